"""What one multiprocessor of a GPU has, and how many programs of a kernel fit into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["GPUS", "Gpu"]


@dataclass(frozen=True)
class Gpu:
    """Limits of an architecture.

    Attributes:
        name: The parts that have it.
        backend: What Triton calls its vendor: cuda or hip.
        target: What Triton compiles for: a number, or the name of an AMD processor.
        warp: Threads of a warp.
        registers: 32-bit registers for each lane of a multiprocessor, over all of its warps.
        step: Registers of a thread are handed out in multiples of this.
        most_registers: Registers that one thread can have.
        shared: Bytes of shared memory of a multiprocessor.
        shared_program: Bytes that one program may use of it.
        reserved: Bytes of it that the system takes for each program.
        warps: Warps that a multiprocessor holds.
        programs: Programs that it holds.
    """

    name: str
    backend: str
    target: int | str
    warp: int
    registers: int
    step: int
    most_registers: int
    shared: int
    shared_program: int
    reserved: int
    warps: int
    programs: int

    def occupancy(self, *, warps: int, registers: int, shared: int) -> int:
        """Return how many programs a multiprocessor holds at once; 0 where not even one fits.

        Args:
            warps: Warps of a program.
            registers: Registers of a thread.
            shared: Bytes of shared memory of a program.
        """
        if shared > self.shared_program or registers > self.most_registers:
            return 0
        granted = -(-max(registers, 1) // self.step) * self.step
        held = min(self.warps, self.registers // granted)
        by_memory = self.shared // (shared + self.reserved) if shared + self.reserved else held
        return min(self.programs, held // warps, by_memory)


KIB = 1024

GPUS: Final[dict[str, Gpu]] = {
    # Source: CUDA C++ Programming Guide 13, "Technical Specifications per Compute Capability".
    "sm_80": Gpu("A100", "cuda", 80, 32, 2048, 8, 255, 164 * KIB, 163 * KIB, KIB, 64, 32),
    "sm_90": Gpu("H100, H200", "cuda", 90, 32, 2048, 8, 255, 228 * KIB, 227 * KIB, KIB, 64, 32),
    "sm_100": Gpu("B200", "cuda", 100, 32, 2048, 8, 255, 228 * KIB, 227 * KIB, KIB, 64, 32),
    # Source: AMD CDNA 3 ISA guide: four SIMDs, each of 512 registers a lane and at most 8 waves.
    "gfx942": Gpu("MI300X", "hip", "gfx942", 64, 2048, 8, 512, 64 * KIB, 64 * KIB, 0, 32, 32),
}
"""The architectures for which kernels are compiled without a GPU."""
