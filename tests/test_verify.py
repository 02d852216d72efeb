"""The audit flags wrong implementations of attention, and only those."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import tilewise as tw
from tilewise import dispatch, verify
from tilewise.base.operator import Implementation
from tilewise.ops.attention import reference
from tilewise.verify import blas, metrics
from tilewise.verify.cases.attention import CASES

TILE = 16


def visible(mask, B, H, N, Nk, bug):
    seen = np.ones((B, H, N, Nk), bool)
    if mask is not None:
        seen &= mask.to_bool(B, H, N, Nk)
        if bug == "mask off by one":
            seen[..., 1:] = seen[..., :-1].copy()
    return seen


def key_heads(x, H, bug):
    Hk = x.shape[1]
    heads = np.arange(H) % Hk if bug == "wrong key head" else np.arange(H) // (H // max(1, Hk))
    return x[:, heads]


def online(q, k, v, *, mask=None, softmax_scale=None, return_lse=False, bug=None):
    """Online softmax in tiles of keys, right unless a bug is switched on."""
    B, H, N, D = q.shape
    Nk, Dv = v.shape[2:]
    dtype = q.dtype.type
    scale = dtype(D**-0.5 if softmax_scale is None else softmax_scale)
    if bug == "writes to its inputs":
        q *= scale
        scale = dtype(1)
    if bug == "rounds to 16 bits":
        q = q.astype(np.float16).astype(dtype)
    k, v = key_heads(k, H, bug), key_heads(v, H, bug)
    seen = visible(mask, B, H, N, Nk, bug)
    m = np.full((B, H, N, 1), -np.inf, dtype)
    l, acc = np.zeros((B, H, N, 1), dtype), np.zeros((B, H, N, Dv), dtype)
    stop = Nk - Nk % TILE if bug == "forgets the last tile" else Nk
    for start in range(0, stop, TILE):
        tile = slice(start, start + TILE)
        s = (q @ k[:, :, tile].swapaxes(-1, -2)) * scale
        s = np.where(seen[..., tile], s, dtype(-np.inf))
        new = np.maximum(m, s.max(axis=-1, keepdims=True))
        if bug == "stale row maximum":
            new = np.where(m == -np.inf, new, m)
        base = new if bug == "no guard for empty rows" else np.where(new == -np.inf, 0, new)
        w, c = np.exp(s - base), np.exp(m - base)
        if bug == "missing rescale":
            c = np.where(m == -np.inf, c, 1)
        l, acc, m = l * c + w.sum(axis=-1, keepdims=True), acc * c + w @ v[:, :, tile], new
    alive = l > 0
    if bug == "no guard for empty rows":
        alive[...] = True
    o = np.where(alive, acc / np.where(alive, l, 1), 0).astype(dtype)
    lse = np.where(alive, m + np.log(np.where(alive, l, 1)), -np.inf)[..., 0]
    if bug == "lse in base 2":
        lse = lse / dtype(np.log(2))
    if bug == "not deterministic":
        o *= dtype(1) + dtype(np.finfo(dtype).eps) * np.random.default_rng().integers(0, 2, o.shape)
        o = o.astype(dtype)
    return SimpleNamespace(o=o, lse=lse) if return_lse else o


def online_vjp(do, q, k, v, o, stats, *, dlse=None, mask=None, softmax_scale=None, bug=None):
    """The gradients, recomputed from lse, right unless a bug is switched on."""
    B, H, N, D = q.shape
    Hk, Nk = k.shape[1:3]
    dtype = q.dtype.type
    scale = dtype(D**-0.5 if softmax_scale is None else softmax_scale)
    wide_k, wide_v = key_heads(k, H, bug), key_heads(v, H, bug)
    seen = visible(mask, B, H, N, Nk, bug)
    s = np.where(seen, (q @ wide_k.swapaxes(-1, -2)) * scale, dtype(-np.inf))
    p = np.exp(s - np.where(stats == -np.inf, 0, stats)[..., None])
    delta = (do * o).sum(axis=-1)
    if dlse is not None and bug != "dropped dlse":
        delta = delta - dlse
    ds = do @ wide_v.swapaxes(-1, -2)
    if bug != "dropped delta":
        ds = ds - delta[..., None]
    ds = p * ds * scale
    dk, dv = ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ do
    if bug == "dk without the scale":
        dk = dk / scale
    group = H // max(1, Hk)
    dk, dv = (x.reshape(B, Hk, group, Nk, -1).sum(axis=2) if H else x for x in (dk, dv))
    if bug == "only the last head of a group":
        last = (p.swapaxes(-1, -2) @ do).reshape(B, Hk, group, Nk, -1)
        dv = last[:, :, -1]
    return ds @ wide_k, dk, dv


def audit(bug, select):
    return verify.run(partial(online, bug=bug), select=select, vjp=partial(online_vjp, bug=bug))


def failed_checks(report):
    return {check.name for _, check in report.failures}


@pytest.mark.parametrize("select", ["heads/", "mask/", "size/D", "size/1", "values/ties"])
def test_right_implementation_passes(select):
    report = audit(None, select)
    assert report.passed, report.failures
    assert report.counts["skipped"] == 0


FORWARD_BUGS = {
    "mask off by one": ("heads/2", {"o", "lse", "dq"}),
    "missing rescale": ("heads/2", {"o", "lse"}),
    "stale row maximum": ("values/large-logits", {"o", "lse"}),
    "wrong key head": ("heads/", {"o", "lse", "dk"}),
    "forgets the last tile": ("heads/one", {"o", "lse"}),
    "no guard for empty rows": ("mask/dense-empty", {"o", "lse"}),
    "rounds to 16 bits": ("heads/one", {"o", "lse"}),
    "lse in base 2": ("heads/one", {"lse"}),
    "writes to its inputs": ("heads/one", {"inputs unchanged"}),
    "not deterministic": ("heads/one", {"same bits twice"}),
}
BACKWARD_BUGS = {
    "dropped delta": ("heads/2", {"dq", "dk"}),
    "dropped dlse": ("heads/2", {"dq", "dk"}),
    "dk without the scale": ("heads/2", {"dk"}),
    "only the last head of a group": ("heads/3", {"dv"}),
}


@pytest.mark.parametrize("bug", FORWARD_BUGS)
def test_planted_bug_in_the_forward_pass_is_flagged(bug):
    select, expected = FORWARD_BUGS[bug]
    report = audit(bug, select)
    assert not report.passed
    assert expected <= failed_checks(report)


@pytest.mark.parametrize("bug", BACKWARD_BUGS)
def test_planted_bug_in_the_gradients_is_flagged_there_alone(bug):
    select, expected = BACKWARD_BUGS[bug]
    report = audit(bug, select)
    assert failed_checks(report) == expected


def test_wrong_key_head_is_flagged_only_where_heads_are_shared():
    report = audit("wrong key head", "heads/one-head")
    assert report.passed


def test_leaking_nan_of_a_masked_key_is_flagged():
    report = audit(None, "poison/absent-lengths")
    assert {"o", "dq"} <= failed_checks(report)
    assert any("should be finite" in check.detail for _, check in report.failures)


def test_changed_bits_of_parts_are_flagged_on_request():
    def depends_on_the_batch(q, k, v, *, mask=None):
        return online(q, k, v, mask=mask) * (1 + np.finfo(q.dtype).eps * (len(q) - 1))

    assert verify.run(depends_on_the_batch, select="heads/one").passed
    report = verify.run(depends_on_the_batch, select="heads/one", invariant=True)
    assert "same bits in a batch of one" in failed_checks(report)


def test_options_that_a_function_does_not_take_are_skipped():
    report = verify.run(partial(online, bug=None), select="bias/N-Nk")
    assert report.counts == {"passed": 0, "failed": 0, "skipped": 1}
    assert not report.passed
    assert report.cases[0].checks[0].detail == "does not take bias"


def test_unsupported_is_skipped_and_any_other_exception_fails():
    def refuses(q, k, v, *, mask=None):
        if q.dtype == np.float64:
            raise tw.Unsupported("float32 only")
        raise RuntimeError("broken\nsecond line")

    report = verify.run(refuses, select="heads/multi-query")
    states = {case.name: case.status for case in report.cases}
    assert states == {"heads/multi-query": "failed", "heads/multi-query-causal": "skipped"}
    assert report.failures[0][1].detail == "raised RuntimeError: broken"


@pytest.mark.parametrize(
    ("result", "detail"),
    [
        (lambda q, v: [1.0], "o is no array but float"),
        (lambda q, v: np.zeros(q.shape[:3], q.dtype), "should be float32 (5, 1, 59, 29)"),
        (lambda q, v: np.zeros((5, 1, 59, 29)), "o is float64"),
    ],
)
def test_wrong_kind_of_result_is_flagged(result, detail):
    report = verify.run(lambda q, k, v: result(q, v), select="heads/one-head")
    assert detail in report.failures[0][1].detail


def test_cases_are_many_and_named_apart():
    names = [case.name for case in CASES]
    assert len(names) >= 120
    assert len(set(names)) == len(names)
    assert all(case.group and case.name != case.group for case in CASES)


def test_problems_are_the_same_every_time():
    case = next(case for case in CASES if case.name == "combined/everything")
    first, second = case.problem(), case.problem()
    assert all(metrics.same_bits(first.arrays[name], second.arrays[name]) for name in first.arrays)


def test_tangents_leave_the_other_numbers_as_they_are():
    case = next(case for case in CASES if case.name == "combined/everything")
    with_tangents, without = case.problem(), replace(case, tangents="").problem()
    kept = without.arrays.keys()
    assert not any(name in kept for name in with_tangents.tangents)
    assert all(metrics.same_bits(with_tangents.arrays[name], without.arrays[name]) for name in kept)


def test_parts_of_a_problem_have_parts_of_every_array():
    case = next(case for case in CASES if case.name == "combined/everything")
    problem = case.problem()
    part = problem.part(slice(5, 8), slice(0, 11)).arrays
    for name, (rows, columns) in {"q": (3, 40), "k": (11, 40), "v": (11, 24)}.items():
        assert part[name].shape[2:] == part[f"t{name}"].shape[2:] == (rows, columns)
    assert part["do"].shape == part["tdo"].shape == (2, 6, 3, 24)
    assert part["dlse"].shape == part["tdlse"].shape == (2, 6, 3)
    assert part["bias"].shape == part["tbias"].shape == (2, 6, 3, 11)
    one = problem.entry(1).arrays
    assert one["tbias"].shape[0] == one["tk"].shape[0] == one["tdlse"].shape[0] == 1
    assert one["tsinks"].shape == (6,)


def test_blas_has_its_threads_back_after_the_audit():
    counts = [get() for get, _ in blas._controls()]
    with blas.one_blas_thread():
        assert all(get() == 1 for get, _ in blas._controls())
    assert [get() for get, _ in blas._controls()] == counts


def test_select_must_match_a_case():
    with pytest.raises(ValueError, match="verify: select must be part of a case's name"):
        verify.run(select="no such case", implementation="reference")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"operator": "conv"}, "operator must be one of 'attention', 'softmax', .* package"),
        ({"operator": "nowhere:f"}, "'nowhere:f' must be importable"),
        ({"operator": "math:pi"}, "'math:pi' must be a function"),
        ({"operator": "math:"}, "function must be named package.module:function"),
        ({"implementation": "fast"}, "implementation must be one of"),
        ({"operator": "math:sin", "implementation": "cpu"}, "implementation must be left out"),
        ({"vjp": "math:sin"}, "vjp must come with a function"),
        ({"jvp": "math:sin"}, "jvp must come with a function"),
        ({"vjp_jvp": "nowhere:f"}, "'nowhere:f' must be importable"),
    ],
)
def test_wrong_calls_are_explained(arguments, text):
    with pytest.raises(ValueError, match=text):
        verify.run(**arguments)


def test_report_is_json():
    report = audit("dropped delta", "heads/one")
    data = json.loads(report.as_json())
    assert data["passed"] is False
    assert data["counts"]["failed"] == 1
    checks = {check["name"]: check for check in data["cases"][0]["checks"]}
    assert checks["dq"]["status"] == "failed"
    assert checks["dq"]["error"] > checks["dq"]["allowed"]
    assert checks["o"]["error"] <= checks["o"]["allowed"]


def test_progress_counts_every_case():
    seen = []
    verify.run("attention", "reference", "heads/multi", lambda *step: seen.append(step))
    assert seen == [(0, 2, "heads/multi-query"), (1, 2, "heads/multi-query-causal")]


GROUPS = list(dict.fromkeys(case.group for case in CASES))


@pytest.mark.parametrize("group", ["poison", "padding", "empty-rows", "combined"])
def test_reference_passes(group):
    report = verify.run("attention", "reference", group + "/")
    assert report.passed, report.failures


@pytest.fixture(scope="module")
def default_report():
    return verify.run()


@pytest.mark.parametrize("group", GROUPS)
def test_default_implementation_passes(default_report, group):
    failures = [
        (case.name, check.detail) for case, check in default_report.failures if case.group == group
    ]
    assert not failures
    assert not any(case.status == "skipped" for case in default_report.cases)


def test_default_implementation_is_as_accurate_as_the_textbook(default_report):
    ratios = {}
    for case in default_report.cases:
        for check in case.checks:
            if check.error and check.yardstick:
                ratios.setdefault(check.name, []).append(np.log(check.error / check.yardstick))
    assert {"o", "dq", "to", "tlse", "tdq", "tdk", "tdv", "tdbias", "tdsinks"} <= ratios.keys()
    for name, logs in ratios.items():
        # The error of a few numbers, as sinks are, is luck; the mean over few cases still is.
        luck = 2 * np.std(logs) / len(logs) ** 0.5
        # The textbook's own error depends on NumPy's BLAS, by some percent.
        assert np.mean(logs) - luck <= np.log(1.1), name


class TestMetrics:
    def test_relative_error_of_huge_numbers_does_not_overflow(self):
        x = np.full(3, 1e300)
        assert metrics.relative_error(x * (1 + 1e-8), x) == pytest.approx(1e-8, rel=1e-6)

    def test_relative_error_with_a_floor_counts_unlike_rows_alike(self):
        want, got = np.array([1e9, 1.0]), np.array([1e9, 1.1])
        assert metrics.relative_error(got, want) < 1e-9
        assert metrics.relative_error(got, want, floor=1.0) > 0.05

    def test_nan_where_the_truth_is_finite_is_an_infinite_error(self):
        assert metrics.relative_error(np.array([np.nan, 1]), np.ones(2)) == np.inf

    def test_relative_error_of_zero_is_absolute(self):
        assert metrics.relative_error(np.array([3.0, 4.0]), np.zeros(2)) == 5.0

    def test_ulp(self):
        want = np.array([1.0, 1.0])
        got = np.array([1.0, np.nextafter(np.float32(1), np.float32(2))], np.float32)
        assert metrics.max_ulp(got, want) == 1.0

    def test_bias_of_rounding_towards_zero_is_minus_one(self):
        want = np.array([1.0, -2.0, 3.0])
        assert metrics.bias(want * (1 - 1e-7), want) == pytest.approx(-0.926, abs=1e-3)
        assert metrics.bias(want, want) == 0

    def test_pattern_tells_infinities_apart_only_on_request(self):
        got, want = np.array([np.nan, 1.0]), np.array([-np.inf, 1.0])
        assert metrics.pattern(got, want) is None
        assert metrics.pattern(got, want, exact=True) == "entry (0,) nan, should be -inf"
        assert metrics.pattern(want, want, exact=True) is None

    def test_same_bits_tells_zeros_apart_but_no_kinds_of_nan(self):
        assert not metrics.same_bits(np.array([0.0]), np.array([-0.0]))
        assert metrics.same_bits(np.array([np.nan]), np.array([-np.nan]))
        assert not metrics.same_bits(np.zeros(2, np.float32), np.zeros(2))


def inputs(dtype=np.float32, **options):
    rng = np.random.default_rng(3)
    shapes = {"q": (2, 4, 19, 7), "k": (2, 2, 23, 7), "v": (2, 2, 23, 5)}
    tensors = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return {**tensors, **options}


ALL = {"dL_dQ": True, "dL_dK": True, "dL_dV": True, "all_correct": True}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_verify_gradients_says_true(dtype):
    report = tw.verify_gradients(**inputs(dtype, mask=tw.causal(), softcap=3.0))
    assert dict(report) == ALL
    assert all(error.differences < error.differences_allowed for error in report.errors.values())


def test_verify_gradients_covers_bias_sinks_empty_rows_and_layout():
    rng = np.random.default_rng(4)
    data = inputs(
        bias=rng.standard_normal((4, 1, 23)).astype(np.float32),
        sinks=np.array([0.5, -np.inf, 1, 2], np.float32),
        mask=tw.dense(rng.random((19, 1)) < 0.7) & tw.causal(),
        alibi_slopes=np.array([0.1, 0.2, 0.3, 0.4], np.float32),
        layout="bnhd",
    )
    for name in "qkv":
        data[name] = np.ascontiguousarray(data[name].swapaxes(1, 2))
    report = tw.verify_gradients(**data)
    assert dict(report) == {**ALL, "dL_dbias": True, "dL_dsinks": True}


def plant(monkeypatch, name, spoil):
    """Register an implementation whose gradients are spoiled."""

    def vjp(call, cotangents):
        return spoil(reference.vjp(call, cotangents))

    module = SimpleNamespace(IMPLEMENTATION=Implementation(name, reference.forward, vjp))
    monkeypatch.setitem(sys.modules, f"planted_{name}", module)
    monkeypatch.setitem(dispatch.TABLE["attention"], name, f"planted_{name}")


@pytest.mark.parametrize(
    ("name", "field", "label", "change"),
    [
        ("scaled", "dq", "dL_dQ", lambda x: x * np.float32(1.00001)),
        ("shifted", "dk", "dL_dK", lambda x: np.roll(x, 1, axis=2)),
        ("one_entry", "dv", "dL_dV", lambda x: x + (np.arange(x.size).reshape(x.shape) == 7)),
        ("with_nan", "dv", "dL_dV", lambda x: np.where(x == x.max(), np.nan, x)),
        ("cut", "dq", "dL_dQ", lambda x: x[..., :-1]),
    ],
)
def test_verify_gradients_says_false(monkeypatch, name, field, label, change):
    def spoil(grads):
        return grads._replace(**{field: change(getattr(grads, field)).astype(np.float32)})

    plant(monkeypatch, name, spoil)
    report = tw.verify_gradients(**inputs(implementation=name))
    assert dict(report) == {**ALL, label: False, "all_correct": False}
    assert not report.errors[label].correct


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"samples": 1.5}, TypeError, "samples must be an integer, got float"),
        ({"q": np.full((2, 4, 19, 7), np.nan)}, ValueError, "q must be finite, got NaN or Inf"),
    ],
)
def test_verify_gradients_explains_wrong_calls(change, error, text):
    with pytest.raises(error, match=text):
        tw.verify_gradients(**{**inputs(np.float64), **change})
