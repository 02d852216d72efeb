"""The contract of the linear map: its arguments, what passes to implementations, its error bound.

`T` is all leading dimensions of x as one, `C` the entries of a row of x, `V` those of a row of y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import (
    FLOATS,
    FloatDType,
    check_tensor,
    compute_dtype,
    is_narrow,
    unit_roundoff,
)
from tilewise.base.errors import type_error, value_error

Array = NDArray[Any]
Shape = tuple[int, ...]

NAME = "linear"


@dataclass(frozen=True, slots=True, eq=False)
class LinearCall:
    """A validated call.

    Attributes:
        x: `(T, C)`, a view wherever strides allow it.
        w: `(V, C)`, dtype of x.
        bias: `(V,)`, dtype of x, or None.
        leading: The dimensions of x that T stands for.
    """

    x: Array
    w: Array
    bias: Array | None
    leading: Shape

    @property
    def dtype(self) -> FloatDType:
        """Return the dtype of the arrays."""
        return self.x.dtype

    @property
    def compute_dtype(self) -> FloatDType:
        """Return the dtype of sums."""
        return compute_dtype(self.x.dtype)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return T, C and V."""
        return (*self.x.shape, self.w.shape[0])


@dataclass(frozen=True, slots=True)
class Needed:
    """Of which inputs a backward pass computes the gradient; the others are None."""

    x: bool = True
    w: bool = True
    bias: bool = True


class LinearGrads(NamedTuple):
    """Gradients of the linear map, or their tangents.

    Attributes:
        dx: Shape and dtype of x.
        dw: Shape and dtype of w, or None where it was added to an accumulator.
        dbias: Shape and dtype of bias, or None where none was given.
    """

    # "| Any" spares those who ask for it a test for None.
    dx: Array | Any
    dw: Array | Any = None
    dbias: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TangentCall:
    """Validated tangents of the inputs, in the shapes of the call; None is zero."""

    tx: Array | None = None
    tw: Array | None = None
    tbias: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CotangentCall:
    """A validated cotangent.

    Attributes:
        dy: `(T, V)`, or None for zero.
        accumulator: `(V, C)`, to which the gradient of w is added, or None.
    """

    dy: Array | None = None
    accumulator: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SecondCall:
    """What the JVP of a VJP takes: a cotangent, tangents of the inputs, that of the cotangent."""

    cotangents: CotangentCall
    tangents: TangentCall
    tdy: Array | None = None


ALL_NEEDED = Needed()


def check_sizes(x: Shape, w: Shape, bias: Shape | None) -> None:
    """Raise where shapes do not fit together.

    Raises:
        ValueError: They do not.
    """
    if not x:
        raise value_error(NAME, "x", "have shape (..., C)", x)
    if len(w) != 2:
        raise value_error(NAME, "w", "have shape (V, C)", w)
    if w[1] != x[-1]:
        raise value_error(NAME, "w", f"have shape (V, C) with C={x[-1]} (from x)", w)
    if bias is not None and bias != w[:1]:
        raise value_error(NAME, "bias", f"have shape (V,) with V={w[0]} (from w)", bias)


def prepare(x: object, w: object, bias: object = None) -> LinearCall:
    """Validate a call.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape.
    """
    first = check_tensor(NAME, "x", x, None, "x", names=FLOATS)
    weight = check_tensor(NAME, "w", w, first.dtype, "x")
    added = None if bias is None else check_tensor(NAME, "bias", bias, first.dtype, "x")
    check_sizes(first.shape, weight.shape, None if added is None else added.shape)
    return LinearCall(flat(first), weight, added, first.shape[:-1])


def prepare_vjp(call: LinearCall, dy: object, accumulator: object = None) -> CotangentCall:
    """Validate the cotangent of a call, and the array to which the gradient of w is added.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape, or an accumulator that cannot be written or is an input.
    """
    cotangent = of_output(call, "dy", dy)
    if accumulator is None:
        return CotangentCall(cotangent)
    array = _accumulator(call, accumulator)
    for name, other in (("x", call.x), ("w", call.w), ("dy", cotangent)):
        if other is not None and np.may_share_memory(array, other):
            raise value_error(NAME, "grad_accumulator", f"not overlap {name}", "a part of it")
    return CotangentCall(cotangent, array)


def prepare_jvp(call: LinearCall, tx: object, tw: object, tbias: object) -> TangentCall:
    """Validate the tangents of a call.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape, or the tangent of a bias that was not given.
    """
    if tbias is not None and call.bias is None:
        raise value_error(NAME, "tbias", "come with a bias", "none")
    x_shape = (*call.leading, call.x.shape[1])
    moved = _like(call, "tx", tx, x_shape)
    return TangentCall(
        None if moved is None else flat(moved),
        _like(call, "tw", tw, call.w.shape),
        _like(call, "tbias", tbias, call.w.shape[:1]),
    )


def of_output(call: LinearCall, name: str, value: object) -> Array | None:
    """Return an array of the shape of y as `(T, V)`, or None."""
    array = _like(call, name, value, (*call.leading, call.w.shape[0]))
    return None if array is None else flat(array)


def flat(array: Array) -> Array:
    """Return an array with all but its last dimension as one."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def accumulator_dtypes(dtype: str) -> tuple[str, ...]:
    """Return the names of the dtypes that an accumulator may have beside a weight's own."""
    return ("float64",) if dtype == "float64" else (dtype, "float32", "float64")


def _accumulator(call: LinearCall, value: object) -> Array:
    if not isinstance(value, np.ndarray):
        requirement = "be a numpy.ndarray"
        raise type_error(NAME, "grad_accumulator", requirement, type(value).__name__)
    allowed = accumulator_dtypes(call.dtype.name)
    if value.dtype.name not in allowed or not value.dtype.isnative:
        requirement = f"have dtype {' or '.join(dict.fromkeys(allowed))}"
        raise type_error(NAME, "grad_accumulator", requirement, str(value.dtype))
    if value.shape != call.w.shape:
        requirement = f"have shape {call.w.shape} (from w)"
        raise value_error(NAME, "grad_accumulator", requirement, value.shape)
    if not value.flags.writeable:
        raise value_error(NAME, "grad_accumulator", "be writable", "a read-only array")
    return value


def _like(call: LinearCall, name: str, value: object, shape: Shape) -> Array | None:
    if value is None:
        return None
    array = check_tensor(NAME, name, value, call.dtype, "x")
    if array.shape != shape:
        raise value_error(NAME, name, f"have shape {shape}", array.shape)
    return array


def error_bound(dtype: FloatDType, terms: int, *, magnitude: Any, size: Any) -> Any:
    """Bound the rounding error of one result, entry by entry or in the Frobenius norm.

    Each entry is a sum of products. To first order in the unit roundoff u of the dtype of sums,
    with independent errors of mean zero, a sum of n products has a root mean square error of at
    most `u sqrt(n) sum |products|` in whatever order it is made, and each product one of u. In 16
    bits the result is rounded once more. The bound is doubled for float64, where the oracle has
    the same errors.

    Args:
        dtype: Dtype of x.
        terms: Products of one entry: C for y, V for dx, T for dw and dbias, twice that for their
            tangents.
        magnitude: The result's formula over absolute values. One number or one for each entry.
        size: The exact result's absolute value, in the same form.

    Returns:
        The bound, in the form of magnitude.

    Source:
        Higham & Mary 2019, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci.
        Comput. 41(5), theorem 2.4, here for the second moment.
    """
    oracle = 2 if dtype == np.float64 else 1
    bound = unit_roundoff(compute_dtype(dtype)) * oracle * ((math.sqrt(terms) + 2) * magnitude)
    if is_narrow(dtype):
        bound = bound + unit_roundoff(dtype) * size
    return bound
