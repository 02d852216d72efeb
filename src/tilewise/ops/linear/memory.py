"""How many bytes the linear map, its derivatives and its Jacobians take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Entry", "as_markdown", "entries"]

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
        what: What is stored.
        numbers: How many numbers, as a formula.
        bytes: How many bytes.
        nonzero: How many bytes of them are not zero.
    """

    what: str
    numbers: str
    bytes: int
    nonzero: int


def entries(T: int, C: int, V: int, itemsize: int = 4) -> Iterator[Entry]:
    """Return what there is for x `(T, C)`, w `(V, C)` and y `(T, V)`.

    Args:
        T: Rows of x.
        C: Entries of a row of x.
        V: Entries of a row of y.
        itemsize: Bytes of one number.
    """
    x, w, y = T * C, V * C, T * V

    def entry(what: str, formula: str, numbers: int, nonzero: int | None = None) -> Entry:
        kept = numbers if nonzero is None else nonzero
        return Entry(what, formula, itemsize * numbers, itemsize * kept)

    yield entry("x, w and y; or their gradients", "T C + V C + T V", x + w + y)
    yield entry("gradient of w, beside an accumulator", "0", 0)
    yield entry("dy/dx as a matrix", "(T V) (T C)", y * x, T * V * C)
    yield entry("dy/dx as an operator, which holds w", "V C", w)
    yield entry("dy/dw as a matrix", "(T V) (V C)", y * w, T * V * C)
    yield entry("dy/dw as an operator, which holds x", "T C", x)


def as_markdown(T: int, C: int, V: int, itemsize: int = 4) -> str:
    """Return the table of `entries`, with decimal units."""
    lines = [
        f"| T = {T}, C = {C}, V = {V}, {itemsize} bytes a number | numbers | bytes | not zero |",
        "|---|---|---|---|",
    ]
    for one in entries(T, C, V, itemsize):
        shown = f"{_shown(one.bytes)} | {_shown(one.nonzero)}"
        lines.append(f"| {one.what} | {one.numbers} | {shown} |")
    return "\n".join(lines) + "\n"


def _shown(count: int) -> str:
    power = min(len(_UNITS) - 1, int(math.log10(count)) // 3) if count else 0
    number = count / 1000**power
    return f"{number:.{0 if not power else 2 if number < 100 else 1}f} {_UNITS[power]}"
