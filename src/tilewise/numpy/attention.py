"""Attention and its derivatives on NumPy arrays."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from tilewise.base.masks import Mask
from tilewise.dispatch import choose
from tilewise.ops.attention.spec import (
    NAME,
    AttentionCall,
    AttentionGrads,
    OutputTangents,
    RowStats,
    Want,
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
        lse: `(B, H, N)`, dtype of q. Natural log-sum-exp of the logits.
        stats: The same as a pair that keeps its digits, for the derivatives.
        max_logit: `(B, H, N)`, dtype of q. Largest attended logit, without the sink.
        entropy: `(B, H, N)`, dtype of q. Entropy of the probabilities, with that of the sink.
    """

    o: Array
    lse: Array | None = None
    stats: RowStats | None = None
    max_logit: Array | None = None
    entropy: Array | None = None


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
    k: Array,
    v: Array,
    *,
    return_lse: Literal[False] = ...,
    return_stats: Literal[False] = ...,
    return_max_logit: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> Array: ...
@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    return_lse: bool = ...,
    return_stats: bool = ...,
    return_max_logit: bool = ...,
    return_entropy: bool = ...,
    **options: Unpack[AttentionOptions],
) -> Array | AttentionResult: ...
def attention(
    q: Array,
    k: Array,
    v: Array,
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
) -> Array | AttentionResult:
    r"""Compute softmax attention.

    `o = softmax(s) v`, `s = softcap tanh(scale q k^T / softcap) + bias - slope |i + Nk - N - j|`,
    and -inf where the mask hides a key. A hidden key is absent: NaN there reaches nothing. A row
    without keys has `o = 0` and `lse = -inf`.

    Args:
        q: `(B, H, N, D)`, float32 or float64. D is at most 512.
        k: `(B, Hk, Nk, D)`, dtype of q. Hk must divide H; head h reads head `h // (H // Hk)`.
        v: `(B, Hk, Nk, Dv)`, dtype of q. Dv is at most 512.
        mask: A mask such as `tilewise.causal()`, or a boolean array that broadcasts to
            `(B, H, N, Nk)`; True lets query i see key j.
        bias: Broadcasts to `(B, H, N, Nk)`, dtype of q. Added to the logits.
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
        return_stats: Return also the pair `RowStats(m, log_l)` that the derivatives take.
        return_max_logit: Return also the largest attended logit of each row.
        return_entropy: Return also the entropy of each row's probabilities.
        implementation: Name of the implementation, which never falls back to another; by default
            the first that serves the call.

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
    call = prepare(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
        seed=seed,
        layout=layout,
    )
    want = Want(return_lse, return_max_logit, return_entropy)
    outputs = choose(NAME, call, implementation).forward(call, want)
    o = _swapped(outputs.o, call)
    if not (return_lse or return_stats or return_max_logit or return_entropy):
        return o
    stats = outputs.stats if return_stats else None
    return AttentionResult(o, outputs.lse, stats, outputs.max_logit, outputs.entropy)


def _with_options(function: Function) -> Function:
    """Show the options of attention by name in the signature of a function that takes them all."""
    shown = inspect.signature(function)
    own = [p for p in shown.parameters.values() if p.kind is not p.VAR_KEYWORD]
    every = inspect.signature(attention).parameters
    options = [every[name] for name in AttentionOptions.__annotations__]
    function.__signature__ = shown.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return function


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
        q: `(B, H, N, D)`, float32 or float64, as in the forward pass.
        k: `(B, Hk, Nk, D)`, dtype of q.
        v: `(B, Hk, Nk, Dv)`, dtype of q.
        o: `(B, H, N, Dv)`, dtype of q. Output of the forward pass.
        stats: `RowStats` of the forward pass, or its lse `(B, H, N)`; the pair is more accurate
            where logits are large. Those of a larger softmax give the gradients of this part.
        dlse: `(B, H, N)`, dtype of q. Cotangent of lse; zero by default.
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
    return _laid_out(function(call, prepare_vjp(call, do, o, stats, dlse)), call)


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
        q: `(B, H, N, D)`, float32 or float64, as in the forward pass.
        k: `(B, Hk, Nk, D)`, dtype of q.
        v: `(B, Hk, Nk, Dv)`, dtype of q.
        o: `(B, H, N, Dv)`, dtype of q. Output of the forward pass.
        stats: `RowStats` of the forward pass, or its lse `(B, H, N)`.
        tbias: Exactly the shape of bias, dtype of q. Tangent of bias.
        tsinks: `(H,)`, dtype of q. Tangent of sinks.
        **options: Those of `attention`, as in the forward pass.

    Returns:
        `to`, in the layout of q, and `tlse`, `(B, H, N)`; both in the dtype of q.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, memory layout or value.
        Unsupported: The implementation has no such function or does not serve the call.
    """
    call, function = _prepared("jvp", q, k, v, options)
    tangents = prepare_jvp(call, tq, tk, tv, o, stats, tbias, tsinks)
    to, tlse = function(call, tangents)
    return OutputTangents(_swapped(to, call), tlse)


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
        q: `(B, H, N, D)`, float32 or float64.
        k: `(B, Hk, Nk, D)`, dtype of q.
        v: `(B, Hk, Nk, Dv)`, dtype of q.
        tbias: Exactly the shape of bias, dtype of q. Tangent of bias.
        tsinks: `(H,)`, dtype of q. Tangent of sinks.
        **options: Those of `attention`.

    Returns:
        The result with `o`, `lse` and `stats`, and their tangents `(to, tlse)`.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, memory layout or value.
        Unsupported: The implementation has no such function or does not serve the call.
    """
    call, function = _prepared("forward_jvp", q, k, v, options)
    tangents = prepare_tangents(call, tq, tk, tv, tbias, tsinks)
    outputs, (to, tlse) = function(call, Want(lse=True), tangents)
    result = AttentionResult(_swapped(outputs.o, call), outputs.lse, outputs.stats)
    return result, OutputTangents(_swapped(to, call), tlse)


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
        q: `(B, H, N, D)`, float32 or float64, as in the forward pass.
        k: `(B, Hk, Nk, D)`, dtype of q.
        v: `(B, Hk, Nk, Dv)`, dtype of q.
        o: `(B, H, N, Dv)`, dtype of q. Output of the forward pass.
        stats: `RowStats` of the forward pass, or its lse `(B, H, N)`.
        dlse: `(B, H, N)`, dtype of q. Cotangent of lse.
        tbias: Exactly the shape of bias, dtype of q. Tangent of bias.
        tsinks: `(H,)`, dtype of q. Tangent of sinks.
        tdo: `(B, H, N, Dv)`, dtype of q. Tangent of do.
        tdlse: `(B, H, N)`, dtype of q. Tangent of dlse.
        to: `(B, H, N, Dv)`, dtype of q. What `attention_jvp` returned for the same tangents, with
            tlse; they are computed where they are not given.
        tlse: `(B, H, N)`, dtype of q.
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
    return _laid_out(function(call, second), call)


def _prepared(
    name: str, q: Array, k: Array, v: Array, options: AttentionOptions
) -> tuple[AttentionCall, Callable[..., Any]]:
    """Return the validated call and the function that serves it."""
    for option in options.keys() - AttentionOptions.__annotations__.keys():
        raise TypeError(f"attention_{name}() got an unexpected keyword argument {option!r}")
    arguments: dict[str, Any] = {**options}
    implementation = arguments.pop("implementation", None)
    call = prepare(q, k, v, **arguments)
    function: Callable[..., Any] = getattr(choose(NAME, call, implementation, name), name)
    return call, function


def _laid_out(grads: AttentionGrads, call: AttentionCall) -> AttentionGrads:
    """Return gradients in the layout of the user's tensors."""
    dq, dk, dv = (_swapped(grad, call) for grad in grads[:3])
    return AttentionGrads(dq, dk, dv, grads.dbias, grads.dsinks)


def _swapped(x: Array, call: AttentionCall) -> Array:
    return x if call.layout == "bhnd" else x.swapaxes(1, 2)
