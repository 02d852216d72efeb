"""The command line: `tilewise verify`, `bench`, `demo`, `plan` and `info`."""

from __future__ import annotations

import sys

import typer

from tilewise.base.errors import Unsupported
from tilewise.cli import bench, demo, info, plan, verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="tilewise",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Exact attention and its gradients, tile by tile.",
)
for command in (verify, bench, demo, plan, info):
    command.register(app)


def main() -> None:
    """Run the command line; what the user got wrong is one line and exit status 2."""
    try:
        app()
    except (ValueError, ImportError, OSError, Unsupported) as error:
        print(f"tilewise: {_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except ExceptionGroup as group:
        for part in group.exceptions:
            print(f"tilewise: {_line(part)}", file=sys.stderr)
        raise SystemExit(2) from None


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
