"""The cross-entropy on JAX arrays."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal, NamedTuple, overload

import jax.numpy as jnp
import numpy as np
from jax import Array

from tilewise.base.dtypes import is_narrow
from tilewise.base.errors import type_error, value_error
from tilewise.ops.cross_entropy.record import FLAT
from tilewise.ops.cross_entropy.spec import (
    NAME,
    check_class_axis,
    check_classes,
    check_options,
    target_shapes,
)
from tilewise.shared.rows import known_rows_in_order

from . import checks
from .autodiff import forward, register

register(FLAT)

Reduction = Literal["none", "sum", "mean"]


class CrossEntropyResult(NamedTuple):
    """The loss with what else was asked for; the others are None.

    Attributes:
        loss: One number, or one for each row without a reduction; dtype of the logits, at least
            float32.
        lse: One for each row: log-sum-exp of the logits after the softcap, also of ignored rows.
        z_loss: Shape of loss: the part `z_loss lse^2` that is in it.
    """

    loss: Array
    lse: Array | None = None
    z_loss: Array | None = None


@overload
def cross_entropy(
    logits: Array,
    targets: Array,
    *,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    weight: Array | None = ...,
    softcap: float | None = ...,
    reduction: Reduction = ...,
    class_axis: int = ...,
    return_lse: Literal[False] = ...,
    return_z_loss: Literal[False] = ...,
    implementation: str | None = ...,
) -> Array: ...
@overload
def cross_entropy(
    logits: Array,
    targets: Array,
    *,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    weight: Array | None = ...,
    softcap: float | None = ...,
    reduction: Reduction = ...,
    class_axis: int = ...,
    return_lse: bool = ...,
    return_z_loss: bool = ...,
    implementation: str | None = ...,
) -> Array | CrossEntropyResult: ...
def cross_entropy(
    logits: Array,
    targets: Array,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weight: Array | None = None,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    class_axis: int = -1,
    return_lse: bool = False,
    return_z_loss: bool = False,
    implementation: str | None = None,
) -> Array | CrossEntropyResult:
    r"""Compute the cross-entropy of logits, with derivatives of first and second order.

    With `s = softcap tanh(logits / softcap)`, or the logits themselves, `lse = log sum exp(s)` and
    the weights t of the target, `loss = sum t (lse - s) + z_loss lse^2` for each row. For a class
    index y, `t = weight[y] (1 - e)` at y plus `weight e / V` everywhere, for class probabilities q
    `t = weight ((1 - e) q + e / V)`, with e the label smoothing.

    The results are differentiable with respect to the logits and class probabilities under every
    transformation of JAX, and one over another up to the second order.

    Args:
        logits: Any shape with an axis of V >= 1 classes; float64, float32, bfloat16 or float16.
            Sums and losses are float32 for the latter two.
        targets: Class indices, any integer dtype, shape of the logits without the classes; or class
            probabilities, shape and dtype of the logits, or float32 where those have 16 bits.
        ignore_index: A row with this class index has no loss and no part in the mean.
        label_smoothing: From 0 to 1.
        z_loss: From 0 to 1e6.
        weight: `(V,)`, dtype of the logits, or float32 where those have 16 bits. Weights of the
            classes, finite. A constant: it has no gradient.
        softcap: From 1e-15 to 1e15, or None.
        reduction: "none", "sum", or "mean": the sum divided by that of `weight[y]` over the rows
            that are not ignored, or with class probabilities by the number of rows. 0 without rows.
        class_axis: The axis of the classes.
        return_lse: Return also `lse` of each row.
        return_z_loss: Return also the part of the loss that z_loss adds, reduced as the loss.
        implementation: Name of the implementation, which never falls back to another; by default
            the first that serves the call.

    Returns:
        The loss, or a `CrossEntropyResult` where more was asked for.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: A third derivative is asked for.
        JaxRuntimeError: When it runs: a class index is out of range.

    Accuracy:
        `tilewise.ops.cross_entropy.spec.error_bound` bounds the error and derives the bound.

    Source:
        As for `tilewise.numpy.cross_entropy`, which computes the same bits.
    """
    logits = checks.array(NAME, "logits", logits)
    options = check_options(
        NAME,
        {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "reduction": reduction,
        },
    )
    axis = check_class_axis(NAME, class_axis, logits.ndim)
    check_classes(NAME, logits.shape, axis)
    rows = known_rows_in_order(logits.shape, (axis,))
    A, C, I = rows.sizes
    targets = _targets(targets, logits, axis)
    of_classes = None if weight is None else _weight(weight, logits, axis)
    indices = jnp.issubdtype(targets.dtype, jnp.integer)
    pair = (None, targets.reshape(A, I)) if indices else (targets.reshape(A, C, I), None)
    text = repr({**asdict(options), "implementation": implementation})
    inputs = (logits.reshape(A, C, I), *pair, of_classes)
    loss, lse, z = forward(FLAT, inputs, text, (True, True, True))
    if reduction == "none":
        loss, z = loss.reshape(rows.row_shape), z.reshape(rows.row_shape)
    if not (return_lse or return_z_loss):
        found: Array = loss
        return found
    lse = lse.reshape(rows.row_shape) if return_lse else None
    return CrossEntropyResult(loss, lse, z if return_z_loss else None)


def _targets(targets: Any, logits: Array, axis: int) -> Array:
    """Return class indices or class probabilities."""
    if not isinstance(targets, Array | np.ndarray):
        raise type_error(NAME, "targets", "be a jax.Array", type(targets).__name__)
    indices = jnp.issubdtype(targets.dtype, jnp.integer)
    if not (indices or jnp.issubdtype(targets.dtype, jnp.floating)):
        requirement = "hold class indices (integers) or class probabilities (floats)"
        raise type_error(NAME, "targets", requirement, str(targets.dtype))
    target_shapes(NAME, targets.shape, logits.shape, axis, indices=indices)
    if indices:
        return checks.signed(NAME, "targets", targets)
    found = checks.either(NAME, "targets", targets, logits.dtype, "logits")
    assert found is not None
    return found


def _weight(weight: Any, logits: Array, axis: int) -> Array:
    """Return the class weights in the dtype of sums."""
    found = checks.either(NAME, "weight", weight, logits.dtype, "logits")
    assert found is not None
    if found.shape != (logits.shape[axis],):
        requirement = f"have shape ({logits.shape[axis]},) (from the classes)"
        raise value_error(NAME, "weight", requirement, found.shape)
    return found.astype(jnp.float32) if is_narrow(logits.dtype) else found
