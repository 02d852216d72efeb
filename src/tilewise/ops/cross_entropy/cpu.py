"""The cross-entropy on the CPU: hands the buffers of a validated call to the compiled kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise import _core
from tilewise.base.dtypes import is_narrow, storage_of
from tilewise.base.memory import empty
from tilewise.base.operator import Implementation

from .spec import (
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

Array = NDArray[Any]


def forward(call: EntropyCall, want: None = None) -> EntropyOutputs:
    """Compute loss, lse, z_loss and row statistics of each row."""
    loss, lse, z, m, log_l, total = (_rows(call) for _ in range(6))
    found = {"loss": loss, "lse": lse, "z": z, "m": m, "log_l": log_l, "total": total}
    _core.cross_entropy_forward(**_given(call, found))
    return EntropyOutputs(loss, lse, z, EntropyStats(m, log_l, total))


def vjp(
    call: EntropyCall,
    cotangents: Cotangents,
    stats: EntropyStats,
    needed: Needed = ALL_NEEDED,
    out: Array | None = None,
) -> EntropyGrads:
    """Compute the gradients that are needed; `out` takes that of the logits, and may be these."""
    found = _gradients(call, needed, out)
    _core.cross_entropy_vjp(**_given(call, {**stats._asdict(), **_cotangents(cotangents), **found}))
    return EntropyGrads(*found.values())


def jvp(call: EntropyCall, tangents: Tangents, stats: EntropyStats) -> EntropyTangents:
    """Compute the tangents of loss, lse and z_loss of each row."""
    tloss, tlse, tz = (_rows(call) for _ in range(3))
    found = {"t_loss": tloss, "t_lse": tlse, "t_z": tz}
    _core.cross_entropy_jvp(**_given(call, {**stats._asdict(), **_tangents(tangents), **found}))
    return EntropyTangents(tloss, tlse, tz)


def vjp_jvp(
    call: EntropyCall, second: SecondCall, stats: EntropyStats, needed: Needed = ALL_NEEDED
) -> EntropyGrads:
    """Compute the tangents of the gradients that are needed."""
    found = _gradients(call, needed, None)
    moved = _cotangents(second.moved)
    given = {
        **stats._asdict(),
        **_cotangents(second.cotangents),
        **_tangents(second.tangents),
        **{f"t{name}": array for name, array in moved.items()},
    }
    _core.cross_entropy_vjp_jvp(**_given(call, {**given, **found}))
    return EntropyGrads(*found.values())


def _rows(call: EntropyCall) -> Array:
    return empty(call.row_sizes, call.compute_dtype)


def _gradients(call: EntropyCall, needed: Needed, out: Array | None) -> dict[str, Array | None]:
    """Return the arrays into which a kernel writes gradients."""
    q, shape = call.probabilities, call.logits.shape
    if out is None and needed.logits:
        out = empty(shape, call.dtype)
    of_targets = empty(shape, q.dtype) if q is not None and needed.targets else None
    return {"dx": out, "dprobabilities": of_targets}


def _cotangents(given: Cotangents) -> dict[str, Array | None]:
    return {"g_loss": given.loss, "g_lse": given.lse, "g_z": given.z_loss}


def _tangents(given: Tangents) -> dict[str, Array | None]:
    return {"tx": given.logits, "tprobabilities": given.probabilities}


def _given(call: EntropyCall, arrays: Mapping[str, Array | None]) -> dict[str, Any]:
    """Return inputs, options and other arrays as a kernel takes them: those of 16 bits as such."""
    arrays = {"x": call.logits, "probabilities": call.probabilities, **arrays}
    if is_narrow(call.dtype):
        arrays = {name: _bits(x) for name, x in arrays.items()}
    options = call.options
    return {
        **arrays,
        "targets": call.targets,
        "weight": call.weight,
        "ignore_index": options.ignore_index,
        "label_smoothing": options.label_smoothing,
        "z_loss": options.z_loss,
        "softcap": options.softcap or 0.0,
        "storage": storage_of(call.dtype),
    }


def _bits(x: Array | None) -> Array | None:
    return x.view(np.uint16) if x is not None and is_narrow(x.dtype) else x


IMPLEMENTATION = Implementation("cpu", forward, vjp, jvp, vjp_jvp)
