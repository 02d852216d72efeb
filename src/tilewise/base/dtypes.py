"""Which arrays an operator accepts: the kind, the dtype and the memory layout."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import type_error, value_error

FloatDType = np.dtype[np.floating[Any]]

FLOATS: frozenset[FloatDType] = frozenset({np.dtype(np.float32), np.dtype(np.float64)})
"""The dtypes of tensors; hashing compares the byte order too, so only native ones are members."""


def unit_roundoff(dtype: FloatDType | type[np.floating[Any]]) -> float:
    """Return u, the largest relative error of one rounding to nearest in the dtype."""
    return float(np.finfo(dtype).eps) / 2


def check_tensor(
    operator: str, name: str, value: object, like: FloatDType | None, source: str
) -> NDArray[Any]:
    """Return a float32 or float64 array that can be read in place, or raise.

    Args:
        operator: Name of the operator, for the error text.
        name: Name of the argument.
        value: What the user gave.
        like: The dtype it must have, or None where it is the first tensor of the call.
        source: Name of the argument that settled ``like``.
    """
    array = value if type(value) is np.ndarray else _as_plain(operator, name, value)
    dtype = array.dtype
    if dtype is not like and (dtype != like if like is not None else dtype not in FLOATS):
        raise _dtype_error(operator, name, dtype, like, source)
    if not array.flags.aligned:
        raise value_error(operator, name, "be aligned in memory", "a misaligned array")
    return array


def check_contiguous_last(operator: str, name: str, array: NDArray[Any]) -> None:
    """Raise where the last dimension of a non-empty array is not contiguous."""
    if array.strides[-1] != array.itemsize and array.shape[-1] > 1 and array.size:
        got = f"strides {array.strides} of {array.itemsize}-byte entries"
        raise value_error(operator, name, "have a contiguous last dimension", got)


def _as_plain(operator: str, name: str, value: object) -> NDArray[Any]:
    # A masked array would lose its mask silently; other subclasses (memmap) are plain memory.
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        return value.view(np.ndarray)
    raise type_error(operator, name, "be a numpy.ndarray", type(value).__name__)


def _dtype_error(
    operator: str, name: str, dtype: np.dtype[Any], like: FloatDType | None, source: str
) -> Exception:
    if not dtype.isnative and dtype.newbyteorder("=") in FLOATS:
        return type_error(operator, name, "have native byte order", f"dtype {dtype.str}")
    wanted = "float32 or float64" if like is None else f"{like} (from {source})"
    return type_error(operator, name, f"have dtype {wanted}", str(dtype))
