"""What an operator is: arguments described as data, and four functions per implementation."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .dims import Shape, Sizes
from .dtypes import (
    FLOAT32,
    FLOATS,
    FloatDType,
    check_contiguous_last,
    check_tensor,
    compute_dtype,
    is_narrow,
)
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
        precision: "storage" is the dtype of the first tensor; "either" may be float32 too where
            that has 16 bits, and "wide" has to be.
    """

    name: str
    shapes: tuple[Shape, ...]
    doc: str
    follows_layout: bool = False
    broadcast: bool = False
    values: Values | None = None
    precision: Literal["storage", "either", "wide"] = "storage"

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
        also = None
        if self.precision != "storage" and like is not None and is_narrow(like):
            also = FLOAT32
            if self.precision == "wide":
                like, source = compute_dtype(like), f"{source} of 16 bits"
        array = check_tensor(operator, self.name, value, like, source, also, FLOATS)
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
        vjp: ``(call, cotangents, needed) -> gradients``.
        jvp: ``(call, tangents) -> tangents of the outputs``, or None where it has none.
        vjp_jvp: ``(call, second, needed) -> tangents of the gradients``, or None.
        forward_jvp: ``(call, want, tangents) -> outputs and their tangents`` in one pass, or None.
        refuses: ``call -> why this call is not served, or None``.
        jvp_jvp: ``(call, second) -> tangents of the output tangents``, or None.
        reduces: Of a loss: whether it reduces losses and their tangents itself, and takes
            cotangents of reduced ones; otherwise it has those of rows.
        interprets: Whether it is one for a GPU whose kernels are interpreted here, on the CPU.
        lower_mask: ``(mask of bytes, N, Nk, dtype of 16 bits, dtype of 8) -> tensors`` of
            `PackedBits`, made on the device of the mask; or None.
    """

    name: str
    forward: Callable[[Any, Any], Any]
    vjp: Callable[..., Any]
    jvp: Callable[..., Any] | None = None
    vjp_jvp: Callable[..., Any] | None = None
    forward_jvp: Callable[..., Any] | None = None
    refuses: Callable[[Any], str | None] = _serves_every_call
    jvp_jvp: Callable[..., Any] | None = None
    reduces: bool = False
    interprets: bool = False
    lower_mask: Callable[..., Any] | None = None


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


Arrays = tuple[NDArray[Any] | None, ...]
KINDS = ("forward", "vjp", "jvp", "vjp_jvp")
"""The functions of an implementation."""

FORWARD_TWICE = "jvp_jvp"
"""One more function, for forward mode over forward mode alone, that not every operator has."""


@dataclass(frozen=True)
class FlatOperator:
    """An operator as functions of flat tuples of arrays, from which every door is made.

    Where names are listed, those that have derivatives come first. In tuples of arrays None is an
    absent input, a zero tangent or cotangent, or a result that is not needed; the others are
    contiguous.

    Attributes:
        name: The operator's name.
        inputs: Names of the arrays that it takes.
        active_inputs: How many of them have derivatives.
        outputs: Names of the arrays that it returns.
        active_outputs: How many of them have derivatives; the first ones, and always needed.
        residuals: Names of what a derivative needs besides inputs and active outputs.
        narrow_residuals: How many of them, the last ones, there are only where the first input has
            16 bits; they are None otherwise.
        narrow_outputs: How many outputs, the first ones, have the dtype of the first input. All
            others, and the residuals, have at least float32.
        rank: Number of dimensions of the first input.
        shapes: ``(shapes of the inputs, options) -> shapes of outputs and residuals``.
        folds: ``(kind, arrays, options) -> bool``: whether the first dimension of all arguments is
            a batch of problems that do not know each other, so that it can hold more of them.
        prepare: ``(inputs, options) -> call``, validated; trailing inputs may be left out.
        forward: ``(implementation, call, needed) -> outputs and residuals``.
        vjp: ``(implementation, call, needed, cotangents, outputs, residuals) -> gradients``.
        jvp: ``(implementation, call, needed, tangents, outputs, residuals) -> output tangents``.
        vjp_jvp: ``(implementation, call, needed, tangents of the cotangents, tangents, cotangents,
            output tangents or Nones, outputs, residuals) -> tangents of the gradients``.
        dtypes: For outputs and residuals with another dtype: "int64", or the name of the input
            that they have it from.
        kept_gradients: How many residuals, the last ones, are gradients by the first active inputs
            for a cotangent of 1 of the first output, which has no dimension then. They are there
            where `needed` asks for them, else None; the first backward uses them up.
        joins: ``(dtype of the first input, options) -> bool``: whether asking for them saves work.
        jvp_jvp: ``(implementation, call, needed, second tangents, other tangents, tangents, output
            tangents, other output tangents, outputs, residuals) -> second output tangents``: what
            moving along the other tangents, and the tangents along the second ones, does to the
            output tangents. Any of those may be None.
        output_tangents: Whether `vjp_jvp` reads the output tangents that it is given.
        read_outputs: Names of the active outputs that derivatives read, None for all. The others
            are given to derivatives as None, so that nothing keeps them.
        orders: Whether `prepare` brings its arrays into C order, with copies where it has to.
        strided: Whether kernels of a GPU take tensors in any strides, and not only such whose last
            dimension is contiguous.
        read_inputs: Names of the inputs whose entries a call is made from. Of the others `prepare`
            does no more than refuse some values, which it cannot on a device.
        split_over: ``(kind, arrays, options) -> number`` of first dimensions of all arguments and
            results that are batches as with `folds`; by default what that says.
    """

    name: str
    inputs: tuple[str, ...]
    active_inputs: int
    outputs: tuple[str, ...]
    active_outputs: int
    residuals: tuple[str, ...]
    narrow_residuals: int
    narrow_outputs: int
    rank: int
    shapes: Callable[..., tuple[tuple[int, ...], ...]]
    folds: Callable[..., bool]
    prepare: Callable[..., Any]
    forward: Callable[..., Arrays]
    vjp: Callable[..., Arrays]
    jvp: Callable[..., Arrays]
    vjp_jvp: Callable[..., Arrays]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    kept_gradients: int = 0
    joins: Callable[[Any, Mapping[str, Any]], bool] | None = None
    jvp_jvp: Callable[..., Arrays] | None = None
    split_over: Callable[..., int] | None = None
    output_tangents: bool = True
    read_outputs: tuple[str, ...] | None = None
    read_inputs: tuple[str, ...] = ()
    orders: bool = False
    strided: bool = False

    @cached_property
    def reads(self) -> tuple[bool, ...]:
        """For each active output, whether derivatives read it."""
        names = self.outputs[: self.active_outputs]
        return tuple([self.read_outputs is None or name in self.read_outputs for name in names])

    def batch(self, kind: str, arrays: Sequence[Any], options: Mapping[str, Any]) -> int:
        """Return how many of the first dimensions of all arguments and results are batches.

        Args:
            kind: Which function takes the arguments.
            arrays: The arguments, or what has their shapes and dtypes; None where there is none.
            options: The other options.
        """
        return int((self.split_over or self.folds)(kind, arrays, options))

    def lengths(self, kind: str) -> tuple[int, ...]:
        """Return how many arrays each group has that a function of this kind takes.

        The groups are those of the function's arguments, with the inputs before the outputs;
        the forward pass takes only inputs.
        """
        x, y = self.active_inputs, self.active_outputs
        if kind == "forward":
            return (len(self.inputs),)
        given = {"vjp": (y,), "jvp": (x,), "vjp_jvp": (y, x, y, y), "jvp_jvp": (x, x, x, y, y)}[
            kind
        ]
        return (*given, len(self.inputs), y, len(self.residuals))

    def arguments(self, kind: str) -> tuple[str, ...]:
        """Return the names of the arrays that a function of this kind takes.

        `d_` marks cotangents, `t_` tangents and `td_` tangents of cotangents.
        """
        if kind == "forward":
            return self.inputs
        x, y = self.inputs[: self.active_inputs], self.outputs[: self.active_outputs]
        dy, tx = [f"d_{name}" for name in y], [f"t_{name}" for name in x]
        tdy, ty = [f"td_{name}" for name in y], [f"t_{name}" for name in y]
        given = {"vjp": dy, "jvp": tx, "vjp_jvp": [*tdy, *tx, *dy, *ty]}[kind]
        return (*given, *self.inputs, *y, *self.residuals)

    def split(self, kind: str, flat: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Cut a flat list of arguments into its groups."""
        groups, start = [], 0
        for length in self.lengths(kind):
            groups.append(tuple(flat[start : start + length]))
            start += length
        return groups

    @cached_property
    def first(self) -> dict[str, int]:
        """For each kind, where the inputs begin among its arguments."""
        return {kind: sum(self.lengths(kind)[:-3]) for kind in (*KINDS, FORWARD_TWICE)}

    def results(self, kind: str) -> int:
        """Return how many arrays a function of this kind returns."""
        if kind == "forward":
            return len(self.outputs) + len(self.residuals)
        return self.active_outputs if kind in ("jvp", FORWARD_TWICE) else self.active_inputs
