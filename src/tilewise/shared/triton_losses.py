"""Triton functions of losses: the soft cap, and how numbers of rows become one."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_math import tanh


@triton.jit
def capped(z, inside, cap, CAPPED: tl.constexpr):
    """Return `s = cap tanh(z / cap)`, or z, and its first two derivatives by z; -inf outside."""
    slope = tl.full(z.shape, 1.0, z.dtype)
    bend = tl.zeros(z.shape, z.dtype)
    s = z
    if CAPPED:
        t, slope = tanh(z / cap)
        s = cap * t
        bend = -2.0 * t / cap * slope
    return tl.where(inside, s, float("-inf")), slope, bend


@triton.jit
def mean_factor_kernel(
    targets_ptr,
    weight_ptr,
    n_rows,
    ignored,
    classes,
    scale_ptr,
    ANY: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute what the mean multiplies the sum of losses by: one over how much the rows count.

    That is their number, or the sum of the class weights of their targets, without ignored rows; 0
    where nothing counts: where that sum is 0 or, with ANY, where all these weights are.
    """
    count = tl.zeros([BLOCK_R], tl.float64)
    some = tl.zeros([BLOCK_R], tl.int32)
    for start in range(0, n_rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R).to(tl.int64)
        y = tl.load(targets_ptr + row, mask=row < n_rows, other=ignored)
        kept = (row < n_rows) & (y != ignored)
        w = kept.to(tl.float64)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + y, mask=kept & (y < classes), other=0.0)
            w = w.to(tl.float64)
        count += w
        some = tl.maximum(some, (w != 0.0).to(tl.int32))
    total = tl.sum(count, axis=0)
    counts = tl.max(some, axis=0) > 0 if ANY else total != 0.0
    tl.store(scale_ptr, tl.where(counts, 1.0 / tl.where(counts, total, 1.0), 0.0))


@triton.jit
def reduce_rows_kernel(
    loss_ptr,
    z_loss_ptr,
    scale_ptr,
    n_rows,
    loss_total_ptr,
    z_loss_total_ptr,
    BLOCK_R: tl.constexpr,
):
    """Add two numbers of each row in float64 and multiply the sums by what a mean divides by."""
    loss = tl.zeros([BLOCK_R], tl.float64)
    z_loss = tl.zeros([BLOCK_R], tl.float64)
    for start in range(0, n_rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R).to(tl.int64)
        loss += tl.load(loss_ptr + row, mask=row < n_rows, other=0.0).to(tl.float64)
        z_loss += tl.load(z_loss_ptr + row, mask=row < n_rows, other=0.0).to(tl.float64)
    scale = tl.full([], 1.0, tl.float64)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    wide: tl.constexpr = loss_total_ptr.dtype.element_ty
    tl.store(loss_total_ptr, (tl.sum(loss, axis=0) * scale).to(wide))
    tl.store(z_loss_total_ptr, (tl.sum(z_loss, axis=0) * scale).to(wide))
