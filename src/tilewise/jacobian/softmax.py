"""The Jacobian of the softmax: for each row `(diag(p) - p p^T) / temperature`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise import numpy as frontend
from tilewise.ops.softmax.spec import axes_of

from .base import MAX_BYTES, Jacobian, Order, Structure, check_finite

Array = NDArray[Any]


class _Softmax(Jacobian):
    def __init__(self, x: Array, axis: Any, options: dict[str, Any]) -> None:
        self._x, self._options = x, {"axis": axis, **options}
        result = frontend.softmax(x, axis, return_stats=True, **options)
        assert isinstance(result, frontend.SoftmaxResult) and result.stats is not None
        self._p, self._stats = result.y, result.stats
        axes = axes_of("softmax", "axis", axis, x.ndim)
        others = tuple([k for k in range(x.ndim) if k not in axes])
        C = math.prod([x.shape[k] for k in axes])
        self.name, self.dtype = "softmax with respect to x", x.dtype
        self.inputs = self.outputs = Order(x.shape, (*others, *axes))
        scale = options.get("temperature", 1.0)
        formula = "diag(p) - p p^T" if scale == 1 else f"(diag(p) - p p^T) / {scale:g}"
        rows = math.prod([x.shape[k] for k in others])
        self.structure = Structure("diagonal + rank one", formula, rows, (C, C))

    def _push(self, t: Array) -> Array:
        found = frontend.softmax_jvp(t, self._x, self._stats, kinds="y", **self._options)
        assert found.ty is not None
        return found.ty

    def _pull(self, g: Array) -> Array:
        dx: Array = frontend.softmax_vjp(g, self._x, self._stats, **self._options).dx
        return dx

    def _held(self) -> tuple[Array | None, ...]:
        given = (self._options.get(name) for name in ("where", "sink"))
        return (self._x, *self._stats, *[a for a in given if isinstance(a, np.ndarray)])

    def rank(self, *, max_bytes: int = MAX_BYTES) -> int:
        """Return the rank: for each row the positive probabilities, less one without a sink.

        A probability that is 0, for its entry is hidden or the number underflowed, gives a row and
        a column of zeros. Nothing but the probabilities is looked at.
        """
        positive, short = self._support()
        return int((positive.sum(axis=1) - short).sum())

    def nullspace(self, *, max_bytes: int = MAX_BYTES) -> Array:
        """Return an orthonormal basis of the vectors whose product is zero.

        For each row that is the vector of ones, where probabilities are positive, without a sink;
        and the unit vector of each probability that is 0.
        """
        positive, short = self._support()
        bases = []
        for support, has_ones in zip(positive, short, strict=True):
            units = np.eye(len(support), dtype=self.dtype)[:, ~support]
            if has_ones:
                ones = (support / math.sqrt(support.sum())).astype(self.dtype)
                units = np.concatenate([ones[:, None], units], axis=1)
            bases.append(units)
        return self._placed(bases, max_bytes)

    def _support(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return for each row which probabilities are positive, and whether they sum to one."""
        rows, (C, _) = self.structure.blocks, self.structure.block_shape
        p = self._p.transpose(self.inputs.axes).reshape(rows, C)
        check_finite(p)
        positive = p > 0
        return positive, positive.any(axis=1) & (self._sink_share().reshape(rows) == 0)

    def _sink_share(self) -> Array:
        """Return the probability of the sink in each row, in the shape of the rows."""
        m, log_l = self._stats
        z = np.asarray(self._options.get("sink", -np.inf), np.float64)
        scale = self._options.get("temperature", 1.0)
        with np.errstate(all="ignore"):
            top = np.where(np.isneginf(m), 0.0, m.astype(np.float64)) / scale
            share = np.exp(z - top - log_l).astype(m.dtype)
        return np.broadcast_to(share, m.shape)


def softmax(
    x: Array,
    axis: int | tuple[int, ...] | None = -1,
    *,
    temperature: float = 1.0,
    where: NDArray[np.bool_] | None = None,
    sink: float | Array | None = None,
    implementation: str | None = None,
) -> Jacobian:
    """Return the Jacobian of `tilewise.numpy.softmax` with respect to x.

    A block for each row, `(diag(p) - p p^T) / temperature`: symmetric, and of rank one less than
    there are positive probabilities, for the sum of the row does not change with x.

    Args:
        x: Any shape. It is kept, not copied: changing it later makes the products wrong.
        axis: As for `tilewise.numpy.softmax`, and so are the others.
        temperature: What x is divided by.
        where: True where an entry is visible.
        sink: One more logit of each row. With one the rank is not reduced.
        implementation: Name of the implementation.

    Raises:
        TypeError: An argument has a wrong kind or dtype.
        ValueError: An argument has a wrong shape or value.
    """
    given: dict[str, Any] = {"temperature": temperature, "where": where, "sink": sink}
    given["implementation"] = implementation
    return _Softmax(x, axis, {name: a for name, a in given.items() if a is not None})
