"""What an operator is: arguments described as data, and four functions per implementation."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dims import Shape, Sizes
from .dtypes import FloatDType, check_contiguous_last, check_tensor
from .errors import type_error, value_error


@dataclass(frozen=True, slots=True)
class Values:
    """A condition on the entries of a small array: its wording and its test."""

    requirement: str
    holds: Callable[[NDArray[Any]], NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Argument:
    """One array of an operator.

    Attributes:
        name: Its name, from the public interface to the kernels.
        shapes: The symbolic shapes that it may have, told apart by their rank.
        doc: What it is, for the documentation.
        follows_layout: Whether ``layout="bnhd"`` swaps its second and third dimensions.
        broadcast: Whether leading dimensions may be missing and any size may be 1.
        values: A condition on its entries.
    """

    name: str
    shapes: tuple[Shape, ...]
    doc: str
    follows_layout: bool = False
    broadcast: bool = False
    values: Values | None = None

    def in_layout(self, layout: str) -> tuple[Shape, ...]:
        """Return the shapes as the user of a layout writes them."""
        if layout == "bhnd" or not self.follows_layout:
            return self.shapes
        return tuple((dims[0], dims[2], dims[1], *dims[3:]) for dims in self.shapes)

    def check(
        self,
        operator: str,
        value: object,
        sizes: Sizes,
        shapes: tuple[Shape, ...],
        like: FloatDType | None,
        source: str = "q",
    ) -> NDArray[Any]:
        """Return the array after checking its kind, dtype, shape, strides and entries."""
        array = check_tensor(operator, self.name, value, like, source)
        if self.broadcast:
            sizes.match_broadcast(self.name, shapes[0], array.shape)
        else:
            sizes.match(self.name, shapes, array.shape)
        if self.follows_layout:
            check_contiguous_last(operator, self.name, array)
        if self.values is not None:
            wrong = array[~self.values.holds(array)]
            if wrong.size:
                got = str(wrong.flat[0])
                raise value_error(operator, self.name, self.values.requirement, got)
        return array


@dataclass(frozen=True, slots=True)
class Number:
    """One real number of an operator and the closed range in which it is computed safely."""

    name: str
    low: float
    high: float
    doc: str

    @property
    def requirement(self) -> str:
        """Return what a value must be, as errors and documents say it."""
        return f"be from {self.low:g} to {self.high:g}"

    def check(self, operator: str, value: object) -> float:
        """Return the number as a float, or raise."""
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise type_error(operator, self.name, "be a real number", type(value).__name__)
        number = float(value)
        if not self.low <= number <= self.high:
            raise value_error(operator, self.name, self.requirement, f"{number:g}")
        return number


def _serves_every_call(call: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """The functions of one implementation of an operator; each takes a validated call.

    Attributes:
        name: The name that users select it by.
        forward: ``(call, want) -> outputs``.
        vjp: ``(call, cotangents) -> gradients``.
        jvp: ``(call, tangents) -> tangents of the outputs``.
        vjp_jvp: The JVP of the VJP.
        refuses: ``call -> why this call is not served, or None``.
    """

    name: str
    forward: Callable[[Any, Any], Any]
    vjp: Callable[..., Any]
    jvp: Callable[..., Any] | None = None
    vjp_jvp: Callable[..., Any] | None = None
    refuses: Callable[[Any], str | None] = _serves_every_call


@dataclass(frozen=True)
class Operator:
    """The record of one operator, from which frontends, audits and documents are made.

    Attributes:
        name: The operator's name.
        inputs: Names of its positional tensors.
        options: Names of its keyword arguments.
        outputs: Names of what it can return.
        residuals: Names of the row statistics that a backward pass needs.
        differentiable: Names of the arguments that have gradients.
        prepare: Validates a call.
        prepare_vjp: Validates the cotangents of a call.
    """

    name: str
    inputs: tuple[str, ...]
    options: tuple[str, ...]
    outputs: tuple[str, ...]
    residuals: tuple[str, ...]
    differentiable: tuple[str, ...]
    prepare: Callable[..., Any]
    prepare_vjp: Callable[..., Any]
