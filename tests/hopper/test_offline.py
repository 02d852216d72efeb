"""Compilation without a GPU: what the machine code of the kernels needs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tilewise.cli.plan import (
    differences,
    names_of,
    page,
    plan,
    planning_modules,
    read_page,
    row,
    rows_of,
    tables,
)
from tilewise.hardware.gpus import GPUS
from tilewise.hardware.offline import Resources

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gpu-resources.md"

# One of each Hopper kernel, and one of the plain Triton kernels.
SHORT = {
    "hopper forward bf16 D=256 masked o_full": {"wgmma": 2 * (2 * 256 // 16 + 2 * 32 // 16)},
    "hopper dk dv bf16 D=64": {"wgmma": 2 * (2 * 64 // 16 + 2 * 64 // 16)},
    "hopper dq bf16 D=64": {"wgmma": 2 * (4 * 64 // 16 + 2 * 64 // 16)},
    "hopper rows bf16 D=64": {},
    "attention dkv D64 bfloat16 bias+alibi+softcap+sinks+dropout+mask": {"wgmma": 10},
}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from tilewise.cli import main; main()", "plan", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def compiled() -> list[Resources]:
    """What the command says of a few kernels, after comparing it with the page."""
    pytest.importorskip("triton")
    names = [text for name in SHORT for text in ("--match", name)]
    check = ["--check", str(PAGE)] if _same_triton() else []
    done = command("--arch", "sm_90", "--json", *names, *check)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [Resources(**one) for one in json.loads(done.stdout)]


def _same_triton() -> bool:
    return importlib.metadata.version("triton") in PAGE.read_text(encoding="utf-8")


def test_kernels_neither_spill_nor_wait_for_each_product(
    compiled: list[Resources],
) -> None:
    assert sorted(one.name for one in compiled) == sorted(SHORT)
    for one in compiled:
        assert one.faults() == []
        assert one.programs >= 1 and one.shared <= 227 * 1024


def test_each_product_is_the_instructions_that_its_extents_take(compiled: list[Resources]) -> None:
    for one in compiled:
        for kind, count in SHORT[one.name].items():
            assert one.instructions[kind] == count, one.name
        if one.name.startswith("hopper") and SHORT[one.name]:
            assert one.instructions["tma_load"] >= 4 and one.instructions["tma_store"] >= 2


@pytest.mark.parametrize("arch", GPUS)
def test_every_planned_kernel_has_a_name_of_its_own(arch: str) -> None:
    pytest.importorskip("triton")
    found = [name for module in planning_modules() for name in names_of(module, arch)]
    assert len(found) == len(set(found))
    assert any(name.startswith("attention fwd") for name in found)
    assert any(name.startswith("hopper") for name in found) == (arch == "sm_90")


@pytest.mark.parametrize("arch", GPUS)
def test_the_page_has_every_planned_kernel_and_none_that_spills(arch: str) -> None:
    pytest.importorskip("triton")
    if not _same_triton():
        pytest.skip("another Triton made the page")
    rows = read_page(PAGE)[arch]
    assert set(rows) == {name for module in planning_modules() for name in names_of(module, arch)}
    for name, text in rows.items():
        _, _, registers, spills, _, _, programs, _, _ = map(str.strip, text.split("|"))
        assert spills == "0" and int(registers) > 0 and int(programs) > 0, name


def test_a_spill_that_the_page_knows_is_a_fault_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    spilling = resources(spill_stores=4)
    path = tmp_path / "page.md"
    path.write_text(page(rows_of([spilling])), encoding="utf-8")
    monkeypatch.setattr("tilewise.cli.plan.compiled", lambda *_: [spilling])
    with pytest.raises(typer.Exit):
        plan(arch=["sm_90"], match=None, jobs=1, write=None, check=path, as_json=False)
    printed = capsys.readouterr().out
    assert "spills 4 + 0 bytes" in printed and "the page does not have" not in printed


def resources(**more: object) -> Resources:
    given = {
        "name": "some kernel",
        "arch": "sm_90",
        "registers": 168,
        "spill_stores": 0,
        "spill_loads": 0,
        "shared": 3 * 1024 + 512,
        "threads": 384,
        "programs": 1,
        "instructions": {"wgmma": 17, "tma_load": 3},
        "warnings": (),
    }
    return Resources(**given | more)


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"spill_stores": 4}, "spills 4 + 0 bytes"),
        ({"spill_loads": 12}, "spills 0 + 12 bytes"),
        ({"programs": 0}, "does not fit"),
        ({"warnings": ("(C7510) Potential Performance Loss",)}, "C7510"),
    ],
)
def test_what_no_kernel_should_do_is_a_fault(more: dict[str, object], fault: str) -> None:
    assert resources().faults() == []
    (found,) = resources(**more).faults()
    assert fault in found


def test_a_page_differs_where_a_row_has_changed(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    one, other = resources(), resources(arch="sm_80", name="other")
    path = tmp_path / "page.md"
    path.write_text(page(rows_of([one, other])), encoding="utf-8")
    assert row(one) in path.read_text(encoding="utf-8")
    known = read_page(path)
    assert known == rows_of([one, other])
    assert differences(rows_of([one]), known) == []
    (changed,) = differences(rows_of([resources(registers=176)]), known)
    assert "sm_90 some kernel" in changed and "176" in changed
    assert differences(rows_of([one]), known, whole=True) == [
        "sm_80 other: there is no such kernel"
    ]
    # The same row of another architecture does not count.
    assert differences(rows_of([resources(name="other")]), known)
    path.write_text(path.read_text("utf-8").replace("as Triton", "as an old Triton"), "utf-8")
    (version,) = differences(rows_of([one]), read_page(path))
    assert "not made by Triton" in version


def test_tables_have_a_part_for_each_architecture() -> None:
    text = tables(rows_of([resources(), resources(arch="gfx942", instructions={})]))
    assert text.count("\n|---|") == 2
    assert "| some kernel | 168 | 0 | 3.5 | 384 | 1 | 17 wgmma, 3 tma_load |" in text
    assert "| none |" in text.partition("gfx942")[2]


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "programs"),
    [
        ("sm_90", 12, 168, 164200, 1),  # registers leave room for one of three warpgroups
        ("sm_90", 4, 32, 0, 16),  # 64 warps
        ("sm_90", 4, 128, 0, 4),
        ("sm_90", 4, 32, 100 * 1024, 2),
        ("sm_90", 1, 8, 0, 32),  # never more than 32 programs
        ("sm_90", 4, 255, 228 * 1024, 0),
        ("sm_80", 8, 64, 80 * 1024, 2),
        ("gfx942", 4, 128, 0, 4),  # 512 registers of each of four SIMDs
        ("gfx942", 4, 32, 20 * 1024, 3),
        ("gfx942", 4, 520, 0, 0),
    ],
)
def test_occupancy_is_what_registers_and_memory_allow(
    arch: str, warps: int, registers: int, shared: int, programs: int
) -> None:
    found = GPUS[arch].occupancy(warps=warps, registers=registers, shared=shared)
    assert found == programs


def test_names_and_architectures_that_do_not_exist_are_refused() -> None:
    pytest.importorskip("triton")
    done = command("--arch", "sm_75")
    assert done.returncode == 2 and "--arch must be one of sm_80" in done.stderr
