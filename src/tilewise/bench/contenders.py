"""Three ways to compute the same attention: tilewise, textbook NumPy and PyTorch.

PyTorch is imported only by `pytorch` and `set_threads`, and only where it is installed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.bench import textbook

__all__ = [
    "TEXTBOOK",
    "Contender",
    "Problem",
    "pytorch",
    "set_threads",
    "textbook_numpy",
    "tilewise",
]

Array = NDArray[Any]

TEXTBOOK = "NumPy textbook"


@dataclass(frozen=True)
class Problem:
    """Inputs of one attention: q, do `(B, H, N, D)`; k, v `(B, Hk, Nk, D)`.

    `causal` aligns bottom-right; `window` w lets a query see its own key and the w before it.
    """

    q: Array
    k: Array
    v: Array
    do: Array
    causal: bool = False
    window: int | None = None

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


@dataclass(frozen=True)
class Contender:
    """A way to compute `Problem`.

    Attributes:
        name: as tables show it.
        forward: returns whatever the backward needs.
        outputs: turns what `forward` returned into named arrays: o, and more where it has more.
        backward: returns (dq, dk, dv) from what `saving` returned.
        saving: the forward that prepares a backward, where it differs from `forward`.
    """

    name: str
    forward: Callable[[], Any]
    outputs: Callable[[Any], dict[str, Array]]
    backward: Callable[[Any], tuple[Any, Any, Any]]
    saving: Callable[[], Any] | None = None

    def save(self) -> Any:
        """Run the forward whose result `backward` takes."""
        return (self.saving or self.forward)()

    def results(self, saved: Any) -> dict[str, Array]:
        """Return every output and gradient by name."""
        gradients = (np.asarray(x) for x in self.backward(saved))
        return {**self.outputs(saved), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def tilewise(
    problem: Problem, implementation: str | None = None, *, lse: bool = False
) -> Contender:
    """Return tilewise as a contender; its code is loaded here, not at the first call."""
    import tilewise as tw
    from tilewise.numpy import attention, attention_vjp

    _load_implementations(implementation)
    options: dict[str, Any] = {"implementation": implementation}
    if problem.window is not None:
        options["mask"] = tw.window(problem.window, 0)
    elif problem.causal:
        options["mask"] = tw.causal()
    q, k, v, do = problem.q, problem.k, problem.v, problem.do

    def forward() -> Any:
        return attention(q, k, v, return_stats=True, return_lse=lse, **options)

    def outputs(made: Any) -> dict[str, Array]:
        named = {"o": made.o, "m": made.stats.m, "log_l": made.stats.log_l}
        return {**named, "lse": made.lse} if lse else named

    def backward(made: Any) -> tuple[Any, Any, Any]:
        grads = attention_vjp(do, q, k, v, made.o, made.stats, **options)
        return grads.dq, grads.dk, grads.dv

    return Contender("tilewise", forward, outputs, backward)


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


def pytorch(problem: Problem, *, packed: bool = False) -> Contender | None:
    """Return PyTorch's scaled_dot_product_attention, None where PyTorch is not installed.

    Args:
        problem: what to compute. A window goes in as a boolean mask, the only form there is.
        packed: fold the queries that share a key head into rows by hand, in place of
            `enable_gqa`; for one query without a mask.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v, do = (torch.from_numpy(x) for x in (problem.q, problem.k, problem.v, problem.do))
    B, H = q.shape[:2]
    Hk = k.shape[1]
    options: dict[str, Any] = {}
    if problem.window is not None:
        options["attn_mask"] = torch.from_numpy(problem.dense_mask())
    elif problem.causal:
        options["is_causal"] = True
    if packed:
        q = q.reshape(B, Hk, H // Hk, q.shape[-1])
    elif H // Hk > 1:
        options["enable_gqa"] = True
    leaves = tuple(x.clone().requires_grad_() for x in (q, k, v))

    def forward() -> Any:
        with torch.no_grad():
            return attend(q, k, v, **options)

    def backward(o: Any) -> tuple[Any, Any, Any]:
        dq, dk, dv = torch.autograd.grad(o, leaves, do.reshape(o.shape), retain_graph=True)
        return dq, dk, dv

    return Contender(
        "PyTorch, packed" if packed else "PyTorch",
        forward,
        lambda o: {"o": o.detach().reshape(B, H, -1, v.shape[-1]).numpy()},
        backward,
        lambda: attend(*leaves, **options),
    )


def set_threads(threads: int) -> None:
    """Tell tilewise, and PyTorch where it is loaded, how many threads to use."""
    import tilewise as tw

    # Without the compiled module there are no threads to set.
    with contextlib.suppress(ImportError):
        tw.set_num_threads(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
