"""A mask as text and arrays, the form in which it passes through a framework's graph."""

from __future__ import annotations

import ast
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from hashlib import blake2b
from threading import Lock
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
_RECENT_BYTES: Final = 1 << 27
_MOST_RECENT: Final = 128


def to_literal(mask: Mask | Lowered) -> tuple[str, Arrays]:
    """Return the expression that makes a mask, in which `a0`, `a1`, ... stand for its arrays.

    The arrays are writable, because frameworks warn of others. Nobody is to write into them.
    """
    if isinstance(mask, RowIntervals):
        return ROWS, (mask.rows.copy(),)
    if isinstance(mask, PackedBits):
        return BITS, (mask.bits.copy(), mask.tiles.copy())
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
    key = (text, operator, *[(a.shape, a.dtype.str, _digest(a)) for a in arrays])
    mask = _recent.get(key)
    if mask is None:
        mask = _build(text, arrays, operator)
        _recent.put(key, mask, sum(array.nbytes for array in arrays))
    return mask


def _digest(array: NDArray[Any]) -> bytes:
    return blake2b(np.ascontiguousarray(array).data, digest_size=16).digest()


@lru_cache(maxsize=128)
def _of_numbers(text: str) -> Mask:
    return _build(text, (), "mask")


class _Recent:
    """The masks that were asked for last, as many as fit into a number of bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes, self._lock = most_bytes, 0, Lock()
        self._masks: OrderedDict[Any, tuple[Mask, int]] = OrderedDict()

    def get(self, key: Any) -> Mask | None:
        """Return a mask, or None where it is not known."""
        with self._lock:
            if key not in self._masks:
                return None
            self._masks.move_to_end(key)
            return self._masks[key][0]

    def put(self, key: Any, mask: Mask, size: int) -> None:
        """Keep a mask; forget others where there is no room."""
        with self._lock:
            if key not in self._masks:
                self._masks[key] = mask, size
                self._bytes += size
            while self._bytes > self._most or len(self._masks) > _MOST_RECENT:
                self._bytes -= self._masks.popitem(last=False)[1][1]


_recent = _Recent(_RECENT_BYTES)


def _build(text: str, arrays: Arrays, operator: str) -> Mask:
    """Return the mask that an expression makes."""
    dense = partial(as_mask, operator=operator)
    mask: Mask = evaluate(text, arrays, {**_PATTERNS, "dense": dense}, operator)
    return mask


def evaluate(
    text: str, arrays: Sequence[Any], functions: Mapping[str, Callable[..., Any]], operator: str
) -> Any:
    """Evaluate an expression; nothing but functions, numbers and names of arrays can be in it.

    Args:
        text: The expression.
        arrays: What `a0`, `a1`, ... stand for.
        functions: What the names of patterns call; what they return is combined by `&` and `|`.
        operator: The name that error messages start with.
    """

    def value(node: ast.expr) -> Any:
        match node:
            case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                return value(left) & value(right)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return value(left) | value(right)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if (
                name in functions
            ):
                named = {str(keyword.arg): value(keyword.value) for keyword in keywords}
                return functions[name](*map(value, args), **named)
            case ast.Name(id=name):
                return arrays[int(name.removeprefix("a"))]
            case ast.Constant(value=constant):
                return constant
        raise ValueError(f"{operator}: mask literal must be an expression of masks, got {text!r}")

    return value(ast.parse(text, mode="eval").body)
