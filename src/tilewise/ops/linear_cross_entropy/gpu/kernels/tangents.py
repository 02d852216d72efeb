"""The tangents of the loss, of lse and of the entropy: sums over tiles of logits."""

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.shared.triton_losses import capped
from tilewise.shared.triton_math import number

from .tiles import (
    logit_tangents,
    probabilities,
    products,
    steepness,
    target_weights,
    token_targets,
    with_bias,
)


@triton.jit
def linear_cross_entropy_jvp_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    class_weight_ptr,
    m_ptr,
    log_l_ptr,
    entropy_ptr,
    thidden_ptr,
    tweight_ptr,
    tbias_ptr,
    T,
    C,
    V,
    first_class,
    ignored,
    sharp: tl.float64,
    share: tl.float64,
    cap: tl.float64,
    parts_ptr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):
    """Sum `p ts`, `t ts` and `p (log p + entropy) ts` over TILES tiles: `(3, chunks, T)`."""
    wide: tl.constexpr = m_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_T
    token = row + tl.arange(0, BLOCK_T)
    chunk = tl.program_id(1).to(tl.int64)
    sharp, share, cap = number(sharp, wide), number(share, wide), number(cap, wide)
    y, w_y, kept = token_targets(
        targets_ptr, class_weight_ptr, token, T, V, first_class, ignored, wide
    )
    m = tl.load(m_ptr + token, mask=token < T, other=0.0)
    kept = kept & (m != float("-inf"))
    log_l = tl.load(log_l_ptr + token, mask=token < T, other=0.0)
    mu = tl.zeros([BLOCK_T], wide)
    of_target = tl.zeros([BLOCK_T], wide)
    surprised = tl.zeros([BLOCK_T], wide)
    for step in range(TILES):
        start = (chunk * TILES + step) * BLOCK_V
        if start < V:
            cols = start + tl.arange(0, BLOCK_V)
            inside = (token < T)[:, None] & (cols < V)[None, :]  # [BLOCK_T, BLOCK_V]
            z = tl.zeros([BLOCK_T, BLOCK_V], wide)
            z = products(z, hidden_ptr, weight_ptr, row, T, start, V, C, PRECISION, BLOCK_K)
            s, slope, _ = capped(with_bias(z, bias_ptr, cols, V, wide), inside, cap, CAPPED)
            tz = tl.zeros([BLOCK_T, BLOCK_V], wide)
            tz = logit_tangents(
                hidden_ptr, weight_ptr, thidden_ptr, tweight_ptr, tbias_ptr, tz, row, T, start,
                cols, V, C, wide, PRECISION, BLOCK_K,
            )  # fmt: skip
            ts = slope * tz
            p, surprise = probabilities(s, m, log_l, entropy_ptr, token, T, wide)
            t = target_weights(y, w_y, kept, cols, inside, class_weight_ptr, V, sharp, share, wide)
            mu += tl.sum(tl.where(p == 0.0, 0.0, p * ts), axis=1)
            of_target += tl.sum(tl.where(t == 0.0, 0.0, t * ts), axis=1)
            surprised += tl.sum(tl.where(surprise == 0.0, 0.0, surprise * ts), axis=1)
    at = parts_ptr + chunk * T + token
    stride = tl.num_programs(1).to(tl.int64) * T
    tl.store(at, mu, mask=token < T)
    tl.store(at + stride, of_target, mask=token < T)
    tl.store(at + 2 * stride, surprised, mask=token < T)


@triton.jit
def linear_cross_entropy_tangents_kernel(
    sums_ptr,
    targets_ptr,
    class_weight_ptr,
    weight_total_ptr,
    m_ptr,
    log_l_ptr,
    T,
    V,
    first_class,
    ignored,
    sharp: tl.float64,
    share: tl.float64,
    zeta: tl.float64,
    tloss_ptr,
    tlse_ptr,
    tentropy_ptr,
    SQUARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute the tangents of loss, lse and entropy of the sums `(3, T)` of each token."""
    wide: tl.constexpr = m_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    has = token < T
    sharp, share, zeta = number(sharp, wide), number(share, wide), number(zeta, wide)
    _, w_y, kept = token_targets(
        targets_ptr, class_weight_ptr, token, T, V, first_class, ignored, wide
    )
    lse = tl.load(m_ptr + token, mask=has, other=0.0)
    kept = kept & (lse != float("-inf"))
    lse += tl.load(log_l_ptr + token, mask=has, other=0.0)
    steep = steepness(
        kept, w_y, lse, None, weight_total_ptr, token, T, V, sharp, share, zeta, SQUARED, wide
    )
    mu = tl.load(sums_ptr + token, mask=has, other=0.0)
    of_target = tl.load(sums_ptr + T + token, mask=has, other=0.0)
    tl.store(tloss_ptr + token, tl.where(kept, steep * mu - of_target, 0.0), mask=has)
    tl.store(tlse_ptr + token, mu, mask=has)
    if tentropy_ptr is not None:
        tl.store(tentropy_ptr + token, -tl.load(sums_ptr + 2 * T + token, mask=has), mask=has)
