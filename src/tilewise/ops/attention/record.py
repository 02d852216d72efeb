"""Attention as functions of flat tuples of arrays, from which the doors are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dims import Sizes
from tilewise.base.literals import from_literal
from tilewise.base.operator import Arrays, FlatOperator, Implementation

from .spec import (
    BIAS,
    KEY,
    LIMITS,
    NAME,
    QUERY,
    SINKS,
    SLOPES,
    VALUE,
    AttentionCall,
    AttentionGrads,
    Needed,
    OutputTangents,
    RowStats,
    Want,
    prepare,
    prepare_jvp,
    prepare_vjp,
    prepare_vjp_jvp,
)

MASK_ARRAYS = 4
"""How many arrays a mask may have, such as lengths or the ids of documents."""

Shape = tuple[int, ...]
_NUMBERS = ("softcap", "softmax_scale", "dropout_p", "layout")
_CHECKED_CALLS = 256
_WANTS = {(m, e): Want(True, m, e) for m in (False, True) for e in (False, True)}
_checked: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def shapes(inputs: Sequence[Shape | None], options: Mapping[str, Any]) -> tuple[Shape, ...]:
    """Return the shapes of outputs and residuals, after matching those of the inputs."""
    layout = options["layout"]
    sizes = Sizes(NAME, LIMITS)
    for argument, got in zip((QUERY, KEY, VALUE, BIAS, SINKS, SLOPES), inputs, strict=False):
        if got is None:
            continue
        if argument.broadcast:
            sizes.match_broadcast(argument.name, argument.shapes[0], got)
        else:
            sizes.match(argument.name, argument.in_layout(layout), got)
    B, H, N, Dv = (sizes[letter] for letter in ("B", "H", "N", "Dv"))
    o = (B, H, N, Dv) if layout == "bhnd" else (B, N, H, Dv)
    return o, *((B, H, N),) * 5


def folds(kind: str, arrays: Sequence[NDArray[Any] | None], options: Mapping[str, Any]) -> bool:
    """Return whether nothing is shared over the batch, and nothing depends on the place in it."""
    start = FLAT.first[kind]
    others = arrays[start + 3 : start + len(FLAT.inputs)]
    return all([a is None for a in others])


def prepare_flat(
    inputs: Sequence[NDArray[Any] | None], options: Mapping[str, Any]
) -> AttentionCall:
    """Validate a call whose mask is a literal and whose seed is an int64 array."""
    q, k, v, *others = inputs
    if not any([a is not None for a in others]):
        return _prepare_alike(q, k, v, options)
    others += [None] * (len(FLAT.inputs) - len(inputs))
    bias, sinks, alibi_slopes, seed, *arrays = others
    given = tuple([a for a in arrays if a is not None])
    return prepare(
        _readable(q),
        _readable(k),
        _readable(v),
        mask=_mask(options, given),
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        seed=None if seed is None else int(seed) % 2**64,
        **{name: options[name] for name in _NUMBERS},
    )


def _prepare_alike(q: Any, k: Any, v: Any, options: Mapping[str, Any]) -> AttentionCall:
    """Validate a call without further arrays; one like an earlier call needs no second check."""
    key = (*options.values(), *[(a.shape, a.strides, a.dtype, a.flags.num) for a in (q, k, v)])
    known = _checked.get(key)
    if known is not None:
        if options["layout"] != "bhnd":
            q, k, v = q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)
        return AttentionCall(q, k, v, *known)
    arrays = [_readable(a) for a in (q, k, v)]
    call = prepare(*arrays, mask=_mask(options, ()), **{name: options[name] for name in _NUMBERS})
    if arrays[0] is q and arrays[1] is k and arrays[2] is v:
        if len(_checked) >= _CHECKED_CALLS:
            _checked.clear()
        _checked[key] = tuple([getattr(call, field.name) for field in fields(call)[3:]])
    return call


def _mask(options: Mapping[str, Any], arrays: tuple[NDArray[Any], ...]) -> Any:
    text = options["mask"]
    return None if text is None else from_literal(text, arrays, NAME)


def _readable(x: NDArray[Any] | None) -> NDArray[Any] | None:
    """Return an array whose last dimension is contiguous, as the kernels read it."""
    if x is None or x.strides[-1] == x.itemsize or x.shape[-1] < 2:
        return x
    return np.ascontiguousarray(x)


def forward(chosen: Implementation, call: AttentionCall, needed: Sequence[bool]) -> Arrays:
    """Return o, lse, max_logit, entropy, m, log_l."""
    o, stats, lse, max_logit, entropy = chosen.forward(call, _WANTS[needed[2], needed[3]])
    return _laid_out(call, o), lse, max_logit, entropy, stats.m, stats.log_l


def vjp(
    chosen: Implementation,
    call: AttentionCall,
    needed: Sequence[bool],
    cotangents: Arrays,
    outputs: Arrays,
    residuals: Sequence[Any],
) -> Arrays:
    """Return dq, dk, dv, dbias, dsinks."""
    do, dlse = cotangents
    o, stats = _readable(outputs[0]), RowStats(*residuals)
    given = prepare_vjp(call, _readable(do), o, stats, dlse)
    return _grads(call, chosen.vjp(call, given, Needed(*needed)))


def jvp(
    chosen: Implementation,
    call: AttentionCall,
    needed: Sequence[bool],
    tangents: Arrays,
    outputs: Arrays,
    residuals: Sequence[Any],
) -> Arrays:
    """Return to, tlse."""
    assert chosen.jvp is not None
    tq, tk, tv = map(_readable, tangents[:3])
    o, stats = _readable(outputs[0]), RowStats(*residuals)
    given = prepare_jvp(call, tq, tk, tv, o, stats, *tangents[3:])
    to, tlse = chosen.jvp(call, given)
    return _laid_out(call, to), tlse


def vjp_jvp(
    chosen: Implementation,
    call: AttentionCall,
    needed: Sequence[bool],
    cotangent_tangents: Arrays,
    tangents: Arrays,
    cotangents: Arrays,
    output_tangents: Arrays,
    outputs: Arrays,
    residuals: Sequence[Any],
) -> Arrays:
    """Return the tangents of dq, dk, dv, dbias, dsinks."""
    assert chosen.vjp_jvp is not None
    (do, dlse), (tdo, tdlse), (to, tlse) = cotangents, cotangent_tangents, output_tangents
    do, tdo, to, o = map(_readable, (do, tdo, to, outputs[0]))
    tq, tk, tv = map(_readable, tangents[:3])
    tbias, tsinks = tangents[3:]
    given = prepare_vjp_jvp(
        call,
        do,
        tq,
        tk,
        tv,
        o,
        RowStats(*residuals),
        dlse=dlse,
        tbias=tbias,
        tsinks=tsinks,
        tdo=tdo,
        tdlse=tdlse,
        outputs=None if to is None or tlse is None else OutputTangents(to, tlse),
    )
    return _grads(call, chosen.vjp_jvp(call, given, Needed(*needed)))


def _laid_out(call: AttentionCall, x: NDArray[Any] | None) -> NDArray[Any] | None:
    """Return a contiguous array in the layout of the call."""
    return x if x is None or call.layout == "bhnd" else np.ascontiguousarray(x.swapaxes(1, 2))


def _grads(call: AttentionCall, grads: AttentionGrads) -> Arrays:
    dq, dk, dv = (_laid_out(call, grad) for grad in grads[:3])
    return dq, dk, dv, grads.dbias, grads.dsinks


FLAT = FlatOperator(
    name=NAME,
    inputs=(
        "q",
        "k",
        "v",
        "bias",
        "sinks",
        "alibi_slopes",
        "seed",
        *(f"mask{i}" for i in range(MASK_ARRAYS)),
    ),
    active_inputs=5,
    outputs=("o", "lse", "max_logit", "entropy"),
    active_outputs=2,
    residuals=RowStats._fields,
    rank=4,
    shapes=shapes,
    folds=folds,
    prepare=prepare_flat,
    forward=forward,
    vjp=vjp,
    jvp=jvp,
    vjp_jvp=vjp_jvp,
)
