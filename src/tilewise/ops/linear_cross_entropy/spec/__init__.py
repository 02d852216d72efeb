"""The contract of the operator: its arguments, its validator and its error bound."""

from __future__ import annotations

from .arguments import (
    CLASSES,
    FIRST_CLASS,
    GRADIENT_FILTER,
    IGNORE_INDEX,
    LABEL_SMOOTHING,
    LIMITS,
    NAME,
    SOFTCAP,
    TOKEN_CHUNK,
    VOCAB_CHUNK,
    WEIGHT,
    Z_LOSS,
)
from .bounds import error_bound
from .calls import (
    CotangentCall,
    ForwardSecondCall,
    LossCall,
    LossGrads,
    LossOutputs,
    LossStats,
    Needed,
    RowTangents,
    SecondCall,
    TangentCall,
    Want,
    reached,
)
from .checks import (
    PROBABILITIES,
    Problem,
    check_reduction,
    check_shift,
    prepare,
    prepare_jvp,
    prepare_vjp,
)

ALL_NEEDED = Needed()

__all__ = [
    "ALL_NEEDED",
    "CLASSES",
    "FIRST_CLASS",
    "GRADIENT_FILTER",
    "IGNORE_INDEX",
    "LABEL_SMOOTHING",
    "LIMITS",
    "NAME",
    "PROBABILITIES",
    "SOFTCAP",
    "TOKEN_CHUNK",
    "VOCAB_CHUNK",
    "WEIGHT",
    "Z_LOSS",
    "CotangentCall",
    "ForwardSecondCall",
    "LossCall",
    "LossGrads",
    "LossOutputs",
    "LossStats",
    "Needed",
    "Problem",
    "RowTangents",
    "SecondCall",
    "TangentCall",
    "Want",
    "check_reduction",
    "check_shift",
    "error_bound",
    "prepare",
    "prepare_jvp",
    "prepare_vjp",
    "reached",
]
