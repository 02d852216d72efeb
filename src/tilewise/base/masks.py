"""Masks: which keys each query sees, as an algebra that lowers to row intervals.

A mask is a value: it knows no sizes until it is lowered for a problem `(B, H, N, Nk)`. Masks
combine with ``&`` (seen by both) and ``|`` (seen by either). Most patterns need at most two key
intervals per query and lower to `RowIntervals` in O(N); everything else becomes `PackedBits`.
Pictures and formulas are in docs/masks.md.
"""

from __future__ import annotations

import operator as _operator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewise.base._held import Frozen, Held, Traced, held, is_traced, values_of
from tilewise.base._lowering import (
    MAX_SPANS,
    BoolArray,
    Mask,
    PackedBits,
    RowIntervals,
    Show,
    Size,
    Spans,
    bool_to_spans,
    interval,
)
from tilewise.base.errors import type_error, value_error

__all__ = [
    "Align",
    "Mask",
    "PackedBits",
    "RowIntervals",
    "as_mask",
    "causal",
    "chunked",
    "dense",
    "documents",
    "lengths",
    "prefix",
    "sink_tokens",
    "window",
]

Align: TypeAlias = Literal["bottom_right", "top_left"]


@dataclass(frozen=True, repr=False)
class _Window(Mask):
    left: int | None
    right: int | None
    align: Align

    def spans(self, size: Size, rows: slice) -> Spans:
        position = _positions(size, rows, self.align)
        far = size.N + size.Nk  # beyond this, an end is as good as unbounded, and fits int64
        lo = position - min(far, far if self.left is None else self.left)
        hi = position + min(far, far if self.right is None else self.right) + 1
        return interval(lo, hi, size.Nk)

    def text(self, show: Show) -> str:
        if self.left is None and self.right == 0:
            return f"causal({_shown(self.align, first=True)})"
        ends = ["None" if end is None else f"{int(end)}" for end in (self.left, self.right)]
        return f"window({ends[0]}, {ends[1]}{_shown(self.align)})"


@dataclass(frozen=True, repr=False)
class _Chunked(Mask):
    size: int
    align: Align

    def spans(self, size: Size, rows: slice) -> Spans:
        length = min(self.size, max(1, size.N + size.Nk))
        start = _positions(size, rows, self.align) // length * length
        return interval(start, start + length, size.Nk)

    def text(self, show: Show) -> str:
        return f"chunked({int(self.size)}{_shown(self.align)})"


@dataclass(frozen=True, repr=False)
class _Prefix(Mask):
    n: int | Held

    @property
    def scalar(self) -> bool:
        return isinstance(self.n, int)

    def check(self, size: Size) -> None:
        if not isinstance(self.n, int):
            _check_per_batch(size, "prefix", self.n)

    def extent(self, size: Size) -> tuple[int, int]:
        return (1, 1) if isinstance(self.n, int) else (size.B, 1)

    def spans(self, size: Size, rows: slice) -> Spans:
        n = np.asarray([min(self.n, size.Nk)]) if isinstance(self.n, int) else self.n.ints
        hi = np.repeat(n[:, None, None], rows.stop - rows.start, axis=2)
        return interval(np.zeros_like(hi), hi, size.Nk)

    def text(self, show: Show) -> str:
        # int() makes a constant of what torch.compile takes for a variable number.
        return f"prefix({int(self.n)})" if isinstance(self.n, int) else f"prefix({show(self.n)})"


@dataclass(frozen=True, repr=False)
class _Lengths(Mask):
    keys: Held
    queries: Held | None

    @property
    def scalar(self) -> bool:
        return False

    def check(self, size: Size) -> None:
        _check_per_batch(size, "lengths", self.keys, f"Nk={size.Nk}", size.Nk)
        if self.queries is not None:
            _check_per_batch(size, "query_lengths", self.queries, f"N={size.N}", size.N)

    def extent(self, size: Size) -> tuple[int, int]:
        return size.B, 1

    def spans(self, size: Size, rows: slice) -> Spans:
        hi = np.repeat(self.keys.ints[:, None, None], rows.stop - rows.start, axis=2)
        if self.queries is not None:
            index = np.arange(rows.start, rows.stop)
            hi = np.where(index < self.queries.ints[:, None, None], hi, 0)
        return interval(np.zeros_like(hi), hi, size.Nk)

    def text(self, show: Show) -> str:
        keys = show(self.keys)
        queries = "" if self.queries is None else f", query_lengths={show(self.queries)}"
        return f"lengths({keys}{queries})"


@dataclass(frozen=True, repr=False)
class _Packed(Mask):
    """Documents given by their boundaries."""

    cu_seqlens: Held
    cu_seqlens_k: Held | None

    @property
    def scalar(self) -> bool:
        return False

    def check(self, size: Size) -> None:
        ends = [("cu_seqlens", self.cu_seqlens, "N", size.N, "")]
        if self.cu_seqlens_k is None:
            ends.append(
                ("cu_seqlens", self.cu_seqlens, "Nk", size.Nk, " too, or give cu_seqlens_k")
            )
        else:
            ends.append(("cu_seqlens_k", self.cu_seqlens_k, "Nk", size.Nk, ""))
        for name, cu, dim, length, more in ends:
            if isinstance(cu, Frozen) and cu.ints[-1] != length:
                requirement = f"end at {dim}={length}{more}"
                raise value_error(size.operator, f"mask {name}", requirement, int(cu.ints[-1]))

    def spans(self, size: Size, rows: slice) -> Spans:
        index = np.arange(rows.start, rows.stop)
        document = np.searchsorted(self.cu_seqlens.ints, index, side="right") - 1
        cu_k = (self.cu_seqlens_k or self.cu_seqlens).ints
        return interval(cu_k[document][None, None], cu_k[document + 1][None, None], size.Nk)

    def text(self, show: Show) -> str:
        queries = show(self.cu_seqlens)
        keys = "" if self.cu_seqlens_k is None else f", cu_seqlens_k={show(self.cu_seqlens_k)}"
        return f"documents({queries}{keys})"


@dataclass(frozen=True, repr=False)
class _Labelled(Mask):
    """Documents given by one id per token."""

    ids: Held
    ids_k: Held | None

    @property
    def scalar(self) -> bool:
        return False

    @property
    def _pair(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids, ids_k = self.ids.ints, (self.ids_k or self.ids).ints
        return np.atleast_2d(ids), np.atleast_2d(ids_k)

    def check(self, size: Size) -> None:
        given = [("ids", self.ids, "N", size.N, "")]
        if self.ids_k is None:
            given.append(("ids", self.ids, "Nk", size.Nk, ", or give ids_k"))
        else:
            given.append(("ids_k", self.ids_k, "Nk", size.Nk, ""))
        for name, ids, dim, length, more in given:
            shape = ids.array.shape
            if shape not in ((length,), (size.B, length)):
                requirement = f"have shape ({dim},) or (B, {dim}) with B={size.B}, {dim}={length}"
                raise value_error(size.operator, f"mask {name}", requirement + more, shape)

    def extent(self, size: Size) -> tuple[int, int]:
        per_batch = self.ids.array.ndim == 2 or (self.ids_k or self.ids).array.ndim == 2
        return (size.B if per_batch else 1), 1

    def spans(self, size: Size, rows: slice) -> Spans | None:
        ids, ids_k = self._pair
        batch = self.extent(size)[0]
        out = np.zeros((batch, 1, rows.stop - rows.start, MAX_SPANS, 2), dtype=np.int32)
        most = 1
        for b in range(batch):
            runs, starts, ends = _runs_by_id(ids_k[b % len(ids_k)])
            wanted = ids[b % len(ids), rows]
            first = np.searchsorted(runs, wanted, side="left")
            count = np.searchsorted(runs, wanted, side="right") - first
            most = max(most, int(count.max(initial=0)))
            if most > MAX_SPANS:
                return None
            for k in range(int(count.max(initial=0))):
                has = count > k
                out[b, 0, has, k, 0] = starts[first[has] + k]
                out[b, 0, has, k, 1] = ends[first[has] + k]
        return out[..., :most, :]

    def visible(self, size: Size, rows: slice) -> BoolArray:
        ids, ids_k = self._pair
        same: BoolArray = ids[:, rows, None] == ids_k[:, None, :]
        return same[:, None]

    def text(self, show: Show) -> str:
        queries = show(self.ids)
        keys = "" if self.ids_k is None else f", ids_k={show(self.ids_k)}"
        return f"documents(ids={queries}{keys})"


@dataclass(frozen=True, repr=False)
class _Dense(Mask):
    array: Held

    @property
    def full(self) -> BoolArray:
        array = self.array.known.view(np.bool_)
        return array.reshape((1,) * (4 - array.ndim) + array.shape)

    @property
    def scalar(self) -> bool:
        return False

    def check(self, size: Size) -> None:
        check_dense(size, self.array.array.shape)

    def extent(self, size: Size) -> tuple[int, int]:
        return self.full.shape[0], self.full.shape[1]

    def spans(self, size: Size, rows: slice) -> Spans | None:
        if self.full.shape[2] == 1:  # one row for all queries, such as a key padding mask
            one = bool_to_spans(np.broadcast_to(self.full, (*self.full.shape[:3], size.Nk)))
            return None if one is None else np.repeat(one, rows.stop - rows.start, axis=2)
        return None

    def visible(self, size: Size, rows: slice) -> BoolArray:
        block = self.full if self.full.shape[2] == 1 else self.full[:, :, rows]
        return np.broadcast_to(block, (*block.shape[:2], rows.stop - rows.start, size.Nk)).copy()

    def text(self, show: Show) -> str:
        return f"dense({show(self.array)})"


def causal(*, align: Align = "bottom_right") -> Mask:
    """Return the mask of keys up to the query's own position: `j <= position(i)`.

    Args:
        align: "bottom_right" puts query i at position `i + Nk - N`, so that the last query sees
            the last key; "top_left" puts it at position i.
    """
    return _Window(None, 0, _alignment("causal", align))


def window(left: int | None, right: int | None, *, align: Align = "bottom_right") -> Mask:
    """Return the mask of keys near the query: `position - left <= j <= position + right`.

    Args:
        left: how many keys before the position are seen; None for all.
        right: how many keys after the position are seen; None for all.
        align: see `causal`.
    """
    ends = [
        None if reach is None else _count("window", name, reach)
        for name, reach in (("left", left), ("right", right))
    ]
    return _Window(ends[0], ends[1], _alignment("window", align))


def prefix(n: int | ArrayLike) -> Mask:
    """Return the mask of the first n keys, `j < n`.

    With a causal mask, ``causal() | prefix(n)``, it makes a prefix language model.

    Args:
        n: an integer, or `(B,)` integers. More than Nk means all keys.
    """
    if isinstance(n, int) or np.ndim(n) == 0:
        return _Prefix(_count("prefix", "n", n))
    return _Prefix(_counts("prefix", "n", n))


def sink_tokens(n: int) -> Mask:
    """Return the mask of the first n keys, kept beside a window.

    Written ``causal() & (window(256, 0) | sink_tokens(4))``. The same mask as `prefix`.

    Args:
        n: how many keys at the start stay visible.
    """
    return _Prefix(_count("sink_tokens", "n", n))


def chunked(size: int, *, align: Align = "bottom_right") -> Mask:
    """Return the mask of keys in the query's own chunk: `j // size == position // size`.

    Args:
        size: the chunk length, at least 1.
        align: see `causal`.
    """
    return _Chunked(_count("chunked", "size", size, least=1), _alignment("chunked", align))


def documents(
    cu_seqlens: ArrayLike | None = None,
    *,
    cu_seqlens_k: ArrayLike | None = None,
    ids: ArrayLike | None = None,
    ids_k: ArrayLike | None = None,
) -> Mask:
    """Return the mask of keys in the query's own document, for packed sequences.

    Give either boundaries or ids.

    Args:
        cu_seqlens: `(documents + 1,)` integers `0 <= ... <= N`: document d holds the queries from
            `cu_seqlens[d]` up to, not including, `cu_seqlens[d + 1]`.
        cu_seqlens_k: the same for keys, up to Nk. By default the queries' own, where N = Nk.
        ids: `(N,)` or `(B, N)` integers: a query sees the keys that have its id.
        ids_k: `(Nk,)` or `(B, Nk)` integers. By default the queries' own, where N = Nk.
    """
    if (cu_seqlens is None) == (ids is None):
        got = "neither" if ids is None else "both"
        raise type_error("documents", "arguments", "be either cu_seqlens or ids", got)
    for name, value, partner, given in (
        ("cu_seqlens_k", cu_seqlens_k, "cu_seqlens", cu_seqlens),
        ("ids_k", ids_k, "ids", ids),
    ):
        if value is not None and given is None:
            raise type_error("documents", name, f"come with {partner}", f"no {partner}")
    if cu_seqlens is not None:
        cu = _boundaries("cu_seqlens", cu_seqlens)
        cu_k = None if cu_seqlens_k is None else _boundaries("cu_seqlens_k", cu_seqlens_k)
        if cu_k is not None and cu_k.array.shape != cu.array.shape:
            requirement = f"have {cu.array.size} entries (as cu_seqlens)"
            raise value_error("documents", "cu_seqlens_k", requirement, cu_k.array.size)
        return _Packed(cu, cu_k)
    keys = None if ids_k is None else _labels("ids_k", ids_k)
    return _Labelled(_labels("ids", ids), keys)


def lengths(lengths: ArrayLike, *, query_lengths: ArrayLike | None = None) -> Mask:
    """Return the mask of each sequence's own keys, without padding: `j < lengths[b]`.

    Args:
        lengths: `(B,)` integers, 0 to Nk.
        query_lengths: `(B,)` integers, 0 to N: queries from there on see nothing.
    """
    queries = None
    if query_lengths is not None:
        queries = _counts("lengths", "query_lengths", query_lengths)
    return _Lengths(_counts("lengths", "lengths", lengths), queries)


def dense(array: ArrayLike) -> Mask:
    """Return the mask given by a boolean array: True where the query sees the key.

    Args:
        array: bool, broadcastable to `(B, H, N, Nk)` from the right.
    """
    values = values_of(array)
    if values.dtype != np.bool_:
        raise type_error("dense", "array", "have dtype bool", str(values.dtype))
    if values.ndim > 4:
        raise value_error("dense", "array", "have at most 4 dimensions", values.shape)
    return _Dense(held(values))


def as_mask(obj: object, operator: str) -> Mask:
    """Return `obj` itself if it is a mask, or the dense mask of a boolean array.

    Args:
        obj: what the user passed as `mask`.
        operator: the name that error messages start with.
    """
    if isinstance(obj, Mask):
        return obj
    requirement = "be a tilewise mask or a boolean array"
    if not isinstance(obj, np.ndarray):
        raise type_error(operator, "mask", requirement, type(obj).__name__)
    if obj.dtype != np.bool_:
        raise type_error(operator, "mask", requirement, f"an array of {obj.dtype}")
    if obj.ndim > 4:
        raise value_error(operator, "mask", "have at most 4 dimensions", obj.shape)
    return _Dense(Frozen(obj))


def check_dense(size: Size, shape: tuple[int, ...]) -> None:
    """Raise where a boolean array does not broadcast to `(B, H, N, Nk)`."""
    if len(shape) > 4:
        raise value_error(size.operator, "mask", "have at most 4 dimensions", shape)
    want = (size.B, size.H, size.N, size.Nk)
    if any(have not in (1, need) for have, need in zip(shape[::-1], want[::-1], strict=False)):
        requirement = f"be broadcastable to (B, H, N, Nk) = {want}"
        raise value_error(size.operator, "mask", requirement, shape)


def _positions(size: Size, rows: slice, align: Align) -> NDArray[np.int64]:
    """Return the positions of some queries among the keys, `(1, 1, n)`."""
    shift = size.Nk - size.N if align == "bottom_right" else 0
    return np.arange(rows.start + shift, rows.stop + shift, dtype=np.int64)[None, None]


def _runs_by_id(
    ids: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.intp], NDArray[np.intp]]:
    """Return ids, starts and ends of the runs of equal ids, sorted by id and then by start."""
    edges = np.flatnonzero(np.diff(ids)) + 1
    starts = np.concatenate(([0], edges)) if ids.size else edges
    ends = np.append(edges, ids.size) if ids.size else edges
    order = np.argsort(ids[starts], kind="stable")
    return ids[starts][order], starts[order], ends[order]


def _shown(align: Align, *, first: bool = False) -> str:
    if align == "bottom_right":
        return ""
    return f"{'' if first else ', '}align={align!r}"


def _alignment(function: str, align: Align) -> Align:
    if align not in get_args(Align):
        raise value_error(function, "align", "be 'bottom_right' or 'top_left'", repr(align))
    return align


def _count(function: str, name: str, value: object, *, least: int = 0) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise type_error(function, name, "be an integer", value)
    try:
        count = _operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise type_error(function, name, "be an integer", value) from None
    if count < least:
        raise value_error(function, name, f"be at least {least}", count)
    return count


def _integers(function: str, name: str, value: object) -> NDArray[np.int64]:
    array = values_of(value)
    if array.dtype.kind not in "iu" and array.size:
        raise type_error(function, name, "have an integer dtype", str(array.dtype))
    return array if is_traced(array) else array.astype(np.int64)


def _vector(function: str, name: str, value: object) -> NDArray[np.int64]:
    array = _integers(function, name, value)
    if array.ndim != 1:
        raise value_error(function, name, "have one dimension", array.shape)
    return array


def _counts(function: str, name: str, value: object) -> Held:
    array = _vector(function, name, value)
    if not is_traced(array) and array.size and array.min() < 0:
        raise value_error(function, name, "be at least 0", int(array.min()))
    return held(array)


def _boundaries(name: str, value: object) -> Held:
    cu = _vector("documents", name, value)
    if is_traced(cu):
        return Traced(cu)
    if not cu.size or cu[0] != 0:
        raise value_error("documents", name, "start at 0", int(cu[0]) if cu.size else "no entries")
    if (np.diff(cu) < 0).any():
        at = int(np.argmax(np.diff(cu) < 0))
        shown = f"{cu[at]} followed by {cu[at + 1]}"
        raise value_error("documents", name, "be non-decreasing", shown)
    return Frozen(cu)


def _labels(name: str, value: object) -> Held:
    ids = _integers("documents", name, value)
    if ids.ndim not in (1, 2):
        raise value_error("documents", name, "have one or two dimensions", ids.shape)
    return held(ids)


def _check_per_batch(
    size: Size, name: str, values: Held, bound: str = "", most: int | None = None
) -> None:
    """Raise unless there is one value per batch entry, none above `most`."""
    if values.array.shape != (size.B,):
        requirement = f"have shape (B,) with B={size.B}"
        raise value_error(size.operator, f"mask {name}", requirement, values.array.shape)
    if most is None or isinstance(values, Traced):
        return
    largest = int(values.ints.max(initial=0))
    if largest > most:
        raise value_error(size.operator, f"mask {name}", f"be at most {bound}", largest)
