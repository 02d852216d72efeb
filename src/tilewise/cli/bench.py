"""`tilewise bench`: tilewise beside textbook NumPy and PyTorch in one alternating run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tilewise.base.dtypes import FLOATS, listed
from tilewise.cli.files import replace_text

if TYPE_CHECKING:
    from rich.table import Table

    from tilewise.bench.cases import Case

__all__ = ["attention", "register"]

_DECODE_NOTE = (
    " GB/s: keys and values over the time. Of read: the time of a plain read of them over it."
)
_DERIVATIVES_NOTE = (
    " Factor: its time over its own forward (of a jvp, which contains one) or backward. Memory: "
    "growth of a fresh process beyond inputs and outputs, from the inputs to all results."
)

_ROWS_NOTE = (
    " GB/s: inputs and outputs once, over the time. Of memcpy: that rate over the copy's. Extra: "
    "growth of a fresh process beyond inputs and outputs. Error: the largest relative one."
)

# Columns that not every table has: what they are called in the results, and how they are shown.
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "GB/s": ("gbytes_per_s", lambda x: f"{x:.1f}"),
    "of memcpy": ("share_of_copy", lambda x: f"{100 * x:.0f} %"),
    "error": ("errors", lambda x: f"{max(x.values()):.0e}" if x else ""),
    "extra MiB": ("extra_bytes", lambda x: f"{x / 2**20:.1f}"),
}


def register(app: typer.Typer) -> None:
    """Add the command group to the application."""
    group = typer.Typer(no_args_is_help=True, help="Speed beside other libraries, after a check.")
    group.callback()(_group)
    group.command("attention")(attention)
    _add_rows(group, "softmax", "Softmax, log-softmax and log-sum-exp")
    _add_rows(group, "cross_entropy", "Cross-entropy of logits, with and without its gradient")
    _add_rows(group, "linear_cross_entropy", "Loss of a classifier, with its gradients")
    app.add_typer(group, name="bench")


def _group() -> None:
    """Speed beside other libraries, after a check of the results."""


def attention(
    n: Annotated[
        list[int] | None,
        typer.Option("--n", min=1, help="Time N queries and keys instead of a suite; repeatable."),
    ] = None,
    suite: Annotated[
        str, typer.Option("--suite", help="quick, full, train, decode, masks, varlen or jax.")
    ] = "quick",
    small_sizes: Annotated[
        bool, typer.Option("--quick", help="Lengths of the suite divided by 64, for a try.")
    ] = False,
    batch: Annotated[int, typer.Option("--batch", min=1, help="B, with --n.")] = 1,
    heads: Annotated[int, typer.Option("--heads", min=1, help="H, with --n.")] = 4,
    head_dim: Annotated[int, typer.Option("--head-dim", min=1, max=512, help="D, with --n.")] = 64,
    causal: Annotated[bool, typer.Option("--causal", help="With --n.")] = False,
    window: Annotated[
        int | None, typer.Option("--window", min=0, help="Causal window, with --n.")
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option("--threads", min=1, help="Of every contender; repeatable. [default: 1]"),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option("--dtype", help=f"{listed(FLOATS)}; repeatable. [default: the suite's]"),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Compare with those alone whose name has this; repeatable."),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Least number of turns per contender.")
    ] = 9,
    implementation: Annotated[
        str | None, typer.Option("--implementation", help="cpu or reference.")
    ] = None,
    derivatives: Annotated[
        bool, typer.Option("--derivatives", help="JVP and double backward too; memory of each.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw GFLOP/s there.")
    ] = None,
) -> None:
    """Forward and backward of attention; no figure is shown for a result that is wrong."""
    from tilewise.bench.cases import SUITES, custom_case, small
    from tilewise.bench.derivatives import CASES, MEMORY_CASE

    if suite not in SUITES:
        _fail(f"--suite must be {listed(tuple(SUITES))}, got {suite!r}")
    if derivatives and dtype not in (None, [], ["float32"]):
        _fail("--derivatives takes float32 alone")
    _check_dtypes(dtype or ())
    for path in (json_file, plot_file):
        _check_writable(path)
    if plot_file is not None:
        _check_matplotlib()
    chosen = SUITES["quick"] if derivatives or n else SUITES[suite]
    cases: tuple[Case, ...] = CASES if derivatives else chosen.cases
    whole: tuple[Case, ...] = (MEMORY_CASE,) if derivatives else chosen.memory
    if n:
        sizes: dict[str, Any] = {"B": batch, "H": heads, "D": head_dim}
        sizes |= {"causal": causal, "window": window, "derivatives": derivatives}
        cases = tuple(custom_case(N, **sizes) for N in n)
        whole = cases if derivatives else ()
    if small_sizes:
        cases, whole = tuple(map(small, cases)), tuple(map(small, whole))
    _check_peers(peer or (), cases)
    options: dict[str, Any] = {
        "threads": tuple(threads or chosen.threads),
        "implementation": implementation,
    }
    timed = {"repeats": repeats, "peers": tuple(peer or ())}
    result = _run(cases, whole, tuple(dtype or chosen.dtypes), options, timed)
    result["suite"] = None if n or derivatives else suite
    if json_file is not None:
        replace_text(json_file, json.dumps(result, indent=2) + "\n")
    if plot_file is not None:
        from tilewise.plot import bench_figure

        bench_figure(result, plot_file)
    if result["failed"]:
        raise typer.Exit(1)


def _add_rows(group: typer.Typer, suite: str, what: str) -> None:
    """Add the command of one suite of `tilewise.bench.rows`."""

    def command(
        threads: Annotated[int, typer.Option("--threads", min=1, help="Of every contender.")] = 1,
        repeats: Annotated[
            int | None,
            typer.Option("--repeats", min=1, help="Least number of turns. [default: the suite's]"),
        ] = None,
        small_sizes: Annotated[
            bool, typer.Option("--quick", help="Sizes divided by 32, for a try.")
        ] = False,
        only: Annotated[
            str, typer.Option("--case", help="Only the case of this name, or those that have it.")
        ] = "",
        large: Annotated[
            bool, typer.Option("--large", help="Cases of minutes too, where there are.")
        ] = False,
        json_file: Annotated[
            Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there.")
        ] = None,
        keep: Annotated[
            bool, typer.Option("--keep", help="Keep what FILE has of other cases.")
        ] = False,
    ) -> None:
        options = {"threads": threads, "repeats": repeats, "quick": small_sizes, "large": large}
        _rows(suite, only, json_file, keep, options)

    help_text = f"{what}; no figure is shown for a result that is wrong."
    group.command(suite, help=help_text)(command)


def _rows(
    suite: str, only: str, json_file: Path | None, keep: bool, options: dict[str, Any]
) -> None:
    """Run the cases of a suite of rows, show each as soon as it is done, and write all."""
    from rich.console import Console

    from tilewise.bench.rows import SUITES, report, run_case, small

    _check_writable(json_file)
    every = [case for case in SUITES[suite].cases if options["large"] or not case.large]
    exact = [case for case in every if case.name == only]
    cases = exact or [case for case in every if only in case.name]
    if not cases:
        _fail(f"--case must be part of one of {', '.join(c.name for c in every)}, got {only!r}")
    threads, repeats = options["threads"], options["repeats"] or SUITES[suite].repeats
    screen, failed, runs = Console(), list[str](), list[dict[str, Any]]()
    for case in map(small, cases) if options["quick"] else cases:
        with _attempt(case.name, failed):
            runs.append(run_case(case, threads=threads, repeats=repeats))
            screen.print(_rows_table(runs[-1]))
    result = report(runs, suite=suite, threads=threads) | {"failed": failed}
    screen.print(_footer(result) + _ROWS_NOTE, highlight=False)
    if json_file is not None:
        if keep and json_file.exists():
            result["runs"] = _joined(json_file, result, [c.name for c in SUITES[suite].cases])
        replace_text(json_file, json.dumps(result, indent=2) + "\n")
    if failed:
        raise typer.Exit(1)


def _joined(path: Path, result: dict[str, Any], order: list[str]) -> list[dict[str, Any]]:
    """Return the runs of a result and those that a file has of other cases, in order."""
    had = json.loads(path.read_text())
    for name in ("suite", "versions", "threads"):
        if had.get(name) != result[name]:
            _fail(f"--keep: {path} has other {name}: {had.get(name)}")
    if had["machine"]["processor"] != result["machine"]["processor"]:
        _fail(f"--keep: {path} is of another processor: {had['machine']['processor']}")
    runs = {run["case"]["name"]: run for run in (*had["runs"], *result["runs"])}
    return sorted(runs.values(), key=lambda run: order.index(run["case"]["name"]))


def _rows_table(run: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    title = f"{run['case']['name']}: {run['threads'][0]} thread{'s' * (run['threads'] != [1])}"
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE)
    for name in ("", "ms", "spread", "turns", "ratio", *_COLUMNS):
        if name not in _COLUMNS or any(t[_COLUMNS[name][0]] for t in run["timings"]):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for t in run["timings"]:
        spread = (t["upper_quartile_s"] - t["lower_quartile_s"]) / t["median_s"]
        cells = [t["contender"], f"{1e3 * t['median_s']:.2f}", f"{100 * spread:.0f} %"]
        cells += [str(t["rounds"]), f"{t['ratio']:.2f}"]
        for key, shown in _COLUMNS.values():
            if any(other[key] for other in run["timings"]):
                cells.append(shown(t[key]) if t[key] is not None else "")
        table.add_row(*cells)
    notes = [f"{name} not available: {reason}" for name, reason in run["skipped"].items()]
    table.caption = "\n".join(notes) or None
    return table


def _check_dtypes(names: Sequence[str]) -> None:
    import importlib.util

    for name in names:
        if name not in FLOATS:
            _fail(f"--dtype must be {listed(FLOATS)}, got {name!r}")
    if "bfloat16" in names and importlib.util.find_spec("ml_dtypes") is None:
        _fail('--dtype bfloat16 needs ml_dtypes: pip install "tilewise[bf16]"')


def _fail(text: str) -> NoReturn:
    """End with one line on standard error and exit status 2."""
    typer.echo(f"bench: {text}", err=True)
    raise typer.Exit(2)


def _check_peers(parts: Sequence[str], cases: tuple[Case, ...]) -> None:
    names = dict.fromkeys(name for case in cases for name in case.contenders[1:])
    for part in parts:
        if not any(part.lower() in name.lower() for name in names):
            _fail(f"--peer must be part of one of the names {', '.join(names)}, got {part!r}")


def _check_writable(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        _fail(f"{path}: cannot be written")


def _check_matplotlib() -> None:
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        _fail('--plot needs matplotlib: pip install "tilewise[plot]"')


def _run(
    cases: tuple[Case, ...],
    whole: tuple[Case, ...],
    dtypes: tuple[str, ...],
    options: dict[str, Any],
    timed: dict[str, Any],
) -> dict[str, Any]:
    """Time `cases` and measure the memory of `whole`, showing each as soon as it is done."""
    from rich.console import Console

    from tilewise.bench.attention import report, run_case
    from tilewise.bench.derivatives import measure_memory

    screen, runs, spaces = Console(), [], []
    failed: list[str] = []
    for case, dtype in ((case, dtype) for case in cases for dtype in dtypes):
        with _attempt(f"{case.name}, {dtype}", failed):
            runs.append(run_case(case, dtype=dtype, **options, **timed))
            screen.print(_table(runs[-1]))
    most = {**options, "threads": max(options["threads"])}
    for case in whole:
        with _attempt(f"memory, {case.name}", failed):
            figures = list(measure_memory(case, **most))
            spaces.append({"case": asdict(case), "figures": figures})
            screen.print(_memory_table(spaces[-1], most["threads"]))
    result = report(runs, dtypes=dtypes, threads=options["threads"])
    result |= {"memory": spaces, "failed": failed}
    screen.print(_footer(result), highlight=False)
    return result


@contextlib.contextmanager
def _attempt(name: str, failed: list[str]) -> Iterator[None]:
    """Show that something is being measured; a failure of it is noted and told."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from tilewise.bench.attention import CaseFailed

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            progress.add_task(name, total=None)
            yield
    except CaseFailed as error:
        failed.append(str(error))
        typer.echo(f"bench: {error}", err=True)


def _table(run: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    shown = " and ".join(str(count) for count in run["threads"])
    plural = "" if run["threads"] == [1] else "s"
    title = f"{run['case']['name']}: {run['dtype']}, {shown} thread{plural}"
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    decode = _is_decode(run)
    names = ["", "ms", "spread", "turns"]
    names += ["GB/s", "of read"] if decode else ["GFLOP/s", "of peak"]
    names += ["ratio", "factor"] if run["case"]["derivatives"] else ["ratio"]
    for name in names:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    direction = None
    for timing in run["timings"]:
        if timing["direction"] != direction:
            direction = timing["direction"]
            table.add_row(f"[bold]{direction}[/]")
        cells = _cells(timing, several=len(run["threads"]) > 1, decode=decode)
        table.add_row(*cells[: len(names)])
    table.caption = "\n".join(_notes(run)) or None
    return table


def _is_decode(run: dict[str, Any]) -> bool:
    return any(t.get("kv_gbytes_per_s") is not None for t in run["timings"])


def _cells(timing: dict[str, Any], *, several: bool, decode: bool) -> list[str]:
    name, median = timing["contender"], timing["median_s"]
    spread = (timing["upper_quartile_s"] - timing["lower_quartile_s"]) / median
    rate, share = ("kv_gbytes_per_s", "share_of_read") if decode else ("gflops", "share_of_peak")
    return [
        f"  {name}, {timing['threads']} thr." if several else f"  {name}",
        f"{1e3 * median:.2f}",
        f"{100 * spread:.0f} %",
        str(timing["rounds"]),
        f"{timing[rate]:.1f}",
        "" if timing[share] is None else f"{100 * timing[share]:.0f} %",
        f"{timing['ratio']:.2f}",
        f"{timing['factor']:.2f}",
    ]


def _memory_table(space: dict[str, Any], threads: int) -> Table:
    from rich import box
    from rich.table import Table

    title = f"memory, {space['case']['name']}: float32, {threads} thread{'s' * (threads > 1)}"
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE)
    for name in ("", "extra MiB", "outputs MiB", "s"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    notes, group = [], None
    for found in space["figures"]:
        this = f"{found['direction']}, N={found['N']}"
        if this != group:
            group = this
            table.add_row(f"[bold]{this}[/]")
        if found["skipped"]:
            notes.append(f"{this}: {found['contender']} left out: {found['skipped']}")
            continue
        sizes = (f"{found[name] / 2**20:.1f}" for name in ("extra_bytes", "output_bytes"))
        table.add_row(f"  {found['contender']}", *sizes, f"{found['seconds']:.2f}")
    table.caption = "\n".join(notes) or None
    return table


def _notes(run: dict[str, Any]) -> list[str]:
    notes = [f"{name} not available: {reason}" for name, reason in run["skipped"].items()]
    if len(run["threads"]) > 1:
        first = run["case"]["contenders"][0]
        own = [t for t in run["timings"] if t["contender"] == first]
        for direction in dict.fromkeys(t["direction"] for t in own):
            one, *more = (t["median_s"] for t in own if t["direction"] == direction)
            gains = ", ".join(f"{one / t:.2f}" for t in more)
            notes.append(
                f"{first} {direction}: {gains} times faster than with {run['threads'][0]} thread"
            )
    return notes


def _footer(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    peaks = [run["peak_gflops"] for run in result["runs"] if run.get("peak_gflops")]
    peak = f"; FMA peak of one core {max(peaks):.0f} GFLOP/s" if peaks else ""
    return (
        f"{result['machine']['processor']}, {result['machine']['cores']} cores, "
        f"{result['machine']['target']}{peak}\n{versions}\n"
        "Medians of alternating turns. Spread: between the quartiles, of the median. Ratio: the "
        "contender's time over that of the first line, median over the turns (above 1: the first "
        "is faster)."
        + _DECODE_NOTE * any(map(_is_decode, result["runs"]))
        + _DERIVATIVES_NOTE * bool(result.get("memory"))
    )
