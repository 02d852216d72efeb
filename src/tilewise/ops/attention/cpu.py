"""Attention on the CPU: hands the buffers of a validated call to the compiled kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise import _core
from tilewise.base.masks import PackedBits, RowIntervals
from tilewise.base.operator import Implementation

from .spec import AttentionCall, AttentionGrads, AttentionOutputs, CotangentCall, RowStats, Want

Array = NDArray[Any]


def forward(call: AttentionCall, want: Want) -> AttentionOutputs:
    """Compute attention tile by tile; `o` is a `(B, H, N, Dv)` view in the layout of the call."""
    o = _empty(call, call.H, call.N, call.Dv)
    rows = (call.B, call.H, call.N)
    m, log_l = np.empty(rows, call.dtype), np.empty(rows, call.dtype)
    lse = np.empty(rows, call.dtype) if want.lse else None
    max_logit = np.empty(rows, call.dtype) if want.max_logit else None
    entropy = np.empty(rows, call.dtype) if want.entropy else None
    _core.attention_forward(
        call.q,
        call.k,
        call.v,
        o,
        m=m,
        log_l=log_l,
        lse=lse,
        max_logit=max_logit,
        entropy=entropy,
        **_options(call),
    )
    return AttentionOutputs(o, RowStats(m, log_l), lse, max_logit, entropy)


def vjp(call: AttentionCall, cotangents: CotangentCall) -> AttentionGrads:
    """Compute the gradients tile by tile, in the layout of the call."""
    dq = _empty(call, call.H, call.N, call.D)
    dk = _empty(call, call.Hk, call.Nk, call.D)
    dv = _empty(call, call.Hk, call.Nk, call.Dv)
    dbias = None if call.bias is None else np.zeros(call.bias.shape, call.dtype)
    dsinks = None if call.sinks is None else np.zeros(call.H, call.dtype)
    dlse = cotangents.dlse
    _core.attention_vjp(
        call.q,
        call.k,
        call.v,
        cotangents.do,
        cotangents.o,
        np.ascontiguousarray(cotangents.stats.m),
        np.ascontiguousarray(cotangents.stats.log_l),
        dlse=None if dlse is None else np.ascontiguousarray(dlse),
        dq=dq,
        dk=dk,
        dv=dv,
        dbias=dbias,
        dsinks=dsinks,
        **_options(call),
    )
    if dbias is not None and call.bias_shape is not None:
        dbias = dbias.reshape(call.bias_shape)
    return AttentionGrads(dq, dk, dv, dbias, dsinks)


def _options(call: AttentionCall) -> dict[str, Any]:
    mask, slopes = call.mask, call.alibi_slopes
    intervals = mask if isinstance(mask, RowIntervals) else None
    packed = mask if isinstance(mask, PackedBits) else None
    return {
        "mask_rows": None if intervals is None else intervals.rows,
        "mask_bits": None if packed is None else packed.bits,
        "mask_tiles": None if packed is None else packed.tiles,
        "bias": call.bias,
        "slopes": None if slopes is None else np.broadcast_to(slopes, (call.B, call.H)),
        "sinks": call.sinks,
        "softmax_scale": call.softmax_scale,
        "softcap": call.softcap or 0.0,
    }


def _empty(call: AttentionCall, heads: int, rows: int, entries: int) -> Array:
    """Return a new `(B, heads, rows, entries)` view of an array in the layout of the call."""
    if call.layout == "bhnd":
        return np.empty((call.B, heads, rows, entries), call.dtype)
    return np.empty((call.B, rows, heads, entries), call.dtype).swapaxes(1, 2)


IMPLEMENTATION = Implementation("cpu", forward, vjp)
