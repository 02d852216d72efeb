"""The cross-entropy on a GPU: allocates results and launches the kernels of a validated call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tilewise.shared.row_tiles import (
    RowTiles,
    Tensor,
    dense,
    empty,
    launch,
    merge_plan,
    reduction_plan,
    row_sizes,
    whole_strides,
    wide_like,
)
from tilewise.shared.triton_losses import mean_factor_kernel, reduce_rows_kernel
from tilewise.shared.triton_rows import sum_parts_kernel

from .kernels import (
    cross_entropy_derivative_kernel,
    cross_entropy_fwd_kernel,
    cross_entropy_merge_kernel,
)
from .plan import tiles

Tensors = tuple[Tensor | None, ...]


class Rows:
    """The rows of one call on the device.

    Attributes:
        x: `(A, C, I)`, the logits.
        q: `(A, C, I)`, class probabilities, or None.
        n_rows: How many rows there are.
    """

    def __init__(self, options: Any, inputs: Sequence[Tensor | None]) -> None:
        x, q, targets, weight = (*inputs, None, None, None)[:4]
        assert x is not None
        self.x, self.q, self.options = x, q, options
        self.A, self.C, self.I = x.shape
        self.n_rows = int(self.A * self.I)
        self.wide = wide_like(x)
        self.targets = None if targets is None else targets.long().contiguous()
        self.weight = None if weight is None else weight.to(self.wide.dtype).contiguous()

    def tiles(self, kind: str) -> RowTiles:
        """Return the tiles for one of the functions."""
        return tiles(kind, self.C, self.I, self.x.dtype.itemsize)

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


def forward(options: Any, inputs: Sequence[Tensor | None]) -> Tensors:
    """Return loss, lse and z_loss, then m, log_l and total.

    Args:
        options: The options of the call.
        inputs: Logits, class probabilities, class indices, class weights.
    """
    at = Rows(options, inputs)
    cut = at.tiles("forward")
    rows = {"loss_ptr": at.rows(), "lse_ptr": at.rows(), "z_loss_ptr": at.rows()}
    rows |= {"m_ptr": at.rows(), "log_l_ptr": at.rows(), "total_ptr": at.rows()}
    parts = None if cut.parts == 1 else at.rows(4, cut.parts)
    phase = "whole" if parts is None else "sums"
    given = {**at.arguments(cut), **rows, "parts_ptr": parts, "PHASE": phase}
    launch(cross_entropy_fwd_kernel, cut.launch(at.A, at.I), given)
    if parts is not None:
        names = ("targets_ptr", "ignored", "zeta", "SQUARED")
        merged = {name: given[name] for name in names} | {"parts_ptr": parts, **rows}
        plan = merge_plan(at.n_rows, 1)
        plan = replace(plan, grid=plan.grid[:1])
        sizes = {"n_rows": at.n_rows, "n_parts": cut.parts}
        launch(cross_entropy_merge_kernel, plan, {**merged, **sizes})
    loss, z_loss = at.reduced(rows["loss_ptr"], rows["z_loss_ptr"])
    return loss, rows["lse_ptr"], z_loss, rows["m_ptr"], rows["log_l_ptr"], rows["total_ptr"]


def gradients(
    options: Any,
    function: str,
    inputs: Sequence[Tensor | None],
    stats: Sequence[Tensor],
    *,
    needed: Sequence[bool],
    cotangents: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None] = (None, None),
    moved: Sequence[Tensor | None] = (None, None, None),
    out: Tensor | None = None,
) -> Tensors:
    """Run "vjp" or "vjp_jvp": return the gradients by logits and class probabilities.

    Args:
        options: The options of the call.
        function: Which derivative.
        inputs: Logits, class probabilities, class indices, class weights.
        stats: m, log_l and total.
        needed: Which of the two are needed.
        cotangents: Of loss, lse and z_loss; of reduced ones where they are.
        tangents: Of logits and class probabilities.
        moved: Tangents of the cotangents.
        out: Where the gradient by the logits is written; may be these.
    """
    at = Rows(options, inputs)
    cut = at.tiles(function)
    dx = dq = None
    if needed[0]:
        dx = empty(tuple(at.x.shape), at.x) if out is None else out
    if needed[1] and at.q is not None:
        dq = empty(tuple(at.q.shape), at.q)
    given = {
        **_derivative(at, cut, function, stats, tangents),
        **_cotangents("g", cotangents),
        **_cotangents("tg", moved),
        "scale_ptr": at.scale(),
        "loss_step": int(options.reduction == "none"),
        "dx_ptr": dx,
        "dq_ptr": dq,
        **whole_strides("dx", dx, inner=cut.inner),
        **whole_strides("dq", dq, inner=cut.inner),
    }
    _run(at, cut, given, summed=function == "vjp_jvp")
    return dx, dq


def jvp(
    options: Any,
    inputs: Sequence[Tensor | None],
    stats: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
) -> Tensors:
    """Return the tangents of loss, lse and z_loss."""
    at = Rows(options, inputs)
    cut = at.tiles("jvp")
    tloss, tlse, tz_loss = at.rows(), at.rows(), at.rows()
    given = {
        **_derivative(at, cut, "jvp", stats, tangents),
        "tloss_ptr": tloss,
        "tlse_ptr": tlse,
        "tz_loss_ptr": tz_loss,
    }
    _run(at, cut, given, summed=True)
    tloss, tz_loss = at.reduced(tloss, tz_loss)
    return tloss, tlse, tz_loss


def _derivative(
    at: Rows,
    cut: RowTiles,
    kind: str,
    stats: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
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
        **_cotangents("g", (None, None, None)),
        **_cotangents("tg", (None, None, None)),
        **dict.fromkeys(absent),
        "loss_step": 0,
        "KIND": kind,
    }


def _run(at: Rows, cut: RowTiles, given: dict[str, Any], *, summed: bool) -> None:
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


def _cotangents(prefix: str, given: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    loss, lse, z_loss = dense(*given)
    return {f"{prefix}_ptr": loss, f"{prefix}_lse_ptr": lse, f"{prefix}_z_ptr": z_loss}
