"""The door of PyTorch to kernels of a GPU, on the CPU, where Triton interprets them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import tilewise as tw
from tilewise import Unsupported
from tilewise.dispatch import device_implementation
from tilewise.torch import (
    attention,
    checks,
    cross_entropy,
    gpu,
    linear_cross_entropy,
    softmax,
)

SHAPES = ((2, 4, 11, 5), (2, 2, 13, 5), (2, 2, 13, 3))


def inputs(dtype: Any = torch.float64, shapes: Any = SHAPES) -> list[Any]:
    made = torch.Generator().manual_seed(7)
    return [torch.randn(s, generator=made, dtype=dtype).requires_grad_() for s in shapes]


def both(function: Any) -> None:
    """Compare what a function of the implementation returns with the kernels of the CPU."""
    for mine, theirs in zip(function("triton"), function("cpu"), strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"mask": tw.causal()},
    "boolean-and-sinks": {
        "mask": torch.arange(11)[:, None] % 3 >= torch.arange(13) % 4,
        "sinks": torch.linspace(-1, 1, 4, dtype=torch.float64),
    },
    "lengths-and-dropout": {"mask": tw.lengths([13, 4]), "dropout_p": 0.3, "seed": 2**63 + 9},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_backward_and_double_backward(name: str) -> None:
    def derived(implementation: str) -> list[Any]:
        x = inputs()
        found = attention(*x, implementation=implementation, return_lse=True, **OPTIONS[name])
        lse = torch.where(found.lse.isfinite(), found.lse, 0.0)
        first = torch.autograd.grad(found.o.sin().sum() + lse.sum(), x, create_graph=True)
        second = torch.autograd.grad(sum(g.cos().sum() for g in first), x)
        return [found.o.detach(), *(g.detach() for g in first), *second]

    both(derived)


def test_transforms() -> None:
    x = [t.detach() for t in inputs()]

    def derived(implementation: str) -> list[Any]:
        def of(*given: Any) -> Any:
            return attention(*given, implementation=implementation, mask=tw.window(3, 2))

        _, moved = torch.func.jvp(of, tuple(x), tuple(t.cos() for t in x))
        many = torch.func.vmap(of)(*[torch.stack([t, t.sin(), 2 * t]) for t in x])
        mixed = torch.func.jvp(
            torch.func.grad(lambda q: of(q, *x[1:]).sin().sum()), (x[0],), (x[0].sin(),)
        )[1]
        return [moved, many, mixed]

    both(derived)


def test_vmap_with_what_entries_do_not_share() -> None:
    x = [torch.stack([t.detach(), t.detach().sin()]) for t in inputs()]
    sinks = torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.0, 0.0, -2.0, 3.0]], dtype=torch.float64)

    def derived(implementation: str) -> list[Any]:
        def of(q: Any, k: Any, v: Any, sinks: Any) -> Any:
            return attention(q, k, v, sinks=sinks, implementation=implementation)

        return [torch.func.vmap(of)(*x, sinks), torch.func.vmap(of)(*[t[:0] for t in (*x, sinks)])]

    both(derived)


def test_memory_that_is_not_contiguous() -> None:
    def derived(implementation: str) -> list[Any]:
        x = inputs(shapes=((2, 4, 5, 11), (2, 2, 5, 13), (2, 2, 3, 13)))
        across = attention(*[t.mT for t in x], implementation=implementation)
        y = inputs(shapes=((2, 11, 4, 5), (2, 13, 2, 5), (2, 13, 2, 3)))
        packed = attention(*y, implementation=implementation, layout="bnhd", mask=tw.causal())
        return [across.detach(), *torch.autograd.grad(packed.sin().sum(), y)]

    both(derived)


@pytest.mark.parametrize("shape", [(11, 13), (13,), (2, 1, 1, 13), (4, 11, 1), (2, 4, 11, 13)])
def test_boolean_masks_that_repeat(shape: tuple[int, ...]) -> None:
    x = [t.detach() for t in inputs()]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6

    def found(implementation: str) -> list[Any]:
        given = {"implementation": implementation, "return_lse": True}
        return [
            *attention(*x, mask=mask, **given)[:2],
            *attention(*x, mask=mask.mT.contiguous().mT if mask.ndim > 1 else mask, **given)[:2],
        ]

    both(found)
    with pytest.raises(ValueError, match="mask must be broadcastable"):
        attention(*x, mask=mask[..., :1].expand(*mask.shape[:-1], 12), implementation="triton")


def test_the_host_does_not_wait_for_what_tensors_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs take no call that does."""
    x = inputs()
    options = {
        "mask": torch.rand(11, 13) < 0.5,
        "sinks": torch.zeros(4, dtype=torch.float64),
        "alibi_slopes": torch.ones(4, dtype=torch.float64),
        "implementation": "triton",
    }
    read: list[Any] = []
    monkeypatch.setattr(gpu.Stage, "copy", lambda self, t: t if t is None else read.append(t))
    o = attention(*x, **options)
    torch.autograd.grad(o.sum(), x)
    weight = torch.ones(5, dtype=torch.float64)
    cross_entropy(x[0][0, 0], torch.arange(11) % 5, weight=weight, implementation="triton")
    softmax(x[0], sink=torch.zeros(2, 4, 11, dtype=torch.float64), implementation="triton")
    assert not read


def test_a_target_that_is_no_class_makes_the_loss_nan() -> None:
    x, weight = inputs(shapes=((4, 3), (7, 3)))
    for targets in ([0, 7, -100, 6], [0, -1, -100, 6]):
        y = torch.tensor(targets)
        for loss, given in (
            (cross_entropy, (x @ weight.mT, y)),
            (linear_cross_entropy, (x, weight, y)),
        ):
            found = loss(*given, reduction="none", implementation="triton")
            assert found.isnan().tolist() == [False, True, False, False]
            assert loss(*given, implementation="triton").isnan()


def test_compiled_calls_are_one_graph() -> None:
    x, sinks = inputs(), torch.zeros(4, dtype=torch.float64)

    def loss(q: Any, k: Any, v: Any) -> Any:
        o = attention(q, k, v, mask=tw.causal(), sinks=sinks, implementation="triton")
        return o.sin().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(
        torch.autograd.grad(compiled(*x), x), torch.autograd.grad(loss(*x), x), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_float32_is_as_near_as_on_the_cpu() -> None:
    x = [t.detach() for t in inputs(torch.float32)]
    exact = attention(*[t.double() for t in x])
    for implementation in ("cpu", "triton"):
        error = (attention(*x, implementation=implementation) - exact).norm() / exact.norm()
        assert error < 3e-7, implementation


def test_arrays_are_refused() -> None:
    x = np.ones((1, 1, 2, 3), np.float32)
    with pytest.raises(Unsupported, match="computes on tensors of PyTorch, not on arrays"):
        tw.attention(x, x, x, implementation="triton")


def test_tensors_of_the_cpu_are_refused_where_nothing_interprets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = device_implementation("attention", "triton")
    assert own.interprets
    compiled = type(own)(**{**vars(own), "interprets": False})
    monkeypatch.setattr(gpu, "device_implementation", lambda *_: compiled)
    with pytest.raises(Unsupported, match="implementation 'triton': computes on a GPU, got"):
        attention(*inputs(), implementation="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_without_cuda_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="cuda:0: PyTorch finds no GPU"):
        checks.check_place("attention", torch.device("cuda", 0))
    with pytest.raises(Unsupported, match="no implementation for device xpu"):
        checks.check_place("attention", torch.device("xpu", 0))


def test_stand_ins_take_no_memory_and_lead_back() -> None:
    stage = gpu.Stage(torch.device("cpu"))
    tensor = torch.arange(3.0).expand(2**18, 2**16, 3)
    other = torch.arange(24.0).reshape(2, 3, 4).transpose(0, 1)
    large, small = stage.stand_in(tensor), stage.stand_in(other)
    assert large is not None and small is not None
    assert large.shape == tensor.shape and small.strides == (16, 48, 4)
    assert stage.tensor(large) is tensor
    assert torch.equal(stage.tensor(small[1:, 0, ::2]), other[1:, 0, ::2])
    assert torch.equal(stage.tensor(large[7, 5:6]), tensor[7, 5:6])


def test_numbers_computed_from_stand_ins_are_an_error() -> None:
    stage = gpu.Stage(torch.device("cpu"))
    array = stage.stand_in(torch.ones(2, 3))
    assert array is not None
    with pytest.raises(RuntimeError, match="a stand-in of float32 was copied"):
        stage.tensor(array + 1)


def test_the_frontend_imports_no_kernels() -> None:
    code = "import sys, tilewise.torch; sys.exit('tilewise.ops.attention.gpu' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name, argument", [("softmax", "x"), ("cross_entropy", "logits")])
def test_kernels_of_a_gpu_refuse_tensors_of_the_cpu_by_the_name_of_the_argument(
    name: str, argument: str
) -> None:
    script = f"""
import torch, tilewise as tw
given = {{"softmax": (-1,), "cross_entropy": (torch.tensor([0, 1, 2]),)}}
try:
    getattr(tw.torch, {name!r})(torch.ones(3, 4), *given[{name!r}], implementation="triton")
except tw.Unsupported as error:
    print(error)
"""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    wanted = f"{name}: implementation 'triton': computes on a GPU, got {argument} on cpu\n"
    assert done.stdout == wanted


_LOGITS = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
OVERWRITTEN: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "probabilities": (lambda x: x * 1, _LOGITS.softmax(1), {"class_axis": 1, "reduction": "none"}),
    "indices": (lambda x: x * 1, torch.arange(15).reshape(3, 5) % 8 - 1, {"ignore_index": -1}),
    "rows that are no view": (
        lambda x: x.transpose(0, 1) * 1,
        torch.arange(15).reshape(5, 3) % 7,
        {},
    ),
}


@pytest.mark.parametrize("name", OVERWRITTEN)
def test_the_gradient_of_the_loss_takes_the_memory_of_the_logits(name: str) -> None:
    make, targets, options = OVERWRITTEN[name]
    x = _LOGITS.clone().requires_grad_()
    sources = [x]
    if targets.is_floating_point():
        targets = targets.clone().requires_grad_()
        sources.append(targets)
    wanted = cross_entropy(make(x), targets, implementation="cpu", **options)
    right = torch.autograd.grad(wanted.sin().sum(), sources)
    logits = make(x)
    memory, version, seen = logits.data_ptr(), logits._version, []
    logits.register_hook(seen.append)
    found = cross_entropy(
        logits, targets, implementation="triton", inplace_backward=True, **options
    )
    got = torch.autograd.grad(found.sin().sum(), sources)
    for mine, theirs in zip(got, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    assert seen[0].data_ptr() == memory and logits._version > version


def test_logits_that_cannot_be_overwritten_are_refused() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    y = torch.tensor([0, 1, 3])
    given: dict[str, Any] = {"inplace_backward": True, "implementation": "triton"}
    with pytest.raises(ValueError, match="be False where the logits are a leaf"):
        cross_entropy(x, y, **given)
    with pytest.raises(ValueError, match="logits must not overlap themselves"):
        cross_entropy((x[:1] * 1).expand(3, 4), y, **given)
    logits = x * 1
    with pytest.raises(ValueError, match="targets must not overlap logits"):
        cross_entropy(logits, logits, **given)
    loss = cross_entropy(x * 1, y, **given)
    with pytest.raises(Unsupported, match="no second derivatives with inplace_backward"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_rows_in_any_strides_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, readable = [], gpu.readable

    def seen(tensor: Any, operator: Any) -> Any:
        kept.append((tensor, readable(tensor, operator)))
        return kept[-1][1]

    monkeypatch.setattr(gpu, "readable", seen)
    x = torch.linspace(-3, 2, 3 * 5 * 28, dtype=torch.float64).reshape(3, 5, 4, 7)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = (torch.arange(84) % 6 - 1).reshape(3, 4, 7)

    def derived(implementation: str) -> list[Any]:
        given: dict[str, Any] = {"implementation": implementation}
        p = softmax(x, 1, **given)
        loss = cross_entropy(x, y, class_axis=1, ignore_index=-1, **given)
        return [p.detach(), *torch.autograd.grad(p.sin().sum() + loss, x)]

    both(derived)
    assert len(kept) > 8
    for before, after in kept:
        assert before.data_ptr() == after.data_ptr() and before.stride() == after.stride()


def test_a_token_without_a_logit_has_no_loss() -> None:
    x, weight = inputs(shapes=((4, 3), (7, 3)))
    bias = torch.full((7,), -torch.inf, dtype=torch.float64)
    y = torch.tensor([0, 3, -100, 6])

    def found(implementation: str) -> list[Any]:
        options = {"bias": bias, "implementation": implementation, "z_loss": 0.1}
        r = linear_cross_entropy(
            x, weight, y, reduction="none", return_entropy=True, return_z_loss=True, **options
        )
        moved = torch.func.jvp(
            lambda x: linear_cross_entropy(x, weight.detach(), y, **options),
            (x.detach(),),
            (torch.ones_like(x),),
        )[1]
        first = torch.autograd.grad(r.loss.sum() + r.entropy.sum(), (x, weight))
        assert not any([t.detach().any() for t in (r.loss, r.z_loss, r.entropy, moved, *first)])
        return [r.loss, moved, *first]

    both(found)


def test_a_bias_and_its_tangent_in_other_strides() -> None:
    x = [t.detach() for t in inputs()]
    bias = torch.linspace(-1, 2, 13 * 11, dtype=torch.float64).reshape(13, 11).T
    moved = bias.sin().contiguous()
    assert moved.stride() != bias.stride()

    def derived(implementation: str) -> list[Any]:
        def of(bias: Any) -> Any:
            return attention(*x, bias=bias, implementation=implementation).sin().sum()

        first = torch.func.jvp(of, (bias,), (moved,))[1]
        return [first, torch.func.jvp(torch.func.grad(of), (bias,), (moved,))[1]]

    both(derived)
