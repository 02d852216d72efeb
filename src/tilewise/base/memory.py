"""Where implementations get the memory of their results: new, or what a frontend has to fill."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]


class _Offered(threading.local):
    arrays: tuple[Array, ...] = ()
    taken: frozenset[int] = frozenset()


_offered = _Offered()


@contextmanager
def results_in(arrays: Sequence[Array]) -> Iterator[None]:
    """Offer contiguous arrays to `empty` inside the block, in this thread, each once."""
    before = _offered.arrays, _offered.taken
    _offered.arrays, _offered.taken = tuple(arrays), frozenset()
    try:
        yield
    finally:
        _offered.arrays, _offered.taken = before


def empty(shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Return a contiguous array without values; the first one offered that has its size and dtype.

    That is only a saving: whose memory a result came to lie in, `settle` looks at.
    """
    size = math.prod(shape)
    for i, array in enumerate(_offered.arrays):
        if i not in _offered.taken and array.size == size and array.dtype == dtype:
            _offered.taken |= {i}
            return array.reshape(shape)
    return np.empty(shape, dtype)


def settle(results: Sequence[Array], targets: Sequence[Array]) -> None:
    """Bring each result into its target, where it is not a view of it already."""
    moved = []
    for result, target in zip(results, targets, strict=True):
        if result.base is not target or not result.flags.c_contiguous:
            lent = any([np.may_share_memory(result, t) for t in targets if t is not target])
            moved.append((target, result.copy() if lent else result))
    for target, result in moved:
        target[...] = result
