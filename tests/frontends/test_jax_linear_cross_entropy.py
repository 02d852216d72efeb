"""Linear cross-entropy in JAX: values, every transformation, what is computed when, error texts."""

from __future__ import annotations

import re
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
from tilewise.jax import execution  # noqa: E402

T, C, V = 7, 3, 5
RNG = np.random.default_rng(11)
H, W, B = (RNG.normal(size=shape) for shape in ((T, C), (V, C), (V,)))
Y = np.array([1, 4, -100, 0, 2, -100, 1])
COUNTS = RNG.uniform(0.5, 2.0, size=V)
ALL = {"label_smoothing": 0.2, "z_loss": 0.03, "class_weight": COUNTS, "softcap": 2.5}
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "everything": ALL,
    "everything of each token": {**ALL, "reduction": "none", "shift": 2},
    "a sum in chunks": {"reduction": "sum", "token_chunk": 2, "vocab_chunk": 2048},
}


@pytest.fixture(autouse=True, scope="module")
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def textbook(
    h: Any,
    w: Any,
    b: Any,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Any = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: int = 0,
    **chunks: int,
) -> tuple[Any, ...]:
    """Loss, lse, entropy and z-loss in jax.numpy, with the logits."""
    h, y = h[: T - shift], Y[shift:]
    s = h @ w.T + b
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    lse = jnp.log(jnp.exp(s).sum(-1))
    log_p, kept = s - lse[:, None], y >= 0
    hot = jax.nn.one_hot(jnp.maximum(y, 0), V, dtype=s.dtype)
    t = class_weight * ((1 - label_smoothing) * hot + label_smoothing / V)
    z = jnp.where(kept, z_loss * lse**2, 0.0)
    loss = jnp.where(kept, -(t * log_p).sum(-1), 0.0) + z
    count = (class_weight * hot).sum(-1)[kept].sum() if reduction == "mean" else 1.0
    if reduction != "none":
        loss, z = loss.sum() / count, z.sum() / count
    return loss, lse, -(jnp.exp(log_p) * log_p).sum(-1), z


def door(h: Any, w: Any, b: Any, **options: Any) -> tuple[Any, ...]:
    asked = dict.fromkeys(("return_lse", "return_entropy", "return_z_loss"), True)
    r = tj.linear_cross_entropy(h, w, Y, bias=b, **asked, **options)
    return r.loss, r.lse, r.entropy, r.z_loss


def loss_of(h: Any, w: Any, b: Any = None, y: Any = Y, **options: Any) -> Any:
    return tj.linear_cross_entropy(h, w, y, bias=b, **options)


def scalar(f: Callable[..., Any], *x: Any) -> Any:
    return sum(jnp.sum(jnp.sin(2 * a)) for a in jax.tree.leaves(f(*x)))


def along(x: Any, phase: float) -> Any:
    return jax.tree.map(lambda a: jnp.cos(3 * jnp.asarray(a) + phase), x)


def every(f: Callable[..., Any], x: tuple[Any, ...]) -> dict[str, Any]:
    """What all transformations make of a function."""
    every_x = tuple(range(len(x)))
    grad = jax.grad(partial(scalar, f), every_x)
    slope = lambda *y: jax.jvp(partial(scalar, f), y, along(x, 1))[1]  # noqa: E731
    h, *rest = x
    first = lambda h: scalar(f, h, *rest)  # noqa: E731
    _, linear = jax.linearize(f, *x)
    return {
        "value": f(*x),
        "grad": grad(*x),
        "grad of one input": jax.grad(first)(h),
        "jvp": jax.jvp(f, x, along(x, 1)),
        "linearize": linear(*along(x, 1)),
        "forward over reverse": jax.jvp(grad, x, along(x, 1))[1],
        "reverse over forward": jax.grad(slope, every_x)(*x),
        "reverse over reverse": jax.grad(
            lambda *y: sum(map(jnp.vdot, grad(*y), along(x, 1))), every_x
        )(*x),
        "forward over forward": jax.jvp(lambda *x: jax.jvp(f, x, along(x, 1)), x, along(x, 2))[1],
        "vmap": jax.vmap(lambda h: grad(h, *rest), -1)(jnp.stack([h, -h], -1)),
        "under vmap": jax.grad(
            lambda w: scalar(jax.vmap(lambda h: f(h, w, x[2])), jnp.stack([h, -h]))
        )(x[1]),
        "checkpoint": jax.grad(partial(scalar, jax.checkpoint(f)))(*x),
    }


def quickly(f: Callable[..., Any], x: tuple[Any, ...]) -> Any:
    """Run a compiled function on which XLA has spent little time."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(f).lower(x).compile(options)(x)


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for transformation in found:
        pairs = (jax.tree.leaves(values[transformation]) for values in (found, wanted))
        for got, want in zip(*pairs, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9, err_msg=transformation)


CASES = [
    ("everything", "all"),
    ("everything of each token", "all"),
    ("nothing", "loss"),
    ("a sum in chunks", "loss"),
]


@pytest.mark.parametrize(("options", "results"), CASES)
def test_every_transformation_agrees_with_the_textbook(options: str, results: str) -> None:
    """Of the loss alone gradients are computed in the forward pass, of all results later."""
    more, part = OPTIONS[options], slice(None) if results == "all" else slice(1)

    def ours(*x: Any) -> Any:
        return door(*x, **more) if results == "all" else (loss_of(*x, **more),)

    x = (H, W, B)
    wanted = quickly(partial(every, lambda *x: textbook(*x, **more)[part]), x)
    same(quickly(partial(every, ours), x), wanted)


def test_outside_of_compiled_programs() -> None:
    found = jax.value_and_grad(loss_of, (0, 1))(H, W)
    want = jax.jit(jax.value_and_grad(lambda *x: textbook(*x, 0.0)[0], (0, 1)))(H, W)
    same({"": found}, {"": want})


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_results_have_the_bits_of_numpy(dtype: str) -> None:
    h, w, b = (x.astype(jnp.dtype(dtype)) for x in (H, W, B))
    asked = dict.fromkeys((f"return_{name}" for name in ("lse", "entropy", "argmax")), True)
    for bits in (False, True) if dtype != "float64" else (True,):
        with jax.enable_x64(bits):
            got = jax.jit(partial(tj.linear_cross_entropy, **asked))(h, w, Y, bias=b)
            want = tw.numpy.linear_cross_entropy(h, w, Y, bias=b, **asked)
            for name in ("loss", "lse", "entropy", "argmax"):
                ours, theirs = getattr(got, name), getattr(want, name)
                np.testing.assert_array_equal(ours, theirs, err_msg=name)
                assert ours.dtype == theirs.dtype or (name == "argmax" and ours.dtype == np.int32)
            assert tw.linear_cross_entropy(jnp.asarray(h), w, Y, bias=b) == want.loss


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_gradients_of_both_ways_have_the_same_bits(dtype: str) -> None:
    """Those of the forward pass, and those that `checkpoint` computes again; times a factor."""
    x = tuple(a.astype(jnp.dtype(dtype)) for a in (H, W, B))
    f = lambda *x: 3 * loss_of(*x)  # noqa: E731
    joined = jax.jit(jax.grad(f, (0, 1, 2)))(*x)
    apart = jax.jit(jax.grad(jax.checkpoint(f), (0, 1, 2)))(*x)
    for a, b, given in zip(joined, apart, x, strict=True):
        assert a.dtype == given.dtype and a.any()
        np.testing.assert_array_equal(a, b)


Ran = list[tuple[str, tuple[bool, ...]]]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Which functions programs run, and which results they compute."""
    calls: Ran = []
    evaluate = execution.evaluate

    def note(operator: Any, kind: str, arrays: Any, options: Any, needed: Any) -> Any:
        calls.append((kind, tuple(needed)))
        return evaluate(operator, kind, arrays, options, needed)

    monkeypatch.setattr(execution, "evaluate", note)
    return calls


def run(f: Callable[..., Any], *x: Any) -> None:
    jax.block_until_ready(jax.jit(f)(*x))


PLAIN = ("forward", (True, True, True, False, False, False, False, False, False))
STATISTICS = ("forward", (True, True, True, False, True, True, False, False, False))


def test_a_step_is_one_pass(ran: Ran) -> None:
    """With the gradients that are asked for; float16 and chunks of classes take two."""
    for f in (loss_of, jax.jit(loss_of), lambda *x: 3 * loss_of(*x)):
        run(jax.value_and_grad(f, (0, 1)), H, W, B)
        assert [kind for kind, _ in ran] == ["forward"]
        assert ran[0][1][6:] == (True, True, False)
        ran.clear()
    run(jax.value_and_grad(loss_of), H.astype(np.float16), W.astype(np.float16))
    assert ran == [STATISTICS, ("vjp", (True, False, False))]
    ran.clear()
    run(jax.value_and_grad(partial(loss_of, vocab_chunk=2048)), H, W)
    assert ran == [STATISTICS, ("vjp", (True, False, False))]


def test_what_nobody_reads_is_not_computed(ran: Ran) -> None:
    t = along((H, W), 1)
    run(loss_of, H, W)
    run(lambda *x: jax.vjp(loss_of, *x)[0], H, W)
    run(lambda *x: jax.linearize(loss_of, *x)[0], H, W)
    assert ran == [PLAIN] * 3
    ran.clear()
    run(lambda *x: jax.jvp(loss_of, x, t), H, W)
    assert ran == [STATISTICS, ("jvp", (True, True, True))]
    ran.clear()
    run(lambda *x: jax.jvp(jax.grad(loss_of), x, t)[1], H, W)
    assert ran == [STATISTICS, ("vjp_jvp", (True, False, False))]


def test_nothing_as_large_as_the_logits_is_stored() -> None:
    T, C, V = 97, 2, 89
    h, w = np.ones((T, C), np.float32), np.ones((V, C), np.float32)
    y = np.arange(T) % V
    for f in (loss_of, partial(loss_of, reduction="none")):
        step = jax.jit(jax.value_and_grad(lambda h, w, f=f: f(h, w, y=y).sum(), (0, 1)))
        hvp = jax.jit(lambda h, w, f=f: jax.jvp(jax.grad(lambda h: f(h, w, y=y).sum()), (h,), (h,)))
        for program in (step, hvp):
            assert max(map(int, re.findall(r"tensor<(\d+)x", program.lower(h, w).as_text()))) == T
            assert not re.search(rf"tensor<({T}x{V}|{V}x{T})x", program.lower(h, w).as_text())


def test_a_scan_over_parts_with_and_without_checkpoint() -> None:
    h, y = np.stack([H, 2 * H]), np.stack([Y, np.roll(Y, 1)])

    def total(body: Callable[..., Any], w: Any) -> Any:
        step = lambda sum_, part: (sum_ + body(w, *part), None)  # noqa: E731
        return jax.lax.scan(step, jnp.zeros(()), (h, y))[0]

    body = lambda w, h, y: loss_of(h, w, y=y)  # noqa: E731
    want = sum(jax.grad(body)(W, *part) for part in zip(h, y, strict=True))
    for f, stacked in ((body, True), (jax.checkpoint(body), False)):
        program = jax.jit(jax.grad(partial(total, f))).lower(W)
        assert (f"tensor<2x{V}x{C}xf64>" in program.as_text()) == stacked
        np.testing.assert_allclose(program.compile()(W), want, rtol=1e-12)


def test_any_leading_dimensions() -> None:
    h, y = RNG.normal(size=(2, 3, C)), RNG.integers(V, size=(2, 3))
    flat = loss_of(h.reshape(6, C), W, y=y.ravel(), reduction="none")
    np.testing.assert_array_equal(loss_of(h, W, y=y, reduction="none"), flat.reshape(2, 3))
    assert loss_of(h[0, 0], W, y=jnp.asarray(y)[0, 0]) == flat[0]
    for y_ in (y.astype(np.uint8), y.astype(np.int32)):
        assert loss_of(h, W, y=y_) == loss_of(h, W, y=y)
    r = tj.linear_cross_entropy(h, W, y, shift=1, return_argmax=True, reduction="none")
    np.testing.assert_allclose(r.loss, loss_of(h[:, :-1], W, y=y[:, 1:], reduction="none"))
    np.testing.assert_array_equal(r.argmax, (h[:, :-1] @ W.T).argmax(-1))
    empty = loss_of(h[:0], W, y=y[:0])
    assert empty == 0


def test_without_a_kept_token_all_is_zero() -> None:
    y = np.full(T, -100)
    loss, grads = jax.jit(jax.value_and_grad(partial(loss_of, y=y, **ALL), (0, 1)))(H, W)
    assert loss == 0 and not any(g.any() for g in grads)


def test_derivatives_agree_with_differences() -> None:
    f = jax.jit(partial(door, **OPTIONS["everything of each token"]))
    check_grads(f, (H, W, B), order=2, modes=("fwd", "rev"))


def test_third_derivatives_are_refused() -> None:
    curve = lambda h: jnp.vdot(jax.jvp(jax.grad(lambda h: loss_of(h, W)), (h,), (H,))[1], H)  # noqa: E731
    with pytest.raises(tw.Unsupported, match="third derivatives are not provided"):
        jax.grad(curve)(H)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "kind": ({"hidden": 3.0}, TypeError, "hidden must be a jax.Array, got float"),
    "weight of another dtype": (
        {"weight": W.astype(np.float32)},
        TypeError,
        "weight must have dtype float64 (from hidden), got float32",
    ),
    "weight of another width": (
        {"weight": W[:, :2]},
        ValueError,
        "weight must have shape (V, C) with C=3 (from hidden), got (5, 2)",
    ),
    "no width": (
        {"hidden": H[:, :0], "weight": W[:, :0]},
        ValueError,
        "hidden must have shape (T, C) with 1 <= C",
    ),
    "bias of another size": ({"bias": B[:2]}, ValueError, "bias must have shape (V,) with V=5"),
    "targets of a list": ({"targets": [1]}, TypeError, "targets must be a jax.Array, got list"),
    "targets of bool": (
        {"targets": Y > 0},
        TypeError,
        "targets must have an integer dtype up to int64, got bool",
    ),
    "targets of another shape": (
        {"targets": Y[:3]},
        ValueError,
        "targets must have shape (7,) (from hidden), got (3,)",
    ),
    "probabilities": (
        {"targets": np.ones((T, V))},
        tw.Unsupported,
        "targets that are class probabilities would be as large as the logits",
    ),
    "softcap": ({"softcap": 0}, ValueError, "softcap must be from 1e-15 to 1e+15, got 0"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum'"),
    "shift": ({"shift": -1}, ValueError, "shift must be from 0 to 2**63 - 1, got -1"),
    "ignored index of a shift": (
        {"targets": Y.astype(np.int32), "shift": 1, "ignore_index": 1 << 40},
        ValueError,
        "ignore_index must fit into the 32 bits of targets, for a shift, got 1099511627776",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_operator_argument_must_and_got(case: str) -> None:
    change, kind, text = ERRORS[case]
    with pytest.raises(kind) as caught:
        tj.linear_cross_entropy(**({"hidden": H, "weight": W, "targets": Y} | change))
    assert f"linear_cross_entropy: {text}" in str(caught.value)


def test_class_weights_have_no_gradient() -> None:
    f = lambda counts: loss_of(H, W, class_weight=counts)  # noqa: E731
    assert not jax.grad(f)(COUNTS).any()


def test_a_target_out_of_range_is_found_when_the_program_runs() -> None:
    with pytest.raises(
        (jax.errors.JaxRuntimeError, ValueError), match="targets must be from 0 to 4"
    ):
        run(lambda y: loss_of(H, W, y=y), np.full(T, V))
