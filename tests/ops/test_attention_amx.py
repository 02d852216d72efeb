"""Products by tile registers: the instructions where the CPU has them, and their emulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import tilewise as tw
from tilewise.base.masks import Mask

_core = pytest.importorskip("tilewise._core")
pytestmark = pytest.mark.usefixtures("poisoned_outputs")

Array = NDArray[Any]
Results = dict[str, Array]
Setting = Callable[..., AbstractContextManager[None]]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
EMULATED = "amx-emulated"
TARGETS = [EMULATED, "amx"]
UNIT = 2.0**-9  # half the distance of neighbouring numbers
B, H, HK, D, DV = 1, 6, 2, 64, 32
MASKS = {
    "all": None,
    "causal": tw.causal(),
    "window": tw.sink_tokens(5) | tw.window(47, 3),
    "bits": tw.dense(np.random.default_rng(3).random((H, 307, 389)) < 0.3),
}


@pytest.fixture
def target(request: pytest.FixtureRequest, setting: Setting) -> Iterator[str]:
    """Use one target for a test, or skip the test where it does not run."""
    name = request.param
    try:
        with setting(name):
            yield name
    except ValueError as error:
        if "must be one of" not in str(error):
            raise
        pytest.skip(f"{name} does not run here")


every_target = pytest.mark.parametrize("target", TARGETS, indirect=True)


def problem(N: int, Nk: int, seed: int = 0, **sizes: int) -> Results:
    """Draw q, k, v and do."""
    d, dv = sizes.get("D", D), sizes.get("Dv", DV)
    rng = np.random.default_rng(seed)
    shapes = {"q": (B, H, N, d), "k": (B, HK, Nk, d), "v": (B, HK, Nk, dv), "do": (B, H, N, dv)}
    return {name: rng.standard_normal(shape).astype(BFLOAT16) for name, shape in shapes.items()}


def as_float64(x: dict[str, Any]) -> dict[str, Any]:
    return {n: a.astype(np.float64) if isinstance(a, np.ndarray) else a for n, a in x.items()}


def forward(x: Results, **options: Any) -> Any:
    asked = dict.fromkeys(("return_lse", "return_stats", "return_entropy"), True)
    return tw.attention(x["q"], x["k"], x["v"], **asked, **options)


def everything(x: Results, **options: Any) -> Results:
    """Return all results of the forward pass and the gradients."""
    r = forward(x, **options)
    saved = (x["q"], x["k"], x["v"], r.o_full, r.stats)
    grads = tw.numpy.attention_vjp(x["do"], *saved, dlse=np.ones_like(r.lse), **options)
    found = {"o": r.o, "o_full": r.o_full, "lse": r.lse, "entropy": r.entropy, **grads._asdict()}
    return {name: array for name, array in found.items() if array is not None}


def assert_same_bits(got: Results, wanted: Results) -> None:
    assert got.keys() == wanted.keys()
    assert not [name for name in wanted if got[name].tobytes() != wanted[name].tobytes()]


def extras() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {
        "bias": rng.standard_normal((H, 307, 389)).astype(np.float32),
        "alibi_slopes": np.linspace(0.0, 0.1, H).astype(np.float32),
        "sinks": rng.standard_normal(H).astype(np.float32),
        "softcap": 11.0,
        "dropout_p": 0.2,
        "seed": 7,
    }


@every_target
@pytest.mark.parametrize("options", [{}, extras()], ids=["plain", "options"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_results_are_as_exact_as_their_dtype(
    mask: Mask | None, options: dict[str, Any], target: str
) -> None:
    x = problem(307, 389)
    got = everything(x, mask=mask, **options)
    exact = everything(as_float64(x), mask=mask, **as_float64(options))
    for name, array in got.items():
        right = exact.get(name, exact["o"])
        error = np.linalg.norm(array.astype(np.float64) - right)
        limit = 2e-6 if name == "lse" else 2 * UNIT
        assert error <= limit * np.linalg.norm(right), (name, error / np.linalg.norm(right))


@every_target
@pytest.mark.parametrize("Nk", [3, 17, 263, 701])
def test_a_chunk_of_queries_gives_the_bits_of_the_whole(Nk: int, target: str) -> None:
    x = problem(Nk, Nk)
    whole = forward(x, mask=tw.causal())
    for n in {1, 3, min(Nk, 50)}:
        part = {"q": x["q"][:, :, Nk - n :], "k": x["k"], "v": x["v"]}
        chunk = forward(part, mask=tw.causal())
        assert chunk.o.tobytes() == whole.o[:, :, Nk - n :].tobytes()
        assert chunk.lse.tobytes() == whole.lse[:, :, Nk - n :].tobytes()


@every_target
def test_any_number_of_threads_gives_the_same_bits(target: str, setting: Setting) -> None:
    x = problem(1009, 1103)
    found = []
    for threads in (1, 3):
        with setting(target, threads):
            found.append(everything(x, mask=tw.causal()))
    assert_same_bits(found[1], found[0])


@every_target
def test_packed_sequences_give_the_bits_of_calls_of_their_own(target: str) -> None:
    lengths = [5, 0, 131, 1, 300]
    starts = np.cumsum([0, *lengths])
    x = problem(int(starts[-1]), int(starts[-1]))
    q, k, v, do = (x[name][0].swapaxes(0, 1) for name in ("q", "k", "v", "do"))
    packed = tw.attention_varlen(q, k, v, starts, mask=tw.causal(), return_stats=True)
    grads = tw.numpy.attention_varlen_vjp(
        do, q, k, v, packed.o_full, packed.stats, starts, mask=tw.causal()
    )
    for a, b in pairwise(starts):
        one = {name: array[:, :, a:b] for name, array in x.items()}
        r = forward(one, mask=tw.causal())
        mine = tw.numpy.attention_vjp(
            one["do"], one["q"], one["k"], one["v"], r.o_full, r.stats, mask=tw.causal()
        )
        for got, wanted in zip(
            (packed.o, grads.dq, grads.dk, grads.dv), (r.o, mine.dq, mine.dk, mine.dv), strict=True
        ):
            assert got[a:b].tobytes() == np.ascontiguousarray(wanted[0].swapaxes(0, 1)).tobytes()


@every_target
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("poisoned", ["q", "k", "v", "do"])
def test_what_is_not_finite_reaches_only_its_own_document(
    poisoned: str, bad: float, target: str
) -> None:
    N, first, last = 333, 37, 171
    ids = np.searchsorted([first, last, 250], np.arange(N), side="right")
    mask = tw.documents(ids=ids) & tw.causal()
    x = problem(N, N)
    clean = everything(x, mask=mask)
    x[poisoned] = x[poisoned].copy()
    x[poisoned][:, :, first:last, ::3] = bad
    with np.errstate(invalid="ignore"):
        got = everything(x, mask=mask)
    others = np.r_[0:first, last:N]
    assert_same_bits(
        {name: np.ascontiguousarray(array[:, :, others]) for name, array in got.items()},
        {name: np.ascontiguousarray(array[:, :, others]) for name, array in clean.items()},
    )
    if poisoned == "v":
        inside = got["o_full"][:, :, first:last]
        assert not np.isfinite(inside[..., ::3]).any()
        assert inside[..., 1::3].tobytes() == clean["o_full"][:, :, first:last, 1::3].tobytes()


@every_target
def test_rows_of_other_lengths_and_types_are_widened_as_without_tiles(
    target: str, setting: Setting
) -> None:
    odd = problem(23, 71, D=48)
    wide = {name: array.astype(np.float32) for name, array in problem(23, 71).items()}
    got = [everything(odd), everything(wide)]
    with setting("avx512"):
        wanted = [everything(odd), everything(wide)]
    for mine, other in zip(got, wanted, strict=True):
        assert_same_bits(mine, other)


def test_emulation_has_the_bits_of_the_instructions(setting: Setting) -> None:
    if "amx" not in _core.targets():
        pytest.skip("amx does not run here")
    small = problem(307, 389)
    small["k"] *= BFLOAT16.type(2.0**-70)  # products below the normal numbers
    small["q"] *= BFLOAT16.type(2.0**-60)
    for x in (problem(307, 389), small):
        for options in ({}, {"mask": tw.causal()}, extras()):
            found = []
            for name in TARGETS:
                with setting(name):
                    found.append(everything(x, **options))
            assert_same_bits(*found)


def test_emulation_is_not_among_the_targets() -> None:
    assert EMULATED not in _core.targets()
    assert _core.target() != EMULATED
