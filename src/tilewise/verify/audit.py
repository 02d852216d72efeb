"""Runs the cases on what is audited and checks every promise that can be checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import FLOATS, is_narrow, listed
from tilewise.base.errors import type_error, value_error

from .blas import one_blas_thread
from .cases.attention import CASES
from .cases.problem import Case, Dims, Problem, dtype_of
from .flat import ENTRIES, run_flat
from .judge import accuracy, compare, poison_heap, text_of, verdict
from .oracle import BACKWARD, SECOND, Oracle, Question, consult
from .report import FAILED, SKIPPED, CaseResult, Check, Report
from .subject import (
    RESULTS,
    Forward,
    Function,
    Known,
    Skipped,
    Subject,
    load,
    of_function,
    of_implementation,
)

__all__ = ["Progress", "audit_case", "run"]

Array = NDArray[Any]
Progress = Callable[[int, int, str], None]
"""Called before every case with its number from 0, how many there are, and its name."""

_TAILS = (1, 13)
_THREADS = (1, 2)
_OF_QUERIES = ("o", "o_full", "dq", "to", "tdq", "one-pass o", "one-pass to")
_SLOW_TARGET = "portable"
_SLOW_WORK = 1_000_000
_OF_PAIRS = ("amx", "amx-emulated", "avx512bf16")
"""The targets that multiply pairs of bfloat16, each with bits of its own."""


def run(
    operator: str | Function = "attention",
    implementation: str | None = None,
    select: str | None = None,
    progress: Progress | None = None,
    *,
    vjp: str | Function | None = None,
    jvp: str | Function | None = None,
    vjp_jvp: str | Function | None = None,
    dtypes: Sequence[str] = (),
    tensors: bool = False,
    invariant: bool | None = None,
) -> Report:
    """Audit an implementation, or a function of your own.

    Args:
        operator: ``"attention"``, ``"softmax"``, ``"log_softmax"``, ``"logsumexp"``,
            ``"cross_entropy"``, ``"linear"`` or ``"linear_cross_entropy"``; or a function with the
            signature of `tilewise.numpy.attention`, or its name ``"package.module:function"``.
            Cases whose options the function does not take are skipped.
        implementation: Which implementation of the operator; None for the default one.
        select: Only the cases whose name contains this.
        progress: Called before every case with (number, how many, name).
        vjp: The gradients of the own function, with the signature of
            `tilewise.numpy.attention_vjp`, or their name.
        jvp: Its tangents, with the signature of `tilewise.numpy.attention_jvp`, or their name.
        vjp_jvp: The tangents of its gradients, with the signature of
            `tilewise.numpy.attention_vjp_jvp`, or their name.
        dtypes: In which dtypes to try every case, "float32", "float64", "bfloat16" or "float16";
            by default each case of attention has its own, float32 or float64, and those of the
            others are tried in all.
        tensors: Whether the own functions take and return PyTorch's tensors. Then the gradients
            are those of autograd unless there is a vjp.
        invariant: Whether parts of a problem must have the bits of the whole. By default that is
            asked of this library's fast implementations only.

    Returns:
        The report; `report.passed` is the verdict.

    Raises:
        ValueError: No such operator, implementation, function or case.
        TypeError: Not a function.
        ImportError: bfloat16 or PyTorch is asked for and not installed.
    """
    derivatives = {"vjp": vjp, "jvp": jvp, "vjp_jvp": vjp_jvp}
    check_dtypes(dtypes)
    if isinstance(operator, str) and operator in ENTRIES:
        _refuse_functions(operator, derivatives, tensors=tensors)
        return run_flat(operator, implementation, select, progress, dtypes)
    subject = _subject(operator, implementation, derivatives, tensors=tensors)
    if invariant is not None:
        subject = replace(subject, invariant=invariant)
    cases = [case for case in CASES if select is None or select in case.name]
    if not cases:
        raise value_error("verify", "select", "be part of a case's name", repr(select))
    results: list[CaseResult] = []
    asked = [(case, dtype) for dtype in dtypes or (None,) for case in cases]
    for number, (case, dtype) in enumerate(asked):
        if progress is not None:
            progress(number, len(asked), case.name)
        results.append(audit_case(case, subject, dtype))
    return Report("attention", subject.name, tuple(results), tuple(dtypes))


def check_dtypes(dtypes: Sequence[str]) -> None:
    """Raise where one of the names is not that of a dtype, or of one that is not installed."""
    if isinstance(dtypes, str):
        raise type_error("verify", "dtypes", "be a sequence of names", repr(dtypes))
    for name in dtypes:
        if name not in FLOATS:
            raise value_error("verify", "dtype", f"be {listed(FLOATS)}", repr(name))
        dtype_of(name)


def _subject(
    operator: str | Function,
    implementation: str | None,
    derivatives: dict[str, str | Function | None],
    *,
    tensors: bool,
) -> Subject:
    if isinstance(operator, str) and ":" in operator:
        operator = load(operator)
    loaded = {
        kind: load(function) if isinstance(function, str) else function
        for kind, function in derivatives.items()
    }
    if callable(operator):
        if implementation is not None:
            got = repr(implementation)
            raise value_error("verify", "implementation", "be left out for a function", got)
        return of_function(operator, **loaded, tensors=tensors)
    if not isinstance(operator, str):
        raise type_error("verify", "operator", "be a name or a function", type(operator).__name__)
    if operator != "attention":
        names = ", ".join(map(repr, ("attention", *ENTRIES)))
        requirement = f"be one of {names}, or package.module:function"
        raise value_error("verify", "operator", requirement, repr(operator))
    _refuse_functions(operator, loaded, tensors=tensors)
    return of_implementation(implementation)


def _refuse_functions(
    operator: str, derivatives: Mapping[str, str | Function | None], *, tensors: bool
) -> None:
    for kind, function in derivatives.items():
        if function is not None:
            raise value_error("verify", kind, "come with a function", f"operator {operator!r}")
    if tensors:
        raise value_error("verify", "tensors", "come with a function", f"operator {operator!r}")


def audit_case(case: Case, subject: Subject, dtype: str | None = None) -> CaseResult:
    """Try one case; exceptions of the audited function become failures.

    Args:
        case: The case.
        subject: What is audited.
        dtype: The dtype to try it in; None for its own.
    """
    start = time.perf_counter()
    checks: list[Check] = []
    asked = case if dtype is None else case.in_dtype(dtype)
    if not subject.takes_dlse:
        asked = replace(asked, cotangents="o")
    try:
        if case.dtype == "float64" != asked.dtype:
            raise Skipped("is a case of float64")
        with one_blas_thread():
            checks.extend(_checks(asked, subject))
    except (Skipped, NotImplementedError) as reason:
        checks.append(Check("call", SKIPPED, detail=str(reason)))
    except Exception as error:
        checks.append(Check("call", FAILED, detail=text_of(error)))
    seconds = time.perf_counter() - start
    return CaseResult(case.name, case.group, tuple(checks), seconds, asked.dtype)


@dataclass(frozen=True)
class _Runs:
    """A problem with what the audited function and its derivatives made of it."""

    problem: Problem
    forward: Forward
    derived: dict[str, dict[str, Array]]

    def results(self) -> dict[str, Array]:
        stats = self.forward.stats
        pair = stats if isinstance(stats, tuple) else ()
        found = self.forward.values | {f"stats[{i}]": x for i, x in enumerate(pair)}
        if self.forward.o_full is not None:
            found["o_full"] = self.forward.o_full
        for results in self.derived.values():
            found = found | results
        return found


def _checks(case: Case, subject: Subject) -> Iterator[Check]:
    problem = case.problem()
    a = problem.arrays
    # What the function would not take is skipped before the costly truth is computed.
    subject.check(problem)
    oracle = consult(Question.of(problem, tangents=subject.has_tangents))
    before = {name: x.tobytes() for name, x in a.items()}
    poison_heap(oracle)
    with np.errstate(all="ignore"):
        runs = _Runs(problem, subject.forward(problem), {})
        for name, value in runs.forward.values.items():
            yield accuracy(case, name, value, oracle)
        lse = oracle.truth["lse"].astype(oracle.dtypes["lse"])
        for kind in subject.kinds:
            known = Known(runs.forward, lse, _outputs(case, runs.derived))
            try:
                runs.derived[kind] = subject.derive(kind, problem, known)
            except (Skipped, NotImplementedError) as reason:
                yield Check(kind, SKIPPED, detail=str(reason))
            else:
                yield from _derived(case, RESULTS[kind], runs.derived[kind], oracle)
        changed = [name for name, x in a.items() if x.tobytes() != before[name]]
        yield verdict("inputs unchanged", not changed, f"wrote to {', '.join(changed)}")
        yield compare("same bits twice", runs.results(), _again(subject, runs).results())
        if subject.invariant:
            yield from _invariance(subject, runs)
        if subject.core is not None:
            yield from _on_threads(subject, subject.core, runs)
            yield from _on_targets(subject, subject.core, runs, oracle)


def _outputs(case: Case, derived: dict[str, dict[str, Array]]) -> dict[str, Array]:
    """Return the tangents of o and lse that the second derivatives are given."""
    # Rounded to 16 bits `to` has too few digits left; what computes it anew has them all.
    return {} if is_narrow(dtype_of(case.dtype)) else derived.get("jvp", {})


def _derived(
    case: Case, names: Sequence[str], found: dict[str, Array], oracle: Oracle
) -> Iterator[Check]:
    for name in names:
        if name in oracle.truth and name in found:
            yield accuracy(case, name, found[name], oracle)
        elif name in oracle.truth or name in found:
            problem = "was not returned" if name in oracle.truth else "is of nothing"
            yield Check(name, FAILED, detail=f"{name} {problem}")


def _again(subject: Subject, runs: _Runs, *, least: bool = False) -> _Runs:
    return _evaluate(subject, runs.problem, runs.derived, least=least)


def _evaluate(
    subject: Subject, problem: Problem, kinds: Collection[str], *, least: bool = False
) -> _Runs:
    """Run the function and some of its derivatives.

    Args:
        subject: What is audited.
        problem: The inputs.
        kinds: The derivatives.
        least: Ask for no statistics in the forward pass, and hand no tangents of o and lse to what
            computes those of the gradients.
    """
    forward = subject.forward(problem, least=least)
    derived: dict[str, dict[str, Array]] = {}
    for kind in kinds:
        lse = forward.values.get("lse", np.zeros(0))
        known = Known(forward, lse, {} if least else _outputs(problem.case, derived))
        derived[kind] = subject.derive(kind, problem, known)
    return _Runs(problem, forward, derived)


def _invariance(subject: Subject, runs: _Runs) -> Iterator[Check]:
    """Check that parts of the problem have the bits of the whole."""
    case, d, whole = runs.problem.case, runs.problem.dims, runs.results()
    if "forward_jvp" in runs.derived and not _multiplies_pairs(subject, runs):
        apart, together = runs.forward.values, runs.derived["forward_jvp"]
        both = {name: x for name, x in apart.items() if f"one-pass {name}" in together}
        once = {name: together[f"one-pass {name}"] for name in both}
        yield compare("same bits in one pass with the tangents", both, once)
    less = _again(subject, runs, least=True).results()
    shared = {name: x for name, x in whole.items() if name in less}
    yield compare("same bits with fewer results", shared, less)
    if d.B > 1:
        # Which pairs are dropped depends on the index in the batch.
        b = 0 if case.dropout else d.B - 1
        part = _evaluate(subject, runs.problem.entry(b), runs.derived)
        yield compare("same bits in a batch of one", _of_entry(runs, b), part.results())
    if case.moves:
        for n in sorted({min(n, d.N - 1) for n in _TAILS if d.N > 1}):
            rows = slice(d.N - n, d.N)
            part = _evaluate(subject, runs.problem.part(rows, slice(None)), runs.derived)
            label = "one query" if n == 1 else "the last queries"
            yield compare(f"same bits for {label}", *_of_rows(runs, part, rows))
    n = max(d.N - d.Nk, 0) + min(d.N, d.Nk) // 2
    if case.causal and 0 < n < d.N:
        rows, keys = slice(0, n), slice(0, n + d.Nk - d.N)
        part = _evaluate(subject, runs.problem.part(rows, keys), runs.derived)
        yield compare("same bits for the first queries", *_of_rows(runs, part, rows))


def _on_threads(subject: Subject, core: Any, runs: _Runs) -> Iterator[Check]:
    """Check that the number of threads does not show in the bits."""
    whole, threads = runs.results(), core.num_threads()
    try:
        for count in _THREADS:
            if count != threads:
                core.set_num_threads(count)
                other = _again(subject, runs).results()
                yield compare(f"same bits on {count} threads", whole, other)
    finally:
        core.set_num_threads(threads)


def _on_targets(subject: Subject, core: Any, runs: _Runs, oracle: Oracle) -> Iterator[Check]:
    """Check that the instruction set does not show in the bits.

    Where it may, for bfloat16, the first target of another kind is checked for its accuracy, and
    those after it for its bits.
    """
    target = core.target()
    small = _small(subject, runs)
    kinds = {_kind(runs, target): (runs, small)}
    try:
        for name in core.targets():
            if name == target:
                continue
            core.set_target(name)
            if (kind := _kind(runs, name)) not in kinds:
                kinds[kind] = again = _again(subject, runs), _again(subject, small)
                yield _accurate(f"as accurate on {name}", again[0], oracle)
                continue
            compared = kinds[kind][1 if name == _SLOW_TARGET else 0]
            other = _again(subject, compared).results()
            yield compare(f"same bits on {name}", compared.results(), other)
    finally:
        core.set_target(target)


def _multiplies_pairs(subject: Subject, runs: _Runs) -> bool:
    """Return whether products of pairs make o, which the pass with tangents never uses."""
    core = subject.core
    return core is not None and _kind(runs, core.target()) in _OF_PAIRS


def _kind(runs: _Runs, target: str) -> str:
    """Return what the targets that must have the same bits have in common."""
    pairs = runs.problem.case.dtype == "bfloat16" and target in _OF_PAIRS
    return target if pairs else "single products"


def _accurate(label: str, runs: _Runs, oracle: Oracle) -> Check:
    """Check the errors of all results at once."""
    case, found = runs.problem.case, runs.results()
    checks = [accuracy(case, name, x, oracle) for name, x in found.items() if name in oracle.truth]
    wrong = [check.detail for check in checks if check.status == FAILED]
    return verdict(label, not wrong, "; ".join(wrong))


def _small(subject: Subject, runs: _Runs) -> _Runs:
    """Return the runs of a part of a problem where the whole would take long without vectors."""
    problem = runs.problem
    if problem.dims.B > 1 and _work(problem.dims) > _SLOW_WORK:
        problem = problem.entry(problem.dims.B - 1)
    for letter, least in (("N", _TAILS[-1]), ("Nk", 64)) if runs.problem.case.moves else ():
        size = getattr(problem.dims, letter)
        kept = max(least, int(size * _SLOW_WORK / max(1, _work(problem.dims))))
        if kept < size:
            tail = slice(size - kept, size) if letter == "N" else slice(None)
            problem = problem.part(tail, slice(0, kept) if letter == "Nk" else slice(None))
    return runs if problem is runs.problem else _evaluate(subject, problem, runs.derived)


def _work(dims: Dims) -> int:
    # Few queries leave most of a vector idle, which is 16 wide.
    return dims.B * dims.H * max(16, dims.N) * dims.Nk * (dims.D + dims.Dv)


def _of_entry(runs: _Runs, b: int) -> dict[str, Array]:
    """Return the results of one batch entry; sums over the batch are left out."""
    part = slice(b, b + 1)
    B = runs.problem.dims.B
    found = {}
    for name, x in runs.results().items():
        if name.endswith("dsinks") or (name.endswith("dbias") and (x.ndim < 4 or x.shape[0] != B)):
            continue
        found[name] = x[part]
    return found


def _of_rows(runs: _Runs, part: _Runs, rows: slice) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return what whole and part say of some queries; sums over queries are left out."""
    axis = 2 if runs.problem.case.layout == "bhnd" else 1
    tensor, row = (slice(None),) * axis, (slice(None), slice(None), rows)
    got = part.results()
    found = {}
    for name, x in runs.results().items():
        if name in _OF_QUERIES:
            found[name] = x[(*tensor, rows)]
        elif name not in BACKWARD and name not in SECOND:
            found[name] = x[row]
    return found, {name: got[name] for name in found if name in got}
