"""How the kernels of the softmax are launched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tilewise.shared.launch import Compilation
from tilewise.shared.row_tiles import RowTiles, compilation, merge_plan, row_tiles

ENTRIES = {"forward": 16384, "vjp": 8192, "jvp": 8192, "vjp_jvp": 4096}
"""Entries of a tile at most, for what a kernel keeps of each in registers."""


def tiles(kind: str, C: int, I: int, itemsize: int) -> RowTiles:
    """Return the tiles of a kernel.

    Args:
        kind: forward, vjp, jvp or vjp_jvp.
        C: Entries of a row.
        I: Rows that lie side by side behind the row's axis.
        itemsize: Bytes of an entry.
    """
    entries = ENTRIES[kind]
    return row_tiles(C, I, entries=entries // 2 if itemsize == 8 else entries)


def planned(arch: str) -> Iterator[Compilation]:
    """Return the configurations that are compiled without a GPU: the same for each architecture."""
    from tilewise.shared.triton_rows import sum_parts_kernel

    from .kernels import softmax_derivative_kernel, softmax_fwd_kernel, softmax_merge_kernel

    rows = {"m_ptr": "*fp32", "log_l_ptr": "*fp32"}
    whole = {"x_ptr": "*bf16", "where_ptr": "*i1", "sink_ptr": "*fp32"}
    for C, I in ((128, 1), (4096, 1), (131072, 1), (512, 64)):
        cut = tiles("forward", C, I, 2)
        for phase in ("whole",) if cut.parts == 1 else ("sums", "write"):
            more = {"y_ptr": "*bf16", "lse_ptr": "*fp32", "parts_ptr": "*fp32"}
            yield _compilation(
                f"softmax_fwd {C}x{I} {phase}",
                softmax_fwd_kernel,
                {**whole, **rows, **more},
                cut,
                {"LOG": False, "PHASE": phase},
            )
    given = ("dy", "tx", "tdy")
    for kind, used in (("vjp", given[:1]), ("jvp", given[1:2]), ("vjp_jvp", given)):
        for C, I in ((4096, 1), (131072, 1), (512, 64)):
            cut = tiles(kind, C, I, 2)
            more = {f"{name}_ptr": "*bf16" for name in (*used, "out")}
            more |= {f"{name}_ptr": "*fp32" for name in ("out_row", "parts", "sums", "dlse")}
            long = ("sums", "second", "write") if kind == "vjp_jvp" else ("sums", "write")
            for phase in ("whole",) if cut.parts == 1 else long:
                yield _compilation(
                    f"softmax_{kind} {C}x{I} {phase}",
                    softmax_derivative_kernel,
                    {**whole, **rows, **more},
                    cut,
                    {"KIND": kind, "LOG": False, "PHASE": phase},
                )
    merged = {**rows, "parts_ptr": "*fp32", "sink_ptr": "*fp32", "lse_ptr": "*fp32"}
    constants, scale = merge_plan(1, 1).constants, {"scale": "fp64"}
    yield compilation("softmax_merge", softmax_merge_kernel, merged, scale, constants, 4)
    added = {"parts_ptr": "*fp32", "total_ptr": "*fp32"}
    yield compilation("sum_parts", sum_parts_kernel, added, {}, constants, 4)


def _compilation(
    name: str, kernel: Any, pointers: dict[str, str], cut: RowTiles, constants: dict[str, Any]
) -> Compilation:
    """Return a configuration in which entries lie side by side along the tile's denser axis."""
    dense = [n for n in kernel.arg_names if n.endswith("_tile" if cut.inner else "_c")]
    fixed = {**dict.fromkeys(dense, 1), **cut.launch(1, 1).constants, **constants}
    return compilation(name, kernel, pointers, {"scale": "fp64"}, fixed, cut.num_warps)
