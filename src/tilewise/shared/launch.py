"""How Triton kernels are launched and compiled, as data: known without Triton and without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

INTERPRETER = "interpreter"
"""The architecture of Triton's interpreter, whose tiles are small so that tests have several."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """One launch of a kernel, without its tensors and numbers.

    Attributes:
        grid: How many programs run, in up to three dimensions.
        constants: The values of the kernel's constexpr arguments.
        num_warps: Warps of one program.
        num_stages: Tiles that loads run ahead of the arithmetic.
        max_registers: Registers that a thread may have, for NVIDIA; None leaves it to the compiler,
            which may rather spill than have fewer programs at a time.
    """

    grid: tuple[int, ...]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told beside the constants."""
        return compiler_options(self.num_warps, self.num_stages, self.max_registers)


@dataclass(frozen=True, slots=True)
class Compilation:
    """One configuration of a kernel that is compiled without a GPU.

    Attributes:
        name: What the tables call it.
        kernel: The decorated Triton function.
        signature: The Triton type of each argument that is no constant, such as `*bf16` or `i32`.
        constants: The values of the kernel's constexpr arguments.
        divisible: Arguments that are multiples of 16, as pointers and most strides are.
        num_warps: Warps of one program.
        num_stages: Tiles that loads run ahead of the arithmetic.
        max_registers: As of a `LaunchPlan`.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: frozenset[str] = field(default_factory=frozenset)
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told beside the constants."""
        return compiler_options(self.num_warps, self.num_stages, self.max_registers)


def compiler_options(num_warps: int, num_stages: int, max_registers: int | None) -> dict[str, int]:
    """Return options by the names that Triton has for them."""
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return options if max_registers is None else options | {"maxnreg": max_registers}
