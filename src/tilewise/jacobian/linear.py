"""The Jacobians of the linear map: Kronecker products with an identity."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import is_narrow
from tilewise.base.errors import value_error
from tilewise.dispatch import choose
from tilewise.ops.linear.spec import (
    CotangentCall,
    LinearCall,
    Needed,
    TangentCall,
    flat,
    prepare,
)

from .base import MAX_BYTES, NAME, Jacobian, Order, Structure, _null, check_finite

Array = NDArray[Any]


class _Linear(Jacobian):
    """Every block is one matrix: w for each row of x, or the rows of x for each row of w."""

    def __init__(self, call: LinearCall, wrt: str, implementation: str | None) -> None:
        self._call, self._wrt, self._matrix = call, wrt, call.w if wrt == "x" else call.x
        self._jvp = choose("linear", call, implementation, "jvp").jvp
        self._vjp = choose("linear", call, implementation, "vjp").vjp
        self.name, self.dtype = f"linear with respect to {wrt}", call.dtype
        T, C, V = call.sizes
        ndim = len(call.leading) + 1
        self.outputs = Order((*call.leading, V), tuple(range(ndim)))
        if wrt == "x":
            self.inputs = Order((*call.leading, C), tuple(range(ndim)))
            self.structure = Structure("Kronecker", "w of I (x) w", T, (V, C), equal=True)
        else:
            self.inputs = Order((V, C), (0, 1))
            self.outputs = Order((*call.leading, V), (ndim - 1, *range(ndim - 1)))
            self.structure = Structure("Kronecker", "x of I (x) x", V, (T, C), equal=True)

    def _push(self, t: Array) -> Array:
        assert self._jvp is not None
        tangents = TangentCall(tx=flat(t)) if self._wrt == "x" else TangentCall(tw=t)
        found: Array = self._jvp(self._call, tangents)
        return found.reshape(self.outputs.shape)

    def _pull(self, g: Array) -> Array:
        of_x = self._wrt == "x"
        found = self._vjp(self._call, CotangentCall(flat(g)), Needed(of_x, not of_x, False))
        part: Array = found.dx if of_x else found.dw
        return part.reshape(self.inputs.shape)

    def _held(self) -> tuple[Array | None, ...]:
        return (self._matrix,)

    def blocks(self, *, max_bytes: int = MAX_BYTES) -> Array:
        """Return the dense blocks, which are one matrix, read-only."""
        count = self.structure.blocks
        return np.broadcast_to(self._matrix, (count, *self.structure.block_shape))

    def rank(self, *, max_bytes: int = MAX_BYTES) -> int:
        """Return the rank: that of the matrix, as often as it is there."""
        matrix = self._wide()
        return self.structure.blocks * (int(np.linalg.matrix_rank(matrix)) if matrix.size else 0)

    def nullspace(self, *, max_bytes: int = MAX_BYTES) -> Array:
        """Return an orthonormal basis of the vectors whose product is zero."""
        return self._placed([_null(self._wide())] * self.structure.blocks, max_bytes)

    def _wide(self) -> Array:
        matrix = self._matrix
        wide = matrix.astype(np.float32) if is_narrow(matrix.dtype) else matrix
        check_finite(wide)
        return wide


def linear(
    x: Array,
    w: Array,
    *,
    wrt: Literal["x", "w"] = "x",
    implementation: str | None = None,
) -> Jacobian:
    """Return the Jacobian of `tilewise.numpy.linear` with respect to x or w.

    With respect to x it is `I (x) w`, one block w for each of the T rows of x; with respect to w,
    one block x, `(T, C)`, for each row of w. The bias has no part in either.

    Args:
        x: `(..., C)`. It is kept, not copied, and so is w.
        w: `(V, C)`, dtype of x.
        wrt: Which of the two is the input.
        implementation: Name of the implementation.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
    """
    if wrt not in ("x", "w"):
        raise value_error(NAME, "wrt", "be 'x' or 'w'", repr(wrt))
    return _Linear(prepare(x, w), wrt, implementation)
