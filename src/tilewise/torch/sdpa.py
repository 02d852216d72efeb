"""torch.nn.functional.scaled_dot_product_attention, and how models come to call it."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Any, Literal, get_args

import torch
from torch.autograd import forward_ad
from torch.nn import functional

from tilewise.base.errors import type_error, unsupported, value_error
from tilewise.base.masks import causal
from tilewise.ops.attention.spec.arguments import LIMITS

from .attention import attention

NAME = "scaled_dot_product_attention"

Fallback = Literal["raise", "pytorch"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "meta")


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Compute attention as `torch.nn.functional.scaled_dot_product_attention` does.

    `softmax(scale query key^T + attn_mask) value`, with every derivative of
    `tilewise.torch.attention`. Unlike in PyTorch, a key that a boolean mask hides is absent: NaN
    there reaches nothing.

    Args:
        query: `(..., H, N, D)` or `(N, D)`; float32, float64, bfloat16 or float16.
        key: `(..., H, Nk, D)`, dtype of query; all sizes before the last two broadcast.
        value: `(..., H, Nk, Dv)`, dtype of query.
        attn_mask: Broadcasts to `(..., H, N, Nk)`. Boolean: True is seen. Floating-point: added to
            the logits, with gradient; -inf hides the key.
        dropout_p: Probability of dropout; its random numbers follow `torch.manual_seed`.
        is_causal: Query i sees the keys up to i, counted from the first one. Not with attn_mask.
        scale: Factor of `query key^T`; `D ** -0.5` by default.
        enable_gqa: key and value may have fewer heads, whose number divides H.

    Returns:
        `(..., H, N, Dv)`, dtype of query. A row that sees no key is 0.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: tilewise does not serve these tensors.
    """
    reason = refusal(query, key, value)
    if reason is not None:
        raise unsupported(NAME, reason)
    leading, heads = _sizes(query, key, value, enable_gqa)
    q, k, v = _heads(query, key, value, heads)
    q, k, v = [_four_dimensional(t, leading) for t in (q, k, v)]
    mask, bias = _mask_and_bias(attn_mask, is_causal, q, k, leading)
    D, Dv = q.shape[-1], v.shape[-1]
    if scale is None:
        scale = D**-0.5 if D else 0.0
    if scale < 0:
        q, scale = -q, -scale
    if not D:
        q, k = [functional.pad(t, (0, 1)) for t in (q, k)]
    if not Dv:
        v = functional.pad(v, (0, 1))
    o = attention(
        q, k, v, mask=mask, bias=bias, softmax_scale=float(scale), dropout_p=float(dropout_p)
    )
    if not Dv:
        o = o[..., :0]
    if len(leading) != 1:
        o = o.reshape(*leading, *o.shape[1:])
    return o if max(query.ndim, key.ndim, value.ndim) > 2 else o.squeeze(0)


def refusal(query: Any, key: Any, value: Any) -> str | None:
    """Return why tilewise does not serve these tensors, or None where it does."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            return None  # an error, not a limit
        if _has_own_functions(tensor):
            return f"{name} is a {type(tensor).__name__}, which has functions of its own"
        if tensor.is_nested or tensor.layout is not torch.strided:
            return f"{name} is nested or sparse"
        if tensor.device.type not in _DEVICES:
            return f"{name} is on {tensor.device.type}"
        if tensor.dtype not in _DTYPES:
            return f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}"
    for size, tensor in (("D", query), ("Dv", value)):
        if tensor.ndim and tensor.shape[-1] > 1:
            violated = LIMITS[size].violation(tensor.shape[-1], lambda letter: None)
            if violated is not None:
                return f"{size} is {tensor.shape[-1]}, not {violated}"
    return None


def _has_own_functions(tensor: Any) -> bool:
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False
    own = type(tensor).__torch_function__
    usual = torch.Tensor.__torch_function__.__func__
    return own is not torch._C._disabled_torch_function_impl and own.__func__ is not usual


def _sizes(query: Any, key: Any, value: Any, enable_gqa: bool) -> tuple[tuple[int, ...], int]:
    """Return the sizes before the heads, and the number of heads, after all have broadcast."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise type_error(NAME, name, "be a torch.Tensor", type(tensor).__name__)
        if tensor.ndim < 2:
            raise value_error(NAME, name, "have at least 2 dimensions", tuple(tensor.shape))
        if tensor.dtype != query.dtype:
            requirement = f"have dtype {query.dtype} (from query)"
            raise type_error(NAME, name, requirement, str(tensor.dtype))
    shapes = [_split(t)[0] for t in (query, key, value)]
    counts = [_split(t)[1] for t in (query, key, value)]
    leading = shapes[0]
    for name, shape in (("key", shapes[1]), ("value", shapes[2])):
        try:
            leading = torch.broadcast_shapes(leading, shape)
        except RuntimeError:
            requirement = f"broadcast to batch {tuple(leading)}"
            raise value_error(NAME, name, requirement, tuple(shape)) from None
    heads = counts[0] if enable_gqa else max(counts) if 0 not in counts else 0
    for name, count in zip(("query", "key", "value"), counts, strict=True):
        fits = count in (1, heads) or (enable_gqa and count and heads % count == 0)
        if not fits:
            rule = "a divisor of the" if enable_gqa else "1 or"
            raise value_error(NAME, name, f"have {rule} {heads} heads of query", count)
    return tuple(leading), heads


def _split(tensor: Any) -> tuple[Any, int]:
    """Return the sizes before the heads, and the number of heads."""
    return tensor.shape[:-3], tensor.shape[-3] if tensor.ndim > 2 else 1


def _heads(query: Any, key: Any, value: Any, heads: int) -> tuple[Any, Any, Any]:
    """Return tensors with heads; key and value have equally many, which divide those of query."""
    q, k, v = [t.unsqueeze(0) if t.ndim == 2 else t for t in (query, key, value)]
    common = math.lcm(k.shape[-3], v.shape[-3]) if heads else 0
    return _repeated(q, heads), _repeated(k, common), _repeated(v, common)


def _repeated(tensor: Any, heads: int) -> Any:
    """Return a tensor whose heads are repeated one by one, up to a number of heads."""
    count = tensor.shape[-3]
    if count == heads:
        return tensor
    if count == 1:
        return tensor.expand(*tensor.shape[:-3], heads, *tensor.shape[-2:])
    return tensor.repeat_interleave(heads // count, -3)


def _four_dimensional(tensor: Any, leading: Sequence[int]) -> Any:
    """Return `(B, H, n, d)`, B being the product of the leading sizes."""
    if len(leading) == 1 and tensor.ndim == 4 and tensor.shape[0] == leading[0]:
        return tensor
    whole = tensor.expand(*leading, *tensor.shape[-3:])
    return whole.reshape(math.prod(leading), *tensor.shape[-3:])


def _mask_and_bias(
    attn_mask: Any, is_causal: bool, q: Any, k: Any, leading: Sequence[int]
) -> tuple[Any, Any]:
    """Return the mask and the bias of `attention` that mean what the arguments mean."""
    if is_causal:
        if attn_mask is not None:
            raise value_error(NAME, "attn_mask", "be None where is_causal is True", "a mask")
        return causal(align="top_left"), None
    if attn_mask is None:
        return None, None
    if not isinstance(attn_mask, torch.Tensor):
        raise type_error(NAME, "attn_mask", "be a torch.Tensor", type(attn_mask).__name__)
    if type(attn_mask).__name__ == "CausalBias":
        return _of_causal_bias(attn_mask), None
    if attn_mask.dtype not in (torch.bool, torch.float32, q.dtype):
        requirement = f"have dtype bool, float32 or {q.dtype} (from query)"
        raise type_error(NAME, "attn_mask", requirement, str(attn_mask.dtype))
    given = _broadcastable(attn_mask, (*leading, q.shape[1], q.shape[2], k.shape[2]))
    if given.dtype == torch.bool:
        return given, None
    seen = _only_hides(given)
    return (None, given.to(q.dtype)) if seen is None else (seen, None)


def _of_causal_bias(bias: Any) -> Any:
    """Return the mask of a `torch.nn.attention.bias.CausalBias`."""
    from torch.nn.attention.bias import CausalVariant

    return causal(align="top_left" if bias.variant == CausalVariant.UPPER_LEFT else "bottom_right")


def _broadcastable(attn_mask: Any, whole: tuple[int, ...]) -> Any:
    """Return a mask of at most 4 dimensions that broadcasts to `(B, H, N, Nk)`."""
    got = attn_mask.shape
    fits = 2 <= len(got) <= max(len(whole), 3) and all(
        have in (1, want) for have, want in zip(reversed(got), reversed(whole), strict=False)
    )
    if not fits:
        raise value_error(NAME, "attn_mask", f"broadcast to {whole}", tuple(got))
    leading = whole[:-3]
    if len(leading) == 1 or len(got) <= 3:
        return attn_mask
    spread = attn_mask.expand(*leading, *got[-3:])
    return spread.reshape(math.prod(leading), *got[-3:])


def _only_hides(bias: Any) -> Any:
    """Return the boolean mask of a bias of 0 and -inf alone, else None."""
    if not is_data(bias):
        return None
    hidden = bias == -math.inf
    return ~hidden if bool((hidden | (bias == 0)).all()) else None


def is_data(tensor: Any) -> bool:
    """Return whether a tensor is nothing but its values: untraced, and without derivatives."""
    return not (
        tensor.requires_grad
        or tensor.is_meta
        or torch.compiler.is_compiling()
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or type(tensor) is not torch.Tensor
    )


class replace_sdpa:  # noqa: N801, used like a function
    """Context manager in which models compute their attention with tilewise.

    Inside the block, in every thread, `torch.nn.functional.scaled_dot_product_attention` is the
    function of this module, also where a module has imported it by name; and
    `torch.nn.MultiheadAttention` and `torch.nn.TransformerEncoder` keep off their fast path, which
    goes past that function. Blocks nest, and the one entered last counts.

    Out of reach is what holds PyTorch's function since before the block in an attribute, a
    closure or a default argument, and what does not call it: exported and scripted programs, and
    `torch.nn.MultiheadAttention` with `need_weights=True`.

    Attributes:
        served: How many calls tilewise served. A call in a compiled function counts when it is
            compiled, not when it runs.
        fallbacks: How many calls went to PyTorch, by reason.

    Args:
        fallback: What happens to a call that tilewise does not serve: `"raise"` an error that says
            why, or compute it with `"pytorch"`.
    """

    def __init__(self, fallback: Fallback = "raise") -> None:
        if fallback not in get_args(Fallback):
            allowed = " or ".join(map(repr, get_args(Fallback)))
            raise value_error("replace_sdpa", "fallback", f"be {allowed}", repr(fallback))
        self.fallback = fallback
        self.served = 0
        self.fallbacks: Counter[str] = Counter()

    def __enter__(self) -> replace_sdpa:
        with _changes:
            if not _blocks:
                _replace()
            _blocks.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        with _changes:
            del _blocks[len(_blocks) - 1 - _blocks[::-1].index(self)]
            if not _blocks:
                _restore()

    def __repr__(self) -> str:
        return (
            f"replace_sdpa(fallback={self.fallback!r}): {self.served} calls served, "
            f"{sum(self.fallbacks.values())} left to PyTorch {dict(self.fallbacks)}"
        )


_changes = Lock()
_counts = Lock()
_blocks: list[replace_sdpa] = []
_pytorchs: Callable[..., Any] = functional.scaled_dot_product_attention
_replaced: list[tuple[dict[str, Any], str, Any]] = []
_fast_path = True


def _replace() -> None:
    """Put the rerouting function where modules hold PyTorch's."""
    global _pytorchs, _fast_path
    _pytorchs = functional.scaled_dot_product_attention
    sought = {id(_pytorchs), id(torch._C._nn.scaled_dot_product_attention)}
    for module, namespace in _namespaces():
        # The rest of PyTorch reaches it through torch.nn.functional.
        if module.startswith("torch.") and module != functional.__name__:
            continue
        for name, value in list(namespace.items()):
            if id(value) in sought and namespace is not globals():
                _replaced.append((namespace, name, value))
                namespace[name] = _rerouted
    _fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)


def _restore() -> None:
    for namespace, name, value in _replaced:
        if namespace.get(name) is _rerouted:
            namespace[name] = value
    _replaced.clear()
    torch.backends.mha.set_fastpath_enabled(_fast_path)


def _namespaces() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in list(sys.modules.items()):
        namespace = getattr(module, "__dict__", None)
        if isinstance(namespace, dict):
            yield name, namespace


def _rerouted(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Serve a call, or do with it what the innermost block says; after the last one, nothing."""
    innermost = _blocks[-1:]
    if innermost:
        refused = refusal(query, key, value)
        if refused is None:
            _count(None)
            return scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if innermost[0].fallback == "raise":
            hint = "replace_sdpa(fallback='pytorch') leaves such calls to PyTorch"
            raise unsupported(NAME, f"{refused}; {hint}")
        _count(refused)
    return _pytorchs(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _count(reason: str | None) -> None:
    """Count a call; one that is compiled counts when it is compiled."""
    with _counts:
        for block in _blocks[-1:]:
            block.served += reason is None
            if reason is not None:
                block.fallbacks[reason] += 1


__all__ = ["replace_sdpa", "scaled_dot_product_attention"]
