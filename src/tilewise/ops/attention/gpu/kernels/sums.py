"""The gradients of the bias and of the sinks, or their tangents: sums in a fixed order."""

import triton
import triton.language as tl

from tilewise.shared.triton_math import INF, LOG2E, load_rows, number, rows_times_rows

from .backward import _gradients, _products
from .tiles import BITS, BOUNDS, INTERVALS, kept, overlaps, part_of, visible


@triton.jit(do_not_specialize=["N", "Nk", "first_entry", "seed_low", "seed_high", "threshold"])
def attention_dbias_kernel(
    q, k, v, tq, tk, tv, do, tdo, bias, tbias, slopes, mask, tiles, m, log_l, delta, tlse, tdelta,
    B, H, group, N, Nk,
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
    D: tl.constexpr, DV: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SECOND: tl.constexpr, T_Q: tl.constexpr,
    T_K: tl.constexpr, T_V: tl.constexpr, T_BIAS: tl.constexpr, TDO: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """One tile of the bias, summed over all that share it: BIAS_B says that entries do not."""
    dtype: tl.constexpr = m.dtype.element_ty
    query_tiles, key_tiles = (N + BM - 1) // BM, (Nk + BN - 1) // BN
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
    acc = tl.zeros([BM, BN], dtype)
    for turn in range(0, entries * heads * tiles_i * tiles_j):
        start_j = (tile_j + turn % tiles_j) * BN
        tile = tile_i + turn // tiles_j % tiles_i
        h = first_h + turn // (tiles_j * tiles_i) % heads
        b = first_b + turn // (tiles_j * tiles_i * heads)
        start_i = tile * BM
        part = (b * mask_stride_b + h * mask_stride_h).to(tl.int64)
        mask_part, bounds = mask, tiles
        if MASK == INTERVALS:
            mask_part, bounds = mask + part * N * 4, tiles + part * query_tiles * BOUNDS
        if MASK == BITS:
            words = (N + 15) // 16
            mask_part = mask + part * Nk * words
            bounds = tiles + part * words * ((Nk + 63) // 64)
        if overlaps(bounds, tile, start_i, start_j, N, Nk, MASK, BM, BN):
            i, j = start_i + tl.arange(0, BM), (start_j + tl.arange(0, BN))[None, :]
            inside, row = i < N, (b * H + h).to(tl.int64) * N + i
            i = i[:, None]
            top = tl.load(m + row, mask=inside, other=-INF)[:, None]
            log_sum = tl.load(log_l + row, mask=inside, other=0.0)[:, None]
            delta_row = tl.load(delta + row, mask=inside, other=0.0)[:, None]
            tlse_row, tdelta_row = delta_row, delta_row
            hk = h // group
            slope, keep = number(0.0, dtype), acc
            if ALIBI:
                slope = tl.load(slopes + b * slopes_stride_b + h).to(dtype)
            q_part, k_part = (
                part_of(q, b, h, stride_qb, stride_qh),
                part_of(k, b, hk, stride_kb, stride_kh),
            )
            v_part, do_part = (
                part_of(v, b, hk, stride_vb, stride_vh),
                part_of(do, b, h, stride_dob, stride_doh),
            )
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
                    tq_part = part_of(tq, b, h, stride_tqb, stride_tqh)
                    tq_tile = load_rows(tq_part, start_i, N, stride_tqn, BM, D, DP, True)
                if T_K:
                    tk_part = part_of(tk, b, hk, stride_tkb, stride_tkh)
                    tk_tile = load_rows(tk_part, start_j, Nk, stride_tkn, BN, D, DP, True)
                if T_V:
                    tv_part = part_of(tv, b, hk, stride_tvb, stride_tvh)
                    tv_tile = load_rows(tv_part, start_j, Nk, stride_tvn, BN, DV, DVP, True)
                if TDO:
                    tdo_part = part_of(tdo, b, h, stride_tdob, stride_tdoh)
                    tdo_tile = load_rows(tdo_part, start_i, N, stride_tdon, BM, DV, DVP, True)
                if T_BIAS:
                    tbias_part = part_of(tbias, b, h, bias_stride_b, bias_stride_h)
                traw = _products(q_tile, tq_tile, k_tile, tk_tile, T_Q, T_K, PRECISION)
                tdp = _products(do_tile, tdo_tile, v_tile, tv_tile, TDO, T_V, PRECISION)
            if DROPOUT:
                keep = kept(
                    start_i, start_j, Nk - N, h, first_entry + b,
                    seed_low, seed_high, threshold, factor, BM, BN, dtype,
                )  # fmt: skip
            _, _, _, _, tds, _ = _gradients(
                raw, traw, dp, tdp, keep, visible(mask_part, i, j, N, Nk, MASK, True), i, j,
                top, log_sum, delta_row, tlse_row, tdelta_row,
                part_of(bias, b, h, bias_stride_b, bias_stride_h), bias_stride_n, bias_stride_k,
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
    out = part_of(dbias, first_b, first_h, dbias_stride_b, dbias_stride_h)
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
