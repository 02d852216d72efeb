"""Attention forward on Hopper: one warp loads, two warpgroups of 4 warps compute.

Each consumer owns `BM` query rows; both read the same ring of key and value tiles, which the
producer fills with bulk copies. The product of the next logits is issued before that of the
current probabilities, so that one tile's softmax runs beside the other's products.
"""

from .parts import (
    HEADS,
    ITEMS,
    N_OWN,
    barriers,
    fence_async_shared,
    fill,
    gl,
    gluon,
    mbarrier,
    read_runs,
    read_work,
    seen_by_rows,
    store_tile,
    tile_at,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _load_tiles(
    descs, bufs, q_bars, k_bars, v_bars, tables, H_PER_KV: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: fill the rings in the order in which the consumers read them."""
    q_desc, k_desc, v_desc = descs
    q_bufs, k_bufs, v_bufs = bufs
    seq = 0
    turn = 0
    for item in range(gl.program_id(0), gl.load(tables + ITEMS), gl.num_programs(0)):
        b, h, tile, mask_head = read_work(tables, item)
        at, visits, _, _ = read_runs(tables, mask_head, tile)
        for n in range(visits):
            row = tile_at(at, n) * BN
            slot = seq % STAGES
            free = ((seq // STAGES) & 1) ^ 1
            mbarrier.wait(k_bars[1].index(slot), free)
            fill(k_desc, b, h // H_PER_KV, row, k_bufs.index(slot), k_bars[0].index(slot), BN, D)
            if n == 0:
                for c in gl.static_range(2):
                    mbarrier.wait(q_bars[1].index(c), (turn & 1) ^ 1)
                    fill(
                        q_desc, b, h, (tile * 2 + c) * BM, q_bufs.index(c), q_bars[0].index(c),
                        BM, D,
                    )  # fmt: skip
            mbarrier.wait(v_bars[1].index(slot), free)
            fill(v_desc, b, h // H_PER_KV, row, v_bufs.index(slot), v_bars[0].index(slot), BN, D)
            seq += 1
        turn += 1


@gluon.jit
def _softmax_step(s, m, l, scale):
    """Return p, the factor of what was summed before, and the new m (base 2) and l."""
    new = gl.maximum(m, gl.max(s, 1) * scale)  # [BM]
    # A row that has seen no key yet must not compute -inf - -inf.
    base = gl.where(new == float("-inf"), 0.0, new)
    alpha = gl.exp2(m - base)
    p = gl.exp2(s * scale - base[:, None])  # [BM, BN]
    return p, alpha, new, l * alpha + gl.sum(p, 1)


@gluon.jit
def _hide(s, tables, item, at, n, own, BM: gl.constexpr, BN: gl.constexpr, MASKED: gl.constexpr):
    """Return the logits of the n-th visit with -inf where the mask hides a key."""
    _, _, tile, mask_head = read_work(tables, item)
    i = tile * (2 * BM) + own
    j = tile_at(at, n) * BN + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
    seen = seen_by_rows(tables, mask_head, i[:, None], j[None, :], MASKED)
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def _compute(
    who: gl.constexpr, o_desc, outs, q_bufs, k_bufs, v_bufs, q_bars, k_bars, v_bars, turns,
    tables, scale, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, MASKED: gl.constexpr, FULL: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    """One of the two consumers."""
    o_ptr, m_ptr, l_ptr = outs
    dtype: gl.constexpr = o_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    zero = gl.zeros([BM, BN], gl.float32, s_layout)
    q = q_bufs.index(who)
    own = who * BM + gl.arange(0, BM, s_rows)
    seq = 0
    turn = 0
    for item in range(gl.program_id(0), gl.load(tables + ITEMS), gl.num_programs(0)):
        _, _, tile, mask_head = read_work(tables, item)
        at, visits, whole, cut = read_runs(tables, mask_head, tile)
        m = gl.full([BM], float("-inf"), gl.float32, s_rows)
        l = gl.full([BM], 0.0, gl.float32, s_rows)
        acc = gl.zeros([BM, D], gl.float32, o_layout)

        slot = seq % STAGES
        mbarrier.wait(q_bars[0].index(who), turn & 1)
        mbarrier.wait(k_bars[0].index(slot), (seq // STAGES) & 1)
        s = warpgroup_mma(q, k_bufs.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_bars[1].index(slot), count=1)
        if (whole > 0) | (cut <= 0):
            s = _hide(s, tables, item, at, 0, own, BM, BN, MASKED)
        p, alpha, m, l = _softmax_step(s, m, l, scale)
        weights = gl.convert_layout(p.to(dtype), p_layout)

        for n in range(1, visits):
            v_slot = slot
            v_phase = (seq // STAGES) & 1
            seq += 1
            slot = seq % STAGES
            mbarrier.wait(k_bars[0].index(slot), (seq // STAGES) & 1)
            if PING_PONG:  # the first consumer issues its products, then the other one
                mbarrier.wait(turns.index(who), ((seq - turn) & 1) ^ who)
            s_next = warpgroup_mma(
                q, k_bufs.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            mbarrier.wait(v_bars[0].index(v_slot), v_phase)
            acc_next = warpgroup_mma(weights, v_bufs.index(v_slot), acc, is_async=True)
            if PING_PONG:
                mbarrier.arrive(turns.index(1 - who), count=1)
            s = warpgroup_mma_wait(1, deps=(s_next,))
            mbarrier.arrive(k_bars[1].index(slot), count=1)
            if (n < whole) | (n >= cut):
                s = _hide(s, tables, item, at, n, own, BM, BN, MASKED)
            p, alpha, m, l = _softmax_step(s, m, l, scale)
            # The weights are an operand in registers: they may not change before the wait.
            acc, weights = warpgroup_mma_wait(0, deps=(acc_next, weights))
            weights = gl.convert_layout(p.to(dtype), p_layout)
            mbarrier.arrive(v_bars[1].index(v_slot), count=1)
            acc = acc * gl.convert_layout(alpha, o_rows)[:, None]

        mbarrier.wait(v_bars[0].index(slot), (seq // STAGES) & 1)
        acc = warpgroup_mma(weights, v_bufs.index(slot), acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
        mbarrier.arrive(v_bars[1].index(slot), count=1)
        seq += 1
        turn += 1

        # A row without keys is 0, and its sum counts as 1.
        l = gl.where(l == 0.0, 1.0, l)
        acc = acc * gl.convert_layout(1.0 / l, o_rows)[:, None]
        b, h, tile, _ = read_work(tables, item)
        N = gl.load(tables + N_OWN)
        i = tile * (2 * BM) + own
        head = (b * gl.load(tables + HEADS) + h).to(gl.int64) * N
        gl.store(m_ptr + head + i, m, mask=i < N)
        gl.store(l_ptr + head + i, gl.log2(l) * 0.6931471805599453, mask=i < N)
        if FULL:
            i = tile * (2 * BM) + who * BM + gl.arange(0, BM, o_rows)
            d = gl.arange(0, D, gl.SliceLayout(0, o_layout))
            at_rows = (head + i) * D
            gl.store(o_ptr + at_rows[:, None] + d[None, :], acc, mask=(i < N)[:, None])
        store_tile(o_desc, b, h, (tile * 2 + who) * BM, q, acc, BM, D)
        mbarrier.arrive(q_bars[1].index(who), count=1)


@gluon.jit
def attention_hopper_fwd_kernel(
    q_desc, k_desc, v_desc, tables, scale, o_desc, o_ptr, m_ptr, l_ptr,
    H_PER_KV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, MASKED: gl.constexpr, FULL: gl.constexpr, PING_PONG: gl.constexpr,
    REGS: gl.constexpr,
):  # fmt: skip
    """Compute o, m and log l of the work items of one program after the other."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D], q_desc.dtype)
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [2, BM, D], layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, D], layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BN, D], layout)
    q_bars = (barriers(2, 1), barriers(2, 1))
    k_bars = (barriers(STAGES, 1), barriers(STAGES, 2))
    v_bars = (barriers(STAGES, 1), barriers(STAGES, 2))
    turns = barriers(2, 1)
    fence_async_shared()
    outs = (o_ptr, m_ptr, l_ptr)
    gl.warp_specialize(
        [
            (_compute, (0, o_desc, outs, q_bufs, k_bufs, v_bufs, q_bars, k_bars, v_bars, turns,
                        tables, scale, BM, BN, D, STAGES, MASKED, FULL, PING_PONG)),
            (_compute, (1, o_desc, outs, q_bufs, k_bufs, v_bufs, q_bars, k_bars, v_bars, turns,
                        tables, scale, BM, BN, D, STAGES, MASKED, FULL, PING_PONG)),
            (_load_tiles, ((q_desc, k_desc, v_desc), (q_bufs, k_bufs, v_bufs), q_bars, k_bars,
                           v_bars, tables, H_PER_KV, BM, BN, D, STAGES)),
        ],
        [4, 1],
        [REGS, 24],
    )  # fmt: skip
