"""The script for a GPU board: its steps, its file of results and its tables, without a GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tilewise.bench import board, board_jax, board_steps

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_board.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_board", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Clock:
    """A clock that a step moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def names(results: dict[str, Any], status: str = "done") -> list[str]:
    return [name for name, entry in results["steps"].items() if entry["status"] == status]


def test_steps_have_names_of_their_own_and_checks_come_before_times() -> None:
    every = list(board.steps())
    assert len({step.name for step in every}) == len(every)
    actions = [step.action for step in every]
    assert actions[0] == "board"
    last = {action: max(i for i, a in enumerate(actions) if a == action) for action in actions}
    assert last["check"] < actions.index("sanitize") < actions.index("time")
    timed = {(p.kind, p.D, p.N, p.causal) for p in board.problems()}
    assert len(timed) == 2 * len(board.HEAD_DIMS) * len(board.LENGTHS) * 2


def test_every_problem_has_the_same_tokens_and_counts_the_products_it_needs() -> None:
    for problem in board.problems():
        assert problem.B * problem.N == board.TOKENS and problem.H * problem.D == board.WIDTH
    full, causal = (board.Problem("forward", 128, 4096, c) for c in (False, True))
    assert full.flops == 4 * 4 * 16 * 4096 * 4096 * 128 == 2 * causal.flops
    assert board.Problem("backward", 128, 4096, False).flops == 2.5 * full.flops


def test_a_run_that_is_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    path, clock, done = tmp_path / "new" / "board.json", Clock(), []

    def do(step: board.Step, results: Any) -> dict[str, Any]:
        done.append(step.name)
        clock.now += 7
        return {}

    only = lambda step: step.action in ("board", "check")  # noqa: E731
    total = sum(map(only, board.steps()))
    left = board.run_steps(path, do, clock, 20, only, lambda line: None)
    assert len(done) == 3 and left == total - 3
    assert names(board.read(path)) == sorted(done)
    left = board.run_steps(path, do, clock, 1e9, only, lambda line: None)
    assert left == 0 and len(done) == len(set(done)) == total
    assert board.read(path)["steps"]["board"]["seconds"] == 7


def test_a_step_that_fails_keeps_its_reason_and_is_tried_again(tmp_path: Path) -> None:
    path, said = tmp_path / "board.json", []
    fails = [True]

    def do(step: board.Step, results: Any) -> dict[str, Any]:
        if fails[0]:
            raise RuntimeError("no such kernel\nand more")
        return {}

    only = lambda step: step.action == "board"  # noqa: E731
    assert board.run_steps(path, do, Clock(), 1, only, said.append) == 1
    entry = board.read(path)["steps"]["board"]
    assert entry["reason"] == "RuntimeError: no such kernel"
    assert said == ["board: failed RuntimeError: no such kernel"]
    fails[0] = False
    assert board.run_steps(path, do, Clock(), 1, only, said.append) == 0
    assert names(board.read(path)) == ["board"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "board.json"
    board.write(path, board.new_results())
    with pytest.raises(TypeError):
        board.write(path, {"schema": 1, "steps": {"board": object()}})
    assert board.read(path) == board.new_results()
    assert list(tmp_path.iterdir()) == [path]


TIMED = "forward D=128 N=4096 causal"


@pytest.mark.parametrize(
    ("results", "fault"),
    [
        ([], "schema"),
        ({"schema": 0}, "schema"),
        ({"schema": 1, "steps": {"dance": {"status": "done"}}}, "'dance'"),
        ({"schema": 1, "steps": {"board": {"status": "begun"}}}, "done or failed"),
        ({"schema": 1, "steps": {"board": {"status": "failed"}}}, "without a reason"),
        ({"schema": 1, "steps": {TIMED: {"status": "done", "result": {"x": {}}}}}, "contenders"),
        (
            {"schema": 1, "steps": {TIMED: {"status": "done", "result": {"hopper": {"ms": 0}}}}},
            "positive milliseconds",
        ),
    ],
)
def test_results_of_another_form_are_refused(tmp_path: Path, results: Any, fault: str) -> None:
    assert fault in board.faults(results)[0]
    path = tmp_path / "board.json"
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"board\.json"):
        board.read(path)


def measured() -> dict[str, Any]:
    about = {"name": "Some Board", "torch": "2.11", "triton": "3.6.0"}
    times = {"hopper": {"ms": 2.0}, "sdpa flash": {"ms": 4.0}, "triton": {"reason": "refused"}}
    return {
        "schema": 1,
        "steps": {
            "board": {"status": "done", "result": about},
            TIMED: {"status": "done", "result": times},
            "check hopper D=128 causal": {"status": "done", "result": {"passes": ["forward"]}},
            "check triton D=128 causal": {"status": "failed", "reason": "o is off"},
        },
    }


def test_tables_hold_rates_and_gaps() -> None:
    assert board.faults(measured()) == []
    text = board.tables(measured())
    flops = 4 * 4 * 16 * 4096 * 4096 * 128 / 2
    hopper, flash = (f"{flops / ms / 1e9:.0f}" for ms in (2.0, 4.0))
    assert f"| D=128 N=4096 causal | - | {hopper} | {flash} | - |" in text
    assert "Some Board" in text and "backward" not in text
    assert board.tables(board.new_results()) == "Nothing has been measured.\n"


def test_only_what_agreed_with_the_oracle_is_timed() -> None:
    results = measured()
    forward, backward = (board.Problem(kind, 128, 512, True) for kind in board.PASSES)
    assert board.is_checked(results, "hopper", forward)
    assert not board.is_checked(results, "hopper", backward)
    assert not board.is_checked(results, "triton", forward)
    assert not board.is_checked(results, "sdpa cudnn", forward)
    other = board.Problem("forward", 64, 512, True)
    found = board_steps.run(board.Step(other.name, "time", _given(other)), results)
    assert set(found) == set(board.CONTENDERS)
    assert all("oracle" in entry["reason"] for entry in found.values())


def _given(problem: board.Problem) -> dict[str, Any]:
    return {name: getattr(problem, name) for name in ("kind", "D", "N", "causal")}


def test_without_a_gpu_the_script_says_so(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if board_steps.board_or_reason()[0] is not None:
        pytest.skip("there is a GPU here")
    path = tmp_path / "board.json"
    assert script.main(["--results", str(path)]) == 2
    assert "no GPU board to measure: " in capsys.readouterr().err
    assert not path.exists()


def test_the_script_lists_its_steps_and_prints_tables(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [step.name for step in board.steps()]
    path = tmp_path / "board.json"
    board.write(path, measured())
    assert script.main(["--tables", "--results", str(path)]) == 0
    assert "Some Board" in capsys.readouterr().out


def test_the_checks_of_a_board_find_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    made = board_steps.__dict__

    def fresh(D: int, *sizes: int) -> list[Any]:
        B, H, Hk, N, Nk = sizes
        shapes = ((B, H, N, D), (B, Hk, Nk, D), (B, Hk, Nk, D), (B, H, N, D))
        q, k, v, do = (torch.randn(shape).to(torch.bfloat16) for shape in shapes)
        return [*(x.requires_grad_() for x in (q, k, v)), do]

    monkeypatch.setitem(made, "_fresh", fresh)
    monkeypatch.setitem(made, "_backend", lambda contender: board_steps.nullcontext())
    found = board_steps.check("sdpa flash", 16, causal=True)
    assert found["passes"] == ["forward", "backward"] and found["same_bits"] is None
    right = made["_attention"]

    def wrong(*given: Any) -> Any:
        o = right(*given)
        return o + 0.05 * (torch.arange(o.shape[2]) == 300)[:, None]

    monkeypatch.setitem(made, "_attention", wrong)
    with pytest.raises(AssertionError, match="o is off by"):
        board_steps.check("sdpa flash", 16, causal=True)


def test_the_tables_say_what_decoding_took() -> None:
    about = {"name": "Some", "torch": "2", "triton": "3"}
    found = {"triton": {"error": 1e-3, "ms": 0.25, "gb_per_s": 2000.0}, "sdpa": {"reason": "no"}}
    steps = {"board": {"status": "done", "result": about}}
    steps["decode D=64 Nk=8192"] = {"status": "done", "result": found}
    steps["decode D=128 Nk=1024"] = {"status": "failed", "reason": "too large"}
    text = board.tables({"schema": 1, "steps": steps})
    assert "decode D=64 Nk=8192: triton 0.250 ms, 2000 GB/s; sdpa no" in text
    assert "decode D=128 Nk=1024: too large" in text


def test_steps_in_jax_check_what_they_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax")
    made = board_jax.__dict__
    monkeypatch.setitem(made, "_SHAPE", (1, 67, 2))
    monkeypatch.setitem(made, "CONTENDERS", ("tilewise.jax", "jax.nn cudnn"))
    if board_jax.missing() is not None:
        with pytest.raises(RuntimeError, match="JAX finds no GPU"):
            board_jax.run(16, causal=True)
    monkeypatch.setitem(made, "missing", lambda: None)
    monkeypatch.setitem(made, "_milliseconds", lambda *given: 2.5)
    right = made["_attend"]
    found = board_jax.run(16, causal=True)
    ours = found["tilewise.jax"]
    assert ours["passes"] == ["forward", "backward"] and ours["ms"]["backward"] == 2.5
    assert "reason" in found["jax.nn cudnn"]
    results = {"schema": 1, "steps": {"board": {"status": "done", "result": {}}}}
    results["steps"]["board"]["result"] |= {"name": "Some", "torch": "2", "triton": "3"}
    results["steps"]["jax D=64 causal"] = {"status": "done", "result": found}
    results["steps"]["jax D=128 causal"] = {"status": "failed", "reason": "no JAX"}
    text = board.tables(results)
    assert "tilewise.jax forward 2.50 ms, backward 2.50 ms" in text
    assert "jax D=128 causal: no JAX" in text and board.faults(results) == []

    def wrong(*given: Any) -> Any:
        attend = right(*given)
        return lambda *x: 1.02 * attend(*x)

    monkeypatch.setitem(made, "_attend", wrong)
    with pytest.raises(AssertionError, match="o is off by 2"):
        board_jax.check("tilewise.jax", 16, causal=True)
