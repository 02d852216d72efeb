"""Operators on PyTorch tensors, with every derivative."""

from __future__ import annotations

from .attention import AttentionResult, attention
from .cross_entropy import CrossEntropyResult, cross_entropy
from .sdpa import replace_sdpa, scaled_dot_product_attention
from .softmax import LogSoftmaxResult, SoftmaxResult, log_softmax, logsumexp, softmax
from .varlen import attention_varlen

__all__ = [
    "AttentionResult",
    "CrossEntropyResult",
    "LogSoftmaxResult",
    "SoftmaxResult",
    "attention",
    "attention_varlen",
    "cross_entropy",
    "log_softmax",
    "logsumexp",
    "replace_sdpa",
    "scaled_dot_product_attention",
    "softmax",
]
