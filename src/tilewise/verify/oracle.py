"""The true results of a problem in float64, and how far an implementation may be from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import FloatDType, is_narrow, round_to, unit_roundoff
from tilewise.ops.attention import reference
from tilewise.ops.attention.spec import (
    AttentionCall,
    AttentionOutputs,
    CotangentCall,
    SecondCall,
    TangentCall,
    Want,
    error_bound,
    prepare,
)

from . import metrics, straightforward
from .cases.problem import Problem
from .noise import Noise, of_rounding

__all__ = [
    "BACKWARD",
    "FORWARD",
    "ONE_PASS",
    "SECOND",
    "TANGENTS",
    "Oracle",
    "Question",
    "consult",
    "floor_of",
]

Array = NDArray[Any]

FORWARD = ("o", "lse", "max_logit", "entropy")
BACKWARD = ("dq", "dk", "dv", "dbias", "dsinks")
TANGENTS = ("to", "tlse")
SECOND = tuple(f"t{name}" for name in BACKWARD)
ONE_PASS = {f"one-pass {name}": name for name in ("o", "lse", *TANGENTS)}
"""What a forward pass with its tangents returns, and which results these are."""
_NOISE_CAP = 1e-2
_ROW_STATISTICS = ("lse", "max_logit", "entropy")
_STATISTICS = (*_ROW_STATISTICS, "tlse")
_EXACTLY = ("lse", "max_logit")
_ALL = Want(lse=True, max_logit=True, entropy=True)
_OF_INPUT = {"dbias": "bias", "tdbias": "bias", "dsinks": "sinks", "tdsinks": "sinks"}
_NO_DIGITS = 0.1


@dataclass(frozen=True)
class Question:
    """A problem whose results are asked for; tensors are `(B, H, N, ...)`.

    Attributes:
        call: The validated call; masked entries may hold NaN.
        do: `(B, H, N, Dv)`, cotangent of o.
        dlse: `(B, H, N)`, cotangent of lse, or None.
        tangents: Tangents of inputs and cotangents by name, tq tk tv tbias tsinks tdo tdlse, zero
            where missing; None asks for no tangents of results.
    """

    call: AttentionCall
    do: Array
    dlse: Array | None = None
    tangents: Mapping[str, Array] | None = None

    @classmethod
    def of(cls, problem: Problem, *, tangents: bool) -> Question:
        """Return the question that a problem of the cases asks, with or without tangents."""
        a, case = problem.arrays, problem.case
        given = {name: case.in_order(name, x) for name, x in problem.tangents.items()}
        call = prepare(a["q"], a["k"], a["v"], **problem.options)
        return cls(call, case.in_order("do", a["do"]), a.get("dlse"), given if tangents else None)

    def cotangents(self, forward: AttentionOutputs) -> CotangentCall:
        """Return the cotangents with the results of the forward pass."""
        return CotangentCall(self.do, self.dlse, forward.o, forward.stats)

    def second(self, forward: AttentionOutputs) -> SecondCall:
        """Return cotangents and tangents with the results of the forward pass."""
        given = self.tangents or {}
        tbias, bias = given.get("tbias"), self.call.bias
        tangents = TangentCall(
            tq=given.get("tq"),
            tk=given.get("tk"),
            tv=given.get("tv"),
            tbias=None if tbias is None or bias is None else tbias.reshape(bias.shape),
            tsinks=given.get("tsinks"),
            o=forward.o,
            stats=forward.stats,
        )
        cotangents = self.cotangents(forward)
        return SecondCall(cotangents, tangents, given.get("tdo"), given.get("tdlse"), None)


@dataclass(frozen=True)
class Oracle:
    """What a problem's results should be; arrays in `(B, H, N, ...)` order.

    Attributes:
        truth: float64 results by name: o lse max_logit entropy dq dk dv, dbias dsinks where there
            are such, and the tangents of o, lse and the gradients where these were asked for.
        plain: Error of the straightforward computation in the problem's dtype; with 16 bits, in
            float32 and rounded to these at the end.
        noise: Error that rounding alone explains, at most `spec.error_bound`.
        unit: u, one rounding in the dtype of sums.
        dtypes: What each result is stored in.
        rounded: What it is rounded to somewhere on the way, or at the end.
        vague: The results that rounding alone may put off by more than is ever allowed.
    """

    truth: dict[str, Array]
    plain: dict[str, float]
    noise: dict[str, float]
    unit: float
    dtypes: dict[str, FloatDType]
    rounded: dict[str, FloatDType]
    vague: frozenset[str]

    def yardstick(self, name: str) -> float:
        """Return the error of the straightforward computation plus one rounding of the result."""
        # With 16 bits that rounding is in the straightforward computation already.
        return self.plain[name] + (0.0 if is_narrow(self.rounded[name]) else self.unit)

    def allowed(self, name: str) -> float:
        """Return the largest error that passes.

        That is the yardstick; but where luck made the error of the straightforward computation
        small, what rounding alone explains takes its place. With 16 bits it is a multiple of the
        larger of the two, for factors of products may be rounded as the result is.
        """
        largest = max(self.plain[name], self.noise[name])
        if not is_narrow(self.rounded[name]):
            return largest + self.unit
        return 2.0 * largest

    def unfit(self, name: str) -> str:
        """Return why a result of 16 bits means nothing, or an empty text."""
        dtype, truth = self.dtypes[name], self.truth[name]
        if is_narrow(self.rounded[name]) and name in self.vague:
            # Kernels for 16 bits may compute the same logit twice in other orders of its sum.
            return "logits so large that float32 cannot tell"
        if not is_narrow(dtype):
            return ""
        with np.errstate(all="ignore"):
            rounded = round_to(truth, dtype)
        if not np.isfinite(rounded[np.isfinite(truth)]).all():
            return f"{dtype} has no numbers as large"
        lost = metrics.relative_error(rounded, truth) > _NO_DIGITS
        return f"{dtype} has no numbers as small" if lost else ""

    def error(self, name: str, got: Array) -> float:
        """Return the error of a result."""
        return metrics.relative_error(got, self.truth[name], floor=floor_of(name))

    def pattern(self, name: str, got: Array) -> str | None:
        """Return in words where NaN and Inf are not as they should be, or None."""
        return metrics.pattern(got, self.truth[name], exact=ONE_PASS.get(name, name) in _EXACTLY)


def consult(question: Question) -> Oracle:
    """Return the truth about a problem."""
    with np.errstate(all="ignore"):
        truth, forward = _exact(question)
        clean = _clean(question)
        finite = truth
        if clean is not question:
            finite, forward = _exact(clean)
        dtypes = {name: _stored(question.call, name) for name in truth}
        # The gradient of a float32 bias is float32, yet made of factors that are rounded as q is.
        q_dtype = question.call.dtype
        rounded = {n: d if n in _STATISTICS else q_dtype for n, d in dtypes.items()}
        plain = {name: round_to(x, rounded[name]) for name, x in _plain(clean).items()}
        noise = _noise(clean)
        vague = {name for name in truth if _size(noise[name], truth[name], name) > _NOISE_CAP}
        for name in truth:
            if is_narrow(rounded[name]):
                noise[name] = np.hypot(noise[name], of_rounding(finite[name], rounded[name]))
        bounds = _bounds(clean, finite, forward)
    if question.tangents is not None:
        tables: tuple[dict[str, Any], ...] = (truth, plain, noise, bounds, dtypes, rounded)
        for results in tables:
            results |= {name: results[same] for name, same in ONE_PASS.items()}
        vague |= {name for name, same in ONE_PASS.items() if same in vague}
    return Oracle(
        truth=truth,
        plain={name: _error_of_plain(plain[name], truth[name], name) for name in truth},
        noise={
            name: min(_size(noise[name], truth[name], name), bounds[name], _NOISE_CAP)
            for name in truth
        },
        unit=unit_roundoff(question.call.compute_dtype),
        dtypes=dtypes,
        rounded=rounded,
        vague=frozenset(vague),
    )


def _exact(question: Question) -> tuple[dict[str, Array], AttentionOutputs]:
    """Return the results of the reference before they are rounded, and its forward pass."""
    call = question.call
    forward = reference.forward64(call, _ALL)
    found: dict[str, Any] = {name: getattr(forward, name) for name in FORWARD}
    found |= reference.vjp64(call, question.cotangents(forward))._asdict()
    if question.tangents is not None:
        second = question.second(forward)
        outputs = reference.jvp64(call, second.tangents)
        grads = reference.vjp_jvp64(call, replace(second, outputs=outputs))
        found |= outputs._asdict() | dict(zip(SECOND, grads, strict=True))
    return {name: value for name, value in found.items() if value is not None}, forward


def _plain(question: Question) -> dict[str, Array]:
    """Return the results of the straightforward computation in the dtype of the problem's sums."""
    x = straightforward.evaluate(question.call, question.call.compute_dtype)
    do, dlse, tangents = question.do, question.dlse, question.tangents
    found = straightforward.results(x) | straightforward.gradients(x, do, dlse)
    if tangents is not None:
        d = straightforward.directions(x, tangents)
        found |= straightforward.output_tangents(x, d) | straightforward.second(x, do, dlse, d)
    return found


def _noise(question: Question) -> dict[str, Array]:
    """Return for every entry of every result how far rounding alone may put it off."""
    x = straightforward.evaluate(question.call, np.dtype(np.float64))
    noise = Noise(x, question.do, question.dlse)
    found = noise.results() | noise.gradients()
    if question.tangents is not None:
        found |= noise.tangents(straightforward.directions(x, question.tangents))
    return found


def _bounds(
    question: Question, truth: dict[str, Array], forward: AttentionOutputs
) -> dict[str, float]:
    """Return the relative form of `spec.error_bound` for every result of a finite call."""
    call = question.call
    sizes = reference.magnitudes(call, question.cotangents(forward))
    bounds = {}
    for name, value in truth.items():
        size, floor = np.abs(value[np.isfinite(value)]), floor_of(name)
        norm = float(np.linalg.norm(size / np.maximum(floor, size) if floor else size))
        if name not in sizes.norms:
            bounds[name] = np.inf
            continue
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


def _stored(call: AttentionCall, name: str) -> FloatDType:
    """Return the dtype that a result must have."""
    if name in _STATISTICS:
        return call.compute_dtype
    of = getattr(call, _OF_INPUT.get(name, "q"))
    dtype: FloatDType = call.dtype if of is None else of.dtype
    return dtype


def floor_of(name: str) -> float:
    """Return the magnitude below which the errors of a result count as absolute ones."""
    # A logit of size 1 or less matters by its absolute error, for exp makes that relative.
    return 1.0 if ONE_PASS.get(name, name) in _ROW_STATISTICS else 0.0


def _error_of_plain(plain: Array, truth: Array, name: str) -> float:
    # Where the straightforward computation itself breaks down it is no yardstick.
    error = metrics.relative_error(plain, truth, floor=floor_of(name))
    return error if np.isfinite(error) else 0.0


def _size(noise: Array, truth: Array, name: str) -> float:
    """Return standard deviations as a relative Frobenius error."""
    finite = np.isfinite(truth) & np.isfinite(noise)
    scale = np.where(finite, truth, 0)
    error = metrics.relative_error(scale + np.where(finite, noise, 0), scale, floor=floor_of(name))
    return error if np.isfinite(error) else 0.0


def _clean(question: Question) -> Question:
    """Return finite numbers in the place of NaN and Inf; -inf in the bias stays."""
    call, tangents = question.call, question.tangents
    bias = call.bias
    if bias is not None and not (bias < np.inf).all():
        bias = np.where(bias < np.inf, bias, bias.dtype.type(0))
    parts: dict[str, Any] = {name: _finite(getattr(call, name)) for name in ("q", "k", "v")}
    parts["bias"] = bias
    if any(part is not getattr(call, name) for name, part in parts.items()):
        call = replace(call, **parts)
    clean = Question(
        call,
        _finite(question.do),
        None if question.dlse is None else _finite(question.dlse),
        None if tangents is None else {name: _finite(x) for name, x in tangents.items()},
    )
    unchanged = clean.call is question.call and clean.do is question.do
    unchanged &= clean.dlse is question.dlse
    unchanged &= all(x is (tangents or {})[name] for name, x in (clean.tangents or {}).items())
    return question if unchanged else clean


def _finite(x: Array) -> Array:
    finite = np.isfinite(x)
    return x if finite.all() else np.where(finite, x, x.dtype.type(0))
