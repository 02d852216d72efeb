"""What is computed, with which keys hidden, and what a way to compute it has to offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.masks import Mask
from tilewise.bench import textbook

__all__ = ["Contender", "NotAvailable", "Pattern", "Problem", "missing", "named"]

Array = NDArray[Any]

_STEP = 1e-5
# Of a larger problem the first heads are compared with float64.
_COMPARED_PAIRS = 1 << 26


class NotAvailable(ImportError):
    """A contender cannot take part; the text says why."""


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees; all that are given hold together, but for `prefix`.

    Attributes:
        causal: none after its own position; the last query stands at the last key.
        window: and of those its own and the `window` before it.
        prefix: the first `prefix` keys, beside the above.
        documents: lengths of documents; a query sees its own.
        lengths: the number of keys of each batch entry.
    """

    causal: bool = False
    window: int | None = None
    prefix: int | None = None
    documents: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self != Pattern()

    @property
    def alone(self) -> bool:
        """Whether nothing is hidden but what `causal` hides."""
        return replace(self, causal=False) == Pattern()

    def sees(self, b: Any, i: Any, j: Any, ids: Any = None, lengths: Any = None) -> Any:
        """Return whether batch entry b's query at position i sees key j.

        Args:
            b: batch entry.
            i: position of the query among the keys, an array or a tensor.
            j: key, the same.
            ids: the number of the document of each position, where there are documents.
            lengths: `self.lengths`, as an array or a tensor where b is one.
        """
        seen = j >= 0
        if self.causal or self.window is not None:
            seen = j <= i
        if self.window is not None:
            seen = seen & (j >= i - self.window)
        if self.prefix is not None:
            seen = seen | (j < self.prefix)
        if self.documents:
            seen = seen & (ids[i] == ids[j])
        return seen & (j < lengths[b]) if self.lengths else seen

    def ids(self) -> NDArray[np.int32]:
        """Return the number of the document at each position."""
        return np.repeat(np.arange(len(self.documents), dtype=np.int32), self.documents)

    def visible(self, b: int, start: int, stop: int, N: int, Nk: int) -> NDArray[np.bool_]:
        """Return rows `[start, stop)` of the mask of N queries and Nk keys as booleans."""
        i, j = np.arange(start, stop)[:, None] + (Nk - N), np.arange(Nk)[None, :]
        seen: NDArray[np.bool_] = self.sees(b, i, j, self.ids(), self.lengths)
        return np.broadcast_to(seen, (stop - start, Nk))

    def pairs(self, B: int, N: int, Nk: int) -> float:
        """Return the visible pairs of a head, over all batch entries; causal counts as half."""
        if self.alone:
            return B * N * Nk * (0.5 if self.causal else 1.0)
        count = 0
        for start in range(0, N, 512):
            rows = (start, min(start + 512, N))
            for b in range(B if self.lengths else 1):
                count += int(self.visible(b, *rows, N, Nk).sum())
        return float(count if self.lengths else B * count)

    def mask(self) -> Mask | None:
        """Return the same as a mask of tilewise."""
        import tilewise as tw

        found: Mask | None = None
        if self.window is not None:
            found = tw.window(self.window, 0)
        elif self.causal:
            found = tw.causal()
        if self.prefix is not None and found is not None:
            found = found | tw.prefix(self.prefix)
        others: list[Mask] = []
        if self.documents:
            others.append(tw.documents(np.cumsum((0, *self.documents))))
        if self.lengths:
            others.append(tw.lengths(self.lengths))
        for other in others:
            found = other if found is None else found & other
        return found


@dataclass(frozen=True)
class Problem:
    """Inputs of one attention: q, do `(B, H, N, D)`; k, v `(B, Hk, Nk, D)`.

    `tangents` are those of q, k and v, for the directions that take them.
    """

    q: Array
    k: Array
    v: Array
    do: Array
    pattern: Pattern = field(default_factory=Pattern)
    tangents: tuple[Array, ...] = ()

    def visible(self, b: int, start: int, stop: int) -> NDArray[np.bool_]:
        """Return rows `[start, stop)` of the mask of batch entry b, `(stop - start, Nk)`."""
        return self.pattern.visible(b, start, stop, self.q.shape[2], self.k.shape[2])

    def dense_mask(self) -> NDArray[np.bool_] | None:
        """Return the mask `(N, Nk)` or `(B, 1, N, Nk)`, None where nothing is hidden."""
        if not self.pattern:
            return None
        N = self.q.shape[2]
        if not self.pattern.lengths:
            return self.visible(0, 0, N).copy()
        return np.stack([self.visible(b, 0, N)[None] for b in range(len(self.q))])

    def compared(self) -> Problem:
        """Return the problem of those first heads that are compared with float64."""
        B, H, N, _ = self.q.shape
        Hk, Nk = self.k.shape[1:3]
        kv = max(1, min(Hk, _COMPARED_PAIRS // (B * N * Nk * (H // Hk))))
        heads = kv * (H // Hk)
        return replace(
            self,
            q=self.q[:, :heads],
            k=self.k[:, :kv],
            v=self.v[:, :kv],
            do=self.do[:, :heads],
            tangents=tuple(t[:, :n] for t, n in zip(self.tangents, (heads, kv, kv), strict=False)),
        )

    def truth(self) -> textbook.Exact:
        """Return the float64 results."""
        rows = self.visible if self.pattern else None
        return textbook.exact(self.q, self.k, self.v, self.do, rows)

    def true_tangents(self) -> dict[str, Array]:
        """Return the tangents of the float64 results by central differences, good to 1e-9."""
        ahead, behind = (self._moved(step).truth() for step in (_STEP, -_STEP))
        names = (f"t{name}" for name in ahead._fields)
        return {n: (a - b) / (2 * _STEP) for n, a, b in zip(names, ahead, behind, strict=True)}

    def _moved(self, step: float) -> Problem:
        inputs = zip((self.q, self.k, self.v), self.tangents, strict=True)
        q, k, v = (x + step * t.astype(np.float64) for x, t in inputs)
        return replace(self, q=q, k=k, v=v)


def named(names: str, values: tuple[Any, ...]) -> dict[str, Array]:
    """Return arrays by name; there may be fewer of them than names."""
    return dict(zip(names.split(), values, strict=False))


def missing(*_: Any) -> Any:
    """Stand for a direction that a contender does not have."""
    raise NotImplementedError


@dataclass(frozen=True)
class Contender:
    """A way to compute `Problem`.

    Attributes:
        name: as tables show it.
        forward: returns whatever the backward needs.
        outputs: turns what `forward` returned into named arrays: o, and more where it has more.
        backward: returns (dq, dk, dv) from what `saving` returned; it may be missing.
        saving: the forward that prepares a backward, where it differs from `forward`.
        step: returns o, dq, dk, dv, forward and backward in one.
        jvp: returns o and its tangent.
        graph: returns what `saving` does, and the gradients that `double_backward` takes.
        double_backward: returns the tangents of dq, dk, dv, and that of o where it is known.
        arrays: gives arrays names, where the above return something else.
    """

    name: str
    forward: Callable[[], Any]
    outputs: Callable[[Any], dict[str, Array]]
    backward: Callable[[Any], tuple[Any, ...]] = missing
    saving: Callable[[], Any] | None = None
    step: Callable[[], tuple[Any, ...]] = missing
    jvp: Callable[[], tuple[Any, Any]] = missing
    graph: Callable[[], tuple[Any, tuple[Any, ...]]] = missing
    double_backward: Callable[[Any, Any], tuple[Any, ...]] = missing
    arrays: Callable[[str, tuple[Any, ...]], dict[str, Array]] = named

    def save(self) -> Any:
        """Run the forward whose result `backward` takes."""
        return (self.saving or self.forward)()

    def offers(self, direction: str) -> bool:
        """Return whether it can do a direction."""
        return direction != "backward" or self.backward is not missing

    def results(self, saved: Any) -> dict[str, Array]:
        """Return every output and gradient by name."""
        return {**self.outputs(saved), **self.arrays("dq dk dv", self.backward(saved))}

    def prepare(self, direction: str, *, training: bool = False) -> Callable[[], Any]:
        """Do what comes before a direction and return the call of the direction itself.

        In training the forward is the one that a backward follows.
        """
        if direction == "backward":
            saved = self.save()
            return lambda: self.backward(saved)
        if direction == "double backward":
            graph = self.graph()
            return lambda: self.double_backward(*graph)
        if direction in ("jvp", "step"):
            return self.jvp if direction == "jvp" else self.step
        return self.save if training else self.forward

    def run(self, direction: str) -> dict[str, Array]:
        """Return every result of a direction, and of what comes before it, by name."""
        if direction == "backward":
            return self.results(self.save())
        if direction == "double backward":
            saved, grads = self.graph()
            last = self.arrays("tdq tdk tdv to", self.double_backward(saved, grads))
            return {**self.outputs(saved), **self.arrays("dq dk dv", grads), **last}
        if direction == "jvp":
            return self.arrays("o to", self.jvp())
        if direction == "step":
            return self.arrays("o dq dk dv", self.step())
        return self.outputs(self.forward())
