"""Which tiles each program of a Hopper kernel visits, and in which order; plain NumPy.

A program owns tiles of rows (queries in the forward pass and for dq, keys for dk and dv) and visits
tiles of the other side. The mask, as row intervals, says which: tiles that no row sees are left
out, and tiles of which every row sees everything need no mask.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FIELDS",
    "RUN_FIELDS",
    "TileMaps",
    "runs_of",
    "seers",
    "snake",
    "tables_of",
    "tile_maps",
    "tiles_of",
    "visits_of",
    "work_of",
]

FIELDS = (
    "items",
    "heads",
    "tiles",
    "mask_step",
    "own",
    "other",
    "padded",
    "runs",
    "spans",
)
"""What the first numbers of the tables are: work items, heads that own work, tiles of one head,
step from the mask of a head to that of the next of its group, rows that own work, rows of the
other side, queries of the row statistics of the backward pass, and where runs and spans begin."""

RUN_FIELDS = 8
"""Numbers in a row of runs: first, end, second, last, visits, whole, cut, 0.

The tiles are `[first, end)` and then `[second, last)`, `visits` in all; the visits
`[whole, cut)` are of tiles that the mask does not cut.
"""

Rows = NDArray[np.int32]
"""`(Bm, Hm, N, 4)`. Two intervals `[lo, hi)` for each row, as in `RowIntervals`."""


class TileMaps(NamedTuple):
    """What a mask does to each pair of tiles.

    Attributes:
        seen: `(Bm, Hm, tiles of rows, tiles of columns)`. Whether some row sees some column.
        whole: The same shape. Whether every row that exists sees every column of the tile.
    """

    seen: NDArray[np.bool_]
    whole: NDArray[np.bool_]


def tiles_of(length: int, tile: int) -> int:
    """Return how many tiles cover a length."""
    return -(-length // tile)


def seers(rows: Rows, Nk: int) -> Rows | None:
    """Return which queries see each key, as `(Bm, Hm, Nk, 4)`; None if over two intervals.

    Args:
        rows: `(Bm, Hm, N, 4)`. Which keys each query sees.
        Nk: Keys.
    """
    Bm, Hm = rows.shape[:2]
    out = np.zeros((Bm, Hm, Nk, 4), np.int32)
    for at in np.ndindex(Bm, Hm):
        turned = _turned(rows[at].astype(np.int64), Nk)
        if turned is None:
            return None
        out[at] = turned
    return out


def _turned(rows: NDArray[np.int64], Nk: int) -> NDArray[np.int64] | None:
    """Turn the intervals of one head around: a key's interval begins and ends where rows change."""
    nothing = np.zeros((1, 4), np.int64)
    ends = np.concatenate((nothing, rows, nothing))
    # The keys in which a row differs from the one before lie between every second end of both.
    between = np.sort(np.concatenate((ends[:-1], ends[1:]), axis=1), axis=1).reshape(-1, 4, 2)
    width = between[..., 1] - between[..., 0]
    if width.sum() > 4 * Nk:
        return None
    row = np.repeat(np.arange(len(between)), width.sum(axis=1))
    flat = width.ravel()
    start = np.repeat(between[..., 0].ravel() - (np.cumsum(flat) - flat), flat)
    key = start + np.arange(flat.sum())
    order = np.argsort(key, kind="stable")
    key, row = key[order], row[order]
    count = np.bincount(key, minlength=Nk)
    if count.max(initial=0) > 4:
        return None
    out = np.zeros((Nk, 4), np.int64)
    out[key, np.arange(key.size) - (np.cumsum(count) - count)[key]] = row
    return out


def tile_maps(rows: Rows | None, N: int, Nk: int, own: int, other: int) -> TileMaps:
    """Return what a mask does to tiles of `own` rows and `other` columns.

    Args:
        rows: `(Bm, Hm, N, 4)`. The columns that each row sees, or None where it sees all.
        N: Rows, at least 1.
        Nk: Columns, at least 1.
        own: Rows of a tile.
        other: Columns of a tile.
    """
    tiles = tiles_of(Nk, other)
    if rows is None:
        shape = (1, 1, tiles_of(N, own), tiles)
        whole = np.arange(tiles) < Nk // other
        return TileMaps(np.ones(shape, np.bool_), np.broadcast_to(whole, shape))
    spans = rows.reshape(*rows.shape[:3], 2, 2).astype(np.int64)
    lo, hi = spans[..., 0], spans[..., 1]
    used = lo < hi
    seen = _covered(np.where(used, lo // other, 0), np.where(used, -(-hi // other), 0), own, tiles)
    inner = _covered(-(-lo // other), hi // other, own, tiles)
    existing = np.minimum(own, N - own * np.arange(seen.shape[2]))
    return TileMaps(seen > 0, inner == existing[:, None])


def _covered(
    first: NDArray[np.int64], end: NDArray[np.int64], own: int, tiles: int
) -> NDArray[np.int64]:
    """Return how many spans of tiles of the rows of each tile cover each tile of columns.

    Args:
        first: `(Bm, Hm, N, 2)`. First tile of columns of each span.
        end: The same shape. The tile after its last one; not after `first` for no tile.
        own: Rows of a tile.
        tiles: Tiles of columns.
    """
    Bm, Hm, N, _ = first.shape
    steps = np.zeros((Bm, Hm, tiles_of(N, own), tiles + 1), np.int64)
    b, h, i, k = np.nonzero(first < end)
    np.add.at(steps, (b, h, i // own, first[b, h, i, k]), 1)
    np.add.at(steps, (b, h, i // own, end[b, h, i, k]), -1)
    counts: NDArray[np.int64] = np.cumsum(steps, axis=-1)[..., :-1]
    return counts


def runs_of(maps: TileMaps) -> NDArray[np.int32]:
    """Return the tiles that each tile of rows visits, as `(Bm, Hm, tiles, RUN_FIELDS)`.

    Two runs hold every tile that is seen, split where the most tiles are unseen; unseen tiles
    inside of a run are visited, and the mask hides all of them. A tile of rows that sees nothing
    visits one tile, so that the kernels have no case without any.
    """
    lead = maps.seen.shape[:3]
    runs = np.zeros((*lead, RUN_FIELDS), np.int32)
    for at in np.ndindex(lead):
        runs[at] = _runs_of_row(maps.seen[at], maps.whole[at])
    return runs


def _runs_of_row(seen: NDArray[np.bool_], whole: NDArray[np.bool_]) -> tuple[int, ...]:
    found = np.flatnonzero(seen)
    if found.size == 0:
        return 0, 1, 0, 0, 1, 0, 0, 0
    gaps = np.diff(found)
    split = int(gaps.argmax()) if gaps.size and gaps.max() > 1 else found.size - 1
    first, end = int(found[0]), int(found[split]) + 1
    second, last = (int(found[split + 1]), int(found[-1]) + 1) if split + 1 < found.size else (0, 0)
    visited = np.concatenate((whole[first:end], whole[second:last]))
    return first, end, second, last, visited.size, *_longest(visited), 0


def _longest(flags: NDArray[np.bool_]) -> tuple[int, int]:
    """Return the longest `[begin, end)` of True; (0, 0) where there is none."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    if edges.size == 0:
        return 0, 0
    begin, end = edges[0::2], edges[1::2]
    best = int((end - begin).argmax())
    return int(begin[best]), int(end[best])


def visits_of(run: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the tiles that one row of runs visits, in order."""
    first, end, second, last = (int(n) for n in run[:4])
    return np.concatenate((np.arange(first, end), np.arange(second, last)))


def work_of(
    runs: NDArray[np.int32], B: int, heads: int, programs: int, group: int = 1
) -> NDArray[np.int32]:
    """Return the work items in the order in which the programs take them, as `(items, 4)`.

    An item is a batch entry, a head, a tile of rows, and `bm * Hm + hm`, the head whose mask it
    has; the first of them where a group of heads shares the item.

    Args:
        runs: What `runs_of` returned, with Bm in {1, B} and Hm in {1, heads * group}.
        B: Batch.
        heads: Heads that own work: of the queries, or of the keys.
        programs: How many programs run.
        group: Query heads that share one item.
    """
    Bm, Hm, tiles, _ = runs.shape
    b, h, tile = (a.ravel() for a in np.indices((B, heads, tiles)))
    of_mask = (b if Bm > 1 else 0 * b) * Hm + (h * group if Hm > 1 else 0)
    visits = runs[..., 4].reshape(Bm * Hm, tiles).astype(np.int64)
    cost = np.zeros(b.size, np.int64)
    for g in range(group if Hm > 1 else 1):
        cost += visits[of_mask + g, tile]
    items = np.stack((b, h, tile, of_mask), axis=1).astype(np.int32)
    return items[snake(cost, programs)]


def snake(cost: NDArray[np.int64], programs: int) -> NDArray[np.int64]:
    """Return items by falling cost, every second round of `programs` of them backwards.

    Program p takes the items p, p + programs, and so on: the longest first, and the program that
    had the longest of one round has the shortest of the next.
    """
    order = np.argsort(-cost, kind="stable")
    for start in range(programs, len(order), 2 * programs):
        order[start : start + programs] = order[start : start + programs][::-1]
    return order


def tables_of(
    rows: Rows | None,
    *,
    B: int,
    heads: int,
    N: int,
    Nk: int,
    own: int,
    other: int,
    programs: int,
    group: int = 1,
    padded: int = 0,
) -> NDArray[np.int32]:
    """Return all that a kernel reads of its schedule: `FIELDS`, work items, runs and spans.

    Args:
        rows: `(Bm, Hm, N, 4)`. The columns that each row sees, or None where it sees all.
        B: Batch.
        heads: Heads that own work.
        N: Rows that own work.
        Nk: Rows of the other side.
        own: Rows of a tile.
        other: Rows of a tile of the other side.
        programs: How many programs run.
        group: Query heads that share one item.
        padded: Queries of the row statistics of the backward pass.
    """
    runs = runs_of(tile_maps(rows, N, Nk, own, other))
    items = work_of(runs, B, heads, programs, group)
    head = {
        "items": len(items),
        "heads": heads,
        "tiles": runs.shape[2],
        "mask_step": int(runs.shape[1] > 1),
        "own": N,
        "other": Nk,
        "padded": padded,
        "runs": len(FIELDS) + items.size,
        "spans": len(FIELDS) + items.size + runs.size,
    }
    spans = np.zeros(0, np.int32) if rows is None else rows
    parts = (np.array([head[name] for name in FIELDS], np.int32), items, runs, spans)
    return np.concatenate([part.ravel() for part in parts])
