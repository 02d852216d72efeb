"""tilewise for NumPy arrays."""

from tilewise.ops.attention.spec import AttentionGrads, RowStats

from .attention import AttentionResult, attention, attention_vjp

__all__ = ["AttentionGrads", "AttentionResult", "RowStats", "attention", "attention_vjp"]
