"""The Hopper kernels of attention: their own text, run on the CPU by the emulator."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import tilewise as tw
from tilewise.base.errors import Unsupported
from tilewise.ops.attention import reference
from tilewise.ops.attention.hopper import launch, plan
from tilewise.ops.attention.spec import CotangentCall, Needed, RowStats, Want, prepare, prepare_vjp

B, H, HK, N, NK, D = 2, 6, 2, 37, 53, 16

MASKS = {
    "none": None,
    "causal": tw.causal(),
    "causal from the first key": tw.causal(align="top_left"),
    "window": tw.window(9, 2),
    "sinks and window": tw.causal() & (tw.window(11, 0) | tw.sink_tokens(3)),
    "lengths": tw.lengths([17, 41], query_lengths=[N, 23]),
}
BOUND = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of few rows, so that small problems have several; new tensors hold NaN."""
    tiles = {
        "forward": plan.Tile(8, 8, 2, True),
        "keys": plan.Tile(8, 8, 2, False),
        "queries": plan.Tile(8, 16, 2, False),
    }
    small = {kind: {D: (tile,)} for kind, tile in tiles.items()}
    monkeypatch.setattr(plan, "CANDIDATES", small)
    for module in (plan, launch):
        monkeypatch.setattr(module, "HEAD_DIMS", dict.fromkeys(tiles, (D,)))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Problem:
    """Tensors of one call, the call in 16 bits, and the same call in float64."""

    def __init__(self, mask: Any = None, dtype: Any = torch.bfloat16, seed: int = 0, **more: Any):
        sizes = {"B": B, "H": H, "HK": HK, "N": N, "NK": NK, "layout": "bhnd"} | more
        b, h, hk, n, nk, self.layout = sizes.values()
        draw = torch.Generator().manual_seed(seed)

        def tensor(heads: int, rows: int) -> torch.Tensor:
            shape = (b, heads, rows, D) if self.layout == "bhnd" else (b, rows, heads, D)
            x = torch.randn(shape, generator=draw).to(dtype)
            return x if self.layout == "bhnd" else x.transpose(1, 2)

        self.q, self.k, self.v, self.do = (
            tensor(h, n),
            tensor(hk, nk),
            tensor(hk, nk),
            tensor(h, n),
        )
        self.dlse = torch.randn((b, h, n), generator=draw)
        exact = [x.double().numpy() for x in (self.q, self.k, self.v)]
        self.exact = prepare(*exact, mask=mask)
        self.call = replace(self.exact, q=self.q, k=self.k, v=self.v, layout=self.layout)

    def expected(self) -> tuple[Any, Any]:
        outputs = reference.forward(self.exact, Want(lse=True, max_logit=True))
        do, dlse = self.do.double().numpy(), self.dlse.double().numpy()
        given = prepare_vjp(self.exact, do, outputs.o, outputs.stats, dlse)
        return outputs, reference.vjp(self.exact, given, Needed())

    def forward(self, device: Any, **want: bool) -> Any:
        return launch.forward(self.call, Want(**{"lse": True, "o_full": True} | want), device)

    def vjp(self, device: Any, outputs: Any, needed: Needed | None = None) -> Any:
        given = CotangentCall(self.do, self.dlse, outputs.o_full, outputs.stats)
        return launch.vjp(self.call, given, needed or Needed(), device)


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    got = found.double().numpy()
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_results_and_gradients_agree_with_the_reference(emulator: ModuleType, mask: Any) -> None:
    problem, device = Problem(mask), emulator.Emulated()
    expected, grads = problem.expected()
    found = problem.forward(device, max_logit=True)
    bound = BOUND[torch.bfloat16]
    assert error(found.o, expected.o) < bound
    assert error(found.o_full, expected.o) < bound / 2
    np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.max_logit, expected.max_logit, rtol=1e-5, atol=1e-5)
    for name, got, want in zip("qkv", problem.vjp(device, found), grads[:3], strict=False):
        assert error(got, want) < bound, name


@pytest.mark.parametrize("paired", [False, True])
def test_every_way_to_order_the_products_agrees(emulator: ModuleType, paired: bool) -> None:
    problem, device = Problem(tw.causal(), B=1), emulator.Emulated()
    expected, grads = problem.expected()
    tiles = {"forward": plan.Tile(8, 16, 4, paired), "keys": plan.Tile(16, 8, 4, paired)}
    with plan.configured("forward", D, tiles["forward"]), plan.configured("keys", D, tiles["keys"]):
        found = problem.forward(device)
        _, dk, dv, *_ = problem.vjp(device, found)
    constants = [job.plan.constants for job in device.jobs]
    assert constants[0]["PING_PONG"] is paired and constants[2]["EARLY"] is paired
    assert error(found.o, expected.o) < BOUND[torch.bfloat16]
    assert error(dk, grads.dk) < BOUND[torch.bfloat16]
    assert error(dv, grads.dv) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_float16_in_either_layout_agrees_too(emulator: ModuleType, layout: str) -> None:
    problem = Problem(tw.causal(), torch.float16, layout=layout)
    device = emulator.Emulated(programs=2)
    expected, grads = problem.expected()
    found = problem.forward(device)
    assert found.o.transpose(1, 2).is_contiguous() == (layout == "bnhd")
    assert error(found.o, expected.o) < BOUND[torch.float16]
    for got, want in zip(problem.vjp(device, found)[:3], grads[:3], strict=True):
        assert error(got, want) < BOUND[torch.float16]


def test_other_interleavings_and_program_counts_give_the_same_bits(emulator: ModuleType) -> None:
    problem = Problem(tw.causal(), B=1, H=4, HK=2)
    ways = [(1, 1), (2, 2), (3, 13), (4, 2), (5, 3), (6, 4)]
    devices = [emulator.Emulated(seed, programs) for seed, programs in ways]
    results = [(o := problem.forward(d), problem.vjp(d, o)) for d in devices]
    (first, grads), *others = results
    for outputs, other in others:
        for a, b in zip(
            (*first.stats, first.o, *grads[:3]),
            (*outputs.stats, outputs.o, *other[:3]),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it(emulator: ModuleType) -> None:
    whole = Problem(tw.causal(), B=1)
    part = Problem(tw.causal(), B=1)
    part.call = replace(
        prepare(whole.exact.q[:, :, 11:], whole.exact.k, whole.exact.v, mask=tw.causal()),
        q=whole.q[:, :, 11:],
        k=whole.k,
        v=whole.v,
    )
    every = whole.forward(emulator.Emulated())
    few = part.forward(emulator.Emulated())
    assert torch.equal(every.o_full[:, :, 11:], few.o_full)
    assert torch.equal(every.stats.m[:, :, 11:], few.stats.m)


def test_rows_without_keys_are_zero_and_have_no_gradient(emulator: ModuleType) -> None:
    problem = Problem(tw.causal(align="bottom_right"), B=1, H=1, HK=1, N=43, NK=19)
    device = emulator.Emulated()
    found = problem.forward(device)
    assert (found.o[:, :, :24] == 0).all() and (found.o_full[:, :, :24] == 0).all()
    assert torch.isneginf(found.lse[:, :, :24]).all() and (found.stats.log_l[:, :, :24] == 0).all()
    dq, dk, dv, *_ = problem.vjp(device, found)
    assert (dq[:, :, :24] == 0).all() and dk.isfinite().all() and dv.isfinite().all()


def test_a_nan_that_is_attended_to_reaches_its_rows_alone(emulator: ModuleType) -> None:
    problem = Problem(B=1, H=2, HK=2)
    problem.v[0, 1, 5, 3] = torch.nan
    problem.q[0, 0, 7] = torch.nan
    o = problem.forward(emulator.Emulated()).o
    bad = torch.zeros(o.shape, dtype=torch.bool)
    bad[0, 1, :, 3] = bad[0, 0, 7] = True
    assert torch.equal(o.isnan(), bad)


def test_values_that_a_mask_could_not_hide_are_refused(emulator: ModuleType) -> None:
    problem, device = Problem(tw.causal(), B=1), emulator.Emulated()
    found = problem.forward(device)
    for name, value in (
        ("q", torch.nan),
        ("k", torch.inf),
        ("do", -torch.inf),
        ("dlse", torch.nan),
    ):
        kept = getattr(problem, name).clone()
        getattr(problem, name).view(-1)[3] = value
        with pytest.raises(Unsupported, match=f"does not serve masks where {name} holds NaN"):
            problem.vjp(device, found)
        getattr(problem, name).copy_(kept)
    problem.v[0, 0, 3, 1] = torch.nan
    for call in (lambda: problem.forward(device), lambda: problem.vjp(device, found)):
        with pytest.raises(Unsupported, match="does not serve masks where v holds NaN"):
            call()


def test_a_hidden_nan_of_a_key_reaches_no_output(emulator: ModuleType) -> None:
    problem = Problem(tw.causal(), B=1, H=2, HK=1, N=NK)
    clean = problem.forward(emulator.Emulated()).o
    problem.k[0, 0, 29] = torch.nan
    spoiled = problem.forward(emulator.Emulated()).o
    assert torch.equal(spoiled[:, :, :29], clean[:, :, :29])
    assert spoiled[:, :, 29:].isnan().all()


def test_large_logits_keep_the_sum_of_their_row(emulator: ModuleType) -> None:
    problem = Problem(B=1, H=1, HK=1)
    problem.q.fill_(64.0)
    problem.k.fill_(-128.0)
    device = emulator.Emulated()
    found = problem.forward(device)
    np.testing.assert_allclose(found.stats.log_l, np.log(NK), rtol=1e-6)
    problem.dlse.zero_()
    _, _, dv, *_ = problem.vjp(device, found)
    mean = problem.do.float().sum(2) / NK
    np.testing.assert_allclose(dv.float()[0, 0], mean[0].expand(NK, D), rtol=1e-2)


def test_only_the_gradients_that_are_needed_are_computed(emulator: ModuleType) -> None:
    problem = Problem(B=1, H=2, HK=1)
    device = emulator.Emulated()
    found = problem.forward(device)
    device.jobs.clear()
    dq, dk, dv, *_ = problem.vjp(device, found, Needed(q=True, k=False, v=False))
    assert dq is not None and dk is None and dv is None
    assert [job.kernel for job in device.jobs] == [
        "attention_hopper_rows_kernel",
        "attention_hopper_bwd_queries_kernel",
    ]


def test_strides_that_bulk_copies_cannot_read_are_copied(emulator: ModuleType) -> None:
    problem = Problem(B=1, H=2, HK=2)
    expected, _ = problem.expected()
    wide = torch.full((1, 2, NK, D + 3), torch.nan, dtype=torch.bfloat16)
    wide[..., :D] = problem.k
    problem.call = replace(problem.call, k=wide[..., :D])
    device = emulator.Emulated()
    assert error(problem.forward(device).o, expected.o) < BOUND[torch.bfloat16]
    assert device.jobs[0].arguments["k_desc"].tensor.is_contiguous()


REFUSED = {
    "it does not serve softcap": {"softcap": 3.0},
    "it does not serve bias": {"bias": torch.zeros(1)},
    "it does not serve dropout": {"dropout_p": 0.5},
    "it does not serve sinks": {"sinks": torch.zeros(H)},
    "it serves a positive softmax_scale, not -1": {"softmax_scale": -1.0},
    "it serves D = Dv in 16, not D=16, Dv=24": {"Dv": 24},
    "the call has no pairs": {"Nk": 0},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_does_not_serve_is_refused_with_the_reason(reason: str) -> None:
    call = Problem().call
    assert launch.refuses(call) is None
    assert launch.refuses(replace(call, **REFUSED[reason])) == reason


def test_float32_and_masks_of_bits_are_refused() -> None:
    call = Problem().call
    assert "not float32" in str(launch.refuses(replace(call, q=call.q.float())))
    dense = tw.dense(np.indices((N, NK)).sum(0) % 2 == 0).lower(B, H, N, NK)
    assert "two intervals a row" in str(launch.refuses(replace(call, mask=dense)))


def test_a_tensor_of_the_cpu_is_refused_by_name() -> None:
    pytest.importorskip("triton")
    x = torch.zeros((1, 1, 3, 64), dtype=torch.bfloat16)
    with pytest.raises((Unsupported, ExceptionGroup), match="hopper"):
        tw.torch.attention(x, x, x, implementation="hopper")


def test_statistics_may_be_a_log_sum_exp_from_elsewhere(emulator: ModuleType) -> None:
    problem, device = Problem(), emulator.Emulated()
    _, grads = problem.expected()
    found = problem.forward(device)
    stats = RowStats(found.lse / np.log(2), torch.zeros_like(found.lse))
    given = CotangentCall(problem.do, problem.dlse, found.o, stats)
    for got, want in zip(
        launch.vjp(problem.call, given, Needed(), device)[:3], grads[:3], strict=True
    ):
        assert error(got, want) < 2 * BOUND[torch.bfloat16]


BROKEN = {
    "a gradient is summed on before it is there": (
        "backward",
        "            dq, ds = warpgroup_mma_wait(0, deps=(dq_next, ds))\n",
        "            dq, ds = warpgroup_mma_wait(1, deps=(dq_next, ds))\n",
    ),
    "queries are given back while they are read": (
        "backward",
        "                mbarrier.arrive(q_bars[1].index(slot), count=1)\n",
        "",
        "                weights = gl.convert_layout(p.to(dtype), a_layout)\n",
        "                weights = gl.convert_layout(p.to(dtype), a_layout)\n"
        "                mbarrier.arrive(q_bars[1].index(slot), count=1)\n",
    ),
    "keys are taken for those of the next item": (
        "backward",
        "        mbarrier.wait(own_bars[0].index(who), turn & 1)\n",
        "        mbarrier.wait(own_bars[0].index(who), 0)\n",
    ),
    "the head of a group is not stepped over": (
        "backward",
        "                head = h * GROUP + g\n",
        "                head = h * GROUP\n",
    ),
    "values are read before they came": (
        "forward",
        "            mbarrier.wait(v_bars[0].index(v_slot), v_phase)\n",
        "",
    ),
    "values are given back while they are read": (
        "forward",
        "            mbarrier.arrive(v_bars[1].index(v_slot), count=1)\n",
        "",
        "            s = warpgroup_mma_wait(1, deps=(s_next,))\n",
        "            mbarrier.arrive(v_bars[1].index(v_slot), count=1)\n"
        "            s = warpgroup_mma_wait(1, deps=(s_next,))\n",
    ),
    "the ring is one tile ahead": (
        "forward",
        "((seq // STAGES) & 1) ^ 1\n",
        "(seq // STAGES) & 1\n",
    ),
    "a wait leaves the product in flight": (
        "forward",
        "warpgroup_mma_wait(0, deps=(acc_next, weights))",
        "warpgroup_mma_wait(1, deps=(acc_next, weights))",
    ),
    "the turn is never handed over": (
        "forward",
        "                mbarrier.arrive(turns.index(1 - who), count=1)\n",
        "                pass\n",
    ),
    "results are stored without a fence": ("parts", "    fence_async_shared()\n", ""),
    "q is given back too late for the next item": (
        "forward",
        "        mbarrier.arrive(q_bars[1].index(who), count=1)\n",
        "",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_emulator_finds_faults(emulator: ModuleType, tmp_path: Path, fault: str) -> None:
    name, *edits = BROKEN[fault]
    folder = tmp_path / "hopper"
    shutil.copytree(Path(__file__).parents[2] / emulator.KERNELS, folder)
    path = folder / "kernels" / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    for old, new in zip(edits[::2], edits[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    problem = Problem(B=1, H=2, HK=1)
    expected, grads = problem.expected()
    right = problem.forward(emulator.Emulated())
    with pytest.raises(AssertionError):
        for seed in range(20):  # not every interleaving shows a race
            device = emulator.Emulated(seed, programs=2, folder=folder)
            if name == "backward":
                for got, want in zip(problem.vjp(device, right)[:3], grads[:3], strict=True):
                    assert error(got, want) < BOUND[torch.bfloat16]
            else:
                assert error(problem.forward(device).o, expected.o) < BOUND[torch.bfloat16]
