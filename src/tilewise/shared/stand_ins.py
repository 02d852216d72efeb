"""Arrays that stand in for the tensors of a call while it is validated, and the way back.

A call is validated where all calls are, in its specification, on arrays of the same shapes and
strides in memory that is only ever reserved. What the kernels get is the validated call with the
tensors in their places.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.errors import unsupported
from tilewise.base.operator import FORWARD_TWICE, KINDS, Implementation

Array = NDArray[Any]
Tensor = Any
"""A tensor of PyTorch, or what has its shape, stride(), numel(), storage_offset(), as_strided."""

_ALIGNMENT = 64
_FIRST_REGION = 1 << 32
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_FUNCTIONS = (*KINDS, "forward_jvp", FORWARD_TWICE)
_regions: list[tuple[mmap.mmap, int]] = []


class Stage:
    """Arrays that stand in for the tensors of one call, and the way back to the tensors.

    Args:
        dtype_of: The dtype of the array for a tensor's dtype.
        new: What to return for an array that stands for no tensor: one without entries, or one of
            integers or booleans that was made on the host.
    """

    def __init__(
        self, dtype_of: Callable[[Any], np.dtype[Any]], new: Callable[[Array], Tensor]
    ) -> None:
        self._dtype_of, self._new = dtype_of, new
        self._region, self._base = _region(_FIRST_REGION)
        self._end = 0
        self._places: list[tuple[int, int, Any]] = []
        self._regions = [self._region]

    def stand_in(self, tensor: Tensor) -> Array | None:
        """Return an array of zeros with the shape and the strides of a tensor; None for None."""
        if tensor is None:
            return None
        dtype = self._dtype_of(tensor.dtype)
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 0 if tensor.numel() == 0 else 1 + sum((n - 1) * step for n, step in steps)
        start, taken = self._end, max(extent * dtype.itemsize, 1)
        self._end += -(-taken // _ALIGNMENT) * _ALIGNMENT
        if self._end > len(self._region):
            # What stands already keeps its own region.
            self._region, self._base = _region(2 * self._end)
            self._regions.append(self._region)
        strides = [dtype.itemsize * step for step in tensor.stride()]
        array: Array = np.ndarray(tuple(tensor.shape), dtype, self._region, start, strides)
        self.place(array, tensor, taken)
        return array

    def place(self, array: Array, tensor: Tensor, taken: int) -> None:
        """Let so many bytes from the first entry of an array on stand for a tensor."""
        self._places.append((address(array), taken, tensor))

    def tensor(self, array: Array) -> Tensor:
        """Return what an array stands for: a tensor, a view of one, or a new one.

        Raises:
            RuntimeError: The array holds numbers that were computed from stand-ins.
        """
        at = address(array)
        for start, taken, tensor in self._places:
            if start <= at < start + taken and array.size:
                strides = [step // array.itemsize for step in array.strides]
                if at == start and array.shape == tuple(tensor.shape):
                    return tensor if list(tensor.stride()) == strides else _view(tensor, array, 0)
                return _view(tensor, array, (at - start) // array.itemsize)
        if array.size and array.dtype.kind not in "iub":
            raise RuntimeError(f"a stand-in of {array.dtype} was copied")
        return self._new(array)


def adapted(
    operator: str,
    implementation: Implementation,
    tensors: type,
    to_tensor: Callable[[Array], Tensor],
    to_array: Callable[[Tensor], Array | None],
) -> Implementation:
    """Return an implementation on tensors as one that takes and returns arrays.

    Args:
        operator: Name of the operator.
        implementation: Takes calls whose arrays are tensors.
        tensors: The type of the tensors.
        to_tensor: What to give it for an array of a call.
        to_array: What to return for a tensor of its results.
    """

    def on_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            given = [mapped(x, np.ndarray, to_tensor) for x in arguments]
            reason = implementation.refuses(given[0])
            if reason is not None:
                raise unsupported(operator, f"implementation {implementation.name!r}: {reason}")
            return mapped(function(*given), tensors, to_array)

        return run

    own = {kind: getattr(implementation, kind) for kind in _FUNCTIONS}
    functions: Mapping[str, Any] = {k: None if f is None else on_arrays(f) for k, f in own.items()}
    # What it refuses is asked with tensors, above.
    return replace(implementation, **functions, refuses=lambda call: None)


def mapped(value: Any, kind: type, f: Callable[[Any], Any]) -> Any:
    """Return a value with f of everything of a kind in it: in tuples and dataclasses too."""
    if isinstance(value, kind):
        return f(value)
    if isinstance(value, tuple):
        parts = [mapped(part, kind, f) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in fields(value)}
        new = {name: mapped(part, kind, f) for name, part in old.items()}
        if any([new[name] is not old[name] for name in old]):
            return type(value)(**new)
    return value


def address(array: Array) -> int:
    """Return where the first entry of an array lies."""
    return int(array.__array_interface__["data"][0])


def _view(tensor: Tensor, array: Array, offset: int) -> Tensor:
    strides = [step // array.itemsize for step in array.strides]
    return tensor.as_strided(array.shape, strides, tensor.storage_offset() + offset)


def _region(size: int) -> tuple[mmap.mmap, int]:
    """Return at least so many bytes that are zero and take no memory, and their address."""
    if not _regions or len(_regions[-1][0]) < size:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        region = mmap.mmap(-1, size, flags=flags, prot=mmap.PROT_READ)
        _regions.append((region, address(np.frombuffer(region, np.uint8, 1))))
    return _regions[-1]
