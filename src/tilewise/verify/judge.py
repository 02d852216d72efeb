"""How one result is judged, whatever operator it is of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import metrics
from .oracle import Oracle
from .report import FAILED, PASSED, SKIPPED, Check

__all__ = ["accuracy", "compare", "poison_heap", "text_of", "verdict"]

Array = NDArray[Any]


class Tried(Protocol):
    """A case in the dtype in which it is tried."""

    @property
    def dtype(self) -> str:
        """The name of the dtype."""
        ...

    def in_order(self, name: str, x: Array) -> Array:
        """Return a result in the order of the truth."""
        ...


def accuracy(case: Tried, name: str, value: Any, oracle: Oracle) -> Check:
    """Check one result's form, its NaN and Inf, and its error."""
    truth = oracle.truth[name]
    if not isinstance(value, np.ndarray):
        return Check(name, FAILED, detail=f"{name} is no array but {type(value).__name__}")
    got = case.in_order(name, value)
    dtype = oracle.dtypes[name]
    if got.shape != truth.shape or got.dtype != dtype:
        found = f"{got.dtype} {got.shape}, should be {dtype} {truth.shape}"
        return Check(name, FAILED, detail=f"{name} is {found}")
    if unfit := oracle.unfit(name):
        return Check(name, SKIPPED, detail=unfit)
    wrong = oracle.pattern(name, got)
    error, allowed = oracle.error(name, got), oracle.allowed(name)
    detail = ""
    if wrong is not None:
        detail = f"{name}: {wrong}"
    elif not error <= allowed:
        detail = f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    return Check(
        name,
        FAILED if detail else PASSED,
        error=error,
        allowed=allowed,
        # The float64 oracle is no more exact than a float64 computation.
        yardstick=None if case.dtype == "float64" else oracle.yardstick(name),
        ulp=metrics.max_ulp(got, truth),
        bias=metrics.bias(got, truth),
        detail=detail,
    )


def compare(label: str, want: dict[str, Array], got: dict[str, Array]) -> Check:
    """Check that results have the bits that they had before."""
    wrong = [
        name
        for name, x in want.items()
        if name not in got or not metrics.same_bits(x, np.asarray(got[name]))
    ]
    return verdict(label, not wrong, f"other bits in {', '.join(wrong)}")


def verdict(label: str, passed: bool, detail: str) -> Check:
    """Return a check of a property; the detail says what is wrong where it fails."""
    return Check(label, PASSED) if passed else Check(label, FAILED, detail=f"{label}: {detail}")


def poison_heap(oracle: Oracle) -> None:
    """Leave NaN in the memory that results are likely to be given, so that gaps show."""
    sizes: Sequence[int] = [x.size for x in oracle.truth.values()]
    held = [np.full(size, np.nan, dtype) for size in sizes for dtype in (np.float32, np.float64)]
    del held


def text_of(error: Exception) -> str:
    """Return in one line what an audited function raised."""
    first = str(error).strip().splitlines()
    return f"raised {type(error).__name__}: {first[0] if first else ''}".rstrip(": ")
