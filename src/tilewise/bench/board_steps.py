"""The steps that run on a GPU board: correct first, then timed beside PyTorch's own kernels."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.bench import board_decode, board_jax
from tilewise.bench.board import OURS, Problem, Step, is_checked
from tilewise.bench.board_oracle import BOUNDS, error, oracle
from tilewise.hardware import machine

__all__ = ["board_or_reason", "check", "run"]

_SWEPT_LENGTH = 4096
_REPEATS, _WARM_UPS, _SECONDS = 50, 3, 0.4
_SANITIZER_SECONDS = 300


def board_or_reason() -> tuple[dict[str, Any] | None, str]:
    """Return what the board is; or None, and why nothing can be measured here."""
    try:
        import torch
    except ImportError:
        return None, "PyTorch is not installed"
    if not torch.cuda.is_available():
        return None, "PyTorch finds no GPU, or was built without CUDA"
    try:
        import triton
    except ImportError:
        return None, "triton is not installed"
    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_gib": round(about.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "host": machine.describe(),
    }, ""


def run(step: Step, results: Mapping[str, Any]) -> Any:
    """Do a step, and return what is written down of it."""
    actions: dict[str, Callable[..., Any]] = {
        "board": lambda: board_or_reason()[0],
        "check": check,
        "decode": lambda **given: board_decode.run(_median, **given),
        "jax": board_jax.run,
        "sanitize": _sanitize,
        "sweep": _sweep,
        "time": lambda **given: _time_all(Problem(**given), results),
    }
    return actions[step.action](**step.arguments)


def check(contender: str, D: int, causal: bool) -> dict[str, Any]:
    """Compare a contender with the float64 oracle on fresh inputs; results begin as NaN.

    Returns:
        The relative error of each result, the passes that are within the bounds, and, of our own,
        whether a second call gave the same bits.

    Raises:
        AssertionError: The forward pass is not within its bound.
    """
    import torch

    shapes = [(2, 4, 4, 389, 389)]
    if contender in OURS:
        shapes.append((2, 4, 2, 257, 389))
    errors: dict[str, float] = {}
    same = True
    with _poisoned():
        for shape in shapes:
            tensors = _fresh(D, *shape)
            found, again = (_results(contender, tensors, causal) for _ in range(2))
            same = same and all(torch.equal(found[name], again[name]) for name in found)
            expected = oracle([_float64(x) for x in tensors], causal)
            for name, tensor in found.items():
                own = error(_float64(tensor), expected[name])
                errors[name] = max(own, errors.get(name, 0.0))
    passes = ["forward"] if errors["o"] <= BOUNDS["forward"] else []
    if "dq" in errors and max(errors[x] for x in ("dq", "dk", "dv")) <= BOUNDS["backward"]:
        passes.append("backward")
    assert "forward" in passes, f"o is off by {errors['o']:.2e}"
    return {"errors": errors, "passes": passes, "same_bits": same if contender in OURS else None}


@contextmanager
def _poisoned() -> Iterator[None]:
    """Let new tensors hold NaN, so that what a kernel does not write is seen."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _fresh(D: int, B: int, H: int, Hk: int, N: int, Nk: int) -> list[Any]:
    """Return new random q, k, v and do."""
    import torch

    shapes = ((B, H, N, D), (B, Hk, Nk, D), (B, Hk, Nk, D), (B, H, N, D))
    made = [torch.randn(shape, device="cuda").to(torch.bfloat16) for shape in shapes]
    return [*(x.requires_grad_() for x in made[:3]), made[3]]


def _results(contender: str, tensors: list[Any], causal: bool) -> dict[str, Any]:
    """Return o, and the gradients where the contender has them."""
    import torch

    from tilewise.base.errors import Unsupported

    *inputs, do = tensors
    with _backend(contender):
        o = _attention(contender, inputs, causal)
        found = {"o": o.detach()}
        try:
            grads = torch.autograd.grad(o, inputs, do)
        except Unsupported:
            return found
    return found | dict(zip(("dq", "dk", "dv"), grads, strict=True))


def _float64(tensor: Any) -> NDArray[np.float64]:
    array: NDArray[np.float64] = tensor.detach().double().cpu().numpy()
    return array


def _attention(contender: str, inputs: Sequence[Any], causal: bool) -> Any:
    import torch

    import tilewise as tw
    import tilewise.torch

    if contender in OURS:
        mask = tw.causal() if causal else None
        return tilewise.torch.attention(*inputs, mask=mask, implementation=contender)
    return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal)


def _backend(contender: str) -> AbstractContextManager[Any]:
    if contender in OURS:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {
        "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    chosen: AbstractContextManager[Any] = sdpa_kernel(kernels[contender])
    return chosen


def _sanitize(tool: str, contender: str, D: int) -> dict[str, Any]:
    """Run one check under compute-sanitizer."""
    command = shutil.which("compute-sanitizer")
    if command is None:
        raise RuntimeError("compute-sanitizer is not on the PATH")
    given = [command, "--tool", tool, "--error-exitcode", "9", sys.executable, sys.argv[0]]
    done = subprocess.run(
        [*given, "--only-check", contender, "--head-dim", str(D)],
        capture_output=True,
        text=True,
        check=False,
        timeout=_SANITIZER_SECONDS,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    if done.returncode != 0:
        raise RuntimeError(f"{tool}: {(lines or [done.stderr[-200:]])[0]}")
    return {"summary": lines[-1] if lines else ""}


def _sweep(kind: str, D: int) -> list[dict[str, Any]]:
    """Time the configurations of a Hopper kernel that compile without spills, fastest first."""
    from tilewise.ops.attention.hopper import plan

    passes = {"forward": ("forward",), "backward": ("keys", "queries")}[kind]
    found = []
    for one in passes:
        for candidate in plan.CANDIDATES[one][D]:
            with plan.configured(one, D, candidate):
                entry = {"kernels": one, **candidate._asdict()}
                try:
                    check("hopper", D, causal=True)
                    problem = Problem(kind, D, _SWEPT_LENGTH, causal=True)
                    entry["ms"] = _milliseconds("hopper", problem)
                except Exception as error:
                    entry["reason"] = f"{type(error).__name__}: {error}"[:200]
                found.append(entry)
    return sorted(found, key=lambda entry: entry.get("ms", float("inf")))


def _time_all(problem: Problem, results: Mapping[str, Any]) -> dict[str, Any]:
    """Time every contender that was right on problems like this one, in the same run."""
    import torch

    from tilewise.bench.board import CONTENDERS

    found: dict[str, Any] = {}
    for contender in CONTENDERS:
        if not is_checked(results, contender, problem):
            found[contender] = {"reason": "it has not agreed with the oracle"}
            continue
        try:
            found[contender] = {"ms": _milliseconds(contender, problem)}
        except Exception as error:
            found[contender] = {"reason": f"{type(error).__name__}: {error}"[:200]}
        torch.cuda.empty_cache()
    return found


def _milliseconds(contender: str, problem: Problem) -> float:
    """Return the median time of a call on the GPU."""
    import torch

    shape = (problem.B, problem.H, problem.H, problem.N, problem.N)
    *inputs, do = _fresh(problem.D, *shape)
    with _backend(contender):
        if problem.kind == "forward":
            inputs = [x.detach() for x in inputs]
            return _median(lambda: _attention(contender, inputs, problem.causal))
        o = _attention(contender, inputs, problem.causal)
        return _median(lambda: torch.autograd.grad(o, inputs, do, retain_graph=True))


def _median(call: Callable[[], Any]) -> float:
    import torch

    for _ in range(_WARM_UPS):
        call()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 5 or (len(times) < _REPEATS and sum(times) < 1e3 * _SECONDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)
