"""Runs Gluon kernels on the CPU: the text of the kernels as it is, with NumPy under its names.

Gluon has no interpreter. Here a kernel is a Python function that calls what stands in for Gluon:

- the partitions of `warp_specialize` are threads of which one runs at a time; a seed chooses which
  one goes on wherever one of them waits or signals, so other seeds try other interleavings;
- a bulk load fills its tile with NaN at once, and delivers later; a bulk store reads later too;
- an asynchronous product is computed as late as its wait allows, and what it reads must not have
  changed since it was issued;
- a barrier has phases, arrivals and bytes as on the chip; when nothing can go on, the kernel fails.

Layouts mean nothing here: the compiler checks them.
"""

from __future__ import annotations

import importlib
import random
import sys
import threading
import types
import zlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

KERNELS = "src/tilewise/ops/attention/hopper"
_here = threading.local()


class HazardError(AssertionError):
    """What would be a race, a deadlock or a lost write on the chip."""


class Block(np.ndarray):
    """A tensor in registers."""

    def to(self, dtype: Any) -> Block:
        with np.errstate(all="ignore"):
            return self.astype(dtype)

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=None)

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return np.asarray(array).view(Block)


def block(x: Any) -> Block:
    return np.asarray(x).view(Block)


class Pointer:
    """Addresses of entries of an array in global memory."""

    def __init__(self, array: np.ndarray, offset: Any = 0) -> None:
        self.array, self.offset = array, offset

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.array, np.asarray(self.offset + np.asarray(more)))

    def at(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        offset = np.asarray(self.offset)
        wanted = np.broadcast_to(np.asarray(True if mask is None else mask), offset.shape)
        inside = (offset >= 0) & (offset < self.array.size)
        if not (inside | ~wanted).all():
            raise HazardError("an access lies outside of its array")
        return np.where(wanted, offset, 0), wanted


class Partition:
    """One thread, which runs only between `go` and `back`."""

    def __init__(self, machine: Machine, function: Callable[..., None], given: tuple) -> None:
        self.machine, self.function, self.given = machine, function, given
        self.go = threading.Semaphore(0)
        self.can: Callable[[], bool] = lambda: True
        self.products: list[Product] = []
        self.unfenced: list[np.ndarray] = []
        self.stores: list[Callable[[], None]] = []
        self.error: BaseException | None = None
        self.ended = False
        self.thread = threading.Thread(target=self.body, daemon=True)
        self.thread.start()

    def body(self) -> None:
        self.go.acquire()
        _here.partition, _here.machine = self, self.machine
        try:
            with np.errstate(all="ignore"):
                self.function(*self.given)
            if self.products or self.stores:
                raise HazardError("a partition ended with products or stores in flight")
        except SystemExit:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self.machine.back.release()

    def pause(self, can: Callable[[], bool]) -> None:
        self.can = can
        self.machine.back.release()
        self.go.acquire()
        if self.machine.stopped:
            raise SystemExit


class Machine:
    """One program: its partitions, its copies in flight, and who runs next."""

    def __init__(self, seed: int, program: tuple[int, ...], grid: tuple[int, ...]) -> None:
        self.random = random.Random(f"{seed} {program}")
        self.program, self.grid = program, grid
        # Copies come soon, or as late as they may.
        self.haste = self.random.choice((0.0, 0.4))
        self.back = threading.Semaphore(0)
        self.stopped = False
        self.copies: list[Callable[[], None]] = []
        self.reads: list[tuple[np.ndarray, np.ndarray]] = []

    def run(self, parts: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Run the partitions to their ends, one of them at a time."""
        alive = [Partition(self, *part) for part in parts]
        try:
            while alive:
                if self.copies and self.random.random() < self.haste:
                    self.copies.pop(self.random.randrange(len(self.copies)))()
                ready = [partition for partition in alive if partition.can()]
                if not ready and not self.copies:
                    raise HazardError("deadlock: every partition waits")
                if not ready:
                    self.copies.pop(self.random.randrange(len(self.copies)))()
                    continue
                chosen = self.random.choice(ready)
                chosen.go.release()
                self.back.acquire()
                if chosen.error is not None:
                    raise chosen.error
                alive = [partition for partition in alive if not partition.ended]
        finally:
            self.stopped = True
            for partition in alive:
                partition.go.release()
        for copy in self.copies:
            copy()

    def written(self, view: np.ndarray) -> None:
        """Check that nothing in flight still reads what is about to be written."""
        for read, _ in self.reads:
            if np.shares_memory(read, view):
                raise HazardError("shared memory was written while it was still being read")


def pause(can: Callable[[], bool] = lambda: True) -> None:
    """Let other partitions run, and go on when `can` holds."""
    partition = getattr(_here, "partition", None)
    if partition is not None:
        partition.pause(can)
    elif not can():
        raise HazardError("deadlock before the partitions began")


class Barrier:
    """An mbarrier: a phase ends with the last arrival, when all bytes have come."""

    def __init__(self) -> None:
        self.count: int | None = None
        self.phase = self.arrived = self.bytes = 0

    def init(self, count: int) -> None:
        self.count = count

    def arrive(self, arrivals: int, expected: int = 0) -> None:
        if self.count is None:
            raise HazardError("a barrier is used before its init")
        self.arrived += arrivals
        self.bytes += expected
        if self.arrived > self.count:
            raise HazardError("more arrivals than a barrier expects in one phase")
        self.settle()

    def came(self, size: int) -> None:
        self.bytes -= size
        self.settle()

    def settle(self) -> None:
        if self.arrived == self.count and self.bytes == 0:
            self.phase, self.arrived = self.phase + 1, 0

    def passed(self, parity: int) -> bool:
        return (self.phase & 1) != parity


class Barriers:
    """Barriers that were allocated together."""

    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


class Shared:
    """A view of shared memory."""

    def __init__(self, view: np.ndarray) -> None:
        self.view = view

    def index(self, i: Any) -> Shared:
        return Shared(self.view[int(i)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.view.transpose(order))

    def reshape(self, shape: Sequence[int]) -> Shared:
        again = self.view.reshape(shape)
        assert np.shares_memory(again, self.view)
        return Shared(again)

    def load(self, layout: Any) -> Block:
        return block(self.view.copy())

    def store(self, values: Block) -> None:
        _here.machine.written(self.view)
        if values.dtype != self.view.dtype or values.shape != self.view.shape:
            raise HazardError(f"{values.dtype} {values.shape} does not fit {self.view.shape}")
        self.view[...] = values
        _here.partition.unfenced.append(self.view)


class Descriptor:
    """A tensor in global memory that is read and written by tiles."""

    def __init__(self, array: np.ndarray, block_shape: Sequence[int]) -> None:
        self.array, self.shape = array, tuple(block_shape)
        self.dtype, self.layout = array.dtype, None
        size = int(np.prod(self.shape)) * array.dtype.itemsize
        self.block_type = types.SimpleNamespace(nbytes=size)

    def region(self, at: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        starts = [int(x) for x in at]
        ends = [
            min(x + n, size)
            for x, n, size in zip(starts, self.shape, self.array.shape, strict=True)
        ]
        there = tuple(slice(x, max(x, e)) for x, e in zip(starts, ends, strict=True))
        here = tuple(slice(0, max(0, e - x)) for x, e in zip(starts, ends, strict=True))
        return there, here


def tma_load(desc: Descriptor, at: Sequence[Any], barrier: Barrier, buffer: Shared) -> None:
    """Begin a load: until it is there, the tile is NaN."""
    machine: Machine = _here.machine
    machine.written(buffer.view)
    if buffer.view.shape != desc.shape or buffer.view.dtype != desc.dtype:
        raise HazardError(f"a tile {desc.shape} does not fit {buffer.view.shape}")
    buffer.view[...] = np.nan
    there, here = desc.region(at)

    def deliver() -> None:
        machine.written(buffer.view)
        buffer.view[...] = 0
        buffer.view[here] = desc.array[there]
        barrier.came(desc.block_type.nbytes)

    machine.copies.append(deliver)


def tma_store(desc: Descriptor, at: Sequence[Any], buffer: Shared) -> None:
    """Begin a store: it reads its tile at any time until it is waited for."""
    machine, partition = _here.machine, _here.partition
    if any(np.shares_memory(buffer.view, view) for view in partition.unfenced):
        raise HazardError("a bulk store reads what was written without a fence")
    there, here = desc.region(at)
    read = (buffer.view, buffer.view.copy())
    machine.reads.append(read)

    def finish() -> None:
        desc.array[there] = buffer.view[here]
        machine.reads[:] = [r for r in machine.reads if r is not read]

    partition.stores.append(finish)


def tma_store_wait(pending: int) -> None:
    """Finish the oldest stores until so many are left."""
    pause()
    stores = _here.partition.stores
    while len(stores) > pending:
        stores.pop(0)()


def fence_async_shared() -> None:
    """Let bulk copies and products see what this partition has written."""
    partition = getattr(_here, "partition", None)
    if partition is not None:
        partition.unfenced.clear()


class Product:
    """A product in flight: computed as late as possible."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.value: Block | None = None
        views = [x.view for x in (a, b) if isinstance(x, Shared)]
        if any(np.shares_memory(v, u) for v in views for u in _here.partition.unfenced):
            raise HazardError("a product reads what was written without a fence")
        self.reads = [(view, view.copy()) for view in views]
        _here.machine.reads.extend(self.reads)

    def finish(self) -> None:
        a, b = (np.asarray(getattr(x, "view", x)) for x in (self.a, self.b))
        if isinstance(self.a, Block):
            a = np.asarray(self.a)
        if a.dtype != b.dtype:
            raise HazardError(f"a product of {a.dtype} and {b.dtype}")
        found = a.astype(np.float32) @ b.astype(np.float32)
        self.value = block(found + np.asarray(self.acc) if self.use_acc else found)
        machine = _here.machine
        machine.reads[:] = [r for r in machine.reads if all(r is not own for own in self.reads)]


def warpgroup_mma(
    a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False
) -> Product:
    """Issue a product."""
    assert is_async and not isinstance(acc, Product)
    product = Product(a, b, acc, use_acc)
    _here.partition.products.append(product)
    pause()
    return product


def warpgroup_mma_wait(pending: int, deps: Sequence[Any]) -> Any:
    """Finish the oldest products until so many are left, and return the values."""
    pause()
    products = _here.partition.products
    while len(products) > pending:
        products.pop(0).finish()
    values = [dep.value if isinstance(dep, Product) else dep for dep in deps]
    if any(value is None for value in values):
        raise HazardError("the result of a product is read before its wait")
    return values[0] if len(values) == 1 else tuple(values)


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
    if layout == "barrier":
        return Barriers(shape[0])
    return Shared(np.full(shape, np.nan, dtype))


def _load(pointer: Pointer, mask: Any = None, other: Any = None) -> Block:
    at, wanted = pointer.at(mask)
    return block(np.where(wanted, pointer.array[at], 0 if other is None else other)).to(
        pointer.array.dtype
    )


def _store(pointer: Pointer, values: Any, mask: Any = None) -> None:
    at, wanted = pointer.at(mask)
    pointer.array[at[wanted]] = np.broadcast_to(values, at.shape)[wanted]


def _barrier_wait(barrier: Barrier, parity: Any) -> None:
    pause(lambda: barrier.passed(int(parity)))


def _barrier_arrive(barrier: Barrier, count: int = 1) -> None:
    barrier.arrive(count)
    pause()


def _reduce(function: Any) -> Callable[[Any, int], Block]:
    return lambda x, axis: block(function.reduce(np.asarray(x), axis=axis))


def _layout(*given: Any, **named: Any) -> None:
    return None


def _language() -> types.ModuleType:
    gl = types.ModuleType("gl")
    names: dict[str, Any] = {
        "constexpr": lambda value: value,
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "int32": np.int32,
        "int64": np.int64,
        "SliceLayout": _layout,
        "NVMMADistributedLayout": _layout,
        "DotOperandLayout": _layout,
        "BlockedLayout": _layout,
        "NVMMASharedLayout": types.SimpleNamespace(get_default_for=_layout),
        "program_id": lambda axis: block(np.int32(_here.machine.program[axis])),
        "num_programs": lambda axis: _here.machine.grid[axis],
        "static_range": range,
        "allocate_shared_memory": _allocate,
        "arange": lambda a, b, layout: block(np.arange(a, b, dtype=np.int32)),
        "zeros": lambda shape, dtype, layout: block(np.zeros(shape, dtype)),
        "full": lambda shape, value, dtype, layout: block(np.full(shape, value, dtype)),
        "where": lambda c, a, b: block(np.where(c, a, b).astype(np.result_type(a, b))),
        "maximum": lambda a, b: block(np.fmax(a, b)),
        "max": _reduce(np.fmax),
        "sum": _reduce(np.add),
        "exp2": lambda x: block(np.exp2(np.asarray(x, np.float32))),
        "log2": lambda x: block(np.log2(np.asarray(x, np.float32))),
        "convert_layout": lambda x, layout: x,
        "load": _load,
        "store": _store,
        "warp_specialize": lambda parts, warps, regs: _here.machine.run(parts),
    }
    vars(gl).update(names)
    return gl


def _modules() -> dict[str, types.ModuleType]:
    """What the kernels import, by its name."""
    gl = _language()
    hopper = types.ModuleType("hopper")
    hopper.tma = types.SimpleNamespace(
        async_load=tma_load, async_store=tma_store, store_wait=tma_store_wait
    )
    hopper.mbarrier = types.SimpleNamespace(
        MBarrierLayout=lambda: "barrier",
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, size: barrier.arrive(1, size),
        wait=_barrier_wait,
        arrive=_barrier_arrive,
    )
    hopper.fence_async_shared = fence_async_shared
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = warpgroup_mma, warpgroup_mma_wait
    gluon = types.ModuleType("gluon")
    gluon.jit, gluon.language = (lambda function: function), gl
    experimental = types.ModuleType("experimental")
    experimental.gluon = gluon
    prefix = "triton.experimental"
    return {
        "triton": types.ModuleType("triton"),
        prefix: experimental,
        f"{prefix}.gluon": gluon,
        f"{prefix}.gluon.language": gl,
        f"{prefix}.gluon.language.nvidia": types.ModuleType("nvidia"),
        f"{prefix}.gluon.language.nvidia.hopper": hopper,
    }


@contextmanager
def _instead(modules: dict[str, types.ModuleType]) -> Any:
    saved = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in saved.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load(name: str, folder: Path | None = None) -> types.ModuleType:
    """Return a module of the kernels, as it is run here; of a copy of their folder if given."""
    folder = folder or Path(__file__).parents[2] / KERNELS
    package = f"emulated_hopper_{zlib.crc32(str(folder).encode())}"
    if package not in sys.modules:
        parent = types.ModuleType(package)
        parent.__path__ = [str(folder)]
        sys.modules[package] = parent
    with _instead(_modules()):
        return importlib.import_module(f"{package}.{name}")


def launch(
    kernel: Callable[..., None], grid: tuple[int, ...], given: dict[str, Any], seed: int = 0
) -> None:
    """Run the programs of a kernel one after the other."""
    for program in np.ndindex(*grid):
        _here.machine, _here.partition = Machine(seed, program, grid), None
        with np.errstate(all="ignore"):
            kernel(**given)


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """Return an array that shares its memory with a tensor."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def pointer_to(tensor: torch.Tensor) -> Pointer:
    """Return the address of a tensor's first entry, in all of its storage."""
    start = tensor.storage_offset()
    size = tensor.untyped_storage().nbytes() // tensor.element_size() - start
    return Pointer(array_of(tensor.as_strided((size,), (1,), start)))


class Emulated:
    """A device as the launcher takes one, with smaller tiles than the chip has."""

    def __init__(self, seed: int = 0, programs: int = 3, folder: Path | None = None) -> None:
        self.seed, self.count, self.folder = seed, programs, folder
        self.jobs: list[Any] = []

    def programs(self, like: Any) -> int:
        return self.count

    def run(self, job: Any) -> None:
        self.jobs.append(job)
        modules = [load(f"kernels.{name}", self.folder) for name in ("forward", "backward")]
        kernels = {name: value for module in modules for name, value in vars(module).items()}
        given: dict[str, Any] = {}
        for name, value in {**job.arguments, **job.plan.constants}.items():
            if hasattr(value, "block"):
                value = Descriptor(array_of(value.tensor), value.block)
            elif isinstance(value, torch.Tensor):
                value = pointer_to(value)
            elif isinstance(value, float):
                value = np.float32(value)
            given[name] = value
        launch(kernels[job.kernel], job.plan.grid, given, self.seed)
