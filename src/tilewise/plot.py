"""Pictures of measured figures; needs the extra `plot` (matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["bench_figure"]

_COLOURS = {
    "tilewise": "#d1495b",
    "tilewise.torch": "#e8a0a9",
    "PyTorch": "#30638e",
    "PyTorch, packed": "#6c9bc4",
    "PyTorch math": "#30638e",
    "NumPy textbook": "#9a9a9a",
}


def bench_figure(result: dict[str, Any], path: Path) -> None:
    """Draw the GFLOP/s of every case, direction and contender as bars, and below them the memory.

    Args:
        result: what `tilewise.bench.attention.report` returns.
        path: where the picture goes; its suffix chooses the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = [
        (f"{t['case']} · {t['direction']}", _contender(run, t), t["contender"], t["gflops"])
        for run in result["runs"]
        for t in run["timings"]
    ]
    spaces = [
        (f"N={f['N']} · {f['direction']}", f["contender"], f["contender"], f["extra_bytes"] / 2**20)
        for space in result.get("memory", ())
        for f in space["figures"]
        if not f["skipped"]
    ]
    heights = [len(panel) for panel in (bars, spaces) if panel]
    figure = Figure(figsize=(9, 1.2 + 0.27 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes, *more = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    _bars(axes, bars)
    peaks = [run["peak_gflops"] for run in result["runs"] if run["peak_gflops"]]
    if peaks:
        axes.axvline(max(peaks), color="black", linewidth=0.8, linestyle="--")
        axes.text(max(peaks), -1.2, "FMA peak of one core", ha="right", fontsize=7)
    axes.set_xlabel("GFLOP/s, median")
    title = f"attention, {result['dtype']}, {result['machine']['processor']}"
    axes.set_title(title, fontsize=9, loc="left")
    for below in more:
        _bars(below, spaces)
        below.set_xscale("symlog", linthresh=1)
        below.set_xlabel("MiB beside inputs and outputs, from the inputs to all results")
    figure.savefig(path, dpi=150)


def _contender(run: dict[str, Any], timing: dict[str, Any]) -> str:
    threads = f", {timing['threads']} thr." if run["case"]["threads"] else ""
    return f"{timing['contender']}{threads}"


def _bars(axes: Any, bars: list[tuple[str, str, str, float]]) -> None:
    """Draw (group, label, contender, value) as bars with a gap between groups."""
    places: list[float] = []
    labels: list[str] = []
    height, last = -1.0, None
    for group, label, contender, value in bars:
        height += 1.0 if group == last else 1.6
        places.append(height)
        labels.append(label if group == last else f"{group} · {label}")
        last = group
        axes.barh(height, value, color=_COLOURS.get(contender, "#555555"), height=0.85)
        axes.text(value, height, f" {value:.0f}", va="center", fontsize=7)
    axes.set_yticks(places, labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
