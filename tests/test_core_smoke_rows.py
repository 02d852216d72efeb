"""A short walk through the compiled softmax and losses, for the sanitizers to watch."""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewise as tw

pytestmark = [pytest.mark.sanitize, pytest.mark.usefixtures("guarded_arrays")]

_core = pytest.importorskip("tilewise._core")

DTYPES = (np.float64, np.float32, ml_dtypes.bfloat16, np.float16)
T, C, V = 61, 37, 419
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}


@pytest.fixture(autouse=True, params=_core.targets())
def target(request: pytest.FixtureRequest) -> Iterator[None]:
    target, threads = _core.target(), _core.num_threads()
    _core.set_target(request.param)
    _core.set_num_threads(2)
    yield
    _core.set_target(target)
    _core.set_num_threads(threads)


def draw(dtype: Any, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(map(sum, shapes)))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def finite(*results: Any) -> None:
    for result in results:
        for x in result if isinstance(result, tuple) else (result,):
            if x is not None:
                assert np.isfinite(np.asarray(x, np.float64)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (19, 131), (3, 4099), (5, 7, 3)])
def test_softmax(dtype: Any, shape: tuple[int, ...]) -> None:
    x, g, tx = draw(dtype, shape, shape, shape)
    for axis in range(len(shape)):
        out = np.empty_like(x)
        assert tw.softmax(x, axis, out=out) is out
        r = tw.numpy.softmax(x, axis, return_stats=True)
        assert r.y.tobytes() == out.tobytes()
        finite(tw.log_softmax(x, axis), tw.logsumexp(x, axis))
        finite(tw.numpy.softmax_vjp(g, x, r.stats, axis=axis))
        finite(tw.numpy.softmax_jvp(tx, x, r.stats, axis=axis))
        finite(tw.numpy.softmax_vjp_jvp(g, tx, x, r.stats, axis=axis))


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses(dtype: Any) -> None:
    logits, move = draw(dtype, (T, V), (T, V))
    y = np.random.default_rng(1).integers(0, V, T)
    y[::7] = -100
    r = tw.numpy.cross_entropy(logits, y, return_stats=True, **OPTIONS)
    finite(r.loss, tw.numpy.cross_entropy_vjp(1.0, logits, y, r.stats, **OPTIONS))
    finite(tw.numpy.cross_entropy_jvp(move, logits, y, r.stats, **OPTIONS))
    finite(tw.numpy.cross_entropy_vjp_jvp(1.0, move, logits, y, r.stats, **OPTIONS))

    hidden, weight, thidden = draw(dtype, (T, C), (V, C), (T, C))
    for chunks in ({}, {"token_chunk": 48, "vocab_chunk": 192}):
        more = {**OPTIONS, **chunks}
        r = tw.numpy.linear_cross_entropy(
            hidden, weight, y, return_grads=True, return_stats=True, **more
        )
        finite(r.loss, r.grads)
        finite(tw.numpy.linear_cross_entropy_vjp(1.0, hidden, weight, y, r.stats, **more))
        finite(tw.numpy.linear_cross_entropy_jvp(thidden, hidden, weight, y, r.stats, **more))
        finite(tw.numpy.linear_cross_entropy_vjp_jvp(1.0, thidden, hidden, weight, y, **more))
