"""The linear map by NumPy's matrix products, which are those of the platform's BLAS."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import compute_dtype, is_narrow, round_to
from tilewise.base.operator import Implementation

from .spec import (
    ALL_NEEDED,
    CotangentCall,
    LinearCall,
    LinearGrads,
    Needed,
    SecondCall,
    TangentCall,
)

Array = NDArray[Any]

# Of a product that is added to an accumulator: enough rows for the BLAS to run at its speed.
_LEAST_ROWS = 64
_BLOCK_ENTRIES = 1 << 18


def forward(call: LinearCall, want: object = None) -> Array:
    """Compute y."""
    y = _wide(call.x) @ _wide(call.w).T
    if call.bias is not None:
        y += call.bias
    return round_to(y, call.dtype) if is_narrow(call.dtype) else y


def vjp(call: LinearCall, cotangents: CotangentCall, needed: Needed = ALL_NEEDED) -> LinearGrads:
    """Compute the gradients that are needed; that of w is added to an accumulator if there is."""
    if cotangents.dy is None:
        return _grads(call, needed, None, None, None, shown=cotangents.accumulator is None)
    dy, dw = cotangents.dy, None
    if needed.w and cotangents.accumulator is not None:
        accumulate(cotangents.accumulator, dy, call.x)
    elif needed.w:
        dw = _wide(dy).T @ _wide(call.x)
    dx = _wide(dy) @ _wide(call.w) if needed.x else None
    dbias = _sum(call, needed, dy)
    return _grads(call, needed, dx, dw, dbias, shown=cotangents.accumulator is None)


def jvp(call: LinearCall, tangents: TangentCall, want: object = None) -> Array:
    """Compute the tangent of y."""
    T, _, V = call.sizes
    ty = _added(
        None if tangents.tx is None else (tangents.tx, call.w.T),
        None if tangents.tw is None else (call.x, tangents.tw.T),
    )
    if ty is None:
        ty = np.zeros((T, V), call.compute_dtype)
    if tangents.tbias is not None:
        ty += tangents.tbias
    return round_to(ty, call.dtype) if is_narrow(call.dtype) else ty


def vjp_jvp(call: LinearCall, second: SecondCall, needed: Needed = ALL_NEEDED) -> LinearGrads:
    """Compute the tangents of the gradients that are needed."""
    dy, tdy, moved = second.cotangents.dy, second.tdy, second.tangents
    tdx = tdw = tdbias = None
    if needed.x:
        tdx = _added(
            None if tdy is None else (tdy, call.w),
            None if dy is None or moved.tw is None else (dy, moved.tw),
        )
    if needed.w:
        tdw = _added(
            None if tdy is None else (tdy.T, call.x),
            None if dy is None or moved.tx is None else (dy.T, moved.tx),
        )
    if tdy is not None:
        tdbias = _sum(call, needed, tdy)
    return _grads(call, needed, tdx, tdw, tdbias)


def accumulate(accumulator: Array, dy: Array, x: Array) -> None:
    """Add `dy^T x` to an array, by blocks of rows: NumPy has no product that adds.

    A block has at most 2^18 entries, or 64 rows, and is all the memory that is taken beside; in 16
    bits also x and the columns of dy for a block, in the dtype of the accumulator.
    """
    V, C = accumulator.shape
    rows = max(_LEAST_ROWS, _BLOCK_ENTRIES // max(1, C))
    sums = compute_dtype(accumulator.dtype)
    x, block = x.astype(sums, copy=False), np.empty((min(rows, V), C), sums)
    for start in range(0, V, rows):
        part = accumulator[start : start + rows]
        found = block[: len(part)]
        np.matmul(dy[:, start : start + rows].astype(sums, copy=False).T, x, out=found)
        found += part
        part[...] = round_to(found, part.dtype) if is_narrow(part.dtype) else found


def _added(*products: tuple[Array, Array] | None) -> Array | None:
    """Return the sum of those products that there are, in the dtype of sums."""
    found: Array | None = None
    for product in products:
        if product is not None:
            a, b = product
            one = _wide(a) @ _wide(b)
            found = one if found is None else np.add(found, one, out=found)
    return found


def _sum(call: LinearCall, needed: Needed, dy: Array) -> Array | None:
    """Return the sum over rows: in float64, for NumPy adds rows one after another."""
    if call.bias is None or not needed.bias:
        return None
    total: Array = dy.sum(axis=0, dtype=np.float64)
    return total


def _grads(
    call: LinearCall,
    needed: Needed,
    dx: Array | None,
    dw: Array | None,
    dbias: Array | None,
    *,
    shown: bool = True,
) -> LinearGrads:
    """Return gradients in their dtypes, zeros where they are needed and nothing came."""

    def made(found: Array | None, shape: tuple[int, ...], wanted: bool) -> Array | None:
        if not wanted:
            return None
        if found is None:
            return np.zeros(shape, call.dtype)
        return found if found.dtype == call.dtype else round_to(found, call.dtype)

    with_bias = needed.bias and call.bias is not None
    return LinearGrads(
        made(dx, call.x.shape, needed.x),
        made(dw, call.w.shape, needed.w and shown),
        made(dbias, call.w.shape[:1], with_bias),
    )


def _wide(array: Array) -> Array:
    """Return an array in the dtype of sums."""
    return array.astype(np.float32) if is_narrow(array.dtype) else array


IMPLEMENTATION = Implementation("cpu", forward, vjp, jvp, vjp_jvp)
