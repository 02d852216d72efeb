"""The passes over the keys: attention itself, and the tangents of its outputs."""

import triton
import triton.language as tl

from tilewise.shared.triton_math import (
    INF,
    LN2,
    LOG2E,
    any_not_finite,
    load_rows,
    natural,
    number,
    rows_times_rows,
    softmax_step,
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
    logits,
    occupied,
    part_of,
    visible,
)


@triton.jit
def fold_logits(m, l, entropy, s, ENTROPY: tl.constexpr):
    """Fold a tile of logits in base 2 into the state of its rows, and into their entropy.

    Returns the new m, l and entropy, `[R]` the factor of what was summed before, and `[R, C]` the
    weights.
    """
    before, summed = m, l
    m, l, shrink, w = softmax_step(m, l, s)
    if ENTROPY:
        base = tl.where(m == -INF, 0.0, m)
        moved = tl.where(before == -INF, 0.0, (before - base) * summed)
        terms = tl.where(w != 0.0, w * (s - base[:, None]), 0.0)
        entropy = shrink * (entropy + moved) + tl.sum(terms, 1)
    return m, l, entropy, shrink, w


@triton.jit
def end_rows(
    m,
    l,
    acc,
    entropy,
    sink,
    row,
    inside,
    m_out,
    log_l_out,
    lse,
    max_logit,
    entropy_out,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Write the statistics of rows whose keys are all folded in, and return their o.

    Args:
        m: `[R]`. Row maxima in base 2.
        l: `[R]`. Sums of `2^(s - m)`.
        acc: `[R, DVP]`. Sums of `2^(s - m) v`.
        entropy: `[R]`. Sums of `2^(s - m) (s - m)`.
        sink: Where the sink of the head is.
        row: `[R]`. Places of the rows among all rows.
        inside: `[R]`. Which of them exist.
        m_out: Row maxima with the sink.
        log_l_out: Natural logarithms of the sums.
        lse: `m + log l`, natural.
        max_logit: Row maxima without the sink, natural.
        entropy_out: Entropies.
        SINKS: Whether there are sinks.
        LSE: Whether lse is asked for.
        MAX_LOGIT: Whether max_logit is.
        ENTROPY: Whether the entropy is.
    """
    if MAX_LOGIT:
        # Maxima may pass over NaN, sums do not.
        top = tl.where((l != l) & (m != INF), l, natural(m))
        tl.store(max_logit + row, top, mask=inside)
    if SINKS:
        z = tl.load(sink).to(m.dtype) * LOG2E
        top = tl.maximum(m, z)
        base = tl.where(top == -INF, 0.0, top)
        shrink, one = tl.exp2(m - base), tl.exp2(z - base)
        if ENTROPY:
            moved = tl.where(m == -INF, 0.0, (m - base) * l)
            entropy = shrink * (entropy + moved) + tl.where(one != 0.0, one * (z - base), 0.0)
        l = l * shrink + one
        acc *= shrink[:, None]
        m = top
    alive = m != -INF
    m = tl.where((l != l) & (m != INF), l, m)
    l = tl.where(alive, l, 1.0)
    log_l = tl.log(l)
    tl.store(m_out + row, m, mask=inside)
    tl.store(log_l_out + row, log_l, mask=inside)
    if LSE:
        tl.store(lse + row, natural(m) + log_l, mask=inside)
    if ENTROPY:
        value = tl.where(alive, log_l - LN2 * (entropy / l), 0.0)
        tl.store(entropy_out + row, value, mask=inside)
    return acc / l[:, None]


@triton.jit
def _forward_tile(
    m,
    l,
    acc,
    entropy,
    q,
    k,
    v,
    stride_kn,
    stride_vn,
    mask,
    bias,
    bias_stride_n,
    bias_stride_k,
    slope,
    scale,
    softcap,
    head,
    entry,
    seed_low,
    seed_high,
    threshold,
    factor,
    start_i,
    start_j,
    N,
    Nk,
    D: tl.constexpr,
    DV: tl.constexpr,
    MASK: tl.constexpr,
    MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
    BIAS: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    ENTROPY: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
):
    """Fold one tile of keys into the state `(m, l, acc)` of the rows, and into their entropy."""
    i = (start_i + tl.arange(0, BM))[:, None]
    j = (start_j + tl.arange(0, BN))[None, :]
    k_tile = load_rows(k, start_j, Nk, stride_kn, BN, D, DP, MASKED)  # [BN, DP]
    raw = rows_times_rows(q, k_tile, PRECISION)  # [BM, BN]
    s, _, _ = logits(
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
        BIAS,
        ALIBI,
        SOFTCAP,
    )
    seen = visible(mask, i, j, N, Nk, MASK, MASKED)
    if MASKED:
        s = tl.where(seen, s, -INF)
    m, l, entropy, shrink, w = fold_logits(m, l, entropy, s, ENTROPY)
    if DROPOUT:
        w *= kept(
            start_i,
            start_j,
            Nk - N,
            head,
            entry,
            seed_low,
            seed_high,
            threshold,
            factor,
            BM,
            BN,
            acc.dtype,
        )
    v_tile = load_rows(v, start_j, Nk, stride_vn, BN, DV, DVP, MASKED)  # [BN, DVP]
    acc *= shrink[:, None]
    if CAREFUL:
        acc = weigh_attended(acc, w, v_tile, seen, WEIGHTS, PRECISION)
    else:
        acc = weigh(acc, w, v_tile, WEIGHTS, PRECISION)
    return m, l, acc, entropy


@triton.jit(do_not_specialize=["N", "Nk", "S", "first_entry", "seed_low", "seed_high", "threshold"])
def attention_fwd_kernel(
    q,
    k,
    v,
    bias,
    slopes,
    sinks,
    mask,
    tiles,
    H,
    group,
    N,
    Nk,
    S,
    order,
    q_starts,
    k_starts,
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
    o,
    o_full,
    m_out,
    log_l_out,
    lse,
    max_logit,
    entropy_out,
    spoiled,
    stride_ob,
    stride_oh,
    stride_on,
    D: tl.constexpr,
    DV: tl.constexpr,
    PACKED: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    O_FULL: tl.constexpr,
    LSE: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    ENTROPY: tl.constexpr,
    HIDES: tl.constexpr,
    CAREFUL: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
):
    """Attention of one tile of queries of one head; o_full has the strides of o.

    Programs whose result is not finite say so in `spoiled`. CAREFUL, run after that, computes
    those tiles again, so that what is hidden from a row and not finite does not reach it.
    """
    dtype: tl.constexpr = m_out.dtype.element_ty
    total = N
    b, h, entry, tile, first_i, first_j, N, Nk = tile_of(
        tl.program_id(0), H, N, Nk, S, order, q_starts, k_starts, BM, False, PACKED
    )
    start_i = tile * BM
    if PACKED and start_i >= N:
        return
    if CAREFUL and tl.load(spoiled + tl.program_id(0)) == 0:
        return
    k = part_of(k, b, h // group, first_j, stride_kb, stride_kh, stride_kn)
    v = part_of(v, b, h // group, first_j, stride_vb, stride_vh, stride_vn)
    slope, part = number(0.0, dtype), (b * mask_stride_b + h * mask_stride_h).to(tl.int64)
    bounds = tiles
    if BIAS:
        bias = part_of(bias, b, h, first_i, bias_stride_b, bias_stride_h, bias_stride_n)
    if ALIBI:
        slope = tl.load(slopes + entry * slopes_stride_b + h).to(dtype)
    if MASK == INTERVALS:
        mask = mask + (part * total + first_i) * 4
        bounds = bounds_of(tiles, part, entry, first_i, total, BM, BOUNDS, PACKED)
    if MASK == BITS:
        words = (N + 15) // 16
        mask, bounds = mask + part * Nk * words, tiles + part * words * ((Nk + 63) // 64)

    q_tile = load_rows(
        part_of(q, b, h, first_i, stride_qb, stride_qh, stride_qn),
        start_i,
        N,
        stride_qn,
        BM,
        D,
        DP,
        True,
    )  # [BM, DP]
    m = tl.full([BM], -INF, dtype)
    l = tl.zeros([BM], dtype)
    entropy = tl.zeros([BM], dtype)
    acc = tl.zeros([BM, DVP], dtype)
    begin, full, rest, stop, turn, jump = key_spans(bounds, tile, Nk, MASK, BN)
    for PART in tl.static_range(3):
        if PART == 0:
            first, last = begin, full
        elif PART == 1:
            first, last = full, rest
        else:
            first, last = rest, stop
        if CAREFUL:
            first, last = begin, stop
        if (PART == 2) or (
            (not CAREFUL) and ((MASK == INTERVALS) or ((PART == 1) and (MASK == EVERYTHING)))
        ):
            for t in range(first, last):
                start_j = (t + tl.where(t >= turn, jump, 0)) * BN
                if MASK != BITS or occupied(bounds, start_i, start_j, N, Nk, BM, BN):
                    m, l, acc, entropy = _forward_tile(
                        m,
                        l,
                        acc,
                        entropy,
                        q_tile,
                        k,
                        v,
                        stride_kn,
                        stride_vn,
                        mask,
                        bias,
                        bias_stride_n,
                        bias_stride_k,
                        slope,
                        scale,
                        softcap,
                        h,
                        first_entry + entry,
                        seed_low,
                        seed_high,
                        threshold,
                        factor,
                        start_i,
                        start_j,
                        N,
                        Nk,
                        D,
                        DV,
                        MASK,
                        CAREFUL or (PART != 1),
                        CAREFUL,
                        BIAS,
                        ALIBI,
                        SOFTCAP,
                        DROPOUT,
                        ENTROPY,
                        WEIGHTS,
                        PRECISION,
                        BM,
                        BN,
                        DP,
                        DVP,
                    )

    if (HIDES) and (not CAREFUL):
        tl.store(spoiled + tl.program_id(0), any_not_finite(acc).to(tl.int32))
    i = start_i + tl.arange(0, BM)
    inside = i < N
    row = (b * H + h).to(tl.int64) * total + first_i + i
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
        inside,
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
    o = part_of(o, b, h, first_i, stride_ob, stride_oh, stride_on)
    store_rows(o, acc, start_i, N, stride_on, BM, DV, DVP)
    if O_FULL:
        o_full = part_of(o_full, b, h, first_i, stride_ob, stride_oh, stride_on)
        store_rows(o_full, acc, start_i, N, stride_on, BM, DV, DVP)
