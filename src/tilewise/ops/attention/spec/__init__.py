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
    PACKED,
    PACKED_NAME,
    QUERY,
    SINKS,
    SLOPES,
    VALUE,
    arguments_table,
    canonical,
    laid_out,
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
    Paging,
    RowStats,
    SecondCall,
    TangentCall,
    Want,
    base2,
)
from .checks import prepare, prepare_jvp, prepare_tangents, prepare_vjp, prepare_vjp_jvp
from .sequences import Sequences

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
    "PACKED",
    "PACKED_NAME",
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
    "Paging",
    "RowStats",
    "SecondCall",
    "Sequences",
    "TangentCall",
    "Want",
    "arguments_table",
    "base2",
    "canonical",
    "error_bound",
    "laid_out",
    "prepare",
    "prepare_jvp",
    "prepare_tangents",
    "prepare_vjp",
    "prepare_vjp_jvp",
]
