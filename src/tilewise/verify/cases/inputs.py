"""How the arrays of a case are drawn, laid out in memory and poisoned."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Bool = NDArray[np.bool_]


def draw(
    values: str, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator
) -> Array:
    """Draw one tensor.

    Args:
        values: ``normal`` is N(0, 1); ``outliers`` adds N(0, 100) to one entry in a thousand (as
            in FlashAttention-3, Table 3); ``large_logits`` makes logits of magnitude 1e4;
            ``zeros`` makes every logit 0; ``ties`` repeats one largest key; ``mean`` gives values
            a mean of -2.5; ``small`` scales everything by 1e-6; ``sharp`` makes each row attend
            to nearly one key; ``equal_keys`` repeats one key.
        name: Which tensor: q, k, v, do, dlse, bias, tq, ...
        shape: Its shape, the last two dimensions being positions and entries.
        dtype: float32 or float64, in which it is drawn.
        rng: Source of randomness.
    """
    x = _normal(shape, dtype, rng)
    if values == "outliers":
        rare = rng.random(shape) < 1e-3
        x = x + np.where(rare, 10 * _normal(shape, dtype, rng), dtype.type(0))
    elif values == "large_logits" and name == "q":
        x = x * dtype.type(3e3)
    elif values == "zeros" and name == "q":
        x = np.zeros_like(x)
    elif values == "ties" and name == "k":
        x[..., 1::3, :] = 2 * x[..., :1, :]
    elif values == "mean" and name == "v":
        x = x * dtype.type(0.5) - dtype.type(2.5)
    elif values == "small":
        x = x * dtype.type(1e-6)
    elif values == "sharp" and name == "q":
        x = x * dtype.type(30)
    elif values == "equal_keys" and name == "k":
        x = np.broadcast_to(x[..., :1, :], shape).copy()
    return np.asarray(x, dtype)


def _normal(shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator) -> Array:
    if dtype == np.float32:
        return np.asarray(rng.standard_normal(shape, dtype=np.float32))
    return np.asarray(rng.standard_normal(shape, dtype=np.float64))


def arrange(memory: str, name: str, x: Array) -> Array:
    """Return an array of the same entries in another memory layout.

    Args:
        memory: ``padded`` leaves NaN between rows; ``transposed`` stores the second and third
            dimensions swapped; ``broadcast`` reads k and v of one batch entry for all of them
            (stride 0); ``readonly`` forbids writing; ``offset`` starts one entry behind an
            aligned address; ``reversed`` stores positions backwards (negative strides).
        name: Which tensor.
        x: Contiguous, 4-D.
    """
    if memory == "padded":
        wide = np.full((*x.shape[:-1], x.shape[-1] + 5), np.nan, x.dtype)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if memory == "transposed":
        return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
    if memory == "broadcast":
        return np.broadcast_to(x[:1], x.shape) if name in ("k", "v", "tk", "tv") else x
    if memory == "readonly":
        x.setflags(write=False)
    if memory == "offset":
        flat = np.full(x.size + 1, np.nan, x.dtype)
        flat[1:] = x.reshape(-1)
        return flat[1:].reshape(x.shape)
    if memory == "reversed":
        return np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1]
    return x


def pad_additively(bias: Array, number: float, queries: int, keys: int) -> None:
    """Put a number into the bias of the last queries (whole rows) and of the last keys."""
    N, Nk = bias.shape[-2:]
    bias[..., N - queries :, :] = number
    bias[..., Nk - keys :] = number


def poison_absent(arrays: dict[str, Array], visible: Bool, sinks: bool) -> None:
    """Put NaN and Inf wherever the mask says that nobody looks.

    Args:
        arrays: q k v do dlse, and bias and tangents where there are such, in (B, H, ...) order;
            written to.
        visible: `(B, H, N, Nk)`.
        sinks: Whether rows have a sink: then dlse of an empty row is not absent.
    """
    B, H, _, Nk = visible.shape
    Hk = arrays["k"].shape[1]
    seen = visible.any(axis=2).reshape(B, Hk, H // Hk, Nk).any(axis=2)
    for name in {"k", "v", "tk", "tv"} & arrays.keys():
        arrays[name][~seen] = np.nan if name[-1] == "k" else np.inf
    # One of the two would hide in a product with the other.
    for name in {"v", "tv"} & arrays.keys():
        arrays[name][..., 0][~seen] = np.nan
    empty = ~visible.any(axis=3)
    of_rows = {"q", "do", "tq", "tdo"} | (set() if sinks else {"dlse", "tdlse"})
    for name in of_rows & arrays.keys():
        arrays[name][empty] = np.nan
    for name in {"bias", "tbias"} & arrays.keys():
        bias = arrays[name]
        part = visible
        for axis, size in enumerate((1,) * (4 - bias.ndim) + bias.shape):
            if size == 1:
                part = np.asarray(part.any(axis=axis, keepdims=True))
        bias[~part.reshape(bias.shape)] = np.nan


def poison_attended(which: str, arrays: dict[str, Array]) -> None:
    """Put one NaN (or Inf) into a position that some rows attend to.

    Args:
        which: The name of an array; ``v_inf`` puts Inf into v.
        arrays: By name, in (B, H, ...) order; written to.
    """
    name, _, inf = which.partition("_")
    x = arrays[name]
    at = tuple(size // 2 for size in x.shape)
    x[at] = np.inf if inf else np.nan
