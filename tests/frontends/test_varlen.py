"""Packed sequences: each has the bits of a call of its own, with every option and derivative."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.func as ft
from numpy.typing import NDArray
from torch.autograd import gradcheck, gradgradcheck

import tilewise as tw
from tilewise.numpy import RowStats

pytest.importorskip("tilewise._core")

Array = NDArray[Any]
H, HK, D, DV = 4, 2, 19, 13
QUERIES = np.array([37, 0, 5, 1, 113, 0, 23, 3, 307])
KEYS = np.array([37, 2, 0, 41, 131, 0, 7, 2, 311])
CU_Q, CU_K = (np.concatenate(([0], np.cumsum(x))) for x in (QUERIES, KEYS))
S, TQ, TK, MOST = len(QUERIES), int(CU_Q[-1]), int(CU_K[-1]), int(KEYS.max())
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def normal(*shape: int, seed: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": tw.causal()},
    "causal top left": {"mask": tw.causal(align="top_left")},
    "window and sink tokens": {"mask": tw.causal() & (tw.window(9, 0) | tw.sink_tokens(3))},
    "prefix": {"mask": tw.causal() | tw.prefix(11)},
    "chunks": {"mask": tw.chunked(16)},
    "both alignments": {"mask": tw.causal() & tw.window(9, 4, align="top_left")},
    "bias": {"bias": normal(H, TQ, MOST, seed=5), "mask": tw.causal()},
    "bias of queries": {"bias": normal(H, TQ, 1, seed=6)},
    "bias of all heads": {"bias": normal(1, TQ, MOST, seed=6)},
    "slopes": {"alibi_slopes": np.abs(normal(H, seed=7)), "softmax_scale": 0.2},
    "slopes of sequences": {"alibi_slopes": np.abs(normal(S, H, seed=8))},
    "softcap": {"softcap": 1.5, "mask": tw.window(40, None)},
    "sinks": {"sinks": normal(H, seed=9), "mask": tw.causal()},
    "dropout": {"dropout_p": 0.4, "seed": 2**63 + 5, "mask": tw.causal()},
}
TANGENTS = {
    "tq": normal(TQ, H, D, seed=11),
    "tk": normal(TK, HK, D, seed=12),
    "tv": normal(TK, HK, DV, seed=13),
}
COTANGENTS = {"do": normal(TQ, H, DV, seed=14), "dlse": normal(H, TQ, seed=15)}
MOVED = {"tdo": normal(TQ, H, DV, seed=16), "tdlse": normal(H, TQ, seed=17)}


def operands(dtype: Any = np.float32) -> dict[str, Array]:
    shapes = {"q": (TQ, H, D), "k": (TK, HK, D), "v": (TK, HK, DV)}
    return {n: normal(*s, seed=i, dtype=dtype) for i, (n, s) in enumerate(shapes.items())}


def cast(arrays: dict[str, Array], dtype: Any) -> dict[str, Array]:
    return {n: x if n.endswith("lse") else x.astype(dtype) for n, x in arrays.items()}


def all_of(prefix: str, given: dict[str, Any], options: dict[str, Any], *ends: Any) -> Any:
    """Every result of the five functions for NumPy arrays, by name."""
    q, k, v = (given[n] for n in "qkv")
    f = {n: getattr(tw.numpy, f"{prefix}_{n}") for n in ("vjp", "jvp", "vjp_jvp", "forward_jvp")}
    asked = dict.fromkeys(
        ("return_lse", "return_stats", "return_max_logit", "return_entropy"), True
    )
    r = getattr(tw.numpy, prefix)(q, k, v, *ends, **asked, **options)
    t = tuple(given[n] for n in TANGENTS)
    moves = {n: given[n] for n in ("tbias", "tsinks") if n in given}
    rows = {n: given[n] for n in ("dlse", "tdo", "tdlse")}
    saved = (q, k, v, r.o_full, r.stats, *ends)
    found = {**r._asdict(), "m": r.stats.m, "log_l": r.stats.log_l}
    found |= f["vjp"](given["do"], *saved, dlse=given["dlse"], **options)._asdict()
    found |= f["jvp"](*t, *saved, **moves, **options)._asdict()
    again = f["vjp_jvp"](given["do"], *t, *saved, **moves, **rows, **options)._asdict()
    found |= {f"t{n}": x for n, x in again.items()}
    one, moved = f["forward_jvp"](*t, q, k, v, *ends, **moves, **options)
    found |= {"one-pass o": one.o, "one-pass to": moved.to, "one-pass tlse": moved.tlse}
    del found["stats"]
    return found


OF_QUERIES = {"o", "o_full", "to", "dq", "tdq", "one-pass o", "one-pass to"}
OF_KEYS = {"dk", "dv", "tdk", "tdv"}
OF_ALL = {"dsinks", "tdsinks"}


def alone(given: dict[str, Any], options: dict[str, Any], s: int) -> Any:
    """The results of one sequence by itself."""
    queries, keys = slice(*CU_Q[s : s + 2]), slice(*CU_K[s : s + 2])
    part = {}
    for name, x in given.items():
        if name in ("k", "v", "tk", "tv"):
            part[name] = x[keys][None]
        elif name in ("bias", "tbias"):
            part[name] = x[:, queries, : KEYS[s]]
        elif name == "tsinks":
            part[name] = x
        else:
            part[name] = x[:, queries][None] if name.endswith("lse") else x[queries][None]
    own = dict(options, layout="bnhd")
    if "bias" in own:
        own["bias"] = own["bias"][:, queries, : KEYS[s]]
    if np.ndim(own.get("alibi_slopes")) == 2:
        own["alibi_slopes"] = own["alibi_slopes"][s]
    return all_of("attention", part, own)


FLOAT32 = np.dtype(np.float32)


@pytest.mark.parametrize(
    ("dtype", "implementation", "name"),
    [
        *((dtype, "cpu", name) for dtype in (FLOAT32, BFLOAT16) for name in OPTIONS),
        *((FLOAT32, "reference", name) for name in ("causal", "bias", "slopes of sequences")),
        *((FLOAT32, "reference", name) for name in ("sinks", "dropout")),
    ],
    ids=str,
)
def test_sequences_have_the_bits_of_calls_of_their_own(
    dtype: np.dtype[Any], implementation: str, name: str
) -> None:
    options = cast({n: x for n, x in OPTIONS[name].items() if isinstance(x, np.ndarray)}, dtype)
    options = {**OPTIONS[name], **options, "implementation": implementation}
    given = operands(dtype) | cast(TANGENTS | COTANGENTS | MOVED, dtype)
    for n in {"bias", "sinks"} & options.keys():
        given[f"t{n}"] = np.cos(options[n].astype(np.float32)).astype(dtype)
    whole = all_of("attention_varlen", given, options, CU_Q, CU_K.astype(np.int32))
    # Dropout counts the place in the batch, so only the first sequence is alone what it is here.
    parts = [alone(given, options, s) for s in range(1 if "seed" in options else S)]
    sums = {n: np.zeros(H) for n in OF_ALL}
    for s, part in enumerate(parts):
        queries, keys = slice(*CU_Q[s : s + 2]), slice(*CU_K[s : s + 2])
        for field, x in part.items():
            if x is None:
                assert whole[field] is None
                continue
            if field in OF_ALL:
                sums[field] += x
                continue
            if field.endswith("bias"):
                got = whole[field][:, queries, : x.shape[2]]
                assert not whole[field][:, queries, x.shape[2] :].any()
            elif field in OF_QUERIES | OF_KEYS:
                got, x = whole[field][queries if field in OF_QUERIES else keys], x[0]
            else:
                got, x = whole[field][:, queries], x[0]
            assert got.dtype == x.dtype
            assert got.tobytes() == x.tobytes(), (field, s)
    if "sinks" in options:
        for field, total in sums.items():
            scale = 4e-2 if dtype == BFLOAT16 else 1e-5
            np.testing.assert_allclose(whole[field].astype(float), total, scale, 30 * scale)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_dropout_counts_a_sequence_as_a_batch_entry(implementation: str) -> None:
    n, sizes = 3, (H, 29, D)
    q, k, v = (normal(n, *sizes, seed=i) for i in range(3))
    options = {"dropout_p": 0.3, "seed": 8, "implementation": implementation}
    batched = tw.attention(q, k, v, **options)
    packed = [np.concatenate(list(x.swapaxes(1, 2))) for x in (q, k, v)]
    o = tw.attention_varlen(*packed, [0, 29, 58, 87], **options)
    np.testing.assert_array_equal(o.reshape(n, 29, H, D).swapaxes(1, 2), batched)


def test_sequences_and_queries_without_keys_are_empty() -> None:
    x = operands()
    r = tw.attention_varlen(**x, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, return_lse=True)
    empty = np.repeat(KEYS == 0, QUERIES)
    assert empty.sum() == 5
    assert not r.o[empty].any()
    assert np.isneginf(r.lse[:, empty]).all()
    assert np.isfinite(r.lse[:, ~empty]).all()
    none = tw.attention_varlen(*(x[n][:0] for n in "qkv"), [0])
    assert none.shape == (0, H, DV)
    assert tw.attention_varlen(*(x[n][:0] for n in "qkv"), [0, 0, 0]).shape == (0, H, DV)


def test_other_sequences_are_absent() -> None:
    """NaN in one sequence reaches none of the others."""
    given = operands() | TANGENTS | COTANGENTS | MOVED
    at, keys = slice(*CU_Q[4:6]), slice(*CU_K[4:6])
    clean = all_of("attention_varlen", given, {"mask": tw.causal()}, CU_Q, CU_K)
    for name in ("q", "k", "v", "do"):
        given[name] = given[name].copy()
        given[name][at if name in ("q", "do") else keys] = np.nan
    spoiled = all_of("attention_varlen", given, {"mask": tw.causal()}, CU_Q, CU_K)
    for field in ("o", "dq", "dk", "dv", "to", "tdq", "tdk", "tdv"):
        of_keys = field in OF_KEYS
        rest = np.ones(TK if of_keys else TQ, bool)
        rest[keys if of_keys else at] = False
        assert clean[field][rest].tobytes() == spoiled[field][rest].tobytes()
        assert np.isnan(spoiled[field][~rest]).any()


def test_boundaries_of_the_keys_are_those_of_the_queries_by_default() -> None:
    q, k, v = (normal(17, H, D, seed=i) for i in range(3))
    cu = [0, 5, 5, 17]
    same = tw.attention_varlen(q, k, v, cu, np.array(cu, np.int32))
    assert tw.attention_varlen(q, k, v, tuple(cu)).tobytes() == same.tobytes()


def test_lse_in_place_of_statistics() -> None:
    x, do = operands(np.float64), normal(TQ, H, DV, seed=3, dtype=np.float64)
    r = tw.attention_varlen(**x, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, return_lse=True)
    full = tw.attention_varlen(**x, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, return_stats=True)
    a = tw.numpy.attention_varlen_vjp(
        do, **x, o=r.o, stats=r.lse, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K
    )
    b = tw.numpy.attention_varlen_vjp(
        do, **x, o=r.o, stats=RowStats(*full.stats), cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K
    )
    np.testing.assert_allclose(a.dk, b.dk, 1e-9, 1e-12)


FEW_Q, FEW_K = torch.tensor([0, 3, 3, 5, 6], dtype=torch.int32), torch.tensor([0, 2, 4, 4, 7])
SMALL = tuple(
    torch.from_numpy(normal(*shape, seed=30 + i, dtype=np.float64))
    for i, shape in enumerate(((6, 2, 2), (7, 1, 2), (7, 1, 3), (2, 6, 3), (2,)))
)
SLOPES = torch.from_numpy(normal(4, 2, seed=40, dtype=np.float64)).abs()


def door(q: Any, k: Any, v: Any, bias: Any = None, sinks: Any = None) -> Any:
    options = {"mask": tw.causal() | tw.prefix(1), "softcap": 2.0, "alibi_slopes": SLOPES}
    r = tw.attention_varlen(
        q, k, v, FEW_Q, FEW_K, bias=bias, sinks=sinks, return_lse=True, **options
    )
    return r.o, r.lse


def test_torch_derivatives_are_those_of_differences() -> None:
    x = [t.clone().requires_grad_() for t in SMALL]
    assert gradcheck(door, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(door, x, check_fwd_over_rev=True)
    assert gradcheck(lambda *x: door(*x, None, x[0].new_zeros(2))[0], x[:3])


def test_torch_and_numpy_have_the_same_bits() -> None:
    for dtype in (np.float32, BFLOAT16):
        x = operands(dtype)
        ours = tw.attention_varlen(**x, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, mask=tw.causal())
        tensors = [torch.from_numpy(t.astype(np.float32)).to(TORCH[dtype]) for t in x.values()]
        o = tw.attention_varlen(
            *tensors, torch.from_numpy(CU_Q), torch.from_numpy(CU_K).int(), mask=tw.causal()
        )
        assert o.dtype == TORCH[dtype]
        np.testing.assert_array_equal(o.float().numpy(), ours.astype(np.float32))


TORCH = {np.float32: torch.float32, BFLOAT16: torch.bfloat16}


def test_vmap_maps_over_tensors_and_boundaries() -> None:
    def f(q: Any, cu_q: Any) -> Any:
        return tw.attention_varlen(q, *SMALL[1:3], cu_q, FEW_K)

    qs = torch.stack((SMALL[0], SMALL[0].sin(), SMALL[0].cos()))
    ends = torch.stack((FEW_Q, FEW_Q, torch.tensor([0, 1, 2, 2, 6], dtype=torch.int32)))
    want = torch.stack([f(q, cu) for q, cu in zip(qs, ends, strict=True)])
    assert ft.vmap(f)(qs, ends).equal(want)
    grads = ft.vmap(ft.grad(lambda q, cu: f(q, cu).sum()))(qs, ends)
    assert grads[2].equal(ft.grad(lambda q: f(q, ends[2]).sum())(qs[2]))


def test_compiles_into_one_graph_for_any_boundaries() -> None:
    def f(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any) -> Any:
        return tw.attention_varlen(q, k, v, cu_q, cu_k, mask=tw.causal()) * 2

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    q, k, v = (t.clone().requires_grad_() for t in SMALL[:3])
    for cu in (FEW_Q, torch.tensor([0, 1, 2, 2, 6], dtype=torch.int32)):
        got, want = compiled(q, k, v, cu, FEW_K), f(q, k, v, cu, FEW_K)
        assert got.equal(want)
        (a,), (b,) = (torch.autograd.grad(o.sum(), q) for o in (got, want))
        assert a.equal(b)


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ends: np.array(ends, np.int32)])
def test_boundaries_of_any_kind_compile_into_one_graph(kind: Any) -> None:
    def f(q: Any, ends: Any) -> Any:
        return tw.attention_varlen(q, q, q, ends, mask=tw.causal())

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    for ends in (kind([0, 3, 6]), kind([0, 4, 6])):
        assert compiled(SMALL[0], ends).equal(f(SMALL[0], ends))


TEXTS = [
    ({"cu_seqlens_q": [1, 37]}, ValueError, "cu_seqlens_q must start at 0, got 1"),
    ({"cu_seqlens_q": [0, 9, 3, TQ]}, ValueError, "cu_seqlens_q must be non-decreasing, got 9 f"),
    ({"cu_seqlens_q": [0, 5]}, ValueError, f"cu_seqlens_q must end at total_q={TQ}, got 5"),
    ({"cu_seqlens_k": [0, 5]}, ValueError, f"cu_seqlens_k must end at total_k={TK}, got 5"),
    ({"cu_seqlens_k": [0, TK]}, ValueError, f"cu_seqlens_k must have {S + 1} entries"),
    ({"cu_seqlens_k": None}, ValueError, f"cu_seqlens_k must be given where total_k={TK}"),
    ({"cu_seqlens_q": [0.0, TQ]}, TypeError, "cu_seqlens_q must be int32 or int64, got float64"),
    ({"cu_seqlens_q": None}, TypeError, "cu_seqlens_q must be given, got None"),
    ({"cu_seqlens_q": CU_Q[None]}, ValueError, r"cu_seqlens_q must have shape \(S \+ 1,\)"),
    ({"mask": tw.documents(CU_Q)}, ValueError, "mask must be made of causal, window, prefix and"),
    ({"mask": tw.lengths([3])}, ValueError, "mask must be made of causal, window, prefix and"),
    ({"mask": np.ones((TQ, TK), bool)}, TypeError, r"mask must be a tilewise mask \(sequences"),
    (
        {"mask": tw.prefix(1) | tw.window(1, 0) | tw.window(1, 0, align="top_left")},
        ValueError,
        "mask must need at most two intervals of keys per query",
    ),
    ({"bias": (1, 1, MOST)}, ValueError, r"bias must have shape \(H or 1, total_q, max_k or 1\)"),
    ({"bias": (H, TQ, TK)}, ValueError, r"bias must broadcast to shape \(H, total_q, max_k\)"),
    ({"alibi_slopes": (S + 1, H)}, ValueError, r"alibi_slopes must have shape \(S, H\) with S=9"),
    ({"k": (TK, 3, D)}, ValueError, "k must have shape .* with Hk a divisor of H=4"),
    ({"q": (1, TQ, H, D)}, ValueError, r"q must have shape \(total_q, H, D\), got"),
    ({"v": (TK, HK)}, ValueError, r"v must have shape \(total_k, Hk, Dv\), got"),
]


@pytest.mark.parametrize("frontend", ["numpy", "torch"])
@pytest.mark.parametrize(("change", "kind", "text"), TEXTS, ids=[text for *_, text in TEXTS])
def test_bad_input_raises_its_text(
    frontend: str, change: dict[str, Any], kind: type[Exception], text: str
) -> None:
    given: dict[str, Any] = {**operands(), "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    arrays = {n: x for n, x in change.items() if isinstance(x, tuple)}
    given |= change | {n: np.zeros(shape, np.float32) for n, shape in arrays.items()}
    if frontend == "torch":
        tensors = ("q", "k", "v", "bias", "alibi_slopes")
        given |= {n: torch.from_numpy(given[n]) for n in tensors if n in given}
    with pytest.raises(kind, match=f"^attention_varlen: {text}"):
        tw.attention_varlen(**given)


def test_layout_is_no_option() -> None:
    x = operands()
    with pytest.raises(TypeError, match="unexpected keyword argument 'layout'"):
        tw.numpy.attention_varlen(**x, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, layout="bnhd")
    with pytest.raises(ValueError, match="layout must be 'bhnd' or 'bnhd', got 'packed'"):
        tw.attention(*(x[n][None] for n in "qkv"), layout="packed")
