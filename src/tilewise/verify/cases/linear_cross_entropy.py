"""The cases of the linear cross-entropy: T tokens of C entries, V classes, and their targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cross_entropy import IGNORED
from .rows import FlatCase, FlatProblem

__all__ = ["CASES", "with_errors_of_logits"]

Array = NDArray[Any]

_DEFAULTS = {
    "ignore_index": IGNORED,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "softcap": None,
    "reduction": "none",
    "token_chunk": None,
    "vocab_chunk": None,
    "gradient_filter": None,
    "lse": True,
    "entropy": True,
}


def _case(
    name: str,
    sizes: tuple[int, int, int] = (13, 29, 67),
    scale: float = 1.0,
    targets: str = "all",
    bias: bool = True,
    class_weight: bool = False,
    cotangents: tuple[str, ...] | None = None,
    tangents: tuple[str, ...] | None = None,
    **options: Any,
) -> FlatCase:
    T, C, V = sizes

    def draw(rng: np.random.Generator) -> dict[str, Array]:
        found = {
            "hidden": rng.standard_normal((T, C)),
            "weight": scale / max(C, 1) ** 0.5 * rng.standard_normal((V, C)),
            "targets": rng.integers(0, V, T),
        }
        if targets != "all":
            found["targets"][:: 3 if targets == "some" else 1] = IGNORED
        if bias:
            found["bias"] = rng.standard_normal(V)
        if class_weight:
            found["class_weight"] = rng.random(V) + 0.1
        return found

    return FlatCase(name, draw, {**_DEFAULTS, **options}, cotangents, tangents)


def _cases() -> Iterator[FlatCase]:
    for sizes in [(1, 1, 1), (1, 37, 5), (53, 1, 3), (5, 7, 1), (61, 127, 83), (3, 67, 2053)]:
        yield _case(f"size/{'x'.join(map(str, sizes))}", sizes)
    for sizes in [(0, 5, 3)]:
        yield _case(f"empty/{'x'.join(map(str, sizes))}", sizes)
    yield _case("bias/none", bias=False)
    for reduction in ("sum", "mean"):
        yield _case(f"reduction/{reduction}", reduction=reduction, targets="some")
        yield _case(f"reduction/{reduction}-weighted", reduction=reduction, class_weight=True)
        yield _case(f"reduction/{reduction}-all-ignored", reduction=reduction, targets="none")
        yield _case(f"reduction/{reduction}-alone", reduction=reduction, cotangents=("loss",))
    yield _case("reduction/none-all-ignored", targets="none", z_loss=0.1)
    yield _case("option/weighted", class_weight=True)
    yield _case("option/smoothed", label_smoothing=0.1)
    yield _case("option/z-loss", z_loss=0.01)
    yield _case("option/softcap", softcap=2.0)
    everything: dict[str, Any] = {
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "softcap": 5.0,
        "reduction": "mean",
    }
    yield _case("option/all", (31, 19, 131), class_weight=True, targets="some", **everything)
    yield _case("chunks/both", (197, 11, 409), token_chunk=48, vocab_chunk=192)
    for scale in (1e2, 1e-4):
        yield _case(f"values/{scale:g}", scale=scale)
    yield _case("values/10000-softcap", scale=1e4, softcap=30.0)
    yield _case("zero/lse-alone", cotangents=("lse",))
    yield _case("zero/entropy-alone", cotangents=("entropy",))
    yield _case("zero/no-tangent-of-hidden", tangents=("weight", "bias"))
    yield _case("zero/no-tangent-of-weight", tangents=("hidden",))


CASES: tuple[FlatCase, ...] = tuple(_cases())
"""Every case."""


def with_errors_of_logits(problem: FlatProblem, size: float, seed: int) -> FlatProblem:
    """Return the problem with each logit off by up to `size`, by T more columns.

    Token t has 1 in the column t and 0 in the others, and weight has the errors.
    """
    rng, a = np.random.default_rng(seed), dict(problem.arrays)
    T, V = len(a["hidden"]), len(a["weight"])
    more = {"hidden": np.eye(T), "weight": size * rng.uniform(-1, 1, (V, T))}
    for name, columns in more.items():
        a[name] = np.concatenate([a[name], columns], axis=1)
        if f"t_{name}" in a:
            a[f"t_{name}"] = np.concatenate([a[f"t_{name}"], 0 * columns], axis=1)
    return replace(problem, arrays=a)
