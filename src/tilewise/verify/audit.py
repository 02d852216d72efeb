"""Runs the cases on what is audited and checks every promise that can be checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.errors import type_error, value_error
from tilewise.ops.attention import spec

from . import metrics
from .cases.attention import CASES, Case, Problem
from .oracle import BACKWARD, Oracle, consult
from .report import FAILED, PASSED, SKIPPED, CaseResult, Check, Report
from .subject import Forward, Function, Skipped, Subject, load, of_function, of_implementation

__all__ = ["Progress", "audit_case", "run"]

Array = NDArray[Any]
Progress = Callable[[int, int, str], None]
"""Called before every case with its number from 0, how many there are, and its name."""

_TAILS = (1, 13)
_THREADS = (1, 2)


def run(
    operator: str | Function = "attention",
    implementation: str | None = None,
    select: str | None = None,
    progress: Progress | None = None,
    *,
    vjp: str | Function | None = None,
    invariant: bool | None = None,
) -> Report:
    """Audit an implementation, or a function of your own.

    Args:
        operator: ``"attention"``; or a function with the signature of
            `tilewise.numpy.attention`, or its name ``"package.module:function"``. Cases whose
            options the function does not take are skipped.
        implementation: Which implementation of the operator; None for the default one.
        select: Only the cases whose name contains this.
        progress: Called before every case with (number, how many, name).
        vjp: The gradients of the own function, with the signature of
            `tilewise.numpy.attention_vjp`, or their name.
        invariant: Whether parts of a problem must have the bits of the whole. By default that is
            asked of this library's fast implementations only.

    Returns:
        The report; `report.passed` is the verdict.

    Raises:
        ValueError: No such operator, implementation, function or case.
        TypeError: Not a function.
    """
    subject = _subject(operator, implementation, vjp)
    if invariant is not None:
        subject = Subject(**{**vars(subject), "invariant": invariant})
    cases = [case for case in CASES if select is None or select in case.name]
    if not cases:
        raise value_error("verify", "select", "be part of a case's name", repr(select))
    results = []
    for number, case in enumerate(cases):
        if progress is not None:
            progress(number, len(cases), case.name)
        results.append(audit_case(case, subject))
    return Report("attention", subject.name, tuple(results))


def _subject(
    operator: str | Function, implementation: str | None, vjp: str | Function | None
) -> Subject:
    if isinstance(operator, str) and ":" in operator:
        operator = load(operator)
    if isinstance(vjp, str):
        vjp = load(vjp)
    if callable(operator):
        if implementation is not None:
            got = repr(implementation)
            raise value_error("verify", "implementation", "be left out for a function", got)
        return of_function(operator, vjp)
    if not isinstance(operator, str):
        raise type_error("verify", "operator", "be a name or a function", type(operator).__name__)
    if operator != "attention":
        requirement = "be 'attention' or package.module:function"
        raise value_error("verify", "operator", requirement, repr(operator))
    if vjp is not None:
        raise value_error("verify", "vjp", "come with a function", f"operator {operator!r}")
    return of_implementation(implementation)


def audit_case(case: Case, subject: Subject) -> CaseResult:
    """Try one case; exceptions of the audited function become failures."""
    start = time.perf_counter()
    checks: list[Check] = []
    try:
        checks.extend(_checks(case, subject))
    except (Skipped, NotImplementedError) as reason:
        checks.append(Check("call", SKIPPED, detail=str(reason)))
    except Exception as error:
        checks.append(Check("call", FAILED, detail=_text(error)))
    return CaseResult(case.name, case.group, tuple(checks), time.perf_counter() - start)


@dataclass(frozen=True)
class _Runs:
    """A problem with what the audited function made of it."""

    problem: Problem
    forward: Forward
    grads: dict[str, Array]

    def results(self) -> dict[str, Array]:
        stats = self.forward.stats
        pair = stats if isinstance(stats, tuple) else ()
        return self.forward.values | self.grads | {f"stats[{i}]": x for i, x in enumerate(pair)}


def _checks(case: Case, subject: Subject) -> Iterator[Check]:
    problem = case.problem()
    a = problem.arrays
    # What the function would not take is skipped before the costly truth is computed.
    subject.check(problem)
    call = spec.prepare(a["q"], a["k"], a["v"], **problem.options)
    oracle = consult(call, _bhnd(case, "do", a["do"]), a.get("dlse"))
    before = {name: x.tobytes() for name, x in a.items()}
    _poison_heap(oracle)
    with np.errstate(all="ignore"):
        forward = subject.forward(problem)
        for name, value in forward.values.items():
            yield _accuracy(case, name, value, oracle)
        grads: dict[str, Array] = {}
        try:
            grads = subject.backward(problem, forward, oracle.truth["lse"].astype(case.dtype))
        except (Skipped, NotImplementedError) as reason:
            yield Check("gradients", SKIPPED, detail=str(reason))
        else:
            yield from _gradients(case, grads, oracle)
        changed = [name for name, x in a.items() if x.tobytes() != before[name]]
        yield _verdict("inputs unchanged", not changed, f"wrote to {', '.join(changed)}")
        runs = _Runs(problem, forward, grads)
        yield _compare("same bits twice", runs.results(), _again(subject, runs).results())
        if subject.invariant:
            yield from _invariance(subject, runs)
        if subject.core is not None:
            yield from _machinery(subject, runs)


def _gradients(case: Case, grads: dict[str, Array], oracle: Oracle) -> Iterator[Check]:
    for name in BACKWARD:
        if name in oracle.truth and name in grads:
            yield _accuracy(case, name, grads[name], oracle)
        elif name in oracle.truth or name in grads:
            problem = "was not returned" if name in oracle.truth else "is of nothing"
            yield Check(name, FAILED, detail=f"{name} {problem}")


def _accuracy(case: Case, name: str, value: Any, oracle: Oracle) -> Check:
    """Check one result's form, its NaN and Inf, and its error."""
    truth = oracle.truth[name]
    if not isinstance(value, np.ndarray):
        return Check(name, FAILED, detail=f"{name} is no array but {type(value).__name__}")
    got = _bhnd(case, name, value)
    if got.shape != truth.shape or got.dtype != case.dtype:
        found = f"{got.dtype} {got.shape}, should be {case.dtype} {truth.shape}"
        return Check(name, FAILED, detail=f"{name} is {found}")
    wrong = oracle.pattern(name, got)
    error, allowed = oracle.error(name, got), oracle.allowed(name)
    detail = ""
    if wrong is not None:
        detail = f"{name}: {wrong}"
    elif not error <= allowed:
        detail = f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    return Check(
        name,
        FAILED if detail else PASSED,
        error=error,
        allowed=allowed,
        # The float64 oracle is no more exact than a float64 computation.
        yardstick=oracle.yardstick(name) if case.dtype == "float32" else None,
        ulp=metrics.max_ulp(got, truth),
        bias=metrics.bias(got, truth),
        detail=detail,
    )


def _again(subject: Subject, runs: _Runs, *, least: bool = False) -> _Runs:
    return _evaluate(subject, runs.problem, bool(runs.grads), least=least)


def _evaluate(subject: Subject, problem: Problem, backward: bool, *, least: bool = False) -> _Runs:
    forward = subject.forward(problem, least=least)
    if not backward:
        return _Runs(problem, forward, {})
    lse = forward.values.get("lse", np.zeros(0))
    return _Runs(problem, forward, subject.backward(problem, forward, lse))


def _invariance(subject: Subject, runs: _Runs) -> Iterator[Check]:
    """Check that parts of the problem have the bits of the whole."""
    case, d, whole = runs.problem.case, runs.problem.dims, runs.results()
    backward = bool(runs.grads)
    less = _again(subject, runs, least=True).results()
    shared = {name: x for name, x in whole.items() if name in less}
    yield _compare("same bits with fewer results", shared, less)
    if d.B > 1:
        b = d.B - 1
        part = _evaluate(subject, runs.problem.entry(b), backward)
        yield _compare("same bits in a batch of one", _of_entry(runs, b), part.results())
    if case.moves:
        for n in sorted({min(n, d.N - 1) for n in _TAILS if d.N > 1}):
            rows = slice(d.N - n, d.N)
            part = _evaluate(subject, runs.problem.part(rows, slice(None)), backward)
            label = "one query" if n == 1 else "the last queries"
            yield _compare(f"same bits for {label}", *_of_rows(runs, part, rows))
    n = max(d.N - d.Nk, 0) + min(d.N, d.Nk) // 2
    if case.causal and 0 < n < d.N:
        rows, keys = slice(0, n), slice(0, n + d.Nk - d.N)
        part = _evaluate(subject, runs.problem.part(rows, keys), backward)
        yield _compare("same bits for the first queries", *_of_rows(runs, part, rows))


def _machinery(subject: Subject, runs: _Runs) -> Iterator[Check]:
    """Check that neither the number of threads nor the instruction set shows in the bits."""
    core = subject.core
    if core is None:
        return
    whole, threads, target = runs.results(), core.num_threads(), core.target()
    try:
        for count in _THREADS:
            if count != threads:
                core.set_num_threads(count)
                other = _again(subject, runs).results()
                yield _compare(f"same bits on {count} threads", whole, other)
        core.set_num_threads(threads)
        for name in core.targets():
            if name != target:
                core.set_target(name)
                yield _compare(f"same bits on {name}", whole, _again(subject, runs).results())
    finally:
        core.set_num_threads(threads)
        core.set_target(target)


def _of_entry(runs: _Runs, b: int) -> dict[str, Array]:
    """Return the results of one batch entry; sums over the batch are left out."""
    part = slice(b, b + 1)
    B = runs.problem.dims.B
    found = {}
    for name, x in runs.results().items():
        if name == "dsinks" or (name == "dbias" and (x.ndim < 4 or x.shape[0] != B)):
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
        if name in ("o", "dq"):
            found[name] = x[(*tensor, rows)]
        elif name not in BACKWARD:
            found[name] = x[row]
    return found, {name: got[name] for name in found if name in got}


def _compare(label: str, want: dict[str, Array], got: dict[str, Array]) -> Check:
    wrong = [
        name
        for name, x in want.items()
        if name not in got or not metrics.same_bits(x, np.asarray(got[name]))
    ]
    return _verdict(label, not wrong, f"other bits in {', '.join(wrong)}")


def _verdict(label: str, passed: bool, detail: str) -> Check:
    return Check(label, PASSED) if passed else Check(label, FAILED, detail=f"{label}: {detail}")


def _bhnd(case: Case, name: str, x: Array) -> Array:
    """Return a tensor in `(B, H, N, D)` order, whatever the layout of the case."""
    swapped = case.layout != "bhnd" and name in ("o", "do", "dq", "dk", "dv") and x.ndim == 4
    return x.swapaxes(1, 2) if swapped else x


def _poison_heap(oracle: Oracle) -> None:
    """Leave NaN in the memory that results are likely to be given, so that gaps show."""
    sizes: Sequence[int] = [x.size for x in oracle.truth.values()]
    held = [np.full(size, np.nan, dtype) for size in sizes for dtype in (np.float32, np.float64)]
    del held


def _text(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"raised {type(error).__name__}: {first[0] if first else ''}".rstrip(": ")
