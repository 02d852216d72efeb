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

__all__ = [
    "AttentionGrads",
    "AttentionResult",
    "OutputTangents",
    "RowStats",
    "attention",
    "attention_forward_jvp",
    "attention_jvp",
    "attention_vjp",
    "attention_vjp_jvp",
]
