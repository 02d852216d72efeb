"""Attention on Hopper GPUs, written in Gluon: forward and backward of 16-bit tensors.

Compiled and checked without a GPU, and not yet timed on one: only a call that names the
implementation gets it.
"""

from __future__ import annotations

from tilewise.base.operator import Implementation
from tilewise.ops.attention.spec import (
    ALL_NEEDED,
    AttentionCall,
    AttentionGrads,
    AttentionOutputs,
    CotangentCall,
    Needed,
    Want,
)

from . import launch
from .device import Gpu, reason_against

__all__ = ["IMPLEMENTATION"]

_GPU = Gpu()


def forward(call: AttentionCall, want: Want) -> AttentionOutputs:
    """Compute attention on the GPU that holds q."""
    return launch.forward(call, want, _GPU)


def vjp(
    call: AttentionCall, cotangents: CotangentCall, needed: Needed = ALL_NEEDED
) -> AttentionGrads:
    """Compute the gradients on the GPU that holds q."""
    return launch.vjp(call, cotangents, needed, _GPU)


def refuses(call: AttentionCall) -> str | None:
    """Return why the call is not served."""
    return reason_against(call.q) or launch.refuses(call)


IMPLEMENTATION = Implementation("hopper", forward, vjp, None, None, refuses=refuses)
