"""The one place that checks a call: what it returns needs no further check."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dims import Sizes
from tilewise.base.dtypes import FLOAT32, FLOATS, check_tensor, is_narrow
from tilewise.base.errors import type_error, unsupported, value_error

from .arguments import (
    BIAS,
    CLASS_WEIGHT,
    CLASSES,
    FIRST_CLASS,
    GRADIENT_FILTER,
    HIDDEN,
    IGNORE_INDEX,
    LABEL_SMOOTHING,
    LIMITS,
    NAME,
    REDUCTIONS,
    SHIFT,
    SOFTCAP,
    TOKEN_CHUNK,
    VOCAB_CHUNK,
    WEIGHT,
    Z_LOSS,
)
from .calls import CotangentCall, Indices, LossCall, LossGrads, LossStats, TangentCall

Array = NDArray[Any]


def prepare(
    hidden: object,
    weight: object,
    targets: object,
    *,
    bias: object = None,
    ignore_index: object = -100,
    label_smoothing: object = 0.0,
    z_loss: object = 0.0,
    class_weight: object = None,
    softcap: object = None,
    reduction: object = "mean",
    token_chunk: object = None,
    vocab_chunk: object = None,
    gradient_filter: object = None,
    first_class: object = 0,
    classes: object = None,
) -> LossCall:
    """Validate a call of `(T, C)` hidden states; the arguments are those of the frontends.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape or value.
        Unsupported: For targets that are probabilities.
    """
    sizes = Sizes(NAME, LIMITS)
    hidden_ = HIDDEN.check(NAME, hidden, sizes, HIDDEN.shapes, None)
    dtype = hidden_.dtype
    weight_ = WEIGHT.check(NAME, weight, sizes, WEIGHT.shapes, dtype, "hidden")
    bias_ = class_weight_ = None
    if bias is not None:
        bias_ = BIAS.check(NAME, bias, sizes, BIAS.shapes, dtype, "hidden")
    if class_weight is not None:
        given = CLASS_WEIGHT.check(NAME, class_weight, sizes, CLASS_WEIGHT.shapes, dtype, "hidden")
        class_weight_ = np.ascontiguousarray(given, FLOAT32 if is_narrow(dtype) else dtype)
    first = FIRST_CLASS.check(first_class)
    whole = first + len(weight_) if classes is None else CLASSES.check(classes)
    if whole < first + len(weight_):
        requirement = f"be at least {first + len(weight_)} (first_class + V)"
        raise value_error(NAME, "classes", requirement, whole)
    ignored = IGNORE_INDEX.check(ignore_index)
    targets_ = check_targets(targets, (len(hidden_),), "T")
    check_range(targets_, ignored, whole)
    return LossCall(
        hidden=np.ascontiguousarray(hidden_),
        weight=np.ascontiguousarray(weight_),
        bias=None if bias_ is None else np.ascontiguousarray(bias_),
        targets=targets_,
        class_weight=class_weight_,
        ignore_index=ignored,
        label_smoothing=LABEL_SMOOTHING.check(NAME, label_smoothing),
        z_loss=Z_LOSS.check(NAME, z_loss),
        softcap=None if softcap is None else SOFTCAP.check(NAME, softcap),
        reduction=check_reduction(reduction),
        first_class=first,
        classes=whole,
        token_chunk=None if token_chunk is None else TOKEN_CHUNK.check(token_chunk),
        vocab_chunk=None if vocab_chunk is None else VOCAB_CHUNK.check(vocab_chunk),
        gradient_filter=(
            0.0 if gradient_filter is None else GRADIENT_FILTER.check(NAME, gradient_filter)
        ),
    )


def check_reduction(value: object) -> str:
    """Return the name of a reduction, or raise."""
    if not isinstance(value, str):
        raise type_error(NAME, "reduction", "be a string", type(value).__name__)
    if value not in REDUCTIONS:
        requirement = f"be one of {', '.join(map(repr, REDUCTIONS))}"
        raise value_error(NAME, "reduction", requirement, repr(value))
    return value


def check_targets(targets: object, shape: tuple[int, ...], source: str) -> Indices:
    """Return targets as int64 after checking all but their values.

    Args:
        targets: What the user gave.
        shape: The shape that they must have.
        source: What settled the shape, for the error text.
    """
    if not isinstance(targets, np.ndarray) or isinstance(targets, np.ma.MaskedArray):
        raise type_error(NAME, "targets", "be a numpy.ndarray", type(targets).__name__)
    dtype = targets.dtype
    if dtype.kind in "fV":
        raise unsupported(NAME, PROBABILITIES)
    if dtype.kind not in "iu" or not np.can_cast(dtype, np.int64):
        raise type_error(NAME, "targets", "have an integer dtype up to int64", str(dtype))
    if targets.shape != shape:
        raise value_error(NAME, "targets", f"have shape {shape} (from {source})", targets.shape)
    return np.ascontiguousarray(targets, np.int64)


PROBABILITIES = (
    "targets that are class probabilities would be as large as the logits, which are never stored; "
    "use cross_entropy on the logits"
)


def check_range(targets: Indices, ignore_index: int, classes: int) -> None:
    """Raise where a target is no class and not ignored."""
    wrong = (targets < 0) | (targets >= classes)
    wrong &= targets != ignore_index
    if wrong.any():
        requirement = f"be from 0 to {classes - 1}, or ignore_index={ignore_index}"
        raise value_error(NAME, "targets", requirement, int(targets[wrong][0]))


class Problem:
    """The arguments of one call in the user's shapes, checked, and the call that they make.

    With a shift all hidden states are in the call, so that none is copied; the last ones of each
    sequence are ignored, and the results leave them out.

    Attributes:
        hidden: The user's array.
        shift: How many tokens ahead of a hidden state its target is.
        call: The validated call.
    """

    def __init__(
        self,
        hidden: object,
        weight: object,
        targets: object,
        *,
        shift: object = 0,
        **options: Any,
    ) -> None:
        self.hidden = check_tensor(NAME, "hidden", hidden, None, "hidden", None, FLOATS)
        if self.hidden.ndim == 0:
            raise value_error(NAME, "hidden", "have shape (..., C)", self.hidden.shape)
        lead = self.hidden.shape[:-1]
        self.shift = check_shift(shift, len(lead))
        moved = check_targets(targets, lead, "hidden")
        if self.shift:
            fill = IGNORE_INDEX.check(options.get("ignore_index", -100))
            moved = shifted(moved, self.shift, fill)
        flat = self.hidden.reshape(moved.size, self.hidden.shape[-1])
        self.call = prepare(flat, weight, moved.reshape(-1), **options)

    def back(self, rows: Array) -> Array:
        """Return one number for each token in the shape of the targets that are used."""
        whole = rows.reshape(self.hidden.shape[:-1])
        return whole[..., : self._used] if self.shift else whole

    def loss_back(self, loss: Array) -> Array:
        """Return the loss, or its tangent, in the user's shape."""
        return self.back(loss) if self.call.reduction == "none" else loss

    def of_tokens(self, name: str, value: object) -> Array | None:
        """Return one number for each token that is used as `(T,)`, with 0 for the others."""
        if value is None:
            return None
        array = self._wide(name, value)
        lead = self.hidden.shape[:-1]
        shape = (*lead[:-1], self._used) if self.shift else lead
        if array.shape != shape:
            raise value_error(NAME, name, f"have shape {shape} (from targets)", array.shape)
        if not self.shift:
            return np.ascontiguousarray(array.reshape(-1))
        whole = np.zeros(lead, array.dtype)
        whole[..., : self._used] = array
        return whole.reshape(-1)

    def of_loss(self, name: str, value: object, *, spread: bool = True) -> Array | None:
        """Return the cotangent of each token's loss as `(T,)`, of that of the loss.

        Without `spread` it is that of the loss itself, for implementations that reduce.
        """
        if self.call.reduction == "none":
            rows = self.of_tokens(name, value)
            return self.call.spread(rows) if spread else rows
        if value is None:
            return None
        if isinstance(value, numbers.Real):
            value = np.asarray(float(value), self.call.compute_dtype)
        array = self._wide(name, value)
        if array.shape != ():
            raise value_error(NAME, name, "have shape () (from reduction)", array.shape)
        return self.call.spread(array) if spread else array

    def like(self, name: str, value: object) -> Array | None:
        """Return a tangent of one of the inputs as the call has that input, or None."""
        if value is None:
            return None
        source = name[1:]
        given = self.hidden if source == "hidden" else getattr(self.call, source)
        if given is None:
            raise value_error(NAME, name, f"come with {source}", "none")
        array = check_tensor(NAME, name, value, given.dtype, source)
        if array.shape != given.shape:
            raise value_error(NAME, name, f"have shape {given.shape} (from {source})", array.shape)
        return np.ascontiguousarray(array.reshape(getattr(self.call, source).shape))

    def stats(self, stats: object) -> LossStats:
        """Return the row statistics of a forward pass as `(T,)` each."""
        if not isinstance(stats, LossStats):
            raise type_error(NAME, "stats", "be LossStats", type(stats).__name__)
        lead, found = self.hidden.shape[:-1], []
        for name, value in stats._asdict().items():
            array = self._wide(f"stats.{name}", value)
            if array.shape != lead:
                requirement = f"have shape {lead} (from hidden)"
                raise value_error(NAME, f"stats.{name}", requirement, array.shape)
            found.append(np.ascontiguousarray(array.reshape(-1)))
        return LossStats(*found)

    def stats_back(self, stats: LossStats) -> LossStats:
        """Return row statistics of all hidden states, with a shift too, in the user's shape."""
        lead = self.hidden.shape[:-1]
        return LossStats(stats.m.reshape(lead), stats.log_l.reshape(lead))

    def grads_back(self, grads: LossGrads) -> LossGrads:
        """Return gradients in the shapes of the inputs."""
        dhidden = grads.dhidden
        if dhidden is not None:
            dhidden = dhidden.reshape(self.hidden.shape)
        return LossGrads(dhidden, grads.dweight, grads.dbias)

    @property
    def _used(self) -> int:
        return max(0, int(self.hidden.shape[-2]) - self.shift)

    def _wide(self, name: str, value: object) -> Array:
        source = "hidden of 16 bits" if is_narrow(self.hidden.dtype) else "hidden"
        return check_tensor(NAME, name, value, self.call.compute_dtype, source)


def check_shift(value: object, dims: int) -> int:
    """Return the shift, or raise; `dims` is how many dimensions the targets have."""
    shift = SHIFT.check(value)
    if shift and not dims:
        raise value_error(NAME, "shift", "be 0, for targets has no dimension", shift)
    return shift


def shifted(targets: Indices, shift: int, ignore_index: int) -> Indices:
    """Return the target of each hidden state where it is so many tokens further on."""
    moved = np.full_like(targets, ignore_index)
    moved[..., : max(0, targets.shape[-1] - shift)] = targets[..., shift:]
    return moved


def prepare_vjp(
    problem: Problem,
    stats: LossStats,
    dloss: object,
    dlse: object,
    dentropy: object,
    entropy: Array | None,
    *,
    spread: bool = True,
) -> CotangentCall:
    """Validate the cotangents of a call; without `spread`, for implementations that reduce.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape.
    """
    rows = problem.of_tokens("dlse", dlse), problem.of_tokens("dentropy", dentropy)
    return CotangentCall(problem.of_loss("dloss", dloss, spread=spread), *rows, stats, entropy)


def prepare_jvp(
    problem: Problem,
    stats: LossStats,
    thidden: object,
    tweight: object,
    tbias: object,
    entropy: Array | None,
) -> TangentCall:
    """Validate the tangents of a call.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape, or the tangent of what was not given.
    """
    return TangentCall(
        problem.like("thidden", thidden),
        problem.like("tweight", tweight),
        problem.like("tbias", tbias),
        stats,
        entropy,
    )
