"""The compiled linear cross-entropy: derivatives, same bits, what is absent, shards, exactness."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

core = pytest.importorskip("tilewise._core")

Array = NDArray[Any]
Setting = Callable[..., AbstractContextManager[None]]
F64, F32 = np.dtype(np.float64), np.dtype(np.float32)
BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
STORAGES = {BF16: "bfloat16", F16: "float16"}
IGNORED = -100
ROWS = ("loss", "lse", "m", "log_l", "picked", "mass", "z_loss_out", "entropy")
ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}


def numbers_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return F64 if dtype == F64 else F32


class Problem:
    """A call's inputs, and the four functions of the core with NaN in what they are to write."""

    def __init__(
        self,
        sizes: tuple[int, int, int] = (53, 13, 419),
        dtype: np.dtype[Any] = F64,
        bias: bool = False,
        class_weight: bool = False,
        ignored: bool = True,
        **options: Any,
    ) -> None:
        T, C, V = self.sizes = sizes
        rng = np.random.default_rng(T * C + V)
        self.dtype, self.numbers = dtype, numbers_of(dtype)
        self.hidden = rng.standard_normal((T, C)).astype(dtype)
        self.weight = (0.7 * rng.standard_normal((V, C))).astype(dtype)
        self.bias = rng.standard_normal(V).astype(dtype) if bias else None
        self.targets = rng.integers(0, V, T)
        if ignored:
            self.targets[::5] = IGNORED
        weights = rng.uniform(0.1, 2.0, V).astype(self.numbers)
        self.class_weight = weights if class_weight else None
        self.options = options
        self.g = rng.uniform(0.5, 1.5, T).astype(self.numbers)

    def given(self) -> dict[str, Any]:
        arrays = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {
            **{name: self.bits(x) for name, x in arrays.items()},
            "targets": self.targets,
            "class_weight": self.class_weight,
            "storage": STORAGES.get(self.dtype),
            **self.options,
        }

    @staticmethod
    def bits(x: Array | None) -> Array | None:
        return x.view(np.uint16) if x is not None and x.dtype in STORAGES else x

    def rows(self, *names: str) -> dict[str, Array]:
        return {name: np.full(self.sizes[0], np.nan, self.numbers) for name in names}

    def gradients(
        self, dtype: np.dtype[Any] | None = None, prefix: str = "d"
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """The arrays of gradients, and the same as the core takes them."""
        T, C, V = self.sizes
        shapes: dict[str, tuple[int, ...]] = {"hidden": (T, C), "weight": (V, C)}
        if self.bias is not None:
            shapes["bias"] = (V,)
        found = {prefix + n: np.full(s, np.nan, dtype or self.dtype) for n, s in shapes.items()}
        return found, {name: self.bits(x) for name, x in found.items()}

    def forward(
        self, gradients: bool = True, dtype: np.dtype[Any] | None = None
    ) -> dict[str, Array]:
        found = self.rows(*ROWS)
        argmax = np.full(self.sizes[0], -7)
        of, views = self.gradients(dtype) if gradients else ({}, {})
        core.linear_cross_entropy_forward(**self.given(), **found, **views, argmax=argmax, g=self.g)
        return {**found, **of, "argmax": argmax}

    def saved(self, entropy: bool = True) -> dict[str, Array]:
        found = self.forward(gradients=False)
        return {name: found[name] for name in ("m", "log_l") + ("entropy",) * entropy}

    def vjp(self, saved: dict[str, Array], **cotangents: Array) -> dict[str, Array]:
        found, views = self.gradients()
        core.linear_cross_entropy_vjp(**self.given(), **saved, **cotangents, **views)
        return found

    def jvp(self, saved: dict[str, Array], **tangents: Array) -> dict[str, Array]:
        found = self.rows("tloss", "tlse", "tz", "tentropy")
        core.linear_cross_entropy_jvp(**self.given(), m=saved["m"], **tangents, **found)
        return found

    def vjp_jvp(self, saved: dict[str, Array], **moves: Array) -> dict[str, Array]:
        found, views = self.gradients(prefix="td")
        core.linear_cross_entropy_vjp_jvp(**self.given(), m=saved["m"], **moves, **views)
        return found


def same(a: dict[str, Array], b: dict[str, Array]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert not np.isnan(x.astype(np.float64)).any(), name
        assert x.tobytes() == b[name].tobytes(), name


def error(got: Array, wanted: Array) -> float:
    wanted = np.asarray(wanted, np.float64)
    return float(np.linalg.norm(got.astype(np.float64) - wanted) / np.linalg.norm(wanted))


# --- Against the textbook -------


def textbook(problem: Problem) -> Callable[..., tuple[Any, ...]]:
    """The results as functions of hidden, weight (and bias), in PyTorch."""
    torch = pytest.importorskip("torch")
    o = {"label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0, **problem.options}
    T, _, V = problem.sizes
    targets = torch.from_numpy(problem.targets)
    kept = targets != IGNORED
    shares = torch.ones(V, dtype=torch.float64)
    if problem.class_weight is not None:
        shares = torch.from_numpy(problem.class_weight).double()
    y = torch.where(kept, targets, 0)
    onehot = torch.zeros(T, V, dtype=torch.float64).scatter_(1, y[:, None], 1.0)
    smoothing = o["label_smoothing"]
    t = onehot * (1 - smoothing) * shares[y][:, None] + smoothing / V * shares
    t = t * kept[:, None]

    def results(hidden: Any, weight: Any, bias: Any = None) -> tuple[Any, ...]:
        s = hidden @ weight.T
        if bias is not None:
            s = s + bias
        if o["softcap"]:
            s = o["softcap"] * torch.tanh(s / o["softcap"])
        lse = torch.logsumexp(s, -1)
        squared = o["z_loss"] * lse**2 * kept
        loss = t.sum(1) * lse - (t * s).sum(1) + squared
        return loss, lse, squared, lse - (torch.softmax(s, -1) * s).sum(1)

    return results


def inputs_of(problem: Problem) -> list[Any]:
    torch = pytest.importorskip("torch")
    arrays = [problem.hidden, problem.weight, problem.bias]
    return [torch.from_numpy(x.astype(np.float64)) for x in arrays if x is not None]


CASES = [
    {},
    {"bias": True},
    {"class_weight": True, "label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"bias": True, "softcap": 5.0},
    {"bias": True, "class_weight": True, **ALL_OPTIONS},
]


@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (53, 13, 419), (211, 263, 1009)])
def test_derivatives_are_those_of_the_textbook(
    sizes: tuple[int, int, int], options: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch")
    problem = Problem(sizes, ignored=sizes[0] > 1, token_chunk=192, vocab_chunk=384, **options)
    results, xs = textbook(problem), inputs_of(problem)
    rng = np.random.default_rng(7)

    def close(got: Array, wanted: Any) -> None:
        size = max(1.0, float(wanted.abs().max()))
        np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=2e-13 * size)

    values = results(*xs)
    found = problem.forward()
    for name, value in zip(("loss", "lse", "z_loss_out", "entropy"), values, strict=True):
        close(found[name], value)
    weights = (torch.from_numpy(problem.g), *[torch.zeros(sizes[0], dtype=torch.float64)] * 3)
    names = [f"d{name}" for name in ("hidden", "weight", "bias")][: len(xs)]
    for name, wanted in zip(names, torch.func.vjp(results, *xs)[1](weights), strict=True):
        close(found[name], wanted)

    saved = problem.saved()
    parts = ("g", "g_lse", "g_z", "g_entropy")
    cotangents = {name: rng.standard_normal(sizes[0]) for name in parts}
    pulled = torch.func.vjp(results, *xs)[1](tuple(map(torch.from_numpy, cotangents.values())))
    gradients = problem.vjp(saved, **cotangents)
    for name, wanted in zip(names, pulled, strict=True):
        close(gradients[name], wanted)

    tangents = {
        f"t{name[1:]}": rng.standard_normal(tuple(x.shape))
        for name, x in zip(names, xs, strict=True)
    }
    pushed = tuple(map(torch.from_numpy, tangents.values()))
    moved = problem.jvp(saved, **tangents)
    for got, wanted in zip(
        moved.values(), torch.func.jvp(results, tuple(xs), pushed)[1], strict=True
    ):
        close(got, wanted)

    def vjp(*arguments: Any) -> Any:
        return torch.func.vjp(results, *arguments[: len(xs)])[1](tuple(arguments[len(xs) :]))

    tcotangents = {f"t{name}": rng.standard_normal(sizes[0]) for name in parts}
    at = (*xs, *map(torch.from_numpy, cotangents.values()))
    along = (*pushed, *map(torch.from_numpy, tcotangents.values()))
    second = problem.vjp_jvp(saved, **cotangents, **tangents, **tcotangents)
    for name, wanted in zip(names, torch.func.jvp(vjp, at, along)[1], strict=True):
        close(second[f"t{name}"], wanted)


@pytest.mark.parametrize("sizes", [(2, 3, 5), (47, 17, 383), (197, 31, 769)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_low_precision_is_exact_to_rounding(
    sizes: tuple[int, int, int], dtype: np.dtype[Any]
) -> None:
    torch = pytest.importorskip("torch")
    problem = Problem(sizes, dtype, ignored=False)
    results, xs = textbook(problem), inputs_of(problem)
    found = problem.forward()
    values = results(*xs)
    for name, value in zip(("loss", "lse"), values, strict=False):
        np.testing.assert_allclose(found[name], value.numpy(), rtol=0, atol=1e-5)
    zeros = [torch.zeros(sizes[0], dtype=torch.float64)] * 3
    cotangents = (torch.from_numpy(problem.g).double(), *zeros)
    for name, wanted in zip(
        ("dhidden", "dweight"), torch.func.vjp(results, *xs)[1](cotangents), strict=True
    ):
        rounded = error(wanted.numpy().astype(dtype), wanted.numpy())
        assert error(found[name], wanted.numpy()) <= 1.05 * rounded + 2e-6, name


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_bfloat16_gradients_in_float32_keep_their_bits(gain: float) -> None:
    torch = pytest.importorskip("torch")
    problem = Problem((193, 37, 773), BF16, ignored=False)
    confident = gain * problem.weight[problem.targets].astype(np.float32)
    problem.hidden = (problem.hidden.astype(np.float32) + confident).astype(BF16)
    results, xs = textbook(problem), inputs_of(problem)
    found = problem.forward(dtype=F32)
    zeros = [torch.zeros(193, dtype=torch.float64)] * 3
    wanted = torch.func.vjp(results, *xs)[1]((torch.from_numpy(problem.g).double(), *zeros))
    assert error(found["dhidden"], wanted[0].numpy()) <= 1e-5
    assert error(found["dweight"], wanted[1].numpy()) <= 1e-5


# --- Same bits -------


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_same_bits_on_every_target(setting: Setting, dtype: np.dtype[Any]) -> None:
    problem = Problem((61, 67, 787), dtype, bias=True, class_weight=True, **ALL_OPTIONS)
    rng = np.random.default_rng(3)
    tangents = {
        f"t{name}": getattr(problem, name) * dtype.type(rng.uniform(0.5, 1))
        for name in ("hidden", "weight", "bias")
    }
    moves = {name: problem.bits(x.astype(dtype)) for name, x in tangents.items()}
    found = {}
    for target in core.targets():
        if dtype == BF16 and target == "avx512bf16":
            continue  # products of pairs
        with setting(target):
            first = problem.forward()
            saved = {name: first[name] for name in ("m", "log_l", "entropy")}
            second = problem.vjp_jvp(saved, g=problem.g, g_lse=problem.g, **moves)
            found[target] = {**first, **problem.jvp(saved, **moves), **second}
    for target in found:
        same(found[target], found["portable"])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_threads_and_chunks_do_not_reach_the_bits(setting: Setting, dtype: np.dtype[Any]) -> None:
    sizes = (601, 71, 1171)
    with setting(threads=1):
        alone = Problem(sizes, dtype, bias=True, label_smoothing=0.1).forward()
    for threads, tokens, classes in [(2, 0, 0), (3, 1, 1), (1, 193, 0), (2, 192, 769)]:
        cuts = {"token_chunk": tokens, "vocab_chunk": classes}
        with setting(threads=threads):
            same(Problem(sizes, dtype, bias=True, label_smoothing=0.1, **cuts).forward(), alone)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_a_token_has_its_bits_in_any_batch(dtype: np.dtype[Any]) -> None:
    problem = Problem((211, 23, 431), dtype, bias=True, **ALL_OPTIONS)
    whole = problem.forward()
    few = Problem((211, 23, 431), dtype, bias=True, **ALL_OPTIONS)
    chosen = np.array([207, 3, 100, 99, 52])
    few.hidden, few.targets, few.g = few.hidden[chosen], few.targets[chosen], few.g[chosen]
    few.sizes = (5, 23, 431)
    found = few.forward()
    for name in (*ROWS, "argmax", "dhidden"):
        assert found[name].tobytes() == whole[name][chosen].tobytes(), name


# --- What is absent -------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_ignored_token_may_be_nan(dtype: np.dtype[Any]) -> None:
    problem = Problem((101, 19, 401), dtype, bias=True, **ALL_OPTIONS)
    clean = problem.forward()
    ignored = problem.targets == IGNORED
    problem.hidden[ignored] = np.nan
    found = problem.forward()
    for name in ("dhidden", "dweight", "dbias"):
        assert found[name].tobytes() == clean[name].tobytes(), name
    assert not found["dhidden"][ignored].any()
    assert not found["loss"][ignored].any()
    for name in ROWS:
        assert found[name][~ignored].tobytes() == clean[name][~ignored].tobytes(), name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nan_stays_in_its_token(dtype: np.dtype[Any]) -> None:
    problem = Problem((97, 19, 401), dtype)
    clean = problem.forward()
    problem.hidden[7, 3] = np.nan
    found = problem.forward()
    others = np.arange(97) != 7
    assert np.isnan(found["loss"][7])
    assert np.isnan(found["dhidden"][7].astype(np.float32)).all()
    assert np.isnan(found["dweight"].astype(np.float32)).all()
    for name in ("loss", "lse", "dhidden"):
        assert found[name][others].tobytes() == clean[name][others].tobytes(), name


def test_all_ignored_gives_zeros_and_the_lse() -> None:
    problem = Problem((29, 11, 131), bias=True, **ALL_OPTIONS)
    lse = problem.forward()["lse"]
    problem.targets[:] = IGNORED
    found = problem.forward()
    for name in ("loss", "z_loss_out", "dhidden", "dweight", "dbias"):
        assert not found[name].any(), name
    np.testing.assert_array_equal(found["lse"], lse)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_runs_of_ignored_tokens_may_be_nan(dtype: np.dtype[Any]) -> None:
    problem = Problem((307, 19, 401), dtype, bias=True, ignored=False, **ALL_OPTIONS)
    absent = np.r_[0:97, 151:293]
    problem.targets[absent] = IGNORED
    whole = problem.forward()
    problem.hidden[absent] = np.nan
    loss = problem.rows("loss")
    found, views = problem.gradients()
    core.linear_cross_entropy_forward(**problem.given(), **loss, **views, g=problem.g)
    same(found, {name: whole[name] for name in found})
    same(loss, {"loss": whole["loss"]})
    saved = {name: whole[name] for name in ("m", "log_l")}
    same(problem.vjp(saved, g=problem.g), found)


def test_no_tokens_give_zero_gradients_of_weights() -> None:
    found = Problem((0, 11, 131), bias=True).forward()
    assert not found["dweight"].any()
    assert not found["dbias"].any()


def test_no_columns_leave_the_bias() -> None:
    problem = Problem((29, 0, 131), bias=True, ignored=False)
    assert problem.bias is not None
    found = problem.forward()
    lse = np.log(np.exp(problem.bias).sum())
    np.testing.assert_allclose(found["loss"], lse - problem.bias[problem.targets], rtol=1e-14)


def test_a_class_without_a_chance_gets_nothing() -> None:
    problem = Problem((29, 11, 131), bias=True)
    assert problem.bias is not None
    absent = np.setdiff1d(np.arange(131), problem.targets)[:40]
    problem.bias[absent] = -np.inf
    found = problem.forward()
    assert np.isfinite(found["loss"]).all()
    assert np.isfinite(found["entropy"]).all()
    assert not found["dweight"][absent].any()
    problem.bias[:] = -np.inf
    empty = problem.forward()
    assert (empty["lse"] == -np.inf).all()
    assert not empty["loss"].any()
    assert not empty["dhidden"].any()
    assert not empty["dweight"].any()


def test_large_logits_do_not_lose_the_sum() -> None:
    problem = Problem((31, 7, 257), F32, bias=True, ignored=False)
    assert problem.bias is not None
    problem.hidden[:] = 0
    problem.bias[:] = -1e9
    found = problem.forward()
    np.testing.assert_allclose(found["loss"], np.log(257), rtol=1e-6)
    shares = np.full(257, problem.g.sum() / 257)
    np.subtract.at(shares, problem.targets, problem.g)
    np.testing.assert_allclose(found["dbias"], shares, atol=1e-5)


# --- Options -------


def test_shards_merge() -> None:
    problem = Problem((59, 17, 677), bias=True, class_weight=True, **ALL_OPTIONS)
    assert problem.bias is not None
    assert problem.class_weight is not None
    whole = problem.forward()
    cotangents = {"g": problem.g, "g_lse": problem.g, "g_z": problem.g}
    gradients = problem.vjp(problem.saved(), **cotangents)
    shards = []
    for start, end in [(0, 203), (203, 677)]:
        shard = Problem((59, 17, 677), v_start=start, v_total=677, **ALL_OPTIONS)
        shard.sizes = (59, 17, end - start)
        shard.hidden, shard.targets, shard.g = problem.hidden, problem.targets, problem.g
        shard.weight, shard.bias = problem.weight[start:end], problem.bias[start:end]
        shard.class_weight = problem.class_weight[start:end]
        shards.append(shard)
    parts = [shard.forward(gradients=False) for shard in shards]
    m = np.maximum(parts[0]["m"], parts[1]["m"])
    log_l = np.log(sum(np.exp(part["m"] - m + part["log_l"]) for part in parts))
    mass, picked = (sum(part[name] for part in parts) for name in ("mass", "picked"))
    lse, kept = m + log_l, problem.targets != IGNORED
    loss = (mass * lse - picked + ALL_OPTIONS["z_loss"] * lse**2) * kept
    np.testing.assert_allclose(loss, whole["loss"], rtol=1e-13, atol=1e-13)
    saved = {"m": m, "log_l": log_l, "mass": mass}
    found = [shard.vjp(saved, **cotangents) for shard in shards]
    for name in ("dweight", "dbias"):
        joined = np.concatenate([part[name] for part in found])
        np.testing.assert_allclose(joined, gradients[name], atol=1e-12)
    np.testing.assert_allclose(
        found[0]["dhidden"] + found[1]["dhidden"], gradients["dhidden"], atol=1e-12
    )


def test_argmax_is_the_first_of_the_largest() -> None:
    problem = Problem((37, 3, 521), F32)
    problem.weight[:] = 1
    problem.hidden[:] = 1
    problem.weight[[70, 130, 400]] = 2
    problem.options["v_start"] = 1000
    problem.options["v_total"] = 2000
    assert (problem.forward()["argmax"] == 1070).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("vocab_chunk", [0, 384])
def test_dweight_is_added_to_what_is_there(dtype: np.dtype[Any], vocab_chunk: int) -> None:
    problem = Problem((211, 41, 419), dtype, vocab_chunk=vocab_chunk)
    alone = problem.forward(dtype=F32)["dweight"]
    for stored in {dtype, F32}:
        there = np.random.default_rng(5).standard_normal((419, 41)).astype(stored)
        sums = there.copy()
        core.linear_cross_entropy_forward(
            **problem.given(),
            **problem.rows("loss"),
            g=problem.g,
            dweight=problem.bits(sums),
            accumulate_dweight=True,
        )
        wanted = there.astype(np.float64) + alone
        assert error(sums, wanted) <= error(wanted.astype(stored), wanted) * 1.01 + 1e-5


@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_filtered_entries_are_left_out(dtype: np.dtype[Any]) -> None:
    eps = 2.0**-9
    problem = Problem((101, 43, 1201), dtype, ignored=False, gradient_filter=eps)
    problem.g[:] = 1
    z = problem.hidden.astype(np.float64) @ problem.weight.astype(np.float64).T
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    onehot = np.arange(1201) == problem.targets[:, None]
    dz = np.where((p >= eps) | onehot, p - onehot, 0)
    assert (dz == 0).mean() > 0.5
    found = problem.forward()
    weight, hidden = problem.weight.astype(np.float64), problem.hidden.astype(np.float64)
    bound = 1e-13 if dtype == F64 else 3e-3
    assert error(found["dhidden"], dz @ weight) <= bound
    assert error(found["dweight"], dz.T @ hidden) <= bound


def test_rows_may_lie_apart() -> None:
    problem = Problem((53, 13, 419), F32)
    wanted = problem.forward()
    wide_hidden, wide_weight = np.full((53, 20), np.nan, F32), np.full((419, 17), np.nan, F32)
    wide_hidden[:, 3:16], wide_weight[:, :13] = problem.hidden, problem.weight
    problem.hidden, problem.weight = wide_hidden[:, 3:16], wide_weight[:, :13]
    same(problem.forward(), wanted)


SHORT_OF_MEMORY = """
import resource
import numpy as np
from tilewise import _core

def call(T, V):
    loss, g = np.full(T, np.nan, np.float32), np.ones(T, np.float32)
    hidden, weight = np.zeros((T, 1), np.float32), np.zeros((V, 1), np.float32)
    targets, dweight = np.zeros(T, np.int64), np.zeros((V, 1), np.float32)
    _core.linear_cross_entropy_forward(hidden, weight, targets, loss=loss, g=g, dweight=dweight)
    return loss

call(3, 7)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
try:
    call(193, 1 << 20)
except MemoryError:
    print(np.allclose(call(3, 7), np.log(7)))
"""


def test_too_little_memory_is_an_error(run_script: Callable[..., str]) -> None:
    assert run_script(SHORT_OF_MEMORY).strip() == "True"


def test_wrong_arrays_are_refused() -> None:
    problem = Problem()
    loss = problem.rows("loss")
    for wrong, words in [
        ({"targets": problem.targets.astype(np.int32)}, "targets must be int64"),
        ({"hidden": problem.hidden[:, :5]}, "weight must have shape"),
        ({"class_weight": np.ones(3)}, "class_weight has another length"),
        ({"storage": "float8"}, "storage must be bfloat16 or float16"),
    ]:
        with pytest.raises(ValueError, match=f"linear_cross_entropy: {words}"):
            core.linear_cross_entropy_forward(**{**problem.given(), **wrong}, **loss)
