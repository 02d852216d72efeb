"""The cross-entropy and its derivatives on NumPy arrays."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from tilewise.base.operator import Implementation
from tilewise.dispatch import choose
from tilewise.ops.cross_entropy import record
from tilewise.ops.cross_entropy.spec import (
    NAME,
    EntropyGrads,
    EntropyStats,
    EntropyTangents,
    Problem,
    SecondCall,
)

Array = NDArray[Any]
Reduction = Literal["none", "sum", "mean"]


class CrossEntropyResult(NamedTuple):
    """The loss with what else was asked for; the others are None.

    Attributes:
        loss: One number, or one for each row without a reduction; dtype of the logits, at least
            float32.
        lse: One for each row: log-sum-exp of the logits after the softcap, also of ignored rows.
        z_loss: Shape of loss: the part `z_loss lse^2` that is in it.
        stats: What the derivatives take.
    """

    loss: Array
    lse: Array | None = None
    z_loss: Array | None = None
    stats: EntropyStats | None = None


class CrossEntropyOptions(TypedDict, total=False):
    """The options that do not change the type of the result; see `cross_entropy`.

    Derivatives take those of the forward pass.
    """

    ignore_index: int
    label_smoothing: float
    z_loss: float
    weight: Array | None
    softcap: float | None
    reduction: Reduction
    class_axis: int
    implementation: str | None


@overload
def cross_entropy(
    logits: Array,
    targets: Array,
    *,
    return_lse: Literal[False] = ...,
    return_z_loss: Literal[False] = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[CrossEntropyOptions],
) -> Array: ...
@overload
def cross_entropy(
    logits: Array,
    targets: Array,
    *,
    return_lse: bool = ...,
    return_z_loss: bool = ...,
    return_stats: bool = ...,
    **options: Unpack[CrossEntropyOptions],
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
    return_stats: bool = False,
    implementation: str | None = None,
) -> Array | CrossEntropyResult:
    r"""Compute the cross-entropy of logits with class indices or class probabilities.

    With `s = softcap tanh(logits / softcap)`, or the logits themselves, `lse = log sum exp(s)` and
    the weights t of the target, `loss = sum t (lse - s) + z_loss lse^2` for each row. For a class
    index y, `t = weight[y] (1 - e)` at y plus `weight e / V` everywhere, for class probabilities q
    `t = weight ((1 - e) q + e / V)`, with e the label smoothing.

    Args:
        logits: Any shape with an axis of V >= 1 classes; float64, float32, float16 or
            `ml_dtypes.bfloat16`. Sums and losses are float32 for the latter two.
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
        return_stats: Return also what the derivatives take.
        implementation: Name of the implementation, which never falls back to another; by default
            the first that serves the call.

    Returns:
        The loss, an array also where it is one number, or a `CrossEntropyResult` where more was
        asked for.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value; so has a class index out of range.
        Unsupported: The named implementation does not serve the call.

    Accuracy:
        `tilewise.ops.cross_entropy.spec.error_bound` bounds the error and derives the bound. The
        bits of a row depend neither on other rows nor on strides.

    Source:
        Label smoothing: Szegedy et al. 2016 (arXiv:1512.00567), section 7. The z-loss: Chowdhery et
        al. 2022 (arXiv:2204.02311), section 5.
    """
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "reduction": reduction,
    }
    problem = Problem(NAME, logits, targets, weight, class_axis, options)
    loss, lse, z, stats = record.forward(choose(NAME, problem.call, implementation), problem.call)
    loss = _shaped(problem, loss)
    if not (return_lse or return_z_loss or return_stats):
        return loss
    back = problem.rows.rows_back
    return CrossEntropyResult(
        loss,
        back(lse) if return_lse else None,
        _shaped(problem, z) if return_z_loss else None,
        EntropyStats(*map(back, stats)) if return_stats else None,
    )


def cross_entropy_vjp(
    dloss: Array | None,
    logits: Array,
    targets: Array,
    stats: EntropyStats | None = None,
    *,
    dlse: Array | None = None,
    dz_loss: Array | None = None,
    out: Array | None = None,
    **options: Unpack[CrossEntropyOptions],
) -> EntropyGrads:
    r"""Compute the gradients of the cross-entropy.

    For a row, with `p = exp(s - lse)`, `total = sum t` and cotangents g, gl, gz of its results:
    `alpha = g total + 2 z_loss lse (g + gz) + gl`, `dlogits = f' (alpha p - g t)`, with f' the
    slope of the softcap. Ignored rows have `g = gz = 0`.

    Args:
        dloss: Shape and dtype of the loss; None is zero, here and below.
        logits: As in the forward pass.
        targets: As in the forward pass.
        stats: `EntropyStats` of the forward pass; computed where it is not given.
        dlse: One for each row, dtype of the loss. Cotangent of lse.
        dz_loss: Shape and dtype of the loss. Cotangent of the part of the loss.
        out: Shape and dtype of the logits. Where their gradient is written; may be the logits
            themselves, and otherwise shares no memory with the arguments.
        **options: The options of `cross_entropy`.

    Returns:
        `dlogits`, and `dtargets` for class probabilities: `g (1 - e) weight (lse - s)`, 0 where s
        is -inf.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: The named implementation does not serve the call.

    Accuracy:
        `tilewise.ops.cross_entropy.spec.error_bound` bounds the error and derives the bound.
    """
    problem, saved, chosen = _prepared("vjp", logits, targets, stats, options)
    given = problem.cotangents(dloss, dlse, dz_loss, "d")
    if out is None:
        return _grads(problem, record.vjp(chosen, problem.call, given, saved))
    written = problem.out(out)
    found = record.vjp_into(chosen, problem, given, saved, written)
    return _grads(problem, found._replace(dlogits=None))._replace(dlogits=out)


def cross_entropy_jvp(
    tlogits: Array | None,
    logits: Array,
    targets: Array,
    stats: EntropyStats | None = None,
    *,
    ttargets: Array | None = None,
    **options: Unpack[CrossEntropyOptions],
) -> EntropyTangents:
    r"""Compute the tangents of the results of the cross-entropy.

    With what `cross_entropy_vjp` names, `ts = f' tlogits` and `tt = (1 - e) weight ttargets`:
    `tlse = sum p ts`, `tz_loss = 2 z_loss lse tlse` and
    `tloss = total tlse - sum t ts + sum tt (lse - s) + tz_loss`.

    Args:
        tlogits: Shape and dtype of the logits. Their tangent; None is zero, here and below.
        logits: As in the forward pass.
        targets: As in the forward pass.
        stats: `EntropyStats` of the forward pass; computed where it is not given.
        ttargets: Shape and dtype of class probabilities. Their tangent.
        **options: The options of `cross_entropy`.

    Returns:
        `tloss`, `tlse` and `tz_loss`.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: The named implementation does not serve the call.
    """
    problem, saved, chosen = _prepared("jvp", logits, targets, stats, options)
    moved = record.jvp(chosen, problem.call, problem.tangents(tlogits, ttargets), saved)
    return EntropyTangents(
        _shaped(problem, moved.tloss),
        problem.rows.rows_back(moved.tlse),
        _shaped(problem, moved.tz_loss),
    )


def cross_entropy_vjp_jvp(
    dloss: Array | None,
    tlogits: Array | None,
    logits: Array,
    targets: Array,
    stats: EntropyStats | None = None,
    *,
    dlse: Array | None = None,
    dz_loss: Array | None = None,
    ttargets: Array | None = None,
    tdloss: Array | None = None,
    tdlse: Array | None = None,
    tdz_loss: Array | None = None,
    **options: Unpack[CrossEntropyOptions],
) -> EntropyGrads:
    r"""Compute the tangents of the gradients: the JVP of `cross_entropy_vjp`.

    Without tangents of the cotangents this is the product of the Hessian of
    `sum dloss loss + sum dlse lse + sum dz_loss z_loss` with the tangents. The formulas are those
    of `tilewise.ops.cross_entropy.reference.vjp_jvp64`.

    Args:
        dloss: Shape and dtype of the loss; None is zero, here and below.
        tlogits: Shape and dtype of the logits. Their tangent.
        logits: As in the forward pass.
        targets: As in the forward pass.
        stats: `EntropyStats` of the forward pass; computed where it is not given.
        dlse: One for each row, dtype of the loss. Cotangent of lse.
        dz_loss: Shape and dtype of the loss. Cotangent of the part of the loss.
        ttargets: Shape and dtype of class probabilities. Their tangent.
        tdloss: Shape and dtype of dloss. Its tangent.
        tdlse: Shape and dtype of dlse. Its tangent.
        tdz_loss: Shape and dtype of dz_loss. Its tangent.
        **options: The options of `cross_entropy`.

    Returns:
        Tangents of the gradients that `cross_entropy_vjp` returns, in the same fields and shapes.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: The named implementation does not serve the call.
    """
    problem, saved, chosen = _prepared("vjp_jvp", logits, targets, stats, options)
    second = SecondCall(
        problem.cotangents(dloss, dlse, dz_loss, "d"),
        problem.tangents(tlogits, ttargets),
        problem.cotangents(tdloss, tdlse, tdz_loss, "td"),
    )
    return _grads(problem, record.vjp_jvp(chosen, problem.call, second, saved))


def _prepared(
    kind: str,
    logits: Array,
    targets: Array,
    stats: EntropyStats | None,
    options: CrossEntropyOptions,
) -> tuple[Problem, EntropyStats, Implementation]:
    """Return the problem, its statistics, and the implementation that serves it."""
    for option in options.keys() - CrossEntropyOptions.__annotations__.keys():
        raise TypeError(f"{NAME}_{kind}() got an unexpected keyword argument {option!r}")
    given: dict[str, Any] = {"class_axis": -1, "weight": None, "implementation": None, **options}
    axis, weight = given.pop("class_axis"), given.pop("weight")
    implementation = given.pop("implementation")
    problem = Problem(NAME, logits, targets, weight, axis, given)
    chosen = choose(NAME, problem.call, implementation, kind)
    if stats is not None:
        return problem, problem.stats(stats), chosen
    return problem, chosen.forward(problem.call, None).stats, chosen


def _shaped(problem: Problem, loss: Array) -> Array:
    """Return a loss in the shape of the rows, where it is not reduced."""
    rows = problem.rows
    return rows.rows_back(loss) if problem.call.options.reduction == "none" else np.asarray(loss)


def _grads(problem: Problem, grads: EntropyGrads) -> EntropyGrads:
    back = problem.rows.back
    return EntropyGrads(*[None if g is None else back(g) for g in grads])
