"""Ways to compute the same attention: tilewise on NumPy arrays, textbook NumPy, and the peers."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

from numpy.typing import NDArray

from tilewise.bench import jax_peers, peers, textbook
from tilewise.bench.cases import (
    DOOR,
    FLEX,
    JAX,
    JAX_DOOR,
    MATH,
    ONE_BY_ONE,
    ONNX,
    PACKED,
    PADDED,
    PYTORCH,
    PYTORCH_ONE_BY_ONE,
    READ,
    TEXTBOOK,
    TILEWISE,
    VARLEN,
)
from tilewise.bench.problems import Contender, NotAvailable, Problem

__all__ = [
    "DOOR",
    "MATH",
    "TEXTBOOK",
    "TILEWISE",
    "Contender",
    "NotAvailable",
    "Problem",
    "make",
    "math_bytes",
    "set_threads",
    "textbook_numpy",
    "tilewise",
]

Array = NDArray[Any]

# What PyTorch 2.13's math path holds at its peak, measured, in matrices of one float per pair.
_MATH_MATRICES = {
    "forward": 2.3,
    "backward": 3.1,
    "step": 3.1,
    "jvp": 5.3,
    "double backward": 11.3,
}
_PEERS = {
    PYTORCH: peers.pytorch,
    PACKED: peers.pytorch_packed,
    PADDED: peers.pytorch_padded,
    PYTORCH_ONE_BY_ONE: peers.pytorch_one_by_one,
    FLEX: peers.flex,
    ONNX: peers.onnx,
    READ: peers.plain_read,
    JAX: jax_peers.jax_nn,
}


def make(
    name: str, problem: Problem, implementation: str | None = None, *, once: bool = False
) -> Contender:
    """Return a contender by name.

    With `once` a contender of PyTorch frees what a forward saved as the backward goes on.

    Raises:
        NotAvailable: it needs something that is not installed, or has no such attention.
    """
    if name == TILEWISE:
        return tilewise(problem, implementation)
    if name == TEXTBOOK:
        return textbook_numpy(problem)
    if name in (DOOR, VARLEN, ONE_BY_ONE):
        _load_implementations(implementation)
        return peers.tilewise(name, problem, implementation, once=once)
    if name == JAX_DOOR:
        return jax_peers.tilewise(problem, implementation)
    if name == MATH:
        return peers.pytorch_math(problem, once=once)
    return _PEERS[name](problem)


def tilewise(
    problem: Problem, implementation: str | None = None, *, lse: bool = False
) -> Contender:
    """Return tilewise as a contender; its code is loaded here, not at the first call."""
    from tilewise.numpy import (
        attention,
        attention_forward_jvp,
        attention_vjp,
        attention_vjp_jvp,
    )

    _load_implementations(implementation)
    options: dict[str, Any] = {"mask": problem.pattern.mask(), "implementation": implementation}
    q, k, v, do = problem.q, problem.k, problem.v, problem.do

    def forward() -> Any:
        return attention(q, k, v, return_stats=True, return_lse=lse, **options)

    def outputs(made: Any) -> dict[str, Array]:
        named = {"o": made.o, "m": made.stats.m, "log_l": made.stats.log_l}
        return {**named, "lse": made.lse} if lse else named

    def backward(made: Any) -> tuple[Any, ...]:
        grads = attention_vjp(do, q, k, v, made.o_full, made.stats, **options)
        return grads.dq, grads.dk, grads.dv

    def jvp() -> tuple[Any, Any]:
        tq, tk, tv = problem.tangents
        made, moved = attention_forward_jvp(tq, tk, tv, q, k, v, **options)
        return made.o, moved.to

    def double_backward(made: Any, _: Any) -> tuple[Any, ...]:
        tq, tk, tv = problem.tangents
        return attention_vjp_jvp(do, tq, tk, tv, q, k, v, made.o, made.stats, **options)[:3]

    return Contender(
        TILEWISE,
        forward,
        outputs,
        backward,
        jvp=jvp,
        graph=lambda: (forward(), ()),
        double_backward=double_backward,
    )


def _load_implementations(implementation: str | None) -> None:
    from tilewise.dispatch import TABLE

    for name, module in TABLE["attention"].items():
        if implementation in (None, name):
            try:
                importlib.import_module(module)
            except ImportError:
                continue


def textbook_numpy(problem: Problem) -> Contender:
    """Return the textbook formula in NumPy as a contender."""
    if problem.q.itemsize == 2:
        raise NotAvailable("NumPy has no fast products of 16-bit matrices")
    mask = problem.dense_mask()
    q, k, v, do = problem.q, problem.k, problem.v, problem.do
    return Contender(
        TEXTBOOK,
        lambda: textbook.forward(q, k, v, mask),
        lambda saved: {"o": saved[0], "lse": saved[1]},
        lambda saved: textbook.backward(do, q, k, v, saved[2]),
    )


def math_bytes(heads: int, N: int, Nk: int, itemsize: int, direction: str) -> int:
    """Return the bytes that PyTorch's math path holds at its peak."""
    return int(_MATH_MATRICES[direction] * heads * N * Nk * itemsize)


def set_threads(threads: int) -> None:
    """Tell tilewise, PyTorch where it is loaded, and the other peers how many threads to use."""
    import tilewise as tw

    # Without the compiled module there are no threads to set.
    with contextlib.suppress(ImportError):
        tw.set_num_threads(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    peers.THREADS.count = threads
