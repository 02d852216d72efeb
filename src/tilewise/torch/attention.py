"""Attention on PyTorch tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tilewise.base.dims import show
from tilewise.base.errors import type_error, unsupported, value_error
from tilewise.base.literals import DENSE, ROWS, to_literal
from tilewise.base.masks import Mask, PackedBits, RowIntervals
from tilewise.ops.attention.record import FLAT, MASK_ARRAYS
from tilewise.ops.attention.spec.arguments import (
    DROPOUT,
    LAYOUTS,
    NAME,
    QUERY,
    SCALE,
    SEED,
    SOFTCAP,
)

from .autodiff import forward, is_traced, register

register(FLAT)

_WIDE = (torch.float32, torch.float64)
_NARROW = (torch.bfloat16, torch.float16)
# PyTorch 2.6 may lack it.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
_MASK_TEXTS = {torch.bool: DENSE, torch.int32: ROWS}
_TENSORS = ("q", "k", "v", "bias", "sinks", "alibi_slopes")
_REQUIRED = ("q", "k", "v")
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
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_max_logit: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = ...,
    return_max_logit: bool = ...,
    return_entropy: bool = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor | AttentionResult: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
) -> Tensor | AttentionResult:
    r"""Compute softmax attention, with derivatives of first and second order.

    `o = softmax(s) v`, `s = softcap tanh(scale q k^T / softcap) + bias - slope |i + Nk - N - j|`,
    and -inf where the mask hides a key. A hidden key is absent: NaN there reaches nothing. A row
    without keys has `o = 0` and `lse = -inf`.

    `o` and `lse` are differentiable with respect to q, k, v, bias and sinks, in reverse and forward
    mode and in one over the other, under every transform of `torch.func`, and inside
    `torch.compile(fullgraph=True)` and `torch.export`. Nothing of size N x Nk is saved.

    Args:
        q: `(B, H, N, D)`, float64, float32, bfloat16 or float16; the latter two are computed in
            float32. D is at most 512. Under autocast, q, k, v and bias are cast first.
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
    if torch.is_autocast_enabled("cpu"):
        q, k, v, bias = _autocast(q, k, v, bias)
    dtype = _check(q, k, v, bias, sinks, alibi_slopes, layout)
    if dtype not in _WIDE:
        q, k, v, bias, sinks, alibi_slopes = [
            t if t is None else t.float() for t in (q, k, v, bias, sinks, alibi_slopes)
        ]
    if softcap is not None:
        softcap = SOFTCAP.check(NAME, softcap)
    if softmax_scale is not None:
        softmax_scale = SCALE.check(NAME, softmax_scale)
    if dropout_p != 0.0 or seed is not None:
        dropout_p = DROPOUT.check(NAME, dropout_p)
        seed = _seed(seed, dropout_p)
    text, arrays = (None, ()) if mask is None else _mask(mask, q, k, layout)
    write = _options if torch.compiler.is_compiling() else _known_options
    options = write(text, softcap, softmax_scale, dropout_p, layout, implementation)
    inputs: tuple[Any, ...] = (q, k, v)
    if arrays or not (bias is sinks is alibi_slopes is seed is None):
        inputs = (q, k, v, bias, sinks, alibi_slopes, seed, *arrays)
    needed = (True, True, bool(return_max_logit), bool(return_entropy))
    o, lse, max_logit, entropy = forward(FLAT, inputs, options, needed)
    if dtype not in _WIDE:
        o = o.to(dtype)
    if not (return_lse or return_max_logit or return_entropy):
        return o
    return AttentionResult(o, lse if return_lse else None, max_logit, entropy)


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


# torch.compile warns of a cache. Typed, because 1, 1.0 and True are one key otherwise.
_known_options = lru_cache(maxsize=256, typed=True)(_options)


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast as autocast does for torch.nn.functional.scaled_dot_product_attention."""
    dtype = torch.get_autocast_dtype("cpu")
    casts = (*_NARROW, torch.float32)
    return tuple(
        [t.to(dtype) if isinstance(t, Tensor) and t.dtype in casts else t for t in tensors]
    )


def _check(
    q: Any, k: Any, v: Any, bias: Any, sinks: Any, alibi_slopes: Any, layout: object
) -> torch.dtype:
    """Return the dtype of q after checking what shapes and values say nothing about."""
    dtype, cpu = None, True
    given = (q, k, v, bias, sinks, alibi_slopes)
    for name, tensor in zip(_TENSORS, given, strict=True):
        if tensor is None and name not in _REQUIRED:
            continue
        if not isinstance(tensor, Tensor):
            raise type_error(NAME, name, "be a torch.Tensor", type(tensor).__name__)
        if tensor.is_nested or tensor.layout is not torch.strided:
            got = "a nested tensor" if tensor.is_nested else str(tensor.layout)
            raise type_error(NAME, name, "be a dense tensor", got)
        if dtype is None:
            dtype, cpu = _first(tensor), tensor.is_cpu
        elif tensor.dtype is not dtype and not (
            dtype in _NARROW and tensor.dtype is torch.float32 and name not in _REQUIRED
        ):
            requirement = f"have dtype {_shown(dtype)} (from q)"
            raise type_error(NAME, name, requirement, _shown(tensor.dtype))
        elif tensor.is_cpu is not cpu:
            raise value_error(NAME, name, f"be on {q.device} (as q)", str(tensor.device))
    if layout not in LAYOUTS:
        raise value_error(NAME, "layout", f"be {' or '.join(map(repr, LAYOUTS))}", repr(layout))
    if q.ndim != FLAT.rank:
        wanted = show(QUERY.in_layout(str(layout))[0])
        raise value_error(NAME, "q", f"have shape {wanted}", tuple(q.shape))
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        requirement = "be without requires_grad, for it has no gradient (pass it detached)"
        raise value_error(NAME, "alibi_slopes", requirement, "requires_grad=True")
    return dtype


def _first(q: Tensor) -> torch.dtype:
    """Return the dtype of q, which the other tensors must have too."""
    dtype = q.dtype
    if dtype not in _WIDE and dtype not in _NARROW:
        requirement = "have dtype float64, float32, bfloat16 or float16"
        raise type_error(NAME, "q", requirement, _shown(dtype))
    if not q.is_cpu and q.device.type != "meta":
        raise unsupported(NAME, f"there is no implementation for device {q.device} yet")
    return dtype


def _shown(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _seed(seed: Any, dropout_p: float) -> Tensor | None:
    """Return the seed as a tensor, which a graph takes as an input and not as a constant."""
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.ndim != 0:
            got = f"shape {tuple(seed.shape)} of {_shown(seed.dtype)}"
            raise type_error(NAME, "seed", "be an integer or an int64 tensor of shape ()", got)
        return seed if dropout_p > 0 else None
    if seed is not None:
        seed = SEED.check(NAME, seed)
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64)
    return torch.full((), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64)


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
        got = f"a tensor of {_shown(mask.dtype)}"
        requirement = "be a tilewise mask or a boolean tensor (a mask that is added is a bias)"
        raise type_error(NAME, "mask", requirement, got)
    if mask.device != q.device:
        raise value_error(NAME, "mask", f"be on {q.device} (as q)", str(mask.device))
    return _MASK_TEXTS[mask.dtype], (mask,)


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
    known = text, tuple([torch.from_numpy(array) for array in arrays])
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
