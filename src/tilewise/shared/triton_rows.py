"""Triton functions for rows: where a tile of rows lies, and how parts of a row become the row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of_rows(n_tile, BLOCK_R: tl.constexpr):
    """Return which rows a program has, of a grid that lists the tiles of one row axis first.

    Returns the indices `[BLOCK_R]` along the axis that tiles cut, the index along the other axis,
    and whether there are such rows.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(n_tile, BLOCK_R)
    tile = (pid % tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    return tile, (pid // tiles).to(tl.int64), tile < n_tile


@triton.jit
def max_or_nan(x, AXIS: tl.constexpr):
    """Return the largest entries along an axis, NaN where there is one."""
    top = tl.max(tl.where(x == x, x, float("-inf")), axis=AXIS)
    spoiled = tl.max((x != x).to(tl.int32), axis=AXIS) > 0
    return tl.where(spoiled, float("nan"), top)


@triton.jit
def larger(a, b):
    """Return the larger of two numbers, NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finite_base(m):
    """Return the maximum that entries are compared with: 0 where no entry is above -inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def merged_sums(l, m, m_new, scale):
    """Return a sum of `exp(scale (x - m))` relative to a larger maximum."""
    return tl.where(m == float("-inf"), 0.0, l * tl.exp((m - finite_base(m_new)) * scale))


@triton.jit
def sum_parts_kernel(
    parts_ptr,
    total_ptr,
    n_rows,
    n_parts,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Add the sums of the parts of each row, in their order: `(K, parts, rows)` to `(K, rows)`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK_R], total_ptr.dtype.element_ty)
    for start in range(0, n_parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        inside = (part < n_parts)[:, None] & (row < n_rows)[None, :]
        at = (k * n_parts + part)[:, None] * n_rows + row[None, :]  # [BLOCK_P, BLOCK_R]
        total += tl.sum(tl.load(parts_ptr + at, mask=inside, other=0.0), axis=0)
    tl.store(total_ptr + k * n_rows + row, total, mask=row < n_rows)
