"""Every bad input raises the error that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import tilewise as tw
from tilewise.base.operator import Implementation
from tilewise.dispatch import TABLE, choose

B, H, HK, N, NK, D, DV = 2, 8, 4, 3, 128, 64, 16
Arguments = dict[str, Any]
Change = Callable[[Arguments], Any]
IMPLEMENTATIONS = ", ".join(map(repr, TABLE["attention"]))


def good() -> Arguments:
    return {
        "q": np.zeros((B, H, N, D), np.float32),
        "k": np.zeros((B, HK, NK, D), np.float32),
        "v": np.zeros((B, HK, NK, DV), np.float32),
        "implementation": "reference",
    }


def array(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def misaligned(*shape: int) -> np.ndarray:
    memory = np.zeros(4 * int(np.prod(shape)) + 1, np.uint8)
    return memory[1:].view(np.float32).reshape(shape)


def replaced(**arguments: Any) -> Change:
    return lambda good: arguments


def bnhd(**arguments: Any) -> Change:
    """Return the change to the other layout, with some arguments replaced."""
    return lambda good: {
        **{name: np.ascontiguousarray(good[name].swapaxes(1, 2)) for name in "qkv"},
        "layout": "bnhd",
        **arguments,
    }


K_SHAPE = "k must have shape (B, Hk, Nk, D)"
BIAS_SHAPE = "bias must broadcast to shape (B, H, N, Nk)"
FLOATS = "dtype float64, float32, bfloat16 or float16"

BAD: list[tuple[Change, type[Exception], str]] = [
    # Kinds
    (replaced(q=[[1.0]]), TypeError, "q must be a numpy.ndarray, got list"),
    (replaced(q=None), TypeError, "q must be a numpy.ndarray, got NoneType"),
    (replaced(k=1.0), TypeError, "k must be a numpy.ndarray, got float"),
    (
        replaced(v=np.ma.zeros((B, HK, NK, DV), np.float32)),
        TypeError,
        "v must be a numpy.ndarray, got MaskedArray",
    ),
    (replaced(bias=[0.0]), TypeError, "bias must be a numpy.ndarray, got list"),
    (replaced(sinks=0.0), TypeError, "sinks must be a numpy.ndarray, got float"),
    # Dtypes
    (replaced(q=array(B, H, N, D, dtype=int)), TypeError, f"q must have {FLOATS}, got int64"),
    (replaced(q=array(B, H, N, D, dtype=bool)), TypeError, f"q must have {FLOATS}, got bool"),
    (
        replaced(q=array(B, H, N, D, dtype=np.uint16)),
        TypeError,
        f"q must have {FLOATS}, got uint16",
    ),
    (
        replaced(q=array(B, H, N, D, dtype=complex)),
        TypeError,
        f"q must have {FLOATS}, got complex128",
    ),
    (replaced(q=array(B, H, N, D, dtype=object)), TypeError, f"q must have {FLOATS}, got object"),
    (
        replaced(k=array(B, HK, NK, D, dtype=np.float64)),
        TypeError,
        "k must have dtype float32 (from q), got float64",
    ),
    (
        replaced(v=array(B, HK, NK, DV, dtype=int)),
        TypeError,
        "v must have dtype float32 (from q), got int64",
    ),
    (
        replaced(bias=array(N, NK, dtype=np.float64)),
        TypeError,
        "bias must have dtype float32 (from q), got float64",
    ),
    (
        replaced(sinks=array(H, dtype=np.float64)),
        TypeError,
        "sinks must have dtype float32 (from q), got float64",
    ),
    (
        replaced(alibi_slopes=array(H, dtype=np.float64)),
        TypeError,
        "alibi_slopes must have dtype float32 (from q), got float64",
    ),
    (
        replaced(q=array(B, H, N, D, dtype=">f4")),
        TypeError,
        "q must have native byte order, got dtype >f4",
    ),
    (
        replaced(k=array(B, HK, NK, D, dtype=">f4")),
        TypeError,
        "k must have native byte order, got dtype >f4",
    ),
    # Ranks and shapes
    (
        replaced(q=array(H, N, D)),
        ValueError,
        "q must have shape (B, H, N, D), got (8, 3, 64)",
    ),
    (
        replaced(k=array(1, B, HK, NK, D)),
        ValueError,
        f"{K_SHAPE}, got (1, 2, 4, 128, 64)",
    ),
    (replaced(v=array()), ValueError, "v must have shape (B, Hk, Nk, Dv), got ()"),
    (
        replaced(k=array(B, H, NK, 32)),
        ValueError,
        f"{K_SHAPE} with D=64 (from q), got (2, 8, 128, 32)",
    ),
    (
        replaced(k=array(5, HK, NK, 32)),
        ValueError,
        f"{K_SHAPE} with B=2 (from q), D=64 (from q), got (5, 4, 128, 32)",
    ),
    (
        replaced(k=array(B, 3, NK, D)),
        ValueError,
        f"{K_SHAPE} with Hk a divisor of H=8, got (2, 3, 128, 64)",
    ),
    (
        replaced(k=array(B, 16, NK, D)),
        ValueError,
        f"{K_SHAPE} with Hk a divisor of H=8, got (2, 16, 128, 64)",
    ),
    (
        replaced(k=array(B, 0, NK, D)),
        ValueError,
        f"{K_SHAPE} with Hk a divisor of H=8, got (2, 0, 128, 64)",
    ),
    (
        replaced(q=array(B, 0, N, D)),
        ValueError,
        f"{K_SHAPE} with Hk a divisor of H=0, got (2, 4, 128, 64)",
    ),
    (
        replaced(v=array(B, H, 127, DV)),
        ValueError,
        "v must have shape (B, Hk, Nk, Dv) with Hk=4 (from k), Nk=128 (from k), "
        "got (2, 8, 127, 16)",
    ),
    (
        replaced(q=array(B, H, N, 513)),
        ValueError,
        "q must have shape (B, H, N, D) with 1 <= D <= 512, got (2, 8, 3, 513)",
    ),
    (
        replaced(q=array(B, H, N, 0)),
        ValueError,
        "q must have shape (B, H, N, D) with 1 <= D <= 512, got (2, 8, 3, 0)",
    ),
    (
        replaced(v=array(B, HK, NK, 513)),
        ValueError,
        "v must have shape (B, Hk, Nk, Dv) with 1 <= Dv <= 512, got (2, 4, 128, 513)",
    ),
    (
        bnhd(k=array(B, NK, HK, 32)),
        ValueError,
        "k must have shape (B, Nk, Hk, D) with D=64 (from q), got (2, 128, 4, 32)",
    ),
    (
        bnhd(q=array(B, N, D)),
        ValueError,
        "q must have shape (B, N, H, D), got (2, 3, 64)",
    ),
    (
        bnhd(bias=array(B, N, H, NK)),
        ValueError,
        f"{BIAS_SHAPE} with H=8 (from q), N=3 (from q), got (2, 3, 8, 128)",
    ),
    (
        replaced(bias=array(B, H, N, 32)),
        ValueError,
        f"{BIAS_SHAPE} with Nk=128 (from k), got (2, 8, 3, 32)",
    ),
    (
        replaced(bias=array(5, 1, 1)),
        ValueError,
        f"{BIAS_SHAPE} with H=8 (from q), got (5, 1, 1)",
    ),
    (
        replaced(bias=array(1, 1, 1, N, NK)),
        ValueError,
        f"{BIAS_SHAPE}, got (1, 1, 1, 3, 128)",
    ),
    (
        replaced(alibi_slopes=array(HK)),
        ValueError,
        "alibi_slopes must have shape (H,) with H=8 (from q), got (4,)",
    ),
    (
        replaced(alibi_slopes=array(1, H)),
        ValueError,
        "alibi_slopes must have shape (B, H) with B=2 (from q), got (1, 8)",
    ),
    (
        replaced(alibi_slopes=array()),
        ValueError,
        "alibi_slopes must have shape (H,) or (B, H), got ()",
    ),
    (
        replaced(sinks=array(B, H)),
        ValueError,
        "sinks must have shape (H,), got (2, 8)",
    ),
    # Memory
    (
        lambda good: {"q": good["q"].swapaxes(2, 3).copy().swapaxes(2, 3)},
        ValueError,
        "q must have a contiguous last dimension, got strides (6144, 768, 4, 12) of 4-byte entries",
    ),
    (
        replaced(v=array(B, HK, NK, 2 * DV)[..., ::2]),
        ValueError,
        "v must have a contiguous last dimension, got strides (65536, 16384, 128, 8) of 4-byte "
        "entries",
    ),
    (
        replaced(k=misaligned(B, HK, NK, D)),
        ValueError,
        "k must be aligned in memory, got a misaligned array",
    ),
    # Values
    (replaced(softmax_scale=-1.0), ValueError, "softmax_scale must be from 0 to 1e+15, got -1"),
    (
        replaced(softmax_scale=float("nan")),
        ValueError,
        "softmax_scale must be from 0 to 1e+15, got nan",
    ),
    (replaced(softmax_scale=np.inf), ValueError, "softmax_scale must be from 0 to 1e+15, got inf"),
    (replaced(softmax_scale="1"), TypeError, "softmax_scale must be a real number, got str"),
    (replaced(softmax_scale=True), TypeError, "softmax_scale must be a real number, got bool"),
    (replaced(softmax_scale=1j), TypeError, "softmax_scale must be a real number, got complex"),
    (replaced(softcap=1e39), ValueError, "softcap must be from 1e-15 to 1e+15, got 1e+39"),
    (replaced(softcap=0), ValueError, "softcap must be from 1e-15 to 1e+15, got 0"),
    (replaced(softcap=-2.5), ValueError, "softcap must be from 1e-15 to 1e+15, got -2.5"),
    (replaced(softcap=float("nan")), ValueError, "softcap must be from 1e-15 to 1e+15, got nan"),
    (replaced(softcap=np.inf), ValueError, "softcap must be from 1e-15 to 1e+15, got inf"),
    (
        replaced(alibi_slopes=np.full(H, np.nan, np.float32)),
        ValueError,
        "alibi_slopes must be finite, got nan",
    ),
    (
        replaced(alibi_slopes=np.full((B, H), -np.inf, np.float32)),
        ValueError,
        "alibi_slopes must be finite, got -inf",
    ),
    (
        replaced(sinks=np.full(H, np.nan, np.float32)),
        ValueError,
        "sinks must be finite or -inf, got nan",
    ),
    (
        replaced(sinks=np.full(H, np.inf, np.float32)),
        ValueError,
        "sinks must be finite or -inf, got inf",
    ),
    (replaced(dropout_p=-0.1), ValueError, "dropout_p must be from 0 to 1, got -0.1"),
    (replaced(dropout_p=1.5, seed=0), ValueError, "dropout_p must be from 0 to 1, got 1.5"),
    (replaced(dropout_p=float("nan")), ValueError, "dropout_p must be from 0 to 1, got nan"),
    (replaced(dropout_p=True, seed=0), TypeError, "dropout_p must be a real number, got bool"),
    (replaced(dropout_p=None), TypeError, "dropout_p must be a real number, got NoneType"),
    (
        replaced(dropout_p=0.5),
        TypeError,
        "seed must be an integer where dropout_p is above 0, got None",
    ),
    (replaced(dropout_p=0.5, seed=-1), ValueError, "seed must be from 0 to 2**64 - 1, got -1"),
    (
        replaced(seed=np.float64(3)),
        TypeError,
        "seed must be an integer, got float64",
    ),
    (replaced(seed=2**64), ValueError, f"seed must be from 0 to 2**64 - 1, got {2**64}"),
    (replaced(seed=True), TypeError, "seed must be an integer, got bool"),
    (replaced(seed=np.True_), TypeError, f"seed must be an integer, got {type(np.True_).__name__}"),
    (replaced(seed="7"), TypeError, "seed must be an integer, got str"),
    (replaced(layout="bdhn"), ValueError, "layout must be 'bhnd' or 'bnhd', got 'bdhn'"),
    (replaced(layout=0), TypeError, "layout must be a string, got int"),
    (
        replaced(implementation="flash"),
        ValueError,
        f"implementation must be one of {IMPLEMENTATIONS}, got 'flash'",
    ),
    (
        replaced(implementation=1),
        ValueError,
        f"implementation must be one of {IMPLEMENTATIONS}, got 1",
    ),
]

# What the mask's own module words: the start of the text is enough here.
BAD_MASKS: list[tuple[Any, type[Exception], str]] = [
    (np.ones((N, 5), np.bool_), ValueError, "mask"),
    (np.ones((N, NK), np.float32), TypeError, "mask"),
    ([[True]], TypeError, "mask"),
    ("causal", TypeError, "mask"),
    (tw.dense(np.ones((7, 1, N, NK), np.bool_)), ValueError, "mask"),
    (tw.lengths(np.array([5, NK + 1])), ValueError, f"mask lengths must be at most Nk={NK}"),
    (tw.lengths(np.array([5, 6, 7])), ValueError, "mask lengths"),
    (tw.documents(np.array([0, 2]), cu_seqlens_k=np.array([0, NK])), ValueError, "mask cu_seqlens"),
    (tw.documents(np.array([0, N])), ValueError, "mask cu_seqlens"),
    (tw.prefix(np.array([1, 2, 3])), ValueError, "mask"),
]


@pytest.mark.parametrize(("change", "kind", "text"), BAD, ids=[row[2] for row in BAD])
def test_bad_input_raises_its_text(change: Change, kind: type[Exception], text: str) -> None:
    arguments = good()
    arguments |= change(arguments)
    with pytest.raises(kind) as caught:
        tw.numpy.attention(**arguments)
    assert str(caught.value) == f"attention: {text}"
    assert type(caught.value) is kind


@pytest.mark.parametrize(("mask", "kind", "text"), BAD_MASKS)
def test_bad_mask_raises(mask: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        tw.numpy.attention(**good(), mask=mask)
    assert str(caught.value).startswith(f"attention: {text}")


def lowered(**changed: Any) -> Any:
    """Return the row intervals or packed bits of this problem, with an array replaced."""
    mask = tw.causal() if "rows" in changed else tw.dense(np.arange(N * NK).reshape(N, NK) % 2 == 0)
    return replace(mask.lower(B, H, N, NK), **changed)


ROW_INTERVALS = "mask rows must have shape (1 or 2, 1 or 8, 3, 4), got"

BAD_LOWERED: list[tuple[Arguments, type[Exception], str]] = [
    ({"rows": array(1, 1, 5, 4, dtype=np.int32)}, ValueError, f"{ROW_INTERVALS} (1, 1, 5, 4)"),
    ({"rows": array(HK, 1, N, 4, dtype=np.int32)}, ValueError, f"{ROW_INTERVALS} (4, 1, 3, 4)"),
    ({"rows": array(N, 4, dtype=np.int32)}, ValueError, f"{ROW_INTERVALS} (3, 4)"),
    (
        {"rows": array(1, 1, N, 4, dtype=np.int64)},
        ValueError,
        "mask rows must be C-contiguous with dtype int32, got int64",
    ),
    (
        {"rows": array(1, 1, N, 8, dtype=np.int32)[..., ::2]},
        ValueError,
        "mask rows must be C-contiguous with dtype int32, got strides (96, 96, 32, 8)",
    ),
    *(
        (
            {"rows": np.full((1, 1, N, 4), row, np.int32)},
            ValueError,
            "mask rows must be ascending intervals within 0 to Nk=128, got others",
        )
        for row in (
            [0, NK + 1, 0, 0],
            [-1, 3, 0, 0],
            [5, 3, 0, 0],
            [0, 9, 4, 12],
            [0, 2, 3, NK + 1],
        )
    ),
    (
        {"bits": array(1, 1, 5, 1, dtype=np.uint16)},
        ValueError,
        "mask bits must have shape (1 or 2, 1 or 8, 128, 1), got (1, 1, 5, 1)",
    ),
    (
        {"tiles": array(1, 1, 1, 1, dtype=np.uint8)},
        ValueError,
        "mask tiles must have shape (1 or 2, 1 or 8, 1, 2), got (1, 1, 1, 1)",
    ),
]


@pytest.mark.parametrize(("changed", "kind", "text"), BAD_LOWERED)
def test_bad_lowered_mask_raises_its_text(
    changed: Arguments, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind) as caught:
        tw.numpy.attention(**good(), mask=lowered(**changed))
    assert str(caught.value) == f"attention: {text}"


@pytest.mark.parametrize("cu_seqlens", [[0, 5, 3, 8], [1, 8], [0, 2.5, 8]])
def test_cu_seqlens_increase_from_zero(cu_seqlens: list[float]) -> None:
    with pytest.raises((ValueError, TypeError)):
        tw.numpy.attention(**good(), mask=tw.documents(np.array(cu_seqlens)))


def good_vjp(layout: str = "bhnd") -> Arguments:
    arguments = good()
    if layout == "bnhd":
        arguments |= bnhd()(arguments)
    o = array(B, H, N, DV) if layout == "bhnd" else array(B, N, H, DV)
    return arguments | {"do": o, "o": o, "stats": tw.RowStats(array(B, H, N), array(B, H, N))}


OUT = "must have shape (B, H, N, Dv)"
ROWS = "must have shape (B, H, N)"

BAD_VJP: list[tuple[str, Arguments, type[Exception], str]] = [
    ("bhnd", {"do": [0.0]}, TypeError, "do must be a numpy.ndarray, got list"),
    (
        "bhnd",
        {"do": array(B, H, N, DV, dtype=np.float64)},
        TypeError,
        "do must have dtype float32 (from q), got float64",
    ),
    (
        "bhnd",
        {"do": array(B, H, N, D)},
        ValueError,
        f"do {OUT} with Dv=16 (from v), got (2, 8, 3, 64)",
    ),
    (
        "bhnd",
        {"do": array(B, H, N, 2 * DV)[..., ::2]},
        ValueError,
        "do must have a contiguous last dimension, got strides (3072, 384, 128, 8) of 4-byte "
        "entries",
    ),
    (
        "bhnd",
        {"o": array(B, HK, N, DV)},
        ValueError,
        f"o {OUT} with H=8 (from q), got (2, 4, 3, 16)",
    ),
    (
        "bnhd",
        {"o": array(B, H, N, DV)},
        ValueError,
        "o must have shape (B, N, H, Dv) with N=3 (from q), H=8 (from q), got (2, 8, 3, 16)",
    ),
    ("bhnd", {"dlse": array(B, H)}, ValueError, f"dlse {ROWS}, got (2, 8)"),
    (
        "bnhd",
        {"dlse": array(B, N, H)},
        ValueError,
        f"dlse {ROWS} with H=8 (from q), N=3 (from q), got (2, 3, 8)",
    ),
    (
        "bhnd",
        {"dlse": array(B, H, N, dtype=int)},
        TypeError,
        "dlse must have dtype float32 (from q), got int64",
    ),
    (
        "bhnd",
        {"stats": array(B, H, 5)},
        ValueError,
        f"stats {ROWS} with N=3 (from q), got (2, 8, 5)",
    ),
    (
        "bhnd",
        {"stats": array(B, H, N, dtype=np.float64)},
        TypeError,
        "stats must have dtype float32 (from q), got float64",
    ),
    (
        "bhnd",
        {"stats": None},
        TypeError,
        "stats must be RowStats or lse as a numpy.ndarray, got NoneType",
    ),
    (
        "bhnd",
        {"stats": (array(B, H, N), array(B, H, N))},
        TypeError,
        "stats must be RowStats or lse as a numpy.ndarray, got tuple",
    ),
    (
        "bhnd",
        {"stats": tw.RowStats(array(B, H, 1), array(B, H, N))},
        ValueError,
        f"stats.m {ROWS} with N=3 (from q), got (2, 8, 1)",
    ),
    (
        "bhnd",
        {"stats": tw.RowStats(array(B, H, N), array(N))},
        ValueError,
        f"stats.log_l {ROWS}, got (3,)",
    ),
    (
        "bhnd",
        {"stats": tw.RowStats(array(B, H, N), array(B, H, N, dtype=np.float64))},
        TypeError,
        "stats.log_l must have dtype float32 (from q), got float64",
    ),
]


@pytest.mark.parametrize(
    ("layout", "arguments", "kind", "text"), BAD_VJP, ids=[row[3] for row in BAD_VJP]
)
def test_bad_cotangent_raises_its_text(
    layout: str, arguments: Arguments, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind) as caught:
        tw.numpy.attention_vjp(**{**good_vjp(layout), **arguments})
    assert str(caught.value) == f"attention: {text}"


def good_tangents(layout: str = "bhnd") -> Arguments:
    """Return good arguments of `attention_jvp`, and of `attention_vjp_jvp` but for do."""
    arguments = good_vjp(layout)
    del arguments["do"]
    arguments |= {"bias": array(1, N, NK), "sinks": array(H)}
    return arguments | {f"t{name}": arguments[name] for name in ("q", "k", "v", "bias", "sinks")}


GOOD: dict[str, Callable[..., Arguments]] = {
    "attention_vjp": good_vjp,
    "attention_jvp": good_tangents,
    "attention_vjp_jvp": lambda layout="bhnd": {"do": None, **good_tangents(layout)},
}

BAD_TANGENTS: list[tuple[str, Arguments, type[Exception], str]] = [
    ("bhnd", {"tq": [0.0]}, TypeError, "tq must be a numpy.ndarray, got list"),
    (
        "bhnd",
        {"tk": array(B, HK, NK, D, dtype=np.float64)},
        TypeError,
        "tk must have dtype float32 (from q), got float64",
    ),
    (
        "bhnd",
        {"tq": array(B, HK, N, D)},
        ValueError,
        "tq must have shape (B, H, N, D) with H=8 (from q), got (2, 4, 3, 64)",
    ),
    (
        "bnhd",
        {"tk": array(B, HK, NK, D)},
        ValueError,
        "tk must have shape (B, Nk, Hk, D) with Nk=128 (from k), Hk=4 (from k), "
        "got (2, 4, 128, 64)",
    ),
    (
        "bhnd",
        {"tv": array(B, HK, NK, D)},
        ValueError,
        "tv must have shape (B, Hk, Nk, Dv) with Dv=16 (from v), got (2, 4, 128, 64)",
    ),
    (
        "bhnd",
        {"tv": array(B, HK, NK, 2 * DV)[..., ::2]},
        ValueError,
        "tv must have a contiguous last dimension, got strides (65536, 16384, 128, 8) of 4-byte "
        "entries",
    ),
    (
        "bhnd",
        {"tbias": array(N, NK)},
        ValueError,
        "tbias must have the shape (1, 3, 128) of bias, got (3, 128)",
    ),
    (
        "bhnd",
        {"tbias": array(1, 1, NK)},
        ValueError,
        "tbias must have the shape (1, 3, 128) of bias, got (1, 1, 128)",
    ),
    (
        "bhnd",
        {"tbias": array(N, 5)},
        ValueError,
        "tbias must broadcast to shape (B, H, N, Nk) with Nk=128 (from k), got (3, 5)",
    ),
    ("bhnd", {"bias": None}, ValueError, "tbias must come with bias, got no bias"),
    ("bhnd", {"sinks": None}, ValueError, "tsinks must come with sinks, got no sinks"),
    (
        "bhnd",
        {"tsinks": array(5)},
        ValueError,
        "tsinks must have shape (H,) with H=8 (from q), got (5,)",
    ),
    ("bhnd", {"o": None}, TypeError, "o must be a numpy.ndarray, got NoneType"),
    (
        "bhnd",
        {"stats": None},
        TypeError,
        "stats must be RowStats or lse as a numpy.ndarray, got NoneType",
    ),
]
BAD_SECOND: list[tuple[str, Arguments, type[Exception], str]] = [
    (
        "bhnd",
        {"do": array(B, H, N, D)},
        ValueError,
        f"do {OUT} with Dv=16 (from v), got (2, 8, 3, 64)",
    ),
    (
        "bnhd",
        {"tdo": array(B, H, N, DV)},
        ValueError,
        "tdo must have shape (B, N, H, Dv) with N=3 (from q), H=8 (from q), got (2, 8, 3, 16)",
    ),
    ("bhnd", {"tdlse": array(B, H)}, ValueError, f"tdlse {ROWS}, got (2, 8)"),
    ("bhnd", {"to": array(B, H, N, DV)}, TypeError, "tlse must be a numpy.ndarray, got NoneType"),
    ("bhnd", {"tlse": array(B, H, N)}, TypeError, "to must be a numpy.ndarray, got NoneType"),
    (
        "bhnd",
        {"to": array(B, H, 5, DV), "tlse": array(B, H, N)},
        ValueError,
        f"to {OUT} with N=3 (from q), got (2, 8, 5, 16)",
    ),
]


@pytest.mark.parametrize(
    ("layout", "arguments", "kind", "text"),
    BAD_TANGENTS,
    ids=[f"{row[0]} {row[3]}" for row in BAD_TANGENTS],
)
def test_bad_tangent_raises_its_text(
    layout: str, arguments: Arguments, kind: type[Exception], text: str
) -> None:
    changed = {**good_tangents(layout), **arguments}
    for function, given in (
        (tw.numpy.attention_jvp, changed),
        (tw.numpy.attention_vjp_jvp, {"do": None, **changed}),
    ):
        with pytest.raises(kind) as caught:
            function(**given)
        assert str(caught.value) == f"attention: {text}"


@pytest.mark.parametrize(
    ("layout", "arguments", "kind", "text"), BAD_SECOND, ids=[row[3] for row in BAD_SECOND]
)
def test_bad_second_derivative_raises_its_text(
    layout: str, arguments: Arguments, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind) as caught:
        tw.numpy.attention_vjp_jvp(**{"do": None, **good_tangents(layout), **arguments})
    assert str(caught.value) == f"attention: {text}"


@pytest.mark.parametrize("name", ["attention_vjp", "attention_jvp", "attention_vjp_jvp"])
def test_unknown_option_names_the_function(name: str) -> None:
    with pytest.raises(TypeError) as caught:
        getattr(tw.numpy, name)(**{**GOOD[name](), "scale": 1.0})
    assert str(caught.value) == f"{name}() got an unexpected keyword argument 'scale'"


def test_good_inputs_are_good() -> None:
    """The inputs that the tests above spoil raise nothing."""
    tw.numpy.attention(**good())
    tw.numpy.attention(**good(), dropout_p=0.5, seed=np.uint64(2**64 - 1))
    tw.numpy.attention(**good(), mask=lowered(rows=array(1, 1, N, 4, dtype=np.int32)))
    tw.numpy.attention(**good(), mask=lowered())
    for layout in ("bhnd", "bnhd"):
        for name, arguments in GOOD.items():
            getattr(tw.numpy, name)(**arguments(layout))


BAD_PARTS: list[tuple[Any, type[Exception], str]] = [
    ([], ValueError, "states must have at least one part, got none"),
    ([array(2, 3)], TypeError, "states[0] must be a pair (o, lse), got ndarray"),
    (
        [(array(B, H, N, DV), array(B, N, H))],
        ValueError,
        f"states[0].lse {ROWS} with H=8 (from states[0].o), N=3 (from states[0].o), got (2, 3, 8)",
    ),
    (
        [(array(B, H, N, DV), array(B, H, N)), (array(B, H, 5, DV), array(B, H, 5))],
        ValueError,
        f"states[1].o {OUT} with N=3 (from states[0].o), got (2, 8, 5, 16)",
    ),
    (
        [(array(B, H, N, DV), array(B, H, N, dtype=np.float64))],
        TypeError,
        "states[0].lse must have dtype float32 (from states[0].o), got float64",
    ),
]


@pytest.mark.parametrize(("parts", "kind", "text"), BAD_PARTS, ids=[row[2] for row in BAD_PARTS])
def test_bad_parts_raise_their_text(parts: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        tw.merge(parts)
    assert str(caught.value) == f"merge: {text}"


def test_dispatching_attention_names_what_it_supports() -> None:
    with pytest.raises(TypeError) as caught:
        tw.attention([1.0], [1.0], [1.0])
    assert str(caught.value) == "attention: q must be a numpy.ndarray, got list"


@pytest.mark.parametrize(("count", "kind"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_number_of_threads_is_positive(count: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="set_num_threads: count must be"):
        tw.set_num_threads(count)


def refuse(call: Any) -> str:
    return "not today"


class Refusing:
    """A module whose implementation serves nothing."""

    IMPLEMENTATION = Implementation("never", print, print, refuses=refuse)


@pytest.mark.parametrize("name", ["jvp", "vjp_jvp"])
def test_implementation_without_a_derivative_is_unsupported(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bare:
        IMPLEMENTATION = Implementation("bare", print, print)

    monkeypatch.setitem(__import__("sys").modules, "tilewise_bare", Bare)
    monkeypatch.setitem(TABLE, "attention", {"bare": "tilewise_bare"})
    arguments = GOOD[f"attention_{name}"]() | {"implementation": "bare"}
    with pytest.raises(tw.Unsupported) as caught:
        getattr(tw.numpy, f"attention_{name}")(**arguments)
    assert str(caught.value) == f"attention: implementation 'bare': has no {name}"


def test_refusals_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"attention": {"never": "tilewise_never", "neither": "tilewise_neither"}}
    monkeypatch.setitem(TABLE, "refused", table["attention"])
    for module in ("tilewise_never", "tilewise_neither"):
        monkeypatch.setitem(__import__("sys").modules, module, Refusing)
    with pytest.raises(ExceptionGroup) as group:
        choose("refused", None)
    assert [type(error) for error in group.value.exceptions] == [tw.Unsupported] * 2
    assert str(group.value.exceptions[1]) == "refused: implementation 'neither': not today"
    with pytest.raises(tw.Unsupported, match="not today"):
        choose("refused", None, "never")
