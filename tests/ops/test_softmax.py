"""The softmax: values and derivatives of each implementation, edge cases, exactness, same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tilewise.base.dtypes import unit_roundoff
from tilewise.numpy import (
    SoftmaxStats,
    log_softmax,
    logsumexp,
    softmax,
    softmax_jvp,
    softmax_vjp,
    softmax_vjp_jvp,
)
from tilewise.ops.softmax import reference
from tilewise.ops.softmax.spec import CotangentCall, Problem, TangentCall, error_bound

Array = NDArray[Any]
F64 = np.dtype(np.float64)
F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
DTYPES = [F64, F32, BF16, F16]
NAN, INF = np.nan, np.inf


# What each function of the core writes.
WRITTEN = {
    "softmax_forward": ("y", "log_y", "lse", "m", "log_l"),
    "softmax_vjp": ("dx", "dsink"),
    "softmax_jvp": ("ty", "tz", "tl"),
    "softmax_vjp_jvp": ("dx", "dsink"),
}


@pytest.fixture(autouse=True, scope="module")
def poisoned_results() -> Iterator[None]:
    """Put NaN into every array that the kernels are to write, before they do."""
    cpu = pytest.importorskip("tilewise.ops.softmax.cpu")
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


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def drawn(*shape: int, dtype: Any = F64, spread: float = 3.0, seed: int = 0) -> Array:
    """Numbers in the dtype itself, so that what is computed of them is exact in float64."""
    return np.asarray(spread * rng(seed).standard_normal(shape)).astype(dtype)


def wide(x: Array) -> Array:
    return x.astype(np.float64)


def tolerance(dtype: np.dtype[Any]) -> float:
    return 8 * unit_roundoff(dtype) if dtype in (BF16, F16) else 2000 * unit_roundoff(dtype)


def results(
    x: Array, axis: Any = -1, *, derivatives: bool = True, **options: Any
) -> dict[str, Any]:
    """Everything that there is to compute of an array, for some fixed cotangents and tangents."""
    r = softmax(x, axis, return_lse=True, return_stats=True, **options)
    found = {"y": r.y, "log_y": log_softmax(x, axis, **options), "lse": r.lse}
    assert r.lse.tobytes() == logsumexp(x, axis, **options).tobytes()
    if not derivatives:
        return found
    options["axis"] = axis
    sink = options.get("sink")
    learned = isinstance(sink, np.ndarray)
    dy, dlog_y, tx, tdy, tdlog_y = (
        drawn(*x.shape, dtype=x.dtype, spread=1, seed=s) for s in range(1, 6)
    )
    dlse, tdlse = (drawn(*r.lse.shape, dtype=r.lse.dtype, spread=1, seed=s) for s in (6, 7))
    tsink = drawn(*sink.shape, dtype=sink.dtype, seed=8) if learned else None
    cotangents = {"dlog_y": dlog_y, "dlse": dlse}
    found |= softmax_vjp(dy, x, r.stats, **cotangents, **options)._asdict()
    kinds = ("y", "log_y", "lse")
    found |= softmax_jvp(tx, x, r.stats, tsink=tsink, kinds=kinds, **options)._asdict()
    moves = {"tsink": tsink, "tdy": tdy, "tdlog_y": tdlog_y, "tdlse": tdlse}
    again = softmax_vjp_jvp(dy, tx, x, r.stats, **cotangents, **moves, **options)
    found |= {"tdx": again.dx, "tdsink": again.dsink}
    return {name: value for name, value in found.items() if value is not None}


def same(implementation: str, a: Array, b: Array, message: object = "") -> None:
    """Compare bits; of the reference, whose sums follow the memory, all but the last ones."""
    if implementation == "cpu":
        assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes(), message
    else:
        u = unit_roundoff(a.dtype)
        np.testing.assert_allclose(wide(a), wide(b), rtol=64 * u, atol=64 * u, err_msg=str(message))


def close(got: dict[str, Array], want: dict[str, Array], dtype: np.dtype[Any]) -> None:
    """Compare all results; each relative to the largest of its own kind."""
    assert got.keys() == want.keys()
    for name in got:
        a, b = wide(got[name]), wide(want[name])
        assert got[name].dtype == want[name].dtype, name
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b), name)
        size = np.abs(b[np.isfinite(b)]).max(initial=0.0)
        np.testing.assert_allclose(a, b, rtol=tolerance(dtype), atol=tolerance(dtype) * size)


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_add_up_to_one(implementation: str, dtype: np.dtype[Any]) -> None:
    x = drawn(5, 67, 3, dtype=dtype)
    y = softmax(x, 1, implementation=implementation)
    assert y.dtype == dtype and y.shape == x.shape
    u = unit_roundoff(dtype)
    np.testing.assert_allclose(wide(y).sum(axis=1), 1, rtol=8 * u)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_a_shift_of_a_row_changes_only_the_lse(implementation: str, dtype: np.dtype[Any]) -> None:
    """By a power of two, so that the shifted row is exact."""
    x = np.round(drawn(3, 101, dtype=dtype) * 64) / dtype.type(64)
    a, b = (
        softmax(x + dtype.type(k), return_lse=True, implementation=implementation) for k in (0, 64)
    )
    np.testing.assert_allclose(a.y, b.y, rtol=300 * unit_roundoff(dtype))
    np.testing.assert_allclose(b.lse - a.lse, 64, rtol=300 * unit_roundoff(dtype))


@pytest.mark.parametrize("C", [1, 2, 15, 16, 17, 63, 64, 65, 1000, 4096, 70_000])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rows_of_any_length(implementation: str, dtype: np.dtype[Any], C: int) -> None:
    x = drawn(3, C, dtype=dtype)
    r = softmax(x, return_lse=True, implementation=implementation)
    s = wide(x)
    lse = np.log(np.exp(s - s.max(1, keepdims=True)).sum(1)) + s.max(1)
    u = unit_roundoff(dtype)
    np.testing.assert_allclose(wide(r.y), np.exp(s - lse[:, None]), rtol=3 * u + 300 * 2.0**-24)
    np.testing.assert_allclose(r.lse, lse, rtol=1e-5, atol=1e-6)
    assert r.lse.dtype == np.float32


def test_entries_are_exact_to_a_hundred_roundings(implementation: str) -> None:
    """4096 entries in a range of 80, each relative to itself."""
    x = rng(3).uniform(-40, 40, (7, 4096)).astype(np.float32)
    y = softmax(x, implementation=implementation)
    exact = reference.forward64(Problem("softmax", x, -1).call).y[..., 0]
    normal = exact > np.finfo(np.float32).tiny
    error = np.abs(y - exact)[normal] / exact[normal]
    assert error.max() <= 100 * 2.0**-24


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [3, 4099])
def test_error_bound_holds(implementation: str, dtype: np.dtype[Any], C: int) -> None:
    x = drawn(5, C, dtype=dtype, spread=10)
    call = Problem("softmax", x, -1, 0.7).call
    exact = reference.forward64(call)
    size = float(np.abs(wide(x)).max()) / 0.7
    got = results(x, temperature=0.7, derivatives=False, implementation=implementation)
    for name, magnitude in (("y", exact.y), ("log_y", 1.0), ("lse", 1.0)):
        right = getattr(exact, name)[..., 0]
        scale = magnitude[..., 0] if isinstance(magnitude, np.ndarray) else magnitude
        bound = error_bound(dtype, name, C, logit_size=size, magnitude=scale, size=np.abs(right))
        assert (np.abs(wide(got[name]) - right) <= bound).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [3, 4099])
def test_error_bound_of_derivatives_holds(
    implementation: str, dtype: np.dtype[Any], C: int
) -> None:
    """Magnitudes are the formulas of the derivatives over absolute values."""
    x, dy, tx = (drawn(5, C, dtype=dtype, spread=3, seed=s) for s in range(3))
    sums = F32 if dtype in (BF16, F16) else dtype
    dlse, sink, tsink = (drawn(5, dtype=sums, seed=s) for s in (3, 4, 5))
    given = {"sink": sink, "temperature": 0.7}
    problem = Problem("softmax", x, -1, **given)
    row = reference.forward64(problem.call)
    p, p_sink = row.y[..., 0], np.exp(wide(sink) - row.lse[:, 0])
    ts, size = np.abs(wide(tx)) / 0.7, float(np.abs(wide(x)).max()) / 0.7
    c = (p * np.abs(wide(dy))).sum(1) + np.abs(wide(dlse))
    mu = (p * ts).sum(1) + p_sink * np.abs(wide(tsink))
    magnitudes = {
        "dx": p * (np.abs(wide(dy)) + c[:, None]) / 0.7,
        "dsink": p_sink * c,
        "ty": p * (ts + mu[:, None]),
        "tlog_y": ts + mu[:, None],
        "tlse": mu,
    }
    given["implementation"] = implementation
    kinds = ("y", "log_y", "lse")
    got = softmax_vjp(dy, x, dlse=dlse, **given)._asdict()
    got |= softmax_jvp(tx, x, tsink=tsink, kinds=kinds, **given)._asdict()
    stats = SoftmaxStats(row.m, row.log_l)
    whole = [problem.whole("x", t) for t in (dy, tx)]
    exact = reference.vjp64(problem.call, CotangentCall(whole[0], None, dlse[:, None], stats))
    moved = reference.jvp64(problem.call, TangentCall(whole[1], tsink[:, None], stats))
    right = exact._asdict() | dict(zip(("ty", "tlog_y", "tlse"), moved, strict=True))
    for name, magnitude in magnitudes.items():
        value = right[name].reshape(magnitude.shape)
        options = {"logit_size": size, "magnitude": magnitude, "size": np.abs(value)}
        bound = error_bound(dtype, name, C, **options)
        assert (np.abs(wide(got[name]) - value) <= bound).all(), name


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "temperature": {"temperature": 0.3},
    "where": {"where": rng(1).random((5, 7, 11)) > 0.4},
    "where of rows": {"where": rng(1).random((7, 1)) > 0.4},
    "where of columns": {"where": rng(1).random(11) > 0.4},
    "sink of one number": {"sink": 1.5},
    "no sink": {"sink": -INF},
    "sinks": {"sink": drawn(5, 7)},
    "sinks of some rows": {"sink": np.where(rng(2).random((5, 7)) > 0.5, -INF, 1.0)},
    "sinks that repeat": {"sink": drawn(5, 1)},
    "one learned sink": {"sink": drawn()},
    "everything": {
        "temperature": 2.5,
        "where": rng(4).random((5, 1, 11)) > 0.6,
        "sink": drawn(7),
    },
}


def options_of(name: str, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Options with arrays in a dtype that goes with x."""
    options = dict(OPTIONS[name])
    if isinstance(options.get("sink"), np.ndarray):
        options["sink"] = options["sink"].astype(dtype)
    return options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_kernels_agree_with_the_reference(name: str, dtype: np.dtype[Any]) -> None:
    x, options = drawn(5, 7, 11, dtype=dtype), options_of(name, dtype)
    got, want = (results(x, **options, implementation=by) for by in ("cpu", "reference"))
    close(got, want, dtype)


# Derivatives


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_those_of_finite_differences(implementation: str, name: str) -> None:
    """Along one direction of all inputs; the tangents are their transpose."""
    options = options_of(name, F64) | {"implementation": implementation}
    x, sink = drawn(5, 7, 11), options.get("sink")
    learned = isinstance(sink, np.ndarray)
    tx = drawn(*x.shape, seed=11)
    tsink = drawn(*sink.shape, seed=12) if learned else None
    h = 1e-5

    shapes = {"y": x.shape, "log_y": x.shape, "lse": (5, 7)}
    weights = {name: drawn(*shape, seed=20 + k) for k, (name, shape) in enumerate(shapes.items())}

    def moved(sign: int) -> float:
        more = options | ({"sink": np.asarray(sink + sign * h * tsink)} if learned else {})
        found = results(x + sign * h * tx, derivatives=False, **more)
        return sum(float((w * found[k])[np.isfinite(found[k])].sum()) for k, w in weights.items())

    slope = (moved(1) - moved(-1)) / (2 * h)
    r = softmax(x, return_stats=True, **options)
    dy, dlog_y, dlse = weights.values()
    grads = softmax_vjp(dy, x, r.stats, dlog_y=dlog_y, dlse=dlse, **options)
    total = (grads.dx * tx).sum() + ((grads.dsink * tsink).sum() if learned else 0)
    np.testing.assert_allclose(total, slope, rtol=1e-7, atol=1e-7)
    moves = softmax_jvp(tx, x, r.stats, tsink=tsink, kinds=tuple(shapes), **options)
    transposed = sum((w * t).sum() for w, t in zip(weights.values(), moves, strict=True))
    np.testing.assert_allclose(transposed, total, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", OPTIONS)
def test_second_derivatives_are_those_of_finite_differences(implementation: str, name: str) -> None:
    options = options_of(name, F64) | {"implementation": implementation}
    x, sink = drawn(5, 7, 11), options.get("sink")
    learned = isinstance(sink, np.ndarray)
    tsink = drawn(*sink.shape, seed=12) if learned else None
    dy, dlog_y, tx, tdy, tdlog_y = (drawn(5, 7, 11, seed=s) for s in range(30, 35))
    dlse, tdlse = drawn(5, 7, seed=36), drawn(5, 7, seed=37)
    h = 1e-5

    def moved(sign: int) -> Any:
        step = sign * h
        more = options | ({"sink": np.asarray(sink + step * tsink)} if learned else {})
        cotangents = {"dlog_y": dlog_y + step * tdlog_y, "dlse": dlse + step * tdlse}
        return softmax_vjp(dy + step * tdy, x + step * tx, **cotangents, **more)

    up, down = moved(1), moved(-1)
    given = {"dlog_y": dlog_y, "dlse": dlse, "tdy": tdy, "tdlog_y": tdlog_y, "tdlse": tdlse}
    got = softmax_vjp_jvp(dy, tx, x, tsink=tsink, **given, **options)
    for a, b, c in zip(got, up, down, strict=True):
        assert a is b is None or np.allclose(a, (b - c) / (2 * h), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("missing", ["dy", "dlog_y", "dlse", "all"])
def test_absent_cotangents_and_tangents_are_zero(implementation: str, missing: str) -> None:
    x, sink, axis = drawn(3, 13), drawn(3), {"implementation": implementation, "axis": -1}
    given = {"dy": drawn(3, 13, seed=1), "dlog_y": drawn(3, 13, seed=2), "dlse": drawn(3, seed=3)}
    names = given if missing == "all" else [missing]
    zeros, none = given | {n: np.zeros_like(given[n]) for n in names}, given | dict.fromkeys(names)
    tx, tsink = (None, None) if missing == "all" else (x, sink)
    for function, moves in ((softmax_vjp, ()), (softmax_vjp_jvp, (tx,))):
        a, b = (
            function(
                c["dy"], *moves, x, dlog_y=c["dlog_y"], dlse=c["dlse"], sink=sink,
                **axis, **({"tsink": tsink} if moves else {}),
            )
            for c in (zeros, none)
        )  # fmt: skip
        assert a.dx.tobytes() == b.dx.tobytes()
        np.testing.assert_array_equal(a.dsink, b.dsink)
    still = softmax_jvp(None, x, sink=sink, kinds=("y", "log_y", "lse"), **axis)
    assert not any(np.any(t) for t in still)


def test_the_gradient_of_the_sink_alone_is_that_beside_the_other() -> None:
    """The kernels write what there is room for."""
    from tilewise.ops.softmax import cpu
    from tilewise.ops.softmax.spec import Needed

    x, sink = drawn(3, 13), drawn(3)
    call = Problem("softmax", x, -1, sink=sink).call
    r = softmax(x, sink=sink, return_stats=True)
    stats = SoftmaxStats(r.stats.m[:, None], r.stats.log_l[:, None])
    cotangents = CotangentCall(x[..., None], None, None, stats)
    both = cpu.vjp(call, cotangents)
    alone = cpu.vjp(call, cotangents, Needed(x=False, sink=True))
    assert alone.dx is None
    assert alone.dsink.tobytes() == both.dsink.tobytes()


def test_statistics_of_a_larger_softmax_give_the_gradients_of_a_part(implementation: str) -> None:
    x, dlse = drawn(3, 31), drawn(3, seed=2)
    stats = softmax(x, return_stats=True, implementation=implementation).stats
    whole = softmax_vjp(None, x, stats, dlse=dlse, implementation=implementation).dx
    parts = [
        softmax_vjp(None, part, stats, dlse=dlse, implementation=implementation).dx
        for part in np.split(x, [17], axis=1)
    ]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-12)


# Hidden entries and rare values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hidden_nan_reaches_nothing(implementation: str, dtype: np.dtype[Any]) -> None:
    x, where = drawn(7, 37, dtype=dtype), rng(1).random((7, 37)) > 0.5
    spoiled = np.where(where, x, dtype.type(NAN))
    options = {"where": where, "implementation": implementation}
    a, b = results(x, **options), results(spoiled, **options)
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name
    assert not wide(a["y"])[~where].any()
    assert np.isneginf(wide(a["log_y"])[~where]).all()
    for name in ("dx", "ty", "tdx"):
        assert not wide(a[name])[~where].any(), name


def test_hidden_cotangents_and_tangents_reach_nothing(implementation: str) -> None:
    x, where = drawn(5, 19), rng(1).random((5, 19)) > 0.5
    where[2] = False
    t = drawn(5, 19, seed=1)
    bad, good = np.where(where, t, NAN), np.where(where, t, 0)
    options = {"where": where, "implementation": implementation}
    rows = np.where(where.any(axis=1), 1.0, NAN)
    a, b = (
        softmax_vjp_jvp(c, c, x, dlog_y=c, tdy=c, tdlog_y=c, dlse=r, tdlse=r, **options).dx
        for c, r in ((bad, rows), (good, np.ones(5)))
    )
    np.testing.assert_array_equal(a, b)
    a, b = (softmax_vjp(c, x, dlog_y=c, dlse=rows, **options).dx for c in (bad, good))
    np.testing.assert_array_equal(a, b)
    for got, want in zip(
        *(softmax_jvp(c, x, kinds=("y", "log_y", "lse"), **options) for c in (bad, good)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["hidden", "-inf"])
def test_an_empty_row_is_zero_with_all_derivatives(
    implementation: str, dtype: np.dtype[Any], how: str
) -> None:
    x, where = drawn(3, 23, dtype=dtype), np.ones((3, 23), np.bool_)
    if how == "hidden":
        where[1] = False
    else:
        x[1] = -INF
    found = results(x, where=where, implementation=implementation)
    assert not wide(found["y"][1]).any()
    assert np.isneginf(wide(found["log_y"][1])).all()
    assert np.isneginf(found["lse"][1])
    for name in ("dx", "ty", "tlog_y", "tlse", "tdx"):
        assert not wide(found[name][1]).any(), name
        assert np.isfinite(wide(found[name])).all(), name
    with_sink = results(x, where=where, sink=np.ones(3, dtype), implementation=implementation)
    assert with_sink["lse"][1] == 1
    assert not wide(with_sink["y"][1]).any()
    assert np.isfinite(wide(with_sink["dsink"])).all()


def test_an_entry_of_minus_infinity_is_absent_from_the_softmax(implementation: str) -> None:
    x = drawn(3, 29, dtype=F32)
    x[:, 5] = -INF
    rest = np.delete(x, 5, axis=1)
    a = results(x, derivatives=False, implementation=implementation)
    b = results(rest, derivatives=False, implementation=implementation)
    np.testing.assert_allclose(np.delete(a["y"], 5, axis=1), b["y"], rtol=1e-6)
    np.testing.assert_allclose(a["lse"], b["lse"], rtol=1e-6)
    assert not a["y"][:, 5].any()
    assert np.isneginf(a["log_y"][:, 5]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_visible_nan_or_infinity_spoils_its_row_alone(
    implementation: str, dtype: np.dtype[Any], value: float
) -> None:
    x = drawn(3, 41, dtype=dtype)
    clean = results(x, derivatives=False, implementation=implementation)
    x[1, 7] = value
    where = np.ones(41, np.bool_)
    where[0] = False
    r = softmax(x, where=where, return_lse=True, implementation=implementation)
    log_y = log_softmax(x, where=where, implementation=implementation)
    assert np.isnan(wide(r.y[1, 1:])).all() and np.isnan(wide(log_y[1, 1:])).all()
    assert r.y[1, 0] == 0 and np.isneginf(wide(log_y)[1, 0])
    assert np.isnan(r.lse[1]) if np.isnan(value) else r.lse[1] == INF
    y = softmax(x, implementation=implementation)
    assert y[[0, 2]].tobytes() == clean["y"][[0, 2]].tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [41, 701, 5003])
def test_a_nan_is_seen_beside_an_infinity(
    implementation: str, dtype: np.dtype[Any], columns: int
) -> None:
    """Wherever each stands, in rows one after another and side by side."""
    last = columns - 1
    x = drawn(19, columns, dtype=dtype)
    for row, (nan, inf) in enumerate([(0, last), (last, 0), (7, 8), (last, last // 2)]):
        x[row, nan], x[row, inf] = NAN, INF
    x[5, 3] = INF
    for lies, axis in ((x, 1), (np.ascontiguousarray(x.T), 0)):
        for options in ({}, {"sink": np.ones(19, dtype)}):
            lse = logsumexp(lies, axis, implementation=implementation, **options)
            assert np.isnan(lse[:4]).all()
            assert lse[5] == INF
            assert np.isfinite(lse[[4, *range(6, 19)]]).all()


@pytest.mark.parametrize("columns", [129, 2049, 5003])
@pytest.mark.parametrize("gap", [0, 3])
def test_large_results_have_the_same_bits_wherever_they_lie(columns: int, gap: int) -> None:
    """They go past the caches by whole lines, which rows and chunks do not end with."""
    rows = (17 << 20) // (4 * columns)
    x, size = drawn(rows, columns, dtype=F32), rows * (columns + gap)
    shown = [0, 1, 15, 16, 17, rows // 2, rows - 2, rows - 1]
    memory = np.empty(size + 64, np.float32)
    for function in (softmax, log_softmax):
        want = function(x[shown])
        for start in (0, 5, 15):
            memory.fill(3)
            first = -memory.ctypes.data % 64 // 4 + start
            lines = memory[first : first + size].reshape(rows, columns + gap)
            function(x, out=lines[:, :columns])
            assert lines[shown, :columns].tobytes() == want.tobytes()
            assert (lines[:, columns:] == 3).all()
            assert (memory[:first] == 3).all() and (memory[first + size :] == 3).all()
            sums = lines[:, :columns].sum(axis=1, dtype=np.float64)
            if function is softmax:
                np.testing.assert_allclose(sums, 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_large_logits_keep_their_digits(implementation: str, dtype: np.dtype[Any]) -> None:
    """Rows of -1e9 or of the smallest number, as additive masks make them, are uniform."""
    for value in (-1e9, float(np.finfo(dtype).min), 1e4, float(np.finfo(dtype).max)):
        x = np.full((2, 8), value, dtype)
        found = results(x, implementation=implementation)
        np.testing.assert_allclose(found["y"], 0.125, rtol=1e-6)
        log_y = np.full((2, 8), -np.log(8))
        np.testing.assert_allclose(found["log_y"], log_y, rtol=1e-6)
        dx = softmax_vjp(np.eye(2, 8, dtype=dtype), x, implementation=implementation).dx
        np.testing.assert_allclose(dx, 0.125 * (np.eye(2, 8) - 0.125), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_of_zero_and_one(implementation: str, dtype: np.dtype[Any]) -> None:
    by = {"implementation": implementation}
    none = np.empty((3, 0), dtype)
    found = results(none, **by)
    assert found["y"].shape == (3, 0) and np.isneginf(found["lse"]).all()
    found = results(none, sink=np.full(3, 2, dtype), **by)
    np.testing.assert_array_equal(found["lse"], 2)
    dlse = np.array([1, 2, 3], found["lse"].dtype)
    dsink = softmax_vjp(none, none, dlse=dlse, sink=np.full(3, 2, dtype), **by).dsink
    np.testing.assert_array_equal(wide(dsink), dlse)
    rows = results(np.empty((0, 5), dtype), sink=np.ones((0,), dtype), **by)
    assert rows["y"].shape == (0, 5) and rows["lse"].shape == (0,)
    one = results(np.full((3, 1), 5, dtype), **by)
    np.testing.assert_array_equal(wide(one["y"]), 1)
    scalar = results(np.array(5, dtype), **by)
    assert scalar["y"].shape == () and scalar["y"] == 1 and scalar["lse"] == 5


# Axes, strides, memory


def arrangements(x: Array) -> dict[str, tuple[Array, Any]]:
    """The rows of a `(3, 5, 37)` array, as arrays and axes that lie otherwise in memory."""
    padded = np.zeros((3, 10, 74), x.dtype)
    padded[:, ::2, ::2] = x
    return {
        "last": (x, -1),
        "middle": (np.ascontiguousarray(x.swapaxes(1, 2)), 1),
        "first": (np.ascontiguousarray(x.transpose(2, 0, 1)), 0),
        "Fortran": (np.asfortranarray(x), -1),
        "steps": (padded[:, ::2, ::2], -1),
        "reversed": (np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1], -1),
        "reversed rows": (np.ascontiguousarray(x[::-1])[::-1], -1),
        "two axes": (x.reshape(3, 5, 37, 1), (2, 3)),
        "a view of another order": (np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1), 2),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_neither_on_the_axis_nor_on_strides(
    implementation: str, dtype: np.dtype[Any]
) -> None:
    x = drawn(3, 5, 37, dtype=dtype)
    want = softmax(x, return_lse=True, implementation=implementation)
    grad = softmax_vjp(x, x, implementation=implementation).dx
    for name, (view, axis) in arrangements(x).items():
        got = softmax(view, axis, return_lse=True, implementation=implementation)
        y, axes = got.y.reshape(view.shape), {"middle": (0, 2, 1), "first": (1, 2, 0)}.get(name)
        y = y.reshape(3, 5, 37) if axes is None else y.transpose(axes)
        same(implementation, y, want.y, name)
        same(implementation, got.lse.reshape(3, 5), want.lse, name)
        dx = softmax_vjp(view, view, axis=axis, implementation=implementation).dx
        dx = dx.reshape(3, 5, 37) if axes is None else dx.transpose(axes)
        same(implementation, dx, grad, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_axes_are_one_row(implementation: str, dtype: np.dtype[Any]) -> None:
    """In the order of the axes of the array, not of the argument."""
    x = drawn(3, 5, 7, 11, dtype=dtype)
    for axes in ((1, 2), (0, 3), (3, 0), (-1, -4), (0, 2), None, (0, 1, 2, 3)):
        kept = [k for k in range(4) if axes is not None and k not in {a % 4 for a in axes}]
        rest = [k for k in range(4) if k not in kept]
        flat = x.transpose(*kept, *rest).reshape(*[x.shape[k] for k in kept], -1)
        want = softmax(np.ascontiguousarray(flat), return_lse=True, implementation=implementation)
        got = softmax(x, axes, return_lse=True, implementation=implementation)
        y = got.y.transpose(*kept, *rest).reshape(flat.shape)
        same(implementation, y, want.y)
        same(implementation, got.lse, want.lse)


def test_every_entry_is_a_row_without_axes(implementation: str) -> None:
    x = drawn(3, 5)
    np.testing.assert_array_equal(softmax(x, (), implementation=implementation), np.ones((3, 5)))
    np.testing.assert_allclose(logsumexp(x, (), implementation=implementation), x, rtol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2, (0, 2)])
def test_results_are_written_into_out_and_in_place(
    implementation: str, dtype: np.dtype[Any], axis: Any
) -> None:
    x = drawn(5, 7, 11, dtype=dtype)
    for function in (softmax, log_softmax):
        want = function(x, axis, sink=1.0, implementation=implementation)
        wider = np.full((5, 14, 11), 3, dtype)
        for out in (np.full_like(x, 3), x.copy(), np.asfortranarray(x), wider[:, ::2]):
            assert function(x, axis, sink=1.0, out=out, implementation=implementation) is out
            same(implementation, out, want)
            np.testing.assert_array_equal(wide(wider[:, 1::2]), 3)
        for own in (x.copy(), np.asfortranarray(x)):
            function(own, axis, sink=1.0, out=own, implementation=implementation)
            same(implementation, own, want)


@pytest.mark.parametrize(
    ("rows", "C"), [(1031, 4099), (4507, 997), (30_011, 151), (600_011, 7), (3, 1_500_007)]
)
def test_large_results_have_the_bits_of_their_rows(
    rows: int, C: int, setting: Callable[..., AbstractContextManager[None]]
) -> None:
    """Results of 16 MiB and more go past the caches, also to addresses that are not aligned."""
    from tilewise import _core

    x = drawn(rows, C, dtype=F32)
    few = [0, 1, rows // 2, rows - 1]
    wants = {
        f: np.stack([f(x[k], implementation="cpu") for k in few]) for f in (softmax, log_softmax)
    }
    off = np.empty(x.size + 5, np.float32)[5:].reshape(x.shape)
    for target in _core.targets():
        with setting(target, 1):
            for function, want in wants.items():
                for out in (off, x.copy()):
                    out[...] = x
                    function(out if out is not off else x, out=out, implementation="cpu")
                    assert out[few].tobytes() == want.tobytes(), target


def test_threads_and_targets_do_not_change_bits(
    setting: Callable[..., AbstractContextManager[None]],
) -> None:
    from tilewise import _core

    shapes = [(5, 131, 3)] * 4 + [(2, 70_001, 1)]
    for dtype, shape in zip([*DTYPES, F32], shapes, strict=True):
        x, rows = drawn(*shape, dtype=dtype), (shape[0], shape[2])
        options = {"where": rng(1).random(shape) > 0.2, "sink": drawn(*rows, dtype=dtype)}
        want = results(x, 1, **options, implementation="cpu")
        for target in _core.targets():
            for threads in (1, 3):
                with setting(target, threads):
                    got = results(x, 1, **options, implementation="cpu")
                for name in want:
                    assert got[name].tobytes() == want[name].tobytes(), (name, target, threads)


def test_numbers_beside_a_row_do_not_change_it(implementation: str) -> None:
    x = drawn(13, 17, 5, dtype=F32)
    whole = softmax(x, 1, implementation=implementation)
    for a in range(13):
        alone = softmax(x[a], 0, implementation=implementation)
        same(implementation, alone, whole[a])


def test_row_statistics_give_the_lse(implementation: str) -> None:
    x = drawn(3, 17, 5)
    by = {"temperature": 0.6, "implementation": implementation}
    r = softmax(x, 1, return_lse=True, return_stats=True, **by)
    assert isinstance(r.stats, SoftmaxStats)
    assert r.stats.m.shape == r.lse.shape == (3, 5)
    np.testing.assert_array_equal(r.stats.m, x.max(axis=1))
    np.testing.assert_allclose(r.stats.m / 0.6 + r.stats.log_l, r.lse, rtol=1e-14)
