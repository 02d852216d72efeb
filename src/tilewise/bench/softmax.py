"""Softmax, log-softmax and log-sum-exp beside PyTorch, SciPy and a copy of the same bytes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.bench.cases import PYTORCH, TILEWISE, dtype_of
from tilewise.bench.problems import NotAvailable
from tilewise.bench.row_cases import (
    COPY,
    Call,
    Inputs,
    Make,
    RowCase,
    RowOperator,
    as_array,
    tensor,
)

__all__ = ["CASES", "OPERATORS"]

Array = NDArray[Any]
SCIPY = "SciPy"

_ALL = (TILEWISE, PYTORCH, SCIPY, COPY)
_COMPARED_ROWS = 64

CASES = (
    RowCase("softmax, 4096 x 4096", "softmax", 4096, 4096, _ALL, memory=True),
    RowCase("softmax, 64 x 1048576", "softmax", 64, 1 << 20, _ALL),
    RowCase("softmax, 131072 x 128", "softmax", 1 << 17, 128, _ALL),
    RowCase("softmax along axis 0, 4096 x 4096", "softmax along axis 0", 4096, 4096, _ALL),
    RowCase("softmax, 4096 x 4096, bfloat16", "softmax", 4096, 4096, _ALL, "bfloat16"),
    RowCase("log_softmax, 4096 x 4096", "log_softmax", 4096, 4096, _ALL),
    RowCase("logsumexp, 4096 x 4096", "logsumexp", 4096, 4096, _ALL, memory=True),
)


def _draw(axis: int) -> Callable[[RowCase], Inputs]:
    def draw(case: RowCase) -> Inputs:
        shape = (case.columns, case.rows) if axis == 0 else (case.rows, case.columns)
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        return {"x": x.astype(dtype_of(case.dtype), copy=False)}

    return draw


def _tilewise(name: str, axis: int) -> Make:
    def make(inputs: Inputs) -> Call:
        from tilewise import numpy as door

        function, x = getattr(door, name), inputs["x"]
        if name == "logsumexp":
            return lambda: function(x, axis=axis)
        out = np.zeros_like(x)
        return lambda: function(x, axis=axis, out=out)

    return make


def _pytorch(name: str, axis: int) -> Make:
    def make(inputs: Inputs) -> Call:
        x = tensor(inputs["x"])
        import torch

        function = getattr(torch, name)
        out = x.new_zeros(len(x)) if name == "logsumexp" else torch.zeros_like(x)
        return lambda: function(x, axis, out=out)

    return make


def _scipy(name: str, axis: int) -> Make:
    def make(inputs: Inputs) -> Call:
        x = inputs["x"]
        if x.dtype.name == "bfloat16":
            raise NotAvailable("no bfloat16")
        try:
            special = importlib.import_module("scipy.special")
        except ImportError as absent:
            raise NotAvailable(str(absent)) from absent
        function = getattr(special, name)
        return lambda: function(x, axis=axis)

    return make


def _copy(inputs: Inputs) -> Call:
    x = inputs["x"]
    to = np.zeros_like(x)
    return lambda: np.copyto(to, x)


def _lines(x: Array, axis: int) -> Array:
    """Return an array with its rows, or the number of each, along the first axis."""
    return x.T if axis == 0 else x


def _true(name: str, axis: int) -> Callable[[Inputs], dict[str, Array]]:
    def truth(inputs: Inputs) -> dict[str, Array]:
        x = _lines(inputs["x"], axis)[:_COMPARED_ROWS].astype(np.float64)
        top = x.max(axis=-1, keepdims=True)
        lse = np.log(np.exp(x - top).sum(axis=-1, keepdims=True)) + top
        results: dict[str, Array] = {
            "softmax": np.exp(x - lse),
            "log_softmax": x - lse,
            "logsumexp": lse[:, 0],
        }
        return {name: results[name]}

    return truth


def _operator(name: str, axis: int = -1) -> RowOperator:
    writes = name != "logsumexp"
    return RowOperator(
        draw=_draw(axis),
        makers={
            TILEWISE: _tilewise(name, axis),
            PYTORCH: _pytorch(name, axis),
            SCIPY: _scipy(name, axis),
            COPY: _copy,
        },
        results=lambda contender, result: {name: _lines(as_array(result), axis)},
        truth=_true(name, axis),
        moved=lambda inputs: inputs["x"].nbytes * (1 + writes),
        # SciPy alone returns new memory for a result of the size of x.
        created=lambda contender, result: result.nbytes if contender == SCIPY and writes else 0,
    )


OPERATORS = {
    **{name: _operator(name) for name in ("softmax", "log_softmax", "logsumexp")},
    "softmax along axis 0": _operator("softmax", axis=0),
}
