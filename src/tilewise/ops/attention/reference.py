"""Attention as the textbook writes it, in float64 NumPy: the oracle of every implementation.

One head of one batch entry at a time, with its whole matrix of probabilities in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewise.base.masks import RowIntervals
from tilewise.base.operator import Implementation
from tilewise.shared.philox import philox4x32

from .spec import (
    ALL_NEEDED,
    LN2,
    AttentionCall,
    AttentionGrads,
    AttentionOutputs,
    CotangentCall,
    InputTangents,
    Needed,
    OutputTangents,
    RowStats,
    SecondCall,
    TangentCall,
    Want,
    base2,
)

F64 = NDArray[np.float64]
Bool = NDArray[np.bool_]


class Head(NamedTuple):
    """The operands of one query head of one batch entry, in float64."""

    q: F64  # (N, D)
    k: F64  # (Nk, D)
    v: F64  # (Nk, Dv)
    bias: F64  # (N or 1, Nk or 1)
    slope: float
    sink: float  # -inf where there is none
    visible: Bool  # (N, Nk)
    keep: F64  # (N, Nk) or (1, 1): what dropout multiplies p by


class Row(NamedTuple):
    """The softmax of each row of one head."""

    p: F64  # (N, Nk), zero where masked
    top: F64  # (N,) largest logit, with the sink
    log_l: F64  # (N,) logarithm of sum exp(s - top)
    max_logit: F64  # (N,) largest logit, without the sink
    entropy: F64  # (N,)


def forward(call: AttentionCall, want: Want) -> AttentionOutputs:
    """Compute attention in float64 and round the results to the dtype of the call."""
    exact = forward64(call, want)
    dtype = call.dtype
    if dtype == np.float64:
        return exact

    def rounded(x: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if x is None else _round(x, dtype)

    return AttentionOutputs(
        _round(exact.o, dtype),
        _split(exact.stats.m * LN2, exact.stats.log_l, dtype),
        rounded(exact.lse),
        rounded(exact.max_logit),
        rounded(exact.entropy),
    )


def vjp(
    call: AttentionCall, cotangents: CotangentCall, needed: Needed = ALL_NEEDED
) -> AttentionGrads:
    """Compute the gradients in float64 and round those that are needed to the call's dtype."""
    return _round_needed(vjp64(call, cotangents), needed, call.dtype)


def jvp(call: AttentionCall, tangents: TangentCall) -> OutputTangents:
    """Compute the tangents of o and lse in float64 and round them to the dtype of the call."""
    to, tlse = jvp64(call, tangents)
    return OutputTangents(_round(to, call.dtype), _round(tlse, call.dtype))


def forward_jvp(
    call: AttentionCall, want: Want, tangents: InputTangents
) -> tuple[AttentionOutputs, OutputTangents]:
    """Compute attention with the tangents of o and lse in float64 and round them."""
    exact = forward64(call, want)
    moves = {field.name: getattr(tangents, field.name) for field in fields(InputTangents)}
    return forward(call, want), jvp(call, TangentCall(**moves, o=exact.o, stats=exact.stats))


def vjp_jvp(call: AttentionCall, second: SecondCall, needed: Needed = ALL_NEEDED) -> AttentionGrads:
    """Compute the tangents of the gradients in float64 and round those that are needed."""
    return _round_needed(vjp_jvp64(call, second), needed, call.dtype)


def forward64(call: AttentionCall, want: Want) -> AttentionOutputs:
    """Compute attention in float64: `o = (softmax(s) * keep) v`, with keep of dropout.

    The sink is in the denominator only; dropout leaves the statistics alone.

    Args:
        call: The validated call.
        want: Which statistics to return.

    Returns:
        Unrounded results; `o` is a `(B, H, N, Dv)` view of an array in the layout of the call.
    """
    o = _empty(call, call.H, call.N, call.Dv)
    top, log_l, max_logit, entropy = (np.empty((call.B, call.H, call.N)) for _ in range(4))
    for b, h in np.ndindex(call.B, call.H):
        head = _head(call, b, h)
        row = _softmax(head, _logits(call, head).s)
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
    of_outputs = cotangents.do, cotangents.dlse, cotangents.o

    def of_head(head: Head, b: int, h: int) -> _HeadGrads:
        row = _recompute(call, head, cotangents.stats, b, h)
        return _head_vjp(call, head, row, _cotangents_of(call, *of_outputs, b, h))

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
    to, tlse = _empty(call, call.H, call.N, call.Dv), np.empty((call.B, call.H, call.N))
    for b, h in np.ndindex(call.B, call.H):
        head, t = _head(call, b, h), _tangents_of(call, tangents, b, h)
        row = _recompute(call, head, tangents.stats, b, h)
        to[b, h], tlse[b, h] = _head_jvp(call, head, row, _f64(tangents.o[b, h]), t)
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
    to, tlse = jvp64(call, second.tangents) if second.outputs is None else second.outputs
    of_outputs = second.cotangents.do, second.cotangents.dlse, second.cotangents.o

    def of_head(head: Head, b: int, h: int) -> _HeadGrads:
        return _head_vjp_jvp(
            call,
            head,
            _recompute(call, head, second.cotangents.stats, b, h),
            _cotangents_of(call, *of_outputs, b, h),
            _tangents_of(call, second.tangents, b, h),
            _cotangents_of(call, second.tdo, second.tdlse, to, b, h),
            _f64(tlse[b, h]),
        )

    return _gradients(call, of_head)


class Magnitudes(NamedTuple):
    """What `spec.error_bound` needs to know about the operands of a call.

    Attributes:
        logit_size: Largest sum of the absolute values that make up one attended logit.
        norms: For each result, the Frobenius norm of its formula over absolute values.
    """

    logit_size: float
    norms: dict[str, float]


def magnitudes(call: AttentionCall, cotangents: CotangentCall) -> Magnitudes:
    """Evaluate the formulas of all results over absolute values, for finite operands."""
    logit_size, squares = 0.0, dict.fromkeys(("o", "lse", "max_logit", "entropy"), 0.0)
    for b, h in np.ndindex(call.B, call.H):
        head = _head(call, b, h)
        s = _logits(call, head).s
        row = _softmax(head, s)
        logit_size = max(logit_size, _logit_size(call, head))
        with np.errstate(all="ignore"):
            gap = np.where(row.p > 0, row.p * np.abs(s - row.top[:, None]), 0.0).sum(axis=1)
        squares["o"] += float((((row.p * head.keep) @ np.abs(head.v)) ** 2).sum())
        squares["entropy"] += float(((1 + gap) ** 2).sum())
        squares["lse"] += call.N
        squares["max_logit"] += call.N
    of_outputs = cotangents.do, cotangents.dlse, cotangents.o

    def of_head(head: Head, b: int, h: int) -> _HeadGrads:
        row = _recompute(call, head, cotangents.stats, b, h)
        return _head_magnitudes(call, head, row, _cotangents_of(call, *of_outputs, b, h))

    grads = _gradients(call, of_head)
    norms = {name: square**0.5 for name, square in squares.items()}
    norms |= {
        name: float(np.sqrt((x**2).sum())) for name, x in grads._asdict().items() if x is not None
    }
    return Magnitudes(logit_size, norms)


def attended_product(weights: F64, x: F64, attended: Bool) -> F64:
    """Return `weights @ x` in which a pair that is not attended adds nothing, whatever `x` holds.

    Args:
        weights: `(N, Nk)`. Zero where not attended.
        x: `(Nk, D)`. Its rows may hold NaN or Inf.
        attended: `(N, Nk)`.

    Returns:
        `(N, D)`.
    """
    finite = np.asarray(np.isfinite(x).all(axis=1))
    with np.errstate(all="ignore"):
        product: F64 = weights @ np.where(finite[:, None], x, 0.0)
        spoiled = np.flatnonzero(~finite)
        for j in spoiled[attended[:, spoiled].any(axis=0)]:
            rows = attended[:, j]
            product[rows] += weights[rows, j, None] * x[j]
    return product


class _HeadGrads(NamedTuple):
    dq: F64
    dk: F64
    dv: F64
    ds: F64
    dsink: float


def _gradients(
    call: AttentionCall, of_head: Callable[[Head, int, int], _HeadGrads]
) -> AttentionGrads:
    """Add up the gradients of the heads over groups and over the broadcast sizes of the bias."""
    dq = _empty(call, call.H, call.N, call.D)
    dk = _empty(call, call.Hk, call.Nk, call.D)
    dv = _empty(call, call.Hk, call.Nk, call.Dv)
    dk[...] = dv[...] = 0
    dbias = None if call.bias is None else np.zeros(call.bias.shape)
    dsinks = None if call.sinks is None else np.zeros(call.H)
    for b, h in np.ndindex(call.B, call.H):
        grads = of_head(_head(call, b, h), b, h)
        hk = h // (call.H // call.Hk)
        dq[b, h] = grads.dq
        dk[b, hk] += grads.dk
        dv[b, hk] += grads.dv
        if dbias is not None:
            part = _of(dbias, b, h)
            part += _sum_to(grads.ds, part.shape)
        if dsinks is not None:
            dsinks[h] += grads.dsink
    if dbias is not None and call.bias_shape is not None:
        dbias = dbias.reshape(call.bias_shape)
    return AttentionGrads(dq, dk, dv, dbias, dsinks)


class _Probabilities(NamedTuple):
    p: F64  # (N, Nk), zero where not attended
    p_sink: F64  # (N,), zero where there is no sink
    attended: Bool  # (N, Nk)
    has_keys: Bool  # (N,)
    slope_of_cap: F64  # (N, Nk), first derivative
    curve_of_cap: F64  # (N, Nk), second derivative


class _Cotangents(NamedTuple):
    """Cotangents of one head and its output, or the tangents of the three; zero if not given."""

    do: F64  # (N, Dv)
    dlse: F64  # (N,)
    o: F64  # (N, Dv)


class _Tangents(NamedTuple):
    """Tangents of the operands of one head; zero if not given."""

    q: F64  # (N, D)
    k: F64  # (Nk, D)
    v: F64  # (Nk, Dv)
    bias: F64  # (N or 1, Nk or 1)
    sink: float


class _Backward(NamedTuple):
    dp: F64  # (N, Nk)
    delta: F64  # (N,)
    ds: F64  # (N, Nk), zero where not attended
    dx: F64  # (N, Nk), zero where not attended


def _recompute(call: AttentionCall, head: Head, stats: RowStats, b: int, h: int) -> _Probabilities:
    """Return `p = exp(s - m - log_l)` with the given statistics."""
    s, slope_of_cap, curve_of_cap = _logits(call, head)
    top, log_l = _given_statistics(stats, head, s, b, h)
    alive = top != -np.inf
    attended = head.visible & alive[:, None]
    base = np.where(alive, top, 0.0)
    with np.errstate(all="ignore"):
        p = np.where(attended, np.exp((s - base[:, None]) - log_l[:, None]), 0.0)
        p_sink = np.where(alive & (head.sink != -np.inf), np.exp(head.sink - base - log_l), 0.0)
    return _Probabilities(
        p, p_sink, attended, np.asarray(attended.any(axis=1)), slope_of_cap, curve_of_cap
    )


def _backward(head: Head, row: _Probabilities, cotangents: _Cotangents) -> _Backward:
    do, dlse, o = cotangents
    with np.errstate(all="ignore"):
        dp = head.keep * (do @ head.v.T)
        # In a row that attends to nothing, o is absent: only the sink's own lse remains.
        delta = np.where(row.has_keys, (do * o).sum(axis=1), 0.0) - dlse
        ds = np.where(row.attended, row.p * (dp - delta[:, None]), 0.0)
        dx = np.where(row.attended, ds * row.slope_of_cap, 0.0)
    return _Backward(dp, delta, ds, dx)


def _head_vjp(
    call: AttentionCall, head: Head, row: _Probabilities, cotangents: _Cotangents
) -> _HeadGrads:
    attended, scale = row.attended, call.softmax_scale
    _, delta, ds, dx = _backward(head, row, cotangents)
    with np.errstate(all="ignore"):
        return _HeadGrads(
            dq=scale * attended_product(dx, head.k, attended),
            dk=scale * attended_product(dx.T, head.q, attended.T),
            dv=attended_product((row.p * head.keep).T, cotangents.do, attended.T),
            ds=ds,
            dsink=-_sink_sum(head, row, row.p_sink * delta),
        )


def _head_jvp(
    call: AttentionCall, head: Head, row: _Probabilities, o: F64, t: _Tangents
) -> tuple[F64, F64]:
    """Return to and tlse."""
    _, ts = _logit_tangents(call, head, row, t)
    with np.errstate(all="ignore"):
        mu = (row.p * ts).sum(axis=1) + row.p_sink * t.sink
        kept = row.p * head.keep
        to = attended_product(kept * ts, head.v, row.attended)
        to += attended_product(kept, t.v, row.attended)
        to -= np.where(row.has_keys[:, None], mu[:, None] * o, 0.0)
    return to, mu


def _head_vjp_jvp(
    call: AttentionCall,
    head: Head,
    row: _Probabilities,
    cotangents: _Cotangents,
    t: _Tangents,
    tcotangents: _Cotangents,
    tlse: F64,
) -> _HeadGrads:
    p, p_sink, attended, has_keys, slope_of_cap, curve_of_cap = row
    do, _, o = cotangents
    tdo, tdlse, to = tcotangents
    dp, delta, ds, dx = _backward(head, row, cotangents)
    tx, ts = _logit_tangents(call, head, row, t)
    with np.errstate(all="ignore"):
        tp = np.where(attended, p * (ts - tlse[:, None]), 0.0)
        tp_sink = p_sink * (t.sink - tlse)
        tdp = head.keep * (tdo @ head.v.T + do @ t.v.T)
        tdelta = np.where(has_keys, (tdo * o + do * to).sum(axis=1), 0.0) - tdlse
        tds = tp * (dp - delta[:, None]) + p * (tdp - tdelta[:, None])
        tds = np.where(attended, tds, 0.0)
        tdx = np.where(attended, tds * slope_of_cap + ds * curve_of_cap * tx, 0.0)

        tdq = attended_product(tdx, head.k, attended)
        tdq += attended_product(dx, t.k, attended)
        tdk = attended_product(tdx.T, head.q, attended.T)
        tdk += attended_product(dx.T, t.q, attended.T)
        tdv = attended_product((tp * head.keep).T, do, attended.T)
        tdv += attended_product((p * head.keep).T, tdo, attended.T)
        tdsink = -_sink_sum(head, row, tp_sink * delta + p_sink * tdelta)
    scale = call.softmax_scale
    return _HeadGrads(scale * tdq, scale * tdk, tdv, tds, tdsink)


def _head_magnitudes(
    call: AttentionCall, head: Head, row: _Probabilities, cotangents: _Cotangents
) -> _HeadGrads:
    """Return the sums of `_head_vjp` over absolute values."""
    do, dlse, _ = (np.abs(x) for x in cotangents)
    v, kept = np.abs(head.v), row.p * head.keep
    delta = (do * (kept @ v)).sum(axis=1) + dlse
    ds = row.p * (head.keep * (do @ v.T) + delta[:, None])
    return _HeadGrads(
        dq=call.softmax_scale * ds @ np.abs(head.k),
        dk=call.softmax_scale * ds.T @ np.abs(head.q),
        dv=kept.T @ do,
        ds=ds,
        dsink=float((row.p_sink * delta).sum()),
    )


def _logit_tangents(
    call: AttentionCall, head: Head, row: _Probabilities, t: _Tangents
) -> tuple[F64, F64]:
    """Return the tangents of `x = scale q k^T` and of s, zero where not attended."""
    with np.errstate(all="ignore"):
        tx = call.softmax_scale * (t.q @ head.k.T + head.q @ t.k.T)
        ts = row.slope_of_cap * tx + t.bias
    return np.where(row.attended, tx, 0.0), np.where(row.attended, ts, 0.0)


def _sink_sum(head: Head, row: _Probabilities, terms: F64) -> float:
    """Add up the terms of the rows that have the sink.

    A row without keys and sink is absent, even where its cotangents are NaN.
    """
    counted = (row.has_keys | (row.p_sink != 0)) & (head.sink != -np.inf)
    return float(np.where(counted, terms, 0.0).sum())


def _cotangents_of(
    call: AttentionCall,
    do: NDArray[Any] | None,
    dlse: NDArray[Any] | None,
    o: NDArray[Any],
    b: int,
    h: int,
) -> _Cotangents:
    return _Cotangents(
        _or_zeros(do, b, h, (call.N, call.Dv)),
        _or_zeros(dlse, b, h, (call.N,)),
        _f64(o[b, h]),
    )


def _tangents_of(call: AttentionCall, t: TangentCall, b: int, h: int) -> _Tangents:
    hk = h // (call.H // call.Hk)
    tsink = 0.0 if t.tsinks is None else float(t.tsinks[h])
    if call.sinks is not None and call.sinks[h] == -np.inf:
        tsink = 0.0  # -inf is no sink, so it does not move
    return _Tangents(
        q=_or_zeros(t.tq, b, h, (call.N, call.D)),
        k=_or_zeros(t.tk, b, hk, (call.Nk, call.D)),
        v=_or_zeros(t.tv, b, hk, (call.Nk, call.Dv)),
        bias=_or_zeros(t.tbias, b, h, (1, 1)),
        sink=tsink,
    )


def _logit_size(call: AttentionCall, head: Head) -> float:
    """Return the largest sum of absolute values that makes up one attended logit."""
    i, j = np.arange(call.N)[:, None], np.arange(call.Nk)
    size = call.softmax_scale * (np.abs(head.q) @ np.abs(head.k.T)) + np.abs(head.bias)
    size += abs(head.slope) * np.abs(i + call.Nk - call.N - j)
    sink = abs(head.sink) if np.isfinite(head.sink) else 0.0
    return float(size.max(initial=sink, where=head.visible & np.isfinite(size)))


class _Logits(NamedTuple):
    s: F64  # (N, Nk), -inf where masked
    slope_of_cap: F64  # (N, Nk)
    curve_of_cap: F64  # (N, Nk)


def _logits(call: AttentionCall, head: Head) -> _Logits:
    """Return the logits and the first two derivatives of the soft cap."""
    with np.errstate(all="ignore"):
        x = call.softmax_scale * (head.q @ head.k.T)
        slope_of_cap, curve_of_cap = np.ones_like(x), np.zeros_like(x)
        if call.softcap is not None:
            t = np.tanh(x / call.softcap)
            x, slope_of_cap = call.softcap * t, 1.0 - t * t
            curve_of_cap = -2.0 * t * slope_of_cap / call.softcap
        i, j = np.arange(call.N)[:, None], np.arange(call.Nk)
        s = x + head.bias - head.slope * np.abs(i + call.Nk - call.N - j)
    return _Logits(np.where(head.visible, s, -np.inf), slope_of_cap, curve_of_cap)


def _softmax(head: Head, s: F64) -> Row:
    """Return the softmax of each row; a row without a finite logit is all zeros."""
    with np.errstate(all="ignore"):
        max_logit = s.max(axis=1, initial=-np.inf)
        top = np.maximum(max_logit, head.sink)
        alive = top != -np.inf
        base = np.where(alive, top, 0.0)
        attended = head.visible & alive[:, None]
        gap = s - base[:, None]
        w = np.where(attended, np.exp(gap), 0.0)
        gap_sink = head.sink - base
        w_sink = np.exp(gap_sink)
        l = np.where(alive, w.sum(axis=1) + w_sink, 1.0)
        p, p_sink, log_l = w / l[:, None], w_sink / l, np.log(l)
        # p log p tends to 0 with p, where gap may be -inf.
        mean_gap = np.where(p != 0, p * gap, 0.0).sum(axis=1)
        mean_gap += np.where(p_sink != 0, p_sink * gap_sink, 0.0)
    return Row(p, top, log_l, max_logit, np.where(alive, log_l - mean_gap, 0.0))


def _given_statistics(stats: RowStats, head: Head, s: F64, b: int, h: int) -> tuple[F64, F64]:
    """Return the row maximum and log sum in natural units, as the statistics give them.

    A maximum that overflowed in base-2 units no longer says where its row stood, so such a row is
    computed anew.
    """
    m, log_l = stats.m[b, h], _f64(stats.log_l[b, h])
    top = _f64(m) * LN2
    saturated = np.abs(m) == np.finfo(m.dtype).max
    if saturated.any():
        own = _softmax(head, s)
        top = np.where(saturated, own.top, top)
        log_l = np.where(saturated, own.log_l, log_l)
    return top, log_l


def _head(call: AttentionCall, b: int, h: int) -> Head:
    hk = h // (call.H // call.Hk)
    slopes, sinks = call.alibi_slopes, call.sinks
    return Head(
        q=_f64(call.q[b, h]),
        k=_f64(call.k[b, hk]),
        v=_f64(call.v[b, hk]),
        bias=_or_zeros(call.bias, b, h, (1, 1)),
        slope=0.0 if slopes is None else float(slopes[b % slopes.shape[0], h]),
        sink=-np.inf if sinks is None else float(sinks[h]),
        visible=_visible(call, b, h),
        keep=_keep(call, b, h),
    )


def _keep(call: AttentionCall, b: int, h: int) -> F64:
    """Return what dropout multiplies the probabilities of one head by: 0 or 1 / (1 - dropout_p).

    Four keys share a counter, which has the query's position among the keys and not its index:
    so a chunk of the queries, or a decoding step, drops what the whole drops.
    """
    if call.dropout_p == 0.0:
        return np.ones((1, 1))
    group, position = np.arange(-(-call.Nk // 4)), np.arange(call.N) + call.Nk - call.N
    counter = np.stack(np.broadcast_arrays(group, position[:, None], h, b))
    words = philox4x32(counter, (call.seed & 0xFFFFFFFF, call.seed >> 32))
    of_pair = np.moveaxis(words, 0, 2).reshape(call.N, 4 * group.size)[:, : call.Nk]
    return np.where(of_pair < call.drop_threshold, 0.0, call.keep_factor)


def _visible(call: AttentionCall, b: int, h: int) -> Bool:
    """Return the mask of one head as a boolean matrix."""
    mask = call.mask
    if mask is None:
        return np.ones((call.N, call.Nk), dtype=np.bool_)
    if isinstance(mask, RowIntervals):
        lo0, hi0, lo1, hi1 = (_of(mask.rows, b, h)[:, i, None] for i in range(4))
        j = np.arange(call.Nk)
        return ((lo0 <= j) & (j < hi0)) | ((lo1 <= j) & (j < hi1))
    queries = np.arange(call.N)
    words = _of(mask.bits, b, h)[:, queries // 16]
    return ((words >> (queries % 16).astype(np.uint16)) & 1).T.astype(np.bool_)


def _of(array: NDArray[Any], b: int, h: int) -> NDArray[Any]:
    """Return one head of an array whose first two sizes may be 1."""
    head: NDArray[Any] = array[b % array.shape[0], h % array.shape[1]]
    return head


def _or_zeros(array: NDArray[Any] | None, b: int, h: int, shape: tuple[int, ...]) -> F64:
    """Return one head in float64, or zeros where the array is not given."""
    return np.zeros(shape) if array is None else _f64(_of(array, b, h))


def _f64(array: NDArray[Any]) -> F64:
    return np.asarray(array, dtype=np.float64)


def _empty(call: AttentionCall, heads: int, rows: int, entries: int) -> F64:
    """Return a new `(B, heads, rows, entries)` view of an array in the layout of the call."""
    if call.layout == "bhnd":
        return np.empty((call.B, heads, rows, entries))
    return np.empty((call.B, rows, heads, entries)).swapaxes(1, 2)


def _sum_to(x: F64, shape: tuple[int, ...]) -> F64:
    """Sum over the dimensions in which the shape has 1."""
    summed = x.sum(axis=0, keepdims=True) if shape[0] == 1 else x
    return summed.sum(axis=1, keepdims=True) if shape[1] == 1 else summed


def _round_needed(grads: AttentionGrads, needed: Needed, dtype: np.dtype[Any]) -> AttentionGrads:
    given = zip(grads, astuple(needed), strict=True)
    return AttentionGrads(
        *(_round(x, dtype) if x is not None and kept else None for x, kept in given)
    )


def _round(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def _split(top: F64, log_l: F64, dtype: np.dtype[Any]) -> RowStats:
    """Return row statistics in a dtype; log_l is relative to the rounded m, so p keeps digits."""
    with np.errstate(all="ignore"):
        m = base2(top, dtype)
        lost = np.where(np.isfinite(m) & (np.abs(m) != np.finfo(dtype).max), top - _f64(m) * LN2, 0)
        return RowStats(m, _round(log_l + lost, dtype))


IMPLEMENTATION = Implementation("reference", forward, vjp, jvp, vjp_jvp, forward_jvp)
