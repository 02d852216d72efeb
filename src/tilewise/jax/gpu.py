"""How programs for CUDA run an operator: its Triton kernels, compiled, in one call of XLA.

While a program is lowered the launcher of the operator runs as for PyTorch, on tensors without
memory. What it launches is taken down, compiled without a GPU, and becomes the attributes of a
custom call, whose handler needs neither Triton nor Python.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import compress
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from tilewise.base.errors import unsupported, value_error
from tilewise.base.masks import PackedBits, RowIntervals
from tilewise.dispatch import DEVICE, TABLE, device_implementation, evaluate_by
from tilewise.ops.attention.spec import PACKED
from tilewise.ops.attention.spec.sequences import Sequences
from tilewise.shared.recording import Recorded, Recording
from tilewise.shared.stand_ins import Stage, adapted

from .device_inputs import boundaries, class_targets, mask_parts, packed_rows
from .execution import HANDLER, HOW, LAUNCHER, Function

ARCHITECTURE: Final = "TILEWISE_CUDA_ARCH"
"""The variable that names what programs are compiled for, such as sm_90."""

_SERVED = "triton"

Arrays = Sequence[Any]
Encode = Callable[[Recording, Sequence[Recorded], Mapping[str, Recorded]], Any]


def refuse_on_cpu(function: Function) -> None:
    """Raise where a program for the CPU asks for an implementation of a GPU."""
    name = function.parsed.get("implementation")
    if name in DEVICE:
        reason = "computes on a GPU, and the program is for the CPU"
        raise unsupported(function.name, f"implementation {name!r}: {reason}")


def emit(function: Function, results: Arrays, *given: Any) -> list[Any]:
    """Return the results of a function while a program for CUDA is being lowered.

    Raises:
        Unsupported: There is no kernel for it, or nothing to compile it with or for.
    """
    _check(function)
    number = architecture(function.name)
    return record(function, results, given, f"sm_{number}", _encoder(function.name, number))


def architecture(operator: str) -> int:
    """Return the number of the architecture that programs are compiled for, such as 90.

    Raises:
        ValueError: The variable names none.
        Unsupported: There is no GPU, and the variable is not set.
    """
    named = os.environ.get(ARCHITECTURE)
    if named is not None:
        found = re.fullmatch(r"sm_(\d{2,3})", named)
        if found is None:
            raise value_error(operator, ARCHITECTURE, "be like sm_90", repr(named))
        return int(found[1])
    try:
        board = jax.devices("cuda")[0]
    except RuntimeError:
        reason = f"JAX finds no GPU of NVIDIA, and {ARCHITECTURE} names none to compile for"
        raise unsupported(operator, reason) from None
    major, minor = str(board.compute_capability).split(".")
    return 10 * int(major) + int(minor)


def record(
    function: Function, results: Arrays, given: Arrays, arch: str, encode: Encode
) -> list[Any]:
    """Return the results of a function by a call that runs what its launcher launches.

    Args:
        function: The function.
        results: Shapes and dtypes of its results.
        given: Its arguments, which may be traced. Leading dimensions that are 1 repeat.
        arch: The architecture.
        encode: Makes a `Program` of a recording, its results and the words that it reads.
    """
    _check_sizes(function, [*given, *results])
    arguments = function.spread(given)
    extra = function.leading(arguments)
    if extra == 0:
        return _Call(function, results, arguments, arch, encode).run()
    leading = jnp.broadcast_shapes(*[a.shape[:extra] for a in given])
    given = [jnp.broadcast_to(a, leading + a.shape[extra:]) for a in given]
    shapes = [jax.ShapeDtypeStruct(r.shape[extra:], r.dtype) for r in results]
    if 0 in leading:
        return [jnp.zeros(r.shape, r.dtype) for r in results]
    if function.operator.folds(function.kind, function.spread(given), function.parsed):
        # The indices join the batch, which is the first dimension of everything.
        count = int(np.prod(leading))
        whole = [
            jax.ShapeDtypeStruct((count * shape.shape[0], *shape.shape[1:]), shape.dtype)
            for shape in shapes
        ]
        merged = [a.reshape(-1, *a.shape[extra + 1 :]) for a in given]
        found = record(function, whole, merged, arch, encode)
    else:
        flat = [a.reshape(-1, *a.shape[extra:]) for a in given]
        found = jax.lax.map(lambda one: record(function, shapes, one, arch, encode), flat)
    return [f.reshape(r.shape) for f, r in zip(found, results, strict=True)]


class _Call:
    """One function without further leading dimensions, on tensors without memory."""

    def __init__(
        self, function: Function, results: Arrays, arguments: list[Any], arch: str, encode: Encode
    ) -> None:
        self.function, self.results, self.encode = function, results, encode
        self.arrays: dict[int, Any] = {}
        self.recording = Recording(arch)
        self.stage = Stage(_stand_in_dtype, self._new)
        self.wrong: Any = None
        self.lowered: list[Recorded] = []
        if function.parsed.get("layout") == PACKED:
            arguments = self._with_boundaries(arguments)
        else:
            arguments = self._with_classes(self._without_masks(arguments))
        self.tensors = [None if a is None else self._tensor(a) for a in arguments]

    def run(self) -> list[Any]:
        """Return the results."""
        found = self._launched()
        tensors = self.recording.apart([self.stage.tensor(a) for a in found])
        program = self.encode(self.recording, tensors, self._words())
        operands = [
            jnp.asarray(b.constant) if b.constant is not None else self.arrays[id(b)]
            for b in program.operands
        ]
        # Memory that only kernels see is bytes, for JAX may not have its dtype.
        rest = program.results[len(tensors) :]
        made = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in tensors]
        made += [jax.ShapeDtypeStruct((b.entries * b.dtype.itemsize,), np.uint8) for b in rest]
        if not program.kernels:
            return [jnp.zeros(r.shape, r.dtype) for r in self.results]
        call = jax.ffi.ffi_call(LAUNCHER, made)
        given = {name: getattr(program, name) for name in ("numbers", "kernels", "code")}
        out = call(*operands, **given)[: len(tensors)]
        for o, r in zip(out, self.results, strict=True):
            # Without 64 bits in JAX integers are shorter there.
            fits = o.dtype == r.dtype or o.dtype.kind == r.dtype.kind == "i"
            if o.shape != r.shape or not fits:
                text = self.function.text
                raise RuntimeError(f"{text}: made {o.dtype} {o.shape}, not {r.dtype} {r.shape}")
        return self._marked([o.astype(r.dtype) for o, r in zip(out, self.results, strict=True)])

    def _launched(self) -> list[NDArray[Any]]:
        """Run the launcher; return the stand-ins of the results that are needed."""
        from tilewise.shared.triton_launch import recorded

        function, stage = self.function, self.stage
        operator = replace(function.operator, prepare=self._prepared)
        own = device_implementation(operator.name, _SERVED)
        if getattr(own, function.kind) is None:
            reason = "forward mode over forward mode is not provided for CUDA"
            raise unsupported(operator.name, f"implementation {own.name!r}: {reason}")
        chosen = adapted(operator.name, own, Recorded, stage.tensor, stage.stand_in)
        stand_ins = [stage.stand_in(t) for t in self.tensors]
        with recorded(self.recording):
            found = evaluate_by(
                chosen, operator, function.kind, stand_ins, self._options(), function.needed
            )
        wanted = list(compress(found, function.needed))
        if len(wanted) != len(self.results) or any([a is None for a in wanted]):
            raise RuntimeError(f"{function.text}: a result is missing")
        return [a for a in wanted if a is not None]

    def _options(self) -> Mapping[str, Any]:
        return {**self.function.parsed, "mask": None} if self.lowered else self.function.parsed

    def _prepared(self, inputs: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Validate a call, and put what was lowered on the device into it."""
        operator, stage = self.function.operator, self.stage
        more: dict[str, Any] = {}
        if options.get("layout") == PACKED:
            at = operator.inputs.index("q_starts")
            given: list[Any] = list(inputs)
            starts = [t for t in self._inputs()[at : at + 2] if t is not None]
            wide: list[Any] = [stage.stand_in(t.to(np.int64)) for t in starts]
            more["sequences"] = Sequences(wide[0], wide[-1])
            # Any boundaries that fit the sizes will do, for those that count are read later.
            for place, array in ((at, given[0]), (at + 1, given[1])):
                if given[place] is not None:
                    given[place] = np.full(given[place].shape, array.shape[1])
                    given[place][0] = 0
            inputs = given
        call = operator.prepare(inputs, options)
        if self.lowered:
            kind = RowIntervals if len(self.lowered) == 1 else PackedBits
            parts: list[Any] = [stage.stand_in(t) for t in self.lowered]
            return replace(call, mask=kind(*parts), **more)
        mask = getattr(call, "mask", None)
        if isinstance(mask, RowIntervals | PackedBits):
            for array in vars(mask).values():
                stage.place(array, self.recording.constant(array), max(array.nbytes, 1))
        return replace(call, **more) if more else call

    def _inputs(self) -> list[Recorded | None]:
        """Return the tensors of the operator's inputs."""
        first = self.function.first
        return self.tensors[first : first + len(self.function.operator.inputs)]

    def _with_boundaries(self, arguments: list[Any]) -> list[Any]:
        """Put safe boundaries of packed sequences into the arguments, and lower their mask."""
        function, arguments = self.function, list(arguments)
        names, first = function.operator.inputs, function.first
        q, k = arguments[first : first + 2]
        bias = arguments[first + names.index("bias")]
        if bias is not None and bias.shape[-1] != 1:
            reason = "takes no bias with a column for each key of packed sequences"
            raise unsupported(function.name, f"a program for CUDA {reason}")
        at = first + names.index("q_starts")
        for place, total in ((at, q.shape[1]), (at + 1, k.shape[1])):
            if arguments[place] is not None:
                arguments[place] = boundaries(arguments[place], total)
        starts = [a for a in arguments[at : at + 2] if a is not None]
        text = function.parsed["mask"]
        if text is not None:
            rows = packed_rows(text, starts[0], starts[-1], q.shape[1], function.name)
            self.lowered = [self._tensor(rows)]
        return arguments

    def _without_masks(self, arguments: list[Any]) -> list[Any]:
        """Lower a mask of arrays; return the arguments without them."""
        function, options = self.function, self.function.parsed
        names = function.operator.inputs
        places = [
            function.first + i
            for i, name in enumerate(names)
            if name.startswith("mask") and arguments[function.first + i] is not None
        ]
        if not places:
            return arguments
        q, k = arguments[function.first : function.first + 2]
        rows, heads = (2, 1) if options["layout"] == "bhnd" else (1, 2)
        sizes = q.shape[0], q.shape[heads], q.shape[rows], k.shape[rows]
        parts = mask_parts(options["mask"], [arguments[i] for i in places], sizes, function.name)
        self.lowered = [self._tensor(part) for part in parts]
        return [None if i in places else a for i, a in enumerate(arguments)]

    def _with_classes(self, arguments: list[Any]) -> list[Any]:
        """Put a class in place of targets that are none, and note which they are."""
        names, first = self.function.operator.inputs, self.function.first
        if "targets" not in names or arguments[first + names.index("targets")] is None:
            return arguments
        at = first + names.index("targets")
        # Of logits the classes are the second dimension, of a weight the first.
        logits, weight = arguments[first], arguments[first + 1]
        classes = weight.shape[0] if "hidden" in names else logits.shape[1]
        ignored = self.function.parsed["ignore_index"]
        arguments = list(arguments)
        arguments[at], self.wrong = class_targets(arguments[at], classes, ignored)
        return arguments

    def _marked(self, results: list[Any]) -> list[Any]:
        """Return results whose loss is NaN where a target was no class."""
        if self.wrong is None or self.function.kind != "forward":
            return results
        loss, *others = results
        wrong = self.wrong.any() if loss.ndim == 0 else self.wrong
        return [jnp.where(wrong, jnp.nan, loss), *others]

    def _words(self) -> dict[str, Recorded]:
        """Return where arguments lie that are known only when the program runs."""
        names = self.function.operator.inputs
        if "seed" not in names:
            return {}
        seed = self.tensors[self.function.first + names.index("seed")]
        return {} if seed is None else {"seed_low": seed[0], "seed_high": seed[1]}

    def _tensor(self, array: Any) -> Recorded:
        tensor = self.recording.argument(array.shape, np.dtype(array.dtype))
        self.arrays[id(tensor.buffer)] = array
        return tensor

    def _new(self, array: NDArray[Any]) -> Recorded:
        if array.size:
            raise RuntimeError(f"{self.function.text}: a stand-in of {array.dtype} was copied")
        return self.recording.empty(array.shape, array.dtype)


def _check(function: Function) -> None:
    """Raise where a function has no kernels, or programs cannot launch them."""
    name = function.parsed.get("implementation")
    if name not in (None, _SERVED):
        if name in TABLE[function.name] and name not in DEVICE:
            reason = "computes on the CPU, and the program is for CUDA"
        else:
            reason = "is not provided through JAX"
        raise unsupported(function.name, f"implementation {name!r}: {reason}")
    if _SERVED not in TABLE[function.name]:
        raise unsupported(function.name, "there are no kernels for CUDA yet")
    if not HANDLER:
        raise unsupported(function.name, f"programs for CUDA need the XLA handler, not {HOW}")


def _check_sizes(function: Function, arrays: Arrays) -> None:
    if not all([isinstance(n, int) for a in arrays for n in a.shape]):
        reason = "sizes must be known where a program is lowered for CUDA"
        raise unsupported(function.name, f"implementation {_SERVED!r}: {reason}")


def _encoder(operator: str, number: int) -> Encode:
    """Return what compiles recordings for an architecture."""
    prefix = f"implementation {_SERVED!r}: "
    if find_spec("triton") is None:
        reason = "needs the package triton, which is not installed, to lower for CUDA"
        raise unsupported(operator, prefix + reason)
    if device_implementation(operator, _SERVED).interprets:
        reason = "kernels are interpreted in this process; unset TRITON_INTERPRET"
        raise unsupported(operator, prefix + reason)
    from tilewise.shared.triton_programs import compiler, encoded

    return partial(encoded, number=number, compiled=compiler(number))


def _stand_in_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of a stand-in: integers have 64 bits, so that nothing widens them."""
    return np.dtype(np.int64) if dtype.kind in "iu" else dtype
