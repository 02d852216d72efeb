"""Cross-entropy of a linear classifier on PyTorch tensors."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active

from tilewise.base.dims import Sizes
from tilewise.base.dtypes import NARROW
from tilewise.base.errors import type_error, unsupported, value_error
from tilewise.dispatch import DEVICE
from tilewise.ops.linear_cross_entropy.record import FLAT
from tilewise.ops.linear_cross_entropy.spec import (
    GRADIENT_FILTER,
    IGNORE_INDEX,
    LABEL_SMOOTHING,
    LIMITS,
    NAME,
    PROBABILITIES,
    SOFTCAP,
    TOKEN_CHUNK,
    VOCAB_CHUNK,
    WEIGHT,
    Z_LOSS,
    check_reduction,
    check_shift,
)

from .autodiff import forward, register
from .checks import autocast, check_device, check_first, shown
from .loss_accumulator import accumulating

register(FLAT)

_NARROW = tuple([getattr(torch, name) for name in NARROW])
# PyTorch 2.6 may lack it.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class LinearCrossEntropyResult(NamedTuple):
    """The loss with what was asked for beside it; the others are None.

    With a shift each has one entry for each target that is used.

    Attributes:
        loss: `()`, or `(...)` with `reduction="none"`; dtype of hidden, at least float32.
        lse: `(...)`, dtype of loss. Natural log-sum-exp of each token's logits.
        entropy: `(...)`, dtype of loss. Entropy of its probabilities.
        argmax: `(...)`, int64. Class of its largest logit; has no gradient.
        z_loss: Shape and dtype of loss, in which it is contained: the terms `z_loss lse^2`.
    """

    loss: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    z_loss: Tensor | None = None


class LinearCrossEntropyOptions(TypedDict, total=False):
    """The options that do not change the type of the result; see `linear_cross_entropy`."""

    bias: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    class_weight: Tensor | None
    softcap: float | None
    reduction: str
    shift: int
    token_chunk: int | None
    vocab_chunk: int | None
    gradient_filter: float | None
    grad_accumulator: Tensor | None
    implementation: str | None


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    return_argmax: Literal[False] = ...,
    return_z_loss: Literal[False] = ...,
    **options: Unpack[LinearCrossEntropyOptions],
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_lse: bool = ...,
    return_entropy: bool = ...,
    return_argmax: bool = ...,
    return_z_loss: bool = ...,
    **options: Unpack[LinearCrossEntropyOptions],
) -> Tensor | LinearCrossEntropyResult: ...
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: int = 0,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    gradient_filter: float | None = None,
    grad_accumulator: Tensor | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
    return_z_loss: bool = False,
    implementation: str | None = None,
) -> Tensor | LinearCrossEntropyResult:
    r"""Compute the cross-entropy of `hidden weight^T + bias` without storing these logits.

    Everything is as in `tilewise.numpy.linear_cross_entropy`. The loss, `lse` and the entropy are
    differentiable with respect to hidden, weight and bias, in reverse and forward mode and in one
    over the other, under every transform of `torch.func`, and inside
    `torch.compile(fullgraph=True)` and `torch.export`. Nothing of size tokens x V is saved.

    With `reduction="mean"` or `"sum"` a forward pass that a backward may follow computes the
    gradients too, for that costs three matrix products in place of four; the first backward hands
    them over. float16 and `vocab_chunk` compute them in the backward.

    Args:
        hidden: `(..., C)`; float64, float32, bfloat16 or float16. Sums are float32 for the latter
            two, and so is the loss.
        weight: `(V, C)`, dtype of hidden. A row for each class.
        targets: `(...)`, integers from 0 to V - 1, or ignore_index.
        bias: `(V,)`, dtype of hidden, or float32 where that has 16 bits.
        ignore_index: The target of a token without a loss: it counts 0, also with all tokens.
        label_smoothing: From 0 to 1, the part of each target that all classes share.
        z_loss: From 0 to 1e6, factor of `lse^2`, which is added to the loss.
        class_weight: `(V,)`, dtype of hidden, or float32 where that has 16 bits; finite. What each
            class counts: what `torch.nn.functional.cross_entropy` calls `weight`. Has no gradient.
        softcap: From 1e-15 to 1e15, or None. A logit z becomes `softcap tanh(z / softcap)`.
        reduction: "mean", "sum" or "none": the loss of each token, its negative log-probability.
        shift: The target of `hidden[..., n, :]` is `targets[..., n + shift]`; hidden states at the
            end have none. 1 is the next token. No hidden state is copied.
        token_chunk: How many tokens' logits there are at a time; by default chosen by size.
        vocab_chunk: How many classes' logits there are at a time; by default all.
        gradient_filter: Probability below which entries may be left out of gradients; None is
            never.
        grad_accumulator: `(V, C)`, contiguous, dtype of weight, or float32 where that has 16 bits.
            Each backward pass in which weight requires a gradient adds that to this tensor, and
            weight gets none, as with `tilewise.torch.linear`.
        return_lse: Return also `lse`, of ignored tokens too; so the next two.
        return_entropy: Return also the entropy of each token's probabilities.
        return_argmax: Return also each token's most probable class.
        return_z_loss: Return also the part of the loss that is the z-loss.
        implementation: Name of the implementation, which never falls back to another.

    Returns:
        The loss, or a `LinearCrossEntropyResult` where more was asked for.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, device or value.
        Unsupported: Targets are class probabilities, the implementation does not serve the call, or
            a third derivative is asked for; with `grad_accumulator`, a transform of `torch.func` or
            a derivative of a backward pass.

    Accuracy:
        `tilewise.ops.linear_cross_entropy.spec.error_bound` bounds the error and derives the bound.

    Source:
        As for `tilewise.numpy.linear_cross_entropy`.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)
    check(hidden, weight, bias, targets, class_weight)
    lead = hidden.shape[:-1]
    shift = check_shift(shift, len(lead))
    reduction = check_reduction(reduction)
    ignored = IGNORE_INDEX.check(ignore_index)
    zeta = Z_LOSS.check(NAME, z_loss)
    options = literal_options(
        ignore_index=ignored,
        label_smoothing=label_smoothing,
        z_loss=zeta,
        softcap=softcap,
        reduction=reduction,
        token_chunk=token_chunk,
        vocab_chunk=vocab_chunk,
        gradient_filter=gradient_filter,
        lse=bool(return_lse or return_z_loss),
        entropy=bool(return_entropy),
        implementation=implementation,
    )
    y = _shifted(targets.to(torch.int64), shift, ignored).reshape(-1)
    wide = torch.float32 if hidden.dtype in _NARROW else hidden.dtype
    counts = None if class_weight is None else class_weight.detach().to(wide)
    inputs = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, y, counts)
    if grad_accumulator is not None:
        found = accumulating(grad_accumulator, inputs, options, argmax=bool(return_argmax))
    else:
        kept = _kept_gradients(inputs[:3], reduction, vocab_chunk, implementation)
        needed = (True, True, True, bool(return_argmax), True, True, *kept)
        found = forward(FLAT, inputs, options, needed)
    loss, lse, entropy, argmax = found[:4]

    def back(rows: Tensor) -> Tensor:
        whole = rows.reshape(lead)
        return whole[..., : max(0, lead[-1] - shift)] if shift else whole

    if reduction == "none":
        loss = back(loss)
    if not (return_lse or return_entropy or return_argmax or return_z_loss):
        return loss
    terms = None
    if return_z_loss:
        terms = _z_loss(lse, y, ignored, zeta, counts, reduction)
    return LinearCrossEntropyResult(
        loss,
        back(lse) if return_lse else None,
        back(entropy) if return_entropy else None,
        back(argmax) if return_argmax else None,
        back(terms) if terms is not None and reduction == "none" else terms,
    )


def literal_options(
    *,
    ignore_index: object,
    label_smoothing: object,
    z_loss: object,
    softcap: object,
    reduction: object,
    token_chunk: object,
    vocab_chunk: object,
    gradient_filter: object,
    **others: Any,
) -> str:
    """Return checked options, and others as they are, as the text of a dictionary."""
    options = {
        "ignore_index": IGNORE_INDEX.check(ignore_index),
        "label_smoothing": LABEL_SMOOTHING.check(NAME, label_smoothing),
        "z_loss": Z_LOSS.check(NAME, z_loss),
        "softcap": None if softcap is None else SOFTCAP.check(NAME, softcap),
        "reduction": check_reduction(reduction),
        "token_chunk": None if token_chunk is None else TOKEN_CHUNK.check(token_chunk),
        "vocab_chunk": None if vocab_chunk is None else VOCAB_CHUNK.check(vocab_chunk),
        "gradient_filter": (
            None if gradient_filter is None else GRADIENT_FILTER.check(NAME, gradient_filter)
        ),
        **others,
    }
    return "{" + ", ".join([f"{name!r}: {value!r}" for name, value in options.items()]) + "}"


def check(hidden: Any, weight: Any, bias: Any, targets: Any, class_weight: Any) -> None:
    """Check all but the values of tensors."""
    _check_tensors(hidden=hidden, weight=weight, bias=bias, class_weight=class_weight)
    if not isinstance(targets, Tensor):
        raise type_error(NAME, "targets", "be a torch.Tensor", type(targets).__name__)
    if targets.is_floating_point():
        raise unsupported(NAME, PROBABILITIES)
    if targets.dtype not in _INTEGERS:
        raise type_error(NAME, "targets", "have an integer dtype up to int64", shown(targets.dtype))
    check_device(NAME, "targets", targets, hidden, "hidden")
    if hidden.ndim == 0:
        raise value_error(NAME, "hidden", "have shape (..., C)", ())
    sizes = Sizes(NAME, LIMITS)
    sizes.bind("C", hidden.shape[-1], "hidden")
    sizes.match("weight", WEIGHT.shapes, tuple(weight.shape))
    for name, tensor in (("bias", bias), ("class_weight", class_weight)):
        if tensor is not None:
            sizes.match(name, (("V",),), tuple(tensor.shape))
    if targets.shape != hidden.shape[:-1]:
        requirement = f"have shape {tuple(hidden.shape[:-1])} (from hidden)"
        raise value_error(NAME, "targets", requirement, tuple(targets.shape))


def _check_tensors(**tensors: Any) -> None:
    """Check kinds, dtypes and devices; the first tensor settles them."""
    first = tensors.pop("hidden")
    check_first(NAME, "hidden", first)
    for name, tensor in tensors.items():
        optional = name != "weight"
        if tensor is None and optional:
            continue
        if not isinstance(tensor, Tensor):
            raise type_error(NAME, name, "be a torch.Tensor", type(tensor).__name__)
        if tensor.is_nested or tensor.layout is not torch.strided:
            got = "a nested tensor" if tensor.is_nested else str(tensor.layout)
            raise type_error(NAME, name, "be a dense tensor", got)
        wider = optional and first.dtype in _NARROW
        if tensor.dtype is not first.dtype and not (wider and tensor.dtype is torch.float32):
            requirement = f"have dtype {shown(first.dtype)} (from hidden)"
            requirement += " or float32" if wider else ""
            raise type_error(NAME, name, requirement, shown(tensor.dtype))
        check_device(NAME, name, tensor, first, "hidden")


def _shifted(targets: Tensor, shift: int, ignore_index: int) -> Tensor:
    """Return the target of each hidden state where it is so many tokens further on."""
    if not shift:
        return targets
    shift = min(shift, targets.shape[-1])
    rest = targets[..., shift:]
    return torch.cat((rest, torch.full_like(targets[..., :shift], ignore_index)), -1)


def _kept_gradients(
    tensors: tuple[Any, ...], reduction: str, vocab_chunk: int | None, implementation: str | None
) -> tuple[bool, ...]:
    """Return which gradients the forward pass is to compute for a backward that may follow.

    Kernels of a GPU know the loss before they begin with the gradients, so none.
    """
    if not tensors[0].is_cpu or implementation in DEVICE:
        return (False,) * len(tensors)
    joined = reduction != "none" and vocab_chunk is None
    if not joined or tensors[0].dtype is torch.float16 or not torch.is_grad_enabled():
        return (False,) * len(tensors)
    if _is_exporting() or _are_functorch_transforms_active():
        return (False,) * len(tensors)
    return tuple([t is not None and t.requires_grad for t in tensors])


def _z_loss(
    lse: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    class_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """Return the part of the loss that is the z-loss, reduced as the loss is."""
    kept = targets != ignore_index
    terms = z_loss * lse.masked_fill(~kept | lse.isneginf(), 0).square()
    if reduction == "none":
        return terms
    if reduction == "sum":
        return terms.sum()
    counted = kept.to(lse.dtype)
    if class_weight is not None:
        counted = class_weight[targets.masked_fill(~kept, 0)].masked_fill(~kept, 0)
    total = counted.sum(dtype=torch.float64)
    whole = terms.sum(dtype=torch.float64) / total.masked_fill(total == 0, torch.inf)
    return whole.to(lse.dtype)
