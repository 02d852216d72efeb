"""NumPy's matrix products on one thread, where that can be arranged.

OpenBLAS's threads wait for each other by spinning. On a machine that is busy with something else
too, small products take ten times as long on two of them as on one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

__all__ = ["one_blas_thread"]

Control = tuple[Callable[[], int], Callable[[int], object]]


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Have every OpenBLAS of this process compute on one thread."""
    controls = _controls()
    before = [get() for get, _ in controls]
    try:
        for _, set_ in controls:
            set_(1)
        yield
    finally:
        for (_, set_), count in zip(controls, before, strict=True):
            set_(count)


@cache
def _controls() -> tuple[Control, ...]:
    """Return what reads and what sets the number of threads of each loaded OpenBLAS."""
    try:
        loaded = Path("/proc/self/maps").read_text().split()
    except OSError:
        return ()
    found = []
    for path in {name for name in loaded if "openblas" in name and name.startswith("/")}:
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        # The wheels of NumPy and SciPy rename the functions of their own copy.
        for name in ("openblas_{}_num_threads", "scipy_openblas_{}_num_threads"):
            for suffix in ("", "64_"):
                get = getattr(library, name.format("get") + suffix, None)
                set_ = getattr(library, name.format("set") + suffix, None)
                if get is not None and set_ is not None:
                    found.append((get, set_))
    return tuple(found)
