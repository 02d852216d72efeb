"""The Triton kernels of the cross-entropy: the forward pass, and one walk for its derivatives.

Rows lie as `(tile, other, C)`: programs cut the tile axis and C. A row that fits into one tile is
done at once. The sums of a longer one are stored for each part, merged in the order of the parts,
and read by a second launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.shared.triton_losses import capped
from tilewise.shared.triton_math import number
from tilewise.shared.triton_rows import (
    finite_base,
    larger,
    max_or_nan,
    merged_sums,
    tile_of_rows,
)


@triton.jit
def _target_weights(y, at_q, q_ptr, w, c, inside, kept, sharp, share):
    """Return the weight t of each class in the targets of rows, 0 in those that are not kept."""
    if q_ptr is not None:
        own = tl.load(q_ptr + at_q, mask=inside, other=0.0).to(w.dtype)
    else:
        own = (c[None, :] == y[:, None]).to(w.dtype)
    t = w[None, :] * (sharp * own + share)  # [BLOCK_R, BLOCK_C]
    return tl.where(inside & kept[:, None], t, 0.0)


@triton.jit
def _finish(m, l, far, total, kept, zeta, SQUARED: tl.constexpr):
    """Return loss, lse, z_loss and log_l of rows, of sums relative to their maxima."""
    alive = m != float("-inf")
    log_l = tl.where(alive, tl.log(l), 0.0)
    # Beside an infinite maximum the sum is NaN, though it is infinite.
    lse = tl.where(m == float("inf"), m, m + log_l)
    z_loss = tl.zeros(m.shape, m.dtype)
    if SQUARED:
        whole = m + log_l
        z_loss = tl.where(kept & alive, zeta * whole * whole, 0.0)
    loss = tl.where(kept & alive, total * log_l + far + z_loss, 0.0)
    return loss, lse, z_loss, log_l


@triton.jit
def cross_entropy_fwd_kernel(
    x_ptr,
    targets_ptr,
    q_ptr,
    weight_ptr,
    n_tile,
    n_rows,
    C,
    row_tile,
    row_other,
    x_tile,
    x_other,
    x_c,
    q_tile,
    q_other,
    q_c,
    ignored,
    sharp: tl.float64,
    share: tl.float64,
    zeta: tl.float64,
    cap: tl.float64,
    loss_ptr,
    lse_ptr,
    z_loss_ptr,
    m_ptr,
    log_l_ptr,
    total_ptr,
    parts_ptr,
    CAPPED: tl.constexpr,
    SQUARED: tl.constexpr,
    PHASE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute loss, lse, z_loss, m, log_l and total of each row.

    PHASE is "whole" where a row is one tile. Else "sums" stores `(m, l, far, total)` of each part,
    with `far = sum t (m - s)`.
    """
    wide: tl.constexpr = m_ptr.dtype.element_ty
    tile, other, has_row = tile_of_rows(n_tile, BLOCK_R)
    row = tile * row_tile + other * row_other  # [BLOCK_R]
    part = tl.program_id(1).to(tl.int64)
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = has_row[:, None] & (c < C)[None, :]  # [BLOCK_R, BLOCK_C]
    y = tl.zeros([BLOCK_R], tl.int64)
    kept = has_row
    if targets_ptr is not None:
        y = tl.load(targets_ptr + row, mask=has_row, other=0)
        kept = has_row & (y != ignored)
    w = tl.full([BLOCK_C], 1.0, wide)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + c, mask=c < C, other=0.0)
    at = tile[:, None] * x_tile + other * x_other + c[None, :] * x_c
    z = tl.load(x_ptr + at, mask=inside, other=0.0).to(wide)
    s, _, _ = capped(z, inside, number(cap, wide), CAPPED)
    at = tile[:, None] * q_tile + other * q_other + c[None, :] * q_c
    t = _target_weights(y, at, q_ptr, w, c, inside, kept, number(sharp, wide), number(share, wide))

    m = max_or_nan(s, 1)
    gap = s - finite_base(m)[:, None]
    l = tl.sum(tl.exp(gap), axis=1)
    far = tl.sum(tl.where(t == 0.0, 0.0, -t * gap), axis=1)
    total = tl.sum(t, axis=1)
    if PHASE == "sums":
        at_part = parts_ptr + part * n_rows + row
        stride = tl.num_programs(1).to(tl.int64) * n_rows
        tl.store(at_part, m, mask=has_row)
        tl.store(at_part + stride, l, mask=has_row)
        tl.store(at_part + 2 * stride, far, mask=has_row)
        tl.store(at_part + 3 * stride, total, mask=has_row)
    else:
        loss, lse, z_loss, log_l = _finish(m, l, far, total, kept, number(zeta, wide), SQUARED)
        tl.store(loss_ptr + row, loss, mask=has_row)
        tl.store(lse_ptr + row, lse, mask=has_row)
        tl.store(z_loss_ptr + row, z_loss, mask=has_row)
        tl.store(m_ptr + row, m, mask=has_row)
        tl.store(log_l_ptr + row, log_l, mask=has_row)
        tl.store(total_ptr + row, total, mask=has_row)


@triton.jit
def cross_entropy_merge_kernel(
    parts_ptr,
    targets_ptr,
    n_rows,
    n_parts,
    ignored,
    zeta: tl.float64,
    loss_ptr,
    lse_ptr,
    z_loss_ptr,
    m_ptr,
    log_l_ptr,
    total_ptr,
    SQUARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Merge the states `(m, l, far, total)` of the parts of each row, in their order."""
    wide: tl.constexpr = m_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    has_row = row < n_rows
    kept = has_row
    if targets_ptr is not None:
        kept = has_row & (tl.load(targets_ptr + row, mask=has_row, other=0) != ignored)
    m = tl.full([BLOCK_R], float("-inf"), wide)
    l = tl.zeros([BLOCK_R], wide)
    far = tl.zeros([BLOCK_R], wide)
    total = tl.zeros([BLOCK_R], wide)
    stride = tl.cast(n_parts, tl.int64) * n_rows
    one = tl.full([], 1.0, wide)
    for start in range(0, n_parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        inside = (part < n_parts)[:, None] & has_row[None, :]  # [BLOCK_P, BLOCK_R]
        at = parts_ptr + part[:, None].to(tl.int64) * n_rows + row[None, :]
        m_part = tl.load(at, mask=inside, other=float("-inf"))
        l_part = tl.load(at + stride, mask=inside, other=0.0)
        far_part = tl.load(at + 2 * stride, mask=inside, other=0.0)
        total_part = tl.load(at + 3 * stride, mask=inside, other=0.0)
        top = larger(m, max_or_nan(m_part, 0))
        base = finite_base(top)
        more = merged_sums(l_part, m_part, top[None, :], one)
        l = merged_sums(l, m, top, one) + tl.sum(more, axis=0)
        far += total * (base - finite_base(m))
        far += tl.sum(far_part + total_part * (base[None, :] - finite_base(m_part)), axis=0)
        total += tl.sum(total_part, axis=0)
        m = top
    loss, lse, z_loss, log_l = _finish(m, l, far, total, kept, number(zeta, wide), SQUARED)
    tl.store(loss_ptr + row, loss, mask=has_row)
    tl.store(lse_ptr + row, lse, mask=has_row)
    tl.store(z_loss_ptr + row, z_loss, mask=has_row)
    tl.store(m_ptr + row, m, mask=has_row)
    tl.store(log_l_ptr + row, log_l, mask=has_row)
    tl.store(total_ptr + row, total, mask=has_row)


@triton.jit
def _of_rows(ptr, row, step, present, scale, wide: tl.constexpr):
    """Return a number for each row: one for all of them with step 0, 0 where it is absent."""
    found = tl.zeros(row.shape, wide)
    if ptr is not None:
        found = tl.load(ptr + row * step, mask=present, other=0.0)
        found = (found.to(tl.float64) * scale).to(wide)
        found = tl.where(present, found, 0.0)
    return found


@triton.jit
def _alpha(g, g_lse, g_z, total, lse, zeta, SQUARED: tl.constexpr):
    """Return `g total + g_lse + 2 zeta lse (g + g_z)`; zeros stay zeros, also beside NaN."""
    alpha = g_lse + tl.where(g == 0.0, 0.0, g * total)
    if SQUARED:
        both = g + g_z
        alpha += tl.where(both == 0.0, 0.0, 2.0 * zeta * both * lse)
    return alpha


@triton.jit
def _scaled(numbers, entries):
    """Return the entries of rows times their numbers; 0 where the number is, also beside NaN."""
    return tl.where(numbers[:, None] == 0.0, 0.0, numbers[:, None] * entries)


@triton.jit
def _state(m_ptr, log_l_ptr, targets_ptr, row, has_row, ignored):
    """Return m, log_l and class indices of rows, which have a class and which of those a loss."""
    m = tl.load(m_ptr + row, mask=has_row, other=float("-inf"))
    log_l = tl.load(log_l_ptr + row, mask=has_row, other=0.0)
    alive = has_row & (m != float("-inf"))
    y = tl.zeros(row.shape, tl.int64)
    kept = alive
    if targets_ptr is not None:
        y = tl.load(targets_ptr + row, mask=has_row, other=0)
        kept = alive & (y != ignored)
    return m, log_l, y, alive, kept


@triton.jit
def _cotangents(
    g_ptr, g_lse_ptr, g_z_ptr, scale_ptr, row, loss_step, alive, kept, total, lse, zeta,
    SQUARED: tl.constexpr,
):  # fmt: skip
    """Return the cotangent g of each row's loss, that of its z-loss beside it, and alpha."""
    wide: tl.constexpr = lse.dtype
    one = tl.full([], 1.0, tl.float64)
    scale = one
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    g = _of_rows(g_ptr, row, loss_step, kept, scale, wide)
    g_z = _of_rows(g_z_ptr, row, loss_step, kept, scale, wide)
    g_lse = _of_rows(g_lse_ptr, row, 1, alive, one, wide)
    return g, g_z, _alpha(g, g_lse, g_z, total, lse, zeta, SQUARED)


@triton.jit
def _moved_alpha(g, g_z, mu, tt_total, zeta, SQUARED: tl.constexpr):
    """Return what the tangents of lse and of the targets change in alpha."""
    moved = tl.where(g == 0.0, 0.0, g * tt_total)
    if SQUARED:
        both = g + g_z
        moved += tl.where(both == 0.0, 0.0, 2.0 * zeta * both * mu)
    return moved


@triton.jit
def _store_tangents(
    tloss_ptr, tlse_ptr, tz_loss_ptr, row, has_row, kept, total, lse, mu, own, zeta,
    SQUARED: tl.constexpr,
):  # fmt: skip
    """Write the tangents of loss, lse and z_loss of rows."""
    squared = tl.zeros(mu.shape, mu.dtype)
    if SQUARED:
        squared = tl.where(kept, 2.0 * zeta * lse * mu, 0.0)
    tl.store(tloss_ptr + row, tl.where(kept, total * mu + own + squared, 0.0), mask=has_row)
    tl.store(tlse_ptr + row, mu, mask=has_row)
    tl.store(tz_loss_ptr + row, squared, mask=has_row)


@triton.jit
def cross_entropy_derivative_kernel(
    x_ptr,
    targets_ptr,
    q_ptr,
    weight_ptr,
    m_ptr,
    log_l_ptr,
    total_ptr,
    g_ptr,
    g_lse_ptr,
    g_z_ptr,
    tx_ptr,
    tq_ptr,
    tg_ptr,
    tg_lse_ptr,
    tg_z_ptr,
    scale_ptr,
    n_tile,
    n_rows,
    C,
    row_tile,
    row_other,
    x_tile,
    x_other,
    x_c,
    q_tile,
    q_other,
    q_c,
    tx_tile,
    tx_other,
    tx_c,
    tq_tile,
    tq_other,
    tq_c,
    dx_tile,
    dx_other,
    dx_c,
    dq_tile,
    dq_other,
    dq_c,
    loss_step,
    ignored,
    sharp: tl.float64,
    share: tl.float64,
    zeta: tl.float64,
    cap: tl.float64,
    dx_ptr,
    dq_ptr,
    tloss_ptr,
    tlse_ptr,
    tz_loss_ptr,
    parts_ptr,
    sums_ptr,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    SQUARED: tl.constexpr,
    PHASE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute dx and dq of "vjp" and "vjp_jvp", or tloss, tlse and tz_loss of "jvp".

    The formulas are those of `tilewise.ops.cross_entropy.reference`. PHASE is "whole" where a row
    is one tile, and for "vjp", which sums nothing. Else "sums" stores `sum p ts`, `sum tt` and
    `sum tt (lse - s) - sum t ts` of each part, and "write" reads their totals from `sums_ptr`.
    """
    wide: tl.constexpr = m_ptr.dtype.element_ty
    tile, other, has_row = tile_of_rows(n_tile, BLOCK_R)
    row = tile * row_tile + other * row_other  # [BLOCK_R]
    part = tl.program_id(1).to(tl.int64)
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = has_row[:, None] & (c < C)[None, :]  # [BLOCK_R, BLOCK_C]
    zeta = number(zeta, wide)
    sharp = number(sharp, wide)

    m, log_l, y, alive, kept = _state(m_ptr, log_l_ptr, targets_ptr, row, has_row, ignored)
    total = tl.load(total_ptr + row, mask=has_row, other=0.0)
    lse = m + log_l
    w = tl.full([BLOCK_C], 1.0, wide)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + c, mask=c < C, other=0.0)
    at = tile[:, None] * x_tile + other * x_other + c[None, :] * x_c
    z = tl.load(x_ptr + at, mask=inside, other=0.0).to(wide)
    s, slope, bend = capped(z, inside, number(cap, wide), CAPPED)
    absent = (s == float("-inf")) | (alive == 0)[:, None]
    p = tl.where(alive[:, None] & inside, tl.exp((s - m[:, None]) - log_l[:, None]), 0.0)
    far = tl.where(absent, 0.0, log_l[:, None] + (m[:, None] - s))
    at = tile[:, None] * q_tile + other * q_other + c[None, :] * q_c
    t = _target_weights(y, at, q_ptr, w, c, inside, kept, sharp, number(share, wide))

    tz = tl.zeros([BLOCK_R, BLOCK_C], wide)
    if tx_ptr is not None:
        at = tile[:, None] * tx_tile + other * tx_other + c[None, :] * tx_c
        tz = tl.load(tx_ptr + at, mask=inside, other=0.0).to(wide)
    tt = tl.zeros([BLOCK_R, BLOCK_C], wide)
    if tq_ptr is not None:
        at = tile[:, None] * tq_tile + other * tq_other + c[None, :] * tq_c
        tt = sharp * w[None, :] * tl.load(tq_ptr + at, mask=inside, other=0.0).to(wide)
        tt = tl.where(kept[:, None], tt, 0.0)
    ts = slope * tz
    mu = tl.zeros([BLOCK_R], wide)
    tt_total = tl.zeros([BLOCK_R], wide)
    own = tl.zeros([BLOCK_R], wide)
    if PHASE == "write":
        mu = tl.load(sums_ptr + row, mask=has_row, other=0.0)
        tt_total = tl.load(sums_ptr + n_rows + row, mask=has_row, other=0.0)
        own = tl.load(sums_ptr + n_rows * 2 + row, mask=has_row, other=0.0)
    elif KIND != "vjp":
        mu = tl.where(alive, tl.sum(p * ts, axis=1), 0.0)
        tt_total = tl.sum(tt, axis=1)
        own = tl.sum(tt * far - t * ts, axis=1)

    if PHASE == "sums":
        at_part = parts_ptr + part * n_rows + row
        stride = tl.num_programs(1).to(tl.int64) * n_rows
        tl.store(at_part, mu, mask=has_row)
        tl.store(at_part + stride, tt_total, mask=has_row)
        tl.store(at_part + 2 * stride, own, mask=has_row)
    elif KIND == "jvp":
        _store_tangents(
            tloss_ptr, tlse_ptr, tz_loss_ptr, row, has_row, kept, total, lse, mu, own, zeta, SQUARED
        )  # fmt: skip
    else:
        g, g_z, alpha = _cotangents(
            g_ptr, g_lse_ptr, g_z_ptr, scale_ptr, row, loss_step, alive, kept, total, lse, zeta,
            SQUARED,
        )  # fmt: skip
        ds = _scaled(alpha, p) - _scaled(g, t)
        dx = tl.where(ds == 0.0, 0.0, slope * ds)
        of_targets = _scaled(g, far)
        if KIND == "vjp_jvp":
            tg, _, talpha = _cotangents(
                tg_ptr, tg_lse_ptr, tg_z_ptr, scale_ptr, row, loss_step, alive, kept, total, lse,
                zeta, SQUARED,
            )  # fmt: skip
            talpha += _moved_alpha(g, g_z, mu, tt_total, zeta, SQUARED)
            gap = tl.where(absent, 0.0, ts - mu[:, None])
            tds = _scaled(talpha, p) + _scaled(alpha, p * gap) - _scaled(tg, t) - _scaled(g, tt)
            dx = tl.where(tds == 0.0, 0.0, slope * tds)
            dx += tl.where(ds == 0.0, 0.0, bend * tz * ds)
            of_targets = _scaled(tg, far) - _scaled(g, gap)
        if dx_ptr is not None:
            at = tile[:, None] * dx_tile + other * dx_other + c[None, :] * dx_c
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if dq_ptr is not None:
            at = tile[:, None] * dq_tile + other * dq_other + c[None, :] * dq_c
            dq = sharp * w[None, :] * of_targets
            tl.store(dq_ptr + at, dq.to(dq_ptr.dtype.element_ty), mask=inside)
