"""Two-dimensional data: each function draws B sets of n points, `(B, n, 2)`."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

__all__ = ["SHAPES"]


def moons(B: int, n: int, random: Generator) -> Tensor:
    """Two interleaved half circles."""
    angle = math.pi * torch.rand(B, n, generator=random)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], -1)
    side = torch.randint(2, (B, n, 1), generator=random) * 2.0 - 1.0
    return 1.2 * side * upper + 0.05 * torch.randn(B, n, 2, generator=random)


def swirl(B: int, n: int, random: Generator) -> Tensor:
    """A spiral of one and a half turns."""
    along = torch.rand(B, n, generator=random).sqrt()
    angle = 3 * math.pi * along
    points = 1.9 * along[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    return points + 0.05 * torch.randn(B, n, 2, generator=random)


def blobs(B: int, n: int, random: Generator) -> Tensor:
    """Five blobs on a circle."""
    angle = 2 * math.pi / 5 * torch.randint(5, (B, n), generator=random)
    points = 1.4 * torch.stack([angle.cos(), angle.sin()], -1)
    return points + 0.12 * torch.randn(B, n, 2, generator=random)


SHAPES = {"two moons": moons, "swirl": swirl, "five blobs": blobs}
