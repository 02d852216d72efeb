"""The only place that chooses an implementation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.errors import unsupported, value_error
from tilewise.base.memory import empty
from tilewise.base.operator import Arrays, FlatOperator, Implementation

_SOFTMAX = {
    "cpu": "tilewise.ops.softmax.cpu",
    "reference": "tilewise.ops.softmax.reference",
    "triton": "tilewise.ops.softmax.gpu",
}

TABLE: dict[str, dict[str, str]] = {
    "attention": {
        "cpu": "tilewise.ops.attention.cpu",
        "reference": "tilewise.ops.attention.reference",
        "triton": "tilewise.ops.attention.gpu",
        "hopper": "tilewise.ops.attention.hopper",
    },
    "cross_entropy": {
        "cpu": "tilewise.ops.cross_entropy.cpu",
        "reference": "tilewise.ops.cross_entropy.reference",
        "triton": "tilewise.ops.cross_entropy.gpu",
    },
    "softmax": _SOFTMAX,
    "log_softmax": _SOFTMAX,
    "logsumexp": _SOFTMAX,
    "linear": {
        "cpu": "tilewise.ops.linear.cpu",
        "reference": "tilewise.ops.linear.reference",
    },
    "linear_cross_entropy": {
        "cpu": "tilewise.ops.linear_cross_entropy.cpu",
        "reference": "tilewise.ops.linear_cross_entropy.reference",
        "triton": "tilewise.ops.linear_cross_entropy.gpu",
    },
}
"""For each operator, the module of each implementation, best first."""

DEVICE = ("triton", "hopper")
"""The implementations whose calls hold tensors of a GPU and no arrays: frontends choose those."""

_COPIED_BYTES = 1 << 24  # small problems are worth a copy, for there a call costs more


def choose(
    operator: str,
    call: Any,
    implementation: str | Implementation | None = None,
    kind: str = "forward",
) -> Implementation:
    """Return the implementation that serves a call.

    Args:
        operator: Name of the operator.
        call: The validated call.
        implementation: A name, which is never replaced by another, or None for the first one that
            does not refuse the call; or an implementation itself.
        kind: Which of its functions is wanted: forward, vjp, jvp or vjp_jvp.

    Raises:
        ValueError: No implementation has that name.
        Unsupported: The named implementation does not serve the call.
        ExceptionGroup: None of them does; it holds the reason of each.
    """
    if implementation is not None:
        chosen = named(operator, implementation)
        reason = _refusal(chosen, call, kind)
        if reason is not None:
            raise unsupported(operator, f"implementation {implementation!r}: {reason}")
        return chosen
    refusals = []
    for name in [name for name in TABLE[operator] if name not in DEVICE]:
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
            leading dimensions: then it runs once for each of their indices, or once for all where
            they can be part of the batch.
        options: What else the call takes; `options["implementation"]` is for `choose`.
        needed: Which results are needed; None stands for the others.
    """
    first = arrays[operator.first[kind]]
    extra = 0 if first is None else first.ndim - operator.rank
    if first is None or extra == 0:
        return _evaluate_one(operator, kind, arrays, options, needed)
    leading = first.shape[:extra]
    if operator.folds(kind, arrays, options):
        apart = [a for a in arrays if a is not None and not _merges(a, extra)]
        if 0 not in leading and sum(a.nbytes for a in apart) <= _COPIED_BYTES:
            merged = [None if a is None else a.reshape(-1, *a.shape[extra + 1 :]) for a in arrays]
            found = _evaluate_one(operator, kind, merged, options, needed)
            return tuple([None if r is None else _unfolded(r, leading) for r in found])
    # Where there is no index, the results of zeros still say which shapes the results have.
    indices: Iterable[Any] = np.ndindex(leading) if 0 not in leading else [None]
    out: list[NDArray[Any] | None] = []
    for index in indices:
        part = [None if a is None else _part(a, index, extra) for a in arrays]
        results = _evaluate_one(operator, kind, part, options, needed)
        if not out:
            out = [None if r is None else empty((*leading, *r.shape), r.dtype) for r in results]
        for whole, result in zip(out, results, strict=True):
            if whole is not None and index is not None:
                whole[index] = result
    return tuple(out)


def _merges(array: NDArray[Any], extra: int) -> bool:
    """Return whether the leading dimensions and the one after them are one, without a copy."""
    steps = list(zip(array.shape[: extra + 1], array.strides, strict=False))
    steps = [step for step in steps if step[0] != 1]
    return all([outer[1] == size * stride for outer, (size, stride) in pairwise(steps)])


def _unfolded(array: NDArray[Any], leading: tuple[int, ...]) -> NDArray[Any]:
    batch = array.shape[0] // math.prod(leading)
    return array.reshape(*leading, batch, *array.shape[1:])


def _part(array: NDArray[Any], index: tuple[Any, ...] | None, extra: int) -> NDArray[Any]:
    """Return what an array holds at an index of its leading dimensions, or zeros."""
    if index is None:
        return np.zeros(array.shape[extra:], array.dtype)
    part: NDArray[Any] = array[index + (...,)]  # noqa: RUF005, typed like this
    return part


def _evaluate_one(
    operator: FlatOperator,
    kind: str,
    arrays: Sequence[NDArray[Any] | None],
    options: Mapping[str, Any],
    needed: tuple[bool, ...],
) -> Arrays:
    return evaluate_by(options["implementation"], operator, kind, arrays, options, needed)


def evaluate_by(
    implementation: str | Implementation | None,
    operator: FlatOperator,
    kind: str,
    arrays: Sequence[NDArray[Any] | None],
    options: Mapping[str, Any],
    needed: tuple[bool, ...],
) -> Arrays:
    """Run one function of an operator, as `evaluate` does, by what `choose` takes.

    The arrays have no further leading dimensions.
    """
    if kind == "forward":
        call = operator.prepare(arrays, options)
        return operator.forward(choose(operator.name, call, implementation), call, needed)
    *given, inputs, outputs, residuals = operator.split(kind, arrays)
    call = operator.prepare(inputs, options)
    chosen = choose(operator.name, call, implementation, kind)
    function: Callable[..., Arrays] = getattr(operator, kind)
    return function(chosen, call, needed, *given, outputs, residuals)


def device_implementation(operator: str, name: str) -> Implementation:
    """Return an implementation on tensors of a GPU by its name.

    Raises:
        ValueError: No implementation has that name.
        Unsupported: What it needs is not installed.
    """
    return named(operator, name)


def _refusal(implementation: Implementation, call: Any, kind: str) -> str | None:
    if getattr(implementation, kind) is None:
        return f"has no {kind}"
    return implementation.refuses(call)


def named(operator: str, implementation: object) -> Implementation:
    """Return an implementation by its name, or the one that is given.

    Raises:
        ValueError: No implementation has that name.
        Unsupported: What it needs is not installed.
    """
    if isinstance(implementation, Implementation):
        return implementation
    if not isinstance(implementation, str) or implementation not in TABLE[operator]:
        names = ", ".join(map(repr, TABLE[operator]))
        raise value_error(operator, "implementation", f"be one of {names}", repr(implementation))
    try:
        return _load(operator, implementation)
    except ModuleNotFoundError as error:
        reason = f"needs the package {error.name}, which is not installed"
        raise unsupported(operator, f"implementation {implementation!r}: {reason}") from error


@cache
def _load(operator: str, name: str) -> Implementation:
    implementation = import_module(TABLE[operator][name]).IMPLEMENTATION
    if not isinstance(implementation, Implementation):
        raise TypeError(f"{TABLE[operator][name]}.IMPLEMENTATION is not an Implementation")
    return implementation
