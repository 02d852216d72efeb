"""`tilewise info`: what runs here, and on what."""

from __future__ import annotations

import typer

__all__ = ["info", "register"]

_PEERS = ("numpy", "torch", "jax", "triton", "scipy", "matplotlib")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("info")(info)


def info() -> None:
    """Show version, instruction sets, threads, processor and the libraries installed."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _facts().items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _facts() -> dict[str, str]:
    import tilewise
    from tilewise.hardware import machine

    about, versions = machine.describe(), machine.versions(*_PEERS)
    facts = {"tilewise": tilewise.__version__, **_core()}
    facts["processor"] = f"{about['processor']} ({about['cores']} cores)"
    facts["system"] = f"{about['system']} {about['architecture']}"
    absent = [peer for peer in _PEERS if peer not in versions]
    facts |= versions
    if absent:
        facts["not installed"] = ", ".join(absent)
    return facts


def _core() -> dict[str, str]:
    try:
        from tilewise import _core
    except ImportError as error:
        return {"compiled core": f"missing ({error}); only the reference implementation runs"}
    active = _core.target()
    targets = [f"{name} (active)" if name == active else name for name in _core.targets()]
    return {
        "targets": ", ".join(targets),
        "threads": str(_core.num_threads()),
        "JAX runs by": _jax(),
        "JAX on CUDA": _jax_on_cuda(),
    }


def _jax() -> str:
    try:
        from tilewise import _xla
    except ImportError:
        return "host callbacks (built without XLA's headers)"
    return f"a handler in XLA, built for version {'.'.join(map(str, _xla.API))} of its interface"


def _jax_on_cuda() -> str:
    """Say whether programs for CUDA can be lowered, and whether JAX could run them, in words."""
    from importlib.util import find_spec

    if find_spec("tilewise._xla") is None:
        return "no programs: built without XLA's headers"
    if find_spec("triton") is None:
        return "no programs: the package triton is not installed"
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    found = next((name for name in plugins if find_spec(name) is not None), None)
    runs = f"{found} is installed" if found else "JAX is installed without CUDA"
    return f"programs are lowered with Triton, never tried on a GPU; {runs}"
