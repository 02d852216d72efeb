"""What the CPU reads of arrays before its kernels run, computed on the device of the arrays.

There a call is put together before any value is known: masks of arrays become bits, those of packed
sequences intervals, and targets that are no class make the loss NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tilewise.base._lowering import KEY_TILE, QUERY_TILE
from tilewise.base.errors import unsupported
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


def boundaries(starts: Array, total: int) -> Array:
    """Return boundaries that are ascending from 0 to a total, whatever was given.

    Those that are right stay as they are; with others no kernel leaves the memory of its arrays.
    """
    ascending = jax.lax.cummax(jnp.clip(starts, 0, total))
    return ascending.at[0].set(0).at[-1].set(total)


def packed_rows(text: str, q_starts: Array, k_starts: Array, total_q: int, operator: str) -> Array:
    """Return what each query sees of its own sequence, `(1, 1, total_q, 4)` as in `RowIntervals`.

    Args:
        text: A mask without arrays, as a literal.
        q_starts: `(S + 1,)`, where the queries of each sequence begin.
        k_starts: `(S + 1,)`, likewise for keys.
        total_q: Queries of all sequences.
        operator: The name that error messages start with.

    Raises:
        Unsupported: Rows may have more than two intervals.
    """
    place = jnp.arange(total_q)
    s = jnp.searchsorted(q_starts[1:], place, side="right")
    N, Nk = (starts[s + 1] - starts[s] for starts in (q_starts, k_starts))
    patterns = _RowPatterns(place - q_starts[s], N, Nk)
    functions = {name: getattr(patterns, name) for name in _NUMBERED}
    spans = evaluate(text, (), functions, operator).spans
    if len(spans) > 2:
        reason = "takes no mask that may have more than two intervals of keys per query"
        raise unsupported(operator, f"a program for CUDA {reason} with packed sequences")
    ends = [jnp.clip(end, 0, Nk) for span in [*spans, (0, 0)][:2] for end in span]
    return jnp.stack(_in_order(*ends), -1).astype(jnp.int32)[None, None]


def _in_order(*ends: Array) -> tuple[Array, ...]:
    """Return two intervals ascending and apart; empty ones are (0, 0) and come last."""
    a, b, c, d = ends
    swap = (a >= b) | ((c < d) & (c < a))
    a, b, c, d = (jnp.where(swap, *pair) for pair in ((c, a), (d, b), (a, c), (b, d)))
    empty, none = a >= b, c >= d
    a, b = jnp.where(empty, 0, a), jnp.where(empty, 0, b)
    joined = ~none & ~empty & (c <= b)
    b = jnp.where(joined, jnp.maximum(b, d), b)
    gone = none | joined
    return a, b, jnp.where(gone, 0, c), jnp.where(gone, 0, d)


class _Spans:
    """Intervals of keys for each query; a query sees what any of them holds."""

    def __init__(self, *spans: tuple[Any, Any]) -> None:
        self.spans = spans

    def __and__(self, other: _Spans) -> _Spans:
        pairs = [(a, b) for a in self.spans for b in other.spans]
        return _Spans(*[(jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1])) for a, b in pairs])

    def __or__(self, other: _Spans) -> _Spans:
        return _Spans(*self.spans, *other.spans)


_NUMBERED = ("causal", "window", "prefix", "chunked")


class _RowPatterns:
    """The patterns of `tilewise.base.masks` without arrays as intervals of keys.

    i, N and Nk are, of each query, its place in its sequence, and the queries and keys of that.
    """

    def __init__(self, i: Array, N: Array, Nk: Array) -> None:
        self.i, self.N, self.Nk = i, N, Nk

    def _position(self, align: str) -> Array:
        return self.i + (self.Nk - self.N if align == "bottom_right" else 0)

    def causal(self, *, align: str = "bottom_right") -> _Spans:
        return self.window(None, 0, align=align)

    def window(self, left: int | None, right: int | None, *, align: str = "bottom_right") -> _Spans:
        position = self._position(align)
        first = 0 * position if left is None else position - left
        return _Spans((first, self.Nk if right is None else position + right + 1))

    def prefix(self, n: int) -> _Spans:
        return _Spans((0 * self.i, jnp.minimum(n, self.Nk)))

    def chunked(self, size: int, *, align: str = "bottom_right") -> _Spans:
        first = self._position(align) // size * size
        return _Spans((first, first + size))


def class_targets(targets: Array, classes: int, ignore_index: int) -> tuple[Array, Array]:
    """Return targets that all are classes or ignored, and which of them were neither."""
    wrong = (targets < 0) | (targets >= classes)
    limits = jnp.iinfo(targets.dtype)
    if limits.min <= ignore_index <= limits.max:
        wrong &= targets != ignore_index
    return jnp.where(wrong, 0, targets), wrong
