"""The letters that name dimensions, and the one rule that matches shapes against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .errors import value_error

GLOSSARY: Mapping[str, str] = {
    "B": "batch",
    "H": "query heads",
    "Hk": "key/value heads; H is a multiple of Hk",
    "N": "queries of one head",
    "Nk": "keys and values of one head",
    "D": "entries of one query or key",
    "Dv": "entries of one value",
    "S": "sequences that are packed one after another",
    "total_q": "queries of all packed sequences",
    "total_k": "keys of all packed sequences",
    "max_k": "keys of the longest packed sequence",
    "T": "tokens that have a target",
    "C": "entries of a hidden state",
    "V": "classes",
}

Shape = tuple[str, ...]
"""A symbolic shape: one entry of the glossary per dimension."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What a size must fulfil when an argument binds it.

    Attributes:
        doc: The rule in words.
        violation: ``(size, size_of) -> what it violates, or None``; ``size_of`` looks up letters.
    """

    doc: str
    violation: Callable[[int, Callable[[str], int | None]], str | None]


def show(dims: Shape) -> str:
    """Return a symbolic shape as a user reads it, such as ``(B, H, N, D)`` or ``(H,)``."""
    return f"({dims[0]},)" if len(dims) == 1 else f"({', '.join(dims)})"


def between(letter: str, low: int, high: int) -> Limit:
    """Return the limit ``low <= size <= high``."""
    doc = f"{low} <= {letter} <= {high}"

    def check(size: int, size_of: Callable[[str], int | None]) -> str | None:
        return None if low <= size <= high else doc

    return Limit(doc, check)


def dividing(letter: str, whole: str) -> Limit:
    """Return the limit that ``letter`` divides ``whole``; zero heads go with zero heads only."""

    def check(size: int, size_of: Callable[[str], int | None]) -> str | None:
        total = size_of(whole)
        if total is None or (size == total == 0) or (size and total and total % size == 0):
            return None
        return f"{letter} a divisor of {whole}={total}"

    return Limit(f"{letter} divides {whole}", check)


class Sizes:
    """The sizes that the letters have in one call.

    The first argument that has a letter binds it; every later one has to agree with it.
    """

    __slots__ = ("_bound", "_limits", "_operator")

    def __init__(self, operator: str, limits: Mapping[str, Limit]) -> None:
        self._operator = operator
        self._limits = limits
        self._bound: dict[str, tuple[int, str]] = {}

    def __getitem__(self, letter: str) -> int:
        """Return the size of a bound letter."""
        return self._bound[letter][0]

    def get(self, letter: str) -> int | None:
        """Return the size of a letter, or None where no argument has bound it."""
        known = self._bound.get(letter)
        return None if known is None else known[0]

    def bind(self, letter: str, size: int, source: str) -> None:
        """Give a letter the size that follows from an argument other than by its shape."""
        self._bound[letter] = (size, source)

    def match(self, name: str, shapes: tuple[Shape, ...], got: tuple[int, ...]) -> None:
        """Match a shape with the symbolic shape of equal rank, and bind its new letters."""
        bound = self._bound
        for dims in shapes:
            if len(dims) != len(got):
                continue
            for letter, size in zip(dims, got, strict=True):
                known = bound.get(letter)
                if known is None:
                    self._bind(name, dims, got, letter, size)
                elif known[0] != size:
                    raise self._disagreement(name, "have", dims, got)
            return
        wanted = " or ".join(map(show, shapes))
        raise value_error(self._operator, name, f"have shape {wanted}", got)

    def match_broadcast(self, name: str, dims: Shape, got: tuple[int, ...]) -> None:
        """Match a shape that may lack leading dimensions and may have 1 in place of any size."""
        tail = dims[len(dims) - len(got) :]
        if len(got) > len(dims):
            raise value_error(self._operator, name, f"broadcast to shape {show(dims)}", got)
        if any(size not in (1, self[letter]) for letter, size in zip(tail, got, strict=True)):
            raise self._disagreement(name, "broadcast to", dims, got)

    def _bind(self, name: str, dims: Shape, got: tuple[int, ...], letter: str, size: int) -> None:
        limit = self._limits.get(letter)
        violated = limit.violation(size, self.get) if limit is not None else None
        if violated is not None:
            raise value_error(self._operator, name, f"have shape {show(dims)} with {violated}", got)
        self._bound[letter] = (size, name)

    def _disagreement(self, name: str, verb: str, dims: Shape, got: tuple[int, ...]) -> ValueError:
        tail = dims[len(dims) - len(got) :]
        wrong = {
            letter: self._bound[letter]
            for letter, size in zip(tail, got, strict=True)
            if letter in self._bound
            and size != self._bound[letter][0]
            and not (verb == "broadcast to" and size == 1)
        }
        where = ", ".join(f"{letter}={size} (from {by})" for letter, (size, by) in wrong.items())
        return value_error(self._operator, name, f"{verb} shape {show(dims)} with {where}", got)
