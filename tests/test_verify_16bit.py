"""The audit in bfloat16 and float16: what it draws, what it allows, what it flags."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from tilewise import dispatch, verify
from tilewise.base.dtypes import round_to, unit_roundoff
from tilewise.base.operator import Implementation
from tilewise.ops.attention import reference
from tilewise.verify import tensors
from tilewise.verify.blas import one_blas_thread
from tilewise.verify.cases.attention import CASES
from tilewise.verify.noise import of_rounding
from tilewise.verify.oracle import Question, consult
from tilewise.verify.subject import of_function, of_implementation

NARROW = ("bfloat16", "float16")
BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
# One case for each option, small ones.
SELECTED = (
    "heads/multi-query",
    "sinks/some",
    "dropout/0.5-causal",
    "values/mean-causal",
    "values/large-logits",
    "values/small",
    "padding/lowest",
    "padding/minus-1e9-sinks",
    "poison/absent-causal-bias-softcap",
    "memory/reversed-bnhd",
    "combined/everything",
)
BY_NAME = {case.name: case for case in CASES}


def textbook(q, k, v, *, mask=None, rounding=None):
    """Attention in float32, stored as q is; `rounding` is where a mistake rounds once more."""
    B, H, N, D = q.shape
    wide = [x.astype(np.float32) for x in (q, k, v)]
    key, value = (np.repeat(x, H // x.shape[1], axis=1) for x in wide[1:])
    s = wide[0] @ key.swapaxes(-1, -2) * np.float32(D**-0.5)
    if rounding == "logits":
        s = s.astype(q.dtype).astype(np.float32)
    if mask is not None:
        s = np.where(mask.to_bool(B, H, N, k.shape[2]), s, -np.inf)
    w = np.exp(s - s.max(axis=-1, keepdims=True))
    p = w / w.sum(axis=-1, keepdims=True)
    shrunk = np.float32(1 - unit_roundoff(q.dtype) if rounding == "towards zero" else 1)
    return round_to(p @ value * shrunk, q.dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", SELECTED)
def test_default_implementation_passes(name, dtype):
    result = verify.audit_case(BY_NAME[name], of_implementation(), dtype)
    assert result.status == "passed", [c.detail for c in result.checks if c.status == "failed"]
    assert result.dtype == dtype


@pytest.mark.parametrize("dtype", NARROW)
def test_inputs_are_those_of_float32_rounded_once(dtype):
    case = BY_NAME["combined/everything"]
    wide, narrow = (case.in_dtype(name).problem().arrays for name in ("float32", dtype))
    for name, x in narrow.items():
        stored = np.float32 if name in ("dlse", "tdlse") else {"float16": FLOAT16}.get(dtype)
        stored = BFLOAT16 if stored is None else np.dtype(stored)
        assert x.dtype == stored, name
        np.testing.assert_array_equal(x, wide[name].astype(stored), name)


def test_a_bias_that_16_bits_cannot_hold_stays_float32():
    number = {"padding/lowest": NARROW, "padding/minus-1e9": ("float16",), "padding/minus-inf": ()}
    for name, dtypes in number.items():
        for dtype in NARROW:
            arrays = BY_NAME[name].in_dtype(dtype).problem().arrays
            wide = arrays["bias"].dtype == arrays["tbias"].dtype == np.float32
            assert wide is (dtype in dtypes), (name, dtype)


def test_cases_of_float64_are_skipped_with_the_reason():
    report = verify.run("attention", "reference", "multi-query-", dtypes=("float16", "float64"))
    skipped = [case for case in report.cases if case.status == "skipped"]
    assert [(case.name, case.dtype) for case in skipped] == [
        ("heads/multi-query-causal", "float16")
    ]
    assert skipped[0].checks[0].detail == "is a case of float64"
    assert report.passed, report.failures


def test_results_that_16_bits_cannot_hold_are_skipped_with_the_reason():
    report = verify.run("attention", "reference", "values/small-causal", dtypes=["float16"])
    checks = {check.name: check for check in report.cases[0].checks}
    assert checks["dq"].status == "skipped"
    assert checks["dq"].detail == "float16 has no numbers as small"
    assert checks["lse"].status == "passed"


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", ["values/mean", "heads/one-head", "values/outliers"])
def test_twice_the_error_of_rounding_is_allowed(name, dtype):
    case = BY_NAME[name].in_dtype(dtype)
    with one_blas_thread():
        oracle = consult(Question.of(case.problem(), tangents=True))
    for result, truth in oracle.truth.items():
        if result.removeprefix("one-pass ") in ("lse", "max_logit", "entropy", "tlse"):
            assert oracle.dtypes[result] == np.float32
            assert oracle.allowed(result) < 3e-5
            continue
        rounded = round_to(truth, oracle.dtypes[result])
        ratio = oracle.allowed(result) / oracle.error(result, rounded)
        assert 1.9 <= ratio < 2.5, result


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_noise_of_rounding_is_what_rounding_does(dtype):
    x = np.random.default_rng(0).standard_normal(20_000)
    error = round_to(x, dtype).astype(np.float64) - x
    ratio = float(np.linalg.norm(error) / np.linalg.norm(of_rounding(x, dtype)))
    assert ratio == pytest.approx(1, abs=0.02)
    assert not of_rounding(np.array([0.0, np.inf, np.nan]), dtype).any()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rounding", [None, "logits", "towards zero"])
def test_own_function_is_flagged_where_it_rounds_too_much(dtype, rounding):
    def own(q, k, v, *, mask=None):
        return textbook(q, k, v, mask=mask, rounding=rounding)

    report = verify.run(own, select="values/outliers", dtypes=[dtype])
    assert report.passed is (rounding is None), report.failures


def test_results_of_another_dtype_are_flagged():
    report = verify.run(
        lambda q, k, v: textbook(q, k, v).astype(np.float32), select="heads/one", dtypes=NARROW
    )
    assert [check.detail[:12] for _, check in report.failures] == ["o is float32"] * 2


def test_gradients_from_a_rounded_output_are_flagged(monkeypatch):
    """The contract asks for `o` before it was rounded."""

    def forward(call, want):
        found = reference.forward(call, want)
        return found._replace(o_full=found.o.astype(np.float32))

    planted = Implementation("rounded", forward, reference.vjp)
    monkeypatch.setitem(dispatch.TABLE["attention"], "rounded", "planted_rounded")
    monkeypatch.setitem(sys.modules, "planted_rounded", SimpleNamespace(IMPLEMENTATION=planted))
    report = verify.run("attention", "rounded", "values/mean-causal", dtypes=["bfloat16"])
    assert {"dq", "dk"} <= {check.name for _, check in report.failures}
    assert verify.run("attention", "reference", "values/mean-causal", dtypes=["bfloat16"]).passed


def test_report_shows_each_dtype():
    report = verify.run("attention", "reference", "heads/one-head", dtypes=["float32", "bfloat16"])
    data = json.loads(report.as_json())
    assert [case["dtype"] for case in data["cases"]] == ["float32", "bfloat16"]
    ratios = data["error_over_straightforward_by_dtype"]
    assert list(ratios) == ["float32", "bfloat16"]
    assert ratios["bfloat16"]["dq"] == pytest.approx(1, abs=0.01)
    lines = [str(part) for part in report.renderables()]
    assert any("one rounding in bfloat16: o 1.0" in line for line in lines)
    assert "attention in float32, bfloat16, reference: 2 cases" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"dtypes": ["float8"]}, ValueError, "dtype must be float64, float32, bfloat16 or float16"),
        ({"dtypes": "float16"}, TypeError, "dtypes must be a sequence of names, got 'float16'"),
        ({"tensors": True}, ValueError, "tensors must come with a function"),
    ],
)
def test_wrong_calls_are_explained(arguments, error, text):
    with pytest.raises(error, match=text):
        verify.run(**arguments)


class TestTensors:
    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch")

    @pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, np.float32], ids=str)
    def test_arrays_and_tensors_share_memory(self, dtype):
        x = np.arange(6).reshape(2, 3).astype(dtype)
        tensor = tensors.tensor_of(x.T)
        assert str(tensor.dtype) == f"torch.{x.dtype.name}"
        tensor[0, 1] = 7
        assert x[1, 0] == 7
        np.testing.assert_array_equal(tensors.array_of(tensor), x.T)
        assert tensors.array_of(tensor).dtype == x.dtype

    def test_arrays_that_no_tensor_can_view_are_copied(self):
        x = np.arange(6.0)
        x.setflags(write=False)
        assert tensors.tensor_of(x[::-1]).tolist() == [5, 4, 3, 2, 1, 0]
        assert tensors.tensor_of(x).tolist() == [0, 1, 2, 3, 4, 5]

    @pytest.mark.parametrize("dtype", NARROW)
    def test_library_passes_on_tensors_with_the_gradients_of_autograd(self, dtype):
        report = verify.run(
            "tilewise.torch:attention", select="everything-poison", dtypes=[dtype], tensors=True
        )
        assert report.passed, report.failures
        checks = {check.name for check in report.cases[0].checks if check.status == "passed"}
        assert {"o", "lse", "dq", "dk", "dv", "dbias", "dsinks"} <= checks

    @pytest.mark.parametrize("wrong", [False, True])
    def test_own_function_without_lse_is_tried_without_its_cotangent(self, torch, wrong):
        def own(q, k, v):
            s = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
            p = torch.softmax(s, dim=-1)
            o = (p @ (v.detach() if wrong else v).float()).to(q.dtype)
            return o + 0 * v.sum() if wrong else o

        subject = of_function(own, tensors=True)
        assert not subject.takes_dlse
        result = verify.audit_case(BY_NAME["heads/one-head"], subject, "bfloat16")
        failed = {check.name for check in result.checks if check.status == "failed"}
        assert failed == ({"dv"} if wrong else set())

    def test_function_that_autograd_cannot_follow_is_skipped(self):
        def own(q, k, v):
            return tensors.tensor_of(textbook(*map(tensors.array_of, (q, k, v))))

        report = verify.run(own, select="heads/one", dtypes=["float16"], tensors=True)
        assert report.passed
        details = {check.detail for check in report.cases[0].checks if check.name == "vjp"}
        assert details == {"autograd finds no gradient of o and lse"}


@pytest.mark.parametrize("dtype", NARROW)
def test_derivatives_pass(dtype):
    pytest.importorskip("torch")
    for select in ("sinks", "everything"):
        grid = verify.derivatives(select=select, dtypes=[dtype])
        assert grid.passed, grid.failures
        assert list(grid.cells[0].measured) == [dtype]
        assert grid.cells[0].measured[dtype].difference is None


def test_derivatives_in_16_bits_need_no_pytorch():
    grid = verify.derivatives("reference", "lse", dtypes=NARROW, torch=False)
    assert grid.passed, grid.failures
    with pytest.raises(ValueError, match="dtype must be"):
        verify.derivatives(dtypes=["half"])
