"""Launches the kernels of the linear cross-entropy on the tensors of a validated call.

The arrays of such a call are tensors of a framework here: with `shape`, `dtype`, `new_empty`, `to`,
`float`, `double`, `char`, `sum` and `contiguous`, as those of PyTorch. Losses are reduced on the
device, and cotangents are those of reduced losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tilewise.base.operator import Implementation
from tilewise.ops.linear_cross_entropy.spec import (
    ALL_NEEDED,
    CotangentCall,
    LossCall,
    LossGrads,
    LossOutputs,
    LossStats,
    Needed,
    RowTangents,
    SecondCall,
    TangentCall,
    Want,
)
from tilewise.shared.launch import LaunchPlan
from tilewise.shared.row_tiles import (
    Tensor,
    dense,
    empty,
    merge_plan,
    reduction_plan,
    wide_like,
)
from tilewise.shared.triton_launch import INTERPRETS, architecture, launch, refuses_arrays
from tilewise.shared.triton_losses import mean_factor_kernel, reduce_rows_kernel
from tilewise.shared.triton_rows import sum_parts_kernel

from .kernels import (
    linear_cross_entropy_cotangents_kernel,
    linear_cross_entropy_fwd_kernel,
    linear_cross_entropy_gradient_kernel,
    linear_cross_entropy_jvp_kernel,
    linear_cross_entropy_merge_kernel,
    linear_cross_entropy_tangents_kernel,
)
from .plan import Tiles, precision, strip, tiles


def forward(call: LossCall, want: Want) -> LossOutputs:
    """Compute the reduced loss, the row statistics and the other results that are wanted."""
    at = _Tokens(call)
    plan = at.plan("forward")
    n_parts = plan.grid[1]
    parts = at.rows(5 if want.entropy else 4, n_parts)
    loss, z_loss, lse, m, log_l = (at.rows() for _ in range(5))
    indices = at.targets.new_empty((n_parts, at.T)) if want.argmax else None
    best = at.targets.new_empty(at.T) if want.argmax else None
    of_parts = {"parts_ptr": parts, "argmax_parts_ptr": indices}
    steps = {"TILES": at.tiles("forward").steps, "ENTROPY": want.entropy}
    launch(linear_cross_entropy_fwd_kernel, plan, {**at.logits(), **of_parts, **steps})
    entropy = at.rows() if want.entropy else None
    picked, mass = (at.rows() if want.picked else None for _ in range(2))
    found = {"loss": loss, "z_loss": z_loss, "lse": lse, "m": m, "log_l": log_l}
    found |= {"entropy": entropy, "argmax": best, "picked": picked, "mass": mass}
    merged = merge_plan(at.T, 1)
    given = {"targets_ptr": at.targets, **at.given("T", "ignored", "zeta", "SQUARED")}
    given |= {f"{name}_ptr": tensor for name, tensor in found.items()}
    launch(
        linear_cross_entropy_merge_kernel,
        replace(merged, grid=merged.grid[:1]),
        {**of_parts, "n_parts": n_parts, **given},
    )
    stats, grads = LossStats(m, log_l), LossGrads()
    if want.gradients is not None:
        one = at.wide.new_empty(()).fill_(1.0)
        whole = one.expand(at.T) if call.reduction == "none" else one
        grads = vjp(call, CotangentCall(whole, None, None, stats), want.gradients)
    loss, _ = at.reduced(loss, z_loss)
    return LossOutputs(loss, stats, entropy, best, picked, mass, grads, lse)


def vjp(call: LossCall, cotangents: CotangentCall, needed: Needed = ALL_NEEDED) -> LossGrads:
    """Compute the gradients that are needed."""
    at = _Tokens(call)
    given = {
        **_derivative(at, cotangents),
        **_tangents(None),
        **_cotangents("tg", None, None, None),
        "sums_ptr": None,
        "SECOND": False,
    }
    return _Strips(at, needed, None, given).run()


def jvp(call: LossCall, tangents: TangentCall) -> RowTangents:
    """Compute the tangents of the reduced loss, of lse and, where it is given, of the entropy."""
    at = _Tokens(call)
    saved = _saved(tangents.stats, tangents.entropy)
    tloss, tlse = at.rows(), at.rows()
    tentropy = None if tangents.entropy is None else at.rows()
    names = ("T", "V", "first_class", "ignored", "sharp", "share", "zeta", "SQUARED")
    given = {
        "sums_ptr": _sums(at, saved, tangents),
        "targets_ptr": at.targets,
        "class_weight_ptr": at.class_weight,
        "weight_total_ptr": at.weight_total(),
        "m_ptr": saved["m_ptr"],
        "log_l_ptr": saved["log_l_ptr"],
        **at.given(*names),
    }
    found = {"tloss_ptr": tloss, "tlse_ptr": tlse, "tentropy_ptr": tentropy}
    plan = LaunchPlan((-(-at.T // 128),), {"BLOCK_R": 128})
    launch(linear_cross_entropy_tangents_kernel, plan, {**given, **found})
    tloss, _ = at.reduced(tloss, tloss)
    return RowTangents(tloss, tlse, tentropy)


def vjp_jvp(call: LossCall, second: SecondCall, needed: Needed = ALL_NEEDED) -> LossGrads:
    """Compute the tangents of the gradients that are needed."""
    at = _Tokens(call)
    saved = _saved(second.cotangents.stats, second.cotangents.entropy)
    given = {
        **_derivative(at, second.cotangents),
        **_tangents(second.tangents),
        **_cotangents("tg", second.tdloss, second.tdlse, second.tdentropy),
        "sums_ptr": _sums(at, saved, second.tangents),
        "SECOND": True,
    }
    return _Strips(at, needed, second.tangents, given).run()


class _Tokens:
    """The tokens of one call on the device.

    Attributes:
        hidden: `(T, C)`.
        weight: `(V, C)`.
        call: The validated call.
    """

    def __init__(self, call: LossCall) -> None:
        self.call = call
        hidden, weight, bias, targets = dense(call.hidden, call.weight, call.bias, call.targets)
        assert hidden is not None and weight is not None and targets is not None
        self.hidden, self.weight, self.bias, self.targets = hidden, weight, bias, targets
        (self.T, self.C), self.V = hidden.shape, weight.shape[0]
        self.wide = wide_like(hidden)
        class_weight: Tensor | None = call.class_weight
        if class_weight is not None:
            class_weight = class_weight.to(self.wide.dtype).contiguous()
        self.class_weight = class_weight
        self.dtype = str(hidden.dtype).rsplit(".", 1)[-1]

    def tiles(self, kind: str) -> Tiles:
        """Return the tiles of a kernel."""
        return tiles(kind, self.hidden.dtype.itemsize, architecture())

    def rows(self, *first: int) -> Tensor:
        """Return memory for a number of each token."""
        return empty((*first, self.T), self.wide)

    def plan(self, kind: str) -> LaunchPlan:
        """Return the launch over all tokens and classes."""
        return self.tiles(kind).launch(self.T, self.V)

    def weight_total(self) -> Tensor | None:
        """Return the sum of all class weights, or None where each is 1."""
        if self.class_weight is None or not self.call.label_smoothing:
            return None
        return self.class_weight.double().sum().reshape(1)

    def given(self, *names: str) -> dict[str, Any]:
        """Return some of the arguments that kernels share."""
        call, cap = self.call, self.call.softcap
        return {name: value for name, value in self._all(call, cap).items() if name in names}

    def _all(self, call: Any, cap: float | None) -> dict[str, Any]:
        return {
            "T": self.T,
            "C": self.C,
            "V": self.V,
            "first_class": call.first_class,
            "ignored": call.ignore_index,
            "sharp": 1.0 - call.label_smoothing,
            "share": call.label_smoothing / call.classes,
            "zeta": call.z_loss,
            "cap": 1.0 if cap is None else cap,
            "CAPPED": cap is not None,
            "SQUARED": call.z_loss != 0,
        }

    def logits(self) -> dict[str, Any]:
        """Return what every kernel takes that makes logits."""
        names = ("T", "C", "V", "first_class", "ignored", "sharp", "share", "cap", "CAPPED")
        return {
            "hidden_ptr": self.hidden,
            "weight_ptr": self.weight,
            "bias_ptr": self.bias,
            "targets_ptr": self.targets,
            "class_weight_ptr": self.class_weight,
            **self.given(*names),
            "PRECISION": "ieee",
        }

    def scale(self) -> Tensor | None:
        """Return what the reduction multiplies sums by, `(1,)` in float64, or None for 1."""
        if self.call.reduction != "mean":
            return None
        scale = self.wide.double().new_empty(1)
        given = {"targets_ptr": self.targets, "weight_ptr": self.class_weight, "scale_ptr": scale}
        sizes = {"n_rows": self.T, "classes": self.V, **self.given("ignored")}
        launch(mean_factor_kernel, reduction_plan(), {**given, **sizes, "ANY": False})
        return scale

    def reduced(self, loss: Tensor, z_loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and z-losses of tokens as the reduction makes them."""
        if self.call.reduction == "none":
            return loss, z_loss
        totals = empty((), self.wide), empty((), self.wide)
        given = {"loss_ptr": loss, "z_loss_ptr": z_loss, "scale_ptr": self.scale()}
        given |= {"loss_total_ptr": totals[0], "z_loss_total_ptr": totals[1]}
        launch(reduce_rows_kernel, reduction_plan(), {**given, "n_rows": self.T})
        return totals


class _Strips:
    """Gradients that are made strip by strip of classes, of stored cotangents of the logits."""

    def __init__(
        self,
        at: _Tokens,
        needed: Needed,
        tangents: TangentCall | None,
        given: Mapping[str, Any],
    ) -> None:
        self.at, self.given = at, given
        moved = (None, None) if tangents is None else (tangents.thidden, tangents.tweight)
        self.thidden, self.tweight = dense(*moved)
        self.cut = at.tiles("vjp" if tangents is None else "vjp_jvp")
        kind = "gradient" if tangents is None else "two_gradients"
        # float16 lacks the range of cotangents, which are as small as one token's part of a mean.
        stored = at.wide if at.dtype == "float16" else at.hidden
        self.product = tiles(kind, stored.dtype.itemsize, architecture())
        chunk = at.call.vocab_chunk
        self.width = strip(at.T, at.V, self.cut.cols, self.product.inner, chunk)
        self.dhidden = empty((at.T, at.C), at.hidden) if needed.hidden else None
        self.dweight = empty((at.V, at.C), at.weight) if needed.weight else None
        self.dbias = None
        if needed.bias and at.bias is not None:
            self.dbias = empty((at.V,), at.bias)
        self.dz = empty((at.T, self.width), stored)
        self.tdz = None if tangents is None else empty((at.T, self.width), stored)
        self.live = empty((at.T,), at.targets.char())
        self.sums = self.dhidden
        if self.dhidden is not None and at.hidden.dtype.itemsize == 2 and self.width < at.V:
            self.sums = empty((at.T, at.C), at.wide)

    def run(self) -> LossGrads:
        """Return dhidden, dweight and dbias."""
        at = self.at
        for start in range(0, at.V, self.width):
            size = min(self.width, at.V - start)
            plan = self.cut.launch(at.T, size)
            strip = {"strip_start": start, "strip": self.width}
            found = {"live_ptr": self.live, "dz_ptr": self.dz, "tdz_ptr": self.tdz}
            given = {**self.given, **strip, **found}
            launch(linear_cross_entropy_cotangents_kernel, plan, given)
            self._hidden(start, size)
            self._classes(start, size)
        return LossGrads(self.dhidden, self.dweight, self.dbias)

    def _hidden(self, start: int, size: int) -> None:
        """Add the part of a strip to dhidden: dz weight, and of tangents dz tweight."""
        at = self.at
        if self.dhidden is None:
            return
        part = slice(start, start + size)
        last = start + size == at.V
        self._multiply(
            (at.T, at.C, size),
            (self.width, 1),
            at.weight[part],
            None if self.tweight is None else self.tweight[part],
            before_ptr=self.sums if start else None,
            after_ptr=self.dhidden if last else self.sums,
            live_ptr=None,
            rows_ptr=None,
        )

    def _classes(self, start: int, size: int) -> None:
        """Compute dweight and dbias of the classes of a strip: dz^T hidden."""
        at, part = self.at, slice(start, start + size)
        if self.dweight is None and self.dbias is None:
            return
        unused = None if self.dweight is not None else empty((size, at.C), at.weight)
        self._multiply(
            (size, at.C, at.T),
            (1, self.width),
            at.hidden,
            self.thidden,
            before_ptr=None,
            after_ptr=unused if self.dweight is None else self.dweight[part],
            live_ptr=self.live,
            rows_ptr=None if self.dbias is None else self.dbias[part],
        )

    def _multiply(
        self,
        sizes: tuple[int, int, int],
        strides: tuple[int, int],
        b: Tensor,
        b2: Tensor | None,
        **more: Tensor | None,
    ) -> None:
        """Multiply the stored cotangents, or with tangents theirs, by one input."""
        M, N, K = sizes
        main, other = (self.dz, None) if self.tdz is None else (self.tdz, self.dz)
        given = {
            "a_ptr": main,
            "b_ptr": b,
            "a2_ptr": None if b2 is None else other,
            "b2_ptr": b2,
            "M": M,
            "N": N,
            "K": K,
            "a_row": strides[0],
            "a_inner": strides[1],
            "PRECISION": precision(self.at.dtype),
        }
        plan = self.product.launch(M, N, "MNK")
        launch(linear_cross_entropy_gradient_kernel, plan, {**given, **more})


def _derivative(at: _Tokens, given: CotangentCall) -> dict[str, Any]:
    """Return what the kernel of the cotangents takes but for tangents."""
    return {
        **at.logits(),
        **at.given("zeta", "SQUARED"),
        **_saved(given.stats, given.entropy),
        "weight_total_ptr": at.weight_total(),
        "mass_ptr": dense(given.mass)[0],
        **_cotangents("g", given.dloss, given.dlse, given.dentropy),
        "scale_ptr": at.scale(),
        "loss_step": int(at.call.reduction == "none"),
    }


def _sums(at: _Tokens, saved: Mapping[str, Tensor | None], tangents: TangentCall) -> Tensor:
    """Return the sums over the classes that tangents need, `(3, T)`."""
    plan = at.plan("jvp")
    n_parts = plan.grid[1]
    parts, sums = at.rows(3, n_parts), at.rows(3)
    given = {**at.logits(), **saved, **_tangents(tangents), "parts_ptr": parts}
    given["TILES"] = at.tiles("jvp").steps
    launch(linear_cross_entropy_jvp_kernel, plan, given)
    merged = {"parts_ptr": parts, "total_ptr": sums, "n_rows": at.T, "n_parts": n_parts}
    launch(sum_parts_kernel, merge_plan(at.T, 3), merged)
    return sums


def _saved(stats: LossStats, entropy: Tensor | None) -> dict[str, Tensor | None]:
    m, log_l, entropy = dense(*stats, entropy)
    return {"m_ptr": m, "log_l_ptr": log_l, "entropy_ptr": entropy}


def _tangents(given: TangentCall | None) -> dict[str, Tensor | None]:
    moved = (None,) * 3 if given is None else (given.thidden, given.tweight, given.tbias)
    thidden, tweight, tbias = dense(*moved)
    return {"thidden_ptr": thidden, "tweight_ptr": tweight, "tbias_ptr": tbias}


def _cotangents(
    prefix: str, loss: Tensor | None, lse: Tensor | None, entropy: Tensor | None
) -> dict[str, Tensor | None]:
    loss, lse, entropy = dense(loss, lse, entropy)
    return {f"{prefix}_ptr": loss, f"{prefix}_lse_ptr": lse, f"{prefix}_entropy_ptr": entropy}


def refuses(call: LossCall) -> str | None:
    """Return why a call is not served, or None."""
    if call.token_chunk is not None:
        return "stores what it does for all tokens and some classes; give vocab_chunk for less"
    if call.gradient_filter > 0:
        return "leaves out no gradients (gradient_filter)"
    return refuses_arrays(call.hidden)


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
