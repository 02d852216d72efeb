"""Attention of few queries in Triton: keys in chunks, whose states are merged in their order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl

import tilewise as tw
from tilewise.bench import board_decode
from tilewise.ops.attention.gpu.decode import launch
from tilewise.ops.attention.gpu.decode.plan import chunks_of, merge_plan, plan
from tilewise.ops.attention.gpu.kernels import decode
from tilewise.shared.launch import INTERPRETER
from tilewise.torch import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, H, HK, N, NK, D, DV = 2, 4, 2, 5, 83, 11, 7
WANT = {"return_lse": True, "return_max_logit": True, "return_entropy": True}


def inputs(n: int = N, keys: int = NK, dtype: Any = torch.float32) -> list[Any]:
    made = torch.Generator().manual_seed(n + keys)
    shapes = (B, H, n, D), (B, HK, keys, D), (B, HK, keys, DV)
    return [torch.randn(s, generator=made, dtype=torch.float64).to(dtype) for s in shapes]


def moved(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def split(*given: Any, **options: Any) -> list[Any]:
    """All results of the kernels, on the CPU."""
    options = {name: moved(value) for name, value in options.items()}
    found: Any = attention(*map(moved, given), implementation="triton", **WANT, **options)
    return [x.cpu() for x in found]


def exact(*given: Any, **options: Any) -> list[Any]:
    """All results of the reference in float64."""
    wide = {
        name: x.double() if isinstance(x, torch.Tensor) and x.dtype != torch.bool else x
        for name, x in options.items()
    }
    own = [x.double() for x in given]
    return list(attention(*own, implementation="reference", **WANT, **wide))  # type: ignore[arg-type]


def error(found: list[Any], expected: list[Any]) -> float:
    """The largest relative difference of a result; infinities must be the same."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if not torch.equal(a.double().nan_to_num(7.0).isinf(), b.nan_to_num(7.0).isinf()):
            return float("inf")
        a, b = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
        worst = max(worst, float((a - b).norm() / b.norm().clamp_min(1e-30)))
    return worst


def same(found: list[Any], expected: list[Any]) -> bool:
    return all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(found, expected, strict=True)
    )


CAUSAL = tw.causal()
DOUBLE: dict[str, Any] = {"generator": torch.Generator().manual_seed(3), "dtype": torch.float64}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": CAUSAL},
    "two-intervals": {"mask": CAUSAL & (tw.window(9, 0) | tw.sink_tokens(3))},
    "two-in-a-tile": {"mask": CAUSAL & (tw.window(9, 0) | tw.sink_tokens(66))},
    "by-head": {"mask": torch.rand(H, N, NK, **DOUBLE) < 0.4},
    "rows-without-keys": {"mask": torch.arange(N)[:, None] > torch.arange(NK) % 2 + 1},
    "bias-slopes": {
        "bias": torch.randn(B, H, 1, NK, **DOUBLE),
        "alibi_slopes": torch.rand(B, H, **DOUBLE),
        "mask": CAUSAL,
    },
    "softcap-sinks": {"softcap": 1.7, "sinks": torch.randn(H, **DOUBLE), "softmax_scale": 0.6},
    "dropout": {"dropout_p": 0.3, "seed": 2**63 + 5, "mask": CAUSAL},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_agrees_with_the_reference(name: str) -> None:
    x = inputs(dtype=torch.float64)
    assert chunks_of(NK, INTERPRETER) == 3
    assert error(split(*x, **OPTIONS[name]), exact(*x, **OPTIONS[name])) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_are_as_accurate_as_one_pass(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, options = inputs(dtype=dtype), {"sinks": torch.linspace(-1, 2, H), "mask": CAUSAL}
    if dtype.itemsize == 2:
        options["sinks"] = options["sinks"].to(dtype)
    expected, found = exact(*x, **options), split(*x, **options)
    monkeypatch.setattr(launch, "MOST_QUERIES", 0)
    whole = split(*x, **options)
    assert not same(found, whole)
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 3e-7
    assert error(found, expected) < max(1.5 * error(whole, expected), rounding)
    assert error(found[1:], expected[1:]) < 3e-7


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
def test_no_queries_no_keys_and_one_pair(shape: tuple[int, int]) -> None:
    x = inputs(*shape, dtype=torch.float64)
    assert error(split(*x), exact(*x)) < 1e-14


def test_a_rows_bits_do_not_depend_on_what_else_is_in_the_call() -> None:
    q, k, v = inputs(7)
    options = {"mask": CAUSAL, "alibi_slopes": torch.linspace(0, 1, H)}
    whole = split(q, k, v, **options)
    part = split(q[1:, :, 3:5], k[1:, :, : NK - 2], v[1:, :, : NK - 2], **options)
    assert same([x[1:, :, 3:5] for x in whole], part)
    end = NK - 6
    one = split(q[:1, :, :1], k[:1, :, :end], v[:1, :, :end], **options)
    assert same([x[:1, :, :1] for x in whole], one)


def test_hidden_keys_behind_the_last_do_not_change_bits() -> None:
    q, k, v = (x[:, :2] for x in inputs(2, 37))
    found = split(q, k, v)
    more = [torch.cat((x, torch.full_like(x, float("nan"))), 2) for x in (k, v)]
    assert same(split(q, *more, mask=tw.lengths([37, 37])), found)


@pytest.mark.parametrize("n", [1, 4])
def test_hidden_nan_reaches_nothing_and_a_seen_one_its_rows(n: int) -> None:
    q, k, v = (x[:1, :2] for x in inputs(n))
    seen = torch.arange(NK) % 7 > 0
    mask = CAUSAL & tw.dense(seen.numpy()) if n == 1 else CAUSAL & tw.window(20, 0)
    clean = split(q, k, v, mask=mask)
    hidden = 35 if n == 1 else NK - 1  # seen by the last row alone, if there are more
    for x in (k, v):
        x[:, :, hidden] = float("nan")
    found = split(q, k, v, mask=mask)
    rows = n if n == 1 else n - 1
    assert same([x[:, :, :rows] for x in found], [x[:, :, :rows] for x in clean])
    assert all(x[:, :, rows:].isnan().all() for x in found)


def test_derivatives_follow_the_chunks() -> None:
    q, k, v = inputs(dtype=torch.float64)
    x = [t[:1].requires_grad_() for t in (q[:, :3], k[:, :1], v[:, :1])]

    def derived(implementation: str) -> list[Any]:
        given = x if implementation == "cpu" else map(moved, x)
        o = attention(*given, mask=CAUSAL, implementation=implementation)
        return list(torch.autograd.grad(o.sin().sum(), x))

    for mine, theirs in zip(derived("triton"), derived("cpu"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", INTERPRETER])
def test_extents_know_nothing_of_batch_heads_queries_and_keys(arch: str) -> None:
    sizes: dict[str, Any] = {"D": 64, "Dv": 128, "dtype": "bfloat16", "arch": arch}
    one = plan(heads=1, rows=1, keys=1, **sizes)
    many = plan(heads=512, rows=67, keys=10**6, **sizes)
    assert one.constants == many.constants and one.grid == (1,)
    assert many.grid == (512 * 5 * chunks_of(10**6, arch),)
    assert one.constants["CHUNK"] % one.constants["BN"] == 0
    assert (
        merge_plan(rows=1, Dv=64, arch=arch).constants
        == merge_plan(rows=999, Dv=64, arch=arch).constants
    )


def test_the_board_times_what_it_has_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    made = board_decode.__dict__
    monkeypatch.setitem(made, "_CHECKED", (1, 2, 1, 37))
    monkeypatch.setitem(made, "_BATCH", 1)
    found = board_decode.run(lambda call: 2.0, 16, 67, DEVICE)
    assert list(found) == ["triton", "triton pages", "sdpa"]
    for of in found.values():
        assert of["ms"] == 2.0
        assert of["gb_per_s"] == pytest.approx(4 * 8 * 67 * 16 / 2e-3 / 1e9)
    monkeypatch.setitem(made, "_call", lambda name, q, k, v: lambda: v[:, :1, :1] + 0 * q)
    found = board_decode.run(lambda call: 2.0, 16, 67, DEVICE)
    assert all("o is off by" in of["reason"] for of in found.values())


def unscaled(m: Any, m_c: Any) -> Any:
    top, base, _, w = RESCALED(m, m_c)
    return top, base, tl.exp2(m - m), w


def without_tail(j: Any, lo: Any, hi: Any) -> Any:
    return j[None, :] >= lo[:, None]


RESCALED = decode._rescaled
PLANTED = {"_rescaled": unscaled, "_between": without_tail}


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels keep what they call")
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three chunks, of which two are merged at a time.
    q, k, v = (x[:1, : 3 if i == 0 else 1] for i, x in enumerate(inputs(1, dtype=torch.float64)))
    expected = exact(q, k, v)
    assert error(split(q, k, v), expected) < 1e-14
    monkeypatch.setattr(decode, name, PLANTED[name])
    assert error(split(q, k, v), expected) > 1e-3
