"""Few queries against many keys: a program for each chunk of keys, and a merge in their order.

The query heads that share a key/value head are rows of one tile, so that they share its loads.
"""

import triton
import triton.language as tl

from tilewise.shared.triton_math import (
    INF,
    any_not_finite,
    number,
    rows_times_rows,
    weigh,
    weigh_attended,
)

from .forward import end_rows, fold_logits
from .tiles import BITS, INTERVALS, intervals_of, kept_at, logits, visible

_NO_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def _load_at(base, at, wanted, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Return `[R, PADDED]`: rows of SIZE entries from their offsets, zero where not wanted."""
    d = tl.arange(0, PADDED)
    inside = wanted[:, None]
    if PADDED != SIZE:
        inside = inside & (d < SIZE)[None, :]
    return tl.load(base + at[:, None] + d[None, :], mask=inside, other=0.0)


@triton.jit
def _hull(lo, hi):
    """Return the least interval that holds those of all rows; `[0, 0)` where all are empty."""
    end = tl.max(tl.where(hi > lo, hi, 0), 0)
    return tl.where(end > 0, tl.min(tl.where(hi > lo, lo, _NO_KEY), 0), 0), end


@triton.jit
def _tiles_in(lo, hi, least, first, last, BN: tl.constexpr):
    """Return the tiles of `[lo, hi)` that lie in `[first, last)` and not before `least`."""
    begin = tl.minimum(tl.maximum(lo // BN, tl.maximum(least, first)), last)
    return begin, tl.minimum(tl.maximum((hi + BN - 1) // BN, begin), last)


@triton.jit
def _between(j, lo, hi):
    """Return `[BM, BN]`: which keys lie in the interval of each row."""
    return (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])


@triton.jit
def _rescaled(m, m_c):
    """Return a maximum above all, 0 for -inf, and the factors of what was summed relative to m."""
    top = tl.maximum(m, tl.max(m_c, 1))
    base = tl.where(top == -INF, 0.0, top)
    return top, base, tl.exp2(m - base), tl.exp2(m_c - base[:, None])


@triton.jit
def _places_of_keys(
    j,
    wanted,
    table,
    page_size,
    stride_kb,
    stride_kn,
    stride_vb,
    stride_vn,
    PAGED: tl.constexpr,
):
    """Return the offsets of keys and of values, and which of them are there and wanted."""
    row = j.to(tl.int64)
    if PAGED:
        page = tl.load(table + j // page_size, mask=wanted, other=0).to(tl.int64)
        wanted = wanted & (page >= 0)
        row = (j % page_size).to(tl.int64)
        at_k, at_v = page * stride_kb + row * stride_kn, page * stride_vb + row * stride_vn
    else:
        at_k, at_v = row * stride_kn, row * stride_vn
    return at_k, at_v, wanted


@triton.jit(
    do_not_specialize=[
        "N",
        "Nk",
        "pages",
        "chunks",
        "first_entry",
        "seed_low",
        "seed_high",
        "threshold",
    ]
)
def attention_decode_kernel(
    q,
    k,
    v,
    bias,
    slopes,
    mask,
    table,
    k_lengths,
    H,
    group,
    N,
    Nk,
    pages,
    page_size,
    chunks,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    bias_stride_b,
    bias_stride_h,
    bias_stride_n,
    bias_stride_k,
    slopes_stride_b,
    mask_stride_b,
    mask_stride_h,
    scale: tl.float64,
    softcap: tl.float64,
    first_entry,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    threshold: tl.uint32,
    factor: tl.float64,
    m_part,
    l_part,
    entropy_part,
    o_part,
    spoiled,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGED: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    ENTROPY: tl.constexpr,
    HIDES: tl.constexpr,
    CAREFUL: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CHUNK: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
):
    """The state `(m, l, acc)` of one tile of rows after one chunk of keys.

    Rows are the queries of all heads of a group, head by head. Chunks begin at multiples of CHUNK
    keys. Keys in pages: key j of entry b is row `j % page_size` of page `table[b, j // page_size]`,
    and `k_lengths[b]` of them are there; otherwise Nk. Parts are `(rows, chunks)`, and of o
    `(rows, chunks, DV)`, left as it is where l is 0. For `spoiled` see `attention_fwd_kernel`.
    """
    if CAREFUL and tl.load(spoiled + tl.program_id(0)) == 0:
        return
    dtype: tl.constexpr = m_part.dtype.element_ty
    row_tiles = (group * N + BM - 1) // BM
    tile, at = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    chunk, at = at % chunks, at // chunks
    b, hk = (at // (H // group)).to(tl.int64), (at % (H // group)).to(tl.int64)
    k += hk * stride_kh
    v += hk * stride_vh
    if PAGED:
        Nk = tl.load(k_lengths + b).to(tl.int32)
        table += b * pages
    else:
        k += b * stride_kb
        v += b * stride_vb

    r = tile * BM + tl.arange(0, BM)
    real = r < group * N
    h, i = hk * group + r // N, tl.where(real, r % N, N)  # [BM]
    q_at = b * stride_qb + h * stride_qh + i.to(tl.int64) * stride_qn
    q_tile = _load_at(q, q_at, real, D, DP)  # [BM, DP]
    of_bias, of_mask = bias, mask
    slope = number(0.0, dtype)
    if BIAS:
        of_bias = (bias + b * bias_stride_b + h * bias_stride_h)[:, None]
    if ALIBI:
        slope = tl.load(slopes + b * slopes_stride_b + h, mask=real, other=0.0)[:, None]
    part = b * mask_stride_b + h * mask_stride_h
    lo0, hi0 = tl.zeros([BM], tl.int32), tl.where(real, Nk, 0)
    lo1, hi1 = tl.zeros([BM], tl.int32), tl.zeros([BM], tl.int32)
    if MASK == INTERVALS:
        lo0, hi0, lo1, hi1 = intervals_of(mask + part * N * 4, i, N)
    if MASK == BITS:
        of_mask = (mask + part * Nk * ((N + 15) // 16))[:, None]

    m = tl.full([BM], -INF, dtype)
    l = tl.zeros([BM], dtype)
    entropy = tl.zeros([BM], dtype)
    acc = tl.zeros([BM, DVP], dtype)
    a0, a1 = _hull(lo0, hi0)
    b0, b1 = _hull(lo1, hi1)
    TILES: tl.constexpr = CHUNK // BN
    first, last = chunk * TILES, chunk * TILES + TILES
    begin, turn = _tiles_in(a0, a1, 0, first, last, BN)
    second, end = _tiles_in(b0, b1, turn, first, last, BN)
    for t in range(begin, turn + (end - second)):
        start_j = (t + tl.where(t >= turn, second - turn, 0)) * BN
        j = start_j + tl.arange(0, BN)
        # What no row sees is not even read.
        wanted = ((j >= a0) & (j < a1)) | ((j >= b0) & (j < b1))
        at_k, at_v, wanted = _places_of_keys(
            j, wanted, table, page_size, stride_kb, stride_kn, stride_vb, stride_vn, PAGED
        )
        k_tile = _load_at(k, at_k, wanted, D, DP)  # [BN, DP]
        raw = rows_times_rows(q_tile, k_tile, PRECISION)  # [BM, BN]
        s, _, _ = logits(
            raw,
            i[:, None],
            j[None, :],
            of_bias,
            bias_stride_n,
            bias_stride_k,
            slope,
            scale,
            softcap,
            N,
            Nk,
            BIAS,
            ALIBI,
            SOFTCAP,
        )
        seen = _between(j, lo0, hi0)
        if MASK == INTERVALS:
            seen = seen | _between(j, lo1, hi1)
        if MASK == BITS:
            seen = visible(of_mask, i[:, None], j[None, :], N, Nk, MASK, True)
        s = tl.where(seen, s, -INF)
        m, l, entropy, shrink, w = fold_logits(m, l, entropy, s, ENTROPY)
        if DROPOUT:
            w *= kept_at(
                (i + (Nk - N))[:, None],
                start_j,
                h[:, None],
                first_entry + b,
                seed_low,
                seed_high,
                threshold,
                factor,
                BN,
                dtype,
            )
        v_tile = _load_at(v, at_v, wanted, DV, DVP)  # [BN, DVP]
        acc *= shrink[:, None]
        if CAREFUL:
            acc = weigh_attended(acc, w, v_tile, seen, WEIGHTS, PRECISION)
        else:
            acc = weigh(acc, w, v_tile, WEIGHTS, PRECISION)

    if HIDES and (not CAREFUL):
        tl.store(spoiled + tl.program_id(0), any_not_finite(acc).to(tl.int32))
    row = ((b * H + h) * N + i) * chunks + chunk
    tl.store(m_part + row, m, mask=real)
    tl.store(l_part + row, l, mask=real)
    if ENTROPY:
        tl.store(entropy_part + row, entropy, mask=real)
    d = tl.arange(0, DVP)
    written = (real & (l != 0.0))[:, None] & (d < DV)[None, :]
    tl.store(o_part + row[:, None] * DV + d[None, :], acc, mask=written)


@triton.jit(do_not_specialize=["N", "R", "chunks"])
def attention_merge_kernel(
    m_part,
    l_part,
    entropy_part,
    o_part,
    sinks,
    H,
    N,
    R,
    chunks,
    o,
    o_full,
    m_out,
    log_l_out,
    lse,
    max_logit,
    entropy_out,
    stride_ob,
    stride_oh,
    stride_on,
    DV: tl.constexpr,
    SINKS: tl.constexpr,
    O_FULL: tl.constexpr,
    LSE: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    ENTROPY: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    DVP: tl.constexpr,
):
    """A few rows from the states of their chunks, BC at a time in ascending order."""
    dtype: tl.constexpr = m_part.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    real = row < R
    b, h, i = row // N // H, row // N % H, row % N
    m = tl.full([BR], -INF, dtype)
    l = tl.zeros([BR], dtype)
    entropy = tl.zeros([BR], dtype)
    acc = tl.zeros([BR, DVP], dtype)
    d = tl.arange(0, DVP)
    for start in range(0, chunks, BC):
        c = start + tl.arange(0, BC)
        at, inside = row[:, None] * chunks + c[None, :], real[:, None] & (c < chunks)[None, :]
        m_c = tl.load(m_part + at, mask=inside, other=-INF)  # [BR, BC]
        l_c = tl.load(l_part + at, mask=inside, other=0.0)
        there = inside & (l_c != 0.0)
        o_c = tl.load(
            o_part + at[:, :, None] * DV + d[None, None, :],
            mask=there[:, :, None] & (d < DV)[None, None, :],
            other=0.0,
        )  # [BR, BC, DVP]
        top, base, shrink, w = _rescaled(m, m_c)
        if ENTROPY:
            entropy_c = tl.load(entropy_part + at, mask=there, other=0.0)
            moved = tl.where(m == -INF, 0.0, (m - base) * l)
            moved_c = tl.where(m_c == -INF, 0.0, (m_c - base[:, None]) * l_c)
            terms = tl.where(w != 0.0, w * (entropy_c + moved_c), 0.0)
            entropy = shrink * (entropy + moved) + tl.sum(terms, 1)
        l = l * shrink + tl.sum(w * l_c, 1)
        acc = acc * shrink[:, None] + tl.sum(w[:, :, None] * o_c, 1)
        m = top
    sink = sinks
    if SINKS:
        sink += h
    acc = end_rows(
        m,
        l,
        acc,
        entropy,
        sink,
        row,
        real,
        m_out,
        log_l_out,
        lse,
        max_logit,
        entropy_out,
        SINKS,
        LSE,
        MAX_LOGIT,
        ENTROPY,
    )
    at = (b * stride_ob + h * stride_oh + i * stride_on)[:, None] + d[None, :]
    written = real[:, None] & (d < DV)[None, :]
    tl.store(o + at, acc.to(o.dtype.element_ty), mask=written)
    if O_FULL:
        tl.store(o_full + at, acc, mask=written)
