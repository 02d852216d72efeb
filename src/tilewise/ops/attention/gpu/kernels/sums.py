"""The gradients of the bias and of the sinks, or their tangents: sums in a fixed order."""

import triton
import triton.language as tl

from tilewise.shared.triton_math import INF, LOG2E, load_rows, number, rows_times_rows

from .backward import _gradients, _products
from .sequences import bounds_of, places, tile_of
from .tiles import BITS, BOUNDS, INTERVALS, kept, overlaps, part_of, visible


@triton.jit(do_not_specialize=["N", "Nk", "S", "first_entry", "seed_low", "seed_high", "threshold"])
def attention_dbias_kernel(
    q, k, v, tq, tk, tv, do, tdo, bias, tbias, slopes, mask, tiles, m, log_l, delta, tlse, tdelta,
    B, H, group, N, Nk, S, order, q_starts, k_starts,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_tqb, stride_tqh, stride_tqn, stride_tkb, stride_tkh, stride_tkn,
    stride_tvb, stride_tvh, stride_tvn, stride_tdob, stride_tdoh, stride_tdon,
    bias_stride_b, bias_stride_h, bias_stride_n, bias_stride_k,
    slopes_stride_b, mask_stride_b, mask_stride_h,
    scale: tl.float64, softcap: tl.float64, first_entry,
    seed_low: tl.uint32, seed_high: tl.uint32, threshold: tl.uint32, factor: tl.float64,
    dbias, dbias_stride_b, dbias_stride_h, dbias_stride_n, dbias_stride_k,
    BIAS_B: tl.constexpr, BIAS_H: tl.constexpr, BIAS_N: tl.constexpr, BIAS_K: tl.constexpr,
    PACKED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SECOND: tl.constexpr, T_Q: tl.constexpr,
    T_K: tl.constexpr, T_V: tl.constexpr, T_BIAS: tl.constexpr, TDO: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """One tile of the bias, summed over all that share it: BIAS_B says that entries do not."""
    dtype: tl.constexpr = m.dtype.element_ty
    query_tiles, key_tiles = (N + BM - 1) // BM, (Nk + BN - 1) // BN
    if PACKED:
        query_tiles = places(N, S, BM)
    total, first_i, first_j, entry = N, 0, 0, 0
    # Of each dimension, where this program begins and how many places it sums over.
    at = tl.program_id(0)
    tile_j, tiles_j, tile_i, tiles_i = 0, key_tiles, 0, query_tiles
    first_h, heads, first_b, entries = 0, H, 0, B
    if BIAS_K:
        tile_j, tiles_j, at = at % key_tiles, 1, at // key_tiles
    if BIAS_N:
        tile_i, tiles_i, at = at % query_tiles, 1, at // query_tiles
    if BIAS_H:
        first_h, heads, at = at % H, 1, at // H
    if BIAS_B:
        first_b, entries = at, 1
    if PACKED:
        _b, _h, entry, tile_i, first_i, first_j, N, Nk = tile_of(
            tile_i, H, total, Nk, S, order, q_starts, k_starts, BM, False, PACKED
        )
        if not BIAS_K:
            tiles_j = (Nk + BN - 1) // BN
        if (tile_i * BM >= N) | (tile_j * BN >= Nk):
            return
    acc = tl.zeros([BM, BN], dtype)
    for turn in range(0, entries * heads * tiles_i * tiles_j):
        start_j = (tile_j + turn % tiles_j) * BN
        tile = tile_i + turn // tiles_j % tiles_i
        h = first_h + turn // (tiles_j * tiles_i) % heads
        b = first_b + turn // (tiles_j * tiles_i * heads)
        start_i = tile * BM
        if not PACKED:
            entry = b
        part = (b * mask_stride_b + h * mask_stride_h).to(tl.int64)
        mask_part, bounds = mask, tiles
        if MASK == INTERVALS:
            mask_part = mask + (part * total + first_i) * 4
            bounds = bounds_of(tiles, part, entry, first_i, total, BM, BOUNDS, PACKED)
        if MASK == BITS:
            words = (N + 15) // 16
            mask_part = mask + part * Nk * words
            bounds = tiles + part * words * ((Nk + 63) // 64)
        if overlaps(bounds, tile, start_i, start_j, N, Nk, MASK, BM, BN):
            i, j = start_i + tl.arange(0, BM), (start_j + tl.arange(0, BN))[None, :]
            inside, row = i < N, (b * H + h).to(tl.int64) * total + first_i + i
            i = i[:, None]
            top = tl.load(m + row, mask=inside, other=-INF)[:, None]
            log_sum = tl.load(log_l + row, mask=inside, other=0.0)[:, None]
            delta_row = tl.load(delta + row, mask=inside, other=0.0)[:, None]
            tlse_row, tdelta_row = delta_row, delta_row
            hk = h // group
            slope, keep = number(0.0, dtype), acc
            if ALIBI:
                slope = tl.load(slopes + entry * slopes_stride_b + h).to(dtype)
            q_part = part_of(q, b, h, first_i, stride_qb, stride_qh, stride_qn)
            k_part = part_of(k, b, hk, first_j, stride_kb, stride_kh, stride_kn)
            v_part = part_of(v, b, hk, first_j, stride_vb, stride_vh, stride_vn)
            do_part = part_of(do, b, h, first_i, stride_dob, stride_doh, stride_don)
            bias_part = part_of(bias, b, h, first_i, bias_stride_b, bias_stride_h, bias_stride_n)
            q_tile = load_rows(q_part, start_i, N, stride_qn, BM, D, DP, True)
            k_tile = load_rows(k_part, start_j, Nk, stride_kn, BN, D, DP, True)
            v_tile = load_rows(v_part, start_j, Nk, stride_vn, BN, DV, DVP, True)
            do_tile = load_rows(do_part, start_i, N, stride_don, BM, DV, DVP, True)
            raw = rows_times_rows(q_tile, k_tile, PRECISION)  # [BM, BN]
            dp = rows_times_rows(do_tile, v_tile, PRECISION)  # [BM, BN]
            traw, tdp, tbias_part = raw, dp, tbias
            if SECOND:
                tlse_row = tl.load(tlse + row, mask=inside, other=0.0)[:, None]
                tdelta_row = tl.load(tdelta + row, mask=inside, other=0.0)[:, None]
                tq_tile, tk_tile, tv_tile, tdo_tile = q_tile, k_tile, v_tile, do_tile
                if T_Q:
                    tq_part = part_of(tq, b, h, first_i, stride_tqb, stride_tqh, stride_tqn)
                    tq_tile = load_rows(tq_part, start_i, N, stride_tqn, BM, D, DP, True)
                if T_K:
                    tk_part = part_of(tk, b, hk, first_j, stride_tkb, stride_tkh, stride_tkn)
                    tk_tile = load_rows(tk_part, start_j, Nk, stride_tkn, BN, D, DP, True)
                if T_V:
                    tv_part = part_of(tv, b, hk, first_j, stride_tvb, stride_tvh, stride_tvn)
                    tv_tile = load_rows(tv_part, start_j, Nk, stride_tvn, BN, DV, DVP, True)
                if TDO:
                    tdo_part = part_of(tdo, b, h, first_i, stride_tdob, stride_tdoh, stride_tdon)
                    tdo_tile = load_rows(tdo_part, start_i, N, stride_tdon, BM, DV, DVP, True)
                if T_BIAS:
                    tbias_part = part_of(
                        tbias, b, h, first_i, bias_stride_b, bias_stride_h, bias_stride_n
                    )
                traw = _products(q_tile, tq_tile, k_tile, tk_tile, T_Q, T_K, PRECISION)
                tdp = _products(do_tile, tdo_tile, v_tile, tv_tile, TDO, T_V, PRECISION)
            if DROPOUT:
                keep = kept(
                    start_i, start_j, Nk - N, h, first_entry + entry,
                    seed_low, seed_high, threshold, factor, BM, BN, dtype,
                )  # fmt: skip
            _, _, _, _, tds, _ = _gradients(
                raw, traw, dp, tdp, keep, visible(mask_part, i, j, N, Nk, MASK, True), i, j,
                top, log_sum, delta_row, tlse_row, tdelta_row,
                bias_part, bias_stride_n, bias_stride_k,
                tbias_part,
                slope, scale, softcap, N, Nk,
                True, T_BIAS, ALIBI, SOFTCAP, DROPOUT, SECOND,
            )  # fmt: skip
            acc += tds
    i, j = (tile_i * BM + tl.arange(0, BM))[:, None], (tile_j * BN + tl.arange(0, BN))[None, :]
    inside = (i < N) & (j < Nk)
    if not BIAS_N:
        acc = tl.sum(acc, 0)[None, :]
        i = tl.zeros([1, 1], tl.int32)
    if not BIAS_K:
        acc = tl.sum(acc, 1)[:, None]
        j = tl.zeros([1, 1], tl.int32)
    out = part_of(dbias, first_b, first_h, first_i, dbias_stride_b, dbias_stride_h, dbias_stride_n)
    out = out + i.to(tl.int64) * dbias_stride_n + j.to(tl.int64) * dbias_stride_k
    tl.store(out, acc, mask=(i < N) & (j < Nk))


@triton.jit
def attention_dsinks_kernel(
    sinks,
    tsinks,
    m,
    log_l,
    delta,
    tlse,
    tdelta,
    B,
    H,
    N,
    dsinks,
    T_SINKS: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradient of the sink of one head, or its tangent: `-sum exp(z - m - log_l) delta`."""
    dtype: tl.constexpr = m.dtype.element_ty
    h = tl.program_id(0)
    z = tl.full([ROWS], tl.load(sinks + h).to(dtype) * LOG2E, dtype)
    acc = tl.zeros([ROWS], dtype)
    for b in range(0, B):
        base = (tl.cast(b, tl.int64) * H + h) * N
        for start in range(0, N, ROWS):
            i = start + tl.arange(0, ROWS)
            row, inside = base + i, i < N
            top = tl.load(m + row, mask=inside, other=-INF)
            log_sum = tl.load(log_l + row, mask=inside, other=0.0)
            # A row without keys and sink is absent, even where its cotangents are NaN.
            counted = (top != -INF) & (z != -INF)
            p = tl.exp2((z - tl.where(counted, top, 0.0)) - log_sum * LOG2E)
            of_row = tl.load(delta + row, mask=inside, other=0.0)
            terms = p * of_row
            if SECOND:
                moved = -tl.load(tlse + row, mask=inside, other=0.0)
                if T_SINKS:
                    moved += tl.load(tsinks + h).to(dtype)
                terms = p * moved * of_row + p * tl.load(tdelta + row, mask=inside, other=0.0)
            acc += tl.where(counted, terms, 0.0)
    tl.store(dsinks + h, -tl.sum(acc, 0))
