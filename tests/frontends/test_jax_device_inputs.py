"""What programs for CUDA compute of masks, boundaries and targets, beside what the CPU does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise import Unsupported  # noqa: E402
from tilewise.base._lowering import Size, to_bits  # noqa: E402
from tilewise.base.literals import to_literal  # noqa: E402
from tilewise.jax.device_inputs import (  # noqa: E402
    boundaries,
    class_targets,
    mask_parts,
    packed_rows,
)
from tilewise.ops.attention.spec.sequences import (  # noqa: E402
    lowered_per_sequence,
    sequences_of,
)

SIZES = [(2, 3, 37, 131), (2, 3, 83, 64)]


def masks(B: int, H: int, N: int, Nk: int) -> dict[str, Any]:
    """Masks of arrays with all that may stand beside them."""
    rng = np.random.default_rng(11)
    some = tw.lengths(rng.integers(0, Nk + 1, B))
    ids, ids_k = (np.sort(rng.integers(0, 4, (B, n))) for n in (N, Nk))
    ends, ends_k = ([0, n // 3, n // 3, n // 2, n] for n in (N, Nk))
    return {
        "lengths": tw.lengths([Nk, Nk // 2], query_lengths=[N // 2, N]),
        "causal": tw.causal() & some,
        "top-left": tw.causal(align="top_left") | some,
        "window": some & tw.window(5, 2),
        "window-of-one-side": tw.window(None, 3, align="top_left") & some,
        "window-of-the-other": tw.window(3, None) & some,
        "chunked": some & (tw.chunked(7) | tw.prefix(2)),
        "chunked-top-left": some & tw.chunked(7, align="top_left"),
        "prefixes": tw.prefix(rng.integers(0, Nk, B)),
        "documents": tw.documents(ends, cu_seqlens_k=ends_k),
        "ids": tw.documents(ids=ids, ids_k=ids_k),
        "ids-of-all": tw.documents(ids=ids[0], ids_k=ids_k[0]) | some,
        "dense": tw.dense(rng.random((B, 1, N, Nk)) < 0.5),
        "dense-full": tw.dense(np.ones((N, Nk), bool)) & some,
        "keys": tw.dense(rng.random(Nk) < 0.5),
    }


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_masks_become_the_bits_that_the_cpu_makes_of_them(sizes: tuple[int, ...]) -> None:
    B, H, N, Nk = sizes
    given = {name: to_literal(mask) for name, mask in masks(*sizes).items()}
    texts = {name: text for name, (text, _) in given.items()}

    @jax.jit
    def parts(arrays: Any) -> Any:
        return {name: mask_parts(texts[name], arrays[name], sizes, "attention") for name in texts}

    lowered = parts({name: [jnp.asarray(a) for a in arrays] for name, (_, arrays) in given.items()})
    for name, mask in masks(*sizes).items():
        expected = to_bits(mask, Size(B, H, N, Nk, "attention"))
        bits, tiles = lowered[name]
        assert bits.dtype == np.int16 and tiles.dtype == np.uint8
        wanted = expected.bits.view(np.int16), expected.tiles
        for found, right in zip((bits, tiles), wanted, strict=True):
            shape = np.broadcast_shapes(found.shape, right.shape)
            assert found.shape == shape, name
            np.testing.assert_array_equal(found, np.broadcast_to(right, shape), err_msg=name)


def test_masks_of_nothing_are_empty() -> None:
    for N, Nk in ((0, 5), (5, 0)):
        bits, tiles = mask_parts("lengths(a0)", [jnp.zeros(2, int)], (2, 3, N, Nk), "attention")
        assert bits.shape == (1, 1, Nk, -(-N // 16)) and tiles.shape[2:] == (
            -(-N // 16),
            -(-Nk // 64),
        )


def test_lowered_masks_stay_what_they_are() -> None:
    rows = tw.causal().lower(1, 1, 5, 7)
    (found,) = mask_parts(*to_literal(rows), (1, 1, 5, 7), "attention")
    np.testing.assert_array_equal(found, rows.rows)
    packed = to_bits(tw.chunked(3), Size(1, 1, 17, 70, "attention"))
    bits, tiles = mask_parts(*to_literal(packed), (1, 1, 17, 70), "attention")
    np.testing.assert_array_equal(bits, packed.bits.view(np.int16))
    np.testing.assert_array_equal(tiles, packed.tiles)


NUMBERED = {
    "causal": tw.causal(),
    "top-left": tw.causal(align="top_left"),
    "window": tw.window(4, 2),
    "windows": tw.window(2, None) & tw.window(None, 3, align="top_left"),
    "window-or-prefix": tw.causal() & (tw.window(3, 0) | tw.prefix(2)),
    "prefix-or-window": tw.prefix(2) | tw.window(1, 1),
    "chunked": tw.chunked(5),
    "chunked-or-causal": tw.chunked(4, align="top_left") | tw.causal(),
    "far-apart": tw.window(0, 0) | tw.chunked(3, align="top_left"),
}


@pytest.mark.parametrize("name", NUMBERED)
def test_masks_of_packed_sequences_become_the_rows_that_the_cpu_makes(name: str) -> None:
    mask, total_q, total_k = NUMBERED[name], 41, 53

    @jax.jit
    def rows(q: Any, k: Any) -> Any:
        return packed_rows(to_literal(mask)[0], q, k, total_q, "attention")

    for seed in range(5):
        cuts = np.random.default_rng(seed)
        q, k = (
            np.concatenate(([0], np.sort(cuts.integers(0, total + 1, 6)), [total]))
            for total in (total_q, total_k)
        )
        expected = lowered_per_sequence(mask, sequences_of(q, k, total_q, total_k))
        found = rows(jnp.asarray(q), jnp.asarray(k))
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected.rows)


def test_packed_masks_of_more_than_two_intervals_are_unsupported() -> None:
    text, _ = to_literal(tw.chunked(3) | tw.prefix(2) | tw.window(1, 0))
    starts = jnp.asarray([0, 3, 7])
    with pytest.raises(Unsupported, match="more than two intervals of keys per query with packed"):
        packed_rows(text, starts, starts, 7, "attention")


def test_boundaries_that_are_wrong_lead_nowhere_else() -> None:
    right = [0, 6, 6, 8, 11]
    assert boundaries(jnp.asarray(right), 11).tolist() == right
    for wrong in ([3, 5, 11], [0, 99, 11], [0, -4, 7], [0, 8, 3, 11], [5]):
        found = boundaries(jnp.asarray(wrong), 11).tolist()
        assert found[-1] == 11 and found == sorted(found) and (len(found) == 1 or found[0] == 0)


def test_targets_that_are_no_class() -> None:
    targets, wrong = class_targets(jnp.asarray([0, 4, 5, -1, -100]), 5, -100)
    assert targets.tolist() == [0, 4, 0, 0, -100]
    assert wrong.tolist() == [False, False, True, True, False]
    _, wrong = class_targets(jnp.asarray([3, 9], np.int8), 5, 1000)
    assert wrong.tolist() == [False, True]
