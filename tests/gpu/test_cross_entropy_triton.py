"""The Triton kernels of the cross-entropy against the reference, interpreted."""

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
from tilewise.ops.cross_entropy.gpu import launch, plan
from tilewise.ops.cross_entropy.record import FLAT
from tilewise.ops.cross_entropy.spec import Cotangents, Needed
from tilewise.shared import row_tiles
from tilewise.verify.device import on_arrays

Array = NDArray[Any]
F64, F32 = np.dtype(np.float64), np.dtype(np.float32)
BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
NAN, INF = np.nan, np.inf
TRITON: Any = on_arrays("cross_entropy", "triton")


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill all memory that kernels are to write with NaN before they do."""
    monkeypatch.setattr(launch, "empty", lambda shape, like: like.new_full(shape, NAN))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def drawn(*shape: int, dtype: Any = F64, spread: float = 3.0, seed: int = 0) -> Array:
    return np.asarray(spread * rng(seed).standard_normal(shape)).astype(dtype)


def indices(rows: tuple[int, int], classes: int, ignored: int = -100) -> Array:
    y = rng(7).integers(0, classes, rows)
    y.flat[1::4] = ignored
    return y


def wide_of(dtype: Any) -> Any:
    return F32 if dtype in (BF16, F16) else dtype


def results(by: Any, x: Array, targets: Array, weight: Array | None = None, **more: Any) -> Any:
    """All results and derivatives of logits `(A, C, I)`, for some cotangents and tangents."""
    options = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None}
    options |= {"reduction": "mean", **more}
    wide, rows = wide_of(x.dtype), (x.shape[0], x.shape[2])
    learned = targets.dtype.kind != "i"
    inputs = (x, targets, None, weight) if learned else (x, None, targets, weight)
    of_loss = rows if options["reduction"] == "none" else ()
    shapes = (of_loss, rows, of_loss)
    g, tg = ([drawn(*s, dtype=wide, seed=k + n) for n, s in enumerate(shapes)] for k in (20, 30))
    tx = drawn(*x.shape, dtype=x.dtype, spread=1, seed=2)
    tq = drawn(*x.shape, dtype=targets.dtype, spread=1, seed=3) if learned else None

    def run(kind: str, *arrays: Any) -> Any:
        results = FLAT.results(kind)
        return evaluate_by(by, FLAT, kind, arrays, options, (True,) * results)

    outputs = run("forward", *inputs)
    saved = (*inputs, *outputs)
    found = dict(zip(("loss", "lse", "z_loss"), outputs, strict=False))
    found |= dict(zip(("dx", "dq"), run("vjp", *g, *saved), strict=True))
    found |= dict(zip(("tloss", "tlse", "tz"), run("jvp", tx, tq, *saved), strict=True))
    second = run("vjp_jvp", *tg, tx, tq, *g, None, None, None, *saved)
    found |= dict(zip(("tdx", "tdq"), second, strict=True))
    return {name: value for name, value in found.items() if value is not None}


def agrees(x: Array, targets: Array, **options: Any) -> None:
    """Compare all results; each relative to the largest of its own kind."""
    got, want = (results(by, x, targets, **options) for by in (TRITON, "reference"))
    assert got.keys() == want.keys()
    u = unit_roundoff(x.dtype)
    rtol = 8 * u if x.dtype in (BF16, F16) else 4000 * u
    for name in got:
        a, b = (value.astype(np.float64) for value in (got[name], want[name]))
        assert got[name].dtype == want[name].dtype and a.shape == b.shape, name
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b), name)
        np.testing.assert_array_equal(np.isposinf(a), np.isposinf(b), name)
        size = np.abs(b[np.isfinite(b)]).max(initial=0.0)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * size, err_msg=name)


EVERY = {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 4.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.3},
    "all smoothed": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.2, "reduction": "none"},
    "weight": {"weight": np.abs(drawn(29))},
    "weights of zero": {"weight": np.zeros(29)},
    "softcap": {"softcap": 2.0},
    "everything": {**EVERY, "weight": drawn(29)},
    "everything by rows": {**EVERY, "weight": drawn(29), "reduction": "none"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_with_class_indices_and_every_derivative(name: str) -> None:
    agrees(drawn(5, 29, 1), indices((5, 1), 29), **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_option_with_class_probabilities_and_every_derivative(name: str) -> None:
    agrees(drawn(5, 29, 1), rng(4).random((5, 29, 1)), **OPTIONS[name])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_dtype_with_every_derivative(dtype: np.dtype[Any]) -> None:
    x, options = drawn(5, 29, 1, dtype=dtype), {**EVERY, "weight": drawn(29, dtype=wide_of(dtype))}
    agrees(x, indices((5, 1), 29), **options)
    for of_targets in {dtype, wide_of(dtype)}:
        agrees(x, rng(4).random((5, 29, 1)).astype(of_targets), **options)


@pytest.mark.parametrize("targets", ["indices", "probabilities"])
def test_rows_in_parts_with_every_derivative(targets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts, of which two are merged at a time."""
    monkeypatch.setattr(plan, "ENTRIES", dict.fromkeys(plan.ENTRIES, 16))
    monkeypatch.setattr(row_tiles, "MERGED_PARTS", 2)
    x = drawn(5, 37, 1)
    x[3, :16] = -INF
    y = indices((5, 1), 37) if targets == "indices" else rng(4).random((5, 37, 1))
    if targets == "probabilities":
        y[3, :16] = 0
    more = {"label_smoothing": 0.0} if targets == "probabilities" else {}
    agrees(drawn(5, 37, 1), y, weight=drawn(37), **EVERY)
    agrees(x, y, **more)


def layouts() -> dict[str, Array]:
    side_by_side = drawn(2, 11, 37)
    return {
        "axis in the middle": drawn(3, 11, 2),
        "many rows side by side": side_by_side,
        "every other class": drawn(5, 22, 1)[:, ::2],
        "transposed": drawn(11, 5, 1).transpose(1, 0, 2),
        "one class": drawn(5, 1, 1),
        "no row": drawn(0, 5, 1),
    }


@pytest.mark.parametrize("name", layouts())
def test_layout_with_every_derivative(name: str) -> None:
    x = layouts()[name]
    agrees(x, indices((x.shape[0], x.shape[2]), x.shape[1]), label_smoothing=0.1)
    agrees(x, np.asarray(rng(4).random(x.shape)))


def test_ignored_rows_hold_what_they_like() -> None:
    """NaN there reaches neither the loss nor a gradient of another row."""
    x, y = drawn(7, 29, 1), indices((7, 1), 29)
    spoiled = np.where((y == -100)[:, None], NAN, x)
    g = (np.asarray(1.5), None, np.asarray(0.5))
    options = {"ignore_index": -100, **EVERY, "reduction": "mean"}
    for array in (x, spoiled):
        saved = evaluate_by(TRITON, FLAT, "forward", (array, None, y), options, (True,) * 6)
        arrays = (*g, array, None, y, None, *saved)
        grads = evaluate_by(TRITON, FLAT, "vjp", arrays, options, (True, False))[0]
        assert np.isfinite(saved[0]) and not grads[y[:, 0] == -100].any()
        if array is x:
            want = saved[0], grads
    assert want[0] == saved[0] and want[1].tobytes() == grads.tobytes()


@pytest.mark.parametrize("of_all", [-100, 3])
def test_all_rows_ignored_count_nothing(of_all: int) -> None:
    x, y = drawn(5, 29, 1), np.full((5, 1), of_all)
    agrees(x, y, ignore_index=of_all)


def test_rare_values_stay_in_their_rows() -> None:
    x, y = drawn(7, 29, 1), np.arange(7)[:, None]
    x[1, 3], x[2, 5], x[3] = NAN, INF, -INF
    x[4, 9], x[5, 5] = -INF, -INF
    agrees(x, y, reduction="none")
    agrees(x, y, reduction="none", z_loss=0.1)


def test_large_logits_keep_their_digits() -> None:
    x, y = np.full((3, 29, 1), -1e9, F32), indices((3, 1), 29)
    agrees(x, y, reduction="none")
    loss = twn.cross_entropy(x, y, class_axis=1, reduction="none", implementation=TRITON)
    np.testing.assert_allclose(loss[y != -100], np.log(29), rtol=1e-6)


def test_the_gradient_may_take_the_place_of_the_logits() -> None:
    x, y = drawn(5, 29, 3), indices((5, 3), 29)
    call = FLAT.prepare((x, None, y), {"ignore_index": -100, **EVERY, "reduction": "sum"})
    found = TRITON.forward(call, None)
    g = twn.cross_entropy_vjp
    want = g(1.0, x, y, class_axis=1, reduction="sum", implementation="reference", **EVERY)
    one = (np.asarray(1.0), None, None)
    grads = TRITON.vjp(call, Cotangents(*one), found.stats, Needed(), x)
    assert np.shares_memory(grads.dlogits, x)
    np.testing.assert_allclose(x, want.dlogits, rtol=1e-11, atol=1e-13)


def test_bits_of_a_row_do_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ENTRIES", dict.fromkeys(plan.ENTRIES, 16))
    x, y = drawn(13, 29, 1, dtype=F32), indices((13, 1), 29)
    options = {"class_axis": 1, "reduction": "none", "implementation": TRITON, **EVERY}
    whole, part = (twn.cross_entropy(x[i], y[i], **options) for i in (slice(None), slice(5, 9)))
    assert whole[5:9].tobytes() == part.tobytes()


@pytest.mark.parametrize("targets", ["indices", "probabilities"])
def test_pytorch_differentiates_twice(targets: str) -> None:
    """Backward, double backward and forward mode through the door."""
    x = torch.from_numpy(drawn(5, 13))
    y = torch.from_numpy(indices((5, 1), 13)[:, 0])
    if targets == "probabilities":
        y = torch.from_numpy(rng(4).random((5, 13)))

    def loss(x: Any, by: str) -> Any:
        return twt.cross_entropy(x, y, implementation=by, **EVERY)

    found = {}
    for by in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(leaf, by), leaf, create_graph=True)
        (second,) = torch.autograd.grad(g.square().sum(), leaf)
        moved = torch.func.jvp(lambda t, by=by: loss(t, by), (x,), (torch.ones_like(x),))[1]
        found[by] = (g.detach(), second, moved)
    for a, b in zip(*found.values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)


def test_arrays_are_refused_with_a_reason() -> None:
    x, y = np.zeros((3, 5), np.float32), np.zeros(3, np.int64)
    with pytest.raises(Unsupported, match="computes on tensors of PyTorch, not on arrays"):
        twn.cross_entropy(x, y, implementation="triton")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_planned_compilations_name_every_argument_once(arch: str) -> None:
    planned = list(plan.planned(arch))
    assert len({one.name for one in planned}) == len(planned)
    for one in planned:
        given = [*one.signature, *one.constants]
        assert sorted(given) == sorted(one.kernel.arg_names), one.name
        assert one.divisible <= one.signature.keys(), one.name
