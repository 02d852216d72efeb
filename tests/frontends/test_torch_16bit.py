"""16-bit tensors in PyTorch: their bits reach the kernels, and every derivative has their dtype."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.func as ft
from torch.utils.checkpoint import checkpoint

import tilewise as tw
from tilewise.base import dtypes
from tilewise.torch import attention

pytest.importorskip("tilewise._core")

B, H, HK, N, NK, D, DV = 2, 4, 2, 37, 53, 16, 12
DTYPES = [torch.bfloat16, torch.float16]
MASK = tw.causal() & tw.lengths([53, 41])
OPTIONS = {"mask": MASK, "softcap": 4.0}


def tensors(dtype: Any, seed: int = 0) -> list[Any]:
    """q, k, v, bias and sinks of one dtype; the last two are float32 where the seed is odd."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, N, D), (B, HK, NK, D), (B, HK, NK, DV), (H, N, NK), (H,))
    x = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return x if seed % 2 == 0 else [*x[:3], *(t.float() for t in x[3:])]


def door(q: Any, k: Any, v: Any, bias: Any, sinks: Any, **more: Any) -> Any:
    r = attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, **OPTIONS, **more)
    return r.o, r.lse


def loss(*x: Any, **more: Any) -> Any:
    o, lse = door(*x, **more)
    return (o.double() ** 2).sum() + lse.double().sin().sum()


def bits(t: Any) -> Any:
    return t.contiguous().view(torch.int16) if t.dtype.itemsize == 2 else t


def array(t: Any) -> Any:
    """A tensor as an array of its dtype."""
    t = t.detach()
    if t.dtype is torch.bfloat16:
        return t.view(torch.int16).numpy().view(dtypes.bfloat16("test"))
    return t.numpy()


def second(f: Callable[..., Any], x: list[Any]) -> Any:
    x = [t.detach().requires_grad_() for t in x]
    grads = torch.autograd.grad(f(*x), x, create_graph=True)
    return torch.autograd.grad(sum((g.double() * g.double().cos()).sum() for g in grads), x)


def forward_over_reverse(f: Callable[..., Any], x: list[Any]) -> Any:
    return ft.jvp(ft.grad(f, (0, 1, 2, 3, 4)), tuple(x), tuple(t.cos() for t in x))[1]


def forward_mode(f: Callable[..., Any], x: list[Any]) -> Any:
    with fw.dual_level():
        duals = [fw.make_dual(t, t.sin()) for t in x]
        return [fw.unpack_dual(f(*duals)).tangent]


def mapped(f: Callable[..., Any], x: list[Any]) -> Any:
    grads = ft.vmap(ft.grad(f, (0, 1, 2, 3, 4)))(*[torch.stack((t, t.cos())) for t in x])
    return [g[1] for g in grads]


def recomputed(f: Callable[..., Any], x: list[Any]) -> Any:
    x = [t.detach().requires_grad_() for t in x]
    return torch.autograd.grad(checkpoint(f, *x, use_reentrant=False), x)


def compiled(f: Callable[..., Any], x: list[Any]) -> Any:
    x = [t.detach().requires_grad_() for t in x]
    whole = torch.compile(f, fullgraph=True, backend="aot_eager")
    return torch.autograd.grad(whole(*x), x)


TRANSFORMS = {
    "grad": lambda f, x: ft.grad(f, (0, 1, 2, 3, 4))(*x),
    "double backward": second,
    "forward over reverse": forward_over_reverse,
    "forward mode": forward_mode,
    "vmap of grad": mapped,
    "checkpoint": recomputed,
    "torch.compile": compiled,
}


@pytest.mark.parametrize("seed", [0, 1], ids=["alike", "with float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_agree_with_float64_and_keep_dtypes(name: str, dtype: Any, seed: int) -> None:
    x = tensors(dtype, seed)
    got = TRANSFORMS[name](loss, x)
    want = TRANSFORMS["grad" if name == "torch.compile" else name](loss, [t.double() for t in x])
    tolerance = (2**-5 if dtype is torch.bfloat16 else 2**-8) * (3 if "double" in name else 1)
    for g, w, t in zip(got, want, x, strict=False):
        assert g.dtype == (torch.float64 if name == "forward mode" else t.dtype)
        assert (g.double() - w).norm() <= tolerance * w.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_and_numpy_have_the_same_bits(dtype: Any) -> None:
    x = [t.requires_grad_() for t in tensors(dtype)]
    o, lse = door(*x)
    do = o.detach().cos()
    grads = torch.autograd.grad((o, lse), x, (do, lse.detach().cos()))
    q, k, v, bias, sinks = map(array, x)
    more = {**OPTIONS, "bias": bias, "sinks": sinks}
    r = tw.attention(q, k, v, return_lse=True, return_stats=True, **more)
    dlse = np.asarray(lse.detach().cos())
    want = tw.numpy.attention_vjp(array(do), q, k, v, r.o_full, r.stats, dlse=dlse, **more)
    assert array(o).tobytes() == r.o.tobytes()
    assert array(lse).tobytes() == r.lse.tobytes()
    for g, w in zip(grads, want, strict=True):
        assert array(g).tobytes() == w.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
def test_the_unrounded_output_is_saved_for_16_bits_alone(dtype: Any) -> None:
    """It is what the gradients are exact with; float32 has nothing to save twice."""
    saved: list[Any] = []

    def pack(t: Any) -> Any:
        saved.append(t)
        return t

    q, k, v = (t.requires_grad_() for t in tensors(dtype)[:3])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        attention(q, k, v)
    outputs = [t for t in saved if t.shape == (B, H, N, DV)]
    expected = [dtype] if dtype is torch.float32 else [dtype, torch.float32]
    assert sorted(map(str, (t.dtype for t in outputs))) == sorted(map(str, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exported_program_keeps_the_dtype(dtype: Any) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return attention(q, k, v, mask=tw.causal())

    x = tuple(tensors(dtype)[:3])
    program = torch.export.export(Model(), x)
    assert bits(program.module()(*x)).equal(bits(attention(*x, mask=tw.causal())))


def test_bfloat16_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    dtypes.bfloat16.cache_clear()
    x = torch.ones(1, 1, 2, 3)
    with pytest.raises(ImportError, match=r"attention: bfloat16 needs .* 'tilewise\[bf16\]'"):
        attention(*[x.bfloat16()] * 3)
    assert attention(*[x.half()] * 3).dtype == torch.float16
    monkeypatch.undo()
    assert attention(*[x.bfloat16()] * 3).dtype == torch.bfloat16


def test_other_dtypes_are_named_where_they_do_not_fit() -> None:
    x = torch.ones(1, 1, 2, 3)
    with pytest.raises(TypeError, match=r"k must have dtype bfloat16 \(from q\), got float16"):
        attention(x.bfloat16(), x.half(), x.bfloat16())
    with pytest.raises(TypeError, match=r"sinks must have dtype float16 \(from q\) or float32"):
        attention(*[x.half()] * 3, sinks=torch.ones(1, dtype=torch.float64))
    a = np.ones((1, 1, 2, 3), np.float16)
    with pytest.raises(TypeError, match=r"bias must have dtype float16 \(from q\) or float32"):
        tw.attention(a, a, a, bias=np.ones((2, 2)))
    rows = np.ones((1, 1, 2), np.float16)
    with pytest.raises(TypeError, match=r"dlse must have dtype float32 \(from q of 16 bits\)"):
        tw.numpy.attention_vjp(a, a, a, a, a, rows.astype(np.float32), dlse=rows)
