"""Runs the Hopper kernels of attention on the tensors of a validated call.

The arrays of the call are tensors of a framework here, with `shape`, `stride()`, `dtype`, `device`,
`new_empty` and `new_tensor` as those of PyTorch have them. Nothing here has run on a GPU yet: the
kernels were compiled, and their text was run on the CPU under an emulator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import ref

import numpy as np

from tilewise.base.errors import unsupported
from tilewise.base.masks import PackedBits, RowIntervals
from tilewise.ops.attention.spec import (
    LN2,
    NAME,
    AttentionCall,
    AttentionGrads,
    AttentionOutputs,
    CotangentCall,
    Needed,
    RowStats,
    Want,
)
from tilewise.shared.launch import LaunchPlan

from .plan import DTYPES, HEAD_DIMS, ROWS, own_rows, plan
from .schedule import Rows, seers, tables_of, tiles_of

Tensor = Any

_COUNT = 128
"""Row statistics are padded to whole tiles of queries of either pass."""

_kept: dict[int, tuple[ref[Any], dict[tuple[Any, ...], Tensor]]] = {}


@dataclass(frozen=True)
class Tiled:
    """A tensor that a kernel reads or writes by tiles."""

    tensor: Tensor
    block: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """One launch: a kernel by its name, its plan and its arguments."""

    kernel: str
    plan: LaunchPlan
    arguments: Mapping[str, Any]


class Device(Protocol):
    """Where kernels run."""

    def programs(self, like: Tensor) -> int:
        """Return how many programs run at a time beside a tensor."""

    def run(self, job: Job) -> None:
        """Run a kernel."""


def refuses(call: AttentionCall) -> str | None:
    """Return why the Hopper kernels do not serve a call, wherever it is."""
    options = {
        "bias": call.bias is not None,
        "alibi_slopes": call.alibi_slopes is not None,
        "sinks": call.sinks is not None,
        "softcap": call.softcap is not None,
        "dropout": call.dropout_p > 0,
        "packed sequences": call.sequences is not None,
        "keys in pages": call.paging is not None,
        "masks of more than two intervals a row": isinstance(call.mask, PackedBits),
    }
    given = [name for name, has in options.items() if has]
    if given:
        return f"it does not serve {', '.join(given)}"
    if dtype_of(call.q) not in DTYPES:
        return f"it serves {' and '.join(DTYPES)} alone, not {dtype_of(call.q)}"
    if call.D not in HEAD_DIMS["forward"] or call.Dv != call.D:
        dims = ", ".join(map(str, HEAD_DIMS["forward"]))
        return f"it serves D = Dv in {dims}, not D={call.D}, Dv={call.Dv}"
    if not call.softmax_scale > 0:
        return f"it serves a positive softmax_scale, not {call.softmax_scale:g}"
    if 0 in (call.B, call.H, call.N, call.Nk):
        return "the call has no pairs"
    return None


def dtype_of(x: Tensor) -> str:
    """Return the name of a tensor's dtype."""
    return str(x.dtype).removeprefix("torch.")


def forward(call: AttentionCall, want: Want, device: Device) -> AttentionOutputs:
    """Compute attention tile by tile; `o` is a `(B, H, N, Dv)` view in the layout of the call."""
    if want.entropy:
        raise unsupported(NAME, "implementation 'hopper' does not compute entropy")
    _check_values(call, v=call.v)
    q, k, v = (_by_tiles(x) for x in (call.q, call.k, call.v))
    chosen = _plan("forward", call, device)
    o = _empty(call, q, call.H, call.N)
    m, log_l = (_rows(call, q) for _ in range(2))
    shape = (call.B, call.H, call.N, call.D)
    o_full = q.new_empty(shape, dtype=m.dtype) if want.o_full else None
    queries, keys = _block(chosen, "BM"), _block(chosen, "BN")
    arguments = {
        "q_desc": Tiled(q, queries),
        "k_desc": Tiled(k, keys),
        "v_desc": Tiled(v, keys),
        "tables": _tables_for(call, chosen, "forward", q),
        "scale": call.softmax_scale / LN2,
        "o_desc": Tiled(o, queries),
        "o_ptr": m if o_full is None else o_full,
        "m_ptr": m,
        "l_ptr": log_l,
        "FULL": want.o_full,
        "H_PER_KV": call.H // call.Hk,
    }
    device.run(Job("attention_hopper_fwd_kernel", chosen, arguments))
    lse = m * LN2 + log_l if want.lse else None
    max_logit = m * LN2 if want.max_logit else None
    return AttentionOutputs(o, RowStats(m, log_l), lse, max_logit, None, o_full)


def vjp(
    call: AttentionCall, cotangents: CotangentCall, needed: Needed, device: Device
) -> AttentionGrads:
    """Compute the gradients in two passes, the same bits at every call."""
    if call.D not in HEAD_DIMS["keys"]:
        dims = ", ".join(map(str, HEAD_DIMS["keys"]))
        raise unsupported(NAME, f"implementation 'hopper' has gradients for D in {dims} alone")
    do, dlse = cotangents.do, cotangents.dlse
    _check_values(call, q=call.q, k=call.k, v=call.v, do=do, dlse=dlse)
    q, k, v = (_by_tiles(x) for x in (call.q, call.k, call.v))
    do = _zeros(q, call) if do is None else _by_tiles(do)
    rows = _gather_rows(call, cotangents, do, device)
    given = {"q": q, "k": k, "v": v, "do": do}
    dq = dk = dv = None
    if needed.k or needed.v:
        dk, dv = (_empty(call, q, call.Hk, call.Nk) for _ in range(2))
        device.run(_keys_job(call, given, rows, dk, dv, device))
    if needed.q:
        dq = _empty(call, q, call.H, call.N)
        device.run(_queries_job(call, given, rows, dq, device))
    return AttentionGrads(dq, dk if needed.k else None, dv if needed.v else None)


def _gather_rows(
    call: AttentionCall, cotangents: CotangentCall, do: Tensor, device: Device
) -> Tensor:
    """Return m, log2 l and delta of each query, `(B, H, 3, padded)` in float32."""
    saved: tuple[Tensor, ...] = cotangents.stats
    m, log_l = (x.contiguous() for x in saved)
    o = _last_contiguous(cotangents.o)
    dlse: Tensor = cotangents.dlse
    padded = tiles_of(call.N, _COUNT) * _COUNT
    rows = m.new_empty((call.B, call.H, 3, padded))
    arguments = {
        **{"do": do, "o": o, "m_ptr": m, "l_ptr": log_l},
        "dlse": m if dlse is None else dlse.contiguous(),
        **{f"stride_do_{dim}": do.stride(i) for i, dim in enumerate("bhn")},
        **{f"stride_o_{dim}": o.stride(i) for i, dim in enumerate("bhn")},
        **{"H": call.H, "N": call.N, "padded": padded, "rows": rows},
        "DLSE": dlse is not None,
    }
    chosen = LaunchPlan((call.B * call.H, padded // ROWS), {"ROWS": ROWS, "D": call.D})
    device.run(Job("attention_hopper_rows_kernel", chosen, arguments))
    return rows


def _keys_job(
    call: AttentionCall,
    given: Mapping[str, Tensor],
    rows: Tensor,
    dk: Tensor,
    dv: Tensor,
    device: Device,
) -> Job:
    chosen = _plan("keys", call, device)
    keys, queries = _block(chosen, "BM"), _block(chosen, "BN")
    flat = rows.view(-1, rows.shape[-1])
    arguments = {
        **{f"{name}_desc": Tiled(given[name], queries) for name in ("q", "do")},
        **{f"{name}_desc": Tiled(given[name], keys) for name in ("k", "v")},
        "rows_desc": Tiled(flat, (1, queries[2])),
        "tables": _tables_for(call, chosen, "keys", given["q"]),
        "scale": call.softmax_scale / LN2,
        "dk_desc": Tiled(dk, keys),
        "dv_desc": Tiled(dv, keys),
        "GROUP": call.H // call.Hk,
    }
    return Job("attention_hopper_bwd_keys_kernel", chosen, arguments)


def _queries_job(
    call: AttentionCall, given: Mapping[str, Tensor], rows: Tensor, dq: Tensor, device: Device
) -> Job:
    chosen = _plan("queries", call, device)
    queries, keys = _block(chosen, "BM"), _block(chosen, "BN")
    arguments = {
        **{f"{name}_desc": Tiled(given[name], queries) for name in ("q", "do")},
        **{f"{name}_desc": Tiled(given[name], keys) for name in ("k", "v")},
        "rows": rows,
        "tables": _tables_for(call, chosen, "queries", given["q"], rows.shape[-1]),
        "scale": call.softmax_scale / LN2,
        "dq_desc": Tiled(dq, queries),
        "GROUP": call.H // call.Hk,
    }
    return Job("attention_hopper_bwd_queries_kernel", chosen, arguments)


def _plan(kind: str, call: AttentionCall, device: Device) -> LaunchPlan:
    programs = device.programs(call.q)
    chosen = plan(kind, call.D, programs=programs, masked=call.mask is not None)
    by_keys = kind == "keys"
    heads, rows = (call.Hk, call.Nk) if by_keys else (call.H, call.N)
    items = call.B * heads * tiles_of(rows, own_rows(chosen))
    return LaunchPlan((min(programs, items),), chosen.constants, chosen.num_warps)


def _block(chosen: LaunchPlan, rows: str) -> tuple[int, ...]:
    return 1, 1, chosen.constants[rows], chosen.constants["D"]


def _tables_for(
    call: AttentionCall, chosen: LaunchPlan, kind: str, like: Tensor, padded: int = 0
) -> Tensor:
    """Return the tables of a kernel on the device of a tensor; those of one mask are kept."""
    make = partial(_make_tables, call, chosen, kind, padded)
    if call.mask is None:
        return _upload(make(), like)
    assert isinstance(call.mask, RowIntervals)
    sizes = (call.B, call.H, call.Hk, call.N, call.Nk, call.D, padded)
    tile = (chosen.constants["BM"], chosen.constants["BN"])
    key = (kind, *sizes, *tile, chosen.grid, str(like.device))
    kept = _tables_of_mask(call.mask.rows)
    if key not in kept:
        kept[key] = _upload(make(), like)
    return kept[key]


def _tables_of_mask(rows: Any) -> dict[tuple[Any, ...], Tensor]:
    """Return the tables that were made of the rows of a mask, which calls share."""
    known = _kept.get(id(rows))
    if known is None or known[0]() is not rows:
        for old in [key for key, (of, _) in _kept.items() if of() is None]:
            del _kept[old]
        known = _kept[id(rows)] = (ref(rows), {})
    return known[1]


def _make_tables(
    call: AttentionCall, chosen: LaunchPlan, kind: str, padded: int
) -> np.ndarray[Any, Any]:
    rows: Rows | None = None
    if isinstance(call.mask, RowIntervals):
        rows = _on_host(call.mask.rows)
    BM, BN = chosen.constants["BM"], chosen.constants["BN"]
    tables = partial(
        tables_of, B=call.B, own=2 * BM, other=BN, programs=chosen.grid[0], padded=padded
    )
    if kind != "keys":
        return tables(rows, heads=call.H, N=call.N, Nk=call.Nk)
    if rows is not None:
        rows = seers(rows, call.Nk)
        if rows is None:
            reason = "has no gradients of keys that over two intervals of queries see"
            raise unsupported(NAME, f"implementation 'hopper' {reason}")
    return tables(rows, heads=call.Hk, N=call.Nk, Nk=call.N, group=call.H // call.Hk)


def _on_host(rows: Any) -> Rows:
    array: Rows = rows if isinstance(rows, np.ndarray) else rows.cpu().numpy()
    return array


def _upload(array: np.ndarray[Any, Any], like: Tensor) -> Tensor:
    return like.new_tensor(array, dtype=like.new_empty(0).int().dtype)


def _check_values(call: AttentionCall, **given: Tensor | None) -> None:
    """Raise where a hidden NaN or infinity would reach a result.

    A tile that a mask cuts is multiplied whole: 0 times a hidden NaN is NaN.
    """
    if call.mask is None:
        return
    ends = {name: x.aminmax() for name, x in given.items() if x is not None}
    # A number less itself is 0, unless it is not finite: so the GPU is waited for once.
    if math.isfinite(sum(end - end for pair in ends.values() for end in pair)):
        return
    wrong = [n for n, pair in ends.items() if not all(math.isfinite(end) for end in pair)]
    reason = f"does not serve masks where {', '.join(wrong)} holds NaN or infinity"
    raise unsupported(NAME, f"implementation 'hopper' {reason}")


def _by_tiles(x: Tensor) -> Tensor:
    """Return a tensor as bulk copies read it: its rows begin at multiples of 16 bytes."""
    steps = [x.stride(i) for i in range(3) if x.shape[i] > 1]
    fits = all(step > 0 and step * x.element_size() % 16 == 0 for step in steps)
    fits = fits and x.stride(3) == 1 and x.data_ptr() % 16 == 0
    return x if fits else x.contiguous()


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _empty(call: AttentionCall, like: Tensor, heads: int, rows: int) -> Tensor:
    """Return a new `(B, heads, rows, D)` view of a tensor in the layout of the call."""
    if call.layout == "bhnd":
        return like.new_empty((call.B, heads, rows, call.D))
    return like.new_empty((call.B, rows, heads, call.D)).transpose(1, 2)


def _zeros(like: Tensor, call: AttentionCall) -> Tensor:
    return like.new_zeros((call.B, call.H, call.N, call.D))


def _rows(call: AttentionCall, like: Tensor) -> Tensor:
    return like.new_empty((call.B, call.H, call.N), dtype=like.new_empty(0).float().dtype)
