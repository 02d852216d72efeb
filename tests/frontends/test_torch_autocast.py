"""Autocast of the CPU and of a GPU: each function gives the dtype that PyTorch's own gives.

Tensors of a GPU are fake ones: what is compared is the rule, and no number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as nn

from tilewise import torch as twt
from tilewise.torch import checks

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def a_gpu_that_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "missing", lambda: None)


@contextlib.contextmanager
def autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """What `torch.autocast` does, also for a GPU that is not there."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def made(device: str, dtype: torch.dtype) -> Callable[..., Any]:
    """What makes tensors; those of a GPU cannot be cut, where PyTorch has no CUDA."""

    def of(*shape: int, to: torch.dtype = dtype) -> Any:
        return torch.ones(shape, dtype=to, device=device)

    return of


def targets(of: Callable[..., Any]) -> Any:
    return of(3, to=torch.int64)


def place(device: str) -> Any:
    return FakeTensorMode() if device == "cuda" else torch.no_grad()


def of_probabilities(of: Callable[..., Any], by: Callable[..., Any]) -> Any:
    """A loss whose targets and weights have another dtype of 16 bits than the logits."""
    x = of(3, 7)
    other = torch.float16 if x.dtype is torch.bfloat16 else torch.bfloat16
    other = x.dtype if x.dtype is torch.float64 else other
    return by(x, of(3, 7, to=other), weight=of(7, to=other))


Q = (1, 2, 3, 7)
PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear": (
        lambda of: twt.linear(of(3, 7), of(5, 7), of(5)),
        lambda of: nn.linear(of(3, 7), of(5, 7), of(5)),
    ),
    "attention": (
        lambda of: twt.attention(of(*Q), of(*Q), of(*Q), bias=of(3, 3)),
        lambda of: nn.scaled_dot_product_attention(of(*Q), of(*Q), of(*Q)),
    ),
    "softmax": (
        lambda of: twt.softmax(of(3, 7)),
        lambda of: torch.softmax(of(3, 7), -1),
    ),
    "log_softmax": (
        lambda of: twt.log_softmax(of(3, 7), sink=of(3)),
        lambda of: torch.log_softmax(of(3, 7), -1),
    ),
    "cross_entropy": (
        lambda of: twt.cross_entropy(of(3, 7), targets(of)),
        lambda of: nn.cross_entropy(of(3, 7), targets(of)),
    ),
    "cross_entropy of probabilities": (
        lambda of: of_probabilities(of, twt.cross_entropy),
        lambda of: of_probabilities(of, nn.cross_entropy),
    ),
    "linear_cross_entropy": (
        lambda of: twt.linear_cross_entropy(of(3, 7), of(5, 7), targets(of), bias=of(5)),
        lambda of: nn.cross_entropy(nn.linear(of(3, 7), of(5, 7), of(5)), targets(of)),
    ),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PAIRS)
def test_dtypes_are_those_of_pytorch(name: str, device: str) -> None:
    mine, theirs = PAIRS[name]
    for to in (torch.bfloat16, torch.float16):
        for dtype in FLOATS:
            with place(device), autocast(device, to):
                of = made(device, dtype)
                found, wanted = mine(of), theirs(of)
            assert found.dtype is wanted.dtype, (dtype, to)
            assert found.device == wanted.device and found.shape == wanted.shape


def test_only_tensors_of_its_own_device_are_cast() -> None:
    for device, other in (("cpu", "cuda"), ("cuda", "cpu")):
        with place("cuda"), autocast(other, torch.float16):
            of, narrow = made(device, torch.float32), made(device, torch.bfloat16)
            assert twt.linear(of(3, 7), of(5, 7)).dtype is torch.float32
            assert twt.attention(of(*Q), of(*Q), of(*Q)).dtype is torch.float32
            assert twt.softmax(narrow(3, 7)).dtype is torch.bfloat16
            with pytest.raises(TypeError, match="weight must have dtype"):
                twt.cross_entropy(narrow(3, 7), targets(of), weight=of(7, to=torch.float16))
