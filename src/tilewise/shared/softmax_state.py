"""The softmax of a row as a fold over parts: states that merge into the state of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dims import Shape, Sizes
from tilewise.base.dtypes import check_tensor
from tilewise.base.errors import type_error, value_error

_O: Shape = ("B", "H", "N", "Dv")
_LSE: Shape = ("B", "H", "N")


class SoftmaxState(NamedTuple):
    """The result of attention over one part of the keys.

    Attributes:
        o: `(B, H, N, Dv)`. Output normalised within the part.
        lse: `(B, H, N)`. Natural log-sum-exp of the part's logits; -inf for a row without keys.
    """

    o: NDArray[Any]
    lse: NDArray[Any]


def merge(states: Iterable[Sequence[Any]]) -> SoftmaxState:
    r"""Merge attention over disjoint parts of the keys into attention over all of them.

    `lse = log sum_i exp(lse_i)` and `o = sum_i exp(lse_i - lse) o_i`, added in the given order.

    Args:
        states: Parts, each a pair `(o, lse)` or a result of `attention(..., return_lse=True)`:
            o `(B, H, N, Dv)`, float32 or float64; lse `(B, H, N)`, dtype of o. At least one part.

    Returns:
        The state of the whole. A row that is empty in every part has `o = 0` and `lse = -inf`; an
        empty part contributes nothing, whatever its `o` holds.

    Raises:
        TypeError: A part is not a pair of arrays of one dtype.
        ValueError: There is no part, or shapes differ.

    Accuracy:
        Weights are computed in float64; each of the n additions rounds once in the dtype of o, so
        the error of o is at most `(n + 1) u max_i |o_i|` beside that of the parts.

    Source:
        Milakov & Gimelshein 2018 (arXiv:1805.02867), section 3.1.
    """
    parts = _checked(list(states))
    first = parts[0].o
    with np.errstate(all="ignore"):
        lse = np.stack([part.lse for part in parts]).astype(np.float64)
        top = lse.max(axis=0)
        base = np.where(top == -np.inf, 0.0, top)
        w = np.exp(lse - base)
        l = w.sum(axis=0)
        weights = (w / np.where(l == 0, 1.0, l)).astype(first.dtype)
        o = np.zeros(first.shape, first.dtype)
        for part, weight in zip(parts, weights, strict=True):
            present = (part.lse != -np.inf)[..., None]
            o += np.where(present, weight[..., None] * part.o, 0)
        total = np.where(top == -np.inf, -np.inf, base + np.log(l))
        return SoftmaxState(o, total.astype(first.dtype))


def _checked(states: list[Sequence[Any]]) -> list[SoftmaxState]:
    if not states:
        raise value_error("merge", "states", "have at least one part", "none")
    sizes = Sizes("merge", {})
    parts: list[SoftmaxState] = []
    for i, state in enumerate(states):
        if not isinstance(state, tuple | list) or len(state) < 2:
            raise type_error("merge", f"states[{i}]", "be a pair (o, lse)", type(state).__name__)
        like = parts[0].o.dtype if parts else None
        o = check_tensor("merge", f"states[{i}].o", state[0], like, "states[0].o")
        lse = check_tensor("merge", f"states[{i}].lse", state[1], o.dtype, f"states[{i}].o")
        sizes.match(f"states[{i}].o", (_O,), o.shape)
        sizes.match(f"states[{i}].lse", (_LSE,), lse.shape)
        parts.append(SoftmaxState(o, lse))
    return parts
