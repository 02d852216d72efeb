"""Packed sequences: each is a call of its own, whose results are put beside one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.masks import RowIntervals
from tilewise.ops.attention.spec import (
    AttentionCall,
    AttentionGrads,
    AttentionOutputs,
    CotangentCall,
    ForwardSecondCall,
    OutputTangents,
    RowStats,
    SecondCall,
    TangentCall,
    Want,
)

Array = NDArray[Any]


def parts(call: AttentionCall) -> Iterator[tuple[AttentionCall, slice, slice]]:
    """Return each sequence as a call, with its queries and its keys among all."""
    assert call.sequences is not None
    for s, (queries, keys) in enumerate(call.sequences.slices()):
        slopes, mask = call.alibi_slopes, call.mask
        keys_of_bias = slice(keys.stop - keys.start)
        part = replace(
            call,
            q=call.q[:, :, queries],
            k=call.k[:, :, keys],
            v=call.v[:, :, keys],
            bias=None if call.bias is None else call.bias[:, :, queries, keys_of_bias],
            bias_shape=None,
            alibi_slopes=None if slopes is None else slopes[s % len(slopes)][None],
            mask=RowIntervals(mask.rows[:, :, queries]) if isinstance(mask, RowIntervals) else None,
            N=queries.stop - queries.start,
            Nk=keys.stop - keys.start,
            sequences=None,
            first_entry=s,
        )
        yield part, queries, keys


def forward(
    call: AttentionCall, want: Want, run: Callable[[AttentionCall, Want], AttentionOutputs]
) -> AttentionOutputs:
    """Return the results of all sequences."""
    rows = (1, call.H, call.N)
    o, m, log_l = _empty(call.N, call.H, call.Dv), np.empty(rows), np.empty(rows)
    lse = np.empty(rows) if want.lse else None
    max_logit = np.empty(rows) if want.max_logit else None
    entropy = np.empty(rows) if want.entropy else None
    for part, queries, _ in parts(call):
        found = run(part, want)
        o[:, :, queries] = found.o
        m[:, :, queries], log_l[:, :, queries] = found.stats
        for whole, piece in zip((lse, max_logit, entropy), found[2:5], strict=True):
            if whole is not None:
                whole[:, :, queries] = piece
    full = o if want.o_full or not call.is_narrow else None
    return AttentionOutputs(o, RowStats(m, log_l), lse, max_logit, entropy, full)


def vjp(
    call: AttentionCall,
    cotangents: CotangentCall,
    run: Callable[[AttentionCall, CotangentCall], AttentionGrads],
) -> AttentionGrads:
    """Return the gradients of all sequences."""

    def of_part(part: AttentionCall, queries: slice, keys: slice) -> AttentionGrads:
        return run(part, _cotangents(cotangents, queries))

    return _gradients(call, of_part)


def jvp(
    call: AttentionCall,
    tangents: TangentCall,
    run: Callable[[AttentionCall, TangentCall], OutputTangents],
) -> OutputTangents:
    """Return the tangents of all sequences."""
    return _output_tangents(
        call, lambda part, queries, keys: run(part, _tangents(tangents, queries, keys))
    )


def jvp_jvp(
    call: AttentionCall,
    second: ForwardSecondCall,
    run: Callable[[AttentionCall, ForwardSecondCall], OutputTangents],
) -> OutputTangents:
    """Return the tangents of the output tangents of all sequences."""
    moves = second.tangents, second.others, second.seconds

    def of_part(part: AttentionCall, queries: slice, keys: slice) -> OutputTangents:
        return run(part, ForwardSecondCall(*(_tangents(x, queries, keys) for x in moves)))

    return _output_tangents(call, of_part)


def vjp_jvp(
    call: AttentionCall,
    second: SecondCall,
    run: Callable[[AttentionCall, SecondCall], AttentionGrads],
) -> AttentionGrads:
    """Return the tangents of the gradients of all sequences."""

    def of_part(part: AttentionCall, queries: slice, keys: slice) -> AttentionGrads:
        known = second.outputs
        given = SecondCall(
            cotangents=_cotangents(second.cotangents, queries),
            tangents=_tangents(second.tangents, queries, keys),
            tdo=_some(second.tdo, queries),
            tdlse=_some(second.tdlse, queries),
            outputs=known and OutputTangents(*(x[:, :, queries] for x in known)),
        )
        return run(part, given)

    return _gradients(call, of_part)


def _output_tangents(
    call: AttentionCall, of_part: Callable[[AttentionCall, slice, slice], OutputTangents]
) -> OutputTangents:
    to, tlse = _empty(call.N, call.H, call.Dv), np.empty((1, call.H, call.N))
    for part, queries, keys in parts(call):
        to[:, :, queries], tlse[:, :, queries] = of_part(part, queries, keys)
    return OutputTangents(to, tlse)


def _gradients(
    call: AttentionCall, of_part: Callable[[AttentionCall, slice, slice], AttentionGrads]
) -> AttentionGrads:
    dq = _empty(call.N, call.H, call.D)
    dk, dv = _empty(call.Nk, call.Hk, call.D), _empty(call.Nk, call.Hk, call.Dv)
    dbias = None if call.bias is None else np.zeros(call.bias.shape)
    dsinks = None if call.sinks is None else np.zeros(call.H)
    for part, queries, keys in parts(call):
        grads = of_part(part, queries, keys)
        dq[:, :, queries], dk[:, :, keys], dv[:, :, keys] = grads[:3]
        if dbias is not None and grads.dbias is not None:
            dbias[:, :, queries, : grads.dbias.shape[3]] = grads.dbias
        if dsinks is not None and grads.dsinks is not None:
            dsinks += grads.dsinks
    if dbias is not None and call.bias_shape is not None:
        dbias = dbias.reshape(call.bias_shape)
    return AttentionGrads(dq, dk, dv, dbias, dsinks)


def _empty(rows: int, heads: int, entries: int) -> Array:
    """Return a new `(1, heads, rows, entries)` view of an array in the layout of packed rows."""
    return np.empty((1, rows, heads, entries)).swapaxes(1, 2)


def _cotangents(x: CotangentCall, queries: slice) -> CotangentCall:
    do, dlse = _some(x.do, queries), _some(x.dlse, queries)
    return CotangentCall(do, dlse, x.o[:, :, queries], _stats(x.stats, queries))


def _tangents(x: TangentCall, queries: slice, keys: slice) -> TangentCall:
    keys_of_bias = slice(keys.stop - keys.start)
    return TangentCall(
        tq=_some(x.tq, queries),
        tk=_some(x.tk, keys),
        tv=_some(x.tv, keys),
        tbias=None if x.tbias is None else x.tbias[:, :, queries, keys_of_bias],
        tsinks=x.tsinks,
        o=x.o[:, :, queries],
        stats=_stats(x.stats, queries),
    )


def _stats(stats: RowStats, queries: slice) -> RowStats:
    return RowStats(stats.m[:, :, queries], stats.log_l[:, :, queries])


def _some(x: Array | None, rows: slice) -> Array | None:
    return None if x is None else x[:, :, rows]
