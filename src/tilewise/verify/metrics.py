"""How far results are from the truth, and whether two results are the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import smallest, unit_roundoff

__all__ = ["bias", "max_ulp", "pattern", "relative_error", "same_bits"]

Array = NDArray[Any]


def relative_error(got: Array, want: Array, *, floor: float = 0.0) -> float:
    """Return the relative Frobenius error `|(got - want) / w| / |want / w|` over finite entries.

    Args:
        got: The result, any float dtype.
        want: The truth in float64, same shape. Its entries that are not finite are left out; where
            only `got` is not finite, the error is infinite.
        floor: With 0, `w = 1`: the plain norm. Otherwise `w = max(floor, |want|)`, so that entries
            of very unlike magnitude, as row maxima can be, count alike.

    Returns:
        The error; where `want` is all zero, the norm of `got` itself.
    """
    finite = np.isfinite(want)
    x, y = np.asarray(got, np.float64)[finite], want[finite]
    if not np.isfinite(x).all():
        return float("inf")
    if not y.size:
        return 0.0
    w = np.maximum(floor, np.abs(y)) if floor else np.float64(1.0)
    # Scaled first: squares of the largest float64 would overflow.
    largest = 1.0 if floor else float(np.abs(y).max()) or 1.0
    with np.errstate(over="ignore"):
        size = float(np.linalg.norm(y / w / largest))
        error = float(np.linalg.norm((x / largest - y / largest) / w))
    return error / size if size else error


def max_ulp(got: Array, want: Array) -> float:
    """Return the largest error in units of the last place of `got`'s dtype.

    The unit is that of the larger of the true entry and the root mean square of the true array:
    entries that cancel to nearly nothing have no last place of their own.
    """
    finite = np.isfinite(want)
    x, y = np.asarray(got, np.float64)[finite], want[finite]
    if not y.size:
        return 0.0
    if not np.isfinite(x).all():
        return float("inf")
    largest = float(np.abs(y).max()) or 1.0
    rms = largest * float(np.sqrt(np.mean((y / largest) ** 2)))
    reference = np.maximum(np.abs(y), rms)
    unit = np.maximum(2 * reference * unit_roundoff(got.dtype), smallest(got.dtype))
    return float((np.abs(x - y) / unit).max())


def bias(got: Array, want: Array) -> float:
    """Return the mean signed error over the root mean square error: 0 is unbiased, 1 all one way.

    The sign of an error is taken relative to the true entry, so that rounding towards zero shows
    as -1 and away from zero as 1.
    """
    finite = np.isfinite(want) & np.isfinite(got)
    y = want[finite]
    error = (np.asarray(got, np.float64)[finite] - y) * np.sign(y)
    if not error.size or not (largest := float(np.abs(error).max())):
        return 0.0
    error /= largest
    return float(error.mean() / np.sqrt((error**2).mean()))


def pattern(got: Array, want: Array, *, exact: bool = False) -> str | None:
    """Return in words where the entries that are not finite differ, or None.

    Args:
        got: The result.
        want: The truth.
        exact: Whether -inf, inf and NaN are told apart; otherwise any of them stands for any.
    """
    spoiled = ~np.isfinite(got) & np.isfinite(want)
    if spoiled.any():
        return f"{_where(spoiled)} {_kind(got, spoiled)}, should be finite"
    missed = np.isfinite(got) & ~np.isfinite(want)
    if missed.any():
        return f"{_where(missed)} finite, should be {_kind(want, missed)}"
    if exact:
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        other = ~np.isfinite(want) & ~same
        if other.any():
            return f"{_where(other)} {_kind(got, other)}, should be {_kind(want, other)}"
    return None


def same_bits(a: Array, b: Array) -> bool:
    """Return whether two arrays agree in shape, dtype and bits; any NaN equals any NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    x, y = (np.ascontiguousarray(array).view(unsigned) for array in (a, b))
    return bool(np.all((x == y) | (np.isnan(a) & np.isnan(b))))


def _where(wrong: NDArray[np.bool_]) -> str:
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    count = int(wrong.sum())
    more = f" and {count - 1} more" if count > 1 else ""
    return f"entry {first}{more}"


def _kind(array: Array, at: NDArray[np.bool_]) -> str:
    return str(array[at][0])
