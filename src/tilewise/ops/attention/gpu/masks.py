"""Boolean masks on the device, lowered there: the host does not wait for their entries."""

from __future__ import annotations

from typing import Any

from tilewise.base._lowering import KEY_TILE, QUERY_TILE
from tilewise.shared.launch import LaunchPlan
from tilewise.shared.triton_launch import launch

from .kernels.masks import attention_pack_kernel

Tensor = Any


def pack(seen: Tensor, N: int, Nk: int, int16: Any, uint8: Any) -> tuple[Tensor, Tensor]:
    """Return what `PackedBits` has of a mask, on its device.

    Args:
        seen: `(Bm, Hm, N or 1, Nk or 1)` of bytes, 0 where a query does not see a key.
        N: How many queries there are.
        Nk: How many keys there are.
        int16: The framework's dtype of the bits.
        uint8: The framework's dtype of the map of tiles.
    """
    Bm, Hm, *sizes = seen.shape
    words, keys = -(-N // QUERY_TILE), -(-Nk // KEY_TILE)
    bits = seen.new_empty((Bm, Hm, Nk, words), dtype=int16)
    tiles = seen.new_empty((Bm, Hm, words, keys), dtype=uint8)
    steps = [0 if n == 1 else seen.stride(2 + d) for d, n in enumerate(sizes)]
    chosen = LaunchPlan((Bm * Hm * words * keys,), {"QUERIES": QUERY_TILE, "KEYS": KEY_TILE})
    given = {"seen": seen, "bits": bits, "tiles": tiles, "H": Hm, "N": N, "Nk": Nk}
    given |= {"stride_b": seen.stride(0), "stride_h": seen.stride(1), "words": words, "keys": keys}
    launch(attention_pack_kernel, chosen, given | {"stride_n": steps[0], "stride_k": steps[1]})
    return bits, tiles
