"""Attention on JAX arrays."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, Unpack, overload

import numpy as np
from jax import Array
from numpy.typing import NDArray

from tilewise.base.dims import show
from tilewise.base.errors import value_error
from tilewise.base.masks import Mask, PackedBits, RowIntervals
from tilewise.ops.attention.record import FLAT
from tilewise.ops.attention.spec.arguments import (
    DROPOUT,
    LAYOUTS,
    NAME,
    SCALE,
    SHAPES,
    SOFTCAP,
)

from . import checks
from .autodiff import forward, register

register(FLAT)

AnyMask: TypeAlias = (
    Mask | RowIntervals | PackedBits | checks.Literal | Array | NDArray[np.bool_] | None
)


class AttentionResult(NamedTuple):
    """Output of attention with the statistics that were asked for; the others are None.

    Attributes:
        o: `(B, H, N, Dv)`, or `(B, N, H, Dv)` with `layout="bnhd"`; dtype of q.
        lse: `(B, H, N)`, dtype of q, at least float32. Natural log-sum-exp of the logits.
        max_logit: `(B, H, N)`, dtype of lse. Largest attended logit, without the sink.
        entropy: `(B, H, N)`, dtype of lse. Entropy of the probabilities, with that of the sink.
    """

    o: Array
    lse: Array | None = None
    max_logit: Array | None = None
    entropy: Array | None = None


class AttentionOptions(TypedDict, total=False):
    """The options of attention that do not change the type of its result."""

    mask: AnyMask
    bias: Array | None
    alibi_slopes: Array | None
    softcap: float | None
    sinks: Array | None
    softmax_scale: float | None
    dropout_p: float
    seed: int | Array | None
    layout: str
    implementation: str | None


@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    return_lse: Literal[False] = ...,
    return_max_logit: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> Array: ...
@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    return_lse: bool = ...,
    return_max_logit: bool = ...,
    return_entropy: bool = ...,
    **options: Unpack[AttentionOptions],
) -> Array | AttentionResult: ...
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: AnyMask = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Array | None = None,
    layout: str = "bhnd",
    return_lse: bool = False,
    return_max_logit: bool = False,
    return_entropy: bool = False,
    implementation: str | None = None,
) -> Array | AttentionResult:
    r"""Compute softmax attention, with derivatives of first and second order.

    `o = softmax(s) v`, `s = softcap tanh(scale q k^T / softcap) + bias - slope |i + Nk - N - j|`,
    and -inf where the mask hides a key. A hidden key is absent: NaN there reaches nothing. A row
    without keys has `o = 0` and `lse = -inf`.

    `o` and `lse` are differentiable with respect to q, k, v, bias and sinks under every
    transformation of JAX: `grad`, `jvp`, `linearize`, `vmap`, `checkpoint`, `jit`, and one over
    another up to the second order. Nothing of size N x Nk is saved.

    Args:
        q: `(B, H, N, D)`, float64, float32, bfloat16 or float16. Sums are float32 for the latter
            two. D is at most 512.
        k: `(B, Hk, Nk, D)`, dtype of q. Hk must divide H; head h reads head `h // (H // Hk)`.
        v: `(B, Hk, Nk, Dv)`, dtype of q. Dv is at most 512.
        mask: A mask such as `tilewise.causal()`, or a boolean array that broadcasts to
            `(B, H, N, Nk)`; True lets query i see key j.
        bias: Broadcasts to `(B, H, N, Nk)`, dtype of q; where q has 16 bits, also float32, as
            alibi_slopes and sinks. Added to the logits.
        alibi_slopes: `(H,)` or `(B, H)`, dtype of q. `slope |i + Nk - N - j|` is subtracted. Has no
            gradient.
        softcap: c > 0: a logit x becomes `c tanh(x / c)`, before the bias and the mask.
        sinks: `(H,)`, dtype of q. One extra logit per head, in the denominator only; -inf is none.
        softmax_scale: Factor of `q k^T`; `D ** -0.5` by default.
        dropout_p: Probability with which a pair is left out of `o`, from 0 to 1; the others count
            `1 / (1 - dropout_p)` times. Row statistics do not change.
        seed: Integer below 2**64, an integer array of no dimensions, or a key of `jax.random`, that
            decides which pairs those are; needed where dropout_p is above 0.
        layout: `"bhnd"`, or `"bnhd"` for arrays `(B, N, H, D)`; bias and row statistics keep
            their order.
        return_lse: Return also `lse = log sum exp s`, with the sink.
        return_max_logit: Return also the largest attended logit of each row. Has no gradient.
        return_entropy: Return also the entropy of each row's probabilities. Has no gradient.
        implementation: Name of the implementation, which never falls back to another; by default
            the first that serves the call.

    Returns:
        `o`, in the layout of q and its dtype; or an `AttentionResult` where more was asked for.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: A third derivative is asked for.
        JaxRuntimeError: When it runs: a value is wrong that was not known while tracing.

    Accuracy:
        `tilewise.ops.attention.spec.error_bound` bounds the error and derives the bound.

    Source:
        As for `tilewise.numpy.attention`, which computes the same bits.
    """
    if layout not in LAYOUTS:
        raise value_error(NAME, "layout", f"be {' or '.join(map(repr, LAYOUTS))}", repr(layout))
    q = checks.array(NAME, "q", q)
    k, v = (checks.array(NAME, name, x, q.dtype) for name, x in (("k", k), ("v", v)))
    _check_rank(q, k, layout)
    dropout_p = DROPOUT.check(NAME, dropout_p)
    text, arrays = (None, ()) if mask is None else _mask(mask, q, k, layout)
    options = {
        "mask": text,
        "softcap": None if softcap is None else SOFTCAP.check(NAME, softcap),
        "softmax_scale": None if softmax_scale is None else SCALE.check(NAME, softmax_scale),
        "dropout_p": dropout_p,
        "layout": layout,
        "implementation": implementation,
    }
    more = (("bias", bias), ("sinks", sinks), ("alibi_slopes", alibi_slopes))
    given = [checks.either(NAME, name, x, q.dtype) for name, x in more]
    given += [checks.seed_words(NAME, seed, dropout_p), None, None]
    needed = (True, True, bool(return_max_logit), bool(return_entropy))
    o, lse, max_logit, entropy = forward(FLAT, (q, k, v, *given, *arrays), repr(options), needed)
    if not (return_lse or return_max_logit or return_entropy):
        found: Array = o
        return found
    return AttentionResult(o, lse if return_lse else None, max_logit, entropy)


def _check_rank(q: Array, k: Array, layout: str) -> None:
    for name, x in (("q", q), ("k", k)):
        dims = SHAPES[layout][name][0]
        if x.ndim != len(dims):
            raise value_error(NAME, name, f"have shape {show(dims)}", x.shape)


def _mask(mask: Any, q: Array, k: Array, layout: str) -> tuple[str, tuple[Array, ...]]:
    """Return a mask as a literal and its arrays."""
    rows, heads = (2, 1) if layout == "bhnd" else (1, 2)
    sizes = q.shape[0], q.shape[heads], q.shape[rows], k.shape[rows]
    return checks.mask_arrays(NAME, mask, sizes)
