"""Packed sequences as the kernels take them."""

from __future__ import annotations

from typing import Any

from tilewise.ops.attention.spec import AttentionCall
from tilewise.shared.launch import LaunchPlan
from tilewise.shared.triton_launch import launch

from .kernels.sequences import attention_sequences_kernel
from .plan import PLACES, tiles_of


def packed_count(call: AttentionCall) -> int | None:
    """Return how many sequences a call has packed, or None."""
    return None if call.sequences is None else len(call.sequences)


def packed_of(call: AttentionCall, extent: int, of_keys: bool = False) -> dict[str, Any]:
    """Return where the sequences of a call begin, and which of them has each place for a tile.

    The table is made on the device: of the boundaries the host need not know more than how many
    there are, so nothing waits for them here.

    Args:
        call: The call.
        extent: Rows of a tile.
        of_keys: Whether tiles are of keys, and not of queries.
    """
    packed: Any = call.sequences
    if packed is None:
        return {"S": 0, "order": None, "q_starts": None, "k_starts": None, "PACKED": False}
    S, q_starts, k_starts = len(packed), packed.q_starts, packed.k_starts
    starts, rows = (k_starts, call.Nk) if of_keys else (q_starts, call.N)
    order = starts.new_empty(tiles_of(rows, extent, S))
    constants = {"EXTENT": extent, "BLOCK": PLACES}
    chosen = LaunchPlan((S,), constants, num_warps=1)
    launch(attention_sequences_kernel, chosen, {"starts": starts, "order": order})
    return {"S": S, "order": order, "q_starts": q_starts, "k_starts": k_starts, "PACKED": True}
