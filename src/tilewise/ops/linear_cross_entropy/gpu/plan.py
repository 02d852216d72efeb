"""How the kernels of the linear cross-entropy are launched."""

from __future__ import annotations

from dataclasses import dataclass

from tilewise.shared.launch import LaunchPlan

STRIP_ENTRIES = 1 << 24
"""Cotangents of logits that are stored at a time: tokens times classes of a strip."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of one kernel.

    Attributes:
        rows: Tokens of a tile, or rows of a gradient.
        cols: Classes of a tile, or columns of a gradient.
        inner: Entries of a product at a time.
        num_warps: Warps of one program.
        num_stages: Tiles that loads run ahead of the arithmetic.
        steps: Tiles of logits that one program folds.
    """

    rows: int
    cols: int
    inner: int
    num_warps: int
    num_stages: int
    steps: int = 1

    def launch(self, rows: int, cols: int, names: str = "TVK") -> LaunchPlan:
        """Return the launch for so many rows and columns; `names` are those of the blocks."""
        grid = (-(-rows // self.rows), -(-cols // (self.cols * self.steps)))
        sizes = (self.rows, self.cols, self.inner)
        blocks = {f"BLOCK_{name}": size for name, size in zip(names, sizes, strict=True)}
        return LaunchPlan(grid, blocks, self.num_warps, self.num_stages)


_NARROW = {
    "forward": Tiles(128, 128, 64, 8, 3, steps=8),
    "jvp": Tiles(64, 128, 64, 8, 3, steps=8),
    "vjp": Tiles(128, 128, 64, 8, 3),
    "vjp_jvp": Tiles(64, 128, 64, 8, 3),
    "gradient": Tiles(128, 128, 64, 8, 3),
}
_WIDE = {
    "forward": Tiles(64, 64, 32, 8, 2, steps=16),
    "jvp": Tiles(64, 64, 32, 8, 2, steps=16),
    "vjp": Tiles(64, 64, 32, 8, 2),
    "vjp_jvp": Tiles(64, 64, 32, 8, 2),
    "gradient": Tiles(64, 64, 32, 8, 2),
}


def tiles(kind: str, itemsize: int) -> Tiles:
    """Return the tiles of a kernel; they do not depend on the sizes of a call.

    Args:
        kind: forward, jvp, vjp, vjp_jvp or gradient, the product that ends the last two.
        itemsize: Bytes of an entry.
    """
    return (_NARROW if itemsize == 2 else _WIDE)[kind]


def strip(T: int, V: int, cols: int, inner: int) -> int:
    """Return how many classes have their cotangents stored at a time.

    Args:
        T: Tokens.
        V: Classes.
        cols: Classes of a tile.
        inner: Classes of a product at a time, of which strips are multiples.
    """
    step = max(cols, inner)
    most = STRIP_ENTRIES // max(T, 1) // step * step
    return min(max(most, step), -(-V // step) * step)


def precision(name: str) -> str:
    """Return how matrix products of a dtype treat their operands.

    The cotangents of float16 stay float32, for float16 lacks their range: with the digits of TF32.
    """
    return "tf32" if name == "float16" else "ieee"
