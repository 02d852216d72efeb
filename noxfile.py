"""Every check of the project, each in an environment of its own: `nox -l` lists them."""

import os
import shutil
import subprocess
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests", "lint", "types", "layers", "docs"]
nox.options.reuse_existing_virtualenvs = True

PYTHONS = ["3.11", "3.12", "3.13"]
MARK = "pytest.mark.sanitize"
PORTABLE = ("-C", "cmake.define.TILEWISE_PORTABLE=ON")  # the soonest built
ADDRESS = (
    "address,undefined",
    "libasan.so",
    {
        # The interpreter itself keeps memory until it exits: leaks there are not ours.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    },
)


def install(session: nox.Session, *what: str) -> None:
    """Install at the versions that the constraints name."""
    session.install("-c", "constraints.txt", *what)


@nox.session
def tests(session: nox.Session) -> None:
    """The whole suite on the running Python."""
    install(session, ".[test]")
    session.run("pytest", *session.posargs)


@nox.session(python=PYTHONS)
def pythons(session: nox.Session) -> None:
    """The whole suite on every supported Python."""
    install(session, ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style of Python and C++."""
    install(session, *tools("ruff", "clang-format"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    sources = sorted(str(path) for path in Path("cpp").rglob("*.[ch]pp"))
    session.run("clang-format", "--dry-run", "-Werror", *sources)


@nox.session
def types(session: nox.Session) -> None:
    """Static types, and the stub of the compiled module against the module itself."""
    install(session, *PORTABLE, ".", *tools("mypy", "nanobind"))
    session.run("mypy")
    stub = Path(session.create_tmp()) / "_core.pyi"
    session.run("python", "-m", "nanobind.stubgen", "-q", "-m", "tilewise._core", "-o", str(stub))
    if stub.read_text() != Path("src/tilewise/_core.pyi").read_text():
        session.error(f"src/tilewise/_core.pyi is out of date: copy {stub} over it")
    stubtest = ["python", "-m", "mypy.stubtest", "--concise", "tilewise._core"]
    report = str(session.run(*stubtest, silent=True, success_codes=[0, 1]))
    # nanobind has a type of its own for functions, which stubtest does not take for one.
    lines = [line for line in report.splitlines() if line.startswith("tilewise.")]
    wrong = [line for line in lines if not line.endswith(" is not a function")]
    if wrong:
        session.error("\n".join(wrong))


@nox.session
def layers(session: nox.Session) -> None:
    """Who may import whom."""
    install(session, *tools("import-linter"))
    session.run("lint-imports", env={"PYTHONPATH": "src"})


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, with every warning an error."""
    install(session, *extra("docs"))
    session.run("zensical", "build", "--clean", "--strict", "--config-file", "mkdocs.yml")


@nox.session
def asan(session: nox.Session) -> None:
    """The portable kernels under the address and undefined-behaviour sanitizers."""
    sanitized(session, *ADDRESS, PORTABLE)


@nox.session
def asan_all(session: nox.Session) -> None:
    """The kernels of every target under those sanitizers, which take long to compile."""
    sanitized(session, *ADDRESS)


@nox.session
def tsan(session: nox.Session) -> None:
    """The compiled core under the thread sanitizer."""
    sanitized(
        session,
        "thread",
        "libtsan.so",
        {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1"},
        # Threads meet in the code that all targets share.
        PORTABLE,
    )


@nox.session
def gpu(session: nox.Session) -> None:
    """Every GPU kernel compiled without a GPU: it needs what docs/gpu-resources.md says."""
    install(session, ".[triton]")
    code = "from tilewise.cli import main; main()"
    session.run("python", "-c", code, "plan", "--check", "docs/gpu-resources.md", *session.posargs)


@nox.session
def clang(session: nox.Session) -> None:
    """The whole suite against the core as clang compiles it."""
    if shutil.which("clang++") is None:
        session.skip("clang++ is not installed")
    session.install("-c", "constraints.txt", ".[test]", env={"CC": "clang", "CXX": "clang++"})
    session.run("pytest", *session.posargs)


def extra(name: str) -> list[str]:
    """The requirements of one extra of the project."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    return list(project["optional-dependencies"][name])


def tools(*names: str) -> list[str]:
    """Single requirements from the extra `lint`."""
    return [line for line in extra("lint") if line.startswith(names)]


def sanitized(
    session: nox.Session,
    kinds: str,
    library: str,
    options: dict[str, str],
    settings: tuple[str, ...] = (),
) -> None:
    """Build the core with a sanitizer and run the tests marked `sanitize`."""
    # Only those modules are collected: PyTorch does not start under the sanitizers.
    marked = [str(path) for path in Path("tests").rglob("test_*.py") if MARK in path.read_text()]
    wanted = [name for name in extra("test") if name.startswith("pytest")]
    install(session, *wanted, "numpy", *extra("bf16"))
    session.install(
        "-c",
        "constraints.txt",
        "-C",
        f"cmake.define.TILEWISE_SANITIZE={kinds}",
        "-C",
        "cmake.build-type=Release",
        "-C",
        "install.strip=false",
        *settings,
        ".",
        env={"CC": "gcc", "CXX": "g++"},
    )
    # The interpreter is not instrumented, so the runtime has to be in the process before it.
    found = subprocess.run(
        ["g++", f"-print-file-name={library}"], check=True, capture_output=True, text=True
    )
    python = os.path.join(session.bin, "python")
    # Address randomisation collides with the fixed shadow memory of the thread sanitizer.
    fixed = ["setarch", "-R"] if can_fix_addresses() else []
    session.run(
        *fixed,
        "env",
        f"LD_PRELOAD={found.stdout.strip()}",
        python,
        "-m",
        "pytest",
        "-m",
        "sanitize",
        *marked,
        # A report of the sanitizer ends the process, and pytest's own capture would swallow it.
        "--capture=sys",
        *session.posargs,
        env={**options, "OPENBLAS_NUM_THREADS": "1"},
        external=True,
    )


def can_fix_addresses() -> bool:
    """Whether this machine lets a process switch off address randomisation."""
    if shutil.which("setarch") is None:
        return False
    return subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0
