"""What the Triton kernels of two or more operators compute: tiles, exponentials, random words.

`compute` is the dtype of sums and row statistics: float32, or float64 for float64.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
ROUNDED, WIDE, SPLIT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def number(x, dtype: tl.constexpr):
    """Return a number that the host gave as a scalar of a dtype, with all the digits of that."""
    return tl.full([], x, dtype)


@triton.jit
def lowest(dtype: tl.constexpr):
    """Return the lowest finite number of float32 or float64."""
    if dtype == tl.float64:
        value = number(-1.7976931348623157e308, dtype)
    else:
        value = number(-3.4028234663852886e38, dtype)
    return value


@triton.jit
def natural(m):
    """Return a row maximum in natural units; the lowest number stands for itself.

    A logit of the lowest number was cut off there when it was brought to base 2.
    """
    return tl.where(m == lowest(m.dtype), m, m * LN2)


@triton.jit
def load_rows(
    base,
    start,
    count,
    stride,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Return `[ROWS, PADDED]`: rows from `start`, zero beyond `count` rows of SIZE entries.

    Without BOUNDED all the rows exist.
    """
    r, d = tl.arange(0, ROWS), tl.arange(0, PADDED)
    at = base + tl.cast(start, tl.int64) * stride
    at += r.to(tl.int64)[:, None] * stride + d[None, :]
    if BOUNDED:
        inside = (start + r < count)[:, None]
        if PADDED != SIZE:
            inside = inside & (d < SIZE)[None, :]
        tile = tl.load(at, mask=inside, other=0.0)
    elif PADDED != SIZE:
        tile = tl.load(at, mask=(d < SIZE)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile  # [ROWS, PADDED]


@triton.jit
def store_rows(
    base,
    x,
    start,
    count,
    stride,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Write `[ROWS, PADDED]` over the rows from `start` that exist, in the dtype of the memory."""
    r, d = tl.arange(0, ROWS), tl.arange(0, PADDED)
    at = base + tl.cast(start, tl.int64) * stride
    at += r.to(tl.int64)[:, None] * stride + d[None, :]
    inside = (start + r < count)[:, None] & (d < SIZE)[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def finite(x):
    """Return where a tile of a dtype of at least 32 bits is neither NaN nor infinite."""
    return tl.abs(x) < INF


@triton.jit
def any_not_finite(x):
    """Return whether a tile of a dtype of at least 32 bits holds NaN or an infinity."""
    return tl.max(tl.where(finite(x), 0, 1)) > 0


@triton.jit
def rows_times_rows(a, b, PRECISION: tl.constexpr):
    """Return `a b^T` of `[R, D]` and `[C, D]`, summed in float32, or float64 for float64."""
    if a.dtype == tl.float64:
        product = tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=tl.float64)
    else:
        product = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return product


@triton.jit
def weigh(acc, w, x, WEIGHTS: tl.constexpr, PRECISION: tl.constexpr):
    """Return `acc + w x` of `[R, C] [R, K] [K, C]`.

    ROUNDED rounds w to the dtype of x; SPLIT takes what that leaves out as a second w; WIDE takes
    x to the dtype of w.
    """
    if WEIGHTS == WIDE:
        x = x.to(w.dtype)
    first = w.to(x.dtype)
    acc = tl.dot(first, x, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    if WEIGHTS == SPLIT:
        left = (w - first.to(w.dtype)).to(x.dtype)
        acc = tl.dot(left, x, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def weigh_attended(
    acc,
    w,
    x,
    seen,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return `acc + w x` where a row of x that is not finite reaches only the rows that see it.

    Slow: for tiles in which there is such a row.
    """
    ROWS: tl.constexpr = x.shape[0]
    r = tl.arange(0, ROWS)
    full = x.to(acc.dtype)
    kept = finite(full)
    spoiled = tl.max(tl.where(kept, 0, 1), 1)  # [K]
    acc = weigh(acc, w, tl.where(kept, full, 0.0).to(x.dtype), WEIGHTS, PRECISION)
    for t in range(ROWS):
        if tl.max(tl.where(r == t, spoiled, 0), 0) > 0:
            row = tl.sum(tl.where((r == t)[:, None] & (kept == 0), full, 0.0), 0)  # [C]
            held = tl.max(tl.where((r == t)[:, None] & (kept == 0), 1, 0), 0)  # [C]
            column = tl.sum(tl.where((r == t)[None, :], w, 0.0), 1)  # [R]
            sees = tl.max(tl.where((r == t)[None, :] & seen, 1, 0), 1)  # [R]
            reached = (sees[:, None] > 0) & (held[None, :] > 0)
            acc = tl.where(reached, acc + column[:, None] * row[None, :], acc)
    return acc


@triton.jit
def _expm1_of_part(f):
    """Return `2^f - 1` for f in [-1/2, 1/2]: the minimax fits that the compiled kernels use.

    Relative error at most 2.4e-10 in float32 and 2.9e-21 in float64, before rounding.
    """
    if f.dtype == tl.float64:
        q = f * 1.3691484191972545e-12 + 2.573350314456854e-11
        q = q * f + 4.4455494061532034e-10
        q = q * f + 7.054894431141825e-09
        q = q * f + 1.0178085967514926e-07
        q = q * f + 1.3215486815888023e-06
        q = q * f + 1.5252733804120638e-05
        q = q * f + 0.00015403530393362876
        q = q * f + 0.0013333558146428406
        q = q * f + 0.009618129107628484
        q = q * f + 0.05550410866482158
        q = q * f + 0.24022650695910072
        q = q * f + 0.6931471805599453
    else:
        q = f * 1.525272000435507e-05 + 0.00015461329894606024
        q = q * f + 0.0013333669630810618
        q = q * f + 0.009618056938052177
        q = q * f + 0.05550410598516464
        q = q * f + 0.24022650718688965
        q = q * f + 0.6931471824645996
    return q * f


@triton.jit
def tanh(x):
    """Return `tanh(x)` and its derivative, with relative accuracy at 0 and at infinity.

    `E / (E + 2)` and `4 (E + 1) / (E + 2)^2` with `E = expm1(2 |x|) = 2^n (2^f - 1) + (2^n - 1)`.
    """
    if x.dtype == tl.float64:
        a = tl.where(tl.abs(x) > 20.0, 20.0, tl.abs(x))
    else:
        a = tl.where(tl.abs(x) > 10.0, 10.0, tl.abs(x))
    y = a * (2 * LOG2E)
    n = tl.floor(y + 0.5)
    power = tl.exp2(n)
    e = power * _expm1_of_part(y - n) + (power - 1.0)
    t = e / (e + 2.0)
    return tl.where(x < 0.0, -t, t), 4.0 * (e + 1.0) / ((e + 2.0) * (e + 2.0))


@triton.jit
def softmax_step(m, l, s):
    """Fold a tile of logits in base 2 into the state of its rows.

    Args:
        m: `[R]`. Row maxima so far; -inf where there was nothing.
        l: `[R]`. Sums of `2^(s - m)`.
        s: `[R, C]`. -inf where masked.

    Returns:
        The new m and l, `[R]` the factor of what was summed before, and `[R, C]` the weights.
    """
    top = tl.maximum(m, tl.max(s, 1))
    base = tl.where(top == -INF, 0.0, top)
    factor = tl.exp2(m - base)
    w = tl.exp2(s - base[:, None])
    return top, l * factor + tl.sum(w, 1), factor, w


@triton.jit
def philox_tile(group, c1, c2, c3, seed_low, seed_high):
    """Return the random words of `[R, C / 4]` counters as `[R, C]`: four columns to a counter.

    The bits of `tilewise.shared.philox.philox4x32`, whose words come one after another here.

    Args:
        group: `[1, C / 4]`. First word of the counter.
        c1: `[R, 1]`. Second word.
        c2: Third word, a scalar or `[R, 1]`.
        c3: Fourth word, a scalar.
        seed_low: Lower half of the key.
        seed_high: Upper half of the key.
    """
    none = tl.zeros([c1.shape[0], group.shape[1]], tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        none + group.to(tl.uint32),
        none + c1.to(tl.uint32),
        none + c2.to(tl.uint32),
        none + c3.to(tl.uint32),
        tl.cast(seed_low, tl.uint32),
        tl.cast(seed_high, tl.uint32),
    )
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
