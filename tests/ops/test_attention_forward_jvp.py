"""The pass that computes attention with its tangents, against the two passes that do it apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tilewise as tw
from tilewise.numpy import attention, attention_forward_jvp, attention_jvp

_core = pytest.importorskip("tilewise._core")

B, H, HK, N, NK, D, DV = 2, 6, 3, 59, 137, 19, 23
NAMES = ("tq", "tk", "tv")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": tw.causal()},
    "bits": {"mask": np.random.default_rng(1).random((B, 1, N, NK)) < 0.3},
    "no keys": {"mask": tw.lengths([NK, 0])},
    "softcap": {"softcap": 1.5},
    "bias": {"bias": (B, H, N, NK)},
    "broadcast bias": {"bias": (1, H, 1, NK), "softcap": 2.5},
    "alibi": {"alibi_slopes": (H,)},
    "sinks": {"sinks": (H,), "mask": tw.lengths([71, 0])},
    "dropout": {"dropout_p": 0.4, "seed": 11, "mask": tw.window(31, 0)},
    "layout": {"layout": "bnhd"},
}


DECODED = [("plain", 3), ("softcap", 1), ("alibi", 3)]


def problem(options: dict[str, Any], dtype: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw the inputs and their tangents, by name."""
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {
        "q": (B, H, N, D),
        "k": (B, HK, NK, D),
        "v": (B, HK, NK, DV),
    }
    if options.get("layout") == "bnhd":
        shapes = {name: (b, n, h, d) for name, (b, h, n, d) in shapes.items()}
    drawn = {name: shape for name, shape in options.items() if isinstance(shape, tuple)}
    arrays = {n: rng.standard_normal(s).astype(dtype) for n, s in (shapes | drawn).items()}
    if "sinks" in arrays:
        arrays["sinks"][0] = -np.inf
    if "alibi_slopes" in arrays:
        arrays["alibi_slopes"] = 0.1 * abs(arrays["alibi_slopes"])
    moving = [name for name in arrays if name != "alibi_slopes"]
    tangents = {f"t{n}": rng.standard_normal(arrays[n].shape).astype(dtype) for n in moving}
    return options | arrays, tangents


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "rows"), [*((n, N) for n in OPTIONS), *DECODED])
def test_one_pass_agrees_with_two(name: str, dtype: Any, rows: int) -> None:
    inputs, tangents = problem(OPTIONS[name], dtype)
    inputs["q"], tangents["tq"] = inputs["q"][..., :rows, :], tangents["tq"][..., :rows, :]
    result, moved = attention_forward_jvp(**tangents, **inputs, implementation="cpu")
    alone = attention(**inputs, return_stats=True, return_lse=True)
    assert result.o.tobytes() == alone.o.tobytes()
    assert result.lse.tobytes() == alone.lse.tobytes()
    for got, wanted in zip(result.stats, alone.stats, strict=True):
        assert got.tobytes() == wanted.tobytes()
    reference = attention_jvp(
        **tangents, **inputs, o=alone.o, stats=alone.stats, implementation="reference"
    )
    for got, wanted in zip(moved, reference, strict=True):
        scale = max(1.0, float(np.linalg.norm(wanted)))
        assert np.linalg.norm(got - wanted) <= 20 * np.finfo(dtype).eps * scale


def test_missing_tangents_are_zero() -> None:
    inputs, tangents = problem({"bias": (B, 1, N, NK), "sinks": (H,)}, np.float64)
    for name in tangents:
        alone = {key: x if key == name else None for key, x in tangents.items()}
        zeros = {key: x if key == name else np.zeros_like(x) for key, x in tangents.items()}
        one = attention_forward_jvp(**alone, **inputs)[1]
        other = attention_forward_jvp(**zeros, **inputs)[1]
        for got, wanted in zip(one, other, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-13)


def test_bits_depend_on_neither_threads_nor_targets_nor_chunks() -> None:
    inputs, tangents = problem({"softcap": 3.0, "dropout_p": 0.2, "seed": 5}, np.float32)
    target, threads = _core.target(), _core.num_threads()
    wanted = attention_forward_jvp(**tangents, **inputs, mask=tw.causal())[1]
    try:
        for name in _core.targets():
            for count in (1, 3):
                _core.set_target(name)
                _core.set_num_threads(count)
                got = attention_forward_jvp(**tangents, **inputs, mask=tw.causal())[1]
                assert got.to.tobytes() == wanted.to.tobytes()
                assert got.tlse.tobytes() == wanted.tlse.tobytes()
    finally:
        _core.set_target(target)
        _core.set_num_threads(threads)
    for last in (1, 17):
        part = (
            dict(inputs, q=inputs["q"][:, :, -last:]),
            dict(tangents, tq=tangents["tq"][:, :, -last:]),
        )
        got = attention_forward_jvp(**part[1], **part[0], mask=tw.causal())[1]
        assert got.to.tobytes() == wanted.to[:, :, -last:].tobytes()
        assert got.tlse.tobytes() == np.ascontiguousarray(wanted.tlse[:, :, -last:]).tobytes()


def test_masked_entries_reach_nothing_and_attended_ones_their_rows() -> None:
    inputs, tangents = problem({}, np.float32)
    clean = attention_forward_jvp(**tangents, **inputs, mask=tw.lengths([101, 101]))[1]
    for name, arrays in (("k", inputs), ("v", inputs), ("tk", tangents), ("tv", tangents)):
        poisoned = arrays[name].copy()
        poisoned[:, :, 101:] = np.nan
        moved = {**tangents, **inputs, name: poisoned}
        got = attention_forward_jvp(**moved, mask=tw.lengths([101, 101]))[1]
        assert got.to.tobytes() == clean.to.tobytes()
    tangents["tk"][1, 1, 80] = np.nan
    to = attention_forward_jvp(**tangents, **inputs, mask=tw.causal(align="top_left"))[1].to
    assert np.isfinite(to).all()
    to = attention_forward_jvp(**tangents, **inputs, mask=tw.causal())[1].to
    seen = np.zeros((B, H, N), bool)
    seen[1, 2:4, 80 - (NK - N) :] = True
    assert np.array_equal(np.isnan(to).any(-1), seen)
