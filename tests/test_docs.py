"""What the documentation says is so: its code runs, its links lead somewhere."""

import re
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import tilewise

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
DOCS = ROOT / "docs"
RUNNABLE = [
    ROOT / "README.md",
    DOCS / "index.md",
    DOCS / "torch.md",
    DOCS / "jax.md",
    DOCS / "cache.md",
    DOCS / "varlen.md",
    DOCS / "jacobian.md",
    *(DOCS / "ops").glob("*.md"),
]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def python_blocks(page: Path) -> list[str]:
    """The fenced Python code of a page, each block behind as many newlines as precede it."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in found]


@pytest.mark.parametrize("page", RUNNABLE, ids=relative)
def test_python_code_runs(page: Path) -> None:
    blocks = python_blocks(page)
    assert blocks
    if find_spec("jax") is None:
        blocks = [block for block in blocks if "import jax" not in block]
    for block in blocks:
        exec(compile(block, relative(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_relative_links_resolve(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose)):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert tilewise.__version__ == project["version"]


def test_readme_commands_are_one_line_each() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    for mark in ("run-command", "test-command"):
        match = re.search(rf"<!-- {mark} -->\n```sh\n(.*?)```", readme, re.DOTALL)
        assert match is not None, mark
        assert match[1].count("\n") == 1
        checked = subprocess.run(["bash", "-n", "-c", match[1]], check=False)
        assert checked.returncode == 0


def test_commit_hooks_use_the_constrained_versions() -> None:
    pins = set((ROOT / "constraints.txt").read_text("utf-8").split())
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    used = re.findall(r'"([\w-]+==[\w.]+)"', hooks)
    assert used
    assert set(used) <= pins
