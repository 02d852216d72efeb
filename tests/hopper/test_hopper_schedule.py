"""Which tiles the Hopper kernels visit, and in which order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise as tw
from tilewise.base.masks import Mask, RowIntervals
from tilewise.ops.attention.hopper import schedule

N, NK, OWN, OTHER = 149, 211, 16, 8

MASKS = {
    "causal": tw.causal(),
    "causal from the first key": tw.causal(align="top_left"),
    "window": tw.window(37, 5),
    "sinks and window": tw.causal() & (tw.window(53, 0) | tw.sink_tokens(11)),
    "prefix": tw.causal() | tw.prefix(67),
    "chunks": tw.chunked(43),
    "documents": tw.documents([0, 31, 31, 97, N], cu_seqlens_k=[0, 59, 83, 83, NK]),
    "lengths": tw.lengths([0, 101, NK], query_lengths=[N, 71, 13]),
}


def lowered(mask: Mask, B: int = 3) -> np.ndarray:
    found = mask.lower(B, 1, N, NK)
    assert isinstance(found, RowIntervals)
    return found.rows


def by_tiles(dense: np.ndarray, own: int, other: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether tiles of a dense mask are seen, and whole, pair by pair."""
    Bm, Hm, N, Nk = dense.shape
    shape = Bm, Hm, -(-N // own), -(-Nk // other)
    seen, whole = np.zeros(shape, bool), np.zeros(shape, bool)
    for b, h, i, j in np.ndindex(*shape):
        part = dense[b, h, i * own : (i + 1) * own, j * other : (j + 1) * other]
        seen[b, h, i, j] = part.any()
        whole[b, h, i, j] = part.all() and part.shape[1] == other
    return seen, whole


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_maps_of_tiles_agree_with_the_dense_mask(mask: Mask) -> None:
    maps = schedule.tile_maps(lowered(mask), N, NK, OWN, OTHER)
    seen, whole = by_tiles(mask.to_bool(3, 1, N, NK), OWN, OTHER)
    np.testing.assert_array_equal(maps.seen, seen)
    np.testing.assert_array_equal(maps.whole, whole)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("by_keys", [False, True], ids=["queries own", "keys own"])
def test_every_tile_that_is_seen_is_visited_once_and_no_other(mask: Mask, by_keys: bool) -> None:
    rows, dense = lowered(mask), mask.to_bool(3, 1, N, NK)
    sizes = (N, NK)
    if by_keys:
        turned = schedule.seers(rows, NK)
        assert turned is not None
        rows, dense, sizes = turned, dense.swapaxes(2, 3), (NK, N)
    runs = schedule.runs_of(schedule.tile_maps(rows, *sizes, OWN, OTHER))
    seen, whole = by_tiles(dense, OWN, OTHER)
    for at in np.ndindex(runs.shape[:3]):
        visits = schedule.visits_of(runs[at])
        expected = np.flatnonzero(seen[at])
        np.testing.assert_array_equal(visits, expected if expected.size else [0])
        assert runs[at][4] == visits.size
        uncut = visits[runs[at][5] : runs[at][6]]
        assert whole[at][uncut].all()


def test_most_tiles_of_a_long_causal_problem_need_no_mask() -> None:
    rows = tw.causal().lower(1, 1, 1024, 1024).rows
    runs = schedule.runs_of(schedule.tile_maps(rows, 1024, 1024, 128, 64))[0, 0]
    np.testing.assert_array_equal(runs[:, 4], 2 * np.arange(1, 9))
    np.testing.assert_array_equal(runs[:, 6] - runs[:, 5], 2 * np.arange(8))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_intervals_are_covered_and_nothing_cut_is_called_whole(data: st.DataObject) -> None:
    n, nk = data.draw(st.integers(1, 41)), data.draw(st.integers(1, 37))
    dense = np.zeros((1, 1, n, nk), bool)
    for row in dense[0, 0]:
        for _ in range(2):
            lo, hi = sorted(data.draw(st.tuples(st.integers(0, nk), st.integers(0, nk))))
            row[lo:hi] = True
    rows = tw.dense(dense).lower(1, 1, n, nk)
    if not isinstance(rows, RowIntervals):
        spans = np.zeros((1, 1, n, 4), np.int32)
        edges = np.diff(dense.astype(np.int8), axis=-1, prepend=0, append=0)
        for i in range(n):
            at = np.flatnonzero(edges[0, 0, i])
            spans[0, 0, i, : at.size] = at
    else:
        spans = rows.rows
    runs = schedule.runs_of(schedule.tile_maps(spans, n, nk, 8, 4))
    seen, whole = by_tiles(dense, 8, 4)
    for tile in range(runs.shape[2]):
        visits = schedule.visits_of(runs[0, 0, tile])
        assert np.unique(visits).size == visits.size and (np.diff(visits) > 0).all()
        assert set(np.flatnonzero(seen[0, 0, tile])) <= set(visits)
        assert whole[0, 0, tile][visits[runs[0, 0, tile, 5] : runs[0, 0, tile, 6]]].all()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_turned_around_say_which_queries_see_a_key(mask: Mask) -> None:
    turned = schedule.seers(lowered(mask), NK)
    assert turned is not None
    dense = RowIntervals(turned).to_bool(NK, N)
    np.testing.assert_array_equal(dense, mask.to_bool(3, 1, N, NK).swapaxes(2, 3))


def test_keys_that_more_than_two_intervals_of_queries_see_are_refused() -> None:
    ids = np.array([0, 1, 0, 1, 0, 1, 2, 2])
    mask = tw.documents(ids=ids, ids_k=np.array([0, 0, 0, 1, 1, 2, 2, 2]))
    rows = mask.lower(1, 1, 8, 8)
    assert isinstance(rows, RowIntervals)
    assert schedule.seers(rows.rows, 8) is None


def test_work_holds_each_tile_of_each_head_once_with_its_mask() -> None:
    rows = np.broadcast_to(lowered(MASKS["lengths"]), (3, 6, N, 4))
    runs = schedule.runs_of(schedule.tile_maps(rows, N, NK, OWN, OTHER))
    work = schedule.work_of(runs, B=3, heads=2, programs=5, group=3)
    tiles = -(-N // OWN)
    assert work.shape == (3 * 2 * tiles, 4)
    assert {tuple(item) for item in work[:, :3].tolist()} == set(np.ndindex(3, 2, tiles))
    np.testing.assert_array_equal(work[:, 3], work[:, 0] * 6 + work[:, 1] * 3)


def loads(cost: np.ndarray, order: np.ndarray, programs: int) -> np.ndarray:
    return np.array([cost[order[p::programs]].sum() for p in range(programs)])


def test_programs_of_a_causal_problem_end_together() -> None:
    tiles, heads, programs = 64, 24, 132
    cost = np.tile(np.arange(1, tiles + 1), heads)
    order = schedule.snake(cost, programs)
    np.testing.assert_array_equal(np.sort(order), np.arange(cost.size))
    mean = cost.sum() / programs
    assert loads(cost, order, programs).max() < 1.06 * mean
    assert loads(cost, np.arange(cost.size), programs).max() > 1.3 * mean
    assert (np.diff(cost[order[::1]][:programs]) <= 0).all()


def test_tables_hold_what_their_head_says() -> None:
    rows = lowered(MASKS["window"], B=1)
    tables = schedule.tables_of(
        rows, B=2, heads=3, N=N, Nk=NK, own=OWN, other=OTHER, programs=7, group=1, padded=160
    )
    head = dict(zip(schedule.FIELDS, tables.tolist(), strict=False))
    tiles = -(-N // OWN)
    assert (head["items"], head["heads"], head["tiles"]) == (6 * tiles, 3, tiles)
    assert (head["own"], head["other"], head["padded"], head["mask_step"]) == (N, NK, 160, 0)
    work = tables[len(schedule.FIELDS) : head["runs"]].reshape(-1, 4)
    runs = tables[head["runs"] : head["spans"]].reshape(1, 1, tiles, schedule.RUN_FIELDS)
    expected = schedule.runs_of(schedule.tile_maps(rows, N, NK, OWN, OTHER))
    np.testing.assert_array_equal(runs, expected)
    np.testing.assert_array_equal(work, schedule.work_of(expected, 2, 3, 7))
    np.testing.assert_array_equal(tables[head["spans"] :], rows.ravel())
