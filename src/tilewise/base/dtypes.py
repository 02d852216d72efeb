"""Which arrays an operator accepts: the kind, the dtype and the memory layout."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import type_error, value_error

FloatDType = np.dtype[np.floating[Any]]

FLOAT32: FloatDType = np.dtype(np.float32)
_FLOAT16: FloatDType = np.dtype(np.float16)
# Hashing compares the byte order too, so only native ones are members.
_COMPUTED = frozenset({FLOAT32, np.dtype(np.float64)})

WIDE = ("float32", "float64")
"""The names of the dtypes that are computed in themselves."""

NARROW = ("bfloat16", "float16")
"""The names of the dtypes that only store: they are computed in float32."""

FLOATS = ("float64", "float32", *NARROW)
"""The names of the dtypes that tensors may have."""


def listed(names: tuple[str, ...]) -> str:
    """Return names of dtypes as an error text lists them."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype is that of `ml_dtypes`, which need not be imported for that."""
    return dtype.itemsize == 2 and dtype.kind == "V" and dtype.name == "bfloat16"


def is_narrow(dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype that was accepted has 16 bits."""
    return dtype.itemsize == 2


def compute_dtype(dtype: FloatDType) -> FloatDType:
    """Return the dtype of sums and row statistics: float32 for 16 bits, else the dtype itself."""
    return FLOAT32 if dtype.itemsize == 2 else dtype


def storage_of(dtype: FloatDType) -> str | None:
    """Return the name of a 16-bit dtype, which kernels are told beside the bits, or None."""
    return dtype.name if dtype.itemsize == 2 else None


@cache
def bfloat16(operator: str) -> FloatDType:
    """Return the dtype of bfloat16 arrays.

    Raises:
        ImportError: The package that defines it is not installed.
    """
    try:
        module: Any = import_module("ml_dtypes")
    except ImportError as error:
        hint = "pip install 'tilewise[bf16]'"
        raise ImportError(f"{operator}: bfloat16 needs the package ml_dtypes; {hint}") from error
    dtype: FloatDType = np.dtype(module.bfloat16)
    return dtype


def unit_roundoff(dtype: FloatDType | type[np.floating[Any]]) -> float:
    """Return u, the largest relative error of one rounding to nearest in the dtype."""
    return 2.0**-8 if is_bfloat16(np.dtype(dtype)) else float(np.finfo(dtype).eps) / 2


def smallest(dtype: FloatDType) -> float:
    """Return the distance of the numbers next to zero; half of it can be lost below `u`."""
    return 2.0**-133 if is_bfloat16(dtype) else float(np.finfo(dtype).smallest_subnormal)


def round_to(x: NDArray[Any], dtype: FloatDType) -> NDArray[Any]:
    """Return an array in a dtype, every entry rounded to nearest once."""
    with np.errstate(all="ignore"):
        # Casts to bfloat16 pass through float32; an odd last bit there remembers what was cut off.
        odd = is_bfloat16(dtype) and x.dtype == np.float64
        return (_to_odd(x) if odd else x).astype(dtype)


def _to_odd(x: NDArray[Any]) -> NDArray[np.float32]:
    near = np.array(x, np.float32)
    wide = near.astype(np.float64)
    bits = near.view(np.int32)
    even = (wide != x) & ~np.isnan(x) & (bits & 1 == 0)
    bits += np.where(even, np.where(np.abs(wide) > np.abs(x), -1, 1), 0).astype(np.int32)
    return near


def check_tensor(
    operator: str,
    name: str,
    value: object,
    like: FloatDType | None,
    source: str,
    also: FloatDType | None = None,
    names: tuple[str, ...] = WIDE,
) -> NDArray[Any]:
    """Return an array of floats that can be read in place, or raise.

    Args:
        operator: Name of the operator, for the error text.
        name: Name of the argument.
        value: What the user gave.
        like: The dtype it must have, or None where it is the first tensor of the call.
        source: Name of the argument that settled ``like``.
        also: Another dtype that it may have.
        names: The names of the dtypes that the first tensor may have.
    """
    array = value if type(value) is np.ndarray else _as_plain(operator, name, value)
    dtype = array.dtype
    if dtype is not like and not _accepts(dtype, like, also, names):
        raise _dtype_error(operator, name, dtype, like, source, also, names)
    if not array.flags.aligned:
        raise value_error(operator, name, "be aligned in memory", "a misaligned array")
    return array


def check_contiguous_last(operator: str, name: str, array: NDArray[Any]) -> None:
    """Raise where the last dimension of a non-empty array is not contiguous."""
    if array.strides[-1] != array.itemsize and array.shape[-1] > 1 and array.size:
        got = f"strides {array.strides} of {array.itemsize}-byte entries"
        raise value_error(operator, name, "have a contiguous last dimension", got)


def _accepts(
    dtype: np.dtype[Any],
    like: FloatDType | None,
    also: FloatDType | None,
    names: tuple[str, ...],
) -> bool:
    if like is not None:
        return dtype == like or (also is not None and dtype == also)
    if dtype in _COMPUTED:
        return True
    return (dtype == _FLOAT16 or is_bfloat16(dtype)) and dtype.name in names


def _as_plain(operator: str, name: str, value: object) -> NDArray[Any]:
    # A masked array would lose its mask silently; other subclasses (memmap) are plain memory.
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        return value.view(np.ndarray)
    raise type_error(operator, name, "be a numpy.ndarray", type(value).__name__)


def _dtype_error(
    operator: str,
    name: str,
    dtype: np.dtype[Any],
    like: FloatDType | None,
    source: str,
    also: FloatDType | None,
    names: tuple[str, ...],
) -> Exception:
    if not dtype.isnative and dtype.newbyteorder("=").name in names:
        return type_error(operator, name, "have native byte order", f"dtype {dtype.str}")
    wanted = listed(names) if like is None else f"{like} (from {source})"
    more = "" if also is None or also == like else f" or {also}"
    return type_error(operator, name, f"have dtype {wanted}{more}", str(dtype))
