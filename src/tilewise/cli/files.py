"""Writing result files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

__all__ = ["numpy_archive", "replace_file", "replace_text"]


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the whole new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` as `replace_file` does."""
    replace_file(path, lambda file: file.write(text.encode()))


def _umask() -> int:
    # The only portable way to read the mask is to set it; mkstemp ignores it and gives 0600.
    current = os.umask(0)
    os.umask(current)
    return current


def numpy_archive(path: Path, arrays: dict[str, Any]) -> None:
    """Write `arrays` as an npz file as `replace_file` does."""
    import numpy as np

    replace_file(path, lambda file: np.savez(file, **arrays))
