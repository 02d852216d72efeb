"""What is audited: an implementation of the library, or a function of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise import numpy as frontend
from tilewise.base.errors import Unsupported, value_error
from tilewise.dispatch import DEVICE, choose
from tilewise.ops.attention import spec

from .cases.problem import Problem
from .device import on_arrays
from .oracle import BACKWARD, ONE_PASS, SECOND, TANGENTS
from .tensors import gradients_of, on_tensors

__all__ = [
    "RESULTS",
    "Forward",
    "Known",
    "Skipped",
    "Subject",
    "load",
    "of_function",
    "of_implementation",
]

Array = NDArray[Any]
Function = Callable[..., Any]

STATISTICS = ("lse", "stats", "max_logit", "entropy")
RESULTS = {"vjp": BACKWARD, "jvp": TANGENTS, "vjp_jvp": SECOND, "forward_jvp": tuple(ONE_PASS)}
"""The derivatives of attention, each with the names of its results."""


class Skipped(Exception):
    """A case that the audited function does not claim to serve; the text says why."""


@dataclass(frozen=True)
class Forward:
    """The results of one forward pass as the function returned them, by name.

    Attributes:
        values: o and the row statistics that were returned.
        stats: What the derivatives take of the row statistics, or None.
        o_full: o before it was rounded to 16 bits, or None.
    """

    values: dict[str, Array]
    stats: Any = None
    o_full: Array | None = None

    @property
    def saved(self) -> Array:
        """What derivatives are given as o: before it was rounded to 16 bits, if there is such."""
        return self.values["o"] if self.o_full is None else self.o_full


@dataclass(frozen=True)
class Subject:
    """An attention function and, perhaps, its derivatives.

    Attributes:
        name: What reports call it.
        attention: Function with the signature of `tilewise.numpy.attention`.
        vjp: Function with the signature of `tilewise.numpy.attention_vjp`, or None.
        jvp: Function with the signature of `tilewise.numpy.attention_jvp`, or None.
        vjp_jvp: Function with the signature of `tilewise.numpy.attention_vjp_jvp`, or None.
        forward_jvp: Function with the signature of `tilewise.numpy.attention_forward_jvp`, or None.
        takes_dlse: Whether there are gradients of lse; otherwise problems are tried without dlse.
        invariant: Whether it promises that parts of a problem have the bits of the whole.
        core: The compiled module behind it, whose threads and targets can be set, or None.
    """

    name: str
    attention: Function
    vjp: Function | None = None
    jvp: Function | None = None
    vjp_jvp: Function | None = None
    forward_jvp: Function | None = None
    takes_dlse: bool = True
    invariant: bool = False
    core: ModuleType | None = field(default=None, compare=False)

    @property
    def kinds(self) -> list[str]:
        """The derivatives that are asked for, whether or not they were given."""
        return [kind for kind in RESULTS if kind != "forward_jvp" or self.forward_jvp]

    @property
    def has_tangents(self) -> bool:
        """Whether there is a forward mode or a second derivative to be judged."""
        return self.jvp is not None or self.vjp_jvp is not None

    def forward(self, problem: Problem, *, least: bool = False) -> Forward:
        """Run the forward pass.

        Args:
            problem: The inputs.
            least: Ask for `o` and the row statistics only, not for all that there is.

        Raises:
            Skipped: The function does not take an option of the problem.
        """
        options = problem.options
        self.check(problem)
        wanted = ("stats",) if least else STATISTICS
        asked = {f"return_{name}": True for name in wanted}
        asked = {name: True for name in asked if name not in self._missing("attention", asked)}
        a = problem.arrays
        return _named(self.attention(a["q"], a["k"], a["v"], **options, **asked))

    def derive(self, kind: str, problem: Problem, known: Known) -> dict[str, Array]:
        """Run one of the derivatives with the results of the forward pass.

        Args:
            kind: "vjp", "jvp", "vjp_jvp" or "forward_jvp".
            problem: The inputs.
            known: What the forward pass returned and, perhaps, the jvp.

        Returns:
            The results that `RESULTS` names, without those that are None.

        Raises:
            Skipped: There is no such function, or it does not take an option of the problem.
        """
        function: Function | None = getattr(self, kind)
        if function is None:
            raise Skipped(f"no {kind} was given")
        a, keywords = problem.arrays, problem.options
        optional = {
            "vjp": ("dlse",),
            "jvp": ("tbias", "tsinks"),
            "vjp_jvp": ("dlse", "tbias", "tsinks", "tdo", "tdlse"),
            "forward_jvp": ("tbias", "tsinks"),
        }[kind]
        keywords |= {name: a[name] for name in optional if name in a}
        self._check(kind, keywords)
        if kind == "vjp_jvp" and not self._missing(kind, known.tangents):
            keywords |= known.tangents
        before: list[Array | None] = [a["do"]] if kind.startswith("vjp") else []
        if kind != "vjp":
            before += [a.get(name) for name in ("tq", "tk", "tv")]
        inputs = (*before, a["q"], a["k"], a["v"])
        found: Any
        if kind == "forward_jvp":
            result, tangents = function(*inputs, **keywords)
            found = (result.o, result.lse, *tangents)
        else:
            stats = known.forward.stats
            stats = known.forward.values.get("lse", known.lse) if stats is None else stats
            found = function(*inputs, known.forward.saved, stats, **keywords)
        found = (found,) if isinstance(found, np.ndarray) else found
        pairs = zip(RESULTS[kind], found, strict=False)
        return {name: value for name, value in pairs if value is not None}

    def check(self, problem: Problem) -> None:
        """Raise `Skipped` where the function does not take an option of the problem."""
        self._check("attention", problem.options)

    def _check(self, kind: str, keywords: Iterable[str]) -> None:
        missing = self._missing(kind, keywords)
        if missing:
            raise Skipped(f"does not take {', '.join(missing)}")

    def _missing(self, kind: str, keywords: Iterable[str]) -> list[str]:
        taken = self._taken[kind]
        return [name for name in keywords if taken is not None and name not in taken]

    @cached_property
    def _taken(self) -> dict[str, frozenset[str] | None]:
        """The keyword arguments that each function takes, None for any."""
        functions = {kind: getattr(self, kind) for kind in ("attention", *RESULTS)}
        return {kind: _keywords(function) for kind, function in functions.items() if function}


@dataclass(frozen=True)
class Known:
    """What a derivative is given beside the problem.

    Attributes:
        forward: What `Subject.forward` returned.
        lse: The true lse, for a function whose forward pass returns no statistics.
        tangents: to and tlse, for a vjp_jvp that may take them in place of computing them.
    """

    forward: Forward
    lse: Array
    tangents: dict[str, Array] = field(default_factory=dict)


def of_implementation(implementation: str | None = None) -> Subject:
    """Return one implementation of this library; None is the one that calls get by default.

    Raises:
        ValueError: No implementation has that name.
    """
    x = np.zeros((1, 1, 1, 1), np.float32)
    chosen: Any = implementation
    try:
        if implementation in DEVICE:
            chosen = on_arrays("attention", implementation)
        name = choose("attention", spec.prepare(x, x, x), chosen).name
    except Unsupported:
        name = str(implementation)
    compiled = name == "cpu"
    return Subject(
        name=name if implementation else f"{name} (default)",
        attention=partial(frontend.attention, implementation=chosen),
        vjp=partial(frontend.attention_vjp, implementation=chosen),
        jvp=partial(frontend.attention_jvp, implementation=chosen),
        vjp_jvp=partial(frontend.attention_vjp_jvp, implementation=chosen),
        forward_jvp=partial(frontend.attention_forward_jvp, implementation=chosen),
        invariant=compiled,
        core=import_module("tilewise._core") if compiled else None,
    )


def of_function(
    attention: Function,
    vjp: Function | None = None,
    jvp: Function | None = None,
    vjp_jvp: Function | None = None,
    *,
    tensors: bool = False,
) -> Subject:
    """Return a function of the user's own.

    Args:
        attention: Takes `(q, k, v)` and any of the keyword arguments of
            `tilewise.numpy.attention`; returns `o`, or an object with what it was asked for.
        vjp: Takes what `tilewise.numpy.attention_vjp` takes.
        jvp: Takes what `tilewise.numpy.attention_jvp` takes; returns `to` or `(to, tlse)`.
        vjp_jvp: Takes what `tilewise.numpy.attention_vjp_jvp` takes.
        tensors: Whether these functions take and return PyTorch's tensors; then autograd stands
            in for a missing vjp.
    """
    module = getattr(attention, "__module__", None)
    name = getattr(attention, "__qualname__", type(attention).__name__)
    name = f"{module}:{name}" if module else name
    if not tensors:
        return Subject(name, attention, vjp, jvp, vjp_jvp)
    taken = _keywords(attention)
    lse = taken is None or "return_lse" in taken
    given = {"vjp": vjp, "jvp": jvp, "vjp_jvp": vjp_jvp}
    wrapped = {kind: on_tensors(f) for kind, f in given.items() if f is not None}
    wrapped.setdefault("vjp", gradients_of(attention, lse=lse))
    return Subject(
        name,
        on_tensors(attention),
        wrapped["vjp"],
        wrapped.get("jvp"),
        wrapped.get("vjp_jvp"),
        takes_dlse=lse or vjp is not None,
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
        getattr(result, "o_full", None),
    )
