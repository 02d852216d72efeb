"""Softmax, log-softmax and log-sum-exp in JAX: values, every transformation, error texts."""

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

A, C, I = 2, 5, 3
NAMES = ("softmax", "log_softmax", "logsumexp")
RNG = np.random.default_rng(3)
X, SINK = RNG.normal(size=(A, C, I)), RNG.normal(size=(A, 1))
SEEN = RNG.random((A, C, I)) < 0.6
SEEN[1, :, 2] = False  # a row without entries
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "temperature, where": {"temperature": 0.4, "where": SEEN},
    "sink of one number": {"sink": 0.5},
    "everything": {"temperature": 1.5, "where": SEEN[:, :, :1], "sink": SINK},
}


@pytest.fixture(autouse=True, scope="module")
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def textbook(
    name: str, x: Any, sink: Any = None, *, where: Any = True, temperature: float = 1.0
) -> Any:
    """The same mathematics in jax.numpy, along axis 1, with 0 for the logarithm of 0."""
    s = x / temperature
    w = jnp.where(where, jnp.exp(s), 0.0)
    l = w.sum(1) if sink is None else w.sum(1) + jnp.exp(sink)
    some = l > 0
    lse = jnp.log(jnp.where(some, l, 1.0))
    log_y = jnp.where(jnp.logical_and(where, some[:, None]), s - lse[:, None], 0.0)
    y = w / jnp.where(some, l, 1.0)[:, None]
    return {"softmax": (y, lse), "log_softmax": (log_y, lse), "logsumexp": lse}[name]


def door(name: str, x: Any, sink: Any = None, **options: Any) -> Any:
    """The function under test, with 0 for the logarithm of 0."""
    more = {} if name == "logsumexp" else {"return_lse": True}
    found = getattr(tj, name)(x, 1, sink=sink, **options, **more)
    found = found if name == "logsumexp" else tuple(found)
    return jax.tree.map(lambda a: jnp.where(jnp.isneginf(a), 0.0, a), found)


def loss(f: Callable[..., Any], *x: Any) -> Any:
    return sum(jnp.sum(jnp.sin(2 * a)) for a in jax.tree.leaves(f(*x)))


def along(x: Any, phase: float) -> Any:
    return jax.tree.map(lambda a: jnp.cos(3 * jnp.asarray(a) + phase), x)


def every(f: Callable[..., Any], x: tuple[Any, ...]) -> dict[str, Any]:
    """What all transformations make of a function."""
    grad = jax.grad(partial(loss, f), tuple(range(len(x))))
    slope = lambda *y: jax.jvp(partial(loss, f), y, along(x, 1))[1]  # noqa: E731
    return {
        "value": f(*x),
        "grad": grad(*x),
        "jvp": jax.jvp(f, x, along(x, 1)),
        "forward over reverse": jax.jvp(grad, x, along(x, 1))[1],
        "reverse over forward": jax.grad(slope, tuple(range(len(x))))(*x),
        "reverse over reverse": jax.grad(
            lambda *y: sum(map(jnp.vdot, grad(*y), along(x, 1))), tuple(range(len(x)))
        )(*x),
        "forward over forward": jax.jvp(lambda *x: jax.jvp(f, x, along(x, 1)), x, along(x, 2))[1],
        "vmap": jax.vmap(grad, (-1, *[None] * (len(x) - 1)))(jnp.stack([x[0], -x[0]], -1), *x[1:]),
        "checkpoint": jax.grad(partial(loss, jax.checkpoint(f)))(*x),
    }


def quickly(f: Callable[..., Any], x: tuple[Any, ...]) -> Any:
    """Run a compiled function on which XLA has spent little time."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(f).lower(x).compile(options)(x)


CASES = [("logsumexp", "nothing"), *((name, "everything") for name in NAMES)]
CASES += [("softmax", option) for option in OPTIONS if option != "everything"]


@pytest.mark.parametrize(("name", "option"), CASES)
def test_every_transformation_agrees_with_the_textbook(name: str, option: str) -> None:
    options = {k: v for k, v in OPTIONS[option].items() if k != "sink"}
    sink = OPTIONS[option].get("sink")
    x = (X,) if sink is None else (X, np.broadcast_to(sink, (A, I)))
    found = quickly(partial(every, partial(door, name, **options)), x)
    wanted = quickly(partial(every, partial(textbook, name, **options)), x)
    for transformation in found:
        pairs = (jax.tree.leaves(values[transformation]) for values in (found, wanted))
        for got, want in zip(*pairs, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9, err_msg=transformation)


@pytest.mark.parametrize("name", ["softmax"])
def test_derivatives_agree_with_differences(name: str) -> None:
    f = jax.jit(lambda x, sink: door(name, x, sink, where=SEEN, temperature=1.5))
    check_grads(f, (X, SINK), order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("axis", [0, -1, (0, 2), None])
def test_results_have_the_bits_of_numpy(axis: Any, dtype: str) -> None:
    x = X.astype(jnp.dtype(dtype))
    for name in NAMES:
        got = np.asarray(jax.jit(partial(getattr(tj, name), axis=axis))(x))
        want = getattr(tw.numpy, name)(x, axis)
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sink_that_is_a_traced_number_of_python_fits_every_dtype(dtype: str) -> None:
    x = jnp.asarray(X, dtype)
    f = lambda z: jnp.sum(tj.softmax(x, 1, sink=z)[0, 0].astype(jnp.float32))  # noqa: E731
    value, slope = jax.jit(jax.value_and_grad(f))(0.5)
    assert value == f(0.5) and slope < 0 and slope.dtype == jnp.float64


def test_sums_keep_their_axes_on_request() -> None:
    assert tj.logsumexp(X, (0, 2), keepdims=True).shape == (1, C, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_derivative_keeps_the_input_and_two_numbers_a_row(name: str) -> None:
    """Not the result, which no derivative reads; so a sum of it needs no memory for it."""
    f = lambda x: getattr(tj, name)(x, 1)  # noqa: E731
    x = jnp.asarray(X)
    for transformed in (jax.vjp, jax.linearize):
        held = jax.tree.leaves(transformed(f, x)[1])
        assert sorted(a.size for a in held) == [A * I, A * I, A * C * I]
    found = jax.jvp(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))), (x,), (x,))[1]
    assert found.shape == x.shape


def test_jit_splits_rows_and_gathers_columns() -> None:
    mesh = jax.make_mesh((2,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    x = RNG.normal(size=(4, 6))
    for axes in (("b",), (None, "b")):
        spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        np.testing.assert_array_equal(
            jax.jit(tj.softmax)(jax.device_put(x, spec)), tw.numpy.softmax(x, -1)
        )


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "kind": (lambda: tj.softmax([1.0]), TypeError, "softmax: x must be a jax.Array, got list"),
    "dtype": (
        lambda: tj.softmax(np.arange(3)),
        TypeError,
        "softmax: x must have dtype float64, float32, bfloat16 or float16, got int64",
    ),
    "axis": (lambda: tj.log_softmax(X, 3), ValueError, "log_softmax: axis must be from -3 to 2"),
    "where": (
        lambda: tj.softmax(X, where=SEEN[:, :, :2]),
        ValueError,
        "softmax: where must broadcast to the shape (2, 5, 3) of x, got (2, 5, 2)",
    ),
    "dtype of where": (
        lambda: tj.softmax(X, where=np.ones(3)),
        TypeError,
        "softmax: where must have dtype bool, got float64",
    ),
    "sink": (
        lambda: tj.logsumexp(X, 1, sink=np.zeros(7)),
        ValueError,
        "logsumexp: sink must broadcast to the shape (2, 3) of the rows, got (7,)",
    ),
    "number for a sink": (
        lambda: jax.eval_shape(partial(tj.softmax, sink=np.inf), X),
        ValueError,
        "softmax: sink must be finite or -inf, got inf",
    ),
    "temperature": (
        lambda: tj.softmax(X, temperature=0),
        ValueError,
        "softmax: temperature must be > 0, got 0",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_operator_argument_must_and_got(case: str) -> None:
    call, kind, text = ERRORS[case]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value).startswith(text)
