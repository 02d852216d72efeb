"""The only place that chooses an implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.errors import unsupported, value_error
from tilewise.base.operator import Arrays, FlatOperator, Implementation

TABLE: dict[str, dict[str, str]] = {
    "attention": {
        "cpu": "tilewise.ops.attention.cpu",
        "reference": "tilewise.ops.attention.reference",
    },
}
"""For each operator, the module of each implementation, best first."""


def choose(
    operator: str, call: Any, implementation: str | None = None, kind: str = "forward"
) -> Implementation:
    """Return the implementation that serves a call.

    Args:
        operator: Name of the operator.
        call: The validated call.
        implementation: A name, which is never replaced by another, or None for the first one that
            does not refuse the call.
        kind: Which of its functions is wanted: forward, vjp, jvp or vjp_jvp.

    Raises:
        ValueError: No implementation has that name.
        Unsupported: The named implementation does not serve the call.
        ExceptionGroup: None of them does; it holds the reason of each.
    """
    if implementation is not None:
        chosen = _named(operator, implementation)
        reason = _refusal(chosen, call, kind)
        if reason is not None:
            raise unsupported(operator, f"implementation {implementation!r}: {reason}")
        return chosen
    refusals = []
    for name in TABLE[operator]:
        candidate = _load(operator, name)
        reason = _refusal(candidate, call, kind)
        if reason is None:
            return candidate
        refusals.append(unsupported(operator, f"implementation {name!r}: {reason}"))
    raise ExceptionGroup(f"{operator}: no implementation serves this call", refusals)


def evaluate(
    operator: FlatOperator,
    kind: str,
    arrays: Sequence[NDArray[Any] | None],
    options: Mapping[str, Any],
    needed: tuple[bool, ...],
) -> Arrays:
    """Run one function of an operator on flat arrays.

    Args:
        operator: The operator.
        kind: forward, vjp, jvp or vjp_jvp.
        arrays: Its arguments, in the order of `FlatOperator.split`. All may have the same further
            leading dimensions: then it runs once for each of their indices.
        options: What else the call takes; `options["implementation"]` is for `choose`.
        needed: Which results are needed; None stands for the others.
    """
    groups = operator.split(kind, arrays)
    first: NDArray[Any] = groups[-3 if len(groups) > 1 else 0][0]
    extra = first.ndim - operator.rank
    if not extra:
        return _evaluate_one(operator, kind, groups, options, needed)
    leading = first.shape[:extra]
    out: list[NDArray[Any] | None] = []
    for index in np.ndindex(leading):
        part = [[None if a is None else a[(*index, ...)] for a in group] for group in groups]
        results = _evaluate_one(operator, kind, part, options, needed)
        if not out:
            out = [None if r is None else np.empty((*leading, *r.shape), r.dtype) for r in results]
        for whole, result in zip(out, results, strict=True):
            if whole is not None:
                whole[index] = result
    return tuple(out)


def _evaluate_one(
    operator: FlatOperator,
    kind: str,
    groups: Sequence[Sequence[NDArray[Any] | None]],
    options: Mapping[str, Any],
    needed: tuple[bool, ...],
) -> Arrays:
    if kind == "forward":
        call = operator.prepare(groups[0], options)
        chosen = choose(operator.name, call, options["implementation"])
        return operator.forward(chosen, call, needed)
    *given, inputs, outputs, residuals = groups
    call = operator.prepare(inputs, options)
    chosen = choose(operator.name, call, options["implementation"], kind)
    function: Callable[..., Arrays] = getattr(operator, kind)
    return function(chosen, call, needed, *given, outputs, residuals)


def _refusal(implementation: Implementation, call: Any, kind: str) -> str | None:
    if getattr(implementation, kind) is None:
        return f"has no {kind}"
    return implementation.refuses(call)


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
