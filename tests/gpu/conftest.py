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


_launch, _patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
_ready: set[int] = set()


def _launched(self: Any, *args: Any, **kwargs: Any) -> None:
    """Run a kernel; what its functions find in their modules is put there anew."""
    _ready.clear()
    _launch(self, *args, **kwargs)


def _patch_once(fn: Any) -> Any:
    """Put NumPy into a module once a launch; the interpreter does so at each call of a function."""
    module = id(fn.__globals__)
    if module in _ready:
        return interpreter._LangPatchScope()
    _ready.add(module)
    return _patch(fn)


_Builder.create_dot = _create_dot
_Builder.cast_impl = _cast_impl
interpreter.GridExecutor.__call__ = _launched
interpreter._patch_lang = _patch_once
