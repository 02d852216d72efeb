"""Attention on packed sequences of PyTorch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tilewise.base.dims import show
from tilewise.base.errors import type_error, value_error
from tilewise.base.literals import to_literal
from tilewise.base.masks import Mask
from tilewise.ops.attention.record import FLAT
from tilewise.ops.attention.spec import PACKED, PACKED_NAME
from tilewise.ops.attention.spec.arguments import DROPOUT, SCALE, SHAPES, SOFTCAP
from tilewise.ops.attention.spec.sequences import check_mask

from .attention import AttentionResult, literal
from .autodiff import forward
from .checks import autocast, check_tensors, seed_of, shown

Boundaries: TypeAlias = Tensor | NDArray[np.integer[Any]] | Sequence[int]


class VarlenOptions(TypedDict, total=False):
    """The options of packed attention that do not change the type of its result."""

    mask: Mask | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    softmax_scale: float | None
    dropout_p: float
    seed: int | Tensor | None
    implementation: str | None


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Boundaries,
    cu_seqlens_k: Boundaries | None = ...,
    *,
    return_lse: Literal[False] = ...,
    return_max_logit: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    **options: Unpack[VarlenOptions],
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Boundaries,
    cu_seqlens_k: Boundaries | None = ...,
    *,
    return_lse: bool = ...,
    return_max_logit: bool = ...,
    return_entropy: bool = ...,
    **options: Unpack[VarlenOptions],
) -> Tensor | AttentionResult: ...
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Boundaries,
    cu_seqlens_k: Boundaries | None = None,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_max_logit: bool = False,
    return_entropy: bool = False,
    implementation: str | None = None,
) -> Tensor | AttentionResult:
    """Compute softmax attention of sequences that are packed one after another, without padding.

    Sequence s has the queries from `cu_seqlens_q[s]` up to, not including, `cu_seqlens_q[s + 1]`,
    and sees its own keys alone. Everything is as in `tilewise.numpy.attention_varlen`, with the
    derivatives and transforms of `attention`.

    Args:
        q: `(total_q, H, D)`, a dtype that `attention` takes.
        k: `(total_k, Hk, D)`, dtype of q. Hk must divide H.
        v: `(total_k, Hk, Dv)`, dtype of q.
        cu_seqlens_q: `(S + 1,)`, an int32 or int64 tensor or array, or a list, ascending from 0 to
            total_q.
        cu_seqlens_k: The same for keys, up to total_k; by default that of the queries. The length
            of the longest sequence follows from it and is not asked for.
        mask: Made of `causal`, `window`, `prefix` and `chunked`, for each sequence by itself.
        bias: `(H or 1, total_q, max_k or 1)`, with max_k keys of the longest sequence, counted from
            each one's first; dtype of q, or float32 where q has 16 bits, as are the next two.
        alibi_slopes: `(H,)` or `(S, H)`. Has no gradient.
        softcap: As in `attention`, as is all that follows.
        sinks: `(H,)`.
        softmax_scale: Factor of `q k^T`; `D ** -0.5` by default.
        dropout_p: Probability with which a pair is left out of `o`.
        seed: Which pairs those are; for dropout, s is the batch entry.
        return_lse: Return also `lse`, `(H, total_q)`.
        return_max_logit: Return also the largest attended logit of each row. Has no gradient.
        return_entropy: Return also the entropy of each row's probabilities. Has no gradient.
        implementation: Name of the implementation, which never falls back to another.

    Returns:
        `o`, `(total_q, H, Dv)`, in the dtype of q; or an `AttentionResult` where more was asked
        for.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, device or value.
        Unsupported: The implementation does not serve the call, or a third derivative is asked for.

    Accuracy:
        That of `attention`.

    Source:
        As for `tilewise.numpy.attention`.
    """
    q, k, v, bias = autocast(q, k, v, bias)
    check_tensors(PACKED_NAME, q, k, v, bias, sinks, alibi_slopes, PACKED, (PACKED,))
    for name, tensor in (("k", k), ("v", v)):
        if tensor.ndim != 3:
            requirement = f"have shape {show(SHAPES[PACKED][name][0])}"
            raise value_error(PACKED_NAME, name, requirement, tuple(tensor.shape))
    starts = _starts("cu_seqlens_q", cu_seqlens_q)
    starts_k = None if cu_seqlens_k is None else _starts("cu_seqlens_k", cu_seqlens_k)
    if softcap is not None:
        softcap = SOFTCAP.check(PACKED_NAME, softcap)
    if softmax_scale is not None:
        softmax_scale = SCALE.check(PACKED_NAME, softmax_scale)
    dropout_p = DROPOUT.check(PACKED_NAME, dropout_p)
    seed = seed_of(PACKED_NAME, seed, dropout_p)
    text = None if mask is None else to_literal(check_mask(mask))[0]
    options = literal(text, softcap, softmax_scale, dropout_p, PACKED, implementation)
    tensors = [t.unsqueeze(0) for t in (q, k, v)]
    inputs = (*tensors, bias, sinks, alibi_slopes, seed, starts, starts_k)
    needed = (True, True, bool(return_max_logit), bool(return_entropy))
    results = forward(FLAT, inputs, options, needed)
    o, lse, max_logit, entropy = [t if t is None else t.squeeze(0) for t in results]
    if not (return_lse or return_max_logit or return_entropy):
        return o
    return AttentionResult(o, lse if return_lse else None, max_logit, entropy)


def _starts(name: str, cu_seqlens: Any) -> Tensor:
    """Return boundaries as a tensor, which a graph takes as an input and not as constants."""
    if cu_seqlens is None:
        raise type_error(PACKED_NAME, name, "be given", "None")
    if not isinstance(cu_seqlens, Tensor) and torch.compiler.is_dynamo_compiling():
        # It cannot trace the dtype of an array.
        cu_seqlens = torch.as_tensor(cu_seqlens, device="cpu")
    if not isinstance(cu_seqlens, Tensor):
        array = np.asarray(cu_seqlens)
        if array.dtype not in (np.int32, np.int64):
            raise type_error(PACKED_NAME, name, "be int32 or int64", str(array.dtype))
        return torch.from_numpy(array.astype(np.int64))
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise type_error(PACKED_NAME, name, "be int32 or int64", shown(cu_seqlens.dtype))
    if cu_seqlens.ndim != 1:
        raise value_error(PACKED_NAME, name, "have shape (S + 1,)", tuple(cu_seqlens.shape))
    return cu_seqlens
