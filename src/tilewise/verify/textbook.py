"""Attention in plain PyTorch with whole matrices, and the derivatives that PyTorch makes of it.

The textbook knows no formula of a derivative, so its derivatives are a truth that shares nothing
with the kernels. PyTorch is imported only where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewise.ops.attention import spec

from .cases.problem import Problem
from .straightforward import dropout_factor

__all__ = ["Along", "Tensors", "Textbook", "one_thread"]

Tensors = tuple[Any, ...]
Function = Callable[..., Tensors]


@dataclass(frozen=True)
class Textbook:
    """Attention as a function of q, k, v and of bias and sinks where these are given.

    Attributes:
        problem: Whose mask and options hold.
        names: Names of the tensors that it takes, in their order.
        lse: Whether it returns lse beside o.
    """

    problem: Problem
    names: Sequence[str]
    lse: bool

    def __call__(self, *tensors: Any) -> Tensors:
        """Return o, or o and lse, in the layout of the problem."""
        import torch

        given, d = dict(zip(self.names, tensors, strict=True)), self.problem.dims
        q, k, v = (self._swapped(x) for x in tensors[:3])
        k, v = (x.repeat_interleave(d.H // d.Hk, dim=1) for x in (k, v))
        seen = torch.from_numpy(self._seen())
        # Hidden logits are replaced twice: the derivative of what is thrown away must be finite.
        s = torch.where(seen, self._logits(q, k, given.get("bias", 0.0)), 0.0)
        sinks = given.get("sinks", s.new_full((d.H,), -torch.inf))[:, None, None]
        top = torch.where(seen, s, -torch.inf).amax(-1, keepdim=True)
        top = torch.maximum(top, sinks).detach()
        alive = top > -torch.inf
        top = torch.where(alive, top, 0.0)
        w = torch.where(seen, torch.exp(s - top), 0.0)
        l = torch.where(alive, w.sum(-1, keepdim=True) + torch.exp(sinks - top), 1.0)
        o = self._swapped((w / l * torch.from_numpy(self._keep())) @ v)
        lse = torch.where(alive, top + torch.log(l), -torch.inf)[..., 0]
        return (o, lse) if self.lse else (o,)

    def _logits(self, q: Any, k: Any, bias: Any) -> Any:
        import torch

        options, d = self.problem.options, self.problem.dims
        s = (q @ k.transpose(-1, -2)) * options.get("softmax_scale", d.D**-0.5)
        if "softcap" in options:
            s = options["softcap"] * torch.tanh(s / options["softcap"])
        slopes = self.problem.arrays.get("alibi_slopes", np.zeros(1)).astype(np.float64)
        distance = (torch.arange(d.N)[:, None] + d.Nk - d.N - torch.arange(d.Nk)).abs()
        return s + bias - torch.from_numpy(slopes)[..., None, None] * distance

    def _swapped(self, x: Any) -> Any:
        return x if self.problem.case.layout == "bhnd" else x.transpose(1, 2)

    def _seen(self) -> Any:
        d, mask = self.problem.dims, self.problem.options.get("mask")
        shape = (d.B, d.H, d.N, d.Nk)
        return np.ones(shape, np.bool_) if mask is None else mask.to_bool(*shape)

    def _keep(self) -> Any:
        a = self.problem.arrays
        call = spec.prepare(a["q"], a["k"], a["v"], **self.problem.options)
        return dropout_factor(call, np.dtype(np.float64))


@dataclass(frozen=True)
class Along:
    """Where and along what a function is differentiated; every column of the grid is a method.

    Attributes:
        f: The function.
        x: Its inputs.
        c: Cotangents of its outputs.
        t: Tangents of the inputs.
        tc: Tangents of the cotangents.
        others: Other inputs and cotangents.
    """

    f: Function
    x: Tensors
    c: Tensors
    t: Tensors
    tc: Tensors
    others: tuple[Tensors, Tensors]

    def gradients(self, x: Tensors, c: Tensors) -> Tensors:
        """Return the gradients of `<c, f(x)>` as a function that can be differentiated again."""
        import torch

        found: Tensors = torch.func.vjp(self.f, *x)[1](c)
        return found

    def backward(self) -> Tensors:
        """Return the gradients of `<c, f(x)>`."""
        import torch

        x = _leaves(self.x)
        found: Tensors = torch.autograd.grad(self.f(*x), x, self.c)
        return found

    def double_backward(self) -> Tensors:
        """Return the gradients of `<t, gradients(x, c)>` with respect to x and c."""
        import torch

        x, c = _leaves(self.x), _leaves(self.c)
        first = torch.autograd.grad(self.f(*x), x, c, create_graph=True)
        found: Tensors = torch.autograd.grad(first, [*x, *c], self.t)
        return found

    def jvp(self) -> Tensors:
        """Return the tangents of the outputs."""
        import torch

        found: Tensors = torch.func.jvp(self.f, self.x, self.t)[1]
        return found

    def jvp_of_vjp(self) -> Tensors:
        """Return the tangents of the gradients: forward mode over reverse mode."""
        import torch

        given, along = (self.x, self.c), (self.t, self.tc)
        found: Tensors = torch.func.jvp(self.gradients, given, along)[1]
        return found

    def vmap(self) -> Tensors:
        """Return the outputs and gradients at two places in one call each."""
        import torch

        x, c = _stacked(self.x, self.others[0]), _stacked(self.c, self.others[1])
        return (*torch.func.vmap(self.f)(*x), *torch.func.vmap(self.gradients)(x, c))

    def one_by_one(self) -> Tensors:
        """Return what `vmap` does, with calls of their own for the two places."""
        places = ((self.x, self.c), self.others)
        return _stacked(*((*self.f(*x), *self.gradients(x, c)) for x, c in places))

    def moved(self, h: float) -> tuple[Tensors, Tensors]:
        """Return inputs and cotangents a step further along their tangents."""
        pairs = ((self.x, self.t), (self.c, self.tc))
        x, c = (tuple(a + h * b for a, b in zip(*pair, strict=True)) for pair in pairs)
        return x, c


@contextmanager
def one_thread() -> Iterator[None]:
    """Have PyTorch compute on one thread: its threads take longer to meet than small problems."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _leaves(tensors: Tensors) -> list[Any]:
    return [x.detach().requires_grad_() for x in tensors]


def _stacked(*tensors: Tensors) -> Tensors:
    import torch

    return tuple(torch.stack(parts) for parts in zip(*tensors, strict=True))
