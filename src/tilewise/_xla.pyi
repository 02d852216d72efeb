"""The handlers for XLA. Private: use tilewise.jax."""

from collections.abc import Callable
from typing import Any

API: tuple[int, int]
"""The version of XLA's foreign function interface that it was compiled for."""

def handler() -> object:
    """The handler, as jax.ffi.register_ffi_target takes it."""

def set_run(
    run: Callable[[str, list[Any], list[Any]], None], ndarray: type[Any], dtypes: dict[str, Any]
) -> None:
    """Let the handler call run(call, inputs, outputs) with arrays of the type ndarray."""

def launcher(on_host: bool = False) -> object:
    """The handler that launches kernels; on_host for memory of the host, and without a stream."""

def open_driver(path: str) -> None:
    """Let kernels be launched by another driver than libcuda.so.1."""
