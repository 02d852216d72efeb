"""Operators of rows beside their peers: correctness first, then alternating timings.

A case names an operator and the size of its rows. `OPERATORS` has, for each operator, the makers
of its contenders and the float64 results of some rows, with which every contender is compared.
Every case runs in an interpreter of its own, and so does every measurement of memory.
"""

from __future__ import annotations

import gc
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.bench.attention import CaseFailed, no_room, verdict
from tilewise.bench.cases import PYTORCH, TILEWISE, dtype_of
from tilewise.bench.contenders import set_threads
from tilewise.bench.problems import NotAvailable
from tilewise.bench.textbook import relative_error
from tilewise.hardware import machine, memory

__all__ = ["CASES", "COPY", "OPERATORS", "RowCase", "RowOperator", "report", "run_case", "small"]

Array = NDArray[Any]
Call = Callable[[], Any]
SCIPY = "SciPy"
COPY = "memcpy"

_COMPARED_ROWS = 64
_SPENT_SECONDS = 1.0
_MOST_ROUNDS = 61


@dataclass(frozen=True)
class RowCase:
    """What is timed.

    Attributes:
        name: as the tables call it.
        operator: a name of `OPERATORS`.
        rows: how many rows.
        columns: how many entries each has.
        dtype: "float64", "float32", "bfloat16" or "float16".
        contenders: names of those who take part; times are compared with the first one's.
        memory: whether to measure what each needs beside its inputs and outputs, too.
    """

    name: str
    operator: str
    rows: int
    columns: int
    dtype: str = "float32"
    contenders: tuple[str, ...] = (TILEWISE, PYTORCH, SCIPY, COPY)
    memory: bool = False


@dataclass(frozen=True)
class RowOperator:
    """An operator: contenders by name, how many bytes it moves, and its float64 results.

    Attributes:
        makers: ``x -> call`` for each contender; the call returns what `rows` takes.
        rows: ``(contender, result) -> NumPy array`` with one line for each row.
        truth: ``rows of x in float64 -> their results``.
        writes: whether a result is as large as x.
    """

    makers: dict[str, Callable[[Array], Call]]
    rows: Callable[[str, Any], Array]
    truth: Callable[[Array], Array]
    writes: bool = True


CASES = (
    RowCase("softmax, 4096 x 4096", "softmax", 4096, 4096, memory=True),
    RowCase("softmax, 64 x 1048576", "softmax", 64, 1 << 20),
    RowCase("softmax, 131072 x 128", "softmax", 1 << 17, 128),
    RowCase("softmax, 4096 x 4096, bfloat16", "softmax", 4096, 4096, "bfloat16"),
    RowCase("log_softmax, 4096 x 4096", "log_softmax", 4096, 4096),
    RowCase("logsumexp, 4096 x 4096", "logsumexp", 4096, 4096, memory=True),
)


def small(case: RowCase) -> RowCase:
    """Return the case with rows and columns divided by 32, to see that everything runs."""
    return replace(case, rows=max(2, case.rows // 32), columns=max(3, case.columns // 32))


def _tilewise(name: str) -> Callable[[Array], Call]:
    def make(x: Array) -> Call:
        from tilewise import numpy as door

        function = getattr(door, name)
        if name == "logsumexp":
            return lambda: function(x, axis=-1)
        out = np.zeros_like(x)
        return lambda: function(x, axis=-1, out=out)

    return make


def _pytorch(name: str) -> Callable[[Array], Call]:
    def make(x: Array) -> Call:
        try:
            import torch
        except ImportError as absent:
            raise NotAvailable(str(absent)) from absent
        function = getattr(torch, name)
        t = torch.from_numpy(x.view(np.uint16) if x.dtype.name == "bfloat16" else x)
        t = t.view(torch.bfloat16) if x.dtype.name == "bfloat16" else t
        out = torch.zeros(len(x), dtype=t.dtype) if name == "logsumexp" else torch.zeros_like(t)
        return lambda: function(t, -1, out=out)

    return make


def _scipy(name: str) -> Callable[[Array], Call]:
    def make(x: Array) -> Call:
        if x.dtype.name == "bfloat16":
            raise NotAvailable("no bfloat16")
        try:
            special = importlib.import_module("scipy.special")
        except ImportError as absent:
            raise NotAvailable(str(absent)) from absent
        function = getattr(special, name)
        return lambda: function(x, axis=-1)

    return make


def _copy(x: Array) -> Call:
    to = np.zeros_like(x)
    return lambda: np.copyto(to, x)


def _as_array(contender: str, result: Any) -> Array:
    return np.asarray(result.float() if contender == PYTORCH else result)


def _true(name: str) -> Callable[[Array], Array]:
    def truth(x: Array) -> Array:
        top = x.max(axis=-1, keepdims=True)
        lse = np.log(np.exp(x - top).sum(axis=-1, keepdims=True)) + top
        results: dict[str, Array] = {
            "softmax": np.exp(x - lse),
            "log_softmax": x - lse,
            "logsumexp": lse[:, 0],
        }
        return results[name]

    return truth


def _operator(name: str) -> RowOperator:
    makers = {TILEWISE: _tilewise(name), PYTORCH: _pytorch(name), SCIPY: _scipy(name), COPY: _copy}
    return RowOperator(makers, _as_array, _true(name), name != "logsumexp")


OPERATORS = {name: _operator(name) for name in ("softmax", "log_softmax", "logsumexp")}


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


def _drawn(case: RowCase) -> Array:
    x = np.random.default_rng(0).standard_normal((case.rows, case.columns), np.float32)
    return x.astype(dtype_of(case.dtype), copy=False)


def measure_case(case: dict[str, Any], threads: int, repeats: int) -> dict[str, Any]:
    """Check and time one case here; `run_case` calls this in a process of its own."""
    chosen = RowCase(**case)
    operator, x = OPERATORS[chosen.operator], _drawn(chosen)
    truth = operator.truth(x[:_COMPARED_ROWS].astype(np.float64))
    calls: dict[str, Call] = {}
    errors: dict[str, float | None] = {}
    skipped: dict[str, str] = {}
    for name in chosen.contenders:
        reason = no_room(4 * x.nbytes)
        try:
            if reason:
                raise NotAvailable(reason)
            call = operator.makers[name](x)
            set_threads(threads)
            found = call()
        except NotAvailable as absent:
            skipped[name] = str(absent)
            continue
        calls[name], errors[name] = call, None
        if name != COPY:
            errors[name] = relative_error(operator.rows(name, found)[:_COMPARED_ROWS], truth)
            wrong = verdict(name, {chosen.operator: errors[name] or 0.0}, chosen.dtype)
            if wrong and name == chosen.contenders[0]:
                return {"wrong": wrong}
            if wrong:
                skipped[name] = wrong
                del calls[name]
        del found
    times = _alternate(calls, repeats)
    moved = x.nbytes * (1 + operator.writes)
    return {
        "case": case,
        "threads": [threads],
        "timings": [_timing(name, times, moved, errors[name], x.nbytes) for name in times],
        "skipped": skipped,
    }


def measure_memory(case: dict[str, Any], threads: int, contender: str) -> int:
    """Return the bytes that one contender needs beside its inputs and outputs, in a process."""
    chosen = RowCase(**case)
    call = OPERATORS[chosen.operator].makers[contender](_drawn(chosen))
    set_threads(threads)
    # SciPy alone returns new memory for a result of the size of x.
    new = contender == SCIPY and OPERATORS[chosen.operator].writes
    _, peak = memory.measure(call, lambda result: result.nbytes if new else 0)
    return peak.extra


def _alternate(calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every turn; the first call of each only warms up."""
    turn = sum(_once(call) for call in calls.values())
    rounds = max(repeats, min(_MOST_ROUNDS, int(_SPENT_SECONDS / max(turn, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(_once(call))
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
    name: str, times: dict[str, list[float]], moved: int, error: float | None, copied: int
) -> dict[str, Any]:
    """Return the figures of a contender, medians over the turns.

    `ratio` is its time over the first contender's, `share_of_copy` the rate at which it reads and
    writes over that of the copy.
    """
    own = times[name]
    median = statistics.median(own)
    lower, _, upper = statistics.quantiles(own, n=4) if len(own) > 1 else (median,) * 3
    if name == COPY:
        moved = 2 * copied

    def over(other: str) -> float:
        return statistics.median(a / b for a, b in zip(own, times[other], strict=True))

    return {
        "contender": name,
        "median_s": median,
        "lower_quartile_s": lower,
        "upper_quartile_s": upper,
        "rounds": len(own),
        "gbytes_per_s": moved / median / 1e9,
        "share_of_copy": moved / (2 * copied) / over(COPY) if COPY in times else None,
        "ratio": over(next(iter(times))),
        "error": error,
        "extra_bytes": None,
    }


def report(runs: Sequence[dict[str, Any]], *, threads: int) -> dict[str, Any]:
    """Return all figures with the machine and the versions, as the JSON file holds them."""
    from tilewise import __version__, _core

    versions = machine.versions("numpy", "ml_dtypes", "torch", "scipy")
    return {
        "suite": "softmax",
        "machine": {**machine.describe(), "target": str(_core.target())},
        "versions": {"tilewise": __version__, **versions},
        "threads": [threads],
        "runs": list(runs),
    }
