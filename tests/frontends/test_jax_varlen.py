"""Packed sequences in JAX: NumPy's bits, every derivative, boundaries known at run time."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import tilewise as tw  # noqa: E402
import tilewise.jax as tj  # noqa: E402

H, HK, D, DV = 4, 2, 5, 3
CU_Q, CU_K = np.array([0, 5, 5, 8, 19], np.int32), np.array([0, 7, 9, 9, 22], np.int32)
S, TQ, TK, MOST = len(CU_Q) - 1, int(CU_Q[-1]), int(CU_K[-1]), int(np.diff(CU_K).max())
RNG = np.random.default_rng(7)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": tw.causal()},
    "window": {"mask": tw.causal() & tw.window(3, 0), "softcap": 1.5},
    "bias": {"bias": RNG.standard_normal((H, TQ, MOST))},
    "bias of queries and slopes": {
        "bias": RNG.standard_normal((1, TQ, 1)),
        "alibi_slopes": RNG.random((S, H)),
    },
    "sinks": {"sinks": RNG.standard_normal(H), "softmax_scale": 0.2},
    "dropout": {"dropout_p": 0.4, "seed": 2**63 + 5},
}


@pytest.fixture(autouse=True, scope="module")
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def operands(dtype: Any = np.float64) -> list[NDArray[Any]]:
    rng = np.random.default_rng(11)
    shapes = (TQ, H, D), (TK, HK, D), (TK, HK, DV)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def cast(options: dict[str, Any], dtype: Any) -> dict[str, Any]:
    arrays = {name: x.astype(dtype) for name, x in options.items() if isinstance(x, np.ndarray)}
    return options | arrays


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_results_have_the_bits_of_numpy(options: dict[str, Any], dtype: Any) -> None:
    given, options = operands(dtype), cast(options, dtype)
    asked = {"return_lse": True, "return_max_logit": True, "return_entropy": True}
    wanted = tw.attention_varlen(*given, CU_Q, CU_K, **asked, **options)
    # Only the boundaries are inputs of the program: they are unknown while it is traced.
    run = jax.jit(lambda q, k: tj.attention_varlen(*given, q, k, **asked, **options))
    found = run(CU_Q, CU_K)
    for name in ("o", "lse", "max_logit", "entropy"):
        assert np.asarray(getattr(found, name)).tobytes() == getattr(wanted, name).tobytes()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_derivatives_are_those_of_differences(options: dict[str, Any]) -> None:
    learned = {name: options[name] for name in ("bias", "sinks") if name in options}
    rest = {name: x for name, x in options.items() if name not in learned}

    def run(q: Any, k: Any, v: Any, more: Any) -> Any:
        return tj.attention_varlen(q, k, v, CU_Q, CU_K, return_lse=True, **more, **rest)[:2]

    def finite(*x: Any) -> Any:
        o, lse = run(*x)
        return o, jnp.where(jnp.isfinite(lse), lse, 0.0)

    check_grads(finite, (*operands(), learned), order=2, modes=("fwd", "rev"))


def test_further_dimensions_are_calls_of_their_own() -> None:
    q, k, v = operands()
    both = jax.vmap(lambda q, cu: tj.attention_varlen(q, k, v, cu, CU_K), (0, 0))
    cu = np.stack([CU_Q, [0, 1, 4, 4, TQ]])
    found = both(jnp.stack([q, q[::-1]]), cu)
    for one, x, starts in zip(found, (q, q[::-1]), cu, strict=True):
        alone = tw.attention_varlen(np.ascontiguousarray(x), k, v, starts, CU_K)
        assert np.asarray(one).tobytes() == alone.tobytes()


@pytest.mark.parametrize(
    "wrong, error, text",
    [
        ({"q": np.zeros((TQ, 3, D))}, ValueError, r"k must have .* Hk a divisor of H=3"),
        ({"k": np.zeros((TK, HK, D), np.float32)}, TypeError, "k must have dtype float64"),
        ({"sinks": np.zeros(3)}, ValueError, r"sinks must have shape \(H,\) with H=4"),
        ({"cu_seqlens_q": None}, TypeError, "cu_seqlens_q must be given"),
        ({"cu_seqlens_q": [0.0, 5.0]}, TypeError, "cu_seqlens_q must be int32 or int64"),
        ({"cu_seqlens_k": [[0, TK]]}, ValueError, r"cu_seqlens_k must have shape \(S \+ 1,\)"),
        ({"mask": tw.lengths([3])}, ValueError, "mask must be made of causal"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p must be from 0 to 1"),
    ],
)
def test_wrong_arguments_raise_while_tracing(
    wrong: dict[str, Any], error: type[Exception], text: str
) -> None:
    q, k, v = operands()
    given = {"q": q, "k": k, "v": v, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    with pytest.raises(error, match=text):
        jax.eval_shape(lambda: tj.attention_varlen(**(given | wrong)))


def test_boundaries_that_fall_raise_when_the_program_runs() -> None:
    q, k, v = operands()
    run = jax.jit(lambda cu: tj.attention_varlen(q, k, v, cu, CU_K))
    with pytest.raises(Exception, match="cu_seqlens_q must be non-decreasing, got 5 followed by 4"):
        run(np.array([0, 5, 4, 8, TQ])).block_until_ready()
