"""Operators on PyTorch tensors, with every derivative."""

from __future__ import annotations

from .attention import AttentionResult, attention
from .sdpa import replace_sdpa, scaled_dot_product_attention
from .varlen import attention_varlen

__all__ = [
    "AttentionResult",
    "attention",
    "attention_varlen",
    "replace_sdpa",
    "scaled_dot_product_attention",
]
