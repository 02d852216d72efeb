"""What passes between the frontends of the cross-entropy and its implementations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import FloatDType, compute_dtype

Array = NDArray[Any]
Reduction = Literal["none", "sum", "mean"]


@dataclass(frozen=True)
class Options:
    """The options of a call that are no arrays.

    Attributes:
        ignore_index: Class index of a row without a loss.
        label_smoothing: Share of the target that is spread over all classes.
        z_loss: Factor of the square of the log-sum-exp.
        softcap: c of `s = c tanh(z / c)`, or None.
        reduction: How the losses of the rows become one.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    reduction: Reduction = "mean"


@dataclass(eq=False)
class EntropyCall:
    """A validated call: rows of C logits for each of A x I places, in any strides.

    Attributes:
        logits: `(A, C, I)`.
        targets: `(A, I)`, int64, contiguous: from 0 to C - 1 or the ignored index; or None.
        probabilities: `(A, C, I)`, dtype of the logits or of sums; where there are no targets.
        weight: `(C,)`, the dtype of sums, contiguous, or None where all are 1.
        options: The other options.
    """

    logits: Array
    targets: NDArray[np.int64] | None
    probabilities: Array | None
    weight: Array | None
    options: Options

    @property
    def dtype(self) -> FloatDType:
        """Return the dtype of the logits."""
        return self.logits.dtype

    @property
    def compute_dtype(self) -> FloatDType:
        """Return the dtype of sums, losses and row statistics."""
        return compute_dtype(self.logits.dtype)

    @property
    def row_sizes(self) -> tuple[int, int]:
        """Return A and I."""
        A, _, I = self.logits.shape
        return A, I

    @cached_property
    def kept(self) -> NDArray[np.bool_]:
        """Return `(A, I)`: which rows have a loss."""
        if self.targets is None:
            return np.ones(self.row_sizes, np.bool_)
        return np.asarray(self.targets != self.options.ignore_index)


class EntropyStats(NamedTuple):
    """What a derivative needs of each row: `lse = m + log_l`.

    The two are kept apart because their rounded sum loses `log_l` where `|m|` is large.

    Attributes:
        m: Dtype of the logits, at least float32. Largest of s; -inf for an empty row.
        log_l: Dtype of m. Logarithm of the sum of `exp(s - m)`; 0 for an empty row.
        total: Dtype of m. Sum of the weights t of the target; 0 for an ignored row.
    """

    m: Array
    log_l: Array
    total: Array


class EntropyOutputs(NamedTuple):
    """What a forward pass returns.

    Attributes:
        loss: `(A, I)`, or `()` where it is reduced.
        lse: `(A, I)`. Log-sum-exp of s, also of ignored rows.
        z_loss: Shape of loss, of which it is a part.
        stats: `(A, I)` each.
    """

    loss: Array
    lse: Array
    z_loss: Array
    stats: EntropyStats


class EntropyGrads(NamedTuple):
    """Gradients of the cross-entropy, or their tangents.

    Attributes:
        dlogits: Shape and dtype of the logits.
        dtargets: Shape and dtype of class probabilities; None for class indices.
    """

    # "| Any" spares those who ask for both a test for None.
    dlogits: Array | Any
    dtargets: Array | None = None


class EntropyTangents(NamedTuple):
    """Tangents of what a forward pass returns.

    Attributes:
        tloss: Shape of loss.
        tlse: One for each row.
        tz_loss: Shape of z_loss.
    """

    tloss: Array
    tlse: Array
    tz_loss: Array


@dataclass(frozen=True, slots=True)
class Needed:
    """Of which inputs a backward pass computes the gradient; the others are None."""

    logits: bool = True
    targets: bool = True


class Cotangents(NamedTuple):
    """Cotangents of what a forward pass returns, or their tangents; None is zero.

    Attributes:
        loss: Shape of loss; of an implementation, `(A, I)`.
        lse: `(A, I)`.
        z_loss: As loss.
    """

    loss: Array | None = None
    lse: Array | None = None
    z_loss: Array | None = None


class Tangents(NamedTuple):
    """Tangents of the inputs; None is zero.

    Attributes:
        logits: `(A, C, I)`.
        probabilities: `(A, C, I)`.
    """

    logits: Array | None = None
    probabilities: Array | None = None


@dataclass(frozen=True, slots=True)
class SecondCall:
    """What the JVP of a VJP takes: cotangents and tangents, and tangents of the cotangents."""

    cotangents: Cotangents
    tangents: Tangents
    moved: Cotangents


@dataclass(frozen=True, slots=True)
class ForwardSecondCall:
    """What the JVP of a JVP takes.

    Attributes:
        tangents: Tangents of the inputs, whose JVP moves.
        others: The tangents along which the inputs move.
        seconds: Those along which the tangents themselves move.
    """

    tangents: Tangents
    others: Tangents
    seconds: Tangents
