"""The reference against the textbook formula and against central differences, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tilewise as tw
from tilewise.ops.attention import reference
from tilewise.ops.attention.spec import (
    AttentionCall,
    AttentionGrads,
    AttentionOutputs,
    Want,
    error_bound,
    prepare,
    prepare_vjp,
)

B, H, HK, N, NK, D, DV = 2, 6, 3, 5, 7, 11, 13
EVERYTHING = Want(lse=True, max_logit=True, entropy=True)
EMPTY_ROWS = np.arange(N * NK).reshape(N, NK) % 3 != 0
EMPTY_ROWS[2] = False

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"softmax_scale": 0.7},
    "zero scale": {"softmax_scale": 0},
    "causal": {"mask": tw.causal()},
    "window": {"mask": tw.causal() & tw.window(2, 0)},
    "lengths": {"mask": tw.lengths(np.array([4, 0]))},
    "dense with an empty row": {"mask": EMPTY_ROWS},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": np.linspace(0.1, 0.9, H)},
    "alibi per batch": {"alibi_slopes": np.linspace(0.1, 0.9, B * H).reshape(B, H)},
    "bias": {"bias": np.sin(np.arange(B * H * N * NK)).reshape(B, H, N, NK)},
    "bias over heads": {"bias": np.sin(np.arange(B * N * NK)).reshape(B, 1, N, NK)},
    "bias of a matrix": {"bias": np.sin(np.arange(N * NK)).reshape(N, NK)},
    "bias per key": {"bias": np.sin(np.arange(NK))},
    "bias per row": {"bias": np.sin(np.arange(H * N)).reshape(H, N, 1)},
    "scalar bias": {"bias": np.array(0.3)},
    "sinks": {"sinks": np.array([0.5, -np.inf, 1.0, -2.0, 0.0, 3.0])},
    "everything": {
        "mask": EMPTY_ROWS,
        "softcap": 2.0,
        "alibi_slopes": np.linspace(0.1, 0.9, H),
        "bias": np.cos(np.arange(H * N * NK)).reshape(1, H, N, NK),
        "sinks": np.linspace(-1, 1, H),
        "softmax_scale": 0.4,
    },
}


def operands(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = ((B, H, N, D), (B, HK, NK, D), (B, HK, NK, DV))
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    return q, k, v


def cotangents(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((B, H, N, DV)), rng.standard_normal((B, H, N))


def gradients(
    call: AttentionCall, do: np.ndarray, dlse: np.ndarray | None = None
) -> tuple[AttentionOutputs, AttentionGrads]:
    outputs = reference.forward64(call, EVERYTHING)
    return outputs, reference.vjp64(call, prepare_vjp(call, do, outputs.o, outputs.stats, dlse))


def textbook(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, options: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return o, lse and entropy by einsum over all heads at once."""
    k, v = (np.repeat(x, H // HK, axis=1) for x in (k, v))
    x = np.einsum("bhid,bhjd->bhij", q, k) * options.get("softmax_scale", D**-0.5)
    cap = options.get("softcap")
    s = x if cap is None else cap * np.tanh(x / cap)
    s = s + options.get("bias", 0.0)
    distance = np.abs(np.arange(N)[:, None] + NK - N - np.arange(NK))
    s = s - np.broadcast_to(options.get("alibi_slopes", 0.0), (B, H))[..., None, None] * distance
    mask = options.get("mask")
    if isinstance(mask, tw.Mask):
        mask = mask.to_bool(B, H, N, NK)
    s = s if mask is None else np.where(mask, s, -np.inf)
    sinks = np.broadcast_to(options.get("sinks", -np.inf), (H,))
    column = np.broadcast_to(sinks[:, None, None], (B, H, N, 1))
    s = np.concatenate([s, column], axis=-1)
    with np.errstate(divide="ignore"):
        e = np.exp(s)
        total = e.sum(-1)
        p = e / np.where(total == 0, 1, total)[..., None]
        entropy = -(p * np.log(np.where(p == 0, 1, p))).sum(-1)
        return np.einsum("bhij,bhjd->bhid", p[..., :-1], v), np.log(total), entropy


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_is_the_textbook_formula(name: str) -> None:
    q, k, v = operands()
    outputs = reference.forward64(prepare(q, k, v, **OPTIONS[name]), EVERYTHING)
    o, lse, entropy = textbook(q, k, v, OPTIONS[name])
    np.testing.assert_allclose(outputs.o, o, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(outputs.lse, lse, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(outputs.entropy, entropy, rtol=1e-11, atol=1e-13)
    m, log_l = outputs.stats
    np.testing.assert_allclose(m * np.log(2) + log_l, lse, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_central_differences(name: str) -> None:
    options = OPTIONS[name]
    arrays = dict(zip("qkv", operands(), strict=True))
    arrays |= {key: options[key] for key in ("bias", "sinks") if key in options}
    fixed = {key: value for key, value in options.items() if key not in arrays}
    do, dlse = cotangents()
    _, grads = gradients(prepare(**arrays, **fixed), do, dlse)

    def loss(shifted: dict[str, Any]) -> float:
        outputs = reference.forward64(prepare(**shifted, **fixed), EVERYTHING)
        alive = outputs.lse != -np.inf
        return float((do * outputs.o).sum() + (dlse[alive] * outputs.lse[alive]).sum())

    rng = np.random.default_rng(2)
    for key, array in arrays.items():
        direction = rng.standard_normal(array.shape)
        direction = np.where(np.isfinite(array), direction, 0.0)
        step = 1e-5
        moved = {
            sign: {**arrays, key: np.asarray(array + sign * step * direction)} for sign in (1, -1)
        }
        expected = (loss(moved[1]) - loss(moved[-1])) / (2 * step)
        grad = getattr(grads, f"d{key}")
        assert grad.shape == array.shape
        assert (grad * direction).sum() == pytest.approx(expected, rel=1e-7, abs=1e-8), key


def test_single_entries_of_the_gradients_are_central_differences() -> None:
    q, k, v = operands()
    do, _ = cotangents()
    _, grads = gradients(prepare(q, k, v, mask=tw.causal()), do)
    for array, grad, at in ((q, grads.dq, (1, 4, 3, 2)), (k, grads.dk, (0, 2, 4, 5))):
        moved = []
        for sign in (1, -1):
            kept = array[at]
            array[at] = kept + sign * 1e-5
            outputs = reference.forward64(prepare(q, k, v, mask=tw.causal()), Want())
            moved.append((do * outputs.o).sum())
            array[at] = kept
        assert grad[at] == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-6)


def test_fully_masked_row_is_zero() -> None:
    q, k, v = operands()
    do, dlse = cotangents()
    outputs, grads = gradients(prepare(q, k, v, mask=np.zeros((N, NK), np.bool_)), do, dlse)
    assert not outputs.o.any()
    assert not outputs.entropy.any()
    for minus_infinity in (outputs.lse, outputs.max_logit, outputs.stats.m):
        assert np.isneginf(minus_infinity).all()
    assert not outputs.stats.log_l.any()
    assert not any(grad.any() for grad in (grads.dq, grads.dk, grads.dv))


def test_row_without_keys_has_the_sink_as_lse() -> None:
    q, k, v = operands()
    do, dlse = cotangents()
    sinks = np.linspace(-1, 1, H)
    call = prepare(q, k, v, mask=np.zeros((N, NK), np.bool_), sinks=sinks)
    outputs, grads = gradients(call, do, dlse)
    np.testing.assert_allclose(outputs.lse, np.broadcast_to(sinks[:, None], (B, H, N)))
    np.testing.assert_allclose(grads.dsinks, dlse.sum(axis=(0, 2)))
    assert not outputs.o.any()
    assert np.isneginf(outputs.max_logit).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_masked_entries_reach_nothing(poison: float, softcap: float | None) -> None:
    """Key 3 is hidden from all rows, bias at hidden pairs is poison, row 2 sees nothing."""
    q, k, v = operands()
    do, dlse = cotangents()
    mask = np.ones((N, NK), np.bool_)
    mask[:, 3] = mask[2] = False
    bias = np.sin(np.arange(N * NK)).reshape(N, NK)
    sinks = np.full(H, -np.inf)
    clean = gradients(prepare(q, k, v, mask=mask, bias=bias, softcap=softcap, sinks=sinks), do)
    for array, at in ((k, np.s_[:, :, 3]), (v, np.s_[:, :, 3]), (q, np.s_[:, :, 2])):
        array[at] = poison
    do[:, :, 2] = poison
    dlse[...] = 0
    dlse[:, :, 2] = poison
    bias[~mask] = poison
    call = prepare(q, k, v, mask=mask, bias=bias, softcap=softcap, sinks=sinks)
    dirty = gradients(call, do, dlse)
    for expected, got in zip((*clean[0], *clean[1]), (*dirty[0], *dirty[1]), strict=True):
        np.testing.assert_array_equal(expected, got)


@pytest.mark.parametrize("name", ["k", "v", "bias", "q"])
def test_nan_reaches_exactly_the_rows_that_attend(name: str) -> None:
    """Under a causal mask key 4 is seen by queries 2, 3 and 4 only, and query 2 sees keys 0..4."""
    q, k, v = operands()
    do, _ = cotangents()
    bias = np.zeros((N, NK))
    where = {"k": (k, np.s_[0, 0, 4, 1]), "v": (v, np.s_[0, 0, 4, 1]), "q": (q, np.s_[0, 0, 2, 1])}
    where["bias"] = (bias, np.s_[2, 4])
    array, at = where[name]
    array[at] = np.nan
    outputs, grads = gradients(prepare(q, k, v, bias=bias, mask=tw.causal()), do)
    spoiled = {
        "k": np.s_[0, :2, 2:],
        "v": np.s_[0, :2, 2:],
        "q": np.s_[0, :1, 2:3],
        "bias": np.s_[:, :, 2:3],
    }
    expected = np.zeros((B, H, N), np.bool_)
    expected[spoiled[name]] = True
    np.testing.assert_array_equal(np.isnan(outputs.o).any(-1), expected)
    np.testing.assert_array_equal(np.isnan(grads.dq).any(-1), expected)
    last = 5 if name in ("q", "bias") else NK
    rows = expected.reshape(B, HK, H // HK, N).any(axis=(2, 3))
    spoiled_keys = rows[..., None] & (np.arange(NK) < last)
    np.testing.assert_array_equal(np.isnan(grads.dk).any(-1), spoiled_keys)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("padding", [-1e9, "finfo.min"])
def test_rows_of_additive_padding_have_the_right_gradients(dtype: type, padding: Any) -> None:
    """Logits that are all -1e9 or finfo.min are a uniform row, not an empty one."""
    low = float(np.finfo(dtype).min) if padding == "finfo.min" else padding
    q, k, v = (x.astype(dtype) for x in operands())
    do = cotangents()[0].astype(dtype)
    zero = np.zeros_like(q)
    bias = np.full((N, NK), low, dtype)
    call, flat = prepare(zero, k, v, bias=bias), prepare(zero, k, v)
    outputs = reference.forward(call, EVERYTHING)
    grads = reference.vjp(call, prepare_vjp(call, do, outputs.o, outputs.stats))
    expected = reference.forward(flat, EVERYTHING)
    uniform = reference.vjp(flat, prepare_vjp(flat, do, expected.o, expected.stats))
    tolerance = 1e-5 if dtype is np.float32 else 1e-6
    np.testing.assert_allclose(outputs.o, expected.o, atol=tolerance)
    for got, right in zip(grads[:3], uniform[:3], strict=True):
        np.testing.assert_allclose(got, right, atol=tolerance)


def test_given_statistics_make_the_gradients_of_a_part() -> None:
    """With the lse and o of the whole softmax, the gradients of two halves of the keys add up."""
    q, k, v = operands()
    do, dlse = cotangents()
    outputs, whole = gradients(prepare(q, k, v), do, dlse)
    parts = []
    for at in (np.s_[:, :, :3], np.s_[:, :, 3:]):
        call = prepare(q, k[at], v[at])
        parts.append(reference.vjp64(call, prepare_vjp(call, do, outputs.o, outputs.lse, dlse)))
    np.testing.assert_allclose(parts[0].dq + parts[1].dq, whole.dq, atol=1e-13)
    for name in ("dk", "dv"):
        joined = np.concatenate([getattr(part, name) for part in parts], axis=2)
        np.testing.assert_allclose(joined, getattr(whole, name), atol=1e-13)


@pytest.mark.parametrize("size", ["B", "N", "Nk", "H"])
def test_sizes_of_zero(size: str) -> None:
    sizes = {"B": B, "H": H, "Hk": HK, "N": N, "Nk": NK} | {size: 0}
    sizes["Hk"] = 0 if size == "H" else HK
    q = np.ones((sizes["B"], sizes["H"], sizes["N"], D))
    k = np.ones((sizes["B"], sizes["Hk"], sizes["Nk"], D))
    v = np.ones((sizes["B"], sizes["Hk"], sizes["Nk"], DV))
    bias = np.zeros((sizes["H"], 1, sizes["Nk"]))
    call = prepare(q, k, v, bias=bias, sinks=np.zeros(sizes["H"]))
    do = np.ones((*q.shape[:3], DV))
    outputs, grads = gradients(call, do)
    assert outputs.o.shape == do.shape
    assert not outputs.o.any() or size not in ("Nk",)
    assert [grad.shape for grad in grads[:4]] == [q.shape, k.shape, v.shape, bias.shape]
    assert not any(np.isnan(grad).any() for grad in grads)


def test_float32_results_are_the_float64_results_rounded() -> None:
    q, k, v = (x.astype(np.float32) for x in operands())
    call = prepare(q, k, v, mask=tw.causal(), layout="bhnd")
    exact, rounded = reference.forward64(call, EVERYTHING), reference.forward(call, EVERYTHING)
    for name in ("o", "lse", "max_logit", "entropy"):
        got = getattr(rounded, name)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, getattr(exact, name).astype(np.float32))
    lse = rounded.stats.m.astype(np.float64) * np.log(2) + rounded.stats.log_l
    np.testing.assert_allclose(lse, exact.lse, rtol=1e-6)


def naive32(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray, do: np.ndarray
) -> dict[str, np.ndarray]:
    """Attention and its gradients step by step in the dtype of the operands, for H = Hk."""
    scale = q.dtype.type(q.shape[-1] ** -0.5)
    s = q @ k.swapaxes(2, 3) * scale + bias
    top = s.max(-1, keepdims=True)
    w = np.exp(s - top)
    l = w.sum(-1, keepdims=True)
    p = w / l
    o = p @ v
    ds = p * (do @ v.swapaxes(2, 3) - (do * o).sum(-1, keepdims=True))
    return {
        "o": o,
        "lse": (top + np.log(l))[..., 0],
        "max_logit": top[..., 0],
        "dq": ds @ k * scale,
        "dk": ds.swapaxes(2, 3) @ q * scale,
        "dv": p.swapaxes(2, 3) @ do,
        "dbias": ds.sum(axis=0),
    }


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_error_bound_holds_for_the_straightforward_computation(scale: float) -> None:
    """The bound is neither exceeded nor more than four orders of magnitude too wide."""
    rng = np.random.default_rng(3)
    shape = (2, 3, 61, 37)
    q, k, v, do = (rng.standard_normal(shape).astype(np.float32) for _ in range(4))
    q *= np.float32(scale)
    bias = rng.standard_normal((3, 61, 61)).astype(np.float32)
    call = prepare(q, k, v, bias=bias)
    exact = reference.forward64(call, EVERYTHING)
    stats = reference.forward(call, EVERYTHING).stats
    checked = prepare_vjp(call, do, exact.o.astype(np.float32), stats)
    sizes = reference.magnitudes(call, checked)
    right = {**exact._asdict(), **reference.vjp64(call, checked)._asdict()}
    for name, got in naive32(q, k, v, bias, do).items():
        error = float(np.linalg.norm(got - right[name]))
        bound = error_bound(
            np.dtype(np.float32),
            name,
            call,
            logit_size=sizes.logit_size,
            magnitude=sizes.norms[name],
            norm=float(np.linalg.norm(right[name])),
        )
        assert 1e-4 * bound < error < bound, name


@pytest.mark.parametrize("name", [*OPTIONS, "dropout"])
def test_magnitudes_are_at_least_the_results(name: str) -> None:
    """A formula over absolute values is at least the formula, for every option."""
    q, k, v = operands()
    call = prepare(q, k, v, **OPTIONS.get(name, {"dropout_p": 0.9, "seed": 2}))
    do, dlse = cotangents()
    outputs, grads = gradients(call, do, dlse)
    checked = prepare_vjp(call, do, outputs.o, outputs.stats, dlse)
    sizes = reference.magnitudes(call, checked)
    assert np.isfinite(sizes.logit_size)
    assert sizes.logit_size >= np.abs(outputs.max_logit[np.isfinite(outputs.max_logit)]).max()
    for field, exact in {"o": outputs.o, **grads._asdict()}.items():
        assert exact is None or np.linalg.norm(exact) <= sizes.norms[field] * (1 + 1e-12)


def test_row_hidden_by_an_infinite_bias_is_empty() -> None:
    """-inf in the bias of a whole row leaves no probability, so nothing of v reaches it."""
    q, k, v = operands()
    do, dlse = cotangents()
    bias = np.zeros((N, NK))
    bias[2] = -np.inf
    v[:, :, 3] = np.nan
    outputs, grads = gradients(prepare(q, k, v, bias=bias), do, dlse)
    assert not outputs.o[:, :, 2].any()
    assert np.isneginf(outputs.lse[:, :, 2]).all()
    assert not grads.dq[:, :, 2].any()
    assert not grads.dbias[2].any()
