"""Attention on packed sequences, and its derivatives, on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, overload

from numpy.typing import ArrayLike

from tilewise.base.masks import Mask
from tilewise.ops.attention.spec import (
    AttentionCall,
    AttentionGrads,
    OutputTangents,
    RowStats,
    Want,
    prepare_jvp,
    prepare_tangents,
    prepare_vjp,
    prepare_vjp_jvp,
)

from .attention import (
    Array,
    AttentionResult,
    Function,
    grads_of,
    prepared,
    result_of,
    tangents_of,
    with_options,
)


class VarlenOptions(TypedDict, total=False):
    """The options of packed attention; see `attention_varlen`.

    Derivatives take those of the forward pass.
    """

    mask: Mask | None
    bias: Array | None
    alibi_slopes: Array | None
    softcap: float | None
    sinks: Array | None
    softmax_scale: float | None
    dropout_p: float
    seed: int | None
    implementation: str | None


def _with_options(function: Function) -> Function:
    return with_options(function, VarlenOptions.__annotations__)


@overload
def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = ...,
    *,
    return_lse: Literal[False] = ...,
    return_stats: Literal[False] = ...,
    return_max_logit: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    **options: Unpack[VarlenOptions],
) -> Array: ...
@overload
def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = ...,
    *,
    return_lse: bool = ...,
    return_stats: bool = ...,
    return_max_logit: bool = ...,
    return_entropy: bool = ...,
    **options: Unpack[VarlenOptions],
) -> Array | AttentionResult: ...
@_with_options
def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    return_lse: bool = False,
    return_stats: bool = False,
    return_max_logit: bool = False,
    return_entropy: bool = False,
    **options: Unpack[VarlenOptions],
) -> Array | AttentionResult:
    r"""Compute softmax attention of sequences that are packed one after another, without padding.

    Sequence s has the queries from `cu_seqlens_q[s]` up to, not including, `cu_seqlens_q[s + 1]`,
    and sees its own keys alone, from `cu_seqlens_k[s]` to `cu_seqlens_k[s + 1]`. Each has the bits
    of a call of `attention` on it alone. A sequence may be empty; queries without keys have `o = 0`
    and `lse = -inf`.

    Args:
        q: `(total_q, H, D)`, a dtype that `attention` takes. D is at most 512.
        k: `(total_k, Hk, D)`, dtype of q. Hk must divide H; head h reads head `h // (H // Hk)`.
        v: `(total_k, Hk, Dv)`, dtype of q. Dv is at most 512.
        cu_seqlens_q: `(S + 1,)`, int32 or int64, ascending from 0 to total_q.
        cu_seqlens_k: The same for keys, up to total_k; by default that of the queries. The length
            of the longest sequence follows from it and is not asked for.
        return_lse: Return also `lse = log sum exp s`, `(H, total_q)`, with the sink.
        return_stats: Return also what the derivatives take: the pair `RowStats(m, log_l)` and
            `o_full`.
        return_max_logit: Return also the largest attended logit of each row.
        return_entropy: Return also the entropy of each row's probabilities.
        **options: Those of `attention`, without layout. The mask is made of `causal`, `window`,
            `prefix` and `chunked`, and applies to each sequence by itself. The bias has the shape
            `(H or 1, total_q, max_k or 1)`, with max_k keys of the longest sequence, counted from
            each one's first; alibi_slopes `(H,)` or `(S, H)`. For dropout, s is the batch entry.

    Returns:
        `o`, `(total_q, H, Dv)`, in the dtype of q; or an `AttentionResult` where more was asked
        for.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, memory layout or value.
        Unsupported: The named implementation does not serve the call.

    Accuracy:
        That of `attention`.

    Source:
        As for `attention`.
    """
    call, function = _prepared("forward", q, k, v, (cu_seqlens_q, cu_seqlens_k), options)
    want = Want(return_lse, return_max_logit, return_entropy, return_stats)
    result = result_of(call, function(call, want), with_stats=return_stats)
    more = return_lse or return_stats or return_max_logit or return_entropy
    return result if more else result.o


@_with_options
def attention_varlen_vjp(
    do: Array | None,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    stats: RowStats | Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    dlse: Array | None = None,
    **options: Unpack[VarlenOptions],
) -> AttentionGrads:
    """Compute the gradients of packed attention; the formulas are those of `attention_vjp`.

    Args:
        do: `(total_q, H, Dv)`, dtype of q. Cotangent of o; None is zero.
        q: `(total_q, H, D)`, as in the forward pass.
        k: `(total_k, Hk, D)`, dtype of q.
        v: `(total_k, Hk, Dv)`, dtype of q.
        o: `(total_q, H, Dv)`. Output of the forward pass; of 16 bits rather `o_full`, in float32.
        stats: `RowStats` of the forward pass, or its lse `(H, total_q)`.
        cu_seqlens_q: `(S + 1,)`, as in the forward pass.
        cu_seqlens_k: `(S + 1,)`, as in the forward pass.
        dlse: `(H, total_q)`, dtype of lse. Cotangent of lse; zero by default.
        **options: Those of `attention_varlen`, as in the forward pass.

    Returns:
        Gradients in the shapes and dtypes of their arguments; `dbias` is 0 behind the last key of
        each sequence.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, memory layout or value.
        Unsupported: The named implementation does not serve the call.
    """
    call, function = _prepared("vjp", q, k, v, (cu_seqlens_q, cu_seqlens_k), options)
    return grads_of(call, function(call, prepare_vjp(call, do, o, stats, dlse)))


@_with_options
def attention_varlen_jvp(
    tq: Array | None,
    tk: Array | None,
    tv: Array | None,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    stats: RowStats | Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    tbias: Array | None = None,
    tsinks: Array | None = None,
    **options: Unpack[VarlenOptions],
) -> OutputTangents:
    """Compute the tangents of o and lse; the formulas are those of `attention_jvp`.

    Args:
        tq: `(total_q, H, D)`, dtype of q. Tangent of q; None is zero, here and below.
        tk: `(total_k, Hk, D)`, dtype of q. Tangent of k.
        tv: `(total_k, Hk, Dv)`, dtype of q. Tangent of v.
        q: `(total_q, H, D)`, as in the forward pass.
        k: `(total_k, Hk, D)`, dtype of q.
        v: `(total_k, Hk, Dv)`, dtype of q.
        o: `(total_q, H, Dv)`. Output of the forward pass; of 16 bits rather `o_full`, in float32.
        stats: `RowStats` of the forward pass, or its lse `(H, total_q)`.
        cu_seqlens_q: `(S + 1,)`, as in the forward pass.
        cu_seqlens_k: `(S + 1,)`, as in the forward pass.
        tbias: Exactly the shape of bias, and one of its dtypes. Tangent of bias.
        tsinks: `(H,)`, a dtype that sinks may have. Tangent of sinks.
        **options: Those of `attention_varlen`, as in the forward pass.

    Returns:
        `to`, `(total_q, H, Dv)`, in the dtype of q, and `tlse`, `(H, total_q)`, in that of lse.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, memory layout or value.
        Unsupported: The implementation has no such function or does not serve the call.
    """
    call, function = _prepared("jvp", q, k, v, (cu_seqlens_q, cu_seqlens_k), options)
    tangents = prepare_jvp(call, tq, tk, tv, o, stats, tbias, tsinks)
    return tangents_of(call, function(call, tangents))


@_with_options
def attention_varlen_forward_jvp(
    tq: Array | None,
    tk: Array | None,
    tv: Array | None,
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    tbias: Array | None = None,
    tsinks: Array | None = None,
    **options: Unpack[VarlenOptions],
) -> tuple[AttentionResult, OutputTangents]:
    """Compute packed attention with the tangents of o and lse, in one pass over the keys.

    Args:
        tq: `(total_q, H, D)`, dtype of q. Tangent of q; None is zero, here and below.
        tk: `(total_k, Hk, D)`, dtype of q. Tangent of k.
        tv: `(total_k, Hk, Dv)`, dtype of q. Tangent of v.
        q: `(total_q, H, D)`, a dtype that `attention` takes.
        k: `(total_k, Hk, D)`, dtype of q.
        v: `(total_k, Hk, Dv)`, dtype of q.
        cu_seqlens_q: `(S + 1,)`, int32 or int64, ascending from 0 to total_q.
        cu_seqlens_k: The same for keys, up to total_k; by default that of the queries.
        tbias: Exactly the shape of bias, and one of its dtypes. Tangent of bias.
        tsinks: `(H,)`, a dtype that sinks may have. Tangent of sinks.
        **options: Those of `attention_varlen`.

    Returns:
        The result with `o`, `lse`, `stats` and `o_full`, and their tangents `(to, tlse)`.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, memory layout or value.
        Unsupported: The implementation has no such function or does not serve the call.
    """
    call, function = _prepared("forward_jvp", q, k, v, (cu_seqlens_q, cu_seqlens_k), options)
    tangents = prepare_tangents(call, tq, tk, tv, tbias, tsinks)
    outputs, moved = function(call, Want(lse=True, o_full=True), tangents)
    return result_of(call, outputs), tangents_of(call, moved)


@_with_options
def attention_varlen_vjp_jvp(
    do: Array | None,
    tq: Array | None,
    tk: Array | None,
    tv: Array | None,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    stats: RowStats | Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    dlse: Array | None = None,
    tbias: Array | None = None,
    tsinks: Array | None = None,
    tdo: Array | None = None,
    tdlse: Array | None = None,
    to: Array | None = None,
    tlse: Array | None = None,
    **options: Unpack[VarlenOptions],
) -> AttentionGrads:
    """Compute the tangents of the gradients; the formulas are those of `attention_vjp_jvp`.

    Args:
        do: `(total_q, H, Dv)`, dtype of q. Cotangent of o; None is zero, here and below.
        tq: `(total_q, H, D)`, dtype of q. Tangent of q.
        tk: `(total_k, Hk, D)`, dtype of q. Tangent of k.
        tv: `(total_k, Hk, Dv)`, dtype of q. Tangent of v.
        q: `(total_q, H, D)`, as in the forward pass.
        k: `(total_k, Hk, D)`, dtype of q.
        v: `(total_k, Hk, Dv)`, dtype of q.
        o: `(total_q, H, Dv)`. Output of the forward pass; of 16 bits rather `o_full`, in float32.
        stats: `RowStats` of the forward pass, or its lse `(H, total_q)`.
        cu_seqlens_q: `(S + 1,)`, as in the forward pass.
        cu_seqlens_k: `(S + 1,)`, as in the forward pass.
        dlse: `(H, total_q)`, dtype of lse. Cotangent of lse.
        tbias: Exactly the shape of bias, and one of its dtypes. Tangent of bias.
        tsinks: `(H,)`, a dtype that sinks may have. Tangent of sinks.
        tdo: `(total_q, H, Dv)`, dtype of q. Tangent of do.
        tdlse: `(H, total_q)`, dtype of lse. Tangent of dlse.
        to: `(total_q, H, Dv)`, dtype of q or float32. What `attention_varlen_jvp` returned for the
            same tangents, with tlse; they are computed where they are not given, and more exactly
            than in 16 bits.
        tlse: `(H, total_q)`, dtype of lse.
        **options: Those of `attention_varlen`, as in the forward pass.

    Returns:
        Tangents of the gradients that `attention_varlen_vjp` returns, in the same fields and
        shapes.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, memory layout or value.
        Unsupported: The implementation has no such function or does not serve the call.
    """
    call, function = _prepared("vjp_jvp", q, k, v, (cu_seqlens_q, cu_seqlens_k), options)
    outputs = None if to is None and tlse is None else (to, tlse)
    second = prepare_vjp_jvp(
        call, do, tq, tk, tv, o, stats, dlse, tbias, tsinks, tdo, tdlse, outputs
    )
    return grads_of(call, function(call, second))


def _prepared(
    name: str,
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens: tuple[object, object],
    options: VarlenOptions,
) -> tuple[AttentionCall, Callable[..., Any]]:
    suffix = "" if name == "forward" else f"_{name}"
    given = {**options}
    return prepared(f"attention_varlen{suffix}", name, (q, k, v), given, VarlenOptions, cu_seqlens)
