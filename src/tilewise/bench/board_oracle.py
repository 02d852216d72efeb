"""What the results of a GPU board are compared with: attention in float64, and bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import tilewise as tw
from tilewise.ops.attention import reference
from tilewise.ops.attention.spec import Needed, Want, prepare, prepare_vjp

__all__ = ["BOUNDS", "error", "oracle"]

BOUNDS: Final = {"forward": 8e-3, "backward": 1.6e-2}
"""Largest relative error of bfloat16 against the float64 oracle, in Frobenius norm."""


def oracle(inputs: Sequence[NDArray[np.float64]], causal: bool) -> dict[str, NDArray[Any]]:
    """Return o, dq, dk and dv for q, k, v and do, `(B, H, N, D)`."""
    q, k, v, do = inputs
    call = prepare(q, k, v, mask=tw.causal() if causal else None)
    outputs = reference.forward(call, Want())
    grads = reference.vjp(call, prepare_vjp(call, do, outputs.o, outputs.stats), Needed())
    return {"o": outputs.o, "dq": grads.dq, "dk": grads.dk, "dv": grads.dv}


def error(found: NDArray[np.float64], expected: NDArray[Any]) -> float:
    """Return the relative error in Frobenius norm; infinity where there is NaN."""
    relative = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    return float(relative) if np.isfinite(relative) else float("inf")
