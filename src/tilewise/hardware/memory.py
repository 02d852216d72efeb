"""Peak extra memory of a call, measured by the operating system in a fresh process.

The figure is the growth of the resident set from just before the call to its highest point
during the call, less the arrays that the call returns. Everything that the first call touches
counts: temporaries, workspaces, thread stacks, packing buffers.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["FreshProcessError", "Peak", "available", "measure", "run_fresh"]

T = TypeVar("T")

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_REPLY = "tilewise-reply:"
# Each numerical library reads its own variable, once, when it is loaded.
_THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "TILEWISE_NUM_THREADS",
    "NPROC",
)


@dataclass(frozen=True)
class Peak:
    """Bytes: resident before the call, at the peak, and the peak growth beyond the outputs."""

    baseline: int
    peak: int
    outputs: int

    @property
    def extra(self) -> int:
        """Memory that the call needed beside its inputs and outputs."""
        return max(0, self.peak - self.baseline - self.outputs)


class FreshProcessError(RuntimeError):
    """A measurement's process failed; the text is its last line of output."""


def available() -> int | None:
    """Return the bytes that can be allocated without swapping, None where that is unknown."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, _group_limit())
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _group_limit() -> int:
    """Return what the control group still allows (containers), or a number without effect."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return max(0, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return sys.maxsize


def _resident() -> tuple[int, int]:
    """Return (resident now, resident at the highest) in bytes."""
    try:
        fields = dict(
            line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines()
        )
        return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return highest, highest


def _settle() -> None:
    """Hand freed memory back and restart the high-water mark, as far as the system lets us."""
    # Memory that malloc kept would otherwise be reused by the call and go uncounted.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5", encoding="ascii")


def measure(call: Callable[[], T], output_bytes: Callable[[T], int]) -> tuple[T, Peak]:
    """Run `call` once and return its result with the peak of the resident set.

    Call it once per process, before anything like `call` ran: what an earlier call allocated and
    kept is already in the baseline and would go uncounted.
    """
    _settle()
    baseline, _ = _resident()
    result = call()
    _, peak = _resident()
    return result, Peak(baseline, peak, output_bytes(result))


def run_fresh(
    target: str,
    arguments: Mapping[str, Any],
    *,
    threads: int | None = None,
    timeout: float | None = None,
) -> Any:
    """Call `target` ("package.module:function") with `arguments` in a new interpreter.

    Args:
        target: a function that takes keyword arguments and returns something JSON can hold.
        arguments: keyword arguments that JSON can hold.
        threads: the number of threads every numerical library is told to use.
        timeout: seconds after which the process is stopped.

    Returns:
        What the function returned.

    Raises:
        FreshProcessError: the process failed, was stopped or ran out of memory.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    if threads is not None:
        environment.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    command = [sys.executable, "-P", "-c", f"from {__name__} import _serve; _serve()"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps({"target": target, "arguments": dict(arguments)}),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as late:
        raise FreshProcessError(f"stopped after {timeout} s") from late
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_REPLY):
            return json.loads(line.removeprefix(_REPLY))
    if done.returncode < 0:
        raise FreshProcessError(f"killed by signal {-done.returncode}")
    said = done.stderr.strip().splitlines()
    raise FreshProcessError(said[-1] if said else f"exit status {done.returncode}")


def _serve() -> None:
    """The other end of `run_fresh`."""
    request = json.load(sys.stdin)
    module, _, name = request["target"].partition(":")
    function = getattr(importlib.import_module(module), name)
    print(_REPLY + json.dumps(function(**request["arguments"])))
