"""Linear cross-entropy: values and derivatives of each implementation, exactness, same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tilewise.base.dtypes import round_to, unit_roundoff
from tilewise.numpy import (
    linear_cross_entropy,
    linear_cross_entropy_jvp,
    linear_cross_entropy_shard,
    linear_cross_entropy_shard_vjp,
    linear_cross_entropy_vjp,
    linear_cross_entropy_vjp_jvp,
    merge_shards,
)
from tilewise.ops.linear_cross_entropy.spec import error_bound

Array = NDArray[Any]
F64 = np.dtype(np.float64)
F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
DTYPES = [F64, F32, BF16, F16]
NARROW = (BF16, F16)
NAN, INF = np.nan, np.inf
T, C, V = 13, 7, 37

# What each function of the core writes.
ROWS = ("loss", "lse", "m", "log_l", "picked", "mass", "entropy", "argmax")
GRADIENTS = ("dhidden", "dweight", "dbias")
WRITTEN = {
    "linear_cross_entropy_forward": (*ROWS, *GRADIENTS),
    "linear_cross_entropy_vjp": GRADIENTS,
    "linear_cross_entropy_jvp": ("tloss", "tlse", "tentropy"),
    "linear_cross_entropy_vjp_jvp": ("tdhidden", "tdweight", "tdbias"),
}


@pytest.fixture(autouse=True, scope="module")
def poisoned_results() -> Iterator[None]:
    """Put NaN into every array that the kernels are to write, before they do."""
    cpu = pytest.importorskip("tilewise.ops.linear_cross_entropy.cpu")
    core = cpu._core

    def poisoned(name: str) -> Callable[..., None]:
        def run(**arrays: Any) -> None:
            for array in map(arrays.get, WRITTEN[name]):
                if array is not None and not arrays.get("accumulate_dweight"):
                    array[...] = NAN if array.dtype.kind == "f" else 0x7FFF
            getattr(core, name)(**arrays)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_core", SimpleNamespace(**{name: poisoned(name) for name in WRITTEN}))
        yield


@pytest.fixture(params=["reference", "cpu"])
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def drawn(*shape: int, dtype: Any = F64, spread: float = 1.0, seed: int = 0) -> Array:
    """Numbers in the dtype itself, so that what is computed of them is exact in float64."""
    return np.asarray(spread * rng(seed).standard_normal(shape)).astype(dtype)


def wide(x: Array) -> Array:
    return x.astype(np.float64)


def inputs(
    *, tokens: int = T, width: int = C, classes: int = V, dtype: Any = F64, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Hidden states, weight and targets, of which some are ignored."""
    y = rng(seed).integers(0, classes, tokens)
    y[3:tokens:5] = -100
    hidden = drawn(tokens, width, dtype=dtype, seed=seed)
    return hidden, drawn(classes, width, dtype=dtype, seed=seed + 1), y


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "bias": {"bias": drawn(V, seed=5)},
    "sum": {"reduction": "sum"},
    "each token": {"reduction": "none", "bias": drawn(V, seed=5)},
    "smoothing": {"label_smoothing": 0.13},
    "z-loss": {"z_loss": 0.07},
    "class weights": {"class_weight": rng(6).random(V)},
    "softcap": {"softcap": 1.7},
    "everything": {
        "bias": drawn(V, seed=5),
        "label_smoothing": 0.2,
        "z_loss": 0.03,
        "class_weight": rng(6).random(V),
        "softcap": 2.5,
    },
    "everything of each token": {
        "bias": drawn(V, seed=5),
        "label_smoothing": 0.2,
        "z_loss": 0.03,
        "class_weight": rng(6).random(V),
        "softcap": 2.5,
        "reduction": "none",
    },
}


def options_of(name: str, dtype: Any) -> dict[str, Any]:
    """Options with arrays in a dtype that goes with hidden."""
    given = OPTIONS[name].items()
    return {k: v.astype(dtype) if isinstance(v, np.ndarray) else v for k, v in given}


def sums_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return F32 if dtype in NARROW else dtype


def values(hidden: Array, weight: Array, y: Array, **options: Any) -> dict[str, Any]:
    """Every result of a forward pass but the gradients."""
    more = ("lse", "entropy", "argmax", "z_loss", "stats")
    asked = {f"return_{name}": True for name in more}
    found = linear_cross_entropy(hidden, weight, y, **asked, **options)._asdict()
    del found["grads"]
    return found


def results(hidden: Array, weight: Array, y: Array, **options: Any) -> dict[str, Any]:
    """Everything that there is to compute, for some fixed cotangents and tangents."""
    found = values(hidden, weight, y, **options)
    stats = found.pop("stats")
    if options.get("reduction") != "none":
        r = linear_cross_entropy(hidden, weight, y, return_grads=True, **options)
        found |= {f"joined_{k}": v for k, v in r.grads._asdict().items()}
        assert r.loss.tobytes() == found["loss"].tobytes()
    bias, sums = options.get("bias"), found["lse"].dtype
    tokens, shape = len(y), found["loss"].shape
    move = {"thidden": drawn(*hidden.shape, dtype=hidden.dtype, seed=11)}
    move["tweight"] = drawn(*weight.shape, dtype=weight.dtype, seed=12)
    if bias is not None:
        move["tbias"] = drawn(*bias.shape, dtype=bias.dtype, seed=13)
    of_loss = [drawn(*shape, dtype=sums, seed=s) for s in (14, 15)]
    rows = [drawn(tokens, dtype=sums, seed=s) for s in (16, 17, 18, 19)]
    c = {"dloss": of_loss[0], "dlse": rows[0], "dentropy": rows[1]}
    tc = {"tdloss": of_loss[1], "tdlse": rows[2], "tdentropy": rows[3]}
    at = {"hidden": hidden, "weight": weight, "targets": y, "stats": stats, **options}
    found |= {f"loss_{k}": v for k, v in _vjp(of_loss[0], at).items()}
    found |= linear_cross_entropy_vjp(**c, **at)._asdict()
    found |= linear_cross_entropy_jvp(**move, **at, return_entropy=True)._asdict()
    again = linear_cross_entropy_vjp_jvp(**c, **move, **tc, **at)._asdict()
    found |= {f"t{name}": value for name, value in again.items()}
    return {name: value for name, value in found.items() if value is not None}


def _vjp(dloss: Array, at: dict[str, Any]) -> dict[str, Any]:
    return linear_cross_entropy_vjp(dloss, **at)._asdict()


def tolerance(name: str, got: Array, dtype: np.dtype[Any]) -> float:
    """Relative to the largest entry; of 16 bits only what is stored in them is rounded to them."""
    if got.dtype in NARROW:
        return 4 * unit_roundoff(dtype)
    return 3000 * unit_roundoff(got.dtype) if dtype == got.dtype else 2e-4


def close(got: dict[str, Array], want: dict[str, Array], dtype: np.dtype[Any]) -> None:
    """Compare all results; each relative to the largest of its own kind."""
    assert got.keys() == want.keys()
    for name in got:
        a, b = wide(got[name]), wide(want[name])
        assert got[name].dtype == want[name].dtype, name
        assert np.isfinite(a).all() and np.isfinite(b).all(), name
        atol = tolerance(name, got[name], dtype) * np.abs(b).max(initial=0.01)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)


# Values and derivatives


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_kernels_agree_with_the_reference(name: str, dtype: np.dtype[Any]) -> None:
    given, options = inputs(dtype=dtype), options_of(name, dtype)
    got, want = (results(*given, **options, implementation=by) for by in ("cpu", "reference"))
    close(got, want, dtype)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_is_that_of_the_textbook(implementation: str, name: str) -> None:
    hidden, weight, y = inputs()
    o = OPTIONS[name]
    s = hidden @ weight.T + o.get("bias", 0)
    s = o["softcap"] * np.tanh(s / o["softcap"]) if "softcap" in o else s
    w, e = o.get("class_weight", np.ones(V)), o.get("label_smoothing", 0)
    p = np.exp(s) / np.exp(s).sum(axis=1, keepdims=True)
    kept = y != -100
    t = e * w / V + (1 - e) * (w * np.eye(V))[np.where(kept, y, 0)]
    z = o.get("z_loss", 0) * np.log(np.exp(s).sum(axis=1)) ** 2
    loss = np.where(kept, -(t * np.log(p)).sum(axis=1) + z, 0)
    by = {"mean": loss.sum() / w[y[kept]].sum(), "sum": loss.sum(), "none": loss}
    got = values(hidden, weight, y, **o, implementation=implementation)
    np.testing.assert_allclose(got["loss"], by[o.get("reduction", "mean")], rtol=1e-12)
    np.testing.assert_allclose(got["lse"], np.log(np.exp(s).sum(axis=1)), rtol=1e-12)
    np.testing.assert_allclose(got["entropy"], -(p * np.log(p)).sum(axis=1), rtol=1e-11)
    np.testing.assert_array_equal(got["argmax"], s.argmax(axis=1))


@pytest.mark.parametrize("name", OPTIONS)
def test_derivatives_are_those_of_finite_differences(implementation: str, name: str) -> None:
    """Along one direction of all inputs and cotangents; tangents are the gradients' transpose."""
    options = OPTIONS[name] | {"implementation": implementation}
    hidden, weight, y = inputs()
    bias, h = options.pop("bias", np.zeros(V)), 1e-5
    shape = (T,) if options.get("reduction") == "none" else ()
    c = [drawn(*shape, seed=4), drawn(T, seed=5), drawn(T, seed=6)]
    tc = [drawn(*shape, seed=7), drawn(T, seed=8), drawn(T, seed=9)]
    t = [drawn(*x.shape, seed=10 + k) for k, x in enumerate((hidden, weight, bias))]

    def at(step: float) -> tuple[list[Array], dict[str, Any]]:
        moved = [x + step * d for x, d in zip((hidden, weight, bias), t, strict=True)]
        return moved[:2], {"bias": moved[2], **options}

    def total(step: float) -> float:
        moved, more = at(step)
        found = values(*moved, y, **more)
        kinds = ("loss", "lse", "entropy")
        return sum(float((g * found[k]).sum()) for g, k in zip(c, kinds, strict=True))

    def gradients(step: float) -> list[Array]:
        moved, more = at(step)
        g = [x + step * d for x, d in zip(c, tc, strict=True)]
        return list(linear_cross_entropy_vjp(g[0], *moved, y, dlse=g[1], dentropy=g[2], **more))

    grads = gradients(0)
    along = sum(float((g * d).sum()) for g, d in zip(grads, t, strict=True))
    np.testing.assert_allclose(along, (total(h) - total(-h)) / (2 * h), rtol=1e-7, atol=1e-7)
    more = {"bias": bias, **options}
    moves = linear_cross_entropy_jvp(
        t[0], hidden, weight, y, tweight=t[1], tbias=t[2], return_entropy=True, **more
    )
    across = sum(float((g * m).sum()) for g, m in zip(c, moves, strict=True))
    np.testing.assert_allclose(across, along, rtol=1e-11, atol=1e-11)
    of_loss, of_rows = {"tdloss": tc[0]}, {"tdlse": tc[1], "tdentropy": tc[2]}
    second = linear_cross_entropy_vjp_jvp(
        c[0],
        t[0],
        hidden,
        weight,
        y,
        dlse=c[1],
        dentropy=c[2],
        tweight=t[1],
        tbias=t[2],
        **of_loss,
        **of_rows,
        **more,
    )
    for a, up, down in zip(second, gradients(h), gradients(-h), strict=True):
        np.testing.assert_allclose(a, (up - down) / (2 * h), rtol=1e-6, atol=1e-7)


def test_a_missing_cotangent_or_tangent_is_zero(implementation: str) -> None:
    hidden, weight, y = inputs()
    by = {"reduction": "none", "implementation": implementation}
    zero, rows = np.zeros(T), drawn(T, seed=4)
    t = drawn(T, C, seed=5)
    none = {"dlse": None, "dentropy": None, "tweight": None, "tdloss": None, "tdlse": None}
    nil = {"dlse": zero, "dentropy": zero, "tweight": 0 * weight, "tdloss": zero, "tdlse": zero}
    a, b = (
        linear_cross_entropy_vjp_jvp(rows, t, hidden, weight, y, **more, **by)
        for more in (none, nil)
    )
    np.testing.assert_allclose(a.dhidden, b.dhidden, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(a.dweight, b.dweight, rtol=1e-13, atol=1e-15)
    still = linear_cross_entropy_jvp(None, hidden, weight, y, **by)
    assert not still.tloss.any() and not still.tlse.any()
    assert not linear_cross_entropy_vjp(None, hidden, weight, y, **by).dweight.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_same_pass_are_those_of_the_backward(
    implementation: str, dtype: np.dtype[Any]
) -> None:
    given, options = inputs(dtype=dtype), options_of("everything", dtype)
    options["implementation"] = implementation
    joined = linear_cross_entropy(*given, return_grads=True, **options).grads
    apart = linear_cross_entropy_vjp(1.0, *given, **options)
    for name, grad in apart._asdict().items():
        other = getattr(joined, name)
        limit = 3 * unit_roundoff(dtype) if dtype in NARROW else 300 * unit_roundoff(dtype)
        np.testing.assert_allclose(
            wide(other), wide(grad), rtol=0, atol=limit * np.abs(wide(grad)).max(), err_msg=name
        )


# Ignored tokens and rare sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_ignored_token_has_no_part(implementation: str, dtype: np.dtype[Any]) -> None:
    """Whatever its hidden state holds; but its own lse is that of its logits."""
    (hidden, weight, y), options = inputs(dtype=dtype), options_of("everything", dtype)
    options["implementation"] = implementation
    kept = y != -100
    spoiled = np.where(kept[:, None], hidden, dtype.type(NAN))
    a = linear_cross_entropy(spoiled, weight, y, return_grads=True, **options)
    b = linear_cross_entropy(hidden, weight, y, return_grads=True, return_lse=True, **options)
    assert a.loss.tobytes() == b.loss.tobytes()
    for name, grad in a.grads._asdict().items():
        assert grad.tobytes() == getattr(b.grads, name).tobytes(), name
    assert not wide(b.grads.dhidden)[~kept].any()
    alone = linear_cross_entropy(
        hidden, weight, np.zeros_like(y), return_lse=True, **options | {"reduction": "none"}
    )
    assert alone.lse.tobytes() == b.lse.tobytes()
    c = linear_cross_entropy(spoiled, weight, y, return_grads=True, return_lse=True, **options)
    assert c.grads.dweight.tobytes() == b.grads.dweight.tobytes()
    assert np.isnan(c.lse[~kept]).all() and c.lse[kept].tobytes() == b.lse[kept].tobytes()
    apart = linear_cross_entropy_vjp(1.0, spoiled, weight, y, **options)
    assert np.isfinite(wide(apart.dweight)).all()
    none = options | {"reduction": "none"}
    loss = linear_cross_entropy(spoiled, weight, y, **none)
    assert not loss[~kept].any() and np.isfinite(loss).all()
    t = drawn(T, C, dtype=dtype, seed=8)
    tloss = linear_cross_entropy_jvp(t, spoiled, weight, y, **none).tloss
    assert not tloss[~kept].any() and np.isfinite(tloss).all()


def test_no_logits_are_made_of_tokens_without_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewise.ops.linear_cross_entropy import cpu

    tokens: list[int] = []

    def counted(name: str) -> Callable[..., None]:
        def run(**arrays: Any) -> None:
            tokens.append(len(arrays["hidden"]))
            getattr(core, name)(**arrays)

        return run

    core = cpu._core
    monkeypatch.setattr(cpu, "_core", SimpleNamespace(**{name: counted(name) for name in WRITTEN}))
    hidden, weight, y = inputs()
    kept = int((y != -100).sum())
    stats = linear_cross_entropy(hidden, weight, y, return_stats=True).stats
    linear_cross_entropy(hidden, weight, y, return_grads=True)
    linear_cross_entropy_vjp(1.0, hidden, weight, y, stats)
    linear_cross_entropy_vjp_jvp(1.0, hidden, hidden, weight, y, stats)
    assert kept < T and tokens == [T, kept, kept, kept]


def test_the_cotangent_of_an_ignored_tokens_lse_reaches_its_hidden_state(
    implementation: str,
) -> None:
    hidden, weight, y = inputs()
    grads = linear_cross_entropy_vjp(
        None, hidden, weight, y, dlse=np.ones(T), implementation=implementation
    )
    s = np.exp(hidden @ weight.T)
    p = s / s.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(grads.dhidden, p @ weight, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_a_kept_token_all_is_zero(
    implementation: str, dtype: np.dtype[Any], tokens: int, reduction: str
) -> None:
    hidden, weight, _ = inputs(tokens=tokens, dtype=dtype)
    y = np.full(tokens, -100)
    options = options_of("everything", dtype)
    options |= {"reduction": reduction, "implementation": implementation}
    found = results(hidden, weight, y, **options)
    for name in ("loss", "z_loss", "loss_dweight", "loss_dhidden", "loss_dbias", "tloss"):
        assert not wide(found[name]).any(), name
    assert found["loss"].shape == ((tokens,) if reduction == "none" else ())
    assert found["dweight"].shape == weight.shape
    if tokens == 0:
        for name in ("dweight", "dbias", "tdweight", "tdbias"):
            assert not wide(found[name]).any(), name


def test_class_weights_of_zero_give_a_mean_of_zero(implementation: str) -> None:
    hidden, weight, y = inputs()
    options = {"class_weight": np.zeros(V), "z_loss": 0.1, "implementation": implementation}
    r = linear_cross_entropy(hidden, weight, y, return_grads=True, **options)
    assert r.loss == 0 and not r.grads.dweight.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_class_has_no_loss(implementation: str, dtype: np.dtype[Any]) -> None:
    given = inputs(classes=1, dtype=dtype)
    r = linear_cross_entropy(
        *given, return_grads=True, return_entropy=True, implementation=implementation
    )
    assert r.loss == 0 and not r.entropy.any()
    for grad in r.grads[:2]:
        np.testing.assert_allclose(wide(grad), 0, atol=1e-15)


@pytest.mark.parametrize("sizes", [(1, 1, 2), (17, 1, 3), (1, 33, 16), (31, 64, 129)])
def test_small_sizes_agree_with_the_reference(sizes: tuple[int, int, int]) -> None:
    tokens, width, classes = sizes
    for dtype in (F64, F32, BF16):
        given = inputs(tokens=tokens, width=width, classes=classes, dtype=dtype)
        close(*(results(*given, implementation=by) for by in ("cpu", "reference")), dtype)


def test_a_class_of_minus_infinity_is_absent(implementation: str) -> None:
    hidden, weight, y = inputs()
    y[y == 5] = 6
    bias = drawn(V, seed=5)
    bias[5] = -INF
    by = {"reduction": "none", "implementation": implementation}
    got = values(hidden, weight, y, bias=bias, **by)
    rest = [np.delete(x, 5, axis=0) for x in (weight, bias)]
    want = values(hidden, rest[0], np.where(y > 5, y - 1, y), bias=rest[1], **by)
    for name in ("loss", "lse", "entropy"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-12, atol=1e-13)
    grads = linear_cross_entropy_vjp(np.ones(T), hidden, weight, y, bias=bias, **by)
    assert not grads.dweight[5].any() and np.isfinite(grads.dhidden).all()


# Exactness


@pytest.mark.parametrize("dtype", [F32, *NARROW], ids=str)
def test_the_loss_of_a_large_vocabulary_is_exact(dtype: np.dtype[Any]) -> None:
    hidden, weight, y = inputs(tokens=31, width=64, classes=32_003, dtype=dtype, seed=3)
    loss, exact = (
        linear_cross_entropy(x.astype(d), w.astype(d), y, implementation=by)
        for d, by in ((dtype, "cpu"), (F64, "reference"))
        for x, w in ((hidden, weight),)
    )
    assert abs(float(loss) - float(exact)) <= 1e-5


@pytest.mark.parametrize("dtype", [F32, *NARROW], ids=str)
def test_gradients_are_as_exact_as_those_of_float32(dtype: np.dtype[Any]) -> None:
    """Against the textbook in float32 on the same inputs, rounded to the dtype."""
    hidden, weight, y = inputs(tokens=61, width=48, classes=1009, dtype=dtype, seed=4)
    exact = linear_cross_entropy_vjp(1.0, wide(hidden), wide(weight), y, implementation="reference")
    got = linear_cross_entropy(hidden, weight, y, return_grads=True, implementation="cpu").grads
    x, w = hidden.astype(np.float32), weight.astype(np.float32)
    s = x @ w.T
    p = np.exp(s - s.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(61), np.where(y < 0, 0, y)] -= 1
    dz = np.where((y >= 0)[:, None], p, 0) / np.float32((y >= 0).sum())
    for mine, textbook, right in zip(got[:2], (dz @ w, dz.T @ x), exact[:2], strict=True):
        rounded = wide(round_to(textbook, dtype))
        error, theirs = (np.linalg.norm(wide(g) - right) for g in (mine, rounded))
        size = np.linalg.norm(right)
        assert error <= 1.05 * theirs + unit_roundoff(F32) * size, (error / size, theirs / size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_bound_holds(implementation: str, dtype: np.dtype[Any]) -> None:
    """Magnitudes are the formulas over absolute values."""
    tokens, width, classes = sizes = (23, 31, 4099)
    hidden, weight, y = inputs(tokens=tokens, width=width, classes=classes, dtype=dtype)
    options = {"softcap": 9.0, "z_loss": 0.01, "reduction": "none"}
    exact = values(wide(hidden), wide(weight), y, **options, implementation="reference")
    got = values(hidden, weight, y, **options, implementation=implementation)
    g = drawn(tokens, dtype=sums_of(dtype), seed=4)
    right = linear_cross_entropy_vjp(
        wide(g), wide(hidden), wide(weight), y, **options, implementation="reference"
    )
    grads = linear_cross_entropy_vjp(g, hidden, weight, y, **options, implementation=implementation)
    h, w, kept = np.abs(wide(hidden)), np.abs(wide(weight)), y != -100
    s = 9 * np.tanh(wide(hidden) @ wide(weight).T / 9)
    log_p = s - exact["lse"][:, None]
    p, steep = np.exp(log_p), kept * (1 + 0.02 * np.abs(exact["lse"]))
    dz = np.abs(wide(g) * steep)[:, None] * p
    dz[kept, y[kept]] += np.abs(wide(g))[kept]
    gap = s.max(axis=1, keepdims=True) - s
    magnitudes = {
        "loss": steep,
        "lse": 1.0,
        "entropy": 1 + (p * gap).sum(axis=1),
        "dhidden": dz.sum(axis=1)[:, None] * w.max(),
        "dweight": dz.T @ h,
    }
    found = got | grads._asdict()
    for name, magnitude in magnitudes.items():
        value = (exact | right._asdict())[name]
        more = {"logit_size": float((h @ w.T).max()), "magnitude": magnitude}
        bound = error_bound(dtype, name, sizes, size=np.abs(value), **more)
        assert (np.abs(wide(found[name]) - value) <= bound).all(), name


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_large_logits_keep_their_digits(implementation: str, dtype: np.dtype[Any]) -> None:
    """A row of equal logits is uniform, however large they are."""
    hidden, y = np.ones((3, 2), dtype), np.arange(3)
    for size in (1e4, -1e9, 1e30):
        weight = np.full((8, 2), size / 2, dtype)
        r = linear_cross_entropy(
            hidden, weight, y, reduction="sum", return_grads=True, implementation=implementation
        )
        np.testing.assert_allclose(r.loss, 3 * np.log(8), rtol=1e-6)
        dz = np.full((8, 3), 0.125) - np.eye(8, 3)
        np.testing.assert_allclose(r.grads.dweight, dz @ hidden, rtol=1e-6)


# The same bits


def bits(a: dict[str, Any], b: dict[str, Any], *names: str) -> None:
    for name in names or a:
        assert a[name].tobytes() == b[name].tobytes(), name


TOKENS = ("loss", "lse", "entropy", "argmax", "loss_dhidden", "dhidden", "tloss", "tdhidden")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_is_the_same_alone_and_in_any_chunk(dtype: np.dtype[Any]) -> None:
    given = inputs(tokens=29, classes=67, dtype=dtype)
    options = {"reduction": "none", "label_smoothing": 0.1, "implementation": "cpu"}
    whole = results(*given, **options)
    hidden, weight, y = given
    dloss = drawn(29, dtype=sums_of(dtype), seed=14)
    for i in (0, 17):
        part = slice(i, i + 1)
        bits(
            values(hidden[part], weight, y[part], **options),
            {k: v[part] for k, v in whole.items() if k in ("loss", "lse", "entropy", "argmax")},
            "loss",
            "lse",
            "entropy",
            "argmax",
        )
        alone = linear_cross_entropy_vjp(dloss[part], hidden[part], weight, y[part], **options)
        assert alone.dhidden.tobytes() == whole["loss_dhidden"][part].tobytes()
    for chunk in (1, 7, 16, 1000):
        bits(results(*given, token_chunk=chunk, **options), whole, *TOKENS)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_chunks_of_classes_do_not_change_the_loss(dtype: np.dtype[Any]) -> None:
    hidden, weight, y = inputs(tokens=11, width=5, classes=4999, dtype=dtype)
    options = {"label_smoothing": 0.1, "softcap": 3.0, "implementation": "cpu"}
    whole = values(hidden, weight, y, **options)
    close_to = results(hidden, weight, y, **options)
    for chunk in (2048, 4096, 9000):
        got = values(hidden, weight, y, vocab_chunk=chunk, **options)
        del got["stats"]
        bits(got, whole, *got)
    close(results(hidden, weight, y, vocab_chunk=2048, **options), close_to, dtype)


def test_threads_and_targets_do_not_change_bits(
    setting: Callable[..., AbstractContextManager[None]],
) -> None:
    from tilewise import _core

    for dtype in (F64, F32, F16):
        given = inputs(tokens=37, width=19, classes=2111, dtype=dtype)
        options = {"softcap": 2.0, "label_smoothing": 0.1, "implementation": "cpu"}
        want = results(*given, **options)
        for target in _core.targets():
            for threads in (1, 3):
                with setting(target, threads):
                    bits(results(*given, **options), want)


def test_runs_repeat_their_bits_with_pairs_of_16_bits(
    setting: Callable[..., AbstractContextManager[None]],
) -> None:
    """Products of bfloat16 pairs have bits of their own, but the same on any number of threads."""
    given = inputs(tokens=37, width=19, classes=2111, dtype=BF16)
    want = results(*given, implementation="cpu")
    for threads in (1, 2, 3):
        with setting(None, threads):
            bits(results(*given, implementation="cpu"), want)


# Shift, parts of the classes, filter


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [1, 3])
def test_a_shift_is_that_of_slices(implementation: str, reduction: str, shift: int) -> None:
    hidden, weight = drawn(2, 3, 11, C), drawn(V, C, seed=1)
    y = rng(2).integers(0, V, (2, 3, 11))
    y[0, 1, 4:7] = -100
    by = {"reduction": reduction, "implementation": implementation}
    got = values(hidden, weight, y, shift=shift, **by)
    cut = np.ascontiguousarray(hidden[..., :-shift, :])
    want = values(cut, weight, y[..., shift:], **by)
    for name in ("loss", "lse", "entropy", "argmax", "z_loss"):
        assert got[name].shape == want[name].shape
        np.testing.assert_allclose(got[name], want[name], rtol=1e-13)
    dloss, dlse = drawn(*want["loss"].shape, seed=3), drawn(*want["lse"].shape, seed=4)
    given = {"dlse": dlse, "dentropy": dlse}
    a = linear_cross_entropy_vjp(dloss, hidden, weight, y, got["stats"], shift=shift, **given, **by)
    b = linear_cross_entropy_vjp(dloss, cut, weight, y[..., shift:], **given, **by)
    np.testing.assert_allclose(a.dhidden[..., :-shift, :], b.dhidden, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(a.dweight, b.dweight, rtol=1e-11, atol=1e-14)
    assert not a.dhidden[..., -shift:, :].any()
    t = drawn(*hidden.shape, seed=5)
    moved = linear_cross_entropy_jvp(t, hidden, weight, y, shift=shift, **by)
    right = linear_cross_entropy_jvp(t[..., :-shift, :], cut, weight, y[..., shift:], **by)
    np.testing.assert_allclose(moved.tloss, right.tloss, rtol=1e-11)
    np.testing.assert_allclose(moved.tlse, right.tlse, rtol=1e-11)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("cuts", [(16,), (1, 7, 36)])
def test_parts_of_the_classes_merge_into_the_whole(
    implementation: str, dtype: np.dtype[Any], cuts: tuple[int, ...]
) -> None:
    (hidden, weight, y), options = inputs(dtype=dtype), options_of("everything", dtype)
    arrays = {"weight": weight, **{k: options.pop(k) for k in ("bias", "class_weight")}}
    options["implementation"] = implementation
    whole = {"reduction": "none", **options, **arrays}
    want = values(hidden, y=y, **whole)
    starts = (0, *cuts)
    parts = [
        {k: part for k, part in zip(arrays, pieces, strict=True)}
        for pieces in zip(*(np.split(x, cuts) for x in arrays.values()), strict=True)
    ]
    at = [{"first_class": a, "classes": V, **options} for a in starts]
    states = [
        linear_cross_entropy_shard(hidden, targets=y, **part, **where)
        for part, where in zip(parts, at, strict=True)
    ]
    merged = merge_shards(states, y, z_loss=options["z_loss"])
    u = unit_roundoff(sums_of(dtype))
    np.testing.assert_allclose(merged.loss, want["loss"], rtol=100 * u, atol=100 * u)
    np.testing.assert_allclose(merged.lse, want["lse"], rtol=100 * u)
    dloss, dlse = (drawn(T, dtype=sums_of(dtype), seed=s) for s in (4, 5))
    right = linear_cross_entropy_vjp(dloss, hidden, targets=y, dlse=dlse, **whole)
    grads = [
        linear_cross_entropy_shard_vjp(
            dloss, hidden, targets=y, merged=merged, dlse=dlse, **part, **where
        )
        for part, where in zip(parts, at, strict=True)
    ]
    v = 4 * unit_roundoff(dtype) if dtype in NARROW else 300 * u
    for name in ("dweight", "dbias"):
        joined = wide(np.concatenate([getattr(g, name) for g in grads]))
        of_whole = wide(getattr(right, name))
        np.testing.assert_allclose(joined, of_whole, rtol=0, atol=v * np.abs(of_whole).max())
    total = sum(wide(g.dhidden) for g in grads)
    limit = (len(grads) + 1) * v * np.abs(wide(right.dhidden)).max()
    np.testing.assert_allclose(total, wide(right.dhidden), rtol=0, atol=limit)


def test_the_gradient_of_a_part_has_the_bits_of_the_whole() -> None:
    """Where the statistics are the same, as z_y of a part has no influence on it."""
    hidden, weight, y = inputs(tokens=23, width=11, classes=4100, dtype=F32)
    by = {"implementation": "cpu"}
    dloss = drawn(23, dtype=F32, seed=4)
    whole = linear_cross_entropy(hidden, weight, y, reduction="none", return_stats=True, **by)
    right = linear_cross_entropy_vjp(dloss, hidden, weight, y, whole.stats, reduction="none", **by)
    cut = 2048
    at = [{"first_class": a, "classes": 4100, **by} for a in (0, cut)]
    parts = np.split(weight, [cut])
    states = [
        linear_cross_entropy_shard(hidden, w, y, **where)
        for w, where in zip(parts, at, strict=True)
    ]
    merged = merge_shards(states, y)._replace(stats=whole.stats)
    grads = [
        linear_cross_entropy_shard_vjp(dloss, hidden, w, y, merged, **where)
        for w, where in zip(parts, at, strict=True)
    ]
    joined = np.concatenate([g.dweight for g in grads])
    assert joined.tobytes() == right.dweight.tobytes()


def test_a_gradient_filter_leaves_out_small_entries_only() -> None:
    hidden, weight, y = inputs(tokens=41, width=29, classes=2111, dtype=F32)
    weight *= np.float32(3)
    by = {"implementation": "cpu"}
    exact = linear_cross_entropy_vjp(1.0, hidden, weight, y, **by)
    for eps in (1e-6, 1e-3):
        for call in (
            lambda eps=eps: linear_cross_entropy_vjp(
                1.0, hidden, weight, y, gradient_filter=eps, **by
            ),
            lambda eps=eps: (
                linear_cross_entropy(
                    hidden, weight, y, gradient_filter=eps, return_grads=True, **by
                ).grads
            ),
        ):
            got = call()
            kept = (y != -100).sum()
            bound = 2111 * eps / kept * np.abs(weight).max() + 1e-6
            assert np.abs(got.dhidden - exact.dhidden).max() <= bound
            bound = 41 * eps / kept * np.abs(hidden).max() + 1e-6
            assert np.abs(got.dweight - exact.dweight).max() <= bound
