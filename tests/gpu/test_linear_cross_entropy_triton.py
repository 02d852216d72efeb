"""The Triton kernels of the linear cross-entropy against the reference, interpreted."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tilewise.numpy as twn
import tilewise.torch as twt
from tilewise.base.dtypes import unit_roundoff
from tilewise.base.errors import Unsupported
from tilewise.dispatch import evaluate_by
from tilewise.ops.linear_cross_entropy.gpu import launch, plan
from tilewise.ops.linear_cross_entropy.record import FLAT
from tilewise.verify.device import on_arrays

Array = NDArray[Any]
F64, F32 = np.dtype(np.float64), np.dtype(np.float32)
BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
NAN, INF = np.nan, np.inf
TRITON: Any = on_arrays("linear_cross_entropy", "triton")
T, C, V = 19, 23, 37


def poison(shape: tuple[int, ...], like: Any) -> Any:
    return like.new_full(shape, NAN if like.is_floating_point() else 77)


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill all memory that kernels are to write with numbers that are wrong."""
    monkeypatch.setattr(launch, "empty", poison)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def drawn(*shape: int, dtype: Any = F64, seed: int = 0) -> Array:
    return np.asarray(rng(seed).standard_normal(shape)).astype(dtype)


def indices(tokens: int = T, classes: int = V) -> Array:
    y = rng(7).integers(0, classes, tokens)
    y[1::4] = -100
    return y


def wide_of(dtype: Any) -> Any:
    return F32 if dtype in (BF16, F16) else dtype


def inputs_of(
    dtype: Any = F64, *, tokens: int = T, bias: Any = True, class_weight: bool = False
) -> list[Any]:
    """Hidden states, weight, bias, targets and class weights."""
    of_bias = None if not bias else drawn(V, dtype=dtype if bias is True else bias, seed=3)
    counts = np.abs(drawn(V, dtype=wide_of(dtype), seed=4)) if class_weight else None
    hidden, weight = drawn(tokens, C, dtype=dtype, seed=1), drawn(V, C, dtype=dtype, seed=2)
    return [hidden, weight, of_bias, indices(tokens), counts]


def results(by: Any, inputs: list[Any], *, entropy: bool = True, **more: Any) -> Any:
    """All results and derivatives, for some cotangents and tangents."""
    options: dict[str, Any] = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0}
    options |= {"softcap": None, "reduction": "mean", "token_chunk": None, "vocab_chunk": None}
    options |= {"gradient_filter": None, "lse": True, "entropy": entropy, **more}
    hidden = inputs[0]
    wide, rows = wide_of(hidden.dtype), (len(hidden),)
    of_loss = rows if options["reduction"] == "none" else ()
    shapes = [of_loss, rows, rows if entropy else None]
    g, tg = (
        [None if s is None else drawn(*s, dtype=wide, seed=k + n) for n, s in enumerate(shapes)]
        for k in (20, 30)
    )
    moves = [
        None if x is None else drawn(*x.shape, dtype=x.dtype, seed=40 + n)
        for n, x in enumerate(inputs[:3])
    ]

    def run(kind: str, *arrays: Any, needed: Any = None) -> Any:
        needed = needed or (True,) * FLAT.results(kind)
        return evaluate_by(by, FLAT, kind, arrays, options, needed)

    outputs = run("forward", *inputs, needed=(True,) * 6 + (False,) * 3)
    saved = (*inputs, *outputs[:3], *outputs[4:])
    found = dict(zip(("loss", "lse", "entropy", "argmax"), outputs, strict=False))
    gradients = ("dhidden", "dweight", "dbias")
    found |= dict(zip(gradients, run("vjp", *g, *saved), strict=True))
    tangents = run("jvp", *moves, *saved)
    found |= dict(zip(("tloss", "tlse", "tentropy"), tangents, strict=True))
    second = run("vjp_jvp", *tg, *moves, *g, None, None, None, *saved)
    found |= {f"t{name}": value for name, value in zip(gradients, second, strict=True)}
    return {name: value for name, value in found.items() if value is not None and value.size}


def agrees(inputs: list[Any], **options: Any) -> None:
    """Compare all results; each relative to the largest of its own kind."""
    got, want = (results(by, inputs, **options) for by in (TRITON, "reference"))
    assert got.keys() == want.keys()
    u = unit_roundoff(inputs[0].dtype)
    rtol = 16 * u if inputs[0].dtype in (BF16, F16) else 4000 * u
    for name in got:
        a, b = (value.astype(np.float64) for value in (got[name], want[name]))
        assert got[name].dtype == want[name].dtype and a.shape == b.shape, name
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b), name)
        size = np.abs(b[np.isfinite(b)]).max(initial=0.0)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * size, err_msg=name)


EVERY = {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 4.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"entropy": False},
    "sum": {"reduction": "sum", "entropy": False},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.3},
    "z-loss": {"z_loss": 0.2},
    "softcap": {"softcap": 2.0},
    "everything": EVERY,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_with_every_derivative(name: str) -> None:
    weighted = name in ("none", "everything")
    agrees(inputs_of(bias=name != "plain", class_weight=weighted), **OPTIONS[name])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_dtype_with_every_derivative(dtype: np.dtype[Any]) -> None:
    inputs = inputs_of(dtype, bias=wide_of(dtype), class_weight=True)
    inputs[1] = (inputs[1] / 4).astype(dtype)
    agrees(inputs, **EVERY)


def test_strips_of_classes_change_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is as wide as the chunk that is asked for, where at first there was one for all."""
    inputs, widths, strip = inputs_of(F32), [], launch.strip

    def seen(*given: Any) -> int:
        widths.append(strip(*given))
        return widths[-1]

    monkeypatch.setattr(launch, "strip", seen)
    whole = results(TRITON, inputs, **EVERY)
    strips = results(TRITON, inputs, vocab_chunk=17, **EVERY)
    assert widths == [48, 48, 16, 16]
    for name in whole:
        assert whole[name].tobytes() == strips[name].tobytes(), name
    agrees(inputs_of(BF16, bias=False), entropy=False, vocab_chunk=16)


def test_bits_of_a_token_do_not_depend_on_the_others() -> None:
    hidden, weight, bias, y, _ = inputs_of(F32)
    options = {"bias": bias, "reduction": "none", "implementation": TRITON, **EVERY}
    whole, part = (
        twn.linear_cross_entropy(hidden[i], weight, y[i], **options)
        for i in (slice(None), slice(16, 19))
    )
    assert whole[16:].tobytes() == part.tobytes()


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    agrees(inputs_of(tokens=tokens), entropy=False)


def test_all_tokens_ignored_count_nothing() -> None:
    inputs = inputs_of()
    inputs[3][:] = -100
    agrees(inputs, entropy=False)
    inputs = inputs_of(class_weight=True)
    inputs[4][:] = 0
    agrees(inputs, entropy=False)


def test_ignored_tokens_hold_what_they_like() -> None:
    """NaN there reaches neither the loss nor a gradient."""
    found = []
    for fill in (1.0, NAN):
        inputs = inputs_of()
        inputs[0][inputs[3] == -100] = fill
        options = {"lse": False, "entropy": False, "reduction": "mean", "ignore_index": -100}
        options |= dict.fromkeys(("token_chunk", "vocab_chunk", "gradient_filter")) | EVERY
        needed = (True,) * 6 + (False,) * 3
        outputs = evaluate_by(TRITON, FLAT, "forward", inputs, options, needed)
        saved = (*inputs, *outputs[:3], *outputs[4:])
        grads = evaluate_by(
            TRITON, FLAT, "vjp", (np.ones(()), None, None, *saved), options, (True,) * 3
        )
        found.append((outputs[0], *grads))
    for a, b in zip(*found, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)
    assert not found[1][1][indices() == -100].any()


def test_absent_classes_have_no_part() -> None:
    """A bias of -inf takes a class out."""
    inputs = inputs_of()
    inputs[2][[5, 20, 21]] = -INF
    inputs[3][np.isin(inputs[3], [5, 20, 21])] = 7
    agrees(inputs)


def test_parts_of_the_classes_merge_into_the_whole() -> None:
    hidden, weight, bias, y, _ = inputs_of()
    options = {"label_smoothing": 0.2, "z_loss": 0.1}
    whole = twn.linear_cross_entropy(
        hidden, weight, y, bias=bias, class_weight=None, reduction="none", **options
    )
    grads = twn.linear_cross_entropy_vjp(
        np.where(y == -100, 0.0, 1.0), hidden, weight, y, bias=bias, reduction="none", **options
    )
    parts = {0: slice(0, 23), 23: slice(23, V)}
    given = {
        first: {"bias": bias[cut], "classes": V, "first_class": first, **options}
        for first, cut in parts.items()
    }
    by = {"implementation": TRITON}
    states = [
        twn.linear_cross_entropy_shard(hidden, weight[cut], y, **given[first], **by)
        for first, cut in parts.items()
    ]
    merged = twn.merge_shards(states, y, z_loss=options["z_loss"])
    np.testing.assert_allclose(merged.loss, whole, rtol=1e-12)
    g = np.where(y == -100, 0.0, 1.0)
    found = [
        twn.linear_cross_entropy_shard_vjp(g, hidden, weight[cut], y, merged, **given[first], **by)
        for first, cut in parts.items()
    ]
    dweight = np.concatenate([part.dweight for part in found])
    np.testing.assert_allclose(dweight, grads.dweight, rtol=1e-10, atol=1e-12)
    dhidden = sum(part.dhidden for part in found)
    np.testing.assert_allclose(dhidden, grads.dhidden, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_door_of_arrays_reduces_once(reduction: str) -> None:
    hidden, weight, bias, y, counts = inputs_of(class_weight=True)
    given = {"bias": bias, "class_weight": counts, "reduction": reduction, "z_loss": 0.1}
    g = drawn(T, seed=20) if reduction == "none" else np.asarray(0.7)
    move = drawn(T, C, seed=40)
    found = []
    for by in (TRITON, "reference"):
        options: dict[str, Any] = {**given, "implementation": by}
        loss = twn.linear_cross_entropy(hidden, weight, y, **options)
        grads = twn.linear_cross_entropy_vjp(g, hidden, weight, y, **options)
        moved = twn.linear_cross_entropy_jvp(move, hidden, weight, y, **options)
        second = twn.linear_cross_entropy_vjp_jvp(
            g, move, hidden, weight, y, tdloss=0.3 * g, **options
        )
        found.append([loss, *grads, moved.tloss, *second])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"token_chunk": 5}, "for all tokens and some classes; give vocab_chunk for less"),
        ({"gradient_filter": 0.1}, "leaves out no gradients"),
    ],
)
def test_what_is_not_served_is_refused(option: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        results(TRITON, inputs_of(F32), **option)


def test_argmax_is_the_first_of_equals() -> None:
    hidden, weight, _, y, _ = inputs_of()
    weight[[20, 35]] = weight[3] = 3 * hidden.sum(axis=0)
    options = {"return_argmax": True, "reduction": "none"}
    got, want = (
        twn.linear_cross_entropy(hidden, weight, y, implementation=by, **options).argmax
        for by in (TRITON, "reference")
    )
    assert (got == 3).any()
    np.testing.assert_array_equal(got, want)


def test_gradients_in_the_forward_pass_are_those_of_the_backward() -> None:
    inputs = inputs_of(F32)
    options = {"ignore_index": -100, "reduction": "mean", "lse": False, "entropy": False, **EVERY}
    options |= dict.fromkeys(("token_chunk", "vocab_chunk", "gradient_filter"))
    outputs = evaluate_by(TRITON, FLAT, "forward", inputs, options, (True,) * 9)
    saved = (*inputs, *outputs[:3], *outputs[4:])
    one = np.ones((), F32)
    grads = evaluate_by(TRITON, FLAT, "vjp", (one, None, None, *saved), options, (True,) * 3)
    for kept, grad in zip(outputs[6:], grads, strict=True):
        assert kept.tobytes() == grad.tobytes()


def test_pytorch_differentiates_twice() -> None:
    """Backward, double backward and forward mode through the door, weights in any strides."""
    hidden, weight, bias, y, _ = map(torch.from_numpy, inputs_of(class_weight=True))
    weight = weight.t().contiguous().t()

    def loss(by: str) -> Any:
        def run(h: Any, w: Any, b: Any) -> Any:
            options = {"bias": b, "shift": 1, "implementation": by, **EVERY}
            return twt.linear_cross_entropy(h, w, y, **options)

        return run

    found = {}
    for by in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        grads = torch.autograd.grad(loss(by)(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        moves = tuple(torch.ones_like(x) for x in leaves)
        moved = torch.func.jvp(loss(by), (hidden, weight, bias), moves)[1]
        found[by] = (*(g.detach() for g in grads), *second, moved)
    for a, b in zip(*found.values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_strips_are_whole_tiles_and_bounded() -> None:
    for tokens in (1, 37, 4096, 1 << 25):
        width = plan.strip(tokens, 128_256, 128, 64)
        assert width % 128 == 0
        assert width == 128 or width * tokens <= plan.STRIP_ENTRIES
    assert plan.strip(7, 100, 128, 64) == 128
    assert [plan.strip(7, 999, 128, 64, chunk) for chunk in (1, 300, 9999)] == [128, 256, 1024]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_planned_compilations_name_every_argument_once(arch: str) -> None:
    planned = list(plan.planned(arch))
    assert len({one.name for one in planned}) == len(planned)
    for one in planned:
        given = [*one.signature, *one.constants]
        assert sorted(given) == sorted(one.kernel.arg_names), one.name
        assert one.divisible <= one.signature.keys(), one.name
