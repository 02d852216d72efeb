"""The largest eigenvalue of a transformer's Hessian, where the textbook formula needs gigabytes.

Gradient descent is stable while its rate is below 2 / lambda, where lambda is the largest
eigenvalue of the loss's second derivative. The Lanczos iteration finds it from products of the
Hessian with vectors, and PyTorch has two ways to take such a product:

    jvp of grad       torch.func.jvp(torch.func.grad(loss), (w,), (v,))
    double backward   torch.autograd.grad(gradient, w, v), the gradient with create_graph=True

Both go through one layer of the GPT in gpt.py, with tilewise's attention and with the textbook
formula: first at a length where they have to agree, then at lengths where memory decides.

Needs torch and matplotlib. Every figure comes from a process of its own.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import fresh
import torch
import typer
from gpt import ATTENTIONS, COLOURS, GPT, load_text
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

import tilewise as tw
from tilewise.hardware import machine, memory

FORWARD, REVERSE = "jvp of grad", "double backward"
LINES = {FORWARD: "-", REVERSE: "--"}
TOLERANCE = 1e-4
# N x N matrices of float32 for which there has to be room before the formula is tried.
TEXTBOOK_MATRICES = 32


@dataclass(frozen=True)
class Job:
    """One search: with which attention, which way, over how many tokens."""

    attention: str
    way: str
    N: int
    steps: int
    width: int
    heads: int
    threads: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.attention}, {self.way}, N = {self.N}"

    def fits(self) -> bool:
        """Whether what the textbook formula keeps fits into the memory that is free."""
        free = memory.available()
        needed = TEXTBOOK_MATRICES * self.heads * self.N**2 * 4
        return self.attention != "textbook" or free is None or needed < 0.8 * free


@dataclass(frozen=True)
class Found:
    """The estimate after each product, the shortest product's seconds, the first one's peak."""

    values: list[float]
    seconds: float
    peak_bytes: int
    attention_share: float

    def mebibytes(self) -> str:
        return f"{self.peak_bytes / 2**20:.0f} MiB"


def loss_of(job: Job) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """Return the loss of one vector of all weights, that vector, and 1 at the attention's own."""
    torch.manual_seed(job.seed)
    book, alphabet = load_text()
    text = book[: job.N + 1]
    # Weights wider than for training: otherwise the attention is all but uniform.
    attend = ATTENTIONS[job.attention]
    model = GPT(len(alphabet), 1, job.width, job.heads, attend, spread=0.1)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    sizes = [weight.numel() for weight in weights.values()]

    def loss(flat: Tensor) -> Tensor:
        pieces = zip(weights.items(), flat.split(sizes), strict=True)
        shaped = {name: piece.view_as(weight) for (name, weight), piece in pieces}
        logits = torch.func.functional_call(model, shaped, (text[None, :-1],))
        return cross_entropy(logits[0], text[1:])

    inside = torch.tensor([".qkv." in name or ".out." in name for name in weights]).float()
    vector = torch.cat([weight.flatten() for weight in weights.values()])
    return loss, vector, inside.repeat_interleave(torch.tensor(sizes))


def product(way: str, loss: Callable[[Tensor], Tensor], w: Tensor, v: Tensor) -> Tensor:
    """Return the Hessian of the loss at w times v."""
    if way == FORWARD:
        return torch.func.jvp(torch.func.grad(loss), (w,), (v,))[1]
    w = w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(w), w, create_graph=True)
    return torch.autograd.grad(gradient, w, v)[0]


def iterate(job: Job, report: Callable[[Any], None]) -> Found:
    """Run the Lanczos iteration; `main` calls this in a process of its own."""
    torch.set_num_threads(job.threads)
    tw.set_num_threads(job.threads)
    # What PyTorch loads at its first derivative is no memory of the attention.
    small_loss, small, _ = loss_of(replace(job, N=16))
    product(job.way, small_loss, small, small)
    loss, w, in_attention = loss_of(job)
    v = torch.randn(w.shape, generator=torch.Generator().manual_seed(job.seed))
    basis = (v / v.norm())[None]
    projected = torch.zeros(job.steps, job.steps, dtype=torch.float64)
    _, peak = memory.measure(partial(product, job.way, loss, w, v), lambda Hv: Hv.nbytes)
    values, seconds = [], []
    for i in range(job.steps):
        begin = time.perf_counter()
        Hv = product(job.way, loss, w, basis[-1])
        seconds.append(time.perf_counter() - begin)
        projected[i, i] = basis[-1] @ Hv
        found, vectors = torch.linalg.eigh(projected[: i + 1, : i + 1])
        values.append(found[-1].item())
        report(values[-1])
        for _ in range(2):  # the second time takes away what rounding left
            Hv = Hv - (basis @ Hv) @ basis
        if i + 1 == job.steps or Hv.norm() < 1e-6 * found.abs().max():
            break
        projected[i, i + 1] = projected[i + 1, i] = Hv.norm()
        basis = torch.cat([basis, Hv[None] / Hv.norm()])
    share = (vectors[:, -1].float() @ basis).square() @ in_attention
    return Found(values, min(seconds), peak.extra, share.item())


def run(jobs: list[Job], progress: Progress) -> dict[Job, Found]:
    """Run each job in a process of its own; those that do not fit into memory are left out."""
    found: dict[Job, Found] = {}
    for job in filter(Job.fits, jobs):
        task = progress.add_task(job.name, total=job.steps)
        found[job] = fresh.run(iterate, job, report=lambda _, task=task: progress.advance(task))
        progress.remove_task(task)
    return found


def show_agreement(screen: Console, found: dict[Job, Found]) -> None:
    """Print the eigenvalues that have to agree; end with status 1 where they do not."""
    table = Table("", title=f"N = {next(iter(found)).N}", title_justify="left")
    table.add_column("largest eigenvalue", justify="right")
    table.add_column("relative difference", justify="right")
    first = next(iter(found.values())).values[-1]
    differences = [abs(result.values[-1] / first - 1) for result in found.values()]
    for (job, result), difference in zip(found.items(), differences, strict=True):
        name = f"{job.attention}, {job.way}"
        table.add_row(name, f"{result.values[-1]:.6f}", f"{difference:.1e}")
    screen.print(table)
    if max(differences) > TOLERANCE:
        screen.print(f"[red]the eigenvalues differ by more than {TOLERANCE}")
        raise typer.Exit(1)


def show_lengths(screen: Console, found: dict[Job, Found]) -> None:
    """Print time and peak memory of one product at each length."""
    table = Table("N", "", title=f"one product, {machine.processor()}", title_justify="left")
    for title in ("textbook", "tilewise", "textbook", "tilewise", ""):
        table.add_column(title, justify="right")
    results = {(job.N, job.way, job.attention): result for job, result in found.items()}
    for N, way in dict.fromkeys(key[:2] for key in results):
        ours, theirs = results[N, way, "tilewise"], results.get((N, way, "textbook"))
        seconds, peaks = ["skipped", f"{ours.seconds:.2f} s"], ["", ours.mebibytes(), ""]
        if theirs is not None:
            seconds[0], peaks[0] = f"{theirs.seconds:.2f} s", theirs.mebibytes()
            peaks[2] = f"{theirs.peak_bytes / ours.peak_bytes:.1f}x"
        table.add_row(str(N), way, *seconds, *peaks)
    screen.print(table)


def plot(agreed: dict[Job, Found], found: dict[Job, Found], path: Path) -> None:
    """Draw how the eigenvalues converge, and the peak memory over the length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    curves, peaks = figure.subplots(1, 2)
    longest = {job: result for job, result in found.items() if job.steps > 1}
    for i, (job, result) in enumerate((agreed | longest).items()):
        # Curves that coincide are drawn ever thinner, so that each one shows.
        colour = COLOURS[job.attention] if job.way == FORWARD else "black"
        line, wide = LINES[job.way], (6, 2.5, 1, 1)[i]
        curves.plot(result.values, line, color=colour, linewidth=wide, label=job.name)
    by_kind: dict[tuple[str, str], dict[int, float]] = {}
    for job, result in found.items():
        by_kind.setdefault((job.attention, job.way), {})[job.N] = result.peak_bytes / 2**20
    for (name, way), points in by_kind.items():
        style = {"color": COLOURS[name], "linestyle": LINES[way], "label": f"{name}, {way}"}
        peaks.loglog(points.keys(), points.values(), marker="o", **style)
    curves.set(xlabel="product", title="largest eigenvalue found")
    lengths = sorted({job.N for job in found})
    peaks.set_xticks(lengths, map(str, lengths))
    peaks.minorticks_off()
    peaks.set(xlabel="tokens", ylabel="MiB", title="peak memory of one product")
    for axes in (curves, peaks):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(
    lengths: Annotated[str, typer.Option(help="Tokens, with commas.")] = "2048,4096,8192",
    agree_at: Annotated[int, typer.Option(min=8, help="Tokens of the comparison.")] = 1024,
    steps: Annotated[int, typer.Option(min=3, help="Products of a search.")] = 16,
    width: Annotated[int, typer.Option(min=1, help="A multiple of 2 * --heads.")] = 32,
    heads: Annotated[int, typer.Option(min=1)] = 1,
    threads: Annotated[int, typer.Option(min=1)] = machine.cores(),
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("largest_eigenvalue.png"),
) -> None:
    """Largest Hessian eigenvalue of a small transformer, with tilewise and with the formula."""
    screen = Console()
    job = Job("textbook", FORWARD, agree_at, steps, width, heads, threads, seed)
    ours = replace(job, attention="tilewise")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        agreed = run([job, ours, replace(ours, way=REVERSE)], progress)
        show_agreement(screen, agreed)
        sizes = [int(N) for N in lengths.split(",")]
        long = replace(ours, N=max(sizes))
        grid = itertools.product(sizes, LINES, (job, ours))
        jobs = [replace(kind, N=N, way=way, steps=1) for N, way, kind in grid]
        found = run([*jobs, long], progress)
    show_lengths(screen, found)
    value, share = found[long].values[-1], found[long].attention_share
    screen.print(
        f"At {long.N} tokens the largest eigenvalue is {value:.4f}: gradient descent needs a rate\n"
        f"below {2 / value:.4f}. {share:.0%} of the eigenvector is in the attention's matrices."
    )
    plot(agreed, found, out)
    print(f"picture: {out}")


if __name__ == "__main__":
    typer.run(main)
