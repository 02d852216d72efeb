"""Tangents, second derivatives and dropout of the compiled kernels: what the contract promises.

The audit's own cases run in test_verify.py, with every derivative. Here are problems larger than
the kernels' tiles and chunks, identities that any right derivative has, and what is absent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tilewise as tw
from tilewise.base.masks import Mask
from tilewise.verify import CASES, Case
from tilewise.verify.cases.attention import Dims, MaskBuilder, Problem
from tilewise.verify.cases.inputs import poison_absent
from tilewise.verify.metrics import same_bits
from tilewise.verify.oracle import Question, consult

_core = pytest.importorskip("tilewise._core")
pytestmark = pytest.mark.usefixtures("poisoned_outputs")

Array = NDArray[Any]
Results = dict[str, Array]
Evaluate = Callable[[Problem], Results]
Setting = Callable[..., AbstractContextManager[None]]

SMALL = Dims(B=2, H=6, Hk=2, N=53, Nk=131, D=13, Dv=17)
# More than one tile of a gradient (192 queries, 96 keys) and more than one of its chunks (960).
LARGE = Dims(B=2, H=2, Hk=1, N=211, Nk=997, D=13, Dv=11)
# Few queries take another way through the kernels; the keys are more than one chunk of it (2048).
FEW = Dims(B=2, H=4, Hk=2, N=5, Nk=2311, D=13, Dv=11)
SIZES = {"large": LARGE, "few queries": FEW}
OF_ROWS = ("to", "tlse", "one-pass to", "one-pass tlse", "tdq")
INPUTS = ("q", "k", "v", "bias", "sinks")
SECOND = tuple(f"td{name}" for name in INPUTS)
EVERYTHING: dict[str, Any] = {
    "bias": "B H N Nk",
    "alibi": "H",
    "softcap": 2.0,
    "sinks": "some",
    "softmax_scale": 0.4,
}


def fixed(mask: Mask) -> MaskBuilder:
    """Return a builder of one mask for every problem."""
    return lambda dims, batch: mask


def random_mask(share: float, *, empty_rows: bool = False) -> MaskBuilder:
    """Return a builder of a mask of many runs, another for every head; some keys nobody sees."""

    def build(d: Dims, batch: slice) -> Mask:
        seen = np.random.default_rng(7).random((1, d.H, d.N, d.Nk)) < share
        seen[..., 3::11] = False
        if empty_rows:
            seen[:, :, 1::3] = False
            seen[:, -1] = False
        return tw.dense(seen)

    return build


MASKS: dict[str, MaskBuilder] = {
    "causal": fixed(tw.causal()),
    "lengths": lambda d, b: tw.lengths(np.array([d.Nk - 300, 0])[b]),
    "random": random_mask(0.5),
    "empty rows": random_mask(0.5, empty_rows=True),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {"bias": "B H N Nk", "alibi": "H", "softcap": 3.0},
    "float64 with dropout": {"dtype": "float64", "bias": "1 H N Nk", "dropout": 0.3},
}


def seen_by_group(seen: Array, Hk: int) -> Array:
    """Say which keys of each key head some query sees: `(B, Hk, Nk)`."""
    B, H, N, Nk = seen.shape
    return np.asarray(seen.reshape(B, Hk, H // Hk * N, Nk).any(axis=2))


def wrong_bits(got: Results, wanted: Results) -> list[str]:
    assert got.keys() == wanted.keys()
    return [name for name in wanted if not same_bits(got[name], wanted[name])]


def dot(x: Array, y: Array) -> float:
    return float((x.astype(np.float64) * y).sum())


# Against the reference


def subset() -> dict[str, list[Case]]:
    """The first and the last case of every group of the audit, but no long ones."""
    groups: dict[str, list[Case]] = {}
    for case in CASES:
        d = case.dims
        if d.B * d.H * d.N * d.Nk < 10**5:
            groups.setdefault(case.group, []).append(case)
    return {name: [cases[0], cases[-1]] for name, cases in groups.items()}


GROUPS = subset()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("group", GROUPS)
def test_cases_of_the_audit_are_those_of_the_reference(
    group: str, dtype: str, derivatives: Evaluate
) -> None:
    for case in GROUPS[group]:
        case = replace(case, dtype=dtype)
        problem = case.problem()
        got = {name: case.in_order(name, x) for name, x in derivatives(problem).items()}
        oracle = consult(Question.of(problem, tangents=True))
        for name in oracle.truth.keys() & got.keys():
            assert oracle.pattern(name, got[name]) is None, (case.name, name)
            error = oracle.error(name, got[name])
            assert error <= oracle.allowed(name), (case.name, name)


# Absence


@pytest.mark.parametrize("dims", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("mask", ["lengths", "empty rows"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fully_masked_row_is_zero(
    dims: Dims, mask: str, options: dict[str, Any], derivatives: Evaluate
) -> None:
    case = Case("fully masked", dims, mask=MASKS[mask], **options)
    got = derivatives(case.problem())
    seen = case.visible()
    empty, unseen = ~seen.any(axis=-1), ~seen_by_group(seen, dims.Hk)
    assert unseen.any()
    for name in OF_ROWS:
        assert (got[name][empty] == 0).all(), name
    for name in ("tdk", "tdv"):
        assert (got[name][unseen] == 0).all(), name
    if case.bias == "B H N Nk":
        assert (got["tdbias"][~seen] == 0).all()
    assert not any(np.isnan(x).any() for x in got.values())


@pytest.mark.parametrize("dims", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_is_masked_does_not_show_in_the_bits(
    dims: Dims, mask: str, options: dict[str, Any], derivatives: Evaluate
) -> None:
    case = Case("absent", dims, mask=MASKS[mask], **options)
    clean, poisoned = case.problem(), case.problem()
    poison_absent(poisoned.arrays, case.visible(), sinks=False)
    spoiled = {name for name, x in poisoned.arrays.items() if np.isnan(x).any()}
    assert spoiled or mask == "causal"
    assert not wrong_bits(derivatives(poisoned), derivatives(clean))


def reached(which: str, case: Case, at: tuple[int, ...]) -> dict[str, tuple[Array, bool]]:
    """Say which rows of each result a NaN in one entry reaches, and whether in its column only."""
    d, seen = case.dims, case.visible()
    rows = np.zeros((d.B, d.H, d.N), np.bool_)
    if which in ("k", "v", "tk", "tv"):
        group = slice(at[1] * (d.H // d.Hk), (at[1] + 1) * (d.H // d.Hk))
        rows[at[0], group] = seen[at[0], group, :, at[2]]
    else:
        rows[at[:3]] = True
    pairs = rows[..., None] & seen
    keys, value = seen_by_group(pairs, d.Hk), which in ("v", "tv")
    cotangent = which in ("do", "tdo")
    to = None if cotangent else (rows, value)
    return {
        "to": to or (np.zeros_like(rows), False),
        "one-pass to": to or (np.zeros_like(rows), False),
        "tlse": (np.zeros_like(rows) if value or cotangent else rows, False),
        "tdq": (rows, False),
        "tdk": (keys, False),
        "tdv": (np.zeros_like(keys) if value else keys, cotangent),
        "tdbias": (pairs, False),
    }


@pytest.mark.parametrize("dims", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("mask", ["causal", "random"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("which", ["q", "k", "v", "bias", "do", "tq", "tk", "tv", "tbias", "tdo"])
def test_attended_nan_reaches_exactly_the_rows_that_attend(
    which: str, softcap: float | None, mask: str, dims: Dims, derivatives: Evaluate
) -> None:
    case = Case("attended", dims, mask=MASKS[mask], bias="B H N Nk", softcap=softcap)
    problem = case.problem()
    x = problem.arrays[which]
    at = (1, x.shape[1] - 1, x.shape[2] // 2, x.shape[3] // 3)
    if which.endswith("bias"):
        at = (*at[:3], int(np.flatnonzero(case.visible()[at[:3]])[-1]))
    x[at] = np.nan
    got = derivatives(problem)
    for name, (rows, column_only) in reached(which, case, at).items():
        nan: Array = np.isnan(got[name])
        if nan.ndim > rows.ndim:
            right = ~np.delete(nan, at[-1], axis=-1) if column_only else nan[rows]
            assert bool(right.all()), name
            nan = np.asarray(nan.any(axis=-1))
        assert np.array_equal(nan, rows), name


# Identities


@pytest.mark.parametrize("dims", [SMALL, FEW], ids=["panels", "few queries"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("missing", ["q", "k", "v", "bias", "sinks", "do", "dlse", "q k v bias"])
def test_missing_tangent_is_a_zero_tangent(
    missing: str, dtype: str, dims: Dims, derivatives: Evaluate
) -> None:
    case = Case("missing", dims, dtype=dtype, mask=MASKS["causal"], **EVERYTHING)
    zero, none = case.problem(), case.problem()
    for name in missing.split():
        zero.arrays[f"t{name}"][...] = 0
        del none.arrays[f"t{name}"]
    wanted, got = derivatives(zero), derivatives(none)
    assert not [name for name, x in wanted.items() if not np.array_equal(got[name], x)]


@pytest.mark.parametrize("dims", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_no_tangents_give_zero(dims: Dims, layout: str, derivatives: Evaluate) -> None:
    case = Case("none", dims, mask=MASKS["random"], tangents="", layout=layout, **EVERYTHING)
    got = derivatives(case.problem())
    assert not [name for name in (*OF_ROWS[:4], *SECOND) if got[name].any()]


@pytest.mark.parametrize("dims", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_tangents_eight_times_as_long_give_results_eight_times_as_long(
    dropout: float, dtype: str, dims: Dims, derivatives: Evaluate
) -> None:
    case = Case("scaled", dims, dtype=dtype, mask=MASKS["causal"], dropout=dropout, **EVERYTHING)
    problem = case.problem()
    once = derivatives(problem)
    for x in problem.tangents.values():
        x *= 8
    eight = derivatives(problem)
    for name in (*OF_ROWS, *SECOND):
        # Subnormal numbers have fewer digits.
        normal = np.abs(once[name]) > 1e-30
        assert same_bits(eight[name][normal], 8 * once[name][normal]), name


def along(case: Case, problem: Problem, *directions: dict[str, Array]) -> Problem:
    """Return a problem whose tangents are the sum of some directions."""
    names = {name for direction in directions for name in direction}
    sums = {name: np.sum([d[name] for d in directions if name in d], axis=0) for name in names}
    kept = {name: x for name, x in problem.arrays.items() if name not in problem.tangents}
    return replace(problem, arrays=kept | sums)


def relative(got: Array, wanted: Array) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("dims", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_results_of_a_sum_of_tangents_are_the_sum_of_the_results(
    dropout: float, dims: Dims, derivatives: Evaluate
) -> None:
    case = Case("sum", dims, dtype="float64", dropout=dropout, **EVERYTHING)
    problem = case.problem()
    one, other = problem.tangents, replace(case, name="another sum").problem().tangents
    first, second = (derivatives(along(case, problem, t)) for t in (one, other))
    both = derivatives(along(case, problem, one, other))
    for name in (*OF_ROWS, *SECOND):
        assert relative(both[name], first[name] + second[name]) < 1e-13, name


@pytest.mark.parametrize("dims", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("mask", [None, "empty rows"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_jvp_and_vjp_are_transposes(
    dropout: float, mask: str | None, dims: Dims, derivatives: Evaluate
) -> None:
    case = Case("transposes", dims, dtype="float64", dropout=dropout, **EVERYTHING)
    case = replace(case, mask=None if mask is None else MASKS[mask])
    problem = case.problem()
    got, a = derivatives(problem), problem.arrays
    a["tsinks"][np.isinf(a["sinks"])] = 0
    for prefix in ("", "one-pass "):
        forward = dot(a["do"], got[f"{prefix}to"]) + dot(a["dlse"], got[f"{prefix}tlse"])
        reverse = sum(dot(a[f"t{name}"], got[f"d{name}"]) for name in INPUTS)
        assert forward == pytest.approx(reverse, rel=1e-11)


@pytest.mark.parametrize("dims", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("mask", [None, "empty rows"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_hessian_is_symmetric(
    dropout: float, mask: str | None, dims: Dims, derivatives: Evaluate
) -> None:
    """`<u, H w> = <w, H u>`: H is the second derivative of `<do, o> + <dlse, lse>`."""
    case = Case("hessian", dims, dtype="float64", dropout=dropout, **EVERYTHING)
    case = replace(case, mask=None if mask is None else MASKS[mask], tangents="q k v bias sinks")
    problem = case.problem()
    u, w = problem.tangents, replace(case, name="another").problem().tangents
    hu, hw = (derivatives(along(case, problem, t)) for t in (u, w))
    absent = np.isinf(problem.arrays["sinks"])
    u["tsinks"][absent] = w["tsinks"][absent] = 0
    one = sum(dot(u[f"t{name}"], hw[f"td{name}"]) for name in INPUTS)
    other = sum(dot(w[f"t{name}"], hu[f"td{name}"]) for name in INPUTS)
    assert one == pytest.approx(other, rel=1e-11)


@pytest.mark.parametrize("dims", [SMALL, FEW], ids=["panels", "few queries"])
def test_derivatives_are_central_differences(dims: Dims, derivatives: Evaluate) -> None:
    case = Case("differences", dims, dtype="float64", mask=MASKS["causal"], **EVERYTHING)
    case = replace(case, sinks="normal", dropout=0.2)
    problem = case.problem()
    got = derivatives(problem)

    def moved(h: float) -> Results:
        names = [name.removeprefix("t") for name in problem.tangents]
        steps = {name: problem.arrays[name] + h * problem.arrays[f"t{name}"] for name in names}
        return derivatives(replace(problem, arrays=problem.arrays | steps))

    h = 1e-3
    ends = [moved(step) for step in (h, -h, 2 * h, -2 * h)]
    for name in ("to", "tlse", *SECOND):
        near, back, far, further = (end[name.removeprefix("t")] for end in ends)
        slope = (8 * (near - back) - (far - further)) / (12 * h)
        assert relative(slope, got[name]) < 1e-8, name


# Memory


@pytest.mark.parametrize("N", [3, 101])
@pytest.mark.parametrize("memory", ["padded", "transposed", "broadcast", "readonly", "reversed"])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_layout_in_memory_does_not_show(
    layout: str, memory: str, N: int, derivatives: Evaluate
) -> None:
    dims = Dims(B=3, H=4, Hk=2, N=N, Nk=211, D=13, Dv=17)
    case = Case("memory", dims, mask=MASKS["causal"], memory=memory, layout=layout, **EVERYTHING)
    problem = case.problem()
    arrays = {name: x.copy(order="C") for name, x in problem.arrays.items()}
    assert not wrong_bits(derivatives(problem), derivatives(replace(problem, arrays=arrays)))


@pytest.mark.parametrize("size", ["B", "N", "Nk", "H Hk"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_sizes_of_zero(size: str, dropout: float, derivatives: Evaluate) -> None:
    dims = replace(SMALL, **dict.fromkeys(size.split(), 0))
    case = Case("zero", dims, bias="1 H 1 Nk", sinks="normal" if dims.B else None, dropout=dropout)
    problem = case.problem()
    got = derivatives(problem)
    for name in problem.arrays.keys() & INPUTS:
        assert got[f"td{name}"].shape == problem.arrays[name].shape
    assert got["to"].shape == problem.arrays["do"].shape
    assert not got["to"].any()
    assert not any(np.isnan(x).any() for x in got.values())


SCARCE = """
import resource, sys
import numpy as np
import tilewise as tw
from tilewise import _core

def mapped():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def within(extra, call):
    '''Run with so many bytes more than there are now; None where that is too little.'''
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped() + extra, hard))
    try:
        return call()
    except MemoryError:
        return None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

rng = np.random.default_rng(3)
q, k, v, tq, tk, tv, do = (
    rng.standard_normal((1, 2, n, 509), np.float32) for n in (193, 97, 97, 193, 97, 97, 193))
options = {"implementation": "cpu", "dropout_p": 0.2, "seed": 5}
made = tw.numpy.attention(q, k, v, return_stats=True, **options)

def second():
    grads = tw.numpy.attention_vjp_jvp(
        do, tq, tk, tv, q, k, v, made.o, made.stats, tdo=do, **options)
    return [x.copy() for x in grads[:3]]

def tangents():
    return list(tw.numpy.attention_jvp(tq, tk, tv, q, k, v, made.o, made.stats, **options))

def one_pass():
    result, moved = tw.numpy.attention_forward_jvp(tq, tk, tv, q, k, v, **options)
    return [result.o, *moved]

call = globals()[sys.argv[1]]
_core.set_num_threads(int(sys.argv[2]))
found = [within(extra << 10, call) for extra in (0, 64, 256, 512, 1024, 4096, 16384, 65536)]
assert found[0] is None, "was not scarce"
wanted = call()
for got in found:
    assert got is None or all(map(np.array_equal, got, wanted))
print("usable")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads and limits memory as Linux does")
@pytest.mark.parametrize("call", ["second", "tangents", "one_pass"])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_failed_allocation_raises_and_leaves_the_process_usable(
    threads: str, call: str, run_script: Callable[..., str]
) -> None:
    assert run_script(SCARCE, call, threads) == "usable\n"


# Dropout


def recovered(dims: Dims, dtype: str, implementation: str, **options: Any) -> dict[str, Array]:
    """Return `p keep` as each function has it, where values or cotangents are the identity.

    For that there are as many queries and keys as entries of a value.
    """
    a = Case("identity", dims, dtype=dtype).problem().arrays
    given = {"mask": tw.causal(), "softcap": 3.0, "implementation": implementation, **options}
    eye, zero = np.zeros_like(a["v"]) + np.eye(dims.N, dtype=dtype), np.zeros_like(a["v"])
    made = tw.numpy.attention(a["q"], a["k"], zero, return_stats=True, **given)
    args, still = (a["q"], a["k"], zero), (None, None)
    saved = (*args, made.o, made.stats)
    second = tw.numpy.attention_vjp_jvp(None, *still, None, *saved, tdo=eye, **given)
    return {
        "forward": tw.numpy.attention(a["q"], a["k"], eye, **given),
        "vjp": tw.numpy.attention_vjp(eye, *saved, **given).dv.swapaxes(-1, -2),
        "jvp": tw.numpy.attention_jvp(*still, eye, *saved, **given).to,
        "forward_jvp": tw.numpy.attention_forward_jvp(*still, eye, *args, **given)[1].to,
        "vjp_jvp": second.dv.swapaxes(-1, -2),
    }


@pytest.mark.parametrize(("p", "dtype"), [(0.1, "float32"), (0.5, "float64"), (0.97, "float32")])
def test_dropout_drops_the_same_pairs_in_every_function(
    p: float, dtype: str, setting: Setting
) -> None:
    dims = Dims(B=2, H=3, Hk=3, N=131, Nk=131, D=11, Dv=131)
    options = {"dropout_p": p, "seed": 0xFEDCBA9876543210}
    reference = recovered(dims, dtype, "reference", **options)["forward"]
    kept = reference != 0
    seen = np.tri(dims.N, dtype=np.bool_)
    assert kept[..., seen].mean() == pytest.approx(1 - p, abs=0.02)
    epsilon = float(np.finfo(dtype).eps)
    for target in _core.targets():
        with setting(target):
            found = recovered(dims, dtype, "cpu", **options)
        for name, x in found.items():
            assert np.array_equal(x != 0, kept), (target, name)
            np.testing.assert_allclose(x, reference, rtol=200 * epsilon, err_msg=name)


@pytest.mark.parametrize("N", [1, 3, 8])
def test_dropout_of_few_queries_drops_the_pairs_of_the_reference(N: int) -> None:
    dims = Dims(B=2, H=4, Hk=2, N=N, Nk=509, D=11, Dv=509)
    a = Case("few", dims).problem().arrays
    options: dict[str, Any] = {"dropout_p": 0.4, "seed": 2**63 + 5}
    eye = np.zeros_like(a["v"]) + np.eye(509, dtype=np.float32)
    found = [
        tw.numpy.attention(a["q"], a["k"], eye, implementation=name, **options) != 0
        for name in ("cpu", "reference")
    ]
    assert np.array_equal(*found)
    assert 0.5 < found[0].mean() < 0.7


def test_dropout_with_one_drops_everything_and_leaves_lse(derivatives: Evaluate) -> None:
    case = Case("all", SMALL, dropout=1.0, mask=MASKS["causal"])
    got = derivatives(case.problem())
    wanted = derivatives(replace(case, dropout=0.0).problem())
    for name in ("o", "dv", "to", "one-pass to", "tdv"):
        assert not got[name].any(), name
    for name in ("lse", "m", "log_l", "entropy", "max_logit"):
        assert same_bits(got[name], wanted[name]), name
    assert relative(got["tlse"], wanted["tlse"]) < 1e-6


def test_dropout_of_zero_is_none(derivatives: Evaluate) -> None:
    problem = Case("zero", SMALL, **EVERYTHING).problem()
    a = problem.arrays
    plain = tw.numpy.attention(a["q"], a["k"], a["v"], implementation="cpu")
    seeded = tw.numpy.attention(a["q"], a["k"], a["v"], dropout_p=0.0, seed=7, implementation="cpu")
    assert same_bits(plain, seeded)


@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("N, Nk", [(307, 307), (3, 2311)], ids=["square", "few queries"])
def test_what_tangents_of_logits_have_in_common_costs_no_digits(
    N: int, Nk: int, with_sinks: bool
) -> None:
    """A common tangent of all keys moves no probability; a difference of large numbers would."""
    rng = np.random.default_rng(5)
    shapes = (1, 2, N, 32), (1, 2, Nk, 32), (1, 2, Nk, 32)
    drawn = [rng.standard_normal(shape).astype(np.float32) for shape in shapes * 2]
    drawn[1] += 10  # tk
    sinks = np.array([0.5, 2], np.float32) if with_sinks else None
    options: dict[str, Any] = {"mask": tw.causal()}

    def tangents(arrays: list[Array]) -> list[tuple[Array, Array]]:
        more = {**options, "sinks": None if sinks is None else sinks.astype(arrays[0].dtype)}
        r = tw.attention(*arrays[3:], return_stats=True, **more)
        apart = tw.numpy.attention_jvp(*arrays, r.o, r.stats, **more)
        _, one_pass = tw.numpy.attention_forward_jvp(*arrays, **more)
        return [(x.to, x.tlse) for x in (apart, one_pass)]

    exact = tangents([x.astype(np.float64) for x in drawn])
    for found, right in zip(tangents(drawn), exact, strict=True):
        for x, y in zip(found, right, strict=True):
            # Without a centre: 1.4e-6 and more.
            assert np.linalg.norm(x - y) <= 1.1e-6 * np.linalg.norm(y)
