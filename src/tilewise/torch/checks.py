"""What the functions check of their tensors, and the seed of the dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewise.base.dims import show
from tilewise.base.dtypes import FLOATS, NARROW, listed
from tilewise.base.errors import type_error, unsupported, value_error
from tilewise.ops.attention.spec import QUERY
from tilewise.ops.attention.spec.arguments import LAYOUTS, SEED, SHAPES

from .gpu import missing

_DTYPES = tuple([getattr(torch, name) for name in FLOATS])
_NARROW = tuple([getattr(torch, name) for name in NARROW])
_TENSORS = ("q", "k", "v", "bias", "sinks", "alibi_slopes")
_REQUIRED = ("q", "k", "v")


def autocast_dtype(first: Any) -> torch.dtype | None:
    """Return the dtype to which autocast casts where a tensor is; None where it is off."""
    device = first.device.type if isinstance(first, Tensor) else "meta"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast as autocast does for torch.nn.functional's linear and scaled_dot_product_attention.

    The device is that of the first tensor: others, and float64, stay as they are.
    """
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    device, casts = tensors[0].device.type, (*_NARROW, torch.float32)
    return tuple(
        [
            t.to(dtype)
            if isinstance(t, Tensor) and t.dtype in casts and t.device.type == device
            else t
            for t in tensors
        ]
    )


def check_tensors(
    operator: str,
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    sinks: Any,
    alibi_slopes: Any,
    layout: str,
    layouts: tuple[str, ...] = LAYOUTS,
) -> None:
    """Check what shapes and values say nothing about."""
    dtype, cpu = None, True
    given = (q, k, v, bias, sinks, alibi_slopes)
    for name, tensor in zip(_TENSORS, given, strict=True):
        if tensor is None and name not in _REQUIRED:
            continue
        if not isinstance(tensor, Tensor):
            raise type_error(operator, name, "be a torch.Tensor", type(tensor).__name__)
        if tensor.is_nested or tensor.layout is not torch.strided:
            got = "a nested tensor" if tensor.is_nested else str(tensor.layout)
            raise type_error(operator, name, "be a dense tensor", got)
        if dtype is None:
            dtype, cpu = _first(operator, tensor), tensor.is_cpu
        elif tensor.dtype is not dtype and not (
            dtype in _NARROW and tensor.dtype is torch.float32 and name not in _REQUIRED
        ):
            more = " or float32" if dtype in _NARROW and name not in _REQUIRED else ""
            requirement = f"have dtype {shown(dtype)} (from q){more}"
            raise type_error(operator, name, requirement, shown(tensor.dtype))
        elif tensor.is_cpu is not cpu or not (cpu or tensor.device == q.device):
            raise value_error(operator, name, f"be on {q.device} (as q)", str(tensor.device))
    if layout not in layouts:
        raise value_error(operator, "layout", f"be {' or '.join(map(repr, layouts))}", repr(layout))
    dims = SHAPES[layout][QUERY.name][0]
    if q.ndim != len(dims):
        raise value_error(operator, "q", f"have shape {show(dims)}", tuple(q.shape))
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        requirement = "be without requires_grad, for it has no gradient (pass it detached)"
        raise value_error(operator, "alibi_slopes", requirement, "requires_grad=True")


def _first(operator: str, q: Tensor) -> torch.dtype:
    """Return the dtype of q, which the other tensors must have too."""
    dtype = q.dtype
    if dtype not in _DTYPES:
        raise type_error(operator, "q", f"have dtype {listed(FLOATS)}", shown(dtype))
    if not q.is_cpu:
        check_place(operator, q.device)
    return dtype


def check_first(operator: str, name: str, x: Any) -> None:
    """Check the tensor that settles dtype and device of a call."""
    if not isinstance(x, Tensor):
        raise type_error(operator, name, "be a torch.Tensor", type(x).__name__)
    if x.is_nested or x.layout is not torch.strided:
        got = "a nested tensor" if x.is_nested else str(x.layout)
        raise type_error(operator, name, "be a dense tensor", got)
    if x.dtype not in _DTYPES:
        raise type_error(operator, name, f"have dtype {listed(FLOATS)}", shown(x.dtype))
    if not x.is_cpu:
        check_place(operator, x.device)


def check_place(operator: str, device: torch.device) -> None:
    """Raise where there are no kernels for a device that is not the CPU."""
    if device.type == "meta":
        return
    if device.type != "cuda":
        raise unsupported(operator, f"there is no implementation for device {device} yet")
    reason = missing()
    if reason is not None:
        raise unsupported(operator, f"device {device}: {reason}")


def check_device(operator: str, name: str, tensor: Tensor, x: Tensor, first: str = "x") -> None:
    """Check that a tensor is where the first one is."""
    if tensor.device != x.device:
        raise value_error(operator, name, f"be on {x.device} (as {first})", str(tensor.device))


def check_accumulator(
    operator: str, accumulator: Any, weight: str, w: Tensor, allowed: tuple[str, ...]
) -> None:
    """Check a tensor to which the gradient of a weight is to be added.

    Args:
        operator: Name of the operator, for the error text.
        accumulator: What the user gave.
        weight: Name of the weight.
        w: The weight.
        allowed: Names of the dtypes that it may have.
    """
    name = "grad_accumulator"
    if not isinstance(accumulator, Tensor):
        raise type_error(operator, name, "be a torch.Tensor", type(accumulator).__name__)
    if shown(accumulator.dtype) not in allowed:
        requirement = f"have dtype {' or '.join(dict.fromkeys(allowed))}"
        raise type_error(operator, name, requirement, shown(accumulator.dtype))
    if accumulator.shape != w.shape:
        requirement = f"have shape {tuple(w.shape)} (from {weight})"
        raise value_error(operator, name, requirement, tuple(accumulator.shape))
    if accumulator.device != w.device:
        requirement = f"be on {w.device} (as {weight})"
        raise value_error(operator, name, requirement, str(accumulator.device))
    if accumulator.requires_grad:
        raise value_error(operator, name, "be without requires_grad", "requires_grad=True")
    if not accumulator.is_contiguous():
        got = f"strides {accumulator.stride()}"
        raise value_error(operator, name, "be contiguous, for a copy would be as large", got)
    if w.numel() and not w.is_meta and accumulator.data_ptr() == w.data_ptr():
        raise value_error(operator, name, f"not overlap {weight}", f"{weight} itself")


def shown(dtype: torch.dtype) -> str:
    """Return the name of a dtype."""
    return str(dtype).removeprefix("torch.")


def seed_of(operator: str, seed: Any, dropout_p: float) -> Tensor | None:
    """Return the seed as a tensor, which a graph takes as an input and not as a constant."""
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.ndim != 0:
            got = f"shape {tuple(seed.shape)} of {shown(seed.dtype)}"
            raise type_error(operator, "seed", "be an integer or an int64 tensor of shape ()", got)
        return seed if dropout_p > 0 else None
    if seed is not None:
        seed = SEED.check(operator, seed)
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64)
    return torch.full((), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64)
