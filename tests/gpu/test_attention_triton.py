"""The Triton kernels of attention against the reference, option by option, interpreted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tilewise.base import masks
from tilewise.verify.audit import audit_case
from tilewise.verify.cases.attention import CASES
from tilewise.verify.cases.problem import Case, Dims
from tilewise.verify.subject import Subject, of_implementation

DIMS = Dims(B=2, H=4, Hk=2, N=67, Nk=79, D=29, Dv=23)
SMALL = Dims(B=1, H=2, Hk=1, N=37, Nk=53, D=16, Dv=16)


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
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
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
    "everything": {
        "mask": SINK_TOKENS,
        "bias": "1 H N Nk",
        "alibi": "H",
        "softcap": 3.0,
        "sinks": "some",
        "dropout": 0.3,
        "softmax_scale": 0.31,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_with_every_derivative(name: str, triton: Subject) -> None:
    result = audit_case(Case(f"gpu/{name}", SMALL, **OPTIONS[name]), triton)
    assert result.status == "passed", result
