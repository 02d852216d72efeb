"""The small character-level GPT that two of the examples share.

The attention is a parameter of the model, so that one model serves to compare several.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import tilewise as tw
from tilewise.torch import LinearCrossEntropyLoss, attention

TEXT = Path(__file__).parent / "data" / "alice.txt"
COLOURS = {"tilewise": "#d1495b", "sdpa": "#30638e", "textbook": "#9a9a9a"}

# What a model calls: q, k, v `(B, H, N, D)` to o `(B, H, N, D)`, each token seeing those before it.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def tilewise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """tilewise: exact, in O(N) memory, with every derivative."""
    return attention(q, k, v, mask=tw.causal())


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused attention."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def textbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula as it is written, with its N x N matrices."""
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    future = torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)
    return s.masked_fill(future, -math.inf).softmax(-1) @ v


ATTENTIONS: dict[str, Attention] = {"tilewise": tilewise, "sdpa": sdpa, "textbook": textbook}


def rotate(x: Tensor) -> Tensor:
    """Turn pairs of entries of q or k `(B, H, N, D)` by angles that grow with the place (RoPE)."""
    N, D = x.shape[-2:]
    angle = torch.arange(N)[:, None] * 1e4 ** (-torch.arange(0, D, 2) / D)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    """One layer: attention, then two matrices with a GELU between, each added to the stream."""

    def __init__(self, width: int, heads: int, attend: Attention) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, N, width)
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each, views of one array
        o = self.attend(rotate(q), rotate(k), v)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Characters `(B, N)` to logits of the next character `(B, N, V)`."""

    def __init__(
        self,
        V: int,
        layers: int,
        width: int,
        heads: int,
        attend: Attention,
        spread: float = 0.02,
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(V, width)
        self.blocks = nn.Sequential(*(Block(width, heads, attend) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), LinearCrossEntropyLoss(width, V)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=spread)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the classifier reads: `(B, N)` to `(B, N, width)`."""
        return self.norm(self.blocks(self.characters(tokens)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head.linear(self.hidden(tokens))

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of each character given those before it: `(B, N + 1)` to a number."""
        return self.head(self.hidden(tokens[:, :-1]), tokens[:, 1:])


def load_text() -> tuple[Tensor, list[str]]:
    """Return the book as numbers, and the alphabet that they count in."""
    text = TEXT.read_text(encoding="ascii")
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([number[character] for character in text]), alphabet
