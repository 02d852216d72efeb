"""The operator as functions of flat tuples of arrays, from which the doors are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import round_to
from tilewise.base.operator import Arrays, FlatOperator, Implementation

from .spec import (
    NAME,
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
    prepare,
)

Array = NDArray[Any]
Shape = tuple[int, ...]

OPTIONS = (
    "ignore_index",
    "label_smoothing",
    "z_loss",
    "softcap",
    "reduction",
    "token_chunk",
    "vocab_chunk",
    "gradient_filter",
)
"""The options of a call; beside them are "lse" and "entropy", whether these are asked for."""

PART = ("first_class", "classes")
"""The options of a call for a part of the classes; without them it is for all."""

_GRADIENTS = {"dhidden": "hidden", "dweight": "weight", "dbias": "bias"}


@dataclass(frozen=True, eq=False)
class FlatCall(LossCall):
    """A call with the outputs that are asked for; the others are arrays without entries."""

    lse: bool
    entropy: bool


def joins_gradients(dtype: Any, options: Mapping[str, Any]) -> bool:
    """Return whether the gradients of the loss are computed together with it.

    They are made for a cotangent of 1 and multiplied later, for which float16 lacks the range.
    """
    joined = options["reduction"] != "none" and options["vocab_chunk"] is None
    return joined and dtype != np.float16


def shapes(inputs: Sequence[Shape | None], options: Mapping[str, Any]) -> tuple[Shape, ...]:
    """Return the shapes of outputs and residuals."""
    hidden, weight, bias = inputs[:3]
    assert hidden is not None and weight is not None
    rows: Shape = (hidden[0],)
    loss = rows if options["reduction"] == "none" else ()
    lse, entropy = (rows if options[name] else (0,) for name in ("lse", "entropy"))
    return loss, lse, entropy, rows, rows, rows, hidden, weight, bias or (0,)


def folds(kind: str, arrays: Sequence[Array | None], options: Mapping[str, Any]) -> bool:
    """Return False: tokens that share a mean and a gradient of weight are one problem."""
    return False


def prepare_flat(inputs: Sequence[Array | None], options: Mapping[str, Any]) -> FlatCall:
    """Validate a call."""
    hidden, weight, bias, targets, class_weight = inputs
    given = {name: options[name] for name in OPTIONS}
    given |= {name: options[name] for name in PART if name in options}
    call = prepare(hidden, weight, targets, bias=bias, class_weight=class_weight, **given)
    return FlatCall(**vars(call), lse=options["lse"], entropy=options["entropy"])


def forward(chosen: Implementation, call: FlatCall, needed: Sequence[bool]) -> Arrays:
    """Return loss, lse, entropy, argmax, m, log_l, dhidden, dweight, dbias."""
    argmax, gradients = needed[3], Needed(*needed[6:])
    want = Want(
        entropy=call.entropy,
        argmax=argmax,
        ignored=call.lse or call.entropy or argmax,
        gradients=gradients if any(needed[6:]) else None,
    )
    found: LossOutputs = chosen.forward(call, want)
    m, log_l = found.stats
    lse = _nothing(call)
    if call.lse:
        lse = m + log_l if found.lse is None else found.lse
    entropy = _nothing(call) if found.entropy is None else found.entropy
    loss = found.loss if chosen.reduces else call.reduce(found.loss)
    return loss, lse, entropy, found.argmax, m, log_l, *found.grads


def vjp(
    chosen: Implementation,
    call: FlatCall,
    needed: Sequence[bool],
    cotangents: Arrays,
    outputs: Arrays,
    residuals: Sequence[Any],
) -> Arrays:
    """Return dhidden, dweight, dbias."""
    dloss, dlse, dentropy = (_some(a) for a in cotangents)
    wanted = Needed(*needed)
    joined = joins_gradients(call.dtype, vars(call)) and not chosen.reduces
    if joined and dloss is not None and dlse is None and dentropy is None:
        grads = LossGrads(*residuals[2:])
        missing = [want and grad is None for want, grad in zip(needed, grads, strict=True)]
        if any(missing):
            # The function of the forward pass, so that gradients that were kept have equal bits.
            grads = chosen.forward(call, Want(ignored=False, gradients=wanted)).grads
        return tuple([_times(grad, dloss) for grad in grads])
    given = cotangent_call(chosen, call, (dloss, dlse, dentropy), outputs, residuals)
    return tuple(chosen.vjp(call, given, wanted))


def jvp(
    chosen: Implementation,
    call: FlatCall,
    needed: Sequence[bool],
    tangents: Sequence[Any],
    outputs: Arrays,
    residuals: Sequence[Any],
) -> Arrays:
    """Return tloss, tlse, tentropy."""
    assert chosen.jvp is not None
    moved: RowTangents = chosen.jvp(call, _tangents(chosen, call, tangents, outputs, residuals))
    return _reduced(chosen, call, moved)


def jvp_jvp(
    chosen: Implementation,
    call: FlatCall,
    needed: Sequence[bool],
    seconds: Sequence[Any],
    others: Sequence[Any],
    tangents: Sequence[Any],
    output_tangents: Arrays,
    other_output_tangents: Arrays,
    outputs: Arrays,
    residuals: Sequence[Any],
) -> Arrays:
    """Return the tangents of tloss, tlse, tentropy."""
    assert chosen.jvp_jvp is not None
    t, u, w = (
        _tangents(chosen, call, given, outputs, residuals) for given in (tangents, others, seconds)
    )
    return _reduced(chosen, call, chosen.jvp_jvp(call, ForwardSecondCall(t, u, w)))


def _reduced(chosen: Implementation, call: FlatCall, moved: RowTangents) -> Arrays:
    """Return tangents of the results as the call reduces them, with nothing for what it lacks."""
    tlse = moved.tlse if call.lse else _nothing(call)
    tentropy = _nothing(call) if moved.tentropy is None else moved.tentropy
    tloss = moved.tloss if chosen.reduces else call.reduce(moved.tloss)
    return tloss, tlse, tentropy


def vjp_jvp(
    chosen: Implementation,
    call: FlatCall,
    needed: Sequence[bool],
    cotangent_tangents: Arrays,
    tangents: Sequence[Any],
    cotangents: Arrays,
    output_tangents: Arrays,
    outputs: Arrays,
    residuals: Sequence[Any],
) -> Arrays:
    """Return the tangents of dhidden, dweight, dbias."""
    assert chosen.vjp_jvp is not None
    tdloss, tdlse, tdentropy = (_some(a) for a in cotangent_tangents)
    second = SecondCall(
        cotangent_call(chosen, call, cotangents, outputs, residuals),
        _tangents(chosen, call, tangents, outputs, residuals),
        tdloss if chosen.reduces else call.spread(tdloss),
        tdlse,
        tdentropy,
    )
    return tuple(chosen.vjp_jvp(call, second, Needed(*needed)))


def cotangent_call(
    chosen: Implementation,
    call: FlatCall,
    cotangents: Arrays,
    outputs: Arrays,
    residuals: Sequence[Any],
) -> CotangentCall:
    """Return the cotangents of a call as implementations take them."""
    dloss, dlse, dentropy = (_some(a) for a in cotangents)
    if not chosen.reduces:
        dloss = call.spread(dloss)
    stats = LossStats(*residuals[:2])
    return CotangentCall(dloss, dlse, dentropy, stats, _some(outputs[2]))


def _tangents(
    chosen: Implementation,
    call: FlatCall,
    tangents: Sequence[Any],
    outputs: Arrays,
    residuals: Sequence[Any],
) -> TangentCall:
    if not chosen.reduces:
        tangents = [None if t is None else np.ascontiguousarray(t) for t in tangents]
    thidden, tweight, tbias = tangents
    entropy = _some(outputs[2])
    ignored = call.lse or call.entropy
    return TangentCall(thidden, tweight, tbias, LossStats(*residuals[:2]), entropy, ignored)


def _some(array: Array | None) -> Array | None:
    """Return an array, or None in place of one that holds nothing."""
    return array if array is not None and array.size else None


def _nothing(call: FlatCall) -> Array:
    return np.empty(0, call.compute_dtype)


def _times(grad: Array | None, factor: Array) -> Array | None:
    """Return a gradient times the cotangent of the loss, rounded once."""
    return None if grad is None else round_to(grad * factor, grad.dtype)


FLAT = FlatOperator(
    name=NAME,
    inputs=("hidden", "weight", "bias", "targets", "class_weight"),
    active_inputs=3,
    outputs=("loss", "lse", "entropy", "argmax"),
    active_outputs=3,
    residuals=(*LossStats._fields, *_GRADIENTS),
    narrow_residuals=0,
    narrow_outputs=0,
    rank=2,
    shapes=shapes,
    folds=folds,
    prepare=prepare_flat,
    forward=forward,
    vjp=vjp,
    jvp=jvp,
    vjp_jvp=vjp_jvp,
    jvp_jvp=jvp_jvp,
    output_tangents=False,
    read_outputs=("entropy",),
    dtypes={"argmax": "int64", **_GRADIENTS},
    kept_gradients=len(_GRADIENTS),
    joins=joins_gradients,
    orders=True,
)
