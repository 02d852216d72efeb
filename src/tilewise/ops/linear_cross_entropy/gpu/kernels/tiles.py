"""Tiles of logits, tokens by classes, and what their bodies read of the tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.shared.triton_rows import finite_base


@triton.jit
def products(
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
def token_targets(
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
def target_weights(
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
def with_bias(z, bias_ptr, cols, V, wide: tl.constexpr):
    """Return `z + bias`, `[BLOCK_T, BLOCK_V]`, where there is one."""
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(wide)[None, :]
    return z


@triton.jit
def probabilities(s, m, log_l, entropy_ptr, token, T, wide: tl.constexpr):
    """Return p and, where there is an entropy, `p (log p + entropy)`."""
    log_p = (s - finite_base(m)[:, None]) - log_l[:, None]
    p = tl.exp(log_p)
    surprise = tl.zeros(p.shape, wide)
    if entropy_ptr is not None:
        h = tl.load(entropy_ptr + token, mask=token < T, other=0.0)
        surprise = tl.where(p == 0.0, 0.0, p * (log_p + h[:, None]))
    return p, surprise


@triton.jit
def logit_tangents(
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
        tz = products(tz, thidden_ptr, weight_ptr, row, T, start, V, C, PRECISION, BLOCK_K)
    if tweight_ptr is not None:
        tz = products(tz, hidden_ptr, tweight_ptr, row, T, start, V, C, PRECISION, BLOCK_K)
    return with_bias(tz, tbias_ptr, cols, V, wide)


@triton.jit
def steepness(
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
def of_tokens(ptr, token, step, present, scale, wide: tl.constexpr):
    """Return a number for each token: one for all of them with step 0, 0 where it is absent."""
    found = tl.zeros(token.shape, wide)
    if ptr is not None:
        found = tl.load(ptr + token * step, mask=present, other=0.0)
        found = (found.to(tl.float64) * scale).to(wide)
        found = tl.where(present, found, 0.0)
    return found
