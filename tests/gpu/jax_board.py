"""A GPU for programs of JAX that is none: the handler of CUDA on a driver that stands in.

Programs for the CPU take the way of those for CUDA: their launches are recorded, written down,
read by the handler and handed to the driver, which gives them back. Here they are interpreted, from
nothing but the bytes that the driver was given.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import pytest
import torch

from tilewise import _xla
from tilewise.jax import autodiff, execution, gpu
from tilewise.shared import triton_launch, triton_programs
from tilewise.shared.recording import Launch
from tilewise.shared.triton_programs import Binary, Program, Specialised

SOURCE = Path(__file__).with_name("stand_in_driver.c")
NUMBER = 90
_TENSORS = {
    "u1": torch.bool, "i1": torch.bool, "i8": torch.int8, "u8": torch.uint8, "i16": torch.int16,
    "i32": torch.int32, "u32": torch.uint32, "i64": torch.int64, "fp16": torch.float16,
    "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip
_NUMBERS = {
    "u1": "?", "i1": "?", "i8": "b", "i16": "h", "i32": "i", "u32": "I", "i64": "q", "u64": "Q",
    "fp32": "f", "fp64": "d",
}  # fmt: skip
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
)


@dataclass
class Board:
    """The driver that stands in, and what it was given.

    Attributes:
        library: The driver.
        kernels: What each image stands for.
        launched: Name, grid, threads and shared memory of each launch, in order.
        programs: The programs that were written down.
        error: What went wrong in a launch.
    """

    library: Any
    kernels: list[tuple[Launch, Specialised]] = field(default_factory=list)
    launched: list[tuple[str, tuple[int, ...], int, int]] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)
    error: BaseException | None = None
    shared: int = 0
    alone: Any = field(default_factory=Lock)

    def compiled(self, launch: Launch, special: Specialised) -> Binary:
        """Return a binary whose code is the place of the kernel in `kernels`."""
        name = launch.kernel.__name__
        known = [(id(other.kernel), repr(same)) for other, same in self.kernels]
        key = id(launch.kernel), repr(special)
        if key not in known:
            known.append(key)
            self.kernels.append((launch, special))
        code = f"{known.index(key)}".encode() + b"\0\xff\x80"
        return Binary(name, code, 32 * launch.plan.num_warps, self.shared, hidden=2)

    def emit(self, function: Any, results: Any, *given: Any) -> Any:
        """Return the results of a function that asks for Triton by the handler of CUDA."""
        if function.parsed["implementation"] != "triton":
            return execution.emit(function, results, *given)

        def encode(*arguments: Any) -> Program:
            made = partial(triton_programs.encoded, number=NUMBER, compiled=self.compiled)
            self.programs.append(made(*arguments))
            return self.programs[-1]

        return gpu.record(function, results, given, "interpreter", encode)

    def launch(self, image: bytes, name: bytes, sizes: Any, values: Any) -> int:
        """Interpret a launch; return 1 where that fails."""
        try:
            launch, special = self.kernels[int(image)]
            assert name.decode() == launch.kernel.__name__
            grid = tuple(sizes[:3])
            self.launched.append((name.decode(), grid, sizes[3], sizes[4]))
            names = [pair[0] for pair in special.signature]
            given = {names[place]: value for (place,), value in special.constants}
            for place, (parameter, of) in enumerate(special.parameters):
                given[parameter] = _value(of, values[place])
            hidden = [values[len(special.parameters) + place] for place in range(2)]
            assert [ctypes.string_at(at, 8) for at in hidden] == 2 * [bytes(8)]
            # XLA runs devices side by side, and the interpreter one kernel at a time.
            with self.alone, triton_launch._unwarned():
                launch.kernel[grid](**given)
        except BaseException as error:
            self.error = error
            return 1
        return 0


def _value(of: str, at: int) -> Any:
    """Return a parameter, which lies at an address, as the interpreter takes it."""
    if not of.startswith("*"):
        form = f"<{_NUMBERS[of]}"
        return struct.unpack(form, ctypes.string_at(at, struct.calcsize(form)))[0]
    (pointer,) = struct.unpack("<Q", ctypes.string_at(at, 8))
    dtype = _TENSORS[of[1:]]
    if pointer == 0:
        return torch.empty(1, dtype=dtype)
    memory = (ctypes.c_char * dtype.itemsize).from_address(pointer)
    return torch.frombuffer(memory, dtype=dtype)


def started(folder: Path, patch: pytest.MonkeyPatch) -> Board:
    """Build the driver, and let programs that ask for Triton take it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no compiler of C")
    path = folder / "libcuda.so.1"
    command: Sequence[Any] = (compiler, "-shared", "-fPIC", "-O1", SOURCE, "-o", path)
    subprocess.run(command, check=True)
    board = Board(ctypes.CDLL(str(path)))
    callback = _CALLBACK(board.launch)
    board.library.stand_in_launched(callback)
    board.library.callback = callback
    _xla.open_driver(str(path))
    jax.ffi.register_ffi_target(execution.LAUNCHER, _xla.launcher(on_host=True), platform="cpu")
    patch.setattr(gpu, "refuse_on_cpu", lambda function: None)
    patch.setattr(autodiff, "emit", board.emit)
    return board
