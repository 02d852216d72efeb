"""`tilewise demo`: forward and backward on a real model's arrays, beside the textbook formula."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tilewise.cli.files import numpy_archive, replace_text

if TYPE_CHECKING:
    from rich.table import Table

    from tilewise.bench.captured import Captured
    from tilewise.bench.demo import SizeReport

__all__ = ["register"]

_LARGEST_N = 1 << 20


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("demo")(demo)


def demo(
    input_file: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE.npz", help="Arrays q, k, v; MiniLM's by default."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Save the results and the figures there."),
    ] = None,
    sizes: Annotated[
        str, typer.Option("--sizes", help="Numbers of tokens, with commas.")
    ] = "512,4096,16384",
    implementation: Annotated[
        str | None, typer.Option("--implementation", help="cpu or reference.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="All cores by default.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON and nothing else.")
    ] = False,
) -> None:
    """Attention of a real model: error, time and memory beside the textbook formula."""
    from tilewise.data import minilm

    lengths = _parse_sizes(sizes)
    captured = _load(input_file or minilm())
    _preflight(implementation)
    folder = _output_folder(out)
    threads = threads or _own_threads()
    figures: dict[str, Any] = _header(captured, input_file, implementation, threads)
    reports = _run(captured, lengths, implementation, threads, folder, as_json, figures)
    figures["sizes"] = [report.as_dict() for report in reports]
    text = json.dumps(figures, indent=2) + "\n"
    if folder is not None:
        replace_text(folder / "figures.json", text)
    if as_json:
        sys.stdout.write(text)


def _fail(text: str) -> NoReturn:
    """End with one line on standard error and exit status 2."""
    typer.echo(f"demo: {text}", err=True)
    raise typer.Exit(2)


def _parse_sizes(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        _fail(f"--sizes must be whole numbers with commas between them, got {text!r}")
    if not all(1 <= length <= _LARGEST_N for length in lengths):
        _fail(f"--sizes must be from 1 to {_LARGEST_N}, got {text!r}")
    return lengths


def _load(path: Path) -> Captured:
    from tilewise.bench.captured import InputFileError, load

    try:
        return load(path)
    except InputFileError as error:
        _fail(str(error))


def _preflight(implementation: str | None) -> None:
    from tilewise.bench.demo import preflight

    try:
        preflight(implementation)
    except (ValueError, ImportError, NotImplementedError) as error:
        _fail(str(error))
    except ExceptionGroup as group:
        _fail("; ".join(str(error) for error in group.exceptions))


def _output_folder(out: Path | None) -> Path | None:
    if out is None:
        return None
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        _fail(f"--out {out}: cannot be written ({error.strerror or error})")


def _own_threads() -> int:
    import tilewise as tw
    from tilewise.hardware import machine

    try:
        return int(tw.get_num_threads())
    except ImportError:
        return machine.cores()


def _target(implementation: str | None) -> str:
    if implementation == "reference":
        return "NumPy"
    try:
        from tilewise import _core
    except ImportError:
        return "NumPy"
    return str(_core.target())


def _header(
    captured: Captured, input_file: Path | None, implementation: str | None, threads: int
) -> dict[str, Any]:
    from tilewise import __version__
    from tilewise.hardware import machine

    return {
        "input": "minilm" if input_file is None else str(input_file),
        "about": captured.about,
        "captured_shape": list(captured.q.shape),
        "implementation": implementation or "default",
        "target": _target(implementation),
        "threads": threads,
        "machine": machine.describe(),
        "versions": {"tilewise": __version__, **machine.versions("numpy")},
    }


def _run(
    captured: Captured,
    lengths: list[int],
    implementation: str | None,
    threads: int,
    folder: Path | None,
    quiet: bool,
    figures: dict[str, Any],
) -> list[SizeReport]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from tilewise.bench.demo import run_size
    from tilewise.hardware.memory import FreshProcessError

    screen, reports = Console(stderr=quiet), []
    if not quiet:
        _show_header(screen.print, figures)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for N in lengths:
            task = progress.add_task(f"N={N}", total=None)

            def say(step: str, task: Any = task, N: int = N) -> None:
                progress.update(task, description=f"N={N}: {step}")

            try:
                report, results = run_size(
                    captured, N, implementation=implementation, threads=threads, say=say
                )
            except (FreshProcessError, MemoryError) as error:
                progress.stop()
                typer.echo(f"demo: N={N}: {str(error) or 'out of memory'}", err=True)
                raise typer.Exit(1) from error
            progress.remove_task(task)
            reports.append(report)
            if folder is not None:
                numpy_archive(folder / f"attention_{N}.npz", results)
            if not quiet:
                screen.print(_table(report))
    if not quiet:
        _show_notes(screen.print, captured, reports, folder)
    return reports


def _show_header(show: Callable[..., None], figures: dict[str, Any]) -> None:
    shape = tuple(figures["captured_shape"])
    show(f"[bold]q, k, v[/] {shape} from {figures['about'] or figures['input']}")
    show(
        f"{figures['machine']['processor']}, threads {figures['threads']}, "
        f"target {figures['target']}, tilewise {figures['versions']['tilewise']}, "
        f"NumPy {figures['versions']['numpy']}"
    )


def _table(report: SizeReport) -> Table:
    from rich.table import Table

    B, H, N, D = report.shape
    table = Table(
        title=f"N = {N}: B={B}, {H} head{'s' if H > 1 else ''}, D={D}, {report.dtype}",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("tilewise", justify="right")
    table.add_column("textbook NumPy", justify="right")
    pair = (report.tilewise, report.textbook)

    def row(name: str, cell: Callable[[Any], str]) -> None:
        table.add_row(name, *("skipped" if f.skipped else cell(f) for f in pair))

    for name in ("o", "lse", "dq", "dk", "dv"):
        row(f"error of {name}", _error_of(name))
    row("forward", lambda f: _seconds(f.forward_s))
    row("backward", lambda f: _seconds(f.backward_s))
    row("tokens per second", lambda f: f"{f.tokens_per_s:,.0f}")
    row("peak extra memory", lambda f: _bytes(f.extra_bytes))
    row("outputs", lambda f: _bytes(f.output_bytes))
    if report.textbook.skipped:
        table.caption = (
            f"textbook skipped: {report.textbook.skipped}; "
            f"its N x N matrices take {_bytes(report.textbook_estimate_bytes)}"
        )
    return table


def _error_of(name: str) -> Callable[[Any], str]:
    return lambda figures: f"{figures.errors[name]:.1e}"


def _show_notes(
    show: Callable[..., None], captured: Captured, reports: list[SizeReport], folder: Path | None
) -> None:
    show(
        "Errors are relative (Frobenius norm) to float64 on the same inputs, over every row and "
        "key (computed by blocks of rows). Tokens per second counts forward and backward over the "
        "heads shown. Memory is the growth of the resident set of a fresh process beyond inputs "
        "and outputs, over one forward and backward.",
        highlight=False,
    )
    if any(report.N > captured.N for report in reports):
        show(f"Beyond {captured.N} tokens the captured ones repeat in order.", highlight=False)
    if any(report.shape[1] < captured.q.shape[1] for report in reports):
        show("Fewer heads at large N keep the textbook formula and the oracle quick.")
    if folder is not None:
        show(f"Saved to {folder}")


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def _bytes(value: float | None) -> str:
    if value is None:
        return ""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value / 1024:.0f} KiB"
