"""What a case of an operator of flat arrays is, and the inputs that are drawn from it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import FloatDType, compute_dtype, round_to
from tilewise.base.operator import FlatOperator

from .problem import dtype_of

__all__ = ["FlatCase", "FlatProblem"]

Array = NDArray[Any]
Arrays = dict[str, Array]
Draw = Callable[[np.random.Generator], Arrays]


@dataclass(frozen=True)
class FlatCase:
    """One problem to try, drawn anew from its name whenever it is made.

    Attributes:
        name: ``group/what is special``.
        draw: Draws the inputs by name; floats in any dtype, integers and booleans as they are.
        options: Options of the operator, beside the implementation.
        cotangents: Of which outputs there are cotangents, None for all.
        tangents: Of which inputs there are tangents, None for all.
        dtype: The dtype in which it is tried.
    """

    name: str
    draw: Draw
    options: Mapping[str, Any] = field(default_factory=dict)
    cotangents: tuple[str, ...] | None = None
    tangents: tuple[str, ...] | None = None
    dtype: str = "float32"

    @property
    def group(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]

    def in_dtype(self, dtype: str) -> FlatCase:
        """Return the case in another dtype, with the same numbers, rounded to it."""
        return replace(self, dtype=dtype)

    def in_order(self, name: str, x: Array) -> Array:
        """Return a result as it is: there are no layouts."""
        return x

    def problem(self, operator: FlatOperator, narrow: tuple[str, ...]) -> FlatProblem:
        """Draw the inputs, cotangents and tangents; the same ones at every call.

        Args:
            operator: What the case is of.
            narrow: The inputs that have the dtype of the case; the others have that of sums.
        """
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        stored = dtype_of(self.dtype)
        wide = compute_dtype(stored)

        def as_stored(x: Array, dtype: FloatDType) -> Array:
            return round_to(x.astype(np.float64), dtype) if x.dtype.kind == "f" else x

        drawn = self.draw(rng)
        inputs = {n: as_stored(x, stored if n in narrow else wide) for n, x in drawn.items()}
        active = operator.inputs[: operator.active_inputs]
        shapes = operator.shapes([_shape(inputs.get(n)) for n in operator.inputs], self.options)
        active_outputs = operator.outputs[: operator.active_outputs]
        arrays = dict(inputs)
        for prefix in ("d", "td"):
            for n, (name, shape) in enumerate(zip(active_outputs, shapes, strict=False)):
                dtype = stored if n < operator.narrow_outputs else wide
                made = as_stored(rng.standard_normal(shape), dtype)
                if self.cotangents is None or name in self.cotangents:
                    arrays[f"{prefix}_{name}"] = made
        for name in active:
            if name in inputs and (self.tangents is None or name in self.tangents):
                arrays[f"t_{name}"] = as_stored(
                    rng.standard_normal(inputs[name].shape), inputs[name].dtype
                )
        return FlatProblem(self, operator, arrays)


@dataclass(frozen=True)
class FlatProblem:
    """The inputs of a case.

    Attributes:
        case: What it was drawn from.
        operator: What it is of.
        arrays: Inputs, cotangents `d_`, their tangents `td_` and tangents `t_` of inputs, by name.
    """

    case: FlatCase
    operator: FlatOperator
    arrays: Arrays

    def mapped(self, change: Callable[[str, Array], Array]) -> FlatProblem:
        """Return the problem with other arrays."""
        return replace(self, arrays={n: change(n, x) for n, x in self.arrays.items()})

    def given(self, kind: str, known: Arrays) -> list[Array | None]:
        """Return the arguments of a function of the operator.

        Args:
            kind: forward, vjp, jvp or vjp_jvp.
            known: Outputs and residuals of the forward pass.
        """
        have = self.arrays | known
        # The tangents of outputs are left to be computed.
        computed = {f"t_{name}" for name in self.operator.outputs}
        names = self.operator.arguments(kind)
        return [None if n in computed else have.get(n) for n in names]


def _shape(x: Array | None) -> tuple[int, ...] | None:
    return None if x is None else x.shape
