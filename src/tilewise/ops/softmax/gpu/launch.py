"""Launches the kernels of the softmax on the tensors of a validated call.

The arrays of such a call are tensors of a framework here: with `shape`, `stride()`, `dtype`,
`new_empty`, `expand`, `float` and `contiguous`, as those of PyTorch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tilewise.base.errors import unsupported
from tilewise.base.operator import Implementation
from tilewise.ops.softmax.spec import (
    ALL_NEEDED,
    CotangentCall,
    Needed,
    SecondCall,
    SoftmaxCall,
    SoftmaxGrads,
    SoftmaxOutputs,
    SoftmaxStats,
    SoftmaxTangents,
    TangentCall,
    Want,
)
from tilewise.shared.row_tiles import (
    RowTiles,
    Tensor,
    dense,
    empty,
    merge_plan,
    row_sizes,
    side_by_side,
    whole_strides,
    wide_like,
)
from tilewise.shared.triton_launch import INTERPRETS, launch, refuses_arrays
from tilewise.shared.triton_rows import sum_parts_kernel

from .kernels import softmax_derivative_kernel, softmax_fwd_kernel, softmax_merge_kernel
from .plan import tiles


def forward(call: SoftmaxCall, want: Want) -> SoftmaxOutputs:
    """Compute the results that are wanted; lse and row statistics come with each."""
    at = _Rows(call, log=_is_log(want.y, want.log_y))
    cut = at.tiles("forward")
    y = None
    if want.y or want.log_y:
        y = at.whole() if want.out is None else want.out
    rows = {"lse_ptr": at.rows(), "m_ptr": at.rows(), "log_l_ptr": at.rows()}
    given = {**at.arguments(cut, y, "y"), "y_ptr": y, **rows}
    plan = cut.launch(at.A, at.I)
    if cut.parts == 1:
        launch(softmax_fwd_kernel, plan, {**given, "parts_ptr": None, "PHASE": "whole"})
    else:
        parts = at.parts(2, cut)
        launch(softmax_fwd_kernel, plan, {**given, "parts_ptr": parts, "PHASE": "sums"})
        merged = {"parts_ptr": parts, "n_rows": at.n_rows, "n_parts": cut.parts}
        merge = merge_plan(at.n_rows, 1)
        merge = replace(merge, grid=merge.grid[:1])
        scale = {"sink_ptr": at.sink, "scale": at.scale}
        launch(softmax_merge_kernel, merge, {**merged, **scale, **rows})
        if y is not None:
            launch(softmax_fwd_kernel, plan, {**given, "parts_ptr": None, "PHASE": "write"})
    lse, m, log_l = rows.values()
    y, log_y = (None, y) if at.log else (y, None)
    return SoftmaxOutputs(y, log_y, lse if want.lse else None, SoftmaxStats(m, log_l))


def vjp(call: SoftmaxCall, cotangents: CotangentCall, needed: Needed = ALL_NEEDED) -> SoftmaxGrads:
    """Compute the gradients that are needed."""
    at = _Rows(call, log=_is_log(cotangents.dy, cotangents.dlog_y))
    out = at.whole() if needed.x else None
    of_rows = at.rows() if needed.sink and at.sink is not None else None
    _derivative(at, "vjp", out, of_rows, cotangents=cotangents)
    return SoftmaxGrads(out, of_rows)


def jvp(call: SoftmaxCall, tangents: TangentCall, want: Want) -> SoftmaxTangents:
    """Compute the tangents of the results that are wanted."""
    at = _Rows(call, log=_is_log(want.y, want.log_y))
    out = at.whole() if want.y or want.log_y else None
    of_rows = at.rows() if want.lse else None
    _derivative(at, "jvp", out, of_rows, tangents=tangents)
    ty, tlog_y = (None, out) if at.log else (out, None)
    return SoftmaxTangents(ty, tlog_y, of_rows)


def vjp_jvp(call: SoftmaxCall, second: SecondCall, needed: Needed = ALL_NEEDED) -> SoftmaxGrads:
    """Compute the tangents of the gradients that are needed."""
    given = second.cotangents
    logs = [x for x in (given.dlog_y, second.tdlog_y) if x is not None]
    plain = [x for x in (given.dy, second.tdy) if x is not None]
    at = _Rows(call, log=_is_log(plain, logs))
    out = at.whole() if needed.x else None
    of_rows = at.rows() if needed.sink and at.sink is not None else None
    _derivative(at, "vjp_jvp", out, of_rows, given, second.tangents, second)
    return SoftmaxGrads(out, of_rows)


def _is_log(y: Any, log_y: Any) -> bool:
    """Return whether a call is about log_y, and not about y; the kernels know one of them."""
    first, second = (x is not None and x is not False and x != [] for x in (y, log_y))
    if first and second:
        raise unsupported("softmax", "implementation 'triton': y and log_y are two calls")
    return second


class _Rows:
    """The rows of one call on the device.

    Attributes:
        x: `(A, C, I)`.
        log: Whether the result with an entry for each of x is log_y.
    """

    def __init__(self, call: SoftmaxCall, *, log: bool) -> None:
        self.x, self.where, self.log = call.x, call.where, log
        (self.sink,) = dense(call.sink)
        self.scale = 1.0 / call.temperature
        self.A, self.C, self.I = call.x.shape
        self.wide = wide_like(call.x)

    @property
    def n_rows(self) -> int:
        """Return how many rows there are."""
        return int(self.A * self.I)

    def tiles(self, kind: str) -> RowTiles:
        """Return the tiles for one of the functions."""
        return tiles(kind, self.C, side_by_side(self.x), self.x.dtype.itemsize)

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
            "LOG": self.log,
        }

    def parts(self, sums: int, cut: RowTiles) -> Tensor:
        """Return memory for sums of each part of each row."""
        return empty((sums, cut.parts, self.n_rows), self.wide)


def _derivative(
    at: _Rows,
    kind: str,
    out: Tensor | None,
    of_rows: Tensor | None,
    cotangents: CotangentCall | None = None,
    tangents: TangentCall | None = None,
    moved: SecondCall | None = None,
) -> None:
    """Write the results of "vjp", "jvp" or "vjp_jvp": one of entries, one of rows."""
    given = cotangents or tangents
    assert given is not None
    dy, dlse = (None, None) if cotangents is None else _of_outputs(at, cotangents, "d")
    tdy, tdlse = (None, None) if moved is None else _of_outputs(at, moved, "td")
    tx, tsink = (None, None) if tangents is None else (tangents.tx, tangents.tsink)
    cut = at.tiles(kind)
    arguments = {
        **at.arguments(cut, out, "out"),
        **_entries(cut, {"dy": dy, "tx": tx, "tdy": tdy}),
        **_numbers({"m": given.stats.m, "log_l": given.stats.log_l}),
        **_numbers({"dlse": dlse, "tsink": tsink, "tdlse": tdlse}),
        "out_ptr": out,
        "out_row_ptr": of_rows,
        "KIND": kind,
    }
    sums = None if cut.parts == 1 else _long(at, cut, arguments, second=kind == "vjp_jvp")
    phase = "whole" if sums is None else "write"
    arguments |= {"parts_ptr": None, "sums_ptr": sums, "PHASE": phase}
    launch(softmax_derivative_kernel, cut.launch(at.A, at.I), arguments)


def _of_outputs(at: _Rows, given: Any, prefix: str) -> tuple[Tensor | None, Tensor | None]:
    """Return what belongs to y or log_y, and to lse."""
    whole = f"{prefix}log_y" if at.log else f"{prefix}y"
    return getattr(given, whole), getattr(given, f"{prefix}lse")


def _long(at: _Rows, cut: RowTiles, given: dict[str, Any], *, second: bool) -> Tensor:
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


def _entries(cut: RowTiles, tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        found |= {f"{name}_ptr": tensor, **whole_strides(name, tensor, inner=cut.inner)}
    return found


def _numbers(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {f"{name}_ptr": dense(tensor)[0] for name, tensor in tensors.items()}


def refuses(call: SoftmaxCall) -> str | None:
    """Return why a call is not served, or None."""
    return refuses_arrays(call.x)


IMPLEMENTATION = Implementation(
    "triton",
    forward,
    vjp,
    jvp,
    vjp_jvp,
    refuses=refuses,
    interprets=INTERPRETS,
)
