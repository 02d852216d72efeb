"""What the Hopper kernels share: names of Gluon's functions, barriers, tiles and masks.

A work item is one tile of rows of one head. What `schedule.tables_of` made says which items there
are, which tiles of the other side each visits, and what the mask lets it see. All of that is read
where it is used, for it would take registers through the loops.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..schedule import FIELDS

__all__ = [
    "HEADS",
    "ITEMS",
    "MASK_STEP",
    "N_OWN",
    "PADDED",
    "barriers",
    "fence_async_shared",
    "fill",
    "gl",
    "gluon",
    "mbarrier",
    "read_runs",
    "read_work",
    "seen_by_rows",
    "store_tile",
    "tile_at",
    "tma_load",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

HEADER = gl.constexpr(len(FIELDS))
ITEMS, HEADS, TILES, MASK_STEP, N_OWN, N_OTHER, PADDED, RUNS, SPANS = (
    gl.constexpr(i) for i in range(len(FIELDS))
)

# Triton 3.7 gave these two shorter names.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait


@gluon.jit
def barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """Return `count` barriers, each of which completes a phase after so many arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def fill(desc, batch, head, row, buffer, full, ROWS: gl.constexpr, D: gl.constexpr):
    """Start to load the tile of `ROWS` rows at `row`; `full` completes when it has arrived.

    Rows that do not exist arrive as zeros.
    """
    mbarrier.expect(full, desc.block_type.nbytes)
    tma_load(desc, [batch, head, row, 0], full, buffer.reshape([1, 1, ROWS, D]))


@gluon.jit
def store_tile(desc, batch, head, row, buffer, values, ROWS: gl.constexpr, D: gl.constexpr):
    """Write a tile through shared memory, which may be used again on return."""
    buffer.store(values.to(desc.dtype))
    fence_async_shared()
    tma_store(desc, [batch, head, row, 0], buffer.reshape([1, 1, ROWS, D]))
    tma_store_wait(0)


@gluon.jit
def read_work(tables, item):
    """Return batch, head, tile and the head whose mask it has, of a work item."""
    at = tables + HEADER + item * 4
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)


@gluon.jit
def read_runs(tables, mask_head, tile):
    """Return the address of a row of runs, how many tiles it visits, and which of them are whole.

    The visits `[first, end)` are of tiles that the mask does not cut.
    """
    row = mask_head * gl.load(tables + TILES) + tile
    at = tables + gl.load(tables + RUNS) + row * 8
    return at, gl.load(at + 4), gl.load(at + 5), gl.load(at + 6)


@gluon.jit
def tile_at(at, n):
    """Return the tile of the n-th visit of the row of runs at an address."""
    first, end, second = gl.load(at), gl.load(at + 1), gl.load(at + 2)
    return gl.where(first + n < end, first + n, second + n - (end - first))


@gluon.jit
def seen_by_rows(tables, mask_head, row, column, MASKED: gl.constexpr):
    """Return which columns the mask lets rows see, `[BM, BN]`.

    Args:
        tables: What `schedule.tables_of` made.
        mask_head: The head whose mask it is.
        row: `[BM, 1]`. Rows that own the work.
        column: `[1, BN]`. Rows of the other side.
        MASKED: Whether there is a mask; without, only what does not exist is hidden.
    """
    if MASKED:
        N = gl.load(tables + N_OWN)
        spans = tables + gl.load(tables + SPANS)
        at = spans + mask_head.to(gl.int64) * N * 4 + row.to(gl.int64) * 4
        exists = row < N
        seen = column >= gl.load(at, mask=exists, other=0)
        seen = seen & (column < gl.load(at + 1, mask=exists, other=0))
        more = column >= gl.load(at + 2, mask=exists, other=0)
        more = more & (column < gl.load(at + 3, mask=exists, other=0))
        seen = seen | more
    else:
        seen = column < gl.load(tables + N_OTHER)
    return seen
