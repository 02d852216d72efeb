"""Real data that ships with tilewise."""

from __future__ import annotations

from pathlib import Path

__all__ = ["minilm"]


def minilm() -> Path:
    """Return the path of `minilm.npz`: q, k, v of one MiniLM layer on 512 tokens of a novel.

    `examples/capture_minilm.py` in the repository wrote it and can write it again.
    """
    return Path(__file__).with_name("minilm.npz")
