"""A cache for `generate` that writes new keys and values behind those that it has."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from tilewise.base.errors import type_error, unsupported, value_error

NAME = "contiguous_cache"


def contiguous_cache(config: Any = None, *, max_length: int = 0) -> Any:
    """Return a cache for a model, to be given to it as `past_key_values`.

    It holds what `transformers.DynamicCache` holds, but appends in place: each layer has room for
    more tokens than there are, and gets twice the room where that is used up. A layer with a
    sliding window keeps that window only.

    Args:
        config: The model's configuration, from which layers with sliding windows are known.
        max_length: Tokens for which layers without window get room at once. No limit.

    Returns:
        A `transformers.DynamicCache`. Layers of other kinds than attention, such as those of
        linear attention, are the usual ones.

    Raises:
        ImportError: transformers has no layers of caches, as before 4.56.
        TypeError: max_length is not an integer.
        ValueError: max_length is negative.

    Its layers raise `Unsupported` where keys or values require gradients, for what they write over
    cannot be differentiated; `transformers.DynamicCache` serves that.
    """
    if isinstance(max_length, bool) or not hasattr(type(max_length), "__index__"):
        raise type_error(NAME, "max_length", "be an integer", type(max_length).__name__)
    if max_length < 0:
        raise value_error(NAME, "max_length", "be at least 0", max_length)
    usual, full, sliding = _layers()
    result = import_module("transformers").DynamicCache(config=config)
    result.layer_class_to_replicate = result.layer_class_to_replicate and (lambda: full(max_length))
    for i, layer in enumerate(result.layers):
        if type(layer) is usual[0]:
            result.layers[i] = full(max_length)
        elif type(layer) is usual[1]:
            result.layers[i] = sliding(layer.sliding_window)
    return result


class Room:
    """Memory behind keys, or behind values, into which more of them are written.

    Args:
        rows: For how many there is room at least.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._buffer: Any = None

    def extended(self, held: Any, new: Any) -> Any:
        """Return `(B, Hk, n + m, D)`: n rows that are held, usually here, and m behind them.

        Args:
            held: `(B, Hk, n, D)`, or empty.
            new: `(B, Hk, m, D)`.
        """
        import torch

        if torch.is_grad_enabled() and (new.requires_grad or held.requires_grad):
            reason = "keys and values are written in place, so they have no gradients"
            raise unsupported(NAME, f"{reason}; use torch.no_grad() or transformers.DynamicCache")
        length = held.shape[2] if held.ndim == new.ndim else 0
        start, end = self._start(held) if length else 0, length + new.shape[2]
        if start is None or not self._fits(new, start + end):
            if start is not None or not self._fits(new, end):
                rows = max(self._rows, 2 * end)
                self._buffer = new.new_empty((*new.shape[:2], rows, new.shape[3]))
            start = 0
            if length:
                self._buffer[:, :, :length] = held
        whole = self._buffer[:, :, start : start + end]
        whole[:, :, length:] = new
        return whole

    def _start(self, held: Any) -> int | None:
        """Return at which row of the buffer the held rows lie, or None where they lie elsewhere."""
        buffer = self._buffer
        if buffer is None or held.shape[0] != buffer.shape[0] or held.stride() != buffer.stride():
            return None
        if held.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
            return None
        return int(held.storage_offset() // buffer.stride(2))

    def _fits(self, new: Any, end: int) -> bool:
        buffer = self._buffer
        if buffer is None or end > buffer.shape[2] or buffer.dtype is not new.dtype:
            return False
        same = (0, 1, 3)
        return all(buffer.shape[i] == new.shape[i] for i in same) and buffer.device == new.device


@cache
def _layers() -> tuple[tuple[Any, Any], Any, Any]:
    """Return the usual classes of layers without and with a window, and those that have room."""
    have = import_module("transformers.cache_utils")
    if not hasattr(have, "DynamicSlidingWindowLayer"):
        raise ImportError(f"{NAME} needs transformers 4.56 or later")
    full, sliding = have.DynamicLayer, have.DynamicSlidingWindowLayer

    class RoomyLayer(full):  # type: ignore[misc, valid-type]
        """Keys and values of one layer, with room behind them."""

        keys: Any
        values: Any

        def __init__(self, max_length: int = 0) -> None:
            super().__init__()
            self.rooms = Room(max_length), Room(max_length)

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            """Write keys and values behind those that are there, and return all of them."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.keys = self.rooms[0].extended(self.keys, key_states)
            self.values = self.rooms[1].extended(self.values, value_states)
            return self.keys, self.values

    class RoomySlidingLayer(sliding):  # type: ignore[misc, valid-type]
        """The last keys and values of one layer with a sliding window, with room behind them."""

        keys: Any
        values: Any

        def __init__(self, sliding_window: int) -> None:
            super().__init__(sliding_window=sliding_window)
            self.rooms = Room(0), Room(0)

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            """Write keys and values behind those that are there, and return what queries see."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            n = key_states.shape[-2]
            self.cumulative_length += n
            keys = self.rooms[0].extended(self.keys, key_states)
            values = self.rooms[1].extended(self.values, value_states)
            last = self.sliding_window - 1
            seen = [x[:, :, -min(last + n, x.shape[2]) :] for x in (keys, values)]
            kept = keys.shape[2] if getattr(self, "record_past", False) else last
            first = max(0, keys.shape[2] - kept)
            self.keys, self.values = keys[:, :, first:], values[:, :, first:]
            return seen[0], seen[1]

    return (full, sliding), RoomyLayer, RoomySlidingLayer
