"""Masks as text and arrays: the same mask comes back, and nothing but masks."""

from __future__ import annotations

import numpy as np
import pytest

import tilewise as tw
from tilewise.base.literals import BITS, DENSE, ROWS, from_literal, to_literal
from tilewise.base.masks import PackedBits, RowIntervals

B, H, N, NK = 2, 3, 5, 7
DENSE_MASK = np.random.default_rng(0).random((B, H, N, NK)) > 0.5

MASKS = [
    tw.causal(),
    tw.causal(align="top_left"),
    tw.window(2, None),
    tw.window(None, 3, align="top_left"),
    tw.chunked(3),
    tw.chunked(2, align="top_left"),
    tw.prefix(4),
    tw.prefix([4, 0]),
    tw.lengths([7, 2]),
    tw.lengths([7, 2], query_lengths=[0, 5]),
    tw.documents([0, 2, 5], cu_seqlens_k=[0, 3, 7]),
    tw.documents(ids=[1, 1, 2, 1, 3], ids_k=np.arange(14).reshape(2, 7) % 3),
    tw.dense(DENSE_MASK),
    tw.dense(DENSE_MASK[:1, :, :, :1]),
    (tw.causal() | tw.prefix([1, 3])) & (tw.lengths([7, 2]) | tw.dense(DENSE_MASK)) & tw.chunked(4),
]


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_a_mask_comes_back(mask: tw.Mask) -> None:
    text, arrays = to_literal(mask)
    again = from_literal(text, arrays, "attention")
    assert again == mask
    assert from_literal(text, tuple(a.copy() for a in arrays), "attention") is again


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_a_lowered_mask_comes_back(mask: tw.Mask) -> None:
    lowered = mask.lower(B, H, N, NK)
    text, arrays = to_literal(lowered)
    again = from_literal(text, arrays, "attention")
    assert text == (ROWS if isinstance(lowered, RowIntervals) else BITS)
    assert isinstance(again, RowIntervals | PackedBits)
    np.testing.assert_array_equal(again.to_bool(N, NK), lowered.to_bool(N, NK))


def test_arrays_may_change_afterwards() -> None:
    array = np.ones((N, NK), bool)
    first = from_literal(DENSE, (array,), "attention")
    array[0] = False
    second = from_literal(DENSE, (array,), "attention")
    assert first == tw.dense(np.ones((N, NK), bool))
    assert second == tw.dense(array)


def test_repeated_sizes_are_not_kept() -> None:
    mask = from_literal(
        DENSE, (np.broadcast_to(DENSE_MASK[:1, :1], DENSE_MASK.shape),), "attention"
    )
    assert mask == tw.dense(DENSE_MASK[:1, :1])


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "causal().lower", "[causal()]", "causal() + 1", "a0[0]", "eval(a0)"],
)
def test_nothing_else_is_evaluated(text: str) -> None:
    with pytest.raises(ValueError, match="mask literal must be an expression of masks"):
        from_literal(text, (DENSE_MASK,), "attention")
