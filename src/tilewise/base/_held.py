"""The arrays that masks hold: frozen copies, or arrays whose values are not known yet."""

from __future__ import annotations

from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from tilewise.base.errors import type_error


@final
class Frozen:
    """A private read-only copy of an array that compares and hashes by content."""

    __slots__ = ("array", "own")

    def __init__(self, array: NDArray[np.generic]) -> None:
        self.own = np.array(array, order="C", copy=True)  # nobody writes, but tracers look at flags
        self.array = self.own.view()
        self.array.setflags(write=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frozen) and np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return hash((self.array.shape, self.array.tobytes()))

    def __reduce__(self) -> tuple[type[Frozen], tuple[NDArray[np.generic]]]:
        return Frozen, (self.array,)

    def __repr__(self) -> str:
        if self.array.dtype == np.bool_ or self.array.ndim != 1:
            return f"<{self.array.dtype} {self.array.shape}>"
        items = [str(item) for item in self.array.tolist()]
        if len(items) > 8:
            items[3:-2] = ["..."]
        return f"[{', '.join(items)}]"

    @property
    def known(self) -> NDArray[np.generic]:
        """Return the array."""
        return self.array

    @property
    def ints(self) -> NDArray[np.int64]:
        """Return the array as int64."""
        return self.array.astype(np.int64, copy=False)


@final
class Traced:
    """An array whose values are not known yet; it is equal to itself alone."""

    __slots__ = ("array", "own")

    def __init__(self, array: NDArray[np.generic]) -> None:
        self.array = self.own = array

    def __repr__(self) -> str:
        return f"<traced {self.array.dtype} {self.array.shape}>"

    @property
    def known(self) -> NDArray[np.generic]:
        """Raise, for the values are asked for."""
        requirement = "be known here (only tilewise.jax takes traced ones)"
        raise type_error("mask", "arrays", requirement, repr(self))

    @property
    def ints(self) -> NDArray[np.int64]:
        """Raise, for the values are asked for."""
        return self.known.astype(np.int64)


Held: TypeAlias = Frozen | Traced

_traced: list[type] = []


def register_traced(kind: type) -> None:
    """Let masks hold arrays of a type whose values are not known yet, as while JAX traces."""
    _traced.append(kind)


def is_traced(value: object) -> bool:
    """Return whether the values of an array are not known yet."""
    return isinstance(value, tuple(_traced))


def values_of(value: Any) -> NDArray[Any]:
    """Return an array of NumPy, or the array without values that is given."""
    return value if is_traced(value) else np.asarray(value)


def held(array: NDArray[Any]) -> Held:
    """Return what a mask holds of an array."""
    return Traced(array) if is_traced(array) else Frozen(array)
