"""Attention beside its peers: correctness first, then alternating timings in one process.

Every case runs in an interpreter of its own, so that each library reads the number of threads
when it loads. Contenders take turns (A B C, A B C, ...), so that a busy machine slows all alike;
the speed ratio is the median of the ratios within each turn.

Floating-point operations: forward `2 pairs (D + Dv)` per head, where `pairs` is the number of
visible (query, key) pairs, `N Nk / 2` for causal. The others in multiples of these two products:
backward 5, forward with its JVP in one pass 6, double backward 15 (the JVP 5, its VJP 10).
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tilewise.base.dtypes import is_narrow, unit_roundoff
from tilewise.bench import contenders, textbook
from tilewise.bench.cases import JAX, MATH, PADDED, READ, TEXTBOOK, Case, dtype_of
from tilewise.bench.problems import Contender, NotAvailable, Problem
from tilewise.hardware import machine, memory

__all__ = ["Case", "CaseFailed", "Timing", "no_room", "report", "run_case", "verdict"]

_GATE_ROUNDINGS = 64
# 16 bits hold little beside the error of rounding the results themselves.
_GATE_ROUNDINGS_OF_16_BITS = 2
_SLOW_SECONDS = 0.25
_VERY_SLOW_SECONDS = 5.0
_SLOW_ROUNDS = 3
_QUICK_SECONDS = 0.01
_SPENT_SECONDS = 1.0
_MOST_ROUNDS = 61
# A library's idle threads may spin for a while; let them sleep before the other one starts.
_PAUSE_SECONDS = 0.02


@dataclass(frozen=True)
class Timing:
    """One contender in one direction.

    `ratio` is its time over that of the case's first contender (above 1: slower), `factor` its
    time over its own in the first direction of the group, `share_of_read` the time of a plain
    read of keys and values over its own; all are medians over the turns.
    """

    case: str
    direction: str
    contender: str
    threads: int
    median_s: float
    lower_quartile_s: float
    upper_quartile_s: float
    rounds: int
    gflops: float
    kv_gbytes_per_s: float | None
    share_of_read: float | None
    share_of_peak: float | None
    ratio: float
    factor: float
    errors: dict[str, float]


class CaseFailed(RuntimeError):
    """A case that gave no figures; the text says why."""


def run_case(
    case: Case,
    *,
    dtype: str = "float32",
    threads: Sequence[int] = (1,),
    repeats: int = 9,
    implementation: str | None = None,
    peers: Sequence[str] = (),
) -> dict[str, Any]:
    """Check and time one case in a process of its own.

    Args:
        case: what to run.
        dtype: "float64", "float32", "bfloat16" or "float16".
        threads: thread counts of every contender, unless the case lists its own.
        repeats: least number of turns; quick calls get more. The textbook formula and a padded
            batch get only three where a call takes them more than a quarter of a second, another
            peer where it takes more than five.
        implementation: which of tilewise's implementations, None for its own choice.
        peers: parts of the names of those that take part beside the first; all where empty.

    Returns:
        `{"case": ..., "dtype": ..., "threads": [...], "timings": [...], "peak_gflops": ...,
        "skipped": {contender: reason}}`; each timing has the fields of `Timing`.

    Raises:
        CaseFailed: the process failed, or a result of tilewise is not within the gate of the
            float64 one.
    """
    arguments = {
        "case": asdict(case),
        "dtype": dtype,
        "threads": list(case.threads or threads),
        "repeats": repeats,
        "implementation": implementation,
        "peers": list(peers),
    }
    try:
        answer = memory.run_fresh(
            f"{__name__}:measure_case", arguments, threads=max(case.threads or threads)
        )
    except memory.FreshProcessError as error:
        raise CaseFailed(f"{case.name}, {dtype}: {error}") from error
    if "wrong" in answer:
        raise CaseFailed(f"{case.name}, {dtype}: {answer['wrong']}")
    return dict(answer)


def report(
    runs: Iterable[dict[str, Any]], *, dtypes: Sequence[str], threads: Sequence[int]
) -> dict[str, Any]:
    """Return all figures with the machine and the versions, as the JSON file holds them."""
    from tilewise import __version__

    versions = machine.versions("numpy", "ml_dtypes", "torch", "onnxruntime", "jax")
    return {
        "machine": {**machine.describe(), "target": _target()},
        "versions": {"tilewise": __version__, **versions},
        "dtype": ", ".join(dtypes),
        "threads": list(threads),
        "runs": list(runs),
    }


def _target() -> str | None:
    try:
        from tilewise import _core
    except ImportError:
        return None
    return str(_core.target())


@dataclass(frozen=True)
class _Entry:
    """A contender at a number of threads, with the errors that the gate found."""

    contender: Contender
    threads: int
    errors: dict[str, float]

    @property
    def label(self) -> tuple[str, int]:
        return self.contender.name, self.threads


Label = tuple[str, int, str]
"""Contender, threads, direction."""


def measure_case(
    case: dict[str, Any],
    dtype: str,
    threads: list[int],
    repeats: int,
    implementation: str | None,
    peers: Sequence[str] = (),
) -> dict[str, Any]:
    """Check and time one case here; `run_case` calls this in a process of its own."""
    chosen = Case(**case)
    problem = chosen.problem(dtype)
    found, skipped = _contenders(chosen, problem, implementation, peers)
    truth = _truth(chosen, problem.compared())
    entries: list[_Entry] = []
    for contender in found:
        try:
            entries += _checked(contender, truth, chosen, dtype, threads)
        except _Wrong as wrong:
            if _is_own(contender.name) or contender is found[0]:
                return {"wrong": str(wrong)}
            skipped[contender.name] = str(wrong)
        except Exception as error:
            if _is_own(contender.name):
                raise
            skipped[contender.name] = _first_line(error)
    del truth
    peak = fma_peak(dtype)
    timings = []
    for group in chosen.groups:
        calls = [
            (e, d, e.contender.prepare(d, training=chosen.training))
            for d in group
            for e in entries
            if e.contender.offers(d)
        ]
        times = _alternate(calls, repeats)
        fixed = (times, peak, problem.q.itemsize)
        timings += [asdict(_timing(chosen, group[0], d, e, *fixed)) for e, d, _ in calls]
    return {
        "case": asdict(chosen),
        "dtype": dtype,
        "threads": threads,
        "timings": timings,
        "peak_gflops": peak,
        "skipped": skipped,
    }


class _Wrong(Exception):
    """A result is not within the gate of the float64 one."""


def _is_own(name: str) -> bool:
    return name.startswith("tilewise")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _truth(case: Case, problem: Problem) -> dict[str, Any]:
    truth = problem.truth()._asdict()
    return truth | problem.true_tangents() if case.derivatives else truth


def _checked(
    contender: Contender,
    truth: dict[str, Any],
    case: Case,
    dtype: str,
    threads: Sequence[int],
) -> list[_Entry]:
    """Return a contender at every number of threads, each compared with the truth."""
    entries = []
    for count in threads:
        contenders.set_threads(count)
        errors = _errors(contender, truth, case.groups)
        wrong = verdict(contender.name, errors, dtype)
        if wrong:
            raise _Wrong(wrong)
        entries.append(_Entry(contender, count, errors))
    return entries


def verdict(name: str, errors: dict[str, float], dtype: str) -> str | None:
    """Return in words what is wrong with a contender, None where its errors pass the gate."""
    kind = dtype_of(dtype)
    roundings = _GATE_ROUNDINGS_OF_16_BITS if is_narrow(kind) else _GATE_ROUNDINGS
    if all(error <= 2 * roundings * unit_roundoff(kind) for error in errors.values()):
        return None
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return f"{name} is wrong: relative errors {shown}"


def fma_peak(dtype: str) -> float | None:
    """Return the measured fused-multiply-add peak of one core in GFLOP/s, None if unknown.

    For 16 bits it is that of float32, in which their sums are.
    """
    try:
        from tilewise import _core
    except ImportError:
        return None
    return float(_core.fma_peak("float64" if dtype == "float64" else "float32", 0.2))


def _contenders(
    case: Case, problem: Problem, implementation: str | None, peers: Sequence[str]
) -> tuple[list[Contender], dict[str, str]]:
    first, *others = case.contenders
    if peers:
        others = [
            name
            for name in others
            if name == READ or any(part.lower() in name.lower() for part in peers)
        ]
    found, skipped = [contenders.make(first, problem, implementation)], {}
    for name in others:
        reason = no_room(_needs(name, case, problem.q.itemsize))
        if reason:
            skipped[name] = reason
            continue
        try:
            found.append(contenders.make(name, problem, implementation))
        except NotAvailable as absent:
            skipped[name] = str(absent)
    return found, skipped


def _needs(name: str, case: Case, itemsize: int) -> int:
    """Return the bytes that a contender with whole matrices holds at its peak."""
    sizes = (case.B * case.H, case.N, case.keys, itemsize)
    if name == TEXTBOOK:
        return textbook.peak_bytes(*sizes)
    if name in (MATH, JAX):
        # Both directions of a group are prepared at once.
        return sum(contenders.math_bytes(*sizes, direction) for direction in case.groups[-1])
    if name == PADDED:
        # Its mask as booleans and as numbers.
        return int((1 + itemsize) * len(case.documents) * max(case.documents) ** 2)
    return 0


def no_room(need: int) -> str | None:
    """Return in words that `need` is more than 80 % of the memory available, or None."""
    free = memory.available()
    if free is None or need <= 0.8 * free:
        return None
    return f"needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} available"


def _errors(
    contender: Contender, truth: dict[str, Any], groups: tuple[tuple[str, ...], ...]
) -> dict[str, float]:
    errors: dict[str, float] = {}
    for direction in (direction for group in groups for direction in group):
        if not contender.offers(direction):
            continue
        got = contender.run(direction)
        for name in (name for name in truth if name in got):
            # The truth has the first heads alone where there are many.
            part = got[name][:, : truth[name].shape[1]]
            errors[name] = textbook.relative_error(part, truth[name])
    return errors


def _alternate(
    calls: list[tuple[_Entry, str, Callable[[], Any]]], repeats: int
) -> dict[Label, list[float]]:
    """Return the seconds of every turn; the first call of each only warms up."""
    first = {(*entry.label, direction): _once(entry, call) for entry, direction, call in calls}
    times: dict[Label, list[float]] = {label: [] for label in first}
    # Only a baseline may sit out turns, and a peer that would take minutes.
    slow = {label for label, seconds in first.items() if seconds > _patience(label[0])}
    turn = sum(seconds for label, seconds in first.items() if label not in slow)
    rounds = max(repeats, min(_MOST_ROUNDS, int(_SPENT_SECONDS / max(turn, 1e-6))))
    gc.disable()
    try:
        for index in range(rounds):
            for entry, direction, call in calls:
                label = (*entry.label, direction)
                if index < _SLOW_ROUNDS or label not in slow:
                    times[label].append(_once(entry, call, quick=first[label] < _QUICK_SECONDS))
    finally:
        gc.enable()
    return times


def _patience(name: str) -> float:
    """Return the seconds of a call beyond which a contender gets few turns."""
    if name in (TEXTBOOK, PADDED):
        return _SLOW_SECONDS
    return math.inf if _is_own(name) else _VERY_SLOW_SECONDS


def _once(entry: _Entry, call: Callable[[], Any], *, quick: bool = False) -> float:
    contenders.set_threads(entry.threads)
    if entry.threads > 1:
        time.sleep(_PAUSE_SECONDS)
    if quick:
        # Wakes the threads, which take as long as such a call.
        call()
    start = time.perf_counter()
    kept = call()
    seconds = time.perf_counter() - start
    del kept
    return seconds


def _timing(
    case: Case,
    first: str,
    direction: str,
    entry: _Entry,
    times: dict[Label, list[float]],
    peak: float | None,
    itemsize: int,
) -> Timing:
    own = times[*entry.label, direction]
    median = statistics.median(own)
    lower, _, upper = statistics.quantiles(own, n=4) if len(own) > 1 else (median,) * 3
    gflops = case.flop(direction) / median / 1e9
    decode = case.N == 1 and direction == "forward"
    first_one = next(name for name, *_ in times)
    reading = (READ, entry.threads, direction)

    def over(name: str, threads: int, then: str) -> float:
        others = times[name, threads, then]
        return statistics.median(a / b for a, b in zip(own, others, strict=False))

    return Timing(
        case=case.name,
        direction=direction,
        contender=entry.contender.name,
        threads=entry.threads,
        median_s=median,
        lower_quartile_s=lower,
        upper_quartile_s=upper,
        rounds=len(own),
        gflops=gflops,
        kv_gbytes_per_s=case.kv_bytes(itemsize) / median / 1e9 if decode else None,
        share_of_read=1 / over(*reading) if reading in times else None,
        share_of_peak=gflops / (peak * entry.threads) if peak else None,
        ratio=over(first_one, entry.threads, direction),
        factor=over(*entry.label, first),
        errors=entry.errors,
    )
