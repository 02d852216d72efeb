"""Parts of the classes tell states that merge into the loss, through which gradients flow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tilewise.numpy as twn
from tilewise.torch import (
    LossState,
    linear_cross_entropy,
    linear_cross_entropy_shard,
    merge_shards,
)

B, N, C, V = 3, 7, 11, 97
CUTS = [(0, 40), (40, 41), (41, V)]
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SHARED = {"label_smoothing": 0.1, "softcap": 5.0}


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(1)
    wide = F64 if dtype is F64 else F32

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=rng, dtype=F64).to(dtype).requires_grad_()

    found = {"hidden": draw(B, N, C), "weight": draw(V, C), "bias": draw(V)}
    found["class_weight"] = torch.rand(V, generator=rng, dtype=wide) + 0.1
    found["targets"] = torch.randint(V, (B, N), generator=rng)
    found["targets"][0, 2:4] = -100
    return found


def states(given: dict[str, Any], **options: Any) -> list[LossState]:
    cut = ("weight", "bias", "class_weight")
    return [
        linear_cross_entropy_shard(
            given["hidden"],
            targets=given["targets"],
            first_class=a,
            classes=V,
            **{name: given[name][a:b] for name in cut},
            **options,
        )
        for a, b in CUTS
    ]


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_parts_merge_into_the_loss_and_its_gradients(dtype: torch.dtype) -> None:
    given = inputs(dtype)
    want = linear_cross_entropy(**given, z_loss=0.1, reduction="none", return_lse=True, **SHARED)
    merged = merge_shards(states(given, **SHARED), given["targets"], z_loss=0.1)
    limit = 1e-13 if dtype is F64 else 1e-5
    torch.testing.assert_close(merged.loss, want.loss, rtol=limit, atol=limit)
    torch.testing.assert_close(merged.lse, want.lse, rtol=limit, atol=limit)
    g, g_lse = torch.randn_like(want.loss), torch.randn_like(want.loss)
    active = [given[name] for name in ("hidden", "weight", "bias")]

    def gradients(of: Any) -> Any:
        return torch.autograd.grad((of.loss * g + of.lse * g_lse).sum(), active)

    limit = {F64: 1e-14, F32: 1e-6, BF16: 2**-7}[dtype]
    for got, right in zip(gradients(merged), gradients(want), strict=True):
        assert (got - right).double().norm() < limit * right.double().norm()


def test_states_are_those_of_arrays() -> None:
    given = inputs(F32)
    arrays = {name: t.detach().numpy() for name, t in given.items()}
    for (a, b), state in zip(CUTS, states(given, **SHARED), strict=True):
        want = twn.linear_cross_entropy_shard(
            arrays["hidden"],
            arrays["weight"][a:b],
            arrays["targets"],
            first_class=a,
            classes=V,
            bias=arrays["bias"][a:b],
            class_weight=arrays["class_weight"][a:b],
            **SHARED,
        )
        for got, right in zip(state, want, strict=True):
            np.testing.assert_allclose(got.detach(), right, rtol=1e-5, atol=1e-6)


def test_large_logits_keep_the_digits_of_the_sum() -> None:
    """l is no difference of large numbers: of whole logits about 1000, nothing is rounded."""
    given, rng = inputs(F32), torch.Generator().manual_seed(2)
    given |= {"bias": torch.full((V,), 1000.0), "class_weight": torch.ones(V)}
    for name in ("hidden", "weight"):
        given[name] = torch.randint(-1, 2, given[name].shape, generator=rng).float()
    exact = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    for state, truth in zip(states(given), states(exact), strict=True):
        torch.testing.assert_close(state.l.double(), truth.l, rtol=1e-6, atol=0)
    merged = merge_shards(states(given), given["targets"])
    want = linear_cross_entropy(**exact, reduction="none")
    torch.testing.assert_close(merged.loss.double(), want, rtol=1e-6, atol=0)


def test_second_derivatives_pass_through_the_merged_loss() -> None:
    given = inputs(F64)
    hidden = given["hidden"]

    def loss(hidden: Any) -> Any:
        parts = states({**given, "hidden": hidden})
        return merge_shards(parts, given["targets"]).loss.sum()

    def whole(hidden: Any) -> Any:
        return linear_cross_entropy(**{**given, "hidden": hidden}, reduction="sum")

    found = []
    for f in (loss, whole):
        (g,) = torch.autograd.grad(f(hidden), hidden, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), hidden)[0])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


def test_wrong_states_are_explained() -> None:
    given = inputs(F64)
    parts, y = states(given), given["targets"]
    for wrong, error, text in [
        ([], ValueError, "states must have at least one part"),
        ([3], TypeError, r"states\[0\] must be a LossState, got int"),
        ([parts[0]._replace(l=y[0])], ValueError, r"states\[0\].l must have shape \(3, 7\)"),
    ]:
        with pytest.raises(error, match=text):
            merge_shards(wrong, y)
    with pytest.raises(ValueError, match="classes must be at least 98"):
        linear_cross_entropy_shard(given["hidden"], given["weight"], y, first_class=1, classes=V)
    with pytest.raises(ValueError, match="targets must be from 0 to 96"):
        linear_cross_entropy_shard(
            given["hidden"], given["weight"], y + V, first_class=0, classes=V
        )
