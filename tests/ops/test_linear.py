"""The linear map: its implementations against float64, the accumulator, and the memory table."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tilewise.base.dtypes import round_to
from tilewise.dispatch import evaluate
from tilewise.numpy import linear, linear_jvp, linear_vjp, linear_vjp_jvp
from tilewise.ops.linear import memory
from tilewise.ops.linear.cpu import accumulate
from tilewise.ops.linear.record import FLAT
from tilewise.ops.linear.spec import error_bound

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
A, T, C, V = 2, 7, 11, 5
PAGE = Path(__file__).parents[2] / "docs" / "ops" / "linear.md"


def problem(dtype: Any = np.float64, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"x": (A, T, C), "w": (V, C), "bias": (V,), "dy": (A, T, V)}
    shapes |= {f"t{name}": shape for name, shape in shapes.items()}
    return {name: round_to(rng.standard_normal(s), np.dtype(dtype)) for name, s in shapes.items()}


def results(a: dict[str, Any], implementation: str) -> dict[str, Any]:
    inputs = a["x"], a["w"], a["bias"]
    found = {"y": linear(*inputs, implementation=implementation)}
    found |= linear_vjp(a["dy"], *inputs, implementation=implementation)._asdict()
    found["ty"] = linear_jvp(
        a["tx"], a["tw"], *inputs, tbias=a["tbias"], implementation=implementation
    )
    grads = linear_vjp_jvp(
        a["dy"],
        a["tx"],
        a["tw"],
        *inputs,
        tbias=a["tbias"],
        tdy=a["tdy"],
        implementation=implementation,
    )
    return found | {f"t{name}": x for name, x in grads._asdict().items()}


TERMS = {"y": C, "ty": 2 * C, "dx": V, "tdx": 2 * V}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_every_function_is_within_the_bound_of_float64(dtype: Any, implementation: str) -> None:
    a = problem(dtype)
    exact = results({n: x.astype(np.float64) for n, x in a.items()}, "reference")
    sizes = results({n: np.abs(x.astype(np.float64)) for n, x in a.items()}, "reference")
    for name, got in results(a, implementation).items():
        assert got.dtype == dtype, name
        terms = TERMS.get(name, 2 * A * T)
        bound = error_bound(got.dtype, terms, magnitude=sizes[name], size=np.abs(exact[name]))
        # The bound is of a root mean square; single entries have up to three times that.
        error = np.abs(got.astype(np.float64) - exact[name])
        assert (error <= 3 * bound + 1e-300).all(), name


def test_formulas_are_those_of_einsum() -> None:
    a = problem()
    got = results(a, "cpu")
    want = {
        "y": np.einsum("atc,vc->atv", a["x"], a["w"]) + a["bias"],
        "dx": np.einsum("atv,vc->atc", a["dy"], a["w"]),
        "dw": np.einsum("atv,atc->vc", a["dy"], a["x"]),
        "dbias": a["dy"].sum(axis=(0, 1)),
        "ty": a["tx"] @ a["w"].T + a["x"] @ a["tw"].T + a["tbias"],
        "tdx": a["tdy"] @ a["w"] + a["dy"] @ a["tw"],
        "tdw": np.einsum("atv,atc->vc", a["tdy"], a["x"])
        + np.einsum("atv,atc->vc", a["dy"], a["tx"]),
        "tdbias": a["tdy"].sum(axis=(0, 1)),
    }
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-12, atol=1e-13, err_msg=name)


def test_second_derivatives_are_those_of_central_differences() -> None:
    a, h = problem(), 1e-6

    def grads(step: float) -> Any:
        moved = {n: a[n] + step * a[f"t{n}"] for n in ("x", "w", "bias", "dy")}
        return linear_vjp(moved["dy"], moved["x"], moved["w"], moved["bias"])

    got = results(a, "cpu")
    for name in ("dx", "dw", "dbias"):
        numeric = (getattr(grads(h), name) - getattr(grads(-h), name)) / (2 * h)
        np.testing.assert_allclose(got[f"t{name}"], numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_what_is_missing_is_zero(implementation: str) -> None:
    a = problem()
    x, w = a["x"], a["w"]
    nothing = linear_vjp(None, x, w, implementation=implementation)
    assert not nothing.dx.any() and not nothing.dw.any() and nothing.dbias is None
    assert not linear_jvp(None, None, x, w, implementation=implementation).any()
    second = linear_vjp_jvp(a["dy"], None, a["tw"], x, w, implementation=implementation)
    np.testing.assert_allclose(second.dx, a["dy"] @ a["tw"])
    assert not second.dw.any()


@pytest.mark.parametrize("shape", [(C,), (0, C), (3, 0, C), (2, 3, 1, C)])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_any_leading_dimensions(shape: tuple[int, ...], implementation: str) -> None:
    rng = np.random.default_rng(1)
    x, w, dy = (rng.standard_normal(s) for s in (shape, (V, C), (*shape[:-1], V)))
    y = linear(x, w, implementation=implementation)
    np.testing.assert_allclose(y, x @ w.T)
    grads = linear_vjp(dy, x, w, implementation=implementation)
    np.testing.assert_allclose(grads.dx, dy @ w)
    assert grads.dw.shape == w.shape


def test_empty_sums_are_zero() -> None:
    x, w = np.ones((3, 0)), np.ones((V, 0))
    assert not linear(x, w).any()
    assert not linear_vjp(np.ones((0, V)), np.ones((0, C)), np.ones((V, C))).dw.any()


def test_the_record_is_the_same_functions() -> None:
    a = {n: x.reshape(-1, x.shape[-1]) if x.ndim == 3 else x for n, x in problem().items()}
    options = {"implementation": None}
    inputs = [a[name] for name in FLAT.inputs]
    (y,) = evaluate(FLAT, "forward", inputs, options, (True,))
    given = [a[name] for name in ("tdy", "tx", "tw", "tbias", "dy")]
    second = evaluate(FLAT, "vjp_jvp", [*given, None, *inputs, y], options, (True, True, False))
    want = results(problem(), "reference")
    np.testing.assert_allclose(y, want["y"].reshape(-1, V), rtol=1e-12)
    np.testing.assert_allclose(second[1], want["tdw"], rtol=1e-12)
    assert second[2] is None


@pytest.mark.parametrize(
    ("dtype", "held"),
    [
        (np.float64, np.float64),
        (np.float32, np.float32),
        (np.float32, np.float64),
        (np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float32),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
    ],
)
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_gradient_of_the_weight_is_added_to_an_accumulator(
    dtype: Any, held: Any, implementation: str
) -> None:
    a = problem(dtype)
    before = np.random.default_rng(3).standard_normal((V, C)).astype(held)
    buffer = before.copy()
    options = {"grad_accumulator": buffer, "implementation": implementation}
    grads = linear_vjp(a["dy"], a["x"], a["w"], a["bias"], **options)
    assert grads.dw is None
    want = linear_vjp(a["dy"].astype(np.float64), a["x"].astype(np.float64), a["w"].astype(float))
    total = before.astype(np.float64) + want.dw
    unit = 2.0**-8 if np.dtype(held).itemsize == 2 else 1e-5
    np.testing.assert_allclose(buffer.astype(np.float64), total, rtol=unit, atol=unit)
    assert not np.array_equal(buffer, before)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_accumulating_takes_no_memory_of_the_size_of_the_weight(dtype: Any) -> None:
    tokens, rows, columns = 16, 4099, 1021
    dy, x = np.ones((tokens, rows), dtype), np.ones((tokens, columns), dtype)
    buffer = np.ones((rows, columns), np.float32)
    tracemalloc.start()
    accumulate(buffer, dy, x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (buffer == 1 + tokens).all()
    assert peak < buffer.nbytes / 8


def error(*arguments: Any, **options: Any) -> str:
    with pytest.raises((TypeError, ValueError)) as raised:
        linear_vjp(*arguments, **options)
    return f"{raised.type.__name__}: {raised.value}"


def test_errors_name_the_argument() -> None:
    a = problem(np.float32)
    x, w, bias, dy = (a[name] for name in ("x", "w", "bias", "dy"))
    assert error(dy, [1.0], w) == "TypeError: linear: x must be a numpy.ndarray, got list"
    want = "ValueError: linear: w must have shape (V, C) with C=11 (from x), got (11, 5)"
    assert error(dy, x, w.T) == want
    assert "bias must have shape (V,) with V=5 (from w), got (4,)" in error(dy, x, w, bias[1:])
    assert "w must have dtype float32 (from x), got float64" in error(dy, x, w.astype(float))
    assert "dy must have shape (2, 7, 5), got (7, 5)" in error(dy[0], x, w)
    assert "x must have shape (..., C)" in error(dy, np.zeros((), np.float32), w)
    buffers = {
        "be a numpy.ndarray": 3,
        "have dtype float32 or float64": np.zeros((V, C), np.float16),
        "have shape (5, 11) (from w)": np.zeros((C, V), np.float32),
        "not overlap w": w,
    }
    for text, buffer in buffers.items():
        assert f"grad_accumulator must {text}" in error(dy, x, w, grad_accumulator=buffer)
    frozen = np.zeros((V, C), np.float32)
    frozen.setflags(write=False)
    assert "be writable" in error(dy, x, w, grad_accumulator=frozen)
    with pytest.raises(ValueError, match="tbias must come with a bias"):
        linear_jvp(None, None, x, w, tbias=bias)


def test_bytes_are_those_of_the_arrays() -> None:
    found = {one.what: one for one in memory.entries(T, C, V, itemsize=8)}
    a = problem()
    x, w = a["x"][0], a["w"]
    y = linear(x, w)
    assert found["x, w and y; or their gradients"].bytes == x.nbytes + w.nbytes + y.nbytes
    of_x = np.kron(np.eye(T), w)  # dy/dx, rows of y after rows of y
    of_w = np.einsum("tc,uv->tuvc", x, np.eye(V)).reshape(T * V, V * C)
    for name, dense in {"dy/dx as a matrix": of_x, "dy/dw as a matrix": of_w}.items():
        assert found[name].bytes == dense.nbytes
        assert found[name].nonzero == np.count_nonzero(dense) * 8


def test_figures_of_the_documented_example() -> None:
    found = {one.what: one for one in memory.entries(64, 768, 1024)}
    assert found["x, w and y; or their gradients"].bytes == 3_604_480
    assert found["dy/dx as a matrix"].bytes == 12_884_901_888
    assert found["dy/dw as a matrix"].bytes == 206_158_430_208
    assert found["dy/dw as a matrix"].nonzero == found["dy/dx as a matrix"].nonzero == 201_326_592
    assert memory.as_markdown(64, 768, 1024) in PAGE.read_text("utf-8")
