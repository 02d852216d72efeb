"""Launches the kernels of few queries on the tensors of a validated call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tilewise.base.masks import RowIntervals
from tilewise.ops.attention.spec import AttentionCall, AttentionOutputs, RowStats, Want
from tilewise.shared.triton_launch import architecture

from .. import launch as ordinary
from ..kernels.decode import attention_decode_kernel, attention_merge_kernel
from ..launch import Tensor, empty, int32, launch, operands, rows, strides, wide
from .plan import MOST_QUERIES, chunks_of, merge_plan, plan


def forward(call: AttentionCall, want: Want) -> AttentionOutputs:
    """Compute attention: that of few queries, or to keys in pages, chunk by chunk of the keys."""
    if call.N <= MOST_QUERIES and call.sequences is None:
        return chunked(call, want)
    if call.paging is None:
        return ordinary.forward(call, want)
    # Distances count from the last key, which a copy puts elsewhere for all but the longest.
    return chunked(call, want) if call.alibi_slopes is not None else _of_copy(call, want)


def chunked(call: AttentionCall, want: Want) -> AttentionOutputs:
    """Compute attention with a program for each chunk of keys, and merge the chunks."""
    full = want.o_full and call.is_narrow
    o = empty(call, call.H, call.N, call.Dv)
    o_full = empty(call, call.H, call.N, call.Dv, wide(call)) if full else None
    m, log_l = rows(call), rows(call)
    asked = want.lse, want.max_logit, want.entropy
    lse, top, entropy = (rows(call) if wanted else None for wanted in asked)
    parts, count = _parts(call, want), call.B * call.H * call.N
    launch(
        attention_merge_kernel,
        merge_plan(rows=count, Dv=call.Dv, arch=architecture()),
        **parts,
        R=count,
        sinks=call.sinks,
        H=call.H,
        N=call.N,
        o=o,
        o_full=o_full,
        m_out=m,
        log_l_out=log_l,
        lse=lse,
        max_logit=top,
        entropy_out=entropy,
        **strides("o", o),
        DV=call.Dv,
        SINKS=call.sinks is not None,
        O_FULL=full,
        LSE=want.lse,
        MAX_LOGIT=want.max_logit,
        ENTROPY=want.entropy,
    )
    stats = RowStats(m, log_l)
    return AttentionOutputs(o, stats, lse, top, entropy, o_full if call.is_narrow else o)


def _parts(call: AttentionCall, want: Want) -> dict[str, Any]:
    """Return the state of every row after each chunk of keys, and how many chunks there are."""
    arch = architecture()
    chosen = plan(
        heads=call.B * call.Hk,
        rows=call.H // max(call.Hk, 1) * call.N,
        keys=call.Nk,
        D=call.D,
        Dv=call.Dv,
        dtype=call.dtype.name,
        arch=arch,
    )
    chunks = chunks_of(call.Nk, arch)
    shape = call.B, call.H, call.N, chunks
    parts: dict[str, Any] = {
        "m_part": _new(call, *shape),
        "l_part": _new(call, *shape),
        "entropy_part": _new(call, *shape) if want.entropy else None,
        "o_part": _new(call, *shape, call.Dv),
        "chunks": chunks,
    }
    hides = _hides(call)
    given = _arguments(call) | parts | {"ENTROPY": want.entropy, "HIDES": hides}
    like: Any = call.q
    given["spoiled"] = like.new_empty(chosen.grid, dtype=int32(call)) if hides else None
    for careful in (False, True) if hides else (False,):
        launch(attention_decode_kernel, chosen, **given, CAREFUL=careful)
    return parts


def _new(call: AttentionCall, *shape: int) -> Tensor:
    like: Any = call.q
    return like.new_empty(shape, dtype=wide(call))


def _hides(call: AttentionCall) -> bool:
    """Return whether a row may not see a key that another row of its tile sees."""
    if call.bias is not None:
        return True
    if call.mask is None:
        return False
    one = isinstance(call.mask, RowIntervals) and call.N == 1 and call.mask.rows.shape[1] == 1
    return not one


def _arguments(call: AttentionCall) -> dict[str, Any]:
    """Return what the chunks are computed from."""
    table: Any = None if call.paging is None else call.paging.block_table
    return {
        **operands(call),
        **_mask_of(call),
        "table": table,
        "k_lengths": None if call.paging is None else call.paging.k_lengths,
        "pages": 0 if table is None else table.shape[1],
        "page_size": 1 if table is None else call.k.shape[2],
        "PAGED": table is not None,
    }


def _mask_of(call: AttentionCall) -> dict[str, Any]:
    if call.mask is None:
        return {"mask": None, "mask_stride_b": 0, "mask_stride_h": 0, "MASK": 0}
    intervals = isinstance(call.mask, RowIntervals)
    mask: Any = call.mask.rows if isinstance(call.mask, RowIntervals) else call.mask.bits
    Bm, Hm = mask.shape[:2]
    parts = {"mask_stride_b": Hm if Bm > 1 else 0, "mask_stride_h": 1 if Hm > 1 else 0}
    return {"mask": mask, **parts, "MASK": 1 if intervals else 2}


def _of_copy(call: AttentionCall, want: Want) -> AttentionOutputs:
    """Compute attention of many queries, to a copy of the keys in one piece for each sequence."""
    assert call.paging is not None
    table: Any = call.paging.block_table
    lengths: Any = call.paging.k_lengths
    k, v = (_copied(pool, table, call.Nk) for pool in (call.k, call.v))
    mask: Any = call.mask
    if mask is None:
        intervals = table.new_zeros((call.B, 1, call.N, 4))
        intervals[..., 1] = lengths[:, None, None]
        mask = RowIntervals(intervals)
    return ordinary.forward(replace(call, k=k, v=v, mask=mask, paging=None), want)


def _copied(pool: Tensor, table: Tensor, keys: int) -> Tensor:
    """Return `(B, Hk, keys, D)`: pages one behind the other, anything where there is none."""
    found = pool.swapaxes(0, 1)[:, table.clip(min=0).long()]  # (Hk, B, P, page_size, D)
    joined = found.reshape(*found.shape[:2], -1, found.shape[4])
    return joined[:, :, :keys].swapaxes(0, 1)
