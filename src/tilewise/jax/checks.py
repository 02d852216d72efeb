"""What the functions of JAX check of their arrays, and the arrays of masks and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilewise.base._held import register_traced
from tilewise.base._lowering import Size
from tilewise.base.dtypes import FLOATS, NARROW, listed
from tilewise.base.errors import type_error, unsupported, value_error
from tilewise.base.literals import DENSE, to_literal
from tilewise.base.masks import Mask, PackedBits, RowIntervals, check_dense
from tilewise.ops.attention.record import MASK_ARRAYS
from tilewise.ops.attention.spec.arguments import SEED

_MASKS = (Mask, RowIntervals, PackedBits)
register_traced(jax.core.Tracer)


@dataclass(frozen=True)
class Literal:
    """A mask whose arrays need not be known while tracing.

    Attributes:
        text: An expression of masks, in which `a0`, `a1`, ... stand for the arrays.
        arrays: The arrays.
    """

    text: str
    arrays: tuple[Any, ...]


def array(operator: str, name: str, value: Any, like: Any = None, source: str = "q") -> jax.Array:
    """Return an array of floats of JAX, or raise.

    Args:
        operator: Name of the operator, for the error text.
        name: Name of the argument.
        value: What the user gave.
        like: The dtype it must have, or None where it is the first array of the call.
        source: Name of the argument that settled it.
    """
    if not isinstance(value, jax.Array | np.ndarray):
        raise type_error(operator, name, "be a jax.Array", type(value).__name__)
    found = jnp.asarray(value) if like is None else _adopting(value, like)
    if like is None and found.dtype.name not in FLOATS:
        raise type_error(operator, name, f"have dtype {listed(FLOATS)}", found.dtype.name)
    if like is not None and found.dtype != like:
        raise type_error(operator, name, f"have dtype {like} (from {source})", found.dtype.name)
    return found


def either(operator: str, name: str, value: Any, like: Any, source: str = "q") -> jax.Array | None:
    """Return an array that may also be float32 where the first one has 16 bits, or None."""
    if value is None:
        return None
    if isinstance(value, jax.Array | np.ndarray) and like.name in NARROW:
        value = _adopting(value, jnp.float32)
        if value.dtype not in (like, jnp.float32):
            requirement = f"have dtype {like} (from {source}) or float32"
            raise type_error(operator, name, requirement, value.dtype.name)
        return value
    return array(operator, name, value, like, source)


def _adopting(value: Any, dtype: Any) -> jax.Array:
    """Return an array of JAX; one made of Python's numbers, whose dtype is weak, takes another."""
    found = jnp.asarray(value)
    weak = found.weak_type and jnp.issubdtype(found.dtype, jnp.floating)
    return found.astype(dtype) if weak else found


def class_indices(operator: str, targets: Any, probabilities: str) -> jax.Array:
    """Return class indices with the bits that they need, or raise.

    Args:
        operator: Name of the operator, for the error text.
        targets: What the user gave.
        probabilities: Why there are none.
    """
    if not isinstance(targets, jax.Array | np.ndarray):
        raise type_error(operator, "targets", "be a jax.Array", type(targets).__name__)
    dtype = targets.dtype
    if jnp.issubdtype(dtype, jnp.floating):
        raise unsupported(operator, probabilities)
    if not jnp.issubdtype(dtype, jnp.integer) or not np.can_cast(dtype, np.int64):
        requirement = "have an integer dtype up to int64"
        raise type_error(operator, "targets", requirement, dtype.name)
    return signed(operator, "targets", targets)


def signed(operator: str, name: str, value: Any) -> jax.Array:
    """Return integers with a sign and as many bits as they need and JAX has, or raise.

    Args:
        operator: Name of the operator, for the error text.
        name: Name of the argument.
        value: Integers of any dtype. What does not fit stays too large.
    """
    wide = np.int32 if np.can_cast(value.dtype, np.int32) else np.int64
    limits = np.iinfo(jax.dtypes.canonicalize_dtype(wide))
    if isinstance(value, np.ndarray) and value.size and value.dtype.itemsize == 8:
        outside = value[(value < limits.min) | (value > limits.max)]
        if outside.size:
            requirement = f"fit {limits.bits} bits (jax_enable_x64 allows 64)"
            raise value_error(operator, name, requirement, int(outside[0]))
    found = jnp.asarray(value)
    if np.iinfo(found.dtype).max > limits.max:
        found = jnp.minimum(found, found.dtype.type(limits.max))
    return found.astype(limits.dtype)


def seed_words(operator: str, seed: Any, dropout_p: float) -> jax.Array | None:
    """Return a seed as its two words of 32 bits, the lower one first, or None without dropout."""
    if seed is None:
        if dropout_p > 0:
            requirement = "be given where dropout_p is above 0: an integer or a key of jax.random"
            raise value_error(operator, "seed", requirement, "None")
        return None
    if isinstance(seed, jax.Array):
        words = _words(operator, seed)
    else:
        number = SEED.check(operator, seed)
        words = jnp.asarray(np.array([number & 0xFFFFFFFF, number >> 32], np.uint32))
    return words if dropout_p > 0 else None


def _words(operator: str, seed: jax.Array) -> jax.Array:
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        seed = jax.random.key_data(seed)
    if jnp.issubdtype(seed.dtype, jnp.integer):
        if seed.shape == (2,) and seed.dtype == jnp.uint32:
            return seed
        if seed.shape == ():
            high = seed >> 32 if seed.dtype.itemsize == 8 else jnp.zeros_like(seed)
            return jnp.stack([seed.astype(jnp.uint32), high.astype(jnp.uint32)])
    requirement = "be an integer, or a key of jax.random of two words"
    got = f"shape {seed.shape} of {seed.dtype.name}"
    raise type_error(operator, "seed", requirement, got)


def mask_arrays(
    operator: str, mask: Any, sizes: tuple[int, int, int, int]
) -> tuple[str, tuple[Any, ...]]:
    """Return a mask as a literal and its arrays.

    Args:
        operator: Name of the operator, for the error text.
        mask: A mask, what it lowers to, or a boolean array.
        sizes: B, H, N and Nk.
    """
    if isinstance(mask, Literal):
        return mask.text, mask.arrays
    size = Size(*sizes, operator)
    if isinstance(mask, _MASKS):
        if isinstance(mask, Mask):
            mask.check(size)
        text, arrays = to_literal(mask)
        if len(arrays) > MASK_ARRAYS:
            if any([isinstance(a, jax.core.Tracer) for a in arrays]):
                requirement = f"hold at most {MASK_ARRAYS} arrays where one is traced"
                raise value_error(operator, "mask", requirement, len(arrays))
            assert isinstance(mask, Mask)
            return DENSE, (jnp.asarray(mask.to_bool(*sizes, operator=operator)),)
        return text, tuple([_as_jax(operator, a) for a in arrays])
    if not isinstance(mask, jax.Array | np.ndarray):
        requirement = "be a tilewise mask or a boolean array"
        raise type_error(operator, "mask", requirement, type(mask).__name__)
    if mask.dtype != np.bool_:
        requirement = "be a tilewise mask or a boolean array (a mask that is added is a bias)"
        raise type_error(operator, "mask", requirement, f"an array of {mask.dtype}")
    check_dense(size, mask.shape)
    return DENSE, (jnp.asarray(mask),)


def _as_jax(operator: str, held: Any) -> jax.Array:
    """Return the array of a mask; without 64 bits in JAX its numbers must fit into 32."""
    if isinstance(held, jax.Array):
        return held
    if held.dtype == np.int64 and not jax.config.jax_enable_x64:
        if held.size and max(abs(int(held.min())), int(held.max())) >= 2**31:
            requirement = "hold numbers below 2**31 where jax_enable_x64 is off"
            raise value_error(operator, "mask", requirement, int(held.max()))
        held = held.astype(np.int32)
    return jnp.asarray(held)
