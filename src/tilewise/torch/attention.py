"""Attention on PyTorch tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from tilewise.base.errors import type_error, unsupported, value_error
from tilewise.base.literals import DENSE, ROWS, to_literal
from tilewise.base.masks import Mask, PackedBits, RowIntervals
from tilewise.cache import KVCache, refuse_without_cache
from tilewise.ops.attention.record import FLAT, MASK_ARRAYS
from tilewise.ops.attention.spec import Want
from tilewise.ops.attention.spec.arguments import (
    DROPOUT,
    NAME,
    SCALE,
    SOFTCAP,
)

from .autodiff import forward, is_traced, register
from .cache import cached_attention
from .checks import autocast, check_tensors, seed_of, shown

register(FLAT)

# PyTorch 2.6 may lack it.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
_MASK_TEXTS = {torch.bool: DENSE, torch.int32: ROWS}
_MASKS = (Mask, RowIntervals, PackedBits)


class AttentionResult(NamedTuple):
    """Output of attention with the statistics that were asked for; the others are None.

    Attributes:
        o: `(B, H, N, Dv)`, or `(B, N, H, Dv)` with `layout="bnhd"`; dtype of q.
        lse: `(B, H, N)`, dtype of q, at least float32. Natural log-sum-exp of the logits.
        max_logit: `(B, H, N)`, dtype of lse. Largest attended logit, without the sink.
        entropy: `(B, H, N)`, dtype of lse. Entropy of the probabilities, with that of the sink.
    """

    o: Tensor
    lse: Tensor | None = None
    max_logit: Tensor | None = None
    entropy: Tensor | None = None


class AttentionOptions(TypedDict, total=False):
    """The options of attention that do not change the type of its result."""

    mask: Mask | RowIntervals | PackedBits | Tensor | NDArray[np.bool_] | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    softmax_scale: float | None
    dropout_p: float
    seed: int | Tensor | None
    layout: str
    implementation: str | None


@overload
def attention(
    q: Tensor,
    k: Tensor | None = ...,
    v: Tensor | None = ...,
    *,
    return_lse: Literal[False] = ...,
    return_max_logit: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    cache: KVCache | None = ...,
    sequences: Any = ...,
    lengths: Any = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor | None = ...,
    v: Tensor | None = ...,
    *,
    return_lse: bool = ...,
    return_max_logit: bool = ...,
    return_entropy: bool = ...,
    cache: KVCache | None = ...,
    sequences: Any = ...,
    lengths: Any = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor | AttentionResult: ...
def attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    mask: Mask | RowIntervals | PackedBits | Tensor | NDArray[np.bool_] | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    layout: str = "bhnd",
    return_lse: bool = False,
    return_max_logit: bool = False,
    return_entropy: bool = False,
    implementation: str | None = None,
    cache: KVCache | None = None,
    sequences: Any = None,
    lengths: Any = None,
) -> Tensor | AttentionResult:
    r"""Compute softmax attention, with derivatives of first and second order.

    `o = softmax(s) v`, `s = softcap tanh(scale q k^T / softcap) + bias - slope |i + Nk - N - j|`,
    and -inf where the mask hides a key. A hidden key is absent: NaN there reaches nothing. A row
    without keys has `o = 0` and `lse = -inf`.

    `o` and `lse` are differentiable with respect to q, k, v, bias and sinks, in reverse and forward
    mode and in one over the other, under every transform of `torch.func`, and inside
    `torch.compile(fullgraph=True)` and `torch.export`. Nothing of size N x Nk is saved.

    Args:
        q: `(B, H, N, D)`, float64, float32, bfloat16 or float16. Sums are float32 for the latter
            two, and bfloat16 needs the package ml_dtypes. D is at most 512. Under autocast, q, k,
            v and bias are cast first.
        k: `(B, Hk, Nk, D)`, dtype of q. Hk must divide H; head h reads head `h // (H // Hk)`.
        v: `(B, Hk, Nk, Dv)`, dtype of q. Dv is at most 512.
        mask: A mask such as `tilewise.causal()`, or a boolean tensor or array that broadcasts to
            `(B, H, N, Nk)`; True lets query i see key j. Or what a mask lowers to, with its row
            intervals also as an int32 tensor.
        bias: Broadcasts to `(B, H, N, Nk)`, dtype of q; where q has 16 bits, also float32, as
            alibi_slopes and sinks. Added to the logits.
        alibi_slopes: `(H,)` or `(B, H)`, dtype of q. `slope |i + Nk - N - j|` is subtracted. Has no
            gradient.
        softcap: c > 0: a logit x becomes `c tanh(x / c)`, before the bias and the mask.
        sinks: `(H,)`, dtype of q. One extra logit per head, in the denominator only; -inf is none.
        softmax_scale: Factor of `q k^T`; `D ** -0.5` by default.
        dropout_p: Probability with which a pair is left out of `o`, from 0 to 1; the others count
            `1 / (1 - dropout_p)` times. Row statistics do not change.
        seed: Integer below 2**64, or an int64 tensor of no dimensions, that decides which pairs
            those are; drawn from PyTorch's generator where it is not given.
        layout: `"bhnd"`, or `"bnhd"` for tensors `(B, N, H, D)`; bias and row statistics keep
            their order.
        return_lse: Return also `lse = log sum exp s`, with the sink.
        return_max_logit: Return also the largest attended logit of each row. Has no gradient.
        return_entropy: Return also the entropy of each row's probabilities. Has no gradient.
        implementation: Name of the implementation, which never falls back to another; by default
            the first that serves the call.
        cache: A `tilewise.KVCache`. k and v, where given, are appended to sequences of it; then q
            attends to all that these hold. Without dropout and derivatives, and torch.compile
            leaves the graph; see docs/cache.md.
        sequences: Which sequences of the cache, in the order of the batch; all by default.
        lengths: `(B,)` integers, with a cache: how many rows of q, k and v are real. Those behind
            them are not appended, and their o is 0.

    Returns:
        `o`, in the layout of q and its dtype; or an `AttentionResult` where more was asked for.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, device or value.
        Unsupported: The implementation does not serve the call, or a third derivative is asked for.

    Accuracy:
        `tilewise.ops.attention.spec.error_bound` bounds the error and derives the bound.

    Source:
        As for `tilewise.numpy.attention`, which computes the same bits.
    """
    if cache is not None:
        found = cached_attention(
            cache,
            q,
            k,
            v,
            want=Want(return_lse, return_max_logit, return_entropy),
            sequences=sequences,
            lengths=lengths,
            mask=mask,
            bias=bias,
            alibi_slopes=alibi_slopes,
            softcap=softcap,
            sinks=sinks,
            softmax_scale=softmax_scale,
            dropout_p=dropout_p,
            seed=seed,
            layout=layout,
            implementation=implementation,
        )
        more = return_lse or return_max_logit or return_entropy
        return AttentionResult(*found) if more else found[0]
    refuse_without_cache(sequences, lengths)
    q, k, v, bias = autocast(q, k, v, bias)
    check_tensors(NAME, q, k, v, bias, sinks, alibi_slopes, layout)
    if softcap is not None:
        softcap = SOFTCAP.check(NAME, softcap)
    if softmax_scale is not None:
        softmax_scale = SCALE.check(NAME, softmax_scale)
    if dropout_p != 0.0 or seed is not None:
        dropout_p = DROPOUT.check(NAME, dropout_p)
        seed = seed_of(NAME, seed, dropout_p)
    text, arrays = (None, ()) if mask is None else _mask(mask, q, k, layout)
    options = literal(text, softcap, softmax_scale, dropout_p, layout, implementation)
    inputs: tuple[Any, ...] = (q, k, v)
    if arrays or not (bias is sinks is alibi_slopes is seed is None):
        inputs = (q, k, v, bias, sinks, alibi_slopes, seed, None, None, *arrays)
    needed = (True, True, bool(return_max_logit), bool(return_entropy))
    o, lse, max_logit, entropy = forward(FLAT, inputs, options, needed)
    if not (return_lse or return_max_logit or return_entropy):
        return o
    return AttentionResult(o, lse if return_lse else None, max_logit, entropy)


def literal(*options: Any) -> str:
    """Return what is not a tensor as the text of a dictionary, see `_options`."""
    # torch.compile warns of a cache.
    write = _options if torch.compiler.is_compiling() else _known_options
    return write(*options)


def _options(
    mask: str | None,
    softcap: float | None,
    softmax_scale: float | None,
    dropout_p: float,
    layout: str,
    implementation: str | None,
) -> str:
    """Return what is not a tensor as a Python literal."""
    return (
        f"{{'mask': {mask!r}, 'softcap': {softcap!r}, 'softmax_scale': {softmax_scale!r}, "
        f"'dropout_p': {dropout_p!r}, 'layout': {layout!r}, 'implementation': {implementation!r}}}"
    )


# Typed, because 1, 1.0 and True are one key otherwise.
_known_options = lru_cache(maxsize=256, typed=True)(_options)


def _mask(mask: Any, q: Tensor, k: Tensor, layout: str) -> tuple[str, tuple[Tensor, ...]]:
    """Return a mask as a literal and its arrays as tensors."""
    if isinstance(mask, _MASKS):
        text, tensors = _tensors_of(mask)
        if len(tensors) > MASK_ARRAYS:
            return DENSE, (_visible(mask, q, k, layout),)
        return text, tensors
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(mask.copy())
    if not isinstance(mask, Tensor):
        requirement = "be a tilewise mask or a boolean tensor"
        raise type_error(NAME, "mask", requirement, type(mask).__name__)
    if mask.dtype not in _MASK_TEXTS:
        got = f"a tensor of {shown(mask.dtype)}"
        requirement = "be a tilewise mask or a boolean tensor (a mask that is added is a bias)"
        raise type_error(NAME, "mask", requirement, got)
    if mask.device != q.device:
        raise value_error(NAME, "mask", f"be on {q.device} (as q)", str(mask.device))
    return _MASK_TEXTS[mask.dtype], (mask,)


def _kept(tensor: Tensor) -> Tensor:
    """Return a new tensor without what a transform of `torch.func` puts around it as it is made.

    That dies with the transform, and the tensor is kept for longer.
    """
    if not torch.compiler.is_compiling():
        while is_functorch_wrapped_tensor(tensor):
            tensor = get_unwrapped(tensor)
    return tensor


def _tensors_of(mask: Mask | RowIntervals | PackedBits) -> tuple[str, tuple[Tensor, ...]]:
    """Return `to_literal` with tensors, which the mask keeps."""
    known: tuple[str, tuple[Tensor, ...]] | None = mask.__dict__.get("_tensors")
    if known is not None and (not is_traced() or torch.compiler.is_dynamo_compiling()):
        return known
    text, arrays = to_literal(mask)
    if arrays and _is_exporting() and torch.compiler.is_dynamo_compiling():
        # The exported program would hold a tensor without values in place of the array.
        reason = "torch.export with strict=True does not take the arrays of a new mask"
        raise unsupported(NAME, f"{reason}; use strict=False")
    known = text, tuple([_kept(torch.from_numpy(array)) for array in arrays])
    if not is_traced():
        mask.__dict__["_tensors"] = known
    return known


def _visible(mask: Any, q: Tensor, k: Tensor, layout: str) -> Tensor:
    """Return a mask of more arrays than an op takes as one boolean tensor."""
    if torch.compiler.is_compiling():
        reason = f"torch.compile takes no mask of more than {MASK_ARRAYS} arrays"
        raise unsupported(NAME, f"{reason}; give a boolean tensor")
    rows, heads = (2, 1) if layout == "bhnd" else (1, 2)
    sizes = q.shape[0], q.shape[heads], q.shape[rows], k.shape[rows]
    return torch.from_numpy(mask.to_bool(*sizes, operator=NAME))
