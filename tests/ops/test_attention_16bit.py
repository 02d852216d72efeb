"""bfloat16 and float16: what is stored in 16 bits, what is not, and how exact the results are."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import tilewise as tw
from tilewise.base.dtypes import round_to, unit_roundoff
from tilewise.ops.attention import reference
from tilewise.ops.attention.spec import (
    AttentionCall,
    CotangentCall,
    SecondCall,
    TangentCall,
    Want,
    canonical,
    error_bound,
    prepare,
    prepare_tangents,
)
from tilewise.verify import CASES

pytest.importorskip("tilewise._core")
pytestmark = pytest.mark.usefixtures("poisoned_outputs")

Array = NDArray[Any]
BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
DTYPES = [BFLOAT16, FLOAT16]
EVERYTHING = Want(lse=True, max_logit=True, entropy=True, o_full=True)
# One problem for every option and for every way through the kernels.
NAMES = (
    "size/17x65",
    "size/zero-Nk-sinks",
    "size/zero-N",
    "heads/multi-query",
    "heads/3-per-key-head",
    "mask/sink-tokens-window",
    "mask/dense-per-batch-and-head",
    "decode/gqa",
    "decode/sinks",
    "bias/B-1-N-Nk",
    "bias/H-N-Nk",
    "alibi/per-batch-and-head",
    "softcap/strong",
    "sinks/some",
    "layout/bnhd-gqa-causal",
    "tangent/q-k",
    "tangent/v-do",
    "dropout/0.5-causal",
    "values/mean",
    "values/outliers",
    "values/sharp",
    "values/large-logits",
    "empty-rows/some-sinks",
    "combined/everything",
    "combined/everything-dropout",
    "combined/everything-decode",
)


@dataclass(frozen=True)
class Drawn:
    """A case of the audit in 16 bits, with all of its results."""

    name: str
    dtype: np.dtype[Any]

    @cached_property
    def problem(self) -> tuple[dict[str, Array], dict[str, Any]]:
        problem = next(case for case in CASES if case.name == self.name).problem()
        arrays = {name: np.array(x, self.dtype) for name, x in problem.arrays.items()}
        for name in {"dlse", "tdlse"} & arrays.keys():
            arrays[name] = arrays[name].astype(np.float32)
        options = {name: arrays.get(name, x) for name, x in problem.options.items()}
        return arrays, options

    @property
    def call(self) -> AttentionCall:
        arrays, options = self.problem
        return prepare(arrays["q"], arrays["k"], arrays["v"], **options)

    def exact(self) -> dict[str, Array]:
        """Every result in float64, from float64 results of the forward pass."""
        call, a = self.call, self.problem[0]
        tangents = prepare_tangents(call, *(a.get(f"t{x}") for x in INPUTS))
        forward = reference.forward64(call, EVERYTHING)
        tdo = a.get("tdo")
        cotangents = CotangentCall(
            canonical(a["do"], call.layout), a.get("dlse"), forward.o, forward.stats
        )
        moves = {f"t{x}": getattr(tangents, f"t{x}") for x in INPUTS}
        moved = TangentCall(**moves, o=forward.o, stats=forward.stats)
        second = SecondCall(
            cotangents,
            moved,
            None if tdo is None else canonical(tdo, call.layout),
            a.get("tdlse"),
            None,
        )
        gradients = reference.vjp64(call, cotangents)._asdict()
        again = reference.vjp_jvp64(call, second)._asdict()
        found = {**forward._asdict(), **gradients, **reference.jvp64(call, moved)._asdict()}
        found |= {f"t{name}": x for name, x in again.items()}
        ordered = ("o", "o_full", "to", "dq", "dk", "dv", "tdq", "tdk", "tdv")
        swapped = {n: found[n].swapaxes(1, 2) for n in ordered if call.layout == "bnhd"}
        return {name: x for name, x in (found | swapped).items() if name != "stats"}

    def results(self, implementation: str) -> dict[str, Any]:
        """Every result of an implementation, through the functions for NumPy arrays."""
        a, options = self.problem
        options = {**options, "implementation": implementation}
        q, k, v, do = (a[name] for name in ("q", "k", "v", "do"))
        asked = dict.fromkeys(("return_lse", "return_stats", "return_max_logit"), True)
        r = tw.attention(q, k, v, **asked, return_entropy=True, **options)
        saved = (q, k, v, r.o_full, r.stats)
        t = (a.get("tq"), a.get("tk"), a.get("tv"))
        more = {n: a[n] for n in ("tbias", "tsinks") if n in a}
        of_rows = {n: a[n] for n in ("dlse", "tdo", "tdlse") if n in a}
        dlse = a.get("dlse")
        grads = tw.numpy.attention_vjp(do, *saved, dlse=dlse, **options)
        again = tw.numpy.attention_vjp_jvp(do, *t, *saved, **more, **of_rows, **options)
        one_pass, moved = tw.numpy.attention_forward_jvp(*t, q, k, v, **more, **options)
        found = {**r._asdict(), **grads._asdict()}
        found |= tw.numpy.attention_jvp(*t, *saved, **more, **options)._asdict()
        found |= {f"t{name}": x for name, x in again._asdict().items()}
        found |= {"one-pass o": one_pass.o, "one-pass o_full": one_pass.o_full}
        found |= {"one-pass to": moved.to, "one-pass tlse": moved.tlse}
        return {name: x for name, x in found.items() if name != "stats" and x is not None}


INPUTS = ("q", "k", "v", "bias", "sinks")
NARROW = {"o", "to", *(f"d{x}" for x in INPUTS), *(f"td{x}" for x in INPUTS)}


def norm(x: Array) -> float:
    return float(np.linalg.norm(np.where(np.isfinite(x), x, 0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_results_are_as_exact_as_their_dtype(name: str, dtype: np.dtype[Any]) -> None:
    """At most twice the error of rounding exact results in bfloat16, and just that in float16."""
    drawn = Drawn(name, dtype)
    exact, rounded, got = drawn.exact(), drawn.results("reference"), drawn.results("cpu")
    u, noise = unit_roundoff(dtype), 2e-5 if name.startswith(("values", "softcap")) else 4e-6
    large = name.endswith("large-logits")
    for field, x in got.items():
        if large and field.startswith("td"):
            continue  # Float32 cannot tell logits of 1e4 well enough for second derivatives.
        right = exact[field.removeprefix("one-pass ")]
        stored = field.removeprefix("one-pass ") in NARROW
        assert x.dtype == rounded[field].dtype == (dtype if stored else np.float32), field
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(right), field)
        size = norm(right)
        with np.errstate(invalid="ignore"):
            error, once = (norm(y.astype(np.float64) - right) for y in (x, rounded[field]))
        if not stored or dtype == FLOAT16:
            # Products of bfloat16 pairs reach statistics, not only what is stored.
            wide = u if dtype == BFLOAT16 else 0
            of_logits = 2e-3 if large else 0
            assert error <= 1.01 * once + (noise + wide + of_logits) * size, (
                field,
                error / (size or 1),
            )
        else:
            assert error <= 2 * max(once, u / 4 * size) + noise, (field, error / (size or 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["size/64x128", "bias/H-N-Nk", "values/mean", "sinks/some"])
def test_error_bound_holds(name: str, dtype: np.dtype[Any]) -> None:
    drawn = Drawn(name, dtype)
    call, arrays = drawn.call, drawn.problem[0]
    exact, got = drawn.exact(), drawn.results("cpu")
    outputs = reference.forward64(call, EVERYTHING)
    cotangents = CotangentCall(arrays["do"], arrays.get("dlse"), outputs.o, outputs.stats)
    sizes = reference.magnitudes(call, cotangents)
    for field in ("o", "lse", "dq", "dk", "dv", "dbias", "dsinks"):
        if field not in got:
            continue
        size = norm(exact[field])
        bound = error_bound(
            dtype,
            field,
            call,
            logit_size=sizes.logit_size,
            magnitude=sizes.norms[field],
            norm=size,
        )
        assert norm(got[field].astype(np.float64) - exact[field]) < bound, field
        assert field == "lse" or bound < 50 * unit_roundoff(dtype) * size


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_float32_bias_slopes_and_sinks_go_with_16_bits(implementation: str) -> None:
    """Their gradients come back in their own dtype, and equal bits give equal results."""
    arrays, options = Drawn("combined/everything", BFLOAT16).problem
    names = ("bias", "alibi_slopes", "sinks")
    wide = options | {name: options[name].astype(np.float32) for name in names}
    found = []
    for given in (options, wide):
        given = {**given, "implementation": implementation}
        q, k, v = arrays["q"], arrays["k"], arrays["v"]
        r = tw.attention(q, k, v, return_stats=True, **given)
        grads = tw.numpy.attention_vjp(arrays["do"], q, k, v, r.o_full, r.stats, **given)
        assert grads.dbias.dtype == given["bias"].dtype
        assert grads.dsinks.dtype == given["sinks"].dtype
        found.append((r.o, grads))
    (o, grads), (o_wide, grads_wide) = found
    assert o.tobytes() == o_wide.tobytes()
    assert grads.dk.tobytes() == grads_wide.dk.tobytes()
    assert grads.dbias.tobytes() == grads_wide.dbias.astype(BFLOAT16).tobytes()


def test_rounded_output_costs_digits_of_the_gradients_and_the_full_one_does_not() -> None:
    """Rows of ds add up to zero, which 16 bits of `o` spoil where values have a mean."""
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.standard_normal((1, 2, 37, 16)).astype(FLOAT16) for _ in range(4))
    v += FLOAT16.type(8)
    bias = np.zeros((2, 37, 37), np.float32)
    r = tw.attention(q, k, v, bias=bias, return_stats=True)
    full, rounded = (
        tw.numpy.attention_vjp(do, q, k, v, o, r.stats, bias=bias).dbias for o in (r.o_full, r.o)
    )
    assert np.abs(full.sum(axis=2)).max() < 1e-4
    assert np.abs(rounded.sum(axis=2)).max() > 1e-3


def test_full_output_is_the_output_itself_where_nothing_was_rounded() -> None:
    x = np.ones((1, 1, 3, 2), np.float32)
    r = tw.attention(x, x, x, return_stats=True)
    assert r.o_full is r.o
    assert tw.attention(x, x, x, return_lse=True).o_full is None


def test_rounding_to_bfloat16_is_to_nearest_once() -> None:
    """Not by way of float32, where a number just above a tie becomes the tie."""
    ties = np.array([1 + 2.0**-8, -1 - 3 * 2.0**-8, 2.0**-133 * 1.5])
    for sign in (-1, 0, 1):
        x = ties * (1 + sign * 2.0**-40)
        low = np.array([1, -1 - 2.0**-7, 2.0**-133])
        high = np.array([1 + 2.0**-7, -1 - 2.0**-6, 2.0**-132])
        even = np.array([1, -1 - 2.0**-6, 2.0**-132])
        want = {-1: low, 0: even, 1: high}[sign]
        np.testing.assert_array_equal(round_to(x, BFLOAT16).astype(np.float64), want)
    rare = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e300, 3.4e38])
    with np.errstate(over="ignore"):
        want = rare.astype(np.float32).astype(BFLOAT16)
    assert round_to(rare, BFLOAT16).tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_keys_is_empty_and_gets_no_gradient(dtype: np.dtype[Any]) -> None:
    x = np.ones((1, 1, 5, 6), dtype)
    mask = tw.window(1, 0, align="top_left") & tw.prefix(2)
    r = tw.attention(x, x, x, mask=mask, return_stats=True, return_lse=True)
    assert not r.o[:, :, 3:].any()
    assert np.isneginf(r.lse[:, :, 3:]).all()
    grads = tw.numpy.attention_vjp(x, x, x, x, r.o_full, r.stats, mask=mask)
    assert not grads.dq[:, :, 3:].any()


def test_import_needs_numpy_alone() -> None:
    script = (
        "import sys, numpy as np, tilewise as tw\n"
        "x = np.ones((1, 1, 2, 3), np.float16)\n"
        "tw.attention(x, x, x)\n"
        "assert 'ml_dtypes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
