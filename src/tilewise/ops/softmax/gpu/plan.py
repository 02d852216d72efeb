"""How the kernels of the softmax are launched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tilewise.shared.launch import Compilation
from tilewise.shared.row_tiles import (
    POINTERS,
    RowTiles,
    compilation,
    itemsize_of,
    merge_plan,
    row_tiles,
    sums_of,
)

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
    return row_tiles(C, I, entries=ENTRIES[kind], itemsize=itemsize)


_PLANNED = {
    "bfloat16": ((128, 1), (4096, 1), (131072, 1), (512, 64)),
    "float16": ((4096, 1),),
    "float32": ((4096, 1), (131072, 1)),
    "float64": ((4096, 1),),
}
"""Entries of a row, and rows side by side, for which kernels are compiled without a GPU."""

_GIVEN = {"vjp": ("dy",), "jvp": ("tx",), "vjp_jvp": ("dy", "tx", "tdy")}


def planned(arch: str) -> Iterator[Compilation]:
    """Return the configurations that are compiled without a GPU: the same for each architecture."""
    from tilewise.shared.triton_rows import sum_parts_kernel

    from .kernels import softmax_merge_kernel

    for dtype, shapes in _PLANNED.items():
        for C, I in shapes:
            yield from _forward(C, I, dtype)
            if C != 128:
                yield from _derivatives(C, I, dtype)
    rows = dict.fromkeys(("m_ptr", "log_l_ptr", "parts_ptr", "sink_ptr", "lse_ptr"), "*fp32")
    constants, scale = merge_plan(1, 1).constants, {"scale": "fp64"}
    yield compilation("softmax_merge", softmax_merge_kernel, rows, scale, constants, 4)
    added = {"parts_ptr": "*fp32", "total_ptr": "*fp32"}
    yield compilation("sum_parts", sum_parts_kernel, added, {}, constants, 4)


def _forward(C: int, I: int, dtype: str) -> Iterator[Compilation]:
    """Return the configurations of the forward pass for rows of C entries."""
    from .kernels import softmax_fwd_kernel

    cut = tiles("forward", C, I, itemsize_of(dtype))
    pointers = _pointers(dtype, ("x", "y"), ("sink", "m", "log_l", "lse", "parts"))
    for phase in ("whole",) if cut.parts == 1 else ("sums", "write"):
        name = f"softmax_fwd {C}x{I} {phase} {dtype}"
        yield _compilation(name, softmax_fwd_kernel, pointers, cut, {"LOG": False, "PHASE": phase})


def _derivatives(C: int, I: int, dtype: str) -> Iterator[Compilation]:
    """Return the configurations of the derivatives for rows of C entries."""
    from .kernels import softmax_derivative_kernel

    rows = ("sink", "m", "log_l", "out_row", "parts", "sums", "dlse")
    for kind, given in _GIVEN.items():
        cut = tiles(kind, C, I, itemsize_of(dtype))
        long = ("sums", "second", "write") if kind == "vjp_jvp" else ("sums", "write")
        for phase in ("whole",) if cut.parts == 1 else long:
            yield _compilation(
                f"softmax_{kind} {C}x{I} {phase} {dtype}",
                softmax_derivative_kernel,
                _pointers(dtype, ("x", *given, "out"), rows),
                cut,
                {"KIND": kind, "LOG": False, "PHASE": phase},
            )


def _pointers(dtype: str, whole: tuple[str, ...], rows: tuple[str, ...]) -> dict[str, str]:
    """Return the types of tensors like x, of tensors with a number of each row, and of the mask."""
    found = {f"{name}_ptr": POINTERS[dtype] for name in whole}
    return found | {f"{name}_ptr": sums_of(dtype) for name in rows} | {"where_ptr": "*i1"}


def _compilation(
    name: str, kernel: Any, pointers: dict[str, str], cut: RowTiles, constants: dict[str, Any]
) -> Compilation:
    """Return a configuration in which entries lie side by side along the tile's denser axis."""
    dense = [n for n in kernel.arg_names if n.endswith("_tile" if cut.inner else "_c")]
    fixed = {**dict.fromkeys(dense, 1), **cut.launch(1, 1).constants, **constants}
    return compilation(name, kernel, pointers, {"scale": "fp64"}, fixed, cut.num_warps)
