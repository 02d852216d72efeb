"""What all tests share, and arrays between forbidden pages for those of the compiled core."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

# Without a GPU Triton interprets its kernels. It asks once, as a kernel is decorated: so this has
# to be there before any test imports Triton.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

OPERATORS = ("attention", "softmax", "cross_entropy", "linear_cross_entropy")
PAGE = mmap.PAGESIZE


@pytest.fixture
def guarded_arrays() -> Iterator[None]:
    """Give the kernels arrays between pages that no one may touch: one access outside ends it all.

    Every other call the arrays end where the page after them begins, else they begin where the
    page before them ends. What the kernels write is copied back.
    """
    core = pytest.importorskip("tilewise._core")
    at_end = cycle((True, False))

    def guarded(function: Callable[..., None]) -> Callable[..., None]:
        def run(*arrays: Any, **options: Any) -> None:
            end = next(at_end)
            copies: dict[Any, tuple[NDArray[Any], NDArray[Any]]] = {}

            def moved(x: Any) -> Any:
                if not isinstance(x, np.ndarray) or not x.flags.c_contiguous or not x.size:
                    return x
                return copies.setdefault((x.ctypes.data, x.shape), (x, between_pages(x, end)))[1]

            function(*map(moved, arrays), **{name: moved(x) for name, x in options.items()})
            for original, copy in copies.values():
                if original.flags.writeable:
                    original[...] = copy

        return run

    wrapped = {
        name: guarded(getattr(core, name)) if name.startswith(OPERATORS) else getattr(core, name)
        for name in dir(core)
        if not name.startswith("_")
    }
    with pytest.MonkeyPatch.context() as patch:
        for operator in OPERATORS:
            patch.setattr(f"tilewise.ops.{operator}.cpu._core", SimpleNamespace(**wrapped))
        yield


def between_pages(x: NDArray[Any], end: bool) -> NDArray[Any]:
    """Return a copy at the end or the beginning of memory between two forbidden pages."""
    inside = -(-x.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, inside + 2 * PAGE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (first, first + PAGE + inside):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0):
            pytest.skip("this system does not let a process forbid pages")
    at = PAGE + (inside - x.nbytes if end else 0)
    copy = np.frombuffer(memory, x.dtype, x.size, at).reshape(x.shape)
    copy[...] = x
    return copy
