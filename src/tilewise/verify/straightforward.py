"""Attention as most people would write it, in the dtype of its inputs.

Whole matrices, one NumPy operation after the other: the yardstick of an implementation's accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.ops.attention.spec import AttentionCall
from tilewise.shared.philox import philox4x32

__all__ = [
    "Directions",
    "Pass",
    "directions",
    "dropout_factor",
    "evaluate",
    "gradients",
    "logit_tangents",
    "output_tangents",
    "per_key_head",
    "results",
    "second",
    "to_bias",
    "visible",
]

Array = NDArray[Any]
Results = dict[str, Array]


@dataclass(frozen=True)
class Pass:
    """All matrices of one evaluation; `k` and `v` repeated to one per query head."""

    call: AttentionCall
    q: Array
    k: Array
    v: Array
    x: Array  # scale q k^T
    t: Array | None  # tanh(x / softcap)
    slope_of_cap: Array | None
    s: Array  # -inf where masked
    m: Array  # (B, H, N, 1), 0 for a row without keys
    alive: Array  # (B, H, N, 1)
    p: Array
    keep: Array  # factor of dropout, (B, H, N, Nk) or (1, 1, 1, 1)
    p_sink: Array  # (B, H, N, 1)
    log_l: Array  # (B, H, N, 1)
    o: Array


@dataclass(frozen=True)
class Directions:
    """Tangents of the inputs and cotangents, zero where not given; tk and tv as k and v."""

    tq: Array
    tk: Array
    tv: Array
    tbias: Array  # broadcasts to (B, H, N, Nk)
    tsinks: Array  # (1, H, 1, 1); 0 where there is no sink
    tdo: Array
    tdlse: Array  # (B, H, N, 1)


def visible(call: AttentionCall) -> NDArray[np.bool_] | None:
    """Return the mask as booleans that broadcast to `(B, H, N, Nk)`, or None."""
    return None if call.mask is None else call.mask.to_bool(call.N, call.Nk)


def evaluate(call: AttentionCall, dtype: np.dtype[Any]) -> Pass:
    """Evaluate attention with whole matrices, every operation in `dtype`, for finite inputs."""
    q = np.ascontiguousarray(call.q, dtype)
    k, v = (_per_query_head(call, np.ascontiguousarray(x, dtype)) for x in (call.k, call.v))
    x = s = (q @ k.swapaxes(-1, -2)) * dtype.type(call.softmax_scale)
    t = slope_of_cap = None
    if call.softcap is not None:
        cap = dtype.type(call.softcap)
        t = np.tanh(s / cap)
        s, slope_of_cap = cap * t, 1 - t * t
    if call.bias is not None:
        s = s + call.bias.astype(dtype)
    if call.alibi_slopes is not None:
        s = s - call.alibi_slopes.astype(dtype)[..., None, None] * _distance(call, dtype)
    seen = visible(call)
    if seen is not None:
        s = np.where(seen, s, dtype.type(-np.inf))
    sink = np.full((1, 1, 1, 1), -np.inf, dtype)
    if call.sinks is not None:
        sink = call.sinks.astype(dtype)[None, :, None, None]
    m = np.maximum(s.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    alive = m != -np.inf
    m = np.where(alive, m, dtype.type(0))
    w, w_sink = np.exp(s - m), np.exp(sink - m)
    l = np.where(alive, w.sum(axis=-1, keepdims=True) + w_sink, dtype.type(1))
    p, keep = w / l, dropout_factor(call, dtype)
    return Pass(
        call=call,
        q=q,
        k=k,
        v=v,
        x=x,
        t=t,
        slope_of_cap=slope_of_cap,
        s=s,
        m=m,
        alive=alive,
        p=p,
        keep=keep,
        p_sink=w_sink / l,
        log_l=np.log(l),
        o=np.asarray(_kept(p, keep) @ v),
    )


def results(x: Pass) -> Results:
    """Return o and the row statistics of an evaluation."""
    lowest = -np.inf
    gap = np.where(x.p > 0, x.s - x.m, 0)
    sinks = 0 if x.call.sinks is None else x.call.sinks.astype(x.m.dtype)[None, :, None, None]
    gap_sink = np.where(x.p_sink > 0, sinks - x.m, 0)
    entropy = x.log_l - (x.p * gap).sum(axis=-1, keepdims=True) - x.p_sink * gap_sink
    return {
        "o": x.o,
        "lse": np.where(x.alive, x.m + x.log_l, lowest)[..., 0],
        "max_logit": x.s.max(axis=-1, initial=lowest),
        "entropy": np.where(x.alive, entropy, 0)[..., 0],
    }


@dataclass(frozen=True)
class _Backward:
    do: Array
    g: Array  # dp - delta
    delta: Array  # (B, H, N, 1)
    ds: Array
    dx: Array  # cotangent of scale q k^T, times the scale


def _backward(x: Pass, do: Array, dlse: Array | None) -> _Backward:
    dtype = x.q.dtype
    do = np.ascontiguousarray(do, dtype)
    delta = (do * x.o).sum(axis=-1, keepdims=True)
    if dlse is not None:
        delta = delta - dlse.astype(dtype)[..., None]
    g = _kept(do @ x.v.swapaxes(-1, -2), x.keep) - delta
    ds = x.p * g
    dx = (ds if x.slope_of_cap is None else ds * x.slope_of_cap) * dtype.type(x.call.softmax_scale)
    return _Backward(do, g, delta, ds, dx)


def gradients(x: Pass, do: Array, dlse: Array | None) -> Results:
    """Return the gradients of an evaluation, for finite cotangents."""
    call, y = x.call, _backward(x, do, dlse)
    found = {
        "dq": y.dx @ x.k,
        "dk": per_key_head(call, y.dx.swapaxes(-1, -2) @ x.q),
        "dv": per_key_head(call, _kept(x.p, x.keep).swapaxes(-1, -2) @ y.do),
    }
    if call.bias is not None:
        found["dbias"] = to_bias(call, y.ds)
    if call.sinks is not None:
        found["dsinks"] = -(x.p_sink * y.delta).sum(axis=(0, 2, 3))
    return found


def directions(x: Pass, tangents: Mapping[str, Array]) -> Directions:
    """Return finite tangents in the dtype of an evaluation, one per query head."""
    call, dtype = x.call, x.q.dtype

    def given(name: str, *shape: int) -> Array:
        found = tangents.get(name)
        return np.zeros(shape, dtype) if found is None else np.ascontiguousarray(found, dtype)

    tsinks = given("tsinks", call.H)
    if call.sinks is not None:
        tsinks = np.where(call.sinks == -np.inf, dtype.type(0), tsinks)
    return Directions(
        tq=given("tq", *x.q.shape),
        tk=_per_query_head(call, given("tk", *call.k.shape)),
        tv=_per_query_head(call, given("tv", *call.v.shape)),
        tbias=given("tbias", 1, 1),
        tsinks=tsinks[None, :, None, None],
        tdo=given("tdo", *x.o.shape),
        tdlse=given("tdlse", *x.o.shape[:3])[..., None],
    )


def logit_tangents(x: Pass, d: Directions) -> tuple[Array, Array]:
    """Return the tangents of `x = scale q k^T` and of s, in a masked place as in any other."""
    tx = (d.tq @ x.k.swapaxes(-1, -2) + x.q @ d.tk.swapaxes(-1, -2)) * x.q.dtype.type(
        x.call.softmax_scale
    )
    return tx, (tx if x.slope_of_cap is None else tx * x.slope_of_cap) + d.tbias


def output_tangents(x: Pass, d: Directions) -> Results:
    """Return the tangents of o and lse."""
    _, ts = logit_tangents(x, d)
    weighted = x.p * ts
    mu = weighted.sum(axis=-1, keepdims=True) + x.p_sink * d.tsinks
    kept = _kept(weighted, x.keep)
    to = np.asarray(kept @ x.v - mu * x.o + _kept(x.p, x.keep) @ d.tv)
    return {"to": to, "tlse": mu[..., 0]}


def second(x: Pass, do: Array, dlse: Array | None, d: Directions) -> Results:
    """Return the tangents of the gradients, for finite cotangents."""
    call, dtype = x.call, x.q.dtype
    y, outputs, (tx, ts) = _backward(x, do, dlse), output_tangents(x, d), logit_tangents(x, d)
    mu = outputs["tlse"][..., None]
    tp, tp_sink = x.p * (ts - mu), x.p_sink * (d.tsinks - mu)
    tdp = _kept(d.tdo @ x.v.swapaxes(-1, -2) + y.do @ d.tv.swapaxes(-1, -2), x.keep)
    tdelta = (d.tdo * x.o + y.do * outputs["to"]).sum(axis=-1, keepdims=True) - d.tdlse
    tds = tp * y.g + x.p * (tdp - tdelta)
    tdx = tds
    if x.t is not None and x.slope_of_cap is not None:
        tt = x.slope_of_cap * (tx / dtype.type(call.softcap))
        tdx = tds * x.slope_of_cap - 2 * x.t * tt * y.ds
    tdx = tdx * dtype.type(call.softmax_scale)
    tdk = tdx.swapaxes(-1, -2) @ x.q + y.dx.swapaxes(-1, -2) @ d.tq
    tdv = _kept(tp, x.keep).swapaxes(-1, -2) @ y.do
    tdv = tdv + _kept(x.p, x.keep).swapaxes(-1, -2) @ d.tdo
    found = {
        "tdq": np.asarray(tdx @ x.k + y.dx @ d.tk),
        "tdk": per_key_head(call, tdk),
        "tdv": per_key_head(call, tdv),
    }
    if call.bias is not None:
        found["tdbias"] = to_bias(call, tds)
    if call.sinks is not None:
        found["tdsinks"] = -(tp_sink * y.delta + x.p_sink * tdelta).sum(axis=(0, 2, 3))
    return found


def _distance(call: AttentionCall, dtype: np.dtype[Any]) -> Array:
    i, j = np.arange(call.N)[:, None], np.arange(call.Nk)
    return np.asarray(np.abs(i + (call.Nk - call.N) - j), dtype)


def dropout_factor(call: AttentionCall, dtype: np.dtype[Any]) -> Array:
    """Return what dropout multiplies p by, `(B, H, N, Nk)`, or a single 1."""
    if not call.dropout_p:
        return np.ones((1, 1, 1, 1), dtype)
    b, h, i, j = np.ogrid[: call.B, : call.H, : call.N, : call.Nk]
    counter = np.stack(np.broadcast_arrays(j[..., ::4] // 4, i + call.Nk - call.N, h, b))
    words = philox4x32(counter, (call.seed % 2**32, call.seed >> 32))
    lanes = np.moveaxis(words, 0, -1).reshape(call.B, call.H, call.N, 4 * words.shape[-1])
    lanes = lanes[..., : call.Nk]
    return np.where(lanes < call.drop_threshold, 0, call.keep_factor).astype(dtype)


def _kept(x: Array, keep: Array) -> Array:
    return x if keep.size == 1 else x * keep


def _per_query_head(call: AttentionCall, x: Array) -> Array:
    """Repeat a tensor of keys or values for each query head."""
    return x if x.shape[1] == call.H else np.repeat(x, call.H // call.Hk, axis=1)


def per_key_head(call: AttentionCall, x: Array) -> Array:
    """Sum over the query heads that share a key/value head."""
    if x.shape[1] == call.Hk:
        return x
    grouped = x.reshape(call.B, call.Hk, call.H // call.Hk, *x.shape[2:])
    return np.asarray(grouped.sum(axis=2))


def to_bias(call: AttentionCall, x: Array) -> Array:
    """Sum over the dimensions in which the bias is broadcast."""
    shape = () if call.bias is None else call.bias.shape
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1)
    summed = x.sum(axis=axes, keepdims=True)
    return np.asarray(summed.reshape(call.bias_shape or ()))
