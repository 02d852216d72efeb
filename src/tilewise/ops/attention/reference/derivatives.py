"""The derivatives of one head, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewise.ops.attention.spec import LN2, AttentionCall, RowStats, TangentCall

from .heads import (
    F64,
    Bool,
    Head,
    attended_product,
    f64,
    logits_of,
    or_zeros,
    softmax_of,
)


class HeadGrads(NamedTuple):
    """The gradients of one head; ds is that of its bias."""

    dq: F64
    dk: F64
    dv: F64
    ds: F64
    dsink: float


class Probabilities(NamedTuple):
    """What the statistics make of the logits."""

    p: F64  # (N, Nk), zero where not attended
    p_sink: F64  # (N,), zero where there is no sink
    attended: Bool  # (N, Nk)
    has_keys: Bool  # (N,)
    slope_of_cap: F64  # (N, Nk), first derivative
    curve_of_cap: F64  # (N, Nk), second derivative


class Cotangents(NamedTuple):
    """Cotangents of one head and its output, or the tangents of the three; zero if not given."""

    do: F64  # (N, Dv)
    dlse: F64  # (N,)
    o: F64  # (N, Dv)


class Tangents(NamedTuple):
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


def recompute(call: AttentionCall, head: Head, stats: RowStats, b: int, h: int) -> Probabilities:
    """Return `p = exp(s - m - log_l)` with the given statistics."""
    s, slope_of_cap, curve_of_cap = logits_of(call, head)
    top, log_l = _given_statistics(stats, head, s, b, h)
    alive = top != -np.inf
    attended = head.visible & alive[:, None]
    base = np.where(alive, top, 0.0)
    with np.errstate(all="ignore"):
        p = np.where(attended, np.exp((s - base[:, None]) - log_l[:, None]), 0.0)
        p_sink = np.where(alive & (head.sink != -np.inf), np.exp(head.sink - base - log_l), 0.0)
    return Probabilities(
        p, p_sink, attended, np.asarray(attended.any(axis=1)), slope_of_cap, curve_of_cap
    )


def _backward(head: Head, row: Probabilities, cotangents: Cotangents) -> _Backward:
    do, dlse, o = cotangents
    with np.errstate(all="ignore"):
        dp = head.keep * (do @ head.v.T)
        # In a row that attends to nothing, o is absent: only the sink's own lse remains.
        delta = np.where(row.has_keys, (do * o).sum(axis=1), 0.0) - dlse
        ds = np.where(row.attended, row.p * (dp - delta[:, None]), 0.0)
        dx = np.where(row.attended, ds * row.slope_of_cap, 0.0)
    return _Backward(dp, delta, ds, dx)


def head_vjp(
    call: AttentionCall, head: Head, row: Probabilities, cotangents: Cotangents
) -> HeadGrads:
    """Return the gradients; see `vjp64`."""
    attended, scale = row.attended, call.softmax_scale
    _, delta, ds, dx = _backward(head, row, cotangents)
    with np.errstate(all="ignore"):
        return HeadGrads(
            dq=scale * attended_product(dx, head.k, attended),
            dk=scale * attended_product(dx.T, head.q, attended.T),
            dv=attended_product((row.p * head.keep).T, cotangents.do, attended.T),
            ds=ds,
            dsink=-_sink_sum(head, row, row.p_sink * delta),
        )


def head_jvp(
    call: AttentionCall, head: Head, row: Probabilities, o: F64, t: Tangents
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


def head_jvp_jvp(
    call: AttentionCall,
    head: Head,
    row: Probabilities,
    o: F64,
    t: Tangents,
    u: Tangents,
    w: Tangents,
) -> tuple[F64, F64]:
    """Return the tangents of to and tlse along u, with t moving along w; see `jvp_jvp64`."""
    p, p_sink, attended, has_keys, slope_of_cap, curve_of_cap = row
    (tx, ts), (ux, us), (wx, _) = (_logit_tangents(call, head, row, given) for given in (t, u, w))
    with np.errstate(all="ignore"):
        wx = wx + call.softmax_scale * (t.q @ u.k.T + u.q @ t.k.T)
        ws = np.where(attended, slope_of_cap * wx + curve_of_cap * tx * ux + w.bias, 0.0)
        mu, nu = ((p * xs).sum(axis=1) + p_sink * x.sink for xs, x in ((ts, t), (us, u)))
        up, kept = np.where(attended, p * (us - nu[:, None]), 0.0), p * head.keep
        moved = (up * ts + p * ws).sum(axis=1) + p_sink * ((u.sink - nu) * t.sink + w.sink)
        uo = attended_product(kept * us, head.v, attended) + attended_product(kept, u.v, attended)
        uo -= np.where(has_keys[:, None], nu[:, None] * o, 0.0)
        wo = attended_product(head.keep * (up * ts + p * ws), head.v, attended)
        wo += attended_product(kept * ts, u.v, attended)
        wo += attended_product(head.keep * up, t.v, attended)
        wo += attended_product(kept, w.v, attended)
        wo -= np.where(has_keys[:, None], moved[:, None] * o + mu[:, None] * uo, 0.0)
    return wo, moved


def head_vjp_jvp(
    call: AttentionCall,
    head: Head,
    row: Probabilities,
    cotangents: Cotangents,
    t: Tangents,
    tcotangents: Cotangents,
    tlse: F64,
) -> HeadGrads:
    """Return the tangents of the gradients; see `vjp_jvp64`."""
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
    return HeadGrads(scale * tdq, scale * tdk, tdv, tds, tdsink)


def head_magnitudes(
    call: AttentionCall, head: Head, row: Probabilities, cotangents: Cotangents
) -> HeadGrads:
    """Return the sums of `head_vjp` over absolute values."""
    do, dlse, _ = (np.abs(x) for x in cotangents)
    v, kept = np.abs(head.v), row.p * head.keep
    delta = (do * (kept @ v)).sum(axis=1) + dlse
    ds = row.p * (head.keep * (do @ v.T) + delta[:, None])
    return HeadGrads(
        dq=call.softmax_scale * ds @ np.abs(head.k),
        dk=call.softmax_scale * ds.T @ np.abs(head.q),
        dv=kept.T @ do,
        ds=ds,
        dsink=float((row.p_sink * delta).sum()),
    )


def _logit_tangents(
    call: AttentionCall, head: Head, row: Probabilities, t: Tangents
) -> tuple[F64, F64]:
    """Return the tangents of `x = scale q k^T` and of s, zero where not attended."""
    with np.errstate(all="ignore"):
        tx = call.softmax_scale * (t.q @ head.k.T + head.q @ t.k.T)
        ts = row.slope_of_cap * tx + t.bias
    return np.where(row.attended, tx, 0.0), np.where(row.attended, ts, 0.0)


def _sink_sum(head: Head, row: Probabilities, terms: F64) -> float:
    """Add up the terms of the rows that have the sink.

    A row without keys and sink is absent, even where its cotangents are NaN.
    """
    counted = (row.has_keys | (row.p_sink != 0)) & (head.sink != -np.inf)
    return float(np.where(counted, terms, 0.0).sum())


def cotangents_of(
    call: AttentionCall,
    do: NDArray[Any] | None,
    dlse: NDArray[Any] | None,
    o: NDArray[Any],
    b: int,
    h: int,
) -> Cotangents:
    """Return the cotangents of one head."""
    return Cotangents(
        or_zeros(do, b, h, (call.N, call.Dv)),
        or_zeros(dlse, b, h, (call.N,)),
        f64(o[b, h]),
    )


def tangents_of(call: AttentionCall, t: TangentCall, b: int, h: int) -> Tangents:
    """Return the tangents of one head."""
    hk = h // (call.H // call.Hk)
    tsink = 0.0 if t.tsinks is None else float(t.tsinks[h])
    if call.sinks is not None and call.sinks[h] == -np.inf:
        tsink = 0.0  # -inf is no sink, so it does not move
    return Tangents(
        q=or_zeros(t.tq, b, h, (call.N, call.D)),
        k=or_zeros(t.tk, b, hk, (call.Nk, call.D)),
        v=or_zeros(t.tv, b, hk, (call.Nk, call.Dv)),
        bias=or_zeros(t.tbias, b, h, (1, 1)),
        sink=tsink,
    )


def largest_logit(call: AttentionCall, head: Head) -> float:
    """Return the largest sum of absolute values that makes up one attended logit."""
    i, j = np.arange(call.N)[:, None], np.arange(call.Nk)
    size = call.softmax_scale * (np.abs(head.q) @ np.abs(head.k.T)) + np.abs(head.bias)
    size += abs(head.slope) * np.abs(i + call.Nk - call.N - j)
    sink = abs(head.sink) if np.isfinite(head.sink) else 0.0
    return float(size.max(initial=sink, where=head.visible & np.isfinite(size)))


def _given_statistics(stats: RowStats, head: Head, s: F64, b: int, h: int) -> tuple[F64, F64]:
    """Return the row maximum and log sum in natural units, as the statistics give them.

    A maximum that overflowed in base-2 units no longer says where its row stood, so such a row is
    computed anew.
    """
    m, log_l = stats.m[b, h], f64(stats.log_l[b, h])
    top = f64(m) * LN2
    saturated = np.abs(m) == np.finfo(m.dtype).max
    if saturated.any():
        own = softmax_of(head, s)
        top = np.where(saturated, own.top, top)
        log_l = np.where(saturated, own.log_l, log_l)
    return top, log_l
