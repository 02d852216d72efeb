"""Attention as a textbook writes it, in NumPy: the baseline, and in float64 the truth.

`forward` and `backward` keep `(B, H, N, Nk)` matrices, as the formula does. `exact` computes the
same in float64 by blocks of rows, so that it also serves where those matrices do not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Exact", "backward", "exact", "forward", "peak_bytes", "relative_error"]

Array = NDArray[Any]
Visible = Callable[[int, int, int], NDArray[np.bool_]]
"""Rows `[start, stop)` of batch entry b: `(b, start, stop)` to booleans `(stop - start, Nk)`."""

_BLOCK_BYTES = 32 << 20


class Exact(NamedTuple):
    """float64 results: o `(B, H, N, Dv)`, lse `(B, H, N)` and the gradients of q, k, v."""

    o: Array
    lse: Array
    dq: Array
    dk: Array
    dv: Array


def forward(
    q: Array, k: Array, v: Array, visible: NDArray[np.bool_] | None = None
) -> tuple[Array, Array, Array]:
    """Return (o, lse, p) of `softmax(q k^T / sqrt(D)) v`, computed in the inputs' dtype."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    s = np.matmul(q, k.swapaxes(-1, -2)) * q.dtype.type(q.shape[-1] ** -0.5)
    if visible is not None:
        s = np.where(visible, s, q.dtype.type(-np.inf))
    m = s.max(axis=-1, keepdims=True)
    p = np.exp(s - m)
    normaliser = p.sum(axis=-1, keepdims=True)
    p = p / normaliser
    lse = (m + np.log(normaliser))[..., 0]
    return np.matmul(p, v), lse, p


def backward(do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, Array, Array]:
    """Return (dq, dk, dv) from the saved probabilities `p`."""
    B, Hk = k.shape[:2]
    group = q.shape[1] // Hk
    wide_k, wide_v = (
        (np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)) if group > 1 else (k, v)
    )
    scale = q.dtype.type(q.shape[-1] ** -0.5)
    dv = np.matmul(p.swapaxes(-1, -2), do)
    dp = np.matmul(do, wide_v.swapaxes(-1, -2))
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    dq = np.matmul(ds, wide_k) * scale
    dk = np.matmul(ds.swapaxes(-1, -2), q) * scale
    if group > 1:
        dk = dk.reshape(B, Hk, group, *dk.shape[2:]).sum(axis=2)
        dv = dv.reshape(B, Hk, group, *dv.shape[2:]).sum(axis=2)
    return dq, dk, dv


def peak_bytes(heads: int, N: int, Nk: int, itemsize: int) -> int:
    """Return the bytes that `forward` and `backward` hold at their peak: p, dp and ds."""
    return 3 * heads * N * Nk * itemsize


def exact(q: Array, k: Array, v: Array, do: Array, visible: Visible | None = None) -> Exact:
    """Return outputs and gradients in float64 of the inputs as they are, in O(N) memory.

    Args:
        q: `(B, H, N, D)`.
        k: `(B, Hk, Nk, D)`.
        v: `(B, Hk, Nk, Dv)`.
        do: `(B, H, N, Dv)`, the cotangent of o.
        visible: rows of the mask, None where every key is visible.

    Returns:
        The results, shaped like the arrays they belong to.
    """
    B, H, N, _ = q.shape
    group = H // k.shape[1]
    o = np.empty(do.shape)
    lse = np.empty((B, H, N))
    dq, dk, dv = np.empty(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b in range(B):
        for h in range(H):
            head = (b, h // group)
            o[b, h], lse[b, h], dq[b, h], part_k, part_v = _exact_head(
                q[b, h], k[head], v[head], do[b, h], visible and partial(visible, b)
            )
            dk[head] += part_k
            dv[head] += part_v
    return Exact(o, lse, dq, dk, dv)


def _exact_head(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    visible: Callable[[int, int], NDArray[np.bool_]] | None,
) -> tuple[Array, Array, Array, Array, Array]:
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    N, scale = len(q), q.shape[-1] ** -0.5
    o, lse, dq = np.empty(do.shape), np.empty(N), np.empty(q.shape)
    dk, dv = np.zeros(k.shape), np.zeros(v.shape)
    rows = max(1, _BLOCK_BYTES // (8 * max(1, len(k))))
    for start in range(0, N, rows):
        block = slice(start, min(start + rows, N))
        p = q[block] @ k.T
        p *= scale
        if visible is not None:
            p[~visible(block.start, block.stop)] = -np.inf
        m = p.max(axis=-1, keepdims=True)
        np.exp(np.subtract(p, m, out=p), out=p)
        normaliser = p.sum(axis=-1, keepdims=True)
        p /= normaliser
        o[block], lse[block] = p @ v, (m + np.log(normaliser))[:, 0]
        dv += p.T @ do[block]
        ds = do[block] @ v.T
        ds -= (o[block] * do[block]).sum(axis=-1, keepdims=True)
        ds *= p
        dq[block] = scale * (ds @ k)
        dk += scale * (ds.T @ q[block])
    return o, lse, dq, dk, dv


def relative_error(got: Array, want: Array) -> float:
    """Return the relative Frobenius error |got - want| / |want| (float64)."""
    size = float(np.linalg.norm(want))
    error = float(np.linalg.norm(np.asarray(got, np.float64) - want))
    return error / size if size else error
