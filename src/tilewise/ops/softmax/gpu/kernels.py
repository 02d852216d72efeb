"""The Triton kernels of the softmax: the forward pass, and one walk for its three derivatives.

Rows lie as `(tile, other, C)`: programs cut the tile axis and C. A row that fits into one tile is
done at once. The sums of a longer one are stored for each part, merged in the order of the parts,
and read by a second launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.shared.triton_rows import (
    finite_base,
    larger,
    max_or_nan,
    merged_sums,
    tile_of_rows,
)


@triton.jit
def _finish(m, l, sink_ptr, row, has_row, scale):
    """Return m and log_l of rows whose sum is l, with the sink."""
    if sink_ptr is not None:
        z = tl.load(sink_ptr + row, mask=has_row, other=float("-inf"))
        # The sink as an entry of x: finite, also where the temperature is large.
        bound: tl.constexpr = 1.7e308 if z.dtype == tl.float64 else 3.4e38
        entry = tl.where(z == float("-inf"), z, tl.minimum(tl.maximum(z / scale, -bound), bound))
        top = larger(m, entry)
        one = tl.full(l.shape, 1.0, l.dtype)
        l = merged_sums(l, m, top, scale) + merged_sums(one, entry, top, scale)
        m = top
    return m, tl.where(m == float("-inf"), 0.0, tl.log(l))


@triton.jit
def _store_rows(m, log_l, lse_ptr, m_ptr, log_l_ptr, row, has_row, scale):
    # Beside an infinite maximum the sum is NaN, though it is infinite.
    lse = tl.where(m == float("inf"), m, m * scale + log_l)
    tl.store(lse_ptr + row, lse, mask=has_row)
    tl.store(m_ptr + row, m, mask=has_row)
    tl.store(log_l_ptr + row, log_l, mask=has_row)


@triton.jit
def softmax_fwd_kernel(
    x_ptr,
    where_ptr,
    sink_ptr,
    n_tile,
    n_rows,
    C,
    row_tile,
    row_other,
    x_tile,
    x_other,
    x_c,
    w_tile,
    w_other,
    w_c,
    y_tile,
    y_other,
    y_c,
    scale: tl.float64,
    y_ptr,
    lse_ptr,
    m_ptr,
    log_l_ptr,
    parts_ptr,
    LOG: tl.constexpr,
    PHASE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute `y = exp(s - lse)` or `log_y`, and lse, m and log_l of each row.

    PHASE is "whole" where a row is one tile. Else "sums" stores `(m, l)` of each part, and "write"
    computes y from the statistics of `softmax_merge_kernel`.
    """
    wide: tl.constexpr = m_ptr.dtype.element_ty
    scale = tl.full([], scale, wide)
    tile, other, has_row = tile_of_rows(n_tile, BLOCK_R)
    row = tile * row_tile + other * row_other  # [BLOCK_R]
    part = tl.program_id(1).to(tl.int64)
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = has_row[:, None] & (c < C)[None, :]  # [BLOCK_R, BLOCK_C]
    visible = inside
    if where_ptr is not None:
        at = tile[:, None] * w_tile + other * w_other + c[None, :] * w_c
        visible = inside & (tl.load(where_ptr + at, mask=inside, other=0) != 0)
    at = tile[:, None] * x_tile + other * x_other + c[None, :] * x_c
    # All entries are read, so that loads are wide, and those that are hidden replaced.
    x = tl.load(x_ptr + at, mask=inside, other=float("-inf")).to(wide)
    x = tl.where(visible, x, float("-inf"))

    if PHASE == "write":
        m = tl.load(m_ptr + row, mask=has_row, other=0.0)
        log_l = tl.load(log_l_ptr + row, mask=has_row, other=0.0)
    else:
        m = max_or_nan(x, 1)
        l = tl.sum(tl.exp((x - finite_base(m)[:, None]) * scale), axis=1)
        if PHASE == "sums":
            at_part = part * n_rows + row
            tl.store(parts_ptr + at_part, m, mask=has_row)
            tl.store(parts_ptr + tl.num_programs(1) * n_rows + at_part, l, mask=has_row)
        else:
            m, log_l = _finish(m, l, sink_ptr, row, has_row, scale)
            _store_rows(m, log_l, lse_ptr, m_ptr, log_l_ptr, row, has_row, scale)
    if PHASE != "sums" and y_ptr is not None:
        y = (x - finite_base(m)[:, None]) * scale - log_l[:, None]
        if not LOG:
            y = tl.exp(y)
        # A row with NaN has it everywhere but where entries are hidden.
        y = tl.where(visible, y, float("-inf") if LOG else 0.0)
        at = tile[:, None] * y_tile + other * y_other + c[None, :] * y_c
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_merge_kernel(
    parts_ptr,
    sink_ptr,
    n_rows,
    n_parts,
    scale: tl.float64,
    lse_ptr,
    m_ptr,
    log_l_ptr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Merge the states `(m, l)` of the parts of each row, in their order."""
    wide: tl.constexpr = m_ptr.dtype.element_ty
    scale = tl.full([], scale, wide)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    has_row = row < n_rows
    m = tl.full([BLOCK_R], float("-inf"), wide)
    l = tl.zeros([BLOCK_R], wide)
    sums = parts_ptr + tl.cast(n_parts, tl.int64) * n_rows
    for start in range(0, n_parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        inside = (part < n_parts)[:, None] & has_row[None, :]  # [BLOCK_P, BLOCK_R]
        at = part[:, None].to(tl.int64) * n_rows + row[None, :]
        m_part = tl.load(parts_ptr + at, mask=inside, other=float("-inf"))
        l_part = tl.load(sums + at, mask=inside, other=0.0)
        top = larger(m, max_or_nan(m_part, 0))
        more = merged_sums(l_part, m_part, top[None, :], scale)
        l = merged_sums(l, m, top, scale) + tl.sum(more, axis=0)
        m = top
    m, log_l = _finish(m, l, sink_ptr, row, has_row, scale)
    _store_rows(m, log_l, lse_ptr, m_ptr, log_l_ptr, row, has_row, scale)


@triton.jit
def _of_rows(ptr, row, alive, wide: tl.constexpr):
    """Return a number for each row, 0 where it is absent or the row empty."""
    found = tl.zeros(row.shape, wide)
    if ptr is not None:
        found = tl.load(ptr + row, mask=alive, other=0.0)
    return found


@triton.jit
def _entries(ptr, at, inside, active, wide: tl.constexpr):
    """Return the entries of a tile, 0 where they are absent or not active."""
    found = tl.zeros(active.shape, wide)
    if ptr is not None:
        found = tl.load(ptr + at, mask=inside, other=0.0).to(wide)
        found = tl.where(active, found, 0.0)
    return found


@triton.jit
def _weight_of_sink(sink_ptr, row, alive, m, log_l, scale):
    """Return the probability of each row's sink, and where there is one."""
    p_sink = tl.zeros(m.shape, m.dtype)
    has_sink = alive
    if sink_ptr is not None:
        z = tl.load(sink_ptr + row, mask=alive, other=float("-inf"))
        has_sink = alive & (z != float("-inf"))
        p_sink = tl.where(has_sink, tl.exp(z - m * scale - log_l), 0.0)
    return p_sink, has_sink


@triton.jit
def _first_sums(p, dy, ts, p_sink, tz, dlse, first, KIND: tl.constexpr, LOG: tl.constexpr):
    """Return mu and c of rows; of parts those of their entries, the first with all else."""
    mu = tl.zeros(dlse.shape, p.dtype)
    mean = tl.zeros(dlse.shape, p.dtype)
    if KIND != "vjp":
        mu = tl.sum(p * ts, axis=1) + tl.where(first, p_sink * tz, 0.0)
    if KIND != "jvp":
        mean = tl.sum(dy if LOG else p * dy, axis=1) - tl.where(first, dlse, 0.0)
    return mu, mean


@triton.jit
def _results(
    p, dy, tdy, gap, p_sink, tz, mu, mean, moved, alive, KIND: tl.constexpr, LOG: tl.constexpr
):
    """Return what a derivative is for each entry, but for the scale, and for each row."""
    if KIND == "vjp":
        out = dy - p * mean[:, None] if LOG else p * (dy - mean[:, None])
        of_row = -p_sink * mean
    elif KIND == "jvp":
        out = gap if LOG else p * gap
        of_row = tl.where(alive, mu, 0.0)
    else:
        of_row = -p_sink * ((tz - mu) * mean + moved)
        if LOG:
            out = tdy - p * gap * mean[:, None] - p * moved[:, None]
        else:
            out = p * gap * (dy - mean[:, None]) + p * (tdy - moved[:, None])
    return out, of_row


@triton.jit
def softmax_derivative_kernel(
    x_ptr,
    where_ptr,
    sink_ptr,
    m_ptr,
    log_l_ptr,
    dy_ptr,
    dlse_ptr,
    tx_ptr,
    tsink_ptr,
    tdy_ptr,
    tdlse_ptr,
    n_tile,
    n_rows,
    C,
    row_tile,
    row_other,
    x_tile,
    x_other,
    x_c,
    w_tile,
    w_other,
    w_c,
    dy_tile,
    dy_other,
    dy_c,
    tx_tile,
    tx_other,
    tx_c,
    tdy_tile,
    tdy_other,
    tdy_c,
    out_tile,
    out_other,
    out_c,
    scale: tl.float64,
    out_ptr,
    out_row_ptr,
    parts_ptr,
    sums_ptr,
    KIND: tl.constexpr,
    LOG: tl.constexpr,
    PHASE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute dx and dsink of "vjp" and "vjp_jvp", or the tangents of y and lse of "jvp".

    With `p = exp((x - m) scale - log_l)`, cotangents dy (of log_y with LOG) and dlse, and tangents
    `ts = scale tx` and tsink::

        c  = sum p dy - dlse       ds  = p (dy - c)       or, with LOG, sum dy - dlse, dy - p c
        mu = sum p ts + p_sink tz  ty  = p (ts - mu)      or, with LOG, ts - mu
        tc = sum (tp dy + p tdy) - tdlse    tds = tp (dy - c) + p (tdy - tc)    tp = p (ts - mu)

    PHASE is "whole" where a row is one tile. Else "sums" stores mu and c of each part, "second" tc,
    and "write" reads the three from `sums_ptr`.
    """
    wide: tl.constexpr = m_ptr.dtype.element_ty
    scale = tl.full([], scale, wide)
    tile, other, has_row = tile_of_rows(n_tile, BLOCK_R)
    row = tile * row_tile + other * row_other  # [BLOCK_R]
    part = tl.program_id(1).to(tl.int64)
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = has_row[:, None] & (c < C)[None, :]  # [BLOCK_R, BLOCK_C]

    m = tl.load(m_ptr + row, mask=has_row, other=float("-inf"))
    log_l = tl.load(log_l_ptr + row, mask=has_row, other=0.0)
    alive = has_row & (m != float("-inf"))
    active = inside & alive[:, None]
    if where_ptr is not None:
        at = tile[:, None] * w_tile + other * w_other + c[None, :] * w_c
        active = active & (tl.load(where_ptr + at, mask=inside, other=0) != 0)
    at = tile[:, None] * x_tile + other * x_other + c[None, :] * x_c
    x = tl.load(x_ptr + at, mask=inside, other=float("-inf")).to(wide)
    p = tl.exp((x - finite_base(m)[:, None]) * scale - log_l[:, None])
    p = tl.where(active, p, 0.0)
    p_sink, has_sink = _weight_of_sink(sink_ptr, row, alive, m, log_l, scale)

    at = tile[:, None] * dy_tile + other * dy_other + c[None, :] * dy_c
    dy = _entries(dy_ptr, at, inside, active, wide)
    at = tile[:, None] * tx_tile + other * tx_other + c[None, :] * tx_c
    ts = _entries(tx_ptr, at, inside, active, wide) * scale
    at = tile[:, None] * tdy_tile + other * tdy_other + c[None, :] * tdy_c
    tdy = _entries(tdy_ptr, at, inside, active, wide)
    dlse = _of_rows(dlse_ptr, row, alive, wide)
    tdlse = _of_rows(tdlse_ptr, row, alive, wide)
    tz = _of_rows(tsink_ptr, row, has_sink, wide)

    # What a row has beside the sum of its entries is added to that of its first part.
    first = part == 0
    if PHASE == "whole" or PHASE == "sums":
        mu, mean = _first_sums(p, dy, ts, p_sink, tz, dlse, first, KIND, LOG)
    else:
        mu = tl.load(sums_ptr + row, mask=has_row, other=0.0)
        mean = tl.load(sums_ptr + n_rows + row, mask=has_row, other=0.0)
    if PHASE == "sums":
        at_part = part * n_rows + row
        tl.store(parts_ptr + at_part, mu, mask=has_row)
        tl.store(parts_ptr + tl.num_programs(1) * n_rows + at_part, mean, mask=has_row)
    else:
        gap = tl.where(active, ts - mu[:, None], 0.0)  # [BLOCK_R, BLOCK_C]
        moved = tl.zeros([BLOCK_R], wide)
        if KIND == "vjp_jvp":
            if PHASE == "write":
                moved = tl.load(sums_ptr + 2 * n_rows + row, mask=has_row, other=0.0)
            else:
                each = tdy if LOG else p * gap * dy + p * tdy
                moved = tl.sum(each, axis=1) - tl.where(first, tdlse, 0.0)
        if PHASE == "second":
            tl.store(parts_ptr + part * n_rows + row, moved, mask=has_row)
        else:
            out, of_row = _results(p, dy, tdy, gap, p_sink, tz, mu, mean, moved, alive, KIND, LOG)
            if KIND != "jvp":
                out = out * scale
            if out_ptr is not None:
                at = tile[:, None] * out_tile + other * out_other + c[None, :] * out_c
                out = tl.where(active, out, 0.0)
                tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
            if out_row_ptr is not None:
                if KIND != "jvp":
                    of_row = tl.where(has_sink, of_row, 0.0)
                tl.store(out_row_ptr + row, of_row, mask=has_row & first)
