"""The cross-entropy as functions of flat tuples of arrays, from which the doors are made.

The implementations compute rows; here their losses are reduced, and cotangents are spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.operator import Arrays, FlatOperator, Implementation

from .spec import (
    ALL_NEEDED,
    NAME,
    Cotangents,
    EntropyCall,
    EntropyGrads,
    EntropyOutputs,
    EntropyStats,
    EntropyTangents,
    ForwardSecondCall,
    Needed,
    Options,
    Problem,
    SecondCall,
    Tangents,
    check_range,
    check_weight,
    reduced_outputs,
    reduced_tangents,
    spread_cotangents,
)

Array = NDArray[Any]
Shape = tuple[int, ...]


def forward(chosen: Implementation, call: EntropyCall) -> EntropyOutputs:
    """Return the results of a call, reduced."""
    found: EntropyOutputs = chosen.forward(call, None)
    return found if chosen.reduces else reduced_outputs(call, found)


def vjp(
    chosen: Implementation,
    call: EntropyCall,
    given: Cotangents,
    stats: EntropyStats,
    needed: Needed = ALL_NEEDED,
    out: Array | None = None,
) -> EntropyGrads:
    """Return the gradients for cotangents of the reduced results."""
    rows = given if chosen.reduces else spread_cotangents(call, given)
    found: EntropyGrads = chosen.vjp(call, rows, stats, needed, out)
    return found


def vjp_into(
    chosen: Implementation, problem: Problem, given: Cotangents, stats: EntropyStats, out: Array
) -> EntropyGrads:
    """Write the gradient of the logits into an array of the user's shape."""
    view = problem.rows.view(out)
    target = np.empty(problem.rows.sizes, out.dtype) if view is None else view
    found = vjp(chosen, problem.call, given, stats, ALL_NEEDED, target)
    if view is None:
        out[...] = problem.rows.back(target)
    return found


def jvp(
    chosen: Implementation, call: EntropyCall, tangents: Tangents, stats: EntropyStats
) -> EntropyTangents:
    """Return the tangents of the reduced results."""
    assert chosen.jvp is not None
    found: EntropyTangents = chosen.jvp(call, tangents, stats)
    return found if chosen.reduces else reduced_tangents(call, found)


def vjp_jvp(
    chosen: Implementation,
    call: EntropyCall,
    second: SecondCall,
    stats: EntropyStats,
    needed: Needed = ALL_NEEDED,
) -> EntropyGrads:
    """Return the tangents of the gradients for cotangents of the reduced results."""
    assert chosen.vjp_jvp is not None
    if not chosen.reduces:
        second = SecondCall(
            spread_cotangents(call, second.cotangents),
            second.tangents,
            spread_cotangents(call, second.moved),
        )
    found: EntropyGrads = chosen.vjp_jvp(call, second, stats, needed)
    return found


def _shapes(inputs: Sequence[Shape | None], options: Mapping[str, Any]) -> tuple[Shape, ...]:
    logits = inputs[0]
    assert logits is not None
    A, _, I = logits
    loss = (A, I) if options["reduction"] == "none" else ()
    return loss, (A, I), loss, *[(A, I)] * len(EntropyStats._fields)


def _folds(kind: str, arrays: Sequence[Array | None], options: Mapping[str, Any]) -> bool:
    """Return whether A is a batch: each row has its own loss, and nothing belongs to all rows."""
    weight = FLAT.first[kind] + FLAT.inputs.index("weight")
    return options["reduction"] == "none" and (len(arrays) <= weight or arrays[weight] is None)


def _prepare(inputs: Sequence[Array | None], options: Mapping[str, Any]) -> EntropyCall:
    """Validate a call; the options were checked by the door."""
    logits, probabilities, targets, weight = (*inputs, None, None, None)[:4]
    assert logits is not None
    chosen = Options(**{k: v for k, v in options.items() if k != "implementation"})
    if targets is not None:
        targets = np.ascontiguousarray(targets, np.int64)
        check_range(NAME, targets, logits.shape[1], chosen.ignore_index)
    if weight is not None:
        weight = np.ascontiguousarray(weight)
        check_weight(NAME, weight)
    return EntropyCall(logits, targets, probabilities, weight, chosen)


def _forward(chosen: Implementation, call: EntropyCall, needed: Any) -> Arrays:
    loss, lse, z_loss, stats = forward(chosen, call)
    return (loss, lse, z_loss, *stats)


def _vjp(
    chosen: Implementation,
    call: EntropyCall,
    needed: Sequence[bool],
    cotangents: Arrays,
    outputs: Arrays,
    residuals: Sequence[Any],
) -> Arrays:
    stats = EntropyStats(*residuals)
    return tuple(vjp(chosen, call, Cotangents(*cotangents), stats, Needed(*needed)))


def _jvp(
    chosen: Implementation,
    call: EntropyCall,
    needed: Sequence[bool],
    tangents: Sequence[Any],
    outputs: Arrays,
    residuals: Sequence[Any],
) -> Arrays:
    return tuple(jvp(chosen, call, Tangents(*tangents), EntropyStats(*residuals)))


def _vjp_jvp(
    chosen: Implementation,
    call: EntropyCall,
    needed: Sequence[bool],
    cotangent_tangents: Arrays,
    tangents: Sequence[Any],
    cotangents: Arrays,
    output_tangents: Arrays,
    outputs: Arrays,
    residuals: Sequence[Any],
) -> Arrays:
    second = SecondCall(
        Cotangents(*cotangents), Tangents(*tangents), Cotangents(*cotangent_tangents)
    )
    return tuple(vjp_jvp(chosen, call, second, EntropyStats(*residuals), Needed(*needed)))


def _jvp_jvp(
    chosen: Implementation,
    call: EntropyCall,
    needed: Sequence[bool],
    seconds: Sequence[Any],
    others: Sequence[Any],
    tangents: Sequence[Any],
    output_tangents: Arrays,
    other_output_tangents: Arrays,
    outputs: Arrays,
    residuals: Sequence[Any],
) -> Arrays:
    assert chosen.jvp_jvp is not None
    second = ForwardSecondCall(Tangents(*tangents), Tangents(*others), Tangents(*seconds))
    found: EntropyTangents = chosen.jvp_jvp(call, second, EntropyStats(*residuals))
    return tuple(found if chosen.reduces else reduced_tangents(call, found))


FLAT = FlatOperator(
    name=NAME,
    inputs=("logits", "probabilities", "targets", "weight"),
    active_inputs=2,
    outputs=("loss", "lse", "z_loss"),
    active_outputs=3,
    residuals=EntropyStats._fields,
    narrow_residuals=0,
    narrow_outputs=0,
    rank=3,
    shapes=_shapes,
    folds=_folds,
    prepare=_prepare,
    forward=_forward,
    vjp=_vjp,
    jvp=_jvp,
    vjp_jvp=_vjp_jvp,
    jvp_jvp=_jvp_jvp,
    output_tangents=False,
    read_outputs=(),
    strided=True,
)
