"""The one place that checks a call: what it returns needs no further check."""

from __future__ import annotations

import operator as _operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import (
    FLOAT32,
    FLOATS,
    check_tensor,
    compute_dtype,
    is_bfloat16,
    is_narrow,
)
from tilewise.base.errors import type_error, value_error
from tilewise.base.operator import Number
from tilewise.shared.memory import check_out
from tilewise.shared.rows import Array, axes_of, rows_along

from .calls import Cotangents, EntropyCall, EntropyStats, Options, Tangents

NAME = "cross_entropy"
REDUCTIONS = ("none", "sum", "mean")
LABEL_SMOOTHING = Number("label_smoothing", 0, 1, "share of the target that all classes have")
# The squares of float32 logits up to 1e15 stay finite.
Z_LOSS = Number("z_loss", 0, 1e6, "factor of the square of the log-sum-exp")
# Inside this range z / c and its square stay normal numbers in float32.
SOFTCAP = Number("softcap", 1e-15, 1e15, "c: a logit z becomes c tanh(z / c)")
_INT64 = np.iinfo(np.int64)


def check_options(name: str, given: Mapping[str, Any]) -> Options:
    """Return the options that are no arrays, checked.

    Args:
        name: Name of the function, for error texts.
        given: Some of the fields of `Options`.

    Raises:
        TypeError: One has a wrong kind.
        ValueError: One has a wrong value.
    """
    options = {**Options().__dict__, **given}
    reduction, cap = options["reduction"], options["softcap"]
    if reduction not in REDUCTIONS:
        requirement = f"be {', '.join(map(repr, REDUCTIONS[:2]))} or {REDUCTIONS[2]!r}"
        raise value_error(name, "reduction", requirement, repr(reduction))
    return Options(
        _ignore_index(name, options["ignore_index"]),
        LABEL_SMOOTHING.check(name, options["label_smoothing"]),
        Z_LOSS.check(name, options["z_loss"]),
        None if cap is None else SOFTCAP.check(name, cap),
        reduction,
    )


def _ignore_index(name: str, value: object) -> int:
    index = _integer(name, "ignore_index", value)
    if not _INT64.min <= index <= _INT64.max:
        raise value_error(name, "ignore_index", "fit 64 bits", index)
    return index


def _integer(name: str, argument: str, value: object) -> int:
    if not isinstance(value, bool | np.bool_):
        try:
            return _operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise type_error(name, argument, "be an integer", type(value).__name__)


def check_class_axis(name: str, value: object, ndim: int) -> int:
    """Return the axis of the classes, counted from 0."""
    axis = _integer(name, "class_axis", value)
    if ndim == 0:
        raise value_error(name, "logits", "have a dimension of classes", ())
    return axes_of(name, "class_axis", axis, ndim, "logits")[0]


def check_classes(name: str, shape: tuple[int, ...], axis: int) -> None:
    """Raise where there is no class."""
    if shape[axis] == 0:
        raise value_error(name, "logits", "have at least one class", shape)


def check_range(name: str, targets: NDArray[np.int64], classes: int, ignore_index: int) -> None:
    """Raise where an index is neither a class nor the ignored one."""
    wrong = (targets < 0) | (targets >= classes)
    if wrong.any():
        wrong &= targets != ignore_index
        if wrong.any():
            requirement = f"be from 0 to {classes - 1} or ignore_index ({ignore_index})"
            raise value_error(name, "targets", requirement, int(targets[wrong].flat[0]))


def check_weight(name: str, weight: Array) -> None:
    """Raise where a class weight is NaN or infinite."""
    wrong = weight[~np.isfinite(weight)]
    if wrong.size:
        raise value_error(name, "weight", "be finite", str(wrong.flat[0]))


def target_shapes(
    name: str, got: tuple[int, ...], shape: tuple[int, ...], axis: int, *, indices: bool
) -> None:
    """Raise where targets do not have the shape that goes with their kind."""
    wanted = shape[:axis] + shape[axis + 1 :] if indices else shape
    if got != wanted:
        kind = "class indices" if indices else "class probabilities"
        requirement = f"have shape {wanted} as {kind} (from logits {shape}, classes in axis {axis})"
        raise value_error(name, "targets", requirement, got)


class Problem:
    """The arguments of one call in the user's shapes, checked, and the call that they make.

    Attributes:
        name: Name of the function, for error texts.
        logits: The user's array.
        rows: How it is seen as `(A, C, I)`.
        call: The validated call.
        probabilities: The user's class probabilities, or None.
    """

    def __init__(
        self,
        name: str,
        logits: object,
        targets: object,
        weight: object,
        class_axis: object,
        options: Mapping[str, Any],
    ) -> None:
        self.name = name
        self.logits = check_tensor(name, "logits", logits, None, "logits", None, FLOATS)
        self.axis = check_class_axis(name, class_axis, self.logits.ndim)
        check_classes(name, self.logits.shape, self.axis)
        self.rows = rows_along(self.logits, (self.axis,))
        checked = check_options(name, options)
        indices, self.probabilities = self._targets(targets, checked.ignore_index)
        q = None if self.probabilities is None else self.rows.whole(self.probabilities)
        whole = self.rows.whole(self.logits)
        self.call = EntropyCall(whole, indices, q, self._weight(weight), checked)

    def logits_like(self, argument: str, value: object) -> Array | None:
        """Return an array of the shape and dtype of the logits as `(A, C, I)`, or None."""
        if value is None:
            return None
        array = check_tensor(self.name, argument, value, self.logits.dtype, "logits")
        self._same_shape(argument, array, self.logits.shape, "logits")
        return self.rows.whole(array)

    def tangents(self, tlogits: object, ttargets: object) -> Tangents:
        """Return the tangents of the inputs."""
        moved = None
        if ttargets is not None:
            if self.probabilities is None:
                raise value_error(self.name, "ttargets", "come with class probabilities", "indices")
            dtype = self.probabilities.dtype
            array = check_tensor(self.name, "ttargets", ttargets, dtype, "targets")
            self._same_shape("ttargets", array, self.logits.shape, "logits")
            moved = self.rows.whole(array)
        return Tangents(self.logits_like("tlogits", tlogits), moved)

    def cotangents(self, loss: object, lse: object, z_loss: object, prefix: str) -> Cotangents:
        """Return cotangents of the results, or their tangents; loss and z_loss as reduced."""
        reduced = self.call.options.reduction != "none"
        of_rows = self.of_rows
        if reduced:
            return Cotangents(
                self._one(f"{prefix}loss", loss),
                of_rows(f"{prefix}lse", lse),
                self._one(f"{prefix}z_loss", z_loss),
            )
        return Cotangents(
            of_rows(f"{prefix}loss", loss),
            of_rows(f"{prefix}lse", lse),
            of_rows(f"{prefix}z_loss", z_loss),
        )

    def of_rows(self, argument: str, value: object) -> Array | None:
        """Return an array of one number for each row as `(A, I)`, or None."""
        if value is None:
            return None
        array = self._wide(argument, value)
        self._same_shape(argument, array, self.rows.row_shape, "logits")
        return self.rows.of_rows(array)

    def stats(self, stats: object) -> EntropyStats:
        """Return the row statistics of a forward pass."""
        if not isinstance(stats, EntropyStats):
            raise type_error(self.name, "stats", "be EntropyStats", type(stats).__name__)
        found = [self.of_rows(f"stats.{n}", getattr(stats, n)) for n in EntropyStats._fields]
        if any([x is None for x in found]):
            raise type_error(self.name, "stats", "hold three arrays", "None")
        return EntropyStats(*found)  # type: ignore[arg-type]

    def out(self, value: object) -> Array:
        """Return the array for the gradient of the logits after checking that it can be written."""
        others = {"targets": self.probabilities, "weight": self.call.weight}
        return check_out(self.name, "out", value, self.logits, "logits", others)

    def _targets(
        self, value: object, ignore_index: int
    ) -> tuple[NDArray[np.int64] | None, Array | None]:
        """Return class indices as `(A, I)`, or class probabilities as they were given."""
        name, shape, axis = self.name, self.logits.shape, self.axis
        if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
            raise type_error(name, "targets", "be a numpy.ndarray", type(value).__name__)
        if value.dtype.kind in "iu":
            target_shapes(name, value.shape, shape, axis, indices=True)
            if value.dtype == np.uint64 and value.size and value.max() > _INT64.max:
                raise value_error(name, "targets", f"be from 0 to {shape[axis] - 1}", value.max())
            indices = np.ascontiguousarray(self.rows.of_rows(value.view(np.ndarray)), np.int64)
            check_range(name, indices, shape[axis], ignore_index)
            return indices, None
        if value.dtype.kind != "f" and not is_bfloat16(value.dtype):
            requirement = "hold class indices (integers) or class probabilities (floats)"
            raise type_error(name, "targets", requirement, str(value.dtype))
        also = FLOAT32 if is_narrow(self.logits.dtype) else None
        array = check_tensor(name, "targets", value, self.logits.dtype, "logits", also)
        target_shapes(name, array.shape, shape, axis, indices=False)
        return None, array

    def _weight(self, value: object) -> Array | None:
        if value is None:
            return None
        dtype = self.logits.dtype
        also = FLOAT32 if is_narrow(dtype) else None
        array = check_tensor(self.name, "weight", value, dtype, "logits", also)
        self._same_shape("weight", array, (self.logits.shape[self.axis],), "the classes")
        check_weight(self.name, array)
        return np.ascontiguousarray(array, compute_dtype(dtype))

    def _one(self, argument: str, value: object) -> Array | None:
        if value is None:
            return None
        if isinstance(value, float | int) and not isinstance(value, bool):
            value = np.asarray(value, compute_dtype(self.logits.dtype))
        array = self._wide(argument, value)
        self._same_shape(argument, array, (), "the reduction")
        return array

    def _wide(self, argument: str, value: object) -> Array:
        # A result of no dimensions is a scalar after any arithmetic.
        if isinstance(value, np.generic):
            value = np.asarray(value)
        if is_narrow(self.logits.dtype):
            return check_tensor(self.name, argument, value, FLOAT32, "logits of 16 bits")
        return check_tensor(self.name, argument, value, self.logits.dtype, "logits")

    def _same_shape(self, argument: str, array: Array, shape: tuple[int, ...], source: str) -> None:
        if array.shape != shape:
            requirement = f"have shape {shape} (from {source})"
            raise value_error(self.name, argument, requirement, array.shape)
