"""The linear cross-entropy on a GPU: allocates results and launches the kernels of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tilewise.shared.launch import LaunchPlan
from tilewise.shared.row_tiles import (
    Tensor,
    dense,
    empty,
    launch,
    merge_plan,
    reduction_plan,
    wide_like,
)
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
from .plan import precision, strip, tiles

Tensors = tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a forward pass returns, token by token but for a reduced loss and z-loss."""

    loss: Tensor
    z_loss: Tensor
    lse: Tensor
    m: Tensor
    log_l: Tensor
    entropy: Tensor | None
    argmax: Tensor | None
    picked: Tensor | None
    mass: Tensor | None


class Tokens:
    """The tokens of one call on the device.

    Attributes:
        hidden: `(T, C)`.
        weight: `(V, C)`.
        call: The validated call, of which only numbers are read.
    """

    def __init__(self, call: Any, inputs: Sequence[Tensor | None]) -> None:
        hidden, weight, bias, targets, class_weight = (*inputs, None, None)[:5]
        assert hidden is not None and weight is not None and targets is not None
        self.call = call
        self.hidden, self.weight = hidden.contiguous(), weight.contiguous()
        (self.bias,) = dense(bias)
        self.targets = targets.long().contiguous()
        (self.T, self.C), self.V = hidden.shape, weight.shape[0]
        self.wide = wide_like(hidden)
        self.class_weight = None
        if class_weight is not None:
            self.class_weight = class_weight.to(self.wide.dtype).contiguous()
        self.precision = precision(str(hidden.dtype).rsplit(".", 1)[-1])
        self.itemsize = hidden.dtype.itemsize

    def rows(self, *first: int) -> Tensor:
        """Return memory for a number of each token."""
        return empty((*first, self.T), self.wide)

    def plan(self, kind: str) -> LaunchPlan:
        """Return the launch over all tokens and classes."""
        return tiles(kind, self.itemsize).launch(self.T, self.V)

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


def forward(
    call: Any,
    inputs: Sequence[Tensor | None],
    *,
    entropy: bool = False,
    argmax: bool = False,
    picked: bool = False,
) -> Outputs:
    """Compute the losses, the row statistics and the other results that are wanted.

    Args:
        call: The validated call, of which only numbers are read.
        inputs: Hidden states, weight, bias, targets, class weights.
        entropy: Whether the entropy of each token's probabilities is wanted.
        argmax: Whether the class of its largest logit is.
        picked: Whether what its target picks, and its mass, are.
    """
    at = Tokens(call, inputs)
    plan = at.plan("forward")
    n_parts = plan.grid[1]
    parts = at.rows(5 if entropy else 4, n_parts)
    found = [at.rows() for _ in range(5)]
    names = ("loss_ptr", "z_loss_ptr", "lse_ptr", "m_ptr", "log_l_ptr")
    indices = at.targets.new_empty((n_parts + 1, at.T)) if argmax else None
    best = None if indices is None else at.targets.new_empty(at.T)
    of_rows = {"parts_ptr": parts, "argmax_parts_ptr": indices}
    steps = {"TILES": tiles("forward", at.itemsize).steps, "ENTROPY": entropy}
    launch(linear_cross_entropy_fwd_kernel, plan, {**at.logits(), **of_rows, **steps})
    more = {
        "entropy_ptr": at.rows() if entropy else None,
        "argmax_ptr": best,
        "picked_ptr": at.rows() if picked else None,
        "mass_ptr": at.rows() if picked else None,
    }
    merged = merge_plan(at.T, 1)
    given = {"targets_ptr": at.targets, **at.given("T", "ignored", "zeta", "SQUARED")}
    launch(
        linear_cross_entropy_merge_kernel,
        replace(merged, grid=merged.grid[:1]),
        {**of_rows, "n_parts": n_parts, **given, **dict(zip(names, found, strict=True)), **more},
    )
    loss, z_loss = at.reduced(*found[:2])
    return Outputs(loss, z_loss, *found[2:], *more.values())


def jvp(
    call: Any,
    inputs: Sequence[Tensor | None],
    stats: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    entropy: Tensor | None = None,
) -> Tensors:
    """Return the tangents of loss, lse and, where it is given, of the entropy.

    Args:
        call: The validated call, of which only numbers are read.
        inputs: Hidden states, weight, bias, targets, class weights.
        stats: m and log_l.
        tangents: Of hidden states, weight and bias.
        entropy: The entropy of each token.
    """
    at = Tokens(call, inputs)
    saved = _saved(stats, entropy)
    sums = _sums(at, saved, tangents)
    tloss, tlse = at.rows(), at.rows()
    tentropy = None if entropy is None else at.rows()
    names = ("T", "V", "first_class", "ignored", "sharp", "share", "zeta", "SQUARED")
    given = {
        "sums_ptr": sums,
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
    return tloss, tlse, tentropy


def gradients(
    call: Any,
    inputs: Sequence[Tensor | None],
    stats: Sequence[Tensor],
    *,
    needed: Sequence[bool],
    cotangents: Sequence[Tensor | None],
    entropy: Tensor | None = None,
    mass: Tensor | None = None,
    tangents: Sequence[Tensor | None] | None = None,
    moved: Sequence[Tensor | None] = (None, None, None),
) -> Tensors:
    """Return the gradients by hidden states, weight and bias, or with tangents their tangents.

    Args:
        call: The validated call, of which only numbers are read.
        inputs: Hidden states, weight, bias, targets, class weights.
        stats: m and log_l.
        needed: Which of the three are needed.
        cotangents: Of the loss, reduced where it is, of lse and of the entropy.
        entropy: The entropy of each token, needed with its cotangent.
        mass: Sum of the weights of each token's target over all parts of the classes, where the
            call is one part.
        tangents: Of hidden states, weight and bias.
        moved: Tangents of the cotangents.
    """
    at = Tokens(call, inputs)
    second = tangents is not None
    tangents = dense(*(tangents or (None, None, None)))
    saved = _saved(stats, entropy)
    given = {
        **at.logits(),
        **at.given("zeta", "SQUARED"),
        **saved,
        "weight_total_ptr": at.weight_total(),
        "mass_ptr": dense(mass)[0],
        **_cotangents("g", cotangents),
        **_cotangents("tg", moved),
        "scale_ptr": at.scale(),
        "loss_step": int(call.reduction == "none"),
        **_tangents(tangents),
        "sums_ptr": _sums(at, saved, tangents) if second else None,
        "SECOND": second,
    }
    return _Strips(at, needed, tangents, given).run()


class _Strips:
    """Gradients that are made strip by strip of classes, of stored cotangents of the logits."""

    def __init__(
        self,
        at: Tokens,
        needed: Sequence[bool],
        tangents: Sequence[Tensor | None],
        given: Mapping[str, Any],
    ) -> None:
        self.at, self.given, self.tangents = at, given, tangents
        self.kind = "vjp_jvp" if given["SECOND"] else "vjp"
        self.cut, self.product = tiles(self.kind, at.itemsize), tiles("gradient", at.itemsize)
        self.width = strip(at.T, at.V, self.cut.cols, self.product.inner)
        self.dhidden = empty((at.T, at.C), at.hidden) if needed[0] else None
        self.dweight = empty((at.V, at.C), at.weight) if needed[1] else None
        self.dbias = None
        if needed[2] and at.bias is not None:
            self.dbias = empty((at.V,), at.bias)
        # float16 lacks the range of cotangents, which are as small as one token's part of a mean.
        stored = at.wide if str(at.hidden.dtype).endswith("float16") else at.hidden
        stored = at.hidden if str(at.hidden.dtype).endswith("bfloat16") else stored
        self.dz = empty((at.T, self.width), stored)
        self.tdz = empty((at.T, self.width), stored) if given["SECOND"] else None
        self.live = empty((at.T,), at.targets.char())
        self.sums = self.dhidden
        if self.dhidden is not None and at.itemsize == 2 and self.width < at.V:
            self.sums = empty((at.T, at.C), at.wide)

    def run(self) -> Tensors:
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
        return self.dhidden, self.dweight, self.dbias

    def _hidden(self, start: int, size: int) -> None:
        """Add the part of a strip to dhidden: dz weight, and of tangents dz tweight."""
        at, tweight = self.at, self.tangents[1]
        if self.dhidden is None:
            return
        part = slice(start, start + size)
        last = start + size == at.V
        self._multiply(
            (at.T, at.C, size),
            (self.width, 1),
            at.weight[part],
            None if tweight is None else tweight[part],
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
            self.tangents[0],
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
            "PRECISION": self.at.precision,
        }
        plan = self.product.launch(M, N, "MNK")
        launch(linear_cross_entropy_gradient_kernel, plan, {**given, **more})


def _sums(
    at: Tokens, saved: Mapping[str, Tensor | None], tangents: Sequence[Tensor | None]
) -> Tensor:
    """Return the sums over the classes that tangents need, `(3, T)`."""
    plan = at.plan("jvp")
    n_parts = plan.grid[1]
    parts, sums = at.rows(3, n_parts), at.rows(3)
    given = {**at.logits(), **saved, **_tangents(tangents), "parts_ptr": parts}
    steps = {"TILES": tiles("jvp", at.itemsize).steps}
    launch(linear_cross_entropy_jvp_kernel, plan, {**given, **steps})
    merged = {"parts_ptr": parts, "total_ptr": sums, "n_rows": at.T, "n_parts": n_parts}
    launch(sum_parts_kernel, merge_plan(at.T, 3), merged)
    return sums


def _saved(stats: Sequence[Tensor], entropy: Tensor | None) -> dict[str, Tensor | None]:
    m, log_l, entropy = dense(*stats, entropy)
    return {"m_ptr": m, "log_l_ptr": log_l, "entropy_ptr": entropy}


def _tangents(tangents: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    thidden, tweight, tbias = dense(*tangents)
    return {"thidden_ptr": thidden, "tweight_ptr": tweight, "tbias_ptr": tbias}


def _cotangents(prefix: str, given: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    loss, lse, entropy = dense(*given)
    return {f"{prefix}_ptr": loss, f"{prefix}_lse_ptr": lse, f"{prefix}_entropy_ptr": entropy}
