"""The cases of the linear map: T rows of C entries become rows of V."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rows import FlatCase

__all__ = ["CASES"]

Array = NDArray[Any]


def _case(
    name: str,
    sizes: tuple[int, int, int] = (7, 29, 13),
    scale: float = 1.0,
    poison: str | None = None,
    bias: bool = True,
    **more: Any,
) -> FlatCase:
    T, C, V = sizes

    def draw(rng: np.random.Generator) -> dict[str, Array]:
        found = {"x": rng.standard_normal((T, C)), "w": scale * rng.standard_normal((V, C))}
        if bias:
            found["bias"] = rng.standard_normal(V)
        if poison is not None:
            found[poison][tuple([n // 2 for n in found[poison].shape])] = np.nan
        return found

    return FlatCase(name, draw, {}, **more)


def _cases() -> Iterator[FlatCase]:
    for sizes in [(1, 1, 1), (1, 37, 5), (53, 1, 3), (41, 7, 1), (61, 127, 83), (3, 2053, 5)]:
        yield _case(f"size/{'x'.join(map(str, sizes))}", sizes)
    for sizes in [(0, 5, 3), (3, 0, 5), (3, 5, 0)]:
        yield _case(f"empty/{'x'.join(map(str, sizes))}", sizes)
    yield _case("bias/none", bias=False)
    for scale in (1e4, 1e-4):
        yield _case(f"values/{scale:g}", scale=scale)
    for name in ("x", "w", "bias"):
        yield _case(f"nan/{name}", poison=name)
    yield _case("zero/no-tangent-of-x", tangents=("w", "bias"))
    yield _case("zero/no-tangent-of-w", tangents=("x",))
    yield _case("zero/no-cotangent", cotangents=())


CASES: tuple[FlatCase, ...] = tuple(_cases())
"""Every case."""
