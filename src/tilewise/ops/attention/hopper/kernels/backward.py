"""Attention backward on Hopper, in two passes without atomics: dk and dv, then dq.

Each pass has one warp that loads and two warpgroups that compute, as the forward pass. `keys` owns
tiles of keys and walks over the queries of every head that shares them, in a fixed order; `queries`
owns tiles of queries. Both compute the probabilities anew from the row statistics, so the same call
gives the same bits.
"""

from .parts import (
    HEADS,
    ITEMS,
    MASK_STEP,
    PADDED,
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
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def attention_hopper_rows_kernel(
    do, o, m_ptr, l_ptr, dlse, stride_do_b, stride_do_h, stride_do_n, stride_o_b, stride_o_h,
    stride_o_n, H, N, padded, rows, ROWS: gl.constexpr, D: gl.constexpr, DLSE: gl.constexpr,
):  # fmt: skip
    """Gather what the two passes read of each query, as `(B, H, 3, padded)`.

    That is m, log2 l and `delta = rowsum(do * o) - dlse`. A query that does not exist has m = inf,
    hence no weight, so that the passes need no test for it.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    head = gl.program_id(0)
    b, h = (head // H).to(gl.int64), (head % H).to(gl.int64)
    i = gl.program_id(1) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))  # [ROWS]
    d = gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    exists = i < N
    n = i.to(gl.int64)[:, None]
    at_do = do + (b * stride_do_b + h * stride_do_h) + (n * stride_do_n + d)  # [ROWS, D]
    at_o = o + (b * stride_o_b + h * stride_o_h) + (n * stride_o_n + d)
    moved = gl.load(at_do, mask=exists[:, None], other=0.0).to(gl.float32)
    value = gl.load(at_o, mask=exists[:, None], other=0.0).to(gl.float32)
    delta = gl.sum(moved * value, 1)
    row = head.to(gl.int64) * N + i
    if DLSE:
        delta = delta - gl.load(dlse + row, mask=exists, other=0.0)
    m = gl.load(m_ptr + row, mask=exists, other=float("inf"))
    log_l = gl.load(l_ptr + row, mask=exists, other=0.0)
    out = rows + head.to(gl.int64) * 3 * padded + i
    gl.store(out, m)
    gl.store(out + padded, log_l * 1.4426950408889634)
    gl.store(out + 2 * padded, delta)


@gluon.jit
def _load_for_keys(
    descs, own_bufs, bufs, own_bars, q_bars, do_bars, tables, GROUP: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer of the pass over keys."""
    q_desc, k_desc, v_desc, do_desc, rows_desc = descs
    seq = 0
    turn = 0
    for item in range(gl.program_id(0), gl.load(tables + ITEMS), gl.num_programs(0)):
        b, h, tile, mask_head = read_work(tables, item)
        for c in gl.static_range(2):
            row = (tile * 2 + c) * BM
            mbarrier.wait(own_bars[1].index(c), (turn & 1) ^ 1)
            fill(k_desc, b, h, row, own_bufs[0].index(c), own_bars[0].index(c), BM, D)
            fill(v_desc, b, h, row, own_bufs[1].index(c), own_bars[0].index(c), BM, D)
        for g in range(GROUP):
            of_mask = mask_head + g * gl.load(tables + MASK_STEP)
            at, visits, _, _ = read_runs(tables, of_mask, tile)
            for n in range(visits):
                row = tile_at(at, n) * BN
                slot = seq % STAGES
                free = ((seq // STAGES) & 1) ^ 1
                head = h * GROUP + g
                of_head = (b * gl.load(tables + HEADS) * GROUP + head) * 3
                mbarrier.wait(q_bars[1].index(slot), free)
                fill(q_desc, b, head, row, bufs[0].index(slot), q_bars[0].index(slot), BN, D)
                for r in gl.static_range(3):
                    mbarrier.expect(q_bars[0].index(slot), rows_desc.block_type.nbytes)
                    tma_load(
                        rows_desc, [of_head + r, row], q_bars[0].index(slot),
                        bufs[2].index(slot * 3 + r),
                    )  # fmt: skip
                mbarrier.wait(do_bars[1].index(slot), free)
                fill(do_desc, b, head, row, bufs[1].index(slot), do_bars[0].index(slot), BN, D)
                seq += 1
        turn += 1


@gluon.jit
def _hide_queries(p, tables, item, at, n, mask_head, own, BM: gl.constexpr, BN: gl.constexpr):
    """Return the probabilities of the n-th visit, 0 where the mask hides a key from a query."""
    _, _, tile, _ = read_work(tables, item)
    j = tile * (2 * BM) + own
    i = tile_at(at, n) * BN + gl.arange(0, BN, gl.SliceLayout(0, p.type.layout))
    return gl.where(seen_by_rows(tables, mask_head, j[:, None], i[None, :], True), p, 0.0)


@gluon.jit
def _compute_keys(
    who: gl.constexpr, descs, own_bufs, bufs, own_bars, q_bars, do_bars, tables, scale,
    GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """One of the two consumers of the pass over keys: logits are transposed, `[keys, queries]`.

    The spans say which queries see each key.
    """
    dk_desc, dv_desc = descs
    dtype: gl.constexpr = dk_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    g_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, g_layout, 2)
    own = who * BM + gl.arange(0, BM, gl.SliceLayout(1, s_layout))
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    zero = gl.zeros([BM, BN], gl.float32, s_layout)
    k, v = own_bufs[0].index(who), own_bufs[1].index(who)
    seq = 0
    turn = 0
    for item in range(gl.program_id(0), gl.load(tables + ITEMS), gl.num_programs(0)):
        b, h, tile, mask_head = read_work(tables, item)
        dk = gl.zeros([BM, D], gl.float32, g_layout)
        dv = gl.zeros([BM, D], gl.float32, g_layout)
        mbarrier.wait(own_bars[0].index(who), turn & 1)
        for g in range(GROUP):
            of_mask = mask_head + g * gl.load(tables + MASK_STEP)
            at, visits, whole, cut = read_runs(tables, of_mask, tile)
            for n in range(visits):
                slot = seq % STAGES
                phase = (seq // STAGES) & 1
                q, do = bufs[0].index(slot), bufs[1].index(slot)
                mbarrier.wait(q_bars[0].index(slot), phase)
                s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
                if EARLY:
                    mbarrier.wait(do_bars[0].index(slot), phase)
                    dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
                    s = warpgroup_mma_wait(1, deps=(s,))
                else:
                    s = warpgroup_mma_wait(0, deps=(s,))
                m = bufs[2].index(slot * 3).reshape([BN]).load(columns)
                s = s * scale - m[None, :]
                log2_l = bufs[2].index(slot * 3 + 1).reshape([BN]).load(columns)
                p = gl.exp2(s - log2_l[None, :])
                if MASKED:
                    if (n < whole) | (n >= cut):
                        p = _hide_queries(p, tables, item, at, n, of_mask, own, BM, BN)
                weights = gl.convert_layout(p.to(dtype), a_layout)
                if not EARLY:
                    mbarrier.wait(do_bars[0].index(slot), phase)
                    dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
                dv_next = warpgroup_mma(weights, do, dv, is_async=True)
                dp = warpgroup_mma_wait(1, deps=(dp,))
                dv, weights = warpgroup_mma_wait(0, deps=(dv_next, weights))
                mbarrier.arrive(do_bars[1].index(slot), count=1)
                delta = bufs[2].index(slot * 3 + 2).reshape([BN]).load(columns)
                ds = gl.convert_layout((p * (dp - delta[None, :])).to(dtype), a_layout)
                dk_next = warpgroup_mma(ds, q, dk, is_async=True)
                dk, ds = warpgroup_mma_wait(0, deps=(dk_next, ds))
                mbarrier.arrive(q_bars[1].index(slot), count=1)
                seq += 1
        turn += 1
        b, h, tile, mask_head = read_work(tables, item)
        row = (tile * 2 + who) * BM
        store_tile(dk_desc, b, h, row, k, dk * (scale * LN2), BM, D)
        store_tile(dv_desc, b, h, row, v, dv, BM, D)
        mbarrier.arrive(own_bars[1].index(who), count=1)


@gluon.jit
def attention_hopper_bwd_keys_kernel(
    q_desc, k_desc, v_desc, do_desc, rows_desc, tables, scale, dk_desc, dv_desc,
    GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, MASKED: gl.constexpr, EARLY: gl.constexpr, REGS: gl.constexpr,
):  # fmt: skip
    """Compute dk and dv of the work items of one program after the other."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D], q_desc.dtype)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [2, BM, D], layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [2, BM, D], layout)
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BN, D], layout)
    do_bufs = gl.allocate_shared_memory(do_desc.dtype, [STAGES, BN, D], layout)
    row_bufs = gl.allocate_shared_memory(gl.float32, [STAGES * 3, 1, BN], rows_desc.layout)
    own_bars = (barriers(2, 2), barriers(2, 1))
    q_bars = (barriers(STAGES, 4), barriers(STAGES, 2))
    do_bars = (barriers(STAGES, 1), barriers(STAGES, 2))
    fence_async_shared()
    own_bufs, bufs = (k_bufs, v_bufs), (q_bufs, do_bufs, row_bufs)
    descs = (dk_desc, dv_desc)
    gl.warp_specialize(
        [
            (_compute_keys, (0, descs, own_bufs, bufs, own_bars, q_bars, do_bars, tables, scale,
                             GROUP, BM, BN, D, STAGES, MASKED, EARLY)),
            (_compute_keys, (1, descs, own_bufs, bufs, own_bars, q_bars, do_bars, tables, scale,
                             GROUP, BM, BN, D, STAGES, MASKED, EARLY)),
            (_load_for_keys, ((q_desc, k_desc, v_desc, do_desc, rows_desc), own_bufs, bufs,
                              own_bars, q_bars, do_bars, tables, GROUP, BM, BN, D, STAGES)),
        ],
        [4, 1],
        [REGS, 24],
    )  # fmt: skip


@gluon.jit
def _load_for_queries(
    descs, own_bufs, bufs, own_bars, k_bars, v_bars, tables, GROUP: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer of the pass over queries."""
    q_desc, k_desc, v_desc, do_desc = descs
    seq = 0
    turn = 0
    for item in range(gl.program_id(0), gl.load(tables + ITEMS), gl.num_programs(0)):
        b, h, tile, mask_head = read_work(tables, item)
        at, visits, _, _ = read_runs(tables, mask_head, tile)
        for c in gl.static_range(2):
            row = (tile * 2 + c) * BM
            mbarrier.wait(own_bars[1].index(c), (turn & 1) ^ 1)
            fill(q_desc, b, h, row, own_bufs[0].index(c), own_bars[0].index(c), BM, D)
            fill(do_desc, b, h, row, own_bufs[1].index(c), own_bars[0].index(c), BM, D)
        for n in range(visits):
            row = tile_at(at, n) * BN
            slot = seq % STAGES
            free = ((seq // STAGES) & 1) ^ 1
            mbarrier.wait(k_bars[1].index(slot), free)
            fill(k_desc, b, h // GROUP, row, bufs[0].index(slot), k_bars[0].index(slot), BN, D)
            mbarrier.wait(v_bars[1].index(slot), free)
            fill(v_desc, b, h // GROUP, row, bufs[1].index(slot), v_bars[0].index(slot), BN, D)
            seq += 1
        turn += 1


@gluon.jit
def _weights(
    s, tables, item, at, n, whole, cut, own, m, log2_l, scale, BM: gl.constexpr,
    BN: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Return the probabilities of the n-th visit of the pass over queries, `[BM, BN]`."""
    p = gl.exp2((s * scale - m[:, None]) - log2_l[:, None])
    if (n < whole) | (n >= cut):
        _, _, tile, mask_head = read_work(tables, item)
        i = tile * (2 * BM) + own
        j = tile_at(at, n) * BN + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
        p = gl.where(seen_by_rows(tables, mask_head, i[:, None], j[None, :], MASKED), p, 0.0)
    return p


@gluon.jit
def _compute_queries(
    who: gl.constexpr, dq_desc, rows, own_bufs, bufs, own_bars, k_bars, v_bars, tables,
    scale, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One of the two consumers of the pass over queries."""
    dtype: gl.constexpr = dq_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    g_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, g_layout, 2)
    own = who * BM + gl.arange(0, BM, gl.SliceLayout(1, s_layout))
    zero = gl.zeros([BM, BN], gl.float32, s_layout)
    q, do = own_bufs[0].index(who), own_bufs[1].index(who)
    seq = 0
    turn = 0
    for item in range(gl.program_id(0), gl.load(tables + ITEMS), gl.num_programs(0)):
        b, h, tile, mask_head = read_work(tables, item)
        at, visits, whole, cut = read_runs(tables, mask_head, tile)
        padded = gl.load(tables + PADDED)
        head = (b * gl.load(tables + HEADS) + h).to(gl.int64)
        of_rows = rows + head * 3 * padded + tile * (2 * BM) + own
        m = gl.load(of_rows)  # [BM]
        log2_l = gl.load(of_rows + padded)
        delta = gl.load(of_rows + 2 * padded)
        dq = gl.zeros([BM, D], gl.float32, g_layout)

        slot = seq % STAGES
        phase = (seq // STAGES) & 1
        mbarrier.wait(own_bars[0].index(who), turn & 1)
        mbarrier.wait(k_bars[0].index(slot), phase)
        k, v = bufs[0].index(slot), bufs[1].index(slot)
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_bars[0].index(slot), phase)
        dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        p = _weights(s, tables, item, at, 0, whole, cut, own, m, log2_l, scale, BM, BN, MASKED)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        mbarrier.arrive(v_bars[1].index(slot), count=1)
        ds = gl.convert_layout((p * (dp - delta[:, None])).to(dtype), a_layout)

        for n in range(1, visits):
            before = slot
            seq += 1
            slot = seq % STAGES
            phase = (seq // STAGES) & 1
            k, v = bufs[0].index(slot), bufs[1].index(slot)
            mbarrier.wait(k_bars[0].index(slot), phase)
            s_next = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_bars[0].index(slot), phase)
            dp_next = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
            dq_next = warpgroup_mma(ds, bufs[0].index(before), dq, is_async=True)
            s = warpgroup_mma_wait(2, deps=(s_next,))
            p = _weights(s, tables, item, at, n, whole, cut, own, m, log2_l, scale, BM, BN, MASKED)
            dp = warpgroup_mma_wait(1, deps=(dp_next,))
            mbarrier.arrive(v_bars[1].index(slot), count=1)
            ds_next = p * (dp - delta[:, None])
            # ds is an operand in registers: it may not change before the wait.
            dq, ds = warpgroup_mma_wait(0, deps=(dq_next, ds))
            mbarrier.arrive(k_bars[1].index(before), count=1)
            ds = gl.convert_layout(ds_next.to(dtype), a_layout)

        dq = warpgroup_mma(ds, bufs[0].index(slot), dq, is_async=True)
        dq, ds = warpgroup_mma_wait(0, deps=(dq, ds))
        mbarrier.arrive(k_bars[1].index(slot), count=1)
        seq += 1
        turn += 1
        b, h, tile, mask_head = read_work(tables, item)
        store_tile(dq_desc, b, h, (tile * 2 + who) * BM, q, dq * (scale * LN2), BM, D)
        mbarrier.arrive(own_bars[1].index(who), count=1)


@gluon.jit
def attention_hopper_bwd_queries_kernel(
    q_desc, k_desc, v_desc, do_desc, rows, tables, scale, dq_desc, GROUP: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr, REGS: gl.constexpr,
):  # fmt: skip
    """Compute dq of the work items of one program after the other."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D], q_desc.dtype)
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [2, BM, D], layout)
    do_bufs = gl.allocate_shared_memory(do_desc.dtype, [2, BM, D], layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, D], layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BN, D], layout)
    own_bars = (barriers(2, 2), barriers(2, 1))
    k_bars = (barriers(STAGES, 1), barriers(STAGES, 2))
    v_bars = (barriers(STAGES, 1), barriers(STAGES, 2))
    fence_async_shared()
    own_bufs, bufs = (q_bufs, do_bufs), (k_bufs, v_bufs)
    gl.warp_specialize(
        [
            (_compute_queries, (0, dq_desc, rows, own_bufs, bufs, own_bars, k_bars, v_bars, tables,
                                scale, BM, BN, D, STAGES, MASKED)),
            (_compute_queries, (1, dq_desc, rows, own_bufs, bufs, own_bars, k_bars, v_bars, tables,
                                scale, BM, BN, D, STAGES, MASKED)),
            (_load_for_queries, ((q_desc, k_desc, v_desc, do_desc), own_bufs, bufs, own_bars,
                                 k_bars, v_bars, tables, GROUP, BM, BN, D, STAGES)),
        ],
        [4, 1],
        [REGS, 24],
    )  # fmt: skip
