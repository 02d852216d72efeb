"""The linear map in JAX: values, derivatives, error texts."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import tilewise as tw  # noqa: E402
import tilewise.jax as tj  # noqa: E402
from tilewise.base.dtypes import unit_roundoff  # noqa: E402

RNG = np.random.default_rng(13)
X, W, B = (RNG.normal(size=shape) for shape in ((2, 5, 7), (3, 7), (3,)))


@pytest.fixture(autouse=True, scope="module")
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_values_are_within_their_bound(dtype: str) -> None:
    x, w, b = (jnp.asarray(a, dtype) for a in (X, W, B))
    for bias in (None, b):
        y = jax.jit(tj.linear)(x, w, bias)
        exact = np.float64(x) @ np.float64(w).T + (0 if bias is None else np.float64(bias))
        assert y.dtype == x.dtype
        limit = 4 * unit_roundoff(y.dtype) * (np.abs(np.float64(x)) @ np.abs(np.float64(w)).T + 2)
        assert (np.abs(np.float64(y) - exact) <= limit).all()
    one = np.float64(tw.linear(x[1, 2], w, b))
    assert (np.abs(one - exact[1, 2]) <= limit[1, 2]).all()


def test_derivatives_agree_with_differences() -> None:
    check_grads(tj.linear, (X, W, B), order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ((3.0, W), TypeError, "x must be a jax.Array, got float"),
        ((X, W.astype("f")), TypeError, "w must have dtype float64 (from x), got float32"),
        ((X, W, B.astype("f")), TypeError, "bias must have dtype float64 (from x), got float32"),
        ((X, W[:, :2]), ValueError, "w must have shape"),
        ((X, W, B[:2]), ValueError, "bias must have shape"),
    ],
)
def test_errors_name_operator_argument_must_and_got(
    given: tuple[Any, ...], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=re.escape(f"linear: {text}")):
        tj.linear(*given)
