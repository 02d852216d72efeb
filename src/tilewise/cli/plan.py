"""`tilewise plan`: compile the GPU kernels without a GPU, and say what they need."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
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

Registers, spills, shared memory and matrix instructions of each kernel that the GPU implementations
launch, as Triton {triton} compiles them. No GPU took part: this says that they fit, not how fast
they are, and no time of theirs has been measured. Spills are bytes that each thread stores and
loads for lack of registers; programs is how many a multiprocessor holds at once. Where warps are
specialised, the registers are those at the start: the consumers take 240 each later on.

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
    match: Annotated[list[str] | None, typer.Option(help="Only kernels of this name.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Compilers at a time.")] = None,
    write: Annotated[Path | None, typer.Option(help="Write the page with the tables.")] = None,
    check: Annotated[Path | None, typer.Option(help="Compare with the page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile every planned GPU kernel; fail where one spills, or does not fit."""
    wanted = arch or list(GPUS)
    for name in set(wanted) - set(GPUS):
        raise value_error("plan", "--arch", f"be one of {', '.join(GPUS)}", repr(name))
    found = list(compiled(wanted, match or [], jobs))
    if not found:
        raise value_error("plan", "--match", "name a kernel of the architectures", repr(match))
    if write is not None:
        replace_text(write, page(found))
    if as_json:
        print(json.dumps([one.as_dict() for one in found]))
    else:
        print(tables(found))
    wrong = [f"{one.arch} {one.name}: {fault}" for one in found for fault in one.faults()]
    if check is not None:
        wrong += differences(found, check.read_text(encoding="utf-8"))
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
        names: Only kernels that have one of these; all where there is none.
        jobs: How many compilers run at a time; as many as there are cores by default.
    """
    work = [
        (module, arch, name)
        for arch in arches
        for module in planning_modules()
        for name in _names(module, arch)
        if not names or name in names
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


def _names(module: str, arch: str) -> list[str]:
    return [one.name for one in import_module(module).planned(arch)]


def _built(module: str, arch: str, name: str) -> Resources:
    planned = import_module(module).planned(arch)
    return build(next(one for one in planned if one.name == name), arch)


def page(found: Iterable[Resources]) -> str:
    """Return the page with what every kernel needs."""
    return _PAGE.format(triton=version("triton")) + tables(found)


def tables(found: Iterable[Resources]) -> str:
    """Return a Markdown table for each architecture."""
    by_arch: dict[str, list[str]] = {}
    for one in found:
        by_arch.setdefault(one.arch, []).append(row(one))
    parts = [
        f"## {arch} ({GPUS[arch].name})\n\n{_HEAD}\n" + "\n".join(rows) + "\n"
        for arch, rows in by_arch.items()
    ]
    return "\n".join(parts)


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


def differences(found: Iterable[Resources], text: str) -> list[str]:
    """Return how a page differs from what the compiler says of some kernels."""
    made_by = f"as Triton {version('triton')} compiles them"
    if made_by not in " ".join(text.split()):
        return [f"the page was made by another version of Triton than {version('triton')}"]
    sections = {part.split(" ", 1)[0]: part for part in text.split("\n## ")[1:]}
    return [
        f"{one.arch} {one.name}: the page does not have the row {row(one)}"
        for one in found
        if row(one) not in sections.get(one.arch, "")
    ]
