"""The cross-entropy on PyTorch tensors."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from tilewise.base.dtypes import NARROW
from tilewise.base.errors import type_error, value_error
from tilewise.ops.cross_entropy import record
from tilewise.ops.cross_entropy.spec import (
    NAME,
    Options,
    check_class_axis,
    check_classes,
    check_options,
    target_shapes,
)
from tilewise.shared.rows import Rows, known_rows_in_order, rows_in_order

from .autodiff import forward, is_traced, register
from .checks import autocast_dtype, check_device, check_first, shown
from .entropy_inplace import overwriting

register(record.FLAT)

Reduction = Literal["none", "sum", "mean"]

_NARROW = tuple([getattr(torch, name) for name in NARROW])


class CrossEntropyResult(NamedTuple):
    """The loss with what else was asked for; the others are None.

    Attributes:
        loss: One number, or one for each row without a reduction; dtype of the logits, at least
            float32.
        lse: One for each row: log-sum-exp of the logits after the softcap, also of ignored rows.
        z_loss: Shape of loss: the part `z_loss lse^2` that is in it.
    """

    loss: Tensor
    lse: Tensor | None = None
    z_loss: Tensor | None = None


@overload
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    weight: Tensor | None = ...,
    softcap: float | None = ...,
    reduction: Reduction = ...,
    class_axis: int = ...,
    return_lse: Literal[False] = ...,
    return_z_loss: Literal[False] = ...,
    inplace_backward: bool = ...,
    implementation: str | None = ...,
) -> Tensor: ...
@overload
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    weight: Tensor | None = ...,
    softcap: float | None = ...,
    reduction: Reduction = ...,
    class_axis: int = ...,
    return_lse: bool = ...,
    return_z_loss: bool = ...,
    inplace_backward: bool = ...,
    implementation: str | None = ...,
) -> Tensor | CrossEntropyResult: ...
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weight: Tensor | None = None,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    class_axis: int = -1,
    return_lse: bool = False,
    return_z_loss: bool = False,
    inplace_backward: bool = False,
    implementation: str | None = None,
) -> Tensor | CrossEntropyResult:
    r"""Compute the cross-entropy of logits, with derivatives of first and second order.

    With `s = softcap tanh(logits / softcap)`, or the logits themselves, `lse = log sum exp(s)` and
    the weights t of the target, `loss = sum t (lse - s) + z_loss lse^2` for each row. For a class
    index y, `t = weight[y] (1 - e)` at y plus `weight e / V` everywhere, for class probabilities q
    `t = weight ((1 - e) q + e / V)`, with e the label smoothing.

    The results are differentiable with respect to the logits and class probabilities, in reverse
    and forward mode and in one over the other, under every transform of `torch.func`, and inside
    `torch.compile(fullgraph=True)` and `torch.export`.

    Args:
        logits: Any shape with a dimension of V >= 1 classes; float64, float32, bfloat16 or float16.
            Sums and losses are float32 for the latter two, and bfloat16 needs the package
            ml_dtypes.
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
        class_axis: The dimension of the classes: the last, where torch.nn.functional.cross_entropy
            has the second.
        return_lse: Return also `lse` of each row.
        return_z_loss: Return also the part of the loss that z_loss adds, reduced as the loss.
        inplace_backward: The backward writes the gradient of the logits over the logits, which must
            be no leaf of the graph, be read by nothing after it, and have no second derivative.
        implementation: Name of the implementation, which never falls back to another; by default
            the first that serves the call.

    Returns:
        The loss, or a `CrossEntropyResult` where more was asked for.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, device or value; so has a class index out of
            range.
        Unsupported: The implementation does not serve the call, a third derivative is asked for, or
            with inplace_backward a second one, forward mode, or a transform.

    Accuracy:
        `tilewise.ops.cross_entropy.spec.error_bound` bounds the error and derives the bound.

    Source:
        As for `tilewise.numpy.cross_entropy`, which computes the same bits.
    """
    check_first(NAME, "logits", logits)
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
    check_classes(NAME, tuple(logits.shape), axis)
    targets = _targets(targets, logits, axis)
    weight = None if weight is None else _weight(weight, logits, axis)
    if inplace_backward and (logits.requires_grad and torch.is_grad_enabled()):
        text = _text(options, implementation)
        found = overwriting(logits, targets, weight, axis, options, text)
    else:
        found = _outputs(logits, targets, weight, axis, options, implementation)
    loss, lse, z = found
    if not (return_lse or return_z_loss):
        return loss
    return CrossEntropyResult(loss, lse if return_lse else None, z if return_z_loss else None)


def _outputs(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    axis: int,
    options: Options,
    implementation: str | None,
) -> tuple[Tensor, ...]:
    """Return loss, lse and z_loss, differentiable."""
    # Where there are no values, sizes need not be numbers, and those cannot be looked up.
    find = rows_in_order if is_traced() else known_rows_in_order
    rows: Rows = find(tuple(logits.shape), (axis,))
    A, C, I = rows.sizes
    whole = logits.reshape(A, C, I)
    if targets.is_floating_point():
        inputs = (whole, targets.reshape(A, C, I), None, weight)
    else:
        inputs = (whole, None, targets.reshape(A, I), weight)
    loss, lse, z = forward(record.FLAT, inputs, _text(options, implementation), (True, True, True))
    if options.reduction == "none":
        loss, z = loss.reshape(rows.row_shape), z.reshape(rows.row_shape)
    return loss, lse.reshape(rows.row_shape), z


def _text(options: Options, implementation: str | None) -> str:
    """Return the options as the text of a dictionary; torch.compile traces no repr of them all."""
    return (
        f"{{'ignore_index': {options.ignore_index!r}, "
        f"'label_smoothing': {options.label_smoothing!r}, 'z_loss': {options.z_loss!r}, "
        f"'softcap': {options.softcap!r}, 'reduction': {options.reduction!r}, "
        f"'implementation': {implementation!r}}}"
    )


def _targets(targets: Any, logits: Tensor, axis: int) -> Tensor:
    """Return class indices as int64, or class probabilities."""
    if not isinstance(targets, Tensor):
        raise type_error(NAME, "targets", "be a torch.Tensor", type(targets).__name__)
    if targets.dtype is torch.bool or targets.is_complex():
        requirement = "hold class indices (integers) or class probabilities (floats)"
        raise type_error(NAME, "targets", requirement, shown(targets.dtype))
    indices = not targets.is_floating_point()
    if not indices:
        targets = _autocast(targets, logits)
        _check_dtype("targets", targets, logits)
    check_device(NAME, "targets", targets, logits, "logits")
    target_shapes(NAME, tuple(targets.shape), tuple(logits.shape), axis, indices=indices)
    return targets.to(torch.int64) if indices else targets


def _weight(weight: Any, logits: Tensor, axis: int) -> Tensor:
    """Return the class weights in the dtype of sums."""
    if not isinstance(weight, Tensor):
        raise type_error(NAME, "weight", "be a torch.Tensor", type(weight).__name__)
    weight = _autocast(weight, logits)
    _check_dtype("weight", weight, logits)
    check_device(NAME, "weight", weight, logits, "logits")
    if tuple(weight.shape) != (logits.shape[axis],):
        requirement = f"have shape ({logits.shape[axis]},) (from the classes)"
        raise value_error(NAME, "weight", requirement, tuple(weight.shape))
    if weight.requires_grad:
        requirement = "be without requires_grad, for it has no gradient (pass it detached)"
        raise value_error(NAME, "weight", requirement, "requires_grad=True")
    return weight.to(_wide(logits))


def _autocast(tensor: Tensor, logits: Tensor) -> Tensor:
    """Cast as autocast does for torch.nn.functional.cross_entropy: what has 16 bits to float32.

    The logits keep theirs, for their loss is that of float32 anyhow.
    """
    mixed = tensor.dtype in _NARROW and tensor.dtype is not logits.dtype
    if not mixed or logits.dtype is torch.float64 or autocast_dtype(logits) is None:
        return tensor
    return tensor.float()


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float32 if logits.dtype in _NARROW else logits.dtype


def _check_dtype(argument: str, tensor: Tensor, logits: Tensor) -> None:
    wide = _wide(logits)
    if tensor.dtype not in (logits.dtype, wide):
        more = "" if wide is logits.dtype else " or float32"
        requirement = f"have dtype {shown(logits.dtype)} (from logits){more}"
        raise type_error(NAME, argument, requirement, shown(tensor.dtype))
