"""The softmax on the CPU: hands the buffers of a validated call to the compiled kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise import _core
from tilewise.base.dtypes import is_narrow, storage_of
from tilewise.base.memory import empty
from tilewise.base.operator import Implementation

from .spec import (
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

Array = NDArray[Any]


def forward(call: SoftmaxCall, want: Want) -> SoftmaxOutputs:
    """Compute the results that are wanted."""
    y, log_y = _whole(call, want.y, want.out), _whole(call, want.log_y, want.out)
    lse, m, log_l = (_rows(call, wanted) for wanted in (want.lse, want.stats, want.stats))
    found = {"y": y, "log_y": log_y, "lse": lse, "m": m, "log_l": log_l}
    _core.softmax_forward(**_given(call, found))
    stats = None if m is None or log_l is None else SoftmaxStats(m, log_l)
    return SoftmaxOutputs(y, log_y, lse, stats)


def vjp(call: SoftmaxCall, cotangents: CotangentCall, needed: Needed = ALL_NEEDED) -> SoftmaxGrads:
    """Compute the gradients that are needed."""
    found = _gradients(call, needed)
    _core.softmax_vjp(**_given(call, {**_cotangents(cotangents), **found}))
    return SoftmaxGrads(**found)


def jvp(call: SoftmaxCall, tangents: TangentCall, want: Want) -> SoftmaxTangents:
    """Compute the tangents of the results that are wanted."""
    found = {
        "ty": _whole(call, want.y),
        "tz": _whole(call, want.log_y),
        "tl": _rows(call, want.lse),
    }
    saved = {"m": tangents.stats.m, "log_l": tangents.stats.log_l}
    _core.softmax_jvp(**_given(call, {**saved, **_tangents(tangents), **found}))
    return SoftmaxTangents(*found.values())


def vjp_jvp(call: SoftmaxCall, second: SecondCall, needed: Needed = ALL_NEEDED) -> SoftmaxGrads:
    """Compute the tangents of the gradients that are needed."""
    found = _gradients(call, needed)
    moved = {"tgy": second.tdy, "tgz": second.tdlog_y, "tgl": second.tdlse}
    given = {**_cotangents(second.cotangents), **_tangents(second.tangents), **moved}
    _core.softmax_vjp_jvp(**_given(call, {**given, **found}))
    return SoftmaxGrads(**found)


def _whole(call: SoftmaxCall, wanted: bool, out: Array | None = None) -> Array | None:
    if not wanted:
        return None
    return empty(call.x.shape, call.dtype) if out is None else out


def _rows(call: SoftmaxCall, wanted: bool) -> Array | None:
    return empty(call.row_sizes, call.compute_dtype) if wanted else None


def _gradients(call: SoftmaxCall, needed: Needed) -> dict[str, Array | None]:
    """Return the arrays into which a kernel writes gradients."""
    of_sink = _rows(call, needed.sink and call.sink is not None)
    return {"dx": _whole(call, needed.x), "dsink": of_sink}


def _cotangents(given: CotangentCall) -> dict[str, Array | None]:
    saved = {"m": given.stats.m, "log_l": given.stats.log_l}
    return {**saved, "gy": given.dy, "gz": given.dlog_y, "gl": given.dlse}


def _tangents(given: TangentCall) -> dict[str, Array | None]:
    return {"tx": given.tx, "tsink": given.tsink}


def _given(call: SoftmaxCall, arrays: dict[str, Array | None]) -> dict[str, Any]:
    """Return x, the options and other arrays as a kernel takes them: those of 16 bits as such."""
    arrays = {"x": call.x, "sink": call.sink, **arrays}
    if is_narrow(call.dtype):
        arrays = {name: _bits(x) for name, x in arrays.items()}
    return {
        **arrays,
        "scale": 1.0 / call.temperature,
        "where": None if call.where is None else call.where.view(np.uint8),
        "storage": storage_of(call.dtype),
    }


def _bits(x: Array | None) -> Array | None:
    return x.view(np.uint16) if x is not None and is_narrow(x.dtype) else x


IMPLEMENTATION = Implementation("cpu", forward, vjp, jvp, vjp_jvp)
