"""How XLA runs the functions of operators: by the compiled handler, or by a callback without it."""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from itertools import compress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir
from numpy.typing import NDArray

from tilewise.base.dtypes import WIDE, bfloat16
from tilewise.base.memory import results_in, settle
from tilewise.base.operator import FlatOperator
from tilewise.dispatch import evaluate

TARGET = "tilewise_evaluate"
"""The name by which compiled and exported programs call the handler."""

LAUNCHER = "tilewise_launch"
"""The name by which those for CUDA call the handler that launches kernels."""

operators: dict[str, FlatOperator] = {}
"""Those that programs may name."""


@dataclass(frozen=True)
class Function:
    """One function of an operator with what it takes besides arrays, the parameter of a primitive.

    Attributes:
        name: Name of the operator.
        kind: Which of its functions.
        options: The other options as the text of a dictionary.
        given: Which of the arguments there are; the others are None.
        needed: Which of the results.
    """

    name: str
    kind: str
    options: str
    given: tuple[bool, ...]
    needed: tuple[bool, ...]

    @cached_property
    def operator(self) -> FlatOperator:
        """Return the operator."""
        return operators[self.name]

    @cached_property
    def parsed(self) -> Mapping[str, Any]:
        """Return the options as a dictionary."""
        options: Mapping[str, Any] = literal_eval(self.options)
        return options

    @cached_property
    def text(self) -> str:
        """Return what the handler is told."""
        flags = ("".join(map(str, map(int, flags))) for flags in (self.given, self.needed))
        return "|".join((self.name, self.kind, *flags, self.options))

    @property
    def first(self) -> int:
        """Return where the inputs of the operator begin among the arguments."""
        return self.operator.first[self.kind]

    def spread(self, given: Sequence[Any]) -> list[Any]:
        """Return the arguments with None in place of those that there are not."""
        arguments = iter(given)
        return [next(arguments) if there else None for there in self.given]

    def split(self, given: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return the arguments in their groups, with None in place of those that there are not."""
        return self.operator.split(self.kind, self.spread(given))

    def leading(self, arguments: Sequence[Any]) -> int:
        """Return how many dimensions come before those that the operator knows."""
        return int(arguments[self.first].ndim - self.operator.rank)


@lru_cache(maxsize=1024)
def _function(text: str) -> Function:
    name, kind, given, needed, options = text.split("|", 4)
    flags = [tuple([flag == "1" for flag in flags]) for flags in (given, needed)]
    return Function(name, kind, options, *flags)


def run(text: str, given: Sequence[NDArray[Any]], results: Sequence[NDArray[Any]]) -> None:
    """Run a function on the memory of XLA.

    Args:
        text: `Function.text`.
        given: Its arguments. Leading dimensions that are 1 repeat.
        results: The arrays into which it writes.
    """
    function = _function(text)
    arguments = function.spread(given)
    extra = function.leading(arguments)
    if extra:
        leading = np.broadcast_shapes(*[a.shape[:extra] for a in given])
        arguments = [
            None if a is None else np.broadcast_to(a, leading + a.shape[extra:]) for a in arguments
        ]
    with results_in(results):
        found = evaluate(
            function.operator, function.kind, arguments, function.parsed, function.needed
        )
    wanted: list[Any] = list(compress(found, function.needed))
    for result, target in zip(wanted, results, strict=True):
        # Without 64 bits in JAX integers are shorter there.
        fits = result.dtype == target.dtype or result.dtype.kind == target.dtype.kind == "i"
        if result.shape != target.shape or not fits:
            raise RuntimeError(f"{text}: made {result.dtype} {result.shape}, not {target.shape}")
    settle(wanted, results)


def emit(function: Function, results: Sequence[Any], *given: Any) -> Any:
    """Return the results of a function while a program is being lowered."""
    if HANDLER:
        return jax.ffi.ffi_call(TARGET, results)(*given, call=function.text)

    def host(*arrays: Any) -> list[NDArray[Any]]:
        made = [np.empty(r.shape, r.dtype) for r in results]
        run(function.text, [np.asarray(a) for a in arrays], made)
        return made

    return jax.pure_callback(host, results, *given)


def _load() -> tuple[bool, str]:
    """Register the handler; return whether it is in use, and how programs run."""
    try:
        xla = import_module("tilewise._xla")
    except ImportError:
        return False, "host callbacks: tilewise was built without XLA's headers"
    built, running = xla.API, _api_of_jaxlib()
    if built[0] != running[0] or built > running:
        versions = f"built for version {_shown(built)}, jaxlib has {_shown(running)}"
        return False, f"host callbacks: the XLA handler was {versions}"
    names = (*WIDE, "float16", "bool", "uint8", "uint16", "uint32", "int32", "int64")
    dtypes = {name: np.dtype(name) for name in names}
    xla.set_run(run, np.ndarray, {**dtypes, "bfloat16": bfloat16("tilewise.jax")})
    jax.ffi.register_ffi_target(TARGET, xla.handler(), platform="cpu")
    jax.ffi.register_ffi_target_as_batch_partitionable(TARGET)
    jax.ffi.register_ffi_target(LAUNCHER, xla.launcher(), platform="CUDA")
    return True, f"XLA handler, built for version {_shown(built)} of its interface"


def _api_of_jaxlib() -> tuple[int, ...]:
    text = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text(encoding="utf-8")
    found = re.findall(r"#define XLA_FFI_API_M(?:AJOR|INOR) (\d+)", text)
    return tuple(map(int, found))


def _shown(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


HANDLER, HOW = _load()
"""Whether the compiled handler runs programs, and how they run in words."""


def mark_batch(call: Any, batch: int) -> None:
    """Tell XLA's partitioner that a call's first dimensions are problems of their own.

    Args:
        call: The custom call, all of whose operands and results have these dimensions.
        batch: How many there are.
    """
    ir = mlir.ir
    factors = list(ir.RankedTensorType(call.results[0].type).shape[:batch])

    def dimensions(value: Any) -> str:
        own = ir.RankedTensorType(value.type).shape[batch:]
        at = [*range(batch), *range(len(factors), len(factors) + len(own))]
        factors.extend(own)
        return f"[{', '.join(map(_factor, at))}]"

    operands, results = (
        ", ".join(map(dimensions, values)) for values in (call.operands, call.results)
    )
    sizes = ", ".join(f"{_factor(i)}={size}" for i, size in enumerate(factors))
    rule = f"#sdy.op_sharding_rule<({operands})->({results}) {{{sizes}}}, custom>"
    call.attributes["sdy.sharding_rule"] = ir.Attribute.parse(rule)
    call.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get(
        {"num_batch_dims": ir.StringAttr.get(str(batch))}
    )


def _factor(index: int) -> str:
    """Return the name of a factor in a rule of Shardy: i to z, then z_1, z_2 and so on."""
    return chr(ord("i") + index) if index < 18 else f"z_{index - 17}"
