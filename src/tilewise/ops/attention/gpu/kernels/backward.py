"""The passes of the gradients and, with SECOND, of their tangents; without atomic additions.

One pass walks over the keys and sums up dq, one walks over the queries and sums up dk and dv, and
small ones sum up the gradients of the bias and of the sinks. Row sums are computed first.
"""

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
    weigh,
    weigh_attended,
)

from .sequences import bounds_of, tile_of
from .tiles import (
    BITS,
    BOUNDS,
    EVERYTHING,
    INTERVALS,
    kept,
    key_spans,
    load_bias,
    logits,
    occupied,
    part_of,
    probabilities,
    query_spans,
    visible,
)


@triton.jit
def _products(a, ta, b, tb, T_A: tl.constexpr, T_B: tl.constexpr, PRECISION: tl.constexpr):
    """Return `ta b^T + a tb^T`, of what is given."""
    dtype: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    moved = tl.zeros([a.shape[0], b.shape[0]], dtype)
    if T_A:
        moved += rows_times_rows(ta, b, PRECISION)
    if T_B:
        moved += rows_times_rows(a, tb, PRECISION)
    return moved


@triton.jit
def _add(acc, w, x, seen, CAREFUL: tl.constexpr, WEIGHTS: tl.constexpr, PRECISION: tl.constexpr):
    """Return `acc + w x`; CAREFUL where x may hold what is hidden and not finite."""
    if CAREFUL:
        acc = weigh_attended(acc, w, x, seen, WEIGHTS, PRECISION)
    else:
        acc = weigh(acc, w, x, WEIGHTS, PRECISION)
    return acc


@triton.jit
def attention_delta_kernel(
    do,
    o,
    dlse,
    tdo,
    to,
    tdlse,
    sinks,
    m,
    log_l,
    H,
    N,
    stride_dob,
    stride_doh,
    stride_don,
    stride_ob,
    stride_oh,
    stride_on,
    stride_tdob,
    stride_tdoh,
    stride_tdon,
    stride_tob,
    stride_toh,
    stride_ton,
    delta_out,
    tdelta_out,
    DV: tl.constexpr,
    DLSE: tl.constexpr,
    TDO: tl.constexpr,
    TDLSE: tl.constexpr,
    SINKS: tl.constexpr,
    SECOND: tl.constexpr,
    BM: tl.constexpr,
    DVP: tl.constexpr,
):
    """Row sums `delta = rowsum(do * o) - dlse` and `rowsum(tdo * o + do * to) - tdlse`."""
    dtype: tl.constexpr = m.dtype.element_ty
    query_tiles = (N + BM - 1) // BM
    tile, at = tl.program_id(0) % query_tiles, tl.program_id(0) // query_tiles
    b, h, start_i = at // H, at % H, tile * BM
    i = start_i + tl.arange(0, BM)
    inside, row = i < N, at.to(tl.int64) * N + i
    top = tl.load(m + row, mask=inside, other=-INF)
    has_keys = top != -INF
    if SINKS:
        # With the sink alone, m is that of the sink and log_l is 0: o is absent.
        z = tl.load(sinks + h).to(dtype) * LOG2E
        has_keys = has_keys & ((top != z) | (tl.load(log_l + row, mask=inside, other=0.0) != 0.0))
    do = part_of(do, b, h, 0, stride_dob, stride_doh, stride_don)
    o = part_of(o, b, h, 0, stride_ob, stride_oh, stride_on)
    do_tile = load_rows(do, start_i, N, stride_don, BM, DV, DVP, True).to(dtype)  # [BM, DVP]
    o_tile = load_rows(o, start_i, N, stride_on, BM, DV, DVP, True).to(dtype)  # [BM, DVP]
    delta = tl.where(has_keys, tl.sum(do_tile * o_tile, 1), 0.0)
    if DLSE:
        delta -= tl.load(dlse + row, mask=inside, other=0.0)
    tl.store(delta_out + row, delta, mask=inside)
    if SECOND:
        to = part_of(to, b, h, 0, stride_tob, stride_toh, stride_ton)
        terms = do_tile * load_rows(to, start_i, N, stride_ton, BM, DV, DVP, True).to(dtype)
        if TDO:
            tdo = part_of(tdo, b, h, 0, stride_tdob, stride_tdoh, stride_tdon)
            terms += load_rows(tdo, start_i, N, stride_tdon, BM, DV, DVP, True).to(dtype) * o_tile
        tdelta = tl.where(has_keys, tl.sum(terms, 1), 0.0)
        if TDLSE:
            tdelta -= tl.load(tdlse + row, mask=inside, other=0.0)
        tl.store(tdelta_out + row, tdelta, mask=inside)


@triton.jit
def _gradients(
    raw,
    traw,
    dp,
    tdp,
    keep,
    seen,
    i,
    j,
    m,
    log_l,
    delta,
    tlse,
    tdelta,
    bias,
    bias_stride_n,
    bias_stride_k,
    tbias,
    slope,
    scale,
    softcap,
    N,
    Nk,
    BIAS: tl.constexpr,
    T_BIAS: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Return what the sums of a tile need, zero where not seen: `w ds dx` and `tw tds tdx`.

    In either order of the tile. `w = p keep`, `ds = p (dp - delta)`, `dx = ds cap'`, and the
    tangents of the three; without SECOND those are `w ds dx` again.
    """
    dtype: tl.constexpr = raw.dtype
    s, t, derivative = logits(
        raw, i, j, bias, bias_stride_n, bias_stride_k, slope, scale, softcap, N, Nk,
        BIAS, ALIBI, SOFTCAP,
    )  # fmt: skip
    p = probabilities(s, m, log_l, seen)
    attended = seen & (m != -INF)
    w = p
    if DROPOUT:
        w = p * keep
        dp = dp * keep
    ds = tl.where(attended, p * (dp - delta), 0.0)
    dx = ds
    if SOFTCAP:
        dx = ds * derivative
    tw, tds, tdx = w, ds, dx
    if SECOND:
        factor, cap = number(scale, dtype), number(softcap, dtype)
        tx = traw * factor
        ts = tx
        if SOFTCAP:
            ts = tx * derivative
        if T_BIAS:
            ts += load_bias(tbias, i, j, bias_stride_n, bias_stride_k, N, Nk).to(dtype)
        tp = tl.where(attended, p * (ts - tlse), 0.0)
        tw = tp
        if DROPOUT:
            tw = tp * keep
            tdp = tdp * keep
        tds = tl.where(attended, tp * (dp - delta) + p * (tdp - tdelta), 0.0)
        tdx = tds
        if SOFTCAP:
            tdx = tds * derivative - (2.0 * ds) * (t * derivative) * (traw * (factor / cap))
            tdx = tl.where(attended, tdx, 0.0)
    return w, ds, dx, tw, tds, tdx


@triton.jit(do_not_specialize=["N", "Nk", "S", "first_entry", "seed_low", "seed_high", "threshold"])
def attention_dq_kernel(
    q, k, v, tq, tk, tv, do, tdo, bias, tbias, slopes, mask, tiles, m, log_l, delta, tlse, tdelta,
    H, group, N, Nk, S, order, q_starts, k_starts,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_tqb, stride_tqh, stride_tqn, stride_tkb, stride_tkh, stride_tkn,
    stride_tvb, stride_tvh, stride_tvn, stride_tdob, stride_tdoh, stride_tdon,
    bias_stride_b, bias_stride_h, bias_stride_n, bias_stride_k,
    slopes_stride_b, mask_stride_b, mask_stride_h,
    scale: tl.float64, softcap: tl.float64, first_entry,
    seed_low: tl.uint32, seed_high: tl.uint32, threshold: tl.uint32, factor: tl.float64,
    dq, spoiled, stride_dqb, stride_dqh, stride_dqn,
    PACKED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SECOND: tl.constexpr, T_Q: tl.constexpr,
    T_K: tl.constexpr, T_V: tl.constexpr, T_BIAS: tl.constexpr, TDO: tl.constexpr,
    HIDES: tl.constexpr, CAREFUL: tl.constexpr,
    WEIGHTS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of queries of one head, or its tangent: a walk over the keys.

    See `attention_fwd_kernel` for CAREFUL.
    """
    dtype: tl.constexpr = m.dtype.element_ty
    # One loop for all tiles keeps a kernel small that is large already.
    WHOLE: tl.constexpr = CAREFUL or SECOND or BIAS or SOFTCAP or DROPOUT
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
    if MASK == INTERVALS:
        mask = mask + (part * total + first_i) * 4
        bounds = bounds_of(tiles, part, entry, first_i, total, BM, BOUNDS, PACKED)
    if MASK == BITS:
        words = (N + 15) // 16
        mask, bounds = mask + part * Nk * words, tiles + part * words * ((Nk + 63) // 64)
    k = part_of(k, b, h // group, first_j, stride_kb, stride_kh, stride_kn)
    v = part_of(v, b, h // group, first_j, stride_vb, stride_vh, stride_vn)
    q = part_of(q, b, h, first_i, stride_qb, stride_qh, stride_qn)
    do = part_of(do, b, h, first_i, stride_dob, stride_doh, stride_don)
    q_tile = load_rows(q, start_i, N, stride_qn, BM, D, DP, True)  # [BM, DP]
    do_tile = load_rows(do, start_i, N, stride_don, BM, DV, DVP, True)  # [BM, DVP]
    top = tl.load(m + row, mask=inside, other=-INF)[:, None]
    log_sum = tl.load(log_l + row, mask=inside, other=0.0)[:, None]
    delta_row = tl.load(delta + row, mask=inside, other=0.0)[:, None]
    tq_tile, tdo_tile, tlse_row, tdelta_row = q_tile, do_tile, delta_row, delta_row
    if SECOND:
        tlse_row = tl.load(tlse + row, mask=inside, other=0.0)[:, None]
        tdelta_row = tl.load(tdelta + row, mask=inside, other=0.0)[:, None]
        if T_Q:
            tq = part_of(tq, b, h, first_i, stride_tqb, stride_tqh, stride_tqn)
            tq_tile = load_rows(tq, start_i, N, stride_tqn, BM, D, DP, True)
        if TDO:
            tdo = part_of(tdo, b, h, first_i, stride_tdob, stride_tdoh, stride_tdon)
            tdo_tile = load_rows(tdo, start_i, N, stride_tdon, BM, DV, DVP, True)
        if T_K:
            tk = part_of(tk, b, h // group, first_j, stride_tkb, stride_tkh, stride_tkn)
        if T_V:
            tv = part_of(tv, b, h // group, first_j, stride_tvb, stride_tvh, stride_tvn)
        if T_BIAS:
            tbias = part_of(tbias, b, h, first_i, bias_stride_b, bias_stride_h, bias_stride_n)

    acc = tl.zeros([BM, DP], dtype)
    begin, full, rest, stop, turn, jump = key_spans(bounds, tile, Nk, MASK, BN)
    for PART in tl.static_range(3):
        if PART == 0:
            first, last = begin, full
        elif PART == 1:
            first, last = full, rest
        else:
            first, last = rest, stop
        if WHOLE:
            first, last = begin, stop
        if (PART == 2) or (
            (not WHOLE) and ((MASK == INTERVALS) or ((PART == 1) and (MASK == EVERYTHING)))
        ):
            for t in range(first, last):
                start_j = (t + tl.where(t >= turn, jump, 0)) * BN
                if (MASK != BITS) or occupied(bounds, start_i, start_j, N, Nk, BM, BN):
                    j = (start_j + tl.arange(0, BN))[None, :]
                    k_tile = load_rows(k, start_j, Nk, stride_kn, BN, D, DP, WHOLE or PART != 1)
                    v_tile = load_rows(v, start_j, Nk, stride_vn, BN, DV, DVP, WHOLE or PART != 1)
                    raw = rows_times_rows(q_tile, k_tile, PRECISION)  # [BM, BN]
                    dp = rows_times_rows(do_tile, v_tile, PRECISION)  # [BM, BN]
                    traw, tdp, keep = raw, dp, raw
                    tk_tile = k_tile
                    if SECOND:
                        tv_tile = v_tile
                        if T_K:
                            tk_tile = load_rows(tk, start_j, Nk, stride_tkn, BN, D, DP, True)
                        if T_V:
                            tv_tile = load_rows(tv, start_j, Nk, stride_tvn, BN, DV, DVP, True)
                        traw = _products(q_tile, tq_tile, k_tile, tk_tile, T_Q, T_K, PRECISION)
                        tdp = _products(do_tile, tdo_tile, v_tile, tv_tile, TDO, T_V, PRECISION)
                    if DROPOUT:
                        keep = kept(
                            start_i, start_j, Nk - N, h, first_entry + entry,
                            seed_low, seed_high, threshold, factor, BM, BN, dtype,
                        )  # fmt: skip
                    seen = visible(mask, i, j, N, Nk, MASK, WHOLE or PART != 1)
                    _, _, dx, _, _, tdx = _gradients(
                        raw, traw, dp, tdp, keep, seen, i, j,
                        top, log_sum, delta_row, tlse_row, tdelta_row,
                        bias, bias_stride_n, bias_stride_k,
                        tbias,
                        slope, scale, softcap, N, Nk,
                        BIAS, T_BIAS, ALIBI, SOFTCAP, DROPOUT, SECOND,
                    )  # fmt: skip
                    acc = _add(acc, tdx, k_tile, seen, CAREFUL, WEIGHTS, PRECISION)
                    if SECOND and T_K:
                        acc = _add(acc, dx, tk_tile, seen, CAREFUL, WEIGHTS, PRECISION)
    if (HIDES) and (not CAREFUL):
        tl.store(spoiled + tl.program_id(0), any_not_finite(acc).to(tl.int32))
    acc = tl.where(top != -INF, acc, 0.0) * number(scale, dtype)
    dq = part_of(dq, b, h, first_i, stride_dqb, stride_dqh, stride_dqn)
    store_rows(dq, acc, start_i, N, stride_dqn, BM, D, DP)


@triton.jit(do_not_specialize=["N", "Nk", "S", "first_entry", "seed_low", "seed_high", "threshold"])
def attention_dkv_kernel(
    q, k, v, tq, tk, tv, do, tdo, bias, tbias, slopes, mask, tiles, m, log_l, delta, tlse, tdelta,
    H, group, N, Nk, S, order, q_starts, k_starts,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_tqb, stride_tqh, stride_tqn, stride_tkb, stride_tkh, stride_tkn,
    stride_tvb, stride_tvh, stride_tvn, stride_tdob, stride_tdoh, stride_tdon,
    bias_stride_b, bias_stride_h, bias_stride_n, bias_stride_k,
    slopes_stride_b, mask_stride_b, mask_stride_h,
    scale: tl.float64, softcap: tl.float64, first_entry,
    seed_low: tl.uint32, seed_high: tl.uint32, threshold: tl.uint32, factor: tl.float64,
    dk, dv, spoiled, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    PACKED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SECOND: tl.constexpr, T_Q: tl.constexpr,
    T_K: tl.constexpr, T_V: tl.constexpr, T_BIAS: tl.constexpr, TDO: tl.constexpr,
    D_K: tl.constexpr, D_V: tl.constexpr,
    HIDES: tl.constexpr, CAREFUL: tl.constexpr,
    WEIGHTS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values, or their tangents: a walk over the queries.

    See `attention_fwd_kernel` for CAREFUL.
    """
    dtype: tl.constexpr = m.dtype.element_ty
    WHOLE: tl.constexpr = CAREFUL or SECOND or BIAS or SOFTCAP or DROPOUT
    total = N
    b, hk, entry, tile, first_i, first_j, N, Nk = tile_of(
        tl.program_id(0), H // group, N, Nk, S, order, q_starts, k_starts, BN, True, PACKED
    )
    query_tiles, start_j = (N + BM - 1) // BM, tile * BN
    if PACKED and start_j >= Nk:
        return
    if CAREFUL and tl.load(spoiled + tl.program_id(0)) == 0:
        return
    j = (start_j + tl.arange(0, BN))[:, None]
    k = part_of(k, b, hk, first_j, stride_kb, stride_kh, stride_kn)
    v = part_of(v, b, hk, first_j, stride_vb, stride_vh, stride_vn)
    k_tile = load_rows(k, start_j, Nk, stride_kn, BN, D, DP, True)  # [BN, DP]
    v_tile = load_rows(v, start_j, Nk, stride_vn, BN, DV, DVP, True)  # [BN, DVP]
    tk_tile, tv_tile = k_tile, v_tile
    if SECOND and T_K:
        tk = part_of(tk, b, hk, first_j, stride_tkb, stride_tkh, stride_tkn)
        tk_tile = load_rows(tk, start_j, Nk, stride_tkn, BN, D, DP, True)
    if SECOND and T_V:
        tv = part_of(tv, b, hk, first_j, stride_tvb, stride_tvh, stride_tvn)
        tv_tile = load_rows(tv, start_j, Nk, stride_tvn, BN, DV, DVP, True)

    dk_tile = tl.zeros([BN, DP], dtype)
    dv_tile = tl.zeros([BN, DVP], dtype)
    for g in range(0, group):
        h = hk * group + g
        part = (b * mask_stride_b + h * mask_stride_h).to(tl.int64)
        mask_part, bounds, bias_part, tbias_part = mask, tiles, bias, tbias
        slope = number(0.0, dtype)
        if ALIBI:
            slope = tl.load(slopes + entry * slopes_stride_b + h).to(dtype)
        if BIAS:
            bias_part = part_of(bias, b, h, first_i, bias_stride_b, bias_stride_h, bias_stride_n)
        if T_BIAS:
            tbias_part = part_of(tbias, b, h, first_i, bias_stride_b, bias_stride_h, bias_stride_n)
        if MASK == INTERVALS:
            mask_part = mask + (part * total + first_i) * 4
            bounds = bounds_of(tiles, part, entry, first_i, total, BM, BOUNDS, PACKED)
        if MASK == BITS:
            words = (N + 15) // 16
            mask_part = mask + part * Nk * words
            bounds = tiles + part * words * ((Nk + 63) // 64)
        begin, full, rest, stop = query_spans(bounds, query_tiles, start_j, Nk, MASK, BN)
        for PART in tl.static_range(3):
            if PART == 0:
                first, last = begin, full
            elif PART == 1:
                first, last = full, rest
            else:
                first, last = rest, stop
            if WHOLE:
                first, last = begin, stop
            if (PART == 2) or (
                (not WHOLE) and ((MASK == INTERVALS) or ((PART == 1) and (MASK == EVERYTHING)))
            ):
                for t in range(first, last):
                    start_i = t * BM
                    if (MASK != BITS) or occupied(bounds, start_i, start_j, N, Nk, BM, BN):
                        i = start_i + tl.arange(0, BM)
                        inside = i < N
                        row = (b * H + h).to(tl.int64) * total + first_i + i
                        top = tl.load(m + row, mask=inside, other=-INF)[None, :]
                        log_sum = tl.load(log_l + row, mask=inside, other=0.0)[None, :]
                        delta_row = tl.load(delta + row, mask=inside, other=0.0)[None, :]
                        tlse_row, tdelta_row = delta_row, delta_row
                        q_tile = load_rows(
                            part_of(q, b, h, first_i, stride_qb, stride_qh, stride_qn),
                            start_i, N, stride_qn, BM, D, DP, True,
                        )  # fmt: skip  # [BM, DP]
                        do_tile = load_rows(
                            part_of(do, b, h, first_i, stride_dob, stride_doh, stride_don),
                            start_i, N, stride_don, BM, DV, DVP, True,
                        )  # fmt: skip  # [BM, DVP]
                        raw = rows_times_rows(k_tile, q_tile, PRECISION)  # [BN, BM]
                        dp = rows_times_rows(v_tile, do_tile, PRECISION)  # [BN, BM]
                        traw, tdp, keep = raw, dp, raw
                        tq_tile, tdo_tile = q_tile, do_tile
                        if SECOND:
                            tlse_row = tl.load(tlse + row, mask=inside, other=0.0)[None, :]
                            tdelta_row = tl.load(tdelta + row, mask=inside, other=0.0)[None, :]
                            if T_Q:
                                tq_tile = load_rows(
                                    part_of(tq, b, h, first_i, stride_tqb, stride_tqh, stride_tqn),
                                    start_i, N, stride_tqn, BM, D, DP, True,
                                )  # fmt: skip
                            if TDO:
                                tdo_part = part_of(
                                    tdo, b, h, first_i, stride_tdob, stride_tdoh, stride_tdon
                                )
                                tdo_tile = load_rows(
                                    tdo_part, start_i, N, stride_tdon, BM, DV, DVP, True
                                )
                            traw = _products(k_tile, tk_tile, q_tile, tq_tile, T_K, T_Q, PRECISION)
                            tdp = _products(v_tile, tv_tile, do_tile, tdo_tile, T_V, TDO, PRECISION)
                        if DROPOUT:
                            keep = tl.trans(
                                kept(
                                    start_i,
                                    start_j,
                                    Nk - N,
                                    h,
                                    first_entry + entry,
                                    seed_low,
                                    seed_high,
                                    threshold,
                                    factor,
                                    BM,
                                    BN,
                                    dtype,
                                )
                            )
                        i = i[None, :]
                        seen = visible(mask_part, i, j, N, Nk, MASK, WHOLE or PART != 1)
                        w, _, dx, tw, _, tdx = _gradients(
                            raw, traw, dp, tdp, keep, seen, i, j,
                            top, log_sum, delta_row, tlse_row, tdelta_row,
                            bias_part, bias_stride_n, bias_stride_k,
                            tbias_part,
                            slope, scale, softcap, N, Nk,
                            BIAS, T_BIAS, ALIBI, SOFTCAP, DROPOUT, SECOND,
                        )  # fmt: skip
                        alive = seen & (top != -INF)
                        if D_V:
                            dv_tile = _add(dv_tile, tw, do_tile, alive, CAREFUL, WEIGHTS, PRECISION)
                            if SECOND and TDO:
                                dv_tile = _add(
                                    dv_tile, w, tdo_tile, alive, CAREFUL, WEIGHTS, PRECISION
                                )
                        if D_K:
                            dk_tile = _add(dk_tile, tdx, q_tile, alive, CAREFUL, WEIGHTS, PRECISION)
                            if SECOND and T_Q:
                                dk_tile = _add(
                                    dk_tile, dx, tq_tile, alive, CAREFUL, WEIGHTS, PRECISION
                                )
    if (HIDES) and (not CAREFUL):
        bad = any_not_finite(dk_tile) | any_not_finite(dv_tile)
        tl.store(spoiled + tl.program_id(0), bad.to(tl.int32))
    if D_K:
        dk = part_of(dk, b, hk, first_j, stride_dkb, stride_dkh, stride_dkn)
        store_rows(dk, dk_tile * number(scale, dtype), start_j, Nk, stride_dkn, BN, D, DP)
    if D_V:
        dv = part_of(dv, b, hk, first_j, stride_dvb, stride_dvh, stride_dvn)
        store_rows(dv, dv_tile, start_j, Nk, stride_dvn, BN, DV, DVP)
