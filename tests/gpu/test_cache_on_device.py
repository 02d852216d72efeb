"""Caches whose pages are tensors of a device, and the kernels that follow their tables."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tilewise as tw
import tilewise.torch.cache_memory
from tilewise.cache import memory
from tilewise.ops.attention.gpu.decode import launch
from tilewise.ops.attention.gpu.kernels import decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, HK, D, DV = 4, 2, 11, 7
LENGTHS = (41, 4)
CAUSAL = tw.causal()


def cache_of(page_size: int = 3, pages: int = 80, dtype: Any = torch.float32) -> tw.KVCache:
    """A cache of tensors; without a GPU, tensors of the CPU in the place of its."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "is_host", lambda device: False)
        return tw.KVCache(pages, page_size, HK, D, DV, dtype=dtype, device=DEVICE)


def normal(seed: int, *shape: int, dtype: Any = torch.float32) -> Any:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made).to(dtype).to(DEVICE)


def keys(B: int, n: int, seed: int = 0, dtype: Any = torch.float32) -> tuple[Any, Any]:
    return normal(seed, B, HK, n, D, dtype=dtype), normal(seed + 1, B, HK, n, DV, dtype=dtype)


def filled(
    page_size: int = 3, dtype: Any = torch.float32, lengths: Any = LENGTHS
) -> tuple[tw.KVCache, Any, Any]:
    """A cache of sequences whose pages alternate, and their keys and values."""
    cache, B = cache_of(page_size, dtype=dtype), len(lengths)
    cache.open(B)
    k, v = keys(B, max(lengths), dtype=dtype)
    for end in range(0, max(lengths), 7):
        counts = [max(0, min(n - end, 7)) for n in lengths]
        part = (slice(None), slice(None), slice(end, end + 7))
        cache.append(k[part], v[part], lengths=counts)
    return cache, k, v


def everything(q: Any, *kv: Any, **options: Any) -> list[Any]:
    """All results of the kernels."""
    want = {"return_lse": True, "return_max_logit": True, "return_entropy": True}
    return list(tw.attention(q, *kv, implementation="triton", **want, **options))


def same(found: list[Any], expected: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def options_of(name: str, dtype: Any = torch.float32) -> dict[str, Any]:
    return {
        "none": {},
        "window": {"mask": CAUSAL & (tw.window(9, 0) | tw.sink_tokens(2))},
        "bias-slopes-sinks": {
            "mask": CAUSAL,
            "bias": normal(7, H, 1, max(LENGTHS), dtype=dtype),
            "alibi_slopes": torch.linspace(0, 1, H, dtype=dtype, device=DEVICE),
            "sinks": torch.linspace(-1, 1, H, dtype=dtype, device=DEVICE),
        },
        "boolean": {"mask": torch.arange(max(LENGTHS)) % 3 > 0},
    }[name]


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", ["none", "window", "bias-slopes-sinks", "boolean"])
def test_pages_have_the_bits_of_keys_in_one_piece(name: str, n: int) -> None:
    cache, k, v = filled()
    q, options = normal(3, len(LENGTHS), H, n, D), options_of(name)
    found = everything(q, cache=cache, **options)
    for b, length in enumerate(LENGTHS):
        own = dict(options)
        for cut in {"bias"} & set(own):
            own[cut] = own[cut][..., :length]
        if name == "boolean":
            own["mask"] = own["mask"][:length].expand(n, length).to(DEVICE)
        one = everything(q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length], **own)
        assert same([x[b : b + 1] for x in found], one)


@pytest.mark.parametrize("page_size", [1, 16, 37])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_size_of_pages_does_not_change_bits(page_size: int, dtype: Any) -> None:
    q, options = normal(3, 2, H, 2, D, dtype=dtype), options_of("bias-slopes-sinks", dtype)
    found = everything(q, cache=filled(page_size, dtype)[0], **options)
    assert found[0].dtype == dtype
    assert same(found, everything(q, cache=filled(5, dtype)[0], **options))


def test_a_prompt_in_pieces_has_the_bits_of_one_call() -> None:
    (k, v), q = keys(1, 11), normal(3, 1, H, 11, D)
    cache = cache_of()
    cache.open(1)
    parts = []
    for start, end in ((0, 3), (3, 4), (4, 11)):
        rows = (slice(None), slice(None), slice(start, end))
        parts.append(everything(q[rows], k[rows], v[rows], cache=cache, mask=CAUSAL))
    whole = [torch.cat(x, 2) for x in zip(*parts, strict=True)]
    assert same(whole, everything(q, k, v, mask=CAUSAL))


@pytest.mark.parametrize("name", ["none", "bias-slopes-sinks"])
@pytest.mark.parametrize("n", [5, 17])
def test_padded_prompts_of_any_length_agree_with_the_cpu(n: int, name: str) -> None:
    (k, v), q = keys(3, n), normal(3, 3, H, n, D)
    options = {"mask": CAUSAL} | options_of(name)
    if name == "bias-slopes-sinks":
        options["bias"] = options["bias"][..., :1]
    lengths = [n, 0, n - 2]
    for b, length in enumerate(lengths):
        for x in (q, k, v):
            x[b, :, length:] = float("nan")
    cache, host = cache_of(), tw.KVCache(80, 3, HK, D, DV)
    found = {}
    for one in (cache, host):
        one.open(3)
        place = DEVICE if one is cache else "cpu"
        moved = {x: y.to(place) if isinstance(y, torch.Tensor) else y for x, y in options.items()}
        given = [x.to(place) for x in (q, k, v)]
        implementation = "triton" if one is cache else "cpu"
        found[one] = tw.attention(
            *given, cache=one, lengths=lengths, return_lse=True, implementation=implementation,
            **moved,
        )  # fmt: skip
    for mine, theirs in zip(found[cache][:2], found[host][:2], strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=3e-6, atol=1e-6)


def test_many_queries_see_the_keys_of_their_sequence_alone() -> None:
    cache, k, v = filled(lengths=(20, 3))
    q = normal(3, 2, H, 17, D)
    found = everything(q, cache=cache)
    for b, n in enumerate((20, 3)):
        one = everything(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        for mine, alone in zip(found, one, strict=True):
            torch.testing.assert_close(mine[b : b + 1], alone, rtol=3e-6, atol=1e-6)


def test_layouts_orders_and_sequences_read_twice() -> None:
    cache, k, v = filled()
    q = normal(3, 3, 2, H, D)
    found = everything(q, cache=cache, sequences=[1, 0, 1], layout="bnhd", mask=CAUSAL)
    assert found[0].is_contiguous()
    for b, id in enumerate((1, 0)):
        n = LENGTHS[id]
        own = q[b : b + 1].transpose(1, 2), k[id : id + 1, :, :n], v[id : id + 1, :, :n]
        one = everything(*own, mask=CAUSAL)
        assert same([found[0][b : b + 1].transpose(1, 2)], one[:1])


def poison(cache: tw.KVCache) -> None:
    """Write NaN wherever no sequence has a key."""
    used = np.zeros((cache.pages, cache.page_size), bool)
    for id in cache.sequences:
        (table,), (length,) = cache.block_table(id), cache.lengths(id)
        for j in range(length):
            if table[j // cache.page_size] >= 0:
                used[table[j // cache.page_size], j % cache.page_size] = True
    unused = torch.from_numpy(~used).to(DEVICE)
    for pool in (cache.k, cache.v):
        pool.masked_fill_(unused[:, None, :, None], float("nan"))


@pytest.mark.parametrize("n", [1, 3, 17])
def test_nan_in_unused_slots_reaches_nothing(n: int) -> None:
    lengths = (37, 4) if n < 17 else (20, 18)
    q = normal(3, 2, H, n, D)
    results = []
    for poisoned in (False, True):
        cache, _, _ = filled(lengths=lengths)
        cache.evict(0, keep=n)
        if poisoned:
            poison(cache)
        results.append(everything(q, cache=cache))
    assert not any(x.isnan().any() for x in results[0])
    assert same(*results)


def held(cache: tw.KVCache, id: int) -> list[Any]:
    (length,), (table,) = cache.lengths(id), cache.block_table(id)
    at = [(table[j // cache.page_size], j % cache.page_size) for j in range(length)]
    pools = [torch.as_tensor(pool).cpu() for pool in (cache.k, cache.v)]
    return [torch.stack([p[a, :, b] for a, b in at if a >= 0] or [p[0, :, 0]]) for p in pools]


def some_operation(draw: random.Random, cache: tw.KVCache, seed: int) -> Callable[..., Any]:
    """A change of a cache, to be made to it and to another one that is in the same state."""
    ids = draw.sample(cache.sequences, min(2, len(cache.sequences)))
    (k, v), counts = keys(len(ids), 4, seed), [draw.randint(0, 4) for _ in ids]
    length, keep = draw.randint(0, int(cache.lengths(ids[0])[0])), draw.randint(0, 8)
    return draw.choice(
        [
            lambda c, place: c.append(k.to(place), v.to(place), ids, lengths=counts),
            lambda c, place: c.append(k.to(place), v.to(place), ids, lengths=counts),
            lambda c, place: c.fork(ids[0], length=length),
            lambda c, place: c.truncate(ids[0], length),
            lambda c, place: c.evict(ids, keep=keep),
            lambda c, place: c.free(ids[:1]) if len(c.sequences) > 3 else c.open(),
        ]
    )


@pytest.mark.parametrize("seed", range(3))
def test_random_operations_agree_with_a_cache_on_the_host(seed: int) -> None:
    draw = random.Random(seed)
    both = cache_of(pages=12), tw.KVCache(12, 3, HK, D, DV)
    for cache in both:
        cache.open(2)
    for step in range(50):
        operation, errors = some_operation(draw, both[1], 1000 * seed + step), []
        for cache, place in zip(both, (DEVICE, "cpu"), strict=True):
            try:
                operation(cache, place)
            except (tw.OutOfPages, ValueError) as failure:
                errors.append(f"{type(failure).__name__}: {failure}")
        assert len(errors) != 1 and len(set(errors)) < 2
        assert both[0].pages_free == both[1].pages_free
        assert both[0].block_table().tolist() == both[1].block_table().tolist()
        for id in both[1].sequences:
            assert same(held(both[0], id), held(both[1], id))


def test_a_fork_decodes_as_a_copy_does() -> None:
    cache, k, v = filled(lengths=(19,))
    (child,) = cache.fork(0)
    more = keys(2, 3, seed=9)
    q = normal(3, 2, H, 3, D)
    found = everything(q, *more, cache=cache, sequences=[0, child], mask=CAUSAL)
    whole = [torch.cat((x.expand(2, -1, -1, -1), y), 2) for x, y in zip((k, v), more, strict=True)]
    assert same(found, everything(q, *whole, mask=CAUSAL))


def test_a_call_that_fails_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _, _ = filled()
    k, v = keys(2, 2)
    before = cache.lengths().tolist(), cache.pages_free, cache.block_table().tolist()

    def fail(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "launch", fail)
    with pytest.raises(KeyboardInterrupt):
        everything(normal(3, 2, H, 2, D), k, v, cache=cache)
    assert before == (cache.lengths().tolist(), cache.pages_free, cache.block_table().tolist())
    cache.append(k, v)


ERRORS: list[tuple[Callable[[tw.KVCache], Any], type[Exception], str]] = [
    (
        lambda c: c.append(*[x.cpu().numpy() for x in keys(3, 1)]),
        TypeError,
        f"KVCache.append: k must be a torch.Tensor on {DEVICE}",
    ),
    (
        lambda c: c.append(*[x.to("meta") for x in keys(3, 1)]),
        ValueError,
        f"KVCache.append: k must be on {DEVICE}",
    ),
    (
        lambda c: c.append(*keys(3, 1, dtype=torch.float64)),
        TypeError,
        "k must have dtype float32 (from cache), got float64",
    ),
    (lambda c: c.append(*keys(3, 99)), tw.OutOfPages, "KVCache.append: cache must have "),
    (
        lambda c: c.append(*[x.requires_grad_() for x in keys(3, 1)]),
        tw.Unsupported,
        "k takes part in a derivative",
    ),
    (
        lambda c: everything(normal(3, 2, H, 1, D), *keys(3, 1), cache=c),
        ValueError,
        "attention: q must have shape (B, H, N, D) with B=3 (from sequences)",
    ),
    (
        lambda c: tw.attention(np.ones((3, H, 1, D), np.float32), cache=c),
        TypeError,
        f"attention: q must be a torch.Tensor on {DEVICE}",
    ),
    (
        lambda c: everything(normal(3, 3, H, 1, D), *keys(3, 1), cache=c, dropout_p=0.5),
        tw.Unsupported,
        "attention: dropout with a cache",
    ),
    (
        lambda c: everything(normal(3, 3, H, 1, D), cache=c, sinks=normal(1, 5)),
        ValueError,
        "attention: sinks must have shape (H,) with H=4",
    ),
]


@pytest.mark.parametrize(("action", "error", "text"), ERRORS, ids=range(len(ERRORS)))
def test_errors_are_those_of_the_host_and_change_nothing(
    action: Callable[[tw.KVCache], Any], error: type[Exception], text: str
) -> None:
    cache, _, _ = filled(lengths=(5, 8, 2))
    before = cache.lengths().tolist(), cache.pages_free
    with pytest.raises(error) as caught:
        action(cache)
    assert text in str(caught.value)
    assert before == (cache.lengths().tolist(), cache.pages_free)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_a_device_without_kernels_is_unsupported() -> None:
    with pytest.raises(tw.Unsupported, match="KVCache: device cuda: PyTorch finds no GPU"):
        tw.KVCache(4, 3, HK, D, device="cuda")
    with pytest.raises(tw.Unsupported, match="KVCache: there is no implementation for device xpu"):
        tw.KVCache(4, 3, HK, D, device=torch.device("xpu"))
    with pytest.raises(ValueError, match="KVCache: device must be a device of PyTorch"):
        tw.KVCache(4, 3, HK, D, device="gpu")
    with pytest.raises(TypeError, match="KVCache: device must be a device of PyTorch"):
        tw.KVCache(4, 3, HK, D, device=3)


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels of a GPU read no memory of the host")
def test_interpreted_kernels_read_a_cache_of_the_host() -> None:
    (k, v), q = keys(2, 9), normal(3, 2, H, 2, D)
    cache = tw.KVCache(16, 3, HK, D, DV)
    cache.open(2)
    found = everything(q, k, v, cache=cache, mask=CAUSAL)
    assert same(found, everything(q, k, v, mask=CAUSAL))


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels keep what they call")
def test_a_wrong_page_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decode._places_of_keys
    cache, k, v = filled(lengths=(19,))
    q = normal(3, 1, H, 1, D)
    expected = everything(q, k, v)
    assert same(everything(q, cache=cache), expected)

    def wrong(j: Any, *others: Any) -> Any:
        at_k, at_v, wanted = right(j, *others)
        return at_k + (j >= 18) * others[3], at_v + (j >= 18) * others[5], wanted

    monkeypatch.setattr(decode, "_places_of_keys", wrong)
    assert not same(everything(q, cache=cache), expected)
