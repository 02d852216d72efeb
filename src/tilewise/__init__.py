"""Exact attention with its gradients, tile by tile, without an N x N matrix.

`tilewise.attention` works on the arrays that it is given; `tilewise.numpy` holds the functions for
NumPy arrays. Masks are built from `causal`, `window`, `prefix`, `documents` and the others below,
combined with `&` and `|`.
"""

from __future__ import annotations

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
    from . import jacobian, numpy
    from .cache import KVCache, OutOfPages
    from .verify.gradients import verify_gradients

__version__ = "0.1.0"

__all__ = [
    "AttentionGrads",
    "KVCache",
    "Mask",
    "OutOfPages",
    "OutputTangents",
    "RowStats",
    "SoftmaxState",
    "Unsupported",
    "__version__",
    "attention",
    "attention_varlen",
    "causal",
    "chunked",
    "cross_entropy",
    "dense",
    "documents",
    "get_num_threads",
    "jacobian",
    "lengths",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "logsumexp",
    "merge",
    "numpy",
    "prefix",
    "set_num_threads",
    "sink_tokens",
    "softmax",
    "verify_gradients",
    "window",
]

_LAZY = {
    "KVCache": ("tilewise.cache", "KVCache"),
    "OutOfPages": ("tilewise.cache", "OutOfPages"),
    "jacobian": ("tilewise.jacobian", None),
    "jax": ("tilewise.jax", None),
    "numpy": ("tilewise.numpy", None),
    "torch": ("tilewise.torch", None),
    "verify": ("tilewise.verify", None),
    "verify_gradients": ("tilewise.verify.gradients", "verify_gradients"),
}


def attention(q: Any, k: Any = None, v: Any = None, **options: Any) -> Any:
    """Compute softmax attention with the frontend of the arrays' own type.

    Formula: `o = softmax(scale q k^T) v`, with the options of `tilewise.numpy.attention`.

    Args:
        q: `(B, H, N, D)`, float64, float32, bfloat16 or float16. An array of NumPy or JAX, or a
            PyTorch tensor.
        k: `(B, Hk, Nk, D)`, dtype of q. Hk must divide H.
        v: `(B, Hk, Nk, Dv)`, dtype of q. With a `cache` neither k nor v need be given.
        **options: As in `tilewise.numpy.attention`.

    Returns:
        `o`, or a NamedTuple where statistics were asked for.

    Raises:
        TypeError: No frontend knows the type of q.
    """
    return _frontend("attention", q).attention(q, k, v, **options)


def attention_varlen(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any = None, **options: Any
) -> Any:
    """Compute softmax attention of packed sequences with the frontend of the arrays' own type.

    Args:
        q: `(total_q, H, D)`. An array of NumPy or JAX, or a PyTorch tensor.
        k: `(total_k, Hk, D)`, dtype of q. Hk must divide H.
        v: `(total_k, Hk, Dv)`, dtype of q.
        cu_seqlens_q: `(S + 1,)` integers, ascending from 0 to total_q: sequence s has the queries
            from `cu_seqlens_q[s]` up to, not including, `cu_seqlens_q[s + 1]`.
        cu_seqlens_k: The same for keys, up to total_k; by default that of the queries.
        **options: As in `tilewise.numpy.attention_varlen`.

    Returns:
        `o`, or a NamedTuple where statistics were asked for.

    Raises:
        TypeError: No frontend knows the type of q.
    """
    frontend = _frontend("attention_varlen", q)
    return frontend.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)


def cross_entropy(logits: Any, targets: Any, **options: Any) -> Any:
    """Compute the cross-entropy of logits with the frontend of the array's own type.

    Formula: `loss = sum t (log sum exp(logits) - logits)` with the weights t of the target.

    Args:
        logits: Any shape with an axis of classes, by default the last; float64, float32, bfloat16
            or float16. An array of NumPy or JAX, or a PyTorch tensor.
        targets: Class indices, integers in the shape of the logits without the classes, or class
            probabilities in their shape.
        **options: As in `tilewise.numpy.cross_entropy` or `tilewise.torch.cross_entropy`.

    Returns:
        The loss, or a NamedTuple where more was asked for.

    Raises:
        TypeError: No frontend knows the type of the logits.
    """
    return _frontend("cross_entropy", logits, "logits").cross_entropy(logits, targets, **options)


def softmax(x: Any, *axis: Any, **options: Any) -> Any:
    """Compute the softmax along axes with the frontend of the array's own type.

    Formula: `y = exp(s) / sum exp(s)` with `s = x / temperature`.

    Args:
        x: Any shape, float64, float32, bfloat16 or float16. An array of NumPy or JAX, or a
            PyTorch tensor.
        *axis: The axis or axes of a row; by default the last.
        **options: As in `tilewise.numpy.softmax` or `tilewise.torch.softmax`.

    Returns:
        `y`, or a NamedTuple where statistics were asked for.

    Raises:
        TypeError: No frontend knows the type of x.
    """
    return _frontend("softmax", x, "x").softmax(x, *axis, **options)


def log_softmax(x: Any, *axis: Any, **options: Any) -> Any:
    """Compute the logarithm of the softmax along axes, with the frontend of the array's own type.

    Args:
        x: As for `softmax`.
        *axis: The axis or axes of a row; by default the last.
        **options: As in `tilewise.numpy.log_softmax` or `tilewise.torch.log_softmax`.

    Returns:
        `log_y`, or a NamedTuple where statistics were asked for.

    Raises:
        TypeError: No frontend knows the type of x.
    """
    return _frontend("log_softmax", x, "x").log_softmax(x, *axis, **options)


def logsumexp(x: Any, *axis: Any, **options: Any) -> Any:
    """Compute the logarithm of the sum of exponentials along axes, by the array's own type.

    Args:
        x: As for `softmax`.
        *axis: The axis or axes of a row; by default all.
        **options: As in `tilewise.numpy.logsumexp` or `tilewise.torch.logsumexp`.

    Returns:
        One number for each row, at least float32.

    Raises:
        TypeError: No frontend knows the type of x.
    """
    return _frontend("logsumexp", x, "x").logsumexp(x, *axis, **options)


def linear(x: Any, w: Any, bias: Any = None, **options: Any) -> Any:
    """Compute `y = x w^T + bias` with the frontend of the array's own type.

    Args:
        x: `(..., C)`, float64, float32, bfloat16 or float16. An array of NumPy or JAX, or a
            PyTorch tensor.
        w: `(V, C)`, dtype of x.
        bias: `(V,)`, dtype of x, or None.
        **options: As in `tilewise.torch.linear`.

    Returns:
        y: `(..., V)`, dtype of x.

    Raises:
        TypeError: No frontend knows the type of x.
    """
    return _frontend("linear", x, "x").linear(x, w, bias, **options)


def linear_cross_entropy(hidden: Any, weight: Any, targets: Any, **options: Any) -> Any:
    """Compute the cross-entropy of a linear classifier, by the type of hidden.

    Formula: `loss = lse - s_y` with `s = hidden weight^T`, which is not stored.

    Args:
        hidden: `(..., C)`, float64, float32, bfloat16 or float16. An array of NumPy or JAX, or a
            PyTorch tensor.
        weight: `(V, C)`, dtype of hidden. A row for each class.
        targets: `(...)`, integers from 0 to V - 1, or ignore_index.
        **options: As in `tilewise.numpy.linear_cross_entropy`.

    Returns:
        The loss, or a NamedTuple where more was asked for.

    Raises:
        TypeError: No frontend knows the type of hidden.
    """
    frontend = _frontend("linear_cross_entropy", hidden, "hidden")
    return frontend.linear_cross_entropy(hidden, weight, targets, **options)


def _frontend(operator: str, array: Any, name: str = "q") -> Any:
    """Return the module of functions for the type of an array."""
    # Statements: torch.compile traces them, and a thread waits for the import of another one.
    for base in type(array).__mro__:
        package = base.__module__.partition(".")[0]
        if package == "numpy":
            import tilewise.numpy as arrays

            return arrays
        if package == "torch":
            import tilewise.torch as tensors

            return tensors
        if package in ("jax", "jaxlib"):
            import tilewise.jax as traced

            return traced
    raise type_error(operator, name, "be a numpy.ndarray", type(array).__name__)


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
