"""The memory of a cache: its pools of pages, where they are."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tilewise.base.errors import type_error, unsupported

from .pages import EVICTED, Claim, View

NAME = "KVCache"

WORDS: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": np.uint16,
}
"""In which NumPy type each dtype is stored; NumPy alone has no bfloat16."""

READERS = {"torch": "tilewise.torch.cache"}
"""For arrays of other packages, the module whose `words` reads them."""

_ON_DEVICE = "tilewise.torch.cache_memory"
"""The module of the memory that is not the host's."""

Reader = Callable[[str, str, Any], tuple[NDArray[Any], str]]
Shape = tuple[int, ...]


class Memory(Protocol):
    """Pools of keys and values in pages, `(pages, Hk, page_size, D or Dv)`.

    Attributes:
        k: The pool of keys.
        v: The pool of values.
    """

    k: Any
    v: Any

    def read(self, operator: str, name: str, value: Any) -> tuple[Any, str]:
        """Return an array or tensor as the pools store it, and the name of its dtype."""

    def write(self, claim: Claim, k: Any, v: Any) -> None:
        """Write keys and values behind the sequences, where nobody reads yet."""

    def dense(self, view: View, b: int) -> tuple[Any, Any]:
        """Return copies `(1, Hk, Nk, D)` and `(1, Hk, Nk, Dv)` of a sequence.

        What they hold of evicted pages nobody sees.
        """


class HostMemory:
    """Pools in the memory of the host, of which NumPy and PyTorch can be views."""

    def __init__(self, k: Shape, v: Shape, dtype: str) -> None:
        # Zeros, because the system hands them out page by page as they are written.
        self.k = np.zeros(k, WORDS[dtype])
        self.v = np.zeros(v, WORDS[dtype])

    def read(self, operator: str, name: str, value: Any) -> tuple[NDArray[Any], str]:
        """Return the memory of an array or tensor, and the name of its dtype."""
        return words(operator, name, value)

    def write(self, claim: Claim, k: NDArray[Any], v: NDArray[Any]) -> None:
        """Write keys and values behind the sequences, page by page."""
        pools = ((self.k, k), (self.v, v))
        for copied in claim.copies:
            for pool, _ in pools:
                pool[copied.target, :, : copied.rows] = pool[copied.source, :, : copied.rows]
        view, page_size = claim.view, self.k.shape[2]
        for b, pages in enumerate(view.tables):
            start, end = int(view.starts[b]), int(view.lengths[b])
            at = start
            while at < end:
                page, row = divmod(at, page_size)
                rows = min(page_size - row, end - at)
                for pool, new in pools:
                    first = at - start
                    pool[pages[page], :, row : row + rows] = new[b, :, first : first + rows]
                at += rows

    def dense(self, view: View, b: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return copies of the keys and values of a sequence, 0 where evicted."""
        return self._joined(self.k, view, b), self._joined(self.v, view, b)

    def _joined(self, pool: NDArray[Any], view: View, b: int) -> NDArray[Any]:
        _, Hk, page_size, width = pool.shape
        dense = np.zeros((1, Hk, int(view.lengths[b]), width), pool.dtype)
        for i, page in enumerate(view.tables[b]):
            part = dense[0, :, i * page_size : (i + 1) * page_size]
            if page != EVICTED:
                part[...] = pool[page, :, : part.shape[1]]
        return dense


def allocated(k: Shape, v: Shape, dtype: str, device: Any, like: Any) -> Memory:
    """Return new pools.

    Args:
        k: Shape of the pool of keys.
        v: Shape of the pool of values.
        dtype: Name of their dtype.
        device: None or what PyTorch calls a device, by name or as an object.
        like: What is on the device instead, where that is None.

    Raises:
        TypeError: `device` is something else.
        Unsupported: There are no kernels for the device.
        MemoryError: There is not enough memory.
    """
    if device is None:
        device = getattr(like, "device", None)
        device = device if type(device).__module__ == "torch" else "cpu"
    elif not isinstance(device, str) and type(device).__module__ != "torch":
        got = type(device).__name__
        raise type_error(NAME, "device", "be a device of PyTorch or the name of one", got)
    if is_host(device):
        return HostMemory(k, v, dtype)
    try:
        made: Memory = import_module(_ON_DEVICE).DeviceMemory(k, v, dtype, device)
    except ModuleNotFoundError as error:
        reason = f"device {device} needs the package {error.name}, which is not installed"
        raise unsupported(NAME, reason) from error
    return made


def is_host(device: Any) -> bool:
    """Return whether a device is the CPU, whose memory is that of the host."""
    return str(device).partition(":")[0] == "cpu"


def words(operator: str, name: str, value: Any) -> tuple[NDArray[Any], str]:
    """Return the memory of an array or tensor as it is stored, and the name of its dtype."""
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        dtype = value.dtype
        known = dtype.name if dtype.isnative else dtype.str
        stored = value.view(np.uint16) if known == "bfloat16" else value
        return stored.view(np.ndarray), known
    for base in type(value).__mro__:
        reader = READERS.get(base.__module__.partition(".")[0])
        if reader is not None:
            read: Reader = import_module(reader).words
            return read(operator, name, value)
    requirement = "be a numpy.ndarray or a torch.Tensor"
    raise type_error(operator, name, requirement, type(value).__name__)


def slots(view: View, page_size: int) -> NDArray[np.int64]:
    """Return where new keys go and where they come from, `(4, keys)`.

    The page and the row in it; the sequence, as a place in the view, and which of its new keys.
    """
    counts = view.lengths - view.starts
    b = np.repeat(np.arange(len(counts)), counts)
    new = np.arange(len(b)) - np.repeat(np.cumsum(counts) - counts, counts)
    key = new + np.repeat(view.starts, counts)
    pages = view.block_table()[b, key // page_size] if len(b) else b
    return np.stack((pages, key % page_size, b, new)).astype(np.int64)


def copied_pages(claim: Claim) -> NDArray[np.int64]:
    """Return the pages that are copied, and those that they are copied to, `(2, copies)`."""
    pairs = [(copied.source, copied.target) for copied in claim.copies]
    return np.array(pairs, np.int64).reshape(-1, 2).T.copy()
