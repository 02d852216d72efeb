"""Boolean masks as the bits that the other kernels read."""

import triton
import triton.language as tl


@triton.jit
def attention_pack_kernel(
    seen, stride_b, stride_h, stride_n, stride_k, bits, tiles, H, N, Nk, words, keys,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Write one tile of `tilewise.base.masks.PackedBits` of a mask `(.., .., N, Nk)` of bytes."""
    pid = tl.program_id(0)
    part, tile, word = (pid // (words * keys)).to(tl.int64), pid // words % keys, pid % words
    r = tl.arange(0, QUERIES)
    i, j = tl.minimum(word * QUERIES + r, N - 1), tile * KEYS + tl.arange(0, KEYS)
    # What lies beyond repeats the last row and the last key.
    row = seen + (part // H) * stride_b + (part % H) * stride_h + i.to(tl.int64) * stride_n
    at = row[:, None] + (tl.minimum(j, Nk - 1).to(tl.int64) * stride_k)[None, :]
    packed = tl.sum((tl.load(at) != 0).to(tl.int32) << r[:, None], 0)  # [KEYS]
    tl.store(bits + (part * Nk + j) * words + word, packed.to(tl.int16), mask=j < Nk)
    some = tl.max((packed != 0).to(tl.int32), 0)
    full = tl.min((packed == (1 << QUERIES) - 1).to(tl.int32), 0)
    tl.store(tiles + (part * words + word) * keys + tile, (some + full).to(tl.uint8))
