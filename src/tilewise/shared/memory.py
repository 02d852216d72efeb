"""Whether an array can be written while others are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import check_tensor
from tilewise.base.errors import value_error

Array = NDArray[Any]


def check_out(
    operator: str, argument: str, value: object, like: Array, name: str, others: Mapping[str, Any]
) -> Array:
    """Return an array for a result after checking that it can be written.

    Args:
        operator: Name of the operator, for the error text.
        argument: Name of the array.
        value: What the user gave: it may be `like` itself.
        like: The array whose shape and dtype it must have.
        name: The name of that one.
        others: Arrays that it must not touch, by their names; None is absent.

    Raises:
        TypeError: It has a wrong kind or dtype.
        ValueError: It has a wrong shape, or its memory cannot be written or is needed.
    """
    array = check_tensor(operator, argument, value, like.dtype, name)
    if array.shape != like.shape:
        requirement = f"have shape {like.shape} (from {name})"
        raise value_error(operator, argument, requirement, array.shape)
    if not array.flags.writeable:
        raise value_error(operator, argument, "be writable", "a read-only array")
    if any(n > 1 and step == 0 for n, step in zip(array.shape, array.strides, strict=True)):
        got = f"strides {array.strides}"
        raise value_error(operator, argument, "not overlap itself", got)
    if not _same_memory(array, like) and overlap(array, like):
        raise value_error(operator, argument, f"be {name} itself or not overlap it", "a part of it")
    for other_name, other in others.items():
        if other is not None and overlap(array, other):
            raise value_error(operator, argument, f"not overlap {other_name}", "a part of it")
    return array


def overlap(a: Array, b: Array) -> bool:
    """Return whether two arrays share memory, or may where that takes long to find out."""
    try:
        return np.shares_memory(a, b, max_work=1000)
    except np.exceptions.TooHardError:
        return True


def _same_memory(a: Array, b: Array) -> bool:
    return (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and a.strides == b.strides
    )
