"""A short walk through every path of the compiled core, for the sanitizers to watch."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewise as tw

pytestmark = [pytest.mark.sanitize, pytest.mark.usefixtures("guarded_arrays")]

_core = pytest.importorskip("tilewise._core")

B, H, HK, N, NK, D, DV = 2, 6, 3, 53, 131, 29, 37
HIDDEN_TARGETS = ("amx-emulated",) if "avx512bf16" in _core.targets() else ()

MASKS = {
    "none": None,
    "causal": tw.causal(),
    "window": tw.window(17, 3),
    "sinks and window": tw.sink_tokens(5) | tw.window(11, 0),
    "lengths": tw.lengths([NK, 0]),
    "documents": tw.documents(ids=np.arange(N) // 19, ids_k=np.arange(NK) // 47),
    "bits": tw.dense(np.random.default_rng(3).random((B, 1, N, NK)) < 0.4),
}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave the target and the number of threads as they were."""
    target, threads = _core.target(), _core.num_threads()
    yield
    _core.set_target(target)
    _core.set_num_threads(threads)


def inputs(
    dtype: Any, shape: tuple[int, ...] = (B, H, HK, N, NK), d: int = D, dv: int = DV
) -> tuple[np.ndarray, ...]:
    b, h, hk, n, nk = shape
    rng = np.random.default_rng(sum(shape))
    shapes = [(b, h, n, d), (b, hk, nk, d), (b, hk, nk, dv), (b, h, n, dv)]
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def every_way(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, **options: Any
) -> list[np.ndarray]:
    """Every array that the forward pass and its derivatives return."""
    statistics = {f"return_{name}": True for name in ("lse", "stats", "max_logit", "entropy")}
    made = tw.numpy.attention(q, k, v, **statistics, **options)
    grads = tw.numpy.attention_vjp(
        do, q, k, v, made.o_full, made.stats, dlse=np.ones_like(made.lse), **options
    )
    arrays = [made.o, made.lse, made.max_logit, made.entropy, *grads]
    tangents = {f"t{name}": x[::-1, ::-1] for name, x in (("q", q), ("k", k), ("v", v))}
    tangents |= {f"t{name}": options[name][::-1] for name in ("bias", "sinks") if name in options}
    given = {"o": made.o_full, "stats": made.stats, **options}
    arrays += tw.numpy.attention_jvp(q=q, k=k, v=v, **tangents, **given)
    arrays += tw.numpy.attention_forward_jvp(q=q, k=k, v=v, **tangents, **options)[1]
    arrays += tw.numpy.attention_vjp_jvp(do, q=q, k=k, v=v, **tangents, tdo=-do, **given)
    return [array for array in arrays if array is not None]


def extras(dtype: Any) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {
        "bias": rng.standard_normal((H, N, NK)).astype(dtype),
        "alibi_slopes": np.linspace(0.0, 0.2, H).astype(dtype),
        "sinks": rng.standard_normal(H).astype(dtype),
        "softcap": 7.0,
        "dropout_p": 0.3,
        "seed": 2**40 + 1,
    }


def assert_close(
    got: list[np.ndarray], wanted: list[np.ndarray], terms: int = NK + N + D, eps: float = 0.0
) -> None:
    """Within the rounding of as many terms as the longest sum of a gradient has."""
    for mine, exact in zip(got, wanted, strict=True):
        assert mine.shape == exact.shape
        x, y = mine.astype(np.float64), exact.astype(np.float64)
        seen = np.isfinite(y)
        assert np.array_equal(x[~seen], y[~seen])
        scale = max(1.0, float(np.linalg.norm(y[seen])))
        assert (
            np.linalg.norm(x[seen] - y[seen]) <= terms * (eps or np.finfo(mine.dtype).eps) * scale
        )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("plain", [True, False])
def test_core_agrees_with_the_reference(dtype: Any, mask: Any, plain: bool) -> None:
    options = {} if plain else extras(dtype)
    tensors = inputs(dtype)
    got = every_way(*tensors, mask=mask, implementation="cpu", **options)
    assert_close(got, every_way(*tensors, mask=mask, implementation="reference", **options))


def test_targets_and_threads_give_the_same_bits() -> None:
    tensors = inputs(np.float32)
    results = []
    for target, threads in itertools.product(_core.targets(), (1, 2, 3)):
        _core.set_target(target)
        _core.set_num_threads(threads)
        results.append([x.tobytes() for x in every_way(*tensors, mask=tw.causal())])
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize(
    "dtype, d, dv, mask",
    [
        (ml_dtypes.bfloat16, 32, 64, "none"),
        (ml_dtypes.bfloat16, 32, 64, "causal"),
        (ml_dtypes.bfloat16, 32, 64, "bits"),
        (ml_dtypes.bfloat16, 29, 37, "lengths"),
        (np.float16, 29, 37, "causal"),
    ],
)
def test_sixteen_bits_agree_with_the_reference_on_every_target(
    dtype: Any, d: int, dv: int, mask: str
) -> None:
    tensors = inputs(dtype, d=d, dv=dv)
    # slopes, sinks and bias as small as the precision of 16 bits is coarse
    options = {} if mask == "none" else {**extras(np.float32), "mask": MASKS[mask]}
    wanted = every_way(*tensors, implementation="reference", **options)
    for target in (*_core.targets(), *HIDDEN_TARGETS):
        _core.set_target(target)
        got = every_way(*tensors, implementation="cpu", **options)
        assert_close(got, wanted, terms=8, eps=float(ml_dtypes.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_packed_sequences_have_the_bits_of_single_calls(dtype: Any) -> None:
    ends = np.array([0, 3, 3, 64, 97, N * B])
    q, k, v, do = (
        x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3]).copy()
        for x in inputs(dtype, (B, H, HK, N, N), d=32, dv=32)
    )
    for target in (*_core.targets(), *HIDDEN_TARGETS):
        _core.set_target(target)
        made = tw.attention_varlen(q, k, v, ends, mask=tw.causal(), return_stats=True)
        grads = tw.numpy.attention_varlen_vjp(
            do, q, k, v, made.o_full, made.stats, ends, mask=tw.causal()
        )
        for a, b in itertools.pairwise(ends):
            one = [x[None, a:b] for x in (q, k, v, do)]
            options = {"mask": tw.causal(), "layout": "bnhd"}
            alone = tw.attention(*one[:3], return_stats=True, **options)
            found = tw.numpy.attention_vjp(one[3], *one[:3], alone.o_full, alone.stats, **options)
            assert made.o[a:b].tobytes() == alone.o[0].tobytes()
            for x, y in zip(grads[:3], found[:3], strict=True):
                assert x[a:b].tobytes() == y[0].tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_pages_have_the_bits_of_one_array(dtype: Any) -> None:
    q, k, v, _ = inputs(dtype, d=32, dv=64)
    for target, page in itertools.product((*_core.targets(), *HIDDEN_TARGETS), (16, 48)):
        _core.set_target(target)
        cache = tw.KVCache(
            pages=2 * (-(-NK // page)), page_size=page, Hk=HK, D=32, Dv=64, dtype=dtype
        )
        ids = cache.open(B)
        cache.append(k, v, ids)
        for rows in (slice(N - 1, N), slice(N - 20, N)):
            part = q[:, :, rows]
            got = tw.attention(part, cache=cache, sequences=ids, mask=tw.causal())
            assert got.tobytes() == tw.attention(part, k, v, mask=tw.causal()).tobytes()


@pytest.mark.parametrize("empty", ["B", "N", "Nk"])
def test_empty_dimensions_work(empty: str) -> None:
    shape = tuple(
        0 if name == empty else size
        for name, size in {"B": 2, "H": 4, "Hk": 2, "N": 5, "Nk": 7}.items()
    )
    for array in every_way(*inputs(np.float32, shape), implementation="cpu"):
        assert not np.isnan(array).any()


def test_strided_inputs_are_read_in_place() -> None:
    q, k, v, do = inputs(np.float32)
    wide = [np.full((*x.shape[:-1], x.shape[-1] + 3), np.nan, np.float32) for x in (q, k, v)]
    for target, source in zip(wide, (q, k, v), strict=True):
        target[..., : source.shape[-1]] = source
    views = [x[..., : source.shape[-1]] for x, source in zip(wide, (q, k, v), strict=True)]
    for one, other in zip(every_way(*views, do), every_way(q, k, v, do), strict=True):
        assert one.tobytes() == other.tobytes()


def test_calls_from_several_python_threads_at_once() -> None:
    _core.set_num_threads(2)
    tensors = inputs(np.float32)
    wanted = [x.tobytes() for x in every_way(*tensors)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(every_way, *tensors) for _ in range(8)]
        for job in jobs:
            assert [x.tobytes() for x in job.result()] == wanted
