"""The softmax, its logarithm and log-sum-exp in Triton, for tensors of a GPU."""

from .launch import IMPLEMENTATION

__all__ = ["IMPLEMENTATION"]
