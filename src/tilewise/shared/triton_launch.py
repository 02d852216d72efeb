"""Launches Triton kernels, compiled or interpreted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np
import triton

from .launch import INTERPRETER, LaunchPlan
from .triton_rows import sum_parts_kernel

INTERPRETS = not isinstance(sum_parts_kernel, triton.JITFunction)
"""Whether Triton interprets its kernels, on the CPU, instead of compiling them."""


class Recorder(Protocol):
    """What takes launches down instead of running them.

    Attributes:
        arch: The architecture that they are for.
    """

    arch: str

    def launch(self, kernel: Any, plan: LaunchPlan, arguments: Mapping[str, Any]) -> None:
        """Take down a launch of a kernel with all of its arguments, constants included."""


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Let launches be taken down; the tensors of calls may be stand-ins then."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def architecture() -> str:
    """Return the architecture that kernels run on."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.arch
    if INTERPRETS:
        return INTERPRETER
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def refuses_arrays(x: Any) -> str | None:
    """Return why kernels do not serve a call whose first input is an array, or None."""
    return "computes on tensors of PyTorch, not on arrays" if isinstance(x, np.ndarray) else None


def launch(kernel: Any, plan: LaunchPlan, arguments: Mapping[str, Any]) -> None:
    """Launch a kernel, unless there is nothing to do."""
    if 0 in plan.grid:
        return
    given = {**arguments, **plan.constants}
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launch(kernel, plan, given)
        return
    with _unwarned() if INTERPRETS else nullcontext():
        kernel[plan.grid](**given, **plan.options)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Compute with NumPy as a GPU does: NaN without a word, and bounds of loops from arrays."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
