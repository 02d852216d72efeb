"""The same bits: run after run, on any threads, in any batch, chunk and instruction set."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import tilewise as tw
from tilewise.base.masks import Mask
from tilewise.ops.attention.spec import Needed, Want, prepare, prepare_vjp_jvp
from tilewise.verify import Case
from tilewise.verify.cases.attention import Dims, MaskBuilder, Problem
from tilewise.verify.metrics import same_bits

_core = pytest.importorskip("tilewise._core")
pytestmark = pytest.mark.usefixtures("poisoned_outputs")

Array = NDArray[Any]
Results = dict[str, Array]
Evaluate = Callable[[Problem], Results]
Setting = Callable[..., AbstractContextManager[None]]

# Several chunks of 960 queries and of 960 keys share few heads.
LONG = Dims(B=2, H=2, Hk=1, N=1031, Nk=1103, D=11, Dv=13)
GROUP = Dims(B=1, H=3, Hk=1, N=1931, Nk=1013, D=13, Dv=7)
DECODE = Dims(B=2, H=6, Hk=2, N=5, Nk=4591, D=19, Dv=23)
EVERYTHING: dict[str, Any] = {
    "bias": "B H N Nk",
    "alibi": "B H",
    "softcap": 5.0,
    "sinks": "some",
    "softmax_scale": 0.3,
}


def fixed(mask: Mask) -> MaskBuilder:
    """Return a builder of one mask for every problem."""
    return lambda dims, batch: mask


def half(d: Dims, batch: slice) -> Mask:
    """Return a mask of many runs, another one for every head."""
    return tw.dense(np.random.default_rng(5).random((d.H, d.N, d.Nk)) < 0.5)


CAUSAL = fixed(tw.causal())


def assert_same_bits(got: Results, wanted: Results) -> None:
    assert got.keys() == wanted.keys()
    wrong = [name for name in wanted if not same_bits(got[name], wanted[name])]
    assert not wrong


# Threads and instruction sets

SHARED_BIAS = [
    " ".join(x if i >> (3 - axis) & 1 else "1" for axis, x in enumerate(("B", "H", "N", "Nk")))
    for i in range(16)
]


@pytest.mark.parametrize("bias", [*SHARED_BIAS, "N Nk", "Nk", None])
def test_any_number_of_threads_gives_the_same_bits(
    bias: str | None, results: Evaluate, setting: Setting
) -> None:
    problem = Case("threads", LONG, mask=CAUSAL, bias=bias, sinks="normal").problem()
    with setting(threads=1):
        wanted = results(problem)
    for threads in (2, 3, 2):
        with setting(threads=threads):
            assert_same_bits(results(problem), wanted)


@pytest.mark.parametrize("dims", [LONG, GROUP, DECODE], ids=["few heads", "group", "decode"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mask", [None, CAUSAL, half], ids=["all", "causal", "random"])
def test_every_target_and_number_of_threads_gives_the_same_bits(
    mask: MaskBuilder | None, dtype: str, dims: Dims, results: Evaluate, setting: Setting
) -> None:
    problem = Case("targets", dims, dtype=dtype, mask=mask).problem()
    wanted = None
    for threads, target in enumerate(_core.targets(), start=1):
        with setting(target, threads):
            got = results(problem)
        wanted = wanted or got
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("N", [3, 197])
@pytest.mark.parametrize("D, Dv", [(1, 2), (7, 31), (64, 128), (257, 129)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_target_gives_the_same_bits_with_all_options(
    dtype: str, D: int, Dv: int, N: int, results: Evaluate, setting: Setting
) -> None:
    dims = Dims(B=1, H=6, Hk=2, N=N, Nk=307, D=D, Dv=Dv)
    for mask in (CAUSAL, half):
        problem = Case("options", dims, dtype=dtype, mask=mask, **EVERYTHING).problem()
        found = []
        for target in _core.targets():
            with setting(target):
                found.append(results(problem))
        for other in found[1:]:
            assert_same_bits(other, found[0])


@settings(max_examples=60, deadline=None, derandomize="CI" in os.environ, database=None)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 2, 3, 400, 700, 40, 40))),
    mask=st.sampled_from([None, CAUSAL, half, fixed(tw.window(70, 9) | tw.prefix(3))]),
    options=st.sampled_from([{}, {"bias": "1 1 N Nk"}, {"bias": "1 H 1 1"}, EVERYTHING]),
    dtype=st.sampled_from(["float32", "float64"]),
    values=st.sampled_from(["normal", "outliers", "sharp", "small"]),
    target=st.sampled_from(_core.targets()),
    threads=st.integers(1, 4),
)
def test_random_target_and_threads_give_the_bits_of_one_portable_thread(
    sizes: tuple[int, ...],
    mask: MaskBuilder | None,
    options: dict[str, Any],
    dtype: str,
    values: str,
    target: str,
    threads: int,
    results: Evaluate,
    setting: Setting,
) -> None:
    B, Hk, group, *rest = sizes
    dims = Dims(B, Hk * group, Hk, *rest)
    problem = Case("random", dims, dtype=dtype, mask=mask, values=values, **options).problem()
    with setting("portable", 1):
        wanted = results(problem)
    with setting(target, threads):
        assert_same_bits(results(problem), wanted)


# Batches and chunks


@pytest.mark.parametrize("N", [3, 211])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "options"])
def test_row_does_not_depend_on_the_rest_of_the_batch(
    plain: bool, dtype: str, N: int, results: Evaluate
) -> None:
    dims = Dims(B=4, H=6, Hk=3, N=N, Nk=2309, D=13, Dv=17)
    options = {} if plain else EVERYTHING
    case = Case("batch", dims, dtype=dtype, mask=CAUSAL, **options)
    problem = case.problem()
    whole = results(problem)
    for b in range(dims.B):
        one = results(problem.entry(b))
        one.pop("dsinks", None)
        assert_same_bits(one, {name: whole[name][b : b + 1] for name in one})
    others = case.problem()
    for name in ("q", "k", "v", "do"):
        others.arrays[name][:2] = np.nan
    spoiled = results(others)
    spoiled.pop("dsinks", None)
    kept = {name: x[2:] for name, x in spoiled.items()}
    assert_same_bits(kept, {name: whole[name][2:] for name in kept})


PIECES = (1, 2, 7, 8, 9, 15, 47, 48, 49)

CHUNKED: dict[str, dict[str, Any]] = {
    "causal": {"mask": CAUSAL},
    "everything": {"mask": CAUSAL, **EVERYTHING},
    "sink tokens and window": {
        "mask": fixed(tw.causal() & (tw.sink_tokens(4) | tw.window(301, 0))),
        "sinks": "normal",
    },
    "alibi": {"mask": CAUSAL, "alibi": "H"},
    "softcap": {"mask": CAUSAL, "softcap": 3.0, "values": "sharp"},
    "shared bias": {"mask": CAUSAL, "bias": "1 1 N Nk", "values": "outliers"},
    "no mask": {},
    "lengths": {"mask": lambda d, b: tw.lengths(np.array([2069, 97])[b])},
    "random": {"mask": half, "bias": "H 1 Nk"},
}


def of_queries(case: Case, problem: Problem, rows: slice) -> Problem:
    """Return some queries as a problem of its own, with the keys that were there before them."""
    end = problem.dims.Nk - (problem.dims.N - rows.stop)
    part = problem.part(rows, slice(0, end if case.mask in (CAUSAL, None) else None))
    if case.mask is None:
        part = problem.part(rows, slice(None))
    if case.mask is None or case.mask is CAUSAL:
        return part
    seen = case.visible()[:, :, rows]
    return replace(part, case=replace(case, mask=lambda d, b: tw.dense(seen)))


@pytest.mark.parametrize("N", [8, 211])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", CHUNKED.values(), ids=CHUNKED)
def test_chunks_of_queries_have_the_bits_of_the_whole(
    options: dict[str, Any], dtype: str, N: int, results: Evaluate
) -> None:
    dims = Dims(B=2, H=4, Hk=2, N=N, Nk=2311, D=21, Dv=18)
    case = Case("chunks", dims, dtype=dtype, **options)
    problem = case.problem()
    whole = results(problem)
    starts = np.cumsum((0, *PIECES))
    for a, b in pairwise((*starts[starts < N], N)):
        part = results(of_queries(case, problem, slice(int(a), int(b))))
        rows = {name: whole[name][:, :, a:b] for name in whole if name[0] != "d" or name == "dq"}
        assert_same_bits({name: part[name] for name in rows}, rows)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("Nk", [2047, 2048, 2049, 6151])
def test_decoding_has_the_bits_of_the_prefill(Nk: int, layout: str, results: Evaluate) -> None:
    dims = Dims(B=1, H=6, Hk=2, N=67, Nk=Nk, D=33, Dv=47)
    case = Case("decode", dims, mask=CAUSAL, alibi="H", layout=layout)
    problem = case.problem()
    whole = results(problem)
    axis = 2 if layout == "bhnd" else 1
    for i in (0, 30, 66):
        one = results(of_queries(case, problem, slice(i, i + 1)))
        for name in ("o", "dq"):
            assert same_bits(one[name], whole[name].take([i], axis=axis)), name
        for name in ("lse", "m", "log_l", "max_logit", "entropy"):
            assert same_bits(one[name], whole[name][:, :, i : i + 1]), name


@pytest.mark.parametrize("N", [7, 389])
def test_fewer_results_have_the_bits_of_all(N: int, results: Evaluate) -> None:
    case = Case("fewer", replace(LONG, N=N), mask=CAUSAL, **EVERYTHING)
    problem = case.problem()
    whole, a = results(problem), problem.arrays
    inputs = (a["q"], a["k"], a["v"])
    o = tw.numpy.attention(*inputs, **problem.options, implementation="cpu")
    assert same_bits(o, whole["o"])
    for name in ("lse", "max_logit", "entropy"):
        asked = {f"return_{name}": True, **problem.options}
        got = getattr(tw.numpy.attention(*inputs, **asked, implementation="cpu"), name)
        assert same_bits(got, whole[name])


# Tangents and second derivatives

# Sums over queries: what is left of them in a part has other bits.
SUMS = ("dk", "dv", "dbias", "dsinks", "tdk", "tdv", "tdbias", "tdsinks")
DROPPING: dict[str, Any] = {"dropout": 0.3, **EVERYTHING}


@pytest.mark.parametrize("bias", ["B H N Nk", "1 H 1 Nk", "1 1 N 1", "1 1 1 1", None])
def test_any_number_of_threads_gives_the_same_bits_of_every_derivative(
    bias: str | None, derivatives: Evaluate, setting: Setting
) -> None:
    case = Case("threads", LONG, mask=CAUSAL, bias=bias, sinks="normal", dropout=0.1)
    problem = case.problem()
    with setting(threads=1):
        wanted = derivatives(problem)
    for threads in (2, 3):
        with setting(threads=threads):
            assert_same_bits(derivatives(problem), wanted)


@pytest.mark.parametrize("N", [3, 197])
@pytest.mark.parametrize("D, Dv", [(7, 31), (40, 65)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_target_gives_the_same_bits_of_every_derivative(
    dtype: str, D: int, Dv: int, N: int, derivatives: Evaluate, setting: Setting
) -> None:
    dims = Dims(B=1, H=2, Hk=1, N=N, Nk=131, D=D, Dv=Dv)
    for mask, options in ((CAUSAL, DROPPING), (half, EVERYTHING)):
        problem = Case("targets", dims, dtype=dtype, mask=mask, **options).problem()
        found = []
        for target in _core.targets():
            with setting(target):
                found.append(derivatives(problem))
        for other in found[1:]:
            assert_same_bits(other, found[0])


@pytest.mark.parametrize("dims", [LONG, GROUP, DECODE], ids=["few heads", "group", "decode"])
def test_every_vector_target_gives_the_same_bits_of_long_problems(
    dims: Dims, derivatives: Evaluate, setting: Setting
) -> None:
    problem = Case("targets", dims, mask=CAUSAL, dropout=0.2).problem()
    found = []
    for threads, target in enumerate(_core.targets()[:2], start=1):
        with setting(target, threads):
            found.append(derivatives(problem))
    assert_same_bits(found[-1], found[0])


@pytest.mark.parametrize("N", [3, 211])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "options"])
def test_derivatives_of_a_row_do_not_depend_on_the_rest_of_the_batch(
    options: dict[str, Any], N: int, derivatives: Evaluate
) -> None:
    dims = Dims(B=3, H=6, Hk=3, N=N, Nk=2309, D=13, Dv=17)
    problem = Case("batch", dims, mask=CAUSAL, **options).problem()
    whole = derivatives(problem)
    for b in range(dims.B):
        one = derivatives(problem.entry(b))
        for name in one.keys() & {"dsinks", "tdsinks"}:
            del one[name]
        assert_same_bits(one, {name: whole[name][b : b + 1] for name in one})


@pytest.mark.parametrize("N", [8, 211])
@pytest.mark.parametrize(
    "options",
    [*CHUNKED.values(), {"mask": CAUSAL, **DROPPING}],
    ids=[*CHUNKED, "everything and dropout"],
)
def test_derivatives_of_chunks_of_queries_have_the_bits_of_the_whole(
    options: dict[str, Any], N: int, derivatives: Evaluate
) -> None:
    dims = Dims(B=2, H=4, Hk=2, N=N, Nk=2311, D=21, Dv=18)
    case = Case("chunks", dims, **options)
    problem = case.problem()
    whole = derivatives(problem)
    for a, b in pairwise([n for n in (0, 1, 3, 8, 64, 113) if n < N] + [N]):
        part = derivatives(of_queries(case, problem, slice(a, b)))
        rows = {name: x[:, :, a:b] for name, x in whole.items() if name not in SUMS}
        assert_same_bits({name: part[name] for name in rows}, rows)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("Nk", [2047, 2049, 4603])
def test_derivatives_of_a_decoding_step_have_the_bits_of_the_prefill(
    Nk: int, layout: str, derivatives: Evaluate
) -> None:
    dims = Dims(B=1, H=6, Hk=2, N=67, Nk=Nk, D=33, Dv=47)
    case = Case("decode", dims, mask=CAUSAL, alibi="H", layout=layout, dropout=0.2)
    problem = case.problem()
    whole = derivatives(problem)
    axis = 2 if layout == "bhnd" else 1
    for i in (0, 30, 66):
        one = derivatives(of_queries(case, problem, slice(i, i + 1)))
        for name in ("o", "dq", "to", "one-pass to", "tdq"):
            assert same_bits(one[name], whole[name].take([i], axis=axis)), name
        for name in ("lse", "tlse", "one-pass tlse"):
            assert same_bits(one[name], whole[name][:, :, i : i + 1]), name


@pytest.mark.parametrize("N", [7, 389])
@pytest.mark.parametrize("needed", ["q", "k", "v", "k v", "bias", "q sinks", ""])
def test_gradients_that_alone_are_needed_have_the_bits_of_all(needed: str, N: int) -> None:
    from tilewise.ops.attention import cpu

    case = Case("needed", replace(LONG, N=N), mask=CAUSAL, **DROPPING)
    problem = case.problem()
    a = problem.arrays
    call = prepare(a["q"], a["k"], a["v"], **problem.options)
    forward = cpu.forward(call, Want())
    tangents = {name: a[name] for name in ("tbias", "tsinks", "tdo", "tdlse", "dlse")}
    inputs = (a["do"], a["tq"], a["tk"], a["tv"], forward.o, forward.stats)
    second = prepare_vjp_jvp(call, *inputs, **tangents)
    some = Needed(**{name: name in needed.split() for name in ("q", "k", "v", "bias", "sinks")})
    for function, along in ((cpu.vjp, second.cotangents), (cpu.vjp_jvp, second)):
        whole, part = function(call, along), function(call, along, some)
        for name in ("q", "k", "v", "bias", "sinks"):
            got, wanted = getattr(part, f"d{name}"), getattr(whole, f"d{name}")
            assert got is None if name not in needed.split() else same_bits(got, wanted), name


@settings(max_examples=40, deadline=None, derandomize="CI" in os.environ, database=None)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (2, 2, 3, 300, 400, 40, 40))),
    mask=st.sampled_from([None, CAUSAL, half, fixed(tw.window(70, 9) | tw.prefix(3))]),
    options=st.sampled_from([{}, {"bias": "1 1 N Nk"}, {"dropout": 0.5}, EVERYTHING, DROPPING]),
    tangents=st.sampled_from(["q k v bias sinks do dlse", "q", "k v", "do", "bias dlse", ""]),
    dtype=st.sampled_from(["float32", "float64"]),
    values=st.sampled_from(["normal", "outliers", "sharp", "small"]),
    threads=st.integers(1, 4),
)
def test_derivatives_have_the_same_bits_on_every_vector_target(
    sizes: tuple[int, ...],
    mask: MaskBuilder | None,
    options: dict[str, Any],
    tangents: str,
    dtype: str,
    values: str,
    threads: int,
    derivatives: Evaluate,
    setting: Setting,
) -> None:
    B, Hk, group, *rest = sizes
    dims = Dims(B, Hk * group, Hk, *rest)
    case = Case("random", dims, dtype=dtype, mask=mask, values=values, **options)
    problem = replace(case, tangents=tangents).problem()
    targets = _core.targets()
    with setting(targets[0], 1):
        wanted = derivatives(problem)
    with setting(targets[1 % len(targets)], threads):
        assert_same_bits(derivatives(problem), wanted)


# The floating-point mode of the caller

MODES = {"flush to zero": 0x8040, "round towards zero": 0x6000}
CONTROL_AT = 28  # of the MXCSR register in the fenv_t of x86-64


class FloatingPointEnvironment:
    """The fenv_t of the C library: its MXCSR register is what NumPy and the kernels run under."""

    def __init__(self) -> None:
        self.libm = ctypes.CDLL(None)
        self.saved = (ctypes.c_uint8 * 64)()

    def register(self) -> int:
        now = (ctypes.c_uint8 * 64)()
        self.libm.fegetenv(now)
        return int.from_bytes(bytes(now[CONTROL_AT : CONTROL_AT + 4]), "little")

    @contextmanager
    def with_bits(self, bits: int) -> Iterator[None]:
        self.libm.fegetenv(self.saved)
        changed = (ctypes.c_uint8 * 64)(*self.saved)
        value = (self.register() & ~0x3F) | bits
        changed[CONTROL_AT : CONTROL_AT + 4] = list(value.to_bytes(4, "little"))
        self.libm.fesetenv(changed)
        try:
            yield
        finally:
            self.libm.fesetenv(self.saved)


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64",
    reason="the register is found in glibc's fenv_t of x86-64",
)
@pytest.mark.parametrize("N", [5, 211])
@pytest.mark.parametrize("bias", ["B H N Nk", "1 H 1 1", None])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("threads", [1, 2])
def test_floating_point_mode_of_the_caller_does_not_show(
    threads: int, mode: int, bias: str | None, N: int, derivatives: Evaluate, setting: Setting
) -> None:
    dims = Dims(B=1, H=4, Hk=2, N=N, Nk=1103, D=13, Dv=17)
    case = Case("mode", dims, mask=CAUSAL, bias=bias, sinks="normal", softmax_scale=0.25)
    problem = case.problem()
    # Values and cotangents so small that o and the gradients are subnormal numbers.
    problem.arrays["v"] *= np.float32(1e-38)
    problem.arrays["dlse"] *= np.float32(1e-38)
    for name in ("tv", "tdlse"):
        problem.arrays[name] *= np.float32(1e-38)
    environment = FloatingPointEnvironment()
    with setting(threads=threads):
        wanted = derivatives(problem)
        with environment.with_bits(mode):
            before = environment.register() & 0xFFC0
            got = derivatives(problem)
            after = environment.register() & 0xFFC0
    tiny = np.finfo(np.float32).tiny
    assert all((np.abs(wanted[name]) < tiny).any() for name in ("o", "dq", "dk", "to", "tdq"))
    assert before == after != 0x1F80
    assert_same_bits(got, wanted)
