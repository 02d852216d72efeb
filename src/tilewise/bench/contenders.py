"""Ways to compute the same attention: tilewise through either door, textbook NumPy and PyTorch.

PyTorch is imported only where a contender needs it, and only where it is installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.bench import textbook

__all__ = [
    "DOOR",
    "MATH",
    "PACKED",
    "PYTORCH",
    "TEXTBOOK",
    "TILEWISE",
    "Contender",
    "Problem",
    "make",
    "math_bytes",
    "pytorch",
    "set_threads",
    "textbook_numpy",
    "tilewise",
    "tilewise_torch",
]

Array = NDArray[Any]

TILEWISE = "tilewise"
DOOR = "tilewise.torch"
PYTORCH = "PyTorch"
PACKED = "PyTorch, packed"
MATH = "PyTorch math"
TEXTBOOK = "NumPy textbook"
# What PyTorch 2.13's math path holds at its peak, measured, in matrices of one float per pair.
_MATH_MATRICES = {"forward": 2.3, "backward": 3.1, "jvp": 5.3, "double backward": 11.3}
_STEP = 1e-5


@dataclass(frozen=True)
class Problem:
    """Inputs of one attention: q, do `(B, H, N, D)`; k, v `(B, Hk, Nk, D)`.

    `causal` aligns bottom-right; `window` w lets a query see its own key and the w before it.
    `tangents` are those of q, k and v, for the directions that take them.
    """

    q: Array
    k: Array
    v: Array
    do: Array
    causal: bool = False
    window: int | None = None
    tangents: tuple[Array, ...] = ()

    def visible(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return rows `[start, stop)` of the mask, `(stop - start, Nk)`."""
        N, Nk = self.q.shape[2], self.k.shape[2]
        position = np.arange(start, stop)[:, None] + (Nk - N)
        key = np.arange(Nk)[None, :]
        seen: NDArray[np.bool_] = key <= position
        return seen if self.window is None else seen & (key >= position - self.window)

    @property
    def masked(self) -> bool:
        """Whether any option hides keys."""
        return self.causal or self.window is not None

    def dense_mask(self) -> NDArray[np.bool_] | None:
        """Return the whole `(N, Nk)` mask, None where nothing is hidden."""
        return self.visible(0, self.q.shape[2]) if self.masked else None

    def truth(self) -> textbook.Exact:
        """Return the float64 results."""
        rows = self.visible if self.masked else None
        return textbook.exact(self.q, self.k, self.v, self.do, rows)

    def true_tangents(self) -> dict[str, Array]:
        """Return the tangents of the float64 results by central differences, good to 1e-9."""
        ahead, behind = (self._moved(step).truth() for step in (_STEP, -_STEP))
        names = (f"t{name}" for name in ahead._fields)
        return {n: (a - b) / (2 * _STEP) for n, a, b in zip(names, ahead, behind, strict=True)}

    def _moved(self, step: float) -> Problem:
        inputs = zip((self.q, self.k, self.v), self.tangents, strict=True)
        q, k, v = (x + step * t.astype(np.float64) for x, t in inputs)
        return replace(self, q=q, k=k, v=v)


def _missing(*_: Any) -> Any:
    raise NotImplementedError


@dataclass(frozen=True)
class Contender:
    """A way to compute `Problem`.

    Attributes:
        name: as tables show it.
        forward: returns whatever the backward needs.
        outputs: turns what `forward` returned into named arrays: o, and more where it has more.
        backward: returns (dq, dk, dv) from what `saving` returned.
        saving: the forward that prepares a backward, where it differs from `forward`.
        jvp: returns o and its tangent.
        graph: returns what `saving` does, and the gradients that `double_backward` takes.
        double_backward: returns the tangents of dq, dk, dv, and that of o where it is known.
    """

    name: str
    forward: Callable[[], Any]
    outputs: Callable[[Any], dict[str, Array]]
    backward: Callable[[Any], tuple[Any, Any, Any]]
    saving: Callable[[], Any] | None = None
    jvp: Callable[[], tuple[Any, Any]] = _missing
    graph: Callable[[], tuple[Any, tuple[Any, ...]]] = _missing
    double_backward: Callable[[Any, Any], tuple[Any, ...]] = _missing

    def save(self) -> Any:
        """Run the forward whose result `backward` takes."""
        return (self.saving or self.forward)()

    def results(self, saved: Any) -> dict[str, Array]:
        """Return every output and gradient by name."""
        return {**self.outputs(saved), **_named("dq dk dv", self.backward(saved))}

    def prepare(self, direction: str) -> Callable[[], Any]:
        """Do what comes before a direction and return the call of the direction itself."""
        if direction == "backward":
            saved = self.save()
            return lambda: self.backward(saved)
        if direction == "double backward":
            graph = self.graph()
            return lambda: self.double_backward(*graph)
        return self.jvp if direction == "jvp" else self.forward

    def run(self, direction: str) -> dict[str, Array]:
        """Return every result of a direction, and of what comes before it, by name."""
        if direction == "backward":
            return self.results(self.save())
        if direction == "double backward":
            saved, grads = self.graph()
            last = _named("tdq tdk tdv to", self.double_backward(saved, grads))
            return {**self.outputs(saved), **_named("dq dk dv", grads), **last}
        return _named("o to", self.jvp()) if direction == "jvp" else self.outputs(self.forward())


def _named(names: str, values: tuple[Any, ...]) -> dict[str, Array]:
    """Return arrays, or tensors as such, by name; there may be fewer of them than names."""
    arrays = (np.asarray(x.detach() if hasattr(x, "detach") else x) for x in values)
    return dict(zip(names.split(), arrays, strict=False))


def make(
    name: str, problem: Problem, implementation: str | None = None, *, once: bool = False
) -> Contender | None:
    """Return a contender by name, None where it needs PyTorch, which is not installed.

    With `once` a contender of PyTorch frees what a forward saved as the backward goes on.
    """
    if name == TILEWISE:
        return tilewise(problem, implementation)
    if name == TEXTBOOK:
        return textbook_numpy(problem)
    if name == DOOR:
        return tilewise_torch(problem, implementation, once=once)
    return pytorch(problem, packed=name == PACKED, math=name == MATH, once=once)


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

    options = _options(problem, implementation)
    q, k, v, do = problem.q, problem.k, problem.v, problem.do

    def forward() -> Any:
        return attention(q, k, v, return_stats=True, return_lse=lse, **options)

    def outputs(made: Any) -> dict[str, Array]:
        named = {"o": made.o, "m": made.stats.m, "log_l": made.stats.log_l}
        return {**named, "lse": made.lse} if lse else named

    def backward(made: Any) -> tuple[Any, Any, Any]:
        grads = attention_vjp(do, q, k, v, made.o, made.stats, **options)
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


def tilewise_torch(
    problem: Problem, implementation: str | None = None, *, once: bool = False
) -> Contender | None:
    """Return tilewise through its PyTorch door, None where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    from tilewise.torch import attention

    options = _options(problem, implementation)
    attend = functools.partial(attention, **options)
    return _of_torch(DOOR, problem, attend, once=once)


def _options(problem: Problem, implementation: str | None) -> dict[str, Any]:
    import tilewise as tw

    _load_implementations(implementation)
    options: dict[str, Any] = {"implementation": implementation}
    if problem.window is not None:
        options["mask"] = tw.window(problem.window, 0)
    elif problem.causal:
        options["mask"] = tw.causal()
    return options


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
    mask = problem.dense_mask()
    q, k, v, do = problem.q, problem.k, problem.v, problem.do
    return Contender(
        TEXTBOOK,
        lambda: textbook.forward(q, k, v, mask),
        lambda saved: {"o": saved[0], "lse": saved[1]},
        lambda saved: textbook.backward(do, q, k, v, saved[2]),
    )


def pytorch(
    problem: Problem, *, packed: bool = False, math: bool = False, once: bool = False
) -> Contender | None:
    """Return PyTorch's scaled_dot_product_attention, None where PyTorch is not installed.

    Args:
        problem: what to compute. A window goes in as a boolean mask, the only form there is.
        packed: fold the queries that share a key head into rows by hand, in place of
            `enable_gqa`; for one query without a mask.
        math: take the path of whole matrices, the only one with every derivative.
        once: as `make` says.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    options: dict[str, Any] = {}
    if problem.window is not None:
        options["attn_mask"] = torch.from_numpy(problem.dense_mask())
    elif problem.causal:
        options["is_causal"] = True
    if not packed and problem.q.shape[1] > problem.k.shape[1]:
        options["enable_gqa"] = True
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, **options)

    def attend_by_matrices(*inputs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return attend(*inputs)

    if math:
        return _of_torch(MATH, problem, attend_by_matrices, once=once)
    return _of_torch(PACKED if packed else PYTORCH, problem, attend, packed=packed)


def math_bytes(heads: int, N: int, Nk: int, itemsize: int, direction: str) -> int:
    """Return the bytes that PyTorch's math path holds at its peak."""
    return int(_MATH_MATRICES[direction] * heads * N * Nk * itemsize)


def _of_torch(
    name: str,
    problem: Problem,
    attend: Callable[..., Any],
    *,
    packed: bool = False,
    once: bool = False,
) -> Contender:
    """Return a differentiable function of the tensors q, k and v as a contender."""
    import torch
    from torch.autograd import grad

    q, k, v, do = (torch.from_numpy(x) for x in (problem.q, problem.k, problem.v, problem.do))
    B, H, N, Dv = do.shape
    if packed:
        q, do = (x.reshape(B, k.shape[1], -1, x.shape[-1]) for x in (q, do))
    tangents = tuple(torch.from_numpy(x) for x in problem.tangents)
    leaves = tuple(x.clone().requires_grad_() for x in (q, k, v))
    cotangent = do.clone().requires_grad_() if tangents else do

    def forward() -> Any:
        with torch.no_grad():
            return attend(q, k, v)

    def save() -> Any:
        return attend(*leaves)

    def graph() -> tuple[Any, tuple[Any, ...]]:
        o = save()
        return o, grad(o, leaves, cotangent, create_graph=True)

    def double_backward(_: Any, grads: Any) -> tuple[Any, ...]:
        found: tuple[Any, ...] = grad(grads, (*leaves, cotangent), tangents, retain_graph=not once)
        return found

    return Contender(
        name,
        forward,
        lambda o: {"o": o.detach().reshape(B, H, N, Dv).numpy()},
        lambda o: grad(o, leaves, do, retain_graph=not once),
        save,
        jvp=lambda: torch.func.jvp(attend, (q, k, v), tangents),
        graph=graph,
        double_backward=double_backward,
    )


def set_threads(threads: int) -> None:
    """Tell tilewise, and PyTorch where it is loaded, how many threads to use."""
    import tilewise as tw

    # Without the compiled module there are no threads to set.
    with contextlib.suppress(ImportError):
        tw.set_num_threads(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
