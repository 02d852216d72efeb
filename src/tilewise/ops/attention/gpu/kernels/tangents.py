"""The tangents of the outputs: a walk over the keys with the row statistics of the forward pass."""

import triton
import triton.language as tl

from tilewise.shared.triton_math import (
    INF,
    LOG2E,
    any_not_finite,
    load_rows,
    number,
    rows_times_rows,
    store_rows,
)

from .backward import _add, _products
from .sequences import bounds_of, tile_of
from .tiles import (
    BITS,
    BOUNDS,
    INTERVALS,
    kept,
    key_spans,
    load_bias,
    logits,
    occupied,
    part_of,
    probabilities,
    visible,
)


@triton.jit(do_not_specialize=["N", "Nk", "S", "first_entry", "seed_low", "seed_high", "threshold"])
def attention_jvp_kernel(
    q, k, v, tq, tk, tv, o, bias, tbias, slopes, sinks, tsinks, mask, tiles, m, log_l,
    H, group, N, Nk, S, order, q_starts, k_starts,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    stride_tqb, stride_tqh, stride_tqn, stride_tkb, stride_tkh, stride_tkn,
    stride_tvb, stride_tvh, stride_tvn,
    bias_stride_b, bias_stride_h, bias_stride_n, bias_stride_k,
    slopes_stride_b, mask_stride_b, mask_stride_h,
    scale: tl.float64, softcap: tl.float64, first_entry,
    seed_low: tl.uint32, seed_high: tl.uint32, threshold: tl.uint32, factor: tl.float64,
    to, tlse, spoiled, stride_tob, stride_toh, stride_ton,
    PACKED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, DROPOUT: tl.constexpr, T_Q: tl.constexpr,
    T_K: tl.constexpr, T_V: tl.constexpr, T_BIAS: tl.constexpr, T_SINKS: tl.constexpr,
    HIDES: tl.constexpr, CAREFUL: tl.constexpr,
    WEIGHTS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """Tangents of one tile of queries of one head; see `attention_fwd_kernel` for CAREFUL."""
    dtype: tl.constexpr = m.dtype.element_ty
    total = N
    b, h, entry, tile, first_i, first_j, N, Nk = tile_of(
        tl.program_id(0), H, N, Nk, S, order, q_starts, k_starts, BM, False, PACKED
    )
    start_i = tile * BM
    if PACKED and start_i >= N:
        return
    if CAREFUL and tl.load(spoiled + tl.program_id(0)) == 0:
        return
    i = start_i + tl.arange(0, BM)
    inside, row = i < N, (b * H + h).to(tl.int64) * total + first_i + i
    i = i[:, None]
    slope, part = number(0.0, dtype), (b * mask_stride_b + h * mask_stride_h).to(tl.int64)
    bounds = tiles
    if ALIBI:
        slope = tl.load(slopes + entry * slopes_stride_b + h).to(dtype)
    if BIAS:
        bias = part_of(bias, b, h, first_i, bias_stride_b, bias_stride_h, bias_stride_n)
    if T_BIAS:
        tbias = part_of(tbias, b, h, first_i, bias_stride_b, bias_stride_h, bias_stride_n)
    if MASK == INTERVALS:
        mask = mask + (part * total + first_i) * 4
        bounds = bounds_of(tiles, part, entry, first_i, total, BM, BOUNDS, PACKED)
    if MASK == BITS:
        words = (N + 15) // 16
        mask, bounds = mask + part * Nk * words, tiles + part * words * ((Nk + 63) // 64)
    k = part_of(k, b, h // group, first_j, stride_kb, stride_kh, stride_kn)
    v = part_of(v, b, h // group, first_j, stride_vb, stride_vh, stride_vn)
    q = part_of(q, b, h, first_i, stride_qb, stride_qh, stride_qn)
    q_tile = load_rows(q, start_i, N, stride_qn, BM, D, DP, True)  # [BM, DP]
    tq_tile = q_tile
    if T_Q:
        tq = part_of(tq, b, h, first_i, stride_tqb, stride_tqh, stride_tqn)
        tq_tile = load_rows(tq, start_i, N, stride_tqn, BM, D, DP, True)  # [BM, DP]
    if T_K:
        tk = part_of(tk, b, h // group, first_j, stride_tkb, stride_tkh, stride_tkn)
    if T_V:
        tv = part_of(tv, b, h // group, first_j, stride_tvb, stride_tvh, stride_tvn)
    top = tl.load(m + row, mask=inside, other=-INF)[:, None]
    log_sum = tl.load(log_l + row, mask=inside, other=0.0)[:, None]

    mean = tl.zeros([BM], dtype)
    has_keys = tl.zeros([BM], tl.int32)
    acc = tl.zeros([BM, DVP], dtype)
    begin, _full, _rest, stop, turn, jump = key_spans(bounds, tile, Nk, MASK, BN)
    for t in range(begin, stop):
        start_j = (t + tl.where(t >= turn, jump, 0)) * BN
        if (MASK != BITS) or occupied(bounds, start_i, start_j, N, Nk, BM, BN):
            j = (start_j + tl.arange(0, BN))[None, :]
            k_tile = load_rows(k, start_j, Nk, stride_kn, BN, D, DP, True)
            tk_tile = k_tile
            if T_K:
                tk_tile = load_rows(tk, start_j, Nk, stride_tkn, BN, D, DP, True)
            raw = rows_times_rows(q_tile, k_tile, PRECISION)  # [BM, BN]
            s, _, derivative = logits(
                raw, i, j, bias, bias_stride_n, bias_stride_k, slope, scale, softcap,
                N, Nk, BIAS, ALIBI, SOFTCAP,
            )  # fmt: skip
            seen = visible(mask, i, j, N, Nk, MASK, True)
            p = probabilities(s, top, log_sum, seen)
            traw = _products(q_tile, tq_tile, k_tile, tk_tile, T_Q, T_K, PRECISION)
            ts = traw * number(scale, dtype)
            if SOFTCAP:
                ts *= derivative
            if T_BIAS:
                ts += load_bias(
                    tbias, i, j, bias_stride_n, bias_stride_k, N, Nk
                ).to(dtype)  # fmt: skip
            moved = tl.where(seen & (top != -INF), p * ts, 0.0)
            mean += tl.sum(moved, 1)
            has_keys = tl.maximum(has_keys, tl.max(seen.to(tl.int32), 1))
            if DROPOUT:
                keep = kept(
                    start_i, start_j, Nk - N, h, first_entry + entry,
                    seed_low, seed_high, threshold, factor, BM, BN, dtype,
                )  # fmt: skip
                p, moved = p * keep, moved * keep
            v_tile = load_rows(v, start_j, Nk, stride_vn, BN, DV, DVP, True)
            acc = _add(acc, moved, v_tile, seen, CAREFUL, WEIGHTS, PRECISION)
            if T_V:
                tv_tile = load_rows(tv, start_j, Nk, stride_tvn, BN, DV, DVP, True)
                acc = _add(acc, p, tv_tile, seen, CAREFUL, WEIGHTS, PRECISION)
    if (HIDES) and (not CAREFUL):
        tl.store(spoiled + tl.program_id(0), any_not_finite(acc).to(tl.int32))
    alive = top != -INF
    if T_SINKS:
        z = tl.full([BM, 1], tl.load(sinks + h).to(dtype) * LOG2E, dtype)
        p = tl.exp2((z - tl.where(alive, top, 0.0)) - log_sum * LOG2E)  # [BM, 1]
        of_sink = p * tl.load(tsinks + h).to(dtype)
        # -inf is no sink, so it does not move.
        mean += tl.sum(tl.where(alive & (z != -INF), of_sink, 0.0), 1)
    tl.store(tlse + row, mean, mask=inside)
    o = part_of(o, b, h, first_i, stride_ob, stride_oh, stride_on)
    o_tile = load_rows(o, start_i, N, stride_on, BM, DV, DVP, True).to(dtype)
    acc -= tl.where(has_keys[:, None] > 0, mean[:, None] * o_tile, 0.0)
    acc = tl.where(alive, acc, 0.0)
    to = part_of(to, b, h, first_i, stride_tob, stride_toh, stride_ton)
    store_rows(to, acc, start_i, N, stride_ton, BM, DV, DVP)
