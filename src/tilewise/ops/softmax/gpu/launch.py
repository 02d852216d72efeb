"""The softmax on a GPU: allocates results and launches the kernels of a validated call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tilewise.shared.launch import LaunchPlan
from tilewise.shared.row_tiles import (
    RowTiles,
    Tensor,
    dense,
    empty,
    launch,
    merge_plan,
    row_sizes,
    whole_strides,
    wide_like,
)
from tilewise.shared.triton_rows import sum_parts_kernel

from .kernels import softmax_derivative_kernel, softmax_fwd_kernel, softmax_merge_kernel
from .plan import tiles

Tensors = tuple[Tensor | None, ...]


class Rows:
    """The rows of one call on the device.

    Attributes:
        x: `(A, C, I)`.
        kind: "y", "log_y" or None: which result has an entry for each of x.
    """

    def __init__(self, call: Any, kind: str | None, inputs: Sequence[Tensor | None]) -> None:
        x, sink, where = (*inputs, None, None)[:3]
        assert x is not None
        self.x, self.kind = x, kind
        self.where = None if where is None else where.expand(x.shape)
        (self.sink,) = dense(sink)
        self.scale = 1.0 / call.temperature
        self.A, self.C, self.I = x.shape
        self.wide = wide_like(x)

    @property
    def n_rows(self) -> int:
        """Return how many rows there are."""
        return int(self.A * self.I)

    def tiles(self, kind: str) -> RowTiles:
        """Return the tiles for one of the functions."""
        return tiles(kind, self.C, self.I, self.x.dtype.itemsize)

    def rows(self) -> Tensor:
        """Return memory for a number of each row."""
        return empty((self.A, self.I), self.wide)

    def whole(self) -> Tensor:
        """Return memory for a result with an entry for each of x."""
        return empty((self.A, self.C, self.I), self.x)

    def arguments(self, cut: RowTiles, out: Tensor | None, prefix: str) -> dict[str, Any]:
        """Return what all kernels that read x take, and the strides of their result."""
        return {
            "x_ptr": self.x,
            "where_ptr": self.where,
            "sink_ptr": self.sink,
            **row_sizes(self.A, self.C, self.I, inner=cut.inner),
            **whole_strides("x", self.x, inner=cut.inner),
            **whole_strides("w", self.where, inner=cut.inner),
            **whole_strides(prefix, out, inner=cut.inner),
            "scale": self.scale,
            "LOG": self.kind == "log_y",
        }

    def parts(self, sums: int, cut: RowTiles) -> Tensor:
        """Return memory for sums of each part of each row."""
        return empty((sums, cut.parts, self.n_rows), self.wide)


def forward(call: Any, kind: str | None, inputs: Sequence[Tensor | None]) -> Tensors:
    """Return y or log_y, or None of `kind` None, then lse, m and log_l."""
    at = Rows(call, kind, inputs)
    cut = at.tiles("forward")
    y = at.whole() if kind else None
    rows = {"lse_ptr": at.rows(), "m_ptr": at.rows(), "log_l_ptr": at.rows()}
    given = {**at.arguments(cut, y, "y"), "y_ptr": y, **rows}
    plan = cut.launch(at.A, at.I)
    if cut.parts == 1:
        launch(softmax_fwd_kernel, plan, {**given, "parts_ptr": None, "PHASE": "whole"})
        return y, *rows.values()
    parts = at.parts(2, cut)
    launch(softmax_fwd_kernel, plan, {**given, "parts_ptr": parts, "PHASE": "sums"})
    merged = {"parts_ptr": parts, "n_rows": at.n_rows, "n_parts": cut.parts, "scale": at.scale}
    launch(softmax_merge_kernel, _merge(at), {**merged, "sink_ptr": at.sink, **rows})
    if y is not None:
        launch(softmax_fwd_kernel, plan, {**given, "parts_ptr": None, "PHASE": "write"})
    return y, *rows.values()


def derivative(
    call: Any,
    kind: str | None,
    function: str,
    inputs: Sequence[Tensor | None],
    stats: Sequence[Tensor],
    *,
    needed: Sequence[bool],
    cotangents: Sequence[Tensor | None] = (None, None),
    tangents: Sequence[Tensor | None] = (None, None),
    moved: Sequence[Tensor | None] = (None, None),
) -> Tensors:
    """Run "vjp", "jvp" or "vjp_jvp".

    Args:
        call: The validated call.
        kind: "y", "log_y" or None.
        function: Which derivative.
        inputs: x, sink, where.
        stats: m and log_l.
        needed: Whether the result with an entry for each of x, and that of rows, are needed.
        cotangents: Of y or log_y, and of lse.
        tangents: Of x and of the sink.
        moved: Tangents of the cotangents.

    Returns:
        dx and dsink, or the tangents of y or log_y and of lse.
    """
    at = Rows(call, kind, inputs)
    cut = at.tiles(function)
    jvp = function == "jvp"
    out = at.whole() if needed[0] and (kind or not jvp) else None
    of_rows = at.rows() if needed[1] and (jvp or at.sink is not None) else None
    given = {
        **at.arguments(cut, out, "out"),
        **_entries(cut, {"dy": cotangents[0], "tx": tangents[0], "tdy": moved[0]}),
        **_rows({"m": stats[0], "log_l": stats[1], "dlse": cotangents[1]}),
        **_rows({"tsink": tangents[1], "tdlse": moved[1]}),
        "out_ptr": out,
        "out_row_ptr": of_rows,
        "KIND": function,
    }
    sums = None if cut.parts == 1 else _long(at, cut, given, second=function == "vjp_jvp")
    phase = "whole" if sums is None else "write"
    given |= {"parts_ptr": None, "sums_ptr": sums, "PHASE": phase}
    launch(softmax_derivative_kernel, cut.launch(at.A, at.I), given)
    return out, of_rows


def _long(at: Rows, cut: RowTiles, given: dict[str, Any], *, second: bool) -> Tensor:
    """Return the sums of rows of several parts: mu, c and tc."""
    sums = empty((3, at.n_rows), at.wide)
    plan = cut.launch(at.A, at.I)
    parts = at.parts(2, cut)
    first = {**given, "parts_ptr": parts, "sums_ptr": None, "PHASE": "sums"}
    launch(softmax_derivative_kernel, plan, first)
    merged = {"n_rows": at.n_rows, "n_parts": cut.parts}
    launch(
        sum_parts_kernel,
        merge_plan(at.n_rows, 2),
        {"parts_ptr": parts, "total_ptr": sums, **merged},
    )
    if second:
        again = {**given, "parts_ptr": parts, "sums_ptr": sums, "PHASE": "second"}
        launch(softmax_derivative_kernel, plan, again)
        total = {"parts_ptr": parts, "total_ptr": sums[2], **merged}
        launch(sum_parts_kernel, merge_plan(at.n_rows, 1), total)
    return sums


def _merge(at: Rows) -> LaunchPlan:
    plan = merge_plan(at.n_rows, 1)
    return replace(plan, grid=plan.grid[:1])


def _entries(cut: RowTiles, tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        found |= {f"{name}_ptr": tensor, **whole_strides(name, tensor, inner=cut.inner)}
    return found


def _rows(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {f"{name}_ptr": dense(tensor)[0] for name, tensor in tensors.items()}
