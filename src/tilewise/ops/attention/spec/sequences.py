"""Sequences that are packed one after another: where they begin, and what each of them sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.errors import type_error, value_error
from tilewise.base.masks import Mask, RowIntervals

from .arguments import PACKED_NAME

Int64 = NDArray[np.int64]
_CACHED_MASKS = 4
_CACHED_BOUNDARIES = 8
_HINT = "sequences are given by cu_seqlens; to hide single pairs, add a bias of -inf"


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Where S packed sequences begin.

    Attributes:
        q_starts: `(S + 1,)`, int64, ascending from 0 to total_q.
        k_starts: `(S + 1,)`, int64, ascending from 0 to total_k.
    """

    q_starts: Int64
    k_starts: Int64

    def __len__(self) -> int:
        """Return S."""
        return len(self.q_starts) - 1

    @property
    def max_k(self) -> int:
        """Return the number of keys of the longest sequence."""
        return int(np.diff(self.k_starts).max(initial=0))

    def slices(self) -> list[tuple[slice, slice]]:
        """Return the queries and the keys of each sequence."""
        queries = [slice(*ends) for ends in pairwise(self.q_starts.tolist())]
        keys = [slice(*ends) for ends in pairwise(self.k_starts.tolist())]
        return list(zip(queries, keys, strict=True))


def sequences_of(cu_q: object, cu_k: object, total_q: int, total_k: int) -> Sequences:
    """Return checked boundaries of packed sequences.

    Args:
        cu_q: `(S + 1,)` integers: sequence s has the queries from `cu_q[s]` to `cu_q[s + 1]`.
        cu_k: The same for keys, or None where they are those of the queries.
        total_q: Queries of all sequences.
        total_k: Keys of all sequences.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape or value.
    """
    q_starts = _boundaries("cu_seqlens_q", cu_q, "total_q", total_q)
    if cu_k is None:
        if total_k != total_q:
            requirement = f"be given where total_k={total_k} is not total_q={total_q}"
            raise value_error(PACKED_NAME, "cu_seqlens_k", requirement, "None")
        return Sequences(q_starts, q_starts)
    k_starts = _boundaries("cu_seqlens_k", cu_k, "total_k", total_k)
    if k_starts.shape != q_starts.shape:
        requirement = f"have {q_starts.size} entries (as cu_seqlens_q)"
        raise value_error(PACKED_NAME, "cu_seqlens_k", requirement, str(k_starts.size))
    return Sequences(q_starts, k_starts)


def lowered_per_sequence(mask: object, sequences: Sequences) -> RowIntervals:
    """Return what each query sees of its own sequence, as `(1, 1, total_q, 4)` intervals.

    Args:
        mask: A mask that depends on nothing but the numbers of queries and keys.
        sequences: The boundaries.

    Raises:
        TypeError: For anything else than a mask.
        ValueError: The mask has arrays, or more than two intervals in a row.
    """
    known = check_mask(mask)
    rows = _rows(known, sequences.q_starts.tobytes(), sequences.k_starts.tobytes())
    if rows is None:
        requirement = f"need at most two intervals of keys per query ({_HINT})"
        raise value_error(PACKED_NAME, "mask", requirement, repr(mask))
    return rows


def check_mask(mask: object) -> Mask:
    """Return a mask that depends on nothing but the numbers of queries and keys, or raise."""
    if not isinstance(mask, Mask):
        requirement = f"be a tilewise mask ({_HINT})"
        raise type_error(PACKED_NAME, "mask", requirement, type(mask).__name__)
    if not mask.scalar:
        requirement = f"be made of causal, window, prefix and chunked, without arrays ({_HINT})"
        raise value_error(PACKED_NAME, "mask", requirement, repr(mask))
    return mask


@lru_cache(maxsize=_CACHED_MASKS)
def _rows(mask: Mask, q_starts: bytes, k_starts: bytes) -> RowIntervals | None:
    """Lower the mask for few longer sequences, and cut out of these what each one sees."""
    q, k = np.frombuffer(q_starts, np.int64), np.frombuffer(k_starts, np.int64)
    lengths, keys = np.diff(q), np.diff(k)
    index = np.arange(q[-1]) - np.repeat(q[:-1], lengths)
    shift, most = np.repeat(keys - lengths, lengths), np.repeat(keys, lengths)
    rows = np.empty((len(index), 4), np.int32)
    most_keys, aligned = int(keys.max(initial=0)), _alignments(mask)
    parts: list[tuple[Any, Int64, int, int]]
    if aligned <= {"bottom_right"}:
        # All that such a mask knows of a query is its position among the keys, index + shift.
        position = index + shift
        first = int(position.min(initial=0))
        parts = [(slice(None), position - first, most_keys - first, most_keys)]
    elif aligned == {"top_left"}:
        parts = [(slice(None), index, int(lengths.max(initial=0)), most_keys)]
    else:
        parts = []
        for d in np.unique(shift).tolist():
            where = np.flatnonzero(shift == d)
            N = int(index[where].max()) + 1
            parts.append((where, index[where], N, N + d))
    for where, at, N, Nk in parts:
        lowered = mask.lower(1, 1, N, Nk, operator=PACKED_NAME)
        if not isinstance(lowered, RowIntervals):
            return None
        rows[where] = lowered.rows[0, 0, at]
    np.minimum(rows, most[:, None], out=rows, casting="unsafe")
    rows[:, :2][rows[:, 0] >= rows[:, 1]] = 0
    rows[:, 2:][rows[:, 2] >= rows[:, 3]] = 0
    rows.setflags(write=False)
    return RowIntervals(rows[None, None])


def _alignments(mask: Mask) -> set[str]:
    """Return how the parts of a mask place the queries among the keys."""
    terms: tuple[Mask, ...] | None = getattr(mask, "terms", None)
    if terms is not None:
        return set().union(*map(_alignments, terms))
    align: str | None = getattr(mask, "align", None)
    return set() if align is None else {align}


def _boundaries(name: str, value: object, dim: str, total: int) -> Int64:
    if value is None:
        raise type_error(PACKED_NAME, name, "be given", "None")
    array: NDArray[Any] = np.asarray(value)
    if isinstance(value, list | tuple) and not array.size:
        array = array.astype(np.int64)
    if array.dtype not in (np.int32, np.int64):
        raise type_error(PACKED_NAME, name, "be int32 or int64", str(array.dtype))
    if array.ndim != 1 or not array.size:
        raise value_error(PACKED_NAME, name, "have shape (S + 1,)", array.shape)
    cu = array.astype(np.int64)
    if cu[0] != 0:
        raise value_error(PACKED_NAME, name, "start at 0", int(cu[0]))
    falls = np.flatnonzero(np.diff(cu) < 0)
    if falls.size:
        got = f"{cu[falls[0]]} followed by {cu[falls[0] + 1]}"
        raise value_error(PACKED_NAME, name, "be non-decreasing", got)
    if cu[-1] != total:
        raise value_error(PACKED_NAME, name, f"end at {dim}={total}", int(cu[-1]))
    return _shared(cu.tobytes())


@lru_cache(maxsize=_CACHED_BOUNDARIES)
def _shared(boundaries: bytes) -> Int64:
    """Return one array for all calls with the same boundaries: a device keeps what it is sent."""
    return np.frombuffer(boundaries, np.int64)
