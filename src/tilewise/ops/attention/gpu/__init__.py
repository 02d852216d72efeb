"""Attention in Triton, for tensors of a GPU."""

from dataclasses import replace

from .decode.launch import forward
from .launch import IMPLEMENTATION as _ORDINARY

IMPLEMENTATION = replace(_ORDINARY, forward=forward)

__all__ = ["IMPLEMENTATION"]
