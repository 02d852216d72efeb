"""The measurements behind `tilewise demo`: real arrays, errors, time and peak extra memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.bench import textbook
from tilewise.bench.captured import Captured
from tilewise.bench.contenders import Contender, Problem, textbook_numpy, tilewise
from tilewise.hardware import memory

__all__ = ["RESULTS", "Figures", "SizeReport", "heads_for", "preflight", "run_size"]

Array = NDArray[Any]

RESULTS = ("o", "lse", "dq", "dk", "dv")
_PAIRS = 1 << 26
_TIMED_SECONDS = 1.0
_TIMED_RUNS = 15


@dataclass(frozen=True)
class Figures:
    """One contender at one size; seconds are the shortest of the runs, bytes come from the system.

    `skipped` says why nothing was measured; then the other figures are absent.
    """

    forward_s: float | None = None
    backward_s: float | None = None
    runs: int = 0
    tokens_per_s: float | None = None
    extra_bytes: int | None = None
    output_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None


@dataclass(frozen=True)
class SizeReport:
    """Both contenders at one length."""

    N: int
    shape: tuple[int, ...]
    dtype: str
    tilewise: Figures
    textbook: Figures
    textbook_estimate_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)


def heads_for(captured: Captured, N: int) -> int:
    """Return how many heads a run at length N uses: all while heads x N x N stays within 2^26."""
    batch, heads = (int(size) for size in captured.q.shape[:2])
    group = heads // int(captured.k.shape[1])
    fitting = _PAIRS // (batch * N * N) // group * group
    return max(group, min(heads, fitting))


def preflight(implementation: str | None) -> None:
    """Run one token through the implementation, so that a wrong name fails before any work."""
    from tilewise.numpy import attention

    one = np.ones((1, 1, 1, 1), np.float32)
    attention(one, one, one, implementation=implementation)


def run_size(
    captured: Captured,
    N: int,
    *,
    implementation: str | None,
    threads: int | None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[SizeReport, dict[str, Array]]:
    """Measure tilewise and the textbook formula at length N and compare both with float64.

    Args:
        captured: the real arrays.
        N: the number of tokens; beyond the captured ones they repeat.
        implementation: which of tilewise's implementations, None for its own choice.
        threads: threads of both contenders, None for their own choice.
        say: told what is being done.

    Returns:
        The report and tilewise's o, lse, dq, dk, dv.

    Raises:
        FreshProcessError: tilewise's own measurement failed.
    """
    q, k, v, do = captured.at(N, heads_for(captured, N))
    B, H = q.shape[:2]
    estimate = textbook.peak_bytes(B * H, N, N, q.itemsize)
    with tempfile.TemporaryDirectory(prefix="tilewise-") as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, q=q, k=k, v=v, do=do)
        say("tilewise: time and memory")
        ours, results = _measure(inputs, "tilewise", threads=threads, implementation=implementation)
        say("textbook NumPy: time and memory")
        theirs, their_results = _measure_textbook(inputs, estimate, threads)
    say("float64 oracle")
    truth = textbook.exact(q, k, v, do)._asdict()
    report = SizeReport(
        N,
        tuple(q.shape),
        str(q.dtype),
        Figures(**ours, errors=_errors(results, truth)),
        Figures(**theirs, errors=_errors(their_results, truth)),
        estimate,
    )
    return report, results


def _errors(got: dict[str, Array], truth: dict[str, Array]) -> dict[str, float]:
    return {name: textbook.relative_error(got[name], truth[name]) for name in got}


def _measure_textbook(
    inputs: Path, estimate: int, threads: int | None
) -> tuple[dict[str, Any], dict[str, Array]]:
    free = memory.available()
    if free is not None and estimate > 0.8 * free:
        return {"skipped": f"needs {estimate} bytes, {free} available"}, {}
    try:
        return _measure(inputs, "textbook", threads=threads)
    except memory.FreshProcessError as error:
        return {"skipped": str(error)}, {}


def _measure(
    inputs: Path, contender: str, *, threads: int | None, implementation: str | None = None
) -> tuple[dict[str, Any], dict[str, Array]]:
    outputs = inputs.with_name(f"{contender}.npz")
    figures = memory.run_fresh(
        f"{__name__}:measure_contender",
        {
            "contender": contender,
            "inputs": str(inputs),
            "outputs": str(outputs),
            "implementation": implementation,
        },
        threads=threads,
    )
    with np.load(outputs, allow_pickle=False) as file:
        return figures, {name: file[name] for name in RESULTS}


def measure_contender(
    contender: str, inputs: str, outputs: str, implementation: str | None
) -> dict[str, Any]:
    """Measure one contender; `run_size` calls this in a process of its own.

    The first forward and backward give the memory, the later ones the time.
    """
    with np.load(inputs, allow_pickle=False) as file:
        problem = Problem(file["q"], file["k"], file["v"], file["do"])
    if contender == "tilewise":
        chosen = tilewise(problem, implementation, lse=True)
    else:
        chosen = textbook_numpy(problem)
    results, peak = memory.measure(
        lambda: chosen.results(chosen.save()),
        lambda named: sum(x.nbytes for x in named.values()),
    )
    kept: dict[str, Any] = {name: results[name] for name in RESULTS}
    np.savez(outputs, **kept)
    del results, kept
    forward_s, backward_s = _time(chosen)
    # The shortest: threads of a BLAS that wait for a busy core make single runs many times longer.
    best = [min(forward_s), min(backward_s)]
    return {
        "forward_s": best[0],
        "backward_s": best[1],
        "runs": len(forward_s),
        "tokens_per_s": problem.q.shape[0] * problem.q.shape[2] / sum(best),
        "extra_bytes": peak.extra,
        "output_bytes": peak.outputs,
    }


def _time(contender: Contender) -> tuple[list[float], list[float]]:
    """Time forward and backward until a second is spent, at least three times each."""
    forward_s: list[float] = []
    backward_s: list[float] = []
    while len(forward_s) < 3 or (
        len(forward_s) < _TIMED_RUNS and sum(forward_s) + sum(backward_s) < _TIMED_SECONDS
    ):
        start = time.perf_counter()
        saved = contender.save()
        middle = time.perf_counter()
        contender.backward(saved)
        end = time.perf_counter()
        forward_s.append(middle - start)
        backward_s.append(end - middle)
    return forward_s, backward_s
