"""Packed sequences: which of them a tile belongs to, and where that one begins.

A tile never lies across two sequences, so each is computed as a call of its own would compute it.
For its tiles of E rows, sequence s has the places from `starts[s] // E + s` up to that of the next
one: as many as it needs or one more, since `ceil(n / E) <= (start + n) // E - start // E + 1`. So
the grid follows from how many rows and sequences there are: nobody has to wait for the boundaries
to launch it, and a captured graph stays right when other boundaries are written over them.
"""

import triton
import triton.language as tl


@triton.jit
def places(rows, S, EXTENT: tl.constexpr):
    """Return how many places there are for the tiles of all sequences."""
    return rows // EXTENT + S


@triton.jit
def first_place(start, s, EXTENT: tl.constexpr):
    """Return the place of the first tile of a sequence."""
    return start // EXTENT + s


@triton.jit
def attention_sequences_kernel(starts, order, EXTENT: tl.constexpr, BLOCK: tl.constexpr):
    """Write for each place the sequence that has it; a search in every program takes longer.

    starts `(S + 1,)`, int64; order `(places,)`, int64. One program for each sequence.
    """
    s = tl.program_id(0)
    first = first_place(tl.load(starts + s), s, EXTENT)
    last = first_place(tl.load(starts + s + 1), s + 1, EXTENT)
    for begin in range(first, last, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        tl.store(order + at, tl.full([BLOCK], 0, tl.int64) + s, mask=at < last)


@triton.jit
def sequence_at(order, place, q_starts, k_starts):
    """Return the sequence of a place, where its queries and its keys begin, and how many it has."""
    s = tl.load(order + place).to(tl.int32)
    first_i, first_j = tl.load(q_starts + s), tl.load(k_starts + s)
    N = (tl.load(q_starts + s + 1) - first_i).to(tl.int32)
    Nk = (tl.load(k_starts + s + 1) - first_j).to(tl.int32)
    return s, first_i, first_j, N, Nk


@triton.jit
def tile_of(
    program,
    heads,
    N,
    Nk,
    S,
    order,
    q_starts,
    k_starts,
    EXTENT: tl.constexpr,
    OF_KEYS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Return which tile a program owns, and what it belongs to.

    Args:
        program: Number of the program, of those of one tile after another, head after head.
        heads: Heads of a batch entry: those of the keys for tiles of keys.
        N: Queries of a batch entry, or of all sequences.
        Nk: Keys, likewise.
        S: How many sequences are packed.
        order: Of packed sequences, the sequence of each place, else None.
        q_starts: Where their queries begin, or None.
        k_starts: Where their keys begin, or None.
        EXTENT: Rows of a tile.
        OF_KEYS: Whether it is a tile of keys.
        PACKED: Whether sequences are packed.

    Returns:
        The batch entry and the head of its tensors; the batch entry that dropout and slopes go by,
        which is the sequence; the tile's number there, perhaps behind its last one; the first query
        and the first key; the numbers of queries and keys.
    """
    rows = Nk if OF_KEYS else N
    if PACKED:
        count = places(rows, S, EXTENT)
        place, at = program % count, program // count
        entry, first_i, first_j, N, Nk = sequence_at(order, place, q_starts, k_starts)
        own = first_j if OF_KEYS else first_i
        tile = (place - first_place(own, entry, EXTENT)).to(tl.int32)
        b, h = at // heads, at % heads
    else:
        count = (rows + EXTENT - 1) // EXTENT
        tile, at = program % count, program // count
        b, h = at // heads, at % heads
        entry, first_i, first_j = b, 0, 0
    return b, h, entry, tile, first_i, first_j, N, Nk


@triton.jit
def bounds_of(
    bounds, part, entry, first_i, N, BM: tl.constexpr, SIZE: tl.constexpr, PACKED: tl.constexpr
):
    """Return where the bounds of a head's tiles begin; packed sequences have one mask for all.

    Args:
        bounds: SIZE numbers for each tile of queries.
        part: Which of the masks of batch entries and heads it is.
        entry: The sequence.
        first_i: Its first query.
        N: Queries of a batch entry.
        BM: Queries of a tile.
        SIZE: Numbers of a tile.
        PACKED: Whether sequences are packed.
    """
    if PACKED:
        skipped = tl.cast(first_place(first_i, entry, BM), tl.int64)
    else:
        skipped = part * ((N + BM - 1) // BM)
    return bounds + skipped * SIZE
