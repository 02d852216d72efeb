"""The cross-entropy in JAX: values, every transformation, error texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import tilewise as tw  # noqa: E402
import tilewise.jax as tj  # noqa: E402

T, V = 5, 7
RNG = np.random.default_rng(9)
LOGITS, WEIGHT = RNG.normal(size=(T, V)), RNG.uniform(0.5, 2.0, size=V)
CLASSES = np.array([3, 0, -100, 6, 3])
PROBABILITIES = RNG.dirichlet(np.ones(V), T)
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "sum, z-loss": {"reduction": "sum", "z_loss": 0.3},
    "rows, smoothing, weights": {
        "reduction": "none",
        "label_smoothing": 0.1,
        "weight": WEIGHT,
    },
    "everything": {"label_smoothing": 0.1, "weight": WEIGHT, "z_loss": 0.3, "softcap": 2.0},
}


@pytest.fixture(autouse=True, scope="module")
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def textbook(
    logits: Any,
    q: Any = None,
    *,
    label_smoothing: float = 0.0,
    weight: Any = 1.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> tuple[Any, Any]:
    """The same mathematics in jax.numpy; without q for the class indices."""
    s = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    kept = jnp.ones(T, bool) if q is not None else CLASSES >= 0
    hot = jax.nn.one_hot(jnp.maximum(CLASSES, 0), V, dtype=s.dtype) if q is None else q
    t = weight * ((1 - label_smoothing) * hot + label_smoothing / V)
    lse = jnp.log(jnp.exp(s).sum(1))
    rows = jnp.where(kept, (t * (lse[:, None] - s)).sum(1) + z_loss * lse**2, 0.0)
    count = T if q is not None else jnp.where(kept, (weight * hot).sum(1), 0.0).sum()
    loss = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / count}[reduction]
    return loss, lse


def door(logits: Any, q: Any = None, **options: Any) -> tuple[Any, Any]:
    targets = CLASSES if q is None else q
    found = tj.cross_entropy(logits, targets, return_lse=True, **options)
    return found.loss, found.lse


def scalar(f: Callable[..., Any], *x: Any) -> Any:
    return sum(jnp.sum(jnp.sin(2 * a)) for a in f(*x))


def along(x: Any, phase: float) -> Any:
    return jax.tree.map(lambda a: jnp.cos(3 * jnp.asarray(a) + phase), x)


def every(f: Callable[..., Any], x: tuple[Any, ...]) -> dict[str, Any]:
    """What all transformations make of a function."""
    every_x = tuple(range(len(x)))
    grad = jax.grad(partial(scalar, f), every_x)
    slope = lambda *y: jax.jvp(partial(scalar, f), y, along(x, 1))[1]  # noqa: E731
    logits, *rest = x
    return {
        "value": f(*x),
        "grad": grad(*x),
        "jvp": jax.jvp(f, x, along(x, 1)),
        "forward over reverse": jax.jvp(grad, x, along(x, 1))[1],
        "reverse over forward": jax.grad(slope, every_x)(*x),
        "reverse over reverse": jax.grad(
            lambda *y: sum(map(jnp.vdot, grad(*y), along(x, 1))), every_x
        )(*x),
        "forward over forward": jax.jvp(lambda *x: jax.jvp(f, x, along(x, 1)), x, along(x, 2))[1],
        "vmap": jax.vmap(lambda logits: grad(logits, *rest), -1)(jnp.stack([logits, -logits], -1)),
        "checkpoint": jax.grad(partial(scalar, jax.checkpoint(f)))(*x),
    }


def quickly(f: Callable[..., Any], x: tuple[Any, ...]) -> Any:
    """Run a compiled function on which XLA has spent little time."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(f).lower(x).compile(options)(x)


BOTH = (LOGITS, PROBABILITIES)
CASES = [*((option, (LOGITS,)) for option in OPTIONS)]
CASES += [(option, BOTH) for option in ("rows, smoothing, weights", "everything")]


@pytest.mark.parametrize(("option", "x"), CASES)
def test_every_transformation_agrees_with_the_textbook(option: str, x: tuple[Any, ...]) -> None:
    found = quickly(partial(every, partial(door, **OPTIONS[option])), x)
    wanted = quickly(partial(every, partial(textbook, **OPTIONS[option])), x)
    for transformation in found:
        pairs = (jax.tree.leaves(values[transformation]) for values in (found, wanted))
        for got, want in zip(*pairs, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9, err_msg=transformation)


def test_derivatives_agree_with_differences() -> None:
    f = jax.jit(lambda logits, q: door(logits, q, **OPTIONS["everything"]))
    check_grads(f, (LOGITS, PROBABILITIES), order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_results_have_the_bits_of_numpy(dtype: str) -> None:
    logits = RNG.normal(size=(2, V, 3)).astype(jnp.dtype(dtype))
    targets = RNG.integers(V, size=(2, 3))
    for bits in (False, True) if dtype != "float64" else (True,):
        with jax.enable_x64(bits):
            f = partial(tj.cross_entropy, class_axis=1, reduction="none", return_z_loss=True)
            got = jax.jit(f)(logits, targets)
            want = tw.numpy.cross_entropy(
                logits, targets, class_axis=1, reduction="none", return_z_loss=True
            )
            for a, b in zip(got, want, strict=False):
                if b is not None:
                    np.testing.assert_array_equal(a, b)
                    assert a.dtype == b.dtype


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int64, np.uint64])
def test_an_index_that_does_not_fit_does_not_become_another(dtype: Any) -> None:
    """Nor does JAX warn that it cuts 64 bits to 32."""
    logits, classes = LOGITS.astype(np.float32), np.arange(T).astype(dtype)
    with jax.enable_x64(False):
        want = tj.cross_entropy(logits, jnp.arange(T))
        assert tj.cross_entropy(logits, classes) == want
        classes[0] = np.iinfo(dtype).max - 99  # cut to 32 bits the index that is ignored
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="targets must"):
            jax.block_until_ready(tj.cross_entropy(logits, classes))


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "kind": (lambda: tj.cross_entropy(3.0, CLASSES), TypeError, "logits must be a jax.Array"),
    "targets": (
        lambda: tj.cross_entropy(LOGITS, CLASSES[:3]),
        ValueError,
        "targets must have shape (5,) as class indices",
    ),
    "kind of targets": (
        lambda: tj.cross_entropy(LOGITS, np.ones((T, V), bool)),
        TypeError,
        "targets must hold class indices (integers) or class probabilities (floats), got bool",
    ),
    "weight": (
        lambda: tj.cross_entropy(LOGITS, CLASSES, weight=WEIGHT[:3]),
        ValueError,
        "weight must have shape (7,) (from the classes), got (3,)",
    ),
    "reduction": (
        lambda: tj.cross_entropy(LOGITS, CLASSES, reduction="all"),  # type: ignore[call-overload]
        ValueError,
        "reduction must be 'none', 'sum' or 'mean', got 'all'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_operator_argument_must_and_got(case: str) -> None:
    call, kind, text = ERRORS[case]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value).startswith(f"cross_entropy: {text}")


def test_a_class_out_of_range_is_found_when_the_program_runs() -> None:
    with pytest.raises(
        (jax.errors.JaxRuntimeError, ValueError), match="targets must be from 0 to 6"
    ):
        jax.block_until_ready(jax.jit(tj.cross_entropy)(LOGITS, np.full(T, V)))
