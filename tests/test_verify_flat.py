"""The audit of softmax, linear and the cross-entropies passes them and flags planted faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tilewise import dispatch, verify
from tilewise.base.operator import Implementation
from tilewise.cli import app
from tilewise.ops.cross_entropy import reference as entropy
from tilewise.ops.linear import reference as linear
from tilewise.ops.linear_cross_entropy import reference as fused
from tilewise.ops.softmax import reference as softmax
from tilewise.verify.flat import ENTRIES, consult_flat

Plant = Callable[..., Implementation]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Implementation], None]:
    """Add an implementation of an operator under the name "planted"."""

    def add(operator: str, implementation: Implementation) -> None:
        load = dispatch._load
        monkeypatch.setitem(dispatch.TABLE[operator], "planted", "no.module")
        monkeypatch.setattr(
            dispatch,
            "_load",
            lambda op, name: implementation if name == "planted" else load(op, name),
        )

    return add


def changed(reference: Any, **functions: Any) -> Implementation:
    return replace(reference.IMPLEMENTATION, name="planted", **functions)


def large_without_maximum(call: Any, want: Any) -> Any:
    found = softmax.forward(call, want)
    with np.errstate(all="ignore"):
        w = np.exp(call.x / np.float32(call.temperature))
        return found._replace(y=w / w.sum(axis=1, keepdims=True))


def one_statistic(call: Any, want: Any) -> Any:
    """Row statistics as their rounded sum."""
    found = softmax.forward(call, want)
    m, log_l = found.stats
    return found._replace(stats=type(found.stats)(m + log_l.astype(m.dtype), 0 * log_l))


def rounded_to_16_bits(call: Any, want: Any) -> Any:
    found = softmax.forward(call, want)
    return found._replace(y=found.y.astype(np.float16).astype(found.y.dtype))


def hidden_leaks(call: Any, want: Any) -> Any:
    found = softmax.forward(call, want)
    bad = np.isnan(call.x).any(axis=1, keepdims=True)
    return found._replace(y=np.where(bad, np.asarray(np.nan, found.y.dtype), found.y))


def narrow_lse(call: Any, want: Any) -> Any:
    found = softmax.forward(call, want)
    return found._replace(lse=found.lse.astype(call.dtype))


def writes(call: Any, want: Any) -> Any:
    found = softmax.forward(call, want)
    call.x *= 1.5
    return found


def unsteady(call: Any, want: Any) -> Any:
    found = softmax.forward(call, want)
    off = np.random.default_rng().integers(0, 2, found.lse.shape)
    return found._replace(lse=np.nextafter(found.lse, found.lse + off.astype(found.lse.dtype)))


def without_dlse(call: Any, given: Any, needed: Any) -> Any:
    return softmax.vjp(call, replace(given, dlse=None), needed)


def without_temperature(call: Any, given: Any, needed: Any) -> Any:
    found = softmax.vjp(call, given, needed)
    return found._replace(dx=(found.dx * call.temperature).astype(call.dtype))


def sink_of_the_wrong_sign(call: Any, given: Any, needed: Any) -> Any:
    found = softmax.vjp(call, given, needed)
    return found._replace(dsink=None if found.dsink is None else -found.dsink)


def without_the_mean(call: Any, tangents: Any, want: Any) -> Any:
    found = softmax.jvp(call, tangents, want)
    p = softmax.forward(call, softmax.Want(y=True)).y
    return found._replace(ty=p * tangents.tx / np.float32(call.temperature))


def without_tdlse(call: Any, second: Any, needed: Any) -> Any:
    return softmax.vjp_jvp(call, replace(second, tdlse=None), needed)


def first_derivative_alone(call: Any, second: Any, needed: Any) -> Any:
    given = replace(second.cotangents, dy=second.tdy, dlse=second.tdlse)
    return softmax.vjp(call, given, needed)


SOFTMAX: dict[str, tuple[dict[str, Any], str, str, set[str]]] = {
    "no maximum": ({"forward": large_without_maximum}, "values/large", "float32", {"y"}),
    "one statistic": (
        {"forward": one_statistic},
        "values/padded-rows",
        "float32",
        {"dx", "ty", "tlse", "tdx"},
    ),
    "16 bits": ({"forward": rounded_to_16_bits}, "size/13", "float32", {"y"}),
    "leak": ({"forward": hidden_leaks}, "where/poisoned", "float32", {"y"}),
    "narrow lse": ({"forward": narrow_lse}, "size/5x", "float16", {"lse"}),
    "writes": ({"forward": writes}, "size/13", "float32", {"inputs unchanged"}),
    "unsteady": ({"forward": unsteady}, "size/5x", "float32", {"same bits twice"}),
    "dlse": ({"vjp": without_dlse}, "size/5x", "float32", {"dx"}),
    "temperature": ({"vjp": without_temperature}, "temperature/0.7", "bfloat16", {"dx"}),
    "sink": ({"vjp": sink_of_the_wrong_sign}, "sink/normal", "float64", {"dsink"}),
    "mean": ({"jvp": without_the_mean}, "temperature/0.7", "float32", {"ty"}),
    "tdlse": ({"vjp_jvp": without_tdlse}, "size/5x", "float32", {"tdx"}),
    "second": ({"vjp_jvp": first_derivative_alone}, "sink/normal", "float16", {"tdx", "tdsink"}),
}


@pytest.mark.parametrize("fault", SOFTMAX)
def test_planted_fault_of_the_softmax_is_flagged_where_it_is(plant: Plant, fault: str) -> None:
    functions, select, dtype, expected = SOFTMAX[fault]
    plant("softmax", changed(softmax, **functions))
    report = verify.run("softmax", "planted", select, dtypes=[dtype])
    failed = {check.name for _, check in report.failures}
    assert failed >= expected, failed
    others = {"same bits twice"} if fault == "writes" else set()
    unexpected = failed - expected - others
    assert fault in ("writes", "unsteady") or not unexpected


def dw_of_half_the_rows(call: Any, given: Any, needed: Any) -> Any:
    found = linear.vjp(call, given, needed)
    x = call.x.copy()
    x[: len(x) // 2] = 0
    return found._replace(dw=linear.vjp(replace(call, x=x), given, needed).dw)


def tdx_without_tw(call: Any, second: Any, needed: Any) -> Any:
    return linear.vjp_jvp(call, replace(second, tangents=replace(second.tangents, tw=None)), needed)


def without_z_loss(call: Any, given: Any, stats: Any, needed: Any, out: Any = None) -> Any:
    plain = replace(call, options=replace(call.options, z_loss=0.0))
    return entropy.vjp(plain, given, stats, needed, out)


def loss_without_smoothing(call: Any, want: Any) -> Any:
    plain = replace(call, options=replace(call.options, label_smoothing=0.0))
    return entropy.forward(call, want)._replace(loss=entropy.forward(plain, want).loss)


def ignored_rows_count(call: Any, given: Any, stats: Any, needed: Any, out: Any = None) -> Any:
    options = replace(call.options, ignore_index=-1)
    targets = np.where(call.targets < 0, 0, call.targets)
    kept = replace(call, targets=targets, options=options)
    return entropy.vjp(kept, given, stats._replace(total=1 + 0 * stats.total), needed, out)


def one_token_short(call: Any, given: Any, needed: Any) -> Any:
    dloss = given.dloss.copy()
    dloss[-1] = 0
    short = fused.vjp(call, replace(given, dloss=dloss), needed)
    return fused.vjp(call, given, needed)._replace(dweight=short.dweight)


def tangents_of_other_statistics(call: Any, given: Any) -> Any:
    """Sums of weights that are not those of the normaliser."""
    m = given.stats.m + np.float32(3e-5)
    return fused.jvp(call, replace(given, stats=given.stats._replace(m=m)))


OTHERS: dict[str, tuple[str, Any, dict[str, Any], str, set[str]]] = {
    "half of dw": ("linear", linear, {"vjp": dw_of_half_the_rows}, "size/41", {"dw"}),
    "tdx": ("linear", linear, {"vjp_jvp": tdx_without_tw}, "size/41", {"tdx"}),
    "z-loss": (
        "cross_entropy",
        entropy,
        {"vjp": without_z_loss},
        "indices/z-loss",
        {"dlogits"},
    ),
    "smoothing": (
        "cross_entropy",
        entropy,
        {"forward": loss_without_smoothing},
        "/smoothed",
        {"loss"},
    ),
    "token": ("linear_cross_entropy", fused, {"vjp": one_token_short}, "bias/none", {"dweight"}),
    "tangents": (
        "linear_cross_entropy",
        fused,
        {"jvp": tangents_of_other_statistics},
        "values/100",
        {"tlse", "tloss", "tentropy"},
    ),
    "ignored": (
        "cross_entropy",
        entropy,
        {"vjp": ignored_rows_count},
        "zero/loss-alone",
        {"dlogits"},
    ),
}


@pytest.mark.parametrize("fault", OTHERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planted_fault_of_others_is_flagged_where_it_is(
    plant: Plant, fault: str, dtype: str
) -> None:
    operator, reference, functions, select, expected = OTHERS[fault]
    plant(operator, changed(reference, **functions))
    report = verify.run(operator, "planted", select, dtypes=[dtype])
    assert {check.name for _, check in report.failures} == expected


def slope_of_the_capped_logit(call: Any, given: Any, stats: Any, needed: Any, out: Any = None):
    """The derivative of the soft cap from its result, which is all but the cap far above it."""
    cap = np.float32(call.options.softcap)
    u = call.logits.astype(np.float64) / cap
    t = cap * np.tanh(u).astype(np.float32) * (1 / cap)
    found = entropy.vjp(call, given, stats, needed, out)
    wrong = np.where(t * t < 1, (1 - t * t) * np.cosh(u) ** 2, 0)
    return found._replace(dlogits=(found.dlogits * wrong).astype(call.dtype))


def test_slope_of_the_soft_cap_has_its_digits_far_above_the_cap(plant: Plant) -> None:
    plant("cross_entropy", changed(entropy, vjp=slope_of_the_capped_logit))
    report = verify.run("cross_entropy", "planted", "softcap", dtypes=["float32"])
    failed = {(case.name, check.name) for case, check in report.failures}
    assert failed == {("values/large-softcap", "dlogits")}


@pytest.mark.parametrize("operator", ENTRIES)
def test_right_implementation_under_another_name_passes(plant: Plant, operator: str) -> None:
    others = {"linear": linear, "cross_entropy": entropy, "linear_cross_entropy": fused}
    module = others.get(operator, softmax)
    plant(operator, changed(module))
    report = verify.run(operator, "planted", "size/", dtypes=["float32", "float16"])
    assert report.passed, report.failures


@pytest.mark.parametrize("operator", ENTRIES)
def test_default_implementation_passes_in_every_dtype(operator: str) -> None:
    report = verify.run(operator)
    assert report.passed, report.failures
    assert report.operator == operator and len(report.dtypes) == 4
    assert {case.status for case in report.cases} == {"passed"}


@pytest.mark.parametrize("operator", ENTRIES)
def test_yardstick_is_the_same_computation(operator: str) -> None:
    """A wrong straightforward computation would allow everything."""
    entry = ENTRIES[operator]
    for case in entry.cases:
        problem = case.in_dtype("float64").problem(entry.operator, entry.narrow)
        with np.errstate(all="ignore"):
            oracle = consult_flat(entry, problem)
        for name, error in oracle.plain.items():
            assert error < 1e-7, (case.name, name)
            # Where all but nothing cancels, no digit is sure.
            if np.linalg.norm(oracle.truth[name]) > 1e-6:
                assert oracle.noise[name] < 1e-9, (case.name, name)


def test_names_of_cases_are_apart() -> None:
    for entry in ENTRIES.values():
        names = [case.name for case in entry.cases]
        assert len(set(names)) == len(names) >= 18


def test_same_problem_every_time_and_in_every_dtype() -> None:
    entry = ENTRIES["softmax"]
    case = next(case for case in entry.cases if case.name == "combined/all")
    first, second = (case.problem(entry.operator, entry.narrow).arrays for _ in range(2))
    narrow = case.in_dtype("float16").problem(entry.operator, entry.narrow).arrays
    for name, x in first.items():
        assert np.array_equal(x, second[name])
    assert np.array_equal(narrow["x"], first["x"].astype(np.float16))
    assert narrow["sink"].dtype == narrow["d_lse"].dtype == np.float32
    assert narrow["d_y"].dtype == np.float16


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["verify", *arguments], terminal_width=120)


def test_command_shows_the_table_and_exits_with_0() -> None:
    result = invoke("logsumexp", "--select", "sink/", "--dtype", "float32", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    for text in ("sink float32", "sink bfloat16", "logsumexp in float32, bfloat16, cpu (default)"):
        assert text in result.output
    assert "6 cases, 6 passed, 0 failed" in result.output


def test_command_exits_with_1_and_writes_what_failed(plant: Plant, tmp_path: Any) -> None:
    plant("softmax", changed(softmax, vjp=without_dlse))
    file = tmp_path / "report.json"
    command = ["softmax", "--implementation", "planted", "--select", "size/5x", "--json", str(file)]
    result = invoke(*command)
    assert result.exit_code == 1
    assert "failed size/5x129x1 in float32: dx: error" in " ".join(result.output.split())
    assert json.loads(file.read_text())["counts"]["failed"] == 4


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"implementation": "fast"},
            "softmax: implementation must be one of 'cpu', 'reference', 'triton'",
        ),
        ({"select": "no such"}, "select must be part of a case's name"),
        ({"vjp": "math:sin"}, "vjp must come with a function"),
        ({"tensors": True}, "tensors must come with a function"),
        ({"dtypes": ["half"]}, "dtype must be float64"),
    ],
)
def test_wrong_calls_are_explained(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        verify.run("softmax", **arguments)
