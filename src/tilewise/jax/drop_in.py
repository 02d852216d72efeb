"""Attention as jax.nn and Flax call it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tilewise.base._lowering import Size
from tilewise.base.errors import type_error, unsupported, value_error
from tilewise.base.masks import causal, check_dense, window

from .attention import attention
from .checks import Literal

NAME = "dot_product_attention"


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | Array | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Compute attention as `jax.nn.dot_product_attention` does, with every derivative.

    `softmax(scale query key^T + bias) value` in O(T) memory. Unlike there, a key that is hidden is
    absent: a row that sees no key is 0, its residual is -inf, and NaN in a hidden key reaches
    nothing. Values may have another size than keys.

    Args:
        query: `(B, T, N, H)` or `(T, N, H)`; float64, float32, bfloat16 or float16.
        key: `(B, S, K, H)` or `(S, K, H)`, dtype of query. K divides N.
        value: `(B, S, K, Hv)` or `(S, K, Hv)`, dtype of query.
        bias: Broadcasts to `(B, N, T, S)`; added to the logits, with gradient.
        mask: Boolean, broadcasts to `(B, N, T, S)`; True is seen.
        scale: Factor of `query key^T`; `H ** -0.5` by default. One that is traced multiplies query,
            and has a gradient.
        is_causal: Query i sees the keys up to i, counted from the first one.
        query_seq_lengths: `(B,)` integers: rows behind them are 0.
        key_value_seq_lengths: `(B,)` integers: keys behind them are hidden.
        local_window_size: How many keys before and after its own position a query sees; one
            number for both.
        implementation: One of tilewise's implementations; by default the first that serves.
        return_residual: Return also the log-sum-exp, without gradient.

    Returns:
        The shape of query with Hv in place of H, its dtype; with return_residual also
        `(B, T, N)` or `(T, N)`, dtype of query.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
    """
    q, k, v = _four_dimensional(query, key, value)
    if implementation in ("xla", "cudnn"):
        requirement = "be None or one of tilewise's (jax.nn has the others)"
        raise value_error(NAME, "implementation", requirement, repr(implementation))
    if bias is not None:
        bias = _bias(bias, q)
    lengths = query_seq_lengths, key_value_seq_lengths
    sizes = *q.shape[:3], k.shape[1]
    seen = _mask(mask, is_causal, local_window_size, lengths, sizes)
    q, scale = _scaled(q, scale)
    o, lse, *_ = attention(
        q,
        k,
        v,
        mask=seen,
        bias=bias,
        softmax_scale=scale,
        layout="bnhd",
        return_lse=True,
        implementation=implementation,
    )
    assert lse is not None
    residual = jax.lax.stop_gradient(lse).swapaxes(1, 2).astype(o.dtype)
    if jnp.ndim(query) == 3:
        o, residual = o[0], residual[0]
    return (o, residual) if return_residual else o


def flax_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    **others: Any,
) -> Any:
    """Compute attention as the `attention_fn` of Flax's `MultiHeadAttention`, nnx and linen.

    Args:
        query: `(..., T, N, H)`.
        key: `(..., S, K, H)`. K divides N.
        value: `(..., S, K, Hv)`.
        bias: Broadcasts to `(..., N, T, S)`; added to the logits, with gradient.
        mask: Broadcasts to `(..., N, T, S)`; what is not 0 is seen. Flax makes masks of floats.
        broadcast_dropout: Not read: every entry of the batch drops pairs of its own.
        dropout_rng: Key of the dropout.
        dropout_rate: Probability with which a pair is left out.
        deterministic: Whether there is no dropout.
        dtype: Dtype of the computation and its result; by default that to which the tensors
            promote.
        precision: Not read: sums are as exact as `tilewise.jax.attention` says.
        module: None, for there are no weights to store.
        **others: `is_causal` as in `dot_product_attention`; `promote_dtype` and
            `force_fp32_for_softmax`, which are not read; anything else that is not None is refused.

    Returns:
        `(..., T, N, Hv)`.

    Raises:
        Unsupported: The weights are asked for, or a product of the caller's own.
    """
    is_causal = bool(others.pop("is_causal", False))
    for name in ("promote_dtype", "force_fp32_for_softmax"):
        others.pop(name, None)
    refused = [name for name, given in {"module": module, **others}.items() if given is not None]
    if refused:
        raise unsupported("flax_attention", f"{refused[0]} is not served: there are no weights")
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    leading = query.shape[:-3]
    q, k, v = (
        x.astype(dtype).reshape(math.prod(leading), *x.shape[-3:]) for x in (query, key, value)
    )
    sizes = *q.shape[:3], k.shape[1]
    seen = None if mask is None else _merged(jnp.asarray(mask) != 0, leading)
    dropped: dict[str, Any] = {}
    if not deterministic and dropout_rate > 0:
        dropped = {"dropout_p": dropout_rate, "seed": dropout_rng}
    o = attention(
        q,
        k,
        v,
        mask=_mask(seen, is_causal, None, (None, None), sizes),
        bias=None if bias is None else _bias(_merged(bias, leading), q),
        layout="bnhd",
        **dropped,
    )
    return o.reshape(*leading, *o.shape[1:])


def _four_dimensional(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """Return tensors with a batch, after checking what has names of its own here."""
    q, k, v = found = tuple([jnp.asarray(x) for x in (query, key, value)])
    heads = k.shape[-2] if k.ndim > 2 else 0
    requirements = (
        ("query", q, ("B", "T", "N", "H")),
        ("key", k, ("B", "S", "K", "H")),
        ("value", v, ("B", "S", "K", "Hv")),
    )
    for name, x, dims in requirements:
        if x.ndim != q.ndim or x.ndim not in (3, 4):
            shown = f"({', '.join(dims)}) or, as all others, without B"
            raise value_error(NAME, name, f"have shape {shown}", x.shape)
        if x.dtype != q.dtype:
            raise type_error(NAME, name, f"have dtype {q.dtype} (from query)", x.dtype.name)
    if k.shape[-1] != q.shape[-1]:
        raise value_error(NAME, "key", f"have H={q.shape[-1]} (from query)", k.shape)
    if v.shape[:-1] != k.shape[:-1]:
        raise value_error(NAME, "value", "have the shape of key but for its last size", v.shape)
    if k.shape[:-3] != q.shape[:-3]:
        raise value_error(NAME, "key", f"have batch {q.shape[0]} (from query)", k.shape)
    if heads == 0 or q.shape[-2] % heads:
        raise value_error(NAME, "key", f"have heads that divide {q.shape[-2]}", k.shape)
    if q.ndim == 3:
        q, k, v = (x[None] for x in found)
    return q, k, v


def _scaled(q: Any, scale: Any) -> tuple[Any, float | None]:
    """Return queries and the factor of their products, which is a positive number."""
    if isinstance(scale, jax.Array | np.ndarray):
        if scale.shape != () or not jnp.issubdtype(scale.dtype, jnp.floating):
            got = f"shape {scale.shape} of {scale.dtype.name}"
            raise type_error(NAME, "scale", "be a real number", got)
        if isinstance(scale, jax.core.Tracer):
            return (q * scale).astype(q.dtype), 1.0
        scale = float(scale)
    if scale is not None and scale < 0:
        return -q, -scale
    return q, scale


def _bias(bias: Any, q: Any) -> Any:
    """Return a bias in a dtype that attention takes."""
    bias = jnp.asarray(bias)
    wide = q.dtype if q.dtype.itemsize > 2 else np.dtype(np.float32)
    return bias if bias.dtype == q.dtype else bias.astype(wide)


def _mask(
    mask: Any,
    is_causal: bool,
    local_window_size: Any,
    lengths: tuple[Any, Any],
    sizes: tuple[int, int, int, int],
) -> Literal | None:
    """Return the mask of `attention` that means what the arguments mean, or None.

    Sizes are the batch, and how many queries, heads and keys there are.
    """
    batch, queries, heads, keys = sizes
    texts: list[str] = []
    arrays: list[Any] = []

    def name(array: Any) -> str:
        arrays.append(array)
        return f"a{len(arrays) - 1}"

    if is_causal:
        texts.append(repr(causal(align="top_left")))
    if local_window_size is not None:
        reach = local_window_size
        if not isinstance(reach, int | tuple | list):
            got = type(reach).__name__
            raise type_error(NAME, "local_window_size", "be an integer or a pair of them", got)
        left, right = (reach, reach) if isinstance(reach, int) else reach
        texts.append(repr(window(left, right, align="top_left")))
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.dtype != np.bool_:
            requirement = "have dtype bool (a mask that is added is a bias)"
            raise type_error(NAME, "mask", requirement, mask.dtype.name)
        check_dense(Size(batch, heads, queries, keys, NAME), mask.shape)
        texts.append(f"dense({name(mask)})")
    names = ("query_seq_lengths", "key_value_seq_lengths")
    of_q, of_k = (_lengths(n, x, batch) for n, x in zip(names, lengths, strict=True))
    if of_q is not None or of_k is not None:
        counts = jnp.full(batch, keys, np.int32) if of_k is None else jnp.clip(of_k, 0, keys)
        text = name(counts)
        if of_q is not None:
            text += f", query_lengths={name(jnp.clip(of_q, 0, queries))}"
        texts.append(f"lengths({text})")
    return Literal(" & ".join(texts), tuple(arrays)) if texts else None


def _lengths(name: str, lengths: Any, batch: int) -> Any:
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        got = f"shape {lengths.shape} of {lengths.dtype.name}"
        raise value_error(NAME, name, f"be integers of shape ({batch},)", got)
    return lengths


def _merged(array: Any, leading: Sequence[int]) -> Any:
    """Return what broadcasts to `(..., N, T, S)` as what broadcasts to `(B, N, T, S)`."""
    if array is None:
        return None
    array = jnp.asarray(array)
    own = array.shape[:-3]
    if all([n == 1 for n in own]):
        return array.reshape(array.shape[-3:])
    whole = jnp.broadcast_to(array, (*leading, *array.shape[-3:]))
    return whole.reshape(math.prod(leading), *array.shape[-3:])
