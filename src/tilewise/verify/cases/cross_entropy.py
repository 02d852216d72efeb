"""The cases of the cross-entropy: rows of C logits at A x I places, and their targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rows import FlatCase
from .softmax import change

__all__ = ["CASES", "IGNORED"]

Array = NDArray[Any]

IGNORED = -100
_DEFAULTS = {
    "ignore_index": IGNORED,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "softcap": None,
    "reduction": "none",
}


def _case(
    name: str,
    sizes: tuple[int, int, int] = (11, 29, 3),
    values: str = "normal",
    targets: str = "indices",
    weight: bool = False,
    cotangents: tuple[str, ...] | None = None,
    tangents: tuple[str, ...] | None = None,
    **options: Any,
) -> FlatCase:
    A, C, I = sizes

    def draw(rng: np.random.Generator) -> dict[str, Array]:
        found = {"logits": change(rng.standard_normal(sizes), values)}
        if targets == "probabilities":
            share = rng.random(sizes)
            found["probabilities"] = share / share.sum(axis=1, keepdims=True)
        else:
            found["targets"] = rng.integers(0, max(C, 1), (A, I))
            if targets == "some":
                found["targets"][::3] = IGNORED
            elif targets == "none":
                found["targets"][...] = IGNORED
        if weight:
            found["weight"] = rng.random(C) + 0.1
        return found

    return FlatCase(name, draw, {**_DEFAULTS, **options}, cotangents, tangents)


def _cases() -> Iterator[FlatCase]:
    for sizes in [(1, 1, 1), (13, 2, 1), (5, 1, 3), (5, 129, 1), (3, 2051, 2), (2, 20011, 1)]:
        yield _case(f"size/{'x'.join(map(str, sizes))}", sizes)
    for sizes in [(0, 5, 3), (2, 5, 0)]:
        yield _case(f"empty/{'x'.join(map(str, sizes))}", sizes)
    for reduction in ("sum", "mean"):
        yield _case(f"reduction/{reduction}", reduction=reduction, targets="some")
        yield _case(f"reduction/{reduction}-weighted", reduction=reduction, weight=True)
        yield _case(f"reduction/{reduction}-all-ignored", reduction=reduction, targets="none")
    yield _case("reduction/mean-probabilities", reduction="mean", targets="probabilities")
    yield _case("reduction/none-all-ignored", targets="none", z_loss=0.1)
    for kind in ("indices", "probabilities"):
        yield _case(f"{kind}/weighted", targets=kind, weight=True)
        yield _case(f"{kind}/smoothed", targets=kind, label_smoothing=0.1)
        yield _case(f"{kind}/z-loss", targets=kind, z_loss=0.01)
        yield _case(f"{kind}/softcap", targets=kind, softcap=2.0)
        yield _case(
            f"{kind}/all",
            (7, 131, 2),
            targets=kind,
            weight=True,
            label_smoothing=0.2,
            z_loss=0.1,
            softcap=5.0,
            reduction="mean",
        )
    for values in ("large", "range", "tiny", "ones", "outlier", "padded-rows"):
        yield _case(f"values/{values}", values=values)
    yield _case("values/range-softcap", values="range", softcap=30.0)
    yield _case("values/large-softcap", values="large", softcap=30.0)
    for values in ("nan", "inf"):
        yield _case(f"rare/{values}", values=values)
    yield _case("zero/lse-alone", cotangents=("lse",))
    yield _case("zero/loss-alone", cotangents=("loss",), targets="some")
    yield _case("zero/targets-alone", targets="probabilities", tangents=("probabilities",))


CASES: tuple[FlatCase, ...] = tuple(_cases())
"""Every case."""
