"""The operator as the textbook writes it, in float64 NumPy: the oracle of every implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import round_to
from tilewise.base.operator import Implementation

from .spec import (
    ALL_NEEDED,
    CotangentCall,
    ForwardSecondCall,
    LossCall,
    LossGrads,
    LossOutputs,
    LossStats,
    Needed,
    RowTangents,
    SecondCall,
    TangentCall,
    Want,
    reached,
)

Array = NDArray[Any]
F64 = NDArray[np.float64]


def forward(call: LossCall, want: Want) -> LossOutputs:
    """Compute in float64 and round the results that are wanted."""
    exact, wide = forward64(call), call.compute_dtype
    stats = _stats(call, exact)
    grads = LossGrads()
    if want.gradients is not None:
        dloss = np.where(call.kept, call.scale, 0.0).astype(wide)
        grads = vjp(call, CotangentCall(dloss, None, None, stats), want.gradients)
    return LossOutputs(
        loss=round_to(exact.loss, wide),
        stats=stats,
        entropy=round_to(exact.entropy, wide) if want.entropy else None,
        argmax=exact.argmax if want.argmax else None,
        picked=round_to(exact.picked, wide) if want.picked else None,
        mass=round_to(exact.mass, wide) if want.picked else None,
        grads=grads,
    )


def vjp(call: LossCall, cotangents: CotangentCall, needed: Needed = ALL_NEEDED) -> LossGrads:
    """Compute the gradients in float64 and round those that are needed."""
    exact, into = vjp64(call, cotangents), cotangents.accumulator
    if into is not None and needed.weight:
        assert exact.dweight is not None
        into[...] = round_to(into.astype(np.float64) + exact.dweight, into.dtype)
    shown = needed if into is None else replace(needed, weight=False)
    return _rounded(call, exact, shown)


def jvp(call: LossCall, tangents: TangentCall) -> RowTangents:
    """Compute the tangents of the results in float64 and round them."""
    return _rounded_tangents(call, tangents, jvp64(call, tangents))


def jvp_jvp(call: LossCall, second: ForwardSecondCall) -> RowTangents:
    """Compute the tangents of the tangents in float64 and round them."""
    return _rounded_tangents(call, second.tangents, jvp_jvp64(call, second))


def vjp_jvp(call: LossCall, second: SecondCall, needed: Needed = ALL_NEEDED) -> LossGrads:
    """Compute the tangents of the gradients in float64 and round those that are needed."""
    return _rounded(call, vjp_jvp64(call, second), needed)


class Exact(NamedTuple):
    """Unrounded results of the forward pass, `(T,)` each."""

    loss: F64
    m: F64
    log_l: F64
    entropy: F64
    argmax: NDArray[np.int64]
    picked: F64
    mass: F64


def forward64(call: LossCall) -> Exact:
    """Compute the loss of each token in float64.

    With the targets' weights t of `_targets`, their sum A and zeta the factor of the z-loss::

        z = hidden weight^T + bias    s = softcap tanh(z / softcap)
        m = max s    log_l = log sum exp(s - m)    lse = m + log_l
        loss = A log_l + sum t (m - s) + zeta lse^2       0 where the token is ignored
        entropy = log_l - sum p (s - m)

    The loss is `A lse - sum t s + zeta lse^2`, summed so that a large m leaves it its digits. Where
    all classes are absent, `m = lse = -inf`, and loss, entropy and log_l are 0.
    """
    with np.errstate(all="ignore"):
        s = _logits(call).s
        t, A = _targets(call)
        m = s.max(axis=1)
        empty = np.isneginf(m)
        gap = s - np.where(empty, 0.0, m)[:, None]
        w = np.exp(gap)
        l = np.where(empty, 1.0, w.sum(axis=1))
        log_l = np.log(l)
        lse = m + log_l
        loss = A * log_l - _weighted(t, gap) + call.z_loss * lse**2
        entropy = log_l - _weighted(w, gap) / l
        loss = np.where(call.kept & ~empty, loss, 0.0)
        return Exact(loss, m, log_l, entropy, s.argmax(axis=1), _weighted(t, s), A)


def vjp64(call: LossCall, cotangents: CotangentCall) -> LossGrads:
    """Compute the gradients in float64 from the given row statistics.

    With `p = exp((s - m) - log_l)` and cotangents g, g_lse and g_entropy of each token::

        alpha = g (A + 2 zeta lse) + g_lse
        ds = alpha p - g t - g_entropy p (log p + entropy)
        dz = ds (1 - (s / softcap)^2)
        dhidden = dz weight    dweight = dz^T hidden    dbias = sum dz
    """
    with np.errstate(all="ignore"):
        row = _row(call, cotangents.stats, cotangents)
        g, g_lse, g_entropy = row.of(cotangents.dloss, cotangents.dlse, cotangents.dentropy)
        dz = _logit_cotangents(call, row, g, g_lse, g_entropy)[1] * row.slope
        return LossGrads(dz @ row.weight, dz.T @ row.hidden, dz.sum(axis=0))


def jvp64(call: LossCall, tangents: TangentCall) -> tuple[F64, F64, F64]:
    """Compute the tangents of loss, lse and entropy in float64 from the given row statistics.

    With what `vjp64` names and `tz = thidden weight^T + hidden tweight^T + tbias`::

        ts = (1 - (s / softcap)^2) tz    tlse = sum p ts
        tloss = (A + 2 zeta lse) tlse - sum t ts
        tentropy = -sum p (log p + entropy) ts
    """
    with np.errstate(all="ignore"):
        row = _row(call, tangents.stats)
        ts = row.slope * _logit_tangents(row, tangents)
        mu = _weighted(row.p, ts)
        tloss = row.steepness * mu - _weighted(row.t, ts)
        return np.where(call.kept, tloss, 0.0), mu, -_weighted(row.surprise, ts)


def vjp_jvp64(call: LossCall, second: SecondCall) -> LossGrads:
    """Compute the tangents of the gradients in float64, by differentiating `vjp64` once more.

    With what `vjp64` and `jvp64` name::

        tp = p (ts - tlse)
        talpha = tg (A + 2 zeta lse) + g 2 zeta tlse + tg_lse
        tds = talpha p + alpha tp - tg t - tg_entropy p (log p + entropy)
              - g_entropy (tp (log p + entropy) + p (ts - tlse + tentropy))
        tdz = tds (1 - (s / softcap)^2) + ds tslope
        tslope = -2 s / softcap^2 ts
        tdhidden = tdz weight + dz tweight    tdweight = tdz^T hidden + dz^T thidden
    """
    given, moves = second.cotangents, second.tangents
    with np.errstate(all="ignore"):
        row = _row(call, given.stats, given, second)
        g, g_lse, g_entropy = row.of(given.dloss, given.dlse, given.dentropy)
        tg, tg_lse, tg_entropy = row.of(second.tdloss, second.tdlse, second.tdentropy)
        ts = row.slope * _logit_tangents(row, moves)
        mu = _weighted(row.p, ts)[:, None]
        tentropy = -_weighted(row.surprise, ts)[:, None]
        alpha, ds = _logit_cotangents(call, row, g, g_lse, g_entropy)
        _, moved = _logit_cotangents(call, row, tg, tg_lse, tg_entropy)
        tp = row.p * (ts - mu)
        tds = moved + g * 2 * call.z_loss * mu * row.p + alpha * tp
        tds -= g_entropy * (row.surprise * (ts - mu) + row.p * (ts - mu + tentropy))
        bend = 0.0 if call.softcap is None else -2 * row.s / call.softcap**2
        dz, tdz = ds * row.slope, tds * row.slope + ds * bend * ts
        tdhidden, tdweight = tdz @ row.weight, tdz.T @ row.hidden
        if moves.tweight is not None:
            tdhidden += dz @ moves.tweight.astype(np.float64)
        if moves.thidden is not None:
            tdweight += dz.T @ row.kept(moves.thidden.astype(np.float64))
        return LossGrads(tdhidden, tdweight, tdz.sum(axis=0))


def jvp_jvp64(call: LossCall, second: ForwardSecondCall) -> tuple[F64, F64, F64]:
    """Compute the tangents of the tangents in float64, by differentiating `jvp64` once more.

    With tangents of all inputs, others marked u along which these move, the seconds marked w by
    which the tangents do, and what `jvp64` names of each::

        wz = whidden weight^T + hidden wweight^T + wbias + thidden uweight^T + uhidden tweight^T
        ws = (1 - (s / softcap)^2) wz + tslope uz    tslope = -2 s / softcap^2 ts
        wlse = sum p (ws + ts us) - tlse ulse
        wloss = (A + 2 zeta lse) wlse + 2 zeta tlse ulse - sum t ws
        wentropy = -sum p (log p + entropy) (ws + ts (us - ulse)) - sum p ts (us - ulse + uentropy)
    """
    t, u, w = second.tangents, second.others, second.seconds
    with np.errstate(all="ignore"):
        row = _row(call, t.stats)
        tz, uz, wz = (_logit_tangents(row, given) for given in (t, u, w))
        wz += _mixed(row, t, u) + _mixed(row, u, t)
        ts, us = row.slope * tz, row.slope * uz
        bend = 0.0 if call.softcap is None else -2 * row.s / call.softcap**2
        ws = row.slope * wz + bend * ts * uz
        mu, nu = _weighted(row.p, ts), _weighted(row.p, us)
        gap = us - nu[:, None]
        wlse = _weighted(row.p, ws + ts * us) - mu * nu
        wloss = row.steepness * wlse - _weighted(row.t, ws)
        if call.z_loss:
            wloss += 2 * call.z_loss * mu * nu
        uentropy = -_weighted(row.surprise, us)[:, None]
        wentropy = -_weighted(row.surprise, ws + ts * gap)
        wentropy -= _weighted(row.p, ts * (gap + uentropy))
        return np.where(call.kept, wloss, 0.0), wlse, wentropy


class _Logits(NamedTuple):
    hidden: F64  # (T, C)
    weight: F64  # (V, C)
    s: F64  # (T, V)
    slope: F64  # (T, V) derivative of s by z


class _Row(NamedTuple):
    """What derivatives read of each token; zeros where it has no part."""

    hidden: F64  # (T, C)
    weight: F64  # (V, C)
    s: F64  # (T, V)
    slope: F64  # (T, V) derivative of s by z
    p: F64  # (T, V)
    surprise: F64  # (T, V) p (log p + entropy)
    t: F64  # (T, V)
    steepness: F64  # (T,) A + 2 zeta lse
    live: NDArray[np.bool_]  # (T,) whether the token has a part

    def kept(self, rows: F64) -> F64:
        """Return rows with zeros where the token has no part."""
        return np.where(self.live[:, None], rows, 0.0)

    def of(self, *rows: Array | None) -> list[F64]:
        """Return cotangents of the tokens as columns, with zeros for None."""
        zero = np.zeros((len(self.live), 1))
        return [zero if r is None else r.astype(np.float64)[:, None] for r in rows]


def _logits(call: LossCall) -> _Logits:
    hidden, weight = call.hidden.astype(np.float64), call.weight.astype(np.float64)
    z = hidden @ weight.T
    if call.bias is not None:
        z += call.bias.astype(np.float64)
    if call.softcap is None:
        return _Logits(hidden, weight, z, np.ones_like(z))
    u = z / call.softcap
    # The slope is 1 - tanh^2, without the difference.
    return _Logits(hidden, weight, call.softcap * np.tanh(u), np.cosh(u) ** -2.0)


def _targets(call: LossCall) -> tuple[F64, F64]:
    """Return the weight of each class in each token's target, and their sum A.

    With label smoothing e, class weights w and `classes` in all: `t_c = (1 - e) w_y [c = y] +
    e w_c / classes`, for the classes of the call.
    """
    e, V, y = call.label_smoothing, len(call.weight), call.targets - call.first_class
    w = np.ones(V) if call.class_weight is None else call.class_weight.astype(np.float64)
    t = np.tile(e / call.classes * w, (call.tokens, 1))
    here = call.kept & (y >= 0) & (y < V)
    t[here, y[here]] += (1 - e) * w[y[here]]
    t = np.where(call.kept[:, None], t, 0.0)
    return t, t.sum(axis=1)


def _weighted(weights: F64, values: F64) -> F64:
    """Return the sums of each row, in which a weight of 0 counts nothing, beside inf too."""
    total: F64 = np.where(weights == 0, 0.0, weights * values).sum(axis=1)
    return total


def _row(call: LossCall, stats: LossStats, *cotangents: CotangentCall | SecondCall) -> _Row:
    """Return the rows, with those cut out that no cotangent reaches, where cotangents are given."""
    hidden, weight, s, slope = _logits(call)
    t, A = _targets(call)
    if cotangents and isinstance(cotangents[0], CotangentCall):
        A = A if cotangents[0].mass is None else cotangents[0].mass.astype(np.float64)
    m, log_l = stats.m.astype(np.float64), stats.log_l.astype(np.float64)
    some = ~np.isneginf(m)
    live = some & reached(call, *cotangents) if cotangents else some
    log_p = (s - m[:, None]) - log_l[:, None]
    p = np.exp(log_p)
    surprise = np.where(p == 0, 0.0, p * (log_p - _weighted(p, log_p)[:, None]))
    keep, t = live[:, None], np.where(some[:, None], t, 0.0)
    return _Row(
        hidden=np.where(keep, hidden, 0.0),
        weight=weight,
        s=np.where(keep, s, 0.0),
        slope=np.where(keep, slope, 0.0),
        p=np.where(keep, p, 0.0),
        surprise=np.where(keep, surprise, 0.0),
        t=t,
        steepness=np.where(live, A + 2 * call.z_loss * (m + log_l), 0.0),
        live=live,
    )


def _logit_cotangents(
    call: LossCall, row: _Row, g: F64, g_lse: F64, g_entropy: F64
) -> tuple[F64, F64]:
    """Return alpha and the cotangents of s."""
    alpha = g * row.steepness[:, None] + g_lse
    return alpha, alpha * row.p - g * row.t - g_entropy * row.surprise


def _logit_tangents(row: _Row, tangents: TangentCall) -> F64:
    tz = np.zeros(row.s.shape)
    if tangents.thidden is not None:
        tz += row.kept(tangents.thidden.astype(np.float64)) @ row.weight.T
    if tangents.tweight is not None:
        tz += row.hidden @ tangents.tweight.astype(np.float64).T
    if tangents.tbias is not None:
        tz += tangents.tbias.astype(np.float64)
    return tz


def _mixed(row: _Row, t: TangentCall, u: TangentCall) -> F64 | float:
    """Return what two tangents of both factors of the logits add to their second tangents."""
    if t.thidden is None or u.tweight is None:
        return 0.0
    return row.kept(t.thidden.astype(np.float64)) @ u.tweight.astype(np.float64).T


def _stats(call: LossCall, exact: Exact) -> LossStats:
    """Return row statistics; log_l is relative to the rounded m, so that p keeps its digits."""
    wide = call.compute_dtype
    with np.errstate(all="ignore"):
        m = round_to(exact.m, wide)
        lost = np.where(np.isfinite(m), exact.m - m, 0.0)
        return LossStats(m, round_to(exact.log_l + lost, wide))


def _rounded_tangents(
    call: LossCall, tangents: TangentCall, moved: tuple[F64, F64, F64]
) -> RowTangents:
    wide = call.compute_dtype
    tloss, tlse, tentropy = (round_to(x, wide) for x in moved)
    return RowTangents(tloss, tlse, None if tangents.entropy is None else tentropy)


def _rounded(call: LossCall, grads: LossGrads, needed: Needed) -> LossGrads:
    given = (call.hidden, call.weight, call.bias)
    wanted = (needed.hidden, needed.weight, needed.bias)
    rounded = [
        round_to(grad, x.dtype) if want and x is not None and grad is not None else None
        for grad, x, want in zip(grads, given, wanted, strict=True)
    ]
    return LossGrads(*rounded)


IMPLEMENTATION = Implementation("reference", forward, vjp, jvp, vjp_jvp, jvp_jvp=jvp_jvp)
