"""What the tests of the Triton kernels share: an interpreter that knows bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_dot, _cast = _Builder.create_dot, _Builder.cast_impl


def _widened(handle: Any) -> Any:
    """Return bfloat16 as float32; the interpreter keeps its bits as 16-bit integers."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)


def _rounded(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of float32 rounded to the nearest bfloat16, ties to even; NaN stays."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16).reshape(x.shape)


def _create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
    """Multiply the numbers of bfloat16 operands; the interpreter multiplies their bits."""
    return _dot(self, _widened(a), _widened(b), d, *precision)


def _cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    """Round to bfloat16 as the hardware does; the interpreter cuts digits off."""
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        return interpreter.TensorHandle(_rounded(src.data), tl.bfloat16)
    return _cast(self, src, dst_type)


def _launch(self: Any, *args: Any, **kwargs: Any) -> None:
    """Launch a kernel, whose functions patch the language for themselves."""
    _patched.clear()
    _execute(self, *args, **kwargs)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of a kernel; the interpreter patches the language in each call, in layers.

    Once for each launch is enough, and takes half the time.
    """
    known = [module in self.fn.__globals__.values() for module in (tl, tl.core)]
    if tuple(known) not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(tuple(known))
    return self.rewrite()(*args, **kwargs)


_patched: set[tuple[bool, ...]] = set()
_execute = interpreter.GridExecutor.__call__
interpreter.GridExecutor.__call__ = _launch
_Builder.create_dot = _create_dot
_Builder.cast_impl = _cast_impl
interpreter.InterpretedFunction.__call__ = _call
