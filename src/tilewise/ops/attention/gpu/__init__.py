"""Attention in Triton, for tensors of a GPU."""

from .launch import IMPLEMENTATION, INTERPRETS

__all__ = ["IMPLEMENTATION", "INTERPRETS"]
