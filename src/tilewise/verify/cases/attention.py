"""The cases of attention: what every implementation is audited, tested and benchmarked on.

Sizes are small and mostly primes, one prime per dimension, so that a transposed pair of
dimensions or a forgotten tail cannot pass unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base import masks
from tilewise.base.masks import Mask

from .problem import Case, Dims, MaskBuilder, Problem

__all__ = ["CASES", "Case", "Dims", "MaskBuilder", "Problem"]


def _fixed(mask: Mask) -> MaskBuilder:
    """Return a builder of one mask for every problem."""
    return lambda dims, batch: mask


def _cuts(total: int, pieces: int) -> NDArray[np.int64]:
    """Return boundaries of documents of unlike lengths, one of them empty."""
    inner = np.linspace(0, total, pieces + 1)[1:-1] ** 1.1 / max(1.0, total) ** 0.1
    cuts = np.sort(inner.astype(np.int64))
    return np.concatenate(([0], cuts, cuts[-1:], [total]))


def _ids(dims: Dims, batch: slice) -> Mask:
    """Return documents by ids, others in every batch entry."""
    at = np.arange(dims.Nk) * (3 + np.arange(8)[batch, None]) // max(1, dims.Nk)
    return masks.documents(ids=at[:, dims.Nk - dims.N :], ids_k=at)


def _ragged(dims: Dims, batch: slice) -> NDArray[np.int64]:
    """Return lengths of the keys of each batch entry: zero, a few, most, all."""
    shares = np.array([0.62, 0.0, 1.0, 0.05, 0.31, 0.9, 0.5, 0.77])[batch]
    return (shares * dims.Nk).astype(np.int64)


def _random(letters: str, share: float) -> MaskBuilder:
    """Return a builder of a random dense mask of some shape; many runs per row."""

    def build(dims: Dims, batch: slice) -> Mask:
        whole = replace(dims, B=8)
        shape = whole.sizes(letters)
        array = np.random.default_rng(5).random(shape) < share
        has_batch = len(shape) == 4 and shape[0] != 1
        return masks.dense(array[batch] if has_batch else array)

    return build


def _blocks(dims: Dims, batch: slice) -> Mask:
    """Return a dense mask with empty, full and mixed tiles, and rows that see nothing."""
    i, j = np.arange(dims.N)[:, None], np.arange(dims.Nk)
    seen = (i // 16 + j // 64) % 3 != 1
    seen &= (i // 32 % 2 == 0) | (j % 5 != 0)
    return masks.dense(seen & (i % 23 != 7))


def _no_keys_for_some(dims: Dims, batch: slice) -> Mask:
    """Return a dense mask in which every third row, and all of the last head, is empty."""
    h, i = np.arange(dims.H)[:, None, None], np.arange(dims.N)[:, None]
    j = np.arange(dims.Nk)
    return masks.dense((i % 3 != 1) & (h < dims.H - 1) & ((i + j) % 7 != 0))


_SQUARE = Dims(N=113, Nk=113)
_MORE_KEYS = Dims(N=53, Nk=211)
_MORE_QUERIES = Dims(N=211, Nk=53)
_TOP_LEFT = "top_left"

_MASKS: dict[str, MaskBuilder] = {
    "prefix": _fixed(masks.prefix(41)),
    "prefix-per-batch": lambda d, b: masks.prefix(_ragged(d, b)),
    "prefix-lm": lambda d, b: masks.causal() | masks.prefix(_ragged(d, b) // 2),
    "window-left": _fixed(masks.window(17, 0)),
    "window-right": _fixed(masks.window(0, 19)),
    "window-both": _fixed(masks.window(13, 11)),
    "window-open-left": _fixed(masks.window(None, 5)),
    "window-open-right": _fixed(masks.window(5, None)),
    "window-one": _fixed(masks.window(0, 0)),
    "documents-by-ids": _ids,
    "documents-causal": lambda d, b: _ids(d, b) & masks.causal(),
    "lengths": lambda d, b: masks.lengths(_ragged(d, b)),
    "lengths-causal": lambda d, b: masks.lengths(_ragged(d, b)) & masks.causal(),
    "chunked": _fixed(masks.chunked(32)),
    "chunked-causal": _fixed(masks.chunked(29) & masks.causal()),
    "sink-tokens-window": _fixed(masks.causal() & (masks.window(23, 0) | masks.sink_tokens(4))),
    "three-intervals": _fixed(masks.sink_tokens(3) | masks.window(9, 0) | masks.chunked(7)),
    "and-or": lambda d, b: (masks.causal() & _ids(d, b)) | masks.prefix(5) & masks.window(60, 0),
}

_DENSE: dict[str, MaskBuilder] = {
    "dense": _random("N Nk", 0.5),
    "dense-sparse": _random("N Nk", 0.02),
    "dense-per-head": _random("H N Nk", 0.4),
    "dense-per-batch": _random("B 1 N Nk", 0.6),
    "dense-per-batch-and-head": _random("B H N Nk", 0.3),
    "dense-keys-only": _random("Nk", 0.5),
    "dense-keys-per-batch": _random("B 1 1 Nk", 0.7),
    "dense-queries-only": _random("N 1", 0.5),
    "dense-blocks": _blocks,
    "dense-empty-rows": _no_keys_for_some,
    "dense-and-causal": lambda d, b: _random("N Nk", 0.5)(d, b) & masks.causal(),
}


def _mask_cases() -> Iterator[Case]:
    for shape, dims in (
        ("square", _SQUARE),
        ("more-keys", _MORE_KEYS),
        ("more-queries", _MORE_QUERIES),
    ):
        yield Case(f"mask/causal-{shape}", dims, mask=_fixed(masks.causal()), causal=True)
        top_left = _fixed(masks.causal(align="top_left"))
        yield Case(f"mask/causal-top-left-{shape}", dims, mask=top_left, moves=False)
    for index, (name, mask) in enumerate(_MASKS.items()):
        # Ids are per position: the last queries have other ids than the first.
        moves = "documents" not in name and name != "and-or"
        dims = (_SQUARE, _MORE_KEYS, Dims(B=3, H=4, Hk=2, N=131, Nk=149))[index % 3]
        yield Case(f"mask/{name}", dims, mask=mask, moves=moves)
    for name, mask in _DENSE.items():
        moves = name in ("dense-keys-only", "dense-keys-per-batch")
        yield Case(f"mask/{name}", Dims(H=4, Hk=2), mask=mask, moves=moves)
    yield Case(
        "mask/window-top-left",
        _MORE_QUERIES,
        mask=_fixed(masks.window(7, 5, align="top_left")),
        moves=False,
    )
    yield Case(
        "mask/documents-packed",
        Dims(B=1, N=211, Nk=211),
        mask=lambda d, b: masks.documents(_cuts(d.N, 5)),
        moves=False,
    )
    yield Case(
        "mask/documents-cross",
        Dims(B=1, N=97, Nk=223),
        mask=lambda d, b: masks.documents(_cuts(d.N, 4), cu_seqlens_k=_cuts(d.Nk, 4)),
        moves=False,
    )
    yield Case(
        "mask/lengths-of-queries-too",
        Dims(B=3, N=127, Nk=127),
        mask=lambda d, b: masks.lengths(
            _ragged(d, b), query_lengths=np.array([101, 127, 0], np.int64)[b]
        ),
        moves=False,
    )
    yield Case(
        "mask/gqa-dense-per-head",
        Dims(H=10, Hk=2, N=67, Nk=149, D=64, Dv=64),
        mask=_random("H N Nk", 0.5),
        moves=False,
    )


def _size_cases() -> Iterator[Case]:
    causal = _fixed(masks.causal())
    for N in range(2, 10):
        dims = Dims(H=4, Hk=2, N=N, Nk=N + 4 * (N % 3), D=17, Dv=19)
        yield Case(f"size/{N}-queries", dims, mask=causal, causal=True)
    yield Case("size/one-by-one", Dims(N=1, Nk=1, D=7, Dv=5))
    yield Case("size/all-ones", Dims(B=1, H=1, Hk=1, N=1, Nk=1, D=1, Dv=1))
    for N, Nk in ((15, 63), (16, 64), (17, 65), (64, 128), (65, 129), (128, 256), (129, 257)):
        yield Case(f"size/{N}x{Nk}", Dims(N=N, Nk=Nk, D=32, Dv=32))
    for D, Dv in (
        (1, 3),
        (7, 1),
        (16, 16),
        (31, 64),
        (40, 48),
        (64, 64),
        (96, 31),
        (128, 128),
        (257, 129),
        (512, 512),
        (8, 509),
        (192, 128),
    ):
        dims = Dims(B=1, H=2, Hk=2, N=47, Nk=89, D=D, Dv=Dv)
        yield Case(f"size/D{D}-Dv{Dv}", dims, mask=causal, causal=True)
    yield Case("size/more-keys", Dims(N=53, Nk=311))
    yield Case("size/more-queries", Dims(N=311, Nk=53))
    for letters in ("B", "N", "Nk", "N Nk", "H Hk"):
        dims = replace(Dims(), **dict.fromkeys(letters.split(), 0))
        yield Case(f"size/zero-{letters.replace(' ', '-')}", dims)
    yield Case("size/zero-Nk-sinks", Dims(Nk=0), sinks="normal")
    yield Case("size/zero-Nk-causal-bias", Dims(Nk=0), mask=causal, bias="H N Nk")
    yield Case("size/many-keys", Dims(B=1, H=2, Hk=1, N=37, Nk=2297, D=40, Dv=24), mask=causal)
    yield Case("size/many-queries", Dims(B=1, H=1, Hk=1, N=2203, Nk=71, D=24, Dv=40))
    long = Dims(B=1, H=2, Hk=1, N=1031, Nk=1031, D=64, Dv=64)
    yield Case("size/long-causal", long, mask=causal, causal=True)


def _head_cases() -> Iterator[Case]:
    causal = _fixed(masks.causal())
    for group in (2, 3, 4, 8):
        dims = Dims(H=2 * group, Hk=2, N=61, Nk=83, D=64, Dv=64)
        yield Case(f"heads/{group}-per-key-head", dims, mask=causal, causal=True)
        yield Case(f"heads/{group}-per-key-head-full", replace(dims, N=31, D=40, Dv=37))
    dims = Dims(H=7, Hk=1, N=67, Nk=109)
    yield Case("heads/multi-query", dims)
    yield Case("heads/multi-query-causal", dims, mask=causal, causal=True, dtype="float64")
    yield Case("heads/one-head", Dims(B=5, H=1, Hk=1, N=59, Nk=73))


def _decode_cases() -> Iterator[Case]:
    long = Dims(B=2, H=4, Hk=4, N=1, Nk=2203, D=64, Dv=64)
    causal = _fixed(masks.causal())
    yield Case("decode/full", long)
    yield Case("decode/causal", long, mask=causal, causal=True)
    yield Case("decode/gqa", replace(long, H=8, Hk=2), mask=causal, causal=True)
    yield Case("decode/multi-query", replace(long, H=5, Hk=1, Nk=2129, D=128, Dv=128))
    yield Case("decode/window", long, mask=_fixed(masks.window(300, 0)))
    yield Case("decode/lengths", replace(long, B=5), mask=_MASKS["lengths"])
    yield Case("decode/dense", replace(long, H=8, Hk=2), mask=_DENSE["dense"], moves=False)
    yield Case("decode/sink-tokens", long, mask=_MASKS["sink-tokens-window"])
    yield Case("decode/sinks", long, sinks="normal")
    yield Case("decode/bias", replace(long, H=6, Hk=2), bias="1 H 1 Nk")
    yield Case("decode/alibi-softcap", replace(long, H=6, Hk=3), alibi="H", softcap=20.0)
    yield Case("decode/bnhd", replace(long, H=8, Hk=2, D=37, Dv=41), layout="bnhd")
    yield Case("decode/few-keys", replace(long, H=6, Hk=2, Nk=67))
    yield Case("decode/three-queries", replace(long, H=8, Hk=2, N=3), mask=causal, causal=True)
    yield Case("decode/float64", replace(long, H=6, Hk=2, Nk=2111), dtype="float64", mask=causal)


def _bias_cases() -> Iterator[Case]:
    dims = Dims(H=4, Hk=2, N=67, Nk=101, D=24, Dv=17)
    for index in range(16):
        letters = " ".join(
            x if index >> (3 - axis) & 1 else "1" for axis, x in enumerate(("B", "H", "N", "Nk"))
        )
        yield Case(f"bias/{letters.replace(' ', '-')}", dims, bias=letters)
    for letters in ("H N Nk", "N Nk", "Nk"):
        yield Case(f"bias/{letters.replace(' ', '-')}", dims, bias=letters)
    causal = _fixed(masks.causal())
    yield Case("bias/causal", dims, bias="H N Nk", mask=causal, causal=True)
    yield Case("bias/dense-mask", dims, bias="1 H N Nk", mask=_DENSE["dense"], moves=False)
    yield Case("bias/transposed", dims, bias="B H N Nk", memory="reversed")
    yield Case("bias/float64", dims, bias="B 1 N Nk", dtype="float64")


def _option_cases() -> Iterator[Case]:
    causal = _fixed(masks.causal())
    gqa = Dims(H=6, Hk=2)
    yield Case("alibi/per-head", Dims(), alibi="H")
    yield Case("alibi/per-batch-and-head", gqa, alibi="B H")
    yield Case("alibi/causal", gqa, alibi="H", mask=causal, causal=True)
    yield Case("alibi/more-queries", _MORE_QUERIES, alibi="B H")
    yield Case("alibi/window-float64", gqa, alibi="H", mask=_MASKS["window-both"], dtype="float64")
    yield Case("softcap/mild", Dims(), softcap=30.0)
    yield Case("softcap/strong", gqa, softcap=0.75)
    yield Case("softcap/causal-large-logits", softcap=50.0, values="sharp", mask=causal)
    yield Case("softcap/bias", gqa, softcap=5.0, bias="B H N Nk")
    yield Case("softcap/float64", gqa, softcap=3.0, dtype="float64")
    yield Case("sinks/normal", Dims(), sinks="normal")
    yield Case("sinks/some", gqa, sinks="some", mask=causal, causal=True)
    yield Case("sinks/large", gqa, sinks="large")
    yield Case("sinks/multi-query", Dims(H=5, Hk=1), sinks="normal", softcap=4.0)
    yield Case("sinks/float64", gqa, sinks="some", dtype="float64")
    yield Case("scale/zero", gqa, softmax_scale=0.0)
    yield Case("scale/one", Dims(), softmax_scale=1.0)
    yield Case("scale/small", gqa, softmax_scale=0.013, mask=causal)
    yield Case("layout/bnhd", Dims(), layout="bnhd")
    yield Case("layout/bnhd-gqa-causal", gqa, layout="bnhd", mask=causal, causal=True)
    yield Case("layout/bnhd-bias-float64", gqa, layout="bnhd", bias="B H N Nk", dtype="float64")
    yield Case("cotangent/o-only", gqa, cotangents="o", mask=causal)
    yield Case("cotangent/lse-only", gqa, cotangents="lse")
    yield Case("cotangent/o-only-sinks", gqa, cotangents="o", sinks="normal")


def _tangent_cases() -> Iterator[Case]:
    """Only some tangents are given; the others are zero."""
    dims = Dims(H=4, Hk=2, N=67, Nk=101, D=24, Dv=17)
    causal = _fixed(masks.causal())
    options: dict[str, Any] = {"mask": causal, "bias": "1 H N Nk", "sinks": "normal"}
    for name in ("q", "k", "v", "bias", "sinks", "do", "dlse"):
        yield Case(f"tangent/{name}-only", dims, tangents=name, **options)
    yield Case("tangent/none", dims, tangents="", **options)
    yield Case("tangent/q-k", dims, tangents="q k", mask=causal, causal=True, softcap=0.9)
    yield Case("tangent/v-do", dims, tangents="v do", softcap=0.9)
    yield Case("tangent/k-dlse-o-only", dims, tangents="k dlse", cotangents="o")
    yield Case("tangent/inputs-decode", replace(dims, N=1, Nk=2203), tangents="q k v")
    yield Case("tangent/inputs-bnhd", dims, tangents="q k v", layout="bnhd", memory="padded")
    yield Case("tangent/k-v-float64", dims, tangents="k v", softcap=2.0, dtype="float64")


def _dropout_cases() -> Iterator[Case]:
    dims = Dims(H=4, Hk=2, N=67, Nk=139, D=24, Dv=17)
    causal = _fixed(masks.causal())
    for p in (0.1, 0.5):
        yield Case(f"dropout/{p}", Dims(), dropout=p)
        yield Case(f"dropout/{p}-causal", dims, dropout=p, mask=causal, causal=True)
        yield Case(f"dropout/{p}-bias", dims, dropout=p, bias="B H N Nk", mask=causal)
    yield Case("dropout/all", dims, dropout=1.0)
    yield Case("dropout/nearly-all", dims, dropout=0.99, sinks="normal")
    yield Case("dropout/dense", dims, dropout=0.5, mask=_DENSE["dense-per-head"], moves=False)
    yield Case("dropout/lengths", dims, dropout=0.1, mask=_MASKS["lengths"])
    yield Case("dropout/window", dims, dropout=0.5, mask=_MASKS["sink-tokens-window"])
    yield Case("dropout/softcap-sinks", dims, dropout=0.1, softcap=2.0, sinks="some")
    yield Case("dropout/bnhd", dims, dropout=0.5, layout="bnhd", memory="padded")
    yield Case("dropout/float64", dims, dropout=0.5, mask=causal, causal=True, dtype="float64")
    yield Case("dropout/absent", dims, dropout=0.5, mask=_MASKS["lengths"], poison="absent")
    yield Case(
        "dropout/empty-rows", dims, dropout=0.1, mask=_DENSE["dense-empty-rows"], moves=False
    )
    yield Case("dropout/more-queries", _MORE_QUERIES, dropout=0.5, mask=causal, causal=True)
    long = Dims(B=1, H=2, Hk=1, N=307, Nk=1031, D=31, Dv=37)
    yield Case("dropout/chunks", long, dropout=0.1, mask=causal, causal=True)
    decode = replace(dims, N=1, Nk=2203)
    yield Case("dropout/decode", decode, dropout=0.1)
    yield Case("dropout/decode-few-keys", replace(decode, Nk=67), dropout=0.5)
    yield Case("dropout/three-queries", replace(decode, N=3), dropout=0.5, mask=causal, causal=True)


def _memory_cases() -> Iterator[Case]:
    dims = Dims(H=4, Hk=2, N=61, Nk=97, D=40, Dv=24)
    causal = _fixed(masks.causal())
    for memory in ("padded", "transposed", "broadcast", "readonly", "offset", "reversed"):
        yield Case(f"memory/{memory}", dims, memory=memory, mask=causal, causal=True)
        yield Case(f"memory/{memory}-bnhd", dims, memory=memory, layout="bnhd")
    yield Case("memory/padded-float64", dims, memory="padded", dtype="float64", bias="H N Nk")


def _value_cases() -> Iterator[Case]:
    dims = Dims(H=4, Hk=2, N=101, Nk=193, D=64, Dv=64)
    causal = _fixed(masks.causal())
    for values in ("outliers", "large_logits", "zeros", "ties", "mean", "small", "sharp"):
        name = values.replace("_", "-")
        yield Case(f"values/{name}", dims, values=values)
        yield Case(f"values/{name}-causal", dims, values=values, mask=causal, causal=True)
    yield Case("values/equal-keys", dims, values="equal_keys")
    yield Case("values/large-logits-float64", dims, values="large_logits", dtype="float64")
    yield Case("values/outliers-D128", replace(dims, D=128, Dv=128), values="outliers")
    lowest = {dtype: float(np.finfo(dtype).min) for dtype in ("float32", "float64")}
    paddings = {"lowest": lowest["float32"], "minus-1e9": -1e9, "minus-inf": -np.inf}
    for name, number in paddings.items():
        yield Case(f"padding/{name}", dims, bias="B 1 N Nk", padding=number)
        yield Case(f"padding/{name}-sinks", dims, bias="H N Nk", padding=number, sinks="some")
    padded = Case("padding/float64", dims, bias="B 1 N Nk", dtype="float64")
    yield replace(padded, name="padding/lowest-float64", padding=lowest["float64"])
    yield replace(padded, name="padding/minus-1e9-causal-float64", padding=-1e9, mask=causal)


def _empty_row_cases() -> Iterator[Case]:
    empty, gqa = _DENSE["dense-empty-rows"], Dims(H=4, Hk=2)
    causal = _fixed(masks.causal())
    nothing = _fixed(masks.prefix(0))
    yield Case("empty-rows/some", gqa, mask=empty, moves=False)
    yield Case("empty-rows/some-sinks", gqa, mask=empty, moves=False, sinks="normal")
    yield Case("empty-rows/some-sinks-some", gqa, mask=empty, moves=False, sinks="some")
    yield Case("empty-rows/some-bias", gqa, mask=empty, moves=False, bias="B H N Nk")
    yield Case("empty-rows/all", gqa, mask=nothing)
    yield Case("empty-rows/all-sinks", gqa, mask=nothing, sinks="normal")
    yield Case("empty-rows/causal-sinks", _MORE_QUERIES, mask=causal, causal=True, sinks="normal")
    yield Case("empty-rows/causal-softcap", _MORE_QUERIES, mask=causal, causal=True, softcap=2.0)
    yield Case("empty-rows/float64", gqa, mask=empty, moves=False, dtype="float64")


def _poison_cases() -> Iterator[Case]:
    gqa = Dims(B=3, H=4, Hk=2, N=67, Nk=131)
    causal = _fixed(masks.causal())
    absent: dict[str, dict[str, Any]] = {
        "lengths": {"mask": _MASKS["lengths"]},
        "lengths-of-queries-too": {
            "mask": lambda d, b: masks.lengths(
                _ragged(d, b), query_lengths=np.array([61, 67, 3], np.int64)[b]
            ),
            "moves": False,
        },
        "window": {"mask": _fixed(masks.window(9, 0))},
        "causal-top-left": {"mask": _fixed(masks.causal(align="top_left")), "moves": False},
        "causal-bias": {"mask": causal, "bias": "B H N Nk"},
        "causal-bias-softcap": {"mask": causal, "bias": "H N Nk", "softcap": 3.0},
        "dense-bias": {"mask": _DENSE["dense"], "bias": "N Nk", "moves": False},
        "dense-keys": {"mask": _DENSE["dense-keys-per-batch"], "bias": "B 1 1 Nk"},
        "empty-rows": {"mask": _DENSE["dense-empty-rows"], "moves": False, "bias": "B H N Nk"},
        "empty-rows-sinks": {"mask": _DENSE["dense-empty-rows"], "moves": False, "sinks": "normal"},
        "all-empty": {"mask": _fixed(masks.prefix(0)), "bias": "H N Nk"},
        "lengths-alibi": {"mask": _MASKS["lengths-causal"], "alibi": "H"},
        "float64": {"mask": _MASKS["lengths"], "bias": "B 1 N Nk", "dtype": "float64"},
    }
    for name, options in absent.items():
        yield Case(f"poison/absent-{name}", gqa, poison="absent", **options)
    for which in ("q", "k", "v", "v_inf"):
        name = which.replace("_", "-")
        yield Case(f"poison/attended-{name}", gqa, poison=which, mask=causal, causal=True)
        dense = _DENSE["dense-per-head"]
        yield Case(f"poison/attended-{name}-dense", gqa, poison=which, mask=dense, moves=False)
    yield Case("poison/attended-bias", gqa, poison="bias", mask=causal, bias="B H N Nk")
    for which in ("k", "v"):
        name = f"poison/attended-{which}-dropout"
        yield Case(name, gqa, poison=which, mask=causal, causal=True, dropout=0.5)
    for which in ("tq", "tk", "tv", "tbias", "tdo", "do"):
        options = {"mask": causal, "causal": True, "bias": "1 H N Nk"}
        yield Case(f"poison/attended-{which}", gqa, poison=which, **options)
    decode = replace(gqa, N=1, Nk=2203)
    lengths = _MASKS["lengths"]
    yield Case("poison/absent-decode", decode, poison="absent", mask=lengths)
    yield Case("poison/attended-decode", decode, poison="k", mask=_DENSE["dense"], moves=False)


def _combined_cases() -> Iterator[Case]:
    gqa = Dims(B=2, H=6, Hk=2, N=97, Nk=173, D=40, Dv=24)
    everything = Case(
        "combined/everything",
        gqa,
        mask=_MASKS["sink-tokens-window"],
        bias="B H N Nk",
        alibi="B H",
        softcap=6.0,
        sinks="some",
        softmax_scale=0.31,
    )
    yield everything
    yield replace(everything, name="combined/everything-dropout", dropout=0.3)
    yield replace(everything, name="combined/everything-float64", dtype="float64")
    yield replace(everything, name="combined/everything-bnhd", layout="bnhd", memory="padded")
    dense = _DENSE["dense-per-batch-and-head"]
    yield replace(everything, name="combined/everything-dense", mask=dense, moves=False)
    yield replace(
        everything,
        name="combined/everything-poison",
        mask=_MASKS["lengths-causal"],
        poison="absent",
        bias="B 1 N Nk",
    )
    yield replace(
        everything,
        name="combined/everything-decode",
        dims=replace(gqa, N=1, Nk=2239),
        bias="H 1 Nk",
    )
    yield Case(
        "combined/window-softcap-sinks",
        replace(gqa, H=8, D=64, Dv=64),
        mask=_fixed(masks.window(31, 0)),
        softcap=30.0,
        sinks="normal",
    )
    yield Case(
        "combined/prefix-lm-bias-outliers",
        gqa,
        mask=_MASKS["prefix-lm"],
        bias="1 H N Nk",
        values="outliers",
    )


CASES: tuple[Case, ...] = (
    *_size_cases(),
    *_head_cases(),
    *_mask_cases(),
    *_decode_cases(),
    *_bias_cases(),
    *_option_cases(),
    *_tangent_cases(),
    *_dropout_cases(),
    *_memory_cases(),
    *_value_cases(),
    *_empty_row_cases(),
    *_poison_cases(),
    *_combined_cases(),
)
"""Every case, grouped by the part of its name before the slash."""
