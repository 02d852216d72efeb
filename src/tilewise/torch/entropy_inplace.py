"""The cross-entropy whose backward pass writes the gradient of the logits over the logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function

from tilewise.base.dtypes import bfloat16
from tilewise.base.errors import unsupported, value_error
from tilewise.dispatch import DEVICE, choose
from tilewise.ops.cross_entropy import record
from tilewise.ops.cross_entropy.spec import (
    NAME,
    Cotangents,
    EntropyCall,
    EntropyStats,
    Needed,
    Options,
    Problem,
)
from tilewise.shared.rows import known_rows_in_order

from . import gpu
from .autodiff import _array, _tensor, forward, is_plain, parsed

_INPLACE = "inplace_backward=True"
Tensors = tuple[Any, ...]


def overwriting(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    axis: int,
    options: Options,
    text: str,
) -> Tensors:
    """Return loss, lse and z_loss, of which one backward pass can be taken.

    Args:
        logits: Validated logits, which require a gradient; so the next two.
        targets: Class indices or probabilities.
        weight: Weights of the classes, in the dtype of sums.
        axis: The dimension of the classes.
        options: The options of the operator.
        text: The same, and the implementation, as the text of a dictionary.

    Raises:
        ValueError: The logits are a leaf, or their memory cannot be written.
        Unsupported: There is a transform or a tracer, or the implementation does not serve the
            call.
    """
    if logits.is_leaf:
        requirement = "be False where the logits are a leaf, for it would overwrite them"
        raise value_error(NAME, "inplace_backward", requirement, "True")
    on_device = not logits.is_cpu or parsed(text)["implementation"] in DEVICE
    plain = is_plain(logits, targets, weight, anywhere=on_device)
    if _are_functorch_transforms_active() or not plain:
        raise unsupported(NAME, f"{_INPLACE} is not served under transforms and tracing")
    function = _OnDevice if on_device else _OnHost
    found: Tensors = function.apply(logits, targets, weight, axis, options, text)
    return found


def _check_backward(g: Tensors) -> None:
    if torch.is_grad_enabled():
        raise unsupported(NAME, f"there are no second derivatives with {_INPLACE}")
    if any([t is not None and is_legacy_batchedtensor(t) for t in g]):
        raise unsupported(NAME, f"there are no batched gradients with {_INPLACE}")


class _Overwriting(Function):  # type: ignore[misc]
    """What both have in common."""

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> Any:
        """Refuse: a forward mode would read what the backward overwrites."""
        raise unsupported(NAME, f"there is no forward mode with {_INPLACE}")


class _OnHost(_Overwriting):
    """The loss of logits in the memory of the CPU."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        weight: Tensor | None,
        axis: int,
        options: Options,
        text: str,
    ) -> Tensors:
        """Compute loss, lse and z_loss."""
        dtype = bfloat16(NAME) if logits.dtype is torch.bfloat16 else np.dtype(np.float32)
        x, y = _array(logits, dtype), _array(targets, dtype)
        w = None if weight is None else _array(weight, dtype)
        problem = Problem(NAME, x, y, w, axis, options.__dict__)
        problem.out(problem.logits)
        ctx.chosen = choose(NAME, problem.call, parsed(text)["implementation"], "vjp")
        loss, lse, z, ctx.stats = record.forward(ctx.chosen, problem.call)
        ctx.problem = problem
        # so that autograd sees where they were changed between the passes
        ctx.save_for_backward(logits, targets, weight)
        ctx.set_materialize_grads(False)
        if options.reduction == "none":
            loss, z = problem.rows.rows_back(loss), problem.rows.rows_back(z)
        return tuple([torch.from_numpy(x) for x in (loss, problem.rows.rows_back(lse), z)])

    @staticmethod
    def backward(ctx: Any, *g: Tensor | None) -> Tensors:
        """Write the gradient of the logits over them."""
        _check_backward(g)
        logits, *_ = ctx.saved_tensors
        problem: Problem = ctx.problem
        cotangents = [None if t is None else t.numpy(force=True) for t in g]
        if problem.call.options.reduction == "none":
            of_rows = problem.rows.of_rows
            given = Cotangents(*[None if c is None else of_rows(c) for c in cotangents])
        else:
            loss, lse, z = cotangents
            given = Cotangents(loss, None if lse is None else problem.rows.of_rows(lse), z)
        found = record.vjp_into(ctx.chosen, problem, given, ctx.stats, problem.logits)
        torch.autograd.graph.increment_version(logits)
        dtargets = None
        if found.dtargets is not None and ctx.needs_input_grad[1]:
            dtargets = _tensor(problem.rows.back(found.dtargets))
        return logits.detach(), dtargets, None, None, None, None


class _OnDevice(_Overwriting):
    """The loss of logits on a GPU, or where Triton interprets its kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        weight: Tensor | None,
        axis: int,
        options: Options,
        text: str,
    ) -> Tensors:
        """Compute loss, lse and z_loss."""
        _check_memory(logits, targets)
        rows = known_rows_in_order(tuple(logits.shape), (axis,))
        whole, q, y = _as_rows(logits, targets, rows.sizes)
        needed = (True,) * record.FLAT.results("forward")
        loss, lse, z, *stats = forward(record.FLAT, (whole, q, y, weight), text, needed)
        ctx.save_for_backward(logits, targets, weight, *stats)
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.options, ctx.text = rows, options, text
        if options.reduction == "none":
            loss, z = loss.reshape(rows.row_shape), z.reshape(rows.row_shape)
        return loss, lse.reshape(rows.row_shape), z

    @staticmethod
    def backward(ctx: Any, *g: Tensor | None) -> Tensors:
        """Write the gradient of the logits over them."""
        _check_backward(g)
        logits, targets, weight, *stats = ctx.saved_tensors
        rows, memory = ctx.rows, logits.detach()
        A, _, I = rows.sizes
        whole, q, y = _as_rows(memory, targets.detach(), rows.sizes)
        of_loss = (A, I) if ctx.options.reduction == "none" else ()
        shapes = (of_loss, (A, I), of_loss)
        given = [None if t is None else t.reshape(s) for t, s in zip(g, shapes, strict=True)]
        call: Any = EntropyCall(whole, y, q, weight, ctx.options)
        chosen = gpu.serving(record.FLAT, parsed(ctx.text)["implementation"], logits)
        needed = Needed(True, ctx.needs_input_grad[1])
        with gpu.device_of(logits):
            cotangents: Any = Cotangents(*given)
            found = record.vjp(chosen, call, cotangents, EntropyStats(*stats), needed, whole)
        if whole.data_ptr() != memory.data_ptr():
            memory.copy_(whole.reshape(memory.shape))
        torch.autograd.graph.increment_version(logits)
        dtargets: Any = found.dtargets
        if dtargets is not None:
            dtargets = dtargets.reshape(targets.shape)
        return memory, dtargets, None, None, None, None


def _as_rows(
    logits: Tensor, targets: Tensor, sizes: tuple[int, int, int]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return logits and probabilities as `(A, C, I)`, or indices as `(A, I)`."""
    A, _, I = sizes
    whole = logits.reshape(sizes)
    if targets.is_floating_point():
        return whole, targets.reshape(sizes), None
    return whole, None, targets.reshape(A, I)


def _check_memory(logits: Tensor, targets: Tensor) -> None:
    """Check that the logits can be written while the targets are read."""
    if any([n > 1 and step == 0 for n, step in zip(logits.shape, logits.stride(), strict=True)]):
        got = f"strides {logits.stride()}"
        raise value_error(NAME, "logits", f"not overlap themselves with {_INPLACE}", got)
    memory = [t.untyped_storage().data_ptr() for t in (logits, targets)]
    if memory[0] == memory[1] and logits.numel():
        raise value_error(NAME, "targets", f"not overlap logits with {_INPLACE}", "a part of it")
