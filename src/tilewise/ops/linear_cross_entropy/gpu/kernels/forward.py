"""The forward pass: tiles of logits are folded into states of their tokens, which merge."""

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.shared.triton_losses import capped
from tilewise.shared.triton_math import number
from tilewise.shared.triton_rows import finite_base, larger, max_or_nan, merged_sums

from .tiles import products, target_weights, token_targets, with_bias


@triton.jit
def linear_cross_entropy_fwd_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    class_weight_ptr,
    T,
    C,
    V,
    first_class,
    ignored,
    sharp: tl.float64,
    share: tl.float64,
    cap: tl.float64,
    parts_ptr,
    argmax_parts_ptr,
    ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):
    """Fold TILES tiles of logits into the states of their tokens.

    `parts_ptr` is `(5, chunks, T)`: m, l, `far = sum t (m - s)`, `mass = sum t` and, with ENTROPY,
    `sum exp(s - m) (s - m)`; `argmax_parts_ptr` is `(chunks, T)`.
    """
    wide: tl.constexpr = parts_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_T
    token = row + tl.arange(0, BLOCK_T)
    chunk = tl.program_id(1).to(tl.int64)
    sharp, share, cap = number(sharp, wide), number(share, wide), number(cap, wide)
    y, w_y, kept = token_targets(
        targets_ptr, class_weight_ptr, token, T, V, first_class, ignored, wide
    )
    m = tl.full([BLOCK_T], float("-inf"), wide)
    l = tl.zeros([BLOCK_T], wide)
    far = tl.zeros([BLOCK_T], wide)
    mass = tl.zeros([BLOCK_T], wide)
    spread = tl.zeros([BLOCK_T], wide)
    best = tl.zeros([BLOCK_T], tl.int64)
    one = tl.full([], 1.0, wide)
    for step in range(TILES):
        start = (chunk * TILES + step) * BLOCK_V
        if start < V:
            cols = start + tl.arange(0, BLOCK_V)
            inside = (token < T)[:, None] & (cols < V)[None, :]  # [BLOCK_T, BLOCK_V]
            z = tl.zeros([BLOCK_T, BLOCK_V], wide)
            z = products(z, hidden_ptr, weight_ptr, row, T, start, V, C, PRECISION, BLOCK_K)
            z = with_bias(z, bias_ptr, cols, V, wide)
            s, _, _ = capped(z, inside, cap, CAPPED)
            t = target_weights(y, w_y, kept, cols, inside, class_weight_ptr, V, sharp, share, wide)
            own = max_or_nan(s, 1)
            if argmax_parts_ptr is not None:
                at = tl.min(tl.where(s == own[:, None], cols[None, :], V), axis=1)
                best = tl.where(own > m, at, best)
            top = larger(m, own)
            base = finite_base(top)
            gap = s - base[:, None]
            e = tl.exp(gap)
            moved = merged_sums(l, m, top, one)
            if ENTROPY:
                spread = merged_sums(spread, m, top, one)
                spread += tl.where(moved == 0.0, 0.0, moved * (m - base))
                spread += tl.sum(tl.where(e == 0.0, 0.0, e * gap), axis=1)
            l = moved + tl.sum(e, axis=1)
            far += mass * (base - finite_base(m))
            far = far + tl.sum(tl.where(t == 0.0, 0.0, -t * gap), axis=1)
            mass += tl.sum(t, axis=1)
            m = top
    at = parts_ptr + chunk * T + token
    stride = tl.num_programs(1).to(tl.int64) * T
    tl.store(at, m, mask=token < T)
    tl.store(at + stride, l, mask=token < T)
    tl.store(at + 2 * stride, far, mask=token < T)
    tl.store(at + 3 * stride, mass, mask=token < T)
    if ENTROPY:
        tl.store(at + 4 * stride, spread, mask=token < T)
    if argmax_parts_ptr is not None:
        tl.store(argmax_parts_ptr + chunk * T + token, best, mask=token < T)


@triton.jit
def linear_cross_entropy_merge_kernel(
    parts_ptr,
    argmax_parts_ptr,
    targets_ptr,
    T,
    n_parts,
    ignored,
    zeta: tl.float64,
    loss_ptr,
    z_loss_ptr,
    lse_ptr,
    m_ptr,
    log_l_ptr,
    entropy_ptr,
    argmax_ptr,
    picked_ptr,
    mass_ptr,
    SQUARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Merge the states of the chunks of classes of each token, in their order."""
    wide: tl.constexpr = m_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    has = token < T
    kept = has & (tl.load(targets_ptr + token, mask=has, other=ignored) != ignored)
    m = tl.full([BLOCK_R], float("-inf"), wide)
    l = tl.zeros([BLOCK_R], wide)
    far = tl.zeros([BLOCK_R], wide)
    mass = tl.zeros([BLOCK_R], wide)
    spread = tl.zeros([BLOCK_R], wide)
    best = tl.zeros([BLOCK_R], tl.int64)
    stride = tl.cast(n_parts, tl.int64) * T
    one = tl.full([], 1.0, wide)
    for start in range(0, n_parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        inside = (part < n_parts)[:, None] & has[None, :]  # [BLOCK_P, BLOCK_R]
        offset = part[:, None].to(tl.int64) * T + token[None, :]
        at = parts_ptr + offset
        m_part = tl.load(at, mask=inside, other=float("-inf"))
        l_part = tl.load(at + stride, mask=inside, other=0.0)
        far_part = tl.load(at + 2 * stride, mask=inside, other=0.0)
        mass_part = tl.load(at + 3 * stride, mask=inside, other=0.0)
        own = max_or_nan(m_part, 0)
        top = larger(m, own)
        base = finite_base(top)
        if argmax_ptr is not None:
            # The first of equals: the chunks hold classes in ascending order.
            cols = tl.load(argmax_parts_ptr + offset, mask=inside, other=0)
            highest = inside & (m_part == own[None, :])
            at_best = tl.min(tl.where(highest, cols, 0x7FFFFFFFFFFFFFFF), axis=0)
            best = tl.where(own > m, at_best, best)
        more = merged_sums(l_part, m_part, top[None, :], one)
        moved = merged_sums(l, m, top, one)
        if entropy_ptr is not None:
            spread_part = tl.load(at + 4 * stride, mask=inside, other=0.0)
            shifted = merged_sums(spread_part, m_part, top[None, :], one)
            shifted += tl.where(more == 0.0, 0.0, more * (m_part - base[None, :]))
            spread = merged_sums(spread, m, top, one)
            spread += tl.where(moved == 0.0, 0.0, moved * (m - base))
            spread += tl.sum(shifted, axis=0)
        l = moved + tl.sum(more, axis=0)
        far += mass * (base - finite_base(m))
        far += tl.sum(far_part + mass_part * (base[None, :] - finite_base(m_part)), axis=0)
        mass += tl.sum(mass_part, axis=0)
        m = top
    alive = m != float("-inf")
    log_l = tl.where(alive, tl.log(l), 0.0)
    lse = m + log_l
    z_loss = tl.zeros([BLOCK_R], wide)
    if SQUARED:
        z_loss = tl.where(kept & alive, number(zeta, wide) * lse * lse, 0.0)
    loss = tl.where(kept & alive, mass * log_l + far + z_loss, 0.0)
    tl.store(loss_ptr + token, loss, mask=has)
    tl.store(z_loss_ptr + token, z_loss, mask=has)
    tl.store(lse_ptr + token, lse, mask=has)
    tl.store(m_ptr + token, m, mask=has)
    tl.store(log_l_ptr + token, log_l, mask=has)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + token, tl.where(alive, log_l - spread / l, 0.0), mask=has)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + token, best, mask=has)
    if picked_ptr is not None:
        tl.store(picked_ptr + token, tl.where(mass == 0.0, 0.0, mass * m) - far, mask=has)
        tl.store(mass_ptr + token, mass, mask=has)
