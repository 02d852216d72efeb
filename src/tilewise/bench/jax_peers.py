"""Attention on JAX arrays, of tilewise and of JAX itself, as programs that XLA has compiled."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.bench.cases import JAX, JAX_DOOR
from tilewise.bench.problems import Contender, NotAvailable, Problem

__all__ = ["jax_nn", "tilewise"]

Array = NDArray[Any]


def tilewise(problem: Problem, implementation: str | None) -> Contender:
    """Return tilewise through its JAX door, under the name and in the layout of JAX's own."""
    _jax()
    from tilewise.jax import dot_product_attention

    attend = functools.partial(dot_product_attention, implementation=implementation)
    return _of_jax(JAX_DOOR, problem, attend)


def jax_nn(problem: Problem) -> Contender:
    """Return `jax.nn.dot_product_attention` as XLA computes it."""
    nn = _jax().nn
    attend = functools.partial(nn.dot_product_attention, implementation="xla")
    return _of_jax(JAX, problem, attend)


def _jax() -> Any:
    if importlib.util.find_spec("jax") is None:
        raise NotAvailable("JAX is not installed")
    return importlib.import_module("jax")


def _of_jax(name: str, problem: Problem, attend: Callable[..., Any]) -> Contender:
    """Return a function of arrays `(B, N, H, D)` as a contender; its programs are compiled here."""
    jax, pattern = _jax(), problem.pattern
    if pattern and not pattern.alone:
        raise NotAvailable("only causal masks are timed in JAX")
    if problem.q.dtype == np.float64:
        raise NotAvailable("jax_enable_x64 is off")
    attend = functools.partial(attend, is_causal=pattern.causal)
    given = (problem.q, problem.k, problem.v, problem.do)
    inputs = [jax.numpy.asarray(x).swapaxes(1, 2) for x in given]

    def step(q: Any, k: Any, v: Any, do: Any) -> tuple[Any, ...]:
        o, back = jax.vjp(attend, q, k, v)
        return (o, *back(do))

    forward = jax.jit(attend).lower(*inputs[:3]).compile()
    both = jax.jit(step).lower(*inputs).compile()

    def arrays(names: str, values: tuple[Any, ...]) -> dict[str, Array]:
        kind = np.float32 if problem.q.itemsize == 2 else problem.q.dtype
        found = zip(names.split(), values, strict=False)
        return {label: np.asarray(x).swapaxes(1, 2).astype(kind, copy=False) for label, x in found}

    return Contender(
        name,
        lambda: jax.block_until_ready(forward(*inputs[:3])),
        lambda o: arrays("o", (o,)),
        step=lambda: jax.block_until_ready(both(*inputs)),
        arrays=arrays,
    )
