"""Pictures of measured figures; needs the extra `plot` (matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["bench_figure"]

_COLOURS = {
    "tilewise": "#d1495b",
    "PyTorch": "#30638e",
    "PyTorch, packed": "#6c9bc4",
    "NumPy textbook": "#9a9a9a",
}


def bench_figure(result: dict[str, Any], path: Path) -> None:
    """Draw the GFLOP/s of every case, direction and contender as bars.

    Args:
        result: what `tilewise.bench.attention.report` returns.
        path: where the picture goes; its suffix chooses the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = [(run, timing) for run in result["runs"] for timing in run["timings"]]
    figure = Figure(figsize=(9, 1.2 + 0.27 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places, labels = _places(bars)
    for place, (_, timing) in zip(places, bars, strict=True):
        colour = _COLOURS.get(timing["contender"], "#555555")
        axes.barh(place, timing["gflops"], color=colour, height=0.85)
        axes.text(timing["gflops"], place, f" {timing['gflops']:.0f}", va="center", fontsize=7)
    axes.set_yticks(places, labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    peaks = [run["peak_gflops"] for run in result["runs"] if run["peak_gflops"]]
    if peaks:
        axes.axvline(max(peaks), color="black", linewidth=0.8, linestyle="--")
        axes.text(max(peaks), -1.2, "FMA peak of one core", ha="right", fontsize=7)
    axes.set_xlabel("GFLOP/s, median")
    title = f"attention, {result['dtype']}, {result['machine']['processor']}"
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _places(bars: list[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[list[float], list[str]]:
    """Return the height and the label of each bar, with a gap between cases and directions."""
    places: list[float] = []
    labels: list[str] = []
    height, group = -1.0, None
    for run, timing in bars:
        this = (timing["case"], timing["direction"])
        height += 1.0 if this == group else 1.6
        name = timing["contender"]
        if run["case"]["threads"]:
            name += f", {timing['threads']} thr."
        label = name if this == group else f"{timing['case']} · {timing['direction']} · {name}"
        places.append(height)
        labels.append(label)
        group = this
    return places, labels
