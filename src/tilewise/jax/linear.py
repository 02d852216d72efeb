"""The linear map on JAX arrays, by XLA's own products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from tilewise.base.dtypes import is_narrow
from tilewise.ops.linear.spec import NAME, check_sizes

from . import checks


def linear(x: Array, w: Array, bias: Array | None = None) -> Array:
    r"""Compute `y = x w^T + bias`, with every derivative and transformation of JAX.

    Args:
        x: `(..., C)`, float64, float32, bfloat16 or float16. Sums are float32 for the latter two.
        w: `(V, C)`, dtype of x.
        bias: `(V,)`, dtype of x, or None.

    Returns:
        y: `(..., V)`, dtype of x.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape.

    Accuracy:
        `tilewise.ops.linear.spec.error_bound`, which does not depend on the order of sums.
    """
    x = checks.array(NAME, "x", x)
    w = checks.array(NAME, "w", w, x.dtype, "x")
    if bias is not None:
        bias = checks.array(NAME, "bias", bias, x.dtype, "x")
    check_sizes(x.shape, w.shape, None if bias is None else bias.shape)
    wide = jnp.float32 if is_narrow(x.dtype) else x.dtype
    last = (((x.ndim - 1,), (1,)), ((), ()))
    highest = jax.lax.Precision.HIGHEST
    y = jax.lax.dot_general(x, w, last, precision=highest, preferred_element_type=wide)
    if bias is not None:
        y = y + bias.astype(wide)
    return y.astype(x.dtype)
