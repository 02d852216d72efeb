"""How the losses of the rows become one number, and a cotangent of it those of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import round_to

from .calls import Cotangents, EntropyCall, EntropyOutputs, EntropyTangents

Array = NDArray[Any]


def row_scale(call: EntropyCall) -> float:
    """Return what the sum of the rows' losses is multiplied by.

    The mean is over the weights of the targets of the rows that are not ignored, and over the rows
    where class probabilities are given. Where there is nothing to divide by it is 0.
    """
    if call.options.reduction != "mean":
        return 1.0
    if call.targets is None or call.weight is None:
        count = float(np.count_nonzero(call.kept))
        return 1.0 / count if count else 0.0
    weights = call.weight[call.targets[call.kept]].astype(np.float64)
    if not weights.any():
        return 0.0
    with np.errstate(divide="ignore"):
        return float(1.0 / weights.sum())


def reduced_outputs(call: EntropyCall, rows: EntropyOutputs) -> EntropyOutputs:
    """Return the results of the rows with loss and z_loss reduced."""
    loss, z_loss = _reduced(call, rows.loss, rows.z_loss)
    return rows._replace(loss=loss, z_loss=z_loss)


def reduced_tangents(call: EntropyCall, rows: EntropyTangents) -> EntropyTangents:
    """Return the tangents of the rows with those of loss and z_loss reduced."""
    tloss, tz_loss = _reduced(call, rows.tloss, rows.tz_loss)
    return EntropyTangents(tloss, rows.tlse, tz_loss)


def spread_cotangents(call: EntropyCall, given: Cotangents) -> Cotangents:
    """Return the cotangents of the rows."""
    if call.options.reduction == "none":
        return given
    scale = row_scale(call)
    return Cotangents(
        _spread(call, given.loss, scale), given.lse, _spread(call, given.z_loss, scale)
    )


def _reduced(call: EntropyCall, *rows: Array) -> tuple[Array, ...]:
    if call.options.reduction == "none":
        return rows
    scale = row_scale(call)
    with np.errstate(all="ignore"):
        sums = [np.asarray(np.ravel(r).sum(dtype=np.float64) * scale) for r in rows]
        return tuple([round_to(s, call.compute_dtype) for s in sums])


def _spread(call: EntropyCall, cotangent: Array | None, scale: float) -> Array | None:
    if cotangent is None:
        return None
    with np.errstate(all="ignore"):
        one = round_to(np.asarray(cotangent.astype(np.float64) * scale), call.compute_dtype)
    return np.broadcast_to(one, call.row_sizes)
