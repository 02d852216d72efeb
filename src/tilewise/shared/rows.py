"""How an array of any shape is seen as `(A, C, I)`, with C along the axes of the softmax."""

from __future__ import annotations

import operator as _operator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.errors import type_error, value_error

Array = NDArray[Any]
Shape = tuple[int, ...]


def axes_of(name: str, argument: str, axis: object, ndim: int, array: str = "x") -> Shape:
    """Return axes in ascending order, counted from 0; None is all of them.

    Args:
        name: Name of the operator, for the error text.
        argument: Name of the argument.
        axis: An integer, a tuple or list of integers, or None.
        ndim: Number of dimensions of the array. One without dimensions has an axis of one entry.
        array: Name of the array.

    Raises:
        TypeError: It is none of these.
        ValueError: An axis does not exist, or is there twice.
    """
    if axis is None:
        return tuple(range(ndim))
    found = []
    for one in axis if isinstance(axis, tuple | list) else (axis,):
        at, count = _integer(name, argument, one), max(ndim, 1)
        if not -count <= at < count:
            requirement = f"be from {-count} to {count - 1}, for {array} has {ndim} dimensions"
            raise value_error(name, argument, requirement, at)
        found.append(at % count)
    if len(set(found)) < len(found):
        raise value_error(name, argument, "have no axis twice", repr(axis))
    return tuple(sorted(found)) if ndim else ()


def _integer(name: str, argument: str, value: object) -> int:
    if not isinstance(value, bool | np.bool_):
        try:
            return _operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    requirement = "be an integer or a tuple of integers"
    raise type_error(name, argument, requirement, type(value).__name__)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of an array: which of its axes are A, which C and which I.

    Attributes:
        shape: Shape of the array.
        outer: Axes that are A together, in this order.
        axes: Axes that are C, ascending, so that the order of a row's entries is that of memory
            in C order, whatever the strides.
        inner: Axes that are I together.
        sizes: A, C and I.
        order: All axes in this order.
    """

    shape: Shape
    outer: Shape
    axes: Shape
    inner: Shape
    sizes: tuple[int, int, int]
    order: Shape

    @property
    def in_order(self) -> bool:
        """Return whether the axes are in their own order."""
        return self.order == tuple(range(len(self.shape)))

    @property
    def row_axes(self) -> Shape:
        """Return the axes that are not C, ascending."""
        return tuple(sorted(self.outer + self.inner))

    @property
    def row_shape(self) -> Shape:
        """Return the shape of an array with one entry for each row."""
        return tuple([self.shape[k] for k in self.row_axes])

    def whole(self, array: Array) -> Array:
        """Return an array of the shape as `(A, C, I)`: a view, or a copy where strides forbid."""
        return array.transpose(self.order).reshape(self.sizes)

    def view(self, array: Array) -> Array | None:
        """Return an array as an `(A, C, I)` view, or None where that would be a copy."""
        seen = self.whole(array)
        return seen if array.size == 0 or np.may_share_memory(seen, array) else None

    def of_rows(self, array: Array) -> Array:
        """Return an array of the row shape as `(A, I)`."""
        A, _, I = self.sizes
        return array.transpose(self._row_order).reshape(A, I)

    def back(self, array: Array) -> Array:
        """Return an `(A, C, I)` array in the shape."""
        split = array.reshape([self.shape[k] for k in self.order])
        return split.transpose(inverse(self.order))

    def rows_back(self, array: Array, *, keepdims: bool = False) -> Array:
        """Return an `(A, I)` array in the row shape; with keepdims, C is 1 in each of its axes."""
        split = array.reshape([self.shape[k] for k in self.outer + self.inner])
        found = split.transpose(inverse(self._row_order))
        return np.expand_dims(found, self.axes) if keepdims else found

    def small(self, array: Array) -> Array:
        """Return an array that broadcasts to the shape as one that broadcasts to `(A, C, I)`.

        Groups of axes over which it repeats stay 1; a group in part repeated is written out.
        """
        array = array[(None,) * (len(self.shape) - array.ndim)]
        given, sizes = array.shape, []
        for group in (self.outer, self.axes, self.inner):
            repeats = all([given[k] == 1 for k in group])
            sizes.append([1 if repeats else self.shape[k] for k in group])
        order = self.order
        grown = np.broadcast_to(array.transpose(order), [n for group in sizes for n in group])
        return grown.reshape([prod(group) for group in sizes])

    @property
    def _row_order(self) -> Shape:
        """Return the axes of the row shape in the order A, I."""
        axes = self.row_axes
        return tuple([axes.index(k) for k in self.outer + self.inner])


def rows_along(array: Array, axes: Shape) -> Rows:
    """Return the rows of an array along axes, so that as little as possible has to be copied.

    The other axes are taken in the order of their strides. Neighbours that lie in memory like one
    axis are one. Of two such, the one with longer strides is A and the other is I.
    """
    return _rows_in_memory(array.shape, array.strides, axes)


@lru_cache(maxsize=256)
def _rows_in_memory(shape: Shape, strides: Shape, axes: Shape) -> Rows:
    steps = [abs(stride) for stride in strides]
    others = [k for k in range(len(shape)) if k not in axes]
    wide = sorted([k for k in others if shape[k] != 1], key=lambda k: -steps[k])
    step = min([steps[k] for k in axes if shape[k] > 1], default=0)
    pairs = enumerate(pairwise(wide), 1)
    breaks = [n for n, (k, j) in pairs if strides[k] != shape[j] * strides[j]]
    if len(breaks) == 1:
        cut = breaks[0]
    elif not breaks:
        cut = len(wide) if not wide or steps[wide[-1]] >= step else 0
    else:
        cut = sum([steps[k] >= step for k in wide])
    ones = [k for k in others if shape[k] == 1]
    return _rows(shape, (*ones, *wide[:cut]), axes, tuple(wide[cut:]))


def rows_in_order(shape: Shape, axes: Shape) -> Rows:
    """Return the rows of a shape along axes, with all other axes in their order."""
    last = axes[-1] if axes else len(shape)
    others = [k for k in range(len(shape)) if k not in axes]
    outer, inner = [k for k in others if k < last], [k for k in others if k > last]
    return _rows(shape, tuple(outer), axes, tuple(inner))


known_rows_in_order = lru_cache(maxsize=256)(rows_in_order)


def _rows(shape: Shape, outer: Shape, axes: Shape, inner: Shape) -> Rows:
    A, C, I = (prod([shape[k] for k in group]) for group in (outer, axes, inner))
    return Rows(shape, outer, axes, inner, (A, C, I), outer + axes + inner)


def inverse(order: Shape) -> Shape:
    """Return the permutation that undoes another."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))
