"""Cross-entropy of a classifier whose classes are in parts, on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.base.dtypes import NARROW
from tilewise.base.errors import type_error, value_error
from tilewise.ops.linear_cross_entropy.record import FLAT
from tilewise.ops.linear_cross_entropy.spec import CLASSES, FIRST_CLASS, NAME

from .autodiff import forward
from .linear_cross_entropy import check, literal_options

_NARROW = tuple([getattr(torch, name) for name in NARROW])


class LossState(NamedTuple):
    """What one part of the classes tells of each token; every field has the shape of targets.

    `l` and `z_y` are differentiable; `m` is a constant, on which the loss does not depend.

    Attributes:
        m: Dtype of hidden, at least float32; so are the others. Largest logit of the part.
        l: Sum of `exp(s - m)`.
        z_y: Sum of the logits times their weights in the target: the logit of the target, or 0
            where that is in another part.
        mass: Sum of these weights: 1 or 0 without label smoothing and class weights.
    """

    m: Tensor
    l: Tensor
    z_y: Tensor
    mass: Tensor


class MergedLoss(NamedTuple):
    """The loss of all parts, differentiable.

    Attributes:
        loss: Shape of targets, dtype of the states; so is lse. 0 for ignored tokens.
        lse: Natural log-sum-exp of all logits.
    """

    loss: Tensor
    lse: Tensor


def linear_cross_entropy_shard(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    first_class: int,
    classes: int,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    softcap: float | None = None,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    gradient_filter: float | None = None,
    implementation: str | None = None,
) -> LossState:
    r"""Compute what one part of the classes tells of each token's loss.

    With s the part's logits and t the weights of `linear_cross_entropy`: `m = max s`, `l = sum
    exp(s - m)`, `z_y = sum t s`. Gradients are those of any tensor: of `weight` and `bias` those
    of the part's classes, of `hidden` the part's share, the sum of which is the gradient.

    Args:
        hidden: `(..., C)`, as for `linear_cross_entropy`.
        weight: `(V, C)`, dtype of hidden. The rows of the part's classes.
        targets: `(...)`, integers from 0 to classes - 1, or ignore_index: numbers of all classes.
        first_class: The class of the first row of weight.
        classes: How many classes there are in all parts.
        bias: As for `linear_cross_entropy`, of the part's classes.
        ignore_index: As for `linear_cross_entropy`; so are the others.
        label_smoothing: As there.
        class_weight: As there, of the part's classes.
        softcap: As there.
        token_chunk: As there.
        vocab_chunk: As there.
        gradient_filter: As there.
        implementation: As there.

    Returns:
        A `LossState`, for `merge_shards`.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, device or value.
        Unsupported: The implementation does not serve the call.

    Source:
        Milakov & Gimelshein 2018 (arXiv:1805.02867), section 3.1.
    """
    check(hidden, weight, bias, targets, class_weight)
    first, whole = FIRST_CLASS.check(first_class), CLASSES.check(classes)
    if whole < first + len(weight):
        requirement = f"be at least {first + len(weight)} (first_class + V)"
        raise value_error(NAME, "classes", requirement, whole)
    options = literal_options(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=0.0,
        softcap=softcap,
        reduction="none",
        token_chunk=token_chunk,
        vocab_chunk=vocab_chunk,
        gradient_filter=gradient_filter,
        lse=True,
        entropy=False,
        implementation=implementation,
        first_class=first,
        classes=whole,
    )
    y = targets.to(torch.int64)
    wide = torch.float32 if hidden.dtype in _NARROW else hidden.dtype
    counts = None if class_weight is None else class_weight.detach().to(wide)
    rows = hidden.reshape(-1, hidden.shape[-1])
    needed = (True, True, False, False, True, True, False, False, False)
    found = forward(FLAT, (rows, weight, bias, y.reshape(-1), counts), options, needed)
    loss, lse, m, log_l = [found[i].reshape(y.shape) for i in (0, 1, 4, 5)]
    if counts is None:
        counts = weight.new_ones(len(weight), dtype=wide)
    mass = _mass(y, ignore_index, first, counts, label_smoothing, whole)
    # l has the digits of log_l, and the derivatives of lse.
    l = (log_l.detach() + (lse - lse.detach())).exp()
    return LossState(m.detach(), l, mass * lse - loss, mass)


def merge_shards(
    states: Sequence[LossState],
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> MergedLoss:
    r"""Merge the states of all parts of the classes into the loss of each token.

    `m = max m_i`, `l = sum l_i exp(m_i - m)`, `lse = m + log l` and `loss = A lse - sum z_y +
    z_loss lse^2`, with A the sum of the masses. These are operations of PyTorch, so that gradients
    reach the states, and through a collective that is differentiable those of other processes.

    Args:
        states: One `LossState` for each part, in any order. At least one.
        targets: As for `linear_cross_entropy_shard`.
        ignore_index: As there.
        z_loss: As for `linear_cross_entropy`.

    Returns:
        A `MergedLoss`.

    Raises:
        TypeError: A state is none.
        ValueError: There is none, or shapes differ.

    Accuracy:
        Sums are float64 and rounded once.
    """
    parts = _checked(states, targets)
    dtype = parts[0].m.dtype
    m, l, z_y, mass = [torch.stack(field).double() for field in zip(*parts, strict=True)]
    top = m.amax(0)
    base = top.masked_fill(top == -torch.inf, 0)
    kept, A = targets != ignore_index, mass.sum(0)
    log_l = (l * (m - base).exp()).sum(0).log()
    lse = base + log_l
    loss = A * log_l + (A * base - z_y.sum(0)) + z_loss * lse.square()
    return MergedLoss(loss.masked_fill(~kept, 0).to(dtype), lse.to(dtype))


def _mass(
    y: Tensor, ignored: int, first: int, counts: Tensor, smoothing: float, classes: int
) -> Tensor:
    """Return the sum of the part's weights in each token's target."""
    kept, at = y != ignored, y - first
    here = kept & (at >= 0) & (at < len(counts))
    own = (1 - smoothing) * counts[at.masked_fill(~here, 0)]
    spread = (smoothing / classes * counts.sum(dtype=torch.float64)).to(counts.dtype)
    return own.masked_fill(~here, 0) + spread * kept.to(counts.dtype)


def _checked(states: Sequence[Any], targets: Tensor) -> list[LossState]:
    parts = list(states)
    if not parts:
        raise value_error("merge_shards", "states", "have at least one part", "none")
    for i, state in enumerate(parts):
        if not isinstance(state, LossState):
            kind = type(state).__name__
            raise type_error("merge_shards", f"states[{i}]", "be a LossState", kind)
        for name, tensor in state._asdict().items():
            if tensor.shape != targets.shape:
                requirement = f"have shape {tuple(targets.shape)} (from targets)"
                shown = f"states[{i}].{name}"
                raise value_error("merge_shards", shown, requirement, tuple(tensor.shape))
    return parts
