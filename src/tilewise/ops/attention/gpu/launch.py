"""Launches the kernels of attention on the tensors of a validated call.

The arrays of such a call are tensors of a framework here: with `shape`, `stride()`, `dtype`,
`device`, `new_empty` and `new_zeros`, as those of PyTorch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tilewise.base.masks import RowIntervals
from tilewise.base.operator import Implementation
from tilewise.ops.attention.spec import (
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
from tilewise.shared import triton_launch
from tilewise.shared.launch import LaunchPlan
from tilewise.shared.triton_launch import INTERPRETS, architecture

from .kernels.backward import attention_delta_kernel, attention_dkv_kernel, attention_dq_kernel
from .kernels.forward import attention_fwd_kernel
from .kernels.sums import attention_dbias_kernel, attention_dsinks_kernel
from .kernels.tangents import attention_jvp_kernel
from .kernels.tiles import attention_bounds_kernel
from .masks import pack
from .packed import packed_count, packed_of
from .plan import padded, plan, tiles_of

Tensor = Any
_compute_dtypes: dict[Any, Any] = {}


def forward(call: AttentionCall, want: Want) -> AttentionOutputs:
    """Compute attention tile by tile; `o` is a `(B, H, N, Dv)` view in the layout of the call."""
    full = want.o_full and call.is_narrow
    o = empty(call, call.H, call.N, call.Dv)
    o_full = empty(call, call.H, call.N, call.Dv, wide(call)) if full else None
    m, log_l = rows(call), rows(call)
    asked = want.lse, want.max_logit, want.entropy
    lse, top, entropy = (rows(call) if wanted else None for wanted in asked)
    chosen = planned(call, "fwd")
    launch_carefully(
        attention_fwd_kernel,
        chosen,
        call,
        o=o,
        o_full=o_full,
        m_out=m,
        log_l_out=log_l,
        lse=lse,
        max_logit=top,
        entropy_out=entropy,
        **strides("o", o),
        O_FULL=full,
        LSE=want.lse,
        MAX_LOGIT=want.max_logit,
        ENTROPY=want.entropy,
    )
    stats = RowStats(m, log_l)
    return AttentionOutputs(o, stats, lse, top, entropy, o_full if call.is_narrow else o)


def forward_jvp(
    call: AttentionCall, want: Want, tangents: InputTangents
) -> tuple[AttentionOutputs, OutputTangents]:
    """Compute attention, then the tangents of o and lse from what it returned."""
    found = forward(call, replace(want, o_full=True))
    moves = {name: getattr(tangents, name) for name in ("tq", "tk", "tv", "tbias", "tsinks")}
    o: Any = found.o_full
    moved = jvp(call, TangentCall(**moves, o=o, stats=found.stats))
    return found, moved


def vjp(
    call: AttentionCall, cotangents: CotangentCall, needed: Needed = ALL_NEEDED
) -> AttentionGrads:
    """Compute the gradients tile by tile, in the layout of the call."""
    return _gradients(call, "", needed, cotangents)


def jvp(call: AttentionCall, tangents: TangentCall) -> OutputTangents:
    """Compute the tangents of o and lse tile by tile, in the layout of the call."""
    return _jvp(call, tangents, call.q.dtype)


def vjp_jvp(call: AttentionCall, second: SecondCall, needed: Needed = ALL_NEEDED) -> AttentionGrads:
    """Compute the tangents of the gradients tile by tile, in the layout of the call."""
    moved = second.outputs or _jvp(call, second.tangents, wide(call))
    return _gradients(call, "second_", needed, second.cotangents, second, moved)


def _jvp(call: AttentionCall, tangents: TangentCall, dtype: Any) -> OutputTangents:
    call, tangents = _alike(call, tangents)
    to, tlse = empty(call, call.H, call.N, call.Dv, dtype), rows(call)
    chosen = planned(call, "jvp")
    launch_carefully(
        attention_jvp_kernel,
        chosen,
        call,
        **_moves(tangents),
        **_saved(tangents),
        to=to,
        tlse=tlse,
        **strides("to", to),
    )
    return OutputTangents(to, tlse)


def _gradients(
    call: AttentionCall,
    prefix: str,
    needed: Needed,
    cotangents: CotangentCall,
    second: SecondCall | None = None,
    moved: OutputTangents | None = None,
) -> AttentionGrads:
    """Compute the gradients or, with `second` and the output tangents, their tangents."""
    if second is not None:
        call, moves = _alike(call, second.tangents)
        second = replace(second, tangents=moves)
    do: Any = cotangents.do
    if do is None:
        do = _like(call).new_zeros((call.B, call.H, call.N, call.Dv))
    delta, tdelta = rows(call), None if second is None else rows(call)
    given = {
        **_saved(cotangents),
        "do": do,
        **strides("do", do),
        "delta": delta,
        "tdelta": tdelta,
        "tlse": None if moved is None else moved.tlse,
        "SECOND": second is not None,
        **_moves(None if second is None else second.tangents),
        **_cotangent_tangents(second),
    }
    _row_sums(call, given, cotangents, second, moved)
    bias, sinks = needed.bias and call.bias is not None, needed.sinks and call.sinks is not None
    return AttentionGrads(
        _dq(call, prefix, given) if needed.q else None,
        *_dk_dv(call, prefix, given, needed),
        _dbias(call, prefix, given) if bias else None,
        _dsinks(call, given) if sinks else None,
    )


def _row_sums(
    call: AttentionCall,
    given: dict[str, Any],
    cotangents: CotangentCall,
    second: SecondCall | None,
    moved: OutputTangents | None,
) -> None:
    """Compute delta and its tangent."""
    BM, to = 64, None if moved is None else moved.to
    grid = (-(-call.N // BM) * call.B * call.H,)
    tdlse = None if second is None else second.tdlse
    launch(
        attention_delta_kernel,
        LaunchPlan(grid, {"BM": BM, "DVP": padded(call.Dv)}),
        **given,
        dlse=_contiguous(cotangents.dlse),
        tdlse=_contiguous(tdlse),
        to=to,
        **strides("to", to),
        sinks=call.sinks,
        H=call.H,
        N=call.N,
        delta_out=given["delta"],
        tdelta_out=given["tdelta"],
        DV=call.Dv,
        DLSE=cotangents.dlse is not None,
        TDLSE=tdlse is not None,
        SINKS=call.sinks is not None,
    )


def _dq(call: AttentionCall, prefix: str, given: dict[str, Any]) -> Tensor:
    dq = empty(call, call.H, call.N, call.D)
    chosen = planned(call, prefix + "dq")
    launch_carefully(attention_dq_kernel, chosen, call, **given, dq=dq, **strides("dq", dq))
    return dq


def _dk_dv(
    call: AttentionCall, prefix: str, given: dict[str, Any], needed: Needed
) -> tuple[Tensor | None, Tensor | None]:
    if not (needed.k or needed.v):
        return None, None
    dk = empty(call, call.Hk, call.Nk, call.D) if needed.k else None
    dv = empty(call, call.Hk, call.Nk, call.Dv) if needed.v else None
    chosen = planned(call, prefix + "dkv")
    launch_carefully(
        attention_dkv_kernel,
        chosen,
        call,
        True,
        **given,
        dk=dk,
        dv=dv,
        **strides("dk", dk),
        **strides("dv", dv),
        D_K=needed.k,
        D_V=needed.v,
    )
    return dk, dv


def _dbias(call: AttentionCall, prefix: str, given: dict[str, Any]) -> Tensor:
    """Compute the gradient of the bias in the shape and the dtype in which it was given."""
    bias: Any = call.bias
    dbias = bias.new_zeros(bias.shape, dtype=wide(call))
    chosen = planned(call, prefix + "dbias")
    own = [size != 1 for size in bias.shape]
    # Of packed sequences it has a row for each query, and a column for each key of the longest.
    packed = call.sequences is not None
    own[2], keys = own[2] or packed, bias.shape[3] if packed else call.Nk
    BM, BN = chosen.constants["BM"], chosen.constants["BN"]
    places = (call.B, call.H, tiles_of(call.N, BM, packed_count(call)), tiles_of(keys, BN))
    programs = [place for place, apart in zip(places, own, strict=True) if apart]
    if dbias.numel():
        launch(
            attention_dbias_kernel,
            replace(chosen, grid=(max(1, int(np.prod(programs))),)),
            **pairs(call, chosen) | given | {"Nk": keys},
            B=call.B,
            **bias_of("dbias", dbias),
            **dict(zip(("BIAS_B", "BIAS_H", "BIAS_N", "BIAS_K"), own, strict=True)),
        )
    assert call.bias_shape is not None
    return dbias.reshape(call.bias_shape).to(bias.dtype)


def _dsinks(call: AttentionCall, given: dict[str, Any]) -> Tensor:
    sinks: Any = call.sinks
    dsinks = sinks.new_zeros(sinks.shape, dtype=wide(call))
    chosen = LaunchPlan((call.H,), {"ROWS": 256})
    sizes = {"B": call.B, "H": call.H, "N": call.N}
    launch(attention_dsinks_kernel, chosen, **given, sinks=sinks, **sizes, dsinks=dsinks)
    return dsinks.to(sinks.dtype)


def _saved(given: CotangentCall | TangentCall) -> dict[str, Any]:
    m, log_l = _contiguous(given.stats.m), _contiguous(given.stats.log_l)
    return {"o": given.o, **strides("o", given.o), "m": m, "log_l": log_l}


def _moves(tangents: InputTangents | None) -> dict[str, Any]:
    """Return tangents of the inputs as the kernels take them."""
    tq, tk, tv, tbias, tsinks = (
        getattr(tangents, name, None) for name in ("tq", "tk", "tv", "tbias", "tsinks")
    )
    return {
        **{"tq": tq, "tk": tk, "tv": tv, "tsinks": _contiguous(tsinks)},
        **strides("tq", tq),
        **strides("tk", tk),
        **strides("tv", tv),
        "tbias": tbias,
        **{"T_Q": tq is not None, "T_K": tk is not None, "T_V": tv is not None},
        **{"T_BIAS": tbias is not None, "T_SINKS": tsinks is not None},
    }


def _alike(call: AttentionCall, tangents: Any) -> tuple[AttentionCall, Any]:
    """Return a call and its tangents with equal strides of both biases: kernels know one set."""
    bias, tbias = call.bias, tangents.tbias
    if tbias is None or all([step(bias, d) == step(tbias, d) for d in range(4)]):
        return call, tangents
    return replace(call, bias=_contiguous(bias)), replace(tangents, tbias=_contiguous(tbias))


def _cotangent_tangents(second: SecondCall | None) -> dict[str, Any]:
    tdo = None if second is None else second.tdo
    return {"tdo": tdo, **strides("tdo", tdo), "TDO": tdo is not None}


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def planned(call: AttentionCall, kind: str) -> LaunchPlan:
    """Return the plan of a kernel for a call."""
    of_keys = kind.endswith("dkv")
    return plan(
        kind,
        heads=call.B * (call.Hk if of_keys else call.H),
        rows=call.Nk if of_keys else call.N,
        D=call.D,
        Dv=call.Dv,
        dtype=call.dtype.name,
        arch=architecture(),
        sequences=packed_count(call),
        crowded=_is_crowded(call),
    )


def _is_crowded(call: AttentionCall) -> bool:
    """Return whether options take registers that large tiles would need."""
    given = call.bias, call.alibi_slopes, call.softcap
    return call.dropout_p > 0 or any([option is not None for option in given])


def launch(kernel: Any, chosen: LaunchPlan, **arguments: Any) -> None:
    """Run a kernel as its plan says, with those of the arguments that it takes."""
    given = arguments | dict(chosen.constants)
    taken = {name: given[name] for name in kernel.arg_names}
    triton_launch.launch(kernel, replace(chosen, constants={}), taken)


def launch_carefully(
    kernel: Any,
    chosen: LaunchPlan,
    call: AttentionCall,
    of_keys: bool = False,
    /,
    **arguments: Any,
) -> None:
    """Run a kernel and, where pairs may be hidden, once more for the programs that it spoiled.

    Those are few or none: the second run ends at once for the others.

    Args:
        kernel: The kernel.
        chosen: Its plan.
        call: The call.
        of_keys: As for `pairs`.
        **arguments: What else it takes.
    """
    given = pairs(call, chosen, of_keys) | arguments
    # Rows whose every bias is -inf are hidden, too.
    hides = call.mask is not None or call.bias is not None
    given["spoiled"] = _like(call).new_empty(chosen.grid, dtype=int32(call)) if hides else None
    launch(kernel, chosen, **given, HIDES=hides, CAREFUL=False)
    if hides:
        launch(kernel, chosen, **given, HIDES=hides, CAREFUL=True)


def pairs(call: AttentionCall, chosen: LaunchPlan, of_keys: bool = False) -> dict[str, Any]:
    """Return what every kernel takes that computes the probabilities of pairs.

    Args:
        call: The call.
        chosen: The plan of the kernel.
        of_keys: Whether its programs own tiles of keys, and not of queries.
    """
    packed = packed_of(call, chosen.constants["BN" if of_keys else "BM"], of_keys)
    mask = mask_of(call, chosen.constants["BM"], None if of_keys else packed)
    return {**operands(call), **packed, **mask}


def operands(call: AttentionCall) -> dict[str, Any]:
    """Return tensors, sizes and numbers of a call as the kernels take them, without its mask."""
    return {
        "q": call.q,
        "k": call.k,
        "v": call.v,
        "slopes": call.alibi_slopes,
        "sinks": call.sinks,
        "H": call.H,
        "group": call.H // max(call.Hk, 1),
        "N": call.N,
        "Nk": call.Nk,
        **strides("q", call.q),
        **strides("k", call.k),
        **strides("v", call.v),
        **bias_of("bias", call.bias),
        "slopes_stride_b": step(call.alibi_slopes, 0),
        "scale": float(call.softmax_scale),
        "softcap": float(call.softcap or 1.0),
        "first_entry": call.first_entry,
        "seed_low": call.seed & 0xFFFFFFFF,
        "seed_high": call.seed >> 32,
        "threshold": call.drop_threshold,
        "factor": call.keep_factor,
        "D": call.D,
        "DV": call.Dv,
        "BIAS": call.bias is not None,
        "ALIBI": call.alibi_slopes is not None,
        "SOFTCAP": call.softcap is not None,
        "SINKS": call.sinks is not None,
        "DROPOUT": call.dropout_p > 0,
    }


def strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Return the strides of a tensor `(B, H, N, D)` as a kernel takes them."""
    return {f"stride_{name}{dim}": 0 if x is None else x.stride(d) for d, dim in enumerate("bhn")}


def bias_of(name: str, bias: Tensor | None) -> dict[str, Any]:
    """Return a bias with its strides, which are 0 where it is broadcast."""
    steps = {f"{name}_stride_{dim}": step(bias, d) for d, dim in enumerate("bhnk")}
    return {name: bias, **steps}


def step(x: Tensor | None, dim: int) -> int:
    """Return a stride, 0 where there is nothing to step over."""
    return 0 if x is None or x.shape[dim] == 1 else int(x.stride(dim))


def mask_of(call: AttentionCall, BM: int, packed: dict[str, Any] | None) -> dict[str, Any]:
    """Return the mask as the kernels read it, with the map of its tiles.

    Args:
        call: The call.
        BM: Queries of a tile.
        packed: `packed_of(call, BM)`, or None where it is not known yet.
    """
    lowered = call.mask
    if lowered is None:
        return {"mask": None, "tiles": None, "mask_stride_b": 0, "mask_stride_h": 0, "MASK": 0}
    mask: Any
    tiles: Any
    if isinstance(lowered, RowIntervals):
        mask, kind = lowered.rows, 1
        tiles = bounds_of(call, mask, BM, packed or packed_of(call, BM))
    else:
        mask, tiles, kind = lowered.bits, lowered.tiles, 2
    Bm, Hm = mask.shape[:2]
    parts = {"mask_stride_b": Hm if Bm > 1 else 0, "mask_stride_h": 1 if Hm > 1 else 0}
    return {"mask": mask, "tiles": tiles, **parts, "MASK": kind}


def bounds_of(call: AttentionCall, mask: Tensor, BM: int, packed: dict[str, Any]) -> Tensor:
    """Return which keys each tile of queries sees, `(Bm, Hm, tiles, 8)`."""
    Bm, Hm = mask.shape[:2]
    tiles = tiles_of(call.N, BM, packed_count(call))
    bounds = mask.new_empty((Bm, Hm, tiles, 8))
    if Bm * Hm * tiles:
        chosen = LaunchPlan((tiles, Bm * Hm), {"BM": BM})
        launch(attention_bounds_kernel, chosen, **packed, rows=mask, N=call.N, bounds=bounds)
    return bounds


def _like(call: AttentionCall) -> Tensor:
    """Return the first tensor of a call, after which others are made."""
    return call.q


def wide(call: AttentionCall) -> Any:
    """Return the framework's dtype of sums and row statistics."""
    dtype = call.q.dtype
    if dtype not in _compute_dtypes:
        _compute_dtypes[dtype] = _like(call).new_empty(0).float().dtype if call.is_narrow else dtype
    return _compute_dtypes[dtype]


def int32(call: AttentionCall) -> Any:
    """Return the framework's dtype of 32-bit integers."""
    key = "int32", type(call.q)
    if key not in _compute_dtypes:
        _compute_dtypes[key] = _like(call).new_empty(0).int().dtype
    return _compute_dtypes[key]


def rows(call: AttentionCall) -> Tensor:
    """Return new row statistics."""
    return _like(call).new_empty((call.B, call.H, call.N), dtype=wide(call))


def empty(call: AttentionCall, heads: int, count: int, entries: int, dtype: Any = None) -> Tensor:
    """Return a new `(B, heads, count, entries)` view of a tensor in the layout of the call."""
    dtype = dtype or call.q.dtype
    if call.layout == "bhnd":
        return _like(call).new_empty((call.B, heads, count, entries), dtype=dtype)
    return _like(call).new_empty((call.B, count, heads, entries), dtype=dtype).swapaxes(1, 2)


def refuses(call: AttentionCall) -> str | None:
    """Return why a call is not served, or None."""
    if isinstance(_like(call), np.ndarray):
        return "computes on tensors of PyTorch, not on arrays"
    return None


IMPLEMENTATION = Implementation(
    "triton",
    forward,
    vjp,
    jvp,
    vjp_jvp,
    forward_jvp,
    refuses,
    interprets=INTERPRETS,
    lower_mask=pack,
)
