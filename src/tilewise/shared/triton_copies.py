"""Triton kernels for what PyTorch does to whole tensors, where a program has no PyTorch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fill_kernel(result_ptr, value: tl.float64, n, BLOCK: tl.constexpr):
    """Write a number into n entries."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.full([BLOCK], value, tl.float64).to(result_ptr.dtype.element_ty)
    tl.store(result_ptr + at, entry, mask=at < n)


@triton.jit
def copy_kernel(
    source_ptr,
    result_ptr,
    n,
    size1,
    size2,
    size3,
    stride0,
    stride1,
    stride2,
    stride3,
    BLOCK: tl.constexpr,
):
    """Write n entries with four strides in C order, in the dtype of the result."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    rest = at // size3
    source = (at % size3) * stride3 + (rest % size2) * stride2
    rest = rest // size2
    source += (rest % size1) * stride1 + (rest // size1) * stride0
    entry = tl.load(source_ptr + source, mask=inside, other=0)
    tl.store(result_ptr + at, entry.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_kernel(source_ptr, n, result_ptr, BLOCK: tl.constexpr):
    """Add n entries."""
    total = tl.zeros([BLOCK], result_ptr.dtype.element_ty)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        total += tl.load(source_ptr + at, mask=at < n, other=0.0)
    tl.store(result_ptr, tl.sum(total, 0))
