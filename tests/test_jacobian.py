"""Jacobians as operators: products against differences, structure, rank, null space, SciPy."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewise as tw
from tilewise import jacobian
from tilewise.jacobian import Jacobian

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 3))
W = RNG.standard_normal((7, 3))
Q, K, V = (RNG.standard_normal(s) for s in ((2, 4, 3, 5), (2, 2, 6, 5), (2, 2, 6, 7)))
SINKS = RNG.standard_normal(4)
SEEN = RNG.random(X.shape) > 0.3
SEEN[0, :, 1] = False
SEEN[1, :, 0] = [False, True, False, False, False]
BNHD = tuple(x.swapaxes(1, 2).copy() for x in (Q, K, V))


def of_attention(wrt: str, q: Any = Q, k: Any = K, v: Any = V, **options: Any) -> Any:
    """An operator and the function whose Jacobian it is, with the point."""
    tensors = {"q": q, "k": k, "v": v}

    def function(x: Any) -> Any:
        return tw.attention(**{**tensors, wrt: x}, **options)

    return jacobian.attention(q, k, v, wrt=wrt, **options), function, tensors[wrt]  # type: ignore[arg-type]


def of_softmax(axis: Any = -1, x: Any = X, **options: Any) -> Any:
    return (
        jacobian.softmax(x, axis, **options),
        lambda x: tw.softmax(x, axis, **options),
        x,
    )


CASES: dict[str, Callable[[], Any]] = {
    "softmax": of_softmax,
    "softmax of columns": lambda: of_softmax(1, temperature=0.7),
    "softmax of two axes": lambda: of_softmax((0, 2)),
    "softmax of all": lambda: of_softmax(None),
    "softmax where": lambda: of_softmax(1, where=SEEN),
    "softmax with a sink": lambda: of_softmax(1, sink=0.5),
    "softmax with sinks": lambda: of_softmax(1, sink=X[:, 0], where=SEEN, temperature=2.0),
    "linear x": lambda: (jacobian.linear(X, W), lambda x: tw.linear(x, W), X),
    "linear w": lambda: (jacobian.linear(X, W, wrt="w"), lambda w: tw.linear(X, w), W),
    "linear of one row": lambda: (jacobian.linear(X[0, 0], W), lambda x: tw.linear(x, W), X[0, 0]),
    "attention q": lambda: of_attention("q"),
    "attention k": lambda: of_attention("k"),
    "attention v": lambda: of_attention("v"),
    "attention q with options": lambda: of_attention(
        "q", mask=tw.causal(), softcap=2.0, sinks=SINKS
    ),
    "attention k with options": lambda: of_attention("k", mask=tw.window(2, 0), softmax_scale=0.3),
    "attention v with dropout": lambda: of_attention("v", dropout_p=0.3, seed=7),
    "attention q in bnhd": lambda: of_attention("q", *BNHD, layout="bnhd"),
    "attention k in bnhd": lambda: of_attention("k", *BNHD, layout="bnhd"),
}


def differences(function: Any, x: Any) -> Any:
    """The Jacobian by central differences."""
    columns, h = [], 1e-6
    for j in range(x.size):
        step = np.zeros(x.size)
        step[j] = h
        step = step.reshape(x.shape)
        columns.append((function(x + step) - function(x - step)).reshape(-1) / (2 * h))
    return np.stack(columns, axis=1)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Any:
    operator, function, x = CASES[request.param]()
    return operator, differences(function, x)


def close(a: Any, b: Any, tolerance: float = 1e-11) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_dense_matrix_is_that_of_differences(case: Any) -> None:
    operator, dense = case
    assert operator.shape == dense.shape
    close(operator.to_dense(), dense, 1e-7)


def test_products_from_both_sides_are_those_of_the_dense_matrix(case: Any) -> None:
    operator, _ = case
    dense, rng = operator.to_dense(), np.random.default_rng(1)
    t, g = (rng.standard_normal((n, 3)) for n in operator.shape[::-1])
    close(operator.matmat(t), dense @ t)
    close(operator.rmatmat(g), dense.T @ g)
    close(operator.matvec(t[:, 0]), dense @ t[:, 0])
    close(operator.rmatvec(g[:, :1]), dense.T @ g[:, :1])
    close(operator @ t, dense @ t)
    close(operator.T @ g[:, 1], dense.T @ g[:, 1])
    shaped = operator.matvec(t[:, 0].reshape(operator.inputs.shape))
    assert shaped.shape == operator.outputs.shape
    close(shaped.reshape(-1), dense @ t[:, 0])


def test_transpose(case: Any) -> None:
    operator, _ = case
    close(operator.T.to_dense(), operator.to_dense().T)
    assert operator.T.shape == operator.shape[::-1]
    assert operator.T.T is operator and operator.H.rank() == operator.rank()
    assert "transposed" in repr(operator.T)


def test_structure_holds(case: Any) -> None:
    operator, _ = case
    s, blocks = operator.structure, operator.blocks()
    assert blocks.shape == (s.blocks, *s.block_shape)
    assert tuple(s.blocks * n for n in s.block_shape) == operator.shape
    assert np.count_nonzero(operator.to_dense()) == np.count_nonzero(blocks)
    if s.equal:
        assert (blocks == blocks[:1]).all()
    if s.kind == "diagonal + rank one":
        for block in blocks:
            visible = np.diag(block) != 0
            rest = block[np.ix_(visible, visible)]
            rest = rest - np.diag(np.diag(rest))
            # -p p^T beside the diagonal: every 2 x 2 minor that avoids it is zero.
            for i, j, k, l in [(0, 1, 2, 3), (0, 2, 1, 4)] if len(rest) > 4 else []:
                close(rest[i, j] * rest[k, l], rest[i, l] * rest[k, j])


def test_rank_and_null_space_are_those_of_the_dense_matrix(case: Any) -> None:
    operator, dense = case
    assert operator.rank() == np.linalg.matrix_rank(dense, tol=1e-8)
    basis = operator.nullspace()
    assert basis.shape == (operator.shape[1], operator.shape[1] - operator.rank())
    close(basis.T @ basis, np.eye(basis.shape[1]))
    close(operator.matmat(basis), 0)


def test_every_formula_of_the_null_space_of_a_row() -> None:
    operator = jacobian.softmax(X[0, :, 0])
    assert operator.rank() == 4
    close(operator.nullspace(), np.full((5, 1), 1 / math.sqrt(5)))
    assert jacobian.softmax(X[0, :, 0], sink=0.0).rank() == 5
    far = jacobian.softmax(np.array([0.0, 1.0, -1e4, -np.inf]))  # p = 0 twice
    assert far.rank() == 1
    half = math.sqrt(0.5)
    close(far.nullspace(), [[half, 0, 0], [half, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert jacobian.softmax(np.array([0.0, 1.0]), sink=-1e5).rank() == 1  # its share is 0
    assert jacobian.softmax(np.array([3.0])).rank() == 0
    assert jacobian.softmax(np.array([-np.inf, -np.inf])).rank() == 0


def test_empty_operators() -> None:
    for operator in (
        jacobian.softmax(np.zeros((3, 0))),
        jacobian.linear(np.zeros((0, 3)), W),
        jacobian.attention(Q[:, :, :0], K, V),
    ):
        assert operator.rank() == 0
        assert operator.to_dense().shape == operator.shape
        assert operator.nullspace().shape == (operator.shape[1],) * 2


def test_bytes_count_what_is_held() -> None:
    operator = jacobian.linear(X, W)
    assert operator.bytes_implicit == W.nbytes
    assert operator.bytes_dense == operator.to_dense().nbytes == 10 * 7 * 10 * 3 * 8
    assert jacobian.linear(X, W, wrt="w").bytes_implicit == X.nbytes
    row = X[0, :, 0].copy()
    assert jacobian.softmax(row).bytes_implicit == row.nbytes + 2 * 8
    large = jacobian.softmax(np.zeros(200_000, np.float32))
    assert large.bytes_dense == 160_000_000_000 and large.bytes_implicit < 1_000_000
    assert "160.0 GB dense, 800.0 kB implicit" in repr(large)


def test_repr_says_what_it_is() -> None:
    text = repr(jacobian.softmax(X, 1, temperature=2.0))
    assert text.startswith("<Jacobian of softmax with respect to x: 30 x 30, float64; 6 blocks of")
    assert "(diag(p) - p p^T) / 2 (diagonal + rank one)" in text


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_other_dtypes(dtype: Any) -> None:
    x, w = X.astype(dtype), W.astype(dtype)
    q, k, v = (a.astype(dtype) for a in (Q, K, V))
    made = [jacobian.softmax(x), jacobian.linear(x, w), jacobian.attention(q, k, v, wrt="k")]
    exact = [jacobian.softmax(X), jacobian.linear(X, W), jacobian.attention(Q, K, V, wrt="k")]
    for operator, truth in zip(made, exact, strict=True):
        dense = operator.to_dense()
        assert dense.dtype == operator.dtype == dtype
        close(dense.astype(float), truth.to_dense(), 1e-5 if dtype == np.float32 else 0.05)
        assert operator.matvec(np.ones(operator.shape[1])).dtype == dtype


def singular(operator: Jacobian, count: int) -> Any:
    from scipy.sparse.linalg import svds

    start = np.random.default_rng(0).standard_normal(min(operator.shape))
    found = svds(operator.as_linear_operator(), k=count, return_singular_vectors=False, v0=start)
    return np.sort(found)[::-1]


def test_scipy_finds_eigenvalues_and_singular_values() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    operator = jacobian.softmax(3 * X[0, :, 0])
    wrapped = operator.as_linear_operator()
    assert wrapped.shape == operator.shape and wrapped.dtype == operator.dtype
    top = linalg.eigs(wrapped, k=2, return_eigenvectors=False)
    close(np.sort(top.real)[::-1], np.linalg.eigvalsh(operator.to_dense())[::-1][:2], 1e-9)
    for other in (jacobian.linear(X, W), jacobian.attention(Q, K, V, wrt="k")):
        want = np.linalg.svd(other.to_dense(), compute_uv=False)
        close(singular(other, 3), want[:3], 1e-9)
    close(wrapped.T @ np.arange(5.0), operator.to_dense().T @ np.arange(5.0))
    narrow = jacobian.softmax(X.astype(np.float16))
    with pytest.raises(TypeError, match="float32 or float64 for SciPy, got float16"):
        narrow.as_linear_operator()


def test_without_scipy_all_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    operator = jacobian.softmax(X)
    assert operator.rank() == 20
    with pytest.raises(ImportError):
        operator.as_linear_operator()


def test_errors_name_the_argument() -> None:
    operator = jacobian.softmax(np.zeros(100))
    wrong: list[tuple[Any, str]] = [
        (lambda: operator.matvec(np.zeros(99)), "t must have shape (100,) or (100,), got (99,)"),
        (lambda: operator.rmatmat(np.zeros(100)), "g must have shape (100, K), got (100,)"),
        (lambda: operator.matvec([0.0]), "t must be a real numpy.ndarray, got list"),
        (lambda: operator.matvec(np.zeros(100, complex)), "numpy.ndarray, got complex128"),
        (lambda: operator.to_dense(max_bytes=79_999), "max_bytes must be at least 80000"),
        (lambda: operator.nullspace(max_bytes=8), "max_bytes must be at least 800"),
        (lambda: jacobian.linear(X, W, wrt="y"), "wrt must be 'x' or 'w', got 'y'"),  # type: ignore[arg-type]
        (lambda: jacobian.attention(Q, K, V, wrt="o"), "wrt must be 'q', 'k' or 'v'"),  # type: ignore[arg-type]
        (lambda: jacobian.softmax(np.array([np.nan, 1])).rank(), "be finite for a rank"),
        (lambda: jacobian.linear(np.full((2, 3), np.inf), W, wrt="w").rank(), "be finite"),
    ]
    for call, text in wrong:
        with pytest.raises((TypeError, ValueError)) as raised:
            call()
        assert text in str(raised.value)


def test_the_memory_of_a_product_does_not_grow_with_the_matrix() -> None:
    import tracemalloc

    operator = jacobian.softmax(np.zeros(300_000, np.float32))
    t = np.ones(300_000, np.float32)
    tracemalloc.start()
    operator.matvec(t)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * t.nbytes
