"""Operators of rows beside their peers: correctness first, then alternating timings.

`SUITES` has the cases of each command, `OPERATORS` the contenders of each operator and its float64
results, with which every contender is compared. Every case runs in an interpreter of its own, and
so does every measurement of memory.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from numpy.typing import NDArray

from tilewise.bench import losses, softmax
from tilewise.bench.attention import CaseFailed, no_room, verdict
from tilewise.bench.contenders import set_threads
from tilewise.bench.problems import NotAvailable
from tilewise.bench.row_cases import COPY, Call, Inputs, RowCase, RowOperator, small
from tilewise.bench.textbook import relative_error
from tilewise.hardware import machine, memory

__all__ = ["COPY", "OPERATORS", "SUITES", "RowCase", "Suite", "report", "run_case", "small"]

Array = NDArray[Any]

_SPENT_SECONDS = 1.0
_MOST_ROUNDS = 61
# Of the size of the logits in float32: what PyTorch holds, and the float64 results.
_HELD = 4


@dataclass(frozen=True)
class Suite:
    """The cases of a command, and the least number of turns unless another is asked for."""

    cases: tuple[RowCase, ...]
    repeats: int = 9


SUITES = {
    "softmax": Suite(softmax.CASES),
    "cross_entropy": Suite(losses.CROSS_ENTROPY),
    "linear_cross_entropy": Suite(losses.LINEAR, repeats=3),
}
OPERATORS: dict[str, RowOperator] = {**softmax.OPERATORS, **losses.OPERATORS}


def run_case(case: RowCase, *, threads: int = 1, repeats: int = 9) -> dict[str, Any]:
    """Check and time one case in a process of its own, and measure memory where it says so.

    Args:
        case: what to run.
        threads: of every contender.
        repeats: least number of turns; quick calls get more.

    Returns:
        `{"case": ..., "threads": [...], "timings": [...], "skipped": {contender: reason}}`.

    Raises:
        CaseFailed: the process failed, or a result of tilewise is not within the gate.
    """
    given = {"case": asdict(case), "threads": threads}
    try:
        answer = memory.run_fresh(
            f"{__name__}:measure_case", {**given, "repeats": repeats}, threads=threads
        )
        if "wrong" in answer:
            raise CaseFailed(f"{case.name}: {answer['wrong']}")
        for timing in answer["timings"] if case.memory else ():
            arguments = {**given, "contender": timing["contender"]}
            timing["extra_bytes"] = memory.run_fresh(
                f"{__name__}:measure_memory", arguments, threads=threads
            )
    except memory.FreshProcessError as error:
        raise CaseFailed(f"{case.name}: {error}") from error
    return dict(answer)


@dataclass(frozen=True)
class _Entry:
    """A contender that passed, with its relative errors and the seconds of its first call."""

    call: Call
    errors: dict[str, float]
    seconds: float


def measure_case(case: dict[str, Any], threads: int, repeats: int) -> dict[str, Any]:
    """Check and time one case here; `run_case` calls this in a process of its own."""
    chosen = RowCase(**case)
    operator = OPERATORS[chosen.operator]
    inputs = operator.draw(chosen)
    truth = operator.truth(inputs)
    entries: dict[str, _Entry] = {}
    skipped: dict[str, str] = {}
    for name in chosen.contenders:
        try:
            entries[name] = _checked(name, chosen, inputs, truth, threads)
        except NotAvailable as absent:
            if name == chosen.contenders[0]:
                return {"wrong": str(absent)}
            skipped[name] = str(absent)
    times = _alternate(entries, repeats)
    moved = operator.moved(inputs) if operator.moved else None
    copied = 2 * next(iter(inputs.values())).nbytes
    return {
        "case": case,
        "threads": [threads],
        "timings": [
            _timing(name, times, copied if name == COPY else moved, copied, entries[name].errors)
            for name in times
        ],
        "skipped": skipped,
    }


def _checked(
    name: str, case: RowCase, inputs: Inputs, truth: Mapping[str, Array], threads: int
) -> _Entry:
    """Return a contender that has room and whose results are right.

    Raises:
        NotAvailable: it is not; the text says why.
    """
    reason = no_room(_HELD * 4 * case.rows * case.columns)
    if reason:
        raise NotAvailable(reason)
    operator = OPERATORS[case.operator]
    call = operator.makers[name](inputs)
    set_threads(threads)
    start = time.perf_counter()
    found = call()
    seconds = time.perf_counter() - start
    if name == COPY:
        return _Entry(call, {}, seconds)
    got = operator.results(name, found)
    errors = {
        what: relative_error(got[what][: len(true)] if true.ndim else got[what], true)
        for what, true in truth.items()
    }
    wrong = verdict(name, errors, case.dtype)
    own = name == case.contenders[0]
    if wrong or (own and any(errors[what] > gate for what, gate in operator.gates.items())):
        shown = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
        raise NotAvailable(f"{name} is wrong: relative errors {shown}")
    return _Entry(call, errors, seconds)


def measure_memory(case: dict[str, Any], threads: int, contender: str) -> int:
    """Return the bytes that one contender needs beside its inputs and outputs, in a process."""
    chosen = RowCase(**case)
    operator = OPERATORS[chosen.operator]
    make = operator.makers[contender]
    call = make(operator.draw(chosen))
    set_threads(threads)
    # Loads what a first call loads.
    make(operator.draw(replace(chosen, rows=2, columns=3)))()
    _, peak = memory.measure(call, lambda result: operator.created(contender, result))
    return peak.extra


def _alternate(entries: Mapping[str, _Entry], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every turn; the first call of each was made before."""
    turn = sum(entry.seconds for entry in entries.values())
    rounds = max(repeats, min(_MOST_ROUNDS, int(_SPENT_SECONDS / max(turn, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in entries}
    gc.disable()
    try:
        for _ in range(rounds):
            for name, entry in entries.items():
                times[name].append(_once(entry.call))
    finally:
        gc.enable()
    return times


def _once(call: Call) -> float:
    start = time.perf_counter()
    kept = call()
    seconds = time.perf_counter() - start
    del kept
    return seconds


def _timing(
    name: str,
    times: dict[str, list[float]],
    moved: int | None,
    copied: int,
    errors: dict[str, float],
) -> dict[str, Any]:
    """Return the figures of a contender, medians over the turns.

    `ratio` is its time over the first contender's, `share_of_copy` the rate at which it reads and
    writes over that of the copy.
    """
    own = times[name]
    median = statistics.median(own)
    lower, _, upper = statistics.quantiles(own, n=4) if len(own) > 1 else (median,) * 3

    def over(other: str) -> float:
        return statistics.median(a / b for a, b in zip(own, times[other], strict=True))

    share = moved / copied / over(COPY) if moved is not None and COPY in times else None
    return {
        "contender": name,
        "median_s": median,
        "lower_quartile_s": lower,
        "upper_quartile_s": upper,
        "rounds": len(own),
        "gbytes_per_s": None if moved is None else moved / median / 1e9,
        "share_of_copy": share,
        "ratio": over(next(iter(times))),
        "errors": errors,
        "extra_bytes": None,
    }


def report(runs: Sequence[dict[str, Any]], *, suite: str, threads: int) -> dict[str, Any]:
    """Return all figures with the machine and the versions, as the JSON file holds them."""
    from tilewise import __version__, _core

    versions = machine.versions("numpy", "ml_dtypes", "torch", "scipy")
    return {
        "suite": suite,
        "machine": {**machine.describe(), "target": str(_core.target())},
        "versions": {"tilewise": __version__, **versions},
        "threads": [threads],
        "runs": list(runs),
    }
