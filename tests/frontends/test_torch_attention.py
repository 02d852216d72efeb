"""Attention in PyTorch: values and all derivatives, for each option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import tilewise as tw
from tilewise.torch import attention

B, H, HK, N, NK, D, DV = 2, 2, 1, 3, 5, 2, 3
F64 = torch.float64
Plain = Callable[..., Any]


def randn(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def inputs(layout: str = "bhnd", **more: Any) -> list[Any]:
    """q, k, v and further differentiable inputs."""
    x = [randn(B, H, N, D, seed=1), randn(B, HK, NK, D, seed=2), randn(B, HK, NK, DV, seed=3)]
    if layout == "bnhd":
        x = [t.transpose(1, 2).contiguous() for t in x]
    return [*x, *more.values()]


SEEN = torch.rand(B, 1, N, NK, generator=torch.Generator().manual_seed(4)) > 0.4
MANY = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 0, 1, 1], [0, 1, 0, 1, 1]], dtype=torch.bool)
BIAS = {
    "bias": (B, H, N, NK),
    "bias (N, Nk)": (N, NK),
    "bias of heads": (H, 1, 1),
    "bias of keys": (B, 1, 1, NK),
    "bias of queries": (1, 1, N, 1),
    "bias of one number": (1,),
}
MASKS: dict[str, Any] = {
    "causal": tw.causal(),
    "causal top left": tw.causal(align="top_left"),
    "window and sink tokens": tw.causal() & (tw.window(1, 0) | tw.sink_tokens(1)),
    "chunks": tw.chunked(2),
    "prefix": tw.causal() | tw.prefix([2, 4]),
    "lengths": tw.lengths([4, 0]),
    "lengths of queries": tw.lengths([4, 2], query_lengths=[1, 3]),
    "packed documents": tw.documents([0, 2, 3], cu_seqlens_k=[0, 1, 5]),
    "labelled documents": tw.documents(ids=[1, 2, 1], ids_k=[[1, 2, 1, 2, 1], [2, 2, 1, 3, 1]]),
    "dense": tw.dense(MANY.numpy()),
    "five arrays": tw.documents([0, 2, 3], cu_seqlens_k=[0, 1, 5])
    & (tw.lengths([4, 2], query_lengths=[1, 3]) | tw.prefix([1, 0])),
    "tensor": SEEN,
    "tensor of keys": SEEN[:, :, :1],
    "expanded tensor": SEEN[:1, :, :1].expand(B, H, N, NK),
    "array": SEEN.numpy(),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "softcap": {"softcap": 1.5},
    "softmax_scale": {"softmax_scale": 0.3},
    "ALiBi": {"alibi_slopes": randn(H).abs()},
    "ALiBi of batches": {"alibi_slopes": randn(B, H).abs()},
    "dropout": {"dropout_p": 0.4, "seed": 7},
    "dropout of all": {"dropout_p": 1.0, "seed": torch.tensor(7)},
    "bnhd": {"layout": "bnhd"},
    "sinks": {"sinks": randn(H, seed=5)},
    **{name: {"bias": randn(*shape, seed=6)} for name, shape in BIAS.items()},
    **{name: {"mask": mask} for name, mask in MASKS.items()},
    "everything": {
        "mask": tw.causal() & tw.lengths([5, 3]),
        "bias": randn(1, H, N, NK, seed=6),
        "sinks": randn(H, seed=5),
        "alibi_slopes": randn(H).abs(),
        "softcap": 1.5,
        "softmax_scale": 0.6,
        "dropout_p": 0.3,
        "seed": 2**63 + 5,
        "layout": "bnhd",
    },
}


class Problem:
    """One set of options: its differentiable inputs, and attention as a function of them."""

    def __init__(self, name: str) -> None:
        self.options = dict(OPTIONS[name])
        given = {name: self.options.pop(name) for name in ("bias", "sinks") if name in self.options}
        self.names = tuple(given)
        self.x = inputs(self.options.get("layout", "bhnd"), **given)

    def leaves(self) -> list[Any]:
        return [t.clone().requires_grad_() for t in self.x]

    def __call__(self, *x: Any, **more: Any) -> Any:
        given = dict(zip(self.names, x[3:], strict=True))
        r = attention(*x[:3], **given, **self.options, **more, return_lse=True)
        return r.o, r.lse

    def in_plain_torch(self, plain: Plain) -> Callable[..., Any]:
        """The same by plain PyTorch."""
        options = dict(self.options)
        mask, p, _ = options.pop("mask", None), options.pop("dropout_p", 0), options.pop("seed", 0)
        options["visible"] = None if mask is None else self.visible(mask)
        options["keep"] = self.kept() if p else 1.0
        return lambda *x: plain(*x[:3], **dict(zip(self.names, x[3:], strict=True)), **options)

    @staticmethod
    def visible(mask: Any) -> Any:
        if isinstance(mask, tw.Mask):
            mask = mask.to_bool(B, H, N, NK)
        return mask if isinstance(mask, torch.Tensor) else torch.from_numpy(mask)

    def kept(self) -> Any:
        """The factors of dropout, read off equal probabilities and values that are a basis."""
        p, seed = self.options["dropout_p"], self.options["seed"]
        q, k = torch.zeros(B, H, N, D, dtype=F64), torch.zeros(B, HK, NK, D, dtype=F64)
        v = torch.eye(NK, dtype=F64).expand(B, HK, NK, NK)
        kept: Any = attention(q, k, v, dropout_p=p, seed=seed) * NK
        allowed = torch.tensor([0.0, 0.0 if p == 1 else 1 / (1 - p)], dtype=F64)
        torch.testing.assert_close(kept, allowed[(kept > 0.5).long()])
        return kept


@pytest.fixture(params=OPTIONS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def directions(tensors: Any, seed: int = 8) -> tuple[Any, ...]:
    return tuple(randn(*t.shape, seed=seed + i) for i, t in enumerate(tensors))


def finite(lse: Any) -> Any:
    return torch.where(lse.isfinite(), lse, 0.0)


def test_values_and_gradients_are_those_of_plain_torch(problem: Problem, plain: Plain) -> None:
    results = []
    for f in (problem, problem.in_plain_torch(plain)):
        x = problem.leaves()
        o, lse = f(*x)
        do, dlse = directions((o, lse))
        dx = torch.autograd.grad((o * do).sum() + (finite(lse) * dlse).sum(), x)
        results.append((o, lse, dx))
    close(*results)


def test_first_derivatives_are_those_of_differences(problem: Problem) -> None:
    gradcheck(
        lambda *x: (problem(*x)[0], finite(problem(*x)[1])),
        problem.leaves(),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=False,
    )


def test_second_derivatives_are_those_of_differences(problem: Problem) -> None:
    def f(*x: Any) -> Any:
        o, lse = problem(*x)
        return o, finite(lse)

    # Masks take the same way as other options: along random directions is enough.
    fast = "mask" in problem.options and not problem.names
    x = problem.leaves()
    gradgradcheck(f, x, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=fast)
