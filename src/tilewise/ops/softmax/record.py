"""The softmax as functions of flat tuples of arrays, from which the doors are made.

There are three operators of one mathematics: they differ in which results they return.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tilewise.base.operator import Arrays, FlatOperator, Implementation

from .spec import (
    CotangentCall,
    ForwardSecondCall,
    Needed,
    Problem,
    SecondCall,
    SoftmaxCall,
    SoftmaxOutputs,
    SoftmaxStats,
    TangentCall,
    Want,
    check_sink,
    check_temperature,
)

Array = NDArray[Any]
Shape = tuple[int, ...]
Kind = Literal["y", "log_y"] | None


def forward_into(
    chosen: Implementation, problem: Problem, want: Want, out: Array
) -> SoftmaxOutputs:
    """Run a forward pass that writes y or log_y into an array of the user's shape."""
    view = problem.rows.view(out)
    target = np.empty(problem.rows.sizes, out.dtype) if view is None else view
    found: SoftmaxOutputs = chosen.forward(problem.call, replace(want, out=target))
    if view is None:
        out[...] = problem.rows.back(target)
    return found


@dataclass(frozen=True)
class _Functions:
    """The functions of one operator.

    Attributes:
        name: Its name.
        kind: Which of its outputs has an entry for each of x, beside lse, which always is one.
    """

    name: str
    kind: Kind

    @cached_property
    def want(self) -> Want:
        """Return what its forward pass computes."""
        return Want(self.kind == "y", self.kind == "log_y", lse=True, stats=True)

    def shapes(self, inputs: Sequence[Shape | None], options: Any) -> tuple[Shape, ...]:
        """Return the shapes of outputs and residuals."""
        x = inputs[0]
        assert x is not None
        A, C, I = x
        return *([(A, C, I)] if self.kind else []), *[(A, I)] * 3

    def folds(self, kind: str, arrays: Sequence[Array | None], options: Any) -> bool:
        """Return whether A is a batch: nothing repeats over it."""
        start = FLAT[self.name].first[kind]
        x, *others = arrays[start : start + 3]
        assert x is not None
        batch = x.ndim - 3
        return all([a is None or a.shape[batch] == x.shape[batch] for a in others])

    def prepare(self, inputs: Sequence[Array | None], options: Mapping[str, Any]) -> SoftmaxCall:
        """Validate a call; `where` may be 1 in place of A, C and I."""
        x, sink, where = (*inputs, None, None)[:3]
        assert x is not None
        if sink is not None:
            check_sink(self.name, sink)
        if where is not None:
            where = np.broadcast_to(where, x.shape)
        temperature = check_temperature(self.name, options["temperature"])
        return SoftmaxCall(x, where, sink, temperature)

    def forward(self, chosen: Implementation, call: SoftmaxCall, needed: Any) -> Arrays:
        """Return y or log_y, then lse, m, log_l."""
        found: SoftmaxOutputs = chosen.forward(call, self.want)
        assert found.stats is not None
        return self._outputs(found.y, found.log_y, found.lse) + tuple(found.stats)

    def vjp(
        self,
        chosen: Implementation,
        call: SoftmaxCall,
        needed: Sequence[bool],
        cotangents: Arrays,
        outputs: Arrays,
        residuals: Sequence[Any],
    ) -> Arrays:
        """Return dx and dsink."""
        return tuple(chosen.vjp(call, self._cotangents(cotangents, residuals), Needed(*needed)))

    def jvp(
        self,
        chosen: Implementation,
        call: SoftmaxCall,
        needed: Sequence[bool],
        tangents: Sequence[Any],
        outputs: Arrays,
        residuals: Sequence[Any],
    ) -> Arrays:
        """Return the tangents of the outputs."""
        assert chosen.jvp is not None
        tx, tsink = tangents
        given = TangentCall(tx, tsink, SoftmaxStats(*residuals))
        return self._outputs(*chosen.jvp(call, given, self.want))

    def vjp_jvp(
        self,
        chosen: Implementation,
        call: SoftmaxCall,
        needed: Sequence[bool],
        cotangent_tangents: Arrays,
        tangents: Sequence[Any],
        cotangents: Arrays,
        output_tangents: Arrays,
        outputs: Arrays,
        residuals: Sequence[Any],
    ) -> Arrays:
        """Return the tangents of dx and dsink."""
        assert chosen.vjp_jvp is not None
        tx, tsink = tangents
        second = SecondCall(
            self._cotangents(cotangents, residuals),
            TangentCall(tx, tsink, SoftmaxStats(*residuals)),
            *self._of_outputs(cotangent_tangents),
        )
        return tuple(chosen.vjp_jvp(call, second, Needed(*needed)))

    def jvp_jvp(
        self,
        chosen: Implementation,
        call: SoftmaxCall,
        needed: Sequence[bool],
        seconds: Sequence[Any],
        others: Sequence[Any],
        tangents: Sequence[Any],
        output_tangents: Arrays,
        other_output_tangents: Arrays,
        outputs: Arrays,
        residuals: Sequence[Any],
    ) -> Arrays:
        """Return the tangents of the output tangents."""
        assert chosen.jvp_jvp is not None
        stats = SoftmaxStats(*residuals)
        t, u, w = (TangentCall(tx, tz, stats) for tx, tz in (tangents, others, seconds))
        return self._outputs(*chosen.jvp_jvp(call, ForwardSecondCall(t, u, w), self.want))

    def _cotangents(self, cotangents: Arrays, residuals: Sequence[Any]) -> CotangentCall:
        return CotangentCall(*self._of_outputs(cotangents), SoftmaxStats(*residuals))

    def _of_outputs(self, given: Arrays) -> tuple[Array | None, Array | None, Array | None]:
        """Return what belongs to y, log_y and lse, of what belongs to the outputs."""
        whole = given[0] if self.kind else None
        y, log_y = (whole if self.kind == kind else None for kind in ("y", "log_y"))
        return y, log_y, given[-1]

    def _outputs(self, y: Array | None, log_y: Array | None, lse: Array | None) -> Arrays:
        whole = y if self.kind == "y" else log_y
        return (whole, lse) if self.kind else (lse,)


def _flat(name: str, kind: Kind) -> FlatOperator:
    functions = _Functions(name, kind)
    outputs = ("lse",) if kind is None else (kind, "lse")
    return FlatOperator(
        name=name,
        inputs=("x", "sink", "where"),
        active_inputs=2,
        outputs=outputs,
        active_outputs=len(outputs),
        residuals=SoftmaxStats._fields,
        narrow_residuals=0,
        narrow_outputs=len(outputs) - 1,
        rank=3,
        shapes=functions.shapes,
        folds=functions.folds,
        prepare=functions.prepare,
        forward=functions.forward,
        vjp=functions.vjp,
        jvp=functions.jvp,
        vjp_jvp=functions.vjp_jvp,
        output_tangents=False,
        read_outputs=(),
        jvp_jvp=functions.jvp_jvp,
        strided=True,
    )


KINDS: Mapping[str, Kind] = {"softmax": "y", "log_softmax": "log_y", "logsumexp": None}
"""Which output with an entry for each of x an operator has, beside the log-sum-exp of each row."""

FLAT = {name: _flat(name, kind) for name, kind in KINDS.items()}
