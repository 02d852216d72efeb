"""What is audited: an implementation of the library, or a function of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise import numpy as frontend
from tilewise.base.errors import Unsupported, value_error
from tilewise.dispatch import choose
from tilewise.ops.attention import spec

from .cases.attention import Problem

__all__ = ["Forward", "Skipped", "Subject", "load", "of_function", "of_implementation"]

Array = NDArray[Any]
Function = Callable[..., Any]

STATISTICS = ("lse", "stats", "max_logit", "entropy")


class Skipped(Exception):
    """A case that the audited function does not claim to serve; the text says why."""


@dataclass(frozen=True)
class Forward:
    """The results of one forward pass as the function returned them, by name."""

    values: dict[str, Array]
    stats: Any = None


@dataclass(frozen=True)
class Subject:
    """An attention function and, perhaps, its gradients.

    Attributes:
        name: What reports call it.
        attention: Function with the signature of `tilewise.numpy.attention`.
        vjp: Function with the signature of `tilewise.numpy.attention_vjp`, or None.
        options: Keyword arguments that `attention` takes, None for any.
        vjp_options: Those that `vjp` takes, None for any.
        invariant: Whether it promises that parts of a problem have the bits of the whole.
        core: The compiled module behind it, whose threads and targets can be set, or None.
    """

    name: str
    attention: Function
    vjp: Function | None = None
    options: frozenset[str] | None = None
    vjp_options: frozenset[str] | None = None
    invariant: bool = False
    core: ModuleType | None = field(default=None, compare=False)

    def forward(self, problem: Problem, *, least: bool = False) -> Forward:
        """Run the forward pass.

        Args:
            problem: The inputs.
            least: Ask for `o` and the row statistics only, not for all that there is.

        Raises:
            Skipped: The function does not take an option of the problem.
        """
        options = problem.options
        self._check(options, self.options)
        wanted = ("stats",) if least else STATISTICS
        asked = {f"return_{name}": True for name in wanted}
        if self.options is not None:
            asked = {name: True for name in asked if name in self.options}
        a = problem.arrays
        return _named(self.attention(a["q"], a["k"], a["v"], **options, **asked))

    def backward(self, problem: Problem, forward: Forward, lse: Array) -> dict[str, Array]:
        """Run the gradients with the results of the forward pass.

        Args:
            problem: The inputs.
            forward: What `forward` returned.
            lse: The true lse, for a function whose forward pass returns no statistics.

        Raises:
            Skipped: There is no such function, or it does not take an option of the problem.
        """
        if self.vjp is None:
            raise Skipped("no gradients were given")
        a, options = problem.arrays, problem.options
        if "dlse" in a:
            options["dlse"] = a["dlse"]
        self._check(options, self.vjp_options)
        stats = forward.stats
        if stats is None:
            stats = forward.values.get("lse", lse)
        grads = self.vjp(a["do"], a["q"], a["k"], a["v"], forward.values["o"], stats, **options)
        names = spec.AttentionGrads._fields
        return {name: value for name, value in zip(names, grads, strict=False) if value is not None}

    def check(self, problem: Problem) -> None:
        """Raise `Skipped` where the function does not take an option of the problem."""
        self._check(problem.options, self.options)

    @staticmethod
    def _check(options: dict[str, Any], taken: frozenset[str] | None) -> None:
        missing = [name for name in options if taken is not None and name not in taken]
        if missing:
            raise Skipped(f"does not take {', '.join(missing)}")


def of_implementation(implementation: str | None = None) -> Subject:
    """Return one implementation of this library; None is the one that calls get by default.

    Raises:
        ValueError: No implementation has that name.
    """
    x = np.zeros((1, 1, 1, 1), np.float32)
    try:
        name = choose("attention", spec.prepare(x, x, x), implementation).name
    except Unsupported:
        name = str(implementation)
    compiled = name == "cpu"
    return Subject(
        name=name if implementation else f"{name} (default)",
        attention=partial(frontend.attention, implementation=implementation),
        vjp=partial(frontend.attention_vjp, implementation=implementation),
        invariant=name != "reference",
        core=import_module("tilewise._core") if compiled else None,
    )


def of_function(attention: Function, vjp: Function | None = None) -> Subject:
    """Return a function of the user's own.

    Args:
        attention: Takes `(q, k, v)` and any of the keyword arguments of
            `tilewise.numpy.attention`; returns `o`, or an object with what it was asked for.
        vjp: Takes what `tilewise.numpy.attention_vjp` takes.
    """
    module = getattr(attention, "__module__", None)
    name = getattr(attention, "__qualname__", type(attention).__name__)
    return Subject(
        name=f"{module}:{name}" if module else name,
        attention=attention,
        vjp=vjp,
        options=_keywords(attention),
        vjp_options=None if vjp is None else _keywords(vjp),
    )


def load(name: str) -> Function:
    """Import the function that ``package.module:function`` names.

    Raises:
        ValueError: The name has another form, or there is no such module or function.
    """
    module, _, path = name.partition(":")
    if not (module and path):
        raise value_error("verify", "function", "be named package.module:function", repr(name))
    try:
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise value_error("verify", repr(name), "be importable", str(error)) from error
    if not callable(found):
        raise value_error("verify", repr(name), "be a function", type(found).__name__)
    function: Function = found
    return function


def _keywords(function: Function) -> frozenset[str] | None:
    try:
        parameters: Iterable[inspect.Parameter] = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY)


def _named(result: Any) -> Forward:
    """Return what a function returned by name: an array, a NamedTuple or a pair (o, lse)."""
    if isinstance(result, np.ndarray):
        return Forward({"o": result})
    if not hasattr(result, "o") and isinstance(result, tuple | list):
        return Forward(dict(zip(("o", "lse"), result, strict=False)))
    values = {name: getattr(result, name, None) for name in ("o", "lse", "max_logit", "entropy")}
    return Forward(
        {name: value for name, value in values.items() if value is not None},
        getattr(result, "stats", None),
    )
