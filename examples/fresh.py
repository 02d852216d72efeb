"""Run a function in a process of its own, so that its peak memory is its own.

The examples compare peaks of memory. Two runs in one process would share what the first one left
behind, so each runs in a fresh interpreter and reports back how far it has got.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["run"]

Report = Callable[[Any], None]


def run(function: Callable[..., Any], *arguments: Any, report: Report | None = None) -> Any:
    """Call `function(*arguments, report=...)` in a new process and return what it returns.

    Args:
        function: a function of a module; it may call `report(value)` as often as it likes.
        arguments: what it is called with; they and its results must be picklable.
        report: told each value that the function reports, here, while it runs.

    Raises:
        RuntimeError: the function raised or its process died; the text says which.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        while True:
            kind, value = ours.recv()
            if kind == "report" and report is not None:
                report(value)
            elif kind == "result":
                return value
            elif kind == "error":
                raise RuntimeError(value)
    except EOFError:
        process.join()
        raise RuntimeError(f"the process ended with status {process.exitcode}") from None
    finally:
        ours.close()
        process.join(5)
        process.kill()


def _serve(parent: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The other end of `run`."""
    try:
        result = function(*arguments, report=lambda value: parent.send(("report", value)))
        parent.send(("result", result))
    except Exception:
        parent.send(("error", traceback.format_exc()))
