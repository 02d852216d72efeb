"""Softmax, log-softmax and log-sum-exp on PyTorch tensors."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad

from tilewise.base.dtypes import NARROW, bfloat16
from tilewise.base.errors import type_error, value_error
from tilewise.dispatch import choose
from tilewise.ops.softmax.record import FLAT, KINDS, forward_into
from tilewise.ops.softmax.spec import (
    Problem,
    Rows,
    Want,
    axes_of,
    check_broadcast,
    check_temperature,
    inverse,
    known_rows_in_order,
    rows_in_order,
    sink_number,
)

from .autodiff import _array, forward, is_plain, is_traced, register
from .checks import autocast_dtype, check_device, check_first, shown

for _operator in FLAT.values():
    register(_operator)

Dim: TypeAlias = int | tuple[int, ...] | None
Mask: TypeAlias = Tensor | NDArray[np.bool_] | None

_NARROW = tuple([getattr(torch, name) for name in NARROW])
_NO_DIM: Any = object()


class SoftmaxResult(NamedTuple):
    """The softmax with its log-sum-exp.

    Attributes:
        y: Shape and dtype of x.
        lse: Shape of x without the dimensions of a row; dtype of x, at least float32.
    """

    y: Tensor
    lse: Tensor


class LogSoftmaxResult(NamedTuple):
    """The logarithm of the softmax with its log-sum-exp.

    Attributes:
        log_y: Shape and dtype of x.
        lse: Shape of x without the dimensions of a row; dtype of x, at least float32.
    """

    log_y: Tensor
    lse: Tensor


@overload
def softmax(
    x: Tensor,
    dim: Dim = ...,
    *,
    temperature: float = ...,
    where: Mask = ...,
    sink: float | Tensor | None = ...,
    out: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
    axis: Dim = ...,
) -> Tensor: ...
@overload
def softmax(
    x: Tensor,
    dim: Dim = ...,
    *,
    temperature: float = ...,
    where: Mask = ...,
    sink: float | Tensor | None = ...,
    out: Tensor | None = ...,
    return_lse: bool = ...,
    implementation: str | None = ...,
    axis: Dim = ...,
) -> Tensor | SoftmaxResult: ...
def softmax(
    x: Tensor,
    dim: Dim = -1,
    *,
    temperature: float = 1.0,
    where: Mask = None,
    sink: float | Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    axis: Dim = _NO_DIM,
) -> Tensor | SoftmaxResult:
    r"""Compute the softmax along dimensions, with derivatives of first and second order.

    `y = exp(s) / (sum exp(s) + exp(sink))` with `s = x / temperature`, the sum over the visible
    entries. A hidden entry is absent: `y = 0`, and NaN there reaches nothing. So is an entry of
    -inf. A row without entries and sink has `y = 0` and `lse = -inf`; one with NaN or inf has
    `y = NaN`.

    `y` and `lse` are differentiable with respect to x and sink, in reverse and forward mode and in
    one over the other, under every transform of `torch.func`, and inside
    `torch.compile(fullgraph=True)` and `torch.export`.

    Args:
        x: Any shape; float64, float32, bfloat16 or float16. Sums are float32 for the latter two,
            and bfloat16 needs the package ml_dtypes. Under the autocast of a GPU, and without out,
            16 bits become float32 first.
        dim: The dimension or dimensions of a row; None is all.
        temperature: From 1e-15 to 1e15. x is divided by it.
        where: Boolean tensor or array that broadcasts to the shape of x. True where an entry is
            visible.
        sink: One more logit of each row, in the denominator only: a number, or a tensor that
            broadcasts to the shape of x without the dimensions of a row, in the dtype of x, or
            float32 where that has 16 bits. -inf is none.
        out: Shape and dtype of x. Where y is written; may be x itself, and otherwise shares no
            memory with x, where and sink. Without derivatives.
        return_lse: Return also `lse = log(sum exp(s) + exp(sink))`.
        implementation: Name of the implementation, which never falls back to another; by default
            the first that serves the call.
        axis: Another name for dim.

    Returns:
        `y`, or a `SoftmaxResult` with return_lse.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, device or value.
        Unsupported: The implementation does not serve the call, or a third derivative is asked for.

    Accuracy:
        `tilewise.ops.softmax.spec.error_bound` bounds the error and derives the bound.

    Source:
        As for `tilewise.numpy.softmax`, which computes the same bits.
    """
    dim = _dim("softmax", dim, axis, -1)
    y, lse = _call("softmax", x, dim, temperature, where, sink, out, return_lse, implementation)
    return SoftmaxResult(y, lse) if return_lse else y


@overload
def log_softmax(
    x: Tensor,
    dim: Dim = ...,
    *,
    temperature: float = ...,
    where: Mask = ...,
    sink: float | Tensor | None = ...,
    out: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
    axis: Dim = ...,
) -> Tensor: ...
@overload
def log_softmax(
    x: Tensor,
    dim: Dim = ...,
    *,
    temperature: float = ...,
    where: Mask = ...,
    sink: float | Tensor | None = ...,
    out: Tensor | None = ...,
    return_lse: bool = ...,
    implementation: str | None = ...,
    axis: Dim = ...,
) -> Tensor | LogSoftmaxResult: ...
def log_softmax(
    x: Tensor,
    dim: Dim = -1,
    *,
    temperature: float = 1.0,
    where: Mask = None,
    sink: float | Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    axis: Dim = _NO_DIM,
) -> Tensor | LogSoftmaxResult:
    r"""Compute the logarithm of the softmax along dimensions, also where that underflows.

    `log_y = s - log(sum exp(s) + exp(sink))` with `s = x / temperature`; -inf where an entry is
    hidden or its row is empty. Differentiable as `softmax` is.

    Args:
        x: As for `softmax`.
        dim: As for `softmax`.
        temperature: As for `softmax`.
        where: As for `softmax`.
        sink: As for `softmax`.
        out: As for `softmax`.
        return_lse: As for `softmax`.
        implementation: As for `softmax`.
        axis: Another name for dim.

    Returns:
        `log_y`, or a `LogSoftmaxResult` with return_lse.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, device or value.
        Unsupported: The implementation does not serve the call, or a third derivative is asked for.

    Accuracy:
        `tilewise.ops.softmax.spec.error_bound` bounds the error and derives the bound.
    """
    name = "log_softmax"
    dim = _dim(name, dim, axis, -1)
    log_y, lse = _call(name, x, dim, temperature, where, sink, out, return_lse, implementation)
    return LogSoftmaxResult(log_y, lse) if return_lse else log_y


def logsumexp(
    x: Tensor,
    dim: Dim = None,
    keepdim: bool = False,
    *,
    temperature: float = 1.0,
    where: Mask = None,
    sink: float | Tensor | None = None,
    implementation: str | None = None,
    axis: Dim = _NO_DIM,
    keepdims: bool = False,
) -> Tensor:
    r"""Compute the logarithm of the sum of exponentials along dimensions.

    `lse = log(sum exp(s) + exp(sink))` with `s = x / temperature`, the sum over the visible
    entries; -inf where there are none, inf where one is inf. Differentiable as `softmax` is.

    Args:
        x: As for `softmax`.
        dim: The dimension or dimensions of a row; None is all.
        keepdim: Whether the dimensions stay, with size 1.
        temperature: As for `softmax`.
        where: As for `softmax`.
        sink: As for `softmax`.
        implementation: As for `softmax`.
        axis: Another name for dim.
        keepdims: Another name for keepdim.

    Returns:
        One number for each row; dtype of x, at least float32.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, device or value.
        Unsupported: The implementation does not serve the call, or a third derivative is asked for.

    Accuracy:
        `tilewise.ops.softmax.spec.error_bound` bounds the error and derives the bound.
    """
    name = "logsumexp"
    check_first(name, "x", x)
    rows = _rows(name, x, _dim(name, dim, axis, None))
    (lse,) = _outputs(name, x, rows, temperature, where, sink, implementation)
    lse = lse.reshape(rows.row_shape)
    if keepdim or keepdims:
        for k in rows.axes:
            lse = lse.unsqueeze(k)
    return lse


def _dim(name: str, dim: Dim, axis: Dim, default: Dim) -> Dim:
    """Return the dimensions, by whichever name they were given."""
    if axis is _NO_DIM:
        return dim
    if dim is not None and dim != default:
        raise TypeError(f"{name}() got both dim and axis")
    return axis


def _rows(name: str, x: Tensor, dim: Dim) -> Rows:
    """Return how x is seen as `(A, C, I)`."""
    # Where there are no values, sizes need not be numbers, and those cannot be looked up.
    find = rows_in_order if is_traced() else known_rows_in_order
    return find(tuple(x.shape), axes_of(name, "dim", dim, x.ndim))


def _call(
    name: str,
    x: Tensor,
    dim: Dim,
    temperature: float,
    where: Mask,
    sink: float | Tensor | None,
    out: Tensor | None,
    return_lse: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Return y or log_y, and lse where it is wanted."""
    check_first(name, "x", x)
    if out is None:
        x, sink = _autocast(x, sink)
    rows = _rows(name, x, dim)
    if out is not None:
        _check_out(name, out, x, sink)
        if is_plain(x, out, where, sink):
            return _write(name, x, rows, temperature, where, sink, out, return_lse, implementation)
    y, lse = _outputs(name, x, rows, temperature, where, sink, implementation)
    y = y.reshape([rows.shape[k] for k in rows.order])
    if not rows.in_order:
        y = y.permute(inverse(rows.order))
    if out is not None:
        y = out.copy_(y)
    return y, lse.reshape(rows.row_shape) if return_lse else None


def _autocast(x: Tensor, sink: Any) -> tuple[Tensor, Any]:
    """Cast as autocast does for torch.softmax: 16 bits to float32 on a GPU, nothing on the CPU."""
    if not x.is_cuda or autocast_dtype(x) is None:
        return x, sink
    if isinstance(sink, Tensor) and sink.dtype in _NARROW:
        sink = sink.float()
    return x.float() if x.dtype in _NARROW else x, sink


def _outputs(
    name: str,
    x: Tensor,
    rows: Rows,
    temperature: float,
    where: Mask,
    sink: float | Tensor | None,
    implementation: str | None,
) -> tuple[Tensor, ...]:
    """Return the outputs of the operator, `(A, C, I)` and `(A, I)`."""
    A, C, I = rows.sizes
    seen = None if where is None else _where(name, where, x, rows)
    logit = None if sink is None else _sink(name, sink, x, rows)
    whole = (x if rows.in_order else x.permute(rows.order)).reshape(A, C, I)
    inputs = (whole,) if seen is None and logit is None else (whole, logit, seen)
    options = f"{{'temperature': {check_temperature(name, temperature)!r}, "
    options += f"'implementation': {implementation!r}}}"
    needed = (True,) * len(FLAT[name].outputs)
    return forward(FLAT[name], inputs, options, needed)


def _where(name: str, where: Any, x: Tensor, rows: Rows) -> Tensor:
    """Return which entries are visible, with 1 in place of A, C or I over which it repeats."""
    if isinstance(where, np.ndarray):
        where = torch.from_numpy(where.copy())
    if not isinstance(where, Tensor):
        raise type_error(name, "where", "be a boolean tensor", type(where).__name__)
    if where.dtype is not torch.bool:
        raise type_error(name, "where", "have dtype bool", shown(where.dtype))
    check_device(name, "where", where, x)
    check_broadcast(name, "where", tuple(where.shape), rows.shape, "x")
    where = where.reshape((1,) * (x.ndim - where.ndim) + tuple(where.shape))
    given, grown, sizes = where.shape, [], []
    for group in (rows.outer, rows.axes, rows.inner):
        repeats = all([given[k] == 1 for k in group])
        kept = [1 if repeats else rows.shape[k] for k in group]
        grown += kept
        sizes.append(math.prod(kept))
    return where.permute(rows.order).expand(grown).reshape(sizes)


def _sink(name: str, sink: Any, x: Tensor, rows: Rows) -> Tensor:
    """Return the sink as `(A, I)` in the dtype of sums."""
    A, _, I = rows.sizes
    wide = torch.float32 if x.dtype in _NARROW else x.dtype
    if not isinstance(sink, Tensor):
        return torch.full((), sink_number(name, sink), dtype=wide, device=x.device).expand(A, I)
    if sink.dtype not in (x.dtype, wide):
        more = "" if wide is x.dtype else " or float32"
        requirement = f"have dtype {shown(x.dtype)} (from x){more}"
        raise type_error(name, "sink", requirement, shown(sink.dtype))
    check_device(name, "sink", sink, x)
    check_broadcast(name, "sink", tuple(sink.shape), rows.row_shape, "the rows")
    return sink.to(wide).expand(rows.row_shape).reshape(A, I)


def _check_out(name: str, out: Any, x: Tensor, sink: Any) -> None:
    if not isinstance(out, Tensor):
        raise type_error(name, "out", "be a torch.Tensor", type(out).__name__)
    if out.dtype is not x.dtype:
        requirement = f"have dtype {shown(x.dtype)} (from x)"
        raise type_error(name, "out", requirement, shown(out.dtype))
    check_device(name, "out", out, x)
    if out.shape != x.shape:
        requirement = f"have shape {tuple(x.shape)} (from x)"
        raise value_error(name, "out", requirement, tuple(out.shape))
    moved = any([isinstance(t, Tensor) and _is_differentiated(t) for t in (x, sink, out)])
    if moved or _are_functorch_transforms_active():
        raise value_error(name, "out", "be None where a derivative may be asked for", "a tensor")


def _is_differentiated(tensor: Tensor) -> bool:
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None


def _write(
    name: str,
    x: Tensor,
    rows: Rows,
    temperature: float,
    where: Mask,
    sink: float | Tensor | None,
    out: Tensor,
    return_lse: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Write y or log_y into the memory of a tensor."""
    dtype = bfloat16(name) if x.dtype is torch.bfloat16 else np.dtype(np.float32)
    given, written, visible, logit = (
        _array(t, dtype) if isinstance(t, Tensor) else t for t in (x, out, where, sink)
    )
    problem = Problem(name, given, rows.axes, temperature, visible, logit)
    target = problem.out(written)
    want = Want(KINDS[name] == "y", KINDS[name] == "log_y", return_lse)
    chosen = choose(name, problem.call, implementation)
    found = forward_into(chosen, problem, want, target)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out, None if found.lse is None else torch.from_numpy(problem.rows.rows_back(found.lse))
