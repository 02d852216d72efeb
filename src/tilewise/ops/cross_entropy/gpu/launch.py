"""Launches the kernels of the cross-entropy on the tensors of a validated call.

The arrays of such a call are tensors of a framework here: with `shape`, `stride()`, `dtype`,
`new_empty`, `to`, `float`, `double` and `contiguous`, as those of PyTorch. Losses are reduced on
the device, and cotangents are those of reduced losses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tilewise.base.operator import Implementation
from tilewise.ops.cross_entropy.spec import (
    ALL_NEEDED,
    Cotangents,
    EntropyCall,
    EntropyGrads,
    EntropyOutputs,
    EntropyStats,
    EntropyTangents,
    Needed,
    SecondCall,
    Tangents,
)
from tilewise.shared.row_tiles import (
    RowTiles,
    Tensor,
    dense,
    empty,
    merge_plan,
    reduction_plan,
    row_sizes,
    side_by_side,
    whole_strides,
    wide_like,
)
from tilewise.shared.triton_launch import INTERPRETS, launch, refuses_arrays
from tilewise.shared.triton_losses import mean_factor_kernel, reduce_rows_kernel
from tilewise.shared.triton_rows import sum_parts_kernel

from .kernels import (
    cross_entropy_derivative_kernel,
    cross_entropy_fwd_kernel,
    cross_entropy_merge_kernel,
)
from .plan import tiles

_NO_COTANGENTS = Cotangents()
_NO_TANGENTS = Tangents()


def forward(call: EntropyCall, want: None = None) -> EntropyOutputs:
    """Compute the reduced loss and z-loss, and lse and statistics of each row."""
    at = _Rows(call)
    cut = at.tiles("forward")
    names = ("loss", "lse", "z_loss", "m", "log_l", "total")
    rows = {f"{name}_ptr": at.rows() for name in names}
    parts = None if cut.parts == 1 else at.rows(4, cut.parts)
    phase = "whole" if parts is None else "sums"
    given = {**at.arguments(cut), **rows, "parts_ptr": parts, "PHASE": phase}
    launch(cross_entropy_fwd_kernel, cut.launch(at.A, at.I), given)
    if parts is not None:
        shared = ("targets_ptr", "ignored", "zeta", "SQUARED")
        merged = {name: given[name] for name in shared} | {"parts_ptr": parts, **rows}
        plan = merge_plan(at.n_rows, 1)
        plan = replace(plan, grid=plan.grid[:1])
        sizes = {"n_rows": at.n_rows, "n_parts": cut.parts}
        launch(cross_entropy_merge_kernel, plan, {**merged, **sizes})
    loss, lse, z_loss, *stats = rows.values()
    loss, z_loss = at.reduced(loss, z_loss)
    return EntropyOutputs(loss, lse, z_loss, EntropyStats(*stats))


def vjp(
    call: EntropyCall,
    cotangents: Cotangents,
    stats: EntropyStats,
    needed: Needed = ALL_NEEDED,
    out: Tensor | None = None,
) -> EntropyGrads:
    """Compute the gradients that are needed; `out` takes that of the logits, and may be these."""
    at = _Rows(call)
    given = {**_cotangents("g", cotangents), **_cotangents("tg", _NO_COTANGENTS)}
    return _gradients(at, "vjp", stats, _NO_TANGENTS, given, needed, out)


def jvp(call: EntropyCall, tangents: Tangents, stats: EntropyStats) -> EntropyTangents:
    """Compute the tangents of the reduced loss and z-loss, and of lse."""
    at = _Rows(call)
    cut = at.tiles("jvp")
    rows = {f"{name}_ptr": at.rows() for name in ("tloss", "tlse", "tz_loss")}
    given = _derivative(at, cut, "jvp", stats, tangents) | rows
    _run(at, cut, given, summed=True)
    tloss, tlse, tz_loss = rows.values()
    tloss, tz_loss = at.reduced(tloss, tz_loss)
    return EntropyTangents(tloss, tlse, tz_loss)


def vjp_jvp(
    call: EntropyCall, second: SecondCall, stats: EntropyStats, needed: Needed = ALL_NEEDED
) -> EntropyGrads:
    """Compute the tangents of the gradients that are needed."""
    at = _Rows(call)
    given = {**_cotangents("g", second.cotangents), **_cotangents("tg", second.moved)}
    return _gradients(at, "vjp_jvp", stats, second.tangents, given, needed, None)


class _Rows:
    """The rows of one call on the device.

    Attributes:
        x: `(A, C, I)`, the logits.
        q: `(A, C, I)`, class probabilities, or None.
        n_rows: How many rows there are.
    """

    def __init__(self, call: EntropyCall) -> None:
        self.x, self.q, self.options = call.logits, call.probabilities, call.options
        self.A, self.C, self.I = self.x.shape
        self.n_rows = int(self.A * self.I)
        self.wide = wide_like(self.x)
        (self.targets,) = dense(call.targets)
        weight: Tensor | None = call.weight
        if weight is not None:
            weight = weight.to(self.wide.dtype).contiguous()
        self.weight = weight

    def tiles(self, kind: str) -> RowTiles:
        """Return the tiles for one of the functions."""
        return tiles(kind, self.C, side_by_side(self.x), self.x.dtype.itemsize)

    def rows(self, *first: int) -> Tensor:
        """Return memory for a number of each row."""
        return empty((*first, self.A, self.I), self.wide)

    def arguments(self, cut: RowTiles) -> dict[str, Any]:
        """Return what all kernels that read the logits take."""
        options, cap = self.options, self.options.softcap
        return {
            "x_ptr": self.x,
            "q_ptr": self.q,
            "targets_ptr": self.targets,
            "weight_ptr": self.weight,
            **row_sizes(self.A, self.C, self.I, inner=cut.inner),
            **whole_strides("x", self.x, inner=cut.inner),
            **whole_strides("q", self.q, inner=cut.inner),
            "ignored": options.ignore_index,
            "sharp": 1.0 - options.label_smoothing,
            "share": options.label_smoothing / self.C,
            "zeta": options.z_loss,
            "cap": 1.0 if cap is None else cap,
            "CAPPED": cap is not None,
            "SQUARED": options.z_loss != 0,
        }

    def scale(self) -> Tensor | None:
        """Return what the reduction multiplies sums by, `(1,)` in float64, or None for 1."""
        if self.options.reduction != "mean":
            return None
        scale = self.wide.double().new_empty(1)
        if self.targets is None:
            return scale.fill_(1.0 / self.n_rows if self.n_rows else 0.0)
        given = {"targets_ptr": self.targets, "weight_ptr": self.weight, "scale_ptr": scale}
        sizes = {"n_rows": self.n_rows, "classes": self.C, "ignored": self.options.ignore_index}
        launch(mean_factor_kernel, reduction_plan(), {**given, **sizes, "ANY": True})
        return scale

    def reduced(self, loss: Tensor, z_loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and z-losses of rows as the reduction makes them."""
        if self.options.reduction == "none":
            return loss, z_loss
        totals = empty((), self.wide), empty((), self.wide)
        given = {"loss_ptr": loss, "z_loss_ptr": z_loss, "scale_ptr": self.scale()}
        given |= {"loss_total_ptr": totals[0], "z_loss_total_ptr": totals[1]}
        launch(reduce_rows_kernel, reduction_plan(), {**given, "n_rows": self.n_rows})
        return totals


def _gradients(
    at: _Rows,
    kind: str,
    stats: EntropyStats,
    tangents: Tangents,
    cotangents: dict[str, Tensor | None],
    needed: Needed,
    out: Tensor | None,
) -> EntropyGrads:
    """Run "vjp" or "vjp_jvp"."""
    cut = at.tiles(kind)
    dx = dq = None
    if needed.logits:
        dx = empty(tuple(at.x.shape), at.x) if out is None else out
    if needed.targets and at.q is not None:
        dq = empty(tuple(at.q.shape), at.q)
    given = {
        **_derivative(at, cut, kind, stats, tangents),
        **cotangents,
        "scale_ptr": at.scale(),
        "loss_step": int(at.options.reduction == "none"),
        "dx_ptr": dx,
        "dq_ptr": dq,
        **whole_strides("dx", dx, inner=cut.inner),
        **whole_strides("dq", dq, inner=cut.inner),
    }
    _run(at, cut, given, summed=kind == "vjp_jvp")
    return EntropyGrads(dx, dq)


def _derivative(
    at: _Rows,
    cut: RowTiles,
    kind: str,
    stats: EntropyStats,
    tangents: Tangents,
) -> dict[str, Any]:
    """Return what all derivatives take, with None for what only some do."""
    m, log_l, total = dense(*stats)
    tx, tq = tangents
    absent = ("dx_ptr", "dq_ptr", "tloss_ptr", "tlse_ptr", "tz_loss_ptr", "scale_ptr")
    return {
        **at.arguments(cut),
        "m_ptr": m,
        "log_l_ptr": log_l,
        "total_ptr": total,
        "tx_ptr": tx,
        "tq_ptr": tq,
        **whole_strides("tx", tx, inner=cut.inner),
        **whole_strides("tq", tq, inner=cut.inner),
        **whole_strides("dx", None, inner=cut.inner),
        **whole_strides("dq", None, inner=cut.inner),
        **_cotangents("g", _NO_COTANGENTS),
        **_cotangents("tg", _NO_COTANGENTS),
        **dict.fromkeys(absent),
        "loss_step": 0,
        "KIND": kind,
    }


def _run(at: _Rows, cut: RowTiles, given: dict[str, Any], *, summed: bool) -> None:
    """Launch a derivative, which reads sums of whole rows where `summed`."""
    plan = cut.launch(at.A, at.I)
    nothing = {"parts_ptr": None, "sums_ptr": None}
    if cut.parts == 1 or not summed:
        launch(cross_entropy_derivative_kernel, plan, {**given, **nothing, "PHASE": "whole"})
        return
    parts, sums = at.rows(3, cut.parts), at.rows(3)
    first = {**given, "parts_ptr": parts, "sums_ptr": None, "PHASE": "sums"}
    launch(cross_entropy_derivative_kernel, plan, first)
    merged = {"n_rows": at.n_rows, "n_parts": cut.parts}
    total = {"parts_ptr": parts, "total_ptr": sums, **merged}
    launch(sum_parts_kernel, merge_plan(at.n_rows, 3), total)
    if given["KIND"] == "jvp":  # numbers of rows alone, which need no second look at the logits
        plan = replace(plan, grid=(plan.grid[0], 1))
    second = {**given, **nothing, "sums_ptr": sums, "PHASE": "write"}
    launch(cross_entropy_derivative_kernel, plan, second)


def _cotangents(prefix: str, given: Cotangents) -> dict[str, Tensor | None]:
    loss, lse, z_loss = dense(*given)
    return {f"{prefix}_ptr": loss, f"{prefix}_lse_ptr": lse, f"{prefix}_z_ptr": z_loss}


def refuses(call: EntropyCall) -> str | None:
    """Return why a call is not served, or None."""
    return refuses_arrays(call.logits)


IMPLEMENTATION = Implementation(
    "triton",
    forward,
    vjp,
    jvp,
    vjp_jvp,
    refuses=refuses,
    reduces=True,
    interprets=INTERPRETS,
)
