r"""How far two equally careful computations of a result may differ by the luck of their roundings.

Each elementary operation is taken to be off by an independent error: u times its result, or for a
dot product u times the sum of its terms' absolute values; exp by 2 ulp. The variances are
propagated to first order through the formulas: with `e_ij` the relative error of `exp(s_ij - m_i)`,
`var o = sum_j (p e)^2 (v - o)^2`, and so on. A name that ends in 2 is a variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import FloatDType, smallest, unit_roundoff

from .straightforward import Directions, Pass, logit_tangents, per_key_head, to_bias

__all__ = ["Noise", "of_rounding"]

Array = NDArray[Any]
Results = dict[str, Array]


@dataclass(frozen=True)
class _Tangents:
    """Tangents of the logits and of o and lse, with their variances."""

    tx: Array
    ts: Array
    ts2: Array
    mu: Array  # (B, H, N, 1)
    mu2: Array
    to: Array
    to2: Array


class Noise:
    """The noise of every result of one evaluation.

    Args:
        x: An evaluation in float64.
        do: Cotangent of o.
        dlse: Cotangent of lse, or None.
    """

    def __init__(self, x: Pass, do: Array, dlse: Array | None) -> None:
        self.x, self.u = x, unit_roundoff(x.call.compute_dtype)
        self.do = np.asarray(do, np.float64)
        self.off = _logit_noise(x, self.u)
        self.gap = np.where(x.p > 0, x.s - x.m, 0)
        # Variance of the weight w = exp(s - m) in its row: (p e)^2.
        self.pe2 = (x.p * (self.off + self.u * (4 + np.abs(self.gap)))) ** 2
        self.row = self.pe2.sum(axis=-1, keepdims=True)
        self.p2 = self.pe2 + x.p**2 * (self.row + (2 * self.u) ** 2)
        self.o2 = self._of_output()
        self._backward(dlse)

    def results(self) -> Results:
        """Return the standard deviations of the entries of o and the row statistics."""
        return _of_statistics(self) | {"o": np.sqrt(self.o2)}

    def gradients(self) -> Results:
        """Return the standard deviations of the entries of the gradients."""
        x, call, u = self.x, self.x.call, self.u
        dx, dx2, kept, kept2 = (
            y.swapaxes(-1, -2) for y in (self.dx, self.dx2, x.p * x.keep, self.p2 * x.keep**2)
        )
        found = {
            "dq": np.sqrt(self._product(self.dx, self.dx2, x.k)),
            "dk": np.sqrt(per_key_head(call, self._product(dx, dx2, x.q))),
            "dv": np.sqrt(per_key_head(call, self._product(kept, kept2, self.do))),
        }
        if call.bias is not None:
            found["dbias"] = self._to_bias(self.ds, self.ds2)
        if call.sinks is not None:
            terms2 = x.p_sink**2 * self.delta2 + self._of_sink(self.delta)
            rounded = (u * np.abs(x.p_sink * self.delta).sum(axis=(0, 2, 3))) ** 2
            found["dsinks"] = np.sqrt(terms2.sum(axis=(0, 2, 3)) + rounded)
        return found

    def tangents(self, d: Directions) -> Results:
        """Return the standard deviations of the tangents of o and lse, and of the gradients."""
        y = self._of_tangents(d)
        found = {"to": np.sqrt(y.to2), "tlse": np.sqrt(y.mu2 + (self.u * y.mu) ** 2)[..., 0]}
        return found | self._of_second(d, y)

    def _of_output(self) -> Array:
        x, u = self.x, self.u
        o2 = self._centred(self.pe2, self.row)
        o2 += (u * ((x.p * x.keep) @ np.abs(x.v))) ** 2 + (2 * u * x.o) ** 2
        return np.asarray(o2)

    def _centred(self, weights2: Array, total2: Array) -> Array:
        """Return `sum_j weights2_j (z_j v_j - o)^2`, z being the factor of dropout."""
        x = self.x
        of_square, of_cross = weights2 * x.keep**2, weights2 * x.keep
        found = of_square @ (x.v * x.v) - 2 * x.o * (of_cross @ x.v) + x.o**2 * total2
        return np.asarray(np.maximum(found, 0))

    def _backward(self, dlse: Array | None) -> None:
        x, u, do = self.x, self.u, self.do
        delta = (do * x.o).sum(axis=-1, keepdims=True)
        delta2 = (do * do * self.o2).sum(axis=-1, keepdims=True)
        delta2 += (u * (np.abs(do) * np.abs(x.o)).sum(axis=-1, keepdims=True)) ** 2
        if dlse is not None:
            delta = delta - dlse.astype(np.float64)[..., None]
        delta2 += (u * delta) ** 2
        g = x.keep * (do @ x.v.swapaxes(-1, -2)) - delta
        g2 = (u * x.keep * (np.abs(do) @ np.abs(x.v).swapaxes(-1, -2))) ** 2 + delta2
        ds, ds2 = x.p * g, self.p2 * g * g + x.p**2 * g2
        scale, slope, slope2 = x.call.softmax_scale, self._slope(), self._slope2()
        self.delta, self.delta2, self.g, self.g2, self.ds, self.ds2 = delta, delta2, g, g2, ds, ds2
        self.dx = ds * slope * scale
        self.dx2 = ((ds2 + (4 * u * ds) ** 2) * slope**2 + ds**2 * slope2) * scale**2

    def _slope(self) -> Array | float:
        return 1.0 if self.x.slope_of_cap is None else self.x.slope_of_cap

    def _slope2(self) -> Array | float:
        # The cap's derivative 1 - t^2 loses what t rounds away.
        return 0.0 if self.x.slope_of_cap is None else (4 * self.u) ** 2

    def _of_tangents(self, d: Directions) -> _Tangents:
        x, u = self.x, self.u
        tx, ts = logit_tangents(x, d)
        terms = self._terms_of_tx(d)
        ts2 = (u * terms * self._slope()) ** 2 + tx**2 * self._slope2() + (2 * u * ts) ** 2
        weighted2 = self.p2 * ts**2 + x.p**2 * ts2
        mu = (x.p * ts).sum(axis=-1, keepdims=True) + x.p_sink * d.tsinks
        mu2 = weighted2.sum(axis=-1, keepdims=True)
        mu2 += (u * (x.p * np.abs(ts)).sum(axis=-1, keepdims=True)) ** 2
        # The rounding of the saved log_l moves all probabilities of a row alike.
        mu2 += self._of_sink(d.tsinks) + (u * (1 + np.abs(x.log_l)) * mu) ** 2
        kept, absolute = x.p * x.keep, np.abs(x.v)
        to = (kept * ts) @ x.v - mu * x.o + kept @ d.tv
        # An error of p ts reaches both terms that have it, and they cancel where v is near o.
        to2 = self._centred(weighted2, weighted2.sum(axis=-1, keepdims=True))
        to2 += mu**2 * self.o2 + (u * mu * x.o) ** 2 + (u * (3 + np.abs(x.log_l)) * to) ** 2
        to2 += (u * ((kept * np.abs(ts)) @ absolute)) ** 2
        to2 += self._product(kept, self.p2 * x.keep**2, d.tv)
        return _Tangents(tx, ts, ts2, mu, mu2, to, to2)

    def _terms_of_tx(self, d: Directions) -> Array:
        x = self.x
        terms = np.abs(d.tq) @ np.abs(x.k).swapaxes(-1, -2)
        terms = terms + np.abs(x.q) @ np.abs(d.tk).swapaxes(-1, -2)
        return np.asarray(x.call.softmax_scale * terms)

    def _of_second(self, d: Directions, y: _Tangents) -> Results:
        x, call, u = self.x, self.x.call, self.u
        a, a2 = y.ts - y.mu, y.ts2 + y.mu2 + (u * (y.ts - y.mu)) ** 2
        h, h2, tdelta, tdelta2 = self._of_tangents_of_cotangents(d, y)
        inner = a * self.g + h
        inner2 = a2 * self.g**2 + a**2 * self.g2 + h2
        inner2 += (u * (np.abs(a * self.g) + np.abs(h))) ** 2
        tds, tds2 = x.p * inner, self.p2 * inner**2 + x.p**2 * inner2
        tdx, tdx2 = self._through_cap(d, y, tds, tds2)
        w, w2 = x.keep * x.p * a, x.keep**2 * (self.p2 * a**2 + x.p**2 * a2)
        kept, kept2 = x.keep * x.p, x.keep**2 * self.p2
        tdk2 = self._transposed(tdx, tdx2, x.q) + self._transposed(self.dx, self.dx2, d.tq)
        tdv2 = self._transposed(w, w2, self.do) + self._transposed(kept, kept2, d.tdo)
        tdq2 = self._product(tdx, tdx2, x.k) + self._product(self.dx, self.dx2, d.tk)
        found = {
            "tdq": np.sqrt(tdq2),
            "tdk": np.sqrt(per_key_head(call, tdk2)),
            "tdv": np.sqrt(per_key_head(call, tdv2)),
        }
        if call.bias is not None:
            found["tdbias"] = self._to_bias(tds, tds2)
        if call.sinks is not None:
            found["tdsinks"] = self._of_sinks(d.tsinks - y.mu, y.mu2, tdelta, tdelta2)
        return found

    def _of_tangents_of_cotangents(
        self, d: Directions, y: _Tangents
    ) -> tuple[Array, Array, Array, Array]:
        """Return `tdp - tdelta` and `tdelta`, each with its variance."""
        x, u = self.x, self.u
        v, tv = x.v.swapaxes(-1, -2), d.tv.swapaxes(-1, -2)
        tdelta = (d.tdo * x.o + self.do * y.to).sum(axis=-1, keepdims=True)
        tdelta2 = (d.tdo**2 * self.o2 + self.do**2 * y.to2).sum(axis=-1, keepdims=True)
        terms = np.abs(d.tdo * x.o) + np.abs(self.do * y.to)
        tdelta2 += (u * terms.sum(axis=-1, keepdims=True)) ** 2
        tdelta = tdelta - d.tdlse
        tdelta2 += (u * tdelta) ** 2
        pairs = np.abs(d.tdo) @ np.abs(v) + np.abs(self.do) @ np.abs(tv)
        h = x.keep * (d.tdo @ v + self.do @ tv) - tdelta
        return h, (u * x.keep * pairs) ** 2 + tdelta2, tdelta, tdelta2

    def _through_cap(
        self, d: Directions, y: _Tangents, tds: Array, tds2: Array
    ) -> tuple[Array, Array]:
        """Return `scale (tds cap'(x) + ds cap''(x) tx)` and its variance."""
        x, call, u = self.x, self.x.call, self.u
        slope, slope2, scale = self._slope(), self._slope2(), call.softmax_scale
        tdx = tds * slope
        tdx2 = (tds2 + (4 * u * tds) ** 2) * slope**2 + tds**2 * slope2
        if x.t is not None and call.softcap is not None:
            tt = slope * y.tx / call.softcap
            tt2 = (slope * u * self._terms_of_tx(d) / call.softcap) ** 2 + (2 * u * tt) ** 2
            tt2 += slope2 * (y.tx / call.softcap) ** 2
            # t is off by what x is off by, as far as the cap lets that through.
            t2 = (self.off / call.softcap) ** 2 + (2 * u * x.t) ** 2
            curve = 2 * x.t * tt
            tdx = tdx - curve * self.ds
            tdx2 = tdx2 + curve**2 * (self.ds2 + (4 * u * self.ds) ** 2)
            tdx2 = tdx2 + 4 * self.ds**2 * (x.t**2 * tt2 + tt**2 * t2)
        return tdx * scale, tdx2 * scale**2

    def _of_sink(self, factor: Array) -> Array:
        """Return the variance that the sink's probability gives to a multiple of itself."""
        x = self.x
        # In this order a maximum of -1e308 leaves 0, for there is no sink in its row.
        weight = x.p_sink * factor
        return np.asarray(weight**2 * self.row + (weight * self.u * (5 + np.abs(x.m))) ** 2)

    def _of_sinks(self, a: Array, a2: Array, tdelta: Array, tdelta2: Array) -> Array:
        x, u = self.x, self.u
        terms2 = x.p_sink**2 * (a2 * self.delta**2 + a**2 * self.delta2 + tdelta2)
        terms2 += self._of_sink(a * self.delta) + self._of_sink(tdelta)
        terms = np.abs(x.p_sink * a * self.delta) + np.abs(x.p_sink * tdelta)
        rounded = (u * terms.sum(axis=(0, 2, 3))) ** 2
        return np.asarray(np.sqrt(terms2.sum(axis=(0, 2, 3)) + rounded))

    def _product(self, weights: Array, weights2: Array, y: Array) -> Array:
        rounded = (self.u * (np.abs(weights) @ np.abs(y))) ** 2
        return np.asarray(weights2 @ (y * y) + rounded)

    def _transposed(self, weights: Array, weights2: Array, y: Array) -> Array:
        return self._product(weights.swapaxes(-1, -2), weights2.swapaxes(-1, -2), y)

    def _to_bias(self, x: Array, x2: Array) -> Array:
        call = self.x.call
        return np.asarray(np.sqrt(to_bias(call, x2) + (self.u * to_bias(call, np.abs(x))) ** 2))


def of_rounding(x: Array, dtype: FloatDType) -> Array:
    """Return the standard deviation of rounding each entry to a dtype once.

    The error is uniform between half a spacing of the numbers down and half a spacing up.
    """
    exact = np.where(np.isfinite(x), x, 0.0)
    _, exponent = np.frexp(exact)
    spacing = np.maximum(np.ldexp(unit_roundoff(dtype), exponent), smallest(dtype))
    return np.where(exact != 0, spacing / np.sqrt(12), 0.0)


def _logit_noise(x: Pass, u: float) -> Array:
    """Return the standard deviation of each attended logit.

    Logits so large that their own spacing is above 1e-3 cannot be told apart by any computation:
    there a result is either exact or arbitrary, and has no noise.
    """
    call = x.call
    terms = call.softmax_scale * (np.abs(x.q) @ np.abs(x.k).swapaxes(-1, -2))
    if x.slope_of_cap is not None:
        terms = terms * x.slope_of_cap
    resolved = (x.p > 0) & (u * np.abs(x.s) < 1e-3)
    return np.where(resolved, u * (terms + 2 * np.abs(x.s)), 0)


def _of_statistics(noise: Noise) -> Results:
    """Return the standard deviations of lse, max_logit and entropy."""
    x, u, gap, pe2 = noise.x, noise.u, noise.gap, noise.pe2
    m, log_l = np.abs(x.m[..., 0]), np.abs(x.log_l[..., 0])
    lse2 = pe2.sum(axis=-1) + (u * (1 + log_l + 2 * m)) ** 2
    surprise = np.where(x.p > 0, x.log_l - gap, 0)
    entropy = (x.p * surprise).sum(axis=-1, keepdims=True)
    entropy2 = (pe2 * (surprise - entropy) ** 2).sum(axis=-1)
    entropy2 += (u * (1 + 2 * log_l + (x.p * np.abs(gap)).sum(axis=-1))) ** 2
    # The sink is not among p: its own logit is exact, its share of the mean gap is not.
    entropy2 += (4 * u * x.p_sink[..., 0] * (1 + m)) ** 2
    top = noise.off.max(axis=-1, initial=0.0)
    return {
        "lse": np.sqrt(lse2),
        "max_logit": np.sqrt(top**2 + (u * m) ** 2),
        "entropy": np.sqrt(entropy2),
    }
