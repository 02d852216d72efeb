"""How rows are cut into tiles for kernels of a GPU, as data, and what launches them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .launch import Compilation, LaunchPlan

Tensor = Any
"""A tensor of PyTorch, or what has its shape, strides, dtype and new_empty."""

MERGED_PARTS = 64
"""Parts of a row that are merged at a time."""


@dataclass(frozen=True, slots=True)
class RowTiles:
    """Tiles of rows and entries; neither depends on how many rows there are.

    Attributes:
        inner: Whether tiles cut the axis behind the row, which lies densest in memory then.
        block_r: Rows of a tile.
        block_c: Entries of a tile.
        parts: Tiles along a row.
        num_warps: Warps of one program.
    """

    inner: bool
    block_r: int
    block_c: int
    parts: int
    num_warps: int

    def launch(self, A: int, I: int) -> LaunchPlan:
        """Return the launch for A x I rows."""
        tile, other = (I, A) if self.inner else (A, I)
        grid = (-(-tile // self.block_r) * other, self.parts)
        return LaunchPlan(grid, {"BLOCK_R": self.block_r, "BLOCK_C": self.block_c}, self.num_warps)


def row_tiles(C: int, I: int, *, entries: int, itemsize: int) -> RowTiles:
    """Return the tiles for rows of C entries.

    Args:
        C: Entries of a row.
        I: Rows that lie side by side behind the row's axis.
        entries: Entries of 4 bytes of a tile at most, a power of two from 2048 on.
        itemsize: Bytes of an entry.
    """
    # Of 8 bytes a thread has half as many, for each takes two registers.
    halved = 2 if itemsize == 8 else 1
    entries //= halved
    inner = I >= 16
    block_r = 32 if inner else 1
    block_c = min(power_of_two(C), entries // block_r)
    if not inner:
        # Short rows share a program, so that each thread has some entries.
        block_r = max(1, 1024 // block_c)
    warps = min(16, max(1, block_r * block_c * halved // 512))
    return RowTiles(inner, block_r, block_c, max(1, -(-C // block_c)), warps)


def side_by_side(x: Tensor) -> int:
    """Return how many rows of `(A, C, I)` lie side by side: I, or 1 where a row's entries do."""
    return int(x.shape[2]) if x.stride(2) <= x.stride(1) else 1


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below n, at least 1."""
    return 1 << max(0, n - 1).bit_length()


def whole_strides(prefix: str, tensor: Tensor | None, *, inner: bool) -> dict[str, int]:
    """Return the strides of an `(A, C, I)` tensor as a kernel takes them: tile, other, entry."""
    a, c, i = (0, 0, 0) if tensor is None else tensor.stride()
    tile, other = (i, a) if inner else (a, i)
    return {f"{prefix}_tile": tile, f"{prefix}_other": other, f"{prefix}_c": c}


def row_sizes(A: int, C: int, I: int, *, inner: bool) -> dict[str, int]:
    """Return the sizes of `(A, C, I)` as a kernel takes them, and the strides of `(A, I)`."""
    if inner:
        return {"n_tile": I, "n_rows": A * I, "C": C, "row_tile": 1, "row_other": I}
    return {"n_tile": A, "n_rows": A * I, "C": C, "row_tile": I, "row_other": 1}


def merge_plan(n_rows: int, sums: int) -> LaunchPlan:
    """Return the launch that merges the parts of rows."""
    constants = {"BLOCK_R": 16, "BLOCK_P": MERGED_PARTS}
    return LaunchPlan((-(-n_rows // 16), sums), constants, num_warps=4)


def reduction_plan() -> LaunchPlan:
    """Return the launch that adds numbers of all rows: one program."""
    return LaunchPlan((1,), {"BLOCK_R": 1024}, num_warps=8)


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return memory for a result of the dtype and device of a tensor."""
    return like.new_empty(shape)


def wide_like(x: Tensor) -> Tensor:
    """Return a tensor without entries in the dtype of sums: float32, or float64 for float64."""
    nothing = x.new_empty(0)
    return nothing if x.dtype.itemsize == 8 else nothing.float()


def dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return small tensors in C order; None stays None."""
    return tuple([None if t is None else t.contiguous() for t in tensors])


POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "float64": "*fp64"}
"""What Triton calls pointers to numbers of a dtype."""


def sums_of(dtype: str) -> str:
    """Return the Triton type of pointers to what belongs to rows of a dtype."""
    return POINTERS["float64" if dtype == "float64" else "float32"]


def itemsize_of(dtype: str) -> int:
    """Return the bytes of a number of a dtype."""
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def compilation(
    name: str,
    kernel: Any,
    pointers: Mapping[str, str],
    numbers: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int,
) -> Compilation:
    """Return a configuration of a kernel; what is not named is a number of 32 bits.

    Args:
        name: What the tables call it.
        kernel: The decorated Triton function.
        pointers: The types of the tensors that are given; other arguments `*_ptr` are None.
        numbers: The types of numbers that are no sizes or strides.
        constants: The values of constexpr arguments, and of sizes and strides that are 1.
        num_warps: Warps of one program.
    """
    signature, fixed = {}, dict(constants)
    for argument in kernel.arg_names:
        if argument in pointers or argument in numbers:
            signature[argument] = pointers.get(argument) or numbers[argument]
        elif argument.endswith("_ptr"):
            fixed[argument] = None
        elif argument not in fixed:
            signature[argument] = "i32"
    sizes = ("_tile", "_other", "_c")
    aligned = {n for n, kind in signature.items() if kind[0] == "*" or n.endswith(sizes)}
    aligned |= {"C", "n_tile"} & signature.keys()
    return Compilation(name, kernel, signature, fixed, frozenset(aligned), num_warps)
