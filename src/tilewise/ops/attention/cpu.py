"""Attention on the CPU: hands the buffers of a validated call to the compiled kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise import _core
from tilewise.base.masks import PackedBits, RowIntervals
from tilewise.base.operator import Implementation

from .spec import (
    ALL_NEEDED,
    AttentionCall,
    AttentionGrads,
    AttentionOutputs,
    CotangentCall,
    InputTangents,
    Needed,
    OutputTangents,
    RowStats,
    SecondCall,
    TangentCall,
    Want,
)

Array = NDArray[Any]


def forward(call: AttentionCall, want: Want) -> AttentionOutputs:
    """Compute attention tile by tile; `o` is a `(B, H, N, Dv)` view in the layout of the call."""
    found = _results(call, want)
    _core.attention_forward(call.q, call.k, call.v, **found, **_options(call))
    return _outputs(found)


def forward_jvp(
    call: AttentionCall, want: Want, tangents: InputTangents
) -> tuple[AttentionOutputs, OutputTangents]:
    """Compute attention and the tangents of o and lse in one pass over the keys."""
    found, moved = _results(call, want), _output_tangents(call)
    _core.attention_forward_jvp(
        call.q,
        call.k,
        call.v,
        **found,
        **_tangents(tangents),
        to=moved.to,
        tlse=moved.tlse,
        **_options(call),
    )
    return _outputs(found), moved


def vjp(
    call: AttentionCall, cotangents: CotangentCall, needed: Needed = ALL_NEEDED
) -> AttentionGrads:
    """Compute the gradients tile by tile, in the layout of the call."""
    found = _gradients(call, needed)
    _core.attention_vjp(
        call.q, call.k, call.v, **_cotangents(call, cotangents), **found, **_options(call)
    )
    return _shaped(call, found)


def jvp(call: AttentionCall, tangents: TangentCall) -> OutputTangents:
    """Compute the tangents of o and lse tile by tile, in the layout of the call."""
    moved = _output_tangents(call)
    _core.attention_jvp(
        call.q,
        call.k,
        call.v,
        **_saved(tangents.o, tangents.stats),
        **_tangents(tangents),
        to=moved.to,
        tlse=moved.tlse,
        **_options(call),
    )
    return moved


def vjp_jvp(call: AttentionCall, second: SecondCall, needed: Needed = ALL_NEEDED) -> AttentionGrads:
    """Compute the tangents of the gradients tile by tile, in the layout of the call."""
    to, tlse = second.outputs or jvp(call, second.tangents)
    found = _gradients(call, needed)
    _core.attention_vjp_jvp(
        call.q,
        call.k,
        call.v,
        **_cotangents(call, second.cotangents),
        **_tangents(second.tangents),
        to=to,
        tlse=np.ascontiguousarray(tlse),
        tdo=second.tdo,
        tdlse=_contiguous(second.tdlse),
        **found,
        **_options(call),
    )
    return _shaped(call, found)


def _results(call: AttentionCall, want: Want) -> dict[str, Any]:
    """Return the arrays into which a forward pass writes."""
    rows = (call.B, call.H, call.N)
    return {
        "o": _empty(call, call.H, call.N, call.Dv),
        "m": np.empty(rows, call.dtype),
        "log_l": np.empty(rows, call.dtype),
        "lse": np.empty(rows, call.dtype) if want.lse else None,
        "max_logit": np.empty(rows, call.dtype) if want.max_logit else None,
        "entropy": np.empty(rows, call.dtype) if want.entropy else None,
    }


def _outputs(found: dict[str, Any]) -> AttentionOutputs:
    o, m, log_l, lse, max_logit, entropy = found.values()
    return AttentionOutputs(o, RowStats(m, log_l), lse, max_logit, entropy)


def _output_tangents(call: AttentionCall) -> OutputTangents:
    to = _empty(call, call.H, call.N, call.Dv)
    return OutputTangents(to, np.empty((call.B, call.H, call.N), call.dtype))


def _saved(o: Array, stats: RowStats) -> dict[str, Any]:
    m, log_l = np.ascontiguousarray(stats.m), np.ascontiguousarray(stats.log_l)
    return {"o": o, "m": m, "log_l": log_l}


def _cotangents(call: AttentionCall, cotangents: CotangentCall) -> dict[str, Any]:
    do = cotangents.do
    if do is None:
        do = np.zeros((call.B, call.H, call.N, call.Dv), call.dtype)
    saved = _saved(cotangents.o, cotangents.stats)
    return {**saved, "do": do, "dlse": _contiguous(cotangents.dlse)}


def _tangents(tangents: InputTangents) -> dict[str, Any]:
    return {
        "tq": tangents.tq,
        "tk": tangents.tk,
        "tv": tangents.tv,
        "tbias": tangents.tbias,
        "tsinks": _contiguous(tangents.tsinks),
    }


def _gradients(call: AttentionCall, needed: Needed) -> dict[str, Any]:
    """Return the arrays into which the kernel writes; it adds to that of the bias."""
    bias = call.bias if needed.bias else None
    sinks = call.sinks if needed.sinks else None
    return {
        "dq": _empty(call, call.H, call.N, call.D) if needed.q else None,
        "dk": _empty(call, call.Hk, call.Nk, call.D) if needed.k else None,
        "dv": _empty(call, call.Hk, call.Nk, call.Dv) if needed.v else None,
        "dbias": None if bias is None else np.zeros(bias.shape, call.dtype),
        "dsinks": None if sinks is None else np.zeros(call.H, call.dtype),
    }


def _shaped(call: AttentionCall, found: dict[str, Any]) -> AttentionGrads:
    dbias = found["dbias"]
    if dbias is not None and call.bias_shape is not None:
        dbias = dbias.reshape(call.bias_shape)
    return AttentionGrads(found["dq"], found["dk"], found["dv"], dbias, found["dsinks"])


def _contiguous(x: Array | None) -> Array | None:
    return None if x is None else np.ascontiguousarray(x)


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
        "dropout_p": call.dropout_p,
        "seed": call.seed,
    }


def _empty(call: AttentionCall, heads: int, rows: int, entries: int) -> Array:
    """Return a new `(B, heads, rows, entries)` view of an array in the layout of the call."""
    if call.layout == "bhnd":
        return np.empty((call.B, heads, rows, entries), call.dtype)
    return np.empty((call.B, rows, heads, entries), call.dtype).swapaxes(1, 2)


IMPLEMENTATION = Implementation("cpu", forward, vjp, jvp, vjp_jvp, forward_jvp)
