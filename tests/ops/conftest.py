"""What the tests of the compiled kernels share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tilewise.verify.blas import one_blas_thread
from tilewise.verify.cases.attention import Problem
from tilewise.verify.subject import RESULTS, Known, Subject, of_implementation

Results = dict[str, NDArray[Any]]


# What each function of the core writes; it adds to dbias, which must hold zeros.
ROWS = ("o", "o_full", "m", "log_l", "lse", "max_logit", "entropy")
GRADIENTS = ("dq", "dk", "dv", "dsinks")
WRITTEN = {
    "attention_forward": ROWS,
    "attention_forward_jvp": (*ROWS, "to", "tlse"),
    "attention_jvp": ("to", "tlse"),
    "attention_vjp": GRADIENTS,
    "attention_vjp_jvp": GRADIENTS,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread_of_blas() -> Iterator[None]:
    """Keep the reference's matrix products on one thread, which is faster on a busy machine."""
    with one_blas_thread():
        yield


@pytest.fixture(scope="session")
def results() -> Callable[[Problem], Results]:
    """Every array that the forward and the backward of the compiled kernels return."""
    pytest.importorskip("tilewise._core")
    return partial(evaluate, of_implementation("cpu"), ("vjp",))


@pytest.fixture(scope="session")
def derivatives() -> Callable[[Problem], Results]:
    """Every array that the compiled kernels return, with every derivative."""
    pytest.importorskip("tilewise._core")
    return partial(evaluate, of_implementation("cpu"), tuple(RESULTS))


@pytest.fixture(scope="session")
def reference_derivatives() -> Callable[[Problem], Results]:
    """Every array that the reference returns."""
    return partial(evaluate, of_implementation("reference"), tuple(RESULTS))


def evaluate(subject: Subject, kinds: tuple[str, ...], problem: Problem) -> Results:
    """Run the forward pass and some derivatives."""
    forward = subject.forward(problem)
    m, log_l = forward.stats
    found = {**forward.values, "m": m, "log_l": log_l}
    for kind in kinds:
        found |= subject.derive(kind, problem, Known(forward, forward.values["lse"]))
    return found


@pytest.fixture(scope="module")
def poisoned_outputs() -> Iterator[None]:
    """Put NaN into every array that the kernels are to write, before they do."""
    cpu = pytest.importorskip("tilewise.ops.attention.cpu")
    core = cpu._core

    def poisoned(name: str) -> Callable[..., None]:
        def run(*arrays: Any, **options: Any) -> None:
            given = dict(zip(("q", "k", "v", "o"), arrays, strict=False)) | options
            fill(*(given.get(written) for written in WRITTEN[name]))
            getattr(core, name)(*arrays, **options)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_core", SimpleNamespace(**{name: poisoned(name) for name in WRITTEN}))
        yield


def fill(*arrays: NDArray[Any] | None) -> None:
    """Write NaN over whole arrays, also those that hold the bits of bfloat16 or float16."""
    for array in arrays:
        if array is not None:
            array[...] = np.nan if array.dtype.kind == "f" else 0x7FFF


@pytest.fixture(scope="session")
def setting() -> Callable[..., AbstractContextManager[None]]:
    """A context in which calls use a named instruction set and a number of threads."""
    core = pytest.importorskip("tilewise._core")

    @contextmanager
    def use(target: str | None = None, threads: int | None = None) -> Iterator[None]:
        before = core.target(), core.num_threads()
        try:
            core.set_target(target or before[0])
            core.set_num_threads(threads or before[1])
            yield
        finally:
            core.set_target(before[0])
            core.set_num_threads(before[1])

    return use


@pytest.fixture(scope="session")
def run_script() -> Callable[..., str]:
    """Run a script in a Python process of its own and return what it printed."""
    pytest.importorskip("tilewise._core")

    def run(script: str, *arguments: str, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    return run
