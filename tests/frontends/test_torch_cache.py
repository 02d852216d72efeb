"""Caches of keys and values with PyTorch tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import tilewise as tw

B, H, HK, N, D, DV, PAGE = 2, 6, 2, 11, 7, 5, 3
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def tensors(n: int = N, dtype: Any = torch.float32) -> tuple[Any, Any, Any]:
    torch.manual_seed(n)
    shapes = ((B, H, n, D), (B, HK, n, D), (B, HK, n, DV))
    q, k, v = (torch.randn(shape, dtype=torch.float32).to(dtype) for shape in shapes)
    return q, k, v


def cache_of(dtype: Any = torch.float32) -> tw.KVCache:
    cache = tw.KVCache(16, PAGE, HK, D, DV, dtype=dtype)
    cache.open(B)
    return cache


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_attention_over_pages_has_the_bits_of_dense_keys(dtype: Any, implementation: str) -> None:
    q, k, v = tensors(dtype=dtype)
    options: dict[str, Any] = {
        "mask": tw.causal() & tw.window(6, 0),
        "sinks": torch.linspace(-1, 1, H, dtype=dtype),
        "alibi_slopes": torch.linspace(0, 1, H, dtype=dtype),
        "bias": torch.randn(H, 1, N).to(dtype),
        "implementation": implementation,
    }
    want = {"return_lse": True, "return_max_logit": True, "return_entropy": True}
    cache = cache_of(dtype)
    cache.append(k[:, :, :4], v[:, :, :4])
    found: Any = tw.attention(q, k[:, :, 4:], v[:, :, 4:], cache=cache, **options, **want)
    expected: Any = tw.attention(q, k, v, **options, **want)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype is b.dtype
        assert torch.equal(a, b)


def test_tensors_of_any_strides_and_layout() -> None:
    q, k, v = tensors()
    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    expected = tw.attention(q, k, v, mask=tw.causal())
    strided = tw.attention(*[x.transpose(1, 2) for x in turned], cache=cache_of(), mask=tw.causal())
    assert torch.equal(strided, expected)
    bnhd = tw.attention(*turned, cache=cache_of(), mask=tw.causal(), layout="bnhd")
    assert torch.equal(bnhd.transpose(1, 2), expected)


def test_tensors_and_arrays_share_a_cache() -> None:
    q, k, v = tensors()
    cache = cache_of()
    cache.append(k[:, :, :3], v[:, :, :3], torch.tensor([0, 1]), lengths=torch.tensor([3, 3]))
    cache.append(k[:, :, 3:].numpy(), v[:, :, 3:].numpy(), np.array([0, 1]))
    expected = tw.attention(q, k, v)
    assert torch.equal(tw.attention(q, cache=cache), expected)
    assert torch.equal(torch.from_numpy(tw.attention(q.numpy(), cache=cache)), expected)
    assert torch.equal(tw.attention(q[1:], cache=cache, sequences=torch.tensor(1)), expected[1:])


def test_a_boolean_tensor_is_a_mask() -> None:
    q, k, v = tensors()
    seen = torch.arange(N) % 3 > 0
    found = tw.attention(q, k, v, cache=cache_of(), mask=seen)
    assert torch.equal(found, tw.attention(q, k, v, mask=seen))


def test_without_gradients_parameters_are_data() -> None:
    q, k, v = (torch.nn.Parameter(x) for x in tensors())
    with torch.no_grad():
        expected = tw.attention(q, k, v)
        assert torch.equal(tw.attention(q, k, v, cache=cache_of()), expected)
    with torch.inference_mode():
        assert torch.equal(tw.attention(q, k, v, cache=cache_of()), expected)


def differentiated(name: str) -> dict[str, Callable[[tw.KVCache], Any]]:
    """Ways to ask for a derivative with respect to one of q, k and v."""
    given = dict(zip("qkv", tensors(), strict=True))
    x = given[name]

    def call(cache: tw.KVCache, moved: Any) -> Any:
        return tw.attention(**{**given, name: moved}, cache=cache).sum()

    def dual(cache: tw.KVCache) -> Any:
        with forward_ad.dual_level():
            return call(cache, forward_ad.make_dual(x, torch.ones_like(x)))

    return {
        "requires_grad": lambda cache: call(cache, x.clone().requires_grad_()),
        "forward_ad": dual,
        "grad": lambda cache: torch.func.grad(lambda moved: call(cache, moved))(x),
        "jvp": lambda cache: torch.func.jvp(lambda moved: call(cache, moved), (x,), (x,)),
        "vmap": lambda cache: torch.vmap(lambda moved: call(cache, moved))(x[None]),
    }


@pytest.mark.parametrize("way", ["requires_grad", "forward_ad", "grad", "jvp", "vmap"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_derivatives_are_refused_and_change_nothing(name: str, way: str) -> None:
    cache = cache_of()
    with pytest.raises(tw.Unsupported, match=f"attention: ({name} takes part|a transform of)"):
        differentiated(name)[way](cache)
    assert cache.lengths().tolist() == [0, 0]
    assert cache.pages_free == cache.pages


def test_appending_what_requires_gradients_is_refused() -> None:
    _, k, v = tensors()
    with pytest.raises(tw.Unsupported, match=r"KVCache.append: v takes part .* torch.no_grad"):
        cache_of().append(k, v.requires_grad_())


def test_compiled_functions_leave_the_graph() -> None:
    q, k, v = tensors()
    cache = cache_of()
    step = torch.compile(
        lambda q, k, v: 2 * tw.attention(2 * q, k, v, cache=cache), backend="eager"
    )
    for i in range(3):
        at = (slice(None), slice(None), slice(i, i + 1))
        o = step(q[at], k[at], v[at])
    assert torch.equal(o, 2 * tw.attention(2 * q[:, :, 2:3], k[:, :, :3], v[:, :, :3]))


def test_exported_programs_hold_no_cache() -> None:
    class Step(torch.nn.Module):  # type: ignore[misc]
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return tw.attention(q, k, v, cache=cache)

    cache = cache_of()
    with pytest.raises(tw.Unsupported, match=r"attention: a cache changes from call to call"):
        torch.export.export(Step(), tensors(), strict=False)
    assert cache.lengths().tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda x: x.to("meta"), ValueError, "q must be on cpu (as cache), got meta"),
        (lambda x: x.double(), TypeError, "q must have dtype float32 (from cache), got float64"),
        (lambda x: x.int(), TypeError, "q must have dtype float32 (from cache), got int32"),
        (lambda x: x.to_sparse(), TypeError, "q must be a dense tensor, got torch.sparse_coo"),
    ],
)
def test_errors(change: Callable[[Any], Any], error: type[Exception], text: str) -> None:
    q, k, v = tensors()
    cache = cache_of()
    with pytest.raises(error) as caught:
        tw.attention(change(q), k, v, cache=cache)
    assert text in str(caught.value)
    assert cache.lengths().tolist() == [0, 0]


def test_what_belongs_to_a_cache_needs_one() -> None:
    with pytest.raises(TypeError, match="attention: lengths must come with cache, got no cache"):
        tw.attention(*tensors(), lengths=[1, 2])
    with pytest.raises(TypeError, match=r"attention: k must be a torch.Tensor, got NoneType"):
        tw.attention(tensors()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_autocast_casts_as_without_a_cache(dtype: Any) -> None:
    given = dtype if dtype == torch.float64 else torch.float32
    (q, k, v), bias = tensors(dtype=given), torch.randn(H, 1, N, dtype=given)
    with torch.autocast("cpu", torch.bfloat16):
        found = tw.attention(q, k, v, cache=cache_of(dtype), bias=bias)
        expected = tw.attention(q, k, v, bias=bias)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_autocast_needs_a_cache_of_its_dtype() -> None:
    cache, (q, k, v) = cache_of(), tensors()
    text = r"attention: cache must have dtype bfloat16 \(from autocast; .*\), got float32"
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=text):
            tw.attention(q, k, v, cache=cache)
        assert cache.lengths().tolist() == [0, 0]
        with torch.autocast("cpu", enabled=False):
            assert tw.attention(q, k, v, cache=cache).dtype == torch.float32
