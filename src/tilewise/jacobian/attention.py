"""The Jacobians of attention with respect to queries, keys and values."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from tilewise import numpy as frontend
from tilewise.base.errors import value_error
from tilewise.numpy.attention import AttentionOptions

from .base import NAME, Jacobian, Order, Structure

Array = NDArray[Any]

_FORMULAS = {
    "q": "scale v^T (diag(p) - p p^T) k",
    "k": "scale v^T (diag(p) - p p^T) (x) q over its queries",
    "v": "P (x) I",
}


class _Attention(Jacobian):
    def __init__(self, tensors: dict[str, Array], wrt: str, options: AttentionOptions) -> None:
        self._wrt, self._options = wrt, options
        self._tensors = (tensors["q"], tensors["k"], tensors["v"])
        result: Any = frontend.attention(*self._tensors, return_stats=True, **options)
        self._o = result.o if result.o_full is None else result.o_full
        self._stats = result.stats
        x, k, o = tensors[wrt], tensors["k"], result.o
        # The order is (batch, head, position, entry), whatever the layout.
        order = (0, 2, 1, 3) if options.get("layout") == "bnhd" else (0, 1, 2, 3)
        B, H, N, Dv = (o.shape[axis] for axis in order)
        Hk, Nk = k.shape[order[1]], k.shape[order[2]]
        self.name, self.dtype = f"attention with respect to {wrt}", x.dtype
        self.inputs, self.outputs = Order(x.shape, order), Order(o.shape, order)
        if wrt == "q":
            count, size = B * H * N, (Dv, x.shape[3])
        else:
            group = H // Hk if Hk else 0
            count, size = B * Hk, (group * N * Dv, Nk * x.shape[3])
        kind: Literal["Kronecker", "dense"] = "Kronecker" if wrt == "v" else "dense"
        self.structure = Structure(kind, _FORMULAS[wrt], count, size)

    def _push(self, t: Array) -> Array:
        tq, tk, tv = (t if name == self._wrt else None for name in "qkv")
        forward = self._o, self._stats
        found = frontend.attention_jvp(tq, tk, tv, *self._tensors, *forward, **self._options)
        return found.to

    def _pull(self, g: Array) -> Array:
        forward = self._o, self._stats
        grads = frontend.attention_vjp(g, *self._tensors, *forward, **self._options)
        part: Array = getattr(grads, f"d{self._wrt}")
        return part

    def _held(self) -> tuple[Array | None, ...]:
        given = [self._options.get(name) for name in ("mask", "bias", "alibi_slopes", "sinks")]
        arrays = [a for a in given if isinstance(a, np.ndarray)]
        return (*self._tensors, self._o, *self._stats, *arrays)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    wrt: Literal["q", "k", "v"] = "q",
    **options: Unpack[AttentionOptions],
) -> Jacobian:
    """Return the Jacobian of `tilewise.numpy.attention` with respect to q, k or v.

    With respect to q there is a block `(Dv, D)` for each query; with respect to k and v one for
    each batch entry and key head, `(H / Hk N Dv, Nk D)`, for queries share keys. That of v is
    `P (x) I`, with the probabilities P of the queries of the head.

    Args:
        q: `(B, H, N, D)`. It is kept, not copied, and so are k and v.
        k: `(B, Hk, Nk, D)`, dtype of q.
        v: `(B, Hk, Nk, Dv)`, dtype of q.
        wrt: Which of the three is the input.
        **options: As for `tilewise.numpy.attention`.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
    """
    if wrt not in _FORMULAS:
        raise value_error(NAME, "wrt", "be 'q', 'k' or 'v'", repr(wrt))
    return _Attention({"q": q, "k": k, "v": v}, wrt, options)
