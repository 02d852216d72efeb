"""The grid of derivatives: it passes, it flags what is wrong, and its page is in step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tilewise import dispatch, verify
from tilewise.base.operator import Implementation
from tilewise.ops.attention import reference
from tilewise.verify import sweep
from tilewise.verify.grid import END, START, Cell, Grid, Measured, insert
from tilewise.verify.oracle import Question, consult
from tilewise.verify.textbook import Textbook

FUNCTIONS = {name: getattr(reference, name) for name in ("forward", "vjp", "jvp", "vjp_jvp")}
PAGE = Path(__file__).parents[1] / "docs" / "derivatives.md"


@pytest.fixture(scope="module")
def grid():
    pytest.importorskip("torch")
    return verify.derivatives()


def test_every_derivative_passes_with_every_option(grid):
    assert grid.passed, grid.failures
    assert {cell.status for cell in grid.cells} == {"passed"}
    assert grid.columns == list(sweep.COLUMNS)
    assert grid.rows == [case.name for case in sweep.ROWS]


def test_central_differences_are_taken_with_no_option_and_with_all(grid):
    taken = {
        (cell.row, cell.column)
        for cell in grid.cells
        if cell.measured["float64"].difference is not None
    }
    columns = [column for column in sweep.COLUMNS if column != "vmap"]
    assert taken == {(row, column) for row in ("no option", "everything") for column in columns}


def test_every_result_of_a_derivative_is_compared(grid):
    compared = {cell.column: set(cell.measured["float32"].errors) for cell in grid.cells[-5:]}
    inputs = {"q", "k", "v", "bias", "sinks"}
    assert compared["backward"] == {f"d{name}" for name in inputs}
    assert compared["jvp"] == {"to", "tlse"}
    assert compared["jvp of vjp"] == {f"td{name}" for name in inputs}
    assert compared["double backward"] == compared["jvp of vjp"] | compared["jvp"]
    assert compared["vmap"] == compared["backward"] | {"o", "lse"}


@pytest.mark.parametrize("case", sweep.ROWS, ids=[case.name for case in sweep.ROWS])
def test_textbook_and_reference_agree_on_the_forward_pass(case):
    torch = pytest.importorskip("torch")
    problem = case.problem()
    names = [name for name in ("q", "k", "v", "bias", "sinks") if name in problem.arrays]
    inputs = [torch.from_numpy(problem.arrays[name].astype(np.float64)) for name in names]
    o, lse = Textbook(problem, names, lse=True)(*inputs)
    truth = consult(Question.of(problem, tangents=False)).truth
    np.testing.assert_allclose(case.in_order("o", o.numpy()), truth["o"], rtol=0, atol=1e-14)
    np.testing.assert_allclose(lse.numpy(), truth["lse"], rtol=1e-14, atol=1e-14)


def plant(monkeypatch, name, **functions):
    """Register an implementation under a name of its own."""
    module = SimpleNamespace(IMPLEMENTATION=Implementation(name, **functions))
    monkeypatch.setitem(sys.modules, f"planted_{name}", module)
    monkeypatch.setitem(dispatch.TABLE["attention"], name, f"planted_{name}")


def wrong(function):
    """Make every result of a function wrong by one part in 10,000."""

    def spoil(*arguments):
        results = function(*arguments)
        return type(results)(*(None if x is None else x * x.dtype.type(1.0001) for x in results))

    return spoil


def failed_columns(grid):
    return {cell.column for cell in grid.cells if cell.status == "failed"}


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("vjp", {"backward", "vmap"}),
        ("jvp", {"jvp", "double backward", "jvp of vjp"}),
        ("vjp_jvp", {"double backward", "jvp of vjp"}),
    ],
)
def test_planted_bug_is_flagged_in_the_columns_that_use_it(monkeypatch, kind, columns):
    pytest.importorskip("torch")
    plant(monkeypatch, f"wrong_{kind}", **{**FUNCTIONS, kind: wrong(FUNCTIONS[kind])})
    assert failed_columns(verify.derivatives(f"wrong_{kind}", "ALiBi")) == columns


def test_wrong_gradients_are_far_from_central_differences_too(monkeypatch):
    pytest.importorskip("torch")
    plant(monkeypatch, "wrong_gradients", **{**FUNCTIONS, "vjp": wrong(reference.vjp)})
    grid = verify.derivatives("wrong_gradients", "no option")
    assert "double backward" in failed_columns(grid)
    assert any("from central differences" in failure for failure in grid.failures)


def test_what_is_not_provided_is_a_failure(monkeypatch):
    plant(monkeypatch, "without_jvp", forward=reference.forward, vjp=reference.vjp)
    grid = verify.derivatives("without_jvp", "no option", torch=False)
    assert failed_columns(grid) == {"jvp", "jvp of vjp"}
    assert "no option, jvp: float32 raised Unsupported: attention: " in grid.failures[0]


def test_without_pytorch_three_columns_are_compared_with_the_reference():
    grid = verify.derivatives("reference", torch=False)
    assert grid.passed, grid.failures
    empty = {cell.column for cell in grid.cells if cell.status == "skipped"}
    assert empty == {"double backward", "vmap"}
    assert grid.missing == (
        "double backward and vmap need PyTorch, which is not installed (pip install torch)"
    )
    assert grid.truth == "the float64 reference"


def test_rows_are_selected_by_name():
    grid = verify.derivatives("reference", "bias", torch=False)
    assert grid.rows == [case.name for case in sweep.ROWS if "bias" in case.name]
    with pytest.raises(ValueError, match="verify: select must be part of an option's name"):
        verify.derivatives("reference", "no such option", torch=False)


def test_progress_counts_every_row():
    seen = []
    verify.derivatives("reference", "causal", lambda *step: seen.append(step), torch=False)
    assert seen == [(0, 2, "causal"), (1, 2, "causal, top left")]


def some_grid(error, difference=None):
    good, bad = Measured({"dq": (1e-7, 2e-7)}), Measured({"dq": (error, 2e-7)}, difference)
    cells = (
        Cell("causal", "backward", {"float32": good, "float64": bad}),
        Cell("causal", "vmap", {}),
    )
    return Grid("own", "the truth", "vmap needs more", cells)


@pytest.mark.parametrize(
    ("error", "difference", "failure"),
    [
        (3e-7, None, "dq: error 3e-07, allowed 2e-07"),
        (np.nan, None, "dq: error nan, allowed 2e-07"),
        (1e-7, 1e-7, "1e-07 from central differences"),
    ],
)
def test_one_wrong_figure_fails_the_grid(error, difference, failure):
    grid = some_grid(error, difference)
    assert not grid.passed
    assert grid.failures == [f"causal, backward: float64 {failure}"]
    assert some_grid(1e-7, 1e-9).passed


def test_grid_is_json():
    data = json.loads(some_grid(np.inf, 1e-9).as_json())
    assert data["passed"] is False
    cell = data["cells"][0]
    assert (cell["option"], cell["derivative"], cell["status"]) == ("causal", "backward", "failed")
    assert cell["measured"]["float64"] == {
        "errors": {"dq": {"error": "inf", "allowed": 2e-7}},
        "central differences": 1e-9,
    }
    assert data["cells"][1]["status"] == "skipped"


def test_grid_is_a_markdown_table():
    lines = some_grid(3e-7).as_markdown().splitlines()
    assert lines[:3] == [
        "| option | backward | vmap |",
        "|---|---|---|",
        "| causal | ✗ 1e-7 3e-7 | - |",
    ]


def test_table_replaces_what_stands_between_the_markers():
    page = f"before\n{START}old\n{END}\nafter\n"
    once = insert(page, "| new |\n")
    assert once == f"before\n{START}\n| new |\n\n{END}\nafter\n"
    assert insert(once, "| new |\n") == once
    assert insert("no markers", "| new |\n") == "| new |\n"
    with pytest.raises(ValueError, match="a page needs both"):
        insert(f"before\n{START}old\n", "| new |\n")


def test_page_has_the_rows_and_columns_of_the_code():
    table = PAGE.read_text("utf-8").split(START)[1].split(END)[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert rows[0] == ["option", *sweep.COLUMNS]
    assert [row[0] for row in rows[2:]] == [case.name for case in sweep.ROWS]
    assert all(cell.startswith("✓ ") for row in rows[2:] for cell in row[1:])
