"""The linear cross-entropy whose backward pass adds the gradient by weight to a tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import Function, forward_ad

from tilewise.base.dtypes import NARROW
from tilewise.base.errors import unsupported
from tilewise.dispatch import DEVICE, choose
from tilewise.ops.linear_cross_entropy.record import FLAT, cotangent_call, prepare_flat
from tilewise.ops.linear_cross_entropy.spec import NAME, Needed

from .autodiff import as_arrays, forward, is_plain, parsed
from .checks import check_accumulator, shown

Tensors = tuple[Any, ...]

_PLAIN_ALONE = "grad_accumulator goes with plain tensors of the CPU alone"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def accumulating(accumulator: Tensor, inputs: Tensors, options: str, *, argmax: bool) -> Tensors:
    """Return loss, lse, entropy and argmax, whose backward pass adds to a tensor.

    Args:
        accumulator: `(V, C)`, dtype of weight, or float32 where that has 16 bits.
        inputs: Validated hidden `(T, C)`, weight, bias, targets and class_weight.
        options: The options of the operator as the text of a dictionary.
        argmax: Whether the argmax is needed.

    Raises:
        TypeError: The accumulator has a wrong kind or dtype.
        ValueError: It has a wrong shape, device or memory.
        Unsupported: A transform of `torch.func`, tangents, or tensors that are not plain ones of
            the CPU.
    """
    if _are_functorch_transforms_active():
        raise unsupported(NAME, "grad_accumulator goes with no transform of torch.func")
    weight, dtype = inputs[1], shown(inputs[1].dtype)
    allowed = (dtype, "float32") if dtype in NARROW else (dtype,)
    check_accumulator(NAME, accumulator, "weight", weight, allowed)
    tensors = [t for t in inputs if t is not None]
    if any([forward_ad.unpack_dual(t).tangent is not None for t in tensors]):
        raise unsupported(NAME, "grad_accumulator goes with no tangents")
    if not is_plain(accumulator, *tensors) or parsed(options)["implementation"] in DEVICE:
        raise unsupported(NAME, _PLAIN_ALONE)
    found: Tensors = _Accumulating.apply(*inputs, accumulator, options, argmax)
    return found


class _Accumulating(Function):  # type: ignore[misc]
    """The operator of first order, of which a backward pass returns all but one gradient."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensors:
        """Compute loss, lse, entropy and argmax."""
        *inputs, accumulator, options, argmax = given
        needed = (True, True, True, argmax, True, True, False, False, False)
        *outputs, m, log_l, _, _, _ = forward(FLAT, inputs, options, needed)
        ctx.save_for_backward(*inputs, *outputs[:3], m, log_l)
        # Not saved: it is no input of the maths, and other layers write to it meanwhile.
        ctx.accumulator, ctx.options = accumulator, parsed(options)
        if argmax:
            ctx.mark_non_differentiable(outputs[3])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Tensors:
        """Compute the gradients by hidden and bias, and add that by weight."""
        saved = ctx.saved_tensors
        dots = [t for t in (*saved, *g) if t is not None]
        moved = any([forward_ad.unpack_dual(t).tangent is not None for t in dots])
        if torch.is_grad_enabled() or moved:
            reason = "with grad_accumulator there is no derivative of a backward pass"
            raise unsupported(NAME, f"{reason} (create_graph=True)")
        if not is_plain(*dots):
            raise unsupported(NAME, _PLAIN_ALONE)
        given = (*saved, *g[:3], ctx.accumulator)
        arrays, make = as_arrays(NAME, saved[0].dtype, given)
        inputs, outputs, stats = arrays[:5], tuple(arrays[5:8]), arrays[8:10]
        cotangents, accumulator = tuple(arrays[10:13]), arrays[13]
        call = prepare_flat(inputs, ctx.options)
        chosen = choose(NAME, call, ctx.options["implementation"], "vjp")
        needed = Needed(*ctx.needs_input_grad[:3])
        into = replace(
            cotangent_call(chosen, call, cotangents, outputs, stats), accumulator=accumulator
        )
        dhidden, _, dbias = chosen.vjp(call, into, needed)
        grads = [None if a is None else make(a) for a in (dhidden, None, dbias)]
        return (*grads, *(None,) * (len(ctx.needs_input_grad) - len(grads)))
