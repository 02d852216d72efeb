"""Attention of PyTorch tensors to the keys that a cache holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch.autograd import forward_ad

from tilewise.base.errors import type_error, unsupported
from tilewise.cache import KVCache, attend
from tilewise.cache.attention import typed
from tilewise.ops.attention.spec import NAME, Want, laid_out

from .autodiff import is_traced
from .checks import autocast, autocast_dtype, shown

_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_WHY = "the keys of a cache are overwritten in place, so there are no derivatives through it"


def words(operator: str, name: str, value: Any) -> tuple[NDArray[Any], str]:
    """Return the memory of a tensor as a cache stores it, and the name of its dtype.

    Raises:
        TypeError: No cache has its dtype, or it is not dense.
        Unsupported: It is not on the CPU, or a derivative through it may be asked for.
    """
    if not isinstance(value, Tensor):
        raise type_error(operator, name, "be a torch.Tensor", type(value).__name__)
    if value.is_nested or value.layout is not torch.strided:
        got = "a nested tensor" if value.is_nested else str(value.layout)
        raise type_error(operator, name, "be a dense tensor", got)
    if not value.is_cpu:
        raise unsupported(operator, f"{name} is on {value.device}; caches are on the CPU yet")
    if is_traced() or _get_tracing_state() is not None:
        reason = "a cache changes from call to call, which torch.export and torch.jit cannot record"
        raise unsupported(operator, reason)
    if _are_functorch_transforms_active():
        raise unsupported(operator, f"a transform of torch.func with a cache: {_WHY}")
    if _is_differentiated(value):
        hint = "call it under torch.no_grad(), or attend to k and v as tensors, without a cache"
        raise unsupported(operator, f"{name} takes part in a derivative: {_WHY}; {hint}")
    known = _NAMES.get(value.dtype, str(value.dtype).removeprefix("torch."))
    plain = value.detach().resolve_neg()
    if known == "bfloat16":
        return plain.view(torch.int16).numpy().view(np.uint16), known
    return plain.numpy(), known


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
    for name in ("bias", "alibi_slopes", "sinks"):
        if options.get(name) is not None:
            options[name] = typed(*words(NAME, name, options[name]))
    mask = options.get("mask")
    if isinstance(mask, Tensor):
        options["mask"] = mask.detach().cpu().numpy()
    call, out = attend(cache, q, k, v, want=want, **options)
    o = laid_out(out.o, call.layout)
    return tuple([_tensor(a) for a in (o, out.lse, out.max_logit, out.entropy)])


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
