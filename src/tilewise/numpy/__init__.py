"""tilewise for NumPy arrays."""

from tilewise.ops.attention.spec import AttentionGrads, OutputTangents, RowStats

from .attention import (
    AttentionResult,
    attention,
    attention_forward_jvp,
    attention_jvp,
    attention_vjp,
    attention_vjp_jvp,
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
    "OutputTangents",
    "RowStats",
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
]
