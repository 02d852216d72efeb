"""The cases of softmax, log_softmax and logsumexp: rows of C entries at A x I places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rows import FlatCase

__all__ = ["CASES"]

Array = NDArray[Any]
Sizes = tuple[int, int, int]


def change(x: Array, values: str) -> Array:
    """Return logits of another kind, from normal ones `(A, C, I)`; see `_VALUES`."""
    A, C, _ = x.shape
    if values == "ones":
        return np.full_like(x, 3.0)
    if values == "outlier":
        x[:, C // 2] += 100
    elif values == "padded":
        x[:, C // 2 :] = -1e9
    elif values == "padded-rows":
        x[: A // 2 + 1] = -1e9
    elif values == "hidden":
        x[:, ::3] = -np.inf
    elif values == "empty-rows":
        x[::2] = -np.inf
    elif values == "nan":
        x[A // 2, C // 2, 0] = np.nan
    elif values == "inf":
        x[A // 2, C // 2, 0] = np.inf
    else:
        x *= _VALUES[values]
    return x


_VALUES = {"normal": 1.0, "large": 1e4, "range": 25.0, "tiny": 1e-6}


def _case(
    name: str,
    sizes: Sizes = (7, 29, 3),
    values: str = "normal",
    where: str | None = None,
    sink: str | None = None,
    temperature: float = 1.0,
    **more: Any,
) -> FlatCase:
    A, C, I = sizes

    def draw(rng: np.random.Generator) -> dict[str, Array]:
        found: dict[str, Array] = {"x": change(rng.standard_normal(sizes), values)}
        if sink is not None:
            found["sink"] = rng.standard_normal((A, I)) + {"large": 40.0}.get(sink, 0.0)
            if sink == "some":
                found["sink"][::2] = -np.inf
        if where is not None:
            found["where"] = seen = rng.random((A, C, I)) > 0.4
            if where == "columns":
                found["where"] = seen[:1, :, :1]
            elif where == "empty-rows":
                seen[::2] = False
            elif where == "poisoned":
                found["x"][~seen] = np.nan
                found["x"][1:][~seen[1:]] = np.inf
        return found

    return FlatCase(name, draw, {"temperature": temperature}, **more)


def _cases() -> Iterator[FlatCase]:
    for sizes in [(1, 1, 1), (13, 2, 1), (3, 1, 5), (5, 129, 1), (2, 2051, 3), (3, 20011, 1)]:
        yield _case(f"size/{'x'.join(map(str, sizes))}", sizes)
    for sizes in [(0, 5, 3), (3, 0, 2), (2, 5, 0)]:
        yield _case(f"empty/{'x'.join(map(str, sizes))}", sizes)
    yield _case("empty/no-entry-but-a-sink", (3, 0, 2), sink="normal")
    for temperature in (0.01, 0.7, 30.0):
        yield _case(f"temperature/{temperature:g}", temperature=temperature)
    for values in ("large", "range", "tiny", "ones", "outlier", "padded", "padded-rows"):
        yield _case(f"values/{values}", values=values)
    for values in ("hidden", "empty-rows", "nan", "inf"):
        yield _case(f"rare/{values}", values=values)
    yield _case("rare/empty-rows-with-a-sink", values="empty-rows", sink="normal")
    yield _case("rare/one-class-of-minus-infinity", (5, 1, 1), values="hidden")
    for where in ("random", "columns", "empty-rows", "poisoned"):
        yield _case(f"where/{where}", where=where)
    for sink in ("normal", "some", "large"):
        yield _case(f"sink/{sink}", sink=sink)
    yield _case("zero/no-lse", cotangents=("y", "log_y"))
    yield _case("zero/lse-alone", cotangents=("lse",))
    yield _case("zero/no-tangent-of-x", sink="normal", tangents=("sink",))
    yield _case("combined/all", where="random", sink="some", temperature=0.6)
    yield _case("combined/long", (3, 4099, 2), values="range", sink="normal", temperature=3.0)
    yield _case("combined/poisoned", values="large", where="poisoned", sink="some")


CASES: tuple[FlatCase, ...] = tuple(_cases())
"""Every case, of each of the three operators."""
