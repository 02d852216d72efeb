"""The Triton kernels of the linear cross-entropy.

Tiles of logits, tokens by classes, are made and used up; the forward pass and the tangents fold
them into sums of each token, chunk by chunk of classes. The gradients store the cotangents of a
strip of classes at a time, and multiply them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.shared.triton_losses import capped
from tilewise.shared.triton_math import number
from tilewise.shared.triton_rows import finite_base, larger, max_or_nan, merged_sums


@triton.jit
def _products(
    acc,
    a_ptr,
    b_ptr,
    row,
    n_rows,
    col,
    n_cols,
    C,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return `acc + a b^T` of the rows from `row` of a, `(n_rows, C)`, and from `col` of b."""
    r, c = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1])
    # Offsets inside a tile have 32 bits, which halves the registers that they take.
    a_ptr += row * C
    b_ptr += col * C
    has_row, has_col = (row + r < n_rows)[:, None], (col + c < n_cols)[None, :]
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < C
        a = tl.load(a_ptr + r[:, None] * C + k[None, :], mask=has_row & inside[None, :], other=0.0)
        b = tl.load(b_ptr + c[None, :] * C + k[:, None], mask=has_col & inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def _token_targets(
    targets_ptr,
    class_weight_ptr,
    token,
    T,
    V,
    first_class,
    ignored,
    wide: tl.constexpr,
):
    """Return the class of each token's target in this part, its weight, and whether it is kept.

    The weight is 0 where the token is ignored or its target lies in another part.
    """
    y = tl.load(targets_ptr + token, mask=token < T, other=ignored)
    kept = (token < T) & (y != ignored)
    y = y - first_class
    here = kept & (y >= 0) & (y < V)
    w = tl.where(here, 1.0, 0.0).to(wide)
    if class_weight_ptr is not None:
        w = tl.load(class_weight_ptr + y, mask=here, other=0.0)
    return y, w, kept


@triton.jit
def _target_weights(
    y,
    w,
    kept,
    cols,
    inside,
    class_weight_ptr,
    V,
    sharp,
    share,
    wide: tl.constexpr,
):
    """Return the weight t of each class in the tokens' targets, `[BLOCK_T, BLOCK_V]`."""
    all_w = tl.full(cols.shape, 1.0, wide)
    if class_weight_ptr is not None:
        all_w = tl.load(class_weight_ptr + cols, mask=cols < V, other=0.0)
    t = tl.where(cols[None, :] == y[:, None], sharp * w[:, None], 0.0) + share * all_w[None, :]
    return tl.where(inside & kept[:, None], t, 0.0)


@triton.jit
def _with_bias(z, bias_ptr, cols, V, wide: tl.constexpr):
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(wide)[None, :]
    return z


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
    sharp: "fp64",
    share: "fp64",
    cap: "fp64",
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
    y, w_y, kept = _token_targets(
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
            z = _products(z, hidden_ptr, weight_ptr, row, T, start, V, C, PRECISION, BLOCK_K)
            z = _with_bias(z, bias_ptr, cols, V, wide)
            s, _, _ = capped(z, inside, cap, CAPPED)
            t = _target_weights(y, w_y, kept, cols, inside, class_weight_ptr, V, sharp, share, wide)
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
    zeta: "fp64",
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
    log_l = tl.log(l)
    lse = tl.where(m == float("inf"), m, m + log_l)
    z_loss = tl.zeros([BLOCK_R], wide)
    if SQUARED:
        z_loss = tl.where(kept, number(zeta, wide) * lse * lse, 0.0)
    loss = tl.where(kept, mass * log_l + far + z_loss, 0.0)
    tl.store(loss_ptr + token, loss, mask=has)
    tl.store(z_loss_ptr + token, z_loss, mask=has)
    tl.store(lse_ptr + token, lse, mask=has)
    tl.store(m_ptr + token, m, mask=has)
    tl.store(log_l_ptr + token, log_l, mask=has)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + token, log_l - spread / l, mask=has)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + token, best, mask=has)
    if picked_ptr is not None:
        tl.store(picked_ptr + token, tl.where(mass == 0.0, 0.0, mass * m) - far, mask=has)
        tl.store(mass_ptr + token, mass, mask=has)


@triton.jit
def _probabilities(s, m, log_l, entropy_ptr, token, T, wide: tl.constexpr):
    """Return p and, where there is an entropy, `p (log p + entropy)`."""
    log_p = (s - m[:, None]) - log_l[:, None]
    p = tl.exp(log_p)
    surprise = tl.zeros(p.shape, wide)
    if entropy_ptr is not None:
        h = tl.load(entropy_ptr + token, mask=token < T, other=0.0)
        surprise = tl.where(p == 0.0, 0.0, p * (log_p + h[:, None]))
    return p, surprise


@triton.jit
def _logit_tangents(
    hidden_ptr,
    weight_ptr,
    thidden_ptr,
    tweight_ptr,
    tbias_ptr,
    tz,
    row,
    T,
    start,
    cols,
    V,
    C,
    wide: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return `tz + thidden weight^T + hidden tweight^T + tbias`, `[BLOCK_T, BLOCK_V]`."""
    if thidden_ptr is not None:
        tz = _products(tz, thidden_ptr, weight_ptr, row, T, start, V, C, PRECISION, BLOCK_K)
    if tweight_ptr is not None:
        tz = _products(tz, hidden_ptr, tweight_ptr, row, T, start, V, C, PRECISION, BLOCK_K)
    return _with_bias(tz, tbias_ptr, cols, V, wide)


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
    sharp: "fp64",
    share: "fp64",
    cap: "fp64",
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
    y, w_y, kept = _token_targets(
        targets_ptr, class_weight_ptr, token, T, V, first_class, ignored, wide
    )
    m = tl.load(m_ptr + token, mask=token < T, other=0.0)
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
            z = _products(z, hidden_ptr, weight_ptr, row, T, start, V, C, PRECISION, BLOCK_K)
            s, slope, _ = capped(_with_bias(z, bias_ptr, cols, V, wide), inside, cap, CAPPED)
            tz = tl.zeros([BLOCK_T, BLOCK_V], wide)
            tz = _logit_tangents(
                hidden_ptr, weight_ptr, thidden_ptr, tweight_ptr, tbias_ptr, tz, row, T, start, cols, V, C,
                wide, PRECISION, BLOCK_K,
            )  # fmt: skip
            ts = slope * tz
            p, surprise = _probabilities(s, m, log_l, entropy_ptr, token, T, wide)
            t = _target_weights(y, w_y, kept, cols, inside, class_weight_ptr, V, sharp, share, wide)
            mu += tl.sum(tl.where(p == 0.0, 0.0, p * ts), axis=1)
            of_target += tl.sum(tl.where(t == 0.0, 0.0, t * ts), axis=1)
            surprised += tl.sum(tl.where(surprise == 0.0, 0.0, surprise * ts), axis=1)
    at = parts_ptr + chunk * T + token
    stride = tl.num_programs(1).to(tl.int64) * T
    tl.store(at, mu, mask=token < T)
    tl.store(at + stride, of_target, mask=token < T)
    tl.store(at + 2 * stride, surprised, mask=token < T)


@triton.jit
def _steepness(
    kept,
    w_y,
    lse,
    mass_ptr,
    weight_total_ptr,
    token,
    T,
    V,
    sharp,
    share,
    zeta,
    SQUARED: tl.constexpr,
    wide: tl.constexpr,
):
    """Return `A + 2 zeta lse` of each token, with A the sum of its target's weights."""
    mass = tl.zeros(token.shape, wide)
    if mass_ptr is not None:
        mass = tl.load(mass_ptr + token, mask=token < T, other=0.0)
    else:
        total = tl.cast(V, wide)
        if weight_total_ptr is not None:
            total = tl.load(weight_total_ptr).to(wide)
        mass = tl.where(kept, sharp * w_y + share * total, 0.0)
    if SQUARED:
        mass += 2.0 * zeta * lse
    return mass


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
    sharp: "fp64",
    share: "fp64",
    zeta: "fp64",
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
    _, w_y, kept = _token_targets(
        targets_ptr, class_weight_ptr, token, T, V, first_class, ignored, wide
    )
    lse = tl.load(m_ptr + token, mask=has, other=0.0)
    lse += tl.load(log_l_ptr + token, mask=has, other=0.0)
    steep = _steepness(
        kept, w_y, lse, None, weight_total_ptr, token, T, V, sharp, share, zeta, SQUARED, wide
    )
    mu = tl.load(sums_ptr + token, mask=has, other=0.0)
    of_target = tl.load(sums_ptr + T + token, mask=has, other=0.0)
    tl.store(tloss_ptr + token, tl.where(kept, steep * mu - of_target, 0.0), mask=has)
    tl.store(tlse_ptr + token, mu, mask=has)
    if tentropy_ptr is not None:
        tl.store(tentropy_ptr + token, -tl.load(sums_ptr + 2 * T + token, mask=has), mask=has)


@triton.jit
def _of_tokens(ptr, token, step, present, scale, wide: tl.constexpr):
    """Return a number for each token: one for all of them with step 0, 0 where it is absent."""
    found = tl.zeros(token.shape, wide)
    if ptr is not None:
        found = tl.load(ptr + token * step, mask=present, other=0.0)
        found = (found.to(tl.float64) * scale).to(wide)
        found = tl.where(present, found, 0.0)
    return found


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
    sharp: "fp64",
    share: "fp64",
    zeta: "fp64",
    cap: "fp64",
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
    y, w_y, kept = _token_targets(
        targets_ptr, class_weight_ptr, token, T, V, first_class, ignored, wide
    )
    m = tl.load(m_ptr + token, mask=has, other=0.0)
    log_l = tl.load(log_l_ptr + token, mask=has, other=0.0)
    one = tl.full([], 1.0, tl.float64)
    scale = one
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    g = _of_tokens(g_ptr, token, loss_step, kept, scale, wide)
    g_lse = _of_tokens(g_lse_ptr, token, 1, has, one, wide)
    g_entropy = _of_tokens(g_entropy_ptr, token, 1, has, one, wide)
    live = (g != 0.0) | (g_lse != 0.0) | (g_entropy != 0.0)
    steep = _steepness(
        kept, w_y, m + log_l, mass_ptr, weight_total_ptr, token, T, V, sharp, share, zeta,
        SQUARED, wide,
    )  # fmt: skip

    z = tl.zeros([BLOCK_T, BLOCK_V], wide)
    z = _products(z, hidden_ptr, weight_ptr, row, T, start, V, C, PRECISION, BLOCK_K)
    s, slope, bend = capped(_with_bias(z, bias_ptr, cols, V, wide), inside, cap, CAPPED)
    p, surprise = _probabilities(s, m, log_l, entropy_ptr, token, T, wide)
    t = _target_weights(y, w_y, kept, cols, inside, class_weight_ptr, V, sharp, share, wide)
    alpha = tl.where(live, g * steep + g_lse, 0.0)
    ds = alpha[:, None] * p - g[:, None] * t - g_entropy[:, None] * surprise
    at = token[:, None] * strip + in_strip[None, :]
    stored = has[:, None] & (in_strip < strip)[None, :]
    if SECOND:
        tg = _of_tokens(tg_ptr, token, loss_step, kept, scale, wide)
        tg_lse = _of_tokens(tg_lse_ptr, token, 1, has, one, wide)
        tg_entropy = _of_tokens(tg_entropy_ptr, token, 1, has, one, wide)
        live = live | (tg != 0.0) | (tg_lse != 0.0) | (tg_entropy != 0.0)
        tz = tl.zeros([BLOCK_T, BLOCK_V], wide)
        tz = _logit_tangents(
            hidden_ptr, weight_ptr, thidden_ptr, tweight_ptr, tbias_ptr, tz, row, T, start, cols, V, C,
            wide, PRECISION, BLOCK_K,
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
    total = tl.zeros([BLOCK_M], wide)
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
            total += tl.sum(a.to(wide), axis=1)
    at = (row * N + col) + r[:, None] * N + c[None, :]
    tl.store(after_ptr + at, acc.to(after_ptr.dtype.element_ty), mask=inside)
    if rows_ptr is not None:
        first = tl.program_id(1) == 0
        tl.store(rows_ptr + row + r, total.to(rows_ptr.dtype.element_ty), mask=has_row & first)
