"""The door to JAX: same bits as NumPy's, what it costs, splitting, export, errors."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402
from jax.extend.core import jaxprs_in_params  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

import tilewise as tw  # noqa: E402
import tilewise.jax as tj  # noqa: E402
from tilewise.jax import execution  # noqa: E402

B, H, N, NK, D, DV = 2, 3, 5, 7, 3, 2
DTYPES = ["float64", "float32", "bfloat16", "float16"]
COMPILED = pytest.mark.skipif(not execution.HANDLER, reason=execution.HOW)


@pytest.fixture(autouse=True, scope="module")
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def tensors(dtype: str = "float64", seed: int = 3) -> list[Any]:
    rng = np.random.default_rng(seed)
    shapes = (B, H, N, D), (B, H, NK, D), (B, H, NK, DV)
    return [rng.normal(size=shape).astype(jnp.dtype(dtype)) for shape in shapes]


def same_bits(got: Any, want: Any) -> None:
    got = np.asarray(got)
    assert got.dtype == want.dtype and got.shape == want.shape
    np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


def loss(f: Any, *x: Any) -> Any:
    return jnp.sum(jnp.sin(f(*x).astype(jnp.float32)))


def kernels(f: Any, *x: Any) -> Counter[str]:
    """How often each function of an operator stands in the program of f, with what it returns."""
    found: Counter[str] = Counter()

    def walk(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if "function" in equation.params:
                found[equation.params["function"].kind] += 1
            for inner in jaxprs_in_params(equation.params):
                walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(f)(*x).jaxpr)
    return found


def only_kernel(kind: str, f: Any, *x: Any) -> execution.Function:
    """The one function of a kind in the program of f."""
    equations = jax.make_jaxpr(f)(*x).jaxpr.eqns
    functions = [e.params["function"] for e in equations if "function" in e.params]
    (function,) = (function for function in functions if function.kind == kind)
    return function


# The same bits


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_have_the_bits_of_numpy(dtype: str) -> None:
    q, k, v = tensors(dtype)
    do = tensors(dtype, seed=5)[0][..., :DV]
    f = jax.jit(partial(tj.attention, mask=tw.causal(), return_lse=True, return_entropy=True))
    found = f(q, k, v)
    want = tw.numpy.attention(
        q, k, v, mask=tw.causal(), return_lse=True, return_stats=True, return_entropy=True
    )
    for name in ("o", "lse", "entropy"):
        same_bits(getattr(found, name), getattr(want, name))
    back = jax.jit(lambda *x: jax.vjp(partial(tj.attention, mask=tw.causal()), *x)[1](do))
    # Of 16 bits, the output before it was rounded is what was saved.
    grads = tw.numpy.attention_vjp(do, q, k, v, want.o_full, want.stats, mask=tw.causal())
    for got, wanted in zip(back(q, k, v), grads[:3], strict=True):
        same_bits(got, wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_16_bits_are_those_of_float32_rounded(dtype: str) -> None:
    narrow = tensors(dtype)
    f = jax.jit(jax.grad(partial(loss, tj.attention), (0, 1, 2)))
    exact = f(*(x.astype(np.float32) for x in narrow))
    for got, want in zip(f(*narrow), exact, strict=True):
        got = np.asarray(got, np.float64)
        assert np.linalg.norm(got - want) <= 8 * float(jnp.finfo(dtype).eps) * np.linalg.norm(want)


def test_a_mask_may_be_traced() -> None:
    q, k, v = tensors()
    seen = np.random.default_rng(7).random((B, 1, N, NK)) < 0.5
    f = jax.jit(lambda *x: tj.attention(*x[:3], mask=x[3]))
    same_bits(f(q, k, v, seen), tw.numpy.attention(q, k, v, mask=tw.dense(seen)))


@pytest.mark.parametrize("bits", [32, 64])
def test_seeds_of_every_kind_drop_the_same_pairs(bits: int) -> None:
    q, k, v = tensors("float32")
    key = jax.random.key(2**31 + 7)
    low, high = (int(word) for word in jax.random.key_data(key))
    with jax.enable_x64(bits == 64):
        f = jax.jit(lambda *x: tj.attention(*x[:3], dropout_p=0.5, seed=x[3]))
        for seed, number in ((key, low | high << 32), (jnp.int32(11), 11)):
            want = tw.numpy.attention(q, k, v, dropout_p=0.5, seed=number)
            same_bits(f(q, k, v, seed), want)
            same_bits(tj.attention(q, k, v, dropout_p=0.5, seed=number), want)


def test_vmap_over_seeds_drops_others_for_each() -> None:
    q, k, v = tensors()
    f = jax.vmap(lambda seed: tj.attention(q, k, v, dropout_p=0.5, seed=seed))
    for i, o in enumerate(f(jnp.arange(3))):
        same_bits(o, tw.numpy.attention(q, k, v, dropout_p=0.5, seed=i))


def test_the_package_itself_finds_the_door_by_the_type() -> None:
    q, k, v = tensors()
    same_bits(jax.jit(tw.attention)(*map(jnp.asarray, (q, k, v))), tw.attention(q, k, v))
    assert isinstance(tw.softmax(jnp.asarray(q)), jax.Array)
    packed = [np.ascontiguousarray(x[0, :, :5].swapaxes(0, 1)) for x in (q, k, v)]
    starts = np.array([0, 2, 5])
    made = tw.attention_varlen(*map(jnp.asarray, packed), starts)
    assert isinstance(made, jax.Array)
    same_bits(made, tw.attention_varlen(*packed, starts))


def test_empty_sizes_work() -> None:
    q, k, v = tensors()
    for x in ((q[:0], k[:0], v[:0]), (q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0])):
        found = jax.jit(jax.grad(partial(loss, tj.attention), (0, 1, 2)))(*x)
        for grad, argument in zip(found, x, strict=True):
            same_bits(grad, np.zeros_like(argument))


def test_without_64_bits_arrays_of_masks_have_32() -> None:
    q, k, v = tensors("float32")
    with jax.enable_x64(False):
        mask = tw.lengths(np.array([4, 2])) & tw.prefix(np.array([3, 6]))
        same_bits(
            jax.jit(partial(tj.attention, mask=mask))(q, k, v), tw.attention(q, k, v, mask=mask)
        )
        big = tw.prefix(np.array([1, 2**31]))
        with pytest.raises(ValueError, match=r"attention: mask must hold numbers below 2\*\*31"):
            tj.attention(q, k, v, mask=big)


# What it costs


def test_only_the_wanted_gradient_is_computed_and_a_missing_cotangent_is_no_array() -> None:
    q, k, v = tensors()
    f = lambda q: jnp.sum(tj.attention(q, k, v, return_lse=True).o)  # noqa: E731
    function = only_kernel("vjp", jax.grad(f), q)
    assert function.needed == (True, False, False, False, False)
    assert function.given[:2] == (True, False)


def test_a_missing_tangent_is_no_array() -> None:
    q, k, v = tensors()
    f = lambda t: jax.jvp(lambda v: tj.attention(q, k, v), (v,), (t,))[1]  # noqa: E731
    assert only_kernel("jvp", f, v).given[:5] == (False, False, True, False, False)


def test_without_derivatives_nothing_is_saved() -> None:
    assert only_kernel("forward", tj.attention, *tensors()).needed == (True,) * 2 + (False,) * 5


POLICIES = {
    "nothing": (jax.checkpoint_policies.nothing_saveable, 2),
    "everything": (jax.checkpoint_policies.everything_saveable, 1),
    "results of operators": (tj.save_results, 1),
    "by name": (
        jax.checkpoint_policies.save_only_these_names(
            "attention.o", "attention.lse", "attention.m", "attention.log_l"
        ),
        1,
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoint_recomputes_what_its_policy_says(policy: str) -> None:
    rule, forwards = POLICIES[policy]
    x = tensors()
    f = lambda *x: loss(tj.attention, *map(jnp.sin, x))  # noqa: E731
    again = jax.grad(jax.checkpoint(f, policy=rule), (0, 1, 2))
    assert kernels(again, *x) == {"forward": forwards, "vjp": 1}
    for got, want in zip(jax.jit(again)(*x), jax.jit(jax.grad(f, (0, 1, 2)))(*x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_a_loss_with_a_jvp_that_is_not_differentiated_costs_one_of_each() -> None:
    q, k, v = tensors()

    def objective(q: Any) -> Any:
        o, to = jax.jvp(lambda q: tj.attention(q, k, v), (q,), (jnp.ones_like(q),))
        return jnp.sum((o - jax.lax.stop_gradient(to)) ** 2)

    assert kernels(jax.grad(objective), q) == {"forward": 1, "jvp": 1, "vjp": 1}


@COMPILED
def test_results_are_written_where_xla_wants_them() -> None:
    q, k, v = tensors()
    results = [np.full((B, H, N, DV), np.nan)]
    seen = []
    real = execution.settle

    def settle(found: Any, targets: Any) -> None:
        seen.extend(np.shares_memory(f, t) for f, t in zip(found, targets, strict=True))
        real(found, targets)

    text = execution.Function(
        "attention",
        "forward",
        repr(
            {
                "mask": None,
                "softcap": None,
                "softmax_scale": None,
                "dropout_p": 0.0,
                "layout": "bhnd",
                "implementation": None,
            }
        ),
        (True,) * 3 + (False,) * 10,
        (True,) + (False,) * 6,
    ).text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "settle", settle)
        execution.run(text, [q, k, v], results)
    assert seen == [True]
    same_bits(results[0], tw.numpy.attention(q, k, v))


# Other ways to run


def test_host_callbacks_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tensors("float32")
    f = partial(loss, tj.attention)
    want = jax.jit(jax.grad(f, (0, 1, 2)))(*x)
    monkeypatch.setattr(execution, "HANDLER", False)
    program = jax.jit(jax.grad(lambda *x: f(*x), (0, 1, 2)))
    assert execution.TARGET not in program.lower(*x).as_text()
    for got, wanted in zip(program(*x), want, strict=True):
        same_bits(got, np.asarray(wanted))


@COMPILED
def test_a_handler_for_a_newer_xla_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "_api_of_jaxlib", lambda: (0, 0))
    used, how = execution._load()
    assert not used and re.search(r"was built for version 0\.\d, jaxlib has 0\.0$", how)


def test_without_the_compiled_module_there_are_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tilewise._xla", None)
    used, how = execution._load()
    assert not used and how == "host callbacks: tilewise was built without XLA's headers"


def mesh() -> Any:
    return jax.make_mesh((2,), ("b",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("axis", [0, 1])
def test_shard_map_over_batch_and_heads(axis: int) -> None:
    rng = np.random.default_rng(4)
    x = [rng.normal(size=(2, 2, *a.shape[2:])) for a in tensors()]
    spec = PartitionSpec(*[None] * axis, "b")
    split = jax.shard_map(tj.attention, mesh=mesh(), in_specs=(spec,) * 3, out_specs=spec)

    def second(f: Any) -> Any:
        return jax.jit(lambda *x: jax.jvp(jax.grad(partial(loss, f), (0, 1, 2)), x, x)[1])

    for got, want in zip(second(split)(*x), second(tj.attention)(*x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@COMPILED
@pytest.mark.parametrize("axis", [0, 1])
def test_jit_splits_calls_over_batch_and_heads(axis: int) -> None:
    rng = np.random.default_rng(4)
    spec = PartitionSpec(*[None] * axis, "b")
    plain = [rng.normal(size=(2, 2, *a.shape[2:])) for a in tensors()]
    x = [jax.device_put(a, NamedSharding(mesh(), spec)) for a in plain]
    program = jax.jit(jax.grad(partial(loss, tj.attention), (0, 1, 2)))
    text = program.lower(*x).compile().as_text()
    assert "all-gather" not in text and text.count(execution.TARGET) >= 2
    for got, want in zip(program(*x), jax.jit(program)(*plain), strict=True):
        assert got.sharding.spec == spec
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@COMPILED
def test_what_cannot_be_split_is_gathered() -> None:
    rng = np.random.default_rng(4)
    plain = [rng.normal(size=(2, 2, n, 3)) for n in (4, 6, 6)]
    spec = NamedSharding(mesh(), PartitionSpec(None, None, "b"))
    x = [jax.device_put(a, spec) for a in plain]
    same_bits(jax.jit(tj.attention)(*x), tw.numpy.attention(*plain))


@COMPILED
def test_a_program_that_was_exported_and_loaded_still_has_a_gradient() -> None:
    x = tensors("float32")
    f = jax.jit(partial(loss, tj.attention))
    allowed = [jax.export.DisabledSafetyCheck.custom_call(execution.TARGET)]
    exported = jax.export.export(f, disabled_checks=allowed)(*x)
    loaded = jax.export.deserialize(exported.serialize(vjp_order=1))
    grads = (jax.grad(g, (0, 1, 2))(*x) for g in (loaded.call, f))
    for got, want in zip(*grads, strict=True):
        same_bits(got, np.asarray(want))


@COMPILED
def test_export_with_a_batch_of_any_size() -> None:
    (batch,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), jnp.float32) for a in tensors()]
    allowed = [jax.export.DisabledSafetyCheck.custom_call(execution.TARGET)]
    exported = jax.export.export(jax.jit(tj.attention), disabled_checks=allowed)(*shapes)
    x = tensors("float32")
    same_bits(exported.call(*x), tw.numpy.attention(*x))


def test_abstract_evaluation_knows_shapes_and_dtypes() -> None:
    x = [jax.ShapeDtypeStruct(a.shape, jnp.bfloat16) for a in tensors()]
    found = jax.eval_shape(partial(tj.attention, return_lse=True), *x)
    assert (found.o.shape, found.o.dtype) == ((B, H, N, DV), jnp.bfloat16)
    assert (found.lse.shape, found.lse.dtype) == ((B, H, N), jnp.float32)


# Errors


def wrong(**changes: Any) -> Any:
    q, k, v = tensors()
    given = {"q": q, "k": k, "v": v, **changes}
    return lambda: jax.jit(lambda: tj.attention(given.pop("q"), **given))()


ERRORS = {
    "kind": (lambda: wrong(q=[1.0]), TypeError, "q must be a jax.Array, got list"),
    "dtype": (
        lambda: wrong(k=np.zeros((B, H, NK, D), np.float32)),
        TypeError,
        "k must have dtype float64 (from q), got float32",
    ),
    "integers": (
        lambda: wrong(q=np.zeros((B, H, N, D), np.int32)),
        TypeError,
        "q must have dtype float64, float32, bfloat16 or float16, got int32",
    ),
    "rank": (
        lambda: wrong(q=np.zeros((H, N, D))),
        ValueError,
        "q must have shape (B, H, N, D), got (3, 5, 3)",
    ),
    "shape": (
        lambda: wrong(k=np.zeros((B, H, NK, 11))),
        ValueError,
        "k must have shape (B, Hk, Nk, D) with D=3 (from q), got (2, 3, 7, 11)",
    ),
    "layout": (lambda: wrong(layout="nbhd"), ValueError, "layout must be 'bhnd' or 'bnhd'"),
    "mask": (
        lambda: wrong(mask=np.zeros((N, NK))),
        TypeError,
        "mask must be a tilewise mask or a boolean array (a mask that is added is a bias)",
    ),
    "shape of mask": (
        lambda: wrong(mask=np.ones((N, NK + 1), bool)),
        ValueError,
        "mask must be broadcastable to (B, H, N, Nk) = (2, 3, 5, 7), got (5, 8)",
    ),
    "lengths": (
        lambda: wrong(mask=tw.lengths([1, NK + 1])),
        ValueError,
        "mask lengths must be at most Nk=7, got 8",
    ),
    "implementation": (
        lambda: wrong(implementation="gpu"),
        ValueError,
        "implementation must be one of 'cpu', 'reference', 'triton', 'hopper', got 'gpu'",
    ),
    "softcap": (lambda: wrong(softcap=-1.0), ValueError, "softcap must be from 1e-15 to 1e+15"),
    "seed": (lambda: wrong(dropout_p=0.5), ValueError, "seed must be given where dropout_p"),
    "kind of seed": (
        lambda: wrong(dropout_p=0.5, seed=np.float64(1.0)),
        TypeError,
        "seed must be an integer",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_while_tracing_name_operator_argument_must_and_got(case: str) -> None:
    make, kind, text = ERRORS[case]
    with pytest.raises(kind) as caught:
        jax.eval_shape(make())
    assert str(caught.value).startswith(f"attention: {text}")


@COMPILED
def test_errors_of_values_are_raised_when_the_program_runs() -> None:
    q, k, v = tensors()
    f = jax.jit(lambda sinks: tj.attention(q, k, v, sinks=sinks))
    with pytest.raises(
        (jax.errors.JaxRuntimeError, ValueError), match="attention: sinks must be finite or -inf"
    ):
        f(np.array([1.0, math.inf, 0.0])).block_until_ready()


def test_third_derivatives_and_those_of_slopes_are_refused() -> None:
    q, k, v = tensors()
    f = lambda s: jnp.sum(jnp.sin(tj.attention(s * q, k, v)))  # noqa: E731
    with pytest.raises(tw.Unsupported, match="attention: third derivatives are not provided"):
        jax.grad(jax.grad(jax.grad(f)))(1.0)
    slopes = lambda s: jnp.sum(tj.attention(q, k, v, alibi_slopes=s))  # noqa: E731
    with pytest.raises(ValueError, match="attention: alibi_slopes must be without derivatives"):
        jax.grad(slopes)(np.ones(H))
