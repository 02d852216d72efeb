"""`tilewise verify`: the audit of an implementation, or of a function of your own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilewise.cli.files import replace_text

if TYPE_CHECKING:
    from tilewise.verify import Report

__all__ = ["register", "verify"]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("verify")(verify)


def verify(
    operator: Annotated[
        str,
        typer.Argument(help="attention, or a function of your own as package.module:function."),
    ] = "attention",
    implementation: Annotated[
        str | None, typer.Option("--implementation", help="cpu or reference.")
    ] = None,
    vjp: Annotated[
        str | None,
        typer.Option("--vjp", help="Gradients of your own function, package.module:function."),
    ] = None,
    select: Annotated[
        str | None, typer.Option("--select", help="Only cases whose name contains this.")
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write every figure there; - is the screen."),
    ] = None,
) -> None:
    """Audit attention: errors against float64, gradients, masks, edge cases, same bits.

    The exit status is 0 if everything passed, 1 if something failed, 2 for a wrong call.
    """
    if json_file not in (None, "-"):
        _check_writable(Path(json_file))
    # A function of the user's own is looked for where the command is run, as python -m does.
    sys.path.insert(0, os.getcwd())
    report = _run(operator, implementation, vjp, select)
    if json_file == "-":
        typer.echo(report.as_json())
    else:
        _show(report)
        if json_file is not None:
            replace_text(Path(json_file), report.as_json() + "\n")
    if not report.passed:
        raise typer.Exit(1)


def _run(operator: str, implementation: str | None, vjp: str | None, select: str | None) -> Report:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from tilewise.verify import run

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        return run(operator, implementation, select, show, vjp=vjp)


def _show(report: Report) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for part in report.renderables():
        console.print(part)


def _check_writable(path: Path) -> None:
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written", param_hint="--json")
