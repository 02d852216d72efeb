"""The operator on the CPU: hands the buffers of a validated call to the compiled kernels."""

from __future__ import annotations

from dataclasses import replace
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
    LossCall,
    LossGrads,
    LossOutputs,
    LossStats,
    Needed,
    RowTangents,
    SecondCall,
    TangentCall,
    Want,
    reached,
)

Array = NDArray[Any]


def forward(call: LossCall, want: Want) -> LossOutputs:
    """Compute the losses, the row statistics and the other results that are wanted."""
    if not want.ignored:
        return _forward(call, want, call.kept)
    if want.gradients is None or call.kept.all():
        return _forward(call, want, None)
    # An ignored token has results, but nothing that it holds may reach a gradient.
    kept = _forward(call, want, call.kept)
    rest = _forward(call, replace(want, gradients=None), ~call.kept)
    stats = (np.where(call.kept, a, b) for a, b in zip(kept.stats, rest.stats, strict=True))
    rows: dict[str, Any] = {
        name: np.where(call.kept, getattr(kept, name), getattr(rest, name))
        for name in ("entropy", "argmax", "picked", "mass")
        if getattr(kept, name) is not None
    }
    return kept._replace(stats=LossStats(*stats), **rows)


def _forward(call: LossCall, want: Want, keep: NDArray[np.bool_] | None) -> LossOutputs:
    """Compute what is wanted of some tokens."""
    at = _Tokens(call, keep)
    loss, m, log_l = at.rows(), at.rows(), at.rows()
    entropy = at.rows() if want.entropy else None
    picked, mass = (at.rows() if want.picked else None for _ in range(2))
    argmax = empty((at.call.tokens,), np.int64) if want.argmax else None
    found: dict[str, Any] = {"loss": loss, "m": m, "log_l": log_l, "entropy": entropy}
    found |= {"argmax": argmax, "picked": picked, "mass": mass}
    grads = LossGrads()
    if want.gradients is not None:
        grads = at.gradients(want.gradients)
        dloss = np.where(at.call.kept, call.scale, 0.0).astype(call.compute_dtype)
        found |= {"g": dloss, "gradient_filter": call.gradient_filter, **grads._asdict()}
    at.run(_core.linear_cross_entropy_forward, found)
    return LossOutputs(
        at.back(loss),
        LossStats(at.back(m), at.back(log_l)),
        at.maybe(entropy),
        at.maybe(argmax),
        at.maybe(picked),
        at.maybe(mass),
        at.whole(grads),
    )


def vjp(call: LossCall, cotangents: CotangentCall, needed: Needed = ALL_NEEDED) -> LossGrads:
    """Compute the gradients that are needed."""
    at = _Tokens(call, reached(call, cotangents))
    accumulator = cotangents.accumulator
    grads = at.gradients(needed if accumulator is None else replace(needed, weight=False))
    given = {**at.cotangents(cotangents), **grads._asdict()}
    if accumulator is not None and needed.weight:
        given |= {"dweight": accumulator, "accumulate_dweight": True}
    stats, entropy = cotangents.stats, cotangents.entropy
    given |= {"m": at.take(stats.m), "log_l": at.take(stats.log_l), "entropy": at.take(entropy)}
    given["gradient_filter"] = call.gradient_filter
    at.run(_core.linear_cross_entropy_vjp, given)
    return at.whole(grads)


def jvp(call: LossCall, tangents: TangentCall) -> RowTangents:
    """Compute the tangents of the results."""
    at = _Tokens(call, None if tangents.ignored else call.kept)
    tloss, tlse = at.rows(), at.rows()
    tentropy = None if tangents.entropy is None else at.rows()
    given = {**at.tangents(tangents), "tloss": tloss, "tlse": tlse, "tentropy": tentropy}
    at.run(_core.linear_cross_entropy_jvp, given)
    return RowTangents(at.back(tloss), at.back(tlse), at.maybe(tentropy))


def vjp_jvp(call: LossCall, second: SecondCall, needed: Needed = ALL_NEEDED) -> LossGrads:
    """Compute the tangents of the gradients that are needed."""
    at = _Tokens(call, reached(call, second.cotangents, second))
    grads = at.gradients(needed)
    given = {
        **at.cotangents(second.cotangents),
        **at.tangents(second.tangents),
        "tg": at.take(second.tdloss),
        "tg_lse": at.take(second.tdlse),
        "tg_entropy": at.take(second.tdentropy),
        **{f"t{name}": grad for name, grad in grads._asdict().items()},
    }
    at.run(_core.linear_cross_entropy_vjp_jvp, given)
    return at.whole(grads)


class _Tokens:
    """The tokens of a call that have a part in a result; the others are left out.

    Attributes:
        call: The call of these tokens alone.
    """

    # What a kernel writes of the classes, whether or not there is a token.
    _OF_CLASSES = frozenset({"dweight", "dbias", "tdweight", "tdbias"})

    def __init__(self, call: LossCall, keep: NDArray[np.bool_] | None) -> None:
        self._whole = call
        self._at = None if keep is None or keep.all() else np.flatnonzero(keep)
        self.call = call
        if self._at is not None:
            hidden, targets = call.hidden[self._at], call.targets[self._at]
            self.call = replace(call, hidden=hidden, targets=targets)

    def take(self, x: Array | None) -> Array | None:
        """Return the tokens' rows of an array."""
        if x is None:
            return None
        return np.ascontiguousarray(x if self._at is None else x[self._at])

    def back(self, x: Array) -> Array:
        """Return the rows of all tokens, with zeros for those left out."""
        if self._at is None:
            return x
        whole = np.zeros((self._whole.tokens, *x.shape[1:]), x.dtype)
        whole[self._at] = x
        return whole

    def maybe(self, x: Array | None) -> Array | None:
        """Return the rows of all tokens where there are any."""
        return None if x is None else self.back(x)

    def rows(self) -> Array:
        """Return memory for one number a token."""
        return empty((self.call.tokens,), self.call.compute_dtype)

    def gradients(self, needed: Needed) -> LossGrads:
        """Return memory for gradients."""
        call, bias = self.call, self.call.bias
        return LossGrads(
            empty(call.hidden.shape, call.dtype) if needed.hidden else None,
            empty(call.weight.shape, call.dtype) if needed.weight else None,
            empty(bias.shape, bias.dtype) if needed.bias and bias is not None else None,
        )

    def whole(self, grads: LossGrads) -> LossGrads:
        """Return gradients with those of all tokens."""
        if grads.dhidden is None:
            return grads
        return grads._replace(dhidden=self.back(grads.dhidden))

    def cotangents(self, given: CotangentCall) -> dict[str, Array | None]:
        """Return cotangents as a kernel takes them."""
        return {
            "mass": self.take(given.mass),
            "g": self.take(given.dloss),
            "g_lse": self.take(given.dlse),
            "g_entropy": self.take(given.dentropy),
        }

    def tangents(self, given: TangentCall) -> dict[str, Array | None]:
        """Return tangents of the inputs, and the maxima, as a kernel takes them."""
        return {
            "m": self.take(given.stats.m),
            "thidden": self.take(given.thidden),
            "tweight": given.tweight,
            "tbias": given.tbias,
        }

    def run(self, function: Any, arrays: dict[str, Any]) -> None:
        """Call a kernel with the inputs, the options and other arrays."""
        call = self.call
        if call.tokens == 0:
            added = {"dweight"} if arrays.get("accumulate_dweight") else set[str]()
            for name in (self._OF_CLASSES & arrays.keys()) - added:
                if arrays[name] is not None:
                    arrays[name][...] = 0
            return
        given = {
            **arrays,
            "hidden": call.hidden,
            "weight": call.weight,
            "bias": call.bias,
            "class_weight": call.class_weight,
        }
        if is_narrow(call.dtype):
            given = {name: _bits(x) for name, x in given.items()}
        function(
            **given,
            targets=call.targets,
            label_smoothing=call.label_smoothing,
            z_loss=call.z_loss,
            softcap=call.softcap or 0.0,
            ignore_index=call.ignore_index,
            v_start=call.first_class,
            v_total=call.classes,
            token_chunk=call.token_chunk or 0,
            vocab_chunk=call.vocab_chunk or 0,
            storage=storage_of(call.dtype),
        )


def _bits(x: Any) -> Any:
    return x.view(np.uint16) if isinstance(x, np.ndarray) and is_narrow(x.dtype) else x


IMPLEMENTATION = Implementation("cpu", forward, vjp, jvp, vjp_jvp)
