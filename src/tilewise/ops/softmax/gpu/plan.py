"""How the kernels of the softmax are launched."""

from __future__ import annotations

from collections.abc import Iterator

from tilewise.shared.launch import Compilation
from tilewise.shared.row_tiles import MERGED_PARTS, RowTiles, row_tiles

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
