"""The gradients and their tangents: cotangents of a strip of logits, and their products."""

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.shared.triton_losses import capped
from tilewise.shared.triton_math import number

from .tiles import (
    logit_tangents,
    of_tokens,
    probabilities,
    products,
    steepness,
    target_weights,
    token_targets,
    with_bias,
)


@triton.jit
def linear_cross_entropy_cotangents_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    class_weight_ptr,
    weight_total_ptr,
    mass_ptr,
    m_ptr,
    log_l_ptr,
    entropy_ptr,
    g_ptr,
    g_lse_ptr,
    g_entropy_ptr,
    scale_ptr,
    thidden_ptr,
    tweight_ptr,
    tbias_ptr,
    tg_ptr,
    tg_lse_ptr,
    tg_entropy_ptr,
    sums_ptr,
    T,
    C,
    V,
    strip_start,
    strip,
    loss_step,
    first_class,
    ignored,
    sharp: tl.float64,
    share: tl.float64,
    zeta: tl.float64,
    cap: tl.float64,
    live_ptr,
    dz_ptr,
    tdz_ptr,
    SECOND: tl.constexpr,
    CAPPED: tl.constexpr,
    SQUARED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the cotangents dz of a strip of logits, `(T, strip)`, and with SECOND their tangents.

    The formulas are those of `tilewise.ops.linear_cross_entropy.reference`. `live_ptr` takes which
    tokens have a cotangent; the others have dz 0, whatever their hidden states hold. `loss_step` is
    0 where one cotangent of the loss stands for all tokens.
    """
    wide: tl.constexpr = m_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_T
    token = row + tl.arange(0, BLOCK_T)
    has = token < T
    in_strip = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    start = strip_start + tl.program_id(1).to(tl.int64) * BLOCK_V
    cols = start + tl.arange(0, BLOCK_V)
    inside = has[:, None] & (cols < V)[None, :]  # [BLOCK_T, BLOCK_V]
    sharp, share = number(sharp, wide), number(share, wide)
    zeta, cap = number(zeta, wide), number(cap, wide)
    y, w_y, kept = token_targets(
        targets_ptr, class_weight_ptr, token, T, V, first_class, ignored, wide
    )
    m = tl.load(m_ptr + token, mask=has, other=0.0)
    alive = m != float("-inf")
    kept = kept & alive
    log_l = tl.load(log_l_ptr + token, mask=has, other=0.0)
    one = tl.full([], 1.0, tl.float64)
    scale = one
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    g = of_tokens(g_ptr, token, loss_step, kept, scale, wide)
    g_lse = of_tokens(g_lse_ptr, token, 1, has, one, wide)
    g_entropy = of_tokens(g_entropy_ptr, token, 1, has, one, wide)
    live = (g != 0.0) | (g_lse != 0.0) | (g_entropy != 0.0)
    steep = steepness(
        kept, w_y, tl.where(alive, m + log_l, 0.0), mass_ptr, weight_total_ptr, token, T, V,
        sharp, share, zeta, SQUARED, wide,
    )  # fmt: skip

    z = tl.zeros([BLOCK_T, BLOCK_V], wide)
    z = products(z, hidden_ptr, weight_ptr, row, T, start, V, C, PRECISION, BLOCK_K)
    s, slope, bend = capped(with_bias(z, bias_ptr, cols, V, wide), inside, cap, CAPPED)
    p, surprise = probabilities(s, m, log_l, entropy_ptr, token, T, wide)
    t = target_weights(y, w_y, kept, cols, inside, class_weight_ptr, V, sharp, share, wide)
    alpha = tl.where(live, g * steep + g_lse, 0.0)
    ds = alpha[:, None] * p - g[:, None] * t - g_entropy[:, None] * surprise
    at = token[:, None] * strip + in_strip[None, :]
    stored = has[:, None] & (in_strip < strip)[None, :]
    if SECOND:
        tg = of_tokens(tg_ptr, token, loss_step, kept, scale, wide)
        tg_lse = of_tokens(tg_lse_ptr, token, 1, has, one, wide)
        tg_entropy = of_tokens(tg_entropy_ptr, token, 1, has, one, wide)
        live = live | (tg != 0.0) | (tg_lse != 0.0) | (tg_entropy != 0.0)
        tz = tl.zeros([BLOCK_T, BLOCK_V], wide)
        tz = logit_tangents(
            hidden_ptr, weight_ptr, thidden_ptr, tweight_ptr, tbias_ptr, tz, row, T, start,
            cols, V, C, wide, PRECISION, BLOCK_K,
        )  # fmt: skip
        ts = slope * tz
        mu = tl.load(sums_ptr + token, mask=has, other=0.0)
        tentropy = -tl.load(sums_ptr + 2 * T + token, mask=has, other=0.0)
        gap = ts - mu[:, None]
        talpha = tg * steep + tg_lse
        if SQUARED:
            talpha += g * 2.0 * zeta * mu
        tds = talpha[:, None] * p - tg[:, None] * t - tg_entropy[:, None] * surprise
        tds += alpha[:, None] * p * gap
        tds -= g_entropy[:, None] * (surprise * gap + p * (gap + tentropy[:, None]))
        tdz = tl.where(live[:, None] & inside, tds * slope + ds * bend * tz, 0.0)
        tl.store(tdz_ptr + at, tdz.to(tdz_ptr.dtype.element_ty), mask=stored)
    dz = tl.where(live[:, None] & inside, ds * slope, 0.0)
    tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=stored)
    if live_ptr is not None:
        tl.store(live_ptr + token, live.to(tl.int8), mask=has & (tl.program_id(1) == 0))


@triton.jit
def _tile(ptr, r, c, row_stride, col_stride, inside):
    """Return a tile; offsets inside it have 32 bits."""
    return tl.load(ptr + r[:, None] * row_stride + c[None, :] * col_stride, mask=inside, other=0.0)


@triton.jit
def linear_cross_entropy_gradient_kernel(
    a_ptr,
    b_ptr,
    a2_ptr,
    b2_ptr,
    live_ptr,
    before_ptr,
    M,
    N,
    K,
    a_row,
    a_inner,
    after_ptr,
    rows_ptr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute `before + a b + a2 b2`, `(M, N)`, with b `(K, N)`, and the sums of the rows of a.

    That is dhidden, where a is dz, or dweight and dbias, where it is dz transposed. Rows of b whose
    entry of `live_ptr` is 0 count as zeros. Terms are added in the order of K, so that the bits do
    not depend on how K is cut into strips, in multiples of BLOCK_K.
    """
    wide: tl.constexpr = tl.float64 if after_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_M
    col = tl.program_id(1).to(tl.int64) * BLOCK_N
    r, c, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    has_row, has_col = row + r < M, col + c < N
    inside = has_row[:, None] & has_col[None, :]  # [BLOCK_M, BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], wide)
    if before_ptr is not None:
        acc = _tile(before_ptr + row * N + col, r, c, N, 1, inside)
    total = tl.zeros([BLOCK_M, BLOCK_K if rows_ptr is not None else 1], wide)
    for begin in range(0, K, BLOCK_K):
        start = tl.cast(begin, tl.int64)
        in_a = has_row[:, None] & (start + k < K)[None, :]  # [BLOCK_M, BLOCK_K]
        there = start + k < K
        if live_ptr is not None:
            there = there & (tl.load(live_ptr + start + k, mask=there, other=0) != 0)
        in_b = there[:, None] & has_col[None, :]  # [BLOCK_K, BLOCK_N]
        at_a, at_b = row * a_row + start * a_inner, start * N + col
        a = _tile(a_ptr + at_a, r, k, a_row, a_inner, in_a)
        b = _tile(b_ptr + at_b, k, c, N, 1, in_b)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION, out_dtype=acc.dtype)
        if a2_ptr is not None:
            a2 = _tile(a2_ptr + at_a, r, k, a_row, a_inner, in_a)
            b2 = _tile(b2_ptr + at_b, k, c, N, 1, in_b)
            acc = tl.dot(a2, b2.to(a2.dtype), acc, input_precision=PRECISION, out_dtype=acc.dtype)
        if rows_ptr is not None:
            total += a.to(wide)
    at = (row * N + col) + r[:, None] * N + c[None, :]
    tl.store(after_ptr + at, acc.to(after_ptr.dtype.element_ty), mask=inside)
    if rows_ptr is not None:
        first = tl.program_id(1) == 0
        of_rows = tl.sum(total, axis=1).to(rows_ptr.dtype.element_ty)
        tl.store(rows_ptr + row + r, of_rows, mask=has_row & first)
