"""Records of the benchmarks of rows: a case, and an operator with its contenders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.bench.cases import PYTORCH
from tilewise.bench.problems import NotAvailable

__all__ = [
    "COPY",
    "Call",
    "Inputs",
    "Make",
    "RowCase",
    "RowOperator",
    "as_array",
    "small",
    "tensor",
]

Array = NDArray[Any]
Inputs = Mapping[str, Array]
Call = Callable[[], Any]
Make = Callable[[Inputs], Call]
COPY = "memcpy"


@dataclass(frozen=True)
class RowCase:
    """What is timed.

    Attributes:
        name: as the tables call it.
        operator: a name of `tilewise.bench.rows.OPERATORS`.
        rows: how many rows.
        columns: how many entries each has.
        contenders: names of those who take part; times are compared with the first one's.
        dtype: "float64", "float32", "bfloat16" or "float16".
        depth: of a matrix product that makes the rows, C; 0 where there is none.
        memory: whether to measure what each needs beside its inputs and outputs, too.
        large: whether it takes minutes and is run only where it is asked for.
    """

    name: str
    operator: str
    rows: int
    columns: int
    contenders: tuple[str, ...]
    dtype: str = "float32"
    depth: int = 0
    memory: bool = False
    large: bool = False


@dataclass(frozen=True)
class RowOperator:
    """An operator, its contenders, and its results in float64.

    Attributes:
        draw: the inputs of a case, by name.
        makers: ``inputs -> call`` for each contender; the call returns what `results` takes.
        results: ``(contender, what it returned) -> arrays`` by name, their lines those of `truth`.
        truth: ``inputs -> arrays`` in float64 by name; of long ones the first lines.
        moved: bytes of inputs and outputs; None where reading and writing is not what counts.
        created: ``(contender, what it returned) -> bytes`` of outputs that the call allocated.
        gates: relative errors of results that tilewise may have, where less than the usual.
    """

    draw: Callable[[RowCase], Inputs]
    makers: Mapping[str, Make]
    results: Callable[[str, Any], Mapping[str, Array]]
    truth: Callable[[Inputs], Mapping[str, Array]]
    moved: Callable[[Inputs], int] | None
    created: Callable[[str, Any], int]
    gates: Mapping[str, float] = field(default_factory=dict)


def small(case: RowCase) -> RowCase:
    """Return the case with its sizes divided by 32, to see that everything runs."""
    rows, columns = max(2, case.rows // 32), max(3, case.columns // 32)
    depth = max(2, case.depth // 32) if case.depth else 0
    return replace(case, rows=rows, columns=columns, depth=depth)


def tensor(x: Array) -> Any:
    """Return the PyTorch tensor on the memory of x.

    Raises:
        NotAvailable: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as absent:
        raise NotAvailable(f"{PYTORCH} is not installed") from absent
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def as_array(x: Any) -> Array:
    """Return an array or a tensor as an array; 16 bits of a tensor become float32."""
    if isinstance(x, np.ndarray | np.generic):
        return np.asarray(x)
    wide = x.detach()
    return np.asarray(wide.float() if wide.element_size() == 2 else wide)
