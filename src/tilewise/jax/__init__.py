"""Operators on JAX arrays, with every transformation."""

from __future__ import annotations

from .attention import AttentionResult, attention
from .autodiff import save_results
from .cross_entropy import CrossEntropyResult, cross_entropy
from .drop_in import dot_product_attention, flax_attention
from .linear import linear
from .linear_cross_entropy import LinearCrossEntropyResult, linear_cross_entropy
from .losses import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels
from .softmax import LogSoftmaxResult, SoftmaxResult, log_softmax, logsumexp, softmax
from .varlen import attention_varlen

__all__ = [
    "AttentionResult",
    "CrossEntropyResult",
    "LinearCrossEntropyResult",
    "LogSoftmaxResult",
    "SoftmaxResult",
    "attention",
    "attention_varlen",
    "cross_entropy",
    "dot_product_attention",
    "flax_attention",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "logsumexp",
    "save_results",
    "softmax",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
]
