"""What the graphs of PyTorch keep for derivatives: nothing that no derivative reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import tilewise as tw

R, C, V = 7, 131, 37
F32 = torch.float32


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kept_bytes(call: Callable[[], Any]) -> int:
    """Return the bytes of the tensors that the graph of a call keeps."""
    found: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    assert result.requires_grad
    return sum(found)


ROWS = {
    "softmax": tw.torch.softmax,
    "log_softmax": tw.torch.log_softmax,
    "logsumexp": tw.torch.logsumexp,
}


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_a_softmax_keeps_its_input_and_two_numbers_a_row(name: str, dtype: torch.dtype) -> None:
    x = randn(R, C, dtype=dtype).requires_grad_()
    assert kept_bytes(lambda: ROWS[name](x, -1)) == x.nbytes + 2 * 4 * R


def test_a_cross_entropy_keeps_logits_targets_and_statistics() -> None:
    x, targets = randn(R, C).requires_grad_(), torch.arange(R)
    statistics = 3 * 4 * R
    kept = kept_bytes(lambda: tw.torch.cross_entropy(x, targets))
    assert kept == x.nbytes + targets.nbytes + statistics


def test_a_linear_map_keeps_its_inputs() -> None:
    x, w = randn(R, C).requires_grad_(), randn(V, C, seed=1).requires_grad_()
    assert kept_bytes(lambda: tw.torch.linear(x, w)) == x.nbytes + w.nbytes


def test_attention_keeps_its_output_which_its_backward_reads() -> None:
    q, k, v = (randn(1, 2, 17, 8, seed=s).requires_grad_() for s in range(3))
    assert kept_bytes(lambda: tw.torch.attention(q, k, v)) >= 4 * q.nbytes


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_a_result_may_be_changed_before_the_backward(name: str) -> None:
    x, weights = randn(R, C).requires_grad_(), randn(R, C, seed=1)
    y = ROWS[name](x, -1)
    (want,) = torch.autograd.grad(y, x, weights, retain_graph=True)
    y.mul_(2)
    (twice,) = torch.autograd.grad(y, x, weights, retain_graph=True)
    torch.testing.assert_close(twice, 2 * want)


@pytest.mark.parametrize("name", ROWS)
def test_a_tangent_is_not_kept_for_the_backward_of_the_tangents(name: str) -> None:
    """Where the second derivatives compute what they need of it."""
    x, t = randn(R, C).requires_grad_(), randn(R, C, seed=1)
    inputs = 2 * x.nbytes + 2 * 4 * R

    def moved() -> Any:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, t)
            y = ROWS[name](dual, -1)
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    assert kept_bytes(moved) <= inputs + x.nbytes + 2 * 4 * R
