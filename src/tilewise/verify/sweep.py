"""The grid: is every derivative of attention right with every option?

The truth is a textbook attention that PyTorch itself differentiates. Without PyTorch it is the
float64 reference, and the columns that are transformations of PyTorch are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base import masks
from tilewise.base.errors import value_error

from . import metrics
from .audit import Progress, check_dtypes
from .blas import one_blas_thread
from .cases.problem import Case, Dims, Problem
from .grid import Cell, Grid, Measured
from .judge import text_of
from .oracle import Oracle, Question, consult, floor_of
from .subject import Known, Subject, of_implementation
from .tensors import array_of, tensor_of
from .textbook import Along, Tensors, Textbook, one_thread

__all__ = ["COLUMNS", "ROWS", "derivatives"]

COLUMNS = {
    "backward": "backward",
    "double backward": "double_backward",
    "jvp": "jvp",
    "jvp of vjp": "jvp_of_vjp",
    "vmap": "vmap",
}
"""The derivatives, each with the method of `Along` that takes it."""

DTYPES = ("float32", "float64")
"""In which the derivatives are taken unless others are asked for."""
_WITHOUT_TORCH = {"backward": "vjp", "jvp": "jvp", "jvp of vjp": "vjp_jvp"}
_WITH_DIFFERENCES = ("no option", "everything")
_STEP = 1e-3

_DIMS = Dims(B=2, H=4, Hk=4, N=19, Nk=29, D=7, Dv=7)


def _rows() -> Iterator[Case]:
    def row(name: str, **options: Any) -> Case:
        given: dict[str, Any] = {"dims": _DIMS, "cotangents": "o", **options}
        return Case(name, **given)

    def masked(name: str, mask: masks.Mask) -> Case:
        return row(name, mask=lambda dims, batch: mask)

    yield row("no option")
    yield masked("causal", masks.causal())
    yield masked("causal, top left", masks.causal(align="top_left"))
    yield masked("window", masks.window(5, 3))
    yield masked("prefix", masks.causal() | masks.prefix(11))
    yield masked("sink tokens", masks.causal() & (masks.window(4, 0) | masks.sink_tokens(3)))
    ids = np.arange(_DIMS.N) // 7, np.arange(_DIMS.Nk) // 11
    yield masked("documents", masks.documents(ids=ids[0], ids_k=ids[1]))
    yield masked("lengths", masks.lengths(np.array([23, 0])))
    drawn = np.random.default_rng(5).random((_DIMS.H, _DIMS.N, _DIMS.Nk))
    yield masked("boolean mask", masks.dense(drawn < 0.5))
    drawn[:, ::3] = drawn[-1] = 1.0
    yield masked("empty rows", masks.dense(drawn < 0.6))
    yield row("bias (B,H,N,Nk)", bias="B H N Nk")
    yield row("bias (1,H,1,Nk)", bias="1 H 1 Nk")
    yield row("bias (N,Nk)", bias="N Nk")
    yield row("ALiBi", alibi="H")
    yield row("softcap", softcap=1.3)
    yield row("sinks", sinks="normal")
    yield row("softmax_scale", softmax_scale=0.7)
    yield row("grouped queries", dims=replace(_DIMS, Hk=2))
    yield row("Dv other than D", dims=replace(_DIMS, Dv=11))
    yield row("one query", dims=replace(_DIMS, N=1))
    yield row("dropout", dropout=0.3)
    yield row("layout bnhd", layout="bnhd")
    yield row("lse", cotangents="both")
    yield row(
        "everything",
        dims=replace(_DIMS, Hk=2, Dv=11),
        mask=lambda dims, batch: masks.dense(drawn < 0.6) & masks.causal(),
        bias="1 H N Nk",
        alibi="B H",
        softcap=2.0,
        sinks="some",
        softmax_scale=0.5,
        dropout=0.2,
        layout="bnhd",
        cotangents="both",
    )


ROWS: tuple[Case, ...] = tuple(_rows())
"""One problem for each option, whose name is the row's."""


def derivatives(
    implementation: str | None = None,
    select: str | None = None,
    progress: Progress | None = None,
    *,
    dtypes: Sequence[str] = DTYPES,
    torch: bool | None = None,
) -> Grid:
    """Compare every derivative of attention with the truth, with every option.

    Args:
        implementation: Which implementation; None for the one that calls get.
        select: Only the options whose name contains this.
        progress: Called before every option with (number, how many, name).
        dtypes: In which dtypes, "float32", "float64", "bfloat16" or "float16". Central differences
            are taken in float64 alone.
        torch: Whether to go through PyTorch; by default where it is installed.

    Returns:
        The grid; `grid.passed` is the verdict.

    Raises:
        ValueError: No such implementation, option or dtype.
        ImportError: bfloat16 is asked for and not installed.
    """
    check_dtypes(dtypes)
    subject = of_implementation(implementation)
    rows = [case for case in ROWS if select is None or select in case.name]
    if not rows:
        raise value_error("verify", "select", "be part of an option's name", repr(select))
    through_torch = find_spec("torch") is not None if torch is None else torch

    def measure(case: Case) -> dict[str, Measured]:
        with one_blas_thread():
            if not through_torch:
                return _through_numpy(case.problem(), subject)
            with one_thread():
                return _through_torch(_Places(case, implementation))

    cells: list[Cell] = []
    for number, case in enumerate(rows):
        if progress is not None:
            progress(number, len(rows), case.name)
        found = {dtype: measure(case.in_dtype(dtype)) for dtype in dtypes}
        for column in COLUMNS:
            measured = {dtype: part[column] for dtype, part in found.items() if column in part}
            cells.append(Cell(case.name, column, measured))
    if through_torch:
        truth = "the textbook in float64, differentiated by PyTorch"
        return Grid(subject.name, truth, "", tuple(cells))
    absent = " and ".join(column for column in COLUMNS if column not in _WITHOUT_TORCH)
    missing = f"{absent} need PyTorch, which is not installed (pip install torch)"
    return Grid(subject.name, "the float64 reference", missing, tuple(cells))


def _through_numpy(problem: Problem, subject: Subject) -> dict[str, Measured]:
    """Return what the functions for NumPy arrays make of a problem."""
    case, found = problem.case, {}
    oracle = consult(Question.of(problem, tangents=True))
    with np.errstate(all="ignore"):
        known = Known(subject.forward(problem), np.zeros(0))
        for column, kind in _WITHOUT_TORCH.items():
            try:
                results = subject.derive(kind, problem, known)
            except Exception as error:
                found[column] = Measured(problem=text_of(error))
                continue
            found[column] = Measured(
                {
                    name: (oracle.error(name, case.in_order(name, x)), oracle.allowed(name))
                    for name, x in results.items()
                }
            )
    return found


@dataclass(frozen=True)
class _Places:
    """The problem of one row in one dtype, and another like it for `vmap`."""

    case: Case
    implementation: str | None

    @cached_property
    def problems(self) -> tuple[Problem, Problem]:
        return self.case.problem(), replace(self.case, name=f"{self.case.name}, again").problem()

    @cached_property
    def oracles(self) -> tuple[Oracle, Oracle, Oracle]:
        """What is allowed: with all tangents, with those of the inputs, at the other place."""
        first, other = (Question.of(problem, tangents=True) for problem in self.problems)
        given = {name: x for name, x in (first.tangents or {}).items() if name[:2] != "td"}
        return consult(first), consult(replace(first, tangents=given)), consult(other)

    @property
    def names(self) -> list[str]:
        """The inputs that have derivatives."""
        return [x for x in ("q", "k", "v", "bias", "sinks") if x in self.problems[0].arrays]

    @property
    def outputs(self) -> list[str]:
        return ["o", "lse"] if "dlse" in self.problems[0].arrays else ["o"]

    def attention(self, *tensors: Any) -> Tensors:
        """Return o, or o and lse, of the function that is examined."""
        import tilewise.torch

        options = self.problems[0].options
        if "alibi_slopes" in options:
            options["alibi_slopes"] = tensor_of(options["alibi_slopes"])
        options |= dict(zip(self.names, tensors, strict=True))
        lse = len(self.outputs) > 1
        found = tilewise.torch.attention(
            **options, return_lse=lse, implementation=self.implementation
        )
        return (found.o, found.lse) if lse else (found,)

    def along(self, f: Callable[..., Tensors], *, exact: bool = False) -> Along:
        """Return a function with the places and directions of the problem as tensors.

        Args:
            f: The function.
            exact: Whether the tensors are float64, of the same numbers.
        """

        def take(prefix: str, names: list[str], problem: Problem) -> Tensors:
            arrays = [problem.arrays[f"{prefix}{name}"] for name in names]
            return tuple(_tensor(x.astype(np.float64) if exact else x) for x in arrays)

        first, other = self.problems
        return Along(
            f,
            x=take("", self.names, first),
            c=take("d", self.outputs, first),
            t=take("t", self.names, first),
            tc=take("td", self.outputs, first),
            others=(take("", self.names, other), take("d", self.outputs, other)),
        )

    def allowed(self, column: str) -> list[tuple[str, float]]:
        """Return the names of a column's results, each with its largest error that passes."""
        whole, inputs_only, other = self.oracles
        grads, tangents = [f"d{x}" for x in self.names], [f"t{x}" for x in self.outputs]
        if column == "vmap":
            names = [*self.outputs, *grads]
            return [(name, max(whole.allowed(name), other.allowed(name))) for name in names]
        of_grads = [f"t{name}" for name in grads]
        if column == "double backward":
            return [(name, inputs_only.allowed(name)) for name in (*of_grads, *tangents)]
        names = {"backward": grads, "jvp": tangents, "jvp of vjp": of_grads}[column]
        return [(name, whole.allowed(name)) for name in names]


def _through_torch(places: _Places) -> dict[str, Measured]:
    """Return what PyTorch's transformations make of a problem."""
    case = places.case
    textbook = Textbook(places.problems[0], places.names, len(places.outputs) > 1)
    examined, truth = places.along(places.attention), places.along(textbook, exact=True)
    # In float64 the truth rounds as well, and its roundings are others.
    sides = 2 if case.dtype == "float64" else 1
    found = {}
    for column, method in COLUMNS.items():
        try:
            got = getattr(examined, method)()
        except Exception as error:
            found[column] = Measured(problem=text_of(error))
            continue
        want = getattr(truth, "one_by_one" if column == "vmap" else method)()
        errors = {
            name: (_error(name, x, y), sides * allowed)
            for (name, allowed), x, y in zip(places.allowed(column), got, want, strict=True)
        }
        difference = None
        if case.dtype == "float64" and case.name in _WITH_DIFFERENCES and column != "vmap":
            difference = _difference(examined, column, got)
        found[column] = Measured(errors, difference)
    return found


def _error(name: str, got: Any, want: Any) -> float:
    return metrics.relative_error(array_of(got), array_of(want), floor=floor_of(name))


def _difference(along: Along, column: str, got: Tensors) -> float:
    """Return how far a derivative is from central differences of what it is the derivative of.

    That is `<c, f>` for the first derivatives and `<t, gradients>` for the second ones, both along
    the tangents; the error is relative to the norm of the derivative.
    """
    first = column in ("backward", "jvp")

    def value(h: float) -> float:
        x, c = along.moved(h)
        return _dot(along.f(*x), along.c) if first else _dot(along.gradients(x, c), along.t)

    near, far = value(_STEP) - value(-_STEP), value(2 * _STEP) - value(-2 * _STEP)
    slope = (8 * near - far) / (12 * _STEP)
    against = {
        "backward": along.t,
        "double backward": (*along.t, *along.tc),
        "jvp": along.c,
        "jvp of vjp": along.t,
    }[column]
    return abs(_dot(got, against) - slope) / math.sqrt(_dot(got, got))


def _dot(x: Tensors, y: Tensors) -> float:
    # The lse of a row without keys is -inf, and nothing moves it.
    pairs = ((a.detach().numpy(), b.detach().numpy()) for a, b in zip(x, y, strict=True))
    terms = [np.where(np.isfinite(a), a * b, 0.0).sum() for a, b in pairs]
    return float(np.sum(terms))


def _tensor(x: NDArray[Any]) -> Any:
    return tensor_of(np.ascontiguousarray(x))
