"""`tilewise bench attention`: what it reports, and that a wrong result gets no figure."""

from __future__ import annotations

import importlib
import importlib.util
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import tilewise as tw
from tilewise import numpy as door
from tilewise.bench import attention as measuring
from tilewise.bench import (
    cases,
    contenders,
    derivatives,
    losses,
    peers,
    rows,
    softmax,
    textbook,
)
from tilewise.bench.attention import CaseFailed
from tilewise.bench.cases import DOOR, PYTORCH, SUITES, TILEWISE, Case, custom_case, small
from tilewise.bench.problems import Pattern
from tilewise.cli import bench
from tilewise.hardware import memory


@pytest.fixture
def app() -> typer.Typer:
    application = typer.Typer()
    bench.register(application)
    return application


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measure shortly, and without fresh processes, whose start takes longer than that."""
    threads = tw.get_num_threads()

    def call(target: str, arguments: dict[str, Any], **options: Any) -> Any:
        module, _, name = target.partition(":")
        return getattr(importlib.import_module(module), name)(**json.loads(json.dumps(arguments)))

    monkeypatch.setattr(memory, "run_fresh", call)
    monkeypatch.setattr(measuring, "_SPENT_SECONDS", 0)
    monkeypatch.setattr(rows, "_SPENT_SECONDS", 0)
    monkeypatch.setattr(measuring, "fma_peak", lambda dtype: 123.0)
    yield
    contenders.set_threads(threads)


def run(app: typer.Typer, *arguments: object) -> Any:
    fixed = ("bench", "attention", "--implementation", "reference", "--repeats", "2")
    return CliRunner().invoke(app, [*fixed, *map(str, arguments)])


def test_figures_are_written_with_the_machine(app: typer.Typer, tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    result = run(app, "--n", 37, "--heads", 2, "--head-dim", 5, "--causal", "--json", target)
    assert result.exit_code == 0, result.output
    written = json.loads(target.read_text())
    assert written["machine"]["processor"]
    assert written["versions"]["numpy"] == np.__version__
    (ran,) = written["runs"]
    timings = {(t["contender"], t["direction"]): t for t in ran["timings"]}
    expected = {"tilewise", "NumPy textbook"}
    if importlib.util.find_spec("torch") is not None:
        expected.add("PyTorch")
    assert set(timings) == {(c, d) for c in expected for d in ("forward", "backward")}
    for timing in timings.values():
        assert timing["rounds"] >= 2
        assert timing["lower_quartile_s"] <= timing["median_s"] <= timing["upper_quartile_s"]
        assert max(timing["errors"].values()) < 64 * np.finfo(np.float32).eps
        assert set(timing["errors"]) >= {"o", "dq", "dk", "dv"}
    assert timings["tilewise", "forward"]["ratio"] == 1
    assert "GFLOP/s" in result.stdout


@pytest.mark.usefixtures("in_this_process")
def test_plot_is_drawn(app: typer.Typer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "figure.png"
    result = run(app, "--n", 16, "--heads", 1, "--head-dim", 4, "--plot", target)
    assert result.exit_code == 0, result.output
    assert target.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("options", [("--window", 3), ("--dtype", "float64")])
def test_other_problems_pass_the_gate(app: typer.Typer, options: tuple[object, ...]) -> None:
    result = run(app, "--n", 19, "--heads", 1, "--head-dim", 4, *options)
    assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("in_this_process")
def test_decode_is_compared_with_both_forms_of_grouped_queries() -> None:
    case = replace(SUITES["quick"].cases[-1], H=8, Hk=2, Nk=43, D=6)
    ran = measuring.run_case(case, repeats=1, implementation="reference")
    assert {t["direction"] for t in ran["timings"]} == {"forward"}
    assert all(t["kv_gbytes_per_s"] > 0 for t in ran["timings"])
    if importlib.util.find_spec("torch") is not None:
        assert "PyTorch, packed" in {t["contender"] for t in ran["timings"]}


@pytest.mark.usefixtures("in_this_process")
def test_thread_counts_are_compared_in_one_run() -> None:
    case = Case("two and one", 1, 1, 23, 4, contenders=(TILEWISE, PYTORCH))
    ran = measuring.run_case(case, threads=(1, 2), repeats=1, implementation="reference")
    own = [t for t in ran["timings"] if t["contender"] == "tilewise"]
    assert [t["threads"] for t in own] == [1, 2, 1, 2]


def test_only_the_slow_baseline_sits_out_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_SLOW_SECONDS", 0.0)
    case = custom_case(9, H=1, D=4)
    ran = measuring.measure_case(vars(case).copy(), "float32", [1], 5, "reference")
    for timing in ran["timings"]:
        baseline = timing["contender"] == contenders.TEXTBOOK
        assert timing["rounds"] in ([3] if baseline else range(5, 62))


def test_wrong_result_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        dq, dk, dv = textbook.backward(*arguments)
        return dq, dk * np.float32(1.001), dv

    case = custom_case(13, H=1, D=4)
    problem = case.problem("float32")
    right = contenders.textbook_numpy(problem)
    p = right.forward()[2]
    broken = replace(
        right,
        name="broken",
        backward=lambda saved: wrong(problem.do, problem.q, problem.k, problem.v, p),
    )
    monkeypatch.setattr(measuring, "_contenders", lambda *given: ([broken], {}))
    answer = measuring.measure_case(vars(case).copy(), "float32", [1], 1, "reference")
    assert set(answer) == {"wrong"}
    assert "broken is wrong" in answer["wrong"]
    monkeypatch.setattr(memory, "run_fresh", lambda *given, **options: answer)
    with pytest.raises(CaseFailed, match="broken is wrong"):
        measuring.run_case(case)


def derivable() -> set[str]:
    """The contenders of a run with derivatives."""
    found = importlib.util.find_spec("torch") is not None
    return {"tilewise"} | ({"tilewise.torch", "PyTorch math"} if found else set())


@pytest.mark.usefixtures("in_this_process")
def test_derivatives_are_timed_and_their_memory_measured(app: typer.Typer, tmp_path: Path) -> None:
    target, picture = tmp_path / "figures.json", tmp_path / "figure.png"
    plot = ("--plot", picture) if importlib.util.find_spec("matplotlib") else ()
    options = ("--derivatives", "--n", 17, "--heads", 2, "--head-dim", 5, "--json", target)
    result = run(app, *options, *plot)
    assert result.exit_code == 0, result.output
    written = json.loads(target.read_text())
    directions = {"forward", "backward", "jvp", "double backward"}
    (ran,), (space,) = written["runs"], written["memory"]
    assert {(t["contender"], t["direction"]) for t in ran["timings"]} == {
        (name, direction) for name in derivable() for direction in directions
    }
    for timing in ran["timings"]:
        assert {"o", "dq", "dk", "dv", "to", "tdq", "tdk", "tdv"} <= set(timing["errors"])
        if timing["direction"] in ("forward", "backward"):
            assert timing["factor"] == 1
    figures = {(f["contender"], f["direction"]): f for f in space["figures"]}
    assert set(figures) == {(name, direction) for name in derivable() for direction in directions}
    array = 2 * 17 * 5 * 4
    row = 2 * 17 * 4
    assert figures["tilewise", "jvp"]["output_bytes"] == 2 * array
    assert figures["tilewise", "double backward"]["output_bytes"] == 4 * array + 2 * row
    assert all(f["seconds"] > 0 and f["skipped"] is None for f in figures.values())
    assert "extra MiB" in result.stdout
    assert not plot or picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("in_this_process")
def test_memory_without_room_is_measured_at_half_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(
        derivatives, "no_room", lambda need: "too much" if need > 15 * 15 * 2.3 * 4 else None
    )
    case = custom_case(23, H=1, D=3, derivatives=True)
    figures = list(derivatives.measure_memory(case, implementation="reference"))
    forward = [(f["contender"], f["N"], f["skipped"]) for f in figures[:6]]
    assert forward == [
        *(("tilewise", 23, None), ("tilewise.torch", 23, None), ("PyTorch math", 23, "too much")),
        *((name, 11, None) for name in ("tilewise", "tilewise.torch", "PyTorch math")),
    ]


@pytest.mark.usefixtures("in_this_process")
def test_wrong_tangent_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    tilewise = contenders.tilewise

    def broken(*given: Any) -> contenders.Contender:
        right = tilewise(*given)
        return replace(right, jvp=lambda: (right.jvp()[0], 1.001 * right.jvp()[1]))

    case = custom_case(13, H=1, D=3, derivatives=True)
    monkeypatch.setattr(contenders, "tilewise", broken)
    with pytest.raises(CaseFailed, match=r"tilewise is wrong: .*to 1\.0e-03"):
        measuring.run_case(case, implementation="reference")


def test_true_tangents_agree_with_the_reference() -> None:
    case = replace(custom_case(7, H=4, D=3, causal=True, derivatives=True), Hk=2, Nk=11)
    x = case.problem("float64")
    options: Any = {"mask": tw.causal(), "implementation": "reference"}
    made = door.attention(x.q, x.k, x.v, return_stats=True, **options)
    tq, tk, tv = x.tangents
    given = (x.q, x.k, x.v, made.o, made.stats)
    want = {
        **door.attention_jvp(tq, tk, tv, *given, **options)._asdict(),
        **dict(
            zip(
                ("tdq", "tdk", "tdv"),
                door.attention_vjp_jvp(x.do, tq, tk, tv, *given, **options),
                strict=False,
            )
        ),
    }
    got = x.true_tangents()
    assert set(got) == set(want)
    for name, value in want.items():
        assert textbook.relative_error(got[name], value) < 1e-8, name


@pytest.mark.usefixtures("in_this_process")
def test_door_to_pytorch_takes_part_where_calls_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(cases, "_FEWEST_QUERIES_THROUGH_TORCH", 13)
    for N, present in ((12, False), (13, True)):
        case = custom_case(N, H=1, D=3, causal=True)
        ran = measuring.run_case(case, repeats=1, implementation="reference", peers=("torch",))
        found = {t["contender"] for t in ran["timings"]}
        assert found == {"tilewise", "PyTorch"} | ({"tilewise.torch"} if present else set())


def test_failed_case_ends_with_status_1(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: Case, **options: Any) -> Any:
        raise CaseFailed(f"{case.name}: killed by signal 9")

    monkeypatch.setattr(measuring, "run_case", fail)
    result = run(app, "--n", 8)
    assert result.exit_code == 1
    assert "killed by signal 9" in result.stderr
    assert "GFLOP" not in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dtype", "int8"), "--dtype must be float64, float32, bfloat16 or float16"),
        (("--suite", "huge"), "--suite must be quick, full, train, decode, masks, varlen or jax"),
        (("--peer", "nobody"), "--peer must be part of one of the names tilewise.torch, PyTorch"),
        (("--derivatives", "--dtype", "float64"), "--derivatives takes float32 alone"),
        (("--json", "/nonexistent/figures.json"), "cannot be written"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    app: typer.Typer, options: tuple[object, ...], words: str
) -> None:
    result = run(app, *options)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("bench: ")
    assert words in line


def test_operations_follow_the_convention() -> None:
    full = custom_case(2048, H=4, D=64)
    assert full.flop("forward") == 4 * 4 * 2048 * 2048 * 64
    multiples = {"backward": 2.5, "jvp": 3, "double backward": 7.5}
    for direction, multiple in multiples.items():
        assert full.flop(direction) == multiple * full.flop("forward")
    assert custom_case(2048, causal=True).pairs() == 2048 * 2048 / 2
    window = custom_case(61, window=7, H=1, D=2)
    assert window.pairs() == window.problem("float32").visible(0, 0, 61).sum()


@pytest.mark.parametrize("suite", SUITES)
def test_cases_have_names_of_their_own(suite: str) -> None:
    names = [case.name for case in SUITES[suite].cases]
    assert len(names) == len(set(names)) > 0
    assert suite != "full" or set(SUITES["quick"].cases) < set(SUITES["full"].cases)


def every_pattern() -> Iterator[tuple[str, Pattern, int, int, int]]:
    """Name, pattern, B, N and Nk of every masked case, smaller."""
    for suite in ("masks", "varlen"):
        for case in map(small, SUITES[suite].cases):
            yield case.name, case.pattern, case.B, case.N, case.keys
    yield "causal, decoding", Pattern(causal=True), 2, 3, 11


@pytest.mark.parametrize(
    ("pattern", "B", "N", "Nk"),
    [x[1:] for x in every_pattern()],
    ids=[x[0] for x in every_pattern()],
)
def test_patterns_are_masks_of_tilewise(pattern: Pattern, B: int, N: int, Nk: int) -> None:
    mask = pattern.mask()
    assert mask is not None
    want = np.broadcast_to(mask.to_bool(B, 1, N, Nk), (B, 1, N, Nk))[:, 0]
    got = np.stack([pattern.visible(b, 0, N, Nk=Nk, N=N) for b in range(B)])
    np.testing.assert_array_equal(got, want)
    if not pattern.alone:
        assert pattern.pairs(B, N, Nk) == want.sum()


def check_tables(result: dict[str, Any]) -> None:
    """The tables of the pages have a line for every case, and replace what was there."""
    path = Path(__file__).parents[2] / "bench" / "readme_table.py"
    spec = importlib.util.spec_from_file_location("readme_table", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    name = script.marker(result)
    for table in (script.table(result), script.short(result)):
        for ran in result["runs"]:
            assert f"| {ran['case']['name']}" in table
        page = f"before\n<!-- {name}:start -->\nold\n<!-- {name}:end -->\nafter"
        written = script.replaced(page, name, table)
        assert table in written and "old" not in written and written.endswith("after")
        assert script.replaced("no markers", name, table) == "no markers"


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("suite", "dtype"),
    [("train", "bfloat16"), ("decode", "float32"), ("masks", "float16"), ("varlen", "bfloat16")],
)
def test_suites_of_pytorch_pass_the_gate(
    app: typer.Typer, tmp_path: Path, suite: str, dtype: str
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    target, picture = tmp_path / "figures.json", tmp_path / "figure.png"
    plot = ("--plot", picture) if importlib.util.find_spec("matplotlib") else ()
    options = ("--suite", suite, "--quick", "--dtype", dtype, "--threads", 1)
    fixed = ("bench", "attention", "--repeats", "1", "--json", target)
    result = CliRunner().invoke(app, [*map(str, (*fixed, *options, *plot))])
    assert result.exit_code == 0, result.output
    written = json.loads(target.read_text())
    assert written["suite"] == suite
    assert len(written["runs"]) == len(SUITES[suite].cases)
    for ran in written["runs"]:
        case = Case(**ran["case"])
        found = {t["contender"] for t in ran["timings"]}
        assert ran["dtype"] == dtype
        assert found == set(case.contenders) - set(ran["skipped"])
        assert set(ran["skipped"]) <= {"onnxruntime"}
        assert {t["direction"] for t in ran["timings"]} == {d for g in case.groups for d in g}
        for timing in ran["timings"]:
            assert (timing["share_of_read"] is not None) == (suite == "decode")
            assert all(error < 2e-2 for error in timing["errors"].values())
    assert "ratio" in result.stdout
    check_tables(written)
    assert not plot or picture.read_bytes().startswith(b"\x89PNG")


def broken(problem: contenders.Problem) -> contenders.Contender:
    """PyTorch, with an output that is a little off."""
    right = peers.pytorch(problem)
    return replace(right, outputs=lambda o: {"o": right.outputs(o)["o"] * 1.001})


@pytest.mark.usefixtures("in_this_process")
def test_wrong_peer_gets_no_figure_and_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setitem(contenders._PEERS, PYTORCH, broken)
    case = Case("small", 1, 2, 13, 3, contenders=(DOOR, PYTORCH))
    ran = measuring.run_case(case, repeats=1, implementation="reference")
    assert {t["contender"] for t in ran["timings"]} == {DOOR}
    assert ran["skipped"][PYTORCH].startswith("PyTorch is wrong: relative errors")


@pytest.mark.usefixtures("in_this_process")
def test_failing_peer_is_not_available(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")

    def fail() -> None:
        raise RuntimeError("no C++ compiler\nand more")

    def failing(problem: contenders.Problem) -> contenders.Contender:
        return replace(peers.pytorch(problem), forward=fail)

    monkeypatch.setitem(contenders._PEERS, PYTORCH, failing)
    result = run(app, "--n", 7, "--heads", 1, "--head-dim", 3)
    assert result.exit_code == 0, result.output
    assert "PyTorch not available: no C++ compiler" in result.stdout


@pytest.mark.usefixtures("in_this_process")
def test_absent_peers_are_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    absent = ("torch", "onnxruntime")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    case = small(SUITES["decode"].cases[0])
    ran = measuring.run_case(case, repeats=1, implementation="reference")
    assert {t["contender"] for t in ran["timings"]} == {"tilewise", "plain read"}
    assert ran["skipped"]["PyTorch"] == "PyTorch is not installed"
    assert ran["skipped"]["onnxruntime"] == "onnxruntime is not installed"


def test_large_problems_are_compared_by_their_first_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("grouped", 2, 6, 5, 3, Hk=3, Nk=7, causal=True)
    problem = case.problem("float64")
    whole = problem.truth()
    monkeypatch.setattr("tilewise.bench.problems._COMPARED_PAIRS", 2 * 5 * 7 * 5)
    part = problem.compared().truth()
    assert part.o.shape == (2, 4, 5, 3)
    assert part.dk.shape == (2, 2, 7, 3)
    for some, every in zip(part, whole, strict=True):
        np.testing.assert_array_equal(some, every[:, : some.shape[1]])


def test_exact_agrees_with_the_textbook_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textbook, "_BLOCK_BYTES", 8 * 41 * 5)
    case = Case("grouped", 2, 4, 37, 7, Hk=2, Nk=41, causal=True)
    problem = case.problem("float64")
    truth = problem.truth()
    o, lse, p = textbook.forward(problem.q, problem.k, problem.v, problem.dense_mask())
    grads = textbook.backward(problem.do, problem.q, problem.k, problem.v, p)
    for got, want in zip((o, lse, *grads), truth, strict=True):
        assert textbook.relative_error(got, want) < 1e-14


def test_exact_gradient_agrees_with_central_differences() -> None:
    problem = Case("small", 1, 2, 5, 3, Hk=1, Nk=7, causal=True).problem("float64")
    truth = problem.truth()
    rng = np.random.default_rng(11)
    for name in ("q", "k", "v"):
        x = getattr(problem, name)
        step = 1e-6 * rng.standard_normal(x.shape)
        ahead, behind = (replace(problem, **{name: x + s * step}).truth().o for s in (1, -1))
        slope = float(((ahead - behind) * problem.do).sum())
        assert slope == pytest.approx(
            float(2 * (getattr(truth, f"d{name}") * step).sum()), rel=1e-7
        )


def touch(megabytes: int) -> dict[str, int]:
    """Hold scratch memory and return a smaller output; runs in a fresh process."""

    def call() -> np.ndarray:
        scratch = np.ones(megabytes << 17)
        return scratch[: len(scratch) // 8].copy()

    result, peak = memory.measure(call, lambda x: x.nbytes)
    return {"extra": peak.extra, "outputs": result.nbytes}


def test_peak_memory_is_the_scratch_and_not_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    answer = memory.run_fresh(f"{Path(__file__).stem}:touch", {"megabytes": 64})
    assert answer["outputs"] == 8 << 20
    assert abs(answer["extra"] - (64 << 20)) < 4 << 20


def nap(seconds: float) -> None:
    time.sleep(seconds)


def test_fresh_process_reports_its_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with pytest.raises(memory.FreshProcessError, match="no_such_module"):
        memory.run_fresh("no_such_module:function", {})
    with pytest.raises(memory.FreshProcessError, match="stopped after"):
        memory.run_fresh(f"{Path(__file__).stem}:nap", {"seconds": 60}, timeout=1)


@pytest.mark.usefixtures("in_this_process")
def test_rows_are_compared_with_the_peers_that_there_are(app: typer.Typer, tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    options = ["--quick", "--repeats", "2", "--case", "x 4096", "--json", str(target)]
    result = CliRunner().invoke(app, ["bench", "softmax", *options])
    assert result.exit_code == 0, result.output
    written = json.loads(target.read_text())
    assert written["machine"]["processor"] and not written["failed"]
    assert {run["case"]["operator"] for run in written["runs"]} == set(softmax.OPERATORS)
    for run in written["runs"]:
        for timing in run["timings"]:
            copies = timing["contender"] == rows.COPY
            assert timing["rounds"] >= 2 and (not timing["errors"]) == copies
            assert (timing["extra_bytes"] is not None) == run["case"]["memory"]
        assert run["timings"][0]["ratio"] == 1
        absent = importlib.util.find_spec("torch") is None
        assert ("PyTorch" in run["skipped"]) == absent
    assert "of memcpy" in result.stdout


@pytest.mark.usefixtures("in_this_process")
def test_rows_that_are_wrong_get_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    case = rows.RowCase("wrong", "softmax", 5, 7, ("tilewise", rows.COPY))
    right = rows.OPERATORS["softmax"]

    def broken(x: Any) -> Any:
        call = right.makers["tilewise"](x)
        return lambda: call() * np.float32(1.0001)

    makers = {**right.makers, "tilewise": broken}
    monkeypatch.setitem(rows.OPERATORS, "softmax", replace(right, makers=makers))
    with pytest.raises(CaseFailed, match="tilewise is wrong"):
        rows.run_case(case, repeats=1)
    monkeypatch.setitem(rows.OPERATORS, "softmax", right)
    assert rows.run_case(case, repeats=1)["timings"][0]["errors"]["softmax"] < 1e-5


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("suite", ["cross_entropy", "linear_cross_entropy"])
def test_losses_are_compared_with_pytorch(app: typer.Typer, tmp_path: Path, suite: str) -> None:
    torch = pytest.importorskip("torch")
    target = tmp_path / "losses.json"
    options = ["--quick", "--large", "--repeats", "2", "--json", str(target)]
    result = CliRunner().invoke(app, ["bench", suite, *options])
    assert result.exit_code == 0, result.output
    written = json.loads(target.read_text())
    assert written["suite"] == suite and len(written["runs"]) == len(rows.SUITES[suite].cases)
    chunks = hasattr(torch.nn, "LinearCrossEntropyOptions")
    for run in written["runs"]:
        assert (losses.CHUNKED in run["skipped"]) == (not chunks and suite != "cross_entropy")
        gradients = {"dhidden", "dweight"} if run["case"]["depth"] else {"dlogits"}
        for timing in run["timings"]:
            step = run["case"]["memory"]
            assert set(timing["errors"]) == {"loss"} | (gradients if step else set())
            assert (timing["extra_bytes"] is not None) == step
        assert run["timings"][0]["contender"] == DOOR
        assert run["timings"][0]["errors"]["loss"] < 5e-7


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("entry", "what", "dtype"),
    [(0, "loss", "bfloat16"), (1, "dhidden", "float32"), (2, "dweight", "float32")],
)
def test_losses_that_are_wrong_get_no_figure(
    monkeypatch: pytest.MonkeyPatch, entry: int, what: str, dtype: str
) -> None:
    pytest.importorskip("torch")
    case = rows.small(rows.SUITES["linear_cross_entropy"].cases[0])
    case = replace(case, contenders=(DOOR,), dtype=dtype)
    right = rows.OPERATORS[case.operator]

    def broken(inputs: Any) -> Any:
        call = right.makers[DOOR](inputs)
        return lambda: [x * (1 + 1e-4 * (i == entry)) for i, x in enumerate(call())]

    changed = replace(right, makers={**right.makers, DOOR: broken})
    monkeypatch.setitem(rows.OPERATORS, case.operator, changed)
    with pytest.raises(CaseFailed, match=f"is wrong.*{what} 1.0e-04"):
        rows.run_case(case, repeats=1)


def test_true_loss_has_the_slope_of_its_gradients() -> None:
    case = rows.RowCase("small", "linear_cross_entropy with gradients", 7, 11, (), depth=5)
    operator, rng = rows.OPERATORS[case.operator], np.random.default_rng(3)
    inputs = {name: x.astype(np.float64) for name, x in operator.draw(case).items() if name != "y"}
    y, truth = operator.draw(case)["y"], operator.truth(operator.draw(case))
    for name, x in inputs.items():
        step = 1e-6 * rng.standard_normal(x.shape)
        ends = [operator.truth({**inputs, name: x + s * step, "y": y})["loss"] for s in (1, -1)]
        slope = 2 * (truth[f"d{name}"] * step).sum()
        assert float(ends[0] - ends[1]) == pytest.approx(slope, rel=1e-4)


@pytest.mark.usefixtures("in_this_process")
def test_other_cases_of_a_file_are_kept(app: typer.Typer, tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    names = [case.name for case in rows.SUITES["softmax"].cases]

    def bench(*options: str) -> Any:
        fixed = ["bench", "softmax", "--quick", "--repeats", "1", "--json", str(target)]
        return CliRunner().invoke(app, [*fixed, *options])

    for name in (names[4], names[0], names[4]):
        assert bench("--keep", "--case", name).exit_code == 0
    written = json.loads(target.read_text())
    assert [run["case"]["name"] for run in written["runs"]] == [names[0], names[4]]
    refused = bench("--keep", "--case", names[0], "--threads", "2")
    assert refused.exit_code == 2 and "--keep" in refused.stderr
    assert bench("--case", names[0]).exit_code == 0
    assert len(json.loads(target.read_text())["runs"]) == 1
    assert "--case must be part of one of" in bench("--case", "nothing").stderr
