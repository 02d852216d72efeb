"""Operators on JAX arrays, with every transformation."""

from __future__ import annotations

from .attention import AttentionResult, attention
from .autodiff import save_results
from .drop_in import dot_product_attention, flax_attention
from .softmax import LogSoftmaxResult, SoftmaxResult, log_softmax, logsumexp, softmax

__all__ = [
    "AttentionResult",
    "LogSoftmaxResult",
    "SoftmaxResult",
    "attention",
    "dot_product_attention",
    "flax_attention",
    "log_softmax",
    "logsumexp",
    "save_results",
    "softmax",
]
