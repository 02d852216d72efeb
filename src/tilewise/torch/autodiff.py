"""The door of every operator to PyTorch: derivatives, transforms and tracing, without its maths.

An operator is four functions of arrays. Each is an op of PyTorch's dispatcher, and `Door` makes the
four differentiable by one another. Because the Hessian H of `<c, f(x)>` is symmetric, they are
closed under differentiation up to the second order:

    function  value           reverse mode, output cotangent g              forward mode
    forward   f(x)            x: J'g = vjp                                  jvp
    vjp       J'c             c: J g = jvp      x: H(c) g = vjp_jvp         vjp_jvp
    jvp       J t             t: J'g = vjp      x: H(g) t = vjp_jvp         in t: jvp
    vjp_jvp   J'tc + H(c) t   tc: J g = jvp     t: H(c) g = vjp_jvp         in tc, t: vjp_jvp

What is missing in the table needs third derivatives, or the second derivative of f itself.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd import Function, forward_ad

from tilewise.base.dtypes import bfloat16, is_bfloat16
from tilewise.base.errors import unsupported
from tilewise.base.operator import KINDS, FlatOperator
from tilewise.dispatch import DEVICE, evaluate

from . import gpu

try:
    from torch._C import (
        _are_functorch_transforms_active,
        _AutoDispatchBelowAutograd,
        _get_tracing_state,
        _len_torch_dispatch_stack,
    )
    from torch._C._functorch import is_legacy_batchedtensor, unwrap_if_dead

    forward_ad._current_level  # noqa: B018, whether it is there
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"tilewise.torch needs PyTorch 2.6 or later and its internals, got {torch.__version__}"
    ) from error

_PLAIN = (torch.Tensor, torch.nn.Parameter)
Tensors = tuple[Any, ...]

_library = torch.library.Library("tilewise", "DEF")
_kernels: dict[tuple[str, str], Kernel] = {}


@dataclass(frozen=True, eq=False)
class Kernel:
    """One of the four functions of an operator, and its op `tilewise::<operator>_<kind>`."""

    operator: FlatOperator
    kind: str

    @cached_property
    def op(self) -> Any:
        """Return the op."""
        return getattr(torch.ops.tilewise, f"{self.operator.name}_{self.kind}").default

    @cached_property
    def results(self) -> int:
        """Return how many results it has."""
        return self.operator.results(self.kind)

    def other(self, kind: str) -> Kernel:
        """Return another function of the same operator."""
        return _kernels[self.operator.name, kind]

    def split(self, flat: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Cut a flat list of arguments into groups, with the inputs that were left out as None."""
        if self.kind == "forward":
            flat = (*flat, *(None,) * (len(self.operator.inputs) - len(flat)))
        return self.operator.split(self.kind, flat)

    def complete(self, needed: tuple[bool, ...], *, narrow: bool) -> tuple[bool, ...]:
        """Return which results are needed, with the residuals that were left out.

        Args:
            needed: Which results are needed.
            narrow: Whether those that there are only with 16 bits are needed.
        """
        missing = self.results - len(needed)
        if missing == 0:
            return needed
        last = self.operator.narrow_residuals
        return needed + (True,) * (missing - last) + (narrow,) * last

    @cached_property
    def first(self) -> int:
        """Return where the inputs of the operator begin among the arguments."""
        return self.operator.first[self.kind]

    def first_input(self, tensors: Tensors) -> Any:
        """Return the first input of the operator among the arguments."""
        return tensors[self.first]


def register(operator: FlatOperator) -> None:
    """Define the four ops of an operator.

    Each takes the options as a Python literal, which results are needed, and the flat tensors. A
    result that is not needed is an empty tensor, because an op cannot return None.
    """
    for kind in KINDS:
        kernel = _kernels[operator.name, kind] = Kernel(operator, kind)
        name = f"{operator.name}_{kind}"
        tensors = "".join([f", Tensor? {argument}" for argument in operator.arguments(kind)])
        results = ", ".join(["Tensor"] * kernel.results)
        schema = f"{name}(str options, bool[] needed{tensors}) -> ({results})"
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        for key in ("CPU", "CUDA"):
            _library.impl(name, _bound(_run, kernel), key)
        # Graphs that call the op itself, as torch.export makes them, stay differentiable.
        for key in ("Autograd", "FuncTorchDynamicLayerFrontMode"):
            _library.impl(name, _bound(_differentiable, kernel), key)
        torch.library.register_fake(f"tilewise::{name}", _bound(_fake, kernel), lib=_library)


def forward(
    operator: FlatOperator, inputs: Sequence[Any], options: str, needed: tuple[bool, ...]
) -> Tensors:
    """Return the outputs of an operator, differentiable; None where they are not needed.

    Args:
        operator: A registered operator.
        inputs: Its inputs, tensors or None; trailing ones may be left out.
        options: The other options as the text of a dictionary.
        needed: Which outputs are needed.
    """
    out: Tensors
    if torch.compiler.is_compiling():
        out = _apply(operator.name, "forward", options, needed, *inputs)
    else:
        out = Door.apply(_kernels[operator.name, "forward"], options, needed, *inputs)
    return out[: len(needed)]


def is_traced() -> bool:
    """Return whether what happens now is written into a graph, or has no values."""
    return bool(torch.compiler.is_compiling() or _len_torch_dispatch_stack() > 0)


def is_plain(*given: Any, anywhere: bool = False) -> bool:
    """Return whether the memory of tensors can be read and written here and now.

    With `anywhere` it may be that of a GPU.
    """
    if is_traced():
        return False
    tensors = [t for t in given if isinstance(t, torch.Tensor)]
    return all([type(t) in _PLAIN and (t.is_cpu or anywhere) and not t.is_neg() for t in tensors])


def _bound(run: Callable[..., Tensors], kernel: Kernel) -> Callable[..., Any]:
    """Return the implementation of an op; no result is None, and one alone is no tuple."""

    def implementation(options: str, needed: Sequence[bool], *tensors: Any) -> Any:
        out = run(kernel, options, tuple(needed), *tensors)
        first = kernel.first_input(tensors)
        out = tuple([first.new_empty(0) if t is None else t for t in out])
        return out if len(out) > 1 else out[0]

    return implementation


@lru_cache(maxsize=256)
def parsed(options: str) -> Mapping[str, Any]:
    """Return options from their text."""
    found: Mapping[str, Any] = literal_eval(options)
    return found


def _run(kernel: Kernel, options: str, needed: tuple[bool, ...], *tensors: Any) -> Tensors:
    """Run a function on the memory of the tensors; None stands for a result that is not needed."""
    first, given = tensors[kernel.first], parsed(options)
    if not first.is_cpu or given["implementation"] in DEVICE:
        return gpu.run(kernel.operator, kernel.kind, given, needed, tensors)
    arrays, make = as_arrays(kernel.operator.name, first.dtype, tensors)
    out = evaluate(kernel.operator, kernel.kind, arrays, given, needed)
    return tuple([make(a) if wanted else None for a, wanted in zip(out, needed, strict=True)])


def as_arrays(
    name: str, dtype: torch.dtype, tensors: Sequence[Any]
) -> tuple[list[Any], Callable[[Any], Any]]:
    """Return the memory of plain tensors as arrays, and what makes tensors of arrays.

    Args:
        name: Name of the operator, for the error text.
        dtype: That of the call; bfloat16 needs a package.
        tensors: Tensors, or None, which stays None.
    """
    if dtype is not torch.bfloat16:
        return [t if t is None else t.numpy(force=True) for t in tensors], torch.from_numpy
    narrow = bfloat16(name)
    return [t if t is None else _array(t, narrow) for t in tensors], _tensor


def _array(tensor: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the memory of a tensor as an array, also that of bfloat16, which NumPy lacks."""
    if tensor.dtype is not torch.bfloat16:
        array: NDArray[Any] = tensor.numpy(force=True)
        return array
    bits: NDArray[Any] = tensor.detach().view(torch.int16).numpy(force=True)
    return bits.view(dtype)


def _tensor(array: Any) -> Any:
    if not is_bfloat16(array.dtype):
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def _fake(kernel: Kernel, options: str, needed: tuple[bool, ...], *tensors: Any) -> Tensors:
    """Return tensors of the right shapes without values."""
    operator, first = kernel.operator, kernel.first_input(tensors)
    inputs = tensors if kernel.kind == "forward" else kernel.split(tensors)[-3]
    if kernel.kind in ("forward", "jvp"):
        extra = first.ndim - operator.rank
        given = [None if t is None else tuple(t.shape[extra:]) for t in inputs]
        leading = tuple(first.shape[:extra])
        shapes = [leading + shape for shape in operator.shapes(given, parsed(options))]
        wide = torch.float32 if _is_narrow(first) else first.dtype
        dtypes = [first.dtype] * operator.narrow_outputs
        dtypes += [wide] * (len(shapes) - len(dtypes))
        for i, name in enumerate((*operator.outputs, *operator.residuals)):
            source = operator.dtypes.get(name)
            if source is not None:
                dtypes[i] = _dtype_of(source, operator, inputs)
        shapes, dtypes = shapes[: kernel.results], dtypes[: kernel.results]
    else:
        like = inputs[: operator.active_inputs]
        shapes = [() if t is None else tuple(t.shape) for t in like]
        dtypes = [first.dtype if t is None else t.dtype for t in like]
    results = zip(shapes, dtypes, needed, strict=True)
    return tuple([first.new_empty(s, dtype=d) if wanted else None for s, d, wanted in results])


def _dtype_of(source: str, operator: FlatOperator, inputs: Tensors) -> torch.dtype:
    """Return a dtype by its name, or by that of an input."""
    if source not in operator.inputs:
        return getattr(torch, source)
    tensor = inputs[operator.inputs.index(source)]
    return (inputs[0] if tensor is None else tensor).dtype


def _is_narrow(tensor: Any) -> bool:
    return bool(tensor.dtype.itemsize == 2)


def _differentiable(
    kernel: Kernel, options: str, needed: tuple[bool, ...], *tensors: Any
) -> Tensors:
    """Call an op from within a graph."""
    out: Tensors
    if kernel.operator.kept_gradients:
        # A graph has all results, also those that the shortest way hands over later.
        out = super(Door, Door).apply(kernel, options, needed, *tensors)
    else:
        out = Door.apply(kernel, options, needed, *tensors)
    return out


class Door(Function):  # type: ignore[misc]
    """The four functions as one differentiable function of (kernel, options, needed, tensors)."""

    @classmethod
    def apply(cls, kernel: Kernel, options: str, needed: tuple[bool, ...], *given: Any) -> Any:
        """Call the function by the shortest way on which nothing is lost.

        Residuals need not be in needed, and are not always returned then.
        """
        if _get_tracing_state() is not None:
            reason = "torch.jit.trace is not served; use torch.export"
            raise unsupported(kernel.operator.name, reason)
        if _are_functorch_transforms_active():
            needed = kernel.complete(needed, narrow=_is_narrow(kernel.first_input(given)))
            given = _complete(kernel, given)
            return super().apply(kernel, options, needed, *given)
        differentiable = forward_ad._current_level >= 0
        eager = not _len_torch_dispatch_stack()
        # What is_grads_batched batches looks like a plain tensor, and is never an input.
        batched = kernel.kind != "forward"
        tensors = []
        for t in given:
            if t is not None:
                t = unwrap_if_dead(t)
                if (
                    type(t) not in _PLAIN
                    or not (t.is_cpu or t.is_cuda)
                    or (batched and is_legacy_batchedtensor(t))
                ):
                    eager = False
                elif t.requires_grad and not differentiable:
                    differentiable = torch.is_grad_enabled()
            tensors.append(t)
        if not eager:
            needed = kernel.complete(needed, narrow=_is_narrow(kernel.first_input(given)))
            given = _complete(kernel, tensors)
            return super().apply(kernel, options, needed, *given)
        if not differentiable:
            return _run(kernel, options, kernel.complete(needed, narrow=False), *tensors)
        return _apply_eagerly(kernel, options, needed, *tensors)

    @staticmethod
    def forward(kernel: Kernel, options: str, needed: tuple[bool, ...], *tensors: Any) -> Tensors:
        """Call the op, below autograd."""
        with _AutoDispatchBelowAutograd():
            out = kernel.op(options, needed, *tensors)
        out = out if len(needed) > 1 else (out,)
        return _only(out, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        """Save what derivatives read."""
        kernel, options, needed, *tensors = inputs
        saved = _save(ctx, kernel, options, needed, tuple(tensors), output, output)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *g: Any) -> tuple[Any, ...]:
        """Apply the reverse mode of the table."""
        kernel: Kernel = ctx.kernel
        operator, kind = kernel.operator, kernel.kind
        given, base = _saved(kernel, ctx.saved_tensors)
        *want, want_x = _wanted(kernel, ctx.needs_input_grad[3:])
        zero, every = (None,) * operator.active_outputs, (True,) * operator.active_outputs

        def call(kind: str, needed: Sequence[bool], *groups: Sequence[Any]) -> Tensors:
            if not (any(needed) and _some(g)):
                return (None,) * len(needed)
            arguments = chain(*groups, base)
            out: Tensors = _apply(operator.name, kind, ctx.options, tuple(needed), *arguments)
            return out

        if kind == "forward":
            grads: tuple[Any, ...] = call("vjp", want_x, g[: operator.active_outputs])
        elif kind == "vjp":
            (c,), (want_c,) = given, want
            jg = call("jvp", every if any(want_c + want_x) else want_c, g)
            grads = (*_only(jg, want_c), *call("vjp_jvp", want_x, zero, g, c, jg))
        elif kind == "jvp":
            (jt, t), (want_t,) = given, want
            grads = (*call("vjp", want_t, g), *call("vjp_jvp", want_x, zero, t, g, jt))
        else:
            (_, _, c, _), (want_tc, want_t, want_c, _) = given, want
            if _some(g) and any(want_c + want_x):
                raise unsupported(operator.name, "third derivatives are not provided")
            jg = call("jvp", every if any(want_tc + want_t) else want_tc, g)
            grads = (*_only(jg, want_tc), *call("vjp_jvp", want_t, zero, g, c, jg))
        grads = (None, None, None, *grads)
        arguments = len(ctx.needs_input_grad)
        return grads[:arguments] + (None,) * (arguments - len(grads))

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> Tensors:
        """Apply the forward mode of the table."""
        kernel: Kernel = ctx.kernel
        operator, kind, needed = kernel.operator, kernel.kind, ctx.needed
        # The primal alone: with its tangent, a later backward would ask for another order.
        saved = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
        given, base = _saved(kernel, saved)
        groups = kernel.split(dots[3:])
        dot_x = groups[0 if kind == "forward" else -3]
        if kind == "forward":
            kind, needed = "jvp", needed[: operator.active_outputs]
            moved: list[Any] = [dot_x[: operator.active_inputs]]
        elif kind == "vjp" and _some(dot_x):
            kind, (dot_c, _, dot_y, _) = "vjp_jvp", groups
            moved = [dot_c, dot_x[: operator.active_inputs], given[0], _all_or_none(dot_y)]
        elif _some(dot_x) or (kind == "vjp_jvp" and _some(groups[2])):
            raise unsupported(operator.name, f"forward mode over {kind} is not provided")
        elif kind == "vjp_jvp":
            dot_tc, dot_t, _, dot_ty, *_ = groups
            moved = [dot_tc, dot_t, given[2], _all_or_none(dot_ty)]
        else:
            moved = [groups[0]]
        out = Door.apply(kernel.other(kind), ctx.options, needed, *chain(*moved, base))
        return (*out, *(None,) * (ctx.results - len(out)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *call: Any) -> tuple[Tensors, tuple[Any, ...]]:
        """Give every tensor the same further leading dimension, over which the function loops."""
        tensors = []
        for t, dim in zip(call[3:], in_dims[3:], strict=True):
            if t is not None:
                t = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            tensors.append(t)
        out = Door.apply(*call[:3], *tensors)
        return out, tuple([None if t is None else 0 for t in out])


class _EagerDoor(Function):  # type: ignore[misc]
    """The door for plain tensors outside of all transforms, which needs no dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, options: str, needed: tuple[bool, ...], *tensors: Any
    ) -> Tensors:
        """Run the function."""
        every = kernel.complete(needed, narrow=_is_narrow(kernel.first_input(tensors)))
        out = _run(kernel, options, every, *tensors)
        kept = kernel.operator.kept_gradients if kernel.kind == "forward" else 0
        if kept:
            # Not saved, so that they can be handed over, for those who get them may change them.
            ctx.gradients = out[-kept:]
            out = (*out[:-kept], *(None,) * kept)
        returned = out[: len(needed)]
        saved = _save(ctx, kernel, options, needed, tensors, out, returned)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*saved)
        return returned

    @staticmethod
    def backward(ctx: Any, *g: Any) -> tuple[Any, ...]:
        """Hand over the gradients that were kept, or apply the reverse mode of the table."""
        kept = _taken(ctx, g)
        if kept is None:
            return Door.backward(ctx, *g)
        return (None, None, None, *kept, *(None,) * (len(ctx.needs_input_grad) - 3 - len(kept)))

    jvp = Door.jvp


# Function.apply itself inspects the signature of forward, which takes 9 us a call.
_apply_eagerly = super(Function, _EagerDoor).apply


def _call(name: str, kind: str, options: str, needed: tuple[bool, ...], *tensors: Any) -> Any:
    return Door.apply(_kernels[name, kind], options, needed, *tensors)


# torch.compile puts the call into its graph whole; what it traces through it sees no Function.
_apply = torch.compiler.allow_in_graph(_call)


def _taken(ctx: Any, g: Sequence[Any]) -> Tensors | None:
    """Return the gradients that a forward pass kept, times a cotangent, where they are all."""
    kept, ctx.gradients = getattr(ctx, "gradients", None), None
    first, *others = g[: ctx.kernel.operator.active_outputs]
    if kept is None or first is None or _some(others) or torch.is_grad_enabled():
        return None
    wanted = ctx.needs_input_grad[3 : 3 + len(kept)]
    if any([want and grad is None for want, grad in zip(wanted, kept, strict=True)]):
        return None
    if type(first) not in _PLAIN or is_legacy_batchedtensor(first):
        return None
    ctx.saved_tensors  # noqa: B018, raises where one was changed, or the graph is gone
    factor = first.item()
    if factor != 1:
        kept = tuple([None if grad is None else grad.mul_(factor) for grad in kept])
    return tuple([grad if want else None for grad, want in zip(kept, wanted, strict=True)])


def _complete(kernel: Kernel, tensors: Sequence[Any]) -> Tensors:
    """Return the arguments of a call with the inputs that were left out."""
    if kernel.kind != "forward":
        return tuple(tensors)
    return (*tensors, *(None,) * (len(kernel.operator.inputs) - len(tensors)))


def _save(
    ctx: Any,
    kernel: Kernel,
    options: str,
    needed: tuple[bool, ...],
    tensors: Tensors,
    out: Tensors,
    returned: Tensors,
) -> Tensors:
    """Save what derivatives read, nothing but arguments and results, and return it."""
    ctx.kernel, ctx.options, ctx.needed, ctx.results = kernel, options, needed, len(returned)
    if kernel.kind == "forward":
        active = kernel.operator.active_outputs
        passive = [t for t in returned[active:] if t is not None]
        if passive:
            ctx.mark_non_differentiable(*passive)
        read = _only(out[:active], kernel.operator.reads)
        tensors += read + out[len(kernel.operator.outputs) :]
    elif kernel.kind == "jvp":
        tensors = _only(out, (kernel.operator.output_tangents,) * len(out)) + tensors
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    return tensors


def _saved(kernel: Kernel, tensors: Sequence[Any]) -> tuple[list[Tensors], Tensors]:
    """Cut what a call saved into the groups that are its own, and those that all functions take."""
    operator = kernel.operator
    results = operator.active_outputs + len(operator.residuals)
    if kernel.kind == "forward":
        inputs = _complete(kernel, tensors[:-results])
        return [], (*inputs, *tensors[-results:])
    own: list[Tensors] = []
    if kernel.kind == "jvp":
        y = operator.active_outputs
        own, tensors = [tuple(tensors[:y])], tensors[y:]
    *given, _, _, _ = kernel.split(tensors)
    return own + given, tuple(tensors[operator.first[kernel.kind] :])


def _wanted(kernel: Kernel, flags: Sequence[bool]) -> list[tuple[bool, ...]]:
    """Return which gradients are wanted: those of the own groups, then of the active inputs."""
    groups = kernel.split(flags)
    own, inputs = ([], groups[0]) if kernel.kind == "forward" else (groups[:-3], groups[-3])
    return [*own, tuple([bool(flag) for flag in inputs[: kernel.operator.active_inputs]])]


def _some(tensors: Sequence[Any]) -> bool:
    return any([t is not None for t in tensors])


def _only(tensors: Tensors, wanted: Sequence[bool]) -> Tensors:
    return tuple([t if want else None for t, want in zip(tensors, wanted, strict=True)])


def _all_or_none(tensors: Tensors) -> Tensors:
    """Return tangents of outputs where all are known; otherwise they are computed."""
    return tensors if all([t is not None for t in tensors]) else (None,) * len(tensors)
