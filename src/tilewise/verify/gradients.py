"""Are the gradients of one problem right? Checked by formula and by finite differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise import numpy as frontend
from tilewise.base.dtypes import WIDE, listed
from tilewise.base.errors import type_error, value_error
from tilewise.base.masks import Mask
from tilewise.ops.attention import reference, spec
from tilewise.ops.attention.spec import AttentionCall, Want

from .oracle import Oracle, Question, consult

__all__ = ["GradientError", "GradientReport", "verify_gradients"]

Array = NDArray[Any]

_LABELS = {"dq": "dL_dQ", "dk": "dL_dK", "dv": "dL_dV", "dbias": "dL_dbias", "dsinks": "dL_dsinks"}
# A directional derivative along N(0, 1) is N(0, |gradient|^2): six standard deviations.
_DEVIATIONS = 6.0
_DIFFERENCE_ACCURACY = 1e-7


@dataclass(frozen=True)
class GradientError:
    """How far one gradient is off.

    Attributes:
        formula: Relative Frobenius error against the float64 formulas.
        allowed: The largest such error that passes.
        differences: Largest error of a directional derivative against central differences of the
            float64 forward pass, over the norm of the gradient.
        differences_allowed: The largest such error that passes.
        problem: Why the gradient could not be compared, or an empty text.
    """

    formula: float
    allowed: float
    differences: float
    differences_allowed: float
    problem: str = ""

    @property
    def correct(self) -> bool:
        """Whether both errors are within what is allowed."""
        near = self.formula <= self.allowed and self.differences <= self.differences_allowed
        return near and not self.problem


class GradientReport(Mapping[str, bool]):
    """For each gradient whether it is correct; ``report["all_correct"]`` is the verdict.

    Attributes:
        errors: By the same names, how far each gradient is off.
    """

    def __init__(self, errors: Mapping[str, GradientError]) -> None:
        self.errors = dict(errors)
        self._verdicts = {name: error.correct for name, error in errors.items()}
        self._verdicts["all_correct"] = all(self._verdicts.values())

    def __getitem__(self, name: str) -> bool:
        """Return whether a gradient is correct."""
        return self._verdicts[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, ``all_correct`` last."""
        return iter(self._verdicts)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._verdicts)

    def __repr__(self) -> str:
        """Return the verdicts as a dictionary."""
        return repr(self._verdicts)


def verify_gradients(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask | NDArray[np.bool_] | None = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    softmax_scale: float | None = None,
    layout: str = "bhnd",
    implementation: str | None = None,
    seed: int = 0,
    samples: int = 4,
) -> GradientReport:
    """Check the gradients of attention on one problem, for random cotangents of o and lse.

    Every gradient is compared with the float64 formulas, entry by entry; and along random
    directions t with fourth-order central differences of the float64 forward pass,
    `sum(dX * t) = d/dh L(X + h t)` with `L = sum(do * o) + sum(dlse * lse)`, which knows no
    formula of a gradient.

    Args:
        q: `(B, H, N, D)`, float32 or float64, finite. Options are as in `tilewise.attention`.
        k: `(B, Hk, Nk, D)`, dtype of q, finite.
        v: `(B, Hk, Nk, Dv)`, dtype of q, finite.
        mask: A mask or a boolean array.
        bias: Broadcasts to `(B, H, N, Nk)`; finite or -inf.
        alibi_slopes: `(H,)` or `(B, H)`.
        softcap: The soft cap.
        sinks: `(H,)`.
        softmax_scale: Factor of `q k^T`.
        layout: ``"bhnd"`` or ``"bnhd"``.
        implementation: Whose gradients; by default those that calls get.
        seed: Of the cotangents and directions.
        samples: How many directions for each gradient.

    Returns:
        ``{"dL_dQ": True, "dL_dK": True, "dL_dV": True, "all_correct": True}``, with ``dL_dbias``
        and ``dL_dsinks`` where these were given; `.errors` has the numbers.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value, or is not finite.
    """
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise type_error("verify_gradients", "samples", "be an integer", type(samples).__name__)
    if samples < 1:
        raise value_error("verify_gradients", "samples", "be at least 1", samples)
    options: dict[str, Any] = {
        "mask": mask,
        "bias": bias,
        "alibi_slopes": alibi_slopes,
        "softcap": softcap,
        "sinks": sinks,
        "softmax_scale": softmax_scale,
        "layout": layout,
    }
    call = spec.prepare(q, k, v, **options)
    if call.is_narrow:
        requirement = f"have dtype {listed(WIDE)}, to be compared entry by entry"
        raise type_error("verify_gradients", "q", requirement, str(call.dtype))
    _check_finite(call)
    rng = np.random.default_rng(seed)
    do = rng.standard_normal((call.B, call.H, call.N, call.Dv)).astype(call.dtype)
    dlse = rng.standard_normal((call.B, call.H, call.N)).astype(call.dtype)
    oracle = consult(Question(call, do, dlse))
    # A row without keys has no lse to vary.
    counted = np.where(np.isfinite(oracle.truth["lse"]), dlse, 0).astype(np.float64)

    chosen = {**options, "implementation": implementation}
    result = frontend.attention(q, k, v, return_stats=True, **chosen)
    if not isinstance(result, frontend.AttentionResult) or result.stats is None:
        raise type_error("verify_gradients", "the forward pass", "return stats", repr(result))
    cotangent = do if layout == "bhnd" else np.ascontiguousarray(do.swapaxes(1, 2))
    grads = frontend.attention_vjp(cotangent, q, k, v, result.o, result.stats, dlse=dlse, **chosen)
    canonical = _canonical(grads, layout)
    loss = _Loss(call, do.astype(np.float64), counted)
    return GradientReport(
        {
            _LABELS[name]: _error_of(name, got, oracle, loss, rng, samples)
            for name, got in canonical.items()
        }
    )


@dataclass(frozen=True)
class _Loss:
    """`L = sum(do * o) + sum(dlse * lse)` in float64."""

    call: AttentionCall
    do: Array
    dlse: Array

    def at(self, **changed: Any) -> float:
        """Return L with some operands replaced by float64 ones."""
        out = reference.forward64(replace(self.call, **changed), Want(lse=True))
        lse = np.where(self.dlse != 0, np.asarray(out.lse), 0.0)
        return float((self.do * out.o).sum() + (self.dlse * lse).sum())

    def slope(self, name: str, direction: Array, step: float) -> float:
        """Return dL along a direction of one operand, with an error of order step^4."""
        base = np.asarray(getattr(self.call, name), np.float64)

        def along(h: float) -> float:
            with np.errstate(all="ignore"):
                moved = base + h * direction.reshape(base.shape)
            return self.at(**{name: moved})

        if name == "v":
            # L is linear in v.
            return (along(1.0) - along(-1.0)) / 2
        near, far = along(step) - along(-step), along(2 * step) - along(-2 * step)
        return (8 * near - far) / (12 * step)


def _error_of(
    name: str, got: Array, oracle: Oracle, loss: _Loss, rng: np.random.Generator, samples: int
) -> GradientError:
    truth, allowed = oracle.truth[name], oracle.allowed(name)
    differences_allowed = _DEVIATIONS * allowed + _DIFFERENCE_ACCURACY
    if got.shape != truth.shape or got.dtype != loss.call.dtype:
        problem = f"{got.dtype} {got.shape}, should be {loss.call.dtype} {truth.shape}"
        return GradientError(np.inf, allowed, np.inf, differences_allowed, problem)
    problem = oracle.pattern(name, got) or ""
    operand = name[1:]
    norm, worst = float(np.linalg.norm(truth)), 0.0
    step = _step(loss.call, operand)
    for _ in range(samples):
        direction = rng.standard_normal(truth.shape)
        want = loss.slope(operand, direction, step)
        found = float((got.astype(np.float64) * direction).sum())
        worst = max(worst, abs(found - want)) if np.isfinite(found) else np.inf
    differences = worst / norm if norm else worst
    return GradientError(
        oracle.error(name, got), allowed, differences, differences_allowed, problem
    )


def _step(call: AttentionCall, operand: str) -> float:
    """Return a step along which logits move by about 1e-3."""
    other = {"q": call.k, "k": call.q}.get(operand)
    if other is None or not other.size:
        return 1e-3
    length = float(np.linalg.norm(other.astype(np.float64), axis=-1).max())
    return 1e-3 / max(1e-3, call.softmax_scale * length)


def _canonical(grads: spec.AttentionGrads, layout: str) -> dict[str, Array]:
    found = {"dq": grads.dq, "dk": grads.dk, "dv": grads.dv}
    if layout != "bhnd":
        found = {name: x.swapaxes(1, 2) for name, x in found.items()}
    if grads.dbias is not None:
        found["dbias"] = grads.dbias
    if grads.dsinks is not None:
        found["dsinks"] = grads.dsinks
    return found


def _check_finite(call: AttentionCall) -> None:
    for name in ("q", "k", "v"):
        if not np.isfinite(getattr(call, name)).all():
            raise value_error("verify_gradients", name, "be finite", "NaN or Inf")
    if call.bias is not None and not (call.bias < np.inf).all():
        raise value_error("verify_gradients", "bias", "be finite or -inf", "NaN or inf")
