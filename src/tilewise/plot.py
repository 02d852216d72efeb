"""Pictures of measured figures; needs the extra `plot` (matplotlib)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["bench_figure"]

_COLOURS = {
    "tilewise": "#d1495b",
    "tilewise, varlen": "#d1495b",
    "tilewise.torch": "#e8a0a9",
    "tilewise, one by one": "#e8a0a9",
    "PyTorch": "#30638e",
    "PyTorch, packed": "#6c9bc4",
    "PyTorch, one by one": "#30638e",
    "PyTorch, padded": "#6c9bc4",
    "PyTorch math": "#30638e",
    "FlexAttention": "#a8c4dd",
    "onnxruntime": "#8f6bb3",
    "NumPy textbook": "#9a9a9a",
    "plain read": "#c8c8c8",
}
_Bar = tuple[str, str, str, float]


def bench_figure(result: dict[str, Any], path: Path) -> None:
    """Draw every case, direction and contender as bars: GFLOP/s, GB/s of decoding, and memory.

    Args:
        result: what `tilewise.bench.attention.report` returns.
        path: where the picture goes; its suffix chooses the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(draw, bars) for draw, bars in _panels(result) if bars]
    heights = [len(bars) for _, bars in panels]
    figure = Figure(figsize=(9, 1.2 + 0.27 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    for axes, (draw, bars) in zip(every, panels, strict=True):
        _bars(axes, bars)
        draw(axes, result)
    title = f"attention, {result['dtype']}, {result['machine']['processor']}"
    every[0].set_title(title, fontsize=9, loc="left")
    figure.savefig(path, dpi=150)


def _panels(
    result: dict[str, Any],
) -> list[tuple[Callable[[Any, dict[str, Any]], None], list[_Bar]]]:
    """Return the bars of each panel, with what draws the rest of it."""
    several = len({run["dtype"] for run in result["runs"]}) > 1
    speeds: list[_Bar] = []
    rates: list[_Bar] = []
    for run in result["runs"]:
        kind = f", {run['dtype']}" if several else ""
        read = any(t["share_of_read"] is not None for t in run["timings"])
        for t in run["timings"]:
            bars, value = (rates, "kv_gbytes_per_s") if read else (speeds, "gflops")
            group = f"{t['case']}{kind} · {t['direction']}"
            bars.append((group, _contender(run, t), t["contender"], t[value]))
    spaces = [
        (f"N={f['N']} · {f['direction']}", f["contender"], f["contender"], f["extra_bytes"] / 2**20)
        for space in result.get("memory", ())
        for f in space["figures"]
        if not f["skipped"]
    ]
    return [(_draw_speeds, speeds), (_draw_rates, rates), (_draw_memory, spaces)]


def _draw_speeds(axes: Any, result: dict[str, Any]) -> None:
    peaks = [run["peak_gflops"] for run in result["runs"] if run["peak_gflops"]]
    if peaks:
        axes.axvline(max(peaks), color="black", linewidth=0.8, linestyle="--")
        axes.text(max(peaks), -1.2, "FMA peak of one core", ha="right", fontsize=7)
    axes.set_xlabel("GFLOP/s, median")


def _draw_rates(axes: Any, _: dict[str, Any]) -> None:
    axes.set_xlabel("GB/s of keys and values, median")


def _draw_memory(axes: Any, _: dict[str, Any]) -> None:
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("MiB beside inputs and outputs, from the inputs to all results")


def _contender(run: dict[str, Any], timing: dict[str, Any]) -> str:
    threads = f", {timing['threads']} thr." if len(run["threads"]) > 1 else ""
    return f"{timing['contender']}{threads}"


def _bars(axes: Any, bars: list[_Bar]) -> None:
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
        shown = f" {value:.0f}" if value >= 10 else f" {value:.1f}"
        axes.text(value, height, shown, va="center", fontsize=7)
    axes.set_yticks(places, labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
