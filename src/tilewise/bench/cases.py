"""The problems that are timed, and the suites that they make up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from tilewise.base.dtypes import bfloat16
from tilewise.bench.problems import Pattern, Problem

__all__ = [
    "DERIVATIVES",
    "DOOR",
    "FLEX",
    "JAX",
    "JAX_DOOR",
    "MATH",
    "ONE_BY_ONE",
    "ONNX",
    "PACKED",
    "PADDED",
    "PYTORCH",
    "PYTORCH_ONE_BY_ONE",
    "READ",
    "SUITES",
    "TEXTBOOK",
    "TILEWISE",
    "VARLEN",
    "Case",
    "Suite",
    "custom_case",
    "dtype_of",
    "small",
]

TILEWISE = "tilewise"
DOOR = "tilewise.torch"
VARLEN = "tilewise, varlen"
ONE_BY_ONE = "tilewise, one by one"
PYTORCH = "PyTorch"
PACKED = "PyTorch, packed"
MATH = "PyTorch math"
PADDED = "PyTorch, padded"
PYTORCH_ONE_BY_ONE = "PyTorch, one by one"
FLEX = "FlexAttention"
JAX_DOOR = "tilewise.jax"
JAX = "jax.nn"
ONNX = "onnxruntime"
TEXTBOOK = "NumPy textbook"
READ = "plain read"

DERIVATIVES = (TILEWISE, DOOR, MATH)
_EVERY = (TILEWISE, DOOR, PYTORCH, TEXTBOOK)
_MASKED = (DOOR, PYTORCH, FLEX)
_SEQUENCES = (VARLEN, ONE_BY_ONE, PYTORCH_ONE_BY_ONE, PADDED)

_PRODUCTS = {"forward": 2, "backward": 5, "step": 7, "jvp": 6, "double backward": 15}
_FEWEST_QUERIES_THROUGH_TORCH = 512
_SMALLER = 64


@dataclass(frozen=True)
class Case:
    """A problem size, its mask, and who computes it; the first is what the others are compared to.

    `threads` lists thread counts, None for the run's own. `derivatives` adds the JVP and double
    backward; `step` is forward and backward as one program, in place of a backward. `causal` to
    `lengths` are those of `Pattern`.
    """

    name: str
    B: int
    H: int
    N: int
    D: int
    Hk: int | None = None
    Nk: int | None = None
    causal: bool = False
    window: int | None = None
    prefix: int | None = None
    documents: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    backward: bool = True
    contenders: tuple[str, ...] = _EVERY
    threads: tuple[int, ...] | None = None
    derivatives: bool = False
    step: bool = False

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Directions, those together that take turns with each other."""
        if self.step:
            return ("forward",), ("step",)
        if self.derivatives:
            return ("forward", "jvp"), ("backward", "double backward")
        return (("forward",), ("backward",)) if self.backward else (("forward",),)

    @property
    def training(self) -> bool:
        """Whether the forward is timed as the one that a backward follows."""
        return self.backward and not (self.derivatives or self.step)

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.N if self.Nk is None else self.Nk

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.H if self.Hk is None else self.Hk

    @property
    def pattern(self) -> Pattern:
        """Which keys a query sees."""
        # JSON turned tuples into lists.
        several = tuple(self.documents), tuple(self.lengths)
        return Pattern(self.causal, self.window, self.prefix, *several)

    def pairs(self) -> float:
        """Return the visible (query, key) pairs of one head, causal counted as half of all."""
        return _pairs(self.pattern, self.B, self.N, self.keys)

    def flop(self, direction: str) -> float:
        """Return the floating-point operations of a direction."""
        return 2.0 * _PRODUCTS[direction] * self.H * self.pairs() * self.D

    def kv_bytes(self, itemsize: int) -> int:
        """Return the bytes of k and v, which a decode step reads once."""
        return 2 * self.B * self.kv_heads * self.keys * self.D * itemsize

    def problem(self, dtype: str) -> Problem:
        """Return inputs from N(0, 1) with a fixed seed, rounded to the dtype."""
        rng = np.random.default_rng(0)
        kind = dtype_of(dtype)
        kv = (self.B, self.kv_heads, self.keys, self.D)
        query = (self.B, self.H, self.N, self.D)
        shapes = (query, kv, kv, query, *((query, kv, kv) if self.derivatives else ()))
        q, k, v, do, *tangents = (rng.standard_normal(shape).astype(kind) for shape in shapes)
        return Problem(q, k, v, do, self.pattern, tuple(tangents))


_pairs = cache(Pattern.pairs)


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a name, bfloat16 among them."""
    return bfloat16("bench") if name == "bfloat16" else np.dtype(name)


@dataclass(frozen=True)
class Suite:
    """Cases, and the dtypes and thread counts that they run with unless others are asked for.

    Of the cases in `memory` the memory is measured, in float32.
    """

    cases: tuple[Case, ...]
    dtypes: tuple[str, ...] = ("float32",)
    threads: tuple[int, ...] = (1,)
    memory: tuple[Case, ...] = ()


def _train(B: int, H: int, N: int, D: int, causal: bool) -> Case:
    name = f"{'causal' if causal else 'full'}, B={B}, H={H}, N={N}, D={D}"
    return Case(name, B, H, N, D, causal=causal, contenders=(DOOR, PYTORCH))


def _jax(H: int, N: int, causal: bool = False) -> Case:
    name = f"{'causal' if causal else 'full'}, B=1, H={H}, N={N}, D=64"
    return Case(name, 1, H, N, 64, causal=causal, contenders=(JAX_DOOR, JAX), step=True)


def _decode(Nk: int) -> Case:
    contenders = (TILEWISE, DOOR, PYTORCH, PACKED, FLEX, ONNX, READ)
    sizes: dict[str, Any] = {"Hk": 8, "Nk": Nk, "backward": False}
    return Case(f"decode, Nk={Nk}", 1, 32, 1, 128, contenders=contenders, **sizes)


def _masked(name: str, N: int, B: int = 1, **pattern: Any) -> Case:
    return Case(f"{name}, N={N}", B, 4, N, 64, contenders=_MASKED, **pattern)


def _sequences(name: str, lengths: tuple[int, ...], causal: bool) -> Case:
    sizes = (1, 8, sum(lengths), 64)
    return Case(name, *sizes, documents=lengths, causal=causal, contenders=_SEQUENCES)


_LENGTHS = (37, 4096, 512, 129, 2048, 255, 1024, 64, 777, 1531, 300, 93)
_DOCUMENTS = (512, 2048, 256, 1024, 1280, 1024, 192, 1856)
_FULL_64 = Case("full, N=2048, D=64", 1, 4, 2048, 64)
_CAUSAL_64 = Case("causal, N=2048, D=64", 1, 4, 2048, 64, causal=True)
_DECODE = replace(
    _decode(8192),
    name="decode, Hq=32, Hk=8, Nk=8192, D=128",
    contenders=(TILEWISE, PYTORCH, PACKED, TEXTBOOK),
)
_BOTH = ("float32", "bfloat16")

SUITES: dict[str, Suite] = {
    "quick": Suite((_FULL_64, _CAUSAL_64, _DECODE)),
    "full": Suite(
        (
            _FULL_64,
            Case("full, N=2048, D=128", 1, 4, 2048, 128),
            _CAUSAL_64,
            Case("causal, N=512, B=4, H=12, D=64", 4, 12, 512, 64, causal=True),
            Case("causal window 256, N=8192, D=64", 1, 1, 8192, 64, causal=True, window=256),
            _DECODE,
            replace(
                _FULL_64,
                name="2 threads and 1, N=2048, D=64",
                contenders=_EVERY[:-1],
                threads=(1, 2),
            ),
        )
    ),
    "train": Suite(
        (
            _train(4, 12, 512, 64, True),
            *(_train(1, 8, 2048, D, causal) for D in (64, 128) for causal in (False, True)),
            _train(1, 8, 8192, 64, True),
        ),
        _BOTH,
    ),
    "decode": Suite(tuple(_decode(Nk) for Nk in (1024, 8192, 32768)), _BOTH, (1, 2)),
    "masks": Suite(
        (
            _masked("causal window 256", 8192, causal=True, window=256),
            _masked("prefix LM 1024", 4096, causal=True, prefix=1024),
            _masked("8 documents, causal", sum(_DOCUMENTS), causal=True, documents=_DOCUMENTS),
            _masked("key padding, B=4", 2048, 4, lengths=(2048, 1536, 1024, 320)),
        ),
        _BOTH,
    ),
    "varlen": Suite(
        (
            _sequences("12 sequences, 37 to 4096", _LENGTHS, False),
            _sequences("12 sequences, 37 to 4096, causal", _LENGTHS, True),
        ),
        _BOTH,
    ),
    "jax": Suite(
        (_jax(8, 512), _jax(8, 2048), _jax(8, 2048, causal=True)),
        _BOTH,
        memory=(_jax(2, 16384),),
    ),
}


def small(case: Case) -> Case:
    """Return a case with every length divided by 64, for a try; nothing is compiled for it."""

    def less(length: int | None) -> Any:
        return None if length is None else -(-length // _SMALLER)

    documents = tuple(map(less, case.documents))
    return replace(
        case,
        N=sum(documents) or less(case.N),
        Nk=less(case.Nk),
        window=less(case.window),
        prefix=less(case.prefix),
        documents=documents,
        lengths=tuple(map(less, case.lengths)),
        contenders=tuple(name for name in case.contenders if name != FLEX),
    )


def custom_case(
    N: int,
    *,
    B: int = 1,
    H: int = 4,
    D: int = 64,
    causal: bool = False,
    window: int | None = None,
    derivatives: bool = False,
) -> Case:
    """Return a case of N queries and keys with a name made from its sizes."""
    mask = f"causal window {window}" if window is not None else "causal" if causal else "full"
    through_torch = N >= _FEWEST_QUERIES_THROUGH_TORCH
    every = tuple(name for name in _EVERY if through_torch or name != DOOR)
    return Case(
        f"{mask}, N={N}, B={B}, H={H}, D={D}",
        *(B, H, N, D),
        causal=causal or window is not None,
        window=window,
        contenders=DERIVATIVES if derivatives else every,
        derivatives=derivatives,
    )
