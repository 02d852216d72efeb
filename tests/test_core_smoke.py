"""A short walk through every path of the compiled core, for the sanitizers to watch."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import tilewise as tw

pytestmark = pytest.mark.sanitize

_core = pytest.importorskip("tilewise._core")

B, H, HK, N, NK, D, DV = 2, 6, 3, 53, 131, 29, 37

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


def inputs(dtype: Any, shape: tuple[int, ...] = (B, H, HK, N, NK)) -> tuple[np.ndarray, ...]:
    b, h, hk, n, nk = shape
    rng = np.random.default_rng(sum(shape))
    shapes = [(b, h, n, D), (b, hk, nk, D), (b, hk, nk, DV), (b, h, n, DV)]
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def every_way(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, **options: Any
) -> list[np.ndarray]:
    """Every array that the forward pass and its derivatives return."""
    statistics = {f"return_{name}": True for name in ("lse", "stats", "max_logit", "entropy")}
    made = tw.numpy.attention(q, k, v, **statistics, **options)
    grads = tw.numpy.attention_vjp(
        do, q, k, v, made.o, made.stats, dlse=np.ones_like(made.lse), **options
    )
    arrays = [made.o, made.lse, *made.stats, made.max_logit, made.entropy, *grads]
    tangents = {f"t{name}": x[::-1, ::-1] for name, x in (("q", q), ("k", k), ("v", v))}
    tangents |= {f"t{name}": options[name][::-1] for name in ("bias", "sinks") if name in options}
    given = {"o": made.o, "stats": made.stats, **options}
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


def assert_close(got: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """Within the rounding of as many terms as the longest sum of a gradient has."""
    for mine, exact in zip(got, wanted, strict=True):
        assert mine.shape == exact.shape
        seen = np.isfinite(exact)
        assert np.array_equal(mine[~seen], exact[~seen])
        error = np.linalg.norm(mine[seen] - exact[seen])
        scale = max(1.0, float(np.linalg.norm(exact[seen])))
        assert error <= (NK + N + D) * np.finfo(mine.dtype).eps * scale


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
