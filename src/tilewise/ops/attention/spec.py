"""The contract of attention as data, and the one validator that reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dims import Limit, Shape, Sizes, between, dividing, show
from tilewise.base.dtypes import FloatDType, unit_roundoff
from tilewise.base.errors import type_error, value_error
from tilewise.base.masks import Mask, PackedBits, RowIntervals, as_mask
from tilewise.base.operator import Argument, Number, Operator, Values

NAME = "attention"
LAYOUTS = ("bhnd", "bnhd")
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

LIMITS: Mapping[str, Limit] = {
    "D": between("D", 1, 512),
    "Dv": between("Dv", 1, 512),
    "Hk": dividing("Hk", "H"),
}

_finite = Values("be finite", np.isfinite)
_below_infinity = Values("be finite or -inf", lambda array: array < np.inf)

_ROWS: Shape = ("B", "H", "N")
_OUT: Shape = ("B", "H", "N", "Dv")

QUERY = Argument("q", (("B", "H", "N", "D"),), "queries", follows_layout=True)
KEY = Argument(
    "k",
    (("B", "Hk", "Nk", "D"),),
    "keys; query head h reads head h // (H // Hk)",
    follows_layout=True,
)
VALUE = Argument("v", (("B", "Hk", "Nk", "Dv"),), "values, one per key", follows_layout=True)
BIAS = Argument(
    "bias",
    (("B", "H", "N", "Nk"),),
    "added to the logits after the soft cap; broadcasts; has a gradient",
    broadcast=True,
)
SLOPES = Argument(
    "alibi_slopes",
    (("H",), ("B", "H")),
    "slope * abs(i + Nk - N - j) is subtracted from the logits",
    values=_finite,
)
SINKS = Argument(
    "sinks",
    (("H",),),
    "one extra logit per head in the denominator only; -inf is no sink; has a gradient",
    values=_below_infinity,
)
OUTPUT = Argument("o", (_OUT,), "output of the forward pass", follows_layout=True)
OUTPUT_COTANGENT = Argument("do", (_OUT,), "cotangent of o", follows_layout=True)
LSE_COTANGENT = Argument("dlse", (_ROWS,), "cotangent of lse")
LSE = Argument("stats", (_ROWS,), "lse of the forward pass")
MAXIMUM = Argument("stats.m", (_ROWS,), "row maximum times log2(e)")
LOG_SUM = Argument("stats.log_l", (_ROWS,), "logarithm of the row sum")

ARRAYS = (QUERY, KEY, VALUE, BIAS, SLOPES, SINKS)
COTANGENTS = (OUTPUT_COTANGENT, OUTPUT, LSE_COTANGENT, LSE, MAXIMUM, LOG_SUM)

# Inside these ranges scale / softcap and what is computed from it stay normal numbers in float32.
SOFTCAP = Number(
    "softcap", 1e-15, 1e15, "c: a logit x becomes c tanh(x / c), before the bias and the mask"
)
SCALE = Number("softmax_scale", 0.0, 1e15, "factor of q k; D ** -0.5 by default")

_BINDS = {
    letter: argument.name
    for argument in reversed((QUERY, KEY, VALUE))
    for letter in argument.shapes[0]
}

_SHAPES = {
    layout: {argument.name: argument.in_layout(layout) for argument in (*ARRAYS, *COTANGENTS)}
    for layout in LAYOUTS
}


class RowStats(NamedTuple):
    """What a backward pass needs of each softmax row: `lse = m * ln(2) + log_l`.

    The two are kept apart because their rounded sum loses `log_l` where `|m|` is large.

    Attributes:
        m: `(B, H, N)`, dtype of q. Row maximum times `log2(e)`; -inf for a row without keys.
        log_l: `(B, H, N)`, dtype of q. Natural logarithm of `sum exp(s - m * ln(2))`; 0 for a
            row without keys.
    """

    m: NDArray[Any]
    log_l: NDArray[Any]


class AttentionOutputs(NamedTuple):
    """What a forward pass returns; `o` is a `(B, H, N, Dv)` view in either layout."""

    o: NDArray[Any]
    stats: RowStats
    lse: NDArray[Any] | None
    max_logit: NDArray[Any] | None
    entropy: NDArray[Any] | None


class AttentionGrads(NamedTuple):
    """Gradients of attention.

    Attributes:
        dq: Shape and layout of q.
        dk: Shape and layout of k.
        dv: Shape and layout of v.
        dbias: Shape of bias, or None where no bias was given.
        dsinks: `(H,)`, or None where no sinks were given.
    """

    dq: NDArray[Any]
    dk: NDArray[Any]
    dv: NDArray[Any]
    dbias: NDArray[Any] | None = None
    dsinks: NDArray[Any] | None = None


class OutputTangents(NamedTuple):
    """Tangents of what a forward pass returns.

    Attributes:
        to: `(B, H, N, Dv)`, or `(B, N, H, Dv)` with `layout="bnhd"`; dtype of q. Tangent of o.
        tlse: `(B, H, N)`, dtype of q. Tangent of lse; 0 for a row without keys and sink.
    """

    to: NDArray[Any]
    tlse: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Needed:
    """Of which inputs a backward pass computes the gradient; the others are None."""

    q: bool = True
    k: bool = True
    v: bool = True
    bias: bool = True
    sinks: bool = True


ALL_NEEDED = Needed()


@dataclass(frozen=True, slots=True)
class Want:
    """Which statistics a forward pass returns besides `o` and the row statistics."""

    lse: bool = False
    max_logit: bool = False
    entropy: bool = False


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """A validated call; every array is a view of what the user gave, never a copy.

    Attributes:
        q: `(B, H, N, D)` in either layout, as are the other tensors.
        k: `(B, Hk, Nk, D)`.
        v: `(B, Hk, Nk, Dv)`.
        bias: 4-D with each size either full or 1, or None.
        bias_shape: The shape in which the user gave bias; that of its gradient.
        alibi_slopes: `(B or 1, H)`, or None.
        sinks: `(H,)`, or None.
        mask: The lowered mask, or None where every query sees every key.
        softcap: c of the soft cap, or None.
        softmax_scale: Factor of q k.
        layout: Layout of the user's tensors, and of the results.
        B: Batch.
        H: Query heads.
        Hk: Key/value heads.
        N: Queries.
        Nk: Keys.
        D: Entries of a query or key.
        Dv: Entries of a value.
        dtype: float32 or float64, native.
    """

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    bias: NDArray[Any] | None
    bias_shape: tuple[int, ...] | None
    alibi_slopes: NDArray[Any] | None
    sinks: NDArray[Any] | None
    mask: RowIntervals | PackedBits | None
    softcap: float | None
    softmax_scale: float
    layout: str
    B: int
    H: int
    Hk: int
    N: int
    Nk: int
    D: int
    Dv: int
    dtype: FloatDType
    dropout_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class CotangentCall:
    """Validated cotangents of a call, with the results of its forward pass.

    Attributes:
        do: `(B, H, N, Dv)` view in either layout, or None for zero.
        dlse: `(B, H, N)`, or None for zero.
        o: `(B, H, N, Dv)` view in either layout.
        stats: Row statistics.
    """

    do: NDArray[Any] | None
    dlse: NDArray[Any] | None
    o: NDArray[Any]
    stats: RowStats


@dataclass(frozen=True, slots=True)
class TangentCall:
    """Validated tangents of the inputs of a call; None is zero and costs nothing.

    Attributes:
        tq: `(B, H, N, D)` view in either layout, as are the next two.
        tk: `(B, Hk, Nk, D)`.
        tv: `(B, Hk, Nk, Dv)`.
        tbias: 4-D, the shape of the call's bias.
        tsinks: `(H,)`.
        o: `(B, H, N, Dv)` view in either layout: output of the forward pass.
        stats: Row statistics of the forward pass.
    """

    tq: NDArray[Any] | None
    tk: NDArray[Any] | None
    tv: NDArray[Any] | None
    tbias: NDArray[Any] | None
    tsinks: NDArray[Any] | None
    o: NDArray[Any]
    stats: RowStats


@dataclass(frozen=True, slots=True)
class SecondCall:
    """What the JVP of a VJP takes: cotangents, tangents of the inputs and of the cotangents.

    Attributes:
        cotangents: Cotangents of the call.
        tangents: Tangents of its inputs, with the same `o` and statistics.
        tdo: `(B, H, N, Dv)` view in either layout: tangent of do, or None for zero.
        tdlse: `(B, H, N)`: tangent of dlse, or None for zero.
        outputs: `jvp(call, tangents)` where it is known already, or None.
    """

    cotangents: CotangentCall
    tangents: TangentCall
    tdo: NDArray[Any] | None
    tdlse: NDArray[Any] | None
    outputs: OutputTangents | None


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
    layout: str = "bhnd",
) -> AttentionCall:
    """Validate a call and return it in the canonical layout.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape, memory layout or value.
    """
    shapes = _shapes_of(layout)
    sizes = Sizes(NAME, LIMITS)
    q_ = QUERY.check(NAME, q, sizes, shapes["q"], None)
    dtype = q_.dtype
    k_ = KEY.check(NAME, k, sizes, shapes["k"], dtype)
    v_ = VALUE.check(NAME, v, sizes, shapes["v"], dtype)
    if layout != "bhnd":
        q_, k_, v_ = q_.swapaxes(1, 2), k_.swapaxes(1, 2), v_.swapaxes(1, 2)

    bias_ = slopes_ = sinks_ = bias_shape = mask_ = None
    if bias is not None:
        array = BIAS.check(NAME, bias, sizes, BIAS.shapes, dtype)
        bias_, bias_shape = array[(None,) * (4 - array.ndim)], array.shape
    if alibi_slopes is not None:
        array = SLOPES.check(NAME, alibi_slopes, sizes, SLOPES.shapes, dtype)
        slopes_ = array[None] if array.ndim == 1 else array
    if sinks is not None:
        sinks_ = SINKS.check(NAME, sinks, sizes, SINKS.shapes, dtype)
    if mask is not None:
        lower = (mask if isinstance(mask, Mask) else as_mask(mask, NAME)).lower
        mask_ = lower(sizes["B"], sizes["H"], sizes["N"], sizes["Nk"], operator=NAME)

    return AttentionCall(
        q=q_,
        k=k_,
        v=v_,
        bias=bias_,
        bias_shape=bias_shape,
        alibi_slopes=slopes_,
        sinks=sinks_,
        mask=mask_,
        softcap=None if softcap is None else SOFTCAP.check(NAME, softcap),
        softmax_scale=sizes["D"] ** -0.5
        if softmax_scale is None
        else SCALE.check(NAME, softmax_scale),
        layout=layout,
        B=sizes["B"],
        H=sizes["H"],
        Hk=sizes["Hk"],
        N=sizes["N"],
        Nk=sizes["Nk"],
        D=sizes["D"],
        Dv=sizes["Dv"],
        dtype=dtype,
    )


def prepare_vjp(
    call: AttentionCall, do: object, o: object, stats: object, dlse: object = None
) -> CotangentCall:
    """Validate the cotangents of a call and the results of its forward pass.

    Args:
        call: The validated call.
        do: Cotangent of o.
        o: Output of the forward pass.
        stats: `RowStats`, or lse alone.
        dlse: Cotangent of lse, or None for zero.

    Raises:
        TypeError: For a wrong kind or dtype.
        ValueError: For a wrong shape or memory layout.
    """
    shapes, dtype = _SHAPES[call.layout], call.dtype
    sizes = Sizes(NAME, LIMITS)
    laid_out = call.layout != "bhnd"
    sizes.match("q", shapes["q"], call.q.swapaxes(1, 2).shape if laid_out else call.q.shape)
    sizes.match("v", shapes["v"], call.v.swapaxes(1, 2).shape if laid_out else call.v.shape)

    def check(argument: Argument, value: object) -> NDArray[Any]:
        array = argument.check(NAME, value, sizes, shapes[argument.name], dtype)
        return array.swapaxes(1, 2) if laid_out and argument.follows_layout else array

    if isinstance(stats, RowStats):
        stats_ = RowStats(check(MAXIMUM, stats.m), check(LOG_SUM, stats.log_l))
    elif isinstance(stats, np.ndarray):
        stats_ = stats_of_lse(check(LSE, stats))
    else:
        got = type(stats).__name__
        raise type_error(NAME, "stats", "be RowStats or lse as a numpy.ndarray", got)
    return CotangentCall(
        do=check(OUTPUT_COTANGENT, do),
        dlse=None if dlse is None else check(LSE_COTANGENT, dlse),
        o=check(OUTPUT, o),
        stats=stats_,
    )


def stats_of_lse(lse: NDArray[Any]) -> RowStats:
    """Return row statistics whose log-sum-exp is `lse`: `m = lse * log2(e)`, `log_l = 0`."""
    return RowStats(base2(lse.astype(np.float64), lse.dtype), np.zeros_like(lse))


def base2(natural: NDArray[np.float64], dtype: FloatDType) -> NDArray[Any]:
    """Return `natural * log2(e)` in a dtype, where a finite number stays finite.

    Logits of `finfo.min`, which additive padding masks make, would overflow to -inf, and their
    rows would be taken for empty ones.
    """
    largest = float(np.finfo(dtype).max)
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.clip(natural * LOG2E, -largest, largest)
        return np.where(np.isinf(natural), natural, finite).astype(dtype)


def arguments_table() -> str:
    """Return the arguments of attention as a Markdown table."""
    rows = [
        (argument.name, " or ".join(map(show, argument.shapes)), _rule_of(argument), argument.doc)
        for argument in ARRAYS
    ]
    rows += [
        (number.name, "number", f"{number.low:g} to {number.high:g}", number.doc)
        for number in (SOFTCAP, SCALE)
    ]
    rows.append(("mask", "Mask or boolean array", "broadcasts to (B, H, N, Nk)", "who sees whom"))
    rows.append(("layout", "string", " or ".join(map(repr, LAYOUTS)), "order of the dimensions"))
    lines = ["| argument | shape | rule | meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {shape} | {rule} | {doc} |" for name, shape, rule, doc in rows]
    return "\n".join(lines)


def _rule_of(argument: Argument) -> str:
    rules = ["float32 or float64" if argument is QUERY else "dtype of q"]
    if argument in (QUERY, KEY, VALUE):
        rules += [limit.doc for letter, limit in LIMITS.items() if _BINDS[letter] == argument.name]
    if argument.follows_layout:
        rules.append("contiguous last dimension")
    if argument.broadcast:
        rules.append("broadcasts")
    if argument.values is not None:
        rules.append(argument.values.requirement.removeprefix("be "))
    return ", ".join(rules)


def error_bound(
    dtype: FloatDType,
    quantity: str,
    call: AttentionCall,
    *,
    logit_size: float,
    magnitude: float,
    norm: float,
) -> float:
    """Bound the Frobenius norm of the rounding error of one result.

    Derivation, to first order in the unit roundoff u, with rounding errors independent and of mean
    zero: then the root mean square error of a sum of n terms is at most `u sqrt(n) sum |terms|`,
    and Frobenius norms add up those squares. In units of u:

    - A logit is a sum of D products, scaled, capped, biased and converted to base 2: its error is
      at most `(sqrt(D) + 4) L`, with L a bound of `scale sum_d |q_d k_d| + |bias| + ...`.
      Subtracting the maximum adds 2 L, and exp two ulp: `exp(s - m)` has the relative error
      `e_s = (sqrt(D) + 6) L + 4`.
    - A probability divides by a sum of Nk such: `e_p = 2 e_s + sqrt(Nk) + 3`.
    - `o = sum p v` has the error `e_p sum p |v|`.
    - `ds = p (do v - do o + dlse)` has the error of p twice, for o carries it as well, and that of
      sums over Dv: `e_ds = 2 e_p + sqrt(Dv) + 4`, times `p (|do| |v| + |do| sum p |v| + |dlse|)`.
    - dq, dk, dbias and dsinks are sums of ds, and dv is one of p: the square root of their length
      is added, and the magnitude is that of the same sum over absolute values.
    - Each result is rounded once: `+ norm`.

    The sum is doubled for float64, where the oracle has the same errors.

    Args:
        dtype: Dtype of the arithmetic.
        quantity: One of o, lse, max_logit, entropy, dq, dk, dv, dbias, dsinks.
        call: The call, for its sizes.
        logit_size: L.
        magnitude: Frobenius norm of the result's formula over absolute values, as
            `reference.magnitudes` computes it; divided by `norm` it is a condition number.
        norm: Frobenius norm of the exact result.

    Returns:
        The bound; divide by `norm` for the relative error.

    Source:
        Higham & Mary 2019, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci.
        Comput. 41(5), theorem 2.4, here for the second moment.
    """
    e_s = (math.sqrt(call.D) + 6) * logit_size + 4
    e_p = 2 * e_s + math.sqrt(call.Nk) + 3
    e_ds = 2 * e_p + math.sqrt(call.Dv) + 4
    spread = 1 if call.bias is None else call.B * call.H * call.N * call.Nk / max(call.bias.size, 1)
    error = {
        "o": e_p,
        "lse": e_p,
        "max_logit": e_s,
        "entropy": 2 * e_p,
        "dq": e_ds + math.sqrt(call.Nk),
        "dk": e_ds + math.sqrt(call.N * call.H / max(call.Hk, 1)),
        "dv": e_p + math.sqrt(call.N * call.H / max(call.Hk, 1)),
        "dbias": e_ds + math.sqrt(spread),
        "dsinks": e_ds + math.sqrt(call.B * call.N),
    }[quantity]
    oracle = 2 if dtype == np.float64 else 1
    return unit_roundoff(dtype) * oracle * (error * magnitude + norm)


def _shapes_of(layout: object) -> Mapping[str, tuple[Shape, ...]]:
    if not isinstance(layout, str):
        raise type_error(NAME, "layout", "be a string", type(layout).__name__)
    if layout not in _SHAPES:
        raise value_error(NAME, "layout", f"be {' or '.join(map(repr, LAYOUTS))}", repr(layout))
    return _SHAPES[layout]


OPERATOR = Operator(
    name=NAME,
    inputs=("q", "k", "v"),
    options=("mask", "bias", "alibi_slopes", "softcap", "sinks", "softmax_scale", "layout"),
    outputs=("o", "lse", "stats", "max_logit", "entropy"),
    residuals=RowStats._fields,
    differentiable=("q", "k", "v", "bias", "sinks"),
    prepare=prepare,
    prepare_vjp=prepare_vjp,
)

__all__ = [
    "OPERATOR",
    "AttentionCall",
    "AttentionGrads",
    "AttentionOutputs",
    "CotangentCall",
    "RowStats",
    "Want",
    "arguments_table",
    "error_bound",
    "prepare",
    "prepare_vjp",
]
