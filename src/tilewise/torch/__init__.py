"""Operators on PyTorch tensors, with every derivative."""

from __future__ import annotations

from .attention import AttentionResult, attention
from .cross_entropy import CrossEntropyResult, cross_entropy
from .linear import linear
from .linear_cross_entropy import LinearCrossEntropyResult, linear_cross_entropy
from .loss_shards import LossState, MergedLoss, linear_cross_entropy_shard, merge_shards
from .losses import CrossEntropyLoss, LinearCrossEntropyLoss
from .sdpa import replace_sdpa, scaled_dot_product_attention
from .softmax import LogSoftmaxResult, SoftmaxResult, log_softmax, logsumexp, softmax
from .varlen import attention_varlen

__all__ = [
    "AttentionResult",
    "CrossEntropyLoss",
    "CrossEntropyResult",
    "LinearCrossEntropyLoss",
    "LinearCrossEntropyResult",
    "LogSoftmaxResult",
    "LossState",
    "MergedLoss",
    "SoftmaxResult",
    "attention",
    "attention_varlen",
    "cross_entropy",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_shard",
    "log_softmax",
    "logsumexp",
    "merge_shards",
    "replace_sdpa",
    "scaled_dot_product_attention",
    "softmax",
]
