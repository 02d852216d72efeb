"""The model of mean_flow.py: points that attend to a set of known points.

The attention is a parameter of the model, so that one model serves to compare several.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Attention", "AverageVelocity"]

# What the model calls: q `(B, H, N, D)` and k, v `(B, H, Nk, D)` to o `(B, H, N, D)`.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """Attention of points to the known ones, then two matrices with a GELU between."""

    def __init__(self, width: int, heads: int, attend: Attention) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, known: Tensor) -> Tensor:  # (B, N, width), (B, Nk, width)
        q = self.q(self.norm1(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(self.norm1(known)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class AverageVelocity(nn.Module):
    """u(z, r, t) of points z `(B, N, 2)` at times `(B, N, 1)`, given known points `(B, Nk, 2)`."""

    def __init__(self, width: int, heads: int, layers: int, attend: Attention) -> None:
        super().__init__()
        self.register_buffer("waves", 0.5 * math.pi * 2.0 ** torch.arange(4))
        self.point = nn.Linear(2 + 4 * len(self.waves), width)
        self.times = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(Layer(width, heads, attend) for _ in range(layers))
        self.velocity = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def embed(self, points: Tensor) -> Tensor:
        phase = (points[..., None] * self.waves).flatten(-2)
        return self.point(torch.cat([points, phase.sin(), phase.cos()], -1))

    def forward(self, known: Tensor, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        times = torch.cat([t, t - r, (math.pi * t).cos(), (math.pi * (t - r)).cos()], -1)
        x, known = self.embed(z) + self.times(times), self.embed(known)
        for layer in self.layers:
            x, known = layer(x, known), layer(known, known)
        return self.velocity(x)
