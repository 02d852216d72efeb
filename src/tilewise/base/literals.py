"""A mask as text and arrays, the form in which it passes through a framework's graph."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tilewise.base import masks
from tilewise.base.masks import Mask, PackedBits, RowIntervals, as_mask

Lowered = RowIntervals | PackedBits
Arrays = tuple[NDArray[Any], ...]

DENSE: Final = "dense(a0)"
"""The text of a mask that is one boolean array."""

ROWS: Final = "rows(a0)"
"""The text of a mask that is the array of `RowIntervals`."""

BITS: Final = "bits(a0, a1)"
"""The text of a mask that is the arrays of `PackedBits`."""

_PATTERNS: dict[str, Callable[..., Mask]] = {
    "causal": masks.causal,
    "window": masks.window,
    "prefix": masks.prefix,
    "chunked": masks.chunked,
    "lengths": masks.lengths,
    "documents": masks.documents,
}
_CACHED_BYTES: Final = 1 << 22


def to_literal(mask: Mask) -> tuple[str, Arrays]:
    """Return the expression that makes a mask, in which `a0`, `a1`, ... stand for its arrays."""
    arrays: list[NDArray[Any]] = []

    def name(frozen: Any) -> str:
        arrays.append(frozen.own)
        return f"a{len(arrays) - 1}"

    text = mask.text(name)
    return text, tuple(arrays)


def from_literal(text: str, arrays: Arrays, operator: str) -> Mask | Lowered:
    """Return the mask that `to_literal` wrote down; the same one again for the same content.

    Args:
        text: The expression.
        arrays: What its names stand for. Not kept, so they may change afterwards.
        operator: The name that error messages start with.
    """
    if not arrays:
        return _of_numbers(text)
    if text == ROWS:
        return RowIntervals(np.ascontiguousarray(arrays[0]))
    if text == BITS:
        return PackedBits(*map(np.ascontiguousarray, arrays))
    # Sizes over which an array repeats say nothing: without them it is small.
    arrays = tuple(a[tuple(slice(1 if s == 0 else None) for s in a.strides)] for a in arrays)
    if sum(array.nbytes for array in arrays) > _CACHED_BYTES:
        return _build(text, arrays, operator)
    contents = tuple((a.shape, a.dtype.str, a.tobytes()) for a in arrays)
    return _of_contents(text, contents, operator)


@lru_cache(maxsize=128)
def _of_numbers(text: str) -> Mask:
    return _build(text, (), "mask")


@lru_cache(maxsize=16)
def _of_contents(
    text: str, contents: tuple[tuple[tuple[int, ...], str, bytes], ...], operator: str
) -> Mask:
    arrays = (np.frombuffer(data, dtype).reshape(shape) for shape, dtype, data in contents)
    return _build(text, tuple(arrays), operator)


def _build(text: str, arrays: Arrays, operator: str) -> Mask:
    """Evaluate the expression; nothing but masks, numbers and the names of arrays can be in it."""

    def value(node: ast.expr) -> Any:
        match node:
            case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                return value(left) & value(right)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return value(left) | value(right)
            case ast.Call(func=ast.Name(id="dense"), args=[array], keywords=[]):
                return as_mask(value(array), operator)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                named = {str(keyword.arg): value(keyword.value) for keyword in keywords}
                return _PATTERNS[name](*map(value, args), **named)
            case ast.Name(id=name):
                return arrays[int(name.removeprefix("a"))]
            case ast.Constant(value=constant):
                return constant
        raise ValueError(f"{operator}: mask literal must be an expression of masks, got {text!r}")

    return value(ast.parse(text, mode="eval").body)  # type: ignore[no-any-return]
