"""Train a small character-level GPT on "Alice's Adventures in Wonderland", twice.

Once with tilewise's attention and once with PyTorch's own; everything else is the same: the text,
the first weights, the batches, the optimiser. The loss curves coincide; time and memory differ.

    python examples/char_gpt.py
    python examples/char_gpt.py --steps 2000 --context 1024 --attention tilewise

Needs torch and matplotlib. Each training runs in a process of its own, so that its peak of memory
is its own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import fresh
import torch
import typer
from gpt import ATTENTIONS, COLOURS, GPT, load_text
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

import tilewise as tw
from tilewise.hardware import machine, memory


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on."""

    steps: int = 400
    context: int = 512
    batch: int = 4
    layers: int = 3
    width: int = 192
    heads: int = 6
    rate: float = 2e-3
    sample: int = 400
    threads: int = 2
    seed: int = 0


@dataclass
class Run:
    """What a training returns."""

    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    held_out: float = math.nan
    peak_bytes: int = 0
    text: str = ""


def train(name: str, settings: Settings, report: Callable[[Any], None]) -> dict[str, Any]:
    """Train with the attention of that name; `main` calls this in a process of its own."""
    torch.set_num_threads(settings.threads)
    tw.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    book, alphabet = load_text()
    learn, held_out = book[: int(0.9 * len(book))], book[int(0.9 * len(book)) :]
    model = GPT(
        len(alphabet),
        settings.layers,
        settings.width,
        settings.heads,
        ATTENTIONS[name],
    )
    run = Run()
    _, peak = memory.measure(lambda: optimise(model, learn, settings, run, report), lambda _: 0)
    run.peak_bytes = peak.extra
    with torch.no_grad():
        pieces = held_out[: len(held_out) // (settings.context + 1) * (settings.context + 1)]
        run.held_out = model.loss(pieces.view(-1, settings.context + 1)).item()
    run.text = write(model, alphabet, settings)
    return asdict(run)


def optimise(
    model: GPT, book: Tensor, settings: Settings, run: Run, report: Callable[[Any], None]
) -> None:
    """Fit the model to random pieces of the book with AdamW."""
    optimiser = torch.optim.AdamW(model.parameters(), settings.rate, (0.9, 0.99), weight_decay=0.1)
    warm_up = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda i: (
            min(1, (i + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * i / settings.steps))
        ),
    )
    random = torch.Generator().manual_seed(settings.seed)
    span = torch.arange(settings.context + 1)
    for _ in range(settings.steps):
        starts = torch.randint(len(book) - len(span), (settings.batch, 1), generator=random)
        begin = time.perf_counter()
        loss = model.loss(book[starts + span])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        run.step_s.append(time.perf_counter() - begin)
        run.losses.append(loss.item())
        report(run.losses[-1])


@torch.no_grad()
def write(model: GPT, alphabet: list[str], settings: Settings) -> str:
    """Let the model go on from "Alice ", one character at a time."""
    random = torch.Generator().manual_seed(settings.seed)
    tokens = [alphabet.index(character) for character in "Alice "]
    for _ in range(settings.sample):
        seen = torch.tensor([tokens[-settings.context :]])
        p = (model(seen)[0, -1] / 0.8).softmax(-1)
        tokens.append(int(torch.multinomial(p, 1, generator=random)))
    return "".join(alphabet[token] for token in tokens)


def show(screen: Console, runs: dict[str, Run], settings: Settings) -> None:
    """Print the runs side by side."""
    table = Table(title=f"{settings.steps} steps, {machine.processor()}", title_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")

    def row(title: str, cell: Callable[[Run], str]) -> None:
        table.add_row(title, *(cell(run) for run in runs.values()))

    first = next(iter(runs.values()))
    row("time per step, median", lambda run: f"{1e3 * statistics.median(run.step_s):.1f} ms")
    row("peak memory of the training", lambda run: f"{run.peak_bytes / 2**20:.0f} MiB")
    row("loss of the last step", lambda run: f"{run.losses[-1]:.5f}")
    row("loss on held-out text", lambda run: f"{run.held_out:.5f}")
    if len(runs) > 1:
        row("largest difference of the loss", lambda run: f"{difference(run, first):.1e}")
    screen.print(table)
    for name, run in list(runs.items())[:1]:
        screen.print(Panel(Text(run.text), title=f"written by the model ({name})", width=80))


def difference(run: Run, other: Run) -> float:
    """Return the largest difference of the two losses over all steps."""
    return max(abs(a - b) for a, b in zip(run.losses, other.losses, strict=True))


def plot(runs: dict[str, Run], path: Path) -> None:
    """Draw the loss curves, and time and memory as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    curves, times, peaks = figure.subplots(1, 3, width_ratios=[3, 1, 1])
    for i, (name, run) in enumerate(runs.items()):
        # The curves coincide: the first one is drawn wide, so that the next shows on top of it.
        curves.plot(run.losses, color=COLOURS[name], label=name, linewidth=(4, 1.2, 0.6)[i])
        times.bar(name, 1e3 * statistics.median(run.step_s), color=COLOURS[name])
        peaks.bar(name, run.peak_bytes / 2**20, color=COLOURS[name])
    curves.set(xlabel="step", ylabel="loss (nats per character)")
    curves.legend(frameon=False)
    times.set_title("ms per step", fontsize=10)
    peaks.set_title("peak memory, MiB", fontsize=10)
    for axes in (curves, times, peaks):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(
    attention: Annotated[
        str, typer.Option(help=f"With commas: {', '.join(ATTENTIONS)}.")
    ] = "tilewise,sdpa",
    steps: Annotated[int, typer.Option(min=1)] = Settings.steps,
    context: Annotated[int, typer.Option(min=8, help="Characters.")] = Settings.context,
    batch: Annotated[int, typer.Option(min=1)] = Settings.batch,
    layers: Annotated[int, typer.Option(min=1)] = Settings.layers,
    width: Annotated[int, typer.Option(min=1, help="A multiple of 2 * --heads.")] = Settings.width,
    heads: Annotated[int, typer.Option(min=1)] = Settings.heads,
    sample: Annotated[int, typer.Option(help="Characters to write.")] = Settings.sample,
    threads: Annotated[int, typer.Option(min=1)] = machine.cores(),
    seed: int = Settings.seed,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("char_gpt.png"),
) -> None:
    """Train a small character-level GPT with tilewise and with PyTorch's attention."""
    names = attention.split(",")
    if unknown := sorted(set(names) - set(ATTENTIONS)):
        raise typer.BadParameter(f"unknown {', '.join(unknown)}", param_hint="--attention")
    settings = Settings(
        steps, context, batch, layers, width, heads, sample=sample, threads=threads, seed=seed
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    runs = {}
    with Progress(*columns, TextColumn("{task.fields[loss]}"), transient=True) as progress:
        for name in names:
            task = progress.add_task(name, total=steps, loss="")

            def report(loss: float, task: Any = task) -> None:
                progress.update(task, advance=1, loss=f"loss {loss:.3f}")

            runs[name] = Run(**fresh.run(train, name, settings, report=report))
    show(Console(), runs, settings)
    plot(runs, out)
    print(f"picture: {out}")


if __name__ == "__main__":
    typer.run(main)
