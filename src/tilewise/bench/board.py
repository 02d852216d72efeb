"""What is measured on a GPU board, in steps that can be cut off and taken up again.

Nothing here needs a GPU: the list of steps, the file of results, and the tables made of it. What
runs on the board is in `tilewise.bench.board_steps`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

__all__ = [
    "CONTENDERS",
    "Check",
    "Problem",
    "Step",
    "faults",
    "is_checked",
    "new_results",
    "problems",
    "read",
    "run_steps",
    "steps",
    "tables",
    "write",
]

SCHEMA: Final = 1
LENGTHS: Final = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS: Final = (64, 128, 256)
JAX_HEAD_DIMS: Final = (64, 128)
DECODED_HEAD_DIMS: Final = (64, 128)
DECODED_LENGTHS: Final = (1024, 8192, 65536)
TOKENS, WIDTH = 16384, 2048
"""Tokens and width of every problem: a tensor has 64 MiB, more than the second-level cache."""

OURS: Final = ("triton", "hopper")
PEERS: Final = ("sdpa flash", "sdpa cudnn")
CONTENDERS: Final = (*OURS, *PEERS)
PASSES: Final = ("forward", "backward")
SANITIZERS: Final = ("memcheck", "racecheck", "synccheck")


@dataclass(frozen=True, slots=True)
class Problem:
    """One timed problem: bfloat16, as many heads as fill the width, queries as many as keys."""

    kind: str
    D: int
    N: int
    causal: bool

    @property
    def B(self) -> int:
        """Return the batch."""
        return TOKENS // self.N

    @property
    def H(self) -> int:
        """Return the heads."""
        return WIDTH // self.D

    @property
    def flops(self) -> float:
        """Return the operations of the products that the method needs: 2 forward, 5 backward."""
        pairs = self.B * self.H * self.N * self.N * (0.5 if self.causal else 1.0)
        return (4.0 if self.kind == "forward" else 10.0) * pairs * self.D

    @property
    def name(self) -> str:
        """Return what the results call it."""
        return f"{self.kind} D={self.D} N={self.N} {'causal' if self.causal else 'full'}"


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison with the float64 oracle, before anything is timed."""

    contender: str
    D: int
    causal: bool

    @property
    def name(self) -> str:
        """Return what the results call it."""
        return f"check {self.contender} D={self.D} {'causal' if self.causal else 'full'}"


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the script: its name, what it does, and with what."""

    name: str
    action: str
    arguments: Mapping[str, Any]


def problems() -> Iterator[Problem]:
    """Return what is timed: the longest sequences first, for they say the most."""
    for kind in PASSES:
        for D in HEAD_DIMS:
            for N in reversed(LENGTHS):
                for causal in (False, True):
                    yield Problem(kind, D, N, causal)


def steps() -> Iterator[Step]:
    """Return every step in order: each takes well under a minute on the board."""
    yield Step("board", "board", {})
    for contender in CONTENDERS:
        for D in HEAD_DIMS:
            for causal in (False, True):
                check = Check(contender, D, causal)
                yield Step(check.name, "check", asdict(check))
    for tool in SANITIZERS:
        for contender in OURS:
            given = {"tool": tool, "contender": contender, "D": 64}
            yield Step(f"{tool} {contender}", "sanitize", given)
    for D in HEAD_DIMS:
        for kind in PASSES:
            if kind == "forward" or D < 256:
                yield Step(f"sweep {kind} D={D}", "sweep", {"kind": kind, "D": D})
    for problem in problems():
        yield Step(problem.name, "time", asdict(problem))
    for D in DECODED_HEAD_DIMS:
        for Nk in DECODED_LENGTHS:
            yield Step(f"decode D={D} Nk={Nk}", "decode", {"D": D, "Nk": Nk})
    for D in JAX_HEAD_DIMS:
        yield Step(f"jax D={D} causal", "jax", {"D": D, "causal": True})


def new_results() -> dict[str, Any]:
    """Return results of which no step is done."""
    return {"schema": SCHEMA, "steps": {}}


def read(path: Path) -> dict[str, Any]:
    """Return the results of a file, or new ones where there is none.

    Raises:
        ValueError: The file does not hold results of this script.
    """
    if not path.exists():
        return new_results()
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    wrong = faults(results)
    if wrong:
        raise ValueError(f"{path}: {wrong[0]}")
    return results


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Write results whole or not at all, so that a script that is cut off keeps what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1, sort_keys=True)
            file.write("\n")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def faults(results: Any) -> list[str]:
    """Return what is wrong with the form of results."""
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        return [f"must have schema {SCHEMA}"]
    known = {step.name: step for step in steps()}
    found = []
    for name, entry in dict(results.get("steps", {})).items():
        if name not in known:
            found.append(f"has a step that there is not, {name!r}")
        elif entry.get("status") not in ("done", "failed"):
            found.append(f"step {name!r} must be done or failed, got {entry.get('status')!r}")
        elif entry["status"] == "failed" and not entry.get("reason"):
            found.append(f"step {name!r} failed without a reason")
        elif entry["status"] == "done" and known[name].action == "time":
            found += _faults_of_times(name, entry.get("result"))
    return found


def _faults_of_times(name: str, result: Any) -> list[str]:
    if not isinstance(result, dict) or not set(result) <= set(CONTENDERS):
        return [f"step {name!r} must hold contenders"]
    return [
        f"step {name!r}: {contender} must have positive milliseconds or a reason"
        for contender, entry in result.items()
        if not (entry.get("ms", 0) > 0 or entry.get("reason"))
    ]


def run_steps(
    path: Path,
    do: Callable[[Step, Mapping[str, Any]], Any],
    clock: Callable[[], float],
    seconds: float,
    wanted: Callable[[Step], bool] = lambda step: True,
    say: Callable[[str], None] = print,
) -> int:
    """Do the steps that are not done yet until the time is over; return how many are left.

    A step that fails is written down with its reason, and is tried again by the next run.

    Args:
        path: The file of results, written after each step.
        do: Does a step, given the results so far, and returns what to write down.
        clock: Returns the time in seconds.
        seconds: No step begins after so many seconds.
        wanted: Which steps to do.
        say: Prints a line.
    """
    results, start = read(path), clock()
    due = [s for s in steps() if wanted(s) and not _is_done(results, s)]
    for place, step in enumerate(due):
        if clock() - start >= seconds:
            say(f"time is over: {len(due) - place} steps are left")
            return len(due) - place
        begin = clock()
        try:
            entry = {"status": "done", "result": do(step, results)}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            entry = {"status": "failed", "reason": f"{type(error).__name__}: {lines[0]}"}
        entry["seconds"] = round(clock() - begin, 2)
        results["steps"][step.name] = entry
        write(path, results)
        say(f"{step.name}: {entry['status']} {entry.get('reason', '')}".rstrip())
    return len([s for s in due if not _is_done(results, s)])


def _is_done(results: Mapping[str, Any], step: Step) -> bool:
    return bool(results["steps"].get(step.name, {}).get("status") == "done")


def is_checked(results: Mapping[str, Any], contender: str, problem: Problem) -> bool:
    """Return whether a contender has agreed with the oracle on problems like this one."""
    name = Check(contender, problem.D, problem.causal).name
    entry = results["steps"].get(name, {})
    passes = entry.get("result", {}).get("passes", [])
    return entry.get("status") == "done" and problem.kind in passes


def tables(results: Mapping[str, Any]) -> str:
    """Return TFLOP/s by problem and contender as Markdown, with the board they were measured on."""
    board = results["steps"].get("board", {}).get("result", {})
    if not board:
        return "Nothing has been measured.\n"
    parts = [f"{board['name']}, PyTorch {board['torch']}, Triton {board['triton']}; TFLOP/s"]
    for kind in PASSES:
        rows = [_row(results, problem) for problem in problems() if problem.kind == kind]
        rows = [row for row in rows if row]
        if rows:
            head = f"| {kind} | " + " | ".join(CONTENDERS) + " |\n|---|" + "---:|" * len(CONTENDERS)
            parts.append("\n".join([head, *rows]))
    parts += [f"{name}: {text}" for name, text in _of_decoding(results)]
    parts += [f"{name}: {text}" for name, text in _of_jax(results)]
    return "\n\n".join(parts) + "\n"


def _row(results: Mapping[str, Any], problem: Problem) -> str:
    entry = results["steps"].get(problem.name, {})
    if entry.get("status") != "done":
        return ""
    cells = []
    for contender in CONTENDERS:
        ms = entry["result"].get(contender, {}).get("ms")
        cells.append(f"{problem.flops / ms / 1e9:.0f}" if ms else "-")
    return f"| {problem.name.partition(' ')[2]} | " + " | ".join(cells) + " |"


def _of_decoding(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Return what each step of decoding found, in words."""
    for step in steps():
        entry = results["steps"].get(step.name, {})
        if step.action != "decode" or not entry:
            continue
        if entry["status"] == "failed":
            yield step.name, entry["reason"]
            continue
        said = [
            f"{contender} {of['ms']:.3f} ms, {of['gb_per_s']:.0f} GB/s"
            if "ms" in of
            else f"{contender} {of['reason']}"
            for contender, of in entry["result"].items()
        ]
        yield step.name, "; ".join(said)


def _of_jax(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Return what each step in JAX found, in words."""
    for step in steps():
        entry = results["steps"].get(step.name, {})
        if step.action != "jax" or not entry:
            continue
        if entry["status"] == "failed":
            yield step.name, entry["reason"]
            continue
        found = dict(entry["result"])
        version, said = found.pop("jax"), []
        for contender, of in found.items():
            times = [f"{kind} {ms:.2f} ms" for kind, ms in of.get("ms", {}).items()]
            said.append(f"{contender} {', '.join(times) or of.get('reason', 'nothing')}")
        yield step.name, f"JAX {version}; {'; '.join(said)}"
