"""Exact attention with its gradients, tile by tile, without an N x N matrix.

`tilewise.attention` works on the arrays that it is given; `tilewise.numpy` holds the functions for
NumPy arrays. Masks are built from `causal`, `window`, `prefix`, `documents` and the others below,
combined with `&` and `|`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base.errors import Unsupported, type_error, value_error
from .base.masks import (
    Mask,
    causal,
    chunked,
    dense,
    documents,
    lengths,
    prefix,
    sink_tokens,
    window,
)
from .ops.attention.spec import AttentionGrads, OutputTangents, RowStats
from .shared.softmax_state import SoftmaxState, merge

if TYPE_CHECKING:
    from . import numpy
    from .verify.gradients import verify_gradients

__version__ = "0.1.0"

__all__ = [
    "AttentionGrads",
    "Mask",
    "OutputTangents",
    "RowStats",
    "SoftmaxState",
    "Unsupported",
    "__version__",
    "attention",
    "causal",
    "chunked",
    "dense",
    "documents",
    "get_num_threads",
    "lengths",
    "merge",
    "numpy",
    "prefix",
    "set_num_threads",
    "sink_tokens",
    "verify_gradients",
    "window",
]

_FRONTENDS = {"numpy": "tilewise.numpy", "torch": "tilewise.torch"}
_LAZY = {
    "numpy": ("tilewise.numpy", None),
    "torch": ("tilewise.torch", None),
    "verify": ("tilewise.verify", None),
    "verify_gradients": ("tilewise.verify.gradients", "verify_gradients"),
}


def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Compute softmax attention with the frontend of the arrays' own type.

    Formula: `o = softmax(scale q k^T) v`, with the options of `tilewise.numpy.attention`.

    Args:
        q: `(B, H, N, D)`, float32 or float64. A NumPy array.
        k: `(B, Hk, Nk, D)`, dtype of q. Hk must divide H.
        v: `(B, Hk, Nk, Dv)`, dtype of q.
        **options: As in `tilewise.numpy.attention`.

    Returns:
        `o`, or a NamedTuple where statistics were asked for.

    Raises:
        TypeError: No frontend knows the type of q.
    """
    for base in type(q).__mro__:
        frontend = _FRONTENDS.get(base.__module__.partition(".")[0])
        if frontend is not None:
            module = sys.modules.get(frontend) or import_module(frontend)
            return module.attention(q, k, v, **options)
    raise type_error("attention", "q", "be a numpy.ndarray", type(q).__name__)


def get_num_threads() -> int:
    """Return the number of threads that the compiled implementation uses."""
    return int(import_module("tilewise._core").num_threads())


def set_num_threads(count: int) -> None:
    """Set the number of threads that the compiled implementation uses; results do not change.

    Args:
        count: From 1 to 1024.

    Raises:
        TypeError: Not an integer.
        ValueError: Outside that range.
    """
    if isinstance(count, bool) or not isinstance(count, int):
        raise type_error("set_num_threads", "count", "be an integer", type(count).__name__)
    if not 1 <= count <= 1024:
        raise value_error("set_num_threads", "count", "be from 1 to 1024", count)
    import_module("tilewise._core").set_num_threads(count)


def __getattr__(name: str) -> Any:
    """Import on first use what `import tilewise` leaves out."""
    if name not in _LAZY:
        raise AttributeError(f"module 'tilewise' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)


def __dir__() -> list[str]:
    """List the lazy names too."""
    return sorted({*globals(), *_LAZY})
