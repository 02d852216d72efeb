"""Modules with the signatures of PyTorch's losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tilewise.base.errors import unsupported, value_error
from tilewise.ops.linear_cross_entropy.spec import NAME

from .cross_entropy import cross_entropy
from .linear_cross_entropy import linear_cross_entropy


class CrossEntropyLoss(nn.CrossEntropyLoss):  # type: ignore[misc]
    """The loss of `torch.nn.CrossEntropyLoss`, computed by `tilewise.torch.cross_entropy`.

    A mean over nothing is 0, where PyTorch has NaN, and the loss of 16-bit logits is float32.

    Args:
        weight: `(V,)`, weights of the classes.
        size_average: Deprecated in PyTorch; goes into reduction.
        ignore_index: A row with this class index has no loss.
        reduce: Deprecated in PyTorch; goes into reduction.
        reduction: "mean", "sum" or "none".
        label_smoothing: From 0 to 1.
        z_loss: From 0 to 1e6, factor of `lse^2`, which is added to the loss.
        softcap: From 1e-15 to 1e15, or None: a logit z becomes `softcap tanh(z / softcap)`.
        inplace_backward: Whether the backward overwrites the logits; see `cross_entropy`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap = z_loss, softcap
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits `(V,)`, `(N, V)` or `(N, V, ...)`.

        Args:
            input: The logits.
            target: Class indices, shape of the logits without V; or class probabilities, shape of
                the logits.
        """
        options: dict[str, Any] = {"reduction": self.reduction}
        loss: Tensor = cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            class_axis=0 if input.ndim == 1 else 1,
            inplace_backward=self.inplace_backward,
            **options,
        )
        return loss


class LinearCrossEntropyLoss(nn.Module):  # type: ignore[misc]
    """A linear classifier and its cross-entropy, whose logits are not stored.

    It has the signature and the parameters of `torch.nn.LinearCrossEntropyLoss` (PyTorch 2.13), so
    that the one loads what the other saved: `linear.weight`, with `bias=True` `linear.bias`, and
    the buffer `weight` where class weights are given. Logits are `loss.linear(hidden)`.

    Args:
        in_features: Entries of a hidden state.
        num_classes: How many classes there are.
        out_features: Not served but empty.
        bias: Whether the classifier has a bias.
        device: Of the parameters.
        dtype: Of the parameters.
        reduction: "mean", "sum" or "none".
        weight: `(num_classes,)`, what each class counts.
        ignore_index: The target of a token without a loss; None is -100.
        label_smoothing: From 0 to 1.
        options: Not served but None; `token_chunk` takes its place.
        z_loss: From 0 to 1e6, factor of `lse^2`, which is added to the loss.
        softcap: From 1e-15 to 1e15, or None: a logit z becomes `softcap tanh(z / softcap)`.
        shift: How many tokens ahead of a hidden state its target is; 1 is the next token.
        token_chunk: How many tokens' logits there are at a time; by default chosen by size.

    Raises:
        ValueError: The class weights have another size.
        Unsupported: `out_features` or `options` is given.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        shift: int = 0,
        token_chunk: int | None = None,
    ) -> None:
        super().__init__()
        if tuple(out_features):
            raise unsupported(NAME, "losses of several targets a token (out_features) do not exist")
        if options is not None:
            raise unsupported(NAME, "options of PyTorch's chunks do not exist; use token_chunk")
        if weight is not None and weight.shape != (num_classes,):
            requirement = f"have shape ({num_classes},) (from num_classes)"
            raise value_error(NAME, "weight", requirement, tuple(weight.shape))
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.ignore_index = -100 if ignore_index is None else ignore_index
        self.reduction, self.label_smoothing = reduction, label_smoothing
        self.z_loss, self.softcap = z_loss, softcap
        self.shift, self.token_chunk = shift, token_chunk

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of hidden states.

        Args:
            input: `(..., in_features)`, dtype of the parameters.
            target: `(...)`, integers from 0 to num_classes - 1, or ignore_index.
        """
        loss: Tensor = linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            bias=self.linear.bias,
            class_weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            reduction=self.reduction,
            shift=self.shift,
            token_chunk=self.token_chunk,
        )
        return loss

    def extra_repr(self) -> str:
        """Return what `repr` shows beside the classifier."""
        options = {
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
            "shift": self.shift,
        }
        return ", ".join([f"{name}={value!r}" for name, value in options.items()])
