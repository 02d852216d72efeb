"""Attention as most people would write it, in the dtype of its inputs, and the noise it has.

The first is the yardstick of an implementation's accuracy. The second says how far two equally
careful computations may differ by the luck of their roundings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import unit_roundoff
from tilewise.ops.attention.spec import AttentionCall

__all__ = ["Pass", "evaluate", "gradients", "noise", "results", "visible"]

Array = NDArray[Any]
Results = dict[str, Array]


@dataclass(frozen=True)
class Pass:
    """All matrices of one evaluation; `k` and `v` repeated to one per query head."""

    call: AttentionCall
    q: Array
    k: Array
    v: Array
    slope_of_cap: Array | None
    s: Array  # -inf where masked
    m: Array  # (B, H, N, 1), 0 for a row without keys
    alive: Array  # (B, H, N, 1)
    p: Array
    p_sink: Array  # (B, H, N, 1)
    log_l: Array  # (B, H, N, 1)
    o: Array


def visible(call: AttentionCall) -> NDArray[np.bool_] | None:
    """Return the mask as booleans that broadcast to `(B, H, N, Nk)`, or None."""
    return None if call.mask is None else call.mask.to_bool(call.N, call.Nk)


def evaluate(call: AttentionCall, dtype: np.dtype[Any]) -> Pass:
    """Evaluate attention with whole matrices, every operation in `dtype`, for finite inputs."""
    q, k, v = (np.ascontiguousarray(x, dtype) for x in (call.q, call.k, call.v))
    if k.shape[1] != call.H:
        k, v = (np.repeat(x, call.H // call.Hk, axis=1) for x in (k, v))
    s = (q @ k.swapaxes(-1, -2)) * dtype.type(call.softmax_scale)
    slope_of_cap = None
    if call.softcap is not None:
        cap = dtype.type(call.softcap)
        t = np.tanh(s / cap)
        s, slope_of_cap = cap * t, 1 - t * t
    if call.bias is not None:
        s = s + call.bias.astype(dtype)
    if call.alibi_slopes is not None:
        s = s - call.alibi_slopes.astype(dtype)[..., None, None] * _distance(call, dtype)
    seen = visible(call)
    if seen is not None:
        s = np.where(seen, s, dtype.type(-np.inf))
    sink = np.full((1, 1, 1, 1), -np.inf, dtype)
    if call.sinks is not None:
        sink = call.sinks.astype(dtype)[None, :, None, None]
    m = np.maximum(s.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    alive = m != -np.inf
    m = np.where(alive, m, dtype.type(0))
    w, w_sink = np.exp(s - m), np.exp(sink - m)
    l = np.where(alive, w.sum(axis=-1, keepdims=True) + w_sink, dtype.type(1))
    p = w / l
    return Pass(
        call, q, k, v, slope_of_cap, s, m, alive, p, w_sink / l, np.log(l), np.asarray(p @ v)
    )


def results(x: Pass) -> Results:
    """Return o and the row statistics of an evaluation."""
    lowest = -np.inf
    gap = np.where(x.p > 0, x.s - x.m, 0)
    sinks = 0 if x.call.sinks is None else x.call.sinks.astype(x.m.dtype)[None, :, None, None]
    gap_sink = np.where(x.p_sink > 0, sinks - x.m, 0)
    entropy = x.log_l - (x.p * gap).sum(axis=-1, keepdims=True) - x.p_sink * gap_sink
    return {
        "o": x.o,
        "lse": np.where(x.alive, x.m + x.log_l, lowest)[..., 0],
        "max_logit": x.s.max(axis=-1, initial=lowest),
        "entropy": np.where(x.alive, entropy, 0)[..., 0],
    }


def gradients(x: Pass, do: Array, dlse: Array | None) -> Results:
    """Return the gradients of an evaluation, for finite cotangents."""
    call, dtype = x.call, x.q.dtype
    do = np.ascontiguousarray(do, dtype)
    delta = (do * x.o).sum(axis=-1, keepdims=True)
    if dlse is not None:
        delta = delta - dlse.astype(dtype)[..., None]
    ds = x.p * (do @ x.v.swapaxes(-1, -2) - delta)
    dx = (ds if x.slope_of_cap is None else ds * x.slope_of_cap) * dtype.type(call.softmax_scale)
    found = {
        "dq": dx @ x.k,
        "dk": _per_key_head(call, dx.swapaxes(-1, -2) @ x.q),
        "dv": _per_key_head(call, x.p.swapaxes(-1, -2) @ do),
    }
    if call.bias is not None:
        found["dbias"] = _to_bias(call, ds)
    if call.sinks is not None:
        found["dsinks"] = -(x.p_sink * delta).sum(axis=(0, 2, 3))
    return found


def noise(x: Pass, do: Array, dlse: Array | None) -> Results:
    r"""Return for each result how far single entries may be off by rounding alone.

    Each elementary operation is taken to be off by an independent error: u times its result, or
    for a dot product u times the sum of its terms' absolute values; exp by 2 ulp. The variances
    are propagated to first order: with `e_ij` the relative error of `exp(s_ij - m_i)`,
    `var o = sum_j (p e)^2 (v - o)^2`, and so on through the formulas of the gradients.

    Args:
        x: An evaluation in float64.
        do: Cotangent of o.
        dlse: Cotangent of lse, or None.

    Returns:
        Standard deviations of the entries of o, lse, ... in float64.
    """
    call, u = x.call, unit_roundoff(x.call.dtype)
    do = np.asarray(do, np.float64)
    off = _logit_noise(x, u)
    gap = np.where(x.p > 0, x.s - x.m, 0)
    # Relative variance of w = exp(s - m), as it weighs in a row: (p e)^2.
    pe2 = (x.p * (off + u * (4 + np.abs(gap)))) ** 2
    row = pe2.sum(axis=-1, keepdims=True)
    v2 = x.v * x.v
    o2 = np.maximum(pe2 @ v2 - 2 * x.o * (pe2 @ x.v) + x.o**2 * row, 0)
    o2 += (u * (x.p @ np.abs(x.v))) ** 2 + (2 * u * x.o) ** 2
    found = _statistics_noise(x, u, off, gap, pe2) | {"o": np.sqrt(o2)}

    delta = (do * x.o).sum(axis=-1, keepdims=True)
    delta2 = (do * do * o2).sum(axis=-1, keepdims=True)
    delta2 += (u * (np.abs(do) * np.abs(x.o)).sum(axis=-1, keepdims=True)) ** 2
    if dlse is not None:
        delta = delta - dlse.astype(np.float64)[..., None]
    delta2 += (u * delta) ** 2
    g = do @ x.v.swapaxes(-1, -2) - delta
    g2 = (u * (np.abs(do) @ np.abs(x.v).swapaxes(-1, -2))) ** 2 + delta2
    p2 = pe2 + x.p**2 * (row + (2 * u) ** 2)
    ds, ds2 = x.p * g, p2 * g * g + x.p**2 * g2
    slope = call.softmax_scale * (1.0 if x.slope_of_cap is None else x.slope_of_cap)
    dx, dx2 = ds * slope, (ds2 + (4 * u * ds) ** 2) * slope**2
    if call.softcap is not None:
        # The cap's derivative 1 - t^2 loses what t rounds away.
        dx2 = dx2 + (ds * call.softmax_scale * u * 4) ** 2

    def product(weights: Array, variance: Array, y: Array) -> Array:
        rounded = (u * (np.abs(weights) @ np.abs(y))) ** 2
        return np.asarray(variance @ (y * y) + rounded)

    found["dq"] = np.sqrt(product(dx, dx2, x.k))
    dx, dx2, p, p2 = (y.swapaxes(-1, -2) for y in (dx, dx2, x.p, p2))
    found["dk"] = np.sqrt(_per_key_head(call, product(dx, dx2, x.q)))
    found["dv"] = np.sqrt(_per_key_head(call, product(p, p2, do)))
    if call.bias is not None:
        found["dbias"] = np.sqrt(_to_bias(call, ds2) + (u * _to_bias(call, np.abs(ds))) ** 2)
    if call.sinks is not None:
        sink2 = x.p_sink**2 * (delta2 + delta**2 * (row + (u * (5 + np.abs(x.m))) ** 2))
        rounded = (u * np.abs(x.p_sink * delta).sum(axis=(0, 2, 3))) ** 2
        found["dsinks"] = np.sqrt(sink2.sum(axis=(0, 2, 3)) + rounded)
    return found


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


def _statistics_noise(x: Pass, u: float, off: Array, gap: Array, pe2: Array) -> Results:
    """Return the standard deviations of lse, max_logit and entropy."""
    m, log_l = np.abs(x.m[..., 0]), np.abs(x.log_l[..., 0])
    lse2 = pe2.sum(axis=-1) + (u * (1 + log_l + 2 * m)) ** 2
    surprise = np.where(x.p > 0, x.log_l - gap, 0)
    entropy = (x.p * surprise).sum(axis=-1, keepdims=True)
    entropy2 = (pe2 * (surprise - entropy) ** 2).sum(axis=-1)
    entropy2 += (u * (1 + 2 * log_l + (x.p * np.abs(gap)).sum(axis=-1))) ** 2
    # The sink is not among p: its own logit is exact, its share of the mean gap is not.
    entropy2 += (4 * u * x.p_sink[..., 0] * (1 + m)) ** 2
    top = off.max(axis=-1, initial=0.0)
    return {
        "lse": np.sqrt(lse2),
        "max_logit": np.sqrt(top**2 + (u * m) ** 2),
        "entropy": np.sqrt(entropy2),
    }


def _distance(call: AttentionCall, dtype: np.dtype[Any]) -> Array:
    i, j = np.arange(call.N)[:, None], np.arange(call.Nk)
    return np.asarray(np.abs(i + (call.Nk - call.N) - j), dtype)


def _per_key_head(call: AttentionCall, x: Array) -> Array:
    """Sum over the query heads that share a key/value head."""
    if x.shape[1] == call.Hk:
        return x
    grouped = x.reshape(call.B, call.Hk, call.H // call.Hk, *x.shape[2:])
    return np.asarray(grouped.sum(axis=2))


def _to_bias(call: AttentionCall, x: Array) -> Array:
    """Sum over the dimensions in which the bias is broadcast."""
    shape = () if call.bias is None else call.bias.shape
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1)
    summed = x.sum(axis=axes, keepdims=True)
    return np.asarray(summed.reshape(call.bias_shape or ()))
