"""`tilewise verify` and `tilewise info` as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tilewise
from tilewise.cli import app, main

OWN = """
import numpy as np

def attention(q, k, v, *, softmax_scale=None):
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if q.shape[1] != k.shape[1]:
        raise NotImplementedError("grouped heads")
    s = q @ k.swapaxes(-1, -2) * q.dtype.type(scale)
    w = np.exp(s - s.max(axis=-1, keepdims=True))
    return w / w.sum(axis=-1, keepdims=True) @ v

def wrong(q, k, v):
    return attention(q, k, v) + q.dtype.type(1e-3)
"""


def invoke(*arguments):
    return CliRunner().invoke(app, ["verify", *arguments], terminal_width=120)


def run_main(monkeypatch, *arguments):
    """Return the exit status of the entry point."""
    monkeypatch.setattr(sys, "argv", ["tilewise", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_attention.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("own_attention", None)


def test_a_passing_audit_exits_with_0_and_shows_its_groups():
    result = invoke("attention", "--implementation", "reference", "--select", "heads/multi")
    assert result.exit_code == 0, result.output
    assert "heads" in result.output
    assert "attention, reference: 2 cases, 2 passed, 0 failed, 0 skipped" in result.output


def test_own_function_passes_and_skips_what_it_does_not_take(own):
    result = invoke("own_attention:attention", "--select", "size/more")
    assert result.exit_code == 0, result.output
    assert "2 passed, 0 failed" in result.output
    assert "no gradients were given" in result.output


def test_a_failing_audit_exits_with_1_and_names_the_failure(own):
    result = invoke("own_attention:wrong", "--select", "size/more")
    assert result.exit_code == 1
    assert "failed size/more-keys: o: error" in result.output


def test_own_module_is_found_in_the_working_directory(own):
    code = "import sys; from tilewise.cli import main; main()"
    command = ["verify", "own_attention:attention", "--select", "size/one", "--json", "-"]
    package = str(Path(tilewise.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        env={**os.environ, "PYTHONPATH": package},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["subject"] == "own_attention:attention"
    assert not done.stderr


def test_json_goes_to_a_file(tmp_path):
    file = tmp_path / "report.json"
    result = invoke("--implementation", "reference", "--select", "heads/one", "--json", str(file))
    assert result.exit_code == 0, result.output
    data = json.loads(file.read_text())
    assert data["passed"] is True
    assert data["tilewise"] == tilewise.__version__
    assert [case["name"] for case in data["cases"]] == ["heads/one-head"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing"], "operator must be 'attention' or package.module:function, got 'nothing'"),
        (["--implementation", "fast"], "implementation must be one of 'cpu', 'reference'"),
        (["--select", "no such case"], "select must be part of a case's name"),
        (["json:no_such"], "'json:no_such' must be importable"),
        (["json:__name__"], "'json:__name__' must be a function, got str"),
    ],
)
def test_a_wrong_call_is_one_line_and_exits_with_2(monkeypatch, capsys, arguments, text):
    assert run_main(monkeypatch, "verify", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert text in error
    assert error.startswith("tilewise: ")
    assert "\n" not in error


def test_an_unwritable_report_is_refused_before_the_audit(monkeypatch, capsys, tmp_path):
    missing = tmp_path / "no" / "report.json"
    assert run_main(monkeypatch, "verify", "--json", str(missing)) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_info_shows_version_targets_and_peers():
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    assert tilewise.__version__ in result.output
    for word in ("numpy", "python", "processor", "system"):
        assert word in result.output
