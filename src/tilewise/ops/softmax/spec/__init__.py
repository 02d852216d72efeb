"""The contract of the softmax: its arguments, its validator and its error bound."""

from __future__ import annotations

from tilewise.shared.rows import (
    Rows,
    axes_of,
    inverse,
    known_rows_in_order,
    rows_along,
    rows_in_order,
)

from .bounds import error_bound
from .calls import (
    CotangentCall,
    ForwardSecondCall,
    Needed,
    SecondCall,
    SoftmaxCall,
    SoftmaxGrads,
    SoftmaxOutputs,
    SoftmaxStats,
    SoftmaxTangents,
    TangentCall,
    Want,
)
from .checks import (
    TEMPERATURE,
    Problem,
    check_boolean,
    check_broadcast,
    check_sink,
    check_temperature,
    prepare_jvp,
    prepare_vjp,
    prepare_vjp_jvp,
    sink_number,
)

ALL_NEEDED = Needed()

__all__ = [
    "ALL_NEEDED",
    "TEMPERATURE",
    "CotangentCall",
    "ForwardSecondCall",
    "Needed",
    "Problem",
    "Rows",
    "SecondCall",
    "SoftmaxCall",
    "SoftmaxGrads",
    "SoftmaxOutputs",
    "SoftmaxStats",
    "SoftmaxTangents",
    "TangentCall",
    "Want",
    "axes_of",
    "check_boolean",
    "check_broadcast",
    "check_sink",
    "check_temperature",
    "error_bound",
    "inverse",
    "known_rows_in_order",
    "prepare_jvp",
    "prepare_vjp",
    "prepare_vjp_jvp",
    "rows_along",
    "rows_in_order",
    "sink_number",
]
