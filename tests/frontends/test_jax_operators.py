"""What every operator has in JAX: transformations that agree, export, axes of a mesh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

import tilewise as tw  # noqa: E402
import tilewise.jax as tj  # noqa: E402
from tilewise.jax import execution  # noqa: E402

T, C, V = 4, 3, 5
RNG = np.random.default_rng(23)
COMPILED = pytest.mark.skipif(not execution.HANDLER, reason=execution.HOW)
CLASSES = np.array([2, -100, 4, 2])
COUNTS = RNG.uniform(0.5, 2.0, size=V)
SEEN = RNG.random((T, V)) < 0.7
SEEN[:, 0] = True


def normal(*shape: int) -> Any:
    return RNG.normal(size=shape)


Operator = tuple[Callable[..., Any], tuple[Any, ...]]
ROWS = {"where": SEEN, "temperature": 0.7}
LOSS = {"label_smoothing": 0.1, "z_loss": 0.3, "softcap": 2.0}
OPERATORS: dict[str, Operator] = {
    **{
        name: (lambda x, z, name=name: getattr(tj, name)(x, -1, sink=z, **ROWS), x)
        for name, x in {
            "softmax": (normal(T, V), normal(T)),
            "logsumexp": (normal(T, V), normal(T)),
        }.items()
    },
    "log_softmax": (lambda x: tj.log_softmax(x, 0, temperature=0.7), (normal(T, V),)),
    "cross_entropy": (
        lambda x: tj.cross_entropy(x, CLASSES, weight=COUNTS, **LOSS),
        (normal(T, V),),
    ),
    "cross_entropy of probabilities": (
        partial(tj.cross_entropy, weight=COUNTS, reduction="none", **LOSS),
        (normal(T, V), RNG.dirichlet(np.ones(V), T)),
    ),
    "linear_cross_entropy": (
        lambda h, w, b: tj.linear_cross_entropy(h, w, CLASSES, bias=b, class_weight=COUNTS, **LOSS),
        (normal(T, C), normal(V, C), normal(V)),
    ),
    "linear": (tj.linear, (normal(T, C), normal(V, C), normal(V))),
    "attention": (
        lambda q, k, v, sinks: tj.attention(
            q, k, v, sinks=sinks, mask=tw.causal(), softmax_scale=0.7, softcap=2.0
        ),
        (normal(1, 2, T, C), normal(1, 1, T, C), normal(1, 1, T, C), normal(2)),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def scalar(f: Callable[..., Any], *x: Any) -> Any:
    return jnp.sum(jnp.sin(2 * f(*x)))


def along(x: Any, phase: float) -> Any:
    return jax.tree.map(lambda a: jnp.cos(3 * jnp.asarray(a) + phase), x)


def quickly(f: Callable[..., Any], x: tuple[Any, ...]) -> Any:
    """Run a compiled function on which XLA has spent little time."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(f).lower(x).compile(options)(x)


def first_order(f: Callable[..., Any], x: tuple[Any, ...]) -> list[Any]:
    """Pairs that have to be the same: ways to J t and J' c, batches, loops, recomputation."""
    first, *rest = x
    y, linear = jax.linearize(f, *x)
    t, c = along(x, 1), along(y, 2)
    _, pull = jax.vjp(f, *x)
    many = [jnp.stack([a, -a, a / 2]) for a in x]
    whole = (None,) * len(rest)
    nested = jax.vmap(jax.vmap(lambda a: f(a, *rest), -1), 1)
    factors = jnp.array([1.0, 0.5])

    def scanned(*x: Any) -> Any:
        step = lambda sum_, r: (sum_ + scalar(f, r * x[0], *x[1:]), None)  # noqa: E731
        return jax.lax.scan(step, jnp.zeros(()), factors)[0]

    def unrolled(*x: Any) -> Any:
        return sum(scalar(f, r * x[0], *x[1:]) for r in factors)

    return [
        (linear(*t), jax.jvp(f, x, t)[1]),
        (tuple(jax.linear_transpose(linear, *x)(c)), pull(c)),
        (jnp.vdot(linear(*t), c), sum(map(jnp.vdot, t, pull(c)))),
        (jax.vmap(f)(*many), jnp.stack([f(*[a[i] for a in many]) for i in range(3)])),
        (
            jax.vmap(f, (-1, *whole))(jnp.stack([first, -first], -1), *rest),
            jnp.stack([f(a, *rest) for a in (first, -first)]),
        ),
        (
            nested(jnp.stack([many[0], 2 * many[0]], -1).swapaxes(0, 1)),
            jnp.stack([jnp.stack([f(r * a, *rest) for r in (1, 2)]) for a in many[0]]),
        ),
        (jax.grad(scanned)(*x), jax.grad(unrolled)(*x)),
        (jax.grad(jax.checkpoint(unrolled))(*x), jax.grad(unrolled)(*x)),
    ]


def second_order(f: Callable[..., Any], x: tuple[Any, ...]) -> list[Any]:
    """The Hessian by forward over reverse, reverse over forward and reverse over reverse."""
    at = tuple(range(len(x)))
    g, by = partial(scalar, f), jax.hessian(partial(scalar, f), at)(*x)
    return [
        (by, jax.jacrev(jax.jacfwd(g, at), at)(*x)),
        (by, jax.jacrev(jax.jacrev(g, at), at)(*x)),
    ]


@pytest.mark.parametrize("name", OPERATORS)
def test_transformations_of_an_operator_agree(name: str) -> None:
    f, x = OPERATORS[name]
    for got, want in quickly(lambda x: first_order(f, x) + second_order(f, x), x):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@COMPILED
@pytest.mark.parametrize("name", OPERATORS)
def test_an_exported_program_still_has_a_gradient(name: str) -> None:
    f, x = OPERATORS[name]
    program = jax.jit(partial(scalar, f))
    allowed = [jax.export.DisabledSafetyCheck.custom_call(execution.TARGET)]
    exported = jax.export.export(program, disabled_checks=allowed)(*x)
    loaded = jax.export.deserialize(exported.serialize(vjp_order=1))
    for got, want in zip(*(jax.grad(g, (0,))(*x) for g in (loaded.call, program)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)


def mesh(kind: Any) -> Any:
    return jax.make_mesh((2,), ("b",), axis_types=(kind,))


SPLIT = [name for name in OPERATORS if name not in ("attention", "log_softmax")]


@pytest.mark.parametrize("name", SPLIT)
def test_shard_map_splits_rows(name: str) -> None:
    """The mean of losses of the same number of rows is the mean of the parts' means."""
    _, (x, *rest) = OPERATORS[name]
    rows, whole = PartitionSpec("b"), PartitionSpec()
    classes = np.abs(CLASSES) % V
    calls: dict[str, tuple[Callable[..., Any], Any, Any]] = {
        "softmax": (lambda x, z: tj.softmax(x, sink=z), (rows, rows), rows),
        "logsumexp": (lambda x, z: tj.logsumexp(x, -1, sink=z), (rows, rows), rows),
        "cross_entropy": (lambda x, y: tj.cross_entropy(x, y), (rows, rows), None),
        "cross_entropy of probabilities": (tj.cross_entropy, (rows, rows), None),
        "linear_cross_entropy": (
            lambda h, w, b, y: tj.linear_cross_entropy(h, w, y, bias=b),
            (rows, whole, whole, rows),
            None,
        ),
        "linear": (tj.linear, (rows, whole, whole), rows),
    }
    f, ins, out = calls[name]
    arrays = (x, *rest, classes) if len(ins) > 1 + len(rest) else (x, *rest)
    part = f if out is not None else lambda *a: jax.lax.pmean(f(*a), "b")
    options = {"mesh": mesh(AxisType.Auto), "in_specs": ins, "out_specs": out or whole}
    split = jax.shard_map(part, **options)
    moving = tuple(i for i, a in enumerate(arrays) if a.dtype.kind == "f")
    found, wanted = (
        jax.jit(jax.value_and_grad(partial(scalar, g), moving))(*arrays) for g in (split, f)
    )
    for got, want in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@COMPILED
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "attention"])
def test_gradients_lie_where_the_arrays_do_on_explicit_axes(name: str) -> None:
    f, x = OPERATORS[name]
    step = jax.jit(jax.value_and_grad(partial(scalar, f)))
    want = step(*x)
    spec = PartitionSpec("b", None)
    devices = mesh(AxisType.Explicit)
    with jax.set_mesh(devices):
        given = (jax.device_put(x[0], NamedSharding(devices, spec)), *x[1:])
        got = step(*given)
    assert got[1].sharding.spec == spec
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
