"""The steps of a GPU board in JAX: correct first, then timed beside JAX's own attention."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tilewise.bench.board import PASSES, Problem
from tilewise.bench.board_oracle import BOUNDS, error, oracle

__all__ = ["CONTENDERS", "check", "missing", "run"]

OURS: Final = "tilewise.jax"
CONTENDERS: Final = (OURS, "jax.nn cudnn", "jax.nn xla")
_SHAPE: Final = (2, 389, 4)
_LENGTH, _CALLS, _TURNS = 4096, 10, 5


def missing() -> str | None:
    """Return why JAX has no GPU here, or None where it has one."""
    # PyTorch's tensors are on the board, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import jax
    except ImportError:
        return "JAX is not installed"
    try:
        jax.devices("cuda")
    except RuntimeError:
        return "JAX finds no GPU of NVIDIA, or was installed without CUDA"
    return None


def run(D: int, causal: bool) -> dict[str, Any]:
    """Check every contender, and time the passes of those that are right.

    Returns:
        The version of JAX, and of each contender its errors and times in milliseconds, or why
        there are none. "backward" is a forward pass and its gradients in one program.

    Raises:
        RuntimeError: JAX has no GPU here.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason)
    import jax

    found: dict[str, Any] = {"jax": jax.__version__}
    for contender in CONTENDERS:
        try:
            found[contender] = check(contender, D, causal)
            passes = found[contender]["passes"]
            found[contender]["ms"] = {k: _milliseconds(contender, D, causal, k) for k in passes}
        except Exception as error:
            found[contender] = {"reason": f"{type(error).__name__}: {error}"[:200]}
    return found


def check(contender: str, D: int, causal: bool) -> dict[str, Any]:
    """Compare a contender with the float64 oracle on fresh inputs.

    Returns:
        The relative error of each result, and the passes that are within the bounds.

    Raises:
        AssertionError: The forward pass is not within its bound.
    """
    B, N, H = _SHAPE
    inputs = _fresh(B, N, H, D)
    names, results = ("o", "dq", "dk", "dv"), _program("backward", contender, causal)(*inputs)
    expected = oracle([_float64(x) for x in inputs], causal)
    pairs = zip(names, results, strict=True)
    errors = {name: error(_float64(result), expected[name]) for name, result in pairs}
    assert errors["o"] <= BOUNDS["forward"], f"o is off by {errors['o']:.2e}"
    backward = max(errors[name] for name in ("dq", "dk", "dv")) <= BOUNDS["backward"]
    return {"errors": errors, "passes": list(PASSES[: 1 + backward])}


def _attend(contender: str, causal: bool) -> Callable[..., Any]:
    """Return attention on arrays `(B, N, H, D)`."""
    import jax

    import tilewise as tw
    import tilewise.jax

    if contender == OURS:
        mask = tw.causal() if causal else None
        return lambda q, k, v: tilewise.jax.attention(q, k, v, mask=mask, layout="bnhd")
    by = contender.rpartition(" ")[2]
    own = jax.nn.dot_product_attention
    return lambda q, k, v: own(q, k, v, is_causal=causal, implementation=by)


def _program(kind: str, contender: str, causal: bool) -> Callable[..., Any]:
    import jax

    attend = _attend(contender, causal)
    if kind == "forward":
        return jax.jit(lambda q, k, v, do: attend(q, k, v))  # type: ignore[no-any-return]

    def step(q: Any, k: Any, v: Any, do: Any) -> tuple[Any, ...]:
        o, back = jax.vjp(attend, q, k, v)
        return (o, *back(do))

    return jax.jit(step)  # type: ignore[no-any-return]


def _fresh(B: int, N: int, H: int, D: int) -> list[Any]:
    """Return new random q, k, v and do."""
    import jax

    keys = jax.random.split(jax.random.key(time.time_ns() % 2**31), 4)
    return [jax.random.normal(key, (B, N, H, D), "bfloat16") for key in keys]


def _float64(array: Any) -> NDArray[np.float64]:
    """Return an array `(B, N, H, D)` of JAX as one `(B, H, N, D)` of NumPy."""
    return np.ascontiguousarray(np.asarray(array, np.float64).swapaxes(1, 2))


def _milliseconds(contender: str, D: int, causal: bool, kind: str) -> float:
    """Return the time of a call, the median of some turns of several calls."""
    import jax

    problem = Problem(kind, D, _LENGTH, causal)
    inputs = _fresh(problem.B, problem.N, problem.H, D)
    program = _program(kind, contender, causal)
    jax.block_until_ready(program(*inputs))
    turns = []
    for _ in range(_TURNS):
        begin = time.perf_counter()
        jax.block_until_ready([program(*inputs) for _ in range(_CALLS)])
        turns.append((time.perf_counter() - begin) / _CALLS)
    return 1e3 * statistics.median(turns)
