"""Losses as Optax calls them."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from tilewise.base.dtypes import is_narrow
from tilewise.base.errors import type_error, value_error
from tilewise.ops.softmax.spec import axes_of, check_broadcast

from . import checks
from .cross_entropy import cross_entropy

Axis = int | tuple[int, ...]

IGNORED = -1
"""The class index of a row that has no loss."""


def softmax_cross_entropy(
    logits: Array, labels: Any, axis: Axis | None = -1, where: Any = None
) -> Array:
    """Compute the loss of each row for class probabilities, as Optax's function of this name does.

    `-sum labels (logits - lse)` over the classes that are seen, with every derivative of
    `cross_entropy`, also by the labels.

    Args:
        logits: Any shape; float64, float32, bfloat16 or float16.
        labels: Broadcasts to the shape of logits; floats of its dtype, or float32 where that has 16
            bits, or integers or booleans.
        axis: The axis or axes of the classes; None is all.
        where: Boolean. Shape of logits, which classes of each row there are; or that without the
            axes, which rows there are. What it hides reaches nothing; a hidden row has loss 0.

    Returns:
        Shape of logits without the axes; dtype of logits, at least float32.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape.
    """
    name = "softmax_cross_entropy"
    logits = checks.array(name, "logits", logits)
    axes = _axes(name, axis, logits)
    labels = _labels(name, labels, logits)
    if where is not None:
        seen, of_rows = _where(name, where, logits, axes)
        seen = jnp.broadcast_to(jnp.expand_dims(seen, axes) if of_rows else seen, logits.shape)
        logits, labels = jnp.where(seen, logits, -jnp.inf), jnp.where(seen, labels, 0)
    flat, at = _one_axis(logits, axes)
    return cross_entropy(flat, _one_axis(labels, axes)[0], reduction="none", class_axis=at)


def softmax_cross_entropy_with_integer_labels(
    logits: Array, labels: Array, axis: Axis = -1, where: Any = None
) -> Array:
    """Compute the loss of each row for class indices, as Optax's function of this name does.

    `lse - logits[label]`, lse over the classes that are seen.

    Args:
        logits: Any shape; float64, float32, bfloat16 or float16.
        labels: Class indices, shape of logits without the axes: of several axes an index into all
            of them, the last one running fastest.
        axis: The axis or axes of the classes.
        where: As for `softmax_cross_entropy`. Where the label itself is hidden the loss is inf.

    Returns:
        Shape of labels; dtype of logits, at least float32.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape.
        JaxRuntimeError: When it runs: a label is out of range.
    """
    name = "softmax_cross_entropy_with_integer_labels"
    logits = checks.array(name, "logits", logits)
    axes = _axes(name, axis, logits)
    rows = tuple([n for k, n in enumerate(logits.shape) if k not in axes])
    if not isinstance(labels, Array | np.ndarray) or not jnp.issubdtype(labels.dtype, jnp.integer):
        got = getattr(labels, "dtype", type(labels).__name__)
        raise type_error(name, "labels", "be an array of integers", str(got))
    if labels.shape != rows:
        raise value_error(name, "labels", f"have shape {rows} (from logits)", labels.shape)
    if where is not None:
        seen, of_rows = _where(name, where, logits, axes)
        if of_rows:
            labels = jnp.where(seen, labels, IGNORED)
        else:
            logits = jnp.where(seen, logits, -jnp.inf)
    flat, at = _one_axis(logits, axes)
    return cross_entropy(flat, labels, ignore_index=IGNORED, reduction="none", class_axis=at)


def _axes(name: str, axis: Any, logits: Array) -> tuple[int, ...]:
    """Return the axes of the classes, in the order that was given."""
    found = axes_of(name, "axis", axis, logits.ndim, "logits")
    return tuple([k % logits.ndim for k in axis]) if isinstance(axis, tuple | list) else found


def _labels(name: str, labels: Any, logits: Array) -> Array:
    """Return class probabilities in the shape of the logits."""
    if not isinstance(labels, Array | np.ndarray):
        raise type_error(name, "labels", "be a jax.Array", type(labels).__name__)
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        labels = labels.astype(jnp.float32 if is_narrow(logits.dtype) else logits.dtype)
    found = checks.either(name, "labels", labels, logits.dtype, "logits")
    assert found is not None
    check_broadcast(name, "labels", found.shape, logits.shape, "logits")
    return jnp.broadcast_to(found, logits.shape)


def _where(name: str, where: Any, logits: Array, axes: tuple[int, ...]) -> tuple[Array, bool]:
    """Return what is seen, and whether that is of rows and not of their classes."""
    if not isinstance(where, Array | np.ndarray) or where.dtype != np.bool_:
        got = getattr(where, "dtype", type(where).__name__)
        raise type_error(name, "where", "be a boolean array", str(got))
    of_rows = where.ndim != logits.ndim
    rows = tuple([n for k, n in enumerate(logits.shape) if not (of_rows and k in axes)])
    check_broadcast(name, "where", where.shape, rows, "the rows" if of_rows else "logits")
    return jnp.broadcast_to(where, rows), of_rows


def _one_axis(x: Array, axes: tuple[int, ...]) -> tuple[Array, int]:
    """Return an array with its axes as one, and which one that is."""
    if len(axes) == 1:
        return x, axes[0]
    kept = [k for k in range(x.ndim) if k not in axes]
    sizes = [x.shape[k] for k in kept]
    merged = x.transpose(*kept, *axes).reshape(*sizes, math.prod([x.shape[k] for k in axes]))
    return merged, len(kept)
