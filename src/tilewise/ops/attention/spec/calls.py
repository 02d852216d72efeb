"""What passes between the frontends of attention and its implementations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import FloatDType, compute_dtype
from tilewise.base.masks import PackedBits, RowIntervals

from .sequences import Sequences

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


class RowStats(NamedTuple):
    """What a backward pass needs of each softmax row: `lse = m * ln(2) + log_l`.

    The two are kept apart because their rounded sum loses `log_l` where `|m|` is large.

    Attributes:
        m: `(B, H, N)`, dtype of q, at least float32. Row maximum times `log2(e)`, in bfloat16 the
            next whole number where pairs are multiplied; -inf for a row without keys.
        log_l: `(B, H, N)`, dtype of m. Natural logarithm of `sum exp(s - m * ln(2))`; 0 for a row
            without keys.
    """

    m: NDArray[Any]
    log_l: NDArray[Any]


class AttentionOutputs(NamedTuple):
    """What a forward pass returns; `o` is a `(B, H, N, Dv)` view in either layout.

    Where q has 16 bits, `o_full` is `o` before it was rounded to them, in float32. Otherwise it is
    `o` itself.
    """

    o: NDArray[Any]
    stats: RowStats
    lse: NDArray[Any] | None
    max_logit: NDArray[Any] | None
    entropy: NDArray[Any] | None
    o_full: NDArray[Any] | None


class AttentionGrads(NamedTuple):
    """Gradients of attention, or their tangents; None for one that was not asked for.

    Attributes:
        dq: Shape and layout of q.
        dk: Shape and layout of k.
        dv: Shape and layout of v.
        dbias: Shape of bias, or None where no bias was given.
        dsinks: `(H,)`, or None where no sinks were given.
    """

    # "| Any" spares those who ask for every gradient, as the NumPy functions do, a test for None.
    dq: NDArray[Any] | Any
    dk: NDArray[Any] | Any
    dv: NDArray[Any] | Any
    dbias: NDArray[Any] | None = None
    dsinks: NDArray[Any] | None = None


class OutputTangents(NamedTuple):
    """Tangents of what a forward pass returns.

    Attributes:
        to: `(B, H, N, Dv)`, or `(B, N, H, Dv)` with `layout="bnhd"`; dtype of q. Tangent of o.
        tlse: `(B, H, N)`, dtype of lse. Tangent of lse; 0 for a row without keys and sink.
    """

    to: NDArray[Any]
    tlse: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Needed:
    """Of which inputs a backward pass computes the gradient; the others are None."""

    q: bool = True
    k: bool = True
    v: bool = True
    bias: bool = True
    sinks: bool = True


ALL_NEEDED = Needed()


@dataclass(frozen=True, slots=True)
class Want:
    """What a forward pass returns besides `o` and the row statistics."""

    lse: bool = False
    max_logit: bool = False
    entropy: bool = False
    o_full: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Paging:
    """Where keys and values lie that are in pages.

    Attributes:
        block_table: `(B, P)`, int32. Key j of a sequence is row `j % page_size` of page
            `block_table[b, j // page_size]`; -1 is a page that the mask hides.
        k_lengths: `(B,)`, int64. Keys of each sequence.
    """

    block_table: NDArray[np.int32]
    k_lengths: NDArray[np.int64]


@dataclass(slots=True, eq=False)  # read only as well, but to freeze it takes 2 us a call
class AttentionCall:
    """A validated call; every array is a view of what the user gave, never a copy.

    Attributes:
        q: `(B, H, N, D)` in either layout, as are the other tensors.
        k: `(B, Hk, Nk, D)`.
        v: `(B, Hk, Nk, Dv)`.
        bias: 4-D with each size either full or 1, or None. Of packed sequences
            `(1, 1 or H, total_q, 1 or max_k)`.
        bias_shape: The shape in which the user gave bias; that of its gradient.
        alibi_slopes: `(B or 1, H)`, or None; B is the number of packed sequences here.
        sinks: `(H,)`, or None.
        mask: The lowered mask, or None where every query sees every key. Of packed sequences row
            intervals that count each sequence's keys from 0.
        softcap: c of the soft cap, or None.
        softmax_scale: Factor of q k.
        layout: Layout of the user's tensors, and of the results.
        B: Batch.
        H: Query heads.
        Hk: Key/value heads.
        N: Queries.
        Nk: Keys.
        D: Entries of a query or key.
        Dv: Entries of a value.
        dtype: Of q k v, one of `tilewise.base.dtypes.FLOATS`, native.
        dropout_p: Probability with which a pair is dropped.
        seed: Seed of the dropout, below 2**64.
        sequences: Where packed sequences begin, or None; then B is 1, and N and Nk are totals.
        first_entry: Place of the first batch entry in the batch that dropout counts.
        paging: Where keys lie that are in pages, or None; then k and v are pools
            `(pages, Hk, page_size, D or Dv)`, and Nk is the largest number of keys.
    """

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    bias: NDArray[Any] | None
    bias_shape: tuple[int, ...] | None
    alibi_slopes: NDArray[Any] | None
    sinks: NDArray[Any] | None
    mask: RowIntervals | PackedBits | None
    softcap: float | None
    softmax_scale: float
    layout: str
    B: int
    H: int
    Hk: int
    N: int
    Nk: int
    D: int
    Dv: int
    dtype: FloatDType
    dropout_p: float = 0.0
    seed: int = 0
    sequences: Sequences | None = None
    first_entry: int = 0
    paging: Paging | None = None

    @property
    def is_narrow(self) -> bool:
        """Return whether q k v have 16 bits."""
        return self.dtype.itemsize == 2

    @property
    def compute_dtype(self) -> FloatDType:
        """Return the dtype of sums and row statistics."""
        return compute_dtype(self.dtype)

    @property
    def drop_threshold(self) -> int:
        """Return the number below which a 32-bit word drops its pair."""
        return min(round(self.dropout_p * 2**32), 2**32 - 1)

    @property
    def keep_factor(self) -> float:
        """Return the factor of the probabilities that are kept; their mean stays what it was."""
        return 0.0 if self.dropout_p == 1.0 else 1.0 / (1.0 - self.dropout_p)


@dataclass(frozen=True, slots=True)
class CotangentCall:
    """Validated cotangents of a call, with the results of its forward pass.

    Attributes:
        do: `(B, H, N, Dv)` view in either layout, or None for zero.
        dlse: `(B, H, N)`, or None for zero.
        o: `(B, H, N, Dv)` view in either layout; dtype of q or float32.
        stats: Row statistics.
    """

    do: NDArray[Any] | None
    dlse: NDArray[Any] | None
    o: NDArray[Any]
    stats: RowStats


@dataclass(frozen=True, slots=True)
class InputTangents:
    """Validated tangents of the inputs of a call; None is zero and costs nothing.

    Attributes:
        tq: `(B, H, N, D)` view in either layout, as are the next two.
        tk: `(B, Hk, Nk, D)`.
        tv: `(B, Hk, Nk, Dv)`.
        tbias: 4-D, the shape of the call's bias.
        tsinks: `(H,)`.
    """

    tq: NDArray[Any] | None
    tk: NDArray[Any] | None
    tv: NDArray[Any] | None
    tbias: NDArray[Any] | None
    tsinks: NDArray[Any] | None


@dataclass(frozen=True, slots=True)
class TangentCall(InputTangents):
    """Tangents of the inputs with the results of the forward pass.

    Attributes:
        o: `(B, H, N, Dv)` view in either layout: output of the forward pass.
        stats: Row statistics of the forward pass.
    """

    o: NDArray[Any]
    stats: RowStats


@dataclass(frozen=True, slots=True)
class SecondCall:
    """What the JVP of a VJP takes: cotangents, tangents of the inputs and of the cotangents.

    Attributes:
        cotangents: Cotangents of the call.
        tangents: Tangents of its inputs, with the same `o` and statistics.
        tdo: `(B, H, N, Dv)` view in either layout: tangent of do, or None for zero.
        tdlse: `(B, H, N)`: tangent of dlse, or None for zero.
        outputs: `jvp(call, tangents)` where it is known already, or None.
    """

    cotangents: CotangentCall
    tangents: TangentCall
    tdo: NDArray[Any] | None
    tdlse: NDArray[Any] | None
    outputs: OutputTangents | None


@dataclass(frozen=True, slots=True)
class ForwardSecondCall:
    """What the JVP of a JVP takes.

    Attributes:
        tangents: Tangents of the inputs, whose JVP moves.
        others: The tangents along which the inputs move, with the same `o` and statistics.
        seconds: Those along which the tangents themselves move.
    """

    tangents: TangentCall
    others: TangentCall
    seconds: TangentCall


def stats_of_lse(lse: NDArray[Any]) -> RowStats:
    """Return row statistics whose log-sum-exp is `lse`: `m = lse * log2(e)`, `log_l = 0`."""
    return RowStats(base2(lse.astype(np.float64), lse.dtype), np.zeros_like(lse))


def base2(natural: NDArray[np.float64], dtype: FloatDType) -> NDArray[Any]:
    """Return `natural * log2(e)` in a dtype, where a finite number stays finite.

    Logits of `finfo.min`, which additive padding masks make, would overflow to -inf, and their
    rows would be taken for empty ones.
    """
    largest = float(np.finfo(dtype).max)
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.clip(natural * LOG2E, -largest, largest)
        return np.where(np.isinf(natural), natural, finite).astype(dtype)
