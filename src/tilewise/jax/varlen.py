"""Attention on packed sequences of JAX arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from tilewise.base.dims import Sizes
from tilewise.base.errors import type_error, value_error
from tilewise.base.literals import to_literal
from tilewise.base.masks import Mask
from tilewise.ops.attention.record import FLAT
from tilewise.ops.attention.spec import LIMITS, PACKED, PACKED_NAME
from tilewise.ops.attention.spec.arguments import DROPOUT, SCALE, SHAPES, SOFTCAP
from tilewise.ops.attention.spec.sequences import check_mask

from . import checks
from .attention import AttentionResult
from .autodiff import forward

Boundaries: TypeAlias = Array | NDArray[np.integer[Any]] | Sequence[int]


class VarlenOptions(TypedDict, total=False):
    """The options of packed attention that do not change the type of its result."""

    mask: Mask | None
    bias: Array | None
    alibi_slopes: Array | None
    softcap: float | None
    sinks: Array | None
    softmax_scale: float | None
    dropout_p: float
    seed: int | Array | None
    implementation: str | None


@overload
def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Boundaries,
    cu_seqlens_k: Boundaries | None = ...,
    *,
    return_lse: Literal[False] = ...,
    return_max_logit: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    **options: Unpack[VarlenOptions],
) -> Array: ...
@overload
def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Boundaries,
    cu_seqlens_k: Boundaries | None = ...,
    *,
    return_lse: bool = ...,
    return_max_logit: bool = ...,
    return_entropy: bool = ...,
    **options: Unpack[VarlenOptions],
) -> Array | AttentionResult: ...
def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Boundaries,
    cu_seqlens_k: Boundaries | None = None,
    *,
    mask: Mask | None = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Array | None = None,
    return_lse: bool = False,
    return_max_logit: bool = False,
    return_entropy: bool = False,
    implementation: str | None = None,
) -> Array | AttentionResult:
    """Compute softmax attention of sequences that are packed one after another, without padding.

    Sequence s has the queries from `cu_seqlens_q[s]` up to, not including, `cu_seqlens_q[s + 1]`,
    and sees its own keys alone. Everything is as in `tilewise.numpy.attention_varlen`, with the
    derivatives and transformations of `attention`. Programs know the number of sequences alone:
    the boundaries may change from call to call.

    Args:
        q: `(total_q, H, D)`, a dtype that `attention` takes.
        k: `(total_k, Hk, D)`, dtype of q. Hk must divide H.
        v: `(total_k, Hk, Dv)`, dtype of q.
        cu_seqlens_q: `(S + 1,)`, int32 or int64, or a list, ascending from 0 to total_q.
        cu_seqlens_k: The same for keys, up to total_k; by default that of the queries.
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
        ValueError: An argument has a wrong shape or value.
        Unsupported: The implementation does not serve the call, or a third derivative is asked for.
        JaxRuntimeError: When it runs: boundaries are wrong that were not known while tracing.

    Accuracy:
        That of `attention`.

    Source:
        As for `tilewise.numpy.attention`.
    """
    q = checks.array(PACKED_NAME, "q", q)
    k, v = (checks.array(PACKED_NAME, name, x, q.dtype) for name, x in (("k", k), ("v", v)))
    more = (("bias", bias), ("sinks", sinks), ("alibi_slopes", alibi_slopes))
    given = [checks.either(PACKED_NAME, name, x, q.dtype) for name, x in more]
    starts = _starts("cu_seqlens_q", cu_seqlens_q)
    starts_k = None if cu_seqlens_k is None else _starts("cu_seqlens_k", cu_seqlens_k)
    sizes = Sizes(PACKED_NAME, LIMITS)
    for name, x in (("q", q), ("k", k), ("v", v), ("sinks", given[1]), ("alibi_slopes", given[2])):
        if x is not None:
            sizes.match(name, SHAPES[PACKED][name], x.shape)
    _check_shapes(starts, starts_k, given[0], q.shape)
    dropout_p = DROPOUT.check(PACKED_NAME, dropout_p)
    options = {
        "mask": None if mask is None else to_literal(check_mask(mask))[0],
        "softcap": None if softcap is None else SOFTCAP.check(PACKED_NAME, softcap),
        "softmax_scale": None if softmax_scale is None else SCALE.check(PACKED_NAME, softmax_scale),
        "dropout_p": dropout_p,
        "layout": PACKED,
        "implementation": implementation,
    }
    inputs = (*(x[None] for x in (q, k, v)), *given)
    inputs += (checks.seed_words(PACKED_NAME, seed, dropout_p), starts, starts_k)
    needed = (True, True, bool(return_max_logit), bool(return_entropy))
    results = forward(FLAT, inputs, repr(options), needed)
    o, lse, max_logit, entropy = (None if x is None else x[0] for x in results)
    assert o is not None
    if not (return_lse or return_max_logit or return_entropy):
        found: Array = o
        return found
    return AttentionResult(o, lse if return_lse else None, max_logit, entropy)


def _check_shapes(starts: Array, starts_k: Array | None, bias: Any, q: tuple[int, ...]) -> None:
    """Raise where shapes are wrong that do not follow from those of the tensors."""
    if starts_k is not None and starts_k.shape != starts.shape:
        requirement = f"have {starts.size} entries (as cu_seqlens_q)"
        raise value_error(PACKED_NAME, "cu_seqlens_k", requirement, starts_k.size)
    total, heads = q[:2]
    if bias is None:
        return
    if (
        bias.ndim not in (2, 3)
        or bias.shape[-2] != total
        or bias.shape[:-2] not in ((), (1,), (heads,))
    ):
        requirement = f"have shape (H or 1, total_q, max_k or 1) with H={heads}, total_q={total}"
        raise value_error(PACKED_NAME, "bias", requirement, bias.shape)


def _starts(name: str, cu_seqlens: Any) -> Array:
    """Return boundaries as an array of JAX, with the bits that integers have there."""
    if cu_seqlens is None:
        raise type_error(PACKED_NAME, name, "be given", "None")
    found = cu_seqlens if isinstance(cu_seqlens, jax.Array) else np.asarray(cu_seqlens)
    if found.dtype not in (np.int32, np.int64):
        raise type_error(PACKED_NAME, name, "be int32 or int64", str(found.dtype))
    if found.ndim != 1:
        raise value_error(PACKED_NAME, name, "have shape (S + 1,)", found.shape)
    return jnp.asarray(found.astype(jax.dtypes.canonicalize_dtype(found.dtype)))
