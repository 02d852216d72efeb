"""tilewise for NumPy arrays."""

from tilewise.ops.attention.spec import AttentionGrads, OutputTangents, RowStats
from tilewise.ops.cross_entropy.spec import EntropyGrads, EntropyStats, EntropyTangents
from tilewise.ops.linear.spec import LinearGrads
from tilewise.ops.linear_cross_entropy.spec import LossGrads, LossStats
from tilewise.ops.softmax.spec import SoftmaxGrads, SoftmaxStats, SoftmaxTangents

from .attention import (
    AttentionResult,
    attention,
    attention_forward_jvp,
    attention_jvp,
    attention_vjp,
    attention_vjp_jvp,
)
from .cross_entropy import (
    CrossEntropyResult,
    cross_entropy,
    cross_entropy_jvp,
    cross_entropy_vjp,
    cross_entropy_vjp_jvp,
)
from .linear import linear, linear_jvp, linear_vjp, linear_vjp_jvp
from .linear_cross_entropy import (
    LinearCrossEntropyResult,
    LossTangents,
    linear_cross_entropy,
    linear_cross_entropy_jvp,
    linear_cross_entropy_vjp,
    linear_cross_entropy_vjp_jvp,
)
from .loss_shards import (
    LossState,
    MergedLoss,
    linear_cross_entropy_shard,
    linear_cross_entropy_shard_vjp,
    merge_shards,
)
from .softmax import (
    LogSoftmaxResult,
    SoftmaxResult,
    log_softmax,
    logsumexp,
    softmax,
    softmax_jvp,
    softmax_vjp,
    softmax_vjp_jvp,
)
from .varlen import (
    attention_varlen,
    attention_varlen_forward_jvp,
    attention_varlen_jvp,
    attention_varlen_vjp,
    attention_varlen_vjp_jvp,
)

__all__ = [
    "AttentionGrads",
    "AttentionResult",
    "CrossEntropyResult",
    "EntropyGrads",
    "EntropyStats",
    "EntropyTangents",
    "LinearCrossEntropyResult",
    "LinearGrads",
    "LogSoftmaxResult",
    "LossGrads",
    "LossState",
    "LossStats",
    "LossTangents",
    "MergedLoss",
    "OutputTangents",
    "RowStats",
    "SoftmaxGrads",
    "SoftmaxResult",
    "SoftmaxStats",
    "SoftmaxTangents",
    "attention",
    "attention_forward_jvp",
    "attention_jvp",
    "attention_varlen",
    "attention_varlen_forward_jvp",
    "attention_varlen_jvp",
    "attention_varlen_vjp",
    "attention_varlen_vjp_jvp",
    "attention_vjp",
    "attention_vjp_jvp",
    "cross_entropy",
    "cross_entropy_jvp",
    "cross_entropy_vjp",
    "cross_entropy_vjp_jvp",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_jvp",
    "linear_cross_entropy_shard",
    "linear_cross_entropy_shard_vjp",
    "linear_cross_entropy_vjp",
    "linear_cross_entropy_vjp_jvp",
    "linear_jvp",
    "linear_vjp",
    "linear_vjp_jvp",
    "log_softmax",
    "logsumexp",
    "merge_shards",
    "softmax",
    "softmax_jvp",
    "softmax_vjp",
    "softmax_vjp_jvp",
]
