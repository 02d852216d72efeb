"""The only place that chooses an implementation."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from tilewise.base.errors import unsupported, value_error
from tilewise.base.operator import Implementation

TABLE: dict[str, dict[str, str]] = {
    "attention": {
        "cpu": "tilewise.ops.attention.cpu",
        "reference": "tilewise.ops.attention.reference",
    },
}
"""For each operator, the module of each implementation, best first."""


def choose(operator: str, call: Any, implementation: str | None = None) -> Implementation:
    """Return the implementation that serves a call.

    Args:
        operator: Name of the operator.
        call: The validated call.
        implementation: A name, which is never replaced by another, or None for the first one that
            does not refuse the call.

    Raises:
        ValueError: No implementation has that name.
        Unsupported: The named implementation does not serve the call.
        ExceptionGroup: None of them does; it holds the reason of each.
    """
    if implementation is not None:
        chosen = _named(operator, implementation)
        reason = chosen.refuses(call)
        if reason is not None:
            raise unsupported(operator, f"implementation {implementation!r}: {reason}")
        return chosen
    refusals = []
    for name in TABLE[operator]:
        candidate = _load(operator, name)
        reason = candidate.refuses(call)
        if reason is None:
            return candidate
        refusals.append(unsupported(operator, f"implementation {name!r}: {reason}"))
    raise ExceptionGroup(f"{operator}: no implementation serves this call", refusals)


def _named(operator: str, implementation: object) -> Implementation:
    if not isinstance(implementation, str) or implementation not in TABLE[operator]:
        names = ", ".join(map(repr, TABLE[operator]))
        raise value_error(operator, "implementation", f"be one of {names}", repr(implementation))
    return _load(operator, implementation)


@cache
def _load(operator: str, name: str) -> Implementation:
    implementation = import_module(TABLE[operator][name]).IMPLEMENTATION
    if not isinstance(implementation, Implementation):
        raise TypeError(f"{TABLE[operator][name]}.IMPLEMENTATION is not an Implementation")
    return implementation
