"""The Triton kernels of attention against the reference, option by option, interpreted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tilewise.base import masks
from tilewise.ops.attention.gpu.kernels import forward
from tilewise.verify.audit import audit_case
from tilewise.verify.cases.attention import CASES
from tilewise.verify.cases.problem import Case, Dims
from tilewise.verify.subject import Subject, of_implementation

SMALL = Dims(B=1, H=2, Hk=1, N=37, Nk=83, D=16, Dv=16)


@pytest.fixture(scope="module")
def triton() -> Subject:
    """The Triton kernels, as `tilewise verify` audits them."""
    return of_implementation("triton")


def by(mask: masks.Mask) -> Any:
    return lambda dims, batch: mask


def random_mask(dims: Dims, batch: slice) -> masks.Mask:
    seen = np.random.default_rng(3).random((dims.H, dims.N, dims.Nk)) < 0.4
    seen[:, 5::9] = False
    return masks.dense(seen)


CAUSAL = by(masks.causal())
SINK_TOKENS = by(masks.causal() & (masks.window(9, 0) | masks.sink_tokens(3)))
EVERYTHING: dict[str, Any] = {
    "mask": SINK_TOKENS,
    "bias": "1 H N Nk",
    "alibi": "H",
    "softcap": 3.0,
    "sinks": "some",
    "dropout": 0.3,
    "softmax_scale": 0.31,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"dims": replace(SMALL, B=2, H=4, Hk=2, D=29, Dv=23)},
    "causal": {"mask": CAUSAL},
    "two-intervals": {"mask": SINK_TOKENS},
    "bits": {"mask": random_mask},
    "bias": {"bias": "B H N Nk", "mask": CAUSAL},
    "bias-of-keys": {"bias": "B 1 1 Nk"},
    "bias-of-queries": {"bias": "1 H N 1"},
    "alibi": {"alibi": "B H", "mask": CAUSAL},
    "softcap": {"softcap": 1.7},
    "sinks": {"sinks": "some", "mask": CAUSAL},
    "dropout": {"dropout": 0.3},
    "bnhd": {"layout": "bnhd", "memory": "padded"},
    "everything": EVERYTHING,
    "everything-float64": {**EVERYTHING, "dtype": "float64"},
}


def passed(case: Case, subject: Subject, dtype: str | None = None) -> None:
    """Audit a case: accuracy of every result and derivative, and the same bits twice."""
    result = audit_case(case, subject, dtype)
    wrong = [check for check in result.checks if check.status != "passed"]
    assert result.checks and not wrong, wrong


@pytest.mark.parametrize("name", OPTIONS)
def test_option_with_every_derivative(name: str, triton: Subject) -> None:
    passed(Case(f"gpu/{name}", **{"dims": SMALL, **OPTIONS[name]}), triton)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_with_every_derivative(dtype: str, triton: Subject) -> None:
    pytest.importorskip("ml_dtypes")
    passed(Case("gpu/narrow", SMALL, mask=CAUSAL, bias="H N Nk", sinks="normal"), triton, dtype)


NAMED = (
    "size/zero-B",
    "size/zero-N",
    "size/zero-Nk-sinks",
    "size/D257-Dv129",
    "empty-rows/all-sinks",
    "padding/lowest",
)


@pytest.mark.parametrize("name", NAMED)
def test_case_of_the_audit(name: str, triton: Subject) -> None:
    (case,) = [case for case in CASES if case.name == name]
    passed(replace(case, dims=replace(case.dims, B=min(case.dims.B, 1))), triton)


POISONED = {
    "absent": {"mask": random_mask, "bias": "H N Nk", "poison": "absent"},
    "absent-sinks": {"mask": random_mask, "sinks": "normal", "poison": "absent"},
    "attended-k": {"mask": CAUSAL, "poison": "k"},
    "attended-v": {"mask": CAUSAL, "poison": "v"},
    "attended-infinite-v": {"mask": random_mask, "poison": "v_inf"},
    "attended-do": {"mask": CAUSAL, "poison": "do"},
    "attended-tq": {"mask": CAUSAL, "poison": "tq"},
}


@pytest.mark.parametrize("name", POISONED)
def test_what_is_not_finite_reaches_those_that_attend_to_it(name: str, triton: Subject) -> None:
    passed(Case(f"gpu/poison-{name}", SMALL, **POISONED[name]), triton)


@pytest.mark.parametrize("planted", ["scale", "nan"])
def test_the_audit_sees_planted_bugs(
    planted: str, triton: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = CAUSAL if planted == "scale" else by(masks.prefix(41))
    case = Case("gpu/planted", SMALL, mask=mask, poison=None if planted == "scale" else "absent")
    if planted == "scale":
        right = forward.logits
        monkeypatch.setattr(
            forward,
            "logits",
            lambda raw, *others: right(raw * (1.0 + 2.0**-12), *others),
        )
    else:
        monkeypatch.setattr(
            forward,
            "weigh_attended",
            lambda acc, w, x, seen, *others: forward.weigh(acc, w, x, *others),
        )
    assert audit_case(case, triton).status == "failed"
