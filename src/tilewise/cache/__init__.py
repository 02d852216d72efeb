"""Keys and values that stay between the calls of a decoding loop."""

from __future__ import annotations

from .attention import attend, refuse_without_cache
from .kv_cache import KVCache
from .pages import OutOfPages

__all__ = ["KVCache", "OutOfPages", "attend", "refuse_without_cache"]
