"""The contract of the cross-entropy: its arguments, its validator and its error bound."""

from __future__ import annotations

from .bounds import error_bound
from .calls import (
    Cotangents,
    EntropyCall,
    EntropyGrads,
    EntropyOutputs,
    EntropyStats,
    EntropyTangents,
    ForwardSecondCall,
    Needed,
    Options,
    SecondCall,
    Tangents,
)
from .checks import (
    LABEL_SMOOTHING,
    NAME,
    REDUCTIONS,
    SOFTCAP,
    Z_LOSS,
    Problem,
    check_class_axis,
    check_classes,
    check_options,
    check_range,
    check_weight,
    target_shapes,
)
from .reduction import reduced_outputs, reduced_tangents, row_scale, spread_cotangents

ALL_NEEDED = Needed()

__all__ = [
    "ALL_NEEDED",
    "LABEL_SMOOTHING",
    "NAME",
    "REDUCTIONS",
    "SOFTCAP",
    "Z_LOSS",
    "Cotangents",
    "EntropyCall",
    "EntropyGrads",
    "EntropyOutputs",
    "EntropyStats",
    "EntropyTangents",
    "ForwardSecondCall",
    "Needed",
    "Options",
    "Problem",
    "SecondCall",
    "Tangents",
    "check_class_axis",
    "check_classes",
    "check_options",
    "check_range",
    "check_weight",
    "error_bound",
    "reduced_outputs",
    "reduced_tangents",
    "row_scale",
    "spread_cotangents",
    "target_shapes",
]
