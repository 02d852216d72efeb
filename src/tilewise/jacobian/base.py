"""What a matrix-free Jacobian is, and what follows from its products alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import is_narrow
from tilewise.base.errors import type_error, value_error

Array = NDArray[Any]
Shape = tuple[int, ...]

NAME = "jacobian"
MAX_BYTES = 1 << 28
"""How large a dense matrix may be unless the caller allows more."""


@dataclass(frozen=True)
class Structure:
    """What a Jacobian looks like where its inputs and outputs are put in the order of its blocks.

    Attributes:
        kind: What one block is.
        formula: One block, or the whole matrix, as a formula.
        blocks: How many blocks there are on the diagonal; outside of them is nothing but zeros.
        block_shape: Rows and columns of a block.
        equal: Whether all blocks are the same matrix.
    """

    kind: Literal["diagonal + rank one", "Kronecker", "dense"]
    formula: str
    blocks: int
    block_shape: tuple[int, int]
    equal: bool = False


@dataclass(frozen=True)
class Order:
    """How an array is put in the order of the blocks.

    Attributes:
        shape: Its shape.
        axes: Its axes, those first that together number the blocks.
    """

    shape: Shape
    axes: Shape

    @property
    def size(self) -> int:
        """Return how many entries there are."""
        return math.prod(self.shape)

    def split(self, array: Array, blocks: int, entries: int) -> Array:
        """Return an array of the shape as `(blocks, entries of one)`."""
        return array.reshape(self.shape).transpose(self.axes).reshape(blocks, entries)

    def join(self, parts: Array) -> Array:
        """Return what `split` was given."""
        whole = parts.reshape([self.shape[k] for k in self.axes])
        return whole.transpose(np.argsort(self.axes))


class Jacobian(ABC):
    """A Jacobian at one point: `matvec` is a JVP, `rmatvec` a VJP.

    Rows are the entries of the output in C order, columns those of the input.

    Attributes:
        name: What is differentiated with respect to what.
        dtype: dtype of the operator, of the vectors and of the products.
        inputs: The input and its blocks.
        outputs: The output and its blocks.
        structure: What the matrix looks like.
    """

    name: str
    dtype: np.dtype[Any]
    inputs: Order
    outputs: Order
    structure: Structure

    @abstractmethod
    def _push(self, t: Array) -> Array:
        """Return the tangent of the output for a tangent of the input, in their shapes."""

    @abstractmethod
    def _pull(self, g: Array) -> Array:
        """Return the gradient of the input for a cotangent of the output, in their shapes."""

    @abstractmethod
    def _held(self) -> tuple[Array | None, ...]:
        """Return the arrays from which products are made."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, which are entries of the output, and columns, which are those of the input."""
        return self.outputs.size, self.inputs.size

    @property
    def T(self) -> Jacobian:
        """The transpose, which is this operator with its two products exchanged."""
        return _Transposed(self)

    @property
    def H(self) -> Jacobian:
        """The adjoint, which is the transpose, for all numbers are real."""
        return self.T

    @property
    def bytes_dense(self) -> int:
        """Bytes of the matrix."""
        rows, columns = self.shape
        return rows * columns * self.dtype.itemsize

    @property
    def bytes_implicit(self) -> int:
        """Bytes of the arrays from which products are made."""
        return sum([x.nbytes for x in self._held() if x is not None])

    def matvec(self, t: Array) -> Array:
        """Return the product with a vector.

        Args:
            t: `(columns,)`, `(columns, 1)`, or the shape of the input.

        Returns:
            `(rows,)`, `(rows, 1)`, or the shape of the output.

        Raises:
            TypeError: t is no real array.
            ValueError: t has another shape.
        """
        return self._product("t", t, self.inputs, self.outputs, self._push)

    def rmatvec(self, g: Array) -> Array:
        """Return the product of the transpose with a vector.

        Args:
            g: `(rows,)`, `(rows, 1)`, or the shape of the output.

        Returns:
            `(columns,)`, `(columns, 1)`, or the shape of the input.

        Raises:
            TypeError: g is no real array.
            ValueError: g has another shape.
        """
        return self._product("g", g, self.outputs, self.inputs, self._pull)

    def matmat(self, t: Array) -> Array:
        """Return the product with a matrix `(columns, K)`, column by column."""
        return self._products("t", t, self.inputs, self.outputs, self._push)

    def rmatmat(self, g: Array) -> Array:
        """Return the product of the transpose with a matrix `(rows, K)`, column by column."""
        return self._products("g", g, self.outputs, self.inputs, self._pull)

    def __matmul__(self, other: Array) -> Array:
        return self.matvec(other) if np.ndim(other) == 1 else self.matmat(other)

    def blocks(self, *, max_bytes: int = MAX_BYTES) -> Array:
        """Return the dense blocks of the diagonal.

        One product gives one column of every block at once.

        Args:
            max_bytes: The largest size that is made.

        Returns:
            `(number of blocks, rows, columns)`.

        Raises:
            ValueError: It would be larger.
        """
        count, (rows, columns) = self.structure.blocks, self.structure.block_shape
        self._check_size("blocks", count * rows * columns, max_bytes)
        found = np.empty((count, rows, columns), self.dtype)
        for j in range(columns):
            unit = np.zeros((count, columns), self.dtype)
            unit[:, j] = 1
            tangents = self._push(np.ascontiguousarray(self.inputs.join(unit)))
            found[:, :, j] = self.outputs.split(tangents, count, rows)
        return found

    def to_dense(self, *, max_bytes: int = MAX_BYTES) -> Array:
        """Return the matrix.

        Args:
            max_bytes: The largest size that is made.

        Raises:
            ValueError: It would be larger.
        """
        self._check_size("to_dense", math.prod(self.shape), max_bytes)
        rows, columns = self._places()
        dense = np.zeros(self.shape, self.dtype)
        dense[rows[:, :, None], columns[:, None, :]] = self.blocks(max_bytes=max_bytes)
        return dense

    def rank(self, *, max_bytes: int = MAX_BYTES) -> int:
        """Return the rank, here by the singular values of the blocks.

        Args:
            max_bytes: The largest size of blocks that are made for it.

        Raises:
            ValueError: They would be larger, or there are entries that are not finite.
        """
        blocks = self._finite_blocks(max_bytes)
        return int(np.linalg.matrix_rank(blocks).sum()) if blocks.size else 0

    def nullspace(self, *, max_bytes: int = MAX_BYTES) -> Array:
        """Return an orthonormal basis of the vectors whose product is zero.

        Args:
            max_bytes: The largest size of the basis and of the blocks that are made for it.

        Returns:
            `(columns, columns - rank)`.

        Raises:
            ValueError: It would be larger, or there are entries that are not finite.
        """
        return self._placed([_null(block) for block in self._finite_blocks(max_bytes)], max_bytes)

    def as_linear_operator(self) -> Any:
        """Return a `scipy.sparse.linalg.LinearOperator`.

        Raises:
            ImportError: SciPy is not installed.
            TypeError: The operator has 16 bits, which SciPy does not compute with.
        """
        from scipy.sparse.linalg import LinearOperator

        if is_narrow(self.dtype):
            got = str(self.dtype)
            raise type_error(NAME, "the operator", "have float32 or float64 for SciPy", got)
        return LinearOperator(
            self.shape,
            matvec=self.matvec,
            rmatvec=self.rmatvec,
            matmat=self.matmat,
            rmatmat=self.rmatmat,
            dtype=self.dtype,
        )

    def __repr__(self) -> str:
        (rows, columns), s = self.shape, self.structure
        size = " x ".join(map(str, s.block_shape))
        each = "each" if s.blocks != 1 else "which is"
        blocks = f"{s.blocks} block{'s' if s.blocks != 1 else ''} of {size}, {each} {s.formula}"
        dense, implicit = _bytes(self.bytes_dense), _bytes(self.bytes_implicit)
        return (
            f"<Jacobian of {self.name}: {rows} x {columns}, {self.dtype}; "
            f"{blocks} ({s.kind}); {dense} dense, {implicit} implicit>"
        )

    def _product(self, name: str, x: Array, given: Order, made: Order, apply: Any) -> Array:
        x = self._vector(name, x)
        if x.shape == given.shape:
            return np.asarray(apply(x), self.dtype)
        if x.shape not in ((given.size,), (given.size, 1)):
            wanted = f"have shape ({given.size},) or {given.shape}"
            raise value_error(NAME, name, wanted, x.shape)
        found: Array = np.asarray(apply(x.reshape(given.shape)), self.dtype)
        return found.reshape(made.size, *x.shape[1:])

    def _products(self, name: str, x: Array, given: Order, made: Order, apply: Any) -> Array:
        x = self._vector(name, x)
        if x.ndim != 2 or len(x) != given.size:
            raise value_error(NAME, name, f"have shape ({given.size}, K)", x.shape)
        found = np.empty((made.size, x.shape[1]), self.dtype)
        for j in range(x.shape[1]):
            column = np.ascontiguousarray(x[:, j]).reshape(given.shape)
            found[:, j] = apply(column).reshape(-1)
        return found

    def _vector(self, name: str, x: Any) -> Array:
        if not isinstance(x, np.ndarray) or np.iscomplexobj(x):
            got = str(x.dtype) if isinstance(x, np.ndarray) else type(x).__name__
            raise type_error(NAME, name, "be a real numpy.ndarray", got)
        return np.ascontiguousarray(x, self.dtype)

    def _places(self) -> tuple[Array, Array]:
        """Return for each block the numbers of its rows and columns."""
        count, (rows, columns) = self.structure.blocks, self.structure.block_shape
        return (
            self.outputs.split(np.arange(self.outputs.size), count, rows),
            self.inputs.split(np.arange(self.inputs.size), count, columns),
        )

    def _placed(self, bases: list[Array], max_bytes: int) -> Array:
        """Return bases of the blocks `(columns of a block, any)` as one of the whole."""
        count = sum([basis.shape[1] for basis in bases])
        self._check_size("nullspace", self.inputs.size * count, max_bytes)
        found, start = np.zeros((self.inputs.size, count), self.dtype), 0
        for columns, basis in zip(self._places()[1], bases, strict=True):
            stop = start + basis.shape[1]
            found[columns, start:stop] = basis
            start = stop
        return found

    def _finite_blocks(self, max_bytes: int) -> Array:
        blocks = self.blocks(max_bytes=max_bytes)
        wide: Array = blocks.astype(np.float32) if is_narrow(self.dtype) else blocks
        check_finite(wide)
        return wide

    def _check_size(self, what: str, numbers: int, max_bytes: int) -> None:
        size = numbers * self.dtype.itemsize
        if size > max_bytes:
            requirement = f"be at least {size}, the bytes of {what}"
            raise value_error(NAME, "max_bytes", requirement, max_bytes)


class _Transposed(Jacobian):
    """A Jacobian with its two products exchanged."""

    def __init__(self, of: Jacobian) -> None:
        self._of, s = of, of.structure
        self.name, self.dtype = f"{of.name}, transposed", of.dtype
        self.inputs, self.outputs = of.outputs, of.inputs
        rows, columns = s.block_shape
        # A sum of a diagonal and a symmetric matrix is its own transpose.
        formula = s.formula if s.kind == "diagonal + rank one" else f"({s.formula})^T"
        self.structure = Structure(s.kind, formula, s.blocks, (columns, rows), s.equal)

    @property
    def T(self) -> Jacobian:
        """The operator itself."""
        return self._of

    def rank(self, *, max_bytes: int = MAX_BYTES) -> int:
        """Return the rank, which is that of the operator itself."""
        return self._of.rank(max_bytes=max_bytes)

    def _push(self, t: Array) -> Array:
        return self._of._pull(t)

    def _pull(self, g: Array) -> Array:
        return self._of._push(g)

    def _held(self) -> tuple[Array | None, ...]:
        return self._of._held()


def check_finite(x: Array) -> None:
    """Raise where a matrix has entries of which no rank can be told."""
    if not np.isfinite(x).all():
        requirement = "be finite for a rank or a null space"
        raise value_error(NAME, "the operator", requirement, "NaN or Inf")


def _null(matrix: Array) -> Array:
    """Return an orthonormal basis of the null space of a matrix."""
    if not matrix.size:
        return np.eye(matrix.shape[1], dtype=matrix.dtype)
    _, s, vt = np.linalg.svd(matrix, full_matrices=True)
    least = s.max(initial=0.0) * max(matrix.shape) * np.finfo(matrix.dtype).eps
    return np.asarray(vt[int((s > least).sum()) :].T)


def _bytes(count: int) -> str:
    power = min(4, int(math.log10(count)) // 3) if count else 0
    unit = ("bytes", "kB", "MB", "GB", "TB")[power]
    return f"{count / 1000**power:.{1 if power else 0}f} {unit}"
