"""Cross-entropy of a linear classifier and its derivatives on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from tilewise.base.errors import value_error
from tilewise.dispatch import choose
from tilewise.ops.linear_cross_entropy.spec import (
    ALL_NEEDED,
    NAME,
    CotangentCall,
    LossGrads,
    LossOutputs,
    LossStats,
    Problem,
    SecondCall,
    Want,
    prepare_jvp,
    prepare_vjp,
)

Array = NDArray[Any]


class LinearCrossEntropyResult(NamedTuple):
    """The loss with what was asked for beside it; the others are None.

    With a shift each has one entry for each target that is used.

    Attributes:
        loss: `()`, or `(...)` with `reduction="none"`; dtype of hidden, at least float32.
        lse: `(...)`, dtype of loss. Natural log-sum-exp of each token's logits.
        entropy: `(...)`, dtype of loss. Entropy of its probabilities.
        argmax: `(...)`, int64. Class of its largest logit, the first one of equals.
        z_loss: Shape and dtype of loss, in which it is contained: the terms `z_loss lse^2`.
        stats: What derivatives take in place of a pass of their own.
        grads: Gradients of the loss.
    """

    loss: Array
    lse: Array | None = None
    entropy: Array | None = None
    argmax: NDArray[np.int64] | None = None
    z_loss: Array | None = None
    stats: LossStats | None = None
    grads: LossGrads | None = None


class LossTangents(NamedTuple):
    """Tangents of what `linear_cross_entropy` returns.

    Attributes:
        tloss: Shape and dtype of loss.
        tlse: Shape and dtype of lse.
        tentropy: Shape and dtype of entropy, or None where it was not asked for.
    """

    tloss: Array
    tlse: Array
    tentropy: Array | None = None


class LinearCrossEntropyOptions(TypedDict, total=False):
    """The options that do not change the type of the result; see `linear_cross_entropy`.

    Derivatives take those of the forward pass.
    """

    bias: Array | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    class_weight: Array | None
    softcap: float | None
    reduction: str
    shift: int
    token_chunk: int | None
    vocab_chunk: int | None
    gradient_filter: float | None
    implementation: str | None


@overload
def linear_cross_entropy(
    hidden: Array,
    weight: Array,
    targets: NDArray[np.integer[Any]],
    *,
    return_lse: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    return_argmax: Literal[False] = ...,
    return_z_loss: Literal[False] = ...,
    return_stats: Literal[False] = ...,
    return_grads: Literal[False] = ...,
    **options: Unpack[LinearCrossEntropyOptions],
) -> Array: ...
@overload
def linear_cross_entropy(
    hidden: Array,
    weight: Array,
    targets: NDArray[np.integer[Any]],
    *,
    return_lse: bool = ...,
    return_entropy: bool = ...,
    return_argmax: bool = ...,
    return_z_loss: bool = ...,
    return_stats: bool = ...,
    return_grads: bool = ...,
    **options: Unpack[LinearCrossEntropyOptions],
) -> Array | LinearCrossEntropyResult: ...
def linear_cross_entropy(
    hidden: Array,
    weight: Array,
    targets: NDArray[np.integer[Any]],
    *,
    bias: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Array | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: int = 0,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    gradient_filter: float | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
    return_z_loss: bool = False,
    return_stats: bool = False,
    return_grads: bool = False,
    implementation: str | None = None,
) -> Array | LinearCrossEntropyResult:
    r"""Compute the cross-entropy of `hidden weight^T + bias` without storing these logits.

    With `s` the logits, or `softcap tanh(logits / softcap)`, and `lse = log sum exp s`, a token's
    loss is `A lse - sum t s + z_loss lse^2`. Its target y weighs the classes by `t_c =
    (1 - label_smoothing) w_y [c = y] + label_smoothing w_c / V`, w the class weights or 1, and A is
    the sum of t: `lse - s_y` without options.

    Args:
        hidden: `(..., C)`; float64, float32, float16 or `ml_dtypes.bfloat16`. Sums are float32 for
            the latter two.
        weight: `(V, C)`, dtype of hidden. A row for each class.
        targets: `(...)`, integers from 0 to V - 1, or ignore_index.
        bias: `(V,)`, dtype of hidden, or float32 where that has 16 bits.
        ignore_index: The target of a token without a loss: it counts 0, also with all tokens.
        label_smoothing: From 0 to 1, the part of each target that all classes share.
        z_loss: From 0 to 1e6, factor of `lse^2`.
        class_weight: `(V,)`, dtype of hidden, or float32 where that has 16 bits; finite. What each
            class counts. (`torch.nn.functional.cross_entropy` calls it `weight`.)
        softcap: From 1e-15 to 1e15, or None.
        reduction: "none", "sum" or "mean": the sum divided by how much the kept tokens count, which
            is their number, or the sum of their `w_y`; 0 where that is 0.
        shift: The target of `hidden[..., n, :]` is `targets[..., n + shift]`; hidden states at the
            end have none. 1 is the next token. Nothing is copied.
        token_chunk: How many tokens' logits there are at a time; by default chosen by size. It
            changes no bits of losses and of the gradient by hidden.
        vocab_chunk: How many classes' logits there are at a time; by default all.
        gradient_filter: Probability below which entries may be left out of gradients; None is
            never.
        return_lse: Return also `lse`, of ignored tokens too; so the next two.
        return_entropy: Return also the entropy of each token's probabilities.
        return_argmax: Return also each token's most probable class.
        return_z_loss: Return also the part of the loss that is the z-loss.
        return_stats: Return also what the derivatives take, `LossStats(m, log_l)`.
        return_grads: Return also the gradients of the loss, which cost less in the same pass. Not
            with `reduction="none"`.
        implementation: Name of the implementation, which never falls back to another; by default
            the first that serves the call.

    Returns:
        The loss, an array also where it has no dimension, or a `LinearCrossEntropyResult` where
        more was asked for.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: Targets are class probabilities, or the implementation does not serve the call.

    Accuracy:
        `tilewise.ops.linear_cross_entropy.spec.error_bound` bounds the error and derives the bound.

    Source:
        Wijmans et al. 2024, Cut Your Losses in Large-Vocabulary Language Models
        (arXiv:2411.09009); z-loss: Chowdhery et al. 2022, PaLM (arXiv:2204.02311), section 5.
    """
    problem = Problem(
        hidden,
        weight,
        targets,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        class_weight=class_weight,
        softcap=softcap,
        reduction=reduction,
        shift=shift,
        token_chunk=token_chunk,
        vocab_chunk=vocab_chunk,
        gradient_filter=gradient_filter,
    )
    call = problem.call
    if return_grads and call.reduction == "none":
        requirement = 'be False with reduction="none" (use linear_cross_entropy_vjp)'
        raise value_error(NAME, "return_grads", requirement, "True")
    more = return_lse or return_entropy or return_argmax or return_stats
    want = Want(
        entropy=return_entropy,
        argmax=return_argmax,
        ignored=more,
        gradients=ALL_NEEDED if return_grads else None,
    )
    chosen = choose(NAME, call, implementation)
    found: LossOutputs = chosen.forward(call, want)
    loss = problem.loss_back(found.loss if chosen.reduces else call.reduce(found.loss))
    if not (more or return_z_loss or return_grads):
        return loss
    lse = found.stats.m + found.stats.log_l
    return LinearCrossEntropyResult(
        loss,
        problem.back(lse) if return_lse else None,
        None if found.entropy is None else problem.back(found.entropy),
        None if found.argmax is None else problem.back(found.argmax),
        problem.loss_back(call.reduce(call.z_loss_of(lse))) if return_z_loss else None,
        problem.stats_back(found.stats) if return_stats else None,
        problem.grads_back(found.grads) if return_grads else None,
    )


def linear_cross_entropy_vjp(
    dloss: Array | None,
    hidden: Array,
    weight: Array,
    targets: NDArray[np.integer[Any]],
    stats: LossStats | None = None,
    *,
    dlse: Array | None = None,
    dentropy: Array | None = None,
    **options: Unpack[LinearCrossEntropyOptions],
) -> LossGrads:
    r"""Compute the gradients of the loss, of lse and of the entropy, or of several at once.

    With `p = exp((s - m) - log_l)` and g the part of `dloss` that is each token's:
    `ds = (g (A + 2 z_loss lse) + dlse) p - g t - dentropy p (log p + entropy)`,
    `dz = ds (1 - (s / softcap)^2)`, `dhidden = dz weight`, `dweight = dz^T hidden`, `dbias = sum
    dz`. A tile of logits is computed again, and no other is stored.

    Args:
        dloss: Shape and dtype of loss, or a number where that has no dimension. Its cotangent;
            None is zero, here and below.
        hidden: As in the forward pass.
        weight: As in the forward pass.
        targets: As in the forward pass.
        stats: `LossStats` of the forward pass; computed where it is not given.
        dlse: Shape and dtype of lse. Its cotangent.
        dentropy: Shape and dtype of entropy. Its cotangent; it costs a forward pass.
        **options: Those of `linear_cross_entropy`.

    Returns:
        `dhidden`, `dweight` and `dbias`, in the dtypes of their inputs; the last is None where
        there is no bias.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: The implementation does not serve the call.

    Accuracy:
        `tilewise.ops.linear_cross_entropy.spec.error_bound` bounds the error and derives the bound.
    """
    entropy = dentropy is not None
    at = _prepared("vjp", hidden, weight, targets, stats, options, entropy=entropy)
    given = at.cotangents(dloss, dlse, dentropy)
    return at.problem.grads_back(at.function(at.problem.call, given))


def linear_cross_entropy_jvp(
    thidden: Array | None,
    hidden: Array,
    weight: Array,
    targets: NDArray[np.integer[Any]],
    stats: LossStats | None = None,
    *,
    tweight: Array | None = None,
    tbias: Array | None = None,
    return_entropy: bool = False,
    **options: Unpack[LinearCrossEntropyOptions],
) -> LossTangents:
    r"""Compute the tangents of the loss, of lse and of the entropy.

    With what `linear_cross_entropy_vjp` names and `ts = (1 - (s / softcap)^2) (thidden weight^T +
    hidden tweight^T + tbias)`: `tlse = sum p ts`, `tloss = (A + 2 z_loss lse) tlse - sum t ts`,
    `tentropy = -sum p (log p + entropy) ts`.

    Args:
        thidden: Shape and dtype of hidden. Its tangent; None is zero, here and below.
        hidden: As in the forward pass.
        weight: As in the forward pass.
        targets: As in the forward pass.
        stats: `LossStats` of the forward pass; computed where it is not given.
        tweight: Shape and dtype of weight. Its tangent.
        tbias: Shape and dtype of bias. Its tangent.
        return_entropy: Whether the tangent of the entropy is wanted; it costs a forward pass.
        **options: Those of `linear_cross_entropy`.

    Returns:
        `tloss`, `tlse` and `tentropy`.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: The implementation does not serve the call.
    """
    at = _prepared("jvp", hidden, weight, targets, stats, options, entropy=return_entropy)
    problem = at.problem
    given = prepare_jvp(problem, at.stats, thidden, tweight, tbias, at.entropy)
    tloss, tlse, tentropy = at.function(problem.call, given)
    return LossTangents(
        problem.loss_back(tloss if at.reduces else problem.call.reduce(tloss)),
        problem.back(tlse),
        None if tentropy is None else problem.back(tentropy),
    )


def linear_cross_entropy_vjp_jvp(
    dloss: Array | None,
    thidden: Array | None,
    hidden: Array,
    weight: Array,
    targets: NDArray[np.integer[Any]],
    stats: LossStats | None = None,
    *,
    dlse: Array | None = None,
    dentropy: Array | None = None,
    tweight: Array | None = None,
    tbias: Array | None = None,
    tdloss: Array | None = None,
    tdlse: Array | None = None,
    tdentropy: Array | None = None,
    **options: Unpack[LinearCrossEntropyOptions],
) -> LossGrads:
    r"""Compute the tangents of the gradients: the JVP of `linear_cross_entropy_vjp`.

    With `tdloss = tdlse = tdentropy = None` this is the product of the Hessian of
    `dloss loss + sum dlse lse + sum dentropy entropy` with the tangents.

    Args:
        dloss: Shape and dtype of loss, or a number where that has no dimension. Its cotangent;
            None is zero, here and below.
        thidden: Shape and dtype of hidden. Its tangent.
        hidden: As in the forward pass.
        weight: As in the forward pass.
        targets: As in the forward pass.
        stats: `LossStats` of the forward pass; computed where it is not given.
        dlse: Shape and dtype of lse. Its cotangent.
        dentropy: Shape and dtype of entropy. Its cotangent.
        tweight: Shape and dtype of weight. Its tangent.
        tbias: Shape and dtype of bias. Its tangent.
        tdloss: Shape and dtype of loss. Tangent of dloss.
        tdlse: Shape and dtype of lse. Tangent of dlse.
        tdentropy: Shape and dtype of entropy. Tangent of dentropy.
        **options: Those of `linear_cross_entropy`.

    Returns:
        Tangents of the gradients that `linear_cross_entropy_vjp` returns, in the same fields.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: The implementation does not serve the call.
    """
    entropy = dentropy is not None or tdentropy is not None
    at = _prepared("vjp_jvp", hidden, weight, targets, stats, options, entropy=entropy)
    problem = at.problem
    second = SecondCall(
        at.cotangents(dloss, dlse, dentropy),
        prepare_jvp(problem, at.stats, thidden, tweight, tbias, at.entropy),
        problem.of_loss("tdloss", tdloss, spread=not at.reduces),
        problem.of_tokens("tdlse", tdlse),
        problem.of_tokens("tdentropy", tdentropy),
    )
    return problem.grads_back(at.function(problem.call, second))


class _Prepared(NamedTuple):
    """A call with its statistics, and the function that serves it."""

    problem: Problem
    stats: LossStats
    entropy: Array | None
    function: Callable[..., Any]
    reduces: bool

    def cotangents(self, dloss: object, dlse: object, dentropy: object) -> CotangentCall:
        """Return the cotangents as the function takes them."""
        given = dloss, dlse, dentropy, self.entropy
        return prepare_vjp(self.problem, self.stats, *given, spread=not self.reduces)


def _prepared(
    kind: str,
    hidden: Array,
    weight: Array,
    targets: NDArray[np.integer[Any]],
    stats: LossStats | None,
    options: LinearCrossEntropyOptions,
    *,
    entropy: bool,
) -> _Prepared:
    for option in options.keys() - LinearCrossEntropyOptions.__annotations__.keys():
        raise TypeError(f"{NAME}_{kind}() got an unexpected keyword argument {option!r}")
    given: dict[str, Any] = {**options}
    implementation = given.pop("implementation", None)
    problem = Problem(hidden, weight, targets, **given)
    chosen = choose(NAME, problem.call, implementation, kind)
    saved, found = None if stats is None else problem.stats(stats), None
    if saved is None or entropy:
        found = chosen.forward(problem.call, Want(entropy=entropy))
        saved = saved or found.stats
    entropies = None if found is None else found.entropy
    return _Prepared(problem, saved, entropies, getattr(chosen, kind), chosen.reduces)
