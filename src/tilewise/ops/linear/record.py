"""The linear map as functions of flat tuples of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from tilewise.base.operator import Arrays, FlatOperator, Implementation

from .spec import (
    NAME,
    CotangentCall,
    LinearCall,
    Needed,
    SecondCall,
    TangentCall,
    prepare,
)

Shape = tuple[int, ...]


def _shapes(inputs: Sequence[Shape | None], options: Any) -> tuple[Shape, ...]:
    """Return the shape of y."""
    x, w = inputs[:2]
    assert x is not None and w is not None
    return ((x[0], w[0]),)


def _folds(kind: str, arrays: Sequence[NDArray[Any] | None], options: Any) -> bool:
    """Return False: all rows share one weight."""
    return False


def _prepare(inputs: Sequence[Any], options: Mapping[str, Any]) -> LinearCall:
    """Validate a call."""
    return prepare(*inputs)


def _forward(chosen: Implementation, call: LinearCall, needed: Any) -> Arrays:
    """Return y."""
    return (chosen.forward(call, None),)


def _vjp(
    chosen: Implementation,
    call: LinearCall,
    needed: Sequence[bool],
    cotangents: Arrays,
    outputs: Arrays,
    residuals: Arrays,
) -> Arrays:
    """Return dx, dw and dbias."""
    return tuple(chosen.vjp(call, CotangentCall(*cotangents), Needed(*needed)))


def _jvp(
    chosen: Implementation,
    call: LinearCall,
    needed: Sequence[bool],
    tangents: Arrays,
    outputs: Arrays,
    residuals: Arrays,
) -> Arrays:
    """Return the tangent of y."""
    assert chosen.jvp is not None
    return (chosen.jvp(call, TangentCall(*tangents)),)


def _vjp_jvp(
    chosen: Implementation,
    call: LinearCall,
    needed: Sequence[bool],
    cotangent_tangents: Arrays,
    tangents: Arrays,
    cotangents: Arrays,
    output_tangents: Arrays,
    outputs: Arrays,
    residuals: Arrays,
) -> Arrays:
    """Return the tangents of dx, dw and dbias."""
    assert chosen.vjp_jvp is not None
    second = SecondCall(CotangentCall(*cotangents), TangentCall(*tangents), *cotangent_tangents)
    return tuple(chosen.vjp_jvp(call, second, Needed(*needed)))


FLAT = FlatOperator(
    name=NAME,
    inputs=("x", "w", "bias"),
    active_inputs=3,
    outputs=("y",),
    active_outputs=1,
    residuals=(),
    narrow_residuals=0,
    narrow_outputs=1,
    rank=2,
    shapes=_shapes,
    folds=_folds,
    prepare=_prepare,
    forward=_forward,
    vjp=_vjp,
    jvp=_jvp,
    vjp_jvp=_vjp_jvp,
    output_tangents=False,
    read_outputs=(),
)
