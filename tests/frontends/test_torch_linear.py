"""The linear map in PyTorch: every derivative and transform, autocast, the accumulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.func as ft
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as nn
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise as tw
from tilewise.torch import linear

A, T, C, V = 2, 3, 5, 7
F64 = torch.float64
LEADING = [(), (T,), (A, T), (A, 1, T)]
NARROW = [torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype)


def inputs(*leading: int, dtype: torch.dtype = F64, grad: bool = False) -> tuple[Any, ...]:
    shapes = ((*leading, C), (V, C), (V,))
    made = [randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    return tuple(t.requires_grad_(grad) for t in made)


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_all_first_and_second_derivatives(leading: tuple[int, ...], with_bias: bool) -> None:
    given = inputs(*leading, grad=True)[: 3 if with_bias else 2]
    same(linear(*given), nn.linear(*given))
    assert gradcheck(linear, given, check_forward_ad=True, check_batched_grad=True, fast_mode=False)
    assert gradgradcheck(linear, given, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_third_derivatives() -> None:
    x, w, bias = inputs(T)

    def third(function: Any) -> Any:
        def loss(x: Any, w: Any) -> Any:
            return (function(x, w, bias) ** 4).sum()

        return ft.grad(lambda x: ft.grad(lambda x: ft.grad(loss)(x, w).sum())(x).sum())(x)

    same(third(linear), third(nn.linear))


TRANSFORMS = {
    "grad": lambda f, x, w: ft.grad(lambda w: f(x, w).sin().sum())(w),
    "jvp": lambda f, x, w: ft.jvp(f, (x, w), (x.cos(), w.sin())),
    "jvp of one": lambda f, x, w: ft.jvp(lambda w: f(x, w), (w,), (w.sin(),)),
    "vmap of x": lambda f, x, w: ft.vmap(f, in_dims=(0, None))(x, w),
    "vmap of rows": lambda f, x, w: ft.vmap(f, in_dims=(1, None), out_dims=1)(x, w),
    "vmap of both": lambda f, x, w: ft.vmap(f)(x, torch.stack([w, 2 * w])),
    "gradients per sample": lambda f, x, w: ft.vmap(
        ft.grad(lambda w, x: f(x, w).sin().sum()), in_dims=(None, 0)
    )(w, x),
    "jacrev": lambda f, x, w: ft.jacrev(f, argnums=(0, 1))(x, w),
    "jacfwd": lambda f, x, w: ft.jacfwd(f, argnums=(0, 1))(x, w),
    "hessian": lambda f, x, w: ft.hessian(lambda w: f(x, w).sin().sum())(w),
    "forward over reverse": lambda f, x, w: ft.jvp(
        ft.grad(lambda w: f(x, w).sin().sum()), (w,), (w.cos(),)
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    x, w, _ = inputs(A, T)
    same(TRANSFORMS[name](linear, x, w), TRANSFORMS[name](nn.linear, x, w))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_whole_with_its_gradients(backend: str) -> None:
    given = inputs(A, T, grad=True)

    def loss(*given: Any) -> Any:
        return linear(*given).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    got = torch.autograd.grad(compiled(*given), given)
    same(got, torch.autograd.grad(nn.linear(*given).sin().sum(), given))


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_values_and_gradients_are_those_of_pytorch(dtype: torch.dtype) -> None:
    given = inputs(A, T, dtype=dtype, grad=True)
    y, want = linear(*given), nn.linear(*given)
    assert torch.equal(y, want)
    dy = randn(A, T, V, seed=5, dtype=dtype)
    for got, expected in zip(
        torch.autograd.grad(y, given, dy), torch.autograd.grad(want, given, dy), strict=True
    ):
        assert got.dtype is dtype
        torch.testing.assert_close(got, expected)


def test_tensors_without_values() -> None:
    x, w, bias = (t.to("meta").requires_grad_() for t in inputs(A, T))
    y = linear(x, w, bias)
    y.sum().backward()
    assert y.is_meta and y.shape == (A, T, V) and w.grad.shape == w.shape


def test_autocast_casts_as_it_does_for_pytorch() -> None:
    x, w, bias = inputs(A, T, dtype=torch.float32, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = linear(x, w, bias), nn.linear(x, w, bias)
        double = linear(x.double(), w.double())
    assert y.dtype is want.dtype is torch.bfloat16
    assert torch.equal(y, want)
    assert double.dtype is F64
    y.float().sum().backward()
    assert x.grad.dtype is w.grad.dtype is torch.float32


PAIRS = [
    (F64, F64),
    (torch.float32, torch.float32),
    (torch.float32, F64),
    (torch.bfloat16, torch.bfloat16),
    *[(dtype, torch.float32) for dtype in NARROW],
]


@pytest.mark.parametrize(("dtype", "held"), PAIRS, ids=str)
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_accumulator_holds_the_sum_and_the_weight_gets_no_gradient(
    dtype: torch.dtype, held: torch.dtype, leading: tuple[int, ...]
) -> None:
    given = inputs(*leading, dtype=dtype, grad=True)
    x, w, bias = given
    before = randn(V, C, seed=9, dtype=held)
    buffer, dy = before.clone(), randn(*leading, V, seed=5, dtype=dtype)
    y = linear(x, w, bias, grad_accumulator=buffer)
    y.backward(dy)
    assert w.grad is None
    exact = [t.detach().double().requires_grad_() for t in given]
    dx, dw, dbias = torch.autograd.grad(nn.linear(*exact), exact, dy.double())
    tolerance = {F64: 1e-14, torch.float32: 1e-6}.get(held, 2**-7)
    torch.testing.assert_close(
        buffer.double(), before.double() + dw, rtol=tolerance, atol=tolerance
    )
    tolerance = {F64: 1e-14, torch.float32: 1e-5}.get(dtype, 2**-6)
    torch.testing.assert_close(x.grad.double(), dx, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(bias.grad.double(), dbias, rtol=tolerance, atol=tolerance)


def test_accumulator_of_float32_keeps_what_16_bits_would_lose() -> None:
    w = torch.zeros(V, C, dtype=torch.bfloat16, requires_grad=True)
    buffer = torch.zeros(V, C)
    x = torch.ones(1, C, dtype=torch.bfloat16)
    for _ in range(300):
        linear(x, w, grad_accumulator=buffer).sum().backward()
    assert (buffer == 300).all()  # bfloat16 stops at 256


def test_accumulator_is_written_only_where_the_weight_requires_a_gradient() -> None:
    x, w, _ = inputs(T)
    buffer = torch.zeros(V, C, dtype=F64)
    linear(x.requires_grad_(), w, grad_accumulator=buffer).sum().backward()
    assert not buffer.any()
    linear(x.detach(), w.requires_grad_(), grad_accumulator=buffer).sum().backward()
    assert buffer.any()


def test_one_accumulator_for_a_weight_that_is_used_twice() -> None:
    x, w, _ = inputs(T, grad=True)
    buffer = torch.zeros(V, C, dtype=F64)

    def loss(function: Any) -> Any:
        return function(function(x, w).sin()[..., :C].cos(), w).sin().sum()

    loss(lambda x, w: linear(x, w, grad_accumulator=buffer)).backward()
    same(buffer, torch.autograd.grad(loss(nn.linear), w)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_accumulating_under_autocast_and_beside_compiled_code() -> None:
    x, w, _ = inputs(A, T, dtype=torch.float32, grad=True)
    buffer = torch.zeros(V, C)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, w, grad_accumulator=buffer)
    y.float().sum().backward()
    assert y.dtype is torch.bfloat16 and w.grad is None
    once = buffer.clone()
    torch.testing.assert_close(once, x.detach().sum((0, 1)).expand(V, C), rtol=0.02, atol=0.02)

    def loss(x: Any, w: Any) -> Any:
        return linear(x, w, grad_accumulator=buffer).sum()

    torch.compile(loss, backend="aot_eager")(x, w).backward()
    torch.testing.assert_close(buffer, 2 * once, rtol=0.02, atol=0.02)


def test_derivatives_of_an_accumulating_backward_are_refused() -> None:
    x, w, _ = inputs(T, grad=True)
    buffer = torch.zeros(V, C, dtype=F64)
    y = linear(x, w, grad_accumulator=buffer)
    with pytest.raises(tw.Unsupported, match="no derivative of a backward pass"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(tw.Unsupported, match="no transform"):
        ft.grad(lambda x: linear(x, w.detach(), grad_accumulator=buffer).sum())(x.detach())
    with torch.autograd.forward_ad.dual_level():
        moved = torch.autograd.forward_ad.make_dual(x.detach(), x.detach())
        with pytest.raises(tw.Unsupported, match="no tangents"):
            linear(moved, w, grad_accumulator=buffer)
    assert not buffer.any()


class Sizes(TorchDispatchMode):
    """Notes how many numbers the new tensors have that operations return."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.known, self.largest = known.data_ptr(), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() != self.known:
                storage = t.untyped_storage().nbytes() // t.itemsize
                self.largest = max(self.largest, storage)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_the_size_of_the_weight_is_made(dtype: torch.dtype) -> None:
    tokens, columns, rows = 2, 37, 4099
    x = torch.ones(tokens, columns, dtype=dtype)
    w = torch.ones(rows, columns, dtype=dtype, requires_grad=True)
    buffer = torch.zeros(rows, columns)

    def largest(**options: Any) -> int:
        y = linear(x, w, **options).float().sum()
        with Sizes(buffer) as sizes:
            y.backward()
        return sizes.largest

    assert largest(grad_accumulator=buffer) <= tokens * rows
    assert (buffer == tokens).all()
    assert largest() >= rows * columns


PEAK = """
import json, sys, torch
from tilewise.hardware.memory import measure
from tilewise.torch import linear
dtype, with_buffer = getattr(torch, sys.argv[1]), sys.argv[2] == "True"
small = torch.ones(8, 8, dtype=dtype, requires_grad=True)
linear(small, small, grad_accumulator=torch.zeros(8, 8)).sum().backward()
x, dy = torch.ones(16, 2048, dtype=dtype), torch.ones(16, 4096, dtype=dtype)
w = torch.ones(4096, 2048, dtype=dtype, requires_grad=True)
buffer = torch.ones(4096, 2048)
y = linear(x, w, grad_accumulator=buffer if with_buffer else None)
def backward():
    y.backward(dy)
    if not with_buffer:
        buffer.add_(w.grad)
_, peak = measure(backward, lambda _: 0)
assert float(buffer.max()) == 17 and (w.grad is None) == with_buffer
print(json.dumps(peak.extra))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory as Linux does")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_of_the_process_has_no_room_for_a_gradient_of_the_weight(dtype: str) -> None:
    def extra(with_buffer: bool) -> int:
        paths = [str(Path(tw.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, dtype, str(with_buffer)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(json.loads(done.stdout))

    gradient = 4096 * 2048 * (4 if dtype == "float32" else 2)
    assert extra(False) >= gradient
    assert extra(True) < gradient / 4


def error(*given: Any, **options: Any) -> str:
    with pytest.raises((TypeError, ValueError)) as raised:
        linear(*given, **options)
    return f"{raised.type.__name__}: {raised.value}"


def test_errors_name_the_argument() -> None:
    x, w, bias = inputs(T, dtype=torch.float32)
    assert error([1.0], w) == "TypeError: linear: x must be a torch.Tensor, got list"
    want = "ValueError: linear: w must have shape (V, C) with C=5 (from x), got (5, 7)"
    assert error(x, w.T) == want
    assert "w must have dtype float32 (from x), got float64" in error(x, w.double())
    assert "x must have dtype" in error(x.int(), w)
    assert "bias must have shape (V,) with V=7" in error(x, w, bias[1:])
    assert "x must be a dense tensor" in error(x.to_sparse(), w)
    assert "w must be on cpu (as x), got meta" in error(x, w.to("meta"))
    buffers = {
        "be a torch.Tensor": 3,
        "have dtype float32 or float64": torch.zeros(V, C, dtype=torch.float16),
        "have shape (7, 5) (from w)": torch.zeros(C, V),
        "be contiguous": torch.zeros(C, V).T,
        "be without requires_grad": torch.zeros(V, C, requires_grad=True),
        "be on cpu": torch.zeros(V, C, device="meta"),
        "not overlap w": w,
    }
    for text, buffer in buffers.items():
        assert f"grad_accumulator must {text}" in error(x, w, grad_accumulator=buffer)


def test_the_top_level_finds_the_frontend() -> None:
    x, w, bias = inputs(A, T)
    same(tw.linear(x, w, bias), nn.linear(x, w, bias))
    same(torch.from_numpy(tw.linear(x.numpy(), w.numpy())), nn.linear(x, w))
    with pytest.raises(TypeError, match="linear: x must be"):
        tw.linear([1.0], [[1.0]])
