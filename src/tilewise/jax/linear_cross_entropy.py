"""Cross-entropy of a linear classifier on JAX arrays."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array

from tilewise.base.dims import Sizes
from tilewise.base.dtypes import is_narrow
from tilewise.base.errors import value_error
from tilewise.ops.linear_cross_entropy.record import FLAT
from tilewise.ops.linear_cross_entropy.spec import (
    GRADIENT_FILTER,
    IGNORE_INDEX,
    LABEL_SMOOTHING,
    LIMITS,
    NAME,
    PROBABILITIES,
    SOFTCAP,
    TOKEN_CHUNK,
    VOCAB_CHUNK,
    WEIGHT,
    Z_LOSS,
    check_reduction,
    check_shift,
)

from . import checks
from .autodiff import forward, register

register(FLAT)


class LinearCrossEntropyResult(NamedTuple):
    """The loss with what was asked for beside it; the others are None.

    With a shift each has one entry for each target that is used.

    Attributes:
        loss: `()`, or `(...)` with `reduction="none"`; dtype of hidden, at least float32.
        lse: `(...)`, dtype of loss. Natural log-sum-exp of each token's logits.
        entropy: `(...)`, dtype of loss. Entropy of its probabilities.
        argmax: `(...)`, integers. Class of its largest logit; has no gradient.
        z_loss: Shape and dtype of loss, in which it is contained: the terms `z_loss lse^2`.
    """

    loss: Array
    lse: Array | None = None
    entropy: Array | None = None
    argmax: Array | None = None
    z_loss: Array | None = None


class LinearCrossEntropyOptions(TypedDict, total=False):
    """The options that do not change the type of the result; see `linear_cross_entropy`."""

    bias: Array | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    class_weight: Array | None
    softcap: float | None
    reduction: str
    shift: int
    token_chunk: int | None
    vocab_chunk: int | None
    gradient_filter: float | None
    implementation: str | None


@overload
def linear_cross_entropy(
    hidden: Array,
    weight: Array,
    targets: Array,
    *,
    return_lse: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    return_argmax: Literal[False] = ...,
    return_z_loss: Literal[False] = ...,
    **options: Unpack[LinearCrossEntropyOptions],
) -> Array: ...
@overload
def linear_cross_entropy(
    hidden: Array,
    weight: Array,
    targets: Array,
    *,
    return_lse: bool = ...,
    return_entropy: bool = ...,
    return_argmax: bool = ...,
    return_z_loss: bool = ...,
    **options: Unpack[LinearCrossEntropyOptions],
) -> Array | LinearCrossEntropyResult: ...
def linear_cross_entropy(
    hidden: Array,
    weight: Array,
    targets: Array,
    *,
    bias: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Array | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: int = 0,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    gradient_filter: float | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
    return_z_loss: bool = False,
    implementation: str | None = None,
) -> Array | LinearCrossEntropyResult:
    r"""Compute the cross-entropy of `hidden weight^T + bias` without storing these logits.

    Everything is as in `tilewise.numpy.linear_cross_entropy`. The loss, `lse` and the entropy are
    differentiable with respect to hidden, weight and bias under every transformation of JAX, and
    one over another up to the second order. Nothing of size tokens x V is saved; forward mode over
    forward mode alone computes such an array, by the reference implementation.

    With `reduction="mean"` or `"sum"`, `jax.grad`, `value_and_grad` and `vjp` compute the gradients
    in the forward pass, for that costs three matrix products in place of four. float16,
    `vocab_chunk` and what `jax.checkpoint` saves memory in compute them in the backward pass.

    Args:
        hidden: `(..., C)`; float64, float32, bfloat16 or float16. Sums are float32 for the latter
            two, and so is the loss.
        weight: `(V, C)`, dtype of hidden. A row for each class.
        targets: `(...)`, integers from 0 to V - 1, or ignore_index.
        bias: `(V,)`, dtype of hidden, or float32 where that has 16 bits.
        ignore_index: The target of a token without a loss: it counts 0, also with all tokens.
        label_smoothing: From 0 to 1, the part of each target that all classes share.
        z_loss: From 0 to 1e6, factor of `lse^2`, which is added to the loss.
        class_weight: `(V,)`, dtype of hidden, or float32 where that has 16 bits; finite. What each
            class counts: what `torch.nn.functional.cross_entropy` calls `weight`. Has no gradient.
        softcap: From 1e-15 to 1e15, or None. A logit z becomes `softcap tanh(z / softcap)`.
        reduction: "mean", "sum" or "none": the loss of each token, its negative log-probability.
        shift: The target of `hidden[..., n, :]` is `targets[..., n + shift]`; hidden states at the
            end have none. 1 is the next token. No hidden state is copied.
        token_chunk: How many tokens' logits there are at a time; by default chosen by size.
        vocab_chunk: How many classes' logits there are at a time; by default all.
        gradient_filter: Probability below which entries may be left out of gradients; None is
            never.
        return_lse: Return also `lse`, of ignored tokens too; so the next two.
        return_entropy: Return also the entropy of each token's probabilities.
        return_argmax: Return also each token's most probable class.
        return_z_loss: Return also the part of the loss that is the z-loss.
        implementation: Name of the implementation, which never falls back to another.

    Returns:
        The loss, or a `LinearCrossEntropyResult` where more was asked for.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
        Unsupported: Targets are class probabilities, the implementation does not serve the call, or
            a third derivative is asked for.
        JaxRuntimeError: When it runs: a target is out of range, or class_weight is not finite.

    Accuracy:
        `tilewise.ops.linear_cross_entropy.spec.error_bound` bounds the error and derives the bound.

    Source:
        As for `tilewise.numpy.linear_cross_entropy`.
    """
    hidden, weight, bias, class_weight = _arrays(hidden, weight, bias, class_weight)
    lead = hidden.shape[:-1]
    targets = checks.class_indices(NAME, targets, PROBABILITIES)
    if targets.shape != lead:
        raise value_error(NAME, "targets", f"have shape {lead} (from hidden)", targets.shape)
    shift = check_shift(shift, len(lead))
    reduction = check_reduction(reduction)
    ignored = IGNORE_INDEX.check(ignore_index)
    zeta = Z_LOSS.check(NAME, z_loss)
    options = {
        "ignore_index": ignored,
        "label_smoothing": LABEL_SMOOTHING.check(NAME, label_smoothing),
        "z_loss": zeta,
        "softcap": None if softcap is None else SOFTCAP.check(NAME, softcap),
        "reduction": reduction,
        "token_chunk": None if token_chunk is None else TOKEN_CHUNK.check(token_chunk),
        "vocab_chunk": None if vocab_chunk is None else VOCAB_CHUNK.check(vocab_chunk),
        "gradient_filter": (
            None if gradient_filter is None else GRADIENT_FILTER.check(NAME, gradient_filter)
        ),
        "lse": bool(return_lse or return_z_loss),
        "entropy": bool(return_entropy),
        "implementation": implementation,
    }
    y = _shifted(targets, shift, ignored).reshape(-1)
    inputs = (hidden.reshape(y.size, hidden.shape[-1]), weight, bias, y, class_weight)
    needed = (True, True, True, bool(return_argmax))
    loss, lse, entropy, argmax = forward(FLAT, inputs, repr(options), needed)

    def back(rows: Array) -> Array:
        whole = rows.reshape(lead)
        return whole[..., : max(0, lead[-1] - shift)] if shift else whole

    if reduction == "none":
        loss = back(loss)
    if not (return_lse or return_entropy or return_argmax or return_z_loss):
        found: Array = loss
        return found
    terms = None
    if return_z_loss:
        terms = _z_loss(lse, y, ignored, zeta, class_weight, reduction)
    return LinearCrossEntropyResult(
        loss,
        back(lse) if return_lse else None,
        back(entropy) if return_entropy else None,
        back(argmax) if return_argmax else None,
        back(terms) if terms is not None and reduction == "none" else terms,
    )


def _arrays(hidden: Any, weight: Any, bias: Any, class_weight: Any) -> tuple[Any, ...]:
    """Return the arrays of floats after checking all but their values; counts in wide dtype."""
    hidden = checks.array(NAME, "hidden", hidden)
    dtype = hidden.dtype
    weight = checks.array(NAME, "weight", weight, dtype, "hidden")
    bias = checks.either(NAME, "bias", bias, dtype, "hidden")
    counts = checks.either(NAME, "class_weight", class_weight, dtype, "hidden")
    if hidden.ndim == 0:
        raise value_error(NAME, "hidden", "have shape (..., C)", ())
    sizes = Sizes(NAME, LIMITS)
    sizes.match("hidden", (("T", "C"),), (math.prod(hidden.shape[:-1]), hidden.shape[-1]))
    sizes.match("weight", WEIGHT.shapes, weight.shape)
    for name, array in (("bias", bias), ("class_weight", counts)):
        if array is not None:
            sizes.match(name, (("V",),), array.shape)
    if counts is not None:
        wide = counts.astype(jnp.float32) if is_narrow(dtype) else counts
        counts = jax.lax.stop_gradient(wide)
    return hidden, weight, bias, counts


def _shifted(targets: Array, shift: int, ignore_index: int) -> Array:
    """Return the target of each hidden state where it is so many tokens further on."""
    if not shift:
        return targets
    limits = jnp.iinfo(targets.dtype)
    if not limits.min <= ignore_index <= limits.max:
        requirement = f"fit into the {limits.bits} bits of targets, for a shift"
        raise value_error(NAME, "ignore_index", requirement, ignore_index)
    shift = min(shift, targets.shape[-1])
    rest = targets[..., shift:]
    return jnp.concatenate((rest, jnp.full_like(targets[..., :shift], ignore_index)), -1)


def _z_loss(
    lse: Array,
    targets: Array,
    ignore_index: int,
    z_loss: float,
    class_weight: Array | None,
    reduction: str,
) -> Array:
    """Return the part of the loss that is the z-loss, reduced as the loss is."""
    kept = targets != ignore_index
    terms = z_loss * jnp.where(kept & ~jnp.isneginf(lse), lse, 0) ** 2
    if reduction == "none":
        return terms
    if reduction == "sum":
        return terms.sum()
    counted = kept.astype(lse.dtype)
    if class_weight is not None:
        counted = jnp.where(kept, class_weight[jnp.where(kept, targets, 0)], 0)
    total = counted.sum()
    return terms.sum() / jnp.where(total == 0, jnp.inf, total)
