"""`tilewise verify` and `tilewise info` as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import tilewise
from tilewise import dispatch
from tilewise.base.operator import Implementation
from tilewise.cli import app, main
from tilewise.ops.attention import reference
from tilewise.verify.grid import END, START

OWN = """
import numpy as np

def jvp(tq, tk, tv, q, k, v, o, stats, *, softmax_scale=None):
    scale = q.dtype.type(q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    s = q @ k.swapaxes(-1, -2) * scale
    w = np.exp(s - s.max(axis=-1, keepdims=True))
    p = w / w.sum(axis=-1, keepdims=True)
    ts = (tq @ k.swapaxes(-1, -2) + q @ tk.swapaxes(-1, -2)) * scale
    mu = (p * ts).sum(axis=-1, keepdims=True)
    return (p * ts) @ v - mu * o + p @ tv, mu[..., 0]

def attention(q, k, v, *, softmax_scale=None):
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if q.shape[1] != k.shape[1]:
        raise NotImplementedError("grouped heads")
    s = q @ k.swapaxes(-1, -2) * q.dtype.type(scale)
    w = np.exp(s - s.max(axis=-1, keepdims=True))
    return w / w.sum(axis=-1, keepdims=True) @ v

def of_tensors(q, k, v):
    s = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    return (s.softmax(-1) @ v.float()).to(q.dtype)

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
    for kind in ("vjp", "jvp", "vjp_jvp"):
        assert f"no {kind} was given" in result.output


def test_tangents_of_an_own_function_are_audited(own):
    command = ["own_attention:attention", "--jvp", "own_attention:jvp", "--select", "size/more"]
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert "no jvp was given" not in result.output
    assert "to 0." in result.output
    assert "tlse 0." in result.output


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


def test_the_grid_of_derivatives_is_shown_and_exits_with_0():
    pytest.importorskip("torch")
    result = invoke("--derivatives", "--implementation", "reference", "--select", "softcap")
    assert result.exit_code == 0, result.output
    assert "derivatives of attention, reference: 5 passed, 0 failed, 0 skipped" in result.output
    assert "differentiated by PyTorch" in result.output


def test_dtypes_are_audited_one_after_another():
    command = ["--implementation", "reference", "--select", "heads/one", "--dtype", "bfloat16"]
    result = invoke(*command, "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert "heads bfloat16" in result.output
    line = "attention in bfloat16, float16, reference: 2 cases, 2 passed, 0 failed, 0 skipped"
    assert line in " ".join(result.output.split())


def test_own_function_of_tensors_is_audited_in_16_bits(own):
    pytest.importorskip("torch")
    result = invoke(
        "own_attention:of_tensors", "--tensors", "--dtype", "bfloat16", "--select", "size/more"
    )
    assert result.exit_code == 0, result.output
    assert "dv 1.0" in result.output


def test_the_grid_of_derivatives_in_16_bits(without_torch):
    command = ["--derivatives", "--implementation", "reference", "--select", "softcap"]
    result = invoke(*command, "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert "errors in float16, relative to" in result.output


@pytest.fixture
def without_torch(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "tilewise.verify.sweep.find_spec", lambda name: None if name == "torch" else found(name)
    )


def test_the_grid_says_which_columns_need_pytorch(without_torch):
    result = invoke("--derivatives", "--implementation", "reference", "--select", "softcap")
    assert result.exit_code == 0, result.output
    assert "double backward and vmap need PyTorch, which is not installed" in result.output
    assert "3 passed, 0 failed, 2 skipped" in result.output


def test_a_grid_with_a_wrong_cell_exits_with_1(without_torch, monkeypatch):
    first = Implementation("first_only", reference.forward, reference.vjp)
    monkeypatch.setitem(dispatch.TABLE["attention"], "first_only", "first_only_attention")
    monkeypatch.setitem(sys.modules, "first_only_attention", SimpleNamespace(IMPLEMENTATION=first))
    result = invoke("--derivatives", "--implementation", "first_only", "--select", "softcap")
    assert result.exit_code == 1
    assert "failed softcap, jvp: float32 raised Unsupported" in result.output


def test_the_grid_goes_to_files_and_between_the_markers_of_a_page(without_torch, tmp_path):
    page, figures = tmp_path / "page.md", tmp_path / "grid.json"
    page.write_text(f"# Title\n\n{START}{END}\n\nMore.\n")
    command = ["--derivatives", "--implementation", "reference", "--select", "softcap"]
    result = invoke(*command, "--markdown", str(page), "--json", str(figures))
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert text.startswith(f"# Title\n\n{START}\n| option | backward |")
    assert text.endswith(f"\n{END}\n\nMore.\n")
    assert json.loads(figures.read_text())["passed"] is True
    alone = invoke(*command, "--markdown", "-")
    assert alone.output.startswith("| option | backward |")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--markdown", "grid.md"], "comes with --derivatives"),
        (["json:dumps", "--derivatives"], "is for attention only"),
        (["--derivatives", "--jvp", "json:dumps"], "comes with a function of your own"),
        (["--derivatives", "--tensors"], "comes with a function of your own"),
        (["--derivatives", "--dtype", "half"], "dtype must be float64, float32, bfloat16 or"),
        (["--derivatives", "--json", "-", "--markdown", "-"], "only one of --json and --markdown"),
        (["--derivatives", "--select", "no such option"], "select must be part of an option's"),
        (["--derivatives", "--implementation", "fast"], "implementation must be one of"),
    ],
)
def test_a_wrong_call_of_the_grid_exits_with_2(monkeypatch, capsys, tmp_path, arguments, text):
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "verify", *arguments) == 2
    assert text in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing"], "package.module:function, got 'nothing'"),
        (["--implementation", "fast"], "implementation must be one of 'cpu', 'reference'"),
        (["--select", "no such case"], "select must be part of a case's name"),
        (["--dtype", "half"], "dtype must be float64, float32, bfloat16 or float16, got 'half'"),
        (["--tensors"], "tensors must come with a function"),
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
    assert "JAX on CUDA" in result.output
    assert result.exit_code == 0, result.output
    assert tilewise.__version__ in result.output
    for word in ("numpy", "python", "processor", "system"):
        assert word in result.output
