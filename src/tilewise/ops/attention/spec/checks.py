"""The one place that checks a call: what it returns needs no further check."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tilewise.base._lowering import KEY_TILE, QUERY_TILE
from tilewise.base.dims import Sizes
from tilewise.base.errors import type_error, value_error
from tilewise.base.masks import Mask, PackedBits, RowIntervals, as_mask
from tilewise.base.operator import Argument

from .arguments import (
    BIAS,
    COTANGENT_TANGENTS,
    COTANGENTS,
    DIFFERENTIABLE,
    DROPOUT,
    KEY,
    LIMITS,
    LOG_SUM,
    LSE,
    MAXIMUM,
    NAME,
    OUTPUT,
    OUTPUT_TANGENTS,
    PACKED,
    PACKED_NAME,
    QUERY,
    SCALE,
    SEED,
    SHAPES,
    SINKS,
    SLOPES,
    SOFTCAP,
    TANGENTS,
    VALUE,
    canonical,
    laid_out,
    shapes_in,
)
from .calls import (
    AttentionCall,
    CotangentCall,
    InputTangents,
    OutputTangents,
    RowStats,
    SecondCall,
    TangentCall,
    stats_of_lse,
)
from .sequences import lowered_per_sequence, sequences_of

_Maybe: TypeAlias = NDArray[Any] | None
_Moves: TypeAlias = tuple[_Maybe, _Maybe, _Maybe, _Maybe, _Maybe]
_Results = tuple[NDArray[Any], RowStats]


def prepare(
    q: object,
    k: object,
    v: object,
    *,
    mask: object = None,
    bias: object = None,
    alibi_slopes: object = None,
    softcap: object = None,
    sinks: object = None,
    softmax_scale: object = None,
    dropout_p: object = 0.0,
    seed: object = None,
    layout: str = "bhnd",
    cu_seqlens: tuple[object, object] | None = None,
) -> AttentionCall:
    """Validate a call and return it in the canonical layout.

    The arguments are those of `arguments_table`; mask may also be lowered already.

    Args:
        q: Queries; `(total_q, H, D)` with cu_seqlens.
        k: Keys.
        v: Values.
        mask: Who sees whom.
        bias: Added to the logits.
        alibi_slopes: Slopes of distances.
        softcap: The soft cap.
        sinks: A logit per head.
        softmax_scale: Factor of the products.
        dropout_p: Probability with which pairs are dropped.
        seed: Which ones.
        layout: Order of the dimensions.
        cu_seqlens: Where packed sequences begin among the queries and among the keys, or None;
            the layout is then that of packed sequences.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape, memory layout or value.
    """
    if cu_seqlens is None:
        name, shapes = NAME, shapes_in(layout)
    else:
        name, layout, shapes = PACKED_NAME, PACKED, SHAPES[PACKED]
    sizes = Sizes(name, LIMITS)
    q_ = QUERY.check(name, q, sizes, shapes["q"], None)
    dtype = q_.dtype
    k_ = KEY.check(name, k, sizes, shapes["k"], dtype)
    v_ = VALUE.check(name, v, sizes, shapes["v"], dtype)
    if layout != "bhnd":
        q_, k_, v_ = (canonical(x, layout) for x in (q_, k_, v_))
    sequences = None
    if cu_seqlens is not None:
        sequences = sequences_of(*cu_seqlens, q_.shape[2], k_.shape[2])
        sizes.bind("S", len(sequences), "cu_seqlens_q")
        sizes.bind("max_k", sequences.max_k, "cu_seqlens_k")

    bias_ = slopes_ = sinks_ = bias_shape = None
    mask_: RowIntervals | PackedBits | None = None
    if bias is not None:
        array = BIAS.check(name, bias, sizes, shapes["bias"], dtype)
        if sequences is not None:
            _check_rows(array, q_.shape[2])
        bias_, bias_shape = array[(None,) * (4 - array.ndim)], array.shape
    if alibi_slopes is not None:
        array = SLOPES.check(name, alibi_slopes, sizes, shapes["alibi_slopes"], dtype)
        slopes_ = array[None] if array.ndim == 1 else array
    if sinks is not None:
        sinks_ = SINKS.check(name, sinks, sizes, shapes["sinks"], dtype)
    if mask is not None:
        if sequences is None:
            mask_ = _lowered(mask, sizes)
        else:
            mask_ = lowered_per_sequence(mask, sequences)
    dropout_p_ = DROPOUT.check(name, dropout_p)
    if seed is None and dropout_p_ > 0:
        raise type_error(name, "seed", "be an integer where dropout_p is above 0", "None")

    B, H, N, D = q_.shape
    return AttentionCall(
        q=q_,
        k=k_,
        v=v_,
        bias=bias_,
        bias_shape=bias_shape,
        alibi_slopes=slopes_,
        sinks=sinks_,
        mask=mask_,
        softcap=None if softcap is None else SOFTCAP.check(name, softcap),
        softmax_scale=D**-0.5 if softmax_scale is None else SCALE.check(name, softmax_scale),
        layout=layout,
        B=B,
        H=H,
        Hk=k_.shape[1],
        N=N,
        Nk=k_.shape[2],
        D=D,
        Dv=v_.shape[3],
        dtype=dtype,
        dropout_p=dropout_p_,
        seed=0 if seed is None else SEED.check(name, seed),
        sequences=sequences,
    )


def prepare_vjp(
    call: AttentionCall, do: object, o: object, stats: object, dlse: object = None
) -> CotangentCall:
    """Validate the cotangents of a call and the results of its forward pass.

    Args:
        call: The validated call.
        do: Cotangent of o, or None for zero.
        o: Output of the forward pass.
        stats: `RowStats`, or lse alone.
        dlse: Cotangent of lse, or None for zero.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape or memory layout.
    """
    fits = _Fits(call)
    return fits.cotangents(do, dlse, fits.results(o, stats))


def prepare_jvp(
    call: AttentionCall,
    tq: object,
    tk: object,
    tv: object,
    o: object,
    stats: object,
    tbias: object = None,
    tsinks: object = None,
) -> TangentCall:
    """Validate the tangents of a call and the results of its forward pass.

    Args:
        call: The validated call.
        tq: Tangent of q, or None for zero; so are the other tangents.
        tk: Tangent of k.
        tv: Tangent of v.
        o: Output of the forward pass.
        stats: `RowStats`, or lse alone.
        tbias: Tangent of bias, of exactly its shape.
        tsinks: Tangent of sinks.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape or memory layout, or the tangent of what was not given.
    """
    fits = _Fits(call)
    return TangentCall(*fits.tangents((tq, tk, tv, tbias, tsinks)), *fits.results(o, stats))


def prepare_tangents(
    call: AttentionCall,
    tq: object,
    tk: object,
    tv: object,
    tbias: object = None,
    tsinks: object = None,
) -> InputTangents:
    """Validate the tangents of a call whose forward pass is yet to be made; see `prepare_jvp`."""
    return InputTangents(*_Fits(call).tangents((tq, tk, tv, tbias, tsinks)))


def prepare_vjp_jvp(
    call: AttentionCall,
    do: object,
    tq: object,
    tk: object,
    tv: object,
    o: object,
    stats: object,
    dlse: object = None,
    tbias: object = None,
    tsinks: object = None,
    tdo: object = None,
    tdlse: object = None,
    outputs: tuple[object, object] | None = None,
) -> SecondCall:
    """Validate what the JVP of the VJP takes.

    Args:
        call: The validated call.
        do: Cotangent of o, or None for zero; so are the other cotangents and tangents.
        tq: Tangent of q.
        tk: Tangent of k.
        tv: Tangent of v.
        o: Output of the forward pass.
        stats: `RowStats`, or lse alone.
        dlse: Cotangent of lse.
        tbias: Tangent of bias, of exactly its shape.
        tsinks: Tangent of sinks.
        tdo: Tangent of do.
        tdlse: Tangent of dlse.
        outputs: `OutputTangents` where they are known already.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape or memory layout, or the tangent of what was not given.
    """
    fits = _Fits(call)
    results = fits.results(o, stats)
    tdo_, tdlse_ = map(fits.optional, COTANGENT_TANGENTS, (tdo, tdlse))
    return SecondCall(
        cotangents=fits.cotangents(do, dlse, results),
        tangents=TangentCall(*fits.tangents((tq, tk, tv, tbias, tsinks)), *results),
        tdo=tdo_,
        tdlse=tdlse_,
        outputs=None
        if outputs is None
        else OutputTangents(*map(fits.array, OUTPUT_TANGENTS, outputs)),
    )


class _Fits:
    """Checks arrays that have to fit a validated call, and returns them in its layout."""

    def __init__(self, call: AttentionCall) -> None:
        self._call = call
        self._name = NAME if call.sequences is None else PACKED_NAME
        self._shapes = SHAPES[call.layout]
        self._sizes = Sizes(self._name, LIMITS)
        for argument, array in ((QUERY, call.q), (KEY, call.k), (VALUE, call.v)):
            given = laid_out(array, call.layout)
            self._sizes.match(argument.name, self._shapes[argument.name], given.shape)
        if call.sequences is not None:
            self._sizes.bind("max_k", call.sequences.max_k, "cu_seqlens_k")

    def array(self, argument: Argument, value: object) -> NDArray[Any]:
        """Return an array that must be given."""
        shapes = self._shapes[argument.name]
        array = argument.check(self._name, value, self._sizes, shapes, self._call.dtype)
        if argument.follows_layout:
            return canonical(array, self._call.layout)
        rows = self._call.sequences is not None and shapes[0][-1] == "total_q"
        return array[None] if rows else array

    def optional(self, argument: Argument, value: object) -> NDArray[Any] | None:
        """Return an array, or None where it is not given."""
        return None if value is None else self.array(argument, value)

    def results(self, o: object, stats: object) -> _Results:
        """Return the output and the row statistics, made from lse where only that is given."""
        o_ = self.array(OUTPUT, o)
        if isinstance(stats, RowStats):
            return o_, RowStats(self.array(MAXIMUM, stats.m), self.array(LOG_SUM, stats.log_l))
        if isinstance(stats, np.ndarray):
            return o_, stats_of_lse(self.array(LSE, stats))
        got = type(stats).__name__
        raise type_error(self._name, "stats", "be RowStats or lse as a numpy.ndarray", got)

    def cotangents(self, do: object, dlse: object, results: _Results) -> CotangentCall:
        """Return the cotangents with the results of the forward pass."""
        do_, dlse_ = map(self.optional, COTANGENTS, (do, dlse))
        return CotangentCall(do_, dlse_, *results)

    def tangents(self, values: Iterable[object]) -> _Moves:
        """Return the tangents of the inputs."""
        tq, tk, tv, tbias, tsinks = map(self._tangent, TANGENTS, DIFFERENTIABLE, values)
        return tq, tk, tv, tbias, tsinks

    def _tangent(self, argument: Argument, of: Argument, value: object) -> NDArray[Any] | None:
        if value is not None and getattr(self._call, of.name) is None:
            raise value_error(self._name, argument.name, f"come with {of.name}", f"no {of.name}")
        array = self.optional(argument, value)
        if array is None or of is not BIAS:
            return array
        if array.shape != self._call.bias_shape:
            requirement = f"have the shape {self._call.bias_shape} of bias"
            raise value_error(self._name, argument.name, requirement, array.shape)
        return array[(None,) * (4 - array.ndim)]


def _check_rows(bias: NDArray[Any], total_q: int) -> None:
    """Raise where the bias of packed sequences does not have a row for each query."""
    if bias.ndim < 2 or bias.shape[-2] != total_q:
        requirement = f"have shape (H or 1, total_q, max_k or 1) with total_q={total_q}"
        raise value_error(PACKED_NAME, "bias", requirement, bias.shape)


def _lowered(mask: object, sizes: Sizes) -> RowIntervals | PackedBits:
    """Return the form of a mask that kernels read."""
    B, H, N, Nk = (sizes[letter] for letter in ("B", "H", "N", "Nk"))
    if not isinstance(mask, RowIntervals | PackedBits):
        lower = (mask if isinstance(mask, Mask) else as_mask(mask, NAME)).lower
        return lower(B, H, N, Nk, operator=NAME)
    words = -(-N // QUERY_TILE)
    forms: dict[str, tuple[type[np.generic], tuple[int, int]]] = {
        "rows": (np.int32, (N, 4)),
        "bits": (np.uint16, (Nk, words)),
        "tiles": (np.uint8, (words, -(-Nk // KEY_TILE))),
    }
    for name in (field.name for field in fields(mask)):
        array, (dtype, shape) = getattr(mask, name), forms[name]
        if array.dtype != dtype or not array.flags.c_contiguous:
            requirement = f"be C-contiguous with dtype {np.dtype(dtype)}"
            got = f"strides {array.strides}" if array.dtype == dtype else str(array.dtype)
            raise value_error(NAME, f"mask {name}", requirement, got)
        leading = array.shape[:2] in itertools.product({1, B}, {1, H})
        if array.shape[2:] != shape or not leading:
            requirement = f"have shape (1 or {B}, 1 or {H}, {shape[0]}, {shape[1]})"
            raise value_error(NAME, f"mask {name}", requirement, array.shape)
    if isinstance(mask, RowIntervals) and not _ascending(mask.rows, Nk):
        requirement = f"be ascending intervals within 0 to Nk={Nk}"
        raise value_error(NAME, "mask rows", requirement, "others")
    return mask


def _ascending(rows: NDArray[np.int32], Nk: int) -> bool:
    """Return whether `lo0 <= hi0 <= lo1 <= hi1` within `[0, Nk]`, or lo1 and hi1 are 0."""
    lo0, hi0, lo1, hi1 = np.moveaxis(rows, -1, 0)
    second = (hi0 <= lo1) & (lo1 <= hi1) & (hi1 <= Nk) | (lo1 == 0) & (hi1 == 0)
    return bool(((lo0 >= 0) & (lo0 <= hi0) & (hi0 <= Nk) & second).all())
