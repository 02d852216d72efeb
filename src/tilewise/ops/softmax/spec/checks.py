"""The one place that checks a call: what it returns needs no further check."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import FLOAT32, FLOATS, check_tensor, is_narrow, round_to
from tilewise.base.errors import type_error, value_error
from tilewise.base.operator import Number
from tilewise.shared.memory import check_out
from tilewise.shared.rows import Array, axes_of, rows_along

from .calls import CotangentCall, SecondCall, SoftmaxCall, SoftmaxStats, TangentCall

# The reciprocal and its product with log2(e) stay normal numbers in float32.
TEMPERATURE = Number("temperature", 1e-15, 1e15, "what x is divided by")


class Problem:
    """The arguments of one call in the user's shapes, checked, and the call that they make.

    Attributes:
        name: Name of the function, for error texts.
        x: The user's array.
        rows: How it is seen as `(A, C, I)`.
        call: The validated call.
        sink_shape: Shape of the sink as the user gave it, or None where it is no array.
    """

    def __init__(
        self,
        name: str,
        x: object,
        axis: object,
        temperature: object = 1.0,
        where: object = None,
        sink: object = None,
    ) -> None:
        self.name = name
        self.x = check_tensor(name, "x", x, None, "x", None, FLOATS)
        self.rows = rows_along(self.x, axes_of(name, "axis", axis, self.x.ndim))
        seen = None if where is None else self._where(where)
        self.sink_shape: tuple[int, ...] | None = None
        self.sink_dtype = self.x.dtype
        logit = None if sink is None else self._sink(sink)
        whole = self.rows.whole(self.x)
        self.call = SoftmaxCall(whole, seen, logit, check_temperature(name, temperature))

    def whole(self, argument: str, value: object) -> Array | None:
        """Return an array of the shape and dtype of x as `(A, C, I)`, or None."""
        if value is None:
            return None
        array = self._array(argument, value)
        if array.shape != self.x.shape:
            raise self._shape_error(argument, self.x.shape, array)
        return self.rows.whole(array)

    def of_rows(self, argument: str, value: object) -> Array | None:
        """Return an array of one number for each row as `(A, I)`, or None."""
        if value is None:
            return None
        array = self._wide(argument, value)
        if array.shape != self.rows.row_shape:
            raise self._shape_error(argument, self.rows.row_shape, array)
        return self.rows.of_rows(array)

    def stats(self, stats: object) -> SoftmaxStats:
        """Return the row statistics of a forward pass."""
        if not isinstance(stats, SoftmaxStats):
            raise type_error(self.name, "stats", "be SoftmaxStats", type(stats).__name__)
        m, log_l = self.of_rows("stats.m", stats.m), self.of_rows("stats.log_l", stats.log_l)
        if m is None or log_l is None:
            raise type_error(self.name, "stats", "hold two arrays", "None")
        return SoftmaxStats(m, log_l)

    def sink_tangent(self, value: object) -> Array | None:
        """Return the tangent of the sink as `(A, I)`, or None."""
        if value is None:
            return None
        if self.sink_shape is None:
            raise value_error(self.name, "tsink", "come with a sink that is an array", "none")
        array = self._either("tsink", value)
        if array.shape != self.sink_shape:
            raise self._shape_error("tsink", self.sink_shape, array, "sink")
        return self._spread(array)

    def out(self, value: object) -> Array:
        """Return the array for the result after checking that it can be written."""
        others = {"where": self.call.where, "sink": self.call.sink}
        return check_out(self.name, "out", value, self.x, "x", others)

    def dsink(self, dsink: Array | None) -> Array | None:
        """Return the gradient of the sink in its shape, summed where it was repeated."""
        if dsink is None or self.sink_shape is None:
            return None
        found, shape = self.rows.rows_back(dsink), self.sink_shape
        added = found.ndim - len(shape)
        repeated = [k for k, n in enumerate(shape, added) if n == 1 and found.shape[k] != 1]
        summed = found.sum(axis=(*range(added), *repeated), dtype=np.float64)
        return round_to(np.asarray(summed.reshape(shape)), self.sink_dtype)

    def _array(self, argument: str, value: object) -> Array:
        return check_tensor(self.name, argument, value, self.x.dtype, "x")

    def _wide(self, argument: str, value: object) -> Array:
        if is_narrow(self.x.dtype):
            return check_tensor(self.name, argument, value, FLOAT32, "x of 16 bits")
        return self._array(argument, value)

    def _either(self, argument: str, value: object) -> Array:
        also = FLOAT32 if is_narrow(self.x.dtype) else None
        return check_tensor(self.name, argument, value, self.x.dtype, "x", also)

    def _where(self, where: object) -> NDArray[np.bool_]:
        array = check_boolean(self.name, where)
        check_broadcast(self.name, "where", array.shape, self.x.shape, "x")
        return np.broadcast_to(self.rows.small(array), self.rows.sizes)

    def _sink(self, sink: object) -> Array:
        A, _, I = self.rows.sizes
        if not isinstance(sink, np.ndarray):
            with np.errstate(over="ignore"):
                one = np.asarray(sink_number(self.name, sink)).astype(self._sums)
            check_sink(self.name, one)
            return np.broadcast_to(one, (A, I))
        array = self._either("sink", sink)
        check_broadcast(self.name, "sink", array.shape, self.rows.row_shape, "the rows")
        check_sink(self.name, array)
        self.sink_shape, self.sink_dtype = array.shape, array.dtype
        return self._spread(array)

    @property
    def _sums(self) -> np.dtype[Any]:
        return FLOAT32 if is_narrow(self.x.dtype) else self.x.dtype

    def _spread(self, array: Array) -> Array:
        """Return an array that broadcasts to the row shape as `(A, I)`, in the dtype of sums."""
        array = array.astype(self._sums, copy=False)
        return self.rows.of_rows(np.broadcast_to(array, self.rows.row_shape))

    def _shape_error(
        self, argument: str, shape: tuple[int, ...], got: Array, source: str = "x"
    ) -> ValueError:
        return value_error(self.name, argument, f"have shape {shape} (from {source})", got.shape)


def prepare_vjp(
    problem: Problem, stats: SoftmaxStats, dy: object, dlog_y: object, dlse: object
) -> CotangentCall:
    """Validate the cotangents of a call.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape.
    """
    whole = problem.whole("dy", dy), problem.whole("dlog_y", dlog_y)
    return CotangentCall(*whole, problem.of_rows("dlse", dlse), stats)


def prepare_jvp(problem: Problem, stats: SoftmaxStats, tx: object, tsink: object) -> TangentCall:
    """Validate the tangents of a call.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape, or the tangent of what was not given.
    """
    return TangentCall(problem.whole("tx", tx), problem.sink_tangent(tsink), stats)


def prepare_vjp_jvp(
    problem: Problem,
    cotangents: CotangentCall,
    tangents: TangentCall,
    tdy: object,
    tdlog_y: object,
    tdlse: object,
) -> SecondCall:
    """Validate what the JVP of the VJP takes.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape.
    """
    whole = problem.whole("tdy", tdy), problem.whole("tdlog_y", tdlog_y)
    return SecondCall(cotangents, tangents, *whole, problem.of_rows("tdlse", tdlse))


def check_temperature(name: str, value: object) -> float:
    """Return the temperature as a float, or raise."""
    if isinstance(value, numbers.Real) and not float(value) > 0:
        raise value_error(name, TEMPERATURE.name, "be > 0", f"{float(value):g}")
    return TEMPERATURE.check(name, value)


def sink_number(name: str, value: object) -> float:
    """Return a sink that is one number, or raise."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise type_error(name, "sink", "be a number or an array", type(value).__name__)
    sink = float(value)
    if not sink < np.inf:
        raise value_error(name, "sink", "be finite or -inf", sink)
    return sink


def check_sink(name: str, sink: Array) -> None:
    """Raise where a logit of the sink is NaN or inf."""
    # What broadcasting repeats is looked at once.
    once = sink[tuple([slice(1 if step == 0 else None) for step in sink.strides])]
    wrong = once[~(once < np.inf)]
    if wrong.size:
        raise value_error(name, "sink", "be finite or -inf", str(wrong.flat[0]))


def check_boolean(name: str, where: object) -> NDArray[np.bool_]:
    """Return an array of bool, or raise."""
    if not isinstance(where, np.ndarray) or isinstance(where, np.ma.MaskedArray):
        raise type_error(name, "where", "be a boolean numpy.ndarray", type(where).__name__)
    if where.dtype != np.bool_:
        raise type_error(name, "where", "have dtype bool", str(where.dtype))
    return where.view(np.ndarray)


def check_broadcast(
    name: str, argument: str, got: tuple[int, ...], shape: tuple[int, ...], whose: str
) -> None:
    """Raise where an array does not broadcast to a shape."""
    tail = shape[len(shape) - len(got) :] if len(got) <= len(shape) else ()
    fits = len(got) <= len(shape) and all(
        [n in (1, full) for n, full in zip(got, tail, strict=True)]
    )
    if not fits:
        raise value_error(name, argument, f"broadcast to the shape {shape} of {whose}", got)
