"""`tilewise verify`: the audit of an implementation, or of a function of your own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewise.cli.files import replace_text

if TYPE_CHECKING:
    from tilewise.verify import Grid, Report
    from tilewise.verify.audit import Progress

__all__ = ["register", "verify"]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("verify")(verify)


def verify(
    operator: Annotated[
        str,
        typer.Argument(
            help="attention, softmax, log_softmax, logsumexp, cross_entropy, linear or "
            "linear_cross_entropy; or an attention of your own as package.module:function."
        ),
    ] = "attention",
    implementation: Annotated[
        str | None, typer.Option("--implementation", help="cpu, reference or triton.")
    ] = None,
    vjp: Annotated[
        str | None,
        typer.Option("--vjp", help="Gradients of your own function, package.module:function."),
    ] = None,
    jvp: Annotated[str | None, typer.Option("--jvp", help="Tangents of your own function.")] = None,
    vjp_jvp: Annotated[
        str | None, typer.Option("--vjp-jvp", help="Tangents of its gradients.")
    ] = None,
    dtypes: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            help="Try every case in float32, float64, bfloat16 or float16; can be repeated.",
        ),
    ] = None,
    tensors: Annotated[
        bool,
        typer.Option(
            "--tensors", help="Your own function takes PyTorch's tensors; autograd is its --vjp."
        ),
    ] = False,
    derivatives: Annotated[
        bool,
        typer.Option("--derivatives", help="Every derivative with every option, as a grid."),
    ] = False,
    select: Annotated[
        str | None, typer.Option("--select", help="Only cases whose name contains this.")
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write every figure there; - is the screen."),
    ] = None,
    markdown_file: Annotated[
        str | None,
        typer.Option(
            "--markdown",
            metavar="FILE",
            help="With --derivatives: write the grid there; - is the screen.",
        ),
    ] = None,
) -> None:
    """Audit an operator: errors against float64, derivatives, masks, edge cases, same bits.

    The exit status is 0 if everything passed, 1 if something failed, 2 for a wrong call.
    """
    for name, file in (("--json", json_file), ("--markdown", markdown_file)):
        if file not in (None, "-"):
            _check_writable(name, Path(file))
    if json_file == markdown_file == "-":
        raise typer.BadParameter("only one of --json and --markdown can be -")
    if derivatives:
        own = {"--vjp": vjp, "--jvp": jvp, "--vjp-jvp": vjp_jvp, "--tensors": tensors or None}
        _check_grid(operator, [name for name, given in own.items() if given is not None])
        passed = _grid(implementation, select, dtypes, json_file, markdown_file)
    elif markdown_file is not None:
        raise typer.BadParameter("comes with --derivatives", param_hint="--markdown")
    else:
        # A function of the user's own is looked for where the command is run, as python -m does.
        sys.path.insert(0, os.getcwd())
        own_functions = {"vjp": vjp, "jvp": jvp, "vjp_jvp": vjp_jvp, "tensors": tensors}
        passed = _audit(operator, implementation, own_functions, select, dtypes, json_file)
    if not passed:
        raise typer.Exit(1)


def _audit(
    operator: str,
    implementation: str | None,
    own: dict[str, Any],
    select: str | None,
    dtypes: list[str] | None,
    json_file: str | None,
) -> bool:
    from tilewise.verify import run

    with _progress() as progress:
        report = run(operator, implementation, select, progress, dtypes=dtypes or (), **own)
    _write(report, {json_file: report.as_json})
    return report.passed


def _grid(
    implementation: str | None,
    select: str | None,
    dtypes: list[str] | None,
    json_file: str | None,
    page: str | None,
) -> bool:
    from tilewise.verify import derivatives
    from tilewise.verify.grid import insert
    from tilewise.verify.sweep import DTYPES

    with _progress() as progress:
        grid = derivatives(implementation, select, progress, dtypes=dtypes or DTYPES)

    def markdown() -> str:
        table = grid.as_markdown()
        if page in (None, "-") or not Path(str(page)).exists():
            return table.rstrip("\n")
        return insert(Path(str(page)).read_text(), table).rstrip("\n")

    _write(grid, {json_file: grid.as_json, page: markdown})
    return grid.passed


def _write(found: Report | Grid, files: dict[str | None, Callable[[], str]]) -> None:
    """Show what was found, unless one of its forms goes to the screen, and write the files."""
    if "-" in files:
        typer.echo(files["-"]())
    else:
        _show(found)
    for file, text in files.items():
        if file not in (None, "-"):
            replace_text(Path(file), text() + "\n")


@contextmanager
def _progress() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        yield show


def _show(found: Report | Grid) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for part in found.renderables():
        console.print(part)


def _check_grid(operator: str, own: list[str]) -> None:
    if operator != "attention":
        raise typer.BadParameter("is for attention only", param_hint="--derivatives")
    if own:
        raise typer.BadParameter("comes with a function of your own", param_hint=own[0])


def _check_writable(name: str, path: Path) -> None:
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written", param_hint=name)
