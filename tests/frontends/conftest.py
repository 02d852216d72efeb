"""What the tests of the frontends share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

# Two devices, to split work over; JAX reads it once.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")


@pytest.fixture(scope="session")
def plain() -> Callable[..., Any]:
    """Attention as plain PyTorch computes it: `(o, lse)` from the whole matrix of logits."""

    def attention(
        q: Any,
        k: Any,
        v: Any,
        bias: Any = None,
        sinks: Any = None,
        *,
        visible: Any = None,
        alibi_slopes: Any = None,
        softcap: float | None = None,
        softmax_scale: float | None = None,
        keep: Any = 1.0,
        layout: str = "bhnd",
    ) -> Any:
        if layout == "bnhd":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        N, Nk = q.shape[2], k.shape[2]
        s = q @ k.mT * (softmax_scale or 1 / math.sqrt(q.shape[3]))
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if alibi_slopes is not None:
            distance = (torch.arange(N)[:, None] + Nk - N - torch.arange(Nk)).abs()
            s = s - alibi_slopes[..., None, None] * distance
        if bias is not None:
            s = s + bias
        if visible is not None:
            s = s.masked_fill(~visible, -math.inf)
        rows = s
        if sinks is not None:
            rows = torch.cat((s, sinks[:, None, None].expand(*s.shape[:3], 1)), 3)
        seen = rows.isfinite().any(3)
        # Where a row sees nothing, its logits are replaced, so that no NaN gets into gradients.
        rows = torch.where(seen[..., None], rows, torch.zeros_like(rows))
        # Not by logsumexp, whose tangents cannot be differentiated in reverse mode.
        top = rows.detach().amax(3)
        lse = (rows - top[..., None]).exp().sum(3).log() + top
        lse = torch.where(seen, lse, -math.inf)
        p = (s - torch.where(seen, lse, 0.0)[..., None]).exp()
        p = torch.where(s.isfinite(), p, torch.zeros_like(p))
        o = (p * keep) @ v
        return (o.transpose(1, 2) if layout == "bnhd" else o), lse

    return attention
