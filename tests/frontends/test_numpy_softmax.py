"""Softmax for NumPy arrays: agreement with SciPy's formulas, result types, error texts, out."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tilewise as tw
from tilewise.numpy import (
    LogSoftmaxResult,
    SoftmaxResult,
    SoftmaxStats,
    log_softmax,
    logsumexp,
    softmax,
    softmax_jvp,
    softmax_vjp,
    softmax_vjp_jvp,
)

Array = NDArray[Any]
A, C, I = 3, 7, 5
X = np.random.default_rng(0).standard_normal((A, C, I))
X32 = X.astype(np.float32)


@pytest.mark.parametrize("axis", [-1, 0, 1, (0, 2), (2, 0), [1, 2], None, np.int64(1)])
def test_values_are_those_of_the_textbook(axis: Any) -> None:
    axes = tuple(axis) if isinstance(axis, list) else axis
    e = np.exp(X)
    total = e.sum(axis=axes, keepdims=True)
    np.testing.assert_allclose(softmax(X, axis), e / total, rtol=1e-13)
    np.testing.assert_allclose(log_softmax(X, axis), X - np.log(total), rtol=1e-12, atol=1e-13)
    got = logsumexp(X, axis, keepdims=True)
    np.testing.assert_allclose(got, np.log(total), rtol=1e-13)
    assert got.shape == total.shape
    assert logsumexp(X, axis).shape == np.log(e.sum(axis=axes)).shape


def test_temperature_divides_and_a_sink_adds_to_the_denominator() -> None:
    e = np.exp(X / 2)
    total = e.sum(axis=1, keepdims=True) + math.exp(0.5)
    np.testing.assert_allclose(softmax(X, 1, temperature=2, sink=0.5), e / total, rtol=1e-13)
    np.testing.assert_allclose(logsumexp(X, 1, temperature=2, sink=0.5), np.log(total[:, 0]))


def test_functions_of_the_package_choose_the_frontend() -> None:
    assert tw.softmax(X, 1).tobytes() == softmax(X, 1).tobytes()
    assert tw.log_softmax(X, axis=0).tobytes() == log_softmax(X, 0).tobytes()
    assert tw.logsumexp(X).tobytes() == logsumexp(X).tobytes()
    with pytest.raises(TypeError, match=r"softmax: x must be a numpy\.ndarray, got list"):
        tw.softmax([1.0, 2.0])


def test_results_are_named() -> None:
    r = softmax(X32, 1, return_lse=True, return_stats=True)
    assert isinstance(r, SoftmaxResult)
    assert isinstance(r.stats, SoftmaxStats)
    assert r.lse.shape == r.stats.m.shape == (A, I)
    assert softmax(X32, 1, return_lse=True).stats is None
    log = log_softmax(X32, 1, return_stats=True)
    assert isinstance(log, LogSoftmaxResult) and log.lse is None
    assert isinstance(softmax(X32, 1), np.ndarray)


def test_derivatives_compute_the_statistics_that_they_are_not_given() -> None:
    stats = softmax(X, 1, temperature=0.5, return_stats=True).stats
    options = {"axis": 1, "temperature": 0.5}
    for function, given in (
        (softmax_vjp, (X, X)),
        (softmax_jvp, (X, X)),
        (softmax_vjp_jvp, (X, X, X)),
    ):
        with_stats, without = function(*given, stats, **options), function(*given, **options)
        for a, b in zip(with_stats, without, strict=True):
            assert a is b is None or a.tobytes() == b.tobytes()


def test_tangents_are_those_that_are_asked_for() -> None:
    assert softmax_jvp(X, X).tlog_y is None
    only = softmax_jvp(X, X, kinds="log_y")
    assert only.ty is None and only.tlse is None and only.tlog_y.shape == X.shape


@pytest.mark.parametrize("shape", [(), (1,), (A,), (A, 1), (1, I), (A, I)])
def test_gradient_of_a_sink_has_its_shape(shape: tuple[int, ...]) -> None:
    if shape == (A,):
        shape = (I,)
    sink, dy = np.ones(shape), np.cos(X)
    dsink = softmax_vjp(dy, X, axis=1, sink=sink).dsink
    full = softmax_vjp(dy, X, axis=1, sink=np.ones((A, I))).dsink
    assert dsink.shape == shape
    np.testing.assert_allclose(dsink.sum(), full.sum(), rtol=1e-12)
    assert softmax_vjp(dy, X, axis=1, sink=1.0).dsink is None


def test_inputs_are_read_only_and_results_are_new() -> None:
    x = X.copy()
    x.flags.writeable = False
    y = softmax(x, 1, where=np.True_ & (X > 0), sink=np.zeros(I))
    assert y.flags.owndata or y.base is not None
    assert not np.shares_memory(x, y)
    y[...] = 0
    np.testing.assert_array_equal(x, X)


def test_results_lie_in_memory_as_x_does() -> None:
    for view in (X, X.transpose(2, 0, 1), np.asfortranarray(X)):
        assert softmax(view, 1).strides == view.strides


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list": ({"x": [1.0]}, TypeError, "x must be a numpy.ndarray, got list"),
    "integers": (
        {"x": np.ones(3, np.int32)},
        TypeError,
        "x must have dtype float64, float32, bfloat16 or float16, got int32",
    ),
    "byte order": ({"x": X.astype(">f8")}, TypeError, "x must have native byte order"),
    "axis": (
        {"axis": 3},
        ValueError,
        "axis must be from -3 to 2, for x has 3 dimensions, got 3",
    ),
    "axis of text": ({"axis": "1"}, TypeError, "axis must be an integer or a tuple of integers"),
    "axis of True": ({"axis": True}, TypeError, "got bool"),
    "axis of 1.0": ({"axis": 1.0}, TypeError, "got float"),
    "axis twice": ({"axis": (1, -2)}, ValueError, "axis must have no axis twice, got (1, -2)"),
    "no temperature": ({"temperature": 0}, ValueError, "temperature must be > 0, got 0"),
    "cold": ({"temperature": -1.5}, ValueError, "temperature must be > 0, got -1.5"),
    "temperature of NaN": ({"temperature": math.nan}, ValueError, "must be > 0, got nan"),
    "too hot": ({"temperature": 1e16}, ValueError, "temperature must be from 1e-15 to 1e+15"),
    "temperature of text": (
        {"temperature": "1"},
        TypeError,
        "temperature must be a real number, got str",
    ),
    "where of numbers": ({"where": np.ones(I)}, TypeError, "where must have dtype bool"),
    "where of a list": ({"where": [True]}, TypeError, "where must be a boolean numpy.ndarray"),
    "where of another size": (
        {"where": np.ones(I + 1, np.bool_)},
        ValueError,
        "where must broadcast to the shape (3, 7, 5) of x, got (6,)",
    ),
    "where of another rank": ({"where": np.ones((1, *X.shape), np.bool_)}, ValueError, "broadcast"),
    "sink of text": ({"sink": "0"}, TypeError, "sink must be a number or an array, got str"),
    "sink of a bool": ({"sink": True}, TypeError, "sink must be a number or an array, got bool"),
    "infinite sink": ({"sink": math.inf}, ValueError, "sink must be finite or -inf, got inf"),
    "sinks with NaN": (
        {"sink": np.full(I, np.nan)},
        ValueError,
        "sink must be finite or -inf, got nan",
    ),
    "sinks of another dtype": (
        {"sink": np.ones(I, np.float32)},
        TypeError,
        "sink must have dtype float64 (from x), got float32",
    ),
    "sinks of another size": (
        {"sink": np.ones(C)},
        ValueError,
        "sink must broadcast to the shape (3, 5) of the rows, got (7,)",
    ),
    "out of another dtype": (
        {"out": np.empty_like(X32)},
        TypeError,
        "out must have dtype float64 (from x), got float32",
    ),
    "out of another shape": (
        {"out": np.empty((A, C))},
        ValueError,
        "out must have shape (3, 7, 5) (from x), got (3, 7)",
    ),
    "out of a list": ({"out": [1.0]}, TypeError, "out must be a numpy.ndarray, got list"),
    "implementation": ({"implementation": "gpu"}, ValueError, "implementation must be one of"),
}


@pytest.mark.parametrize("function", [softmax, log_softmax])
@pytest.mark.parametrize("name", BAD)
def test_error_says_what_is_wrong(name: str, function: Any) -> None:
    change, kind, text = BAD[name]
    with pytest.raises(kind) as caught:
        function(**({"x": X, "axis": 1} | change))
    assert str(caught.value).startswith(f"{function.__name__}: ")
    assert text in str(caught.value)


def test_errors_of_logsumexp_name_it() -> None:
    with pytest.raises(ValueError, match="logsumexp: temperature must be > 0, got 0"):
        logsumexp(X, temperature=0)


BAD_MEMORY = {
    "read-only": "out must be writable, got a read-only array",
    "a part of x": "out must be x itself or not overlap it",
    "x in another order": "out must be x itself or not overlap it",
    "itself": "out must not overlap itself",
    "sink": "out must not overlap sink",
    "where": "out must not overlap where",
}


@pytest.mark.parametrize("name", BAD_MEMORY)
def test_out_that_cannot_be_written_changes_nothing(name: str) -> None:
    buffer = np.random.default_rng(1).standard_normal((8, 7, 7))
    before, x, options = buffer.copy(), buffer[:7], {}
    if name == "read-only":
        out = np.zeros_like(x)
        out.flags.writeable = False
    elif name == "itself":
        zeros = np.zeros((7, 7))
        out = np.lib.stride_tricks.as_strided(zeros, x.shape, (0, *zeros.strides))
    elif name == "sink":
        out = np.zeros_like(x)
        options["sink"] = out[0]
    elif name == "where":
        out = np.zeros_like(x)
        options["where"] = out.view(np.bool_)[:, :, ::8]
    else:
        out = buffer[1:] if name == "a part of x" else x.swapaxes(1, 2)
    with pytest.raises(ValueError, match=re.escape(f"softmax: {BAD_MEMORY[name]}")):
        softmax(x, 1, out=out, **options)
    np.testing.assert_array_equal(buffer, before)


def test_out_between_the_columns_of_x_is_no_overlap() -> None:
    buffer = np.zeros((A, 2 * C, I))
    buffer[:, ::2] = X
    assert softmax(buffer[:, ::2], 1, out=buffer[:, 1::2]).base is buffer
    np.testing.assert_array_equal(buffer[:, ::2], X)
    np.testing.assert_array_equal(buffer[:, 1::2], softmax(X, 1))


BAD_DERIVATIVES: dict[str, tuple[Any, str]] = {
    "dy": (lambda: softmax_vjp(X[0], X), "dy must have shape (3, 7, 5) (from x), got (7, 5)"),
    "dtype": (lambda: softmax_vjp(X32, X), "dy must have dtype float64 (from x), got float32"),
    "dlse": (
        lambda: softmax_vjp(None, X, dlse=np.ones(C)),
        "dlse must have shape (3, 7) (from x), got (7,)",
    ),
    "stats": (lambda: softmax_vjp(X, X, X), "stats must be SoftmaxStats, got ndarray"),
    "size of stats": (
        lambda: softmax_vjp(X, X, softmax(X, 1, return_stats=True).stats),
        "stats.m must have shape (3, 7) (from x), got (3, 5)",
    ),
    "tsink": (
        lambda: softmax_jvp(X, X, tsink=np.ones(C), sink=1.0),
        "tsink must come with a sink that is an array",
    ),
    "shape of tsink": (
        lambda: softmax_jvp(X, X, tsink=np.ones((A, C)), sink=np.ones(C)),
        "tsink must have shape (7,) (from sink), got (3, 7)",
    ),
    "kinds": (lambda: softmax_jvp(X, X, kinds=("z",)), "kinds must be of 'y', 'log_y', 'lse'"),
    "narrow": (
        lambda: softmax_vjp(None, X.astype(np.float16), dlse=np.ones((A, C), np.float16)),
        "dlse must have dtype float32 (from x of 16 bits), got float16",
    ),
}


@pytest.mark.parametrize("name", BAD_DERIVATIVES)
def test_errors_of_derivatives(name: str) -> None:
    call, text = BAD_DERIVATIVES[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(f"softmax: {text}")):
        call()


def test_unknown_options_are_refused_by_name() -> None:
    with pytest.raises(
        TypeError, match=r"softmax_vjp\(\) got an unexpected keyword argument 'dim'"
    ):
        softmax_vjp(X, X, dim=1)
