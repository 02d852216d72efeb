"""Attention as the textbook writes it, in float64 NumPy: the oracle of every implementation.

One head of one batch entry at a time, with its whole matrix of probabilities in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewise.base.masks import RowIntervals
from tilewise.base.operator import Implementation

from .spec import (
    LN2,
    AttentionCall,
    AttentionGrads,
    AttentionOutputs,
    CotangentCall,
    RowStats,
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


def vjp(call: AttentionCall, cotangents: CotangentCall) -> AttentionGrads:
    """Compute the gradients in float64 and round them to the dtype of the call."""
    exact = vjp64(call, cotangents)
    dq, dk, dv = (_round(x, call.dtype) for x in exact[:3])
    dbias, dsinks = (None if x is None else _round(x, call.dtype) for x in exact[3:])
    return AttentionGrads(dq, dk, dv, dbias, dsinks)


def forward64(call: AttentionCall, want: Want) -> AttentionOutputs:
    """Compute attention in float64: `o = softmax(s) v`, with the sink in the denominator only.

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
        row = _softmax(head, _logits(call, head)[0])
        attended = head.visible & (row.top != -np.inf)[:, None]
        o[b, h] = attended_product(row.p, head.v, attended)
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

    With `p = exp(s - m - log_l)` and `delta = rowsum(do * o) - dlse`::

        dp = do v^T    ds = p * (dp - delta)    dx = ds * (1 - tanh(x / softcap)^2)
        dq = scale dx k    dk = scale dx^T q    dv = p^T do    dbias = ds
        dsink = -sum_i exp(sink - m_i - log_l_i) delta_i

    The statistics are taken as they are given, not computed anew: those of a larger softmax give
    the gradients of a part of it, as ring attention needs them.

    Args:
        call: The validated call.
        cotangents: Validated cotangents, with `o` and the statistics of the forward pass.

    Returns:
        Unrounded gradients; the first three are `(B, H, N, D)` views in the layout of the call.
    """
    return _gradients(call, cotangents, _head_vjp)


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
        s = _logits(call, head)[0]
        row = _softmax(head, s)
        logit_size = max(logit_size, _logit_size(call, head))
        with np.errstate(all="ignore"):
            gap = np.where(row.p > 0, row.p * np.abs(s - row.top[:, None]), 0.0).sum(axis=1)
        squares["o"] += float(((row.p @ np.abs(head.v)) ** 2).sum())
        squares["entropy"] += float(((1 + gap) ** 2).sum())
        squares["lse"] += call.N
        squares["max_logit"] += call.N
    grads = _gradients(call, cotangents, _head_magnitudes)
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
        for j in np.flatnonzero(~finite):
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
    call: AttentionCall, cotangents: CotangentCall, of_head: Callable[..., _HeadGrads]
) -> AttentionGrads:
    """Add up the gradients of the heads over groups and over the broadcast sizes of the bias."""
    dq = _empty(call, call.H, call.N, call.D)
    dk = _empty(call, call.Hk, call.Nk, call.D)
    dv = _empty(call, call.Hk, call.Nk, call.Dv)
    dk[...] = dv[...] = 0
    dbias = None if call.bias is None else np.zeros(call.bias.shape)
    dsinks = None if call.sinks is None else np.zeros(call.H)
    for b, h in np.ndindex(call.B, call.H):
        grads = of_head(call, _head(call, b, h), cotangents, b, h)
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
    slope_of_cap: F64  # (N, Nk)


def _recompute(call: AttentionCall, head: Head, stats: RowStats, b: int, h: int) -> _Probabilities:
    """Return `p = exp(s - m - log_l)` with the given statistics."""
    s, slope_of_cap = _logits(call, head)
    top, log_l = _given_statistics(stats, head, s, b, h)
    alive = top != -np.inf
    attended = head.visible & alive[:, None]
    base = np.where(alive, top, 0.0)
    with np.errstate(all="ignore"):
        p = np.where(attended, np.exp((s - base[:, None]) - log_l[:, None]), 0.0)
        p_sink = np.where(alive & (head.sink != -np.inf), np.exp(head.sink - base - log_l), 0.0)
    return _Probabilities(p, p_sink, attended, slope_of_cap)


def _head_vjp(
    call: AttentionCall, head: Head, cotangents: CotangentCall, b: int, h: int
) -> _HeadGrads:
    p, p_sink, attended, slope_of_cap = _recompute(call, head, cotangents.stats, b, h)
    do, o, dlse = _cotangents_of(cotangents, b, h)
    with np.errstate(all="ignore"):
        # In a row that attends to nothing, o is absent: only the sink's own lse remains.
        delta = np.where(attended.any(axis=1), (do * o).sum(axis=1), 0.0) - dlse
        ds = np.where(attended, p * (do @ head.v.T - delta[:, None]), 0.0)
        dx = np.where(attended, ds * slope_of_cap * call.softmax_scale, 0.0)
        # A row without keys and sink is absent, even where its cotangents are NaN.
        counted = (attended.any(axis=1) | (p_sink != 0)) & (head.sink != -np.inf)
        dsink = -np.where(counted, p_sink * delta, 0.0).sum()
    return _HeadGrads(
        dq=attended_product(dx, head.k, attended),
        dk=attended_product(dx.T, head.q, attended.T),
        dv=attended_product(p.T, do, attended.T),
        ds=ds,
        dsink=float(dsink),
    )


def _head_magnitudes(
    call: AttentionCall, head: Head, cotangents: CotangentCall, b: int, h: int
) -> _HeadGrads:
    """Return the sums of `_head_vjp` over absolute values."""
    p, p_sink, _, _ = _recompute(call, head, cotangents.stats, b, h)
    do, _, dlse = (np.abs(x) for x in _cotangents_of(cotangents, b, h))
    v = np.abs(head.v)
    delta = (do * (p @ v)).sum(axis=1) + dlse
    ds = p * (do @ v.T + delta[:, None])
    return _HeadGrads(
        dq=call.softmax_scale * ds @ np.abs(head.k),
        dk=call.softmax_scale * ds.T @ np.abs(head.q),
        dv=p.T @ do,
        ds=ds,
        dsink=float((p_sink * delta).sum()),
    )


def _cotangents_of(cotangents: CotangentCall, b: int, h: int) -> tuple[F64, F64, F64]:
    """Return do, o and dlse of one head."""
    do, o = _f64(cotangents.do[b, h]), _f64(cotangents.o[b, h])
    dlse = cotangents.dlse
    return do, o, np.zeros(len(do)) if dlse is None else _f64(dlse[b, h])


def _logit_size(call: AttentionCall, head: Head) -> float:
    """Return the largest sum of absolute values that makes up one attended logit."""
    i, j = np.arange(call.N)[:, None], np.arange(call.Nk)
    size = call.softmax_scale * (np.abs(head.q) @ np.abs(head.k.T)) + np.abs(head.bias)
    size += abs(head.slope) * np.abs(i + call.Nk - call.N - j)
    sink = abs(head.sink) if np.isfinite(head.sink) else 0.0
    return float(size.max(initial=sink, where=head.visible & np.isfinite(size)))


def _logits(call: AttentionCall, head: Head) -> tuple[F64, F64]:
    """Return the logits, -inf where masked, and the derivative of the soft cap."""
    with np.errstate(all="ignore"):
        x = call.softmax_scale * (head.q @ head.k.T)
        slope_of_cap = np.ones_like(x)
        if call.softcap is not None:
            t = np.tanh(x / call.softcap)
            x, slope_of_cap = call.softcap * t, 1.0 - t * t
        i, j = np.arange(call.N)[:, None], np.arange(call.Nk)
        s = x + head.bias - head.slope * np.abs(i + call.Nk - call.N - j)
    return np.where(head.visible, s, -np.inf), slope_of_cap


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
    slopes, bias, sinks = call.alibi_slopes, call.bias, call.sinks
    return Head(
        q=_f64(call.q[b, h]),
        k=_f64(call.k[b, hk]),
        v=_f64(call.v[b, hk]),
        bias=np.zeros((1, 1)) if bias is None else _f64(_of(bias, b, h)),
        slope=0.0 if slopes is None else float(slopes[b % slopes.shape[0], h]),
        sink=-np.inf if sinks is None else float(sinks[h]),
        visible=_visible(call, b, h),
    )


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


def _round(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def _split(top: F64, log_l: F64, dtype: np.dtype[Any]) -> RowStats:
    """Return row statistics in a dtype; log_l is relative to the rounded m, so p keeps digits."""
    with np.errstate(all="ignore"):
        m = base2(top, dtype)
        lost = np.where(np.isfinite(m) & (np.abs(m) != np.finfo(dtype).max), top - _f64(m) * LN2, 0)
        return RowStats(m, _round(log_l + lost, dtype))


IMPLEMENTATION = Implementation("reference", forward, vjp)
