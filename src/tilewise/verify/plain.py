"""Operators as straightforward PyTorch: what autograd makes of them is the yardstick of errors.

Each function takes the differentiable inputs as tensors, and the other inputs and options as a
case has them. Where rows have no entry it is guarded, for NaN is no yardstick. PyTorch is imported
only where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .tensors import tensor_of

__all__ = [
    "cross_entropy",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "logsumexp",
    "softmax",
]

Given = Mapping[str, Any]
Tensors = tuple[Any, ...]


def softmax(given: Given, x: Any, sink: Any = None) -> Tensors:
    """Return y and lse."""
    import torch

    s, alive, hidden = _logits(given, x, sink)
    y = torch.softmax(s, 1)[:, : x.shape[1]]
    return torch.where(alive & ~hidden, y, 0.0), _lse(s, alive)


def log_softmax(given: Given, x: Any, sink: Any = None) -> Tensors:
    """Return log_y and lse."""
    import torch

    s, alive, hidden = _logits(given, x, sink)
    log_y = torch.log_softmax(s, 1)[:, : x.shape[1]]
    return torch.where(alive & ~hidden, log_y, -torch.inf), _lse(s, alive)


def logsumexp(given: Given, x: Any, sink: Any = None) -> Tensors:
    """Return lse."""
    s, alive, _ = _logits(given, x, sink)
    return (_lse(s, alive),)


def linear(given: Given, x: Any, w: Any, bias: Any = None) -> Tensors:
    """Return y."""
    y = x @ w.mT
    return (y if bias is None else y + bias,)


def cross_entropy(given: Given, logits: Any, probabilities: Any = None) -> Tensors:
    """Return loss, lse and the term of the log-sum-exp."""
    import torch

    s = logits if given["softcap"] is None else _capped(logits, given["softcap"])
    lse = torch.logsumexp(s, 1)
    t, kept, count = _targets(given, logits, probabilities)
    far = torch.where(t == 0, torch.zeros_like(s), -t * torch.log_softmax(s, 1))
    z_loss = torch.where(kept, given["z_loss"] * lse**2, 0.0)
    loss = torch.where(kept, far.sum(1) + z_loss, 0.0)
    if given["reduction"] != "none":
        loss, z_loss = loss.sum() / count, z_loss.sum() / count
    return loss, lse, z_loss


def linear_cross_entropy(given: Given, hidden: Any, weight: Any, bias: Any = None) -> Tensors:
    """Return loss, lse and entropy."""
    import torch

    (z,) = linear(given, hidden, weight, bias)
    rows = {**given, "targets": given["targets"][:, None]}
    if "class_weight" in given:
        rows["weight"] = given["class_weight"]
    loss, lse, _ = cross_entropy(rows, z[:, :, None])
    s = z if given["softcap"] is None else _capped(z, given["softcap"])
    log_p = torch.log_softmax(s, 1)
    loss = loss[:, 0] if given["reduction"] == "none" else loss
    return loss, lse[:, 0], -(log_p.exp() * log_p).sum(1)


def _logits(given: Given, x: Any, sink: Any) -> tuple[Any, Any, Any]:
    """Return logits with the sink as one more, which rows have any, and what is hidden."""
    import torch

    hidden = torch.zeros_like(x, dtype=torch.bool)
    if "where" in given:
        hidden = ~tensor_of(np.ascontiguousarray(given["where"])).expand(x.shape)
    s = (x / given["temperature"]).masked_fill(hidden, -torch.inf)
    if sink is not None:
        s = torch.cat([s, sink[:, None]], 1)
    alive = (s != -torch.inf).any(1, keepdim=True)
    return torch.where(alive, s, torch.zeros_like(s)), alive, hidden


def _lse(s: Any, alive: Any) -> Any:
    import torch

    if not s.shape[1]:
        return torch.full((s.shape[0], s.shape[2]), -torch.inf, dtype=s.dtype)
    return torch.where(alive[:, 0], torch.logsumexp(s, 1), -torch.inf)


def _capped(logits: Any, softcap: float) -> Any:
    import torch

    return softcap * torch.tanh(logits / softcap)


def _targets(given: Given, logits: Any, probabilities: Any) -> tuple[Any, Any, Any]:
    """Return the weight of each class, which rows count, and what a mean divides by."""
    import torch

    A, C, I = logits.shape
    e = given["label_smoothing"]
    w = tensor_of(given["weight"]).to(logits) if "weight" in given else torch.ones(C).to(logits)
    spread = w[:, None] * (e / max(C, 1))
    if probabilities is not None:
        t = w[:, None] * (1 - e) * probabilities.to(logits) + spread
        kept, count = torch.ones(A, I, dtype=torch.bool), A * I
    else:
        targets = tensor_of(given["targets"])
        kept = targets != given["ignore_index"]
        index = torch.where(kept, targets, 0)
        one = torch.zeros_like(logits).scatter(1, index[:, None], 1.0)
        t = one * w[:, None] * (1 - e) + spread
        count = torch.where(kept, w[index], 0.0).sum()
    count = count if given["reduction"] == "mean" else 1
    return t, kept, count if count else 1
