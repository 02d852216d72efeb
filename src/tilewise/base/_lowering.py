"""The algebra of masks and its lowering to the two forms that kernels read.

Spans are the working form: int32 ``(Bm, Hm, n, K, 2)``, the K half-open key intervals of n query
rows. Normalised spans are ascending, disjoint and not adjacent; empty ones are (0, 0) and last.
Whatever cannot be spans is evaluated as boolean blocks of a few rows, never as a whole.
"""

from __future__ import annotations

import operator as _operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, ClassVar, Final, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tilewise.base.errors import type_error, value_error

QUERY_TILE: Final = 16
KEY_TILE: Final = 64
MAX_SPANS: Final = 8  # beyond this, boolean blocks cost less than sorting intervals
SPAN_BLOCK_ROWS: Final = 1 << 16
BOOL_BLOCK_BYTES: Final = 1 << 22
_INT32_MAX: Final = 2**31 - 1
# 32 results of at most 2**16 rows x 16 bytes keep the cache below 32 MiB.
_CACHE_RESULTS: Final = 32
_CACHE_ROWS: Final = 1 << 16

Spans: TypeAlias = NDArray[np.int32]
BoolArray: TypeAlias = NDArray[np.bool_]
Show: TypeAlias = Callable[[Any], str]


@dataclass(frozen=True)
class Size:
    """The problem a mask is lowered for; `operator` is named in error messages."""

    B: int
    H: int
    N: int
    Nk: int
    operator: str

    def check(self) -> None:
        """Raise where a size is no size, or where keys do not fit int32 intervals."""
        for name in ("B", "H", "N", "Nk"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)):
                raise type_error(self.operator, name, "be an integer", value)
            if value < 0:
                raise value_error(self.operator, name, "be at least 0", value)
        if self.Nk > _INT32_MAX:
            requirement = "be below 2**31 where a mask is given (its intervals are int32)"
            raise value_error(self.operator, "Nk", requirement, self.Nk)

    def blocks(self, rows: int) -> Iterator[slice]:
        """Cut the N query rows into blocks of `rows`, a multiple of 16; none where N is 0."""
        rows = max(QUERY_TILE, rows // QUERY_TILE * QUERY_TILE)
        for start in range(0, self.N, rows):
            yield slice(start, min(start + rows, self.N))


@dataclass(frozen=True, eq=False)
class RowIntervals:
    """Two key intervals per query row.

    Args:
        rows: `(Bm, Hm, N, 4)`, int32, C-contiguous, read-only: lo0, hi0, lo1, hi1, each pair
            half-open within [0, Nk], ascending, disjoint and not adjacent. An empty interval
            is (0, 0) and comes last.
    """

    rows: NDArray[np.int32]

    def to_bool(self, N: int, Nk: int) -> BoolArray:
        """Return `(Bm, Hm, N, Nk)` booleans: True where the query sees the key."""
        Bm, Hm = self.rows.shape[:2]
        return spans_to_bool(self.rows.reshape(Bm, Hm, N, 2, 2), Nk)


@dataclass(frozen=True, eq=False)
class PackedBits:
    """One bit per query and key, with a map of occupied tiles.

    Args:
        bits: `(Bm, Hm, Nk, ceil(N/16))`, uint16, C-contiguous, read-only: bit `i % 16` of
            `bits[b, h, j, i // 16]` says that query i sees key j. Rows from N on repeat row N-1.
        tiles: `(Bm, Hm, ceil(N/16), ceil(Nk/64))`, uint8, C-contiguous, read-only: 0 empty,
            1 partial, 2 full, over the 16 queries x 64 keys that exist.
    """

    bits: NDArray[np.uint16]
    tiles: NDArray[np.uint8]

    def to_bool(self, N: int, Nk: int) -> BoolArray:
        """Return `(Bm, Hm, N, Nk)` booleans: True where the query sees the key."""
        Bm, Hm, _, words = self.bits.shape
        octets = self.bits.astype("<u2").view(np.uint8).reshape(Bm, Hm, Nk, 2 * words)
        by_key = np.unpackbits(octets, axis=-1, count=N, bitorder="little")
        return np.ascontiguousarray(by_key.swapaxes(2, 3)).view(np.bool_)


def interval(lo: NDArray[np.int64], hi: NDArray[np.int64], Nk: int) -> Spans:
    """Return one span per row from int64 ends of the same shape, clipped to [0, Nk]."""
    out = np.empty((*lo.shape, 1, 2), dtype=np.int32)
    np.clip(lo, 0, Nk, out=out[..., 0, 0], casting="unsafe")
    np.clip(hi, 0, Nk, out=out[..., 0, 1], casting="unsafe")
    out[out[..., 1] <= out[..., 0]] = 0
    return out


def intersect(a: Spans, b: Spans) -> Spans:
    """Return the normalised intersection of two normalised spans."""
    lo = np.maximum(a[..., :, None, 0], b[..., None, :, 0])
    hi = np.minimum(a[..., :, None, 1], b[..., None, :, 1])
    pairs = np.stack((lo, hi), axis=-1)
    return normalise(pairs.reshape(*lo.shape[:-2], a.shape[-2] * b.shape[-2], 2))


def unite(a: Spans, b: Spans) -> Spans:
    """Return the normalised union of two normalised spans."""
    shape = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    parts = [np.broadcast_to(x, (*shape, *x.shape[-2:])) for x in (a, b)]
    return normalise(np.concatenate(parts, axis=-2))


def normalise(spans: Spans) -> Spans:
    """Sort each row's spans, merge those that overlap or touch, drop the empty ones."""
    used = spans[..., 0] < spans[..., 1]
    K = spans.shape[-2]
    if K == 1:
        return np.where(used[..., None], spans, np.int32(0))
    # One int64 per span sorts by lo; unused spans become (INT32_MAX, 0) and go last.
    keys = (spans[..., 0].astype(np.int64) << 32) | spans[..., 1]
    keys = np.where(used, keys, _INT32_MAX << 32).reshape(-1, K)
    keys.sort(axis=-1)
    lo = keys >> 32
    reach = np.maximum.accumulate(keys & 0xFFFFFFFF, axis=-1)
    used = lo < _INT32_MAX
    first = used.copy()
    first[:, 1:] &= lo[:, 1:] > reach[:, :-1]
    last = used.copy()
    last[:, :-1] &= first[:, 1:] | ~used[:, 1:]
    count = np.count_nonzero(first, axis=-1)
    width = max(1, int(count.max(initial=0)))
    out = np.zeros((len(keys), width, 2), dtype=np.int32)
    # Row by row, the taken slots come in the order in which a boolean index lists the ends.
    taken = np.arange(width) < count[:, None]
    out[taken, 0] = lo[first]
    out[taken, 1] = reach[last]
    return out.reshape(*spans.shape[:-2], width, 2)


def spans_to_bool(spans: Spans, Nk: int) -> BoolArray:
    """Return `(Bm, Hm, n, Nk)` booleans of spans `(Bm, Hm, n, K, 2)`."""
    keys = np.arange(Nk, dtype=np.int32)
    out = np.zeros((*spans.shape[:-2], Nk), dtype=np.bool_)
    for k in range(spans.shape[-2]):
        out |= (keys >= spans[..., k, :1]) & (keys < spans[..., k, 1:])
    return out


def bool_to_spans(block: BoolArray) -> Spans | None:
    """Return the runs of True in each row as normalised spans, or None if a row has over two."""
    starts, ends = block.copy(), block.copy()
    starts[..., 1:] &= ~block[..., :-1]
    ends[..., :-1] &= ~block[..., 1:]
    count = np.count_nonzero(starts, axis=-1)
    if count.max(initial=0) > 2:
        return None
    out = np.zeros((*block.shape[:-1], 2, 2), dtype=np.int32)
    # Row by row, the taken slots come in the order in which nonzero lists the runs.
    taken = np.arange(2) < count[..., None]
    out[taken, 0] = np.nonzero(starts)[-1]
    out[taken, 1] = np.nonzero(ends)[-1] + 1
    return out


def to_intervals(mask: Mask, size: Size) -> RowIntervals | None:
    """Return the mask as row intervals, or None if some row needs more than two."""
    Bm, Hm = mask.extent(size)
    rows = np.zeros((Bm, Hm, size.N, 4), dtype=np.int32)
    fits = _rows_from_spans(rows, mask, size)
    if fits is None:
        fits = _rows_from_runs(rows, mask, size)
    rows.setflags(write=False)
    return RowIntervals(rows) if fits else None


def _rows_from_spans(rows: NDArray[np.int32], mask: Mask, size: Size) -> bool | None:
    """Fill `rows`; return whether every row fits, or None where spans cannot tell."""
    for block in size.blocks(_span_block_rows(rows)):
        spans = mask.spans(size, block)
        if spans is None:
            return None
        K = spans.shape[-2]
        if K > 2:  # normalised spans are no wider than their fullest row
            return False
        rows[:, :, block, : 2 * K] = spans.reshape(*spans.shape[:3], 2 * K)
    return True


def _rows_from_runs(rows: NDArray[np.int32], mask: Mask, size: Size) -> bool:
    for block in size.blocks(_bool_block_rows(rows, size)):
        spans = bool_to_spans(mask.visible(size, block))
        if spans is None:
            return False
        rows[:, :, block] = spans.reshape(*spans.shape[:3], 4)
    return True


def to_bits(mask: Mask, size: Size) -> PackedBits:
    """Return the mask as packed bits, made block by block so that the bits are the peak memory."""
    Bm, Hm = mask.extent(size)
    bits = np.zeros((Bm, Hm, size.Nk, -(-size.N // QUERY_TILE)), dtype=np.uint16)
    if not _bits_from_spans(bits, mask, size):
        for block in size.blocks(_bool_block_rows(bits, size)):
            bits[..., _words(block)] = _pack(mask.visible(size, block)).swapaxes(2, 3)
    edges = np.arange(0, size.Nk, KEY_TILE)
    some = np.bitwise_or.reduceat(bits, edges, axis=2) != 0
    full = np.bitwise_and.reduceat(bits, edges, axis=2) == 0xFFFF
    tiles = np.ascontiguousarray(np.add(some, full, dtype=np.uint8).swapaxes(2, 3))
    bits.setflags(write=False)
    tiles.setflags(write=False)
    return PackedBits(bits, tiles)


def _bits_from_spans(bits: NDArray[np.uint16], mask: Mask, size: Size) -> bool:
    """Flip one bit where a span begins or ends, then xor along the keys; False if no spans."""
    for block in size.blocks(_span_block_rows(bits)):
        spans = mask.spans(size, block)
        if spans is None:
            return False
        words = _words(block)
        row = np.arange(words.start * QUERY_TILE, words.stop * QUERY_TILE)
        spans = spans[:, :, np.minimum(row, size.N - 1) - block.start]
        b, h, i, k, end = np.nonzero((spans[..., :1] < spans[..., 1:]) & (spans < size.Nk))
        flips = np.left_shift(1, row[i] % QUERY_TILE).astype(np.uint16)
        at = (b, h, spans[b, h, i, k, end], row[i] // QUERY_TILE)
        np.bitwise_xor.at(bits, at, flips)
    np.bitwise_xor.accumulate(bits, axis=2, out=bits)
    return True


def _words(block: slice) -> slice:
    return slice(block.start // QUERY_TILE, -(-block.stop // QUERY_TILE))


def _pack(block: BoolArray) -> NDArray[np.uint16]:
    """Return `(Bm, Hm, ceil(n/16), Nk)` words; rows missing from the last repeat the last row."""
    Bm, Hm, n, Nk = block.shape
    missing = -n % QUERY_TILE
    if missing:
        tail = np.broadcast_to(block[:, :, -1:], (Bm, Hm, missing, Nk))
        block = np.concatenate((block, tail), axis=2)
    octets = np.packbits(block, axis=2, bitorder="little").astype(np.uint16)
    words: NDArray[np.uint16] = octets[:, :, 0::2] | (octets[:, :, 1::2] << np.uint16(8))
    return words


def _span_block_rows(result: NDArray[np.generic]) -> int:
    Bm, Hm = result.shape[:2]
    return SPAN_BLOCK_ROWS // max(1, int(Bm * Hm))


def _bool_block_rows(result: NDArray[np.generic], size: Size) -> int:
    Bm, Hm = result.shape[:2]
    return BOOL_BLOCK_BYTES // max(1, int(Bm * Hm) * size.Nk)


class Mask(ABC):
    """Which keys each query sees. Immutable; made by `causal`, `window`, ..., `dense`.

    ``a & b`` lets a query see what both let it see, ``a | b`` what either does. Equality is
    structural: the same construction with the same data.
    """

    # Makes ``ndarray & mask`` reach __rand__ instead of being spread over the array's elements.
    __array_ufunc__: ClassVar[None] = None

    def lower(
        self, B: int, H: int, N: int, Nk: int, *, operator: str = "attention"
    ) -> RowIntervals | PackedBits:
        """Return the form that kernels read, for one problem size.

        The result is `RowIntervals` exactly when every row has at most two intervals. Its arrays
        are read-only, shared between calls, and `(Bm, Hm, ...)` with Bm in {1, B}, Hm in {1, H}.

        Args:
            B: batch size.
            H: query heads.
            N: queries.
            Nk: keys, below 2**31.
            operator: the name that error messages start with.

        Raises:
            ValueError: the mask's data does not fit the sizes.
        """
        size = Size(B, H, N, Nk, operator)
        size.check()
        cached = self.scalar and N <= _CACHE_ROWS
        rows = _cached_intervals(self, N, Nk) if cached else None
        if rows is not None:
            return rows
        self.check(size)
        memo: tuple[tuple[int, ...], RowIntervals | PackedBits] | None = self.__dict__.get("_memo")
        if memo is None or memo[0] != (B, H, N, Nk):
            rows = None if cached else to_intervals(self, size)
            memo = (B, H, N, Nk), rows or to_bits(self, size)
            self.__dict__["_memo"] = memo
        return memo[1]

    def to_bool(self, B: int, H: int, N: int, Nk: int, *, operator: str = "attention") -> BoolArray:
        """Return `(Bm, Hm, N, Nk)` booleans: True where the query sees the key. O(N Nk)."""
        size = Size(B, H, N, Nk, operator)
        size.check()
        self.check(size)
        return self.visible(size, slice(0, N))

    @property
    def scalar(self) -> bool:
        """Whether the mask holds no arrays, so that it is the same for every batch and head."""
        return True

    def check(self, size: Size) -> None:  # noqa: B027, most patterns fit every size
        """Raise where the mask's data does not fit the sizes."""

    def extent(self, size: Size) -> tuple[int, int]:
        """Return (Bm, Hm): over how many batch entries and heads the mask differs."""
        return 1, 1

    @abstractmethod
    def spans(self, size: Size, rows: slice) -> Spans | None:
        """Return normalised spans of some rows, or None where that would take too many."""

    @abstractmethod
    def text(self, show: Show) -> str:
        """Return the expression that makes the mask, with what `show` writes for its arrays."""

    def __repr__(self) -> str:
        return self.text(repr)

    def visible(self, size: Size, rows: slice) -> BoolArray:
        """Return some rows as booleans `(Bm, Hm, n, Nk)`."""
        spans = self.spans(size, rows)
        if spans is None:
            raise NotImplementedError(f"{type(self).__name__} needs its own visible()")
        return spans_to_bool(spans, size.Nk)

    def __and__(self, other: Mask) -> Mask:
        """Return the mask of keys seen by both."""
        return All(_terms(All, "&", self, other))

    def __or__(self, other: Mask) -> Mask:
        """Return the mask of keys seen by either."""
        return AnyOf(_terms(AnyOf, "|", self, other))

    def __rand__(self, other: object) -> NoReturn:
        """Raise: the left operand is no mask."""
        raise _not_a_mask("&", other)

    def __ror__(self, other: object) -> NoReturn:
        """Raise: the left operand is no mask."""
        raise _not_a_mask("|", other)

    def __bool__(self) -> bool:
        """Raise: ``a and b`` would silently drop a mask."""
        raise TypeError("mask: a mask has no truth value; combine masks with & and |")

    def __getstate__(self) -> dict[str, object]:
        """Return the fields alone, so that copies and pickles carry no other form of the mask."""
        return {name: value for name, value in self.__dict__.items() if name[0] != "_"}


@lru_cache(maxsize=_CACHE_RESULTS)
def _cached_intervals(mask: Mask, N: int, Nk: int) -> RowIntervals | None:
    return to_intervals(mask, Size(1, 1, N, Nk, "mask"))


def _not_a_mask(symbol: str, other: object) -> TypeError:
    hint = " (wrap a boolean array in dense())" if isinstance(other, np.ndarray) else ""
    requirement = f"both be masks{hint}"
    return type_error("mask", f"operands of {symbol}", requirement, type(other).__name__)


def _terms(kind: type[All] | type[AnyOf], symbol: str, a: Mask, b: object) -> tuple[Mask, ...]:
    """Return the operands with nested expressions of the same kind opened up."""
    if not isinstance(b, Mask):
        raise _not_a_mask(symbol, b)
    return tuple(t for m in (a, b) for t in (m.terms if isinstance(m, kind) else (m,)))


@dataclass(frozen=True, repr=False)
class Combined(Mask):
    """Two or more masks under one operation; never nested in itself."""

    terms: tuple[Mask, ...]

    @property
    def scalar(self) -> bool:
        return all(term.scalar for term in self.terms)

    def check(self, size: Size) -> None:
        for term in self.terms:
            term.check(size)

    def extent(self, size: Size) -> tuple[int, int]:
        Bm, Hm = np.broadcast_shapes(*(term.extent(size) for term in self.terms))
        return Bm, Hm

    @abstractmethod
    def combine(self, a: Spans, b: Spans) -> Spans:
        """Return the normalised combination of two normalised spans."""

    def spans(self, size: Size, rows: slice) -> Spans | None:
        result = self.terms[0].spans(size, rows)
        for term in self.terms[1:]:
            more = None if result is None else term.spans(size, rows)
            if result is None or more is None:
                return None
            result = self.combine(result, more)
            if result.shape[-2] > MAX_SPANS:
                return None
        return result


@dataclass(frozen=True, repr=False)
class All(Combined):
    """Keys that every term lets a query see."""

    def combine(self, a: Spans, b: Spans) -> Spans:
        return intersect(a, b)

    def visible(self, size: Size, rows: slice) -> BoolArray:
        return reduce(_operator.and_, (term.visible(size, rows) for term in self.terms))

    def text(self, show: Show) -> str:
        shown = [(t.text(show), isinstance(t, AnyOf)) for t in self.terms]
        return " & ".join([f"({text})" if nested else text for text, nested in shown])


@dataclass(frozen=True, repr=False)
class AnyOf(Combined):
    """Keys that at least one term lets a query see."""

    def combine(self, a: Spans, b: Spans) -> Spans:
        return unite(a, b)

    def visible(self, size: Size, rows: slice) -> BoolArray:
        return reduce(_operator.or_, (term.visible(size, rows) for term in self.terms))

    def text(self, show: Show) -> str:
        return " | ".join([term.text(show) for term in self.terms])
