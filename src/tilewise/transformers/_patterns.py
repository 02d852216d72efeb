"""What the mask functions of transformers mean, as tilewise masks.

transformers describes a mask by nested closures over absolute token positions, such as
``and_masks(sliding_window_overlay(4096), causal_mask_function)``. A closure is recognised by the
code object that its factory in `transformers.masking_utils` makes, and read through its cells.
Each factory is tried on a small grid first, so that one whose meaning differs in some version of
transformers is not recognised, and evaluated instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import CodeType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base._lowering import All, AnyOf, BoolArray, Show, Size, Spans, interval
from tilewise.base.masks import Mask, dense, documents

Function = Callable[..., Any]
Cells = Mapping[str, Any]


@dataclass(frozen=True)
class Grid:
    """The queries and keys of one call; a token's position counts from the sequence's start.

    Attributes:
        B: Batch.
        N: Queries.
        Nk: Keys.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
    """

    B: int
    N: int
    Nk: int
    q_offset: int
    kv_offset: int

    @property
    def shift(self) -> int:
        """Return what to add to the index of a query to get the index of its own key."""
        return self.q_offset - self.kv_offset

    def of_queries(self, per_token: Any) -> NDArray[Any]:
        """Return the entries of the queries, of `(B or 1, tokens)`."""
        return _host(per_token)[:, self.q_offset : self.q_offset + self.N]

    def of_keys(self, per_token: Any) -> NDArray[Any]:
        """Return the entries of the keys, of `(B or 1, tokens)`."""
        return _host(per_token)[:, self.kv_offset : self.kv_offset + self.Nk]


@dataclass(frozen=True, repr=False)
class Band(Mask):
    """Query i sees the keys `i + first <= j < i + end`; None leaves a side open."""

    first: int | None
    end: int | None

    def spans(self, size: Size, rows: slice) -> Spans:
        index = np.arange(rows.start, rows.stop, dtype=np.int64)[None, None]
        lo = np.zeros_like(index) if self.first is None else index + self.first
        hi = np.full_like(index, size.Nk) if self.end is None else index + self.end
        return interval(lo, hi, size.Nk)

    def text(self, show: Show) -> str:
        return f"band({self.first}, {self.end})"


@dataclass(frozen=True, eq=False, repr=False)
class Chunks(Mask):
    """Query i sees the keys of its own chunk; chunks start after the padding on the left."""

    length: int
    padding: NDArray[np.int64]
    grid: Grid

    @property
    def scalar(self) -> bool:
        return False

    def extent(self, size: Size) -> tuple[int, int]:
        return len(self.padding), 1

    def spans(self, size: Size, rows: slice) -> Spans:
        position = np.arange(rows.start, rows.stop, dtype=np.int64) + self.grid.q_offset
        padding = self.padding[:, None, None]
        start = padding + (position - padding) // self.length * self.length - self.grid.kv_offset
        return interval(start, start + self.length, size.Nk)

    def text(self, show: Show) -> str:
        return f"chunks({self.length})"


def describe(function: Function, grid: Grid) -> Mask | None:
    """Return the mask that a mask function of transformers stands for.

    Args:
        function: `(batch, head, query position, key position) -> bool`.
        grid: The call.

    Returns:
        The mask of the call, or None where the function is not recognised.
    """
    name, cells = _named(function)
    return _READERS[name](cells, grid) if _trusted(name) else None


def padding(keys: Any, grid: Grid) -> Mask:
    """Return the mask of the tokens that are not padding.

    Args:
        keys: `(B or 1, tokens)`, bool. Missing tokens at the end count as padding.
        grid: The call.
    """
    seen = grid.of_keys(keys)
    missing = grid.Nk - seen.shape[1]
    return dense(np.pad(seen, ((0, 0), (0, missing)))[:, None, None, :])


def depends_on_tokens(function: Any) -> bool:
    """Return whether a mask function reads packed sequences, blocks or what is not known."""
    name, cells = _named(function)
    if name in ("and_masks", "or_masks"):
        return any(depends_on_tokens(inner) for inner in cells["mask_functions"])
    return name in ("", "packed_sequence_mask_function", "blockwise_overlay")


def _causal(cells: Cells, grid: Grid) -> Mask:
    return Band(None, grid.shift + 1)


def _everything(cells: Cells, grid: Grid) -> Mask:
    return Band(None, None)


def _window(cells: Cells, grid: Grid) -> Mask:
    return Band(grid.shift - int(cells["sliding_window"]) + 1, None)


def _both_sides(cells: Cells, grid: Grid) -> Mask:
    reach = int(cells["sliding_window"])
    return Band(grid.shift - reach, grid.shift + reach + 1)


def _chunks(cells: Cells, grid: Grid) -> Mask:
    left = cells.get("left_padding")
    padded = np.zeros(1, np.int64) if left is None else _host(left).astype(np.int64)
    return Chunks(int(cells["chunk_size"]), padded, grid)


def _padding(cells: Cells, grid: Grid) -> Mask:
    return padding(cells["padding_mask"], grid)


def _packed(cells: Cells, grid: Grid) -> Mask:
    ids = cells["packed_sequence_mask"]
    return documents(ids=grid.of_queries(ids), ids_k=grid.of_keys(ids))


def _blocks(cells: Cells, grid: Grid) -> Mask:
    ids = cells["block_sequence_ids"]
    keys = grid.of_keys(ids)
    # -1 is no block: a query's -1 must not find a key's -1.
    return documents(ids=grid.of_queries(ids), ids_k=np.where(keys < 0, -2, keys))


def _union(cells: Cells, grid: Grid) -> Mask | None:
    terms = [describe(function, grid) for function in cells["mask_functions"]]
    return _combined(AnyOf, terms)


def _intersection(cells: Cells, grid: Grid) -> Mask | None:
    functions = cells["mask_functions"]
    named = [_named(function) for function in functions]
    ids = [
        c["packed_sequence_mask"] for name, c in named if name == "packed_sequence_mask_function"
    ]
    terms = []
    for function, (name, inner) in zip(functions, named, strict=True):
        if name != "remap_positions_for_packed_sequence":
            terms.append(describe(function, grid))
        elif _remaps() and len(ids) == 1 and _consecutive(ids[0], inner["position_ids"], grid):
            terms.append(_relative(inner["mask_function"], grid))
        else:
            return None
    return _combined(All, terms)


def _combined(kind: type[All] | type[AnyOf], terms: list[Mask | None]) -> Mask | None:
    known = [term for term in terms if term is not None]
    if not known or len(known) != len(terms):
        return None
    result = known[0]
    for term in known[1:]:
        result = result & term if kind is All else result | term
    return result


def _relative(function: Function, grid: Grid) -> Mask | None:
    """Return the mask of a function that looks at the distance of query and key alone."""
    mask = describe(function, grid)
    pending = [mask]
    while pending:
        term = pending.pop()
        if isinstance(term, All | AnyOf):
            pending.extend(term.terms)
        elif not isinstance(term, Band):
            return None
    return mask


def _consecutive(ids: Any, positions: Any, grid: Grid) -> bool:
    """Return whether positions within each packed sequence differ as the indices do."""
    sequence, position = _host(ids), _host(positions)
    if grid.q_offset or grid.kv_offset or sequence.shape != position.shape:
        return False
    if not grid.N == grid.Nk == sequence.shape[1]:
        return False
    inside = np.diff(sequence, axis=1) == 0
    ordered = bool((np.diff(sequence, axis=1) >= 0).all())
    return ordered and bool((np.diff(position, axis=1)[inside] == 1).all())


_READERS: Mapping[str, Callable[[Cells, Grid], Mask | None]] = {
    "causal_mask_function": _causal,
    "bidirectional_mask_function": _everything,
    "sliding_window_overlay": _window,
    "sliding_window_bidirectional_overlay": _both_sides,
    "chunked_overlay": _chunks,
    "padding_mask_function": _padding,
    "packed_sequence_mask_function": _packed,
    "blockwise_overlay": _blocks,
    "and_masks": _intersection,
    "or_masks": _union,
}


def _named(function: Function) -> tuple[str, Cells]:
    """Return which factory made a function, and what it holds; "" where none is known."""
    code = getattr(function, "__code__", None)
    name = _codes().get(code, "")
    if not name or code is None:
        return "", {}
    cells = getattr(function, "__closure__", None) or ()
    return name, {
        key: cell.cell_contents for key, cell in zip(code.co_freevars, cells, strict=True)
    }


@cache
def _codes() -> Mapping[CodeType | None, str]:
    return {function.__code__: name for name, function in _samples().items()}


@cache
def _trusted(name: str) -> bool:
    """Return whether the functions of a factory mean what its reader says."""
    function, reader = _samples().get(name), _READERS.get(name)
    if function is None or reader is None:
        return False
    cells = _named(function)[1]
    return all(_agree(partial(reader, cells, grid), function, grid) for grid in _TRIALS)


@cache
def _remaps() -> bool:
    """Return whether remapping positions means what is assumed of it in packed sequences."""
    packed = _samples()["packed_sequence_mask_function"]
    remapped = _samples()["remap_positions_for_packed_sequence"]
    inner = _named(remapped)[1]["mask_function"]

    def both(*indices: Any) -> Any:
        return packed(*indices) & remapped(*indices)

    def read() -> Mask | None:
        return _combined(All, [describe(packed, _WHOLE), _relative(inner, _WHOLE)])

    return _agree(read, both, _WHOLE)


def _agree(read: Callable[[], Mask | None], function: Function, grid: Grid) -> bool:
    """Return whether a mask sees what a function sees."""
    try:
        mask = read()
    except (KeyError, TypeError, ValueError):
        return False
    if mask is None:
        return False
    shape = (grid.B, 1, grid.N, grid.Nk)
    seen = np.broadcast_to(mask.to_bool(grid.B, 1, grid.N, grid.Nk), shape)
    return np.array_equal(seen, _evaluated(function, grid))


def _evaluated(function: Function, grid: Grid) -> BoolArray:
    import torch

    batch = torch.arange(grid.B)[:, None, None, None]
    query = torch.arange(grid.q_offset, grid.q_offset + grid.N)[None, None, :, None]
    key = torch.arange(grid.kv_offset, grid.kv_offset + grid.Nk)[None, None, None, :]
    head = torch.zeros((1, 1, 1, 1), dtype=torch.int64)
    seen = _host(function(batch, head, query, key).expand(grid.B, 1, grid.N, grid.Nk))
    return seen.astype(np.bool_)


@cache
def _samples() -> Mapping[str, Function]:
    """Return a function of each factory that this version of transformers has."""
    import torch
    from transformers import masking_utils as have

    tokens = torch.arange(2 * _TOKENS).view(2, _TOKENS)
    arguments: dict[str, tuple[Any, ...]] = {
        "sliding_window_overlay": (3,),
        "sliding_window_bidirectional_overlay": (2,),
        "chunked_overlay": (3, torch.tensor([0, 2])),
        "padding_mask_function": (tokens % 5 != 2,),
        "packed_sequence_mask_function": (tokens // 4,),
        "remap_positions_for_packed_sequence": (have.causal_mask_function, tokens % 4),
        "blockwise_overlay": (tokens // 4 % 3 - 1,),
        "and_masks": (have.causal_mask_function, have.sliding_window_overlay(3)),
        "or_masks": (have.causal_mask_function, have.sliding_window_overlay(3)),
    }
    samples = {
        name: getattr(have, name)
        for name in ("causal_mask_function", "bidirectional_mask_function")
        if hasattr(have, name)
    }
    for name, given in arguments.items():
        if hasattr(have, name):
            samples[name] = getattr(have, name)(*given)
    return samples


def _host(per_token: Any) -> NDArray[Any]:
    array: NDArray[Any] = per_token.detach().cpu().numpy()
    return array


_TOKENS = 17
_WHOLE = Grid(2, _TOKENS, _TOKENS, 0, 0)
_TRIALS = (Grid(2, 11, 11, 0, 0), Grid(2, 3, 13, 10, 0), Grid(2, 5, 7, 9, 6), Grid(2, 1, 5, 9, 5))
