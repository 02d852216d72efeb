"""Train a small transformer of Flax on "Alice's Adventures in Wonderland", twice.

Once with tilewise as its `attention_fn` and once with Flax's own; everything else is the same: the
text, the first weights, the batches, the optimiser. The loss curves coincide; the time differs.

    python examples/flax_gpt.py

Needs flax and matplotlib.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

BOOK = Path(__file__).parent / "data" / "alice.txt"
COLOURS = {"tilewise": "#d1495b", "Flax": "#30638e"}


class Settings(NamedTuple):
    """Everything that a run depends on."""

    steps: int = 150
    context: int = 512
    batch: int = 4
    layers: int = 2
    width: int = 128
    heads: int = 4
    rate: float = 2e-3
    seed: int = 0


class Run(NamedTuple):
    """What a training returns: the loss, and the seconds, of each step."""

    losses: list[float]
    step_s: list[float]


def model_of(attention_fn: Callable[..., Any], letters: int, settings: Settings) -> Any:
    """Return a transformer that predicts the next letter, its attention being the parameter."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    rngs, width = nnx.Rngs(settings.seed), settings.width

    class Block(nnx.Module):
        def __init__(self) -> None:
            self.before, self.between = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
            self.attend = nnx.MultiHeadAttention(
                settings.heads, width, decode=False, attention_fn=attention_fn, rngs=rngs
            )
            self.up = nnx.Linear(width, 4 * width, rngs=rngs)
            self.down = nnx.Linear(4 * width, width, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = x + self.attend(self.before(x), is_causal=True)
            return x + self.down(jax.nn.gelu(self.up(self.between(x))))

    class Transformer(nnx.Module):
        def __init__(self) -> None:
            self.letters = nnx.Embed(letters, width, rngs=rngs)
            self.places = nnx.Embed(settings.context, width, rngs=rngs)
            self.blocks = nnx.List([Block() for _ in range(settings.layers)])
            self.last = nnx.LayerNorm(width, rngs=rngs)

        def __call__(self, tokens: Any) -> Any:
            x = self.letters(tokens) + self.places(jnp.arange(tokens.shape[1]))
            for block in self.blocks:
                x = block(x)
            return self.letters.attend(self.last(x))

    return Transformer()


def train(name: str, attention_fn: Callable[..., Any], settings: Settings) -> Run:
    """Fit a model with that attention to random pieces of the book."""
    import jax
    import optax
    from flax import nnx

    alphabet, book = np.unique(list(BOOK.read_text(encoding="utf-8")), return_inverse=True)
    model = model_of(attention_fn, len(alphabet), settings)
    optimiser = nnx.Optimizer(model, optax.adamw(settings.rate), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimiser: Any, pieces: Any) -> Any:
        def loss(model: Any) -> Any:
            scores = model(pieces[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(scores, pieces[:, 1:]).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimiser.update(model, grads)
        return value

    random, run = np.random.default_rng(settings.seed), Run([], [])
    span = np.arange(settings.context + 1)
    for _ in track(range(settings.steps), name, transient=True):
        starts = random.integers(len(book) - len(span), size=(settings.batch, 1))
        begin = time.perf_counter()
        run.losses.append(float(jax.block_until_ready(step(model, optimiser, book[starts + span]))))
        run.step_s.append(time.perf_counter() - begin)
    return run


def difference(run: Run, other: Run) -> float:
    """Return the largest difference of the two losses over all steps."""
    return max(abs(a - b) for a, b in zip(run.losses, other.losses, strict=True))


def plot(runs: dict[str, Run], path: Path) -> None:
    """Draw the loss curves, and the time of a step as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    curves, times = figure.subplots(1, 2, width_ratios=[3, 1])
    for width, (name, run) in zip((4, 1.2), runs.items(), strict=True):
        curves.plot(run.losses, color=COLOURS[name], label=name, linewidth=width)
        times.bar(name, 1e3 * statistics.median(run.step_s), color=COLOURS[name])
    curves.set(xlabel="step", ylabel="loss (nats per character)")
    curves.legend(frameon=False)
    times.set_title("ms per step", fontsize=10)
    for axes in (curves, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(
    steps: Annotated[int, typer.Option(min=2)] = Settings().steps,
    context: Annotated[int, typer.Option(min=8, help="Characters.")] = Settings().context,
    batch: Annotated[int, typer.Option(min=1)] = Settings().batch,
    layers: Annotated[int, typer.Option(min=1)] = Settings().layers,
    width: Annotated[int, typer.Option(min=1, help="A multiple of --heads.")] = Settings().width,
    heads: Annotated[int, typer.Option(min=1)] = Settings().heads,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("flax_gpt.png"),
) -> None:
    """Train a small transformer of Flax with tilewise and with Flax's own attention."""
    os.environ.setdefault("NPROC", str(threads))  # XLA reads it when JAX starts
    from flax import nnx

    import tilewise as tw

    tw.set_num_threads(threads)
    settings = Settings(steps, context, batch, layers, width, heads, seed=seed)
    attentions = {"tilewise": tw.jax.flax_attention, "Flax": nnx.dot_product_attention}
    runs = {name: train(name, function, settings) for name, function in attentions.items()}
    table = Table("", *runs)
    milliseconds = (f"{1e3 * statistics.median(run.step_s):.1f} ms" for run in runs.values())
    table.add_row("time per step, median", *milliseconds)
    table.add_row("loss of the last step", *(f"{run.losses[-1]:.5f}" for run in runs.values()))
    largest = difference(*runs.values())
    table.add_row("largest difference of the loss", "", f"{largest:.1e}")
    Console().print(table)
    plot(runs, out)
    print(f"picture: {out}")


if __name__ == "__main__":
    typer.run(main)
