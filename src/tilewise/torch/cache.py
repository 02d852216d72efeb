"""Attention of PyTorch tensors to the keys that a cache holds."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch.autograd import forward_ad

from tilewise.base.errors import type_error, unsupported, value_error
from tilewise.cache import KVCache, attend
from tilewise.cache.attention import Door, typed
from tilewise.dispatch import DEVICE, device_implementation
from tilewise.ops.attention.record import FLAT
from tilewise.ops.attention.spec import NAME, Want, laid_out

from .autodiff import is_traced
from .checks import autocast, autocast_dtype, shown
from .gpu import Stage, adapted, implementation_for, readable

_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_TENSORS = ("bias", "alibi_slopes", "sinks")
_WHY = "the keys of a cache are overwritten in place, so there are no derivatives through it"


def words(operator: str, name: str, value: Any) -> tuple[NDArray[Any], str]:
    """Return the memory of a tensor as a cache on the host stores it, and the name of its dtype.

    Raises:
        TypeError: No cache has its dtype, or it is not dense.
        ValueError: It is not on the CPU.
        Unsupported: A derivative through it may be asked for.
    """
    plain = checked(operator, name, value, torch.device("cpu"))
    known = _NAMES.get(plain.dtype, shown(plain.dtype))
    if known == "bfloat16":
        return plain.view(torch.int16).numpy().view(np.uint16), known
    return plain.numpy(), known


def checked(operator: str, name: str, value: Any, device: torch.device) -> Tensor:
    """Return a tensor on the device of a cache without what PyTorch knows of its origin.

    Raises:
        TypeError: It is no dense tensor.
        ValueError: It is on another device.
        Unsupported: A derivative through it may be asked for, or the call is recorded.
    """
    if not isinstance(value, Tensor):
        raise type_error(operator, name, "be a torch.Tensor", type(value).__name__)
    if value.is_nested or value.layout is not torch.strided:
        got = "a nested tensor" if value.is_nested else str(value.layout)
        raise type_error(operator, name, "be a dense tensor", got)
    if value.device != device:
        raise value_error(operator, name, f"be on {device} (as cache)", str(value.device))
    if is_traced() or _get_tracing_state() is not None:
        reason = "a cache changes from call to call, which torch.export and torch.jit cannot record"
        raise unsupported(operator, reason)
    if value.is_cuda and torch.cuda.is_current_stream_capturing():
        reason = "a cache changes from call to call, which a CUDA graph cannot record"
        raise unsupported(operator, reason)
    if _are_functorch_transforms_active():
        raise unsupported(operator, f"a transform of torch.func with a cache: {_WHY}")
    if _is_differentiated(value):
        hint = "call it under torch.no_grad(), or attend to k and v as tensors, without a cache"
        raise unsupported(operator, f"{name} takes part in a derivative: {_WHY}; {hint}")
    return value.detach().resolve_neg()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def cached_attention(
    cache: KVCache, q: Any, k: Any, v: Any, *, want: Want, **options: Any
) -> tuple[Tensor | None, ...]:
    """Return o, lse, max_logit and entropy of `tilewise.cache.attend` on tensors.

    Args:
        cache: The cache.
        q: Queries.
        k: Keys to append, or None.
        v: Values to append, or None.
        want: Which of the last three to return; the others are None.
        **options: As of `attend`.

    Raises:
        TypeError: Autocast casts q to another dtype than that of the cache.
    """
    cast = autocast_dtype(q)
    if cast is not None:
        q, k, v, options["bias"] = autocast(q, k, v, options.get("bias"))
        _check_autocast(cache, q, cast)
    mask = options.get("mask")
    if isinstance(mask, Tensor):
        options["mask"] = mask.detach().cpu().numpy()
    on_device = isinstance(getattr(cache, "k", None), Tensor)
    if on_device or options.get("implementation") in DEVICE:
        return _by_kernels_of_a_device(cache, q, k, v, want, options)
    for name in _TENSORS:
        if options.get(name) is not None:
            options[name] = typed(*words(NAME, name, options[name]))
    call, out = attend(cache, q, k, v, want=want, **options)
    o = laid_out(out.o, call.layout)
    return tuple([_tensor(a) for a in (o, out.lse, out.max_logit, out.entropy)])


class _OnDevice(Door):
    """The way to tensors of a device: arrays of the call stand in for them."""

    def __init__(self, stage: Stage, device: torch.device) -> None:
        self._stage = stage
        self._device = device

    def array(self, stored: Any, dtype: str) -> NDArray[Any]:
        tensor = stored if isinstance(stored, Tensor) else _tensor(typed(stored, dtype))
        array = self._stage.stand_in(readable(tensor))
        assert array is not None
        return array

    def full(self, shape: tuple[int, ...], value: float, dtype: Any) -> Tensor:
        wanted = getattr(torch, dtype.name)
        return torch.full(shape, value, dtype=wanted, device=self._device)


def _by_kernels_of_a_device(
    cache: KVCache, q: Any, k: Any, v: Any, want: Want, options: dict[str, Any]
) -> tuple[Tensor | None, ...]:
    """Attend where the cache is: on a device, or on the CPU by kernels that are interpreted."""
    found: Any = getattr(cache, "k", None)
    pool = found if isinstance(found, Tensor) else torch.empty(0)
    name = implementation_for(FLAT, options.pop("implementation") or DEVICE[0], pool)
    stage = Stage(pool.device, keeps=False)
    for option in _TENSORS:
        if options.get(option) is not None:
            tensor = readable(checked(NAME, option, options[option], pool.device))
            options[option] = stage.stand_in(tensor)
    own = device_implementation(NAME, name)
    chosen = adapted(NAME, own, stage.tensor, lambda tensor: tensor)
    door = _OnDevice(stage, pool.device)
    with torch.cuda.device(pool.device) if pool.is_cuda else nullcontext():
        call, out = attend(cache, q, k, v, want=want, implementation=chosen, door=door, **options)
    results: Any = laid_out(out.o, call.layout), out.lse, out.max_logit, out.entropy
    return tuple(results)


def _check_autocast(cache: object, q: object, cast: torch.dtype) -> None:
    """Check that the keys of a cache have the dtype to which autocast has cast q."""
    was_cast = isinstance(q, Tensor) and q.dtype is cast
    if was_cast and isinstance(cache, KVCache) and cache.dtype != shown(cast):
        requirement = f"have dtype {shown(cast)} (from autocast; or leave that for the call)"
        raise type_error(NAME, "cache", requirement, cache.dtype)


def _tensor(array: NDArray[Any] | None) -> Tensor | None:
    if array is None:
        return None
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _is_differentiated(tensor: Tensor) -> bool:
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    return bool(forward_ad.unpack_dual(tensor).tangent is not None)
