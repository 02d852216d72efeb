"""The true results of a problem in float64, and how far an implementation may be from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import unit_roundoff
from tilewise.ops.attention import reference
from tilewise.ops.attention.spec import (
    AttentionCall,
    AttentionOutputs,
    CotangentCall,
    Want,
    error_bound,
)

from . import metrics, straightforward

__all__ = ["Oracle", "consult"]

Array = NDArray[Any]

FORWARD = ("o", "lse", "max_logit", "entropy")
BACKWARD = ("dq", "dk", "dv", "dbias", "dsinks")
_NOISE_CAP = 1e-2
_ROW_STATISTICS = ("lse", "max_logit", "entropy")
_EXACTLY = ("lse", "max_logit")
_ALL = Want(lse=True, max_logit=True, entropy=True)


@dataclass(frozen=True)
class Oracle:
    """What a problem's results should be; arrays in `(B, H, N, ...)` order.

    Attributes:
        truth: float64 results by name: o lse max_logit entropy dq dk dv, and dbias dsinks where
            there are such.
        plain: Error of the straightforward computation in the problem's dtype.
        noise: Error that rounding alone explains, at most `spec.error_bound`.
        unit: u, one rounding.
    """

    truth: dict[str, Array]
    plain: dict[str, float]
    noise: dict[str, float]
    unit: float

    def yardstick(self, name: str) -> float:
        """Return the error of the straightforward computation plus one rounding of the result."""
        return self.plain[name] + self.unit

    def allowed(self, name: str) -> float:
        """Return the largest error that passes.

        That is the yardstick; but where luck made the error of the straightforward computation
        small, what rounding alone explains takes its place.
        """
        return max(self.plain[name], self.noise[name]) + self.unit

    def error(self, name: str, got: Array) -> float:
        """Return the error of a result."""
        return metrics.relative_error(got, self.truth[name], floor=_floor(name))

    def pattern(self, name: str, got: Array) -> str | None:
        """Return in words where NaN and Inf are not as they should be, or None."""
        return metrics.pattern(got, self.truth[name], exact=name in _EXACTLY)


def consult(call: AttentionCall, do: Array, dlse: Array | None) -> Oracle:
    """Return the truth about a call.

    Args:
        call: The validated call; masked entries may hold NaN.
        do: `(B, H, N, Dv)`, cotangent of o.
        dlse: `(B, H, N)`, cotangent of lse, or None.
    """
    with np.errstate(all="ignore"):
        truth, forward = _exact(call, do, dlse)
        clean = _clean(call, do, dlse)
        if any(x is not y for x, y in zip(clean, (call, do, dlse), strict=True)):
            finite, forward = _exact(*clean)
        else:
            finite = truth
        plain = _plain(*clean)
        exact = straightforward.evaluate(clean[0], np.dtype(np.float64))
        noise = straightforward.noise(exact, *clean[1:])
        bounds = _bounds(*clean, finite, forward)
    return Oracle(
        truth=truth,
        plain={name: _error_of_plain(plain[name], truth[name], name) for name in truth},
        noise={
            name: min(_size(noise[name], truth[name], name), bounds[name], _NOISE_CAP)
            for name in truth
        },
        unit=unit_roundoff(call.dtype),
    )


def _exact(
    call: AttentionCall, do: Array, dlse: Array | None
) -> tuple[dict[str, Array], AttentionOutputs]:
    """Return the results of the reference before they are rounded, and its forward pass."""
    forward = reference.forward64(call, _ALL)
    grads = reference.vjp64(call, CotangentCall(do, dlse, forward.o, forward.stats))
    found = {name: getattr(forward, name) for name in FORWARD} | grads._asdict()
    return {name: value for name, value in found.items() if value is not None}, forward


def _plain(call: AttentionCall, do: Array, dlse: Array | None) -> dict[str, Array]:
    x = straightforward.evaluate(call, call.dtype)
    return straightforward.results(x) | straightforward.gradients(x, do, dlse)


def _bounds(
    call: AttentionCall,
    do: Array,
    dlse: Array | None,
    truth: dict[str, Array],
    forward: AttentionOutputs,
) -> dict[str, float]:
    """Return the relative form of `spec.error_bound` for every result of a finite call."""
    sizes = reference.magnitudes(call, CotangentCall(do, dlse, forward.o, forward.stats))
    bounds = {}
    for name, value in truth.items():
        size, floor = np.abs(value[np.isfinite(value)]), _floor(name)
        norm = float(np.linalg.norm(size / np.maximum(floor, size) if floor else size))
        bound = error_bound(
            call.dtype,
            name,
            call,
            logit_size=sizes.logit_size,
            magnitude=sizes.norms[name],
            norm=norm,
        )
        bounds[name] = bound / norm if norm and np.isfinite(bound) else np.inf
    return bounds


def _floor(name: str) -> float:
    # A logit of size 1 or less matters by its absolute error, for exp makes that relative.
    return 1.0 if name in _ROW_STATISTICS else 0.0


def _error_of_plain(plain: Array, truth: Array, name: str) -> float:
    # Where the straightforward computation itself breaks down it is no yardstick.
    error = metrics.relative_error(plain, truth, floor=_floor(name))
    return error if np.isfinite(error) else 0.0


def _size(noise: Array, truth: Array, name: str) -> float:
    """Return standard deviations as a relative Frobenius error."""
    finite = np.isfinite(truth) & np.isfinite(noise)
    scale = np.where(finite, truth, 0)
    error = metrics.relative_error(scale + np.where(finite, noise, 0), scale, floor=_floor(name))
    return error if np.isfinite(error) else 0.0


def _clean(
    call: AttentionCall, do: Array, dlse: Array | None
) -> tuple[AttentionCall, Array, Array | None]:
    """Return finite numbers in the place of NaN and Inf; -inf in the bias stays."""
    bias = call.bias
    if bias is not None and not (bias < np.inf).all():
        bias = np.where(bias < np.inf, bias, bias.dtype.type(0))
    parts: dict[str, Any] = {
        "q": _finite(call.q),
        "k": _finite(call.k),
        "v": _finite(call.v),
        "bias": bias,
    }
    if any(part is not getattr(call, name) for name, part in parts.items()):
        call = replace(call, **parts)
    return call, _finite(do), None if dlse is None else _finite(dlse)


def _finite(x: Array) -> Array:
    finite = np.isfinite(x)
    return x if finite.all() else np.where(finite, x, x.dtype.type(0))
