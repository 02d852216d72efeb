"""The cross-entropy for NumPy arrays: result types, error texts, out."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tilewise as tw
from tilewise.numpy import (
    CrossEntropyResult,
    EntropyStats,
    cross_entropy,
    cross_entropy_jvp,
    cross_entropy_vjp,
    cross_entropy_vjp_jvp,
    log_softmax,
)

Array = NDArray[Any]
N, V = 5, 7
RNG = np.random.default_rng(0)
Z = RNG.standard_normal((N, V))
Z32 = Z.astype(np.float32)
Y = RNG.integers(0, V, N)
Q = RNG.random((N, V))


def test_values_are_those_of_the_log_softmax() -> None:
    log_y = log_softmax(Z)
    np.testing.assert_allclose(cross_entropy(Z, Y), -log_y[np.arange(N), Y].mean(), rtol=1e-14)
    np.testing.assert_allclose(cross_entropy(Z, Q), -(Q * log_y).sum() / N, rtol=1e-14)


def test_the_function_of_the_package_chooses_the_frontend() -> None:
    assert tw.cross_entropy(Z, Y, z_loss=0.1).tobytes() == cross_entropy(Z, Y, z_loss=0.1).tobytes()
    with pytest.raises(TypeError, match=r"logits must be a numpy\.ndarray, got list"):
        tw.cross_entropy([1.0, 2.0], Y)


def test_results_are_named_and_hold_what_was_asked_for() -> None:
    loss = cross_entropy(Z32, Y)
    assert isinstance(loss, np.ndarray) and loss.shape == () and loss.dtype == np.float32
    r = cross_entropy(Z32, Y, return_lse=True)
    assert isinstance(r, CrossEntropyResult) and r.z_loss is r.stats is None
    assert r.lse.shape == (N,)
    r = cross_entropy(Z.astype(np.float16), Y, return_stats=True, reduction="none")
    assert isinstance(r.stats, EntropyStats) and r.lse is None
    assert r.loss.shape == (N,) and r.loss.dtype == r.stats.m.dtype == np.float32
    r = cross_entropy(Z, Y, z_loss=0.5, return_z_loss=True)
    assert r.z_loss.shape == () and 0 < r.z_loss < r.loss


def test_derivatives_compute_the_statistics_that_they_are_not_given() -> None:
    options: dict[str, Any] = {"z_loss": 0.1, "label_smoothing": 0.2, "softcap": 5}
    stats = cross_entropy(Z, Q, return_stats=True, **options).stats
    for function, given in (
        (cross_entropy_vjp, (1.0, Z, Q)),
        (cross_entropy_jvp, (Z, Z, Q)),
        (cross_entropy_vjp_jvp, (1.0, Z, Z, Q)),
    ):
        a, b = function(*given, stats, **options), function(*given, **options)
        for x, y in zip(a, b, strict=True):
            assert x is y is None or x.tobytes() == y.tobytes()


def test_gradients_of_targets_are_those_of_probabilities() -> None:
    assert cross_entropy_vjp(1.0, Z, Y).dtargets is None
    assert cross_entropy_vjp(1.0, Z, Q).dtargets.shape == Q.shape
    narrow = cross_entropy_vjp(1.0, Z.astype(np.float16), Q.astype(np.float32))
    assert narrow.dlogits.dtype == np.float16 and narrow.dtargets.dtype == np.float32


def test_inputs_are_read_only_and_results_are_new() -> None:
    z, q = Z.copy(), Q.copy()
    z.flags.writeable = q.flags.writeable = False
    grads = cross_entropy_vjp(1.0, z, q)
    assert not np.shares_memory(grads.dlogits, z) and not np.shares_memory(grads.dtargets, q)


W = np.ones(V)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list": ({"logits": [1.0]}, TypeError, "logits must be a numpy.ndarray, got list"),
    "integers": (
        {"logits": np.ones((N, V), np.int32)},
        TypeError,
        "logits must have dtype float64, float32, bfloat16 or float16, got int32",
    ),
    "scalar": ({"logits": np.ones(())}, ValueError, "logits must have a dimension of classes"),
    "no classes": (
        {"logits": np.ones((N, 0))},
        ValueError,
        "logits must have at least one class, got (5, 0)",
    ),
    "axis": (
        {"class_axis": 2},
        ValueError,
        "class_axis must be from -2 to 1, for logits has 2 dimensions, got 2",
    ),
    "two axes": ({"class_axis": (0, 1)}, TypeError, "class_axis must be an integer, got tuple"),
    "axis of True": ({"class_axis": True}, TypeError, "class_axis must be an integer, got bool"),
    "list of targets": ({"targets": [1]}, TypeError, "targets must be a numpy.ndarray, got list"),
    "boolean targets": (
        {"targets": np.ones(N, np.bool_)},
        TypeError,
        "targets must hold class indices (integers) or class probabilities (floats), got bool",
    ),
    "index too large": (
        {"targets": np.where(np.arange(N) == 2, V, Y)},
        ValueError,
        "targets must be from 0 to 6 or ignore_index (-100), got 7",
    ),
    "negative index": (
        {"targets": np.full(N, -1), "ignore_index": -2},
        ValueError,
        "targets must be from 0 to 6 or ignore_index (-2), got -1",
    ),
    "huge index": (
        {"targets": np.full(N, 2**64 - 100, np.uint64)},
        ValueError,
        "targets must be from 0 to 6, got",
    ),
    "indices of another shape": (
        {"targets": Y[:3]},
        ValueError,
        "targets must have shape (5,) as class indices (from logits (5, 7), classes in axis 1), "
        "got (3,)",
    ),
    "probabilities of another shape": (
        {"targets": Q[:, :3]},
        ValueError,
        "targets must have shape (5, 7) as class probabilities",
    ),
    "probabilities of another dtype": (
        {"targets": Q.astype(np.float32)},
        TypeError,
        "targets must have dtype float64 (from logits), got float32",
    ),
    "weight of a list": ({"weight": [1.0]}, TypeError, "weight must be a numpy.ndarray, got list"),
    "weight of another size": (
        {"weight": W[:3]},
        ValueError,
        "weight must have shape (7,) (from the classes), got (3,)",
    ),
    "weight of another dtype": (
        {"weight": W.astype(np.float32)},
        TypeError,
        "weight must have dtype float64 (from logits), got float32",
    ),
    "infinite weight": ({"weight": W * math.inf}, ValueError, "weight must be finite, got inf"),
    "smoothing": (
        {"label_smoothing": 1.5},
        ValueError,
        "label_smoothing must be from 0 to 1, got 1.5",
    ),
    "z-loss": ({"z_loss": -1}, ValueError, "z_loss must be from 0 to 1e+06, got -1"),
    "z-loss of text": ({"z_loss": "1"}, TypeError, "z_loss must be a real number, got str"),
    "softcap": ({"softcap": 0}, ValueError, "softcap must be from 1e-15 to 1e+15, got 0"),
    "ignored index": (
        {"ignore_index": 1.0},
        TypeError,
        "ignore_index must be an integer, got float",
    ),
    "reduction": (
        {"reduction": "max"},
        ValueError,
        "reduction must be 'none', 'sum' or 'mean', got 'max'",
    ),
    "implementation": ({"implementation": "gpu"}, ValueError, "implementation must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_error_says_what_is_wrong(name: str) -> None:
    change, kind, text = BAD[name]
    with pytest.raises(kind) as caught:
        cross_entropy(**({"logits": Z, "targets": Y} | change))
    assert str(caught.value).startswith("cross_entropy: ")
    assert text in str(caught.value)


BAD_DERIVATIVES: dict[str, tuple[Any, str]] = {
    "dloss": (
        lambda: cross_entropy_vjp(np.ones(N), Z, Y),
        "dloss must have shape () (from the reduction), got (5,)",
    ),
    "dloss of rows": (
        lambda: cross_entropy_vjp(np.ones(3), Z, Y, reduction="none"),
        "dloss must have shape (5,) (from logits), got (3,)",
    ),
    "dtype": (
        lambda: cross_entropy_vjp(np.float32(1), Z, Y),
        "dloss must have dtype float64 (from logits), got float32",
    ),
    "narrow": (
        lambda: cross_entropy_vjp(None, Z.astype(np.float16), Y, dlse=np.ones(N)),
        "dlse must have dtype float32 (from logits of 16 bits), got float64",
    ),
    "tlogits": (
        lambda: cross_entropy_jvp(Z[0], Z, Y),
        "tlogits must have shape (5, 7) (from logits), got (7,)",
    ),
    "ttargets": (
        lambda: cross_entropy_jvp(Z, Z, Y, ttargets=Q),
        "ttargets must come with class probabilities, got indices",
    ),
    "stats": (lambda: cross_entropy_vjp(1.0, Z, Y, Z), "stats must be EntropyStats, got ndarray"),
    "size of stats": (
        lambda: cross_entropy_vjp(1.0, Z, Y, EntropyStats(*np.zeros((3, 2)))),
        "stats.m must have shape (5,) (from logits), got (2,)",
    ),
}


@pytest.mark.parametrize("name", BAD_DERIVATIVES)
def test_errors_of_derivatives(name: str) -> None:
    call, text = BAD_DERIVATIVES[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(f"cross_entropy: {text}")):
        call()


BAD_MEMORY = {
    "read-only": "out must be writable, got a read-only array",
    "a part": "out must be logits itself or not overlap it",
    "targets": "out must not overlap targets",
    "shape": "out must have shape (5, 7) (from logits), got (7, 5)",
}


@pytest.mark.parametrize("name", BAD_MEMORY)
def test_out_that_cannot_be_written_changes_nothing(name: str) -> None:
    buffer = np.random.default_rng(1).standard_normal((2 * N, V))
    before, z, targets = buffer.copy(), buffer[:N], Q
    out = {"read-only": Z.copy(), "a part": buffer[1 : N + 1], "shape": Z.T.copy()}.get(name)
    if name == "read-only":
        out.flags.writeable = False
    if name == "targets":
        out = targets = Q.copy()
    with pytest.raises(ValueError, match=re.escape(f"cross_entropy: {BAD_MEMORY[name]}")):
        cross_entropy_vjp(1.0, z, targets, out=out)
    np.testing.assert_array_equal(buffer, before)
    np.testing.assert_array_equal(targets, Q)


def test_unknown_options_are_refused_by_name() -> None:
    text = r"cross_entropy_vjp\(\) got an unexpected keyword argument 'axis'"
    with pytest.raises(TypeError, match=text):
        cross_entropy_vjp(1.0, Z, Y, axis=1)
