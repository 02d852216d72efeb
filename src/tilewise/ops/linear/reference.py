"""The linear map as the textbook writes it, in float64 NumPy: the oracle of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import round_to
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
F64 = NDArray[np.float64]


def forward(call: LinearCall, want: object = None) -> Array:
    """Compute `y = x w^T + bias` in float64 and round it."""
    y = _wide(call.x) @ _wide(call.w).T
    return round_to(y if call.bias is None else y + _wide(call.bias), call.dtype)


def vjp(call: LinearCall, cotangents: CotangentCall, needed: Needed = ALL_NEEDED) -> LinearGrads:
    """Compute `dx = dy w`, `dw = dy^T x` and `dbias = sum dy` in float64 and round them."""
    dy = _of_output(call, cotangents.dy)
    dw = dy.T @ _wide(call.x)
    if cotangents.accumulator is not None and needed.w:
        cotangents.accumulator[...] = round_to(
            cotangents.accumulator.astype(np.float64) + dw, cotangents.accumulator.dtype
        )
    shown = cotangents.accumulator is None
    return _rounded(call, needed, dy @ _wide(call.w), dw if shown else None, dy.sum(axis=0))


def jvp(call: LinearCall, tangents: TangentCall, want: object = None) -> Array:
    """Compute `ty = tx w^T + x tw^T + tbias` in float64 and round it."""
    T, _, V = call.sizes
    ty = np.zeros((T, V))
    if tangents.tx is not None:
        ty += _wide(tangents.tx) @ _wide(call.w).T
    if tangents.tw is not None:
        ty += _wide(call.x) @ _wide(tangents.tw).T
    if tangents.tbias is not None:
        ty += _wide(tangents.tbias)
    return round_to(ty, call.dtype)


def vjp_jvp(call: LinearCall, second: SecondCall, needed: Needed = ALL_NEEDED) -> LinearGrads:
    """Compute the tangents of the gradients in float64 and round them.

    `tdx = tdy w + dy tw`, `tdw = tdy^T x + dy^T tx`, `tdbias = sum tdy`.
    """
    dy, tdy = _of_output(call, second.cotangents.dy), _of_output(call, second.tdy)
    tdx, tdw = tdy @ _wide(call.w), tdy.T @ _wide(call.x)
    if second.tangents.tw is not None:
        tdx += dy @ _wide(second.tangents.tw)
    if second.tangents.tx is not None:
        tdw += dy.T @ _wide(second.tangents.tx)
    return _rounded(call, needed, tdx, tdw, tdy.sum(axis=0))


def _of_output(call: LinearCall, value: Array | None) -> F64:
    T, _, V = call.sizes
    return np.zeros((T, V)) if value is None else _wide(value)


def _wide(array: Array) -> F64:
    return array.astype(np.float64)


def _rounded(call: LinearCall, needed: Needed, dx: F64, dw: F64 | None, dbias: F64) -> LinearGrads:
    return LinearGrads(
        round_to(dx, call.dtype) if needed.x else None,
        round_to(dw, call.dtype) if needed.w and dw is not None else None,
        round_to(dbias, call.dtype) if needed.bias and call.bias is not None else None,
    )


IMPLEMENTATION = Implementation("reference", forward, vjp, jvp, vjp_jvp)
