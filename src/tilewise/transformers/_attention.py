"""The attention function that transformers calls in each layer."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from tilewise.base.errors import type_error, unsupported
from tilewise.base.masks import PackedBits, RowIntervals, causal, dense, window

from ._masks import INTERVAL_ENDS, NAME

Lowered = RowIntervals | PackedBits

MAKES_MASKS = bool(find_spec("transformers") and find_spec("transformers.masking_utils"))
"""Whether transformers lets an implementation make the masks, as it does since 4.53."""

# What these carry would change the result, and tilewise has no equal for it.
_REFUSED = {
    "output_attentions": "probabilities are never stored; use attn_implementation='eager' for them",
    "head_mask": "heads cannot be masked one by one; use attn_implementation='eager'",
    "cache": "paged caches (continuous batching) are not served",
    "indices": "attention to selected keys is not served; use attn_implementation='sdpa'",
    "block_indices": "attention to selected blocks is not served; use attn_implementation='sdpa'",
    "sinks": "sinks that differ between queries are not served; use attn_implementation='sdpa'",
}


def attention_forward(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    position_bias: Any = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """Compute the attention of one layer for `attn_implementation="tilewise"`.

    Args:
        module: The layer; `module.is_causal` counts where `is_causal` and the mask are None.
        query: `(B, H, N, D)`.
        key: `(B, Hk, Nk, D)`; Hk divides H.
        value: `(B, Hk, Nk, Dv)`.
        attention_mask: What `attention_mask` of this package made; or a boolean mask (True is
            seen) or an additive one that broadcasts to `(B, H, N, Nk)`; or None.
        dropout: Probability of dropout.
        scaling: Factor of `q k^T`; `D ** -0.5` by default.
        is_causal: Whether query i sees the keys up to i, where there is no mask.
        sliding_window: How many keys a causal query sees, where there is no mask.
        softcap: Soft cap of the logits.
        s_aux: `(H,)`, a learned logit per head in the denominator.
        position_bias: Added to the logits; broadcasts to `(B, H, N, Nk)`.
        **kwargs: What other implementations read.

    Returns:
        `(B, N, H, Dv)`, and None in place of the probabilities.

    Raises:
        Unsupported: The layer asks for what tilewise does not have.
    """
    from tilewise.torch import attention

    for name, reason in _REFUSED.items():
        asked = kwargs.get(name)
        if asked is not None and asked is not False:
            raise unsupported(NAME, f"{name}: {reason}")
    query, key, value = _of_one_batch(query, key, value)
    mask, bias = _mask_and_bias(attention_mask, query, key, position_bias)
    _check_future(module, attention_mask, query, key)
    if attention_mask is None and query.shape[2] > 1:
        given = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = _causal(sliding_window) if given else None
    o = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        mask=mask,
        bias=bias,
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.reshape(-1).to(query.dtype),
        softmax_scale=scaling,
        dropout_p=dropout,
        layout="bnhd",
    )
    return o, None


def _of_one_batch(*tensors: Any) -> Iterator[Any]:
    """Repeat tensors of batch 1, such as learned queries, for the batch of the others."""
    B = max(tensor.shape[0] for tensor in tensors)
    return (t if t.shape[0] == B else t.expand(B, *t.shape[1:]) for t in tensors)


def _check_future(module: Any, mask: Any, query: Any, key: Any) -> None:
    """Refuse a mask of padding alone in a layer that leaves hiding the future to its own code."""
    if MAKES_MASKS or mask is None or mask.ndim != 4 or mask.shape[2] != 1:
        return
    is_decoder = getattr(module, "is_causal", False)
    is_decoder = is_decoder and not getattr(module, "is_cross_attention", False)
    if is_decoder and 1 < query.shape[2] <= key.shape[2]:
        reason = f"{type(module).__name__} gives a mask that does not hide the future"
        raise unsupported(NAME, f"{reason}; transformers 4.53 or later may serve it")


def _causal(sliding_window: int | None) -> Any:
    mask = causal(align="top_left")
    if sliding_window is None:
        return mask
    return mask & window(sliding_window - 1, 0, align="top_left")


def _mask_and_bias(given: Any, query: Any, key: Any, position_bias: Any) -> tuple[Any, Any]:
    """Return a mask and a bias that together mean the attention mask and the position bias."""
    import torch

    from tilewise.torch.sdpa import is_data

    bias = None if position_bias is None else position_bias.to(query.dtype)
    if given is None:
        return None, bias
    if not isinstance(given, torch.Tensor):
        raise type_error(NAME, "attention_mask", "be a torch.Tensor", type(given).__name__)
    if given.dtype is torch.int32:
        if given.ndim != 4 or given.shape[-1] != INTERVAL_ENDS:
            reason = f"row intervals of shape {tuple(given.shape)}: the model edited its mask"
            raise unsupported(NAME, f"{reason}; use attn_implementation='sdpa'")
        return given, bias
    if given.dtype is not torch.bool and not given.is_floating_point():
        requirement = "be boolean, additive floating-point or int32 row intervals"
        raise type_error(NAME, "attention_mask", requirement, str(given.dtype))
    N, Nk = query.shape[2], key.shape[2]
    lowered = _lowered_once(given, N, Nk) if is_data(given) and given.ndim == 4 else None
    if lowered is not None:
        return lowered, bias
    given = given[..., :Nk]
    if given.dtype is torch.bool:
        return given, bias
    added = given.to(query.dtype)
    return None, added if bias is None else bias + added


_recent: list[tuple[weakref.ref[Any], tuple[int, ...], Lowered | None]] = []


def _lowered_once(given: Any, N: int, Nk: int) -> Lowered | None:
    """Return `_lowered` of a mask, worked out once for all the layers that share the mask."""
    if given.is_inference():  # its changes are not counted
        return _lowered(given[..., :Nk], N)
    key = (given._version, N, Nk)
    for reference, known, result in _recent:
        if reference() is given and known == key:
            return result
    result = _lowered(given[..., :Nk], N)
    kept = [entry for entry in _recent if entry[0]() is not None]
    _recent[:] = [*kept[-3:], (weakref.ref(given), key, result)]
    return result


def _lowered(given: Any, N: int) -> Lowered | None:
    """Return what a mask means to the kernels, or None if it does more than hide keys."""
    import torch

    if given.dtype is not torch.bool:
        hidden = given <= torch.finfo(given.dtype).min / 2
        if not bool((hidden | (given == 0)).all()):
            return None
        given = ~hidden
    B, H, _, Nk = given.shape
    return dense(given.cpu().numpy()).lower(B, H, N, Nk)
