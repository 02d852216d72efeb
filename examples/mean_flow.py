"""One-step generation with MeanFlow: its loss takes a forward-mode derivative through attention.

The model sees a few points of a shape (two moons, a swirl or five blobs) and turns noise into
more points of that shape in a single step. Only attention tells the noise which shape it is.

MeanFlow (Geng et al. 2025, arXiv:2505.13447) learns the average velocity u(z, r, t) of the flow
between the times r and t, where z = (1 - t) x + t noise. Its target holds the derivative of u
along the flow, whose velocity is v = noise - x:

    u_target = v - (t - r) d/dt u,     d/dt u = jvp of u at (z, r, t) along (v, 0, 1)

so every training step needs torch.func.jvp of attention, which PyTorch's fused attention refuses.

    python examples/mean_flow.py

Needs torch and matplotlib.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from set_transformer import Attention, AverageVelocity
from shapes import SHAPES
from torch import Generator, Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tilewise as tw
from tilewise.hardware import machine
from tilewise.torch import attention


def textbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula as it is written, with its N x Nk matrices."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


ATTENTIONS: dict[str, Attention] = {"tilewise": attention, "textbook": textbook}


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on."""

    steps: int = 1800
    sets: int = 2  # of each shape in a batch
    known: int = 64
    made: int = 256
    width: int = 64
    heads: int = 4
    layers: int = 3
    rate: float = 6e-3
    seed: int = 0


def make_model(settings: Settings, attend: Attention) -> AverageVelocity:
    """Return the model with the first weights that the seed gives."""
    torch.manual_seed(settings.seed)
    return AverageVelocity(settings.width, settings.heads, settings.layers, attend)


def with_derivative(
    model: nn.Module, known: Tensor, z: Tensor, r: Tensor, t: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return u(z, r, t) and d/dt u, its derivative along the flow."""
    along = (v, torch.zeros_like(r), torch.ones_like(t))
    return torch.func.jvp(lambda z, r, t: model(known, z, r, t), (z, r, t), along)


def batch(settings: Settings, random: Generator) -> tuple[Tensor, ...]:
    """Return known points, then z, r, t and v of the points to make; r = t for a third of them."""
    count = settings.known + settings.made
    data = torch.cat([shape(settings.sets, count, random) for shape in SHAPES.values()])
    known, x = data.split([settings.known, settings.made], 1)
    noise = torch.randn(x.shape, generator=random)
    r, t = torch.rand(2, *x.shape[:2], 1, generator=random).sort(0).values
    r = torch.where(torch.rand(t.shape, generator=random) < 1 / 3, t, r)
    return known, (1 - t) * x + t * noise, r, t, noise - x


def train(
    settings: Settings, attend: Attention, report: Callable[[float], None]
) -> tuple[nn.Module, list[float]]:
    """Return the average of the model over the last steps, and the seconds of each step."""
    random = Generator().manual_seed(settings.seed)
    model = make_model(settings, attend)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimiser = torch.optim.AdamW(model.parameters(), settings.rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.rate, settings.steps, pct_start=0.2
    )
    step_s = []
    for _ in range(settings.steps):
        known, z, r, t, v = batch(settings, random)
        begin = time.perf_counter()
        u, dudt = with_derivative(model, known, z, r, t, v)
        error = (u - (v - (t - r) * dudt).detach()).square().sum(-1)
        loss = (error / (error.detach() + 1e-3) ** 0.75).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        step_s.append(time.perf_counter() - begin)
        average.update_parameters(model)
        report(loss.item())
    return average.module, step_s


def derivative_error(settings: Settings, attend: Attention) -> float:
    """Return the relative difference of d/dt u from the textbook formula in float64."""
    found = []
    for attend_with, dtype in ((attend, torch.float32), (textbook, torch.float64)):
        model = make_model(settings, attend_with).to(dtype)
        inputs = batch(settings, Generator().manual_seed(settings.seed))
        found.append(with_derivative(model, *(x.to(dtype) for x in inputs))[1].double())
    return ((found[0] - found[1]).norm() / found[1].norm()).item()


def refusal(settings: Settings) -> str:
    """Return what PyTorch's fused attention says to the derivative."""
    try:
        derivative_error(settings, scaled_dot_product_attention)
    except (NotImplementedError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return "takes the derivative too"


@torch.no_grad()
def generate(model: nn.Module, known: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Turn noise into points in that many steps from time 1 to time 0."""
    z = noise
    for i in range(steps, 0, -1):
        r, t = (torch.full((*z.shape[:2], 1), time / steps) for time in (i - 1, i))
        z = z - (t - r) * model(known, z, r, t)
    return z


def distance(x: Tensor, y: Tensor) -> float:
    """Return the energy distance of two sets of points: 0 where they are distributed alike."""
    return (2 * torch.cdist(x, y).mean() - torch.pdist(x).mean() - torch.pdist(y).mean()).item()


def evaluate(model: nn.Module, settings: Settings) -> dict[str, dict[str, Tensor]]:
    """Return for each shape its known points, the data and what the model makes of noise."""
    random = Generator().manual_seed(settings.seed + 1)
    results = {}
    for name, shape in SHAPES.items():
        known, data, other = shape(1, settings.known + 4000, random).split(
            [settings.known, 2000, 2000], 1
        )
        noise = torch.randn(data.shape, generator=random)
        results[name] = {
            "points seen": known[0],
            "noise": noise[0],
            "one step": generate(model, known, noise, 1)[0],
            "two steps": generate(model, known, noise, 2)[0],
            "other data": other[0],
            "data": data[0],
        }
    return results


def show(screen: Console, results: dict[str, dict[str, Tensor]]) -> None:
    """Print how far noise and samples are from the data."""
    table = Table("", title="energy distance from the data", title_justify="left")
    for name in results:
        table.add_column(name, justify="right")
    for row in ("noise", "one step", "two steps", "other data"):
        found = (distance(points[row], points["data"]) for points in results.values())
        table.add_row(row, *(f"{value:.4f}" for value in found))
    screen.print(table)


def plot(results: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Draw what the model has seen, what it makes of noise, and the data."""
    from matplotlib.figure import Figure

    rows = {
        "points seen": "#30638e",
        "one step": "#d1495b",
        "two steps": "#d1495b",
        "data": "#9a9a9a",
    }
    figure = Figure(figsize=(7, 9), layout="constrained")
    grid = figure.subplots(len(rows), len(results))
    for column, (name, points) in zip(grid.T, results.items(), strict=True):
        column[0].set_title(name)
        for axes, (row, colour) in zip(column, rows.items(), strict=True):
            axes.scatter(*points[row].T, s=9 if row == "points seen" else 2, color=colour)
            axes.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal", xticks=[], yticks=[])
    for axes, row in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(row)
    figure.savefig(path, dpi=110)


def main(
    attend: Annotated[
        str, typer.Option("--attention", help=f"{' or '.join(ATTENTIONS)}.")
    ] = "tilewise",
    steps: Annotated[int, typer.Option(min=10)] = Settings.steps,
    known: Annotated[int, typer.Option(min=1, help="Points seen of a set.")] = Settings.known,
    made: Annotated[int, typer.Option(min=1, help="Points to make of a set.")] = Settings.made,
    threads: Annotated[int, typer.Option(min=1)] = machine.cores(),
    seed: int = Settings.seed,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("mean_flow.png"),
) -> None:
    """Train a small MeanFlow with attention inside, and generate in one step."""
    if attend not in ATTENTIONS:
        raise typer.BadParameter(f"unknown {attend}", param_hint="--attention")
    torch.set_num_threads(threads)
    tw.set_num_threads(threads)
    settings = Settings(steps, known=known, made=made, seed=seed)
    screen = Console()
    screen.print(f"PyTorch's fused attention: {refusal(settings)}", highlight=False)
    error = derivative_error(settings, ATTENTIONS[attend])
    screen.print(f"{attend}: d/dt u differs by {error:.1e} from the textbook formula in float64")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=steps)

        def report(loss: float) -> None:
            progress.update(task, advance=1, description=f"loss {loss:.3f}")

        model, step_s = train(settings, ATTENTIONS[attend], report)
    results = evaluate(model, settings)
    show(screen, results)
    screen.print(
        f"{steps} steps, {1e3 * statistics.median(step_s):.1f} ms each, "
        f"{sum(step_s):.0f} s in all, {machine.processor()}, {threads} threads"
    )
    plot(results, out)
    print(f"picture: {out}")


if __name__ == "__main__":
    typer.run(main)
