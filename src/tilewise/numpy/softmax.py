"""Softmax, log-softmax, log-sum-exp and their derivatives on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from tilewise.base.errors import value_error
from tilewise.dispatch import choose
from tilewise.ops.softmax.record import forward_into
from tilewise.ops.softmax.spec import (
    Problem,
    SoftmaxGrads,
    SoftmaxOutputs,
    SoftmaxStats,
    SoftmaxTangents,
    Want,
    prepare_jvp,
    prepare_vjp,
    prepare_vjp_jvp,
)

Array = NDArray[Any]
Axis = int | tuple[int, ...] | None

KINDS = ("y", "log_y", "lse")
"""The names of the results that have tangents."""


class SoftmaxResult(NamedTuple):
    """The softmax with the statistics that were asked for; the others are None.

    Attributes:
        y: Shape and dtype of x.
        lse: Shape of x without the axes; dtype of x, at least float32.
        stats: The same as a pair that keeps its digits, for the derivatives.
    """

    y: Array
    lse: Array | None = None
    stats: SoftmaxStats | None = None


class LogSoftmaxResult(NamedTuple):
    """The logarithm of the softmax with the statistics that were asked for.

    Attributes:
        log_y: Shape and dtype of x.
        lse: Shape of x without the axes; dtype of x, at least float32.
        stats: The same as a pair that keeps its digits, for the derivatives.
    """

    log_y: Array
    lse: Array | None = None
    stats: SoftmaxStats | None = None


class SoftmaxOptions(TypedDict, total=False):
    """The options of the softmax that do not change the type of its result; see `softmax`.

    Derivatives take those of the forward pass.
    """

    axis: Axis
    temperature: float
    where: NDArray[np.bool_] | None
    sink: float | Array | None
    implementation: str | None


@overload
def softmax(
    x: Array,
    axis: Axis = ...,
    *,
    temperature: float = ...,
    where: NDArray[np.bool_] | None = ...,
    sink: float | Array | None = ...,
    out: Array | None = ...,
    return_lse: Literal[False] = ...,
    return_stats: Literal[False] = ...,
    implementation: str | None = ...,
) -> Array: ...
@overload
def softmax(
    x: Array,
    axis: Axis = ...,
    *,
    temperature: float = ...,
    where: NDArray[np.bool_] | None = ...,
    sink: float | Array | None = ...,
    out: Array | None = ...,
    return_lse: bool = ...,
    return_stats: bool = ...,
    implementation: str | None = ...,
) -> Array | SoftmaxResult: ...
def softmax(
    x: Array,
    axis: Axis = -1,
    *,
    temperature: float = 1.0,
    where: NDArray[np.bool_] | None = None,
    sink: float | Array | None = None,
    out: Array | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    implementation: str | None = None,
) -> Array | SoftmaxResult:
    r"""Compute the softmax along axes.

    `y = exp(s) / (sum exp(s) + exp(sink))` with `s = x / temperature`, the sum over the visible
    entries. A hidden entry is absent: `y = 0`, and NaN there reaches nothing. So is an entry of
    -inf. A row without entries and sink has `y = 0` and `lse = -inf`; one with NaN or inf has
    `y = NaN`.

    Args:
        x: Any shape; float64, float32, float16 or `ml_dtypes.bfloat16`. Sums are float32 for the
            latter two.
        axis: The axis or axes of a row; None is all.
        temperature: From 1e-15 to 1e15. x is divided by it.
        where: bool, broadcasts to the shape of x. True where an entry is visible.
        sink: One more logit of each row, in the denominator only: a number, or an array that
            broadcasts to the shape of x without the axes, in the dtype of x, or float32 where that
            has 16 bits. -inf is none.
        out: Shape and dtype of x. Where y is written; may be x itself, and otherwise shares no
            memory with x, where and sink.
        return_lse: Return also `lse = log(sum exp(s) + exp(sink))`.
        return_stats: Return also what the derivatives take, `SoftmaxStats(m, log_l)`.
        implementation: Name of the implementation, which never falls back to another; by default
            the first that serves the call.

    Returns:
        `y`, or a `SoftmaxResult` where more was asked for.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, memory or value.
        Unsupported: The named implementation does not serve the call.

    Accuracy:
        `tilewise.ops.softmax.spec.error_bound` bounds the error and derives the bound. The bits
        depend neither on the axes nor on strides.

    Source:
        Milakov & Gimelshein 2018 (arXiv:1805.02867), algorithm 3; the sink: Xiao et al. 2023
        (arXiv:2309.17453), equation 2, with any logit in place of 0.
    """
    problem = Problem("softmax", x, axis, temperature, where, sink)
    want = Want(y=True, lse=return_lse, stats=return_stats)
    y, found = _forward(problem, want, out, implementation)
    if not (return_lse or return_stats):
        return y
    return SoftmaxResult(y, *_statistics(problem, found))


@overload
def log_softmax(
    x: Array,
    axis: Axis = ...,
    *,
    temperature: float = ...,
    where: NDArray[np.bool_] | None = ...,
    sink: float | Array | None = ...,
    out: Array | None = ...,
    return_lse: Literal[False] = ...,
    return_stats: Literal[False] = ...,
    implementation: str | None = ...,
) -> Array: ...
@overload
def log_softmax(
    x: Array,
    axis: Axis = ...,
    *,
    temperature: float = ...,
    where: NDArray[np.bool_] | None = ...,
    sink: float | Array | None = ...,
    out: Array | None = ...,
    return_lse: bool = ...,
    return_stats: bool = ...,
    implementation: str | None = ...,
) -> Array | LogSoftmaxResult: ...
def log_softmax(
    x: Array,
    axis: Axis = -1,
    *,
    temperature: float = 1.0,
    where: NDArray[np.bool_] | None = None,
    sink: float | Array | None = None,
    out: Array | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    implementation: str | None = None,
) -> Array | LogSoftmaxResult:
    r"""Compute the logarithm of the softmax along axes, also where the softmax itself underflows.

    `log_y = s - log(sum exp(s) + exp(sink))` with `s = x / temperature`; -inf where an entry is
    hidden or its row is empty.

    Args:
        x: As for `softmax`.
        axis: As for `softmax`.
        temperature: As for `softmax`.
        where: As for `softmax`.
        sink: As for `softmax`.
        out: As for `softmax`.
        return_lse: As for `softmax`.
        return_stats: As for `softmax`.
        implementation: As for `softmax`.

    Returns:
        `log_y`, or a `LogSoftmaxResult` where more was asked for.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, memory or value.
        Unsupported: The named implementation does not serve the call.

    Accuracy:
        `tilewise.ops.softmax.spec.error_bound` bounds the error and derives the bound.
    """
    problem = Problem("log_softmax", x, axis, temperature, where, sink)
    want = Want(log_y=True, lse=return_lse, stats=return_stats)
    log_y, found = _forward(problem, want, out, implementation)
    if not (return_lse or return_stats):
        return log_y
    return LogSoftmaxResult(log_y, *_statistics(problem, found))


def logsumexp(
    x: Array,
    axis: Axis = None,
    *,
    keepdims: bool = False,
    temperature: float = 1.0,
    where: NDArray[np.bool_] | None = None,
    sink: float | Array | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Compute the logarithm of the sum of exponentials along axes.

    `lse = log(sum exp(s) + exp(sink))` with `s = x / temperature`, the sum over the visible
    entries; -inf where there are none, inf where one is inf.

    Args:
        x: As for `softmax`.
        axis: The axis or axes of a row; None is all.
        keepdims: Whether the axes stay, with size 1.
        temperature: As for `softmax`.
        where: As for `softmax`.
        sink: As for `softmax`.
        implementation: As for `softmax`.

    Returns:
        One number for each row, an array also where there is one row; dtype of x, at least float32.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: The named implementation does not serve the call.

    Accuracy:
        `tilewise.ops.softmax.spec.error_bound` bounds the error and derives the bound.
    """
    problem = Problem("logsumexp", x, axis, temperature, where, sink)
    forward = choose("logsumexp", problem.call, implementation).forward
    lse: Array = forward(problem.call, Want(lse=True)).lse
    return problem.rows.rows_back(lse, keepdims=bool(keepdims))


def softmax_vjp(
    dy: Array | None,
    x: Array,
    stats: SoftmaxStats | None = None,
    *,
    dlog_y: Array | None = None,
    dlse: Array | None = None,
    **options: Unpack[SoftmaxOptions],
) -> SoftmaxGrads:
    r"""Compute the gradients of softmax, log-softmax and log-sum-exp, or of several at once.

    With `p = exp((x - m) / temperature - log_l)` and `p_sink = exp(sink - lse)`:
    `c = sum (p dy + dlog_y) - dlse`, `dx = (p (dy - c) + dlog_y) / temperature`,
    `dsink = -p_sink c`. Hidden entries and empty rows have no part and get 0.

    Args:
        dy: Shape and dtype of x. Cotangent of `softmax`; None is zero, here and below.
        x: As in the forward pass.
        stats: `SoftmaxStats` of the forward pass; computed where it is not given. That of a larger
            softmax gives the gradients of this part.
        dlog_y: Shape and dtype of x. Cotangent of `log_softmax`.
        dlse: One for each row, dtype of lse. Cotangent of `logsumexp`.
        **options: axis, temperature, where, sink and implementation, as for `softmax`.

    Returns:
        `dx`, and `dsink` in the shape of sink, None where that is not an array.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: The named implementation does not serve the call.

    Accuracy:
        `tilewise.ops.softmax.spec.error_bound` bounds the error and derives the bound.
    """
    problem, saved, function = _prepared("vjp", x, stats, options)
    return _grads(problem, function(problem.call, prepare_vjp(problem, saved, dy, dlog_y, dlse)))


def softmax_jvp(
    tx: Array | None,
    x: Array,
    stats: SoftmaxStats | None = None,
    *,
    tsink: Array | None = None,
    kinds: Collection[str] = ("y", "lse"),
    **options: Unpack[SoftmaxOptions],
) -> SoftmaxTangents:
    r"""Compute the tangents of softmax, log-softmax and log-sum-exp.

    With what `softmax_vjp` names and `ts = tx / temperature`: `tlse = sum p ts + p_sink tsink`,
    `ty = p (ts - tlse)`, `tlog_y = ts - tlse`.

    Args:
        tx: Shape and dtype of x. Tangent of x; None is zero, here and below.
        x: As in the forward pass.
        stats: `SoftmaxStats` of the forward pass; computed where it is not given.
        tsink: Shape of sink, and one of its dtypes. Tangent of sink.
        kinds: Which tangents are wanted, of `"y"`, `"log_y"` and `"lse"`.
        **options: axis, temperature, where, sink and implementation, as for `softmax`.

    Returns:
        `ty`, `tlog_y` and `tlse`; None where it is not wanted.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: The named implementation does not serve the call.
    """
    wanted = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in wanted:
        if kind not in KINDS:
            requirement = f"be of {', '.join(map(repr, KINDS))}"
            raise value_error("softmax", "kinds", requirement, repr(kind))
    problem, saved, function = _prepared("jvp", x, stats, options)
    want = Want("y" in wanted, "log_y" in wanted, "lse" in wanted)
    ty, tlog_y, tlse = function(problem.call, prepare_jvp(problem, saved, tx, tsink), want)
    rows = problem.rows
    return SoftmaxTangents(
        None if ty is None else rows.back(ty),
        None if tlog_y is None else rows.back(tlog_y),
        None if tlse is None else rows.rows_back(tlse),
    )


def softmax_vjp_jvp(
    dy: Array | None,
    tx: Array | None,
    x: Array,
    stats: SoftmaxStats | None = None,
    *,
    dlog_y: Array | None = None,
    dlse: Array | None = None,
    tsink: Array | None = None,
    tdy: Array | None = None,
    tdlog_y: Array | None = None,
    tdlse: Array | None = None,
    **options: Unpack[SoftmaxOptions],
) -> SoftmaxGrads:
    r"""Compute the tangents of the gradients: the JVP of `softmax_vjp`.

    With `tdy = tdlog_y = tdlse = None` this is the product of the Hessian of
    `sum dy y + sum dlog_y log_y + sum dlse lse` with the tangents. With what the other two name:
    `tp = p (ts - tlse)`, `tc = sum (tp dy + p tdy + tdlog_y) - tdlse`,
    `tdx = (tp (dy - c) + p (tdy - tc) + tdlog_y) / temperature`,
    `tdsink = -p_sink ((tsink - tlse) c + tc)`.

    Args:
        dy: Shape and dtype of x. Cotangent of `softmax`; None is zero, here and below.
        tx: Shape and dtype of x. Tangent of x.
        x: As in the forward pass.
        stats: `SoftmaxStats` of the forward pass; computed where it is not given.
        dlog_y: Shape and dtype of x. Cotangent of `log_softmax`.
        dlse: One for each row, dtype of lse. Cotangent of `logsumexp`.
        tsink: Shape of sink, and one of its dtypes. Tangent of sink.
        tdy: Shape and dtype of x. Tangent of dy.
        tdlog_y: Shape and dtype of x. Tangent of dlog_y.
        tdlse: One for each row, dtype of lse. Tangent of dlse.
        **options: axis, temperature, where, sink and implementation, as for `softmax`.

    Returns:
        Tangents of the gradients that `softmax_vjp` returns, in the same fields and shapes.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: The named implementation does not serve the call.
    """
    problem, saved, function = _prepared("vjp_jvp", x, stats, options)
    second = prepare_vjp_jvp(
        problem,
        prepare_vjp(problem, saved, dy, dlog_y, dlse),
        prepare_jvp(problem, saved, tx, tsink),
        tdy,
        tdlog_y,
        tdlse,
    )
    return _grads(problem, function(problem.call, second))


def _forward(
    problem: Problem, want: Want, out: Array | None, implementation: str | None
) -> tuple[Array, SoftmaxOutputs]:
    """Return the array of the shape of x that was written, and the statistics."""
    written = np.empty_like(problem.x) if out is None else problem.out(out)
    chosen = choose(problem.name, problem.call, implementation)
    return (written if out is None else out), forward_into(chosen, problem, want, written)


def _statistics(
    problem: Problem, found: SoftmaxOutputs
) -> tuple[Array | None, SoftmaxStats | None]:
    back, stats = problem.rows.rows_back, found.stats
    lse = None if found.lse is None else back(found.lse)
    return lse, None if stats is None else SoftmaxStats(back(stats.m), back(stats.log_l))


def _prepared(
    name: str, x: Array, stats: SoftmaxStats | None, options: SoftmaxOptions
) -> tuple[Problem, SoftmaxStats, Callable[..., Any]]:
    """Return the problem, its statistics, and the function that serves it."""
    shown = f"softmax_{name}"
    for option in options.keys() - SoftmaxOptions.__annotations__.keys():
        raise TypeError(f"{shown}() got an unexpected keyword argument {option!r}")
    given: dict[str, Any] = {"axis": -1, **options}
    implementation = given.pop("implementation", None)
    problem = Problem("softmax", x, **given)
    chosen = choose("softmax", problem.call, implementation, name)
    saved = chosen.forward(problem.call, Want(stats=True)).stats if stats is None else None
    return problem, saved or problem.stats(stats), getattr(chosen, name)


def _grads(problem: Problem, grads: SoftmaxGrads) -> SoftmaxGrads:
    return SoftmaxGrads(problem.rows.back(grads.dx), problem.dsink(grads.dsink))
