"""What importing tilewise brings into a process."""

import json
import subprocess
import sys

HEAVY = {"torch", "jax", "triton", "typer", "rich", "click", "matplotlib", "scipy", "pandas"}


def newly_imported(statement: str) -> set[str]:
    """The names in sys.modules that a statement adds in a fresh interpreter."""
    code = (
        f"import json, sys\nknown = set(sys.modules)\n{statement}\n"
        "print(json.dumps(sorted(set(sys.modules) - known)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def packages(names: set[str]) -> set[str]:
    """The top-level packages among module names, without the standard library."""
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def test_import_needs_numpy_alone() -> None:
    assert packages(newly_imported("import tilewise")) == {"numpy", "tilewise"}


def test_import_loads_no_command_line_and_no_verifier() -> None:
    loaded = newly_imported("import tilewise")
    for name in ("cli", "verify", "demo", "bench"):
        assert not any(module.startswith(f"tilewise.{name}") for module in loaded), name


def test_a_call_needs_numpy_alone() -> None:
    statement = (
        "import numpy, tilewise\n"
        "a = numpy.ones((1, 1, 2, 3), numpy.float32)\n"
        "tilewise.attention(a, a, a, mask=tilewise.causal())"
    )
    assert packages(newly_imported(statement)) == {"numpy", "tilewise"}


def test_command_line_starts_without_frameworks() -> None:
    loaded = packages(newly_imported("import tilewise.cli"))
    assert not loaded & (HEAVY - {"typer", "rich", "click"})


THREADS = """
import numpy, threading, tilewise
a, start, found = numpy.ones((1, 1, 2, 3), numpy.float32), threading.Barrier(8), []
def call():
    start.wait()
    found.append(tilewise.attention(a, a, a).shape)
threads = [threading.Thread(target=call) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert found == [a.shape] * 8, found
"""


def test_first_calls_may_come_from_several_threads() -> None:
    newly_imported(THREADS)
