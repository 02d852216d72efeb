"""What attention takes, as data: arrays, numbers, sizes and layouts."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dims import Limit, Shape, between, dividing, show
from tilewise.base.dtypes import FLOATS, listed
from tilewise.base.errors import type_error, value_error
from tilewise.base.operator import Argument, Number, Values

NAME = "attention"
PACKED_NAME = "attention_varlen"
LAYOUTS = ("bhnd", "bnhd")
PACKED = "packed"
"""The layout of packed sequences: `(total_q, H, D)`, without a batch."""

LIMITS: Mapping[str, Limit] = {
    "D": between("D", 1, 512),
    "Dv": between("Dv", 1, 512),
    "Hk": dividing("Hk", "H"),
}


@dataclass(frozen=True, slots=True)
class Whole:
    """One argument that is a non-negative integer of so many bits."""

    name: str
    bits: int
    doc: str

    def check(self, operator: str, value: object) -> int:
        """Return the number as an int, or raise."""
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise type_error(operator, self.name, "be an integer", type(value).__name__)
        number = int(value)
        if not 0 <= number < 2**self.bits:
            raise value_error(operator, self.name, f"be from 0 to 2**{self.bits} - 1", number)
        return number


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
    precision="either",
)
SLOPES = Argument(
    "alibi_slopes",
    (("H",), ("B", "H")),
    "slope * abs(i + Nk - N - j) is subtracted from the logits",
    values=_finite,
    precision="either",
)
SINKS = Argument(
    "sinks",
    (("H",),),
    "one extra logit per head in the denominator only; -inf is no sink; has a gradient",
    values=_below_infinity,
    precision="either",
)
OUTPUT = Argument(
    "o", (_OUT,), "output of the forward pass", follows_layout=True, precision="either"
)
LSE = Argument("stats", (_ROWS,), "lse of the forward pass", precision="wide")
MAXIMUM = Argument("stats.m", (_ROWS,), "row maximum times log2(e)", precision="wide")
LOG_SUM = Argument("stats.log_l", (_ROWS,), "logarithm of the row sum", precision="wide")

ARRAYS = (QUERY, KEY, VALUE, BIAS, SLOPES, SINKS)
DIFFERENTIABLE = (QUERY, KEY, VALUE, BIAS, SINKS)
RESULTS = (OUTPUT, LSE, MAXIMUM, LOG_SUM)
COTANGENTS = (
    Argument("do", (_OUT,), "cotangent of o", follows_layout=True),
    Argument("dlse", (_ROWS,), "cotangent of lse", precision="wide"),
)
TANGENTS = tuple(
    replace(argument, name=f"t{argument.name}", doc=f"tangent of {argument.name}", values=None)
    for argument in DIFFERENTIABLE
)
OUTPUT_TANGENTS = (
    Argument("to", (_OUT,), "tangent of o", follows_layout=True, precision="either"),
    Argument("tlse", (_ROWS,), "tangent of lse", precision="wide"),
)
COTANGENT_TANGENTS = (
    Argument("tdo", (_OUT,), "tangent of do", follows_layout=True),
    Argument("tdlse", (_ROWS,), "tangent of dlse", precision="wide"),
)

# Inside these ranges scale / softcap and what is computed from it stay normal numbers in float32.
SOFTCAP = Number(
    "softcap", 1e-15, 1e15, "c: a logit x becomes c tanh(x / c), before the bias and the mask"
)
SCALE = Number("softmax_scale", 0.0, 1e15, "factor of q k; D ** -0.5 by default")
DROPOUT = Number("dropout_p", 0.0, 1.0, "probability with which o leaves out a pair, from 0 to 1")
SEED = Whole("seed", 64, "which pairs dropout leaves out; required where dropout_p is above 0")

_BINDS = {
    letter: argument.name
    for argument in reversed((QUERY, KEY, VALUE))
    for letter in argument.shapes[0]
}

_PACKED_LETTERS = {"N": "total_q", "Nk": "total_k"}


def _packed(argument: Argument) -> tuple[Shape, ...]:
    """Return the shapes of an argument of packed sequences."""
    if argument is SLOPES:
        return ("H",), ("S", "H")
    if argument is BIAS or argument.name == "tbias":
        return (("H", "total_q", "max_k"),)
    return tuple(
        tuple([_PACKED_LETTERS.get(letter, letter) for letter in dims if letter != "B"])
        for dims in argument.in_layout("bnhd")
    )


_EVERY = (*ARRAYS, *RESULTS, *COTANGENTS, *TANGENTS, *OUTPUT_TANGENTS, *COTANGENT_TANGENTS)
SHAPES = {
    layout: {argument.name: argument.in_layout(layout) for argument in _EVERY} for layout in LAYOUTS
} | {PACKED: {argument.name: _packed(argument) for argument in _EVERY}}


def canonical(x: NDArray[Any], layout: str) -> NDArray[Any]:
    """Return a tensor of a layout as a `(B, H, N, D)` view."""
    if layout == "bhnd":
        return x
    return (x if layout != PACKED else x[None]).swapaxes(1, 2)


def laid_out(x: NDArray[Any], layout: str) -> NDArray[Any]:
    """Return a `(B, H, N, D)` view as a tensor of a layout."""
    if layout == "bhnd":
        return x
    x = x.swapaxes(1, 2)
    return x if layout != PACKED else x[0]


def arguments_table() -> str:
    """Return the arguments of attention as a Markdown table."""
    rows = [
        (argument.name, " or ".join(map(show, argument.shapes)), _rule_of(argument), argument.doc)
        for argument in ARRAYS
    ]
    rows += [
        (number.name, "number", f"{number.low:g} to {number.high:g}", number.doc)
        for number in (SOFTCAP, SCALE, DROPOUT)
    ]
    rows.append((SEED.name, "integer", f"0 to 2**{SEED.bits} - 1", SEED.doc))
    rows.append(("mask", "Mask or boolean array", "broadcasts to (B, H, N, Nk)", "who sees whom"))
    rows.append(("layout", "string", " or ".join(map(repr, LAYOUTS)), "order of the dimensions"))
    lines = ["| argument | shape | rule | meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {shape} | {rule} | {doc} |" for name, shape, rule, doc in rows]
    return "\n".join(lines)


def _rule_of(argument: Argument) -> str:
    rules = [listed(FLOATS) if argument is QUERY else "dtype of q"]
    if argument.precision == "either":
        rules.append("or float32 where q has 16 bits")
    if argument in (QUERY, KEY, VALUE):
        rules += [limit.doc for letter, limit in LIMITS.items() if _BINDS[letter] == argument.name]
    if argument.follows_layout:
        rules.append("contiguous last dimension")
    if argument.broadcast:
        rules.append("broadcasts")
    if argument.values is not None:
        rules.append(argument.values.requirement.removeprefix("be "))
    return ", ".join(rules)


def shapes_in(layout: object) -> Mapping[str, tuple[Shape, ...]]:
    """Return the shapes of every array, by name, as the user of a layout writes them."""
    if not isinstance(layout, str):
        raise type_error(NAME, "layout", "be a string", type(layout).__name__)
    if layout not in LAYOUTS:
        raise value_error(NAME, "layout", f"be {' or '.join(map(repr, LAYOUTS))}", repr(layout))
    return SHAPES[layout]
