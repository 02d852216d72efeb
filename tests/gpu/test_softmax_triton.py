"""The Triton kernels of the softmax against the reference, interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import tilewise.numpy as twn
from tilewise.base.dtypes import unit_roundoff
from tilewise.base.errors import Unsupported
from tilewise.ops.softmax.gpu import launch, plan
from tilewise.shared import row_tiles
from tilewise.verify.device import on_arrays

Array = NDArray[Any]
F64, F32 = np.dtype(np.float64), np.dtype(np.float32)
BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
NAN, INF = np.nan, np.inf
TRITON: Any = on_arrays("softmax", "triton")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill all memory that kernels are to write with NaN before they do."""
    monkeypatch.setattr(launch, "empty", lambda shape, like: like.new_full(shape, NAN))
    yield


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut rows into parts of 16 entries."""
    monkeypatch.setattr(plan, "ENTRIES", dict.fromkeys(plan.ENTRIES, 16))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def drawn(*shape: int, dtype: Any = F64, spread: float = 3.0, seed: int = 0) -> Array:
    return np.asarray(spread * rng(seed).standard_normal(shape)).astype(dtype)


def results(x: Array, by: Any, axis: Any = -1, *, log: bool = False, **options: Any) -> Any:
    """Everything of one kind that there is to compute of an array."""
    options |= {"axis": axis, "implementation": by}
    function = twn.log_softmax if log else twn.softmax
    r = function(x, return_lse=True, return_stats=True, **options)
    sink = options.get("sink")
    dy, tx, tdy = (drawn(*x.shape, dtype=x.dtype, spread=1, seed=s) for s in (1, 2, 3))
    dlse, tdlse = (drawn(*r.lse.shape, dtype=r.lse.dtype, spread=1, seed=s) for s in (4, 5))
    tsink = None
    if isinstance(sink, np.ndarray):
        tsink = drawn(*sink.shape, dtype=sink.dtype, seed=6)
    name = "dlog_y" if log else "dy"
    given = {"dlse": dlse} | ({"dlog_y": dy} if log else {})
    first = None if log else dy
    grads = twn.softmax_vjp(first, x, r.stats, **given, **options)
    kinds = ("log_y" if log else "y", "lse")
    moved = twn.softmax_jvp(tx, x, r.stats, tsink=tsink, kinds=kinds, **options)
    more = {"tsink": tsink, "tdlse": tdlse, f"t{name}": tdy}
    again = twn.softmax_vjp_jvp(first, tx, x, r.stats, **given, **more, **options)
    found = {"y": r[0], "lse": r.lse, "dx": grads.dx, "dsink": grads.dsink}
    found |= {f"t{name}": value for name, value in zip(("y", "log", "lse"), moved, strict=True)}
    found |= {"tdx": again.dx, "tdsink": again.dsink}
    return {name: value for name, value in found.items() if value is not None}


def close(got: dict[str, Array], want: dict[str, Array], dtype: np.dtype[Any]) -> None:
    """Compare all results; each relative to the largest of its own kind."""
    assert got.keys() == want.keys()
    u = unit_roundoff(dtype)
    rtol = 8 * u if dtype in (BF16, F16) else 2000 * u
    for name in got:
        a, b = (x.astype(np.float64) for x in (got[name], want[name]))
        assert got[name].dtype == want[name].dtype and a.shape == b.shape, name
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b), name)
        size = np.abs(b[np.isfinite(b)]).max(initial=0.0)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * size, err_msg=name)


def agrees(x: Array, axis: Any = -1, *, log: bool = False, **options: Any) -> None:
    got, want = (results(x, by, axis, log=log, **options) for by in (TRITON, "reference"))
    close(got, want, x.dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.3},
    "where": {"where": rng(1).random((5, 7, 11)) > 0.4},
    "where of rows": {"where": rng(1).random((7, 1)) > 0.4},
    "one number as sink": {"sink": 1.5},
    "sinks": {"sink": drawn(5, 7)},
    "sinks of some rows": {"sink": np.where(rng(2).random((5, 7)) > 0.5, -INF, 1.0)},
    "everything": {"temperature": 2.5, "where": rng(4).random((5, 1, 11)) > 0.6, "sink": drawn(7)},
}


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("name", OPTIONS)
def test_option_with_every_derivative(name: str, log: bool) -> None:
    agrees(drawn(5, 7, 11), log=log, **OPTIONS[name])


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_dtype_with_every_derivative(dtype: np.dtype[Any], log: bool) -> None:
    options = OPTIONS["everything"] | {"sink": drawn(7, dtype=dtype)}
    agrees(drawn(5, 7, 11, dtype=dtype), log=log, **options)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_rows_in_parts_with_every_derivative(
    log: bool, short_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three parts, of which two are merged at a time."""
    monkeypatch.setattr(row_tiles, "MERGED_PARTS", 2)
    options = OPTIONS["everything"] | {"where": rng(4).random(37) > 0.6}
    agrees(drawn(5, 7, 37), log=log, **options)


def test_logsumexp_needs_no_softmax() -> None:
    x, sink = drawn(5, 37), drawn(5)
    a, b = (twn.logsumexp(x, -1, sink=sink, implementation=by) for by in (TRITON, "reference"))
    np.testing.assert_allclose(a, b, rtol=1e-14)


LAYOUTS = {
    "first axis": (drawn(13, 5, 3), 0),
    "middle axis": (drawn(5, 13, 3), 1),
    "many rows side by side": (drawn(3, 11, 37), 1),
    "two axes": (drawn(3, 5, 7), (1, 2)),
    "all axes": (drawn(3, 5), None),
    "transposed": (drawn(13, 17).T, 0),
    "every other entry": (drawn(5, 26)[:, ::2], -1),
    "every other row": (drawn(10, 13)[1::2], -1),
    "one entry": (drawn(5, 1), -1),
    "one row": (drawn(17), -1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_with_every_derivative(name: str) -> None:
    x, axis = LAYOUTS[name]
    agrees(x, axis)


@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (0, 0)])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    agrees(np.zeros(shape))
    if shape[0]:
        agrees(np.zeros(shape), sink=drawn(shape[0]))


def test_in_place() -> None:
    x = drawn(5, 37, 3)
    want = twn.softmax(x, 1, implementation="reference")
    got = twn.softmax(x, 1, out=x, implementation=TRITON)
    assert got is x
    np.testing.assert_allclose(x, want, rtol=1e-13)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_a_hidden_nan_reaches_nothing(log: bool) -> None:
    x, where = drawn(7, 37), rng(1).random((7, 37)) > 0.5
    where[3] = False
    spoiled = np.where(where, x, NAN)
    a, b = (results(array, TRITON, log=log, where=where) for array in (x, spoiled))
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name
    assert not a["dx"][3].any() and not a["tdx"][3].any() and a["lse"][3] == -INF


def test_hidden_cotangents_and_tangents_reach_nothing() -> None:
    x, where = drawn(5, 19), rng(1).random((5, 19)) > 0.5
    where[2] = False
    t = drawn(5, 19, seed=1)
    rows = np.where(where.any(axis=1), 1.0, NAN)
    options = {"where": where, "implementation": TRITON}
    found = [
        (
            twn.softmax_vjp(c, x, dlse=rows, **options).dx,
            twn.softmax_vjp_jvp(c, c, x, tdy=c, dlse=rows, tdlse=rows, **options).dx,
            *twn.softmax_jvp(c, x, **options)[::2],
        )
        for c in (np.where(where, t, NAN), np.where(where, t, 0))
    ]
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
def test_rare_values_stay_in_their_rows(parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if parts:
        monkeypatch.setattr(plan, "ENTRIES", dict.fromkeys(plan.ENTRIES, 16))
    x = drawn(11, 31)
    x[1, 3], x[2], x[4, 30] = NAN, NAN, INF
    x[5], x[6, 17], x[7] = INF, -INF, -INF
    x[9, 2:4] = INF, NAN
    for log in (False, not parts):
        agrees(x, log=log)


@pytest.mark.parametrize("fill", [np.finfo(F32).min, -1e9, -INF], ids=str)
def test_rows_that_a_mask_filled(fill: float) -> None:
    """They are uniform, and so are their gradients; of -inf they are empty."""
    x = drawn(3, 23, dtype=F32)
    x[1] = fill
    agrees(x)
    y = twn.softmax(x, implementation=TRITON)
    np.testing.assert_allclose(y[1], 0 if fill == -INF else 1 / 23, rtol=1e-6)


def test_bits_of_a_row_do_not_depend_on_the_others(short_tiles: None) -> None:
    x, where = drawn(13, 29, dtype=F32), rng(1).random((13, 29)) > 0.3
    whole = twn.softmax(x, where=where, implementation=TRITON)
    part = twn.softmax(x[5:9], where=where[5:9], implementation=TRITON)
    assert whole[5:9].tobytes() == part.tobytes()


def test_absent_cotangents_and_tangents_are_zero() -> None:
    x, sink = drawn(3, 13), drawn(3)
    options = {"sink": sink, "implementation": TRITON}
    zeros = np.zeros_like(x)
    a = twn.softmax_vjp_jvp(zeros, x, x, tdy=zeros, tsink=sink, **options)
    b = twn.softmax_vjp_jvp(None, x, x, tsink=sink, **options)
    for of_zeros, of_none in zip(a, b, strict=True):
        np.testing.assert_array_equal(of_zeros, of_none)
    assert not any(np.any(t) for t in twn.softmax_jvp(None, x, **options) if t is not None)


def test_both_kinds_at_once_are_two_calls() -> None:
    x = drawn(3, 13)
    with pytest.raises(Unsupported, match=r"softmax: .*y and log_y are two calls"):
        twn.softmax_vjp(x, x, dlog_y=x, implementation=TRITON)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_planned_compilations_name_every_argument_once(arch: str) -> None:
    planned = list(plan.planned(arch))
    assert len({one.name for one in planned}) == len(planned)
    for one in planned:
        given = [*one.signature, *one.constants]
        assert sorted(given) == sorted(one.kernel.arg_names), one.name
        assert one.divisible <= one.signature.keys(), one.name
