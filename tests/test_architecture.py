"""Who may import whom, in Python and in C++."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tilewise.dispatch import DEVICE, TABLE

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tilewise"
CPP = ROOT / "cpp"

# Third-party packages beside NumPy, and the parts of tilewise that may import them.
PLACES = {
    "typer": ("tilewise.cli",),
    "click": ("tilewise.cli",),
    "rich": ("tilewise.cli", "tilewise.verify.report", "tilewise.verify.grid"),
    "torch": (
        "tilewise.torch",
        "tilewise.distributed",
        "tilewise.transformers",
        "tilewise.bench",
        "tilewise.verify.flat",
        "tilewise.verify.plain",
        "tilewise.verify.sweep",
        "tilewise.verify.tensors",
        "tilewise.verify.textbook",
    ),
    "triton": (
        *(modules[name] for modules in TABLE.values() for name in DEVICE if name in modules),
        "tilewise.shared.triton_copies",
        "tilewise.shared.triton_launch",
        "tilewise.shared.triton_losses",
        "tilewise.shared.triton_math",
        "tilewise.shared.triton_programs",
        "tilewise.shared.triton_rows",
        "tilewise.hardware.offline",
        "tilewise.bench.board_steps",
    ),
    "jax": ("tilewise.jax", "tilewise.distributed", "tilewise.bench"),
    "transformers": ("tilewise.transformers",),
    "scipy": ("tilewise.jacobian",),
    "matplotlib": ("tilewise.plot", "tilewise.bench", "tilewise.demo"),
    "pytest": ("tilewise.verify",),
}

# Those that an installation may lack: imported where they are used, never with the module.
OPTIONAL = {"torch", "jax", "transformers", "scipy", "matplotlib", "pytest"}

# Except in the frontend of a framework, which is itself imported where it is used.
FRONTENDS = {"torch": ("tilewise.torch",), "jax": ("tilewise.jax",)}

CPP_LAYERS = {
    "simd": {"simd"},
    "runtime": {"runtime", "simd"},
    "math": {"math", "simd"},
    "tile": {"tile", "math", "runtime", "simd"},
    "ops": {"ops", "tile", "math", "runtime", "simd"},
    "bindings": {"bindings", "ops", "tile", "math", "runtime", "simd"},
}


def modules() -> dict[str, Path]:
    """Each module of the package by its name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, *, top_level: bool = False) -> Iterator[str]:
    """The full name of everything that a module imports; with top_level, on being imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in on_import(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base]) if base else ".".join(parent)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported and not only for a type checker."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from on_import(child)


def within(name: str, places: tuple[str, ...]) -> bool:
    """Whether a module is one of the places or lies inside one."""
    return any(name == place or name.startswith(place + ".") for place in places)


MODULES = modules()


def test_import_linter_contracts_hold() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(SOURCE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_third_party_packages_stay_in_their_places(name: str) -> None:
    allowed = sys.stdlib_module_names | {"numpy", "tilewise"}
    for imported in imports(name, MODULES[name]):
        package = imported.partition(".")[0]
        if package not in allowed:
            assert within(name, PLACES.get(package, ())), f"{name} imports {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_optional_packages_are_imported_where_they_are_used(name: str) -> None:
    for imported in imports(name, MODULES[name], top_level=True):
        package = imported.partition(".")[0]
        if package in OPTIONAL:
            assert within(name, FRONTENDS.get(package, ())), f"{name} imports {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_frontends_of_frameworks_are_imported_where_they_are_used(name: str) -> None:
    for frontends in FRONTENDS.values():
        for imported in imports(name, MODULES[name], top_level=True):
            assert within(name, frontends) or not within(imported, frontends)


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("tilewise.ops.")])
def test_operators_and_implementations_do_not_know_each_other(name: str) -> None:
    operator = ".".join(name.split(".")[:3])
    leaf = name.removeprefix(operator).strip(".").partition(".")[0]
    for imported in imports(name, MODULES[name]):
        if within(imported, ("tilewise.ops",)):
            assert within(imported, (operator,)), f"{name} imports {imported}"
            other = imported.removeprefix(operator).strip(".").partition(".")[0]
            assert other in {"spec", leaf}, f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("tilewise.ops.")])
def test_only_the_cpu_implementation_of_an_operator_calls_the_core(name: str) -> None:
    if name.rpartition(".")[2] != "cpu":
        assert not any(within(it, ("tilewise._core",)) for it in imports(name, MODULES[name]))


def cpp_files() -> list[Path]:
    return sorted(path for path in CPP.rglob("*") if path.suffix in {".hpp", ".cpp"})


def includes(path: Path) -> list[tuple[str, str]]:
    """Each include of a file as its opening character and its text."""
    pattern = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
    return pattern.findall(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", cpp_files(), ids=lambda path: str(path.relative_to(CPP)))
def test_cpp_includes_downwards_only(path: Path) -> None:
    layer = path.relative_to(CPP).parts[0]
    for mark, target in includes(path):
        if mark == '"' and "/" in target and (CPP / target).exists():
            assert target.partition("/")[0] in CPP_LAYERS[layer], f"{path} includes {target}"


@pytest.mark.parametrize("path", cpp_files(), ids=lambda path: str(path.relative_to(CPP)))
def test_only_the_bindings_know_python(path: Path) -> None:
    if path.relative_to(CPP).parts[0] != "bindings":
        for _, target in includes(path):
            assert not target.startswith(("nanobind/", "Python.h", "numpy/")), target
