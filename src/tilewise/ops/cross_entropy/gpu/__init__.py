"""The cross-entropy in Triton, for tensors of a GPU."""

from .launch import IMPLEMENTATION

__all__ = ["IMPLEMENTATION"]
