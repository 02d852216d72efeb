"""The examples run, with tiny settings, and their own comparisons hold."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tilewise as tw

torch = pytest.importorskip("torch")

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
EXAMPLES = Path(__file__).parents[1] / "examples"
LOCAL = (
    "fresh",
    "gpt",
    "shapes",
    "set_transformer",
    "char_gpt",
    "mean_flow",
    "largest_eigenvalue",
    "flax_gpt",
)


def run_here(function: Callable[..., Any], *arguments: Any, report: Callable[[Any], None]) -> Any:
    """What `fresh.run` does, without a process of its own: tests need no honest peaks."""
    return function(*arguments, report=report)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Import an example by name; afterwards it and its settings are gone."""
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads(), tw.get_num_threads()

    def import_example(name: str) -> Any:
        module = importlib.import_module(name)
        if hasattr(module, "plot") and not HAS_MATPLOTLIB:
            monkeypatch.setattr(module, "plot", lambda *arguments: None)
        return module

    yield import_example
    torch.set_num_threads(threads[0])
    tw.set_num_threads(threads[1])
    for name in LOCAL:
        sys.modules.pop(name, None)


def is_picture(path: Path) -> bool:
    return not HAS_MATPLOTLIB or path.read_bytes().startswith(b"\x89PNG")


def test_char_gpt_learns_alike_with_both_attentions(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    char_gpt = load("char_gpt")
    found: dict[str, Any] = {}

    def show(screen: Any, runs: dict[str, Any], settings: Any) -> None:
        found.update(runs)

    monkeypatch.setattr(char_gpt.fresh, "run", run_here)
    monkeypatch.setattr(char_gpt, "show", show)
    picture = tmp_path / "char_gpt.png"
    char_gpt.main(
        steps=5, context=37, batch=3, layers=2, width=20, heads=2, sample=7, threads=1, out=picture
    )
    assert set(found) == {"tilewise", "sdpa"}
    assert char_gpt.difference(found["tilewise"], found["sdpa"]) < 1e-5
    assert found["tilewise"].losses[-1] < found["tilewise"].losses[0]
    assert len(found["tilewise"].text) == len("Alice ") + 7
    assert is_picture(picture)


def test_char_gpt_is_the_same_twice(load: Callable[[str], Any]) -> None:
    char_gpt = load("char_gpt")
    settings = char_gpt.Settings(3, 17, 2, 1, 12, 2, sample=5, threads=1)
    runs = [char_gpt.train("tilewise", settings, lambda loss: None) for _ in range(2)]
    assert runs[0]["losses"] == runs[1]["losses"]
    assert runs[0]["text"] == runs[1]["text"]


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="draws a picture")
def test_char_gpt_runs_as_a_program(tmp_path: Path) -> None:
    tiny = "--attention tilewise --steps 2 --context 13 --batch 2 --layers 1 --width 8 --heads 2"
    picture = tmp_path / "char_gpt.png"
    command = [
        sys.executable,
        EXAMPLES / "char_gpt.py",
        *tiny.split(),
        "--threads=1",
        "--out",
        picture,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "time per step" in done.stdout
    assert is_picture(picture)


def test_a_transformer_of_flax_learns_alike_with_both_attentions(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flax", reason="Flax is not installed")
    monkeypatch.setenv("NPROC", "1")
    flax_gpt, found = load("flax_gpt"), []
    monkeypatch.setattr(flax_gpt, "plot", lambda runs, path: found.append(runs))
    flax_gpt.main(steps=4, context=19, batch=3, layers=2, width=12, heads=2, out=tmp_path / "x.png")
    (runs,) = found
    assert flax_gpt.difference(runs["tilewise"], runs["Flax"]) < 1e-5
    assert runs["tilewise"].losses[-1] < runs["tilewise"].losses[0]


def test_mean_flow_takes_the_derivative_that_the_formula_has(load: Callable[[str], Any]) -> None:
    mean_flow = load("mean_flow")
    settings = mean_flow.Settings(sets=2, known=11, made=13, width=10, heads=2, layers=2)
    assert mean_flow.derivative_error(settings, mean_flow.ATTENTIONS["tilewise"]) < 1e-5


def test_mean_flow_runs(
    load: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "mean_flow.png"
    load("mean_flow").main(steps=10, known=5, made=7, threads=1, out=picture)
    said = capsys.readouterr().out
    assert "energy distance" in said
    assert "one step" in said
    assert is_picture(picture)


def test_one_step_from_noise_follows_the_velocity_once(load: Callable[[str], Any]) -> None:
    mean_flow = load("mean_flow")
    noise = torch.tensor([[[3.0, -2.0], [0.5, 4.0]]])

    def velocity(known: Any, z: Any, r: Any, t: Any) -> Any:
        return 0.25 * z + (t - r)

    got = mean_flow.generate(velocity, noise, noise, 1)
    torch.testing.assert_close(got, 0.75 * noise - 1)


def test_eigenvalues_agree_both_ways_and_with_the_formula(
    load: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = load("largest_eigenvalue")
    monkeypatch.setattr(example.fresh, "run", run_here)
    picture = tmp_path / "eigenvalue.png"
    example.main(lengths="19,41", agree_at=23, steps=5, width=8, heads=2, threads=1, out=picture)
    said = capsys.readouterr().out
    assert "differ" not in said.split("relative difference")[1]
    assert "At 41 tokens the largest eigenvalue is" in said
    assert is_picture(picture)


def test_lanczos_iteration_finds_the_largest_eigenvalue(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load("largest_eigenvalue")
    curvature = torch.tensor([3.0, -7.0, 2.0])
    found = (lambda w: (curvature * w * w).sum() / 2), torch.zeros(3), torch.tensor([1.0, 0, 0])
    monkeypatch.setattr(example, "loss_of", lambda job: found)
    for way in (example.FORWARD, example.REVERSE):
        job = example.Job("tilewise", way, 5, 20, 1, 1, 1, 0)
        got = example.iterate(job, lambda value: None)
        assert got.values[-1] == pytest.approx(3, rel=1e-5)
        assert got.attention_share == pytest.approx(1, rel=1e-5)


HELPERS = """
import os

def counts(until, report):
    for i in range(until):
        report(i)
    return os.getpid()

def fails(report):
    raise ValueError("no such thing")

def dies(report):
    os._exit(3)
"""


@pytest.fixture
def helpers(load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "helpers_of_fresh.py").write_text(HELPERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("helpers_of_fresh")
    sys.modules.pop("helpers_of_fresh", None)


def test_fresh_process_reports_and_returns(load: Callable[[str], Any], helpers: Any) -> None:
    reports: list[int] = []
    pid = load("fresh").run(helpers.counts, 3, report=reports.append)
    assert reports == [0, 1, 2]
    assert pid != os.getpid()


def test_fresh_process_tells_what_went_wrong(load: Callable[[str], Any], helpers: Any) -> None:
    fresh = load("fresh")
    with pytest.raises(RuntimeError, match="no such thing"):
        fresh.run(helpers.fails)
    with pytest.raises(RuntimeError, match="ended with status 3"):
        fresh.run(helpers.dies)
