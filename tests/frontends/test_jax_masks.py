"""Masks whose arrays JAX traces, and decoding with a plain array for a cache of keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402

import tilewise as tw  # noqa: E402
import tilewise.jax as tj  # noqa: E402

B, H, HK, N, D = 2, 4, 2, 13, 8
RNG = np.random.default_rng(19)
Q, K, V = (RNG.normal(size=(B, h, N, D)).astype(np.float32) for h in (H, HK, HK))
IDS = np.sort(RNG.integers(3, size=(B, N)), axis=1)
MASKS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "lengths": (lambda a: tw.lengths(a), (np.array([3, 11]),)),
    "lengths of both": (
        lambda a, b: tw.causal() & tw.lengths(a, query_lengths=b),
        (np.array([3, 11]), np.array([13, 0])),
    ),
    "prefix": (lambda a: tw.causal() | tw.prefix(a), (np.array([5, 2]),)),
    "documents": (lambda a: tw.documents(a) & tw.window(3, 2), (np.array([0, 4, 4, 13]),)),
    "ids": (lambda a: tw.documents(ids=a) & tw.causal(), (IDS,)),
    "dense": (lambda a: tw.dense(a) & tw.lengths([13, 7]), (RNG.random((B, 1, N, N)) < 0.5,)),
}


@pytest.mark.parametrize("case", MASKS)
def test_a_mask_of_traced_arrays_is_that_of_their_values(case: str) -> None:
    make, arrays = MASKS[case]
    want = tw.attention(Q, K, V, mask=make(*arrays))
    f = jax.jit(lambda *arrays: tj.attention(Q, K, V, mask=make(*arrays)))
    np.testing.assert_array_equal(f(*arrays), want)
    other = [a[::-1].copy() if a.ndim == 1 and case != "documents" else a for a in arrays]
    np.testing.assert_array_equal(f(*other), tw.attention(Q, K, V, mask=make(*other)))
    assert f._cache_size() == 1


def test_derivatives_and_vmap_of_traced_lengths() -> None:
    slope = jax.grad(lambda k, n: jnp.sum(tj.attention(Q, k, V, mask=tw.lengths(n)) ** 2))
    many = np.array([[3, 11], [13, 0], [1, 1]])
    for n, grad in zip(many, jax.jit(jax.vmap(slope, (None, 0)))(K, many), strict=True):
        mask = tw.lengths(n)
        r = tw.numpy.attention(Q, K, V, mask=mask, return_stats=True)
        want = tw.numpy.attention_vjp(2 * r.o, Q, K, V, r.o, r.stats, mask=mask).dk
        np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-6)
        assert not np.asarray(grad)[0, :, n[0] :].any()


def test_decoding_by_scan_has_the_bits_of_one_causal_call() -> None:
    """Each sequence with a length of its own, in arrays as long as the longest may become."""
    put = jax.vmap(lambda cache, new, at: jax.lax.dynamic_update_slice(cache, new, (0, at, 0)))

    def step(state: Any, token: Any) -> Any:
        keys, values, lengths = state
        q, k, v = token
        keys, values = put(keys, k, lengths), put(values, v, lengths)
        lengths = lengths + 1
        return (keys, values, lengths), tj.attention(q, keys, values, mask=tw.lengths(lengths))

    started = np.array([5, 2])
    room = jnp.full((B, HK, N + 4, D), jnp.nan)  # what is behind the lengths is never read
    cache = [room, room]
    for b, n in enumerate(started):
        cache = [c.at[b, :, :n].set(x[b, :, :n]) for c, x in zip(cache, (K, V), strict=True)]
    rows = [np.stack([x[b, :, n : n + 8] for b, n in enumerate(started)]) for x in (Q, K, V)]
    tokens = tuple(jnp.moveaxis(x, 2, 0)[..., None, :] for x in rows)
    state = (*cache, jnp.asarray(started))
    (_, _, lengths), o = jax.jit(lambda *x: jax.lax.scan(step, *x))(state, tokens)
    np.testing.assert_array_equal(lengths, started + 8)
    whole = tw.attention(Q, K, V, mask=tw.causal())
    for b, n in enumerate(started):
        np.testing.assert_array_equal(
            np.asarray(o)[:, b, :, 0], whole[b, :, n : n + 8].swapaxes(0, 1)
        )


def traced(make: Callable[[Any], Any], n: Any, **options: Any) -> Any:
    return jax.jit(lambda n: tj.attention(Q, K, V, mask=make(n), **options))(n)


def test_shapes_of_traced_arrays_are_checked_while_tracing() -> None:
    three = np.array([1, 2, 3])
    for make, text in (
        (tw.lengths, r"attention: mask lengths must have shape \(B,\) with B=2, got \(3,\)"),
        (lambda n: tw.documents(ids=n), r"attention: mask ids must have shape \(N,\) or \(B, N\)"),
        (lambda n: tw.dense(n > 1), r"attention: mask must be broadcastable to \(B, H, N, Nk\)"),
    ):
        with pytest.raises(ValueError, match=text):
            jax.eval_shape(lambda n, make=make: tj.attention(Q, K, V, mask=make(n)), three)
    for make, text in (
        (lambda n: tw.lengths(n / 2), "lengths: lengths must have an integer dtype, got float32"),
        (lambda n: tw.dense(n), "dense: array must have dtype bool, got int32"),
    ):
        with pytest.raises(TypeError, match=text):
            traced(make, jnp.asarray(three))


def test_values_of_traced_arrays_are_checked_when_the_program_runs() -> None:
    at_run_time = (jax.errors.JaxRuntimeError, ValueError)
    with pytest.raises(at_run_time, match="mask lengths must be at most Nk=13, got 14"):
        jax.block_until_ready(traced(tw.lengths, np.array([1, 14])))


def test_traced_arrays_are_for_jax_alone() -> None:
    n = np.array([3, 11])
    with pytest.raises(TypeError, match=r"arrays must be known here .*, got <traced int32 \(2,\)>"):
        jax.jit(lambda n: tw.numpy.attention(Q, K, V, mask=tw.lengths(n)))(n)
    with pytest.raises(ValueError, match="mask must hold at most 4 arrays where one is traced, go"):
        traced(
            lambda n: tw.lengths(n) & tw.lengths(n) & tw.lengths(n, query_lengths=n) & tw.prefix(n),
            n,
        )
