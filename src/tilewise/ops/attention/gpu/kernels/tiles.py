"""The walk over tiles that every pass shares: which tiles there are, who sees whom, the logits.

Formulas of pairs hold in both orders of a tile, queries x keys and keys x queries: there `i` are
the queries and `j` the keys, and all that is given per query or per key, as `[BM, 1]` and `[1, BN]`
or as `[1, BM]` and `[BN, 1]`.
"""

import triton
import triton.language as tl

from tilewise.shared.triton_math import INF, LOG2E, lowest, number, philox_tile, tanh

from .sequences import tile_of

EVERYTHING = tl.constexpr(0)
INTERVALS = tl.constexpr(1)
BITS = tl.constexpr(2)
BOUNDS = tl.constexpr(8)
_NO_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def part_of(base, b, h, first, stride_b, stride_h, stride_n):
    """Return where one head of one batch entry begins, at its row `first`, in 64 bits."""
    part = base + tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h
    return part + tl.cast(first, tl.int64) * stride_n


@triton.jit
def attention_bounds_kernel(
    rows, N, bounds, S, order, q_starts, BM: tl.constexpr, PACKED: tl.constexpr
):
    """Write for each tile of queries which keys all of its rows see, and which any does.

    Row intervals `(.., N, 4)`; bounds `(.., tiles, 8)`: `[a0, a1)` and `[b0, b1)` hold the first
    and the second intervals, and each row's first interval holds `[a2, a3)`.
    """
    place, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = part * N
    _, _, _, tile, first_i, _, N, _ = tile_of(
        place, 1, N, 0, S, order, q_starts, q_starts, BM, False, PACKED
    )
    i = tile * BM + tl.arange(0, BM)
    inside = i < N
    at = rows + (first + first_i + i.to(tl.int64)) * 4  # [BM]
    lo0, hi0 = tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=inside, other=0)
    lo1, hi1 = tl.load(at + 2, mask=inside, other=0), tl.load(at + 3, mask=inside, other=0)
    out = bounds + (part * tl.num_programs(0) + place) * BOUNDS
    tl.store(out, tl.min(tl.where(hi0 > lo0, lo0, _NO_KEY), 0))
    tl.store(out + 1, tl.max(tl.where(hi0 > lo0, hi0, 0), 0))
    tl.store(out + 2, tl.min(tl.where(hi1 > lo1, lo1, _NO_KEY), 0))
    tl.store(out + 3, tl.max(tl.where(hi1 > lo1, hi1, 0), 0))
    tl.store(out + 4, tl.max(tl.where(inside, lo0, 0), 0))
    tl.store(out + 5, tl.min(tl.where(inside, hi0, _NO_KEY), 0))


@triton.jit
def key_spans(bounds, tile, Nk, MASK: tl.constexpr, BN: tl.constexpr):
    """Return which tiles of keys a tile of queries has to visit, in ascending order.

    First those of `[begin, full)`, of which some pairs are masked; then `[full, rest)`, of which
    none is; then `[rest, stop)`, masked again, where tile t stands for `t + (t >= turn) * jump`.
    """
    if MASK == INTERVALS:
        at = bounds + tl.cast(tile, tl.int64) * BOUNDS
        a0, a1 = tl.load(at), tl.load(at + 1)
        b0, b1 = tl.load(at + 2), tl.load(at + 3)
        a2, a3 = tl.load(at + 4), tl.load(at + 5)
        turn = (a1 + BN - 1) // BN
        begin = tl.minimum(a0 // BN, turn)
        full = tl.minimum(tl.maximum((a2 + BN - 1) // BN, begin), turn)
        rest = tl.minimum(tl.maximum(a3 // BN, full), turn)
        second = tl.maximum(tl.minimum(b0, b1) // BN, turn)
        stop = turn + tl.maximum((b1 + BN - 1) // BN - second, 0)
        jump = second - turn
    else:
        begin, jump = Nk * 0, Nk * 0
        stop = (Nk + BN - 1) // BN
        turn = stop
        if MASK == BITS:
            full, rest = begin, begin
        else:
            full, rest = begin, Nk // BN
    return begin, full, rest, stop, turn, jump


@triton.jit
def query_spans(bounds, tiles, start, Nk, MASK: tl.constexpr, BN: tl.constexpr):
    """Return which tiles of queries see any of the keys `[start, start + BN)`.

    `[begin, full)` with masked pairs, `[full, rest)` without, `[rest, stop)` with.
    """
    if MASK == INTERVALS:
        CHUNK: tl.constexpr = 64
        end = tl.minimum(start + BN, Nk)
        begin, stop = tiles, tiles * 0
        for c in range(0, tiles, CHUNK):
            t = c + tl.arange(0, CHUNK)
            any_seen, _ = _sees(bounds, t, tiles, start, end)
            begin = tl.minimum(begin, tl.min(tl.where(any_seen, t, tiles), 0))
            stop = tl.maximum(stop, tl.max(tl.where(any_seen, t + 1, 0), 0))
        full = stop
        for c in range(0, tiles, CHUNK):
            t = c + tl.arange(0, CHUNK)
            _, all_seen = _sees(bounds, t, tiles, start, end)
            full = tl.minimum(full, tl.min(tl.where(all_seen, t, stop), 0))
        rest = stop
        for c in range(0, tiles, CHUNK):
            t = c + tl.arange(0, CHUNK)
            _, all_seen = _sees(bounds, t, tiles, start, end)
            rest = tl.minimum(rest, tl.min(tl.where((t >= full) & (all_seen == 0), t, stop), 0))
        begin = tl.minimum(begin, full)
    else:
        begin, full = tiles * 0, tiles * 0
        stop = tiles
        rest = begin
        if MASK == EVERYTHING:
            rest = stop
    return begin, full, rest, stop


@triton.jit
def _sees(bounds, t, tiles, start, end):
    """Return which tiles of queries see any of the keys `[start, end)`, and which all of them."""
    at, inside = bounds + t.to(tl.int64) * BOUNDS, t < tiles
    a0, a1 = tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=inside, other=0)
    b0, b1 = tl.load(at + 2, mask=inside, other=0), tl.load(at + 3, mask=inside, other=0)
    a2, a3 = tl.load(at + 4, mask=inside, other=0), tl.load(at + 5, mask=inside, other=0)
    some = ((a0 < end) & (a1 > start)) | ((b0 < end) & (b1 > start))
    return inside & some, inside & (a2 <= start) & (end <= a3)


@triton.jit
def occupied(tiles, start_i, start_j, N, Nk, BM: tl.constexpr, BN: tl.constexpr):
    """Return whether any pair of a tile is seen, by the map of 16 queries x 64 keys."""
    QUERIES: tl.constexpr = (BM + 15) // 16
    KEYS: tl.constexpr = (BN + 63) // 64
    r = start_i // 16 + tl.arange(0, QUERIES)
    c = start_j // 64 + tl.arange(0, KEYS)
    words, columns = (N + 15) // 16, (Nk + 63) // 64
    at = tiles + r.to(tl.int64)[:, None] * columns + c[None, :]
    found = tl.load(at, mask=(r < words)[:, None] & (c < columns)[None, :], other=0)
    return tl.max(tl.max(found.to(tl.int32), 1), 0) > 0


@triton.jit
def intervals_of(rows, i, N):
    """Return the ends of the two intervals of each query; empty beyond N."""
    at, inside = rows + i.to(tl.int64) * 4, i < N
    lo0, hi0 = tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=inside, other=0)
    lo1, hi1 = tl.load(at + 2, mask=inside, other=0), tl.load(at + 3, mask=inside, other=0)
    return lo0, hi0, lo1, hi1


@triton.jit
def visible(mask, i, j, N, Nk, MASK: tl.constexpr, MASKED: tl.constexpr):
    """Return which pairs of a tile the mask lets see each other; something that broadcasts.

    Args:
        mask: One head of the row intervals, or of the packed bits.
        i: Queries.
        j: Keys.
        N: Queries there are.
        Nk: Keys there are.
        MASK: Which kind of mask it is.
        MASKED: Whether there may be pairs in the tile that do not.
    """
    if not MASKED:
        seen = i >= 0
    elif MASK == INTERVALS:
        lo0, hi0, lo1, hi1 = intervals_of(mask, i, N)
        seen = ((j >= lo0) & (j < hi0)) | ((j >= lo1) & (j < hi1))
    else:
        seen = (i < N) & (j < Nk)
        if MASK == BITS:
            words = (N + 15) // 16
            at = mask + j.to(tl.int64) * words + i // 16
            word = tl.load(at, mask=seen, other=0).to(tl.int32)
            seen = seen & (((word >> (i % 16)) & 1) > 0)
    return seen


@triton.jit
def logits(
    raw,
    i,
    j,
    bias,
    bias_stride_n,
    bias_stride_k,
    slope,
    scale,
    softcap,
    N,
    Nk,
    BIAS: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Return the logits in base 2 and, with a soft cap c, `tanh(x / c)` and its derivative.

    `s = c tanh(scale raw / c) + bias - slope |i + Nk - N - j|`, times `log2(e)`.
    """
    dtype: tl.constexpr = raw.dtype
    factor, cap = number(scale, dtype), number(softcap, dtype)
    t, derivative = raw, raw
    if SOFTCAP:
        t, derivative = tanh(raw * (factor / cap))
        s = t * (cap * LOG2E)
    else:
        s = raw * (factor * LOG2E)
    if ALIBI:
        distance = tl.abs(i + (Nk - N) - j).to(dtype)
        s -= (slope.to(dtype) * LOG2E) * distance
    if BIAS:
        added = load_bias(bias, i, j, bias_stride_n, bias_stride_k, N, Nk).to(dtype)
        s += added * LOG2E
        # A finite bias as low as the lowest number must not become -inf: it would count as masked.
        s = tl.where((s < lowest(dtype)) & (added != -INF), lowest(dtype), s)
    return s, t, derivative


@triton.jit
def load_bias(bias, i, j, stride_n, stride_k, N, Nk):
    """Return a tile of a bias, whose strides are 0 where it is broadcast."""
    at = bias + i.to(tl.int64) * stride_n + j.to(tl.int64) * stride_k
    return tl.load(at, mask=(i < N) & (j < Nk), other=0.0)


@triton.jit
def kept(
    start_i,
    start_j,
    offset,
    head,
    entry,
    seed_low,
    seed_high,
    threshold,
    factor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return `[BM, BN]`: what dropout multiplies probabilities by, 0 or `1 / (1 - p)`.

    Four keys share a counter, which has the query's position among the keys and not its index.
    """
    position = start_i + offset + tl.arange(0, BM)
    return kept_at(
        position[:, None],
        start_j,
        head,
        entry,
        seed_low,
        seed_high,
        threshold,
        factor,
        BN,
        dtype,
    )


@triton.jit
def kept_at(
    position,
    start_j,
    head,
    entry,
    seed_low,
    seed_high,
    threshold,
    factor,
    BN: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return what `kept` does, for positions `[BM, 1]` of queries of one head, or of as many."""
    group = start_j // 4 + tl.arange(0, BN // 4)
    words = philox_tile(group[None, :], position, head, entry, seed_low, seed_high)
    return tl.where(
        words < tl.cast(threshold, tl.uint32), number(0.0, dtype), number(factor, dtype)
    )


@triton.jit
def probabilities(s, m, log_l, seen):
    """Return `exp(s - m - log_l)` of logits in base 2, zero where not seen."""
    base = tl.where(m == -INF, 0.0, m)
    p = tl.exp2((s - base) - log_l * LOG2E)
    return tl.where(seen & (m != -INF), p, 0.0)


@triton.jit
def overlaps(
    bounds,
    tile,
    start_i,
    start_j,
    N,
    Nk,
    MASK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Return whether a tile of queries may see any key of `[start_j, start_j + BN)`."""
    if MASK == INTERVALS:
        at = bounds + tl.cast(tile, tl.int64) * BOUNDS
        end = start_j + BN
        first = (tl.load(at) < end) & (tl.load(at + 1) > start_j)
        found = first | ((tl.load(at + 2) < end) & (tl.load(at + 3) > start_j))
    elif MASK == BITS:
        found = occupied(bounds, start_i, start_j, N, Nk, BM, BN)
    else:
        found = start_j < Nk
    return found
