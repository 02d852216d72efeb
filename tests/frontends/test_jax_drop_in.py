"""Attention under the names of jax.nn and Flax, beside their own."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402

import tilewise as tw  # noqa: E402
import tilewise.jax as tj  # noqa: E402

B, T, S, N, K, H = 2, 5, 7, 6, 3, 4
RNG = np.random.default_rng(11)
BIAS = RNG.normal(size=(1, N, T, S)).astype(np.float32)
SEEN = RNG.random((B, 1, T, S)) < 0.5
SEEN[..., 0] = True


def tensors(heads: int = K, dtype: Any = np.float32) -> tuple[Any, ...]:
    shapes = (B, T, N, H), (B, S, heads, H), (B, S, heads, H)
    return tuple(RNG.normal(size=shape).astype(dtype) for shape in shapes)


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (2, 1)},
    "window of one number": {"local_window_size": 1, "is_causal": True},
    "mask and bias": {"mask": SEEN, "bias": BIAS},
    "lengths": {"key_value_seq_lengths": np.array([3, 7], np.int32)},
    "lengths of both": {
        "query_seq_lengths": np.array([5, 2], np.int32),
        "key_value_seq_lengths": np.array([4, 6], np.int32),
    },
    "scale": {"scale": 0.3},
    "scale below zero": {"scale": -0.3},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_values_residual_and_gradients_are_those_of_jax_nn(option: str) -> None:
    x = tensors()
    arrays = {k: v for k, v in OPTIONS[option].items() if isinstance(v, np.ndarray)}
    others = {k: v for k, v in OPTIONS[option].items() if k not in arrays}
    rows = np.arange(T) < arrays.get("query_seq_lengths", np.full(B, T))[:, None]

    def run(f: Any) -> Any:
        def loss(x: Any, arrays: Any) -> Any:
            o, residual = f(*x, **arrays, **others, return_residual=True)
            return jnp.sum(jnp.sin(o)), (o, residual)

        both = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, (o, residual)), grads = both(x, arrays)
        # jax.nn gives rows behind the lengths a residual too.
        return o, np.where(rows[..., None], residual, 0), grads

    pairs = zip(
        jax.tree.leaves(run(tj.dot_product_attention)),
        jax.tree.leaves(run(jax.nn.dot_product_attention)),
        strict=True,
    )
    for got, want in pairs:
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_one_problem_needs_no_batch() -> None:
    x = [a[0] for a in tensors()]
    o, residual = tj.dot_product_attention(*x, return_residual=True)
    assert (o.shape, residual.shape) == ((T, N, H), (T, N))
    np.testing.assert_allclose(o, jax.nn.dot_product_attention(*x), rtol=2e-5, atol=2e-6)


def test_a_row_without_keys_is_zero() -> None:
    hidden = np.zeros((1, 1, T, S), bool)
    f = partial(tj.dot_product_attention, mask=hidden)
    o, residual = f(*tensors(), return_residual=True)
    assert not o.any() and np.isneginf(residual).all()
    grads = jax.grad(lambda *x: f(*x).sum(), (0, 1, 2))(*tensors())
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_a_traced_scale_has_a_gradient(scale: float) -> None:
    x = tensors()

    def run(f: Any) -> Any:
        loss = lambda scale: jnp.sum(jnp.sin(f(*x, scale=scale)))  # noqa: E731
        return loss(jnp.float32(scale)), jax.jit(jax.value_and_grad(loss))(scale)

    found, wanted = (run(m.dot_product_attention) for m in (tj, jax.nn))
    for got, want in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"key": np.zeros((S, K, H), np.float32)}, r"key must have shape \(B, S, K, H\)"),
    "dtype": ({"value": np.zeros((B, S, K, H))}, "value must have dtype float32"),
    "heads": (
        {"key": np.zeros((B, S, 4, H), np.float32), "value": np.zeros((B, S, 4, H), np.float32)},
        "key must have heads that divide 6",
    ),
    "size": ({"key": np.zeros((B, S, K, 5), np.float32)}, r"key must have H=4 \(from query\)"),
    "mask": ({"mask": np.zeros((T, S), np.float32)}, "mask must have dtype bool"),
    "lengths": (
        {"query_seq_lengths": np.zeros(3, np.int32)},
        r"query_seq_lengths must be integers",
    ),
    "shape of mask": ({"mask": np.ones((T, T), bool)}, "mask must be broadcastable to"),
    "scale": ({"scale": np.ones(2)}, r"scale must be a real number, got shape \(2,\)"),
    "window": ({"local_window_size": 1.5}, "local_window_size must be an integer or a pair"),
    "implementation": ({"implementation": "xla"}, "implementation must be None or one of"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case: str) -> None:
    changes, text = ERRORS[case]
    with jax.enable_x64(True), pytest.raises((TypeError, ValueError), match=text) as caught:
        given = dict(zip(("query", "key", "value"), tensors(), strict=True)) | changes
        jax.jit(lambda: tj.dot_product_attention(**given))()
    assert str(caught.value).startswith("dot_product_attention: ")


def test_batches_of_several_dimensions_share_masks_that_repeat() -> None:
    q, k, v = (RNG.normal(size=(2, 3, n, N, H)).astype(np.float32) for n in (T, S, S))
    seen, bias = RNG.random((2, 1, 1, T, S)) < 0.7, RNG.normal(size=(N, T, S)).astype(np.float32)
    f = partial(tj.flax_attention, is_causal=True, force_fp32_for_softmax=True)
    found = jax.jit(f)(q, k, v, bias=bias, mask=seen)
    for i, j in np.ndindex(2, 3):
        given = {"bias": bias[None], "mask": seen[i], "is_causal": True}
        want = tj.dot_product_attention(q[i, j], k[i, j], v[i, j], **given)
        np.testing.assert_array_equal(found[i, j], want)
    with pytest.raises(tw.Unsupported, match="flax_attention: qk_attn_weights_einsum is not serve"):
        f(q, k, v, qk_attn_weights_einsum=jnp.einsum)


def flax_pair(**options: Any) -> Any:
    """Two modules of the same weights, with tilewise's attention and with Flax's own."""
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")

    def module(**function: Any) -> Any:
        sizes = {"num_heads": 3, "in_features": 12, "decode": False}
        return nnx.MultiHeadAttention(**sizes, rngs=nnx.Rngs(0), **options, **function)

    return module(attention_fn=tj.flax_attention), module()


def test_a_module_of_flax_computes_the_same_with_it() -> None:
    ours, theirs = flax_pair()
    x = RNG.normal(size=(2, 3, 5, 12)).astype(np.float32)  # a batch of two dimensions
    seen = RNG.random((2, 3, 1, 5, 5)) < 0.7
    seen[..., 0] = True
    for mask in (None, seen):
        np.testing.assert_allclose(ours(x, mask=mask), theirs(x, mask=mask), rtol=2e-5, atol=2e-5)


def test_masks_of_flax_are_floats() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")
    linen = pytest.importorskip("flax.linen", reason="Flax is not installed")
    x = RNG.normal(size=(2, 5, 12)).astype(np.float32)
    mask = nnx.make_causal_mask(x[..., 0])
    assert mask.dtype == np.float32
    ours, theirs = flax_pair()
    np.testing.assert_allclose(ours(x, mask=mask), theirs(x, mask=mask), rtol=2e-5, atol=2e-5)
    plain = linen.MultiHeadDotProductAttention(num_heads=3)
    weights = plain.init(jax.random.key(0), x)
    with_ours = linen.MultiHeadDotProductAttention(num_heads=3, attention_fn=tj.flax_attention)
    got, want = (
        jax.value_and_grad(lambda x, m=m: jnp.sum(jnp.sin(m.apply(weights, x, mask=mask))))(x)
        for m in (with_ours, plain)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_a_module_of_flax_decodes_from_its_cache() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")
    x = RNG.normal(size=(2, 5, 12)).astype(np.float32)
    ours, _ = flax_pair()
    whole = ours(x, mask=nnx.make_causal_mask(x[..., 0]))
    ours.set_attributes(decode=True)
    ours.init_cache(x.shape)
    step = nnx.jit(lambda module, token: module(token))
    for i in range(x.shape[1]):
        np.testing.assert_allclose(step(ours, x[:, i : i + 1])[:, 0], whole[:, i], atol=2e-5)


def test_dropout_in_a_module_of_flax_follows_its_key() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")
    ours, _ = flax_pair(dropout_rate=0.5)
    x = RNG.normal(size=(2, 5, 12)).astype(np.float32)
    first, again, other = (
        np.asarray(ours(x, deterministic=False, rngs=nnx.Rngs(seed))) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first != np.asarray(ours(x, deterministic=True))).any()


def test_weights_that_are_asked_for_are_refused() -> None:
    ours, _ = flax_pair()
    with pytest.raises(tw.Unsupported, match="flax_attention: module is not served"):
        ours(RNG.normal(size=(2, 5, 12)).astype(np.float32), sow_weights=True)


def test_a_module_of_equinox_computes_the_same_on_its_heads() -> None:
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")
    x = RNG.normal(size=(B, T, 12)).astype(np.float32)

    class Attention(eqx.nn.MultiheadAttention):
        def __call__(self, query: Any, key_: Any, value: Any, mask: Any = None) -> Any:
            projections = self.query_proj, self.key_proj, self.value_proj
            heads = (
                jax.vmap(project)(a).reshape(len(a), self.num_heads, -1)
                for project, a in zip(projections, (query, key_, value), strict=True)
            )
            o = tj.dot_product_attention(*heads, mask=mask)
            return jax.vmap(self.output_proj)(o.reshape(len(o), -1))

    @eqx.filter_jit
    def run(module: Any) -> Any:
        one = lambda m, x: m(x, x, x, mask=np.tri(T, dtype=bool))  # noqa: E731
        loss = lambda m: jnp.sum(jnp.sin(jax.vmap(partial(one, m))(x)))  # noqa: E731
        return eqx.filter_value_and_grad(loss)(module)

    made = (kind(3, 12, key=jax.random.key(3)) for kind in (Attention, eqx.nn.MultiheadAttention))
    for got, want in zip(*(jax.tree.leaves(run(module)) for module in made), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)
