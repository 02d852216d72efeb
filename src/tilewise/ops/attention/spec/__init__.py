"""The contract of attention: its arguments as data, its validator and its error bound."""

from __future__ import annotations

from tilewise.base.operator import Operator

from .arguments import (
    ARRAYS,
    BIAS,
    DIFFERENTIABLE,
    KEY,
    LIMITS,
    NAME,
    QUERY,
    SINKS,
    SLOPES,
    VALUE,
    arguments_table,
)
from .bounds import error_bound
from .calls import (
    ALL_NEEDED,
    LN2,
    AttentionCall,
    AttentionGrads,
    AttentionOutputs,
    CotangentCall,
    InputTangents,
    Needed,
    OutputTangents,
    RowStats,
    SecondCall,
    TangentCall,
    Want,
    base2,
)
from .checks import prepare, prepare_jvp, prepare_tangents, prepare_vjp, prepare_vjp_jvp

OPERATOR = Operator(
    name=NAME,
    inputs=("q", "k", "v"),
    options=(
        "mask",
        "bias",
        "alibi_slopes",
        "softcap",
        "sinks",
        "softmax_scale",
        "dropout_p",
        "seed",
        "layout",
    ),
    outputs=("o", "lse", "stats", "max_logit", "entropy"),
    residuals=RowStats._fields,
    differentiable=tuple(argument.name for argument in DIFFERENTIABLE),
    prepare=prepare,
    prepare_vjp=prepare_vjp,
)

__all__ = [
    "ALL_NEEDED",
    "ARRAYS",
    "BIAS",
    "KEY",
    "LIMITS",
    "LN2",
    "NAME",
    "OPERATOR",
    "QUERY",
    "SINKS",
    "SLOPES",
    "VALUE",
    "AttentionCall",
    "AttentionGrads",
    "AttentionOutputs",
    "CotangentCall",
    "InputTangents",
    "Needed",
    "OutputTangents",
    "RowStats",
    "SecondCall",
    "TangentCall",
    "Want",
    "arguments_table",
    "base2",
    "error_bound",
    "prepare",
    "prepare_jvp",
    "prepare_tangents",
    "prepare_vjp",
    "prepare_vjp_jvp",
]
