"""What was found about each derivative with each option, as data, JSON, Markdown and a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewise.hardware import machine

from .report import FAILED, PASSED, SKIPPED

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["END", "START", "Cell", "Grid", "Measured", "insert"]

ALLOWED_DIFFERENCE = 1e-8
"""Central differences of fourth order in float64, with steps of 1e-3, are better than this."""
START, END = "<!-- derivatives:start -->\n", "<!-- derivatives:end -->"


@dataclass(frozen=True)
class Measured:
    """The errors of one derivative with one option in one dtype.

    Attributes:
        errors: For each result its relative error and the largest one that passes.
        difference: Relative error against central differences, or None where none were taken.
        problem: What else is wrong, or an empty text.
    """

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    difference: float | None = None
    problem: str = ""

    @property
    def error(self) -> float:
        """The largest error."""
        return max((error for error, _ in self.errors.values()), default=0.0)

    @property
    def failure(self) -> str:
        """What is wrong, or an empty text."""
        wrong = [
            f"{name}: error {error:.3g}, allowed {allowed:.3g}"
            for name, (error, allowed) in self.errors.items()
            if not error <= allowed
        ]
        if self.difference is not None and not self.difference <= ALLOWED_DIFFERENCE:
            wrong.append(f"{self.difference:.3g} from central differences")
        return self.problem or ", ".join(wrong)


@dataclass(frozen=True)
class Cell:
    """One derivative with one option.

    Attributes:
        row: The option.
        column: The derivative.
        measured: By dtype; empty where the derivative was not tried.
    """

    row: str
    column: str
    measured: dict[str, Measured]

    @property
    def failures(self) -> list[str]:
        """What is wrong, with the dtype."""
        found = ((dtype, part.failure) for dtype, part in self.measured.items())
        return [f"{dtype} {failure}" for dtype, failure in found if failure]

    @property
    def status(self) -> str:
        """Passed, failed or skipped."""
        if not self.measured:
            return SKIPPED
        return FAILED if self.failures else PASSED

    @property
    def text(self) -> str:
        """The errors, one for each dtype."""
        return " ".join(_short(part.error) for part in self.measured.values()) or "-"


@dataclass(frozen=True)
class Grid:
    """Every derivative with every option.

    Attributes:
        subject: Name of the implementation.
        truth: What the errors are relative to.
        missing: Why columns are empty, or an empty text.
        cells: Row by row.
    """

    subject: str
    truth: str
    missing: str
    cells: tuple[Cell, ...]

    @property
    def rows(self) -> list[str]:
        """The options in their order."""
        return list(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def columns(self) -> list[str]:
        """The derivatives in their order."""
        return list(dict.fromkeys(cell.column for cell in self.cells))

    @property
    def passed(self) -> bool:
        """Whether something was tried and nothing failed."""
        states = {cell.status for cell in self.cells}
        return PASSED in states and FAILED not in states

    @property
    def failures(self) -> list[str]:
        """Everything that is wrong, with its place."""
        return [
            f"{cell.row}, {cell.column}: {failure}"
            for cell in self.cells
            for failure in cell.failures
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the grid as plain data; numbers that are not finite become text."""
        import tilewise

        return {
            "operator": "attention",
            "subject": self.subject,
            "passed": self.passed,
            "truth": self.truth,
            "missing": self.missing,
            "tilewise": tilewise.__version__,
            "versions": machine.versions("numpy", "torch"),
            "machine": machine.describe(),
            "cells": [
                {
                    "option": cell.row,
                    "derivative": cell.column,
                    "status": cell.status,
                    "measured": {dtype: _as_dict(part) for dtype, part in cell.measured.items()},
                }
                for cell in self.cells
            ],
        }

    def as_json(self) -> str:
        """Return the grid as JSON."""
        return json.dumps(self.as_dict(), indent=1, allow_nan=False)

    def as_markdown(self) -> str:
        """Return the grid as a Markdown table with what it was measured on."""
        import tilewise

        lines = [f"| option | {' | '.join(self.columns)} |", "|---" * (len(self.columns) + 1) + "|"]
        marks = {PASSED: "✓ ", FAILED: "✗ ", SKIPPED: ""}
        for row in self.rows:
            cells = [f"{marks[cell.status]}{cell.text}" for cell in self._of(row)]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        about, versions = machine.describe(), machine.versions("numpy", "torch")
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines += ["", f"tilewise {tilewise.__version__}, {self.subject}; {shown};"]
        lines.append(f"{about['processor']}. Errors are relative to {self.truth}.")
        return "\n".join(lines) + "\n"

    def renderables(self) -> Iterator[RenderableType]:
        """Return what a rich console prints: the table, the failures, a verdict."""
        from rich.markup import escape
        from rich.text import Text

        yield self._table()
        if self.missing:
            yield Text(self.missing, style="yellow")
        for failure in self.failures:
            yield Text.from_markup(f"[red]failed[/red] {escape(failure)}")
        counts = {
            status: sum(cell.status == status for cell in self.cells)
            for status in (PASSED, FAILED, SKIPPED)
        }
        line = f"derivatives of attention, {self.subject}: "
        line += ", ".join(f"{count} {status}" for status, count in counts.items())
        yield Text(line, style="bold green" if self.passed else "bold red")
        dtypes = dict.fromkeys(dtype for cell in self.cells for dtype in cell.measured)
        yield Text(f"errors in {' and '.join(dtypes)}, relative to {self.truth}")

    def _table(self) -> Table:
        from rich import box
        from rich.table import Table

        # Narrow enough for 80 columns.
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("option", no_wrap=True)
        for column in self.columns:
            table.add_column(column.replace(" ", "\n", 1), justify="right", no_wrap=True)
        colours = {PASSED: "green", FAILED: "bold red", SKIPPED: "dim"}
        for row in self.rows:
            table.add_row(
                row, *(f"[{colours[cell.status]}]{cell.text}[/]" for cell in self._of(row))
            )
        return table

    def _of(self, row: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.row == row]


def insert(page: str, table: str) -> str:
    """Return a page in which the table stands between the markers, or the table where it has none.

    Raises:
        ValueError: The page has only one of the markers.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if bool(start) != bool(END in page):
        raise ValueError(f"a page needs both {START.strip()} and {END}, in this order")
    return f"{before}{START}\n{table}\n{END}{after}" if end else table


def _short(error: float) -> str:
    """Return a number with one digit: 2e-7."""
    mantissa, _, exponent = f"{error:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent and error else str(mantissa)


def _as_dict(part: Measured) -> dict[str, Any]:
    def number(x: float) -> float | str:
        return float(x) if np.isfinite(x) else str(x)

    errors = {
        name: {"error": number(error), "allowed": number(allowed)}
        for name, (error, allowed) in part.errors.items()
    }
    found: dict[str, Any] = {"errors": errors}
    if part.difference is not None:
        found["central differences"] = number(part.difference)
    return found | ({"problem": part.problem} if part.problem else {})
