"""Caches of keys and values: who holds which page, and attention over them."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewise as tw

H, HK, D, DV, PAGE = 6, 2, 7, 5, 3
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
IMPLEMENTATIONS = ["reference", "cpu"]
Dense = list[np.ndarray]


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def keys(B: int, n: int, seed: int = 0, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    return normal(seed, B, HK, n, D, dtype=dtype), normal(seed + 1, B, HK, n, DV, dtype=dtype)


def cache_of(pages: int = 40, **options: Any) -> tw.KVCache:
    return tw.KVCache(pages, PAGE, HK, D, DV, **options)


def filled(*lengths: int, pages: int = 40, seed: int = 0) -> tuple[tw.KVCache, Dense, Dense]:
    """A cache with sequences 0, 1, ... of these lengths, and their keys and values."""
    cache = cache_of(pages)
    cache.open(len(lengths))
    k, v = keys(len(lengths), max(lengths), seed)
    cache.append(k, v, lengths=lengths)
    cut = [[x[b : b + 1, :, :n] for b, n in enumerate(lengths)] for x in (k, v)]
    return cache, cut[0], cut[1]


def held(cache: tw.KVCache, id: int) -> tuple[np.ndarray, np.ndarray]:
    """The keys and values of a sequence, 0 where they are evicted."""
    (length,), (table,) = cache.lengths(id), cache.block_table(id)
    found = []
    for pool in (cache.k, cache.v):
        pages = [pool[page] if page >= 0 else 0 * pool[0] for page in table]
        whole = np.concatenate([pool[0, :, :0], *pages], axis=1)
        found.append(whole[:, :length])
    return found[0], found[1]


def state(cache: tw.KVCache) -> dict[str, Any]:
    """Everything that a user can see of a cache."""
    ids = cache.sequences
    return {
        "free": cache.pages_free,
        "ids": ids,
        "lengths": [cache.lengths(id).tolist() for id in ids],
        "tables": [cache.block_table(id).tolist() for id in ids],
        "held": [[x.tobytes() for x in held(cache, id)] for id in ids],
        "next": cache._pages._next,
        "holders": list(cache._pages._holders),
        "free pages": sorted(cache._pages._free),
        "busy": [entry.busy for entry in cache._pages._entries.values()],
    }


def check_books(cache: tw.KVCache) -> None:
    """Every page has as many holders as tables name it, and is free where that is none."""
    tables = [cache.block_table(id)[0] for id in cache.sequences]
    named = np.bincount(
        np.concatenate([np.zeros(0, int), *[t[t >= 0] for t in tables]]).astype(int),
        minlength=cache.pages,
    )
    assert named.tolist() == cache._pages._holders
    assert sorted(cache._pages._free) == np.flatnonzero(named == 0).tolist()
    assert cache.pages_free == np.count_nonzero(named == 0)


def everything(q: np.ndarray, *kv: Any, **options: Any) -> list[np.ndarray]:
    """All results of attention."""
    want = {f"return_{name}": True for name in ("lse", "max_logit", "entropy", "stats")}
    out: Any = tw.attention(q, *kv, **want, **options)
    return [out.o, *out.stats, out.lse, out.max_logit, out.entropy]


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# Attention


OPTIONS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "none": lambda N, Nk: {},
    "causal": lambda N, Nk: {"mask": tw.causal()},
    "window": lambda N, Nk: {"mask": tw.causal() & (tw.window(4, 0) | tw.sink_tokens(1))},
    "by head": lambda N, Nk: {"mask": tw.dense(np.arange(H * N).reshape(H, N, 1) % 3 > 0)},
    "three intervals": lambda N, Nk: {
        "mask": tw.chunked(2, align="top_left") | tw.sink_tokens(1) | tw.window(0, 0)
    },
    "boolean": lambda N, Nk: {"mask": (np.arange(N * Nk).reshape(N, Nk) % 3 > 0)},
    "bias": lambda N, Nk: {"bias": normal(7, H, 1, Nk), "mask": tw.causal()},
    "slopes": lambda N, Nk: {"alibi_slopes": np.linspace(0.1, 1, H, dtype=np.float32)},
    "sinks": lambda N, Nk: {"sinks": normal(8, H), "softcap": 2.5, "softmax_scale": 0.7},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_over_pages_has_the_bits_of_dense_keys(name: str, implementation: str) -> None:
    lengths, N = (11, 4, 8), 4
    cache, k, v = filled(*lengths)
    q, max_k = normal(3, 3, H, N, D), max(lengths)
    options = OPTIONS[name](N, max_k)
    found = everything(q, cache=cache, implementation=implementation, **options)
    for b, n in enumerate(lengths):
        own = dict(options)
        for cut in {"bias", "mask"} & {key for key in own if isinstance(own[key], np.ndarray)}:
            own[cut] = own[cut][..., :n]
        one = everything(q[b : b + 1], k[b], v[b], implementation=implementation, **own)
        assert_same([x[b : b + 1] for x in found], one)


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"three intervals", "boolean"}))
def test_compiled_kernels_read_the_pages_themselves(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(tw.KVCache, "_dense")
    cache, _, _ = filled(11, 4, 8)
    cache.evict(keep=5)
    tw.attention(normal(3, 3, H, 4, D), cache=cache, implementation="cpu", **OPTIONS[name](4, 11))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [1, 16, 37, 64, 512])
def test_the_size_of_pages_does_not_change_bits(page: int, dtype: Any) -> None:
    """Pages that end within, at and beyond the ends of the tiles that kernels read."""
    lengths, N = [301, 128], 67
    k, v = normal(0, 2, HK, 301, 32, dtype=dtype), normal(1, 2, HK, 301, 32, dtype=dtype)
    q = normal(2, 2, H, N, 32, dtype=dtype)
    cache = tw.KVCache(1000, page, HK, 32, dtype=dtype)
    order = cache.open(2)
    for end in range(0, 301, 43):  # so that the pages of the two alternate
        counts = [max(0, min(n - end, 43)) for n in lengths]
        part = (slice(None), slice(None), slice(end, end + 43))
        cache.append(k[part], v[part], order, lengths=counts)
    for rows in (N, 1):
        found = everything(q[:, :, :rows], cache=cache, mask=tw.causal(), implementation="cpu")
        for b, n in enumerate(lengths):
            own = (q[b : b + 1, :, :rows], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
            one = everything(*own, mask=tw.causal(), implementation="cpu")
            assert_same([x[b : b + 1] for x in found], one)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layout_is_that_of_attention(implementation: str) -> None:
    cache, k, v = filled(11, 11)
    q = normal(3, 2, H, 4, D)
    options: dict[str, Any] = {"mask": tw.causal(), "implementation": implementation}
    expected = tw.attention(q, np.concatenate(k), np.concatenate(v), **options)
    found = tw.attention(q.swapaxes(1, 2).copy(), cache=cache, layout="bnhd", **options)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found.swapaxes(1, 2), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("chunks", [(13,), (1,) * 13, (5, 0, 3, 4, 1), (2, 11)])
def test_chunks_have_the_bits_of_one_go(chunks: tuple[int, ...], implementation: str) -> None:
    B, n = 2, 13
    (k, v), q = keys(B, n), normal(3, B, H, n, D)
    options: dict[str, Any] = {"mask": tw.causal(), "implementation": implementation}
    expected = everything(q, k, v, **options)
    cache = cache_of()
    cache.open(B)
    parts, end = [], 0
    for size in chunks:
        rows = (slice(None), slice(None), slice(end, end + size))
        parts.append(everything(q[rows], k[rows], v[rows], cache=cache, **options))
        end += size
    assert_same([np.concatenate(x, axis=2) for x in zip(*parts, strict=True)], expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("extra", [{}, {"alibi_slopes": np.linspace(0.1, 1, H, dtype=np.float32)}])
def test_padded_prompts_give_what_each_gives_alone(
    extra: dict[str, Any], implementation: str
) -> None:
    lengths, N = [5, 0, 7, 1], 7
    k, v = keys(4, N)
    q = normal(3, 4, H, N, D)
    options = {"mask": tw.causal(), "implementation": implementation, **extra}
    for b, n in enumerate(lengths):
        for x in (q, k, v):
            x[b, :, n:] = np.nan
    cache = cache_of()
    cache.open(4)
    found = everything(q, k, v, cache=cache, lengths=lengths, **options)
    assert cache.lengths().tolist() == lengths
    for b, n in enumerate(lengths):
        own = (q[b : b + 1, :, :n], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        assert_same([x[b : b + 1, :, :n] for x in found], everything(*own, **options))
        empty = [0, -np.inf, 0, -np.inf, -np.inf, 0]
        for x, value in zip(found, empty, strict=True):
            assert (x[b, :, n:] == value).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fork_has_the_bits_of_a_copy(implementation: str) -> None:
    cache, (k,), (v,) = filled(8)
    children = cache.fork(0, 2)
    branches = [keys(1, 5, seed=20 + i) for i in range(3)]
    for id, branch in zip([0, *children], branches, strict=True):
        for i in range(5):
            cache.append(*[x[:, :, i : i + 1] for x in branch], id)
    q = normal(3, 3, H, 2, D)
    options: dict[str, Any] = {"mask": tw.causal(), "implementation": implementation}
    whole = [
        np.concatenate([np.concatenate((x, b[i]), 2) for b in branches])
        for i, x in ((0, k), (1, v))
    ]
    found = everything(q, cache=cache, **options)
    assert_same(found, everything(q, *whole, **options))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_evicted_keys_are_hidden_and_positions_stay(implementation: str) -> None:
    lengths = (17, 8, 2)
    cache, k, v = filled(*lengths)
    before = cache.pages_free
    cache.evict([0, 1], keep=4)
    gone = [12, 3, 0]  # whole pages before the last four keys
    assert cache.pages_free == before + sum(gone) // PAGE
    assert cache.block_table()[0, :5].tolist() == [-1, -1, -1, -1, 4]
    assert cache.lengths().tolist() == list(lengths)
    used = np.unique(cache.block_table())
    free = np.setdiff1d(np.arange(cache.pages), used)
    cache.k[free] = cache.v[free] = np.nan
    q = normal(3, 3, H, 2, D)
    slopes = np.linspace(0.1, 1, H, dtype=np.float32)
    for mask in (None, tw.causal(), tw.window(9, 0) | tw.sink_tokens(2), tw.window(3, 0)):
        options = {"alibi_slopes": slopes, "implementation": implementation}
        found = everything(q, cache=cache, mask=mask, **options)
        for b, n in enumerate(lengths):
            seen = (np.arange(n) >= gone[b])[None, :].repeat(2, 0)
            own = tw.dense(seen) if mask is None else tw.dense(seen) & mask
            one = everything(q[b : b + 1], k[b], v[b], mask=own, **options)
            assert_same([x[b : b + 1] for x in found], one)


def test_a_sliding_window_decodes_in_a_constant_number_of_pages() -> None:
    window, total = 5, 60
    cache = tw.KVCache(3, PAGE, HK, D, DV)
    cache.open()
    (k, v), q = keys(1, total), normal(3, 1, H, total, D)
    mask = tw.causal() & tw.window(window - 1, 0)
    expected = tw.attention(q, k, v, mask=mask)
    for i in range(total):
        at = (slice(None), slice(None), slice(i, i + 1))
        cache.evict(keep=window - 1)
        o = tw.attention(q[at], k[at], v[at], cache=cache, mask=mask)
        np.testing.assert_array_equal(o, expected[at])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sequences_may_be_chosen_in_any_order_and_read_twice(implementation: str) -> None:
    cache, k, v = filled(5, 9, 3)
    q = normal(3, 4, H, 1, D)
    order = [2, 0, 2, 1]
    found = tw.attention(q, cache=cache, sequences=order, implementation=implementation)
    for b, id in enumerate(order):
        one = tw.attention(q[b : b + 1], k[id], v[id], implementation=implementation)
        np.testing.assert_array_equal(found[b : b + 1], one)
    single = tw.attention(q[3:], cache=cache, sequences=1, implementation=implementation)
    np.testing.assert_array_equal(single, found[3:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_sequences_and_no_sequences(implementation: str) -> None:
    cache = cache_of()
    for mask in (None, tw.causal()):
        options: dict[str, Any] = {"mask": mask, "implementation": implementation}
        none = tw.attention(normal(0, 0, H, 2, D), cache=cache, **options)
        assert none.shape == (0, H, 2, DV)
    cache.open(2)
    out = everything(normal(0, 2, H, 2, D), cache=cache, implementation=implementation)
    assert (out[0] == 0).all()
    assert (out[3] == -np.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_dtype(dtype: Any, implementation: str) -> None:
    k, v = keys(2, 7, dtype=dtype)
    q = normal(3, 2, H, 7, D, dtype=dtype)
    options: dict[str, Any] = {"mask": tw.causal(), "implementation": implementation}
    for cache in (cache_of(like=k), cache_of(dtype=dtype), cache_of(dtype=np.dtype(dtype).name)):
        cache.open(2)
        found = everything(q, k, v, cache=cache, **options)
        assert cache.k.itemsize == np.dtype(dtype).itemsize
    assert_same(found, everything(q, k, v, **options))


def test_derivative_functions_take_no_cache() -> None:
    q = normal(0, 1, H, 2, D)
    with pytest.raises(TypeError, match="cache"):
        tw.numpy.attention_vjp(q, q, q, q, q, q, cache=cache_of())  # type: ignore[call-arg]


# Pages


def test_pages_are_shared_until_one_appends() -> None:
    cache, _, _ = filled(8, pages=10)
    assert cache.pages_free == 7
    cache.fork(0, 2)
    assert cache.pages_free == 7
    k, v = keys(1, 1)
    cache.append(k, v, 1)
    assert cache.pages_free == 6  # a page of its own for the last two keys
    cache.append(k, v, 2)
    assert cache.pages_free == 5
    cache.append(k, v, 0)  # has the page for itself by now
    assert cache.pages_free == 5
    assert len({int(row[2]) for row in cache.block_table()}) == 3
    check_books(cache)


def test_all_that_share_a_page_may_append_in_one_call() -> None:
    cache, (k,), (v,) = filled(8, pages=5)
    cache.fork(0, 2)
    more = keys(3, 1, seed=9)
    cache.append(*more)
    assert cache.pages_free == 0
    for b in range(3):
        for found, first, new in zip(held(cache, b), (k, v), more, strict=True):
            np.testing.assert_array_equal(found, np.concatenate((first[0], new[b]), axis=1))
    check_books(cache)


def test_a_fork_of_a_part_does_not_see_the_rest() -> None:
    cache, (k,), _ = filled(8)
    (child,) = cache.fork(0, length=4)
    new, values = keys(1, 2, seed=9)
    cache.append(new, values, child)
    np.testing.assert_array_equal(held(cache, 0)[0], k[0])
    np.testing.assert_array_equal(held(cache, child)[0], np.concatenate((k[0, :, :4], new[0]), 1))


def test_truncated_keys_are_forgotten_and_their_pages_free() -> None:
    cache, (k,), _ = filled(11)
    (child,) = cache.fork(0)
    for length in (10, 9, 4):
        cache.truncate(0, length)
        np.testing.assert_array_equal(held(cache, 0)[0], k[0, :, :length])
    new, values = keys(1, 3, seed=9)
    cache.append(new, values, 0)
    np.testing.assert_array_equal(held(cache, 0)[0], np.concatenate((k[0, :, :4], new[0]), 1))
    np.testing.assert_array_equal(held(cache, child)[0], k[0])
    check_books(cache)


def test_contiguous_sequences_have_one_page_each() -> None:
    cache = tw.KVCache.contiguous(3, 8, HK, D, DV)
    assert cache.sequences == [0, 1, 2]
    assert cache.pages_free == 3
    assert cache.max_length == 8
    k, v = keys(3, 8)
    cache.append(k, v)
    np.testing.assert_array_equal(cache.k, k)
    np.testing.assert_array_equal(cache.v, v)
    with pytest.raises(ValueError, match=r"sequence 1 must stay within max_length=8, got 8 \+ 1"):
        cache.append(*keys(1, 1), 1)


def test_ids_are_never_used_again() -> None:
    cache = cache_of()
    assert cache.open(3) == [0, 1, 2]
    cache.free([0, 2])
    assert cache.sequences == [1]
    assert cache.open() == [3]


def test_bytes_are_those_of_the_formula() -> None:
    cache = tw.KVCache(11, PAGE, HK, D, DV, dtype="bfloat16")
    assert cache.nbytes == 11 * PAGE * HK * (D + DV) * 2
    assert repr(cache).startswith("<KVCache: page_size=3, Hk=2, D=7, Dv=5, dtype='bfloat16'; 0 seq")


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_agree_with_lists(seed: int) -> None:
    """Sequences as lists of keys, which copy all that they share, behave as those of a cache."""
    draw = random.Random(seed)
    cache = cache_of(pages=12)
    model: dict[int, list[np.ndarray]] = {id: [] for id in cache.open(2)}
    gone = dict.fromkeys(model, 0)
    for step in range(60):
        known = state(cache)
        ids = draw.sample(sorted(model), min(len(model), draw.randint(1, 3)))
        try:
            match draw.choice(["append"] * 4 + ["fork", "truncate", "evict", "free", "open"]):
                case "append":
                    counts = [draw.randint(0, 4) for _ in ids]
                    k, v = keys(len(ids), 4, seed=1000 * seed + step)
                    cache.append(k, v, ids, lengths=counts)
                    for b, (id, n) in enumerate(zip(ids, counts, strict=True)):
                        model[id] = [*model[id], *k[b, :, :n].swapaxes(0, 1)]
                case "fork" if ids:
                    length = draw.randint(gone[ids[0]], len(model[ids[0]]))
                    for new in cache.fork(ids[0], 2, length=length):
                        model[new], gone[new] = model[ids[0]][:length], gone[ids[0]]
                case "truncate" if ids:
                    length = draw.randint(gone[ids[0]], len(model[ids[0]]))
                    cache.truncate(ids[0], length)
                    model[ids[0]] = model[ids[0]][:length]
                case "evict":
                    keep = draw.randint(0, 8)
                    cache.evict(ids, keep=keep)
                    for id in ids:
                        whole = max(0, len(model[id]) - keep) // PAGE * PAGE
                        gone[id] = max(gone[id], whole)
                case "free" if len(model) > 3:
                    cache.free(ids)
                    for id in ids:
                        del model[id]
                case _ if len(model) < 6:
                    model.update((id, []) for id in cache.open())
                    gone.update((id, 0) for id in model if id not in gone)
        except tw.OutOfPages:
            assert state(cache) == known
        check_books(cache)
        assert cache.lengths().tolist() == [len(model[id]) for id in cache.sequences]
        for id, rows in model.items():
            expected = np.array([*rows, np.zeros((HK, D))])[:-1].swapaxes(0, 1).astype(np.float32)
            expected[:, : gone[id]] = 0
            np.testing.assert_array_equal(held(cache, id)[0], expected)


def test_threads_with_sequences_of_their_own() -> None:
    cache = tw.KVCache(60, PAGE, HK, D, DV)
    (prompt,) = cache.open()
    k, v = keys(1, 4)
    cache.append(k, v, prompt)
    new = [keys(1, 9, seed=50 + i) for i in range(6)]
    q = normal(3, 1, H, 1, D)

    def decode(i: int) -> np.ndarray:
        (id,) = cache.fork(prompt)
        for j in range(9):
            at = [x[:, :, j : j + 1] for x in new[i]]
            o = tw.attention(q, *at, cache=cache, sequences=id)
        cache.free(id)
        return o

    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(decode, [0, 1, 2, 3, 4, 5] * 5))
    for i, o in enumerate(found):
        whole = [np.concatenate((a, b), axis=2) for a, b in zip((k, v), new[i % 6], strict=True)]
        np.testing.assert_array_equal(o, tw.attention(q, *whole))
    assert cache.pages_free == 58
    check_books(cache)


# Errors: each leaves the cache as it was.


Action = Callable[[tw.KVCache], Any]


def new(B: int, n: int = 1, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    return keys(B, n, **options)


def query(B: int = 2, N: int = 1, heads: int = H, dtype: Any = np.float32) -> np.ndarray:
    return normal(3, B, heads, N, D, dtype=dtype)


BAD: list[tuple[Action, type[Exception], str]] = [
    # append
    (
        lambda c: c.append(*new(3)),
        ValueError,
        "KVCache.append: k must have shape (B, Hk, Nk, D) with B=2 (from sequences)",
    ),
    (
        lambda c: c.append(new(2)[0], new(2, 2)[1]),
        ValueError,
        "v must have shape (B, Hk, Nk, Dv) with Nk=1 (from k), got",
    ),
    (
        lambda c: c.append(new(2)[1], new(2)[1]),
        ValueError,
        "k must have shape (B, Hk, Nk, D) with D=7 (from cache)",
    ),
    (
        lambda c: c.append(new(2)[0], new(2)[0]),
        ValueError,
        "v must have shape (B, Hk, Nk, Dv) with Dv=5 (from cache)",
    ),
    (
        lambda c: c.append(new(2)[0][0], new(2)[1]),
        ValueError,
        "k must have shape (B, Hk, Nk, D), got (2, 1, 7)",
    ),
    (
        lambda c: c.append(*new(2, dtype=np.float64)),
        TypeError,
        "k must have dtype float32 (from cache), got float64",
    ),
    (
        lambda c: c.append(new(2)[0], new(2)[1].astype(">f4")),
        TypeError,
        "v must have dtype float32 (from cache), got >f4",
    ),
    (
        lambda c: c.append([[1.0]], new(2)[1]),
        TypeError,
        "k must be a numpy.ndarray or a torch.Tensor, got list",
    ),
    (
        lambda c: c.append(*new(2), layout="hbnd"),
        ValueError,
        "layout must be 'bhnd' or 'bnhd', got 'hbnd'",
    ),
    (
        lambda c: c.append(*new(2), [0, 0]),
        ValueError,
        "KVCache.append: sequences must be different, got 0 2 times",
    ),
    (
        lambda c: c.append(*new(1), 2),
        ValueError,
        "KVCache.append: sequences must be open in this cache, got 2",
    ),
    (lambda c: c.append(*new(1), -1), ValueError, "sequences must be open in this cache, got -1"),
    (
        lambda c: c.append(*new(1), 0.0),
        TypeError,
        "sequences must be an integer or integers, got float",
    ),
    (
        lambda c: c.append(*new(1), True),
        TypeError,
        "sequences must be an integer or integers, got bool",
    ),
    (
        lambda c: c.append(*new(2), ["0", "1"]),
        TypeError,
        "sequences must be an integer or integers, got str",
    ),
    (
        lambda c: c.append(*new(2, 2), lengths=[1, 3]),
        ValueError,
        "lengths must be from 0 to 2, got 3",
    ),
    (
        lambda c: c.append(*new(2, 2), lengths=[1, -1]),
        ValueError,
        "lengths must be from 0 to 2, got -1",
    ),
    (
        lambda c: c.append(*new(2, 2), lengths=[1]),
        ValueError,
        "lengths must have 2 entries (from sequences), got 1",
    ),
    (
        lambda c: c.append(*new(2, 8)),
        tw.OutOfPages,
        "KVCache.append: cache must have 6 free pages, got 4",
    ),
    (lambda c: c.append(*new(1, 15), 0), tw.OutOfPages, "must have 5 free pages, got 4"),
    # free
    (lambda c: c.free(2), ValueError, "KVCache.free: sequences must be open in this cache, got 2"),
    (lambda c: c.free([0, 1, 7]), ValueError, "sequences must be open in this cache, got 7"),
    (
        lambda c: c.free([1, 1]),
        ValueError,
        "KVCache.free: sequences must be different, got 1 2 times",
    ),
    (lambda c: c.free(None), TypeError, "KVCache.free: sequences must be given, got None"),
    # fork
    (lambda c: c.fork(2), ValueError, "KVCache.fork: sequences must be open in this cache, got 2"),
    (lambda c: c.fork(0, length=6), ValueError, "KVCache.fork: length must be from 0 to 5, got 6"),
    (lambda c: c.fork(0, length=-1), ValueError, "length must be at least 0, got -1"),
    (lambda c: c.fork(0, -1), ValueError, "KVCache.fork: n must be at least 0, got -1"),
    (
        lambda c: c.fork(1, length=2),
        ValueError,
        "length must be from 3 to 8 (earlier keys of sequence 1 are evicted), got 2",
    ),
    (lambda c: c.fork("a"), TypeError, "KVCache.fork: sequence must be an integer, got str"),
    # truncate
    (lambda c: c.truncate(0, 6), ValueError, "KVCache.truncate: length must be from 0 to 5, got 6"),
    (
        lambda c: c.truncate(1, 2),
        ValueError,
        "KVCache.truncate: length must be from 3 to 8 (earlier",
    ),
    (lambda c: c.truncate(5, 0), ValueError, "KVCache.truncate: sequences must be open"),
    (
        lambda c: c.truncate(0, 1.5),
        TypeError,
        "KVCache.truncate: length must be an integer, got float",
    ),
    # evict, open, and what only reads
    (
        lambda c: c.evict([0, 5], keep=0),
        ValueError,
        "KVCache.evict: sequences must be open in this cache, got 5",
    ),
    (lambda c: c.evict(keep=-1), ValueError, "KVCache.evict: keep must be at least 0, got -1"),
    (lambda c: c.open(-1), ValueError, "KVCache.open: n must be at least 0, got -1"),
    (
        lambda c: c.lengths(9),
        ValueError,
        "KVCache.lengths: sequences must be open in this cache, got 9",
    ),
    (lambda c: c.block_table(9), ValueError, "KVCache.block_table: sequences must be open"),
    # attention: the keys that it was to append are not there afterwards
    (
        lambda c: tw.attention(query(3), *new(2), cache=c),
        ValueError,
        "attention: q must have shape (B, H, N, D) with B=2 (from sequences)",
    ),
    (
        lambda c: tw.attention(query(heads=5), *new(2), cache=c),
        ValueError,
        "attention: cache must have shape (B, Hk, Nk, D) with Hk a divisor of H=5",
    ),
    (lambda c: tw.attention(query()[..., :3], *new(2), cache=c), ValueError, "with D=3 (from q)"),
    (
        lambda c: tw.attention(query(dtype=np.float64), *new(2), cache=c),
        TypeError,
        "attention: q must have dtype float32 (from cache), got float64",
    ),
    (
        lambda c: tw.attention(query(), *new(2, 9), cache=c),
        tw.OutOfPages,
        "attention: cache must have 6 free pages, got 4",
    ),
    (
        lambda c: tw.attention(query(), new(2)[0], cache=c),
        TypeError,
        "attention: v must be given where the other of k and v is, got None",
    ),
    (
        lambda c: tw.attention(query(), *new(2), cache=c, mask="causal"),
        TypeError,
        "attention: mask must be a tilewise mask",
    ),
    (
        lambda c: tw.attention(query(), *new(2), cache=c, mask=np.ones((1, 5), bool)),
        ValueError,
        "attention: mask must broadcast to shape (B, H, N, Nk) with Nk=9",
    ),
    (
        lambda c: tw.attention(query(), *new(2), cache=c, bias=query()[..., :5]),
        ValueError,
        "attention: bias must broadcast to shape",
    ),
    (
        lambda c: tw.attention(query(), *new(2), cache=c, softcap=-1.0),
        ValueError,
        "attention: softcap must be",
    ),
    (
        lambda c: tw.attention(query(), *new(2), cache=c, sinks=np.zeros(5, np.float32)),
        ValueError,
        "attention: sinks must have shape (H,) with H=6",
    ),
    (
        lambda c: tw.attention(query(), *new(2), cache=c, implementation="gpu"),
        ValueError,
        "attention: implementation must be one of",
    ),
    (
        lambda c: tw.attention(query(), *new(2), cache=c, dropout_p=0.1, seed=1),
        tw.Unsupported,
        "attention: dropout with a cache",
    ),
    (
        lambda c: tw.attention(query(), *new(2), cache=c, sequences=[1, 1]),
        ValueError,
        "attention: sequences must be different, got 1 2 times",
    ),
    (
        lambda c: tw.attention(query(), cache=c, lengths=[1, 2]),
        ValueError,
        "attention: lengths must be from 0 to 1, got 2",
    ),
    (
        lambda c: tw.attention(query(), cache=np.zeros(3)),
        TypeError,
        "attention: cache must be a tilewise.KVCache, got ndarray",
    ),
    (
        lambda c: tw.attention(query(), *new(2), sequences=[0, 1]),
        TypeError,
        "attention: sequences must come with cache, got no cache",
    ),
]


@pytest.mark.parametrize(("action", "error", "text"), BAD, ids=range(len(BAD)))
def test_an_error_says_what_is_wrong_and_changes_nothing(
    action: Action, error: type[Exception], text: str
) -> None:
    cache, _, _ = filled(5, 8, pages=8)
    cache.evict(1, keep=4)
    before = state(cache)
    with pytest.raises(error) as caught:
        action(cache)
    assert text in str(caught.value)
    assert state(cache) == before
    check_books(cache)


def test_an_unexpected_failure_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _, _ = filled(5, 8)
    cache.fork(0)
    before = state(cache)

    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tw.KVCache, "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        cache.append(*keys(3, 7))
    assert state(cache) == before


def test_while_a_call_appends_no_other_changes_the_sequence() -> None:
    cache, _, _ = filled(5, 8)
    k, v = keys(1, 2)
    text = r"sequences must be in no other call that appends to them, got 0"
    with cache._appending("KVCache.append", 0, k, v, None, "bhnd"):
        assert cache.lengths().tolist() == [5, 8]
        for action in (
            lambda: cache.append(k, v, 0),
            lambda: cache.truncate(0, 1),
            lambda: cache.fork(0),
            lambda: cache.evict(0, keep=0),
            lambda: cache.free(0),
        ):
            with pytest.raises(ValueError, match=text):
                action()
        cache.append(k, v, 1)
    assert cache.lengths().tolist() == [7, 10]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"pages": -1}, ValueError, "KVCache: pages must be at least 0, got -1"),
        ({"page_size": 0}, ValueError, "KVCache: page_size must be at least 1, got 0"),
        ({"Hk": 0}, ValueError, "KVCache: Hk must be at least 1, got 0"),
        ({"D": 513}, ValueError, "KVCache: D must be at most 512, got 513"),
        ({"Dv": 0}, ValueError, "KVCache: Dv must be at least 1, got 0"),
        ({"D": 7.0}, TypeError, "KVCache: D must be an integer, got float"),
        ({"dtype": np.int32}, TypeError, "KVCache: dtype must be one of float32, float64, "),
        ({"dtype": "f4"}, TypeError, "KVCache: dtype must be one of"),
        ({"dtype": ">f4"}, TypeError, "KVCache: dtype must be one of"),
        ({"dtype": 3}, TypeError, "KVCache: dtype must be one of"),
        ({"dtype": np.float32, "like": np.zeros(1)}, TypeError, "dtype must be left out where"),
    ],
    ids=str,
)
def test_a_bad_cache_is_refused(change: dict[str, Any], error: type[Exception], text: str) -> None:
    good: dict[str, Any] = {"pages": 4, "page_size": 3, "Hk": 2, "D": 7, "Dv": 5}
    with pytest.raises(error) as caught:
        tw.KVCache(**{**good, **change})
    assert text in str(caught.value)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_of_a_whole_cache_are_refused(duplicate: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"^KVCache: copies must be made by fork, .* deepcopy"):
        duplicate(filled(5)[0])
