"""Compiles recorded launches, without a GPU, into a program that needs no Triton to run.

Arguments are specialised by Triton's own rules: numbers that are 1 become constants, and what is a
multiple of 16 is compiled as such. The program is a list of numbers, whose form
`cpp/bindings/cuda_program.hpp` reads.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import triton
from numpy.typing import NDArray

from tilewise.hardware.offline import compiled as compiled_by_triton

from .recording import Buffer, Launch, Recorded, Recording

FORMAT: Final = 1
"""The version of the list of numbers."""

POINTER, NUMBER, WORD = 0, 1, 2
"""Kinds of parameters: an address in a buffer, a number, and 32 bits that are read from a buffer
when the program runs."""

_PACKED = {
    "u1": "B", "i1": "B", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I",
    "i64": "q", "u64": "Q", "fp16": "e", "fp32": "f", "fp64": "d",
}  # fmt: skip
_BITS_OF_PTX = re.compile(r"\.param\s+\.[bufs](\d+)\b")


@dataclass(frozen=True)
class Specialised:
    """How the arguments of a launch are compiled.

    Attributes:
        signature: The Triton type of each argument, "constexpr" where it is a constant.
        constants: The values of those, by place.
        attributes: What is known of the others, by place.
    """

    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], Any], ...]

    @property
    def parameters(self) -> tuple[tuple[str, str], ...]:
        """Return names and types of what a launch passes."""
        return tuple([pair for pair in self.signature if pair[1] != "constexpr"])


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    Attributes:
        name: Its name in the code.
        code: The code, a cubin.
        threads: Threads of a program.
        shared: Bytes of shared memory of a program.
        hidden: How many parameters follow those of the kernel, which all are null.
    """

    name: str
    code: bytes
    threads: int
    shared: int
    hidden: int


@dataclass(frozen=True)
class Program:
    """What runs where there is no Triton.

    Attributes:
        operands: The buffers that it is given, in order.
        results: The buffers that it writes, in order: those that were asked for, then others.
        numbers: What to launch, as `cpp/bindings/cuda_program.hpp` reads it.
        kernels: A line for each kernel: a digest of its code, and its name.
        code: The code of the kernels, one after the other.
    """

    operands: tuple[Buffer, ...]
    results: tuple[Buffer, ...]
    numbers: NDArray[np.int64]
    kernels: str
    code: bytes


def capability(arch: str) -> int:
    """Return the number of an architecture such as "sm_90", or raise."""
    found = re.fullmatch(r"sm_(\d{2,3})", arch)
    if found is None:
        raise ValueError(f"programs: arch must be like 'sm_90', got {arch!r}")
    return int(found[1])


def encoded(
    recording: Recording,
    wanted: Sequence[Recorded],
    words: Mapping[str, Recorded],
    number: int,
    compiled: Callable[[Launch, Specialised], Binary],
) -> Program:
    """Return a recording as a program.

    Args:
        recording: What was taken down.
        wanted: Its results, each the whole of a buffer of its own.
        words: For arguments whose values are known only when the program runs, where they lie.
        number: That of the architecture.
        compiled: Compiles a kernel.
    """
    launches = [(launch, specialised(launch)) for launch in recording.launches]
    first = [tensor.buffer for tensor in wanted]
    used = _unique([*first, *_used(launches, words)])
    operands = [buffer for buffer in used if buffer.given]
    results = [buffer for buffer in used if not buffer.given]
    places = {id(buffer): place for place, buffer in enumerate([*operands, *results])}
    kernels: dict[tuple[str, str], tuple[int, Binary]] = {}
    body: list[int] = []
    for launch, special in launches:
        binary = compiled(launch, special)
        key = hashlib.sha256(binary.code).hexdigest()[:32], binary.name
        at, _ = kernels.setdefault(key, (len(kernels), binary))
        grid = [*launch.plan.grid, 1, 1][:3]
        passed = [
            _parameter(of, launch.arguments[name], words.get(name), places)
            for name, of in special.parameters
        ]
        passed += [(NUMBER, 0, 8)] * binary.hidden
        body += [at, *map(int, grid), len(passed), *[n for one in passed for n in one]]
    binaries = [binary for _, binary in kernels.values()]
    head = [FORMAT, number, len(places), len(binaries), len(launches)]
    head += [n for b in binaries for n in (len(b.code), b.threads, b.shared)]
    return Program(
        tuple(operands),
        tuple(results),
        np.array(head + body, np.int64),
        "\n".join([" ".join(key) for key in kernels]),
        b"".join([binary.code for binary in binaries]),
    )


def specialised(launch: Launch) -> Specialised:
    """Return how Triton specialises the arguments of a launch."""
    binder, backend, names = _binder(launch.kernel)
    _, found, _ = binder(**launch.arguments)
    values = list(launch.arguments[name] for name in names)
    constants, attributes = [], []
    for place, (kind, key) in enumerate(found):
        if kind == "constexpr":
            constants.append(((place,), values[place]))
        elif isinstance(key, str):
            parsed = tuple([tuple(pair) for pair in backend.parse_attr(key)])
            if parsed:
                attributes.append(((place,), parsed))
    kinds = [kind for kind, _ in found]
    signature = tuple(zip(names, kinds, strict=True))
    return Specialised(signature, tuple(constants), tuple(attributes))


def compiler(number: int) -> Callable[[Launch, Specialised], Binary]:
    """Return what compiles kernels for the NVIDIA architecture of a number."""

    def compiled(launch: Launch, special: Specialised) -> Binary:
        options = tuple(launch.plan.options.items())
        return _compiled(launch.kernel, special, options, number)

    return compiled


@cache
def _compiled(
    kernel: Any, special: Specialised, options: tuple[tuple[str, int], ...], number: int
) -> Binary:
    made = compiled_by_triton(
        kernel,
        dict(special.signature),
        dict(special.constants),
        {place: [list(pair) for pair in pairs] for place, pairs in special.attributes},
        triton.backends.compiler.GPUTarget("cuda", number, 32),
        dict(options),
    )
    about = made.metadata
    if about.global_scratch_size or about.profile_scratch_size or about.num_ctas != 1:
        raise NotImplementedError(f"{about.name} needs scratch memory, or clusters of programs")
    sizes = [_size(of) for _, of in special.parameters]
    declared = _declared(made.asm["ptx"], about.name)
    # Behind its own parameters a kernel has pointers to scratch memory, which is not there.
    hidden = declared[len(sizes) :]
    if declared[: len(sizes)] != sizes or len(hidden) > 2 or set(hidden) - {8}:
        raise RuntimeError(f"{about.name} takes {declared} bytes, not {sizes} and null pointers")
    threads = 32 * int(about.num_warps)
    return Binary(about.name, made.asm["cubin"], threads, int(about.shared), len(hidden))


@cache
def _binder(kernel: Any) -> tuple[Any, Any, list[str]]:
    """Return the function by which Triton specialises arguments, its backend, and their names."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    if not isinstance(kernel, triton.JITFunction):
        kernel = triton.JITFunction(kernel.fn, **kernel.kwargs)
    backend = make_backend(GPUTarget("cuda", 80, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    return binder, backend, list(kernel.arg_names)


def _used(
    launches: Iterable[tuple[Launch, Specialised]], words: Mapping[str, Recorded]
) -> list[Buffer]:
    """Return the buffers that launches read or write."""
    found = []
    for launch, special in launches:
        for name, of in special.parameters:
            value = words.get(name, launch.arguments[name])
            if isinstance(value, Recorded):
                found.append(value.buffer)
            elif of.startswith("*"):
                raise TypeError(f"{name} must be a tensor, got {value!r}")
    return found


def _unique(buffers: Iterable[Buffer]) -> list[Buffer]:
    return list({id(buffer): buffer for buffer in buffers}.values())


def _parameter(
    of: str, value: Any, word: Recorded | None, places: Mapping[int, int]
) -> tuple[int, int, int]:
    """Return a parameter as three numbers: its kind, then buffer and byte, or bits and bytes."""
    if word is not None:
        if _size(of) != 4:
            raise TypeError(f"a word that is read must have 32 bits, got {of}")
        offset = word.storage_offset() * word.dtype.itemsize
        return WORD, places[id(word.buffer)], offset
    if of.startswith("*"):
        offset = value.storage_offset() * value.dtype.itemsize
        return POINTER, places[id(value.buffer)], offset
    packed = struct.pack(f"<{_PACKED[of]}", value)
    return NUMBER, int.from_bytes(packed.ljust(8, b"\0"), "little", signed=True), len(packed)


def _size(of: str) -> int:
    """Return how many bytes a parameter of a Triton type has."""
    return 8 if of.startswith("*") else struct.calcsize(f"<{_PACKED[of]}")


def _declared(ptx: str, name: str) -> list[int]:
    """Return how many bytes each parameter of a kernel has, as its code says."""
    entry = re.search(rf"\.entry\s+{re.escape(name)}\s*\(([^)]*)\)", ptx)
    if entry is None:
        raise RuntimeError(f"there is no kernel {name} in the code")
    return [int(bits) // 8 for bits in _BITS_OF_PTX.findall(entry[1])]
