"""Random numbers that are a function of a counter: the same everywhere, with no state to keep."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: NDArray[np.integer], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Return four 32-bit random words for each counter, by ten rounds of Philox.

    Args:
        counter: `(4, ...)` integers, taken modulo 2**32.
        key: Two integers below 2**32.

    Returns:
        `(4, ...)`.

    Source:
        Salmon, Moraes, Dror & Shaw 2011, Parallel random numbers: as easy as 1, 2, 3 (SC11),
        section 3.3 and table 2.
    """
    c0, c1, c2, c3 = np.asarray(counter).astype(np.uint64) & _LOW
    k0, k1 = key
    for _ in range(10):
        a, b = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c2 = (b >> _HALF) ^ c1 ^ np.uint64(k0), (a >> _HALF) ^ c3 ^ np.uint64(k1)
        c1, c3 = b & _LOW, a & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)
