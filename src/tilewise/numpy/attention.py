"""Attention and its gradients on NumPy arrays."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from tilewise.base.masks import Mask
from tilewise.dispatch import choose
from tilewise.ops.attention.spec import (
    AttentionGrads,
    RowStats,
    Want,
    prepare,
    prepare_vjp,
)

Array = NDArray[Any]


class AttentionResult(NamedTuple):
    """Output of attention with the statistics that were asked for; the others are None.

    Attributes:
        o: `(B, H, N, Dv)`, or `(B, N, H, Dv)` with `layout="bnhd"`; dtype of q.
        lse: `(B, H, N)`, dtype of q. Natural log-sum-exp of the logits.
        stats: The same as a pair that keeps its digits, for `attention_vjp`.
        max_logit: `(B, H, N)`, dtype of q. Largest attended logit, without the sink.
        entropy: `(B, H, N)`, dtype of q. Entropy of the probabilities, with that of the sink.
    """

    o: Array
    lse: Array | None = None
    stats: RowStats | None = None
    max_logit: Array | None = None
    entropy: Array | None = None


class AttentionOptions(TypedDict, total=False):
    """The options of attention that do not change the type of its result."""

    mask: Mask | NDArray[np.bool_] | None
    bias: Array | None
    alibi_slopes: Array | None
    softcap: float | None
    sinks: Array | None
    softmax_scale: float | None
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
        layout: `"bhnd"`, or `"bnhd"` for tensors `(B, N, H, D)`; bias and row statistics keep
            their order.
        return_lse: Return also `lse = log sum exp s`, with the sink.
        return_stats: Return also the pair `RowStats(m, log_l)` that `attention_vjp` takes.
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
        sinks: Xiao et al. 2023 (arXiv:2309.17453), equation 2, with a learned logit in place of 0.
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
        layout=layout,
    )
    want = Want(return_lse, return_max_logit, return_entropy)
    outputs = choose("attention", call, implementation).forward(call, want)
    o: Array = outputs.o if layout == "bhnd" else outputs.o.swapaxes(1, 2)
    if not (return_lse or return_stats or return_max_logit or return_entropy):
        return o
    stats = outputs.stats if return_stats else None
    return AttentionResult(o, outputs.lse, stats, outputs.max_logit, outputs.entropy)


def attention_vjp(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    stats: RowStats | Array,
    *,
    dlse: Array | None = None,
    mask: Mask | NDArray[np.bool_] | None = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    softmax_scale: float | None = None,
    layout: str = "bhnd",
    implementation: str | None = None,
) -> AttentionGrads:
    r"""Compute the gradients of attention from the results of its forward pass.

    With `p = exp(s - m - log_l)` and `delta = rowsum(do * o) - dlse`:
    `ds = p * (do v^T - delta)`, `dq = scale dx k`, `dk = scale dx^T q`, `dv = p^T do`,
    `dbias = ds`, `dsinks = -sum exp(sink - lse) delta`, where `dx` is `ds` times the derivative of
    the soft cap. A row without keys contributes nothing, except `dlse` to its sink.

    Args:
        do: `(B, H, N, Dv)`, dtype of q. Cotangent of o.
        q: `(B, H, N, D)`, float32 or float64, as in the forward pass; so are the options.
        k: `(B, Hk, Nk, D)`, dtype of q.
        v: `(B, Hk, Nk, Dv)`, dtype of q.
        o: `(B, H, N, Dv)`, dtype of q. Output of the forward pass.
        stats: `RowStats` of the forward pass, or its lse `(B, H, N)`; the pair is more accurate
            where logits are large. Those of a larger softmax give the gradients of this part.
        dlse: `(B, H, N)`, dtype of q. Cotangent of lse; zero by default.
        mask: A mask such as `tilewise.causal()`, or a boolean array that broadcasts to
            `(B, H, N, Nk)`; True lets query i see key j.
        bias: Broadcasts to `(B, H, N, Nk)`, dtype of q. Added to the logits.
        alibi_slopes: `(H,)` or `(B, H)`, dtype of q. `slope |i + Nk - N - j|` is subtracted.
        softcap: c > 0: a logit x becomes `c tanh(x / c)`, before the bias and the mask.
        sinks: `(H,)`, dtype of q. One extra logit per head, in the denominator only; -inf is none.
        softmax_scale: Factor of `q k^T`; `D ** -0.5` by default.
        layout: `"bhnd"`, or `"bnhd"` for tensors `(B, N, H, D)`; bias and row statistics keep
            their order.
        implementation: Name of the implementation, which never falls back to another; by default
            the first that serves the call.

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
        layout=layout,
    )
    cotangents = prepare_vjp(call, do, o, stats, dlse)
    grads: AttentionGrads = choose("attention", call, implementation).vjp(call, cotangents)
    if layout == "bhnd":
        return grads
    dq, dk, dv = (grad.swapaxes(1, 2) for grad in grads[:3])
    return AttentionGrads(dq, dk, dv, grads.dbias, grads.dsinks)
