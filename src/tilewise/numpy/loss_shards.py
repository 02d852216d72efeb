"""Cross-entropy of a classifier whose classes are in parts: a state of each, merged, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import round_to
from tilewise.base.errors import type_error, value_error
from tilewise.dispatch import choose
from tilewise.ops.linear_cross_entropy.spec import (
    NAME,
    CotangentCall,
    LossGrads,
    LossOutputs,
    LossStats,
    Problem,
    Want,
)

Array = NDArray[Any]
F64 = NDArray[np.float64]


class LossState(NamedTuple):
    """What one part of the classes tells of each token; every field has the shape of targets.

    Attributes:
        m: Dtype of hidden, at least float32; so are the others. Largest logit of the part.
        l: Sum of `exp(s - m)`.
        z_y: Sum of the logits times their weights in the target: the logit of the target, or 0
            where that is in another part.
        mass: Sum of these weights: 1 or 0 without label smoothing and class weights.
    """

    m: Array
    l: Array
    z_y: Array
    mass: Array


class MergedLoss(NamedTuple):
    """The loss of all parts, and what the gradients of each part need of it.

    Attributes:
        loss: Shape of targets, dtype of the states; so are the others. 0 for ignored tokens.
        lse: Natural log-sum-exp of all logits.
        stats: `lse` as a pair that keeps its digits.
        mass: Sum of the weights of all classes in the target.
    """

    loss: Array
    lse: Array
    stats: LossStats
    mass: Array


class ShardOptions(TypedDict, total=False):
    """The options of one part of the classes; see `tilewise.numpy.linear_cross_entropy`.

    bias and class_weight have one entry for each class of the part.
    """

    bias: Array | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    class_weight: Array | None
    softcap: float | None
    token_chunk: int | None
    vocab_chunk: int | None
    gradient_filter: float | None
    implementation: str | None


def linear_cross_entropy_shard(
    hidden: Array,
    weight: Array,
    targets: NDArray[np.integer[Any]],
    *,
    first_class: int,
    classes: int,
    **options: Unpack[ShardOptions],
) -> LossState:
    r"""Compute what one part of the classes tells of each token's loss.

    With s the part's logits and t the weights of `linear_cross_entropy`: `m = max s`, `l = sum
    exp(s - m)`, `z_y = sum t s`.

    Args:
        hidden: `(..., C)`, as for `linear_cross_entropy`.
        weight: `(V, C)`, dtype of hidden. The rows of the part's classes.
        targets: `(...)`, integers from 0 to classes - 1, or ignore_index: numbers of all classes.
        first_class: The class of the first row of weight.
        classes: How many classes there are in all parts.
        **options: Those of `linear_cross_entropy` but reduction and shift; bias and class_weight of
            the part's classes.

    Returns:
        A `LossState`, for `merge_shards`.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: The implementation does not serve the call.

    Source:
        Milakov & Gimelshein 2018 (arXiv:1805.02867), section 3.1.
    """
    problem, implementation = _shard(hidden, weight, targets, first_class, classes, options)
    chosen = choose(NAME, problem.call, implementation)
    found: LossOutputs = chosen.forward(problem.call, Want(picked=True))
    assert found.picked is not None and found.mass is not None
    m, log_l = found.stats
    return LossState(*[problem.back(x) for x in (m, np.exp(log_l), found.picked, found.mass)])


def merge_shards(
    states: Sequence[LossState],
    targets: NDArray[np.integer[Any]],
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> MergedLoss:
    r"""Merge the states of all parts of the classes into the loss of each token.

    `m = max m_i`, `l = sum l_i exp(m_i - m)`, `lse = m + log l` and `loss = A lse - sum z_y +
    z_loss lse^2`, with A the sum of the masses.

    Args:
        states: One `LossState` for each part, in any order. At least one.
        targets: As for `linear_cross_entropy_shard`.
        ignore_index: As there.
        z_loss: As there.

    Returns:
        A `MergedLoss`.

    Raises:
        TypeError: A state is none.
        ValueError: There is none, or shapes differ.

    Accuracy:
        Sums are float64 and rounded once.
    """
    parts = _checked(states, targets)
    first = parts[0]
    with np.errstate(all="ignore"):
        m, l, z_y, mass = (np.stack(field).astype(np.float64) for field in zip(*parts, strict=True))
        top = m.max(axis=0)
        base = np.where(top == -np.inf, 0.0, top)
        log_l = np.log((l * np.exp(m - base)).sum(axis=0))
        A = mass.sum(axis=0)
        lse = base + log_l
        loss = A * log_l + (A * base - z_y.sum(axis=0)) + z_loss * lse**2
        loss = np.where(targets == ignore_index, 0.0, loss)
    loss, lse, top, log_l, A = (round_to(x, first.m.dtype) for x in (loss, lse, base, log_l, A))
    return MergedLoss(loss, lse, LossStats(top, log_l), A)


def linear_cross_entropy_shard_vjp(
    dloss: Array | None,
    hidden: Array,
    weight: Array,
    targets: NDArray[np.integer[Any]],
    merged: MergedLoss,
    *,
    first_class: int,
    classes: int,
    dlse: Array | None = None,
    **options: Unpack[ShardOptions],
) -> LossGrads:
    r"""Compute the gradients of the merged loss that one part of the classes has.

    Args:
        dloss: Shape of targets, dtype of the states. Cotangent of each token's loss; None is zero.
        hidden: As for `linear_cross_entropy_shard`.
        weight: As there.
        targets: As there.
        merged: Result of `merge_shards` for all parts.
        first_class: As there.
        classes: As there.
        dlse: Shape of targets, dtype of the states. Cotangent of `lse`.
        **options: As there.

    Returns:
        `dweight` and `dbias` of the part's classes, and the part's share of `dhidden`: the sum of
        the shares is the gradient.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: The implementation does not serve the call.
    """
    if not isinstance(merged, MergedLoss):
        raise type_error(NAME, "merged", "be a MergedLoss", type(merged).__name__)
    problem, implementation = _shard(hidden, weight, targets, first_class, classes, options)
    given = CotangentCall(
        problem.of_loss("dloss", dloss),
        problem.of_tokens("dlse", dlse),
        None,
        problem.stats(merged.stats),
        mass=problem.of_tokens("merged.mass", merged.mass),
    )
    chosen = choose(NAME, problem.call, implementation, "vjp")
    return problem.grads_back(chosen.vjp(problem.call, given))


def _shard(
    hidden: Array,
    weight: Array,
    targets: NDArray[np.integer[Any]],
    first_class: int,
    classes: int,
    options: ShardOptions,
) -> tuple[Problem, str | None]:
    for option in options.keys() - ShardOptions.__annotations__.keys():
        raise TypeError(f"{NAME}_shard() got an unexpected keyword argument {option!r}")
    given: dict[str, Any] = {**options, "first_class": first_class, "classes": classes}
    implementation = given.pop("implementation", None)
    return Problem(hidden, weight, targets, reduction="none", **given), implementation


def _checked(states: Sequence[Any], targets: NDArray[np.integer[Any]]) -> list[LossState]:
    parts = list(states)
    if not parts:
        raise value_error("merge_shards", "states", "have at least one part", "none")
    for i, state in enumerate(parts):
        if not isinstance(state, LossState):
            kind = type(state).__name__
            raise type_error("merge_shards", f"states[{i}]", "be a LossState", kind)
        for name, array in state._asdict().items():
            if array.shape != targets.shape:
                requirement = f"have shape {targets.shape} (from targets)"
                shown = f"states[{i}].{name}"
                raise value_error("merge_shards", shown, requirement, array.shape)
    return parts
