"""What a case of attention is, and the inputs that are drawn from it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import FloatDType, bfloat16, compute_dtype, is_narrow, round_to
from tilewise.base.masks import Mask

from .inputs import Array, arrange, draw, pad_additively, poison_absent, poison_attended

__all__ = ["Case", "Dims", "MaskBuilder", "Problem", "dtype_of"]

TANGENTS = ("q", "k", "v", "bias", "sinks", "do", "dlse")
"""What has tangents; the tangent of q is tq."""
TENSORS = frozenset({"q", "k", "v", "do", "tq", "tk", "tv", "tdo"})
"""The inputs that follow the layout."""
_IN_LAYOUT = TENSORS | {"o", "dq", "dk", "dv", "to", "tdq", "tdk", "tdv"}
_IN_LAYOUT |= {"one-pass o", "one-pass to"}
_OF_ROWS = frozenset({"dlse", "tdlse"})
"""The inputs that belong to row statistics, and have their dtype."""


def dtype_of(name: str) -> FloatDType:
    """Return the dtype of a name, that of bfloat16 too.

    Raises:
        ImportError: bfloat16 needs a package that is not installed.
    """
    return bfloat16("verify") if name == "bfloat16" else np.dtype(name)


@dataclass(frozen=True)
class Dims:
    """The sizes of one case; see `tilewise.base.dims`."""

    B: int = 2
    H: int = 3
    Hk: int = 3
    N: int = 101
    Nk: int = 127
    D: int = 37
    Dv: int = 29

    def sizes(self, letters: str) -> tuple[int, ...]:
        """Return the shape that letters and ones name, such as ``"B 1 N Nk"``."""
        return tuple(1 if x == "1" else int(getattr(self, x)) for x in letters.split())


MaskBuilder = Callable[[Dims, slice], Mask]
"""The mask of some batch entries of a problem: ``(dims, slice of the batch) -> Mask``."""


@dataclass(frozen=True)
class Case:
    """One problem to try, drawn anew from its name whenever it is made.

    Attributes:
        name: ``group/what is special``.
        dims: Sizes.
        dtype: "float32", "float64", "bfloat16" or "float16".
        mask: Builder of the mask, or None.
        moves: Whether the last queries with the same mask see what they see among all queries.
        causal: Whether the first queries with the first keys see what they see among all.
        bias: Letters of the shape of the bias, such as "B H N Nk", or None.
        alibi: Letters of the shape of the slopes, "H" or "B H", or None.
        softcap: The soft cap, or None.
        sinks: "normal", "some" (every second one -inf), "large" or None.
        softmax_scale: The scale, or None for the default.
        layout: "bhnd" or "bnhd".
        values: How numbers are drawn, see `inputs.draw`.
        memory: How arrays lie in memory, see `inputs.arrange`.
        padding: A number that the bias of the last queries and keys holds, or None.
        poison: "absent", or the name of an array that holds one NaN, or None.
        cotangents: "both", "o" or "lse": of which outputs there are cotangents.
        tangents: Of which inputs and cotangents there are tangents, such as "q v dlse".
        dropout: Probability with which a pair is dropped.
    """

    name: str
    dims: Dims = field(default_factory=Dims)
    dtype: str = "float32"
    mask: MaskBuilder | None = None
    moves: bool = True
    causal: bool = False
    bias: str | None = None
    alibi: str | None = None
    softcap: float | None = None
    sinks: str | None = None
    softmax_scale: float | None = None
    layout: str = "bhnd"
    values: str = "normal"
    memory: str = "contiguous"
    padding: float | None = None
    poison: str | None = None
    cotangents: str = "both"
    tangents: str = "q k v bias sinks do dlse"
    dropout: float = 0.0

    @property
    def group(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]

    @property
    def seed(self) -> int:
        """The seed of the dropout: both of its 32-bit halves depend on the name."""
        return zlib.crc32(self.name.encode()) * 0x9E3779B97F4A7C15 % 2**64

    def in_dtype(self, dtype: str) -> Case:
        """Return the case in another dtype; in 16 bits, with the inputs of float32 rounded."""
        return replace(self, dtype=dtype)

    def in_order(self, name: str, x: Array) -> Array:
        """Return an input or a result in `(B, H, N, D)` order, whatever the layout."""
        swapped = self.layout != "bhnd" and name in _IN_LAYOUT and x.ndim == 4
        return x.swapaxes(1, 2) if swapped else x

    def problem(self) -> Problem:
        """Draw the inputs of the case; the same ones at every call."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        arrays = self._draw(rng)
        if self.padding is not None:
            pad_additively(arrays["bias"], self.padding, self.dims.N // 5, self.dims.Nk // 7)
            arrays["q"][:, :, self.dims.N - self.dims.N // 5 :] = 0
        if self.poison == "absent":
            poison_absent(arrays, self.visible(), self.sinks is not None)
        elif self.poison is not None:
            poison_attended(self.poison, arrays)
        for name in TENSORS & arrays.keys():
            arrays[name] = arrange(self.memory, name, arrays[name])
            if self.layout == "bnhd":
                swapped = arrays[name].swapaxes(1, 2)
                free = self.memory == "contiguous"
                arrays[name] = np.ascontiguousarray(swapped) if free else swapped
        for name in {"bias", "tbias"} & arrays.keys():
            if self.memory == "reversed":
                arrays[name] = np.ascontiguousarray(arrays[name].T).T
        return Problem(self, self.dims, slice(0, self.dims.B), arrays)

    def visible(self) -> NDArray[np.bool_]:
        """Return the mask as booleans `(B, H, N, Nk)`."""
        d = self.dims
        if self.mask is None:
            return np.ones((d.B, d.H, d.N, d.Nk), np.bool_)
        seen = self.mask(d, slice(0, d.B)).to_bool(d.B, d.H, d.N, d.Nk)
        return np.array(np.broadcast_to(seen, (d.B, d.H, d.N, d.Nk)))

    def _draw(self, rng: np.random.Generator) -> dict[str, Array]:
        d, stored = self.dims, dtype_of(self.dtype)
        dtype = compute_dtype(stored)
        letters = {
            "q": "B H N D",
            "k": "B Hk Nk D",
            "v": "B Hk Nk Dv",
            "do": "B H N Dv",
            "dlse": "B H N",
            "bias": self.bias,
            "alibi_slopes": self.alibi,
            "sinks": "H" if self.sinks else None,
        }
        # Last, so that the other numbers are the same with and without tangents.
        letters |= {f"t{name}": letters[name] for name in TANGENTS}
        arrays = {
            name: draw(self.values if shape != "H" else "normal", name, d.sizes(shape), dtype, rng)
            for name, shape in letters.items()
            if shape is not None
        }
        if self.alibi:
            # The published slopes, 2 ** (-8 h / H), with some spread.
            steps = np.arange(1, d.H + 1, dtype=dtype) * dtype.type(-8 / max(1, d.H))
            arrays["alibi_slopes"] = np.exp2(steps + arrays["alibi_slopes"] / 4)
        if self.sinks == "some":
            arrays["sinks"][::2] = -np.inf
        elif self.sinks == "large":
            arrays["sinks"] += 20
        if self.cotangents == "o":
            del arrays["dlse"]
        elif self.cotangents == "lse":
            arrays["do"][...] = 0
        for name in TANGENTS:
            if name not in self.tangents.split() or name not in arrays:
                arrays.pop(f"t{name}", None)
        if is_narrow(stored):
            # Rounded here, so that the truth is about the numbers that are stored.
            wide = self._wide(stored)
            return {n: x if n in wide else round_to(x, stored) for n, x in arrays.items()}
        return arrays

    def _wide(self, stored: FloatDType) -> frozenset[str]:
        """Return the inputs that are float32 beside a q of 16 bits."""
        number = np.asarray(self.padding or 0.0, np.float64)
        fits = np.isinf(number) or np.isfinite(round_to(number, stored))
        return _OF_ROWS if fits else _OF_ROWS | {"bias", "tbias"}


@dataclass(frozen=True)
class Problem:
    """The inputs of a case, or of a part of it.

    Attributes:
        case: What it was drawn from.
        dims: Its sizes.
        batch: Which entries of the case's batch it holds.
        arrays: q k v do, and dlse bias alibi_slopes sinks tq tk tv tbias tsinks tdo tdlse where
            there are such, in the case's layout.
    """

    case: Case
    dims: Dims
    batch: slice
    arrays: dict[str, Array]

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `tilewise.numpy.attention`, those that are not the default."""
        case = self.case
        given: dict[str, Any] = {
            "mask": None if case.mask is None else case.mask(self.dims, self.batch),
            "bias": self.arrays.get("bias"),
            "alibi_slopes": self.arrays.get("alibi_slopes"),
            "softcap": case.softcap,
            "sinks": self.arrays.get("sinks"),
            "softmax_scale": case.softmax_scale,
            "dropout_p": case.dropout or None,
            "seed": case.seed if case.dropout else None,
            "layout": None if case.layout == "bhnd" else case.layout,
        }
        return {name: value for name, value in given.items() if value is not None}

    @property
    def tangents(self) -> dict[str, Array]:
        """The tangents of inputs and cotangents; one that is missing is zero."""
        names = [f"t{name}" for name in TANGENTS]
        return {name: self.arrays[name] for name in names if name in self.arrays}

    def entry(self, b: int) -> Problem:
        """Return one batch entry as a problem of its own."""
        part = slice(b, b + 1)
        arrays = {}
        for name, x in self.arrays.items():
            four = name in (*TENSORS, "dlse", "tdlse") or x.ndim == 4
            has_batch = four or (name == "alibi_slopes" and x.ndim == 2)
            arrays[name] = x[part] if has_batch and x.shape[0] != 1 else x
        return Problem(self.case, replace(self.dims, B=1), part, arrays)

    def part(self, queries: slice, keys: slice) -> Problem:
        """Return consecutive queries and keys as a problem of its own, with the same mask."""
        arrays = dict(self.arrays)
        axis = 2 if self.case.layout == "bhnd" else 1
        before = (slice(None),) * axis
        for name in TENSORS & arrays.keys():
            rows = keys if name[-1] in "kv" else queries
            arrays[name] = arrays[name][(*before, rows)]
        for name in {"dlse", "tdlse"} & arrays.keys():
            arrays[name] = arrays[name][:, :, queries]
        for name in {"bias", "tbias"} & arrays.keys():
            bias = arrays[name]
            if bias.ndim > 1 and bias.shape[-2] != 1:
                bias = bias[..., queries, :]
            arrays[name] = bias if bias.shape[-1] == 1 else bias[..., keys]
        dims = replace(
            self.dims,
            N=len(range(self.dims.N)[queries]),
            Nk=len(range(self.dims.Nk)[keys]),
        )
        return Problem(self.case, dims, self.batch, arrays)
