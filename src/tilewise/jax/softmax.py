"""Softmax, log-softmax and log-sum-exp on JAX arrays."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from tilewise.base.dtypes import is_narrow
from tilewise.base.errors import type_error
from tilewise.ops.softmax.record import FLAT
from tilewise.ops.softmax.spec import (
    Rows,
    axes_of,
    check_broadcast,
    check_temperature,
    inverse,
    known_rows_in_order,
    sink_number,
)

from . import checks
from .autodiff import forward, register

for _operator in FLAT.values():
    register(_operator)

Axis: TypeAlias = int | tuple[int, ...] | None
Seen: TypeAlias = Array | NDArray[np.bool_] | None
Sink: TypeAlias = float | Array | None


class SoftmaxResult(NamedTuple):
    """The softmax with its log-sum-exp.

    Attributes:
        y: Shape and dtype of x.
        lse: Shape of x without the axes of a row; dtype of x, at least float32.
    """

    y: Array
    lse: Array


class LogSoftmaxResult(NamedTuple):
    """The logarithm of the softmax with its log-sum-exp.

    Attributes:
        log_y: Shape and dtype of x.
        lse: Shape of x without the axes of a row; dtype of x, at least float32.
    """

    log_y: Array
    lse: Array


@overload
def softmax(
    x: Array,
    axis: Axis = ...,
    *,
    temperature: float = ...,
    where: Seen = ...,
    sink: Sink = ...,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
) -> Array: ...
@overload
def softmax(
    x: Array,
    axis: Axis = ...,
    *,
    temperature: float = ...,
    where: Seen = ...,
    sink: Sink = ...,
    return_lse: bool = ...,
    implementation: str | None = ...,
) -> Array | SoftmaxResult: ...
def softmax(
    x: Array,
    axis: Axis = -1,
    *,
    temperature: float = 1.0,
    where: Seen = None,
    sink: Sink = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Array | SoftmaxResult:
    r"""Compute the softmax along axes, with derivatives of first and second order.

    `y = exp(s) / (sum exp(s) + exp(sink))` with `s = x / temperature`, the sum over the visible
    entries. A hidden entry is absent: `y = 0`, and NaN there reaches nothing. So is an entry of
    -inf. A row without entries and sink has `y = 0` and `lse = -inf`; one with NaN or inf has
    `y = NaN`.

    `y` and `lse` are differentiable with respect to x and sink under every transformation of JAX,
    and one over another up to the second order.

    Args:
        x: Any shape; float64, float32, bfloat16 or float16. Sums are float32 for the latter two.
        axis: The axis or axes of a row; None is all.
        temperature: From 1e-15 to 1e15. x is divided by it.
        where: Boolean array that broadcasts to the shape of x. True where an entry is visible.
        sink: One more logit of each row, in the denominator only: a number, or an array that
            broadcasts to the shape of x without the axes of a row, in the dtype of x, or float32
            where that has 16 bits. -inf is none.
        return_lse: Return also `lse = log(sum exp(s) + exp(sink))`.
        implementation: Name of the implementation, which never falls back to another; by default
            the first that serves the call.

    Returns:
        `y`, or a `SoftmaxResult` with return_lse.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: A third derivative is asked for.
        JaxRuntimeError: When it runs: a logit of the sink is NaN or inf.

    Accuracy:
        `tilewise.ops.softmax.spec.error_bound` bounds the error and derives the bound.

    Source:
        As for `tilewise.numpy.softmax`, which computes the same bits.
    """
    y, lse = _call("softmax", x, axis, temperature, where, sink, implementation)
    return SoftmaxResult(y, lse) if return_lse else y


@overload
def log_softmax(
    x: Array,
    axis: Axis = ...,
    *,
    temperature: float = ...,
    where: Seen = ...,
    sink: Sink = ...,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
) -> Array: ...
@overload
def log_softmax(
    x: Array,
    axis: Axis = ...,
    *,
    temperature: float = ...,
    where: Seen = ...,
    sink: Sink = ...,
    return_lse: bool = ...,
    implementation: str | None = ...,
) -> Array | LogSoftmaxResult: ...
def log_softmax(
    x: Array,
    axis: Axis = -1,
    *,
    temperature: float = 1.0,
    where: Seen = None,
    sink: Sink = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Array | LogSoftmaxResult:
    r"""Compute the logarithm of the softmax along axes, also where that underflows.

    `log_y = s - log(sum exp(s) + exp(sink))` with `s = x / temperature`; -inf where an entry is
    hidden or its row is empty. Differentiable as `softmax` is.

    Args:
        x: As for `softmax`.
        axis: As for `softmax`.
        temperature: As for `softmax`.
        where: As for `softmax`.
        sink: As for `softmax`.
        return_lse: As for `softmax`.
        implementation: As for `softmax`.

    Returns:
        `log_y`, or a `LogSoftmaxResult` with return_lse.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: A third derivative is asked for.
        JaxRuntimeError: When it runs: a logit of the sink is NaN or inf.

    Accuracy:
        `tilewise.ops.softmax.spec.error_bound` bounds the error and derives the bound.
    """
    log_y, lse = _call("log_softmax", x, axis, temperature, where, sink, implementation)
    return LogSoftmaxResult(log_y, lse) if return_lse else log_y


def logsumexp(
    x: Array,
    axis: Axis = None,
    *,
    keepdims: bool = False,
    temperature: float = 1.0,
    where: Seen = None,
    sink: Sink = None,
    implementation: str | None = None,
) -> Array:
    r"""Compute the logarithm of the sum of exponentials along axes.

    `lse = log(sum exp(s) + exp(sink))` with `s = x / temperature`, the sum over the visible
    entries; -inf where there are none, inf where one is inf. Differentiable as `softmax` is.

    Args:
        x: As for `softmax`.
        axis: The axis or axes of a row; None is all.
        keepdims: Whether the axes stay, with size 1.
        temperature: As for `softmax`.
        where: As for `softmax`.
        sink: As for `softmax`.
        implementation: As for `softmax`.

    Returns:
        One number for each row; dtype of x, at least float32.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: A third derivative is asked for.
        JaxRuntimeError: When it runs: a logit of the sink is NaN or inf.

    Accuracy:
        `tilewise.ops.softmax.spec.error_bound` bounds the error and derives the bound.
    """
    name = "logsumexp"
    x, rows = _rows(name, x, axis)
    (lse,) = _outputs(name, x, rows, temperature, where, sink, implementation)
    lse = lse.reshape(rows.row_shape)
    return jnp.expand_dims(lse, rows.axes) if keepdims else lse


def _call(
    name: str,
    x: Array,
    axis: Axis,
    temperature: float,
    where: Seen,
    sink: Sink,
    implementation: str | None,
) -> tuple[Array, Array]:
    """Return y or log_y, and lse."""
    x, rows = _rows(name, x, axis)
    y, lse = _outputs(name, x, rows, temperature, where, sink, implementation)
    y = y.reshape([rows.shape[k] for k in rows.order])
    if not rows.in_order:
        y = y.transpose(inverse(rows.order))
    return y, lse.reshape(rows.row_shape)


def _rows(name: str, x: Any, axis: Axis) -> tuple[Array, Rows]:
    """Return x as an array of JAX, and how it is seen as `(A, C, I)`."""
    x = checks.array(name, "x", x)
    return x, known_rows_in_order(x.shape, axes_of(name, "axis", axis, x.ndim))


def _outputs(
    name: str,
    x: Array,
    rows: Rows,
    temperature: float,
    where: Seen,
    sink: Sink,
    implementation: str | None,
) -> tuple[Array, ...]:
    """Return the outputs of the operator, `(A, C, I)` and `(A, I)`."""
    whole = (x if rows.in_order else x.transpose(rows.order)).reshape(rows.sizes)
    logit = None if sink is None else _sink(name, sink, x, rows)
    seen = None if where is None else _where(name, where, rows)
    options = {
        "temperature": check_temperature(name, temperature),
        "implementation": implementation,
    }
    needed = (True,) * len(FLAT[name].outputs)
    return forward(FLAT[name], (whole, logit, seen), repr(options), needed)


def _where(name: str, where: Any, rows: Rows) -> Array:
    """Return which entries are visible, with 1 in place of A, C or I over which it repeats."""
    if not isinstance(where, Array | np.ndarray):
        raise type_error(name, "where", "be a boolean array", type(where).__name__)
    if where.dtype != np.bool_:
        raise type_error(name, "where", "have dtype bool", str(where.dtype))
    check_broadcast(name, "where", where.shape, rows.shape, "x")
    ndim = len(rows.shape)
    seen = jnp.asarray(where).reshape((1,) * (ndim - where.ndim) + where.shape)
    grown, sizes = [], []
    for group in (rows.outer, rows.axes, rows.inner):
        repeats = all([seen.shape[k] == 1 for k in group])
        kept = [1 if repeats else rows.shape[k] for k in group]
        grown += kept
        sizes.append(math.prod(kept))
    return jnp.broadcast_to(seen.transpose(rows.order), grown).reshape(sizes)


def _sink(name: str, sink: Any, x: Array, rows: Rows) -> Array:
    """Return the sink as `(A, I)` in the dtype of sums."""
    A, _, I = rows.sizes
    wide = jnp.dtype(jnp.float32) if is_narrow(x.dtype) else x.dtype
    if not isinstance(sink, Array | np.ndarray):
        return jnp.full((A, I), sink_number(name, sink), wide)
    given = checks.either(name, "sink", sink, x.dtype, "x")
    assert given is not None
    check_broadcast(name, "sink", given.shape, rows.row_shape, "the rows")
    return jnp.broadcast_to(given.astype(wide), rows.row_shape).reshape(A, I)
