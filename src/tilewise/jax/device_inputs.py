"""What the CPU reads of arrays before its kernels run, computed on the device of the arrays.

There a call is put together before any value is known: masks of arrays become bits, and targets
that are no class make the loss NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from tilewise.base._lowering import KEY_TILE, QUERY_TILE
from tilewise.base.literals import BITS, ROWS, evaluate

Sizes = tuple[int, int, int, int]


def mask_parts(text: str, arrays: Sequence[Array], sizes: Sizes, operator: str) -> list[Array]:
    """Return the arrays of a mask as kernels read them: of `RowIntervals`, or of `PackedBits`.

    Args:
        text: The mask as a literal.
        arrays: Its arrays, which may be traced.
        sizes: B, H, N and Nk.
        operator: The name that error messages start with.
    """
    if text == ROWS:
        return [arrays[0].astype(jnp.int32)]
    if text == BITS:
        return [arrays[0].astype(jnp.uint16).view(jnp.int16), arrays[1].astype(jnp.uint8)]
    _, _, N, Nk = sizes
    words = -(-N // QUERY_TILE)
    if N == 0 or Nk == 0:
        tiles = jnp.zeros((1, 1, words, -(-Nk // KEY_TILE)), jnp.uint8)
        return [jnp.zeros((1, 1, Nk, words), jnp.int16), tiles]
    patterns = _Patterns(sizes)
    functions = {name: getattr(patterns, name) for name in _PATTERNS}
    seen = jnp.broadcast_arrays(evaluate(text, arrays, functions, operator), patterns.every)[0]
    return _packed(seen)


def _packed(seen: Array) -> list[Array]:
    """Return the bits and tiles of `PackedBits` for `(Bm, Hm, 16 words, Nk)` booleans."""
    Bm, Hm, rows, Nk = seen.shape
    words = rows // QUERY_TILE
    shifts = jnp.arange(QUERY_TILE, dtype=jnp.uint16)[:, None]
    parts = seen.reshape(Bm, Hm, words, QUERY_TILE, Nk).astype(jnp.uint16) << shifts
    bits = parts.sum(3, dtype=jnp.uint16)  # [Bm, Hm, words, Nk]
    beyond = ((0, 0), (0, 0), (0, 0), (0, -Nk % KEY_TILE))

    def tiled(filler: int) -> Array:
        padded = jnp.pad(bits, beyond, constant_values=filler)
        return padded.reshape(Bm, Hm, words, -1, KEY_TILE)

    some, full = (tiled(0) != 0).any(-1), (tiled(0xFFFF) == 0xFFFF).all(-1)
    tiles = some.astype(jnp.uint8) + full.astype(jnp.uint8)
    return [bits.swapaxes(2, 3).view(jnp.int16), tiles]


_PATTERNS = ("causal", "window", "prefix", "chunked", "lengths", "documents", "dense")


class _Patterns:
    """The patterns of `tilewise.base.masks` as booleans `(Bm, Hm, 16 words, Nk)`.

    Rows from N on repeat the last one.
    """

    def __init__(self, sizes: Sizes) -> None:
        _, _, self.N, self.Nk = sizes
        rows = -(-self.N // QUERY_TILE) * QUERY_TILE
        self.i = jnp.minimum(jnp.arange(rows), self.N - 1)[None, None, :, None]
        self.j = jnp.arange(self.Nk)[None, None, None, :]
        self.every = jnp.ones((1, 1, rows, self.Nk), bool)

    def _position(self, align: str) -> Array:
        return self.i + (self.Nk - self.N if align == "bottom_right" else 0)

    def causal(self, *, align: str = "bottom_right") -> Array:
        return self.j <= self._position(align)

    def window(self, left: int | None, right: int | None, *, align: str = "bottom_right") -> Array:
        position, seen = self._position(align), self.every
        if left is not None:
            seen = seen & (self.j >= position - left)
        return seen if right is None else seen & (self.j <= position + right)

    def prefix(self, n: Any) -> Array:
        return self.j < jnp.reshape(jnp.asarray(n), (-1, 1, 1, 1))

    def chunked(self, size: int, *, align: str = "bottom_right") -> Array:
        return self.j // size == self._position(align) // size

    def lengths(self, lengths: Array, *, query_lengths: Array | None = None) -> Array:
        seen = self.prefix(lengths)
        if query_lengths is None:
            return seen
        return seen & (self.i < jnp.reshape(query_lengths, (-1, 1, 1, 1)))

    def documents(
        self,
        cu_seqlens: Array | None = None,
        *,
        cu_seqlens_k: Array | None = None,
        ids: Array | None = None,
        ids_k: Array | None = None,
    ) -> Array:
        if ids is not None:
            of_keys = jnp.atleast_2d(ids if ids_k is None else ids_k)[:, None, None, :]
            return self._rows(jnp.atleast_2d(ids)[:, None, :, None]) == of_keys
        assert cu_seqlens is not None
        ends = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        document = jnp.searchsorted(cu_seqlens, self.i, side="right") - 1
        return (ends[document] <= self.j) & (self.j < ends[document + 1])

    def dense(self, array: Array) -> Array:
        full = array.reshape((1,) * (4 - array.ndim) + array.shape)
        return full if full.shape[2] == 1 else self._rows(full)

    def _rows(self, array: Array) -> Array:
        """Return an array `(.., .., N, ..)` with its last row repeated."""
        beyond = ((0, 0), (0, 0), (0, self.every.shape[2] - self.N), (0, 0))
        return jnp.pad(array, beyond, mode="edge")


def class_targets(targets: Array, classes: int, ignore_index: int) -> tuple[Array, Array]:
    """Return targets that all are classes or ignored, and which of them were neither."""
    wrong = (targets < 0) | (targets >= classes)
    limits = jnp.iinfo(targets.dtype)
    if limits.min <= ignore_index <= limits.max:
        wrong &= targets != ignore_index
    return jnp.where(wrong, 0, targets), wrong
