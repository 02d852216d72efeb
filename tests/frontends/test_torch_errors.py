"""Wrong use of attention in PyTorch says what is wrong before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.func as ft

import tilewise as tw
from tilewise import dispatch
from tilewise.base.operator import Implementation
from tilewise.ops.attention import cpu
from tilewise.torch import attention

B, H, HK, N, NK, D, DV = 2, 6, 3, 5, 7, 11, 13


def zeros(*shape: int, **how: Any) -> Any:
    return torch.zeros(*shape, **how)


def good() -> dict[str, Any]:
    return {"q": zeros(B, H, N, D), "k": zeros(B, HK, NK, D), "v": zeros(B, HK, NK, DV)}


def nested() -> Any:
    return torch.nested.nested_tensor([zeros(H, N, D), zeros(H, 3, D)], layout=torch.jagged)


def quantised() -> Any:
    return torch.quantize_per_tensor(zeros(B, H, N, D), 0.1, 0, torch.qint8)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # Kinds
    "array": ({"q": np.zeros((B, H, N, D))}, TypeError, "q must be a torch.Tensor, got ndarray"),
    "no k": ({"k": None}, TypeError, "k must be a torch.Tensor, got NoneType"),
    "number": ({"sinks": 1.0}, TypeError, "sinks must be a torch.Tensor, got float"),
    "sparse": (
        {"k": zeros(B, HK, NK, D).to_sparse()},
        TypeError,
        "k must be a dense tensor, got torch.sparse_coo",
    ),
    # Dtypes
    "integers": (
        {"q": zeros(B, H, N, D, dtype=torch.int64)},
        TypeError,
        "q must have dtype float64, float32, bfloat16 or float16, got int64",
    ),
    "complex": (
        {"q": zeros(B, H, N, D, dtype=torch.complex64)},
        TypeError,
        "float16, got complex64",
    ),
    "two dtypes": (
        {"v": zeros(B, HK, NK, DV).double()},
        TypeError,
        "v must have dtype float32 (from q), got float64",
    ),
    "bias of another dtype": (
        {"bias": zeros(N, NK).bfloat16()},
        TypeError,
        "bias must have dtype float32 (from q), got bfloat16",
    ),
    # Devices
    "two devices": (
        {"k": zeros(B, HK, NK, D, device="meta")},
        ValueError,
        "k must be on cpu (as q), got meta",
    ),
    "mask on another device": (
        {"mask": zeros(N, NK, dtype=torch.bool, device="meta")},
        ValueError,
        "mask must be on cpu (as q), got meta",
    ),
    # Shapes
    "rank": ({"q": zeros(H, N, D)}, ValueError, "q must have shape (B, H, N, D), got (6, 5, 11)"),
    "rank in the other layout": (
        {"q": zeros(1, B, H, N, D), "layout": "bnhd"},
        ValueError,
        "q must have shape (B, N, H, D), got (1, 2, 6, 5, 11)",
    ),
    "rank of k": ({"k": zeros(NK, D)}, ValueError, "k must have shape (B, Hk, Nk, D), got (7, 11)"),
    "size": (
        {"k": zeros(B, HK, NK, D + 1)},
        ValueError,
        "k must have shape (B, Hk, Nk, D) with D=11 (from q), got (2, 3, 7, 12)",
    ),
    "heads": ({"k": zeros(B, 4, NK, D)}, ValueError, "Hk a divisor of H=6, got (2, 4, 7, 11)"),
    "bias": (
        {"bias": zeros(N + 1, NK)},
        ValueError,
        "bias must broadcast to shape (B, H, N, Nk) with N=5 (from q), got (6, 7)",
    ),
    "sinks": ({"sinks": zeros(HK)}, ValueError, "sinks must have shape (H,) with H=6"),
    "mask": (
        {"mask": zeros(N + 1, NK, dtype=torch.bool)},
        ValueError,
        "mask must be broadcastable to (B, H, N, Nk) = (2, 6, 5, 7), got (6, 7)",
    ),
    "lengths": (
        {"mask": tw.lengths([1, 2, 3])},
        ValueError,
        "mask lengths must have shape (B,) with B=2, got (3,)",
    ),
    # Values and other options
    "mask of numbers": (
        {"mask": zeros(N, NK)},
        TypeError,
        "boolean tensor (a mask that is added is a bias), got a tensor of float32",
    ),
    "mask of another kind": ({"mask": "causal"}, TypeError, "boolean tensor, got str"),
    "slopes with a gradient": (
        {"alibi_slopes": zeros(H, requires_grad=True)},
        ValueError,
        "alibi_slopes must be without requires_grad, for it has no gradient",
    ),
    "infinite slope": (
        {"alibi_slopes": torch.full((H,), torch.inf)},
        ValueError,
        "alibi_slopes must be finite, got inf",
    ),
    "infinite sink": (
        {"sinks": torch.full((H,), torch.inf)},
        ValueError,
        "sinks must be finite or -inf, got inf",
    ),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be from 1e-15 to 1e+15, got 0"),
    "softcap of text": ({"softcap": "1"}, TypeError, "softcap must be a real number, got str"),
    "scale": ({"softmax_scale": -1.0}, ValueError, "softmax_scale must be from 0 to 1e+15, got -1"),
    "scale as a tensor": (
        {"softmax_scale": torch.tensor(1.0)},
        TypeError,
        "softmax_scale must be a real number, got Tensor",
    ),
    "dropout": ({"dropout_p": 1.5}, ValueError, "dropout_p must be from 0 to 1, got 1.5"),
    "dropout of True": ({"dropout_p": True}, TypeError, "dropout_p must be a real number"),
    "seed": ({"dropout_p": 0.5, "seed": -1}, ValueError, "seed must be from 0 to 2**64 - 1"),
    "seed without dropout": ({"seed": 0.5}, TypeError, "seed must be an integer, got float"),
    "seed of two numbers": (
        {"dropout_p": 0.5, "seed": torch.tensor([1, 2])},
        TypeError,
        "seed must be an integer or an int64 tensor of shape (), got shape (2,) of int64",
    ),
    "seed of int32": (
        {"dropout_p": 0.5, "seed": torch.tensor(1, dtype=torch.int32)},
        TypeError,
        "got shape () of int32",
    ),
    "layout": ({"layout": "hbnd"}, ValueError, "layout must be 'bhnd' or 'bnhd', got 'hbnd'"),
    "layout of a list": ({"layout": ["bhnd"]}, ValueError, "got ['bhnd']"),
    "implementation": ({"implementation": "gpu"}, ValueError, "implementation must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_error_says_what_is_wrong(name: str) -> None:
    change, kind, text = BAD[name]
    with pytest.raises(kind) as caught:
        attention(**{**good(), **change})
    assert str(caught.value).startswith("attention: ")
    assert text in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*(nested|quantize):UserWarning")
@pytest.mark.parametrize("make", [nested, quantised])
def test_tensors_of_other_kinds_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"attention: q must (be a dense tensor|have dtype)"):
        attention(**{**good(), "q": make()})


def test_16_bit_tensors_go_with_float32_options_but_not_with_float32_keys() -> None:
    q, k, v = (t.bfloat16() for t in good().values())
    assert attention(q, k, v, sinks=zeros(H), bias=zeros(N, NK)).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"k must have dtype bfloat16 \(from q\), got float32"):
        attention(q, k.float(), v)


def test_other_devices_are_unsupported() -> None:
    with torch._subclasses.FakeTensorMode():
        x = [torch.empty(t.shape, device="xpu") for t in good().values()]
        with pytest.raises(tw.Unsupported, match="no implementation for device xpu"):
            attention(*x)


def test_functions_that_an_implementation_lacks_are_unsupported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first_order = Implementation("cpu", cpu.forward, cpu.vjp)
    monkeypatch.setattr(dispatch, "_load", lambda operator, name: first_order)
    x = tuple(good().values())
    refusal = "attention: implementation 'cpu': has no jvp"

    def f(*x: Any) -> Any:
        return attention(*x, implementation="cpu")

    with pytest.raises(tw.Unsupported, match=refusal):
        ft.jvp(f, x, x)
    with pytest.raises(tw.Unsupported, match=refusal):
        ft.grad(lambda *x: ft.grad(lambda *y: f(*y).sum())(*x).sum())(*x)
    monkeypatch.setitem(dispatch.TABLE, "attention", {"cpu": ""})
    with pytest.raises(ExceptionGroup) as caught:
        ft.jvp(attention, x, x)
    assert str(caught.value.exceptions[0]) == refusal
