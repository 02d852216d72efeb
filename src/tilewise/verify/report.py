"""What an audit found, as data, as JSON and as a table."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewise.hardware import machine

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["FAILED", "PASSED", "SKIPPED", "CaseResult", "Check", "Report"]

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Check:
    """One thing that was checked about one case.

    Attributes:
        name: A result such as ``dq``, or a property such as ``same bits twice``.
        status: "passed", "failed" or "skipped".
        error: Relative error against the oracle, for a result.
        allowed: The largest error that passes.
        yardstick: Error of the straightforward computation in float32 plus one rounding, for a
            float32 result.
        ulp: Largest error in units of the last place.
        bias: Mean signed error over the root mean square error.
        detail: Why it failed or was skipped.
    """

    name: str
    status: str
    error: float | None = None
    allowed: float | None = None
    yardstick: float | None = None
    ulp: float | None = None
    bias: float | None = None
    detail: str = ""

    @property
    def share(self) -> float:
        """The error as a part of what is allowed; 0 for a property."""
        if self.error is None or not self.allowed:
            return 0.0
        return self.error / self.allowed if math.isfinite(self.error) else math.inf


@dataclass(frozen=True)
class CaseResult:
    """What was checked about one case in one dtype, and how long that took."""

    name: str
    group: str
    checks: tuple[Check, ...]
    seconds: float
    dtype: str

    @property
    def status(self) -> str:
        """Failed if any check failed, skipped if all were, otherwise passed."""
        states = {check.status for check in self.checks}
        if FAILED in states:
            return FAILED
        return SKIPPED if states == {SKIPPED} else PASSED


@dataclass(frozen=True)
class Report:
    """The findings of an audit.

    Attributes:
        operator: Name of the operator.
        subject: Name of the implementation or function.
        cases: One result per case, in the order of the cases.
        dtypes: In which dtypes every case was tried; empty where each had its own.
    """

    operator: str
    subject: str
    cases: tuple[CaseResult, ...]
    dtypes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether something was checked and nothing failed."""
        return not self.failures and any(case.status == PASSED for case in self.cases)

    @property
    def failures(self) -> tuple[tuple[CaseResult, Check], ...]:
        """Every failed check with its case."""
        return tuple(
            (case, check) for case in self.cases for check in case.checks if check.status == FAILED
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many cases passed, failed and were skipped."""
        found = Counter(case.status for case in self.cases)
        return {status: found[status] for status in (PASSED, FAILED, SKIPPED)}

    @property
    def ratios(self) -> dict[str, float]:
        """For each result, its error over that of the straightforward computation plus a rounding.

        The geometric mean over the cases, in which the luck of single cases cancels: at most 1
        where an implementation is as accurate as the textbook. Results without an error are left
        out.
        """
        return self._ratios_of(self.cases)

    @property
    def ratios_by_dtype(self) -> dict[str, dict[str, float]]:
        """The ratios of the cases in each dtype, float64 left out."""
        names = dict.fromkeys(case.dtype for case in self.cases)
        found = {d: self._ratios_of([c for c in self.cases if c.dtype == d]) for d in names}
        return {dtype: ratios for dtype, ratios in found.items() if ratios}

    @staticmethod
    def _ratios_of(cases: Sequence[CaseResult]) -> dict[str, float]:
        logs: dict[str, list[float]] = {}
        for case in cases:
            for check in case.checks:
                if check.error and check.yardstick and math.isfinite(check.error):
                    logs.setdefault(check.name, []).append(math.log(check.error / check.yardstick))
        return {name: math.exp(sum(values) / len(values)) for name, values in logs.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data; numbers that are not finite become text."""
        import tilewise

        return {
            "operator": self.operator,
            "subject": self.subject,
            "passed": self.passed,
            "counts": self.counts,
            "error_over_straightforward": self.ratios,
            "error_over_straightforward_by_dtype": self.ratios_by_dtype,
            "tilewise": tilewise.__version__,
            "versions": machine.versions("numpy"),
            "machine": machine.describe(),
            "cases": [
                {
                    "name": case.name,
                    "group": case.group,
                    "dtype": case.dtype,
                    "status": case.status,
                    "seconds": round(case.seconds, 4),
                    "checks": [_as_dict(check) for check in case.checks],
                }
                for case in self.cases
            ],
        }

    def as_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(self.as_dict(), indent=1, allow_nan=False)

    def renderables(self) -> Iterator[RenderableType]:
        """Return what a rich console prints: a table of the groups, the failures, a verdict."""
        from rich.markup import escape
        from rich.text import Text

        yield self._table()
        skipped = _reasons(self.cases)
        for reason, count in skipped.most_common():
            yield Text(f"skipped: {count} x {reason}", style="yellow")
        for case, check in self.failures:
            name = f"{case.name} in {case.dtype}" if self.dtypes else case.name
            yield Text.from_markup(f"[red]failed[/red] {escape(name)}: {escape(check.detail)}")
        for dtype, ratios in self.ratios_by_dtype.items():
            label = f" in {dtype}" if self.dtypes else ""
            shown = "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            yield Text(f"mean error over straightforward + one rounding{label}: {shown}")
        counts, seconds = self.counts, sum(case.seconds for case in self.cases)
        label = f" in {', '.join(self.dtypes)}" if self.dtypes else ""
        line = f"{self.operator}{label}, {self.subject}: {len(self.cases)} cases, "
        line += ", ".join(f"{count} {status}" for status, count in counts.items())
        yield Text(f"{line} in {seconds:.1f} s", style="bold green" if self.passed else "bold red")

    def _table(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("group", no_wrap=True)
        for column in ("cases", "checks", "failed", "error", "error /\nallowed"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("worst in", overflow="fold")
        rows: dict[str, list[CaseResult]] = {}
        for case in self.cases:
            several = len(self.dtypes) > 1
            rows.setdefault(f"{case.group} {case.dtype}" if several else case.group, []).append(
                case
            )
        for label, cases in rows.items():
            table.add_row(*self._row(label, cases))
        return table

    @staticmethod
    def _row(label: str, cases: Sequence[CaseResult]) -> tuple[str, ...]:
        pairs = [(case, check) for case in cases for check in case.checks]
        failed = sum(check.status == FAILED for _, check in pairs)
        done = sum(check.status != SKIPPED for _, check in pairs)
        measured = [pair for pair in pairs if pair[1].error is not None]
        shown = ("", "", "")
        if measured:
            case, check = max(measured, key=lambda pair: pair[1].share)
            where = f"{case.name.partition('/')[2]}: {check.name}"
            shown = (f"{check.error:.1e}", f"{check.share:.2f}", where)
        mark = f"[red]{failed}[/red]" if failed else "0"
        return (label, str(len(cases)), str(done), mark, *shown)


def _as_dict(check: Check) -> dict[str, Any]:
    found: dict[str, Any] = {"name": check.name, "status": check.status}
    for name in ("error", "allowed", "yardstick", "ulp", "bias"):
        value = getattr(check, name)
        if value is not None:
            found[name] = float(value) if np.isfinite(value) else str(value)
    return found | ({"detail": check.detail} if check.detail else {})


def _reasons(cases: tuple[CaseResult, ...]) -> Counter[str]:
    return Counter(
        check.detail for case in cases for check in case.checks if check.status == SKIPPED
    )
