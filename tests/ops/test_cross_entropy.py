"""The cross-entropy: values and derivatives of each implementation, edge cases, same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tilewise.base.dtypes import compute_dtype as sums_in
from tilewise.base.dtypes import unit_roundoff
from tilewise.numpy import (
    EntropyStats,
    cross_entropy,
    cross_entropy_jvp,
    cross_entropy_vjp,
    cross_entropy_vjp_jvp,
    logsumexp,
)
from tilewise.ops.cross_entropy.spec import error_bound

Array = NDArray[Any]
F64 = np.dtype(np.float64)
F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
DTYPES = [F64, F32, BF16, F16]
NAN, INF = np.nan, np.inf
IGNORED = -100

# What each function of the core writes.
WRITTEN = {
    "cross_entropy_forward": ("loss", "lse", "z", "m", "log_l", "total"),
    "cross_entropy_vjp": ("dx", "dprobabilities"),
    "cross_entropy_jvp": ("t_loss", "t_lse", "t_z"),
    "cross_entropy_vjp_jvp": ("dx", "dprobabilities"),
}


@pytest.fixture(autouse=True, scope="module")
def poisoned_results() -> Iterator[None]:
    """Put NaN into every array that the kernels are to write, before they do."""
    cpu = pytest.importorskip("tilewise.ops.cross_entropy.cpu")
    core = cpu._core

    def poisoned(name: str) -> Callable[..., None]:
        def run(**arrays: Any) -> None:
            for array in map(arrays.get, WRITTEN[name]):
                if array is not None and not np.shares_memory(array, arrays["x"]):
                    array[...] = NAN if array.dtype.kind == "f" else 0x7FFF
            getattr(core, name)(**arrays)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_core", SimpleNamespace(**{name: poisoned(name) for name in WRITTEN}))
        yield


@pytest.fixture(params=["reference", "cpu"])
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def drawn(*shape: int, dtype: Any = F64, spread: float = 3.0, seed: int = 0) -> Array:
    """Numbers in the dtype itself, so that what is computed of them is exact in float64."""
    rng = np.random.default_rng(seed)
    return np.asarray(spread * rng.standard_normal(shape)).astype(dtype)


def indices(*shape: int, classes: int, ignored: float = 0.2, seed: int = 1) -> Array:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, shape)
    return np.where(rng.random(shape) < ignored, IGNORED, y)


def probabilities(*shape: int, dtype: Any = F64, seed: int = 2) -> Array:
    """Weights of classes that need not add up to 1, some of them 0."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.random(shape) * (rng.random(shape) > 0.3)).astype(dtype)


def wide(x: Array) -> Array:
    return x.astype(np.float64)


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "smoothing": {"label_smoothing": 0.15},
    "z-loss": {"z_loss": 0.03},
    "softcap": {"softcap": 2.5},
    "weight": {"weight": 5},
    "everything": {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 4.0, "weight": 5},
}
KINDS = ["indices", "probabilities"]
A, C, I = 5, 13, 3


def options_of(name: str, classes: int = C, dtype: np.dtype[Any] = F64) -> dict[str, Any]:
    """Options with the weights of classes, of which one is 0 and one is negative."""
    options = dict(OPTIONS[name])
    if "weight" in options:
        weight = np.random.default_rng(options["weight"]).random(classes) + 0.5
        weight[1 % classes], weight[2 % classes] = 0, -0.25
        options["weight"] = weight.astype(dtype)
    return options


def targets_of(kind: str, shape: tuple[int, ...], dtype: Any = F64) -> Array:
    """Targets for logits whose classes are the second axis."""
    if kind == "probabilities":
        return probabilities(*shape, dtype=dtype)
    return indices(*shape[:1], *shape[2:], classes=shape[1])


def results(z: Array, targets: Array, axis: int = 1, **options: Any) -> dict[str, Any]:
    """Everything that there is to compute, for some fixed cotangents and tangents."""
    options["class_axis"] = axis
    more = dict.fromkeys(("return_lse", "return_z_loss", "return_stats"), True)
    r = cross_entropy(z, targets, **more, **options)
    sums, soft = r.lse.dtype, targets.dtype.kind != "i"
    g, gz, tg, tgz = (drawn(*r.loss.shape, dtype=sums, spread=1, seed=s) for s in range(3, 7))
    gl, tgl = (drawn(*r.lse.shape, dtype=sums, spread=1, seed=s) for s in (7, 8))
    tz = drawn(*z.shape, dtype=z.dtype, spread=1, seed=9)
    tq = drawn(*z.shape, dtype=targets.dtype, spread=0.1, seed=10) if soft else None
    given = {"dlse": gl, "dz_loss": gz}
    found = {"loss": r.loss, "lse": r.lse, "z_loss": r.z_loss, "total": r.stats.total}
    found |= cross_entropy_vjp(g, z, targets, r.stats, **given, **options)._asdict()
    found |= cross_entropy_jvp(tz, z, targets, r.stats, ttargets=tq, **options)._asdict()
    moves = {"ttargets": tq, "tdloss": tg, "tdlse": tgl, "tdz_loss": tgz}
    again = cross_entropy_vjp_jvp(g, tz, z, targets, r.stats, **given, **moves, **options)
    found |= {"tdlogits": again.dlogits, "tdtargets": again.dtargets}
    return {name: value for name, value in found.items() if value is not None}


def textbook(z: Array, targets: Array, **options: Any) -> tuple[Array, Array, Array]:
    """Loss, lse and z_loss of rows along the last axis, from the whole log-softmax."""
    s, V, softcap = wide(z), z.shape[-1], options.get("softcap")
    weight, smoothing = options.get("weight"), options.get("label_smoothing", 0)
    if softcap is not None:
        s = softcap * np.tanh(s / softcap)
    lse = np.log(np.exp(s - s.max(-1, keepdims=True)).sum(-1)) + s.max(-1)
    w = np.ones(V) if weight is None else wide(weight)
    kept = np.ones(lse.shape, np.bool_)
    if targets.dtype.kind == "i":
        kept = targets != IGNORED
        q = np.asarray(targets[..., None] == np.arange(V), np.float64)
    else:
        q = wide(targets)
    t = w * ((1 - smoothing) * q + smoothing / V)
    z_part = np.where(kept, options.get("z_loss", 0) * lse**2, 0)
    return np.where(kept, (t * (lse[..., None] - s)).sum(-1), 0) + z_part, lse, z_part


# Values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_rows_are_those_of_the_textbook(implementation: str, name: str, kind: str) -> None:
    z, options = drawn(A, C, I), options_of(name)
    targets = targets_of(kind, z.shape)
    r = cross_entropy(
        z, targets, class_axis=1, reduction="none", return_lse=True, return_z_loss=True,
        implementation=implementation, **options,
    )  # fmt: skip
    last = np.moveaxis(targets, 1, -1) if kind == "probabilities" else targets
    for got, want in zip(r[:3], textbook(np.moveaxis(z, 1, -1), last, **options), strict=True):
        assert got.shape == (A, I)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_are_sums_and_means_of_rows(
    implementation: str, kind: str, weighted: bool
) -> None:
    z, by = drawn(7, 11), {"implementation": implementation, "z_loss": 0.1}
    targets = targets_of(kind, z.shape)
    weight = np.random.default_rng(3).random(11) + 0.5 if weighted else None
    rows = cross_entropy(z, targets, weight=weight, reduction="none", **by)
    total = cross_entropy(z, targets, weight=weight, reduction="sum", **by)
    mean = cross_entropy(z, targets, weight=weight, return_z_loss=True, **by)
    np.testing.assert_allclose(total, rows.sum(), rtol=1e-14)
    if kind == "probabilities":
        count = 7.0
    else:
        kept = targets[targets != IGNORED]
        count = float(len(kept) if weight is None else weight[kept].sum())
    np.testing.assert_allclose(mean.loss, rows.sum() / count, rtol=1e-14)
    z_rows = cross_entropy(z, targets, reduction="none", return_z_loss=True, **by).z_loss
    np.testing.assert_allclose(mean.z_loss, z_rows.sum() / count, rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_kernels_agree_with_the_reference(name: str, kind: str, dtype: np.dtype[Any]) -> None:
    shape = (3, 4099, 2) if name == "everything" else (A, 67, I)
    z, options = drawn(*shape, dtype=dtype), options_of(name, shape[1], sums_in(dtype))
    targets = targets_of(kind, shape, dtype)
    got, want = (
        results(z, targets, reduction="none", implementation=i, **options)
        for i in ("cpu", "reference")
    )
    assert got.keys() == want.keys()
    narrow = unit_roundoff(dtype) if dtype.itemsize == 2 else 0
    for key, b in want.items():
        assert got[key].dtype == b.dtype, key
        quantity = {"total": "z_loss"}.get(key, key.removeprefix("t") if "td" in key else key)
        size = np.abs(wide(b)).max()
        bound = error_bound(sums_in(dtype), quantity, shape[1], logit_size=6, magnitude=4, size=4)
        bound = bound * max(1, size) + 2 * narrow * size * (key.lstrip("t")[0] == "d")
        np.testing.assert_allclose(wide(got[key]), wide(b), rtol=0, atol=bound, err_msg=key)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_wide_vocabulary_keeps_its_digits(kind: str) -> None:
    """Against float64, for bfloat16 logits of which the target's may be far from the largest."""
    z = drawn(7, 32_003, dtype=BF16)
    targets = targets_of(kind, z.shape, F32)
    if kind == "probabilities":
        targets = (targets / targets.sum(1, keepdims=True)).astype(np.float32)
    got = cross_entropy(z, targets, reduction="none", implementation="cpu")
    np.testing.assert_allclose(got, textbook(z, targets)[0], rtol=0, atol=1e-5)


# Derivatives


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_first_derivatives_are_those_of_finite_differences(
    implementation: str, name: str, kind: str, reduction: str
) -> None:
    z, h = drawn(A, C, I), 1e-6
    options = options_of(name) | {"implementation": implementation, "class_axis": 1}
    options["reduction"] = reduction
    targets = targets_of(kind, z.shape)
    tz, tq = drawn(*z.shape, seed=11), drawn(*z.shape, spread=0.1, seed=12)
    soft = kind == "probabilities"
    more = {"return_lse": True, "return_z_loss": True}
    r = cross_entropy(z, targets, **more, return_stats=True, **options)
    g = [drawn(*x.shape, seed=13 + n) for n, x in enumerate(r[:3])]

    def moved(sign: int) -> float:
        at = targets + sign * h * tq if soft else targets
        found = cross_entropy(z + sign * h * tz, at, **more, **options)[:3]
        return float(sum((w * x).sum() for w, x in zip(g, found, strict=True)))

    slope = (moved(1) - moved(-1)) / (2 * h)
    grads = cross_entropy_vjp(g[0], z, targets, r.stats, dlse=g[1], dz_loss=g[2], **options)
    total = (grads.dlogits * tz).sum() + ((grads.dtargets * tq).sum() if soft else 0)
    np.testing.assert_allclose(total, slope, rtol=1e-6, atol=1e-6)
    moves = cross_entropy_jvp(tz, z, targets, r.stats, ttargets=tq if soft else None, **options)
    transposed = sum((w * t).sum() for w, t in zip(g, moves, strict=True))
    np.testing.assert_allclose(transposed, total, rtol=1e-11, atol=1e-11)
    assert grads.dtargets is None or soft


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_second_derivatives_are_those_of_finite_differences(
    implementation: str, name: str, kind: str, reduction: str
) -> None:
    z, h = drawn(A, C, I), 1e-5
    options = options_of(name) | {"implementation": implementation, "class_axis": 1}
    options["reduction"] = reduction
    targets, soft = targets_of(kind, z.shape), kind == "probabilities"
    shape = (A, I) if reduction == "none" else ()
    g, gz, tg, tgz = (drawn(*shape, seed=s) for s in range(20, 24))
    gl, tgl = drawn(A, I, seed=24), drawn(A, I, seed=25)
    tz, tq = drawn(*z.shape, seed=26), drawn(*z.shape, seed=27) if soft else None

    def moved(step: float) -> Any:
        at = targets if tq is None else targets + step * tq
        given = {"dlse": gl + step * tgl, "dz_loss": gz + step * tgz}
        return cross_entropy_vjp(g + step * tg, z + step * tz, at, **given, **options)

    up, down = moved(h), moved(-h)
    got = cross_entropy_vjp_jvp(
        g, tz, z, targets, dlse=gl, dz_loss=gz, ttargets=tq,
        tdloss=tg, tdlse=tgl, tdz_loss=tgz, **options,
    )  # fmt: skip
    for a, b, c in zip(got, up, down, strict=True):
        assert a is b is None or np.allclose(a, (b - c) / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_absent_cotangents_and_tangents_are_zero(implementation: str, kind: str) -> None:
    z, by = drawn(3, 17), {"implementation": implementation, "z_loss": 0.1, "reduction": "none"}
    targets, zero = targets_of(kind, z.shape), np.zeros(3)
    some = drawn(3, seed=1)
    tq = np.zeros_like(z) if kind == "probabilities" else None
    a = cross_entropy_vjp(None, z, targets, dlse=some, **by)
    b = cross_entropy_vjp(zero, z, targets, dlse=some, dz_loss=zero, **by)
    assert a.dlogits.tobytes() == b.dlogits.tobytes()
    assert not any(t.any() for t in cross_entropy_jvp(None, z, targets, ttargets=tq, **by))
    a = cross_entropy_vjp_jvp(some, z, z, targets, **by)
    b = cross_entropy_vjp_jvp(some, z, z, targets, dlse=zero, ttargets=tq, tdloss=zero, **by)
    np.testing.assert_array_equal(a.dlogits, b.dlogits)


def test_the_gradient_of_a_row_adds_up_to_zero(implementation: str) -> None:
    """For class indices without a z-loss: a shift of all logits changes nothing."""
    z, y = drawn(7, 101, dtype=F32), indices(7, classes=101)
    dz = cross_entropy_vjp(1, z, y, label_smoothing=0.1, implementation=implementation).dlogits
    np.testing.assert_allclose(wide(dz).sum(axis=1), 0, atol=1e-7)


# Ignored rows and rare values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_ignored_rows_have_no_loss_whatever_their_logits_are(
    implementation: str, dtype: np.dtype[Any], reduction: str
) -> None:
    z = drawn(7, 37, dtype=dtype)
    y = indices(7, classes=37, ignored=0)
    y[[1, 4]] = -7
    spoiled = z.copy()
    spoiled[1], spoiled[4, 5] = NAN, INF
    options = options_of("everything", 37, sums_in(dtype)) | {
        "ignore_index": -7, "reduction": reduction, "implementation": implementation,
    }  # fmt: skip
    a, b = (cross_entropy(x, y, return_lse=True, **options) for x in (z, spoiled))
    assert a.loss.tobytes() == b.loss.tobytes()
    if reduction == "none":
        assert not a.loss[[1, 4]].any()
    np.testing.assert_array_equal(np.isnan(b.lse), np.arange(7) == 1)
    one = np.ones(a.loss.shape, a.loss.dtype)
    grads = [cross_entropy_vjp(one, x, y, dz_loss=one, **options).dlogits for x in (z, spoiled)]
    assert grads[0].tobytes() == grads[1].tobytes() and not wide(grads[0])[[1, 4]].any()
    again = cross_entropy_vjp_jvp(one, z, spoiled, y, tdloss=one, **options).dlogits
    assert not wide(again)[[1, 4]].any()
    assert np.isfinite(cross_entropy_jvp(z, spoiled, y, **options).tloss).all()


def test_the_lse_of_an_ignored_row_has_its_derivatives(implementation: str) -> None:
    z, y = drawn(2, 11), np.full(2, IGNORED)
    dlse, by = np.ones(2), {"implementation": implementation, "z_loss": 0.1}
    dz = cross_entropy_vjp(None, z, y, dlse=dlse, **by).dlogits
    p = np.exp(z - logsumexp(z, -1)[:, None])
    np.testing.assert_allclose(dz, p, rtol=1e-13)
    tlse = cross_entropy_jvp(z, z, y, **by).tlse
    np.testing.assert_allclose(tlse, (p * z).sum(1), rtol=1e-13)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("rows", [0, 3])
def test_without_rows_that_count_the_loss_and_its_gradient_are_zero(
    implementation: str, rows: int, reduction: str
) -> None:
    z, y = drawn(rows, 5), np.full(rows, IGNORED)
    options = options_of("everything", 5)
    found = results(z, y, reduction=reduction, implementation=implementation, **options)
    for name in ("loss", "z_loss", "total", "tloss", "tz_loss"):
        assert not found[name].any(), name
    assert found["loss"].shape == ((rows,) if reduction == "none" else ())
    none = cross_entropy_vjp(found["loss"] + 1, z, y, reduction=reduction, **options).dlogits
    assert none.shape == z.shape and not none.any()
    soft = results(drawn(0, 5), drawn(0, 5), reduction=reduction, implementation=implementation)
    assert not soft["loss"].any() and soft["dtargets"].shape == (0, 5)


def test_weights_of_zero_alone_give_a_mean_of_zero(implementation: str) -> None:
    z, y, weight = drawn(3, 5), np.array([1, 1, 2]), np.array([1.0, 0, 0, 1, 1])
    options = {"weight": weight, "implementation": implementation}
    assert cross_entropy(z, y, **options) == 0
    assert not cross_entropy_vjp(1.0, z, y, **options).dlogits.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_class_has_no_loss(implementation: str, dtype: np.dtype[Any]) -> None:
    z = np.array([[5], [-3], [1e4]], dtype)
    y = np.array([0, IGNORED, 0])
    found = results(z, y, label_smoothing=0.3, implementation=implementation)
    assert found["loss"] == 0 and abs(found["tloss"]) < 1e-6
    np.testing.assert_array_equal(found["lse"], wide(z[:, 0]).astype(found["lse"].dtype))
    dz = cross_entropy_vjp(1, z, y, implementation=implementation).dlogits
    assert not wide(dz).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_a_logit_above_minus_infinity_is_zero(
    implementation: str, dtype: np.dtype[Any], kind: str
) -> None:
    z, targets = drawn(3, 23, dtype=dtype), targets_of(kind, (3, 23), dtype)
    if kind == "indices":
        targets[:] = 5, 7, 11
    z[1] = -INF
    options = options_of("everything", 23, sums_in(dtype)) | {"softcap": None}
    found = results(z, targets, reduction="none", implementation=implementation, **options)
    assert np.isneginf(found["lse"][1])
    for name, value in found.items():
        if name not in ("lse", "total"):
            assert not wide(value)[1].any(), name
            assert np.isfinite(wide(value)).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_class_of_minus_infinity_without_weight_is_absent(
    implementation: str, dtype: np.dtype[Any], kind: str
) -> None:
    z, targets = drawn(3, 29, dtype=dtype), targets_of(kind, (3, 29), dtype)
    if kind == "indices":
        targets[:] = 7, 2, 28
        shorter = targets - (targets > 5)
    else:
        targets[:, 5] = 0
        shorter = np.delete(targets, 5, axis=1)
    z[:, 5] = -INF
    by = {"implementation": implementation, "z_loss": 0.1, "reduction": "none"}
    a, b = results(z, targets, **by), results(np.delete(z, 5, axis=1), shorter, **by)
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    for name in ("dlogits", "dtargets", "tdtargets"):
        if name in a:
            assert not wide(a[name])[:, 5].any(), name
            assert np.isfinite(wide(a[name])).all(), name
    if kind == "probabilities":
        targets[1, 5] = 0.5
        found = cross_entropy(z, targets, **by)
        np.testing.assert_array_equal(np.isposinf(found), [False, True, False])


@pytest.mark.parametrize("columns", [41, 5003])
def test_a_nan_is_seen_beside_an_infinity(implementation: str, columns: int) -> None:
    last = columns - 1
    z = drawn(5, columns, dtype=F32)
    for row, (nan, inf) in enumerate([(0, last), (last, 0), (7, 8)]):
        z[row, nan], z[row, inf] = NAN, INF
    z[3, 3] = INF
    found = cross_entropy(
        z, np.full(5, 2), reduction="none", return_lse=True, implementation=implementation
    )
    assert np.isnan(found.lse[:3]).all() and found.lse[3] == INF and np.isfinite(found.lse[4])
    np.testing.assert_array_equal(np.isnan(found.loss), [True, True, True, True, False])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_nan_or_infinity_spoils_its_row_alone(
    implementation: str, dtype: np.dtype[Any], kind: str, value: float
) -> None:
    z, targets = drawn(3, 41, dtype=dtype), targets_of(kind, (3, 41), dtype)
    if kind == "indices":
        targets[:] = 5, 7, 11
    options = options_of("everything", 41, sums_in(dtype)) | {"softcap": None}
    options |= {"reduction": "none", "implementation": implementation}
    clean = results(z, targets, **options)
    z[1, 17] = value
    found = results(z, targets, **options)
    assert np.isnan(found["loss"][1]) and np.isnan(found["z_loss"][1])
    assert np.isnan(found["lse"][1]) if np.isnan(value) else found["lse"][1] == INF
    assert np.isnan(wide(found["dlogits"][1])).all()
    for name in found:
        assert found[name][[0, 2]].tobytes() == clean[name][[0, 2]].tobytes(), name


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_large_logits_keep_their_digits(implementation: str, dtype: np.dtype[Any]) -> None:
    for value in (-1e9, float(np.finfo(dtype).min), 1e4, 1e30):
        z = np.full((2, 8), value, dtype)
        y = np.array([3, 5])
        loss = cross_entropy(z, y, label_smoothing=0.1, implementation=implementation)
        np.testing.assert_allclose(loss, np.log(8), rtol=1e-6)
        dz = cross_entropy_vjp(1, z, y, reduction="sum", implementation=implementation).dlogits
        np.testing.assert_allclose(dz, 0.125 - np.eye(8)[y], rtol=1e-6)
    z = np.array([[1e4, 1e4 - 3, -1e4]], dtype)
    loss = cross_entropy(z, np.array([1]), implementation=implementation)
    np.testing.assert_allclose(loss, 3 + np.log1p(np.exp(-3)), rtol=1e-6)


def test_a_softcap_bounds_infinite_logits(implementation: str) -> None:
    z, by = np.array([[INF, -INF, 0.0]]), {"softcap": 2.0, "implementation": implementation}
    want = cross_entropy(np.array([[2.0, -2, 0]]), np.array([1]), implementation=implementation)
    np.testing.assert_allclose(cross_entropy(z, np.array([1]), **by), want, rtol=1e-14)
    dz = cross_entropy_vjp(1.0, z, np.array([1]), **by).dlogits
    assert not dz[0, :2].any() and dz[0, 2] > 0


@pytest.mark.parametrize("integer", ["int8", "uint8", "int16", "uint16", "int32", "uint64"])
def test_indices_of_any_integer_dtype(implementation: str, integer: str) -> None:
    z, y = drawn(3, 11), np.array([7, 3, 0])
    want = cross_entropy(z, y, ignore_index=3, implementation=implementation)
    got = cross_entropy(z, y.astype(integer), ignore_index=3, implementation=implementation)
    assert got.tobytes() == want.tobytes()


# Strides, memory, bits


def same(implementation: str, a: Array, b: Array, message: object = "") -> None:
    """Compare bits; of the reference, whose sums follow the memory, all but the last ones."""
    if implementation == "cpu":
        assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes(), message
    else:
        u = unit_roundoff(a.dtype)
        np.testing.assert_allclose(wide(a), wide(b), rtol=64 * u, atol=64 * u, err_msg=str(message))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_neither_on_the_class_axis_nor_on_strides(
    implementation: str, dtype: np.dtype[Any], kind: str
) -> None:
    z, by = drawn(3, 5, 37, dtype=dtype), {"reduction": "none", "implementation": implementation}
    soft = kind == "probabilities"
    targets = probabilities(3, 5, 37, dtype=dtype) if soft else indices(3, 5, classes=37)
    want = results(z, targets, 2, **by)
    padded = np.zeros((3, 10, 74), dtype)
    padded[:, ::2, ::2] = z
    first = np.ascontiguousarray(z.transpose(2, 0, 1))
    for name, view, axis in (
        ("middle", np.ascontiguousarray(z.swapaxes(1, 2)), 1),
        ("first", first, 0),
        ("Fortran", np.asfortranarray(z), 2),
        ("steps", padded[:, ::2, ::2], 2),
        ("reversed", np.ascontiguousarray(z[:, :, ::-1])[:, :, ::-1], 2),
        ("a view", np.ascontiguousarray(z.swapaxes(0, 1)).swapaxes(0, 1), -1),
    ):
        at = np.moveaxis(targets, 2, axis) if soft else targets
        r = cross_entropy(view, at, class_axis=axis, return_lse=True, **by)
        same(implementation, r.loss, want["loss"], name)
        same(implementation, r.lse, want["lse"], name)
        one = np.ones(r.loss.shape, r.loss.dtype)
        grads = cross_entropy_vjp(one, view, at, class_axis=axis, **by)
        right = cross_entropy_vjp(one, z, targets, **by)
        same(implementation, np.moveaxis(grads.dlogits, axis, 2), right.dlogits, name)
        if soft:
            same(implementation, np.moveaxis(grads.dtargets, axis, 2), right.dtargets, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_gradient_is_written_into_out_and_over_the_logits(
    implementation: str, dtype: np.dtype[Any], axis: int
) -> None:
    z, by = drawn(5, 7, 11, dtype=dtype), {"implementation": implementation, "softcap": 3.0}
    y = indices(*np.delete(z.shape, axis), classes=z.shape[axis])
    by |= {"class_axis": axis}
    want = cross_entropy_vjp(1, z, y, **by).dlogits
    wider = np.full((5, 14, 11), 3, dtype)
    for out in (np.full_like(z, 3), np.asfortranarray(z), wider[:, ::2]):
        assert cross_entropy_vjp(1, z, y, out=out, **by).dlogits is out
        same(implementation, out, want)
    np.testing.assert_array_equal(wide(wider[:, 1::2]), 3)
    for own in (z.copy(), np.asfortranarray(z)):
        cross_entropy_vjp(1, own, y, out=own, **by)
        same(implementation, own, want)


@pytest.mark.parametrize("kind", KINDS)
def test_both_gradients_are_right_where_one_takes_the_place_of_the_logits(
    implementation: str, kind: str
) -> None:
    z, targets = drawn(2, 4099, dtype=F32), targets_of(kind, (2, 4099), F32)
    want = cross_entropy_vjp(1, z, targets, label_smoothing=0.1, implementation=implementation)
    got = cross_entropy_vjp(
        1, z, targets, label_smoothing=0.1, out=z, implementation=implementation
    )
    assert got.dlogits is z
    for a, b in zip(got, want, strict=True):
        assert a is b is None or a.tobytes() == b.tobytes()


def test_threads_and_targets_do_not_change_bits(
    setting: Callable[..., AbstractContextManager[None]],
) -> None:
    from tilewise import _core

    cases = [(d, (7, 2053, 2), k, "everything") for d in DTYPES for k in KINDS]
    cases += [(F32, (2, 70_001, 1), kind, "everything") for kind in KINDS]
    cases += [(F32, (67, 1009, 1), "indices", name) for name in ("nothing", "softcap")]
    for dtype, shape, kind, name in cases:
        z, options = drawn(*shape, dtype=dtype), options_of(name, shape[1], sums_in(dtype))
        targets = targets_of(kind, shape, dtype)
        want = results(z, targets, implementation="cpu", **options)
        for target in _core.targets():
            for threads in (1, 3):
                with setting(target, threads):
                    got = results(z, targets, implementation="cpu", **options)
                for key in want:
                    assert got[key].tobytes() == want[key].tobytes(), (key, target, threads)


def test_large_gradients_go_past_the_caches_with_the_same_bits() -> None:
    z, y = drawn(67, 65_537, dtype=F32, spread=1), indices(67, classes=65_537)
    whole = cross_entropy_vjp(1, z, y, reduction="sum", implementation="cpu").dlogits
    for k in (0, 33, 66):
        alone = cross_entropy_vjp(1, z[k], y[k, ...], reduction="sum", implementation="cpu").dlogits
        assert alone.tobytes() == whole[k].tobytes()


def test_row_statistics_give_the_lse(implementation: str) -> None:
    z, y = drawn(3, 17, 5), indices(3, 5, classes=17)
    r = cross_entropy(
        z, y, class_axis=1, return_lse=True, return_stats=True, implementation=implementation
    )
    assert isinstance(r.stats, EntropyStats)
    np.testing.assert_array_equal(r.stats.m, z.max(axis=1))
    np.testing.assert_allclose(r.stats.m + r.stats.log_l, r.lse, rtol=1e-14)
    np.testing.assert_array_equal(r.stats.total, y != IGNORED)
