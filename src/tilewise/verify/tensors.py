"""Functions of PyTorch tensors as functions of arrays, with the gradients that PyTorch makes.

PyTorch is imported only where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import bfloat16, is_bfloat16

__all__ = ["array_of", "gradients_of", "on_tensors", "tensor_of"]

Function = Callable[..., Any]

_FIELDS = ("o", "lse", "stats", "max_logit", "entropy", "o_full")


def tensor_of(x: NDArray[Any]) -> Any:
    """Return an array as a tensor, of the same memory wherever tensors can have it."""
    import torch

    plain = x.view(np.int16) if is_bfloat16(x.dtype) else x
    if not plain.flags.writeable or min(plain.strides, default=0) < 0:
        plain = plain.copy()
    tensor = torch.from_numpy(plain)
    return tensor.view(torch.bfloat16) if is_bfloat16(x.dtype) else tensor


def array_of(tensor: Any) -> NDArray[Any]:
    """Return a tensor as an array."""
    import torch

    plain = tensor.detach().cpu()
    if plain.dtype is not torch.bfloat16:
        return np.asarray(plain.numpy())
    return np.asarray(plain.view(torch.int16).numpy()).view(bfloat16("verify"))


def on_tensors(function: Function) -> Function:
    """Return a function of arrays that hands tensors to another one."""

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        given = {name: _given(x) for name, x in keywords.items()}
        return _returned(function(*(_given(x) for x in arguments), **given))

    return call


def gradients_of(function: Function, *, lse: bool) -> Function:
    """Return the gradients that autograd makes of a function of tensors.

    Args:
        function: Takes what `tilewise.torch.attention` takes.
        lse: Whether it returns `lse` where it is asked for it.

    Returns:
        A function of arrays with the signature of `tilewise.numpy.attention_vjp`.
    """

    def vjp(do: Any, q: Any, k: Any, v: Any, o: Any, stats: Any, **options: Any) -> Any:
        import torch

        cotangents = [do] + [options.pop(name) for name in ("dlse",) if name in options]
        given = {name: _given(x) for name, x in options.items()}
        inputs = [_given(x).detach().requires_grad_() for x in (q, k, v)]
        for name in ("bias", "sinks"):
            if name in given:
                given[name] = given[name].detach().requires_grad_()
        asked = {"return_lse": True} if lse else {}
        outputs = _outputs(function(*inputs, **given, **asked))[: len(cotangents)]
        if len(outputs) < len(cotangents) or not all(x.requires_grad for x in outputs):
            raise NotImplementedError("autograd finds no gradient of o and lse")
        others = [given.get(name) for name in ("bias", "sinks")]
        leaves = [*inputs, *(x for x in others if x is not None)]
        found = iter(torch.autograd.grad(outputs, leaves, [_given(x) for x in cotangents]))
        names = (*inputs, *others)
        return tuple(None if x is None else array_of(next(found)) for x in names)

    return vjp


def _given(x: Any) -> Any:
    """Return arrays as tensors, also those in a pair of statistics."""
    if isinstance(x, np.ndarray):
        return tensor_of(x)
    if isinstance(x, tuple):
        parts = [_given(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def _returned(x: Any) -> Any:
    """Return tensors as arrays, also those in a tuple and in an object with fields."""
    if hasattr(x, "detach"):
        return array_of(x)
    if isinstance(x, Sequence) and not hasattr(x, "o"):
        return tuple(_returned(part) for part in x)
    if not hasattr(x, "o"):
        return x
    return SimpleNamespace(**{name: _returned(getattr(x, name, None)) for name in _FIELDS})


def _outputs(result: Any) -> list[Any]:
    """Return o and, perhaps, lse of what a function returned."""
    if hasattr(result, "detach"):
        return [result]
    parts = [result.o, getattr(result, "lse", None)] if hasattr(result, "o") else list(result)[:2]
    return [x for x in parts if x is not None]
