"""The softmax as the textbook writes it, in float64 NumPy: the oracle of every implementation."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import round_to
from tilewise.base.operator import Implementation

from .spec import (
    ALL_NEEDED,
    CotangentCall,
    ForwardSecondCall,
    Needed,
    SecondCall,
    SoftmaxCall,
    SoftmaxGrads,
    SoftmaxOutputs,
    SoftmaxStats,
    SoftmaxTangents,
    TangentCall,
    Want,
)

Array = NDArray[Any]
F64 = NDArray[np.float64]
Bool = NDArray[np.bool_]


def forward(call: SoftmaxCall, want: Want) -> SoftmaxOutputs:
    """Compute in float64 and round the results that are wanted."""
    exact, dtype = forward64(call), call.compute_dtype
    y = _stored(exact.y, call, want.out) if want.y else None
    log_y = _stored(exact.log_y, call, want.out) if want.log_y else None
    stats = _stats(call, exact) if want.stats else None
    return SoftmaxOutputs(y, log_y, _rounded_to(exact.lse, dtype) if want.lse else None, stats)


def vjp(call: SoftmaxCall, cotangents: CotangentCall, needed: Needed = ALL_NEEDED) -> SoftmaxGrads:
    """Compute the gradients in float64 and round those that are needed."""
    return _rounded(call, vjp64(call, cotangents), needed)


def jvp(call: SoftmaxCall, tangents: TangentCall, want: Want) -> SoftmaxTangents:
    """Compute the tangents of the results in float64 and round those that are wanted."""
    return _rounded_tangents(call, jvp64(call, tangents), want)


def jvp_jvp(call: SoftmaxCall, second: ForwardSecondCall, want: Want) -> SoftmaxTangents:
    """Compute the tangents of the tangents in float64 and round those that are wanted."""
    return _rounded_tangents(call, jvp_jvp64(call, second), want)


def vjp_jvp(call: SoftmaxCall, second: SecondCall, needed: Needed = ALL_NEEDED) -> SoftmaxGrads:
    """Compute the tangents of the gradients in float64 and round those that are needed."""
    return _rounded(call, vjp_jvp64(call, second), needed)


class Exact(NamedTuple):
    """Unrounded results of the forward pass."""

    y: F64  # (A, C, I)
    log_y: F64  # (A, C, I)
    lse: F64  # (A, I)
    m: F64  # (A, I) largest entry, with the sink
    log_l: F64  # (A, I) logarithm of sum exp(s - m / temperature)


def forward64(call: SoftmaxCall) -> Exact:
    """Compute the softmax of each row in float64.

    With `s = x / temperature`, -inf where hidden, and the sink z::

        top = max(max s, z)    l = sum exp(s - top) + exp(z - top)    lse = top + log l
        y = exp(s - top) / l    log_y = s - top - log l

    A row without an entry above -inf and without a sink has `y = 0` and `lse = -inf`.
    """
    with np.errstate(all="ignore"):
        visible, s, z = _logits(call)
        seen = call.x.max(axis=1, initial=-np.inf, where=visible).astype(np.float64)
        m = np.maximum(seen, z * call.temperature)
        top = m / call.temperature
        alive = top != -np.inf
        base = np.where(alive, top, 0.0)
        gap = s - base[:, None]
        w = np.where(visible, np.exp(gap), 0.0)
        l = np.where(alive, w.sum(axis=1) + np.exp(z - base), 1.0)
        log_l = np.log(l)
        log_y = np.where(visible, gap - log_l[:, None], -np.inf)
        # Beside an infinite maximum the sum is NaN, though it is infinite.
        lse = np.where(np.isposinf(top), np.inf, top + log_l)
        return Exact(np.where(visible, w / l[:, None], 0.0), log_y, lse, m, log_l)


def vjp64(call: SoftmaxCall, cotangents: CotangentCall) -> SoftmaxGrads:
    """Compute the gradients in float64 from the given row statistics.

    With `p = exp((x - m) / temperature - log_l)` and `p_sink = exp(z - m / temperature - log_l)`::

        c = sum (p dy + dlog_y) - dlse
        ds = p (dy - c) + dlog_y    dx = ds / temperature    dsink = -p_sink c
    """
    with np.errstate(all="ignore"):
        row = _probabilities(call, cotangents.stats)
        dy, dlog_y, dlse = _cotangents(row, cotangents.dy, cotangents.dlog_y, cotangents.dlse)
        c = _mean_cotangent(row, dy, dlog_y, dlse)
        ds = row.p * (dy - c[:, None]) + dlog_y
        return _gradients(call, row, ds, -row.p_sink * c)


def jvp64(call: SoftmaxCall, tangents: TangentCall) -> tuple[F64, F64, F64]:
    """Compute the tangents of y, log_y and lse in float64 from the given row statistics.

    With what `vjp64` names and `ts = tx / temperature`::

        tlse = sum p ts + p_sink tsink    ty = p (ts - tlse)    tlog_y = ts - tlse
    """
    with np.errstate(all="ignore"):
        row = _probabilities(call, tangents.stats)
        ts, tz = _tangents(call, row, tangents)
        mu = (row.p * ts).sum(axis=1) + row.p_sink * tz
        gap = np.where(row.active, ts - mu[:, None], 0.0)
        return row.p * gap, gap, mu


def vjp_jvp64(call: SoftmaxCall, second: SecondCall) -> SoftmaxGrads:
    """Compute the tangents of the gradients in float64, by differentiating `vjp64` once more.

    With what `vjp64` and `jvp64` name::

        tp = p (ts - tlse)    tc = sum (tp dy + p tdy + tdlog_y) - tdlse
        tds = tp (dy - c) + p (tdy - tc) + tdlog_y    tdx = tds / temperature
        tdsink = -p_sink ((tsink - tlse) c + tc)
    """
    given = second.cotangents
    with np.errstate(all="ignore"):
        row = _probabilities(call, given.stats)
        ts, tz = _tangents(call, row, second.tangents)
        dy, dlog_y, dlse = _cotangents(row, given.dy, given.dlog_y, given.dlse)
        tdy, tdlog_y, tdlse = _cotangents(row, second.tdy, second.tdlog_y, second.tdlse)
        mu = (row.p * ts).sum(axis=1) + row.p_sink * tz
        c = _mean_cotangent(row, dy, dlog_y, dlse)
        tp = row.p * (ts - mu[:, None])
        tc = (tp * dy).sum(axis=1) + _mean_cotangent(row, tdy, tdlog_y, tdlse)
        tds = tp * (dy - c[:, None]) + row.p * (tdy - tc[:, None]) + tdlog_y
        return _gradients(call, row, tds, -row.p_sink * ((tz - mu) * c + tc))


def jvp_jvp64(call: SoftmaxCall, second: ForwardSecondCall) -> tuple[F64, F64, F64]:
    """Compute the tangents of the tangents in float64, by differentiating `jvp64` once more.

    With tangents `tx`, others `ux`, and the seconds `wx` by which tx moves::

        ulse = sum p us + p_sink usink    up = p (us - ulse)
        wlse = sum (up ts + p ws) + p_sink ((usink - ulse) tsink + wsink)
        wy = up (ts - tlse) + p (ws - wlse)    wlog_y = ws - wlse
    """
    with np.errstate(all="ignore"):
        row = _probabilities(call, second.tangents.stats)
        (ts, tz), (us, uz), (ws, wz) = (
            _tangents(call, row, given)
            for given in (second.tangents, second.others, second.seconds)
        )
        mu = (row.p * ts).sum(axis=1) + row.p_sink * tz
        nu = (row.p * us).sum(axis=1) + row.p_sink * uz
        up = row.p * (us - nu[:, None])
        moved = (up * ts + row.p * ws).sum(axis=1) + row.p_sink * ((uz - nu) * tz + wz)
        gap = np.where(row.active, ws - moved[:, None], 0.0)
        return up * (ts - mu[:, None]) + row.p * gap, gap, moved


class _Row(NamedTuple):
    """The probabilities of each row, made from its statistics."""

    p: F64  # (A, C, I)
    p_sink: F64  # (A, I)
    active: Bool  # (A, C, I): visible, in a row that is not empty
    alive: Bool  # (A, I)
    has_sink: Bool  # (A, I)


def _logits(call: SoftmaxCall) -> tuple[Bool, F64, F64]:
    """Return which entries are visible, the logits and the sink, -inf where there is none."""
    s = call.x.astype(np.float64) / call.temperature
    A, C, I = call.x.shape
    visible = np.ones((A, C, I), np.bool_) if call.where is None else call.where
    z = np.full((A, I), -np.inf) if call.sink is None else call.sink.astype(np.float64)
    return visible, np.where(visible, s, -np.inf), z


def _probabilities(call: SoftmaxCall, stats: SoftmaxStats) -> _Row:
    visible, s, z = _logits(call)
    top, log_l = stats.m.astype(np.float64) / call.temperature, stats.log_l.astype(np.float64)
    alive = top != -np.inf
    active = visible & alive[:, None]
    p = np.where(active, np.exp((s - top[:, None]) - log_l[:, None]), 0.0)
    has_sink = z != -np.inf
    p_sink = np.where(alive & has_sink, np.exp((z - top) - log_l), 0.0)
    return _Row(p, p_sink, active, alive, has_sink)


def _stats(call: SoftmaxCall, exact: Exact) -> SoftmaxStats:
    """Return row statistics; log_l is relative to the rounded m, so that p keeps its digits."""
    dtype = call.compute_dtype
    largest = float(np.finfo(dtype).max)
    with np.errstate(all="ignore"):
        finite = np.isfinite(exact.m)
        m = _rounded_to(np.where(finite, np.clip(exact.m, -largest, largest), exact.m), dtype)
        lost = np.where(finite, (exact.m - m) / call.temperature, 0.0)
        return SoftmaxStats(m, _rounded_to(exact.log_l + lost, dtype))


def _cotangents(
    row: _Row, dy: Array | None, dlog_y: Array | None, dlse: Array | None
) -> tuple[F64, F64, F64]:
    """Return cotangents, or their tangents, with zeros where nothing is."""
    return _kept(row.active, dy), _kept(row.active, dlog_y), _kept(row.alive, dlse)


def _kept(keep: Bool, x: Array | None) -> F64:
    return np.zeros(keep.shape) if x is None else np.where(keep, x.astype(np.float64), 0.0)


def _mean_cotangent(row: _Row, dy: F64, dlog_y: F64, dlse: F64) -> F64:
    c: F64 = (row.p * dy).sum(axis=1) + dlog_y.sum(axis=1) - dlse
    return c


def _tangents(call: SoftmaxCall, row: _Row, tangents: TangentCall) -> tuple[F64, F64]:
    """Return the tangents of the logits and of the sink, with zeros where nothing is."""
    ts = _kept(row.active, tangents.tx) / call.temperature
    return ts, _kept(row.has_sink, tangents.tsink)


def _gradients(call: SoftmaxCall, row: _Row, ds: F64, dsink: F64) -> SoftmaxGrads:
    dx = np.where(row.active, ds / call.temperature, 0.0)
    if call.sink is None:
        return SoftmaxGrads(dx)
    return SoftmaxGrads(dx, np.where(row.has_sink, dsink, 0.0))


def _rounded_tangents(
    call: SoftmaxCall, tangents: tuple[F64, F64, F64], want: Want
) -> SoftmaxTangents:
    ty, tlog_y, tlse = tangents
    return SoftmaxTangents(
        _rounded_to(ty, call.dtype) if want.y else None,
        _rounded_to(tlog_y, call.dtype) if want.log_y else None,
        _rounded_to(tlse, call.compute_dtype) if want.lse else None,
    )


def _rounded(call: SoftmaxCall, grads: SoftmaxGrads, needed: Needed) -> SoftmaxGrads:
    dsink = grads.dsink if needed.sink else None
    return SoftmaxGrads(
        _rounded_to(grads.dx, call.dtype) if needed.x else None,
        None if dsink is None else _rounded_to(dsink, call.compute_dtype),
    )


def _rounded_to(x: F64, dtype: np.dtype[Any]) -> Array:
    return np.ascontiguousarray(round_to(x, dtype))


def _stored(x: F64, call: SoftmaxCall, out: Array | None) -> Array:
    rounded = _rounded_to(x, call.dtype)
    if out is None:
        return rounded
    out[...] = rounded
    return out


IMPLEMENTATION = Implementation("reference", forward, vjp, jvp, vjp_jvp, jvp_jvp=jvp_jvp)
