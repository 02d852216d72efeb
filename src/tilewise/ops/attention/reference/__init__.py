"""Attention as the textbook writes it, in float64 NumPy: the oracle of every implementation.

One head of one batch entry at a time, with its whole matrix of probabilities in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import round_to
from tilewise.base.operator import Implementation
from tilewise.ops.attention.spec import (
    ALL_NEEDED,
    LN2,
    AttentionCall,
    AttentionGrads,
    AttentionOutputs,
    CotangentCall,
    ForwardSecondCall,
    InputTangents,
    Needed,
    OutputTangents,
    RowStats,
    SecondCall,
    TangentCall,
    Want,
    base2,
)

from . import packed
from .derivatives import (
    HeadGrads,
    cotangents_of,
    head_jvp,
    head_jvp_jvp,
    head_magnitudes,
    head_vjp,
    head_vjp_jvp,
    largest_logit,
    recompute,
    tangents_of,
)
from .heads import F64, Head, attended_product, f64, head_of, logits_of, part_of, softmax_of

__all__ = [
    "IMPLEMENTATION",
    "Magnitudes",
    "attended_product",
    "forward",
    "forward64",
    "forward_jvp",
    "jvp",
    "jvp64",
    "jvp_jvp",
    "jvp_jvp64",
    "magnitudes",
    "vjp",
    "vjp64",
    "vjp_jvp",
    "vjp_jvp64",
]


def forward(call: AttentionCall, want: Want) -> AttentionOutputs:
    """Compute attention in float64 and round the results to the dtype of the call."""
    exact = forward64(call, want)
    if call.dtype == np.float64:
        return exact
    dtype = call.compute_dtype

    def rounded(x: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if x is None else round_to(x, dtype)

    o = round_to(exact.o, call.dtype)
    return AttentionOutputs(
        o,
        _split(exact.stats.m * LN2, exact.stats.log_l, dtype),
        rounded(exact.lse),
        rounded(exact.max_logit),
        rounded(exact.entropy),
        rounded(exact.o_full) if call.is_narrow else o,
    )


def vjp(
    call: AttentionCall, cotangents: CotangentCall, needed: Needed = ALL_NEEDED
) -> AttentionGrads:
    """Compute the gradients in float64 and round those that are needed to their inputs' dtypes."""
    return _round_needed(vjp64(call, cotangents), needed, call)


def jvp(call: AttentionCall, tangents: TangentCall) -> OutputTangents:
    """Compute the tangents of o and lse in float64 and round them to the dtypes of o and lse."""
    to, tlse = jvp64(call, tangents)
    return OutputTangents(round_to(to, call.dtype), round_to(tlse, call.compute_dtype))


def jvp_jvp(call: AttentionCall, second: ForwardSecondCall) -> OutputTangents:
    """Compute the tangents of the output tangents in float64 and round them."""
    wo, wlse = jvp_jvp64(call, second)
    return OutputTangents(round_to(wo, call.dtype), round_to(wlse, call.compute_dtype))


def forward_jvp(
    call: AttentionCall, want: Want, tangents: InputTangents
) -> tuple[AttentionOutputs, OutputTangents]:
    """Compute attention with the tangents of o and lse in float64 and round them."""
    exact = forward64(call, want)
    moves = {field.name: getattr(tangents, field.name) for field in fields(InputTangents)}
    return forward(call, want), jvp(call, TangentCall(**moves, o=exact.o, stats=exact.stats))


def vjp_jvp(call: AttentionCall, second: SecondCall, needed: Needed = ALL_NEEDED) -> AttentionGrads:
    """Compute the tangents of the gradients in float64 and round those that are needed."""
    return _round_needed(vjp_jvp64(call, second), needed, call)


def forward64(call: AttentionCall, want: Want) -> AttentionOutputs:
    """Compute attention in float64: `o = (softmax(s) * keep) v`, with keep of dropout.

    The sink is in the denominator only; dropout leaves the statistics alone.

    Args:
        call: The validated call.
        want: Which statistics to return.

    Returns:
        Unrounded results; `o` is a `(B, H, N, Dv)` view of an array in the layout of the call.
    """
    if call.sequences is not None:
        return packed.forward(call, want, forward64)
    o = _empty(call, call.H, call.N, call.Dv)
    top, log_l, max_logit, entropy = (np.empty((call.B, call.H, call.N)) for _ in range(4))
    for b, h in np.ndindex(call.B, call.H):
        head = head_of(call, b, h)
        row = softmax_of(head, logits_of(call, head).s)
        attended = head.visible & (row.top != -np.inf)[:, None]
        o[b, h] = attended_product(row.p * head.keep, head.v, attended)
        top[b, h], log_l[b, h] = row.top, row.log_l
        max_logit[b, h], entropy[b, h] = row.max_logit, row.entropy
    return AttentionOutputs(
        o,
        _split(top, log_l, np.dtype(np.float64)),
        top + log_l if want.lse else None,
        max_logit if want.max_logit else None,
        entropy if want.entropy else None,
        o if want.o_full or not call.is_narrow else None,
    )


def vjp64(call: AttentionCall, cotangents: CotangentCall) -> AttentionGrads:
    """Compute the gradients in float64 from the given row statistics.

    With `p = exp(s - m - log_l)`, keep of dropout and `delta = rowsum(do * o) - dlse`::

        dp = keep * (do v^T)    ds = p * (dp - delta)    dx = ds * (1 - tanh(x / softcap)^2)
        dq = scale dx k    dk = scale dx^T q    dv = (p * keep)^T do    dbias = ds
        dsink = -sum_i exp(sink - m_i - log_l_i) delta_i

    The statistics are taken as they are given, not computed anew: those of a larger softmax give
    the gradients of a part of it, as ring attention needs them.

    Args:
        call: The validated call.
        cotangents: Validated cotangents, with `o` and the statistics of the forward pass.

    Returns:
        Unrounded gradients; the first three are `(B, H, N, D)` views in the layout of the call.
    """
    if call.sequences is not None:
        return packed.vjp(call, cotangents, vjp64)
    of_outputs = cotangents.do, cotangents.dlse, cotangents.o

    def of_head(head: Head, b: int, h: int) -> HeadGrads:
        row = recompute(call, head, cotangents.stats, b, h)
        return head_vjp(call, head, row, cotangents_of(call, *of_outputs, b, h))

    return _gradients(call, of_head)


def jvp64(call: AttentionCall, tangents: TangentCall) -> OutputTangents:
    """Compute the tangents of o and lse in float64 from the given output and row statistics.

    With `p = exp(s - m - log_l)`, keep of dropout and `p_sink = exp(sink - m - log_l)`::

        tx = scale (tq k^T + q tk^T)    ts = tx * (1 - tanh(x / softcap)^2) + tbias
        tlse = rowsum(p * ts) + p_sink tsink
        to = (p * keep * ts) v - tlse o + (p * keep) tv

    Args:
        call: The validated call.
        tangents: Validated tangents, with `o` and the statistics of the forward pass.

    Returns:
        Unrounded tangents; the first is a `(B, H, N, Dv)` view in the layout of the call.
    """
    if call.sequences is not None:
        return packed.jvp(call, tangents, jvp64)
    to, tlse = _empty(call, call.H, call.N, call.Dv), np.empty((call.B, call.H, call.N))
    for b, h in np.ndindex(call.B, call.H):
        head, t = head_of(call, b, h), tangents_of(call, tangents, b, h)
        row = recompute(call, head, tangents.stats, b, h)
        to[b, h], tlse[b, h] = head_jvp(call, head, row, f64(tangents.o[b, h]), t)
    return OutputTangents(to, tlse)


def vjp_jvp64(call: AttentionCall, second: SecondCall) -> AttentionGrads:
    """Compute the tangents of the gradients in float64, by differentiating `vjp64` once more.

    With what `vjp64` and `jvp64` name, and `tlse` and `to` from the latter::

        tp = p * (ts - tlse)    tdp = keep * (tdo v^T + do tv^T)
        tdelta = rowsum(tdo * o + do * to) - tdlse
        tds = tp * (dp - delta) + p * (tdp - tdelta)
        tdx = tds * cap'(x) + ds * cap''(x) * tx    with cap(x) = softcap tanh(x / softcap)
        tdq = scale (tdx k + dx tk)    tdk = scale (tdx^T q + dx^T tq)    tdbias = tds
        tdv = (tp * keep)^T do + (p * keep)^T tdo
        tdsink = -sum_i (tp_sink_i delta_i + p_sink_i tdelta_i)    tp_sink = p_sink (tsink - tlse)

    Args:
        call: The validated call.
        second: Validated cotangents, tangents, and tangents of the cotangents.

    Returns:
        Unrounded tangents of the gradients, in the fields and the layout of the gradients.
    """
    if call.sequences is not None:
        return packed.vjp_jvp(call, second, vjp_jvp64)
    to, tlse = jvp64(call, second.tangents) if second.outputs is None else second.outputs
    of_outputs = second.cotangents.do, second.cotangents.dlse, second.cotangents.o

    def of_head(head: Head, b: int, h: int) -> HeadGrads:
        return head_vjp_jvp(
            call,
            head,
            recompute(call, head, second.cotangents.stats, b, h),
            cotangents_of(call, *of_outputs, b, h),
            tangents_of(call, second.tangents, b, h),
            cotangents_of(call, second.tdo, second.tdlse, to, b, h),
            f64(tlse[b, h]),
        )

    return _gradients(call, of_head)


def jvp_jvp64(call: AttentionCall, second: ForwardSecondCall) -> OutputTangents:
    """Compute the tangents of `jvp64` in float64 along others u, its own moving along seconds w.

    With what `jvp64` names, `cap(x) = softcap tanh(x / softcap)`, and ux us uo ulse from u::

        wx = scale (wq k^T + q wk^T + tq uk^T + uq tk^T)    ws = cap'(x) wx + cap''(x) tx ux + wbias
        up = p * (us - ulse)
        wlse = rowsum(up * ts + p * ws) + p_sink ((usink - ulse) tsink + wsink)
        wo = (keep * (up * ts + p * ws)) v + (p * keep * ts) uv + (keep * up) tv + (p * keep) wv
             - wlse o - tlse uo

    Args:
        call: The validated call.
        second: Validated tangents, with the output and the statistics of the forward pass.

    Returns:
        Unrounded; the first is a `(B, H, N, Dv)` view in the layout of the call.
    """
    if call.sequences is not None:
        return packed.jvp_jvp(call, second, jvp_jvp64)
    wo, wlse = _empty(call, call.H, call.N, call.Dv), np.empty((call.B, call.H, call.N))
    moves = second.tangents, second.others, second.seconds
    for b, h in np.ndindex(call.B, call.H):
        head = head_of(call, b, h)
        row = recompute(call, head, second.tangents.stats, b, h)
        t, u, w = (tangents_of(call, given, b, h) for given in moves)
        o = f64(second.tangents.o[b, h])
        wo[b, h], wlse[b, h] = head_jvp_jvp(call, head, row, o, t, u, w)
    return OutputTangents(wo, wlse)


class Magnitudes(NamedTuple):
    """What `spec.error_bound` needs to know about the operands of a call.

    Attributes:
        logit_size: Largest sum of the absolute values that make up one attended logit.
        norms: For each result, the Frobenius norm of its formula over absolute values.
    """

    logit_size: float
    norms: dict[str, float]


def magnitudes(call: AttentionCall, cotangents: CotangentCall) -> Magnitudes:
    """Evaluate the formulas of all results over absolute values, for finite operands.

    Packed sequences have to be given one by one.
    """
    logit_size, squares = 0.0, dict.fromkeys(("o", "lse", "max_logit", "entropy"), 0.0)
    for b, h in np.ndindex(call.B, call.H):
        head = head_of(call, b, h)
        s = logits_of(call, head).s
        row = softmax_of(head, s)
        logit_size = max(logit_size, largest_logit(call, head))
        with np.errstate(all="ignore"):
            gap = np.where(row.p > 0, row.p * np.abs(s - row.top[:, None]), 0.0).sum(axis=1)
        squares["o"] += float((((row.p * head.keep) @ np.abs(head.v)) ** 2).sum())
        squares["entropy"] += float(((1 + gap) ** 2).sum())
        squares["lse"] += call.N
        squares["max_logit"] += call.N
    of_outputs = cotangents.do, cotangents.dlse, cotangents.o

    def of_head(head: Head, b: int, h: int) -> HeadGrads:
        row = recompute(call, head, cotangents.stats, b, h)
        return head_magnitudes(call, head, row, cotangents_of(call, *of_outputs, b, h))

    grads = _gradients(call, of_head)
    norms = {name: square**0.5 for name, square in squares.items()}
    norms |= {
        name: float(np.sqrt((x**2).sum())) for name, x in grads._asdict().items() if x is not None
    }
    return Magnitudes(logit_size, norms)


def _gradients(
    call: AttentionCall, of_head: Callable[[Head, int, int], HeadGrads]
) -> AttentionGrads:
    """Add up the gradients of the heads over groups and over the broadcast sizes of the bias."""
    dq = _empty(call, call.H, call.N, call.D)
    dk = _empty(call, call.Hk, call.Nk, call.D)
    dv = _empty(call, call.Hk, call.Nk, call.Dv)
    dk[...] = dv[...] = 0
    dbias = None if call.bias is None else np.zeros(call.bias.shape)
    dsinks = None if call.sinks is None else np.zeros(call.H)
    for b, h in np.ndindex(call.B, call.H):
        grads = of_head(head_of(call, b, h), b, h)
        hk = h // (call.H // call.Hk)
        dq[b, h] = grads.dq
        dk[b, hk] += grads.dk
        dv[b, hk] += grads.dv
        if dbias is not None:
            part = part_of(dbias, b, h)
            part += _sum_to(grads.ds, part.shape)
        if dsinks is not None:
            dsinks[h] += grads.dsink
    if dbias is not None and call.bias_shape is not None:
        dbias = dbias.reshape(call.bias_shape)
    return AttentionGrads(dq, dk, dv, dbias, dsinks)


def _empty(call: AttentionCall, heads: int, rows: int, entries: int) -> F64:
    """Return a new `(B, heads, rows, entries)` view of an array in the layout of the call."""
    if call.layout == "bhnd":
        return np.empty((call.B, heads, rows, entries))
    return np.empty((call.B, rows, heads, entries)).swapaxes(1, 2)


def _sum_to(x: F64, shape: tuple[int, ...]) -> F64:
    """Sum over the dimensions in which the shape has 1."""
    summed = x.sum(axis=0, keepdims=True) if shape[0] == 1 else x
    return summed.sum(axis=1, keepdims=True) if shape[1] == 1 else summed


def _round_needed(grads: AttentionGrads, needed: Needed, call: AttentionCall) -> AttentionGrads:
    """Return the gradients that are needed in the dtypes of the inputs."""
    inputs = call.q, call.k, call.v, call.bias, call.sinks
    given = zip(grads, astuple(needed), inputs, strict=True)
    return AttentionGrads(
        *(
            round_to(x, of.dtype) if x is not None and kept and of is not None else None
            for x, kept, of in given
        )
    )


def _split(top: F64, log_l: F64, dtype: np.dtype[Any]) -> RowStats:
    """Return row statistics in a dtype; log_l is relative to the rounded m, so p keeps digits."""
    with np.errstate(all="ignore"):
        m = base2(top, dtype)
        lost = np.where(np.isfinite(m) & (np.abs(m) != np.finfo(dtype).max), top - f64(m) * LN2, 0)
        return RowStats(m, round_to(log_l + lost, dtype))


def _refuses(call: AttentionCall) -> str | None:
    return None if call.paging is None else "reads no keys in pages"


IMPLEMENTATION = Implementation(
    "reference", forward, vjp, jvp, vjp_jvp, forward_jvp, _refuses, jvp_jvp
)
