"""Operators on JAX arrays, with every transformation."""

from __future__ import annotations

from .attention import AttentionResult, attention
from .autodiff import save_results
from .softmax import LogSoftmaxResult, SoftmaxResult, log_softmax, logsumexp, softmax

__all__ = [
    "AttentionResult",
    "LogSoftmaxResult",
    "SoftmaxResult",
    "attention",
    "log_softmax",
    "logsumexp",
    "save_results",
    "softmax",
]
