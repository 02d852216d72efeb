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
Y = torch.tensor([0, 6, 2])


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


def given(device: str, *shape: int, dtype: torch.dtype) -> Any:
    return torch.ones(shape, dtype=dtype, device=device)


def place(device: str) -> Any:
    return FakeTensorMode(allow_non_fake_inputs=True) if device == "cuda" else torch.no_grad()


def probabilities(x: Any, by: Callable[..., Any]) -> Any:
    """A loss whose targets and weights have another dtype of 16 bits than the logits."""
    other = torch.float16 if x.dtype is torch.bfloat16 else torch.bfloat16
    other = x.dtype if x.dtype is torch.float64 else other
    return by(x, x.to(other), weight=torch.ones_like(x[0], dtype=other))


PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear": (lambda x, q: twt.linear(x, x, x[0, :3]), lambda x, q: nn.linear(x, x)),
    "attention": (
        lambda x, q: twt.attention(q, q, q, bias=q[..., :3]),
        lambda x, q: nn.scaled_dot_product_attention(q, q, q),
    ),
    "sdpa": (
        lambda x, q: twt.scaled_dot_product_attention(q, q, q),
        lambda x, q: nn.scaled_dot_product_attention(q, q, q),
    ),
    "softmax": (lambda x, q: twt.softmax(x), lambda x, q: torch.softmax(x, -1)),
    "log_softmax": (
        lambda x, q: twt.log_softmax(x, sink=x[:, 0]),
        lambda x, q: torch.log_softmax(x, -1),
    ),
    "cross_entropy": (
        lambda x, q: twt.cross_entropy(x, Y.to(x.device)),
        lambda x, q: nn.cross_entropy(x, Y.to(x.device)),
    ),
    "cross_entropy of probabilities": (
        lambda x, q: probabilities(x, twt.cross_entropy),
        lambda x, q: probabilities(x, nn.cross_entropy),
    ),
    "linear_cross_entropy": (
        lambda x, q: twt.linear_cross_entropy(x, x, Y.to(x.device), bias=x[:, 0]),
        lambda x, q: nn.cross_entropy(nn.linear(x, x), Y.to(x.device)),
    ),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PAIRS)
def test_dtypes_are_those_of_pytorch(name: str, device: str) -> None:
    mine, theirs = PAIRS[name]
    for to in (torch.bfloat16, torch.float16):
        for dtype in FLOATS:
            with place(device), autocast(device, to):
                x, q = given(device, 3, 7, dtype=dtype), given(device, 1, 2, 3, 7, dtype=dtype)
                found, wanted = mine(x, q), theirs(x, q)
            assert found.dtype is wanted.dtype, (dtype, to)
            assert found.device == wanted.device and found.shape == wanted.shape


def test_only_tensors_of_its_own_device_are_cast() -> None:
    for device, other in (("cpu", "cuda"), ("cuda", "cpu")):
        with place("cuda"), autocast(other, torch.float16):
            x = given(device, 3, 7, dtype=torch.float32)
            q = given(device, 1, 2, 3, 7, dtype=torch.float32)
            narrow = x.bfloat16()
            assert twt.linear(x, x).dtype is twt.attention(q, q, q).dtype is torch.float32
            assert twt.softmax(narrow).dtype is torch.bfloat16
            with pytest.raises(TypeError, match="weight must have dtype"):
                twt.cross_entropy(narrow, Y.to(device), weight=narrow[0].half())


def test_an_argument_for_the_result_keeps_the_dtype() -> None:
    with place("cuda"), autocast("cuda", torch.float16):
        x = given("cuda", 3, 7, dtype=torch.bfloat16)
        assert twt.softmax(x, out=torch.empty_like(x)).dtype is torch.bfloat16
