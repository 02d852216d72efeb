"""Runs operators on tensors of a GPU, or of the CPU where Triton interprets its kernels.

A call is validated where all calls are, in its specification, on arrays that stand in for the
tensors: of the same shapes, strides and dtypes, in memory that is only ever reserved. What the
kernels get is the validated call with the tensors in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from typing import Any
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray

from tilewise.base._lowering import Size
from tilewise.base.dtypes import bfloat16
from tilewise.base.errors import unsupported
from tilewise.base.literals import DENSE
from tilewise.base.masks import PackedBits, check_dense
from tilewise.base.operator import FlatOperator, Implementation
from tilewise.dispatch import DEVICE, TABLE, device_implementation, evaluate_by
from tilewise.ops.attention.spec import PACKED
from tilewise.shared import stand_ins

Array = NDArray[Any]
Tensors = tuple[Any, ...]

_uploads: dict[tuple[int, torch.device], tuple[ref[Any], Any]] = {}


@cache
def missing() -> str | None:
    """Return why no kernel can run on a GPU here, or None where one can."""
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU, or was built without CUDA"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def run(
    operator: FlatOperator,
    kind: str,
    options: Mapping[str, Any],
    needed: tuple[bool, ...],
    tensors: Sequence[Any],
) -> Tensors:
    """Run one function of an operator, as `tilewise.dispatch.evaluate` does on arrays.

    Args:
        operator: The operator.
        kind: forward, vjp, jvp or vjp_jvp.
        options: What else the call takes.
        needed: Which results are needed; None stands for the others.
        tensors: Its flat arguments, with trailing inputs of a forward pass perhaps left out.
    """
    first = tensors[operator.first[kind]]
    name = implementation_for(operator, options["implementation"], first)
    given = [None if t is None else readable(t, operator) for t in tensors]
    one = partial(_run_one, operator, kind, name, options, needed)
    extra = first.ndim - operator.rank
    with device_of(first):
        if extra == 0:
            return one(given)
        leading, stage = first.shape[:extra], Stage(first.device)
        if operator.folds(kind, [stage.stand_in(t) for t in given], options) and 0 not in leading:
            merged = [None if t is None else t.reshape(-1, *t.shape[extra + 1 :]) for t in given]
            return tuple([None if r is None else _unfolded(r, leading) for r in one(merged)])
        return _each(operator, one, given, leading)


def serving(operator: FlatOperator, implementation: str | None, first: Any) -> Implementation:
    """Return the implementation on tensors that serves calls with such a first input.

    Raises:
        Unsupported: There is none, or the one that is named computes elsewhere.
    """
    return device_implementation(operator.name, implementation_for(operator, implementation, first))


def device_of(tensor: Any) -> AbstractContextManager[Any]:
    """Make the GPU of a tensor the one on which kernels are launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def adapted(
    operator: str,
    implementation: Implementation,
    to_tensor: Callable[[Array], Any],
    to_array: Callable[[Any], Array | None],
) -> Implementation:
    """Return an implementation on tensors as one that takes and returns arrays.

    Args:
        operator: Name of the operator.
        implementation: Takes calls whose arrays are tensors.
        to_tensor: What to give it for an array of a call.
        to_array: What to return for a tensor of its results.
    """
    return stand_ins.adapted(operator, implementation, torch.Tensor, to_tensor, to_array)


class Stage(stand_ins.Stage):
    """Arrays that stand in for the tensors of one call, and the way back to the tensors.

    Args:
        device: Where the tensors are.
        keeps: Whether arrays of integers stay on the device for other calls, as masks do.
    """

    def __init__(self, device: torch.device, keeps: bool = True) -> None:
        def new(array: Array) -> Any:
            if array.size:
                return (_uploaded if keeps else sent)(array, device)
            return torch.empty(array.shape, dtype=_tensor_dtype(array.dtype), device=device)

        super().__init__(_dtype, new)

    def copy(self, tensor: Any) -> Array | None:
        """Return an array with the entries of a tensor; of one on a GPU they are waited for."""
        if tensor is None:
            return None
        array: Array = tensor.cpu().contiguous().numpy()
        self.place(array, tensor.contiguous(), max(array.nbytes, 1))
        return array


def _run_one(
    operator: FlatOperator,
    kind: str,
    name: str,
    options: Mapping[str, Any],
    needed: tuple[bool, ...],
    tensors: Sequence[Any],
) -> Tensors:
    """Run a function on tensors without further leading dimensions."""
    start = operator.first[kind]
    stage = Stage(tensors[start].device)
    own = device_implementation(operator.name, name)
    if own.lower_mask and options["mask"] == DENSE and options["layout"] != PACKED:
        mask = partial(own.lower_mask, int16=torch.int16, uint8=torch.uint8)
        operator, options, tensors = _with_lowered(mask, operator, start, options, tensors, stage)
    tensors, wrong = _with_classes(operator, start, options, tensors)
    read = {start + operator.inputs.index(argument) for argument in operator.read_inputs}
    arrays = [
        stage.copy(t) if place in read else stage.stand_in(t) for place, t in enumerate(tensors)
    ]
    chosen = adapted(operator.name, own, stage.tensor, stage.stand_in)
    found = evaluate_by(chosen, operator, kind, arrays, options, needed)
    kept = zip(found, needed, strict=True)
    results = [stage.tensor(a) if a is not None and wanted else None for a, wanted in kept]
    if wrong is not None and kind == "forward" and results[0] is not None:
        results[0].masked_fill_(wrong if results[0].ndim else wrong.any(), float("nan"))
    return tuple(results)


def _with_classes(
    operator: FlatOperator, start: int, options: Mapping[str, Any], tensors: Sequence[Any]
) -> tuple[Sequence[Any], Any]:
    """Put a class in place of targets that are none; return all arguments, and which those were.

    Nothing waits for them: that a target is no class shows as a loss of NaN.
    """
    at = start + operator.inputs.index("targets") if "targets" in operator.inputs else -1
    if not 0 <= at < len(tensors) or tensors[at] is None:
        return tensors, None
    targets, fused = tensors[at], "hidden" in operator.inputs
    # Of logits the classes are the second dimension, of a weight the first.
    classes = tensors[start + 1].shape[0] if fused else tensors[start].shape[1]
    wrong = ((targets < 0) | (targets >= classes)) & (targets != options["ignore_index"])
    known = targets.masked_fill(wrong, 0)
    return [known if place == at else t for place, t in enumerate(tensors)], wrong


def _with_lowered(
    lower: Callable[..., Sequence[Any]],
    operator: FlatOperator,
    start: int,
    options: Mapping[str, Any],
    tensors: Sequence[Any],
    stage: Stage,
) -> tuple[FlatOperator, Mapping[str, Any], list[Any]]:
    """Lower a boolean tensor on its device, so that the host does not wait for its entries.

    Args:
        lower: ``(mask of bytes, N, Nk) -> tensors`` of `PackedBits`.
        operator: Attention.
        start: Where its inputs begin among the tensors.
        options: What else the call takes.
        tensors: Its flat arguments.
        stage: Makes arrays that stand in for tensors.

    Returns:
        An operator whose calls have the mask, and the other options and arguments.
    """
    at = start + operator.inputs.index("mask0")
    seen, (q, k) = tensors[at], tensors[start : start + 2]
    heads, rows = (1, 2) if options["layout"] == "bhnd" else (2, 1)
    size = Size(q.shape[0], q.shape[heads], q.shape[rows], k.shape[rows], operator.name)
    check_dense(size, tuple(seen.shape))
    seen = seen.reshape((1,) * (4 - seen.ndim) + seen.shape).view(torch.uint8)
    parts = lower(seen, size.N, size.Nk)

    def prepare(inputs: Sequence[Any], given: Mapping[str, Any]) -> Any:
        call = operator.prepare(inputs, given)
        stand_ins: list[Any] = [stage.stand_in(part) for part in parts]
        return replace(call, mask=PackedBits(*stand_ins))

    rest = [None if place == at else t for place, t in enumerate(tensors)]
    return replace(operator, prepare=prepare), {**options, "mask": None}, rest


def _each(
    operator: FlatOperator,
    one: Callable[..., Tensors],
    tensors: Sequence[Any],
    leading: Sequence[int],
) -> Tensors:
    """Run a function once for each index of the leading dimensions."""
    if 0 in leading:
        zeros = [None if t is None else t.new_zeros(t.shape[len(leading) :]) for t in tensors]
        return tuple([None if r is None else r.new_empty((*leading, *r.shape)) for r in one(zeros)])
    every = [
        one([None if t is None else readable(t[index], operator) for t in tensors])
        for index in product(*map(range, leading))
    ]
    parts = zip(*every, strict=True)
    stacked = [None if of[0] is None else torch.stack(of) for of in parts]
    return tuple([None if t is None else t.reshape(*leading, *t.shape[1:]) for t in stacked])


def _unfolded(tensor: Any, leading: Sequence[int]) -> Any:
    return tensor.reshape(*leading, -1, *tensor.shape[1:])


def implementation_for(operator: FlatOperator, implementation: str | None, first: Any) -> str:
    """Return the name of the implementation that a call on a device gets, or raise."""
    if first.is_cpu:
        assert implementation is not None
        if not device_implementation(operator.name, implementation).interprets:
            reason = f"computes on a GPU, got {operator.inputs[0]} on {first.device}"
            raise unsupported(operator.name, f"implementation {implementation!r}: {reason}")
        return implementation
    names = [name for name in TABLE[operator.name] if name in DEVICE]
    if implementation is None:
        if not names:
            reason = f"there is no implementation for device {first.device} yet"
            raise unsupported(operator.name, reason)
        return names[0]
    if implementation in TABLE[operator.name] and implementation not in DEVICE:
        reason = f"computes on the CPU, got {operator.inputs[0]} on {first.device}"
        raise unsupported(operator.name, f"implementation {implementation!r}: {reason}")
    return implementation


def readable(tensor: Any, operator: FlatOperator | None = None) -> Any:
    """Return a tensor whose numbers are in its memory as they are, in strides that kernels take.

    Those of an operator that is not `strided`, or of none, take rows whose entries are contiguous.
    """
    tensor = tensor.detach().resolve_neg()
    if operator is not None and operator.orders:
        return tensor.contiguous()
    strided = operator is not None and operator.strided
    if strided or tensor.ndim == 0 or tensor.stride(-1) == 1 or tensor.shape[-1] < 2:
        return tensor
    return tensor.contiguous()


def _uploaded(array: Array, device: torch.device) -> Any:
    """Return integers on the device, such as a lowered mask, which calls share."""
    key = id(array), device
    known = _uploads.get(key)
    if known is not None and known[0]() is array:
        return known[1]
    tensor = _tensor_of(array).to(device)
    for old in [old for old, (of, _) in _uploads.items() if of() is None]:
        _uploads.pop(old, None)
    _uploads[key] = ref(array), tensor
    return tensor


def sent(array: Array, device: torch.device) -> Any:
    """Return integers on the device without waiting for it, for the current stream alone."""
    tensor = _tensor_of(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _tensor_of(array: Array) -> Any:
    plain = array.view(np.int16) if array.dtype == np.uint16 else array
    return torch.from_numpy(np.array(plain, order="C"))


@cache
def _dtype(dtype: torch.dtype) -> np.dtype[Any]:
    name = str(dtype).removeprefix("torch.")
    return bfloat16("torch") if name == "bfloat16" else np.dtype(name)


@cache
def _tensor_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    name = "int16" if dtype == np.uint16 else dtype.name
    return getattr(torch, name)
