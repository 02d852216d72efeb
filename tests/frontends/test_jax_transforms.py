"""Every transformation of JAX on every option of attention, beside the textbook in jax.numpy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import tilewise as tw  # noqa: E402
import tilewise.jax as tj  # noqa: E402

B, H, N, NK, D, DV = 2, 3, 5, 7, 3, 2
FEW = 1  # key/value heads where there are fewer
RNG = np.random.default_rng(5)
SEEN = RNG.random((B, 1, N, NK)) < 0.6
SEEN[1, 0, 2] = False  # a row without keys
SLOPES = np.array([0.5, 0.25, 0.125])


def normal(*shape: int) -> Any:
    return RNG.normal(size=shape)


@pytest.fixture(autouse=True, scope="module")
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def textbook(
    q: Any,
    k: Any,
    v: Any,
    bias: Any = None,
    sinks: Any = None,
    *,
    seen: Any = True,
    softcap: float | None = None,
    slopes: Any = None,
    keep: Any = 1.0,
    scale: float = D**-0.5,
) -> tuple[Any, Any]:
    """Attention with its matrix of probabilities, which JAX differentiates itself."""
    k, v = (jnp.repeat(a, q.shape[1] // a.shape[1], 1) for a in (k, v))
    s = scale * q @ k.swapaxes(2, 3)
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    s = s if bias is None else s + bias
    if slopes is not None:
        i, j = jnp.arange(s.shape[2])[:, None], jnp.arange(s.shape[3])
        s = s - jnp.asarray(slopes)[:, None, None] * abs(i + s.shape[3] - s.shape[2] - j)
    w = jnp.where(seen, jnp.exp(s), 0.0)
    l = w.sum(3) if sinks is None else w.sum(3) + jnp.exp(sinks)[:, None]
    some = l > 0
    l = jnp.where(some, l, 1.0)
    return (keep * w / l[..., None]) @ v, jnp.where(some, jnp.log(l), 0.0)


def kept_pairs(dropout_p: float, seed: int) -> Any:
    """What dropout multiplies each probability by, as NumPy's door shows it."""
    q, k, v = (
        np.zeros((B, H, N, D)),
        np.zeros((B, H, NK, D)),
        np.broadcast_to(np.eye(NK), (B, H, NK, NK)),
    )
    return NK * tw.numpy.attention(q, k, v, dropout_p=dropout_p, seed=seed)


PLAIN = (normal(B, H, N, D), normal(B, H, NK, D), normal(B, H, NK, DV))
BIAS, SINKS = normal(1, H, N, NK), normal(H)
GROUPED = (PLAIN[0], normal(B, FEW, NK, D), normal(B, FEW, NK, DV))
CAUSAL = np.tri(N, NK, NK - N, dtype=bool)
LENGTHS = np.array([4, 0])
OPTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "nothing": (PLAIN, {}, {}),
    "causal, softcap": (
        PLAIN,
        {"mask": tw.causal(), "softcap": 1.5},
        {"seen": CAUSAL, "softcap": 1.5},
    ),
    "boolean mask, bias": ((*PLAIN, BIAS), {"mask": SEEN}, {"seen": SEEN}),
    "lengths": (
        PLAIN,
        {"mask": tw.lengths(LENGTHS)},
        {"seen": np.arange(NK) < LENGTHS[:, None, None, None]},
    ),
    "dropout": (
        PLAIN,
        {"dropout_p": 0.25, "seed": 2**40 + 3},
        {"keep": kept_pairs(0.25, 2**40 + 3)},
    ),
    "layout, fewer key heads": (GROUPED, {"layout": "bnhd"}, {}),
    "everything": (
        (*GROUPED, BIAS, SINKS),
        {"mask": SEEN, "softcap": 2.0, "alibi_slopes": SLOPES, "softmax_scale": 0.8},
        {"seen": SEEN, "softcap": 2.0, "slopes": SLOPES, "scale": 0.8},
    ),
}


def door(q: Any, k: Any, v: Any, bias: Any = None, sinks: Any = None, **options: Any) -> Any:
    """The function under test, with 0 for the logarithm of 0."""
    turned = options.get("layout") == "bnhd"
    if turned:
        q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    found = tj.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, **options)
    o = found.o.swapaxes(1, 2) if turned else found.o
    return o, jnp.where(jnp.isfinite(found.lse), found.lse, 0.0)


Function = Callable[..., tuple[Any, Any]]


def loss(f: Function, *x: Any) -> Any:
    o, lse = f(*x)
    return jnp.sum(jnp.sin(2 * o)) + jnp.sum(jnp.cos(lse))


def along(x: tuple[Any, ...], phase: float) -> tuple[Any, ...]:
    """Tangents of arrays, none two alike."""
    return jax.tree.map(lambda a: jnp.cos(3 * jnp.asarray(a) + phase), x)


def grad(f: Function, x: tuple[Any, ...]) -> Any:
    return jax.grad(partial(loss, f), tuple(i for i, a in enumerate(x) if a is not None))(*x)


def rev_over_rev(f: Function, x: tuple[Any, ...]) -> Any:
    def slope(*x: Any) -> Any:
        t = [a for a in along(x, 1) if a is not None]
        return sum(
            jnp.vdot(a, jax.lax.stop_gradient(b)) for a, b in zip(grad(f, x), t, strict=True)
        )

    return jax.grad(slope, tuple(i for i, a in enumerate(x) if a is not None))(*x)


def rev_over_fwd(f: Function, x: tuple[Any, ...]) -> Any:
    fixed = along(x, 1)

    def slope(*x: Any) -> Any:
        return jax.jvp(partial(loss, f), x, fixed)[1]

    return jax.grad(slope, tuple(i for i, a in enumerate(x) if a is not None))(*x)


def fwd_over_fwd(f: Function, x: tuple[Any, ...]) -> Any:
    inner = lambda x, t: jax.jvp(f, x, t)  # noqa: E731
    return jax.jvp(inner, (x, along(x, 1)), (along(x, 2), along(x, 3)))[1]


def transposed(f: Function, x: tuple[Any, ...]) -> Any:
    y, linear = jax.linearize(f, *x)
    back = jax.linear_transpose(linear, *x)
    return linear(*along(x, 1)), back(along(y, 2)), jax.linear_transpose(back, y)(along(x, 3))


def hessian(f: Function, x: tuple[Any, ...]) -> Any:
    """The second derivatives along scalings of the inputs: forward over reverse under vmap."""
    scaled = lambda s: loss(f, *[None if a is None else s[i] * a for i, a in enumerate(x)])  # noqa: E731
    return jax.hessian(scaled)(jnp.ones(len(x)))


def batched(f: Function, x: tuple[Any, ...]) -> Any:
    """Derivatives under vmap, over q at the front, over v at the back, nested."""
    q, k, v, *rest = x
    one = lambda q, v: grad(f, (q, k, v, *rest))  # noqa: E731
    both = jax.vmap(jax.vmap(one, (0, None)), (None, -1))
    return both(jnp.stack([q, 2 * q]), jnp.stack([v, v - 1, -v], -1))


def of_batches(f: Function, x: tuple[Any, ...]) -> Any:
    """Derivatives over vmap, where what is not mapped repeats."""

    def whole(*x: Any) -> Any:
        q, *others = x
        return jax.vmap(lambda q: f(q, *others))(jnp.stack([q, 2 * q, -q]))

    return grad(whole, x), rev_over_fwd(whole, x)


TRANSFORMATIONS: dict[str, Callable[[Function, tuple[Any, ...]], Any]] = {
    "jit": lambda f, x: f(*x),
    "grad": grad,
    "value_and_grad": lambda f, x: jax.value_and_grad(partial(loss, f))(*x),
    "jvp": lambda f, x: jax.jvp(f, x, along(x, 1)),
    "linearize and linear_transpose": transposed,
    "checkpoint": lambda f, x: grad(jax.checkpoint(f), x),
    "forward over reverse": lambda f, x: jax.jvp(lambda *x: grad(f, x), x, along(x, 1))[1],
    "reverse over forward": rev_over_fwd,
    "reverse over reverse": rev_over_rev,
    "forward over forward": fwd_over_fwd,
    "hessian": hessian,
    "vmap": batched,
    "derivatives of vmap": of_batches,
}


def quickly(f: Callable[..., Any], x: tuple[Any, ...]) -> Any:
    """Run a compiled function on which XLA has spent little time."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(f).lower(x).compile(options)(x)


def made(f: Function, names: tuple[str, ...], x: tuple[Any, ...]) -> dict[str, Any]:
    return {name: TRANSFORMATIONS[name](f, x) for name in names}


@cache
def truth(option: str) -> dict[str, Any]:
    """What JAX's own differentiation makes of the textbook formula."""
    x, _, options = OPTIONS[option]
    names = [name for name in TRANSFORMATIONS if option == "everything" or name not in ONCE]
    return quickly(partial(made, partial(textbook, **options), tuple(names)), x)


def check(option: str, names: tuple[str, ...], implementation: str | None = None) -> None:
    x, options, _ = OPTIONS[option]
    f = partial(door, implementation=implementation, **options)
    found = quickly(partial(made, f, names), x)
    for name in names:
        pairs = (jax.tree.leaves(values[name]) for values in (found, truth(option)))
        for got, want in zip(*pairs, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9, err_msg=name)


ONCE = ("value_and_grad", "linearize and linear_transpose", "checkpoint", "hessian")
"""Transformations to which it is all the same what the options are, beside the others."""


@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "nothing"])
def test_every_transformation_agrees_with_the_textbook(option: str) -> None:
    names = [name for name in TRANSFORMATIONS if option == "everything" or name not in ONCE]
    check(option, tuple(names))


@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "nothing"])
def test_the_formulas_of_the_reference_are_what_jax_derives(option: str) -> None:
    check(option, ("grad", "jvp", "forward over reverse", "forward over forward"), "reference")


@pytest.mark.parametrize("option", ["nothing", "everything"])
def test_derivatives_agree_with_differences(option: str) -> None:
    x, options, _ = OPTIONS[option]
    f = jax.jit(partial(door, **options))
    check_grads(f, x, order=2, modes=("fwd", "rev"))


def test_forward_over_forward_is_refused_where_an_implementation_lacks_it() -> None:
    x, _, _ = OPTIONS["nothing"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="implementation 'cpu': has no jvp_jvp"):
        jax.block_until_ready(fwd_over_fwd(partial(door, implementation="cpu"), x))
