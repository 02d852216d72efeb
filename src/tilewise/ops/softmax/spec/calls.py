"""What passes between the frontends of the softmax and its implementations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import FloatDType, compute_dtype

Array = NDArray[Any]


@dataclass(slots=True, eq=False)
class SoftmaxCall:
    """A validated call: rows of C entries for each of A x I places, in any strides.

    Attributes:
        x: `(A, C, I)`.
        where: `(A, C, I)`, bool, or None where every entry is visible.
        sink: `(A, I)`, the dtype of sums, or None.
        temperature: What x is divided by.
    """

    x: Array
    where: NDArray[np.bool_] | None
    sink: Array | None
    temperature: float

    @property
    def dtype(self) -> FloatDType:
        """Return the dtype of x."""
        return self.x.dtype

    @property
    def compute_dtype(self) -> FloatDType:
        """Return the dtype of sums and row statistics."""
        return compute_dtype(self.x.dtype)

    @property
    def row_sizes(self) -> tuple[int, int]:
        """Return A and I."""
        A, _, I = self.x.shape
        return A, I


@dataclass(frozen=True, slots=True, eq=False)
class Want:
    """Which results are wanted: of a forward pass, or their tangents.

    Attributes:
        y: The softmax.
        log_y: Its logarithm.
        lse: The log-sum-exp.
        stats: Row statistics.
        out: `(A, C, I)`, dtype of x, or None. Where a forward pass writes the first or the second,
            of which it computes one; may be x itself.
    """

    y: bool = False
    log_y: bool = False
    lse: bool = False
    stats: bool = False
    out: Array | None = None


@dataclass(frozen=True, slots=True)
class Needed:
    """Of which inputs a backward pass computes the gradient; the others are None."""

    x: bool = True
    sink: bool = True


class SoftmaxStats(NamedTuple):
    """What a derivative needs of each row: `lse = m / temperature + log_l`.

    The two are kept apart because their rounded sum loses `log_l` where `|m|` is large.

    Attributes:
        m: Dtype of x, at least float32. Largest visible entry of x, or what the sink would be as
            one; -inf for an empty row.
        log_l: Dtype of m. Logarithm of the sum of `exp((x - m) / temperature)`, with the sink; 0
            for an empty row.
    """

    m: Array
    log_l: Array


class SoftmaxOutputs(NamedTuple):
    """What a forward pass returns; None for what was not wanted.

    Attributes:
        y: `(A, C, I)`, dtype of x. The softmax.
        log_y: `(A, C, I)`, dtype of x. Its logarithm.
        lse: `(A, I)`, dtype of x, at least float32. Logarithm of the sum of exponentials.
        stats: `(A, I)` each.
    """

    y: Array | None = None
    log_y: Array | None = None
    lse: Array | None = None
    stats: SoftmaxStats | None = None


class SoftmaxGrads(NamedTuple):
    """Gradients of the softmax, or their tangents.

    Attributes:
        dx: Shape and dtype of x.
        dsink: Shape and dtype of sink, or None where no array was given.
    """

    # "| Any" spares those who ask for both a test for None.
    dx: Array | Any
    dsink: Array | None = None


class SoftmaxTangents(NamedTuple):
    """Tangents of what a forward pass returns; None for what was not asked for.

    Attributes:
        ty: Shape and dtype of x. Tangent of the softmax.
        tlog_y: Shape and dtype of x. Tangent of its logarithm.
        tlse: One for each row, dtype of lse. Tangent of the log-sum-exp; 0 for an empty row.
    """

    ty: Array | None = None
    tlog_y: Array | None = None
    tlse: Array | None = None


@dataclass(frozen=True, slots=True)
class CotangentCall:
    """Validated cotangents of a call; None is zero.

    Attributes:
        dy: `(A, C, I)`. Cotangent of the softmax.
        dlog_y: `(A, C, I)`. Cotangent of its logarithm.
        dlse: `(A, I)`. Cotangent of the log-sum-exp.
        stats: Row statistics of the forward pass.
    """

    dy: Array | None
    dlog_y: Array | None
    dlse: Array | None
    stats: SoftmaxStats


@dataclass(frozen=True, slots=True)
class TangentCall:
    """Validated tangents of the inputs of a call; None is zero.

    Attributes:
        tx: `(A, C, I)`.
        tsink: `(A, I)`.
        stats: Row statistics of the forward pass.
    """

    tx: Array | None
    tsink: Array | None
    stats: SoftmaxStats


@dataclass(frozen=True, slots=True)
class SecondCall:
    """What the JVP of a VJP takes.

    Attributes:
        cotangents: Cotangents of the call.
        tangents: Tangents of its inputs, with the same statistics.
        tdy: `(A, C, I)`. Tangent of dy, or None for zero; so are the next two.
        tdlog_y: `(A, C, I)`. Tangent of dlog_y.
        tdlse: `(A, I)`. Tangent of dlse.
    """

    cotangents: CotangentCall
    tangents: TangentCall
    tdy: Array | None
    tdlog_y: Array | None
    tdlse: Array | None


@dataclass(frozen=True, slots=True)
class ForwardSecondCall:
    """What the JVP of a JVP takes.

    Attributes:
        tangents: Tangents of the inputs, whose JVP moves.
        others: The tangents along which the inputs move, with the same statistics.
        seconds: Those along which the tangents themselves move.
    """

    tangents: TangentCall
    others: TangentCall
    seconds: TangentCall
