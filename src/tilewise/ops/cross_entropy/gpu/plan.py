"""How the kernels of the cross-entropy are launched."""

from __future__ import annotations

from tilewise.shared.launch import LaunchPlan
from tilewise.shared.row_tiles import RowTiles, row_tiles

ENTRIES = {"forward": 8192, "vjp": 4096, "jvp": 4096, "vjp_jvp": 2048}
"""Entries of a tile at most, for what a kernel keeps of each in registers."""


def tiles(kind: str, C: int, I: int, itemsize: int) -> RowTiles:
    """Return the tiles of a kernel.

    Args:
        kind: forward, vjp, jvp or vjp_jvp.
        C: Classes.
        I: Rows that lie side by side behind the axis of the classes.
        itemsize: Bytes of a logit.
    """
    entries = ENTRIES[kind]
    return row_tiles(C, I, entries=entries // 2 if itemsize == 8 else entries)


def reduction() -> LaunchPlan:
    """Return the launch that adds numbers of all rows: one program."""
    return LaunchPlan((1,), {"BLOCK_R": 1024}, num_warps=8)
