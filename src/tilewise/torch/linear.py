"""The linear map on PyTorch tensors, by PyTorch's own products, and accumulated gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import Function, forward_ad

from tilewise.base.dtypes import FLOATS, listed
from tilewise.base.errors import type_error, unsupported, value_error
from tilewise.ops.linear.spec import NAME, accumulator_dtypes, check_sizes

from .checks import autocast, check_accumulator, shown

_DTYPES = tuple([getattr(torch, name) for name in FLOATS])

# Entries of the columns of dy that are widened at a time, where the accumulator is wider.
_WIDENED = 1 << 22
_LEAST_ROWS = 64


def linear(
    x: Tensor, w: Tensor, bias: Tensor | None = None, *, grad_accumulator: Tensor | None = None
) -> Tensor:
    r"""Compute `y = x w^T + bias`, as `torch.nn.functional.linear` does, with derivatives.

    The gradients are `dx = dy w`, `dw = dy^T x` and `dbias = sum dy`, where the leading dimensions
    are one. They are such products themselves, so there is a derivative of every order, in reverse
    and forward mode, under every transform of `torch.func` and inside `torch.compile`.

    With `grad_accumulator` a backward pass adds the gradient of w to that tensor in one product,
    as Megatron does with `main_grad`, and w gets none: `w.grad` stays as it is. No temporary of the
    size of w is made. The tensor may be float32 where w has 16 bits; then each term of the sum
    has the digits of float32, however many backward passes add to it.

    Args:
        x: `(..., C)`, float64, float32, bfloat16 or float16, on any device. Under autocast it is
            cast as there, and so are w and bias.
        w: `(V, C)`, dtype of x.
        bias: `(V,)`, dtype of x, or None.
        grad_accumulator: `(V, C)`, contiguous, dtype of w, or float32 or float64 where that is
            wider. Written to by each backward pass in which w requires a gradient.

    Returns:
        y: `(..., V)`, dtype of x.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape, device or memory.
        Unsupported: With `grad_accumulator`: a transform of `torch.func`, or a backward pass that
            is itself to be differentiated.

    Accuracy:
        `tilewise.ops.linear.spec.error_bound`, which does not depend on the order of sums.
    """
    x, w, bias = autocast(x, w, bias)
    _check(x, w, bias)
    if grad_accumulator is not None:
        return _accumulating(x, w, bias, grad_accumulator)
    if torch.compiler.is_compiling():
        return torch.nn.functional.linear(x, w, bias)
    y: Tensor = _Linear.apply(x, w, bias)
    return y


class _Linear(Function):  # type: ignore[misc]
    """The linear map; its derivatives are linear maps, so that they have derivatives too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """Compute y."""
        return torch.nn.functional.linear(x, w, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x and w."""
        x, w, _ = inputs
        ctx.save_for_backward(x, w)
        ctx.save_for_forward(x, w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients."""
        x, w = ctx.saved_tensors
        want_x, want_w, want_bias = ctx.needs_input_grad
        dx = _Linear.apply(dy, w.mT, None) if want_x else None
        dw = _Linear.apply(_flat(dy).mT, _flat(x).mT, None) if want_w else None
        return dx, dw, _flat(dy).sum(0) if want_bias else None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, tbias: Tensor | None) -> Tensor:
        """Compute the tangent of y."""
        x, w = ctx.saved_tensors
        parts = []
        if tx is not None:
            parts.append(_Linear.apply(tx, w, None))
        if tw is not None:
            parts.append(_Linear.apply(x, tw, None))
        if tbias is not None:
            parts.append(tbias.expand(*x.shape[:-1], len(w)).clone())
        ty: Tensor = sum(parts[1:], start=parts[0])
        return ty


class _Accumulating(Function):  # type: ignore[misc]
    """The linear map whose backward pass adds the gradient of the weight to a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, accumulator: Tensor) -> Tensor:
        """Compute y."""
        ctx.save_for_backward(x, w)
        # Not saved: it is no input of the maths, and other layers write to it meanwhile.
        ctx.accumulator = accumulator
        return torch.nn.functional.linear(x, w, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x and bias, and add that of w."""
        x, w = ctx.saved_tensors
        moved = any([forward_ad.unpack_dual(t).tangent is not None for t in (x, w, dy)])
        if torch.is_grad_enabled() or moved:
            reason = "with grad_accumulator there is no derivative of a backward pass"
            raise unsupported(NAME, f"{reason} (create_graph=True)")
        want_x, want_w, want_bias, _ = ctx.needs_input_grad
        if want_w:
            accumulate(ctx.accumulator, _flat(dy), _flat(x))
        dx = torch.nn.functional.linear(dy, w.mT) if want_x else None
        return dx, None, _flat(dy).sum(0) if want_bias else None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _accumulating(x: Tensor, w: Tensor, bias: Tensor | None, accumulator: Tensor) -> Tensor:
    if _are_functorch_transforms_active():
        raise unsupported(NAME, "grad_accumulator goes with no transform of torch.func")
    check_accumulator(NAME, accumulator, "w", w, accumulator_dtypes(shown(w.dtype)))
    tensors = [t for t in (x, w, bias) if t is not None]
    if any([forward_ad.unpack_dual(t).tangent is not None for t in tensors]):
        raise unsupported(NAME, "grad_accumulator goes with no tangents")
    y: Tensor = _Accumulating.apply(x, w, bias, accumulator)
    return y


def accumulate(accumulator: Tensor, dy: Tensor, x: Tensor) -> None:
    """Add `dy^T x` to a tensor without a temporary of its size.

    Where the dtypes are the same, that is one product of PyTorch. For an accumulator of more bits x
    is widened, and dy by blocks of columns, so that products and sums are those of its dtype.

    Args:
        accumulator: `(V, C)`, contiguous.
        dy: `(T, V)`.
        x: `(T, C)`, dtype of dy.
    """
    if accumulator.dtype is x.dtype:
        accumulator.addmm_(dy.mT, x)
        return
    wide = x.to(accumulator.dtype)
    rows = max(_LEAST_ROWS, _WIDENED // max(1, len(dy)))
    for start in range(0, len(accumulator), rows):
        columns = dy[:, start : start + rows].to(accumulator.dtype)
        accumulator[start : start + rows].addmm_(columns.mT, wide)


def _flat(t: Tensor) -> Tensor:
    """Return a tensor with all but its last dimension as one."""
    # Not by flatten, which has no rule for the batches of is_grads_batched.
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _check(x: Any, w: Any, bias: Any) -> None:
    for name, t in (("x", x), ("w", w), ("bias", bias)):
        if t is None and name == "bias":
            continue
        if not isinstance(t, Tensor):
            raise type_error(NAME, name, "be a torch.Tensor", type(t).__name__)
        if t.is_nested or t.layout is not torch.strided:
            got = "a nested tensor" if t.is_nested else str(t.layout)
            raise type_error(NAME, name, "be a dense tensor", got)
        if name == "x" and t.dtype not in _DTYPES:
            raise type_error(NAME, name, f"have dtype {listed(FLOATS)}", shown(t.dtype))
        if t.dtype is not x.dtype:
            requirement = f"have dtype {shown(x.dtype)} (from x)"
            raise type_error(NAME, name, requirement, shown(t.dtype))
        if t.device != x.device:
            raise value_error(NAME, name, f"be on {x.device} (as x)", str(t.device))
    check_sizes(tuple(x.shape), tuple(w.shape), None if bias is None else tuple(bias.shape))
