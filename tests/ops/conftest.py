"""What the tests of the compiled kernels share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tilewise.verify.cases.attention import Problem
from tilewise.verify.subject import of_implementation

Results = dict[str, NDArray[Any]]


@pytest.fixture(scope="session")
def results() -> Callable[[Problem], Results]:
    """Every array that the forward and the backward of the compiled kernels return."""
    pytest.importorskip("tilewise._core")
    subject = of_implementation("cpu")

    def evaluate(problem: Problem) -> Results:
        forward = subject.forward(problem)
        m, log_l = forward.stats
        grads = subject.backward(problem, forward, forward.values["lse"])
        return {**forward.values, "m": m, "log_l": log_l, **grads}

    return evaluate


@pytest.fixture(scope="module")
def poisoned_outputs() -> Iterator[None]:
    """Put NaN into every array that the kernels are to write, before they do."""
    cpu = pytest.importorskip("tilewise.ops.attention.cpu")
    core = cpu._core

    def forward(*arrays: Any, **options: Any) -> None:
        written = ("m", "log_l", "lse", "max_logit", "entropy")
        fill(arrays[3], *(options[name] for name in written))
        core.attention_forward(*arrays, **options)

    def vjp(*arrays: Any, **options: Any) -> None:
        # dbias must hold zeros.
        fill(*(options[name] for name in ("dq", "dk", "dv", "dsinks")))
        core.attention_vjp(*arrays, **options)

    with pytest.MonkeyPatch.context() as patch:
        poisoned = SimpleNamespace(attention_forward=forward, attention_vjp=vjp)
        patch.setattr(cpu, "_core", poisoned)
        yield


def fill(*arrays: NDArray[Any] | None) -> None:
    """Write NaN over whole arrays."""
    for array in arrays:
        if array is not None:
            array[...] = np.nan


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
