"""Softmax rows whose columns lie far apart have the bits of rows one after another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tilewise.numpy import (
    log_softmax,
    logsumexp,
    softmax,
    softmax_jvp,
    softmax_vjp,
    softmax_vjp_jvp,
)

pytest.importorskip("tilewise._core")

Array = NDArray[Any]
Setting = Callable[..., AbstractContextManager[None]]
F64 = np.dtype(np.float64)
F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
BY = {"implementation": "cpu"}


def rows_of(shape: tuple[int, ...], dtype: np.dtype[Any], seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def inside(x: Array) -> Array:
    """`(A, I, C)` with the rows' columns as the middle dimension of the memory, C far apart."""
    return np.ascontiguousarray(x.swapaxes(1, 2))


def everything(
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    lies: Callable[[Array], Array],
    axis: int,
    back: Callable[[Array], Array],
    *,
    hidden: bool,
    learned: bool,
    spoiled: tuple[float, ...] = (),
) -> dict[str, Array]:
    """All results of `(A, I, C)` rows that lie in some other way, turned back.

    Args:
        shape: A, I and C.
        dtype: of x.
        lies: ``(A, I, C) array -> the array as it lies``.
        axis: which of its axes is that of the columns.
        back: the other way.
        hidden: whether a mask hides some entries.
        learned: whether each row has a sink.
        spoiled: values of x in some entries of the first rows.
    """
    A, I, C = shape
    wide = F32 if dtype.itemsize == 2 else dtype
    x = rows_of(shape, dtype, 0)
    for k, value in enumerate(spoiled):
        x[0, k % I, (7 * k) % C] = value
    x[A - 1, I - 1] = -np.inf  # a row without entries
    options: dict[str, Any] = {"axis": axis, "temperature": 0.7, **BY}
    if hidden:
        options["where"] = lies(np.random.default_rng(9).random(shape) > 0.3)
    tsink = None
    if learned:
        options["sink"], tsink = rows_of((A, I), dtype, 10), rows_of((A, I), dtype, 11)
        options["sink"][0, 0] = -np.inf
    dy, dlog_y, tx, tdy, tdlog_y = (lies(rows_of(shape, dtype, k)) for k in range(1, 6))
    dlse, tdlse = (rows_of((A, I), wide, k) for k in (6, 7))
    x = lies(x)
    r = softmax(x, return_lse=True, return_stats=True, **options)
    grads = softmax_vjp(dy, x, r.stats, dlog_y=dlog_y, dlse=dlse, **options)
    plain = softmax_vjp(dy, x, r.stats, **options)
    moved = softmax_jvp(tx, x, r.stats, tsink=tsink, kinds=("y", "log_y", "lse"), **options)
    again = softmax_vjp_jvp(
        dy, tx, x, r.stats, dlog_y=dlog_y, dlse=dlse, tsink=tsink, tdy=tdy, tdlog_y=tdlog_y,
        tdlse=tdlse, **options,
    )  # fmt: skip
    whole = {
        "y": r.y, "log_y": log_softmax(x, **options), "dx": grads.dx, "dx of dy": plain.dx,
        "ty": moved.ty, "tlog_y": moved.tlog_y, "tdx": again.dx,
    }  # fmt: skip
    numbers = {
        "lse": r.lse, "logsumexp": logsumexp(x, **options), "m": r.stats.m,
        "log_l": r.stats.log_l, "tlse": moved.tlse, "dsink": grads.dsink, "tdsink": again.dsink,
    }  # fmt: skip
    found = {name: np.ascontiguousarray(back(value)) for name, value in whole.items()}
    return found | {name: value for name, value in numbers.items() if value is not None}


def as_it_is(x: Array) -> Array:
    return x


LAYOUTS: dict[str, tuple[Callable[[Array], Array], int, Callable[[Array], Array]]] = {
    "columns in the middle": (inside, 1, lambda y: y.swapaxes(1, 2)),
    "columns of every second row": (
        lambda x: np.repeat(inside(x), 2, axis=2)[:, :, ::2],
        1,
        lambda y: y.swapaxes(1, 2),
    ),
    "rows outside lie closer": (
        lambda x: np.ascontiguousarray(x.transpose(2, 1, 0)).transpose(2, 1, 0),
        2,
        as_it_is,
    ),
    "from the end": (
        lambda x: inside(x[:, ::-1, ::-1])[:, ::-1, ::-1],
        1,
        lambda y: y.swapaxes(1, 2),
    ),
}


def compare(shape: tuple[int, int, int], dtype: np.dtype[Any], layout: str, **options: Any) -> None:
    lies, axis, back = LAYOUTS[layout]
    want = everything(shape, dtype, as_it_is, 2, as_it_is, **options)
    got = everything(shape, dtype, lies, axis, back, **options)
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == want[name].dtype and value.shape == want[name].shape, name
        assert value.tobytes() == want[name].tobytes(), name


@pytest.mark.parametrize("hidden", [False, True], ids=["all seen", "hidden"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_rows_side_by_side_have_the_bits_of_rows(
    dtype: np.dtype[Any], layout: str, hidden: bool
) -> None:
    compare((3, 89, 131), dtype, layout, hidden=hidden, learned=not hidden)


@pytest.mark.parametrize("C", [1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 2047, 2049, 4219])
def test_rows_of_any_length_have_the_bits_of_rows(C: int) -> None:
    compare((2, 19, C), F32, "columns in the middle", hidden=False, learned=True)


@pytest.mark.parametrize("I", [2, 3, 8, 15, 16, 17, 31, 32, 64, 67, 128])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_any_number_of_rows_side_by_side(dtype: np.dtype[Any], I: int) -> None:
    compare((3, I, 23), dtype, "columns in the middle", hidden=I % 2 == 1, learned=False)


def test_targets_and_threads_do_not_reach_the_bits(setting: Setting) -> None:
    from tilewise import _core

    for dtype, shape in ((F32, (2, 37, 71)), (F64, (2, 37, 71)), (F32, (1, 5, 33_333))):
        for target in _core.targets():
            for threads in (1, 3):
                with setting(target, threads):
                    compare(shape, dtype, "columns in the middle", hidden=False, learned=True)


def test_rows_too_long_to_be_kept_have_the_bits_of_rows() -> None:
    for hidden in (False, True):
        compare((1, 67, 16_411), F32, "columns in the middle", hidden=hidden, learned=not hidden)


def test_rare_values_have_the_bits_of_rows() -> None:
    """A NaN is a NaN in both, whatever its sign."""
    spoiled = (np.nan, np.inf, -np.inf, -0.0, 0.0, 3e38, -3e38, 1e-42)
    lies, axis, back = LAYOUTS["columns in the middle"]
    options: dict[str, Any] = {"hidden": False, "learned": True, "spoiled": spoiled}
    want = everything((2, 23, 41), F32, as_it_is, 2, as_it_is, **options)
    got = everything((2, 23, 41), F32, lies, axis, back, **options)
    for name, value in got.items():
        clear = [np.where(np.isnan(v), np.float32(1), v).tobytes() for v in (value, want[name])]
        assert clear[0] == clear[1], name
        np.testing.assert_array_equal(np.isnan(value), np.isnan(want[name]), name)


@pytest.mark.parametrize("start", [0, 5])
def test_large_results_have_the_bits_of_rows(start: int) -> None:
    """They go past the caches where every line of memory is whole."""
    A, C, I = 1, 1031, 4160
    memory = np.full(A * C * I + start + 16, 3, np.float32)
    first = -memory.ctypes.data % 64 // 4 + start
    out = memory[first : first + A * C * I].reshape(A, C, I)
    x = rows_of((A, C, I), F32, 0)
    few = [0, 1, 63, 64, I - 65, I - 1]
    rows = np.ascontiguousarray(x[0][:, few].T)
    for function in (softmax, log_softmax):
        function(x, 1, out=out, **BY)
        assert np.ascontiguousarray(out[0][:, few].T).tobytes() == function(rows, **BY).tobytes()
        assert (memory[:first] == 3).all() and (memory[first + A * C * I :] == 3).all()


def test_results_in_place_are_those_beside() -> None:
    for shape in ((3, 131, 71), (1, 16_411, 19)):
        x = rows_of(shape, F32, 0)
        for function in (softmax, log_softmax):
            want, own = function(x, 1, **BY), x.copy()
            function(own, 1, out=own, **BY)
            assert own.tobytes() == want.tobytes()
