"""Attention as functions of flat tuples of arrays, from which the doors are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dims import Sizes
from tilewise.base.dtypes import is_narrow
from tilewise.base.literals import from_literal
from tilewise.base.operator import Arrays, FlatOperator, Implementation

from .spec import (
    BIAS,
    KEY,
    LIMITS,
    NAME,
    PACKED,
    QUERY,
    SINKS,
    SLOPES,
    VALUE,
    AttentionCall,
    AttentionGrads,
    ForwardSecondCall,
    Needed,
    RowStats,
    TangentCall,
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
_WANTS = {flags: Want(True, *flags) for flags in product((False, True), repeat=3)}
_checked: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def shapes(inputs: Sequence[Shape | None], options: Mapping[str, Any]) -> tuple[Shape, ...]:
    """Return the shapes of outputs and residuals, after matching those of the inputs."""
    layout = options["layout"]
    if layout == PACKED:
        # The frontend has matched them already.
        q, _, v = inputs[:3]
        assert q is not None and v is not None
        rows = (1, q[2], q[1])
        return (*q[:3], v[3]), *(rows,) * 5, (*q[:3], v[3])
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
    return o, *((B, H, N),) * 5, o


def folds(kind: str, arrays: Sequence[NDArray[Any] | None], options: Mapping[str, Any]) -> bool:
    """Return whether nothing is shared over the batch, and nothing depends on the place in it."""
    start = FLAT.first[kind]
    others = arrays[start + 3 : start + len(FLAT.inputs)]
    return all([a is None for a in others])


def split_over(kind: str, arrays: Sequence[Any], options: Mapping[str, Any]) -> int:
    """Return how many first dimensions are batches: also the heads, where keys have as many."""
    if not folds(kind, arrays, options):
        return 0
    q, k = arrays[FLAT.first[kind] :][:2]
    return 2 if options["layout"] == "bhnd" and q.shape[1] == k.shape[1] else 1


def prepare_flat(
    inputs: Sequence[NDArray[Any] | None], options: Mapping[str, Any]
) -> AttentionCall:
    """Validate a call whose mask is a literal and whose seed is an array of integers.

    Packed sequences are `(1, total_q, H, D)`.
    """
    q, k, v, *others = inputs
    if not any([a is not None for a in others]):
        return _prepare_alike(q, k, v, options)
    others += [None] * (len(FLAT.inputs) - len(inputs))
    bias, sinks, alibi_slopes, seed, q_starts, k_starts, *arrays = others
    given = tuple([a for a in arrays if a is not None])
    packed = options["layout"] == PACKED
    return prepare(
        *[_readable(a[0] if packed and a is not None else a) for a in (q, k, v)],
        mask=_mask(options, given),
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        seed=None if seed is None else _seed(seed),
        cu_seqlens=(q_starts, k_starts) if packed else None,
        **{name: options[name] for name in _NUMBERS},
    )


def _seed(seed: NDArray[Any]) -> int:
    """Return a seed that is one integer, or two of 32 bits, the lower one first."""
    if seed.ndim == 0:
        return int(seed) % 2**64
    low, high = (int(word) % 2**32 for word in seed)
    return low | high << 32


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
    """Return o, lse, max_logit, entropy, m, log_l, o_full; the last only of 16 bits."""
    want = _WANTS[needed[2], needed[3], needed[-1]]
    o, stats, lse, max_logit, entropy, o_full = chosen.forward(call, want)
    o_full = _laid_out(call, o_full) if want.o_full else None
    return _laid_out(call, o), lse, max_logit, entropy, stats.m, stats.log_l, o_full


def vjp(
    chosen: Implementation,
    call: AttentionCall,
    needed: Sequence[bool],
    cotangents: Arrays,
    outputs: Arrays,
    residuals: Sequence[Any],
) -> Arrays:
    """Return dq, dk, dv, dbias, dsinks."""
    do, dlse = _of(call, *cotangents)
    o, stats = _known(call, outputs, residuals)
    given = prepare_vjp(call, do, o, stats, dlse)
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
    (tq, tk, tv), (tbias, tsinks) = _of(call, *tangents[:3]), tangents[3:]
    o, stats = _known(call, outputs, residuals)
    given = prepare_jvp(call, tq, tk, tv, o, stats, tbias, tsinks)
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
    (do, dlse), (tdo, tdlse) = _of(call, *cotangents), _of(call, *cotangent_tangents)
    (tq, tk, tv), (tbias, tsinks) = _of(call, *tangents[:3]), tangents[3:]
    o, stats = _known(call, outputs, residuals)
    to, tlse = _of(call, *output_tangents)
    # Of 16 bits, to has lost digits that rowsum(do * to) needs: it is computed anew.
    lost = to is None or tlse is None or is_narrow(to.dtype)
    given = prepare_vjp_jvp(
        call,
        do,
        tq,
        tk,
        tv,
        o,
        stats,
        dlse=dlse,
        tbias=tbias,
        tsinks=tsinks,
        tdo=tdo,
        tdlse=tdlse,
        outputs=None if lost else (to, tlse),
    )
    return _grads(call, chosen.vjp_jvp(call, given, Needed(*needed)))


def jvp_jvp(
    chosen: Implementation,
    call: AttentionCall,
    needed: Sequence[bool],
    seconds: Arrays,
    others: Arrays,
    tangents: Arrays,
    output_tangents: Arrays,
    other_output_tangents: Arrays,
    outputs: Arrays,
    residuals: Sequence[Any],
) -> Arrays:
    """Return the tangents of to and tlse."""
    assert chosen.jvp_jvp is not None
    o, stats = _known(call, outputs, residuals)

    def given(moves: Arrays) -> TangentCall:
        (tq, tk, tv), (tbias, tsinks) = _of(call, *moves[:3]), moves[3:]
        return prepare_jvp(call, tq, tk, tv, o, stats, tbias, tsinks)

    second = ForwardSecondCall(given(tangents), given(others), given(seconds))
    wo, wlse = chosen.jvp_jvp(call, second)
    return _laid_out(call, wo), wlse


def _known(
    call: AttentionCall, outputs: Arrays, residuals: Sequence[Any]
) -> tuple[NDArray[Any] | None, RowStats]:
    """Return the output, as exact as it was saved, and the row statistics."""
    m, log_l, o_full = residuals
    o, m, log_l = _of(call, outputs[0] if o_full is None else o_full, m, log_l)
    assert m is not None and log_l is not None
    return o, RowStats(m, log_l)


def _of(call: AttentionCall, *arrays: NDArray[Any] | None) -> list[NDArray[Any] | None]:
    """Return tensors and row statistics as a call takes them."""
    if call.sequences is None:
        return [_readable(a) if a is not None and a.ndim == 4 else a for a in arrays]
    return [None if a is None else _readable(a[0]) if a.ndim == 4 else a[0] for a in arrays]


def _laid_out(call: AttentionCall, x: NDArray[Any] | None) -> NDArray[Any] | None:
    """Return a contiguous array in the layout of the call, with a batch of 1 where it has none."""
    if x is None or call.layout == "bhnd":
        return x
    return np.ascontiguousarray(x.swapaxes(1, 2))


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
        "q_starts",
        "k_starts",
        *(f"mask{i}" for i in range(MASK_ARRAYS)),
    ),
    active_inputs=5,
    outputs=("o", "lse", "max_logit", "entropy"),
    active_outputs=2,
    residuals=(*RowStats._fields, "o_full"),
    narrow_residuals=1,
    narrow_outputs=1,
    rank=4,
    shapes=shapes,
    folds=folds,
    prepare=prepare_flat,
    forward=forward,
    vjp=vjp,
    jvp=jvp,
    vjp_jvp=vjp_jvp,
    jvp_jvp=jvp_jvp,
    split_over=split_over,
    read_inputs=(
        "seed",
        "q_starts",
        "k_starts",
        *(f"mask{i}" for i in range(MASK_ARRAYS)),
    ),
)
