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
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tilewise.bench import contenders, textbook
from tilewise.bench.contenders import (
    DOOR,
    MATH,
    PACKED,
    PYTORCH,
    TEXTBOOK,
    TILEWISE,
    Contender,
    Problem,
)
from tilewise.hardware import machine, memory

__all__ = ["SUITES", "Case", "CaseFailed", "Timing", "custom_case", "report", "run_case"]

_PRODUCTS = {"forward": 2, "backward": 5, "jvp": 6, "double backward": 15}
_GATE_ROUNDINGS = 64
_SLOW_SECONDS = 0.25
_SLOW_ROUNDS = 3
_SPENT_SECONDS = 1.0
_MOST_ROUNDS = 61
# A library's idle threads may spin for a while; let them sleep before the other one starts.
_PAUSE_SECONDS = 0.02
_FEWEST_QUERIES_THROUGH_TORCH = 512


@dataclass(frozen=True)
class Case:
    """A problem size and its mask; `threads` lists the thread counts, None for the run's own.

    `derivatives` adds the JVP and double backward, beside the one peer that has them.
    """

    name: str
    B: int
    H: int
    N: int
    D: int
    Hk: int | None = None
    Nk: int | None = None
    causal: bool = False
    window: int | None = None
    backward: bool = True
    packed: bool = False
    textbook: bool = True
    threads: tuple[int, ...] | None = None
    derivatives: bool = False

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Directions, those together that take turns with each other."""
        if self.derivatives:
            return ("forward", "jvp"), ("backward", "double backward")
        return (("forward",), ("backward",)) if self.backward else (("forward",),)

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.N if self.Nk is None else self.Nk

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.H if self.Hk is None else self.Hk

    def pairs(self) -> float:
        """Return the visible (query, key) pairs of one head, causal counted as half of all."""
        if self.window is not None:
            position = np.arange(self.N) + self.keys - self.N
            return float(np.minimum(position + 1, self.window + 1).sum())
        return self.N * self.keys * (0.5 if self.causal else 1.0)

    def flop(self, direction: str) -> float:
        """Return the floating-point operations of a direction."""
        return 2.0 * _PRODUCTS[direction] * self.B * self.H * self.pairs() * self.D

    def kv_bytes(self, itemsize: int) -> int:
        """Return the bytes of k and v, which a decode step reads once."""
        return 2 * self.B * self.kv_heads * self.keys * self.D * itemsize

    def problem(self, dtype: str) -> Problem:
        """Return inputs from N(0, 1) with a fixed seed."""
        rng = np.random.default_rng(0)
        kv = (self.B, self.kv_heads, self.keys, self.D)
        query = (self.B, self.H, self.N, self.D)
        shapes = (query, kv, kv, query, *((query, kv, kv) if self.derivatives else ()))
        q, k, v, do, *tangents = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
        return Problem(q, k, v, do, self.causal, self.window, tuple(tangents))


_FULL_64 = Case("full, N=2048, D=64", 1, 4, 2048, 64)
_CAUSAL_64 = Case("causal, N=2048, D=64", 1, 4, 2048, 64, causal=True)
_DECODE = Case(
    "decode, Hq=32, Hk=8, Nk=8192, D=128",
    *(1, 32, 1, 128),
    Hk=8,
    Nk=8192,
    backward=False,
    packed=True,
)
SUITES: dict[str, tuple[Case, ...]] = {
    "quick": (_FULL_64, _CAUSAL_64, _DECODE),
    "full": (
        _FULL_64,
        Case("full, N=2048, D=128", 1, 4, 2048, 128),
        _CAUSAL_64,
        Case("causal, N=512, B=4, H=12, D=64", 4, 12, 512, 64, causal=True),
        Case("causal window 256, N=8192, D=64", 1, 1, 8192, 64, causal=True, window=256),
        _DECODE,
        Case("2 threads and 1, N=2048, D=64", 1, 4, 2048, 64, textbook=False, threads=(1, 2)),
    ),
}


def custom_case(
    N: int,
    *,
    B: int = 1,
    H: int = 4,
    D: int = 64,
    causal: bool = False,
    window: int | None = None,
    derivatives: bool = False,
) -> Case:
    """Return a case of N queries and keys with a name made from its sizes."""
    mask = f"causal window {window}" if window is not None else "causal" if causal else "full"
    return Case(
        f"{mask}, N={N}, B={B}, H={H}, D={D}",
        *(B, H, N, D),
        causal=causal or window is not None,
        window=window,
        textbook=not derivatives,
        derivatives=derivatives,
    )


@dataclass(frozen=True)
class Timing:
    """One contender in one direction.

    `ratio` is its time over tilewise's (above 1: slower), `factor` its time over its own in the
    first direction of the group; both are medians over the turns.
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
    threads: int = 1,
    repeats: int = 9,
    implementation: str | None = None,
) -> dict[str, Any]:
    """Check and time one case in a process of its own.

    Args:
        case: what to run.
        dtype: "float32" or "float64".
        threads: threads of every contender, unless the case lists its own.
        repeats: least number of turns; quick calls get more. The textbook formula gets only
            three where a call takes it more than a quarter of a second.
        implementation: which of tilewise's implementations, None for its own choice.

    Returns:
        `{"timings": [...], "peak_gflops": ..., "skipped": {contender: reason}}`; each timing has
        the fields of `Timing`.

    Raises:
        CaseFailed: the process failed, or a result is not within the gate of the float64 one.
    """
    arguments = {
        "case": asdict(case),
        "dtype": dtype,
        "threads": threads,
        "repeats": repeats,
        "implementation": implementation,
    }
    try:
        answer = memory.run_fresh(
            f"{__name__}:measure_case", arguments, threads=max(case.threads or (threads,))
        )
    except memory.FreshProcessError as error:
        raise CaseFailed(f"{case.name}: {error}") from error
    if "wrong" in answer:
        raise CaseFailed(f"{case.name}: {answer['wrong']}")
    return dict(answer)


def report(runs: Iterable[dict[str, Any]], *, dtype: str, threads: int) -> dict[str, Any]:
    """Return all figures with the machine and the versions, as the JSON file holds them."""
    from tilewise import __version__

    versions = machine.versions("numpy", "torch")
    return {
        "machine": machine.describe(),
        "versions": {"tilewise": __version__, **versions},
        "dtype": dtype,
        "threads": threads,
        "runs": list(runs),
    }


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
    case: dict[str, Any], dtype: str, threads: int, repeats: int, implementation: str | None
) -> dict[str, Any]:
    """Check and time one case here; `run_case` calls this in a process of its own."""
    counts = case.pop("threads")
    chosen = Case(**case, threads=None if counts is None else tuple(counts))
    problem = chosen.problem(dtype)
    found, skipped = _contenders(chosen, problem, implementation)
    truth = problem.truth()._asdict()
    if chosen.derivatives:
        truth |= problem.true_tangents()
    entries = []
    for contender in found:
        for count in chosen.threads or (threads,):
            contenders.set_threads(count)
            errors = _errors(contender, truth, chosen.groups)
            wrong = verdict(contender.name, errors, dtype)
            if wrong:
                return {"wrong": wrong}
            entries.append(_Entry(contender, count, errors))
    del truth
    peak = fma_peak(dtype)
    timings = []
    for group in chosen.groups:
        calls = [(e, d, e.contender.prepare(d)) for d in group for e in entries]
        times = _alternate(calls, repeats)
        fixed = (times, peak, problem.q.itemsize)
        timings += [asdict(_timing(chosen, group[0], d, e, *fixed)) for e, d, _ in calls]
    return {"case": asdict(chosen), "timings": timings, "peak_gflops": peak, "skipped": skipped}


def verdict(name: str, errors: dict[str, float], dtype: str) -> str | None:
    """Return in words what is wrong with a contender, None where its errors pass the gate."""
    if all(error <= _GATE_ROUNDINGS * float(np.finfo(dtype).eps) for error in errors.values()):
        return None
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return f"{name} is wrong: relative errors {shown}"


def fma_peak(dtype: str) -> float | None:
    """Return the measured fused-multiply-add peak of one core in GFLOP/s, None if unknown."""
    try:
        from tilewise import _core
    except ImportError:
        return None
    return float(_core.fma_peak(dtype, 0.2))


def _contenders(
    case: Case, problem: Problem, implementation: str | None
) -> tuple[list[Contender], dict[str, str]]:
    names = [DOOR] if case.derivatives or case.N >= _FEWEST_QUERIES_THROUGH_TORCH else []
    names.append(MATH if case.derivatives else PYTORCH)
    names += [PACKED] * case.packed + [TEXTBOOK] * case.textbook
    sizes = (case.B * case.H, case.N, case.keys, problem.q.itemsize)
    needs = {
        TEXTBOOK: textbook.peak_bytes(*sizes),
        # Both directions of a group are prepared at once.
        MATH: sum(contenders.math_bytes(*sizes, direction) for direction in case.groups[-1]),
    }
    found, skipped = [contenders.tilewise(problem, implementation)], {}
    for name in names:
        reason = no_room(needs.get(name, 0))
        peer = None if reason else contenders.make(name, problem, implementation)
        if peer is None:
            skipped[name] = reason or "PyTorch is not installed"
        else:
            found.append(peer)
    return found, skipped


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
        got = contender.run(direction)
        errors |= {n: textbook.relative_error(got[n], truth[n]) for n in truth if n in got}
    return errors


def _alternate(
    calls: list[tuple[_Entry, str, Callable[[], Any]]], repeats: int
) -> dict[Label, list[float]]:
    """Return the seconds of every turn; the first call of each only warms up."""
    first = {(*entry.label, direction): _once(entry, call) for entry, direction, call in calls}
    times: dict[Label, list[float]] = {label: [] for label in first}
    # Only the baseline may sit out turns: a peer has to be there in each of them.
    slow = {label for label in first if label[0] == TEXTBOOK and first[label] > _SLOW_SECONDS}
    turn = sum(seconds for label, seconds in first.items() if label not in slow)
    turn += sum(_PAUSE_SECONDS for entry, _, _ in calls if entry.threads > 1)
    rounds = max(repeats, min(_MOST_ROUNDS, int(_SPENT_SECONDS / max(turn, 1e-6))))
    gc.disable()
    try:
        for index in range(rounds):
            for entry, direction, call in calls:
                label = (*entry.label, direction)
                if index < _SLOW_ROUNDS or label not in slow:
                    times[label].append(_once(entry, call))
    finally:
        gc.enable()
    return times


def _once(entry: _Entry, call: Callable[[], Any]) -> float:
    contenders.set_threads(entry.threads)
    if entry.threads > 1:
        time.sleep(_PAUSE_SECONDS)
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

    def over(other: Label) -> float:
        return statistics.median(a / b for a, b in zip(own, times[other], strict=False))

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
        share_of_peak=gflops / (peak * entry.threads) if peak else None,
        ratio=over((TILEWISE, entry.threads, direction)),
        factor=over((*entry.label, first)),
        errors=entry.errors,
    )
