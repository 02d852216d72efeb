"""The gradient of the classifier's weight is added to a tensor, and nothing else changes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import func as ft

import tilewise as tw
from tilewise.ops.linear_cross_entropy import cpu
from tilewise.torch import linear_cross_entropy

B, N, C, V = 3, 11, 13, 307
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def randn(*shape: int, seed: int, dtype: torch.dtype = F64) -> Any:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return drawn.to(dtype)


def inputs(dtype: torch.dtype = F64) -> tuple[Any, ...]:
    hidden = randn(B, N, C, seed=1, dtype=dtype)
    weight, bias = randn(V, C, seed=2, dtype=dtype) / 3, randn(V, seed=3, dtype=dtype)
    targets = torch.randint(V, (B, N), generator=torch.Generator().manual_seed(4))
    targets[1, 2:5] = -100
    return *[t.requires_grad_() for t in (hidden, weight, bias)], targets


def gradients(given: tuple[Any, ...], **options: Any) -> tuple[Any, ...]:
    """The loss and what a backward pass leaves in the inputs."""
    hidden, weight, bias, targets = given
    for t in given[:3]:
        t.grad = None
    found = linear_cross_entropy(hidden, weight, targets, bias=bias, **options)
    loss = found if torch.is_tensor(found) else found.loss.sum() + found.lse.square().sum()
    loss.sum().backward()
    return loss.detach(), hidden.grad, weight.grad, bias.grad


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "shift": 1, "softcap": 3.0},
    {"reduction": "none", "label_smoothing": 0.1, "return_lse": True},
    {"token_chunk": 16, "vocab_chunk": 64, "z_loss": 0.1},
    {"implementation": "reference"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_accumulator_holds_the_sum_and_the_weight_gets_no_gradient(options: Any) -> None:
    given = inputs()
    before = randn(V, C, seed=9)
    buffer = before.clone()
    loss, dhidden, dweight, dbias = gradients(given, grad_accumulator=buffer, **options)
    want, right, gradient, added = gradients(given, **options)
    assert dweight is None and torch.equal(loss, want)
    torch.testing.assert_close(buffer - before, gradient, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(dhidden, right, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(dbias, added, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("dtype", "held", "limit"),
    [(F32, F32, 3e-6), (BF16, BF16, 2**-8), (BF16, F32, 2**-16), (F16, F32, 3e-6)],
)
def test_accumulator_has_the_digits_of_its_dtype(
    dtype: torch.dtype, held: torch.dtype, limit: float
) -> None:
    given = inputs(dtype)
    before = 1e-3 * randn(V, C, seed=9, dtype=held)
    buffer = before.clone()
    gradients(given, grad_accumulator=buffer)
    exact = [t.detach().double().requires_grad_() for t in given[:3]]
    gradient = gradients((*exact, given[3]))[2]
    error = buffer.double() - before.double() - gradient
    assert error.norm() < limit * gradient.norm()


def test_two_backward_passes_add_twice_and_an_ignored_batch_nothing() -> None:
    given, buffer = inputs(), torch.zeros(V, C, dtype=F64)
    gradients(given, grad_accumulator=buffer)
    once = buffer.clone()
    gradients((*given[:3], torch.full((B, N), -100)), grad_accumulator=buffer)
    assert torch.equal(buffer, once) and once.any()
    gradients(given, grad_accumulator=buffer)
    torch.testing.assert_close(buffer, 2 * once, rtol=1e-14, atol=0)


def test_accumulator_is_written_only_where_the_weight_requires_a_gradient() -> None:
    hidden, weight, bias, targets = inputs()
    buffer = torch.zeros(V, C, dtype=F64)
    options = {"bias": bias, "grad_accumulator": buffer}
    linear_cross_entropy(hidden, weight.detach(), targets, **options).backward()
    assert not buffer.any() and hidden.grad.any()
    linear_cross_entropy(hidden.detach(), weight, targets, **options).backward()
    assert buffer.any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_accumulating_under_autocast_and_beside_compiled_code() -> None:
    given, buffer = inputs(F32), torch.zeros(V, C)
    with torch.autocast("cpu", BF16):
        _, _, dweight, _ = gradients(given, grad_accumulator=buffer)
    assert dweight is None
    once = buffer.clone()
    torch.testing.assert_close(once, gradients(given)[2], rtol=0.05, atol=2e-4)

    def loss(hidden: Any, weight: Any) -> Any:
        return 3 * linear_cross_entropy(hidden, weight, given[3], grad_accumulator=buffer)

    torch.compile(loss, backend="aot_eager")(*given[:2]).backward()
    assert not torch.equal(buffer, once)


def test_derivatives_of_an_accumulating_backward_are_refused() -> None:
    hidden, weight, _, targets = inputs()
    buffer = torch.zeros(V, C, dtype=F64)
    loss = linear_cross_entropy(hidden, weight, targets, grad_accumulator=buffer)
    with pytest.raises(tw.Unsupported, match="no derivative of a backward pass"):
        torch.autograd.grad(loss, hidden, create_graph=True)

    def of(hidden: Any) -> Any:
        return linear_cross_entropy(hidden, weight.detach(), targets, grad_accumulator=buffer)

    with pytest.raises(tw.Unsupported, match="no transform"):
        ft.grad(of)(hidden.detach())
    with torch.autograd.forward_ad.dual_level():
        moved = torch.autograd.forward_ad.make_dual(hidden.detach(), hidden.detach())
        with pytest.raises(tw.Unsupported, match="no tangents"):
            of(moved)
    options = {"grad_accumulator": buffer, "implementation": "triton"}
    with pytest.raises(tw.Unsupported, match="plain tensors of the CPU alone"):
        linear_cross_entropy(hidden, weight, targets, **options)
    assert not buffer.any()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_no_array_of_the_size_of_the_weight_is_made(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def noted(shape: tuple[int, ...], dtype: Any) -> Any:
        made.append(math.prod(shape))
        return np.empty(shape, dtype)

    monkeypatch.setattr(cpu, "empty", noted)
    given = inputs(dtype)
    gradients(given, grad_accumulator=torch.zeros(V, C))
    assert {V, (B * N - 3) * C} < set(made)
    assert V * C not in made
    gradients(given)
    assert V * C in made


def test_wrong_accumulators_are_explained() -> None:
    hidden, weight, _, targets = inputs(F32)
    buffers = {
        "be a torch.Tensor": 3,
        "have dtype float32": torch.zeros(V, C, dtype=F64),
        "have shape (307, 13) (from weight)": torch.zeros(C, V),
        "be contiguous": torch.zeros(C, V).T,
        "be without requires_grad": torch.zeros(V, C, requires_grad=True),
        "be on cpu": torch.zeros(V, C, device="meta"),
        "not overlap weight": weight.detach(),
    }
    for text, buffer in buffers.items():
        with pytest.raises((TypeError, ValueError)) as caught:
            linear_cross_entropy(hidden, weight, targets, grad_accumulator=buffer)
        assert f"linear_cross_entropy: grad_accumulator must {text}" in str(caught.value)
