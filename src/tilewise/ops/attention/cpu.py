"""Attention on the CPU: hands the buffers of a validated call to the compiled kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise import _core
from tilewise.base.dtypes import FLOAT32, FloatDType, is_narrow, storage_of
from tilewise.base.masks import PackedBits, RowIntervals
from tilewise.base.memory import empty
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
    _core.attention_forward(**_given(call, found), **_options(call))
    return _outputs(call, found)


def forward_jvp(
    call: AttentionCall, want: Want, tangents: InputTangents
) -> tuple[AttentionOutputs, OutputTangents]:
    """Compute attention and the tangents of o and lse in one pass over the keys."""
    found, moved = _results(call, want), _output_tangents(call, call.dtype)
    _forward_jvp(call, found, tangents, moved)
    return _outputs(call, found), moved


def vjp(
    call: AttentionCall, cotangents: CotangentCall, needed: Needed = ALL_NEEDED
) -> AttentionGrads:
    """Compute the gradients tile by tile, in the layout of the call."""
    found = _gradients(call, needed)
    _core.attention_vjp(
        **_given(call, {**_cotangents(call, cotangents), **found}),
        **_options(call),
    )
    return _shaped(call, found)


def jvp(call: AttentionCall, tangents: TangentCall) -> OutputTangents:
    """Compute the tangents of o and lse tile by tile, in the layout of the call."""
    if _is_rounded_on_the_way(call):
        return forward_jvp(call, Want(), tangents)[1]
    return _jvp(call, tangents, call.dtype)


def vjp_jvp(call: AttentionCall, second: SecondCall, needed: Needed = ALL_NEEDED) -> AttentionGrads:
    """Compute the tangents of the gradients tile by tile, in the layout of the call."""
    cotangents = second.cotangents
    if _is_rounded_on_the_way(call):
        full = Want(o_full=True)
        found, moved = _results(call, full), _output_tangents(call, call.compute_dtype)
        _forward_jvp(call, found, second.tangents, moved)
        outputs = _outputs(call, found)
        assert outputs.o_full is not None
        cotangents = replace(cotangents, o=outputs.o_full, stats=outputs.stats)
    else:
        moved = second.outputs or _jvp(call, second.tangents, call.compute_dtype)
    found = _gradients(call, needed)
    arrays = {
        **_cotangents(call, cotangents),
        **_tangents(second.tangents),
        "to": moved.to,
        "tlse": np.ascontiguousarray(moved.tlse),
        "tdo": second.tdo,
        "tdlse": _contiguous(second.tdlse),
        **found,
    }
    _core.attention_vjp_jvp(**_given(call, arrays), **_options(call))
    return _shaped(call, found)


def _forward_jvp(
    call: AttentionCall, found: dict[str, Any], tangents: InputTangents, moved: OutputTangents
) -> None:
    arrays = {**found, **_tangents(tangents), **moved._asdict()}
    _core.attention_forward_jvp(**_given(call, arrays), **_options(call))


def _is_rounded_on_the_way(call: AttentionCall) -> bool:
    """Return whether the forward pass may have rounded the weights to bfloat16.

    Tangents subtract `tlse * o`, which has to be the sum over the weights that they use.
    """
    return storage_of(call.dtype) == "bfloat16"


def _jvp(call: AttentionCall, tangents: TangentCall, dtype: FloatDType) -> OutputTangents:
    """Compute the tangents of o, in a dtype, and of lse."""
    moved = _output_tangents(call, dtype)
    arrays = {
        **_saved(tangents.o, tangents.stats),
        **_tangents(tangents),
        **moved._asdict(),
    }
    _core.attention_jvp(**_given(call, arrays), **_options(call))
    return moved


def _given(call: AttentionCall, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return q k v and other arrays as the kernels take them: those of 16 bits as such."""
    arrays = {"q": call.q, "k": call.k, "v": call.v, **arrays}
    return {name: _bits(x) for name, x in arrays.items()} if call.is_narrow else arrays


def _bits(x: Array | None) -> Array | None:
    return x.view(np.uint16) if x is not None and is_narrow(x.dtype) else x


def _wide(x: Array | None) -> Array | None:
    """Return an array of one number per head, which the kernels never take in 16 bits."""
    return x.astype(np.float32) if x is not None and is_narrow(x.dtype) else x


def _results(call: AttentionCall, want: Want) -> dict[str, Any]:
    """Return the arrays into which a forward pass writes."""
    rows, dtype = (call.B, call.H, call.N), call.compute_dtype
    found = {
        "o": _empty(call, call.H, call.N, call.Dv),
        "m": empty(rows, dtype),
        "log_l": empty(rows, dtype),
        "lse": empty(rows, dtype) if want.lse else None,
        "max_logit": empty(rows, dtype) if want.max_logit else None,
        "entropy": empty(rows, dtype) if want.entropy else None,
    }
    if want.o_full and call.is_narrow:
        found["o_full"] = _empty(call, call.H, call.N, call.Dv, FLOAT32)
    return found


def _outputs(call: AttentionCall, found: dict[str, Any]) -> AttentionOutputs:
    o, m, log_l, lse, max_logit, entropy, *full = found.values()
    o_full = o if not call.is_narrow else full[0] if full else None
    return AttentionOutputs(o, RowStats(m, log_l), lse, max_logit, entropy, o_full)


def _output_tangents(call: AttentionCall, dtype: FloatDType) -> OutputTangents:
    to = _empty(call, call.H, call.N, call.Dv, dtype)
    return OutputTangents(to, empty((call.B, call.H, call.N), call.compute_dtype))


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
        "tsinks": _wide(_contiguous(tangents.tsinks)),
    }


def _gradients(call: AttentionCall, needed: Needed) -> dict[str, Any]:
    """Return the arrays into which the kernel writes; it adds to that of the bias."""
    bias = call.bias if needed.bias else None
    sinks = call.sinks if needed.sinks else None
    return {
        "dq": _empty(call, call.H, call.N, call.D) if needed.q else None,
        "dk": _empty(call, call.Hk, call.Nk, call.D) if needed.k else None,
        "dv": _empty(call, call.Hk, call.Nk, call.Dv) if needed.v else None,
        "dbias": None if bias is None else np.zeros(bias.shape, call.compute_dtype),
        "dsinks": None if sinks is None else np.zeros(call.H, call.compute_dtype),
    }


def _shaped(call: AttentionCall, found: dict[str, Any]) -> AttentionGrads:
    """Return the gradients in the dtypes of their inputs, that of the bias in its shape."""
    dbias, dsinks = found["dbias"], found["dsinks"]
    if dbias is not None and call.bias is not None and call.bias_shape is not None:
        dbias = dbias.reshape(call.bias_shape).astype(call.bias.dtype, copy=False)
    if dsinks is not None and call.sinks is not None:
        dsinks = dsinks.astype(call.sinks.dtype, copy=False)
    return AttentionGrads(found["dq"], found["dk"], found["dv"], dbias, dsinks)


def _contiguous(x: Array | None) -> Array | None:
    return None if x is None else np.ascontiguousarray(x)


def _options(call: AttentionCall) -> dict[str, Any]:
    mask, slopes, sequences = call.mask, call.alibi_slopes, call.sequences
    intervals = mask if isinstance(mask, RowIntervals) else None
    packed = mask if isinstance(mask, PackedBits) else None
    options: dict[str, Any] = {
        "mask_rows": None if intervals is None else intervals.rows,
        "mask_bits": None if packed is None else packed.bits,
        "mask_tiles": None if packed is None else packed.tiles,
        "bias": call.bias,
        "slopes": slopes,
        "sinks": call.sinks,
        "softmax_scale": call.softmax_scale,
        "softcap": call.softcap or 0.0,
        "dropout_p": call.dropout_p,
        "seed": call.seed,
    }
    if slopes is not None:
        entries = call.B if sequences is None else len(sequences)
        options["slopes"] = np.broadcast_to(slopes, (entries, call.H))
    if call.is_narrow:
        options |= {
            "storage": storage_of(call.dtype),
            "bias": _bits(call.bias),
            "slopes": _wide(options["slopes"]),
            "sinks": _wide(call.sinks),
        }
    if sequences is not None:
        options |= {"q_starts": sequences.q_starts, "k_starts": sequences.k_starts}
    if call.paging is not None:
        options |= {"block_table": call.paging.block_table, "k_lengths": call.paging.k_lengths}
    return options


def _empty(
    call: AttentionCall, heads: int, rows: int, entries: int, dtype: FloatDType | None = None
) -> Array:
    """Return a new `(B, heads, rows, entries)` view of an array in the layout of the call."""
    dtype = dtype or call.dtype
    if call.layout == "bhnd":
        return empty((call.B, heads, rows, entries), dtype)
    return empty((call.B, rows, heads, entries), dtype).swapaxes(1, 2)


IMPLEMENTATION = Implementation("cpu", forward, vjp, jvp, vjp_jvp, forward_jvp)
