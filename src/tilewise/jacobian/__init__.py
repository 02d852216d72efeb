"""Jacobians of operators as linear maps: applied from either side, never formed unless asked for.

`softmax`, `linear` and `attention` return a `Jacobian` at a point; see docs/jacobian.md.
"""

from .attention import attention
from .base import Jacobian, Structure
from .linear import linear
from .softmax import softmax

__all__ = ["Jacobian", "Structure", "attention", "linear", "softmax"]
