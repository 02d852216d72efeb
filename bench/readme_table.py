"""Write the figures of a benchmark into README.md, between its bench markers.

tilewise bench attention --suite full --json bench/results/attention.json
python bench/readme_table.py bench/results/attention.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- bench:start -->\n", "<!-- bench:end -->"


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
        percent = "-" if share is None else f"{100 * share:.0f} %"
        lines.append(f"| {run['case']['name']}, {direction} | {' | '.join(cells)} | {percent} |")
    return lines


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table with the machine and versions below it."""
    runs = [run for run in result["runs"] if not run["case"]["threads"]]
    found = dict.fromkeys(t["contender"] for run in runs for t in run["timings"])
    names = ["tilewise", *(name for name in found if name != "tilewise")]
    lines = [f"| milliseconds | {' | '.join(names)} | of peak |", "|---" * (len(names) + 2) + "|"]
    for run in runs:
        lines += rows(run, names)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines += ["", f"{result['dtype']}, one thread, {result['machine']['processor']}; {versions}."]
    lines.append("In brackets: the time over tilewise's, median of alternating turns.")
    for run in result["runs"]:
        if run["case"]["threads"]:
            lines.append(gain(run))
    return "\n".join(lines) + "\n"


def gain(run: dict[str, Any]) -> str:
    """Say how much faster tilewise is with more threads."""
    own = [t for t in run["timings"] if t["contender"] == "tilewise"]
    parts = []
    for direction in dict.fromkeys(t["direction"] for t in own):
        one, *more = (t for t in own if t["direction"] == direction)
        parts += [f"{one['median_s'] / t['median_s']:.2f}x {direction}" for t in more]
    return f"Two threads against one: {', '.join(parts)}."


def main(path: str) -> None:
    """Replace the table in README.md by that of a result file."""
    result = json.loads(Path(path).read_text())
    before, rest = README.read_text().split(START)
    after = rest.split(END)[1]
    README.write_text(before + START + "\n" + table(result) + "\n" + END + after)


if __name__ == "__main__":
    main(*sys.argv[1:])
