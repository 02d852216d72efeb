"""The cross-entropy as the textbook writes it, in float64 NumPy: the oracle of the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import round_to
from tilewise.base.operator import Implementation

from .spec import (
    ALL_NEEDED,
    Cotangents,
    EntropyCall,
    EntropyGrads,
    EntropyOutputs,
    EntropyStats,
    EntropyTangents,
    ForwardSecondCall,
    Needed,
    SecondCall,
    Tangents,
)

Array = NDArray[Any]
F64 = NDArray[np.float64]
Bool = NDArray[np.bool_]


def forward(call: EntropyCall, want: None = None) -> EntropyOutputs:
    """Compute in float64 and round."""
    exact, dtype = forward64(call), call.compute_dtype
    with np.errstate(all="ignore"):
        m = round_to(exact.m, dtype)
        # log_l is relative to the rounded m, so that p keeps its digits
        lost = np.where(np.isfinite(exact.m), exact.m - m, 0.0)
    stats = EntropyStats(m, round_to(exact.log_l + lost, dtype), round_to(exact.total, dtype))
    loss, lse, z_loss = (round_to(x, dtype) for x in (exact.loss, exact.lse, exact.z_loss))
    return EntropyOutputs(loss, lse, z_loss, stats)


def vjp(
    call: EntropyCall,
    cotangents: Cotangents,
    stats: EntropyStats,
    needed: Needed = ALL_NEEDED,
    out: Array | None = None,
) -> EntropyGrads:
    """Compute the gradients in float64 and round those that are needed."""
    found = _rounded(call, vjp64(call, cotangents, stats), needed)
    if out is not None:
        out[...] = found.dlogits
        found = found._replace(dlogits=out)
    return found


def jvp(call: EntropyCall, tangents: Tangents, stats: EntropyStats) -> EntropyTangents:
    """Compute the tangents of the results in float64 and round them."""
    moved = jvp64(call, tangents, stats)
    return EntropyTangents(*[round_to(t, call.compute_dtype) for t in moved])


def jvp_jvp(call: EntropyCall, second: ForwardSecondCall, stats: EntropyStats) -> EntropyTangents:
    """Compute the tangents of the tangents in float64 and round them."""
    moved = jvp_jvp64(call, second, stats)
    return EntropyTangents(*[round_to(t, call.compute_dtype) for t in moved])


def vjp_jvp(
    call: EntropyCall, second: SecondCall, stats: EntropyStats, needed: Needed = ALL_NEEDED
) -> EntropyGrads:
    """Compute the tangents of the gradients in float64 and round those that are needed."""
    return _rounded(call, vjp_jvp64(call, second, stats), needed)


class Exact(NamedTuple):
    """Unrounded results of the forward pass, `(A, I)` each."""

    loss: F64
    lse: F64
    z_loss: F64
    m: F64
    log_l: F64
    total: F64


def forward64(call: EntropyCall) -> Exact:
    """Compute the cross-entropy of each row in float64.

    With logits z, class weights w, a share e of smoothing and V classes::

        s = c tanh(z / c)    or z without a softcap
        t = w[y] (1 - e) [class is y] + w e / V      class index y
        t = w ((1 - e) q + e / V)                    class probabilities q
        total = sum t    m = max s    log_l = log sum exp(s - m)    lse = m + log_l
        z_loss = zeta lse^2
        loss = total log_l + sum t (m - s) + z_loss

    An ignored row has `loss = z_loss = total = 0`, and so has one without a logit above -inf.
    """
    with np.errstate(all="ignore"):
        s, t = _logits(call), _weights(call)
        m = s.max(axis=1)
        alive, kept = m != -np.inf, call.kept & (m != -np.inf)
        gap = s - np.where(alive, m, 0.0)[:, None]
        log_l = np.log(np.where(alive, np.exp(gap).sum(axis=1), 1.0))
        lse = np.where(np.isposinf(m), np.inf, m + log_l)
        far = np.where(t == 0, 0.0, -t * gap).sum(axis=1)
        total = t.sum(axis=1)
        z_loss = np.where(kept, _times(call.options.z_loss, (m + log_l) ** 2), 0.0)
        loss = np.where(kept, total * log_l + far + z_loss, 0.0)
        return Exact(loss, lse, z_loss, m, log_l, total)


def vjp64(call: EntropyCall, cotangents: Cotangents, stats: EntropyStats) -> EntropyGrads:
    """Compute the gradients in float64 from the given row statistics.

    With cotangents g of the loss, gl of lse, gz of z_loss and `p = exp((s - m) - log_l)`::

        alpha = g total + 2 zeta lse (g + gz) + gl
        ds = alpha p - g t    dz = f' ds    f' = 1 - (s / c)^2
        dq = g (1 - e) w (lse - s)

    `dq` is 0 where s is -inf.
    """
    with np.errstate(all="ignore"):
        row = _row(call, stats)
        g, alpha = _alpha(call, row, cotangents)
        ds = _scaled(alpha, row.p) - _scaled(g, row.t)
        return EntropyGrads(_kept(row.slope, ds), _of_targets(call, _scaled(g, row.far)))


def jvp64(call: EntropyCall, tangents: Tangents, stats: EntropyStats) -> tuple[F64, F64, F64]:
    """Compute the tangents of loss, lse and z_loss in float64 from the given row statistics.

    With what `vjp64` names, `ts = f' tz`, `tt = (1 - e) w tq` and `mu = sum p ts`::

        tloss = total mu - sum t ts + sum tt (lse - s) + tz_loss
        tlse = mu    tz_loss = 2 zeta lse mu
    """
    with np.errstate(all="ignore"):
        row = _row(call, stats)
        move = _moves(call, row, tangents)
        tz_loss = np.where(row.kept, _times(2 * call.options.z_loss, row.lse * move.mu), 0.0)
        own = row.total * move.mu - (row.t * move.ts).sum(axis=1)
        tloss = own + (move.tt * row.far).sum(axis=1) + tz_loss
        return np.where(row.kept, tloss, 0.0), move.mu, tz_loss


def vjp_jvp64(call: EntropyCall, second: SecondCall, stats: EntropyStats) -> EntropyGrads:
    """Compute the tangents of the gradients in float64, by differentiating `vjp64` once more.

    With what `vjp64` and `jvp64` name, and the tangents tg, tgl, tgz of the cotangents::

        talpha = tg total + g sum tt + 2 zeta (lse (tg + tgz) + mu (g + gz)) + tgl
        tds = p (talpha + alpha (ts - mu)) - tg t - g tt
        tdz = f' tds + f'' tz ds    f'' = -2 s f' / c^2
        tdq = (1 - e) w (tg (lse - s) + g (mu - ts))
    """
    with np.errstate(all="ignore"):
        row = _row(call, stats)
        move = _moves(call, row, second.tangents)
        g, alpha = _alpha(call, row, second.cotangents)
        tg, talpha = _alpha(call, row, second.moved)
        both = _rows_of(call, row, second.cotangents.loss, second.cotangents.z_loss)
        talpha = talpha + np.where(g == 0, 0.0, g * move.tt.sum(axis=1))
        talpha = talpha + np.where(both == 0, 0.0, _times(2 * call.options.z_loss, both * move.mu))
        gap = np.where(row.absent, 0.0, move.ts - move.mu[:, None])
        ds = _scaled(alpha, row.p) - _scaled(g, row.t)
        tds = _scaled(talpha, row.p) + _scaled(alpha, row.p * gap)
        tds = tds - _scaled(tg, row.t) - _scaled(g, move.tt)
        moved = _kept(row.slope, tds) + _kept(row.bend * move.tz, ds)
        return EntropyGrads(moved, _of_targets(call, _scaled(tg, row.far) - _scaled(g, gap)))


def jvp_jvp64(
    call: EntropyCall, second: ForwardSecondCall, stats: EntropyStats
) -> tuple[F64, F64, F64]:
    """Compute the tangents of the tangents in float64, by differentiating `jvp64` once more.

    With tangents tz and tq, others uz and uq, the seconds wz and wq by which tz and tq move, and
    what `jvp64` names of each::

        ws = f' wz + f'' tz uz    wlse = sum p (ws + ts us) - mu nu    nu = sum p us
        wz_loss = 2 zeta (lse wlse + mu nu)
        wloss = total wlse - sum t ws + wz_loss
                + sum (wt (lse - s) + tt (nu - us) + ut (mu - ts))
    """
    with np.errstate(all="ignore"):
        row = _row(call, stats)
        given = second.tangents, second.others, second.seconds
        t, u, w = (_moves(call, row, tangents) for tangents in given)
        ws = w.ts + row.bend * t.tz * u.tz
        spread = (row.p * (ws + t.ts * u.ts)).sum(axis=1) - t.mu * u.mu
        wlse = np.where(row.alive, spread, 0.0)
        z_part = _times(2 * call.options.z_loss, row.lse * wlse + t.mu * u.mu)
        wz_loss = np.where(row.kept, z_part, 0.0)
        of_t, of_u = (np.where(row.absent, 0.0, x.mu[:, None] - x.ts) for x in (t, u))
        of_targets = (w.tt * row.far + t.tt * of_u + u.tt * of_t).sum(axis=1)
        wloss = row.total * wlse - (row.t * ws).sum(axis=1) + of_targets + wz_loss
        return np.where(row.kept, wloss, 0.0), wlse, wz_loss


class _Row(NamedTuple):
    """What the derivatives start from: entries `(A, C, I)`, numbers `(A, I)`."""

    p: F64
    t: F64  # 0 in a row without a loss
    far: F64  # lse - s, and 0 where s is -inf
    slope: F64  # f'
    bend: F64  # f''
    absent: Bool  # s is -inf
    lse: F64
    total: F64
    alive: Bool  # not without a logit above -inf
    kept: Bool  # alive, and has a loss


class _Moves(NamedTuple):
    tz: F64
    ts: F64
    tt: F64
    mu: F64


def _logits(call: EntropyCall) -> F64:
    z, cap = call.logits.astype(np.float64), call.options.softcap
    return z if cap is None else cap * np.tanh(z / cap)


def _class_weights(call: EntropyCall) -> F64:
    """Return w as `(1, C, 1)`."""
    C = call.logits.shape[1]
    w = np.ones(C) if call.weight is None else call.weight.astype(np.float64)
    return w[None, :, None]


def _weights(call: EntropyCall) -> F64:
    """Return t, 0 in ignored rows."""
    w, smoothing, C = _class_weights(call), call.options.label_smoothing, call.logits.shape[1]
    if call.targets is None:
        assert call.probabilities is not None
        q = call.probabilities.astype(np.float64)
    else:
        q = np.asarray(np.arange(C)[None, :, None] == call.targets[:, None], np.float64)
    t = w * ((1 - smoothing) * q + smoothing / C)
    return np.where(call.kept[:, None], t, 0.0)


def _row(call: EntropyCall, stats: EntropyStats) -> _Row:
    s, cap = _logits(call), call.options.softcap
    m, log_l, total = (x.astype(np.float64) for x in stats)
    alive = m != -np.inf
    p = np.where(alive[:, None], np.exp((s - m[:, None]) - log_l[:, None]), 0.0)
    absent = np.isneginf(s) | ~alive[:, None]
    far = np.where(absent, 0.0, log_l[:, None] + (m[:, None] - s))
    slope, bend = np.ones_like(s), np.zeros_like(s)
    if cap is not None:
        # 1 - tanh^2, without the difference.
        slope = np.cosh(call.logits.astype(np.float64) / cap) ** -2.0
        bend = -2 * s / cap**2 * slope
    kept = alive & call.kept
    t = np.where(kept[:, None], _weights(call), 0.0)
    return _Row(p, t, far, slope, bend, absent, m + log_l, total, alive, kept)


def _moves(call: EntropyCall, row: _Row, tangents: Tangents) -> _Moves:
    zeros = np.zeros(call.logits.shape)
    tz = zeros if tangents.logits is None else tangents.logits.astype(np.float64)
    tq = tangents.probabilities
    tt = zeros if tq is None else _of_targets(call, tq.astype(np.float64))
    assert tt is not None
    ts = row.slope * tz
    mu = np.where(row.alive, (row.p * ts).sum(axis=1), 0.0)
    return _Moves(tz, ts, np.where(row.kept[:, None], tt, 0.0), mu)


def _alpha(call: EntropyCall, row: _Row, given: Cotangents) -> tuple[F64, F64]:
    """Return g and alpha; zeros of g, gl and gz stay zeros, also beside NaN."""
    g, both = _rows_of(call, row, given.loss), _rows_of(call, row, given.loss, given.z_loss)
    alpha = np.zeros(row.total.shape) if given.lse is None else given.lse.astype(np.float64)
    alpha = np.where(row.alive, alpha, 0.0) + np.where(g == 0, 0.0, g * row.total)
    z_part = _times(2 * call.options.z_loss, both * row.lse)
    return g, alpha + np.where(both == 0, 0.0, z_part)


def _rows_of(call: EntropyCall, row: _Row, *given: Array | None) -> F64:
    """Return the sum of cotangents in the rows that have a loss."""
    total = np.zeros(row.total.shape)
    for one in given:
        if one is not None:
            total = total + one.astype(np.float64)
    return np.where(row.kept, total, 0.0)


def _of_targets(call: EntropyCall, far: F64) -> F64 | None:
    """Return `(1 - e) w` times an array, or None for class indices."""
    if call.probabilities is None:
        return None
    return (1 - call.options.label_smoothing) * _class_weights(call) * far


def _times(factor: float, x: F64) -> F64:
    """Return a product that is 0 where the factor is, also beside inf."""
    return factor * x if factor else np.zeros_like(x)


def _scaled(numbers: F64, entries: F64) -> F64:
    """Return the entries of rows times their numbers; 0 where the number is, also beside NaN."""
    return np.where(numbers[:, None] == 0, 0.0, numbers[:, None] * entries)


def _kept(factor: F64, x: F64) -> F64:
    """Return a product whose zeros stay zeros, also beside NaN."""
    return np.where(x == 0, 0.0, factor * x)


def _rounded(call: EntropyCall, grads: EntropyGrads, needed: Needed) -> EntropyGrads:
    q = call.probabilities
    of_targets = None
    if q is not None and needed.targets:
        assert grads.dtargets is not None
        of_targets = round_to(grads.dtargets, q.dtype)
    return EntropyGrads(round_to(grads.dlogits, call.dtype) if needed.logits else None, of_targets)


IMPLEMENTATION = Implementation("reference", forward, vjp, jvp, vjp_jvp, jvp_jvp=jvp_jvp)
