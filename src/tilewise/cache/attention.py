"""Attention of queries to the keys that a cache holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tilewise.base._lowering import Show, Size, Spans, interval
from tilewise.base.dims import Sizes
from tilewise.base.dtypes import FloatDType, bfloat16
from tilewise.base.errors import Unsupported, type_error, unsupported
from tilewise.base.masks import Mask, PackedBits, RowIntervals, as_mask, causal, dense
from tilewise.base.operator import Implementation
from tilewise.dispatch import choose
from tilewise.ops.attention.spec import (
    BIAS,
    KEY,
    LIMITS,
    NAME,
    QUERY,
    SINKS,
    SLOPES,
    AttentionCall,
    AttentionOutputs,
    Paging,
    RowStats,
    Want,
    canonical,
)
from tilewise.ops.attention.spec.arguments import SCALE, SOFTCAP, shapes_in
from tilewise.ops.attention.spec.sequences import Sequences, lowered_per_sequence

from .kv_cache import KVCache, row_counts
from .pages import View

Array: TypeAlias = NDArray[Any]
Lowered: TypeAlias = RowIntervals | PackedBits


class Door:
    """How attention gets at what a cache stores: on the host as it is."""

    def array(self, stored: Any, dtype: str) -> Array:
        """Return an array of the call for what the memory of a cache stores, with its dtype."""
        if not isinstance(stored, np.ndarray):
            requirement = "be in the memory of the host where q is an array"
            raise type_error(NAME, "cache", requirement, f"one on {stored.device}")
        return typed(stored, dtype)

    def full(self, shape: tuple[int, ...], value: float, dtype: FloatDType) -> Any:
        """Return what results can be written to, full of a number."""
        return np.full(shape, value, dtype)


HOST = Door()


def attend(
    cache: KVCache,
    q: Any,
    k: Any = None,
    v: Any = None,
    *,
    sequences: Any = None,
    lengths: Any = None,
    layout: str = "bhnd",
    implementation: str | Implementation | None = None,
    want: Want | None = None,
    door: Door = HOST,
    **options: Any,
) -> tuple[AttentionCall, AttentionOutputs]:
    """Append keys and values to sequences, and let queries attend to all that these hold.

    Args:
        cache: The cache.
        q: `(B, H, N, D)`, dtype of the cache. The last query stands at the last key.
        k: `(B, Hk, N, D)`, or None where nothing is appended; also fewer or more keys than N.
        v: `(B, Hk, N, Dv)`.
        sequences: B ids, or one; all open sequences by default. Different ones if k is given.
        lengths: `(B,)` integers: how many rows of q, k and v are real. The others, behind them, are
            not appended, and their o is 0. All by default.
        layout: `"bhnd"`, or `"bnhd"` for tensors `(B, N, H, D)`.
        implementation: Name of the implementation, or None for the first that serves the call; or
            an implementation itself.
        want: Which statistics to return.
        door: How to get at the memory of the cache.
        **options: mask, bias `(B, H, N, max_k)`, alibi_slopes, softcap, sinks and softmax_scale.

    Returns:
        The checked call without its mask, and what a forward pass returns.

    Raises:
        Unsupported: Dropout is asked for, or the named implementation does not serve the call.
        OutOfPages: There are not enough free pages.
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
    """
    if not isinstance(cache, KVCache):
        raise type_error(NAME, "cache", "be a tilewise.KVCache", type(cache).__name__)
    if options.pop("dropout_p", 0.0) != 0.0 or options.pop("seed", None) is not None:
        raise unsupported(NAME, "dropout with a cache, which is for inference; leave it out")
    with _visible(cache, k, v, sequences, lengths, layout) as view:
        cached = _checked(cache, door, view, q, lengths, layout, options)
        return cached.call, _forward(cached, implementation, want or Want())


def refuse_without_cache(sequences: Any, lengths: Any) -> None:
    """Raise where an argument is given that means nothing without a cache."""
    for name, value in (("sequences", sequences), ("lengths", lengths)):
        if value is not None:
            raise type_error(NAME, name, "come with cache", "no cache")


@contextmanager
def _visible(
    cache: KVCache, k: Any, v: Any, sequences: Any, lengths: Any, layout: str
) -> Iterator[View]:
    if (k is None) != (v is None):
        missing = "k" if k is None else "v"
        raise type_error(NAME, missing, "be given where the other of k and v is", "None")
    if k is None:
        yield cache._view(NAME, sequences)
    else:
        with cache._appending(NAME, sequences, k, v, lengths, layout) as view:
            yield view


@dataclass(frozen=True, slots=True)
class _Cached:
    """A checked call over the keys of a cache.

    Attributes:
        call: The call, with the pools as k and v, and without its mask.
        cache: The cache.
        door: How to get at its memory.
        view: The sequences.
        rows: How many queries of each sequence are real.
        mask: A mask, a boolean array of 4 dimensions, or None.
    """

    call: AttentionCall
    cache: KVCache
    door: Door
    view: View
    rows: list[int]
    mask: Mask | Array | None

    @property
    def is_full(self) -> bool:
        """Return whether all queries are real."""
        return all([rows == self.call.N for rows in self.rows])

    @property
    def is_shared(self) -> bool:
        """Return whether the mask knows of a sequence no more than its sizes."""
        return self.mask is None or (isinstance(self.mask, Mask) and self.mask.scalar)

    def sizes(self) -> list[tuple[int, int, int]]:
        """Return of each sequence its real queries, its keys and how many of these are evicted."""
        view = self.view
        return list(zip(self.rows, view.lengths.tolist(), view.hidden.tolist(), strict=True))


def _checked(
    cache: KVCache,
    door: Door,
    view: View,
    q: Any,
    lengths: Any,
    layout: str,
    options: dict[str, Any],
) -> _Cached:
    found = cache._words(NAME, "q", q), cache.k, cache.v
    q, k, v = (door.array(stored, cache.dtype) for stored in found)
    B, Nk = len(view.lengths), int(view.lengths.max(initial=0))
    sizes = Sizes(NAME, LIMITS)
    sizes.bind("B", B, "sequences")
    q = QUERY.check(NAME, q, sizes, shapes_in(layout)["q"], q.dtype)
    sizes.match("cache", KEY.shapes, (B, k.shape[1], Nk, k.shape[3]))
    mask = _mask(options.pop("mask", None), sizes)
    q = canonical(q, layout)
    _, H, N, D = q.shape
    mask = None if N == 1 and mask == _CAUSAL else mask
    call = AttentionCall(
        q=q,
        k=k,
        v=v,
        mask=None,
        layout=layout,
        B=B,
        H=H,
        Hk=k.shape[1],
        N=N,
        Nk=Nk,
        D=D,
        Dv=v.shape[3],
        dtype=q.dtype,
        paging=Paging(view.block_table(), view.lengths),
        **_numbers(sizes, q.dtype, **options),
    )
    return _Cached(call, cache, door, view, row_counts(NAME, lengths, B, N), mask)


def _numbers(
    sizes: Sizes,
    dtype: FloatDType,
    bias: Any = None,
    alibi_slopes: Any = None,
    softcap: Any = None,
    sinks: Any = None,
    softmax_scale: Any = None,
) -> dict[str, Any]:
    """Return the checked options that are arrays of numbers or numbers."""
    if bias is not None:
        bias = BIAS.check(NAME, bias, sizes, BIAS.shapes, dtype)
        bias = bias[(None,) * (4 - bias.ndim)]
    if alibi_slopes is not None:
        alibi_slopes = SLOPES.check(NAME, alibi_slopes, sizes, SLOPES.shapes, dtype)
        alibi_slopes = np.broadcast_to(alibi_slopes, (sizes["B"], sizes["H"]))
    if sinks is not None:
        sinks = SINKS.check(NAME, sinks, sizes, SINKS.shapes, dtype)
    scale = sizes["D"] ** -0.5 if softmax_scale is None else SCALE.check(NAME, softmax_scale)
    return {
        "bias": bias,
        "bias_shape": None if bias is None else bias.shape,
        "alibi_slopes": alibi_slopes,
        "softcap": None if softcap is None else SOFTCAP.check(NAME, softcap),
        "sinks": sinks,
        "softmax_scale": scale,
    }


def _mask(mask: Any, sizes: Sizes) -> Mask | Array | None:
    if mask is None or isinstance(mask, Mask):
        return mask
    as_mask(mask, NAME)
    sizes.match_broadcast("mask", ("B", "H", "N", "Nk"), mask.shape)
    whole: Array = mask[(None,) * (4 - mask.ndim)]
    return whole


def typed(stored: Array, dtype: str) -> Array:
    """Return stored words as an array of their dtype."""
    return stored.view(bfloat16(NAME)) if dtype == "bfloat16" else stored


def _forward(
    cached: _Cached, implementation: str | Implementation | None, want: Want
) -> AttentionOutputs:
    """Compute all sequences from the pages themselves, or one after the other from copies."""
    call = _paged(cached)
    paged = None if call is None else _that_serves(call, implementation)
    if call is not None and paged is not None:
        out: AttentionOutputs = paged.forward(call, want)
        for b, rows in enumerate(cached.rows):
            for whole, value in zip(_flat(out), _NO_KEYS, strict=True):
                if whole is not None and rows < call.N:
                    whole[b, :, rows:] = value
        return out
    out = _empty(cached.call, want, cached.door)
    for b, rows in enumerate(cached.rows):
        one = _of_sequence(cached, b)
        found = choose(NAME, one, implementation).forward(one, want)
        for whole, part in zip(_flat(out), _flat(found), strict=True):
            if whole is not None and part is not None:
                whole[b, :, :rows] = part[0]
    return out


def _that_serves(
    call: AttentionCall, implementation: str | Implementation | None
) -> Implementation | None:
    try:
        return choose(NAME, call, implementation)
    except (Unsupported, ExceptionGroup):
        return None


def _paged(cached: _Cached) -> AttentionCall | None:
    """Return the call for all sequences at once, or None where there is no such call."""
    call, mask = cached.call, cached.mask
    if not cached.is_full and call.alibi_slopes is not None:
        return None  # distances count from the last query, which is not real then
    sizes = cached.sizes()
    if cached.is_full and len(set(sizes)) == 1 and (mask is None or cached.is_shared):
        lowered = _lowered(cached, 0)
        return None if isinstance(lowered, PackedBits) else replace(call, mask=lowered)
    if not sizes or (cached.is_full and mask is None and not cached.view.hidden.any()):
        return call
    rows = _rows_at_once(cached) if cached.is_shared else None
    if rows is None:
        rows = _rows_one_by_one(cached)
    return None if rows is None else replace(call, mask=RowIntervals(rows))


def _rows_at_once(cached: _Cached) -> NDArray[np.int32] | None:
    """Return `(B, 1, N, 4)` intervals, or None where it would take too long or some do not fit."""
    sizes, view, rows = cached.sizes(), cached.view, cached.rows
    if np.ptp(view.lengths) > _LOWERED_ALONE * len(set(sizes)):
        return None
    ends = [np.concatenate(([0], np.cumsum(x, dtype=np.int64))) for x in (rows, view.lengths)]
    mask = cached.mask if isinstance(cached.mask, Mask) else _From(0)
    try:
        found = lowered_per_sequence(mask, Sequences(*ends)).rows[0, 0]
    except ValueError:  # more than two intervals
        return None
    visible = np.maximum(found, np.repeat(view.hidden, rows)[:, None]).reshape(-1, 2, 2)
    visible[visible[..., 0] >= visible[..., 1]] = 0
    only_second = visible[:, 0, 1] == 0
    visible[only_second] = visible[only_second, ::-1]
    out = np.zeros((cached.call.B, 1, cached.call.N, 4), np.int32)
    real = np.arange(cached.call.N) < np.array(rows)[:, None]
    out[:, 0][real] = visible.reshape(-1, 4)
    return out


def _rows_one_by_one(cached: _Cached) -> NDArray[np.int32] | None:
    """Return `(B, 1 or H, N, 4)` intervals, or None where some row needs more than two."""
    call, rows = cached.call, None
    for b, (count, length, _) in enumerate(cached.sizes()):
        lowered = _lowered(cached, b)
        if isinstance(lowered, PackedBits):
            return None
        part = np.array((0, length, 0, 0)) if lowered is None else lowered.rows[0]
        if rows is None:
            heads = 1 if lowered is None else len(part)
            rows = np.zeros((call.B, heads, call.N, 4), np.int32)
        rows[b, :, :count] = part
    return rows


def _of_sequence(cached: _Cached, b: int) -> AttentionCall:
    """Return the call of one sequence alone, with its keys gathered."""
    call, rows, Nk = cached.call, slice(cached.rows[b]), int(cached.view.lengths[b])
    found = cached.cache._dense(cached.view, b)
    k, v = (cached.door.array(stored, cached.cache.dtype) for stored in found)
    return replace(
        call,
        q=call.q[b : b + 1, :, rows],
        k=k,
        v=v,
        bias=None if call.bias is None else _of(call.bias, b, rows, Nk),
        alibi_slopes=None if call.alibi_slopes is None else call.alibi_slopes[b : b + 1],
        mask=_lowered(cached, b),
        B=1,
        N=cached.rows[b],
        Nk=Nk,
        paging=None,
    )


def _of(array: Array, b: int, rows: slice, Nk: int) -> Array:
    """Return the part of `(B or 1, H or 1, N or 1, max_k or 1)` that belongs to a sequence."""
    part = array[b : b + 1] if array.shape[0] > 1 else array
    part = part[:, :, rows] if array.shape[2] > 1 else part
    return part[..., :Nk] if array.shape[3] > 1 else part


def _lowered(cached: _Cached, b: int) -> Lowered | None:
    """Return what the real queries of a sequence see of its keys; evicted ones are hidden."""
    call, mask, B = cached.call, cached.mask, cached.call.B
    n, Nk, hidden = cached.sizes()[b]
    if isinstance(mask, np.ndarray):
        mask, B, b = dense(_of(mask, b, slice(n), Nk)), 1, 0
    if hidden:
        mask = _From(hidden) if mask is None else mask & _From(hidden)
    if mask is None:
        return None
    lowered = mask.lower(B, call.H, n, Nk, operator=NAME)
    if isinstance(lowered, RowIntervals):
        return lowered if len(lowered.rows) == 1 else RowIntervals(lowered.rows[b : b + 1])
    if len(lowered.bits) == 1:
        return lowered
    return PackedBits(lowered.bits[b : b + 1], lowered.tiles[b : b + 1])


@dataclass(frozen=True, repr=False)
class _From(Mask):
    """All keys from one on."""

    first: int

    def spans(self, size: Size, rows: slice) -> Spans:
        first = np.full((1, 1, rows.stop - rows.start), self.first, np.int64)
        return interval(first, np.full_like(first, size.Nk), size.Nk)

    def text(self, show: Show) -> str:
        return f"from({self.first})"


_CAUSAL = causal()
_LOWERED_ALONE = 1000
"""How many rows of a mask are lowered in the time that it takes to lower one row by itself."""

_NO_KEYS = (0.0, -np.inf, 0.0, -np.inf, -np.inf, 0.0, 0.0)
"""What a forward pass returns of a row that sees no key, in the order of `_flat`."""


def _flat(outputs: AttentionOutputs) -> tuple[Array | None, ...]:
    o, stats, *others = outputs
    return o, *stats, *others


def _empty(call: AttentionCall, want: Want, door: Door) -> AttentionOutputs:
    """Return what a forward pass returns of rows that see no key."""
    rows = (call.B, call.H, call.N)
    m, log_l, lse, max_logit, entropy = (
        door.full(rows, value, call.compute_dtype) for value in _NO_KEYS[1:6]
    )
    o = o_full = _zeros(call, call.dtype, door)
    if call.is_narrow:
        o_full = _zeros(call, call.compute_dtype, door)
    return AttentionOutputs(
        o,
        RowStats(m, log_l),
        lse if want.lse else None,
        max_logit if want.max_logit else None,
        entropy if want.entropy else None,
        o_full if want.o_full or not call.is_narrow else None,
    )


def _zeros(call: AttentionCall, dtype: FloatDType, door: Door) -> Any:
    if call.layout == "bhnd":
        return door.full((call.B, call.H, call.N, call.Dv), 0.0, dtype)
    return door.full((call.B, call.N, call.H, call.Dv), 0.0, dtype).swapaxes(1, 2)
