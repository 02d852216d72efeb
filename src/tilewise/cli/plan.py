"""`tilewise plan`: compile the GPU kernels without a GPU, and say what they need."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from tilewise.base.errors import value_error
from tilewise.cli.files import replace_text
from tilewise.hardware.gpus import GPUS
from tilewise.hardware.offline import Resources, build

__all__ = ["plan", "register"]

_INTERPRET = "TRITON_INTERPRET"
_COLUMNS = "registers | spills | shared KiB | threads | programs | instructions"
_HEAD = f"| kernel | {_COLUMNS} |\n|---|{'---:|' * 5}---|"

_PAGE = """\
# What the GPU kernels need

Registers, spills, shared memory and matrix instructions of kernels that the GPU implementations
launch, as Triton {triton} compiles them; of those that are not listed nothing is known. No GPU took
part: this says what they need, not how fast they are, and no time of theirs has been measured.
Spills are bytes that each thread stores and loads for lack of registers; programs is how many a
multiprocessor holds at once. Where warps are specialised, the registers are those at the start: the
consumers take 240 each later on.

`tilewise plan --write docs/gpu-resources.md` made this page, and `tilewise plan --check
docs/gpu-resources.md` compares it with what the compiler says now.

"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("plan")(plan)


def plan(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90, sm_100 or gfx942; all by default.")
    ] = None,
    match: Annotated[
        list[str] | None, typer.Option(help="Only kernels of this name; * stands for anything.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Compilers at a time.")] = None,
    write: Annotated[Path | None, typer.Option(help="Write the page with the tables.")] = None,
    check: Annotated[Path | None, typer.Option(help="Compare with the page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile every planned GPU kernel; fail where one spills, or differs from the page."""
    wanted = arch or list(GPUS)
    for name in set(wanted) - set(GPUS):
        raise value_error("plan", "--arch", f"be one of {', '.join(GPUS)}", repr(name))
    found = list(compiled(wanted, match or [], jobs))
    if not found:
        raise value_error("plan", "--match", "name a kernel of the architectures", repr(match))
    rows = rows_of(found)
    if write is not None:
        kept = read_page(write) if (arch or match) and write.exists() else {}
        replace_text(write, page({name: kept.get(name, {}) | rows.get(name, {}) for name in GPUS}))
    if as_json:
        print(json.dumps([one.as_dict() for one in found]))
    else:
        print(tables(rows))
    wrong = [f"{one.arch} {one.name}: {fault}" for one in found for fault in one.faults()]
    if check is not None:
        wrong += differences(rows, read_page(check), whole=not (arch or match))
    for line in wrong:
        print(line)
    if wrong:
        raise typer.Exit(1)


def compiled(
    arches: Iterable[str], names: list[str], jobs: int | None = None
) -> Iterator[Resources]:
    """Return what each planned kernel needs on each architecture.

    Args:
        arches: The architectures.
        names: Only kernels that one of these patterns fits; all where there is none.
        jobs: How many compilers run at a time; as many as there are cores by default.
    """
    work = [
        (module, arch, name)
        for arch in arches
        for module in planning_modules()
        for name in names_of(module, arch)
        if not names or any(fnmatchcase(name, pattern) for pattern in names)
    ]
    # Compilers run in processes of their own, where kernels are not interpreted.
    interpret = os.environ.pop(_INTERPRET, None)
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=spawn) as pool:
            yield from pool.map(_built, *zip(*work, strict=True)) if work else ()
    finally:
        if interpret is not None:
            os.environ[_INTERPRET] = interpret


def planning_modules() -> list[str]:
    """Return the modules that say what is compiled for an operator."""
    from tilewise import ops

    (root,) = ops.__path__
    found = sorted(Path(root).rglob("plan.py"))
    parts = [path.relative_to(root).with_suffix("").parts for path in found]
    return [".".join((ops.__name__, *part)) for part in parts]


def names_of(module: str, arch: str) -> list[str]:
    """Return the names of what a module plans for an architecture."""
    return [one.name for one in import_module(module).planned(arch)]


def _built(module: str, arch: str, name: str) -> Resources:
    planned = import_module(module).planned(arch)
    return build(next(one for one in planned if one.name == name), arch)


Rows = dict[str, dict[str, str]]
"""For each architecture and the name of each kernel, its row of the table."""


def rows_of(found: Iterable[Resources]) -> Rows:
    """Return the rows of kernels."""
    rows: Rows = {}
    for one in found:
        rows.setdefault(one.arch, {})[one.name] = row(one)
    return rows


def row(one: Resources) -> str:
    """Return the row of a kernel."""
    cells: list[Any] = [
        one.name,
        one.registers,
        one.spill_stores + one.spill_loads,
        f"{one.shared / 1024:.1f}",
        one.threads,
        one.programs,
        ", ".join(f"{count} {kind}" for kind, count in one.instructions.items()) or "none",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def page(rows: Rows) -> str:
    """Return the page with the rows of every kernel."""
    return _PAGE.format(triton=version("triton")) + tables(rows)


def tables(rows: Rows) -> str:
    """Return a Markdown table for each architecture that has rows."""
    parts = [
        f"## {arch} ({GPUS[arch].name})\n\n{_HEAD}\n"
        + "\n".join(of_arch[name] for name in sorted(of_arch))
        + "\n"
        for arch, of_arch in rows.items()
        if of_arch
    ]
    return "\n".join(parts)


def read_page(path: Path) -> Rows:
    """Return the rows of a page; none of them where another version of Triton made it."""
    text = path.read_text(encoding="utf-8")
    if f"as Triton {version('triton')} compiles them" not in " ".join(text.split()):
        return {}
    rows: Rows = {}
    for part in text.split("\n## ")[1:]:
        lines = part.splitlines()
        of_arch = [line for line in lines if line.startswith("| ")][1:]
        rows[lines[0].split(" ", 1)[0]] = {line[2:].split(" | ")[0]: line for line in of_arch}
    return rows


def differences(rows: Rows, page: Rows, *, whole: bool = False) -> list[str]:
    """Return how a page differs from what the compiler says now.

    Args:
        rows: What the compiler says.
        page: The rows of the page.
        whole: Whether the page must have no other rows.
    """
    if not page:
        return [f"the page was not made by Triton {version('triton')}"]
    said = [(arch, name, text) for arch, of in rows.items() for name, text in of.items()]
    wrong = [
        f"{arch} {name}: the page does not have the row {text}"
        for arch, name, text in said
        if page.get(arch, {}).get(name) != text
    ]
    known = {(arch, name) for arch, name, _ in said}
    others = [(arch, name) for arch, of in page.items() for name in of if (arch, name) not in known]
    return wrong + [f"{arch} {name}: there is no such kernel" for arch, name in others if whole]
