"""Write the figures of benchmarks into README.md, each between its own markers.

tilewise bench attention --suite full --json bench/results/attention.json
tilewise bench attention --derivatives --json bench/results/derivatives.json
python bench/readme_table.py bench/results/attention.json bench/results/derivatives.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"


def cell(timings: dict[str, dict[str, Any]], contender: str, own: str = "tilewise") -> str:
    """Milliseconds of one contender, and how many times longer than tilewise it takes."""
    timing = timings.get(contender)
    if timing is None:
        return "-"
    milliseconds = f"{1e3 * timing['median_s']:.1f}"
    return milliseconds if contender == own else f"{milliseconds} ({timing['ratio']:.2f}x)"


def rows(run: dict[str, Any], names: list[str]) -> list[str]:
    """One line for each direction of a case that ran with one thread."""
    lines = []
    for direction in dict.fromkeys(t["direction"] for t in run["timings"]):
        own = {t["contender"]: t for t in run["timings"] if t["direction"] == direction}
        share = own["tilewise"]["share_of_peak"]
        cells = [cell(own, name) for name in names]
        cells.append("-" if share is None else f"{100 * share:.0f} %")
        if run["case"].get("derivatives"):
            first = {"jvp": "forward", "double backward": "backward"}.get(direction)
            cells.append(f"{own['tilewise']['factor']:.2f} {first}" if first else "")
        lines.append(f"| {run['case']['name']}, {direction} | {' | '.join(cells)} |")
    return lines


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table with the machine and versions below it."""
    runs = [run for run in result["runs"] if not run["case"]["threads"]]
    found = dict.fromkeys(t["contender"] for run in runs for t in run["timings"])
    names = ["tilewise", *(name for name in found if name != "tilewise")]
    heads = ["milliseconds", *names, "of peak"] + ["in units of its own"] * bool(memory(result))
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for run in runs:
        lines += rows(run, names)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines += ["", f"{result['dtype']}, one thread, {result['machine']['processor']}; {versions}."]
    lines.append("In brackets: the time over tilewise's, median of alternating turns.")
    for run in result["runs"]:
        if run["case"]["threads"]:
            lines.append(gain(run))
    return "\n".join([*lines, *memory(result)]) + "\n"


def gain(run: dict[str, Any]) -> str:
    """Say how much faster tilewise is with more threads."""
    own = [t for t in run["timings"] if t["contender"] == "tilewise"]
    parts = []
    for direction in dict.fromkeys(t["direction"] for t in own):
        one, *more = (t for t in own if t["direction"] == direction)
        parts += [f"{one['median_s'] / t['median_s']:.2f}x {direction}" for t in more]
    return f"Two threads against one: {', '.join(parts)}."


def memory(result: dict[str, Any]) -> list[str]:
    """Return the Markdown table of the memory beside inputs and outputs, where it was measured."""
    lines = []
    for space in result.get("memory", ()):
        found = {(f["direction"], f["N"], f["contender"]): f for f in space["figures"]}
        names = list(dict.fromkeys(name for _, _, name in found))
        heads = [f"MiB beside inputs and outputs, {space['case']['name']}", *names]
        lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for direction, N in dict.fromkeys(key[:2] for key in found):
            cells = [space_cell(found[direction, N, name]) for name in names]
            at = f" at N={N}" if space["case"]["N"] != N else ""
            lines.append(f"| {direction}{at} | {' | '.join(cells)} |")
    return lines


def space_cell(figures: dict[str, Any]) -> str:
    """Mebibytes and seconds of one contender, or why there are none."""
    if figures["skipped"]:
        return figures["skipped"]
    return f"{figures['extra_bytes'] / 2**20:.1f} ({figures['seconds']:.1f} s)"


def main(*paths: str) -> None:
    """Replace the tables in README.md by those of result files."""
    for path in paths:
        result = json.loads(Path(path).read_text())
        name = "derivatives" if result.get("memory") else "bench"
        start, end = f"<!-- {name}:start -->\n", f"<!-- {name}:end -->"
        before, rest = README.read_text().split(start)
        after = rest.split(end)[1]
        README.write_text(before + start + "\n" + table(result) + "\n" + end + after)


if __name__ == "__main__":
    main(*sys.argv[1:])
