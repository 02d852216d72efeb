"""Takes down what the launchers of GPU kernels do, on tensors that have no memory.

A launcher runs as it runs on the tensors of a framework. What comes out is a program: launches of
kernels on numbered buffers, which another process may run on another machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .launch import LaunchPlan

DType = np.dtype[Any]
_ALIGNMENT = 64
_FILLED = 1024  # entries that a program of the kernels below fills or copies
_DIMENSIONS = 4


@dataclass(eq=False)
class Buffer:
    """Memory that a program reads or writes.

    Attributes:
        entries: How many entries it has.
        dtype: Their type.
        constant: The numbers that it begins with, or None.
        given: Whether it is an argument of the program, which nothing writes to.
    """

    entries: int
    dtype: DType
    constant: NDArray[Any] | None = None
    given: bool = False


@dataclass(frozen=True)
class Launch:
    """One launch of a program.

    Attributes:
        kernel: The decorated Triton function.
        plan: Its grid, warps and stages.
        arguments: All of its arguments by name: numbers, None and `Recorded`.
    """

    kernel: Any
    plan: LaunchPlan
    arguments: Mapping[str, Any]


@dataclass
class Recording:
    """A program as it is being taken down.

    Attributes:
        arch: The architecture that it is for.
        launches: What it launches, in this order.
    """

    arch: str
    launches: list[Launch] = field(default_factory=list)
    _constants: dict[int, tuple[Any, Recorded]] = field(default_factory=dict)

    def argument(self, shape: Sequence[int], dtype: DType) -> Recorded:
        """Return a new argument of the program, contiguous."""
        return self._new(shape, dtype, given=True)

    def empty(self, shape: Sequence[int], dtype: DType) -> Recorded:
        """Return new memory, contiguous."""
        return self._new(shape, dtype)

    def constant(self, array: NDArray[Any]) -> Recorded:
        """Return memory that begins with the numbers of an array; the same one for the same."""
        known = self._constants.get(id(array))
        if known is None:
            plain = np.ascontiguousarray(array)
            # What is stored as words of bits is read as PyTorch stores it.
            plain = plain.view(np.int16) if plain.dtype == np.uint16 else plain
            made = self._new(plain.shape, plain.dtype, constant=plain, given=True)
            known = self._constants[id(array)] = array, made
        return known[1]

    def launch(self, kernel: Any, plan: LaunchPlan, arguments: Mapping[str, Any]) -> None:
        """Take down a launch."""
        self.launches.append(Launch(kernel, plan, dict(arguments)))

    def apart(self, tensors: Sequence[Recorded]) -> list[Recorded]:
        """Return tensors that each are all of a memory of its own, copied where they are not."""
        found: list[Recorded] = []
        taken: set[int] = set()
        for tensor in tensors:
            whole = tensor.numel() == tensor.buffer.entries and tensor.is_contiguous()
            own = whole and not tensor.buffer.given and id(tensor.buffer) not in taken
            found.append(tensor if own else self.copy(tensor, tensor.dtype))
            taken.add(id(found[-1].buffer))
        return found

    def copy(self, tensor: Recorded, dtype: DType) -> Recorded:
        """Return a contiguous copy in a dtype."""
        made = self.empty(tensor.shape, dtype)
        sizes, strides = _merged(tensor.shape, tensor.stride())
        if len(sizes) > _DIMENSIONS:
            raise NotImplementedError(f"a copy of {tensor.shape} with steps {tensor.stride()}")
        sizes, strides = ([0] * (_DIMENSIONS - len(x)) + x for x in (sizes, strides))
        given = {f"stride{i}": step for i, step in enumerate(strides)}
        given |= {f"size{i}": max(size, 1) for i, size in enumerate(sizes) if i}
        self._over(made, "copy_kernel", {"source_ptr": tensor, "result_ptr": made, **given})
        return made

    def fill(self, tensor: Recorded, value: float) -> None:
        """Write a number everywhere."""
        if not tensor.is_contiguous():
            raise NotImplementedError("only contiguous memory is filled")
        self._over(tensor, "fill_kernel", {"result_ptr": tensor, "value": value})

    def sum(self, tensor: Recorded) -> Recorded:
        """Return the sum of contiguous numbers."""
        made = self.empty((), tensor.dtype)
        given = {"source_ptr": tensor, "n": tensor.numel(), "result_ptr": made}
        plan = LaunchPlan((1,), {"BLOCK": _FILLED})
        self.launch(_kernel("sum_kernel"), plan, {**given, **plan.constants})
        return made

    def _over(self, made: Recorded, kernel: str, given: Mapping[str, Any]) -> None:
        n = made.numel()
        plan = LaunchPlan((-(-n // _FILLED),), {"BLOCK": _FILLED})
        if n:
            self.launch(_kernel(kernel), plan, {**given, "n": n, **plan.constants})

    def _new(self, shape: Sequence[int], dtype: DType, **more: Any) -> Recorded:
        sizes = tuple(map(int, shape))
        buffer = Buffer(math.prod(sizes), np.dtype(dtype), **more)
        return Recorded(self, buffer, sizes, contiguous_strides(sizes))


class Recorded:
    """A tensor without memory: a view of a buffer, with what launchers use of PyTorch's tensors.

    Attributes:
        buffer: What it is a view of.
        shape: Its sizes.
        dtype: Its type, one of NumPy's.
    """

    device = "cuda"

    def __init__(
        self,
        recording: Recording,
        buffer: Buffer,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int = 0,
    ) -> None:
        self._recording, self._strides, self._offset = recording, strides, offset
        self.buffer, self.shape, self.dtype = buffer, shape, buffer.dtype

    @property
    def ndim(self) -> int:
        """Return how many dimensions there are."""
        return len(self.shape)

    def __len__(self) -> int:
        """Return the first size."""
        return self.shape[0]

    def stride(self, dim: int | None = None) -> Any:
        """Return the strides in entries, or that of one dimension."""
        return self._strides if dim is None else self._strides[dim]

    def storage_offset(self) -> int:
        """Return the place of the first entry in the buffer."""
        return self._offset

    def data_ptr(self) -> int:
        """Return an address with the remainders that the one in a program will have."""
        return _ALIGNMENT + self._offset * self.dtype.itemsize

    def numel(self) -> int:
        """Return how many entries there are."""
        return math.prod(self.shape)

    def is_contiguous(self) -> bool:
        """Return whether the entries lie in C order."""
        steps = zip(self.shape, self._strides, contiguous_strides(self.shape), strict=True)
        return self.numel() == 0 or all([n == 1 or have == want for n, have, want in steps])

    def new_empty(self, *shape: Any, dtype: Any = None) -> Recorded:
        """Return new memory, of the same dtype unless another is named."""
        return self._recording.empty(_sizes(shape), self.dtype if dtype is None else dtype)

    def new_zeros(self, *shape: Any, dtype: Any = None) -> Recorded:
        """Return new memory with zeros."""
        return self.new_empty(*shape, dtype=dtype).fill_(0.0)

    def fill_(self, value: float) -> Recorded:
        """Write a number everywhere."""
        self._recording.fill(self, value)
        return self

    def as_strided(self, shape: Sequence[int], strides: Sequence[int], offset: int) -> Recorded:
        """Return a view of the same buffer."""
        return Recorded(self._recording, self.buffer, tuple(shape), tuple(strides), offset)

    def swapaxes(self, a: int, b: int) -> Recorded:
        """Return a view with two dimensions in each other's places."""
        order = list(range(self.ndim))
        order[a], order[b] = order[b], order[a]
        shape, strides = ([x[i] for i in order] for x in (self.shape, self._strides))
        return self.as_strided(shape, strides, self._offset)

    def expand(self, *sizes: Any) -> Recorded:
        """Return a view that repeats over new leading dimensions and those of size 1."""
        shape = _sizes(sizes)
        new = len(shape) - self.ndim
        own = [1] * new + list(self.shape)
        steps = [0] * new + list(self._strides)
        strides = [0 if n != m else step for n, m, step in zip(own, shape, steps, strict=True)]
        return self.as_strided(shape, strides, self._offset)

    def reshape(self, *sizes: Any) -> Recorded:
        """Return the entries in C order in another shape; a view where they lie so."""
        shape = _sizes(sizes)
        if -1 in shape:
            rest = -math.prod(shape)
            shape = tuple([self.numel() // max(rest, 1) if n == -1 else n for n in shape])
        own = self.contiguous()
        return own.as_strided(shape, contiguous_strides(shape), own.storage_offset())

    def __getitem__(self, index: int | slice) -> Recorded:
        """Return a part along the first dimension."""
        first, *rest = self._strides
        if isinstance(index, slice):
            start, stop, step = index.indices(self.shape[0])
            shape = (len(range(start, stop, step)), *self.shape[1:])
            return self.as_strided(shape, (first * step, *rest), self._offset + start * first)
        return self.as_strided(self.shape[1:], rest, self._offset + index * first)

    def contiguous(self) -> Recorded:
        """Return the entries in C order: itself where they lie so."""
        return self if self.is_contiguous() else self._recording.copy(self, self.dtype)

    def to(self, dtype: Any) -> Recorded:
        """Return the entries in another dtype: itself where they have it."""
        wanted: DType = np.dtype(dtype)
        return self if wanted == self.dtype else self._recording.copy(self, wanted)

    def float(self) -> Recorded:
        """Return the entries in float32."""
        return self.to(np.float32)

    def double(self) -> Recorded:
        """Return the entries in float64."""
        return self.to(np.float64)

    def int(self) -> Recorded:
        """Return the entries in int32."""
        return self.to(np.int32)

    def char(self) -> Recorded:
        """Return the entries in int8."""
        return self.to(np.int8)

    def sum(self) -> Recorded:
        """Return the sum of all entries."""
        return self._recording.sum(self.contiguous())


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of entries in C order."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides[: len(shape)]))


def _sizes(given: Sequence[Any]) -> tuple[int, ...]:
    """Return sizes that were given one by one, or as one sequence."""
    sizes = given[0] if len(given) == 1 and not isinstance(given[0], int | np.integer) else given
    return tuple([int(n) for n in sizes])


def _merged(shape: Sequence[int], strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return sizes and strides without dimensions that a walk does not need."""
    sizes: list[int] = []
    steps: list[int] = []
    for n, step in zip(shape, strides, strict=True):
        if n == 1:
            continue
        if sizes and steps[-1] == n * step:
            sizes[-1], steps[-1] = sizes[-1] * n, step
        else:
            sizes.append(n)
            steps.append(step)
    return sizes, steps


def _kernel(name: str) -> Any:
    return getattr(import_module("tilewise.shared.triton_copies"), name)
