"""Losses under the names of Optax, beside its own where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402

import tilewise.jax as tj  # noqa: E402

A, B, V = 3, 5, 7
RNG = np.random.default_rng(17)
LOGITS = RNG.normal(size=(A, B, V))
LABELS = RNG.dirichlet(np.ones(V), (A, B))
CLASSES = RNG.integers(V, size=(A, B))
SEEN = RNG.random((A, B, V)) < 0.7
np.put_along_axis(SEEN, CLASSES[..., None], True, 2)
ROWS = RNG.random((A, B)) < 0.6
MANY = "softmax_cross_entropy"
ONE = "softmax_cross_entropy_with_integer_labels"


@pytest.fixture(autouse=True, scope="module")
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "classes": (ONE, (LOGITS, CLASSES), {}),
    "another axis": (ONE, (LOGITS.transpose(2, 0, 1), CLASSES), {"axis": 0}),
    "two axes": (ONE, (LOGITS, 5 * CLASSES[:, 0]), {"axis": (1, 2)}),
    "two axes in another order": (ONE, (LOGITS, 5 * CLASSES[:, 0]), {"axis": (-1, 1)}),
    "some classes": (ONE, (LOGITS, CLASSES), {"where": SEEN}),
    "some rows": (ONE, (LOGITS, CLASSES), {"where": ROWS}),
    "probabilities": (MANY, (LOGITS, LABELS), {}),
    "probabilities that repeat": (MANY, (LOGITS, LABELS[0, 0]), {}),
    "probabilities along two axes": (MANY, (LOGITS, LABELS), {"axis": (0, 2)}),
    "probabilities of everything": (MANY, (LOGITS, LABELS), {"axis": None}),
    "one hot integers": (MANY, (LOGITS, np.eye(V, dtype=np.int32)[CLASSES]), {}),
    "probabilities of some classes": (MANY, (LOGITS, LABELS), {"where": SEEN}),
    "probabilities of some rows": (MANY, (LOGITS, LABELS), {"where": ROWS}),
}


def slopes(f: Callable[..., Any], x: tuple[Any, ...]) -> Any:
    """Losses and their gradients by what is real."""
    real = tuple(i for i, a in enumerate(x) if a.dtype.kind == "f")
    loss = lambda *x: jnp.sum(jnp.sin(f(*x)))  # noqa: E731
    return jax.jit(lambda *x: (f(*x), jax.grad(loss, real)(*x)))(*x)


@pytest.mark.parametrize("case", CALLS)
def test_losses_and_gradients_are_those_of_optax(case: str) -> None:
    optax = pytest.importorskip("optax", reason="Optax is not installed")
    name, x, options = CALLS[case]
    ours, theirs = (slopes(partial(getattr(m, name), **options), x) for m in (tj, optax))
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # Gradients by hidden labels are NaN in Optax: 0 times -inf.
        np.testing.assert_allclose(got, np.nan_to_num(want), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [ONE, MANY])
def test_what_is_hidden_reaches_nothing(name: str) -> None:
    labels = CLASSES if name == ONE else LABELS
    for where in (ROWS, SEEN):
        hidden = ~(where if where.ndim == 3 else where[..., None])
        found = [
            slopes(partial(getattr(tj, name), labels=labels, where=where), (x,))
            for x in (LOGITS, np.where(hidden, np.nan, LOGITS))
        ]
        for plain, poisoned in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_array_equal(plain, poisoned)
        assert (np.asarray(found[0][0])[~ROWS] == 0).all() or where is SEEN


def test_losses_of_16_bits_are_float32() -> None:
    x = jnp.asarray(LOGITS, jnp.bfloat16)
    assert tj.softmax_cross_entropy_with_integer_labels(x, CLASSES).dtype == jnp.float32
    assert tj.softmax_cross_entropy(x, LABELS.astype(np.float32)).dtype == jnp.float32


ERRORS: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "kind": (ONE, {"logits": 1.0}, TypeError, "logits must be a jax.Array, got float"),
    "axis": (MANY, {"axis": 3}, ValueError, "axis must be from -3 to 2"),
    "labels": (ONE, {"labels": CLASSES[1:]}, ValueError, "labels must have shape (3, 5) (from"),
    "kind of labels": (ONE, {"labels": LABELS}, TypeError, "labels must be an array of integers"),
    "shape of probabilities": (
        MANY,
        {"labels": LABELS[1:]},
        ValueError,
        "labels must broadcast to the shape (3, 5, 7) of logits, got (2, 5, 7)",
    ),
    "kind of where": (ONE, {"where": 1.0 * ROWS}, TypeError, "where must be a boolean array, got"),
    "where": (
        MANY,
        {"where": ROWS[1:]},
        ValueError,
        "where must broadcast to the shape (3, 5) of the rows, got (2, 5)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_operator_argument_must_and_got(case: str) -> None:
    name, changes, kind, text = ERRORS[case]
    given = {"logits": LOGITS, "labels": CLASSES if name == ONE else LABELS} | changes
    with pytest.raises(kind) as caught:
        getattr(tj, name)(**given)
    assert str(caught.value).startswith(f"{name}: {text}")
