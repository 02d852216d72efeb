"""Reading captured queries, keys and values, and repeating their tokens to other lengths."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["Captured", "InputFileError", "load"]

Array = NDArray[Any]

_REQUIRED = ("q", "k", "v")
_OPTIONAL = ("do",)
_LARGEST_DIM = 512
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError)


class InputFileError(ValueError):
    """A file that cannot be used; the text says why in one line."""


@dataclass(frozen=True)
class Captured:
    """Arrays of one attention layer: q, do `(B, H, N, D)`; k `(B, Hk, N, D)`; v `(B, Hk, N, Dv)`.

    `do`, the cotangent of o, is None where the file holds none; `about` says where the arrays
    come from.
    """

    q: Array
    k: Array
    v: Array
    do: Array | None
    about: str

    @property
    def N(self) -> int:
        """Number of captured tokens."""
        return int(self.q.shape[2])

    def at(self, N: int, heads: int) -> tuple[Array, Array, Array, Array]:
        """Return (q, k, v, do) of `N` tokens and at most `heads` query heads.

        Fewer tokens than captured are the first N; more repeat the captured ones in order. Where
        the file holds no `do`, it is drawn from N(0, 1) with a fixed seed, for all N rows.
        """
        tokens = np.arange(N) % self.N
        group = self.q.shape[1] // self.k.shape[1]
        kept = max(1, heads // group)
        q = np.ascontiguousarray(self.q[:, : kept * group, tokens])
        k, v = (np.ascontiguousarray(x[:, :kept, tokens]) for x in (self.k, self.v))
        if self.do is not None:
            return q, k, v, np.ascontiguousarray(self.do[:, : kept * group, tokens])
        shape = (*q.shape[:3], v.shape[-1])
        return q, k, v, np.random.default_rng(0).standard_normal(shape).astype(q.dtype)


def load(path: Path) -> Captured:
    """Read and check a captured file.

    Args:
        path: an uncompressed or compressed npz with q, k, v, of float32 or float64, and
            optionally do. Pickled objects are refused, not loaded.

    Raises:
        InputFileError: the file or what it holds cannot be used.
    """
    try:
        with path.open("rb") as handle:
            arrays, about = _read(path, handle)
    except InputFileError:
        raise
    except FileNotFoundError as error:
        raise InputFileError(f"{path}: no such file") from error
    except _UNREADABLE as error:
        raise InputFileError(f"{path}: not a readable npz file ({_one_line(error)})") from error
    except (OSError, MemoryError, NotImplementedError, RuntimeError) as error:
        raise InputFileError(f"{path}: cannot be read ({_one_line(error)})") from error
    _check(path, arrays)
    return Captured(arrays["q"], arrays["k"], arrays["v"], arrays.get("do"), about)


def _read(path: Path, handle: BinaryIO) -> tuple[dict[str, Array], str]:
    file = np.load(handle, allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise InputFileError(f"{path}: must be an npz file, got a single array")
    with file:
        missing = [name for name in _REQUIRED if name not in file.files]
        if missing:
            raise InputFileError(
                f"{path}: must hold the arrays q, k and v, got no {' and no '.join(missing)}"
            )
        arrays = {n: file[n] for n in (*_REQUIRED, *_OPTIONAL) if n in file.files}
        for name, x in arrays.items():
            if not isinstance(x, np.ndarray):
                raise InputFileError(f"{path}: {name} must be an array, got raw bytes")
        return arrays, _about(file)


def _one_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    if "pickle" in text:  # NumPy proposes to load it unsafely, which is not on offer here
        return "it holds Python objects, or is not an npz file at all"
    return text.splitlines()[0].rstrip(". ")


def _about(file: Any) -> str:
    parts = []
    for name in ("model", "layer", "source"):
        if name in file.files:
            value = np.asarray(file[name])
            if value.dtype.kind == "U" and value.size == 1:
                parts.append(str(value.item()))
    return ", ".join(parts)


def _check(path: Path, arrays: dict[str, Array]) -> None:
    q, k, v = (arrays[name] for name in _REQUIRED)
    for name, x in arrays.items():
        if x.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise InputFileError(f"{path}: {name} must be float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise InputFileError(f"{path}: {name} must be {q.dtype} like q, got {x.dtype}")
        if x.ndim != 4 or x.size == 0:
            raise InputFileError(f"{path}: {name} must be a non-empty (B, H, N, D), got {x.shape}")
        if x.shape[-1] > _LARGEST_DIM:
            raise InputFileError(f"{path}: {name} must have D <= {_LARGEST_DIM}, got {x.shape}")
        if not np.isfinite(x).all():
            raise InputFileError(f"{path}: {name} must be finite, got NaN or infinity")
    B, H, N, D = q.shape
    Hk = k.shape[1]
    wanted = {"k": (B, Hk, N, D), "v": (B, Hk, N, v.shape[-1]), "do": (B, H, N, v.shape[-1])}
    for name, x in arrays.items():
        if x.shape != wanted.get(name, x.shape):
            raise InputFileError(
                f"{path}: {name} must have shape {wanted[name]} to match the others, got {x.shape}"
            )
    if H % Hk:
        raise InputFileError(f"{path}: k must have a number of heads that divides H={H}, got {Hk}")
