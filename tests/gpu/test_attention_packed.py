"""Packed sequences in the Triton kernels of attention, interpreted: each is a call of its own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import tilewise as tw
from tilewise.ops.attention.gpu.decode import launch as decode
from tilewise.ops.attention.gpu.kernels import sequences
from tilewise.torch import attention, attention_varlen, gpu

# Tiles of 64: two of queries, two of keys with a tail each, sequences without the ones or the
# others or both, and tiles whose rows begin in the middle of a tile of all rows.
QUERIES, KEYS = (67, 0, 5, 3, 0), (7, 2, 71, 0, 0)
CU_Q, CU_K = ([sum(n[:s]) for s in range(len(n) + 1)] for n in (QUERIES, KEYS))
S, TQ, TK, MOST = len(QUERIES), sum(QUERIES), sum(KEYS), max(KEYS)
H, HK, D, DV = 2, 1, 5, 3
SHAPES = {"q": (TQ, H, D), "k": (TK, HK, D), "v": (TK, HK, DV)}
MASK = tw.causal() & (tw.window(9, 0) | tw.sink_tokens(3))


def normal(*shape: int, seed: int = 0, dtype: Any = torch.float64) -> Any:
    made = torch.Generator().manual_seed(97 + seed)
    return torch.randn(shape, generator=made, dtype=torch.float64).to(dtype)


def operands(dtype: Any = torch.float64) -> list[Any]:
    return [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES.values())]


def everything(*, dropout: bool) -> dict[str, Any]:
    return {
        "mask": MASK,
        "alibi_slopes": normal(S, H, seed=3).abs(),
        "softcap": 1.5,
        "sinks": normal(H, seed=4),
        "softmax_scale": 0.4,
        **({"dropout_p": 0.3, "seed": 2**63 + 5} if dropout else {}),
    }


def derived(attend: Any, given: list[Any], weights: list[Any], more: dict[str, Any]) -> list[Any]:
    """Return results of a call, its gradients and those of these: every kernel runs."""
    given = [x.detach().clone().requires_grad_() for x in given]
    found = attend(*given, return_lse=True, return_max_logit=True, return_entropy=True, **more)
    lse = torch.where(found.lse.isfinite(), found.lse, 0.0)
    loss = (found.o * weights[0]).sum() + (lse * weights[1]).sum()
    first = torch.autograd.grad(loss, given, create_graph=True)
    second = torch.autograd.grad(sum((g * g.detach().cos()).sum() for g in first), given)
    found = [found.o, found.lse, found.max_logit, found.entropy]
    return [x.detach() for x in (*found, *first, *second)]


def cotangents() -> list[Any]:
    return [normal(TQ, H, DV, seed=5), normal(H, TQ, seed=6)]


def packed(implementation: str, inactive: dict[str, Any], **active: Any) -> list[Any]:
    """Return what `derived` does of the packed sequences."""
    names = list(active)

    def attend(q: Any, k: Any, v: Any, *others: Any, **more: Any) -> Any:
        more |= dict(zip(names, others, strict=True))
        return attention_varlen(q, k, v, CU_Q, CU_K, implementation=implementation, **more)

    return derived(attend, [*operands(), *active.values()], cotangents(), inactive)


def close(mine: list[Any], theirs: list[Any]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_every_option_and_derivative_is_that_of_the_cpu_with_its_dropout() -> None:
    options = everything(dropout=True)
    bias = normal(H, TQ, MOST, seed=7)
    for i, keys in zip(pairwise(CU_Q), KEYS, strict=True):
        bias[:, slice(*i), keys:] = torch.nan  # Nobody reads these.
    active = {"sinks": options.pop("sinks"), "bias": bias}
    close(packed("triton", options, **active), packed("cpu", options, **active))


def test_bias_that_keys_and_heads_share() -> None:
    bias = {"bias": normal(1, TQ, 1, seed=7)}
    close(packed("triton", {}, **bias), packed("cpu", {}, **bias))


def test_each_sequence_has_the_bits_of_a_call_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # Calls of few queries have kernels of their own.
    monkeypatch.setattr(decode, "MOST_QUERIES", 0)
    options = everything(dropout=False)
    together = packed("triton", options)
    weights = cotangents()
    for s, (queries, keys) in enumerate(zip(pairwise(CU_Q), pairwise(CU_K), strict=True)):
        i, j = slice(*queries), slice(*keys)
        if i.start == i.stop:
            continue
        q, k, v = operands()
        own = options | {"alibi_slopes": options["alibi_slopes"][s]}
        own |= {"layout": "bnhd", "implementation": "triton"}
        rows = [weights[0][None, i], weights[1][None, :, i]]
        alone = derived(attention, [x[None] for x in (q[i], k[j], v[j])], rows, own)
        o, lse, top, entropy, dq, dk, dv, ddq, ddk, ddv = together
        mine = [o[i], lse[:, i], top[:, i], entropy[:, i], dq[i], dk[j], dv[j], ddq[i], ddk[j]]
        for a, b in zip([*mine, ddv[j]], alone, strict=True):
            assert torch.equal(a, b[0]), s


@pytest.mark.parametrize(("spoiled", "mask"), [(0, None), (2, MASK)])
def test_what_is_not_finite_stays_in_its_sequence_and_in_its_tensor(
    spoiled: int, mask: Any
) -> None:
    def results(*, poisoned: bool) -> list[Any]:
        of_q, of_k = (slice(cu[spoiled], cu[spoiled + 1]) for cu in (CU_Q, CU_K))
        given = []
        for x, rows in zip((*operands(), cotangents()[0]), (of_q, of_k, of_k, of_q), strict=True):
            around = torch.full((len(x) + 130, *x.shape[1:]), torch.nan, dtype=x.dtype)
            around[65:-65] = x
            if poisoned:
                around[65:-65][rows] = torch.nan
            given.append(around[65:-65])
        leaves = [x.detach().requires_grad_() for x in given[:3]]
        o = attention_varlen(*leaves, CU_Q, CU_K, mask=mask, implementation="triton")
        grads = torch.autograd.grad(o, leaves, given[3])
        found = zip((o.detach(), *grads), (of_q, of_q, of_k, of_k), strict=True)
        return [torch.cat([x[: rows.start], x[rows.stop :]]) for x, rows in found]

    for clean, other in zip(results(poisoned=False), results(poisoned=True), strict=True):
        assert clean.isfinite().all() and torch.equal(clean, other)


def test_sixteen_bits() -> None:
    def results(implementation: str) -> list[Any]:
        leaves = [x.requires_grad_() for x in operands(torch.bfloat16)]
        o = attention_varlen(*leaves, CU_Q, CU_K, mask=MASK, implementation=implementation)
        return [o.detach(), *torch.autograd.grad(o, leaves, cotangents()[0].bfloat16())]

    for mine, theirs in zip(results("triton"), results("cpu"), strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


PLANTED: dict[str, Any] = {
    "wrong offset": lambda s, i, j, N, Nk: (s, i, j + (s > 0), N, Nk),
    "keys of a neighbour": lambda s, i, j, N, Nk: (s, i, j, N, Nk + 2 * (s == 0)),
    "dropped tail": lambda s, i, j, N, Nk: (s, i, j, N, Nk - (Nk > 64) * (Nk % 64)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sequences.sequence_at
    monkeypatch.setattr(sequences, "sequence_at", lambda *given: PLANTED[name](*right(*given)))
    q, k, v = operands()
    mine, theirs = (
        attention_varlen(q, k, v, CU_Q, CU_K, implementation=implementation)
        for implementation in ("triton", "cpu")
    )
    with pytest.raises(AssertionError, match="not close"):
        close([mine], [theirs])


def test_boundaries_are_checked_as_on_the_cpu() -> None:
    with pytest.raises(ValueError, match="must end at total_k=80, got 81"):
        attention_varlen(*operands(), CU_Q, [*CU_K[:-1], 81], implementation="triton")
    ends = torch.tensor(CU_Q, dtype=torch.int32)
    q = normal(TQ, H, D)
    mine, theirs = (attention_varlen(q, q, q, ends, implementation=x) for x in ("triton", "cpu"))
    close([mine], [theirs])


def test_boundaries_and_masks_are_sent_once_for_all_layers_and_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = []
    send = gpu._tensor_of
    monkeypatch.setattr(gpu, "_tensor_of", lambda array: sent.append(array.shape) or send(array))
    q = normal(11, 1, D).requires_grad_()
    for _ in range(2):
        o = attention_varlen(q, q, q, [0, 4, 11], mask=tw.window(2, 3), implementation="triton")
        torch.autograd.grad(o.sum(), q)
    assert sent == [(1, 1, 11, 4), (3,)]
