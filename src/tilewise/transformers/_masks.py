"""The attention masks of transformers as row intervals."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base._lowering import BOOL_BLOCK_BYTES, RowIntervals, bool_to_spans
from tilewise.base.errors import unsupported
from tilewise.base.masks import Mask

from ._patterns import Grid, depends_on_tokens, describe, padding

NAME = "tilewise.transformers"

INTERVAL_ENDS = 4
"""The last size of a tensor of row intervals: lo0, hi0, lo1, hi1."""


def attention_mask(
    batch_size: int,
    q_length: Any = None,
    kv_length: int = 0,
    q_offset: Any = 0,
    kv_offset: int = 0,
    **given: Any,
) -> Any:
    """Return the mask of a forward pass for `attn_implementation="tilewise"`.

    transformers calls it once per forward pass and kind of layer, and hands what it returns to
    each layer.

    Args:
        batch_size: Batch.
        q_length: Queries; versions of transformers before 5 give `cache_position` instead.
        kv_length: Keys.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        **given: `mask_function`, `attention_mask` `(B, tokens)` bool or None, and what else
            `transformers.masking_utils.sdpa_mask` takes.

    Returns:
        `(B or 1, 1, N, 4)`, int32: two half-open intervals of keys per query. Where a query sees
        more than two intervals, or the model is going to edit the mask, `(B, 1, N, Nk)` bool.
    """
    _check_family(given.get("config"))
    positions = given.get("cache_position")
    if positions is not None:
        q_length, q_offset = len(positions), positions[0] if len(positions) else 0
    grid = Grid(batch_size, int(q_length), int(kv_length), int(q_offset), int(kv_offset))
    # Models may cut a mask down to its keys, which leaves intervals whole where there are as many.
    if grid.Nk > INTERVAL_ENDS and not _to_be_edited(given):
        rows = _intervals(grid, given)
        if rows is not None:
            return _tensor(rows, given)
    return _dense(grid, given, slice(0, grid.N))


def as_attention_mask(mask: Mask, B: int, N: int, Nk: int | None = None) -> Any:
    """Return a tilewise mask as the `attention_mask` of a model's forward pass.

    Args:
        mask: The mask, such as `tilewise.causal() & tilewise.window(256, 0)`.
        B: Batch.
        N: Queries.
        Nk: Keys; N by default.

    Returns:
        `(B or 1, 1, N, 4)`, int32: two half-open intervals of keys per query. Where a query sees
        more than two intervals, `(B or 1, 1, N, Nk)` bool.
    """
    import torch

    keys = N if Nk is None else Nk
    lowered = mask.lower(B, 1, N, keys, operator=NAME)
    if isinstance(lowered, RowIntervals):
        return torch.from_numpy(lowered.rows.copy())
    return torch.from_numpy(lowered.to_bool(N, keys).copy())


def _check_family(config: Any) -> None:
    """Refuse a model whose attention would take the intervals for a mask of its own kind."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    modelling = sys.modules.get(name) if name.startswith("transformers.models.") else None
    if modelling is None or hasattr(modelling, "ALL_ATTENTION_FUNCTIONS"):
        return
    # Models that are made of others have no attention of their own.
    if any(getattr(it, "_supports_attention_backend", False) for it in vars(modelling).values()):
        return
    reason = f"{type(config).__name__}: the model does not use the attention interface"
    raise unsupported(NAME, f"{reason} of transformers; use attn_implementation='eager'")


def _to_be_edited(given: dict[str, Any]) -> bool:
    """Return whether the model asked for a mask that it can index and concatenate.

    It asks by allowing no None in place of the mask. transformers allows none either for packed
    sequences, blocks and the functions of a user, whose masks it does not edit.
    """
    if "cache_position" in given or given.get("use_vmap"):
        return False
    skipped = given.get("allow_is_causal_skip", True)
    skipped = skipped or given.get("allow_is_bidirectional_skip", False)
    return not skipped and not depends_on_tokens(given.get("mask_function"))


def _intervals(grid: Grid, given: dict[str, Any]) -> NDArray[np.int32] | None:
    """Return `(B or 1, 1, N, 4)` row intervals, or None where some row needs more than two."""
    function, tokens = given.get("mask_function"), given.get("attention_mask")
    mask = None if function is None else describe(function, grid)
    if mask is None:
        return _evaluated(grid, given)
    if tokens is not None and not bool(tokens.all()):
        mask = mask & padding(tokens, grid)
    lowered = mask.lower(grid.B, 1, grid.N, grid.Nk)
    return lowered.rows if isinstance(lowered, RowIntervals) else None


def _evaluated(grid: Grid, given: dict[str, Any]) -> NDArray[np.int32] | None:
    """Return the intervals of a function that is not recognised, a block of rows at a time."""
    rows = np.zeros((grid.B, 1, grid.N, INTERVAL_ENDS), dtype=np.int32)
    step = max(1, BOOL_BLOCK_BYTES // max(1, grid.B * grid.Nk))
    for start in range(0, grid.N, step):
        block = slice(start, min(start + step, grid.N))
        spans = bool_to_spans(_dense(grid, given, block).cpu().numpy())
        if spans is None:
            return None
        rows[:, :, block] = spans.reshape(*spans.shape[:3], INTERVAL_ENDS)
    return rows


def _dense(grid: Grid, given: dict[str, Any], rows: slice) -> Any:
    """Return some rows of the mask as `(B, 1, n, Nk)` booleans."""
    import torch
    from transformers.masking_utils import sdpa_mask

    first, count = grid.q_offset + rows.start, rows.stop - rows.start
    given = {**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    positions = given.get("cache_position")
    if positions is None:
        given.update(q_length=count, q_offset=first)
    else:
        given["cache_position"] = torch.arange(first, first + count, device=positions.device)
    return sdpa_mask(batch_size=grid.B, kv_length=grid.Nk, kv_offset=grid.kv_offset, **given)


def _tensor(rows: NDArray[np.int32], given: dict[str, Any]) -> Any:
    import torch

    positions = given.get("cache_position")
    device = given.get("device", "cpu") if positions is None else positions.device
    return torch.from_numpy(rows.copy()).to(device)
