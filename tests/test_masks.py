"""Masks against their definitions, written here once more as loops over queries and keys."""

from __future__ import annotations

import copy
import pickle
import re
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.base import _lowering, masks
from tilewise.base.errors import Unsupported, must, type_error, unsupported, value_error
from tilewise.base.masks import (
    Mask,
    PackedBits,
    RowIntervals,
    as_mask,
    causal,
    chunked,
    dense,
    documents,
    lengths,
    prefix,
    sink_tokens,
    window,
)

Dims = tuple[int, int, int, int]
Sees = Callable[[int, int, int, int], bool]

ALIGNS = st.sampled_from(["bottom_right", "top_left"])


def position(dims: Dims, align: str, i: int) -> int:
    return i + dims[3] - dims[2] if align == "bottom_right" else i


def cuts(draw: st.DrawFn, end: int, inner: int) -> list[int]:
    points = draw(st.lists(st.integers(0, end), min_size=inner, max_size=inner))
    return [0, *sorted(points), end]


def draw_positional(draw: st.DrawFn, dims: Dims) -> tuple[Mask, Sees]:
    align = draw(ALIGNS)
    kind = draw(st.sampled_from(["causal", "window", "chunked"]))
    if kind == "causal":
        return causal(align=align), lambda b, h, i, j: j <= position(dims, align, i)
    if kind == "chunked":
        size = draw(st.integers(1, 20))
        return (
            chunked(size, align=align),
            lambda b, h, i, j: j // size == position(dims, align, i) // size,
        )
    reach = st.sampled_from([0, 1, 2, 3, 5, 8, 12, None])
    left, right = draw(reach), draw(reach)

    def sees(b: int, h: int, i: int, j: int) -> bool:
        p = position(dims, align, i)
        return (left is None or j >= p - left) and (right is None or j <= p + right)

    return window(left, right, align=align), sees


def draw_documents(draw: st.DrawFn, dims: Dims) -> tuple[Mask, Sees]:
    B, _, N, Nk = dims
    if draw(st.booleans()):
        inner = draw(st.integers(0, 4))
        q, k = cuts(draw, N, inner), cuts(draw, Nk, inner)

        def together(b: int, h: int, i: int, j: int) -> bool:
            return any(q[d] <= i < q[d + 1] and k[d] <= j < k[d + 1] for d in range(inner + 1))

        return documents(q, cu_seqlens_k=k), together
    few = st.integers(-1, draw(st.sampled_from([0, 1, 3])))
    ids, ids_k = (
        np.array(draw(st.lists(few, min_size=B * n, max_size=B * n)), dtype=np.int16).reshape(B, n)
        for n in (N, Nk)
    )
    if draw(st.booleans()):
        ids_k = np.sort(ids_k, axis=1)
    if draw(st.booleans()):
        row, own = ids[0].copy(), ids_k
        return documents(ids=row, ids_k=own), lambda b, h, i, j: row[i] == own[b, j]
    return documents(ids=ids, ids_k=ids_k), lambda b, h, i, j: ids[b, i] == ids_k[b, j]


def draw_dense(draw: st.DrawFn, dims: Dims) -> tuple[Mask, Sees]:
    shape = tuple(n if draw(st.booleans()) else 1 for n in dims)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    if draw(st.booleans()):  # one run in each row
        ends = np.sort(rng.integers(0, shape[3] + 1, (*shape[:3], 2)), axis=-1)
        keys = np.arange(shape[3])
        array = (keys >= ends[..., :1]) & (keys < ends[..., 1:])
    else:
        array = rng.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.9, 1.0]))
    full = np.broadcast_to(array, dims)
    given = array[0, 0] if shape[:2] == (1, 1) else array
    return dense(given), lambda b, h, i, j: bool(full[b, h, i, j])


def draw_band(draw: st.DrawFn, dims: Dims) -> tuple[Mask, Sees]:
    """Return a narrow window with sink tokens, which takes two intervals and often touches."""
    left, right, n = (draw(st.integers(0, 3)) for _ in range(3))
    align = draw(ALIGNS)
    mask = sink_tokens(n) | window(left, right, align=align)
    return mask, lambda b, h, i, j: j < n or -left <= j - position(dims, align, i) <= right


def draw_leaf(draw: st.DrawFn, dims: Dims) -> tuple[Mask, Sees]:
    B, _, N, Nk = dims
    kinds = [
        "band",
        "band",
        "positional",
        "positional",
        "prefix",
        "lengths",
        "documents",
        "dense",
        "dense",
    ]
    kind = draw(st.sampled_from(kinds))
    if kind == "band":
        return draw_band(draw, dims)
    if kind == "positional":
        return draw_positional(draw, dims)
    if kind == "documents":
        return draw_documents(draw, dims)
    if kind == "dense":
        return draw_dense(draw, dims)
    per_batch = draw(st.lists(st.integers(0, Nk), min_size=B, max_size=B))
    if kind == "prefix":
        if draw(st.booleans()):
            return prefix(per_batch), lambda b, h, i, j: j < per_batch[b]
        n = draw(st.integers(0, Nk + 3))
        return sink_tokens(n), lambda b, h, i, j: j < n
    if draw(st.booleans()):
        return lengths(per_batch), lambda b, h, i, j: j < per_batch[b]
    rows = draw(st.lists(st.integers(0, N), min_size=B, max_size=B))
    return (
        lengths(np.array(per_batch), query_lengths=np.array(rows)),
        lambda b, h, i, j: i < rows[b] and j < per_batch[b],
    )


def draw_expression(draw: st.DrawFn, dims: Dims, depth: int) -> tuple[Mask, Sees]:
    if depth == 0 or draw(st.sampled_from([False, False, False, True])):
        return draw_leaf(draw, dims)
    a, sees_a = draw_expression(draw, dims, depth - 1)
    b, sees_b = draw_expression(draw, dims, depth - 1)
    if draw(st.sampled_from([False, False, True])):
        return a & b, lambda *at: sees_a(*at) and sees_b(*at)
    return a | b, lambda *at: sees_a(*at) or sees_b(*at)


@st.composite
def expressions(draw: st.DrawFn) -> tuple[Mask, Sees, Dims]:
    dims = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 2, 7, 15, 16, 17, 23, 32, 37])),
        draw(st.sampled_from([1, 3, 11, 19, 29, 63, 64, 65, 131])),
    )
    return *draw_expression(draw, dims, depth=3), dims


def evaluate(sees: Sees, dims: Dims) -> np.ndarray:
    B, H, N, Nk = dims
    out = np.zeros(dims, dtype=bool)
    for b in range(B):
        for h in range(H):
            for i in range(N):
                for j in range(Nk):
                    out[b, h, i, j] = sees(b, h, i, j)
    return out


def runs(row: np.ndarray) -> int:
    return sum(1 for j in range(len(row)) if row[j] and (j == 0 or not row[j - 1]))


def assert_normal_form(rows: np.ndarray, Nk: int) -> None:
    assert rows.dtype == np.int32 and rows.flags.c_contiguous and not rows.flags.writeable
    for lo0, hi0, lo1, hi1 in rows.reshape(-1, 4).tolist():
        for lo, hi in ((lo0, hi0), (lo1, hi1)):
            assert 0 <= lo < hi <= Nk or (lo, hi) == (0, 0)
        if hi1:
            assert hi0 and hi0 < lo1


def assert_tiles_match(bits: PackedBits, full: np.ndarray) -> None:
    N, Nk = full.shape[2:]
    assert bits.tiles.shape[2:] == ((N + 15) // 16, (Nk + 63) // 64)
    for index in np.ndindex(bits.tiles.shape):
        b, h, row, column = index
        tile = full[b, h, 16 * row : 16 * row + 16, 64 * column : 64 * column + 64]
        assert bits.tiles[index] == (2 if tile.all() else 1 if tile.any() else 0)


def assert_bits_match(bits: PackedBits, full: np.ndarray) -> None:
    N, Nk = full.shape[2:]
    assert bits.bits.shape == (*full.shape[:2], Nk, (N + 15) // 16)
    for array, dtype in ((bits.bits, np.uint16), (bits.tiles, np.uint8)):
        assert array.dtype == dtype and array.flags.c_contiguous and not array.flags.writeable
    for i in range(bits.bits.shape[3] * 16):
        column = (bits.bits[..., i // 16] >> (i % 16)) & 1
        assert np.array_equal(column.astype(bool), full[:, :, min(i, N - 1)])


@settings(max_examples=200, deadline=None)
@given(expressions())
def test_lowered_mask_equals_its_definition(case: tuple[Mask, Sees, Dims]) -> None:
    mask, sees, dims = case
    B, H, N, Nk = dims
    expected = evaluate(sees, dims)
    lowered = mask.lower(B, H, N, Nk)
    got = lowered.to_bool(N, Nk)
    assert got.dtype == bool and got.shape[0] in (1, B) and got.shape[1] in (1, H)
    assert np.array_equal(np.broadcast_to(got, dims), expected)
    assert np.array_equal(np.broadcast_to(mask.to_bool(B, H, N, Nk), dims), expected)
    if max(runs(row) for row in expected.reshape(-1, Nk)) <= 2:
        assert isinstance(lowered, RowIntervals)
        assert lowered.rows.shape == (*got.shape[:3], 4)
        assert_normal_form(lowered.rows, Nk)
    else:
        assert isinstance(lowered, PackedBits)
        assert_bits_match(lowered, got)
        assert_tiles_match(lowered, got)


@settings(max_examples=40, deadline=None)
@given(expressions())
def test_small_blocks_give_the_same_result(case: tuple[Mask, Sees, Dims]) -> None:
    mask, _, (B, H, N, Nk) = case
    whole = mask.lower(B, H, N, Nk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_lowering, "BOOL_BLOCK_BYTES", 1)
        patch.setattr(_lowering, "SPAN_BLOCK_ROWS", 1)
        size = _lowering.Size(B, H, N, Nk, "attention")
        cut = _lowering.to_intervals(mask, size) or _lowering.to_bits(mask, size)
    assert type(cut) is type(whole)
    for name, array in vars(whole).items():
        assert np.array_equal(array, vars(cut)[name])


@settings(max_examples=40, deadline=None)
@given(expressions())
def test_repr_builds_an_equal_mask(case: tuple[Mask, Sees, Dims]) -> None:
    mask = case[0]
    if mask.scalar:
        again = eval(repr(mask), dict(vars(masks)))
        assert again == mask and hash(again) == hash(mask)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=4, max_size=4)))
def test_normalise_sorts_and_merges(rows: list[list[tuple[int, int]]]) -> None:
    spans = np.array(rows, dtype=np.int32).reshape(1, 1, len(rows), 4, 2)
    got = _lowering.normalise(spans)
    for row, out in zip(rows, got[0, 0].tolist(), strict=True):
        seen = {j for lo, hi in row for j in range(lo, hi)}
        starts = sorted(j for j in seen if j - 1 not in seen)
        ends = sorted(j + 1 for j in seen if j + 1 not in seen)
        want = [list(pair) for pair in zip(starts, ends, strict=True)]
        assert out == want + [[0, 0]] * (len(out) - len(want))


def rows_of(mask: Mask, B: int, H: int, N: int, Nk: int) -> list[list[int]]:
    lowered = mask.lower(B, H, N, Nk)
    assert isinstance(lowered, RowIntervals)
    return lowered.rows[0, 0].tolist()


def test_causal_is_bottom_right_by_default() -> None:
    assert rows_of(causal(), 1, 1, 3, 5) == [[0, 3, 0, 0], [0, 4, 0, 0], [0, 5, 0, 0]]
    assert rows_of(causal(), 1, 1, 3, 2) == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 2, 0, 0]]
    assert rows_of(causal(), 1, 1, 1, 7) == [[0, 7, 0, 0]]
    top_left = causal(align="top_left")
    assert rows_of(top_left, 1, 1, 3, 5) == [[0, 1, 0, 0], [0, 2, 0, 0], [0, 3, 0, 0]]
    assert rows_of(top_left, 1, 1, 3, 2) == [[0, 1, 0, 0], [0, 2, 0, 0], [0, 2, 0, 0]]


def test_window_with_sinks_takes_two_intervals() -> None:
    mask = causal() & (window(1, 0) | sink_tokens(2))
    want = [[0, 1, 0, 0], [0, 2, 0, 0], [0, 3, 0, 0], [0, 4, 0, 0], [0, 2, 3, 5]]
    assert rows_of(mask, 1, 1, 5, 5) == want


def test_touching_intervals_merge() -> None:
    touching = window(1, 1) | (window(None, None) & prefix(3))
    assert rows_of(touching, 1, 1, 6, 6)[4] == [0, 6, 0, 0]


def test_chunks_before_the_first_key_are_empty() -> None:
    assert rows_of(chunked(2), 1, 1, 4, 2) == [[0, 0, 0, 0]] * 2 + [[0, 2, 0, 0]] * 2


def test_lengths_have_one_row_set_per_batch_entry() -> None:
    lowered = (lengths([2, 0, 5]) & causal()).lower(3, 7, 5, 5)
    assert isinstance(lowered, RowIntervals)
    assert lowered.rows.shape == (3, 1, 5, 4)
    assert lowered.rows[:, 0, :, 1].tolist() == [[1, 2, 2, 2, 2], [0] * 5, [1, 2, 3, 4, 5]]


def test_documents_from_boundaries_and_ids_agree() -> None:
    cu, ids = [0, 2, 2, 7], [4, 4, 9, 9, 9, 9, 9]
    a, b = (m.lower(1, 1, 7, 7) for m in (documents(cu), documents(ids=ids)))
    assert isinstance(a, RowIntervals) and isinstance(b, RowIntervals)
    assert np.array_equal(a.rows, b.rows)


def test_dense_with_two_runs_becomes_intervals() -> None:
    array = np.zeros((3, 11), dtype=bool)
    array[1, 2:4] = array[1, 5:] = True
    assert rows_of(dense(array), 2, 3, 3, 11) == [[0] * 4, [2, 4, 5, 11], [0] * 4]
    array[1, 8] = False
    assert isinstance(dense(array).lower(2, 3, 3, 11), PackedBits)


@pytest.mark.parametrize("B, H, N, Nk", [(0, 3, 5, 7), (2, 0, 5, 7), (2, 3, 0, 7), (2, 3, 5, 0)])
def test_zero_sizes_work(B: int, H: int, N: int, Nk: int) -> None:
    some = np.zeros((B, H, N, Nk), dtype=bool)
    some[..., ::2] = True
    cases = [
        causal(),
        window(2, None, align="top_left"),
        prefix(3),
        chunked(2),
        lengths([min(Nk, 1)] * B, query_lengths=[min(N, 2)] * B),
        prefix([1] * B),
        documents([0, 0, N], cu_seqlens_k=[0, Nk, Nk]),
        documents(ids=np.zeros((B, N), dtype=int), ids_k=np.zeros((B, Nk), dtype=int)),
        dense(some),
        causal() & dense(some) | lengths([0] * B),
    ]
    for mask in cases:
        lowered = mask.lower(B, H, N, Nk)
        got = lowered.to_bool(N, Nk)
        assert got.shape == mask.to_bool(B, H, N, Nk).shape
        assert got.shape[0] in (1, B) and got.shape[1] in (1, H) and got.shape[2:] == (N, Nk)


def test_positions_beyond_int32_do_not_overflow() -> None:
    Nk = 2**31 - 1
    assert rows_of(causal(), 1, 1, 2, Nk) == [[0, Nk - 1, 0, 0], [0, Nk, 0, 0]]
    assert rows_of(window(10**30, 10**30), 1, 1, 1, Nk) == [[0, Nk, 0, 0]]
    assert rows_of(chunked(10**30), 1, 1, 1, Nk) == [[0, Nk, 0, 0]]
    assert rows_of(prefix(10**30) & window(3, 0), 1, 1, 1, Nk) == [[Nk - 4, Nk, 0, 0]]


def test_long_unions_do_not_recurse() -> None:
    terms = [documents(ids=[7 * (i == k) for i in range(9)], ids_k=[7] * 9) for k in range(9)]
    assert rows_of(reduce(lambda a, b: a | b, terms * 300), 1, 1, 9, 9) == [[0, 9, 0, 0]] * 9


LOWERING_ERRORS = [
    (lengths([3, 200]), "mask lengths must be at most Nk=128, got 200"),
    (lengths([3]), "mask lengths must have shape (B,) with B=2, got (1,)"),
    (
        lengths([3, 3], query_lengths=[0, 65]),
        "mask query_lengths must be at most N=64, got 65",
    ),
    (prefix([1, 2, 3]), "mask prefix must have shape (B,) with B=2, got (3,)"),
    (documents([0, 60]), "mask cu_seqlens must end at N=64, got 60"),
    (documents([0, 64]), "mask cu_seqlens must end at Nk=128 too, or give cu_seqlens_k, got 64"),
    (documents([0, 64], cu_seqlens_k=[0, 9]), "mask cu_seqlens_k must end at Nk=128, got 9"),
    (
        documents(ids=[0] * 9),
        "mask ids must have shape (N,) or (B, N) with B=2, N=64, got (9,)",
    ),
    (
        documents(ids=[0] * 64),
        "mask ids must have shape (Nk,) or (B, Nk) with B=2, Nk=128, or give ids_k, got (64,)",
    ),
    (
        documents(ids=[0] * 64, ids_k=[[0] * 128] * 3),
        "mask ids_k must have shape (Nk,) or (B, Nk) with B=2, Nk=128, got (3, 128)",
    ),
    (
        dense(np.ones((64, 127), dtype=bool)),
        "mask must be broadcastable to (B, H, N, Nk) = (2, 3, 64, 128), got (64, 127)",
    ),
]


@pytest.mark.parametrize("mask, text", LOWERING_ERRORS)
def test_data_that_does_not_fit_is_refused(mask: Mask, text: str) -> None:
    for expression in (mask, causal() & mask, mask | causal()):
        for method in (expression.lower, expression.to_bool):
            with pytest.raises(ValueError) as error:
                method(2, 3, 64, 128, operator="attention")
            assert str(error.value) == f"attention: {text}"


CONSTRUCTION_ERRORS = [
    (
        lambda: causal(align="left"),
        ValueError,
        "causal: align must be 'bottom_right' or 'top_left', got 'left'",
    ),
    (lambda: window(-1, 0), ValueError, "window: left must be at least 0, got -1"),
    (lambda: window(0, -3), ValueError, "window: right must be at least 0, got -3"),
    (lambda: window(1.5, 0), TypeError, "window: left must be an integer, got 1.5"),
    (lambda: window(True, 0), TypeError, "window: left must be an integer, got True"),
    (lambda: prefix(-1), ValueError, "prefix: n must be at least 0, got -1"),
    (lambda: prefix([[1]]), ValueError, "prefix: n must have one dimension, got (1, 1)"),
    (lambda: sink_tokens(None), TypeError, "sink_tokens: n must be an integer, got None"),
    (lambda: chunked(0), ValueError, "chunked: size must be at least 1, got 0"),
    (lambda: lengths([1, -2]), ValueError, "lengths: lengths must be at least 0, got -2"),
    (
        lambda: lengths([1.0]),
        TypeError,
        "lengths: lengths must have an integer dtype, got float64",
    ),
    (
        documents,
        TypeError,
        "documents: arguments must be either cu_seqlens or ids, got neither",
    ),
    (
        lambda: documents([0], ids=[0]),
        TypeError,
        "documents: arguments must be either cu_seqlens or ids, got both",
    ),
    (
        lambda: documents([0], ids_k=[0]),
        TypeError,
        "documents: ids_k must come with ids, got no ids",
    ),
    (lambda: documents([1, 4]), ValueError, "documents: cu_seqlens must start at 0, got 1"),
    (lambda: documents([]), ValueError, "documents: cu_seqlens must start at 0, got no entries"),
    (
        lambda: documents([0, 4, 3]),
        ValueError,
        "documents: cu_seqlens must be non-decreasing, got 4 followed by 3",
    ),
    (
        lambda: documents([0, 4], cu_seqlens_k=[0, 2, 4]),
        ValueError,
        "documents: cu_seqlens_k must have 2 entries (as cu_seqlens), got 3",
    ),
    (lambda: dense(np.ones(3)), TypeError, "dense: array must have dtype bool, got float64"),
    (
        lambda: dense(np.ones((1,) * 5, dtype=bool)),
        ValueError,
        "dense: array must have at most 4 dimensions, got (1, 1, 1, 1, 1)",
    ),
]


@pytest.mark.parametrize("make, kind, text", CONSTRUCTION_ERRORS)
def test_wrong_arguments_are_refused(
    make: Callable[[], Mask], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind) as error:
        make()
    assert str(error.value) == text


def test_too_many_keys_are_refused() -> None:
    with pytest.raises(ValueError) as error:
        causal().lower(1, 1, 1, 2**31, operator="attention")
    text = "be below 2**31 where a mask is given (its intervals are int32), got 2147483648"
    assert str(error.value) == f"attention: Nk must {text}"


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="attention: N must be at least 0, got -1"):
        causal().lower(1, 1, -1, 1)
    with pytest.raises(TypeError, match=r"attention: B must be an integer, got 1\.0"):
        causal().lower(1.0, 1, 1, 1)


@pytest.mark.parametrize("other", [3, None, "causal", np.ones((2, 2), dtype=bool)])
def test_only_masks_combine(other: object) -> None:
    shown = type(other).__name__
    hint = " (wrap a boolean array in dense())" if shown == "ndarray" else ""
    combinations = {
        "&": (lambda: causal() & other, lambda: other & causal()),
        "|": (lambda: causal() | other, lambda: other | causal()),
    }
    for symbol, both in combinations.items():
        for combine in both:
            with pytest.raises(TypeError) as error:
                combine()
            want = f"mask: operands of {symbol} must both be masks{hint}, got {shown}"
            assert str(error.value) == want


def test_masks_have_no_truth_value() -> None:
    with pytest.raises(TypeError, match=r"combine masks with & and \|"):
        causal() and window(1, 1)


def test_as_mask() -> None:
    mask, array = causal(), np.eye(3, dtype=bool)
    assert as_mask(mask, "attention") is mask
    assert as_mask(array, "attention") == dense(array)
    requirement = "attention: mask must be a tilewise mask or a boolean array, got"
    for wrong, shown in ((None, "NoneType"), (np.ones(3), "an array of float64"), ([True], "list")):
        with pytest.raises(TypeError) as error:
            as_mask(wrong, "attention")
        assert str(error.value) == f"{requirement} {shown}"
    with pytest.raises(ValueError, match="attention: mask must have at most 4 dimensions"):
        as_mask(np.ones((1,) * 5, dtype=bool), "attention")


def test_user_arrays_are_copied() -> None:
    arrays = {
        "lengths": np.array([3, 4]),
        "prefix": np.array([3, 4]),
        "documents": np.array([0, 5]),
        "dense": np.eye(5, dtype=bool),
    }
    made = {name: getattr(masks, name)(array) for name, array in arrays.items()}
    before = {name: mask.to_bool(2, 1, 5, 5) for name, mask in made.items()}
    hashes = {name: hash(mask) for name, mask in made.items()}
    for array in arrays.values():
        array[...] = 1
    for name, mask in made.items():
        assert np.array_equal(mask.to_bool(2, 1, 5, 5), before[name])
        assert np.array_equal(mask.lower(2, 1, 5, 5).to_bool(5, 5), before[name])
        assert hash(mask) == hashes[name]


def test_masks_and_lowered_forms_are_immutable() -> None:
    mask = window(3, 0)
    with pytest.raises(FrozenInstanceError):
        mask.left = 7
    lowered = mask.lower(1, 1, 4, 4)
    assert isinstance(lowered, RowIntervals)
    with pytest.raises(ValueError, match="read-only"):
        lowered.rows[...] = 0
    with pytest.raises(FrozenInstanceError):
        lowered.rows = None
    shown = mask.to_bool(1, 1, 4, 4)
    shown[...] = False
    assert mask.to_bool(1, 1, 4, 4).any()


def test_equality_and_hash_are_by_content() -> None:
    makers: list[Callable[[], Mask]] = [
        causal,
        lambda: causal(align="top_left"),
        lambda: window(4, 0),
        lambda: window(4, None),
        lambda: prefix(3),
        lambda: prefix([3]),
        lambda: chunked(3),
        lambda: lengths([3]),
        lambda: lengths([3], query_lengths=[3]),
        lambda: documents([0, 3]),
        lambda: documents([0, 3], cu_seqlens_k=[0, 3]),
        lambda: documents(ids=[0, 3]),
        lambda: dense(np.eye(3, dtype=bool)),
        lambda: dense(np.eye(3, dtype=bool)[None]),
        lambda: causal() & prefix(3),
        lambda: causal() | prefix(3),
    ]
    for a, make_a in enumerate(makers):
        for b, make_b in enumerate(makers):
            assert (make_a() == make_b()) == (a == b)
    assert len({make() for make in makers * 2}) == len(makers)
    assert causal() == window(None, 0) and sink_tokens(3) == prefix(np.int32(3))
    assert causal() != "causal()"


def test_repr_is_short_and_reads_as_code() -> None:
    mask = causal() & (window(256, 0) | sink_tokens(4)) & chunked(8, align="top_left")
    want = "causal() & (window(256, 0) | prefix(4)) & chunked(8, align='top_left')"
    assert repr(mask) == want
    assert repr(causal(align="top_left")) == "causal(align='top_left')"
    assert repr(lengths([1, 2], query_lengths=[3, 4])) == "lengths([1, 2], query_lengths=[3, 4])"
    assert repr(documents(range(10))) == "documents([0, 1, 2, ..., 8, 9])"
    assert repr(documents(ids=[[1]], ids_k=[2])) == "documents(ids=<int64 (1, 1)>, ids_k=[2])"
    assert repr(dense(np.eye(2, dtype=bool))) == "dense(<bool (2, 2)>)"


@pytest.mark.parametrize("mask", [causal() & prefix(3), lengths([3, 5]), dense(np.eye(5) > 0)])
def test_copies_and_pickles_are_equal(mask: Mask) -> None:
    before = mask.lower(2, 1, 5, 5).to_bool(5, 5)
    for again in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert again == mask and hash(again) == hash(mask)
        assert np.array_equal(again.lower(2, 1, 5, 5).to_bool(5, 5), before)


def test_lowered_forms_are_cached() -> None:
    assert causal().lower(2, 3, 33, 44) is causal().lower(5, 7, 33, 44)
    odd = dense((np.arange(44) % 2 > 0)[None])
    assert odd.lower(1, 1, 33, 44) is odd.lower(1, 1, 33, 44)
    assert odd.lower(1, 1, 34, 44) is not odd.lower(1, 1, 33, 44)
    three = window(0, 0) | chunked(3) & prefix(30) | prefix(1)
    assert three.lower(1, 1, 33, 44) is three.lower(1, 1, 33, 44)


def test_causal_lowers_in_linear_time_and_memory() -> None:
    N = 16384
    seconds = []
    for extra in range(20):  # a new size each time, so that no result is cached
        start = time.perf_counter()
        causal().lower(1, 1, N, N + 1000 + extra)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2e-3
    tracemalloc.start()
    try:
        causal().lower(1, 1, N, N + 999)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * N


def test_packing_needs_little_more_than_the_bits() -> None:
    N, Nk = 8192, 8192
    mask = dense(np.arange(Nk) % 3 > 0) & causal()
    tracemalloc.start()
    try:
        lowered = mask.lower(1, 1, N, Nk)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(lowered, PackedBits)
    assert peak < lowered.bits.nbytes + 8 * _lowering.BOOL_BLOCK_BYTES < N * Nk


def test_error_form() -> None:
    text = "attention: k must have shape (B, Hk, Nk, D) with D=64 (from q), got (2, 8, 128, 32)"
    requirement = "have shape (B, Hk, Nk, D) with D=64 (from q)"
    assert must("attention", "k", requirement, (2, 8, 128, 32)) == text
    for make, kind in ((type_error, TypeError), (value_error, ValueError)):
        error = make("attention", "k", requirement, (2, 8, 128, 32))
        assert type(error) is kind and str(error) == text
    refused = unsupported("attention", "no float16")
    assert type(refused) is Unsupported and isinstance(refused, NotImplementedError)
    assert str(refused) == "attention: no float16"


def test_pictures_in_the_docs_are_right() -> None:
    page = (Path(__file__).parents[1] / "docs" / "masks.md").read_text(encoding="utf-8")
    pictures = re.findall(r"```text\n(.+) {4}N=(\d+) Nk=(\d+)\n\n((?:[#. ]+\n)+)```", page)
    assert len(pictures) > 9
    for expression, N, Nk, drawn in pictures:
        mask = eval(expression, dict(vars(masks)))
        rows = mask.to_bool(1, 1, int(N), int(Nk))[0, 0]
        assert drawn == "".join(" ".join(".#"[int(cell)] for cell in row) + "\n" for row in rows)
