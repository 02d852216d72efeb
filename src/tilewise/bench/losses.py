"""Cross-entropy and linear cross-entropy beside PyTorch, all through PyTorch tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.bench.cases import DOOR, PYTORCH, dtype_of
from tilewise.bench.problems import NotAvailable
from tilewise.bench.row_cases import Call, Inputs, Make, RowCase, RowOperator, as_array, tensor

__all__ = ["CHUNKED", "CROSS_ENTROPY", "LINEAR", "OPERATORS"]

Array = NDArray[Any]
CHUNKED = "PyTorch, chunked"

_FORWARD = "cross_entropy"
_STEP = "cross_entropy with gradient"
_LINEAR = "linear_cross_entropy with gradients"
_COMPARED_ROWS = 64
_CHUNK = 256
_BLOCK_ROWS = 128
_BOTH = (DOOR, PYTORCH)
_ALL = (DOOR, PYTORCH, CHUNKED)

CROSS_ENTROPY = (
    RowCase("forward, 2048 x 32000", _FORWARD, 2048, 32000, _BOTH),
    RowCase("forward and backward, 2048 x 32000", _STEP, 2048, 32000, _BOTH, memory=True),
    RowCase("forward, 2048 x 32000, bfloat16", _FORWARD, 2048, 32000, _BOTH, "bfloat16"),
    RowCase(
        "forward and backward, 2048 x 32000, bfloat16",
        _STEP,
        2048,
        32000,
        _BOTH,
        "bfloat16",
        memory=True,
    ),
)
LINEAR = (
    RowCase("T=2048, C=768, V=32000", _LINEAR, 2048, 32000, _ALL, depth=768, memory=True),
    RowCase(
        "T=2048, C=768, V=32000, bfloat16",
        _LINEAR,
        2048,
        32000,
        _ALL,
        "bfloat16",
        depth=768,
        memory=True,
    ),
    RowCase(
        "T=2048, C=768, V=128256", _LINEAR, 2048, 128256, _ALL, depth=768, memory=True, large=True
    ),
)


def _draw(case: RowCase) -> Inputs:
    """Return targets, and logits or what they are the product of: logits of about N(0, 1)."""
    rng, dtype = np.random.default_rng(0), dtype_of(case.dtype)
    y = rng.integers(0, case.columns, case.rows)
    if not case.depth:
        logits = rng.standard_normal((case.rows, case.columns), np.float32)
        return {"logits": logits.astype(dtype, copy=False), "y": y}
    hidden = rng.standard_normal((case.rows, case.depth), np.float32)
    weight = rng.standard_normal((case.columns, case.depth), np.float32)
    weight /= np.float32(np.sqrt(case.depth))
    both = {"hidden": hidden, "weight": weight}
    return {name: x.astype(dtype, copy=False) for name, x in both.items()} | {"y": y}


def _tilewise_loss(*inputs: Any) -> Any:
    from tilewise import torch as door

    return (door.cross_entropy if len(inputs) == 2 else door.linear_cross_entropy)(*inputs)


def _pytorch_loss(*inputs: Any) -> Any:
    from torch.nn import functional

    *made, y = inputs
    return functional.cross_entropy(made[0] if len(made) == 1 else functional.linear(*made), y)


def _chunked_loss(hidden: Any, weight: Any, y: Any) -> Any:
    import torch

    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise NotAvailable(f"PyTorch {torch.__version__} has none")
    function = torch.nn.functional.linear_cross_entropy
    return function(hidden, weight, y, options=options(batch_chunk_size=_CHUNK))


_LOSSES = {DOOR: _tilewise_loss, PYTORCH: _pytorch_loss, CHUNKED: _chunked_loss}


def _make(loss: Callable[..., Any], gradients: bool, inputs: Inputs) -> Call:
    tensors = {name: tensor(x) for name, x in inputs.items()}
    import torch

    given = tuple(tensors.values())
    if not gradients:
        return lambda: (loss(*given),)
    leaves = tuple(x.requires_grad_() for name, x in tensors.items() if name != "y")

    def call() -> tuple[Any, ...]:
        found = loss(*given)
        return (found, *torch.autograd.grad(found, leaves))

    return call


def _results(contender: str, result: tuple[Any, ...]) -> dict[str, Array]:
    names = ("loss", "dlogits") if len(result) < 3 else ("loss", "dhidden", "dweight")
    return {name: as_array(x) for name, x in zip(names, result, strict=False)}


def _created(contender: str, result: tuple[Any, ...]) -> int:
    return sum(x.nbytes for x in result)


def _softmax_and_loss(z: Array, y: Array) -> tuple[Array, float]:
    """Overwrite float64 logits by their softmax; return it with the sum of the losses."""
    rows = np.arange(len(z))
    picked = z[rows, y]
    m = z.max(axis=-1, keepdims=True)
    np.exp(np.subtract(z, m, out=z), out=z)
    l = z.sum(axis=-1, keepdims=True)
    z /= l
    return z, float((np.log(l) + m).sum() - picked.sum())


def _true(gradients: bool, inputs: Inputs) -> dict[str, Array]:
    """Return the mean loss and the gradients in float64, a block of rows at a time."""
    y = inputs["y"]
    T, loss = len(y), 0.0
    made = "logits" not in inputs
    hidden = inputs["hidden"].astype(np.float64) if made else np.empty((T, 0))
    weight = inputs["weight"].astype(np.float64) if made else np.empty((0, 0))
    rows, dweight = [], np.zeros_like(weight)
    for start in range(0, T, _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        z = hidden[block] @ weight.T if made else inputs["logits"][block].astype(np.float64)
        dz, part = _softmax_and_loss(z, y[block])
        loss += part
        dz[np.arange(len(dz)), y[block]] -= 1
        dz /= T
        if made:
            rows.append(dz @ weight)
            dweight += dz.T @ hidden[block]
        elif start < _COMPARED_ROWS:
            rows.append(dz[:_COMPARED_ROWS])
    truth: dict[str, Array] = {"loss": np.asarray(loss / T)}
    if gradients:
        truth["dhidden" if made else "dlogits"] = np.concatenate(rows)
    return truth | ({"dweight": dweight} if made else {})


def _moved(gradients: bool, inputs: Inputs) -> int:
    return inputs["logits"].nbytes * (1 + gradients)


def _operator(gradients: bool, *, product: bool = False) -> RowOperator:
    makers: dict[str, Make] = {
        name: partial(_make, loss, gradients) for name, loss in _LOSSES.items()
    }
    return RowOperator(
        draw=_draw,
        makers=makers,
        results=_results,
        truth=partial(_true, gradients),
        moved=None if product else partial(_moved, gradients),
        created=_created,
        # Of a loss up to 20 that is 1e-5.
        gates={"loss": 5e-7},
    )


OPERATORS = {
    _FORWARD: _operator(False),
    _STEP: _operator(True),
    _LINEAR: _operator(True, product=True),
}
