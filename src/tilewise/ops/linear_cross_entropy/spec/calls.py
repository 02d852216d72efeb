"""What passes between the frontends of the operator and its implementations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import FloatDType, compute_dtype

Array = NDArray[Any]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LossCall:
    """A validated call. All arrays are C-contiguous; T tokens, C entries, V classes.

    Attributes:
        hidden: `(T, C)`.
        weight: `(V, C)`, dtype of hidden.
        bias: `(V,)`, dtype of hidden or of sums, or None.
        targets: `(T,)`; each is ignore_index or from 0 to classes - 1.
        class_weight: `(V,)`, the dtype of sums, or None.
        ignore_index: The target of tokens that have no loss.
        label_smoothing: The part of the target that all classes share.
        z_loss: Factor of `lse^2`.
        softcap: The soft cap, or None.
        reduction: "mean", "sum" or "none".
        first_class: The class of the first row of weight; above 0 in a part of the classes.
        classes: How many classes there are in all parts.
        token_chunk: Tokens of a tile, or None for the implementation's choice.
        vocab_chunk: Classes of a tile, or None for the implementation's choice.
        gradient_filter: Probability below which gradients may be left out; 0 is never.
    """

    hidden: Array
    weight: Array
    bias: Array | None
    targets: Indices
    class_weight: Array | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    reduction: str
    first_class: int
    classes: int
    token_chunk: int | None
    vocab_chunk: int | None
    gradient_filter: float

    @property
    def dtype(self) -> FloatDType:
        """Return the dtype of hidden."""
        return self.hidden.dtype

    @property
    def compute_dtype(self) -> FloatDType:
        """Return the dtype of sums, statistics and losses."""
        return compute_dtype(self.hidden.dtype)

    @property
    def tokens(self) -> int:
        """Return T."""
        return int(self.hidden.shape[0])

    @cached_property
    def kept(self) -> NDArray[np.bool_]:
        """Return which tokens have a loss, `(T,)`."""
        kept: NDArray[np.bool_] = self.targets != self.ignore_index
        return kept

    @cached_property
    def scale(self) -> float:
        """Return the factor of each kept token's loss in the reduced loss of all classes.

        A mean over nothing, or over classes that all count 0, is 0.
        """
        if self.reduction != "mean":
            return 1.0
        if self.class_weight is None:
            total = float(np.count_nonzero(self.kept))
        else:
            counted = self.class_weight[self.targets[self.kept]]
            total = float(counted.sum(dtype=np.float64))
        return 1.0 / total if total else 0.0

    def reduce(self, rows: Array) -> Array:
        """Return the reduced loss, or its tangent, of those of the tokens, which are 0 if ignored.

        Sums are float64 and rounded once.
        """
        if self.reduction == "none":
            return rows
        total = rows.sum(dtype=np.float64) * self.scale
        return np.asarray(total).astype(rows.dtype)

    def z_loss_of(self, lse: Array) -> Array:
        """Return the z-loss of each token, which is a part of its loss."""
        return np.where(self.kept & ~np.isneginf(lse), self.z_loss * lse**2, 0).astype(lse.dtype)

    def spread(self, dloss: Array | None) -> Array | None:
        """Return the cotangent of each token's loss, `(T,)`, of that of the reduced loss."""
        if dloss is None:
            return None
        whole = np.where(self.kept, dloss.astype(np.float64) * self.scale, 0.0)
        return whole.astype(self.compute_dtype)


@dataclass(frozen=True, slots=True)
class Needed:
    """Of which inputs a gradient is needed; the others are None."""

    hidden: bool = True
    weight: bool = True
    bias: bool = True


@dataclass(frozen=True, slots=True)
class Want:
    """Which results of a forward pass are wanted beside the losses and the row statistics.

    Attributes:
        entropy: The entropy of each token's probabilities.
        argmax: The class of its largest logit.
        picked: What its target picks, and its mass.
        ignored: Whether ignored tokens have statistics too; otherwise those hold any numbers.
        gradients: The gradients of the reduced loss that are wanted; of the sum with "none".
    """

    entropy: bool = False
    argmax: bool = False
    picked: bool = False
    ignored: bool = True
    gradients: Needed | None = None


class LossStats(NamedTuple):
    """What a derivative needs of each token: `lse = m + log_l`.

    The two are kept apart because their rounded sum loses `log_l` where `|m|` is large.

    Attributes:
        m: Dtype of hidden, at least float32. Largest logit, after the soft cap.
        log_l: Dtype of m. Logarithm of the sum of `exp(s - m)`.
    """

    m: Array
    log_l: Array


class LossGrads(NamedTuple):
    """Gradients, or their tangents; None for what was not asked for or not given.

    Attributes:
        dhidden: Shape and dtype of hidden.
        dweight: Shape and dtype of weight.
        dbias: Shape and dtype of bias.
    """

    dhidden: Array | None = None
    dweight: Array | None = None
    dbias: Array | None = None


class LossOutputs(NamedTuple):
    """What a forward pass returns, token by token; None for what was not wanted.

    Attributes:
        loss: `(T,)`, the dtype of sums, as is all but argmax; 0 for an ignored token.
        stats: `(T,)` each.
        entropy: `(T,)`. Entropy of the probabilities.
        argmax: `(T,)`, int64. Class of the largest logit, the first one of equals.
        picked: `(T,)`. Sum over the classes of the call of the target's weights times the logits.
        mass: `(T,)`. Sum of these weights.
        grads: Gradients of the reduced loss.
        lse: `(T,)`. The log-sum-exp, or None where it is the sum of the statistics.
    """

    loss: Array
    stats: LossStats
    entropy: Array | None = None
    argmax: Indices | None = None
    picked: Array | None = None
    mass: Array | None = None
    grads: LossGrads = LossGrads()
    lse: Array | None = None


class RowTangents(NamedTuple):
    """Tangents of the results, token by token: `(T,)` each, in the dtype of sums.

    Attributes:
        tloss: Tangent of the losses.
        tlse: Tangent of the log-sum-exp.
        tentropy: Tangent of the entropy, or None where it is not wanted.
    """

    tloss: Array
    tlse: Array
    tentropy: Array | None = None


@dataclass(frozen=True, slots=True)
class CotangentCall:
    """Validated cotangents of a call, token by token; None is zero.

    Attributes:
        dloss: `(T,)`. Cotangents of the losses, 0 for ignored tokens.
        dlse: `(T,)`. Cotangents of the log-sum-exp.
        dentropy: `(T,)`. Cotangents of the entropy.
        stats: Row statistics, of all parts where the call is one part of the classes.
        entropy: `(T,)`. The entropy, needed with dentropy.
        mass: `(T,)`. Sum of the target's weights over all parts where the call is one part.
        accumulator: `(V, C)`, dtype of weight or of sums. The gradient by weight, where that is
            needed, is added to it and not returned; None returns it.
    """

    dloss: Array | None
    dlse: Array | None
    dentropy: Array | None
    stats: LossStats
    entropy: Array | None = None
    mass: Array | None = None
    accumulator: Array | None = None


@dataclass(frozen=True, slots=True)
class TangentCall:
    """Validated tangents of the inputs of a call; None is zero.

    Attributes:
        thidden: `(T, C)`.
        tweight: `(V, C)`.
        tbias: `(V,)`.
        stats: Row statistics.
        entropy: `(T,)`. The entropy where its tangent is wanted, or its cotangent is given.
        ignored: Whether the tangents of lse and entropy are wanted of ignored tokens.
    """

    thidden: Array | None
    tweight: Array | None
    tbias: Array | None
    stats: LossStats
    entropy: Array | None = None
    ignored: bool = True


@dataclass(frozen=True, slots=True)
class SecondCall:
    """What the JVP of a VJP takes.

    Attributes:
        cotangents: Cotangents of the call.
        tangents: Tangents of its inputs, with the same statistics.
        tdloss: `(T,)`. Tangent of dloss, or None for zero; so are the next two.
        tdlse: `(T,)`. Tangent of dlse.
        tdentropy: `(T,)`. Tangent of dentropy.
    """

    cotangents: CotangentCall
    tangents: TangentCall
    tdloss: Array | None
    tdlse: Array | None
    tdentropy: Array | None


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


def reached(call: LossCall, *given: CotangentCall | SecondCall) -> NDArray[np.bool_]:
    """Return which tokens have a cotangent, or a tangent of one, that is not 0.

    The others have no part in gradients, whatever their hidden states hold.
    """
    found = np.zeros(call.tokens, np.bool_)
    for part in given:
        if isinstance(part, CotangentCall):
            rows = part.dloss, part.dlse, part.dentropy
        else:
            rows = part.tdloss, part.tdlse, part.tdentropy
        for row in rows:
            if row is not None:
                found |= row != 0
    return found
