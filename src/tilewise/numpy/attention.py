"""Attention and its derivatives on NumPy arrays."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from tilewise.base.masks import Mask
from tilewise.cache import KVCache, attend, refuse_without_cache
from tilewise.dispatch import choose
from tilewise.ops.attention.spec import (
    NAME,
    AttentionCall,
    AttentionGrads,
    AttentionOutputs,
    OutputTangents,
    RowStats,
    Want,
    laid_out,
    prepare,
    prepare_jvp,
    prepare_tangents,
    prepare_vjp,
    prepare_vjp_jvp,
)

Array = NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])


class AttentionResult(NamedTuple):
    """Output of attention with the statistics that were asked for; the others are None.

    Attributes:
        o: `(B, H, N, Dv)`, or `(B, N, H, Dv)` with `layout="bnhd"`; dtype of q.
        lse: `(B, H, N)`, dtype of q, at least float32. Natural log-sum-exp of the logits.
        stats: The same as a pair that keeps its digits, for the derivatives.
        max_logit: `(B, H, N)`, dtype of lse. Largest attended logit, without the sink.
        entropy: `(B, H, N)`, dtype of lse. Entropy of the probabilities, with that of the sink.
        o_full: `o` before it was rounded, in float32, where q has 16 bits; `o` itself otherwise.
            Returned with stats; the derivatives are more exact where they are given it as `o`.
    """

    o: Array
    lse: Array | None = None
    stats: RowStats | None = None
    max_logit: Array | None = None
    entropy: Array | None = None
    o_full: Array | None = None


class AttentionOptions(TypedDict, total=False):
    """The options of attention that do not change the type of its result; see `attention`.

    Derivatives take those of the forward pass.
    """

    mask: Mask | NDArray[np.bool_] | None
    bias: Array | None
    alibi_slopes: Array | None
    softcap: float | None
    sinks: Array | None
    softmax_scale: float | None
    dropout_p: float
    seed: int | None
    layout: str
    implementation: str | None


@overload
def attention(
    q: Array,
    k: Array | None = ...,
    v: Array | None = ...,
    *,
    return_lse: Literal[False] = ...,
    return_stats: Literal[False] = ...,
    return_max_logit: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    cache: KVCache | None = ...,
    sequences: Any = ...,
    lengths: Any = ...,
    **options: Unpack[AttentionOptions],
) -> Array: ...
@overload
def attention(
    q: Array,
    k: Array | None = ...,
    v: Array | None = ...,
    *,
    return_lse: bool = ...,
    return_stats: bool = ...,
    return_max_logit: bool = ...,
    return_entropy: bool = ...,
    cache: KVCache | None = ...,
    sequences: Any = ...,
    lengths: Any = ...,
    **options: Unpack[AttentionOptions],
) -> Array | AttentionResult: ...
def attention(
    q: Array,
    k: Array | None = None,
    v: Array | None = None,
    *,
    mask: Mask | NDArray[np.bool_] | None = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bhnd",
    return_lse: bool = False,
    return_stats: bool = False,
    return_max_logit: bool = False,
    return_entropy: bool = False,
    implementation: str | None = None,
    cache: KVCache | None = None,
    sequences: Any = None,
    lengths: Any = None,
) -> Array | AttentionResult:
    r"""Compute softmax attention.

    `o = softmax(s) v`, `s = softcap tanh(scale q k^T / softcap) + bias - slope |i + Nk - N - j|`,
    and -inf where the mask hides a key. A hidden key is absent: NaN there reaches nothing. A row
    without keys has `o = 0` and `lse = -inf`.

    Args:
        q: `(B, H, N, D)`, float64, float32, float16 or `ml_dtypes.bfloat16`. Sums are float32
            for the latter two. D is at most 512.
        k: `(B, Hk, Nk, D)`, dtype of q. Hk must divide H; head h reads head `h // (H // Hk)`.
        v: `(B, Hk, Nk, Dv)`, dtype of q. Dv is at most 512.
        mask: A mask such as `tilewise.causal()`, or a boolean array that broadcasts to
            `(B, H, N, Nk)`; True lets query i see key j.
        bias: Broadcasts to `(B, H, N, Nk)`, dtype of q; where q has 16 bits, also float32, as
            alibi_slopes and sinks. Added to the logits.
        alibi_slopes: `(H,)` or `(B, H)`, dtype of q. `slope |i + Nk - N - j|` is subtracted.
        softcap: c > 0: a logit x becomes `c tanh(x / c)`, before the bias and the mask.
        sinks: `(H,)`, dtype of q. One extra logit per head, in the denominator only; -inf is none.
        softmax_scale: Factor of `q k^T`; `D ** -0.5` by default.
        dropout_p: Probability with which a pair is left out of `o`, from 0 to 1; the others count
            `1 / (1 - dropout_p)` times. Row statistics do not change.
        seed: Integer below 2**64 that decides, with the batch entry, the head and the position of
            the query and the key, which pairs those are. Required where `dropout_p > 0`.
        layout: `"bhnd"`, or `"bnhd"` for tensors `(B, N, H, D)`; bias and row statistics keep
            their order.
        return_lse: Return also `lse = log sum exp s`, with the sink.
        return_stats: Return also what the derivatives take: the pair `RowStats(m, log_l)` and
            `o_full`.
        return_max_logit: Return also the largest attended logit of each row.
        return_entropy: Return also the entropy of each row's probabilities.
        implementation: Name of the implementation, which never falls back to another; by default
            the first that serves the call.
        cache: A `tilewise.KVCache`. k and v, where given, are appended to sequences of it; then q
            attends to all that these hold. Without dropout and derivatives; see docs/cache.md.
        sequences: Which sequences of the cache, in the order of the batch; all by default.
        lengths: `(B,)` integers, with a cache: how many rows of q, k and v are real. Those behind
            them are not appended, and their o is 0.

    Returns:
        `o`, in the layout of q and its dtype; or an `AttentionResult` where more was asked for.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, memory layout or value.
        Unsupported: The named implementation does not serve the call.

    Accuracy:
        `tilewise.ops.attention.spec.error_bound` bounds the error and derives the bound.

    Source:
        Dao 2023, FlashAttention-2 (arXiv:2307.08691), algorithm 1; Milakov & Gimelshein 2018
        (arXiv:1805.02867), algorithm 3; ALiBi: Press et al. 2021 (arXiv:2108.12409), section 3;
        sinks: Xiao et al. 2023 (arXiv:2309.17453), equation 2, with a learned logit in place of 0;
        dropout: Salmon et al. 2011, Philox4x32-10.
    """
    options: dict[str, Any] = {
        "mask": mask,
        "bias": bias,
        "alibi_slopes": alibi_slopes,
        "softcap": softcap,
        "sinks": sinks,
        "softmax_scale": softmax_scale,
        "dropout_p": dropout_p,
        "seed": seed,
        "layout": layout,
    }
    want = Want(return_lse, return_max_logit, return_entropy, return_stats)
    if cache is None:
        refuse_without_cache(sequences, lengths)
        call = prepare(q, k, v, **options)
        outputs = choose(NAME, call, implementation).forward(call, want)
    else:
        options |= {"sequences": sequences, "lengths": lengths, "implementation": implementation}
        call, outputs = attend(cache, q, k, v, want=want, **options)
    if not (return_lse or return_stats or return_max_logit or return_entropy):
        return laid_out(outputs.o, call.layout)
    return result_of(call, outputs, with_stats=return_stats)


def with_options(function: Function, names: Iterable[str]) -> Function:
    """Show options of attention by name in the signature of a function that takes them."""
    shown = inspect.signature(function)
    own = [p for p in shown.parameters.values() if p.kind is not p.VAR_KEYWORD]
    every = inspect.signature(attention).parameters
    options = [every[name] for name in names]
    function.__signature__ = shown.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return function


def _with_options(function: Function) -> Function:
    return with_options(function, AttentionOptions.__annotations__)


@_with_options
def attention_vjp(
    do: Array | None,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    stats: RowStats | Array,
    *,
    dlse: Array | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionGrads:
    r"""Compute the gradients of attention from the results of its forward pass.

    With `p = exp(s - m - log_l)` and `delta = rowsum(do * o) - dlse`:
    `ds = p * (keep * do v^T - delta)`, `dq = scale dx k`, `dk = scale dx^T q`,
    `dv = (p * keep)^T do`, `dbias = ds`, `dsinks = -sum exp(sink - lse) delta`, where `dx` is `ds`
    times the derivative of the soft cap and `keep` is 1, or the factor of dropout. A row without
    keys contributes nothing, except `dlse` to its sink.

    Args:
        do: `(B, H, N, Dv)`, dtype of q. Cotangent of o; None is zero.
        q: `(B, H, N, D)`, as in the forward pass.
        k: `(B, Hk, Nk, D)`, dtype of q.
        v: `(B, Hk, Nk, Dv)`, dtype of q.
        o: `(B, H, N, Dv)`. Output of the forward pass; of 16 bits rather `o_full`, in float32.
        stats: `RowStats` of the forward pass, or its lse `(B, H, N)`; the pair is more accurate
            where logits are large. Those of a larger softmax give the gradients of this part.
        dlse: `(B, H, N)`, dtype of lse. Cotangent of lse; zero by default.
        **options: Those of `attention`, as in the forward pass.

    Returns:
        Gradients in the layout and dtype of their arguments. `dbias` has the shape of bias, summed
        over its broadcast dimensions; it and `dsinks` are None where the argument was not given.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, memory layout or value.
        Unsupported: The named implementation does not serve the call.

    Accuracy:
        `tilewise.ops.attention.spec.error_bound` bounds the error and derives the bound.

    Source:
        Dao 2023, FlashAttention-2 (arXiv:2307.08691), algorithm 2.
    """
    call, function = _prepared("vjp", q, k, v, options)
    return grads_of(call, function(call, prepare_vjp(call, do, o, stats, dlse)))


@_with_options
def attention_jvp(
    tq: Array | None,
    tk: Array | None,
    tv: Array | None,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    stats: RowStats | Array,
    *,
    tbias: Array | None = None,
    tsinks: Array | None = None,
    **options: Unpack[AttentionOptions],
) -> OutputTangents:
    r"""Compute the tangents of o and lse from the results of the forward pass.

    With `p = exp(s - m - log_l)` and `tx = scale (tq k^T + q tk^T)`:
    `ts = tx * (1 - tanh(x / softcap)^2) + tbias`, `tlse = rowsum(p * ts) + exp(sink - lse) tsink`,
    `to = (p * keep * ts) v - tlse o + (p * keep) tv`, with `keep` of dropout. A row
    without keys has `to = 0`, and the tangent of its sink as `tlse`.

    Args:
        tq: `(B, H, N, D)`, dtype of q. Tangent of q; None is zero, here and below.
        tk: `(B, Hk, Nk, D)`, dtype of q. Tangent of k.
        tv: `(B, Hk, Nk, Dv)`, dtype of q. Tangent of v.
        q: `(B, H, N, D)`, as in the forward pass.
        k: `(B, Hk, Nk, D)`, dtype of q.
        v: `(B, Hk, Nk, Dv)`, dtype of q.
        o: `(B, H, N, Dv)`. Output of the forward pass; of 16 bits rather `o_full`, in float32.
        stats: `RowStats` of the forward pass, or its lse `(B, H, N)`.
        tbias: Exactly the shape of bias, and one of its dtypes. Tangent of bias.
        tsinks: `(H,)`, a dtype that sinks may have. Tangent of sinks.
        **options: Those of `attention`, as in the forward pass.

    Returns:
        `to`, in the layout and dtype of q, and `tlse`, `(B, H, N)`, in the dtype of lse.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, memory layout or value.
        Unsupported: The implementation has no such function or does not serve the call.
    """
    call, function = _prepared("jvp", q, k, v, options)
    tangents = prepare_jvp(call, tq, tk, tv, o, stats, tbias, tsinks)
    return tangents_of(call, function(call, tangents))


@_with_options
def attention_forward_jvp(
    tq: Array | None,
    tk: Array | None,
    tv: Array | None,
    q: Array,
    k: Array,
    v: Array,
    *,
    tbias: Array | None = None,
    tsinks: Array | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[AttentionResult, OutputTangents]:
    r"""Compute attention together with the tangents of o and lse, in one pass over the keys.

    `attention` and `attention_jvp` in one call: three times the work of the forward pass alone
    where the two calls do three and a half times as much. The result has the bits of `attention`;
    the formulas of the tangents are those of `attention_jvp`.

    Args:
        tq: `(B, H, N, D)`, dtype of q. Tangent of q; None is zero, here and below.
        tk: `(B, Hk, Nk, D)`, dtype of q. Tangent of k.
        tv: `(B, Hk, Nk, Dv)`, dtype of q. Tangent of v.
        q: `(B, H, N, D)`, as for `attention`.
        k: `(B, Hk, Nk, D)`, dtype of q.
        v: `(B, Hk, Nk, Dv)`, dtype of q.
        tbias: Exactly the shape of bias, and one of its dtypes. Tangent of bias.
        tsinks: `(H,)`, a dtype that sinks may have. Tangent of sinks.
        **options: Those of `attention`.

    Returns:
        The result with `o`, `lse`, `stats` and `o_full`, and their tangents `(to, tlse)`.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, memory layout or value.
        Unsupported: The implementation has no such function or does not serve the call.
    """
    call, function = _prepared("forward_jvp", q, k, v, options)
    tangents = prepare_tangents(call, tq, tk, tv, tbias, tsinks)
    outputs, moved = function(call, Want(lse=True, o_full=True), tangents)
    return result_of(call, outputs), tangents_of(call, moved)


@_with_options
def attention_vjp_jvp(
    do: Array | None,
    tq: Array | None,
    tk: Array | None,
    tv: Array | None,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    stats: RowStats | Array,
    *,
    dlse: Array | None = None,
    tbias: Array | None = None,
    tsinks: Array | None = None,
    tdo: Array | None = None,
    tdlse: Array | None = None,
    to: Array | None = None,
    tlse: Array | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionGrads:
    r"""Compute the tangents of the gradients: the JVP of `attention_vjp`.

    With `tdo = tdlse = None` this is the product of the Hessian of `sum(do * o) + sum(dlse * lse)`
    with the tangents. With what the other two name: `tp = p * (ts - tlse)`,
    `tdp = keep * (tdo v^T + do tv^T)`, `tdelta = rowsum(tdo * o + do * to) - tdlse`,
    `tds = tp * (dp - delta) + p * (tdp - tdelta)`; `tdx` is `tds` times the derivative of the soft
    cap plus `ds * tx` times its second derivative; `tdq = scale (tdx k + dx tk)`,
    `tdk = scale (tdx^T q + dx^T tq)`, `tdv = (tp * keep)^T do + (p * keep)^T tdo`,
    `tdbias = tds`.

    Args:
        do: `(B, H, N, Dv)`, dtype of q. Cotangent of o; None is zero, here and below.
        tq: `(B, H, N, D)`, dtype of q. Tangent of q.
        tk: `(B, Hk, Nk, D)`, dtype of q. Tangent of k.
        tv: `(B, Hk, Nk, Dv)`, dtype of q. Tangent of v.
        q: `(B, H, N, D)`, as in the forward pass.
        k: `(B, Hk, Nk, D)`, dtype of q.
        v: `(B, Hk, Nk, Dv)`, dtype of q.
        o: `(B, H, N, Dv)`. Output of the forward pass; of 16 bits rather `o_full`, in float32.
        stats: `RowStats` of the forward pass, or its lse `(B, H, N)`.
        dlse: `(B, H, N)`, dtype of lse. Cotangent of lse.
        tbias: Exactly the shape of bias, and one of its dtypes. Tangent of bias.
        tsinks: `(H,)`, a dtype that sinks may have. Tangent of sinks.
        tdo: `(B, H, N, Dv)`, dtype of q. Tangent of do.
        tdlse: `(B, H, N)`, dtype of lse. Tangent of dlse.
        to: `(B, H, N, Dv)`, dtype of q or float32. What `attention_jvp` returned for the same
            tangents, with tlse; they are computed where they are not given, and more exactly than
            in 16 bits.
        tlse: `(B, H, N)`, dtype of lse.
        **options: Those of `attention`, as in the forward pass.

    Returns:
        Tangents of the gradients that `attention_vjp` returns, in the same fields and shapes.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, memory layout or value.
        Unsupported: The implementation has no such function or does not serve the call.
    """
    call, function = _prepared("vjp_jvp", q, k, v, options)
    outputs = None if to is None and tlse is None else (to, tlse)
    second = prepare_vjp_jvp(
        call, do, tq, tk, tv, o, stats, dlse, tbias, tsinks, tdo, tdlse, outputs
    )
    return grads_of(call, function(call, second))


def _prepared(
    name: str, q: Array, k: Array, v: Array, options: AttentionOptions
) -> tuple[AttentionCall, Callable[..., Any]]:
    return prepared(f"attention_{name}", name, (q, k, v), {**options}, AttentionOptions)


def prepared(
    shown: str,
    name: str,
    tensors: tuple[Array, Array, Array],
    options: dict[str, Any],
    known: type,
    cu_seqlens: tuple[object, object] | None = None,
) -> tuple[AttentionCall, Callable[..., Any]]:
    """Return the validated call and the function that serves it.

    Args:
        shown: The name of the public function.
        name: That of the implementations' function.
        tensors: q, k, v.
        options: The keyword arguments.
        known: The TypedDict of those that there are.
        cu_seqlens: The boundaries of packed sequences.
    """
    for option in options.keys() - known.__annotations__.keys():
        raise TypeError(f"{shown}() got an unexpected keyword argument {option!r}")
    implementation = options.pop("implementation", None)
    call = prepare(*tensors, cu_seqlens=cu_seqlens, **options)
    function: Callable[..., Any] = getattr(choose(NAME, call, implementation, name), name)
    return call, function


def result_of(
    call: AttentionCall, outputs: AttentionOutputs, *, with_stats: bool = True
) -> AttentionResult:
    """Return results in the layout of the user's tensors."""
    o, stats, lse, max_logit, entropy, o_full = outputs
    of_rows = (stats.m, stats.log_l, lse, max_logit, entropy)
    m, log_l, lse, max_logit, entropy = (rows_of(call, x) for x in of_rows)
    result = AttentionResult(laid_out(o, call.layout), lse, None, max_logit, entropy)
    if not with_stats or o_full is None:
        return result
    full = result.o if o_full is o else laid_out(o_full, call.layout)
    return result._replace(stats=RowStats(m, log_l), o_full=full)


def grads_of(call: AttentionCall, grads: AttentionGrads) -> AttentionGrads:
    """Return gradients in the layout of the user's tensors."""
    dq, dk, dv = (laid_out(grad, call.layout) for grad in grads[:3])
    return AttentionGrads(dq, dk, dv, grads.dbias, grads.dsinks)


def tangents_of(call: AttentionCall, moved: OutputTangents) -> OutputTangents:
    """Return tangents of the outputs in the layout of the user's tensors."""
    return OutputTangents(laid_out(moved.to, call.layout), rows_of(call, moved.tlse))


def rows_of(call: AttentionCall, x: Any) -> Any:
    """Return `(B, H, N)` statistics; packed sequences have no batch."""
    return x if x is None or call.sequences is None else x[0]
