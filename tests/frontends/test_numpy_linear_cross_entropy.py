"""Linear cross-entropy for NumPy arrays: shapes, result types, statistics, parts, error texts."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import tilewise as tw
from tilewise.numpy import (
    LinearCrossEntropyResult,
    LossGrads,
    LossState,
    LossStats,
    LossTangents,
    linear_cross_entropy,
    linear_cross_entropy_jvp,
    linear_cross_entropy_shard,
    linear_cross_entropy_shard_vjp,
    linear_cross_entropy_vjp,
    linear_cross_entropy_vjp_jvp,
    merge_shards,
)

Array = NDArray[Any]
C, V = 5, 11
RNG = np.random.default_rng(0)
H, W, B = RNG.standard_normal((2, 7, C)), RNG.standard_normal((V, C)), RNG.standard_normal(V)
Y = RNG.integers(0, V, (2, 7))
Y[1, 3] = -100


def test_shapes_and_dtypes_are_those_of_the_inputs() -> None:
    for dtype in (np.float64, np.float32, np.float16, np.dtype(ml_dtypes.bfloat16)):
        h, w, b = (x.astype(dtype) for x in (H, W, B))
        sums = np.float32 if h.itemsize == 2 else h.dtype
        asked = dict.fromkeys(
            [f"return_{n}" for n in ("lse", "entropy", "argmax", "z_loss", "stats", "grads")], True
        )
        r = linear_cross_entropy(h, w, Y, bias=b, shift=2, z_loss=0.1, **asked)
        assert isinstance(r, LinearCrossEntropyResult)
        assert r.loss.shape == r.z_loss.shape == () and r.loss.dtype == sums
        assert r.lse.shape == r.entropy.shape == r.argmax.shape == (2, 5)
        assert r.lse.dtype == r.entropy.dtype == sums and r.argmax.dtype == np.int64
        assert isinstance(r.stats, LossStats) and r.stats.m.shape == (2, 7)
        assert isinstance(r.grads, LossGrads)
        for grad, x in zip(r.grads, (h, w, b), strict=True):
            assert grad.shape == x.shape and grad.dtype == x.dtype
    assert isinstance(linear_cross_entropy(H, W, Y), np.ndarray)
    assert linear_cross_entropy(H, W, Y, reduction="none").shape == (2, 7)
    assert linear_cross_entropy(H, W, Y, return_grads=True).grads.dbias is None


def test_the_function_of_the_package_chooses_the_frontend() -> None:
    want = linear_cross_entropy(H, W, Y, bias=B)
    assert tw.linear_cross_entropy(H, W, Y, bias=B).tobytes() == want.tobytes()
    with pytest.raises(TypeError, match=r"hidden must be a numpy\.ndarray, got list"):
        tw.linear_cross_entropy([1.0], W, Y)


def test_leading_dimensions_strides_and_targets_of_any_integer() -> None:
    want = linear_cross_entropy(H, W, Y, reduction="none")
    flat = linear_cross_entropy(H.reshape(14, C), W, Y.reshape(14), reduction="none")
    assert flat.tobytes() == want.tobytes()
    for h, w in ((np.asfortranarray(H), W), (H, np.asfortranarray(W)), (H, W[::-1][::-1])):
        assert linear_cross_entropy(h, w, Y, reduction="none").tobytes() == want.tobytes()
    for dtype in (np.int8, np.int16, np.int32):
        got = linear_cross_entropy(H, W, Y.astype(dtype), reduction="none")
        assert got.tobytes() == want.tobytes()
    one = linear_cross_entropy(H[0, 0], W, np.array(Y[0, 0]), reduction="none")
    assert one.shape == () and one == want[0, 0]
    unsigned = linear_cross_entropy(H, W, np.abs(Y).astype(np.uint8), ignore_index=100)
    assert unsigned == linear_cross_entropy(H, W, Y)


def test_a_shift_beyond_the_end_leaves_no_target() -> None:
    r = linear_cross_entropy(H, W, Y, shift=9, return_lse=True, return_grads=True)
    assert r.loss == 0 and r.lse.shape == (2, 0) and not r.grads.dweight.any()
    assert linear_cross_entropy(H, W, Y, shift=9, reduction="none").shape == (2, 0)


@pytest.mark.parametrize("shift", [0, 2])
def test_derivatives_compute_the_statistics_that_they_are_not_given(shift: int) -> None:
    options = {"bias": B, "label_smoothing": 0.1, "shift": shift}
    stats = linear_cross_entropy(H, W, Y, return_stats=True, **options).stats
    for function, given in (
        (linear_cross_entropy_vjp, (1.5, H, W, Y)),
        (linear_cross_entropy_jvp, (H, H, W, Y)),
        (linear_cross_entropy_vjp_jvp, (1.5, H, H, W, Y)),
    ):
        a, b = function(*given, stats, **options), function(*given, **options)
        for x, y in zip(a, b, strict=True):
            assert (x is None and y is None) or x.tobytes() == y.tobytes()
    assert isinstance(linear_cross_entropy_jvp(H, H, W, Y), LossTangents)


def test_a_cotangent_may_be_a_number_or_an_array() -> None:
    want = linear_cross_entropy_vjp(2.0, H, W, Y).dweight
    for dloss in (np.float64(2), np.array(2.0), 2):
        assert linear_cross_entropy_vjp(dloss, H, W, Y).dweight.tobytes() == want.tobytes()


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "hidden of a list": ({"hidden": [1.0]}, TypeError, "hidden must be a numpy.ndarray, got list"),
    "hidden of integers": (
        {"hidden": Y},
        TypeError,
        "hidden must have dtype float64, float32, bfloat16 or float16, got int64",
    ),
    "hidden without a dimension": (
        {"hidden": np.array(1.0)},
        ValueError,
        "hidden must have shape (..., C), got ()",
    ),
    "weight of another width": (
        {"weight": W[:, :2]},
        ValueError,
        "weight must have shape (V, C) with C=5 (from hidden), got (11, 2)",
    ),
    "weight without a class": (
        {"weight": W[:0]},
        ValueError,
        "weight must have shape (V, C) with 1 <= V",
    ),
    "weight of another dtype": (
        {"weight": W.astype(np.float32)},
        TypeError,
        "weight must have dtype float64 (from hidden), got float32",
    ),
    "bias of another size": ({"bias": B[1:]}, ValueError, "bias must have shape (V,) with V=11"),
    "targets of a list": ({"targets": [1]}, TypeError, "targets must be a numpy.ndarray, got list"),
    "targets of bool": (
        {"targets": Y > 0},
        TypeError,
        "targets must have an integer dtype up to int64, got bool",
    ),
    "targets of uint64": (
        {"targets": Y.astype(np.uint64)},
        TypeError,
        "targets must have an integer dtype up to int64, got uint64",
    ),
    "targets of another shape": (
        {"targets": Y[0]},
        ValueError,
        "targets must have shape (2, 7) (from hidden), got (7,)",
    ),
    "probabilities": (
        {"targets": np.ones((2, 7, V))},
        tw.Unsupported,
        "targets that are class probabilities would be as large as the logits",
    ),
    "a target that is no class": (
        {"targets": np.full((2, 7), V)},
        ValueError,
        "targets must be from 0 to 10, or ignore_index=-100, got 11",
    ),
    "class weights of infinity": (
        {"class_weight": np.full(V, np.inf)},
        ValueError,
        "class_weight must be finite, got inf",
    ),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum'"),
    "shift of one token": (
        {"hidden": H[0, 0], "targets": np.array(1), "shift": 1},
        ValueError,
        "shift must be 0, for targets has no dimension, got 1",
    ),
    "shift of a half": ({"shift": 0.5}, TypeError, "shift must be an integer, got float"),
    "gradients of each token": (
        {"return_grads": True, "reduction": "none"},
        ValueError,
        'return_grads must be False with reduction="none"',
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_error_says_what_is_wrong(name: str) -> None:
    change, kind, text = BAD[name]
    with pytest.raises(kind, match=re.escape(text)) as caught:
        linear_cross_entropy(**({"hidden": H, "weight": W, "targets": Y} | change))
    assert str(caught.value).startswith("linear_cross_entropy: ")


STATS = LossStats(np.zeros((2, 7)), np.zeros((2, 7)))
BAD_VJP: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dloss": ({"dloss": np.ones(3)}, ValueError, "dloss must have shape () (from reduction)"),
    "dloss of each token": (
        {"dloss": np.ones(3), "reduction": "none"},
        ValueError,
        "dloss must have shape (2, 7) (from targets), got (3,)",
    ),
    "dlse": (
        {"dlse": np.ones((2, 7)), "shift": 1},
        ValueError,
        "dlse must have shape (2, 6) (from targets), got (2, 7)",
    ),
    "dlse of another dtype": (
        {"dlse": np.ones((2, 7), np.float32)},
        TypeError,
        "dlse must have dtype float64 (from hidden), got float32",
    ),
    "stats": ({"stats": (1, 2)}, TypeError, "stats must be LossStats, got tuple"),
    "stats of another shape": (
        {"stats": STATS._replace(m=np.zeros(14))},
        ValueError,
        "stats.m must have shape (2, 7) (from hidden), got (14,)",
    ),
}


@pytest.mark.parametrize("name", BAD_VJP)
def test_error_of_a_derivative_says_what_is_wrong(name: str) -> None:
    change, kind, text = BAD_VJP[name]
    given = {"dloss": np.array(1.0), "hidden": H, "weight": W, "targets": Y}
    with pytest.raises(kind, match=re.escape(text)):
        linear_cross_entropy_vjp(**(given | change))


def test_errors_of_tangents_and_options() -> None:
    with pytest.raises(ValueError, match="tbias must come with bias, got none"):
        linear_cross_entropy_jvp(None, H, W, Y, tbias=B)
    with pytest.raises(ValueError, match=r"tweight must have shape \(11, 5\) \(from weight\)"):
        linear_cross_entropy_jvp(None, H, W, Y, tweight=W[1:])
    for function in (linear_cross_entropy_vjp, linear_cross_entropy_jvp):
        with pytest.raises(TypeError, match="unexpected keyword argument 'cap'"):
            function(None, H, W, Y, cap=1.0)


def test_errors_of_parts_of_the_classes() -> None:
    at = {"first_class": 0, "classes": V}
    state = linear_cross_entropy_shard(H, W, Y, **at)
    assert isinstance(state, LossState) and state.m.shape == state.mass.shape == Y.shape
    with pytest.raises(ValueError, match=r"classes must be at least 14 \(first_class \+ V\)"):
        linear_cross_entropy_shard(H, W, Y, first_class=3, classes=V)
    with pytest.raises(ValueError, match="targets must be from 0 to 11"):
        linear_cross_entropy_shard(H, W, Y + 20, first_class=0, classes=12)
    with pytest.raises(TypeError, match="unexpected keyword argument 'shift'"):
        linear_cross_entropy_shard(H, W, Y, shift=1, **at)
    with pytest.raises(ValueError, match="merge_shards: states must have at least one part"):
        merge_shards([], Y)
    with pytest.raises(TypeError, match=r"states\[0\] must be a LossState, got tuple"):
        merge_shards([(1, 2)], Y)
    with pytest.raises(ValueError, match=r"states\[0\]\.m must have shape \(7,\) \(from targets\)"):
        merge_shards([state], Y[0])
    with pytest.raises(TypeError, match="merged must be a MergedLoss, got LossState"):
        linear_cross_entropy_shard_vjp(None, H, W, Y, state, **at)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_a_part_of_absent_classes_changes_nothing(implementation: str) -> None:
    """As the part that holds what pads a vocabulary, in which a bias hides every class."""
    bias, by = np.where(np.arange(V) < 7, B, -np.inf), {"implementation": implementation}
    want = linear_cross_entropy(H, W[:7], Y % 7, bias=B[:7], reduction="none", **by)
    at = [{"first_class": a, "bias": bias[a:b], "classes": V, **by} for a, b in ((0, 7), (7, V))]
    states = [
        linear_cross_entropy_shard(H, w, Y % 7, **where)
        for w, where in zip((W[:7], W[7:]), at, strict=True)
    ]
    merged = merge_shards(states, Y % 7)
    np.testing.assert_allclose(merged.loss, want, rtol=1e-13)
    assert (merge_shards(states[1:], Y % 7).lse == -np.inf).all()
    grads = linear_cross_entropy_shard_vjp(np.ones_like(want), H, W[7:], Y % 7, merged, **at[1])
    assert not any(grad.any() for grad in grads)


def test_the_reference_gives_a_token_without_classes_no_loss() -> None:
    given = {"bias": np.full(V, -np.inf), "implementation": "reference", "z_loss": 0.1}
    asked = {"reduction": "none", "label_smoothing": 0.1, **given}
    r = linear_cross_entropy(H, W, Y, return_lse=True, return_entropy=True, **asked)
    assert not r.loss.any() and not r.entropy.any() and (r.lse == -np.inf).all()
    ones = np.ones_like(r.loss)
    grads = linear_cross_entropy_vjp(ones, H, W, Y, dlse=ones, dentropy=ones, **asked)
    moved = linear_cross_entropy_jvp(H, H, W, Y, **asked)
    again = linear_cross_entropy_vjp_jvp(ones, H, H, W, Y, dlse=ones, **asked)
    for zero in (*grads, *again, moved.tloss, moved.tlse):
        assert not zero.any()


def test_a_class_that_is_absent_and_counts_nothing_is_no_part_of_smoothing() -> None:
    made = np.random.default_rng(5)
    hidden, weight = made.standard_normal((3, 5)), made.standard_normal((131, 5))
    bias, class_weight = np.zeros(131), made.uniform(0.5, 1, 131)
    bias[[2, 70, 130]], class_weight[[2, 70, 130]] = -np.inf, 0
    given = {"bias": bias, "class_weight": class_weight, "label_smoothing": 0.3}
    losses = [
        linear_cross_entropy(hidden, weight, np.array([1, 5, 129]), implementation=name, **given)
        for name in ("cpu", "reference")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-12)
