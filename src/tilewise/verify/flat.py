"""The audit of operators of flat arrays: forward, VJP, JVP and the JVP of the VJP in each dtype."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import (
    FLOATS,
    FloatDType,
    compute_dtype,
    is_narrow,
    round_to,
    unit_roundoff,
)
from tilewise.base.errors import value_error
from tilewise.base.operator import KINDS, FlatOperator
from tilewise.dispatch import TABLE, evaluate
from tilewise.ops.cross_entropy.record import FLAT as CROSS_ENTROPY
from tilewise.ops.linear.record import FLAT as LINEAR
from tilewise.ops.linear_cross_entropy.record import FLAT as LINEAR_CROSS_ENTROPY
from tilewise.ops.softmax.record import FLAT as SOFTMAX

from . import metrics, plain
from .blas import one_blas_thread
from .cases import cross_entropy, linear, linear_cross_entropy, softmax
from .cases.problem import dtype_of
from .cases.rows import FlatCase, FlatProblem
from .judge import accuracy, compare, poison_heap, text_of, verdict
from .noise import of_rounding
from .oracle import Oracle, floor_of
from .report import FAILED, SKIPPED, CaseResult, Check, Report
from .tensors import array_of, tensor_of
from .textbook import Along, one_thread

__all__ = ["ENTRIES", "Entry", "audit_flat", "consult_flat", "run_flat"]

Array = NDArray[Any]
Results = dict[str, Array]
Progress = Callable[[int, int, str], None]

# How many errors an estimate of their size is made of, at least, and evaluations it comes from.
_ERRORS, _DRAWS = 20, 5
_NOISE_CAP = 1e-2
_THREADS = (1, 2)


@dataclass(frozen=True)
class Entry:
    """What the audit knows of an operator.

    Attributes:
        operator: Its record.
        cases: Its cases.
        plain: The straightforward computation: ``(other inputs and options, *tensors) -> outputs``.
        narrow: The inputs that have the dtype of the case; the others have that of sums.
        exponents: The inputs that an exponential is taken of.
        own_bits: Whether its compiled implementation promises bits that nothing else shows in.
        pairs: Whether targets with products of bfloat16 pairs have bits of their own.
        off_logits: ``(problem, size, seed)``: puts logits that are no input off by up to a size,
            with inputs that may have more columns.
    """

    operator: FlatOperator
    cases: tuple[FlatCase, ...]
    plain: Callable[..., tuple[Any, ...]]
    narrow: tuple[str, ...]
    exponents: tuple[str, ...] = ()
    own_bits: bool = True
    pairs: bool = False
    off_logits: Callable[[FlatProblem, float, int], FlatProblem] | None = None


def _softmax(name: str, function: Callable[..., Any]) -> Entry:
    return Entry(SOFTMAX[name], softmax.CASES, function, ("x",), ("x", "sink"))


ENTRIES: Mapping[str, Entry] = {
    "softmax": _softmax("softmax", plain.softmax),
    "log_softmax": _softmax("log_softmax", plain.log_softmax),
    "logsumexp": _softmax("logsumexp", plain.logsumexp),
    "cross_entropy": Entry(
        CROSS_ENTROPY,
        cross_entropy.CASES,
        plain.cross_entropy,
        ("logits", "probabilities"),
        ("logits",),
    ),
    "linear": Entry(LINEAR, linear.CASES, plain.linear, ("x", "w", "bias"), own_bits=False),
    "linear_cross_entropy": Entry(
        LINEAR_CROSS_ENTROPY,
        linear_cross_entropy.CASES,
        plain.linear_cross_entropy,
        ("hidden", "weight", "bias"),
        pairs=True,
        off_logits=linear_cross_entropy.with_errors_of_logits,
    ),
}
"""The operators that are audited here, by name."""


def run_flat(
    name: str,
    implementation: str | None = None,
    select: str | None = None,
    progress: Progress | None = None,
    dtypes: Sequence[str] = (),
) -> Report:
    """Audit an implementation of an operator of `ENTRIES`; see `tilewise.verify.run`.

    Without dtypes every case is tried in all that are installed.

    Raises:
        ValueError: No such implementation or case.
        ImportError: PyTorch, which makes the yardstick, is not installed.
    """
    entry, table = ENTRIES[name], TABLE[name]
    if find_spec("torch") is None:
        raise ImportError(f"verify: {name} is compared with PyTorch; pip install 'tilewise[torch]'")
    if implementation is not None and implementation not in table:
        requirement = f"be one of {', '.join(map(repr, table))}"
        raise value_error(name, "implementation", requirement, repr(implementation))
    chosen = [case for case in entry.cases if select is None or select in case.name]
    if not chosen:
        raise value_error("verify", "select", "be part of a case's name", repr(select))
    missing = () if find_spec("ml_dtypes") else ("bfloat16",)
    tried = tuple(dtypes) or tuple([dtype for dtype in FLOATS if dtype not in missing])
    asked = [case.in_dtype(dtype) for dtype in tried for case in chosen]
    results = []
    for number, case in enumerate(asked):
        if progress is not None:
            progress(number, len(asked), case.name)
        results.append(audit_flat(entry, case, implementation))
    subject = implementation or f"{next(iter(table))} (default)"
    return Report(name, subject, tuple(results), tried)


def audit_flat(entry: Entry, case: FlatCase, implementation: str | None = None) -> CaseResult:
    """Try one case in its dtype; exceptions of the implementation become failures."""
    start, checks = time.perf_counter(), list[Check]()
    try:
        with one_blas_thread(), one_thread(), np.errstate(all="ignore"):
            checks.extend(_checks(entry, case, implementation))
    except NotImplementedError as reason:
        checks.append(Check("call", SKIPPED, detail=str(reason)))
    except Exception as error:
        checks.append(Check("call", FAILED, detail=text_of(error)))
    seconds = time.perf_counter() - start
    return CaseResult(case.name, case.group, tuple(checks), seconds, case.dtype)


def _checks(entry: Entry, case: FlatCase, implementation: str | None) -> Iterator[Check]:
    problem = case.problem(entry.operator, entry.narrow)
    oracle = consult_flat(entry, problem)
    before = {name: x.tobytes() for name, x in problem.arrays.items()}
    poison_heap(oracle)
    found = results(problem, implementation)
    for name in oracle.truth:
        if name in found:
            yield accuracy(case, name, found[name], oracle)
        else:
            yield Check(name, FAILED, detail=f"{name} was not returned")
    changed = [name for name, x in problem.arrays.items() if x.tobytes() != before[name]]
    yield verdict("inputs unchanged", not changed, f"wrote to {', '.join(changed)}")
    yield compare("same bits twice", found, results(problem, implementation))
    chosen = implementation or next(iter(TABLE[entry.operator.name]))
    if entry.own_bits and chosen == "cpu":
        targets = not (entry.pairs and case.dtype == "bfloat16")
        yield from _same_bits(problem, found, implementation, targets)


def results(
    problem: FlatProblem,
    implementation: str | None,
    saved: Callable[[str, Array], Array] | None = None,
) -> Results:
    """Return everything that an implementation makes of a problem, by name.

    Its derivatives are given what its own forward pass saved, changed if there is a function for
    that.
    """
    operator, known = problem.operator, Results()
    options = {**problem.case.options, "implementation": implementation}
    found = Results()
    for kind in KINDS:
        names = result_names(operator, kind)
        needed = tuple([_is_needed(problem, name) for name in names])
        out = evaluate(operator, kind, problem.given(kind, known), options, needed)
        named = {n: x for n, x in zip(names, out, strict=True) if x is not None}
        if kind == "forward":
            known = {n: x if saved is None else saved(n, x) for n, x in named.items()}
            # What the backward makes of the gradients that are kept is what counts.
            named = {n: x for n, x in named.items() if n not in kept_gradients(operator)}
        found |= {n: x for n, x in named.items() if _is_needed(problem, n)}
    return found


def kept_gradients(operator: FlatOperator) -> tuple[str, ...]:
    """Return the names of the gradients that a forward pass may keep for the backward."""
    return operator.residuals[len(operator.residuals) - operator.kept_gradients :]


def result_names(operator: FlatOperator, kind: str) -> tuple[str, ...]:
    """Return what the results of a function are called: y, dx, ty, tdx and so on."""
    if kind == "forward":
        return (*operator.outputs, *operator.residuals)
    if kind == "jvp":
        return tuple([f"t{name}" for name in operator.outputs[: operator.active_outputs]])
    prefix = "d" if kind == "vjp" else "td"
    return tuple([f"{prefix}{name}" for name in operator.inputs[: operator.active_inputs]])


def consult_flat(entry: Entry, problem: FlatProblem) -> Oracle:
    """Return the truth about a problem, and how far results may be from it."""
    operator, stored = problem.operator, dtype_of(problem.case.dtype)
    wide, exact = compute_dtype(stored), problem.mapped(_exactly)
    residuals = set(operator.residuals) - set(kept_gradients(operator))
    passive = operator.outputs[operator.active_outputs :]
    truth = {
        n: x
        for n, x in results(exact, "reference").items()
        if n not in residuals and n not in passive
    }
    straight = _straightforward(entry, problem.mapped(lambda n, x: _in_dtype(x, wide)))
    # In float64 one rounding would not show: many are taken, and their effect is divided.
    times = 2.0**16 if stored == np.float64 else 1.0
    # Of 20 errors the root mean square is sure to a sixth, of 5 to a third.
    fewest = min([x.size for x in truth.values() if x.size], default=_ERRORS)
    draws = max(_DRAWS, -(-_ERRORS // fewest))
    moved = _moved(entry, exact, times * unit_roundoff(wide), draws)
    dtypes = {name: _dtype(problem, name, stored, wide) for name in truth}
    plain, noise, vague = {}, {}, set()
    for name, value in truth.items():
        plain[name] = _error(round_to(straight[name], dtypes[name]), value, name)
        # Two standard deviations: the errors of single numbers are luck.
        columns = tuple([slice(n) for n in value.shape])
        errors = [_error(other[name][columns], value, name) / times for other in moved]
        size = 2 * math.sqrt(sum([error**2 for error in errors]) / draws)
        if size > _NOISE_CAP:
            vague.add(name)
        lost = _lost(value, dtypes[name])
        noise[name] = float(np.hypot(min(size, _NOISE_CAP), _error(value + lost, value, name)))
    unit = unit_roundoff(wide)
    if stored == np.float64:
        # The oracle rounds as well, in sums of sums of as many terms as a dimension has.
        unit *= 1 + 2 * math.sqrt(max([max(x.shape, default=1) for x in problem.arrays.values()]))
    return Oracle(truth, plain, noise, unit, dtypes, dtypes, frozenset(vague))


def _error(got: Array, truth: Array, name: str) -> float:
    """Return the error of a result, or 0 where it breaks down: that is no yardstick."""
    error = metrics.relative_error(got, truth, floor=floor_of(name))
    return error if np.isfinite(error) else 0.0


def _lost(truth: Array, dtype: FloatDType) -> Array:
    """Return what the rounding to 16 bits takes from a result, or what is too small to be kept."""
    if is_narrow(dtype):
        return of_rounding(truth, dtype)
    return np.where(np.abs(truth) < 2 * float(np.finfo(dtype).tiny), -truth, 0.0)


def _straightforward(entry: Entry, problem: FlatProblem) -> Results:
    """Return what PyTorch makes of the problem in the dtype of its sums."""
    import torch

    operator, a = problem.operator, problem.arrays
    active = operator.inputs[: operator.active_inputs]
    given = [name for name in active if name in a]
    others = {n: x for n, x in a.items() if n in operator.inputs and n not in active}
    options = {**others, **problem.case.options}

    def function(*tensors: Any) -> tuple[Any, ...]:
        named = dict(zip(given, tensors, strict=True))
        return entry.plain(options, *[named.get(name) for name in active])

    x = tuple([tensor_of(a[name]) for name in given])
    y = function(*x)

    def like(prefix: str, names: Sequence[str], tensors: Sequence[Any]) -> tuple[Any, ...]:
        pairs = zip([f"{prefix}_{name}" for name in names], tensors, strict=False)
        return tuple([tensor_of(a[n]) if n in a else torch.zeros_like(t) for n, t in pairs])

    c, tc = like("d", operator.outputs, y), like("td", operator.outputs, y)
    along = Along(function, x, c, like("t", given, x), tc, ((), ()))
    found = dict(zip(operator.outputs, y, strict=False))
    found |= dict(zip([f"d{name}" for name in given], along.gradients(x, c), strict=True))
    found |= dict(zip([f"t{name}" for name in operator.outputs], along.jvp(), strict=False))
    found |= dict(zip([f"td{name}" for name in given], along.jvp_of_vjp(), strict=True))
    return {name: array_of(t) for name, t in found.items()}


def _moved(entry: Entry, exact: FlatProblem, unit: float, draws: int) -> list[Results]:
    """Return exact results at inputs that rounding could not tell from the true ones.

    Each number is off by up to two roundings, its own and that of what is done with it first; of
    logits, that is their distance from the largest of the row. An exponential of two units in the
    last place is off by up to four: so are the arguments of exponentials, and the row statistics
    that derivatives read, of which probabilities are made.
    """
    scale = exact.case.options.get("temperature", 1.0)

    def of(seed: int) -> Results:
        rng = np.random.default_rng(seed)

        def off(x: Array, relative: Array | float, absolute: float) -> Array:
            near, far = (unit * rng.uniform(-1, 1, x.shape) for _ in range(2))
            return np.where(np.isfinite(x), x + (relative * near + absolute * far), x)

        def move(name: str, x: Array) -> Array:
            if name in entry.exponents:
                return off(x, 2 * _distance(name, exact), 4 * scale)
            return off(x, 2 * x, 0) if x.dtype.kind == "f" else x

        def saved(name: str, x: Array) -> Array:
            kept = kept_gradients(exact.operator)
            return off(x, 0, 4) if name in exact.operator.residuals and name not in kept else x

        moved = exact.mapped(move)
        if entry.off_logits is not None:
            moved = entry.off_logits(moved, 4 * unit, seed)
        return results(moved, "reference", saved)

    return [of(seed) for seed in range(draws)]


def _distance(name: str, exact: FlatProblem) -> Array | float:
    """Return what the first operation on finite logits `(A, C, I)` rounds relative to.

    That is the distance from the largest of the row, with its sink; with a soft cap, themselves.
    """
    x, options = exact.arrays[name], exact.case.options
    if options.get("softcap") is not None:
        return x
    if x.ndim != 3 or not x.size:
        return 0.0
    top = np.where(np.isfinite(x), x, -np.inf).max(axis=1, keepdims=True)
    if "sink" in exact.arrays:
        top = np.maximum(top, exact.arrays["sink"][:, None] * options["temperature"])
    return np.where(np.isfinite(x), top - x, 0.0)


def _same_bits(
    problem: FlatProblem, found: Results, implementation: str | None, targets: bool
) -> Iterator[Check]:
    """Check that neither threads, nor targets, nor what else is in the batch show in the bits."""
    core: Any = import_module("tilewise._core")
    threads, target = core.num_threads(), core.target()
    try:
        for count in _THREADS:
            core.set_num_threads(count)
            yield compare(f"same bits on {count} threads", found, results(problem, implementation))
        core.set_num_threads(threads)
        for name in core.targets() if targets else ():
            core.set_target(name)
            yield compare(f"same bits on {name}", found, results(problem, implementation))
    finally:
        core.set_num_threads(threads)
        core.set_target(target)
    operator, a = problem.operator, problem.arrays
    inputs = problem.given("forward", {})
    count = len(a[operator.inputs[0]])
    if count > 1 and operator.folds("forward", inputs, problem.case.options):
        alone = results(problem.mapped(lambda n, x: x[-1:]), implementation)
        whole = {name: x[-1:] for name, x in found.items()}
        yield compare("same bits alone in the batch", whole, alone)


def _is_needed(problem: FlatProblem, name: str) -> bool:
    """Return whether a result is asked for: no gradient of an input that is not there."""
    for prefix in ("td", "d"):
        of = name.removeprefix(prefix)
        if of != name and of in problem.operator.inputs:
            return of in problem.arrays
    return True


def _dtype(problem: FlatProblem, name: str, stored: FloatDType, wide: FloatDType) -> FloatDType:
    """Return the dtype that a result must have."""
    operator = problem.operator
    for prefix in ("td", "d"):
        of = name.removeprefix(prefix)
        if of != name and of in operator.inputs:
            dtype: FloatDType = problem.arrays[of].dtype
            return dtype
    of = name if name in operator.outputs else name.removeprefix("t")
    return stored if of in operator.outputs[: operator.narrow_outputs] else wide


def _exactly(name: str, x: Array) -> Array:
    return _in_dtype(x, np.dtype(np.float64))


def _in_dtype(x: Array, dtype: FloatDType) -> Array:
    return x if x.dtype.kind in "bi" else x.astype(dtype)
