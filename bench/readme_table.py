"""Write the figures of benchmarks into README.md and docs/benchmark.md, between their markers.

tilewise bench attention --suite full --json bench/results/attention.json
tilewise bench attention --suite train --json bench/results/train.json
tilewise bench attention --suite jax --json bench/results/jax.json
tilewise bench attention --derivatives --json bench/results/derivatives.json
tilewise bench softmax --json bench/results/softmax.json
tilewise bench cross_entropy --json bench/results/cross_entropy.json
tilewise bench linear_cross_entropy --json bench/results/linear_cross_entropy.json
python bench/readme_table.py bench/results/*.json

A page has `<!-- NAME:start -->` and `<!-- NAME:end -->` around a table, where NAME is `bench`,
`bench-train` or that of another suite, or `derivatives`; `bench-train-short` and its like say for
each case how much longer the fastest peer takes. A table goes into every page that has its markers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_DOCS = ROOT / "docs"
ROWS = ("softmax", "cross_entropy", "linear_cross_entropy")
PAGES = (
    ROOT / "README.md",
    _DOCS / "benchmark.md",
    _DOCS / "jax.md",
    *(_DOCS / "ops" / f"{name}.md" for name in ROWS),
)
READ = "plain read"
Timings = dict[str, dict[str, Any]]


def cell(timings: Timings, contender: str, first: str) -> str:
    """Milliseconds of one contender, and how many times longer than the first it takes."""
    timing = timings.get(contender)
    if timing is None:
        return "-"
    milliseconds = f"{1e3 * timing['median_s']:.{1 if timing['median_s'] >= 1e-3 else 2}f}"
    return milliseconds if contender == first else f"{milliseconds} ({timing['ratio']:.2f}x)"


def rows(run: dict[str, Any], names: list[str], dtype: str) -> list[str]:
    """One line for each direction and number of threads of a case."""
    lines = []
    counts = [(t["direction"], t["threads"]) for t in run["timings"]]
    for direction, threads in dict.fromkeys(counts):
        own = {
            t["contender"]: t
            for t in run["timings"]
            if (t["direction"], t["threads"]) == (direction, threads)
        }
        first = own[names[0]]
        cells = [cell(own, name, names[0]) for name in names]
        if reads(run):
            cells.append(f"{first['kv_gbytes_per_s']:.1f}")
            cells.append(f"{100 * first['share_of_read']:.0f} %")
        else:
            share = first["share_of_peak"]
            cells.append("-" if share is None else f"{100 * share:.0f} %")
        if run["case"].get("derivatives"):
            before = {"jvp": "forward", "double backward": "backward"}.get(direction)
            cells.append(f"{first['factor']:.2f} {before}" if before else "")
        label = f"{run['case']['name']}{dtype}"
        label += f", {direction}" * (not reads(run))
        label += f", {threads} thread{'s' * (threads > 1)}" * (len(threads_of(run)) > 1)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def reads(run: dict[str, Any]) -> bool:
    """Whether a plain read of keys and values took part."""
    return any(t.get("share_of_read") is not None for t in run["timings"])


def threads_of(run: dict[str, Any]) -> list[int]:
    """The numbers of threads of a case."""
    return list(dict.fromkeys(t.get("threads") or run["threads"][0] for t in run["timings"]))


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table with the machine and versions below it."""
    runs = [run for run in result["runs"] if not run["case"]["threads"]]
    names = [
        name
        for name in dict.fromkeys(t["contender"] for run in runs for t in run["timings"])
        if name != READ
    ]
    heads = ["milliseconds", *names]
    heads += ["GB/s", "of a plain read"] if any(map(reads, runs)) else ["of peak"]
    heads += ["in units of its own"] * any(run["case"].get("derivatives") for run in runs)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    several = "," in result["dtype"]
    for run in runs:
        lines += rows(run, names, f", {run['dtype']}" if several else "")
    lines += ["", below(result, runs)]
    lines.append(f"In brackets: the time over that of {names[0]}, median of alternating turns.")
    lines += absent(runs)
    for run in result["runs"]:
        if run["case"]["threads"]:
            lines.append(gain(run))
    return "\n".join([*lines, *memory(result)]) + "\n"


def rows_table(result: dict[str, Any]) -> str:
    """Return the Markdown table of operators of rows: one line for each case."""
    runs = result["runs"]
    names = list(dict.fromkeys(t["contender"] for run in runs for t in run["timings"]))
    copies = any(t["share_of_copy"] for run in runs for t in run["timings"])
    heads = ["milliseconds", *names, *["of memcpy"] * copies]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for run in runs:
        own = {t["contender"]: t for t in run["timings"]}
        rest = [f"{100 * (own[names[0]]['share_of_copy'] or 0):.0f} %"] * copies
        cells = [*(cell(own, name, names[0]) for name in names), *rest]
        lines.append(f"| {run['case']['name']} | {' | '.join(cells)} |")
        if run["case"]["memory"]:
            sizes = [f"{own[n]['extra_bytes'] / 2**20:.1f}" if n in own else "-" for n in names]
            lines.append(f"| MiB beside inputs and outputs | {' | '.join(sizes + [''] * copies)} |")
        if "loss" in own[names[0]]["errors"]:
            errors = [f"{own[n]['errors']['loss']:.0e}" if n in own else "-" for n in names]
            lines.append(f"| relative error of the loss | {' | '.join(errors)} |")
    lines += ["", below({**result, "dtype": "float32 unless said otherwise"}, runs)]
    told = f"In brackets: the time over that of {names[0]}, median of alternating turns."
    told += " Of memcpy: bytes read and written per second over the copy's." * copies
    return "\n".join([*lines, told, *absent(runs)]) + "\n"


def rows_short(result: dict[str, Any]) -> str:
    """Return a table of how many times longer the fastest peer of rows takes, and of the copy."""
    lines = ["| | the fastest peer takes | of memcpy |", "|---|---|---|"]
    for run in result["runs"]:
        first, *others = run["timings"]
        peers = [(t["ratio"], t["contender"]) for t in others if t["contender"] != "memcpy"]
        shown = "{:.2f}x {}".format(*min(peers)) if peers else "-"
        share = f"{100 * first['share_of_copy']:.0f} %" if first["share_of_copy"] else "-"
        lines.append(f"| {run['case']['name']} | {shown} | {share} |")
    told = below({**result, "dtype": "float32 unless said otherwise"}, result["runs"])
    return "\n".join([*lines, "", told]) + "\n"


def absent(runs: list[dict[str, Any]]) -> list[str]:
    """Say which peers there are no figures of, and why."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, reason in run["skipped"].items():
            found.setdefault(f"{name} ({reason})", {})[run.get("dtype", "")] = None
    every = {run.get("dtype", "") for run in runs}
    return [
        f"Not available{'' if set(kinds) == every else ' in ' + ' and '.join(kinds)}: {name}."
        for name, kinds in found.items()
    ]


def short(result: dict[str, Any]) -> str:
    """Return a table of how many times longer the fastest peer takes."""
    found: dict[str, dict[str, str]] = {}
    for run in result["runs"]:
        cells = found.setdefault(run["case"]["name"], {})
        for direction, threads in dict.fromkeys(
            (t["direction"], t["threads"]) for t in run["timings"]
        ):
            peers = [
                (t["ratio"], t["contender"])
                for t in run["timings"]
                if (t["direction"], t["threads"]) == (direction, threads)
                and not t["contender"].startswith(("tilewise", READ))
            ]
            head = f"{run['dtype']} {direction}"
            head += f", {threads} thread{'s' * (threads > 1)}" * (len(threads_of(run)) > 1)
            cells[head] = "{:.2f}x {}".format(*min(peers)) if peers else "-"
    heads = list(dict.fromkeys(head for cells in found.values() for head in cells))
    lines = [f"| the fastest peer takes | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, cells in found.items():
        lines.append(f"| {name} | {' | '.join(cells.get(head, '-') for head in heads)} |")
    return "\n".join([*lines, "", below(result, result["runs"])]) + "\n"


def below(result: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Say what was measured where."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine, target = result["machine"]["processor"], result["machine"].get("target")
    where = f"{machine}, {target}" if target else machine
    counts = dict.fromkeys(count for run in runs for count in threads_of(run))
    shown = "one thread, " if list(counts) == [1] else ""
    return f"{result['dtype']}, {shown}{where}; {versions}."


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


def marker(result: dict[str, Any]) -> str:
    """Return the name between whose markers a table goes."""
    suite = result.get("suite", "full")
    if result.get("memory") and suite in (None, "full"):
        return "derivatives"
    return "bench" if suite in ("quick", "full") else f"bench-{suite}"


def replaced(page: str, name: str, text: str) -> str:
    """Return a page with the text between the markers of that name, where it has them."""
    start, end = f"<!-- {name}:start -->\n", f"<!-- {name}:end -->"
    before, found, rest = page.partition(start)
    return before + start + "\n" + text + "\n" + end + rest.partition(end)[2] if found else page


def main(*paths: str) -> None:
    """Replace the tables in the pages by those of result files."""
    for path in paths:
        result = json.loads(Path(path).read_text())
        if "runs" not in result:
            continue
        name = marker(result)
        if result.get("suite") in ROWS:
            for page in PAGES:
                text = replaced(page.read_text(), name, rows_table(result))
                page.write_text(replaced(text, f"{name}-short", rows_short(result)))
            continue
        for page in PAGES:
            text = replaced(page.read_text(), name, table(result))
            if result.get("suite"):
                text = replaced(text, f"{name}-short", short(result))
            page.write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
