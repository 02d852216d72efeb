"""One query head of one batch entry with its whole matrix of logits, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewise.base.masks import RowIntervals
from tilewise.ops.attention.spec import AttentionCall
from tilewise.shared.philox import philox4x32

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


def head_of(call: AttentionCall, b: int, h: int) -> Head:
    """Return the operands of one head."""
    hk = h // (call.H // call.Hk)
    slopes, sinks = call.alibi_slopes, call.sinks
    return Head(
        q=f64(call.q[b, h]),
        k=f64(call.k[b, hk]),
        v=f64(call.v[b, hk]),
        bias=or_zeros(call.bias, b, h, (1, 1)),
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
    entry = call.first_entry + b
    counter = np.stack(np.broadcast_arrays(group, position[:, None], h, entry))
    words = philox4x32(counter, (call.seed & 0xFFFFFFFF, call.seed >> 32))
    of_pair = np.moveaxis(words, 0, 2).reshape(call.N, 4 * group.size)[:, : call.Nk]
    return np.where(of_pair < call.drop_threshold, 0.0, call.keep_factor)


def _visible(call: AttentionCall, b: int, h: int) -> Bool:
    """Return the mask of one head as a boolean matrix."""
    mask = call.mask
    if mask is None:
        return np.ones((call.N, call.Nk), dtype=np.bool_)
    if isinstance(mask, RowIntervals):
        lo0, hi0, lo1, hi1 = (part_of(mask.rows, b, h)[:, i, None] for i in range(4))
        j = np.arange(call.Nk)
        return ((lo0 <= j) & (j < hi0)) | ((lo1 <= j) & (j < hi1))
    queries = np.arange(call.N)
    words = part_of(mask.bits, b, h)[:, queries // 16]
    return ((words >> (queries % 16).astype(np.uint16)) & 1).T.astype(np.bool_)


class Logits(NamedTuple):
    """The logits with the first two derivatives of the soft cap."""

    s: F64  # (N, Nk), -inf where masked
    slope_of_cap: F64  # (N, Nk)
    curve_of_cap: F64  # (N, Nk)


def logits_of(call: AttentionCall, head: Head) -> Logits:
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
    return Logits(np.where(head.visible, s, -np.inf), slope_of_cap, curve_of_cap)


def softmax_of(head: Head, s: F64) -> Row:
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


def part_of(array: NDArray[Any], b: int, h: int) -> NDArray[Any]:
    """Return one head of an array whose first two sizes may be 1."""
    head: NDArray[Any] = array[b % array.shape[0], h % array.shape[1]]
    return head


def or_zeros(array: NDArray[Any] | None, b: int, h: int, shape: tuple[int, ...]) -> F64:
    """Return one head in float64, or zeros where the array is not given."""
    return np.zeros(shape) if array is None else f64(part_of(array, b, h))


def f64(array: NDArray[Any]) -> F64:
    """Return an array in float64."""
    return np.asarray(array, dtype=np.float64)
