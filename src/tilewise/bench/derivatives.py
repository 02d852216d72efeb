"""JVP and double backward of attention: their cases, and the memory that each direction takes.

Their time is measured as `tilewise.bench.attention` measures every direction. Memory is measured
from the inputs on: a double backward with the forward and the backward that it needs.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tilewise.bench import contenders, textbook
from tilewise.bench.attention import CaseFailed, no_room, verdict
from tilewise.bench.cases import DERIVATIVES, DOOR, JAX, MATH, TILEWISE, Case
from tilewise.bench.problems import Contender, Problem
from tilewise.hardware import memory

__all__ = ["CASES", "MEMORY_CASE", "Figures", "measure_memory"]

CASES = (
    Case("full, N=2048, D=64", 1, 4, 2048, 64, contenders=DERIVATIVES, derivatives=True),
    Case("full, N=2048, D=128", 1, 4, 2048, 128, contenders=DERIVATIVES, derivatives=True),
    Case(
        "causal, N=2048, D=64",
        1,
        4,
        2048,
        64,
        contenders=DERIVATIVES,
        derivatives=True,
        causal=True,
    ),
)
MEMORY_CASE = Case("full, N=16384, H=2, D=64", 1, 2, 16384, 64, derivatives=True)

_DTYPE = "float32"
_CHECKED_ROWS = 128
_CHECKED = ("o", "dq", "to", "tdq")


@dataclass(frozen=True)
class Figures:
    """One contender in one direction; `skipped` says why there is nothing but the names."""

    N: int
    direction: str
    contender: str
    seconds: float | None = None
    extra_bytes: int | None = None
    output_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None


def measure_memory(
    case: Case, *, threads: int = 1, implementation: str | None = None
) -> Iterator[dict[str, Any]]:
    """Measure every direction of float32 attention, each contender in a process of its own.

    Args:
        case: sizes and mask. Where PyTorch does not fit, all are measured at half as many queries
            and keys too, until it does.
        threads: threads of every contender.
        implementation: which of tilewise's implementations, None for its own choice.

    Yields:
        The fields of `Figures`, direction by direction.

    Raises:
        CaseFailed: tilewise failed, or a result is not within the gate of the float64 one.
    """
    names = [TILEWISE] + [DOOR, MATH] * (importlib.util.find_spec("torch") is not None)
    if case.step:
        names = list(case.contenders)
    for direction in (direction for group in case.groups for direction in group):
        size = case
        while True:
            figures = [_measure(size, direction, name, threads, implementation) for name in names]
            yield from map(asdict, figures)
            if size.N == 1 or not any(found.skipped for found in figures):
                break
            size = replace(size, N=size.N // 2)


def _measure(
    case: Case, direction: str, contender: str, threads: int, implementation: str | None
) -> Figures:
    this = Figures(case.N, direction, contender)
    if contender in (MATH, JAX):
        need = contenders.math_bytes(case.B * case.H, case.N, case.keys, 4, direction)
        reason = no_room(need)
        if reason:
            return replace(this, skipped=reason)
    arguments = {
        "case": asdict(case),
        "direction": direction,
        "contender": contender,
        "threads": threads,
        "implementation": implementation,
    }
    try:
        answer = memory.run_fresh(f"{__name__}:measure_contender", arguments, threads=threads)
    except memory.FreshProcessError as error:
        if contender in (MATH, JAX):
            return replace(this, skipped=str(error))
        raise CaseFailed(f"{case.name}, {direction}: {contender}: {error}") from error
    if "wrong" in answer:
        raise CaseFailed(f"{case.name}, {direction}: {answer['wrong']}")
    return replace(this, **answer)


def measure_contender(
    case: dict[str, Any], direction: str, contender: str, threads: int, implementation: str | None
) -> dict[str, Any]:
    """Run a direction once; `measure_memory` calls this in a process of its own."""
    problem = Case(**case).problem(_DTYPE)
    if contender != TILEWISE:
        # At its first derivative PyTorch loads much of itself, which is not the memory of a call.
        # By the reference, so that nothing of the kernels is there before the call.
        token = Case(**{**case, "N": 1}).problem(_DTYPE)
        _make(contender, token, "reference").run(direction)
    chosen = _make(contender, problem, implementation)
    contenders.set_threads(threads)
    start = time.perf_counter()
    results, peak = memory.measure(
        lambda: chosen.run(direction), lambda named: sum(x.nbytes for x in named.values())
    )
    seconds = time.perf_counter() - start
    errors = _errors(problem, results)
    wrong = verdict(contender, errors, _DTYPE)
    if wrong:
        return {"wrong": wrong}
    return {
        "seconds": seconds,
        "extra_bytes": peak.extra,
        "output_bytes": peak.outputs,
        "errors": errors,
    }


def _make(contender: str, problem: Problem, implementation: str | None) -> Contender:
    return contenders.make(contender, problem, implementation, once=True)


def _errors(problem: Problem, results: dict[str, Any]) -> dict[str, float]:
    """Compare the last rows, which are an attention of their own, with float64."""
    rows = slice(-_CHECKED_ROWS, None)
    part = replace(problem, q=problem.q[:, :, rows], do=problem.do[:, :, rows])
    truth = part.truth()._asdict()
    if problem.tangents:
        tq, tk, tv = problem.tangents
        truth |= replace(part, tangents=(tq[:, :, rows], tk, tv)).true_tangents()
    found = (name for name in _CHECKED if name in results)
    return {n: textbook.relative_error(results[n][:, :, rows], truth[n]) for n in found}
