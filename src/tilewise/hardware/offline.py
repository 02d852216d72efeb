"""Compiles Triton and Gluon kernels without a GPU, and says what the machine code needs.

Triton's compiler takes any architecture as its target, and the tools for NVIDIA that it brings,
ptxas and nvdisasm, read the result. So registers, spills, shared memory and the instructions of
matrix units are known, and tested, where no GPU is.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tilewise.base.errors import value_error

from .gpus import GPUS

if TYPE_CHECKING:
    from tilewise.shared.launch import Compilation

__all__ = ["INSTRUCTIONS", "Resources", "build", "compiled"]

INSTRUCTIONS: Final[Mapping[str, str]] = {
    "wgmma": r"\bHGMMA\b|\bQGMMA\b|\bIGMMA\b",
    "mma": r"\bHMMA\b|\bQMMA\b|\bIMMA\b|\bDMMA\b",
    "tcgen05": r"\bUTC[HQIO]MMA\b",
    "tma_load": r"\bUTMALDG\b",
    "tma_store": r"\bUTMASTG\b",
    "mfma": r"\bv_s?mfma\w*",
    "local_load": r"\bLDL\b|\bscratch_load\w*",
    "local_store": r"\bSTL\b|\bscratch_store\w*",
}
"""Instructions that are counted in the machine code, and what they look like there."""


@dataclass(frozen=True)
class Resources:
    """What one configuration of a kernel needs on one architecture.

    Attributes:
        name: Its name.
        arch: The architecture.
        registers: Registers of a thread. Where warps are specialised, those at the start.
        spill_stores: Bytes that each thread stores for lack of registers; on AMD, 4 a register.
        spill_loads: Bytes that each thread loads for that.
        shared: Bytes of shared memory of a program.
        threads: Threads of a program.
        programs: Programs that a multiprocessor holds at once, as registers and memory allow.
        instructions: How many there are of each kind of `INSTRUCTIONS`; those that are not there
            are left out.
        warnings: Warnings of ptxas that products run one after the other, C75xx.
    """

    name: str
    arch: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    threads: int
    programs: int
    instructions: Mapping[str, int]
    warnings: tuple[str, ...]

    def faults(self) -> list[str]:
        """Return what no kernel should do: spill, not fit, or have its products serialised."""
        found = []
        if self.spill_stores or self.spill_loads:
            found.append(f"spills {self.spill_stores} + {self.spill_loads} bytes")
        if self.programs == 0:
            found.append(f"does not fit: {self.registers} registers, {self.shared} bytes")
        return found + list(self.warnings)

    def as_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold."""
        return asdict(self) | {"instructions": dict(self.instructions)}


def build(compilation: Compilation, arch: str) -> Resources:
    """Compile a configuration anew, whatever Triton's cache holds.

    Args:
        compilation: The configuration.
        arch: One of `GPUS`.

    Raises:
        ValueError: There is no such architecture.
        RuntimeError: Triton interprets kernels in this process, so that it cannot compile them.
        ImportError: Triton is not installed.
    """
    if arch not in GPUS:
        raise value_error("offline", "arch", f"be one of {', '.join(GPUS)}", repr(arch))
    if not hasattr(compilation.kernel, "arg_names") or not hasattr(compilation.kernel, "cache_key"):
        raise RuntimeError("offline: kernels are interpreted here; unset TRITON_INTERPRET")
    with _anew() as log:
        made = _compile(compilation, arch)
    gpu = GPUS[arch]
    threads = gpu.warp * int(made.metadata.num_warps)
    if gpu.backend == "cuda":
        code = _disassembled(made.asm["cubin"])
        registers, stores, loads = _said_by_ptxas(log.getvalue())
    else:
        code = made.asm["amdgcn"]
        registers, stores, loads = _said_by_amdgcn(code)
    shared = int(made.metadata.shared)
    counts = {kind: len(re.findall(form, code)) for kind, form in INSTRUCTIONS.items()}
    return Resources(
        name=compilation.name,
        arch=arch,
        registers=registers,
        spill_stores=stores,
        spill_loads=loads,
        shared=shared,
        threads=threads,
        programs=gpu.occupancy(warps=threads // gpu.warp, registers=registers, shared=shared),
        instructions={kind: count for kind, count in counts.items() if count},
        warnings=tuple(re.findall(r"\(C75\d\d\)[^\n]*", log.getvalue())),
    )


@contextlib.contextmanager
def _anew() -> Iterator[io.StringIO]:
    """Compile into an empty cache, and collect what ptxas says."""
    from triton import knobs

    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory(prefix="tilewise-") as folder,
        knobs.cache.scope(),
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.cache.dir = folder
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        yield log


def compiled(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[Any, Any],
    attributes: Mapping[tuple[int, ...], Any],
    target: Any,
    options: Mapping[str, Any],
) -> Any:
    """Return what Triton compiles of a kernel for any target.

    Args:
        kernel: The decorated function.
        signature: The Triton type of each argument, "constexpr" where it is a constant.
        constants: The values of those, by name or by place.
        attributes: What is known of arguments, by place.
        target: A `GPUTarget` of Triton.
        options: Those of a launch, such as num_warps.
    """
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    source: Any = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    made = source(kernel, dict(signature), constexprs=dict(constants), attrs=dict(attributes))
    return triton_compile(made, target=target, options=dict(options))


def _compile(compilation: Compilation, arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    kernel, gpu = compilation.kernel, GPUS[arch]
    given = {**compilation.signature, **dict.fromkeys(compilation.constants, "constexpr")}
    places = [i for i, name in enumerate(kernel.arg_names) if name in compilation.divisible]
    return compiled(
        kernel,
        {name: given[name] for name in kernel.arg_names},
        compilation.constants,
        {(i,): [["tt.divisibility", 16]] for i in places},
        GPUTarget(gpu.backend, gpu.target, gpu.warp),
        compilation.options,
    )


def _said_by_ptxas(log: str) -> tuple[int, int, int]:
    """Return registers, and bytes of spill stores and loads, as `ptxas -v` reports them."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise RuntimeError(f"offline: ptxas reported no resources:\n{log}")
    return int(registers[1]), int(spills[1]), int(spills[2])


def _said_by_amdgcn(code: str) -> tuple[int, int, int]:
    """Return vector registers, and bytes of spills, as the metadata of AMD's code says."""
    found = [re.search(rf"\.{name}:\s*(\d+)", code) for name in ("vgpr_count", "vgpr_spill_count")]
    if None in found:
        raise RuntimeError("offline: the AMD code has no metadata")
    registers, spilled = (int(match[1]) for match in found if match is not None)
    return registers, 4 * spilled, 4 * spilled


def _disassembled(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory(prefix="tilewise-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = knobs.nvidia.nvdisasm.path
        done = subprocess.run([tool, "-c", str(path)], check=True, capture_output=True, text=True)
    return done.stdout
