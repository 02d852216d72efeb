"""The NumPy functions over the reference: layouts, options and results."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import numpy as np
import pytest

import tilewise as tw
from tilewise.ops.attention.spec import ARRAYS, OPERATOR, arguments_table

B, H, HK, N, NK, D, DV = 2, 6, 3, 5, 7, 11, 13
DTYPES = [np.float32, np.float64]

attention = partial(tw.numpy.attention, implementation="reference")
attention_vjp = partial(tw.numpy.attention_vjp, implementation="reference")
attention_jvp = partial(tw.numpy.attention_jvp, implementation="reference")
attention_vjp_jvp = partial(tw.numpy.attention_vjp_jvp, implementation="reference")


def normal(*shape: int, dtype: Any = np.float64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def operands(dtype: Any = np.float64) -> dict[str, np.ndarray]:
    return {
        "q": normal(B, H, N, D, dtype=dtype),
        "k": normal(B, HK, NK, D, dtype=dtype, seed=1),
        "v": normal(B, HK, NK, DV, dtype=dtype, seed=2),
    }


def options(dtype: Any = np.float64) -> dict[str, Any]:
    return {
        "mask": tw.causal(),
        "bias": normal(H, 1, NK, dtype=dtype, seed=3),
        "alibi_slopes": np.linspace(0.1, 1, H, dtype=dtype),
        "softcap": 3,
        "sinks": normal(H, dtype=dtype, seed=4),
        "softmax_scale": np.float32(0.5),
        "dropout_p": 0.25,
        "seed": np.int64(12),
    }


def swapped(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(x.swapaxes(1, 2)) for name, x in arrays.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_agree(dtype: Any) -> None:
    arrays, chosen = operands(dtype), options(dtype)
    do, dlse = normal(B, H, N, DV, dtype=dtype), normal(B, H, N, dtype=dtype)
    one = attention(**arrays, **chosen, return_stats=True)
    other = attention(**swapped(arrays), **chosen, layout="bnhd", return_stats=True)
    assert one.o.flags.c_contiguous
    assert other.o.flags.c_contiguous
    np.testing.assert_array_equal(one.o, other.o.swapaxes(1, 2))
    np.testing.assert_array_equal(one.stats.m, other.stats.m)
    grads = attention_vjp(do, **arrays, o=one.o, stats=one.stats, dlse=dlse, **chosen)
    laid_out = swapped({**arrays, "do": do})
    others = attention_vjp(
        **laid_out, o=other.o, stats=other.stats, dlse=dlse, **chosen, layout="bnhd"
    )
    for name, x in laid_out.items():
        if name != "do":
            assert getattr(others, f"d{name}").shape == x.shape
            assert getattr(others, f"d{name}").flags.c_contiguous
            np.testing.assert_array_equal(
                getattr(grads, f"d{name}"), getattr(others, f"d{name}").swapaxes(1, 2)
            )
    np.testing.assert_array_equal(grads.dbias, others.dbias)
    np.testing.assert_array_equal(grads.dsinks, others.dsinks)


def tangents(chosen: dict[str, Any], dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """Return tangents of the operands and of the options that have any."""
    inputs = {**operands(dtype), "bias": chosen["bias"], "sinks": chosen["sinks"]}
    return {f"t{name}": normal(*x.shape, dtype=dtype, seed=5) for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_tangents_in_both_layouts_agree(dtype: Any) -> None:
    arrays, chosen = operands(dtype), options(dtype)
    moving = tangents(chosen, dtype)
    rows = {name: normal(B, H, N, dtype=dtype) for name in ("dlse", "tdlse")}
    tensors = {name: normal(B, H, N, DV, dtype=dtype) for name in ("do", "tdo")}
    forward = attention(**arrays, **chosen, return_stats=True)
    common = {**chosen, "stats": forward.stats}
    one = attention_jvp(**arrays, **moving, o=forward.o, **common)
    second = attention_vjp_jvp(**arrays, **moving, **tensors, **rows, o=forward.o, **common)

    four = {name: x for name, x in moving.items() if name in ("tq", "tk", "tv")}
    turned = swapped({**arrays, **four, "o": forward.o})
    moved = {"tbias": moving["tbias"], "tsinks": moving["tsinks"]}
    common["layout"] = "bnhd"
    other = attention_jvp(**turned, **moved, **common)
    assert type(other) is tw.OutputTangents
    np.testing.assert_array_equal(one.to, other.to.swapaxes(1, 2))
    np.testing.assert_array_equal(one.tlse, other.tlse)
    for known in ({}, other._asdict()):
        others = attention_vjp_jvp(**turned, **swapped(tensors), **moved, **rows, **known, **common)
        # Known tangents are rounded, which shows in float32.
        tolerance = 100 * np.finfo(dtype).eps if known else 0
        for name in ("dq", "dk", "dv"):
            assert getattr(others, name).flags.c_contiguous
            got = getattr(others, name).swapaxes(1, 2)
            np.testing.assert_allclose(getattr(second, name), got, tolerance, tolerance)
        np.testing.assert_allclose(second.dbias, others.dbias, tolerance, tolerance)
        np.testing.assert_allclose(second.dsinks, others.dsinks, tolerance, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_derivatives_have_the_dtype_of_q(dtype: Any) -> None:
    arrays, chosen = operands(dtype), options(dtype)
    forward = attention(**arrays, **chosen, return_stats=True)
    given = {**arrays, **tangents(chosen, dtype), "o": forward.o, "stats": forward.stats}
    first = attention_jvp(**given, **chosen)
    assert [x.shape for x in first] == [(B, H, N, DV), (B, H, N)]
    second = attention_vjp_jvp(forward.o, **given, **chosen)
    sizes = [*arrays.values(), chosen["bias"], chosen["sinks"]]
    assert [x.shape for x in second] == [x.shape for x in sizes]
    assert {x.dtype for x in (*first, *second)} == {np.dtype(dtype)}


def test_what_is_none_is_zero() -> None:
    arrays = operands()
    forward = attention(**arrays, return_stats=True)
    results = {"o": forward.o, "stats": forward.stats}
    q, k, v = arrays.values()
    dlse = normal(B, H, N)
    grads = attention_vjp(None, **arrays, **results, dlse=dlse)
    zeros = attention_vjp(np.zeros_like(forward.o), **arrays, **results, dlse=dlse)
    nothing = attention_vjp_jvp(forward.o, None, None, None, **arrays, **results)
    tangent = attention_jvp(None, None, v, q, k, v, **results)
    assert not any(x.any() for x in nothing[:3])
    np.testing.assert_allclose(tangent.to, forward.o, rtol=1e-12)
    assert not tangent.tlse.any()
    for one, other in zip(grads[:3], zeros[:3], strict=True):
        np.testing.assert_array_equal(one, other)


def test_tangents_of_the_hessian_are_those_of_moved_gradients() -> None:
    """Along the tangents of everything, from the forward pass on, in the other layout."""
    chosen, do = options(), normal(B, N, H, DV)
    arrays, moving = swapped(operands()), tangents(chosen)
    moving |= swapped({name: moving[name] for name in ("tq", "tk", "tv")})
    del chosen["mask"]

    def gradients(step: float) -> list[np.ndarray]:
        at = {name: x + step * moving[f"t{name}"] for name, x in arrays.items()}
        varied = {name: chosen[name] + step * moving[f"t{name}"] for name in ("bias", "sinks")}
        given = {**chosen, **varied, "layout": "bnhd"}
        forward = attention(**at, **given, return_stats=True)
        return list(attention_vjp(do, **at, o=forward.o, stats=forward.stats, **given))

    forward = attention(**arrays, **chosen, layout="bnhd", return_stats=True)
    results = {"o": forward.o, "stats": forward.stats}
    second = attention_vjp_jvp(do, **arrays, **moving, **results, **chosen, layout="bnhd")
    near = zip(gradients(1e-4), gradients(-1e-4), second, strict=True)
    for ahead, behind, got in near:
        np.testing.assert_allclose(got, (ahead - behind) / 2e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["attention_vjp", "attention_jvp", "attention_vjp_jvp"])
def test_signatures_show_the_options_of_attention(name: str) -> None:
    shown = inspect.signature(getattr(tw.numpy, name)).parameters
    every = inspect.signature(tw.numpy.attention).parameters
    for option in (*OPERATOR.options, "implementation"):
        assert shown[option] == every[option]


@pytest.mark.parametrize("mask", [tw.causal(), np.arange(N * NK).reshape(N, NK) % 2 == 0])
def test_lowered_mask_is_the_mask(mask: Any) -> None:
    arrays = operands()
    lowered = (mask if isinstance(mask, tw.Mask) else tw.dense(mask)).lower(B, H, N, NK)
    np.testing.assert_array_equal(attention(**arrays, mask=lowered), attention(**arrays, mask=mask))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_have_the_dtype_of_q(dtype: Any) -> None:
    arrays, chosen = operands(dtype), options(dtype)
    result = attention(
        **arrays,
        **chosen,
        return_lse=True,
        return_stats=True,
        return_max_logit=True,
        return_entropy=True,
    )
    grads = attention_vjp(result.o, **arrays, o=result.o, stats=result.lse, **chosen)
    fields = [result.o, result.lse, *result.stats, result.max_logit, result.entropy, *grads]
    assert {x.dtype for x in fields} == {np.dtype(dtype)}
    assert result.o.shape == (B, H, N, DV)
    assert {x.shape for x in fields[1:6]} == {(B, H, N)}
    assert [x.shape for x in grads] == [
        *(x.shape for x in arrays.values()),
        chosen["bias"].shape,
        chosen["sinks"].shape,
    ]


def test_output_is_alone_unless_more_is_asked_for() -> None:
    arrays = operands()
    alone = attention(**arrays)
    assert type(alone) is np.ndarray
    for name in ("lse", "stats", "max_logit", "entropy"):
        result = attention(**arrays, **{f"return_{name}": True})
        assert type(result) is tw.numpy.AttentionResult
        np.testing.assert_array_equal(result.o, alone)
        present = {field for field, x in result._asdict().items() if x is not None}
        assert present == {"o", name} | ({"o_full"} if name == "stats" else set())


def test_gradients_of_absent_options_are_none() -> None:
    arrays = operands()
    result = attention(**arrays, return_stats=True)
    grads = attention_vjp(result.o, **arrays, o=result.o, stats=result.stats)
    assert type(grads) is tw.AttentionGrads
    assert grads.dbias is None
    assert grads.dsinks is None


def test_lse_and_pair_give_the_same_gradients() -> None:
    arrays, chosen = operands(), options()
    do = normal(B, H, N, DV)
    result = attention(**arrays, **chosen, return_lse=True, return_stats=True)
    pair = attention_vjp(do, **arrays, o=result.o, stats=result.stats, **chosen)
    single = attention_vjp(do, **arrays, o=result.o, stats=result.lse, **chosen)
    for one, other in zip(pair, single, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


def test_grouped_heads_are_repeated_heads() -> None:
    arrays, chosen = operands(), options()
    group = H // HK
    repeated = {**arrays, **{name: np.repeat(arrays[name], group, axis=1) for name in "kv"}}
    do = normal(B, H, N, DV)
    one = attention(**arrays, **chosen, return_stats=True)
    other = attention(**repeated, **chosen, return_stats=True)
    np.testing.assert_array_equal(one.o, other.o)
    grads = attention_vjp(do, **arrays, o=one.o, stats=one.stats, **chosen)
    apart = attention_vjp(do, **repeated, o=one.o, stats=one.stats, **chosen)
    for name in ("dk", "dv"):
        summed = getattr(apart, name).reshape(B, HK, group, NK, -1).sum(axis=2)
        np.testing.assert_allclose(getattr(grads, name), summed, atol=1e-14)


@pytest.mark.parametrize("one_head", [1, H])
def test_any_number_of_key_heads_that_divides(one_head: int) -> None:
    arrays = operands()
    k, v = normal(B, one_head, NK, D), normal(B, one_head, NK, DV)
    assert attention(arrays["q"], k, v).shape == (B, H, N, DV)


def test_strided_read_only_and_broadcast_inputs_are_read_in_place() -> None:
    arrays = operands()
    expected = attention(**arrays)
    wide = np.full((B, H, 2 * N, D + 3), np.nan)
    wide[:, :, ::2, :D] = arrays["q"]
    reversed_keys = arrays["k"][:, :, ::-1].copy()
    reversed_values = arrays["v"][:, :, ::-1].copy()
    reversed_keys.flags.writeable = False
    got = attention(wide[:, :, ::2, :D], reversed_keys[:, :, ::-1], reversed_values[:, :, ::-1])
    np.testing.assert_array_equal(expected, got)
    same = np.broadcast_to(arrays["v"][:1, :1], arrays["v"].shape)
    np.testing.assert_array_equal(
        attention(arrays["q"], arrays["k"], same), attention(**{**arrays, "v": same.copy()})
    )


def test_inputs_are_not_written() -> None:
    arrays, chosen = operands(), options()
    for x in (*arrays.values(), chosen["bias"], chosen["sinks"], chosen["alibi_slopes"]):
        x.flags.writeable = False
    result = attention(**arrays, **chosen, return_stats=True)
    attention_vjp(result.o, **arrays, o=result.o, stats=result.stats, **chosen)


@pytest.mark.parametrize(
    "shape", [(), (NK,), (N, NK), (N, 1), (H, 1, 1), (1, H, N, NK), (B, 1, 1, NK), (B, H, N, NK)]
)
def test_bias_broadcasts_and_its_gradient_sums(shape: tuple[int, ...]) -> None:
    arrays, do = operands(), normal(B, H, N, DV)
    bias = np.asarray(normal(*shape))
    full = np.broadcast_to(bias, (B, H, N, NK))
    one = attention(**arrays, bias=bias, return_stats=True)
    other = attention(**arrays, bias=full)
    np.testing.assert_array_equal(one.o, other)
    grads = attention_vjp(do, **arrays, o=one.o, stats=one.stats, bias=bias)
    dense = attention_vjp(do, **arrays, o=one.o, stats=one.stats, bias=full).dbias
    leading = tuple(range(4 - len(shape)))
    ones = tuple(axis for axis, size in enumerate(shape) if size == 1)
    expected = dense.sum(axis=leading).sum(axis=ones, keepdims=True)
    assert grads.dbias.shape == shape
    np.testing.assert_allclose(grads.dbias, expected, atol=1e-13)


def test_boolean_array_is_a_mask() -> None:
    arrays = operands()
    visible = np.tri(N, NK, NK - N, dtype=np.bool_)
    expected = attention(**arrays, mask=tw.causal())
    np.testing.assert_array_equal(attention(**arrays, mask=visible), expected)
    np.testing.assert_array_equal(attention(**arrays, mask=tw.dense(visible)), expected)


def test_packed_bits_are_read_as_the_matrix_they_pack() -> None:
    """A random matrix does not fit two intervals, and 37 queries do not fill the last word."""
    q, k, v = normal(B, HK, 37, D), normal(B, HK, 70, D), normal(B, HK, 70, DV)
    visible = np.random.default_rng(0).random((B, 1, 37, 70)) < 0.5
    o = attention(q, k, v, mask=visible)
    hidden = np.where(visible, 0.0, -np.inf)
    np.testing.assert_allclose(o, attention(q, k, v, bias=hidden), atol=1e-14)


def test_attention_dispatches_on_the_type_of_array() -> None:
    arrays = operands()
    got = tw.attention(**arrays, implementation="reference", return_lse=True)
    assert type(got) is tw.numpy.AttentionResult
    np.testing.assert_array_equal(got.o, attention(**arrays))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_of_parts_is_the_whole(dtype: Any) -> None:
    arrays = operands(dtype)
    whole = attention(**arrays, return_lse=True)
    parts = []
    for at in (np.s_[:, :, :2], np.s_[:, :, 2:2], np.s_[:, :, 2:]):
        k, v = arrays["k"][at], arrays["v"][at]
        parts.append(attention(arrays["q"], k, v, return_lse=True))
    merged = tw.merge(parts)
    assert type(merged) is tw.SoftmaxState
    assert {merged.o.dtype, merged.lse.dtype} == {np.dtype(dtype)}
    tolerance = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(merged.o, whole.o, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(merged.lse, whole.lse, rtol=tolerance)


def test_merge_of_empty_parts_is_empty_and_ignores_their_output() -> None:
    o, lse = np.full((1, 1, 2, DV), np.nan), np.array([[[-np.inf, -np.inf]]])
    merged = tw.merge([(o, lse), (np.ones_like(o), np.array([[[-np.inf, 2.0]]]))])
    np.testing.assert_array_equal(merged.lse, [[[-np.inf, 2.0]]])
    np.testing.assert_array_equal(merged.o[0, 0], np.stack([np.zeros(DV), np.ones(DV)]))


def test_merge_spreads_nan_to_its_row_only() -> None:
    o, lse = np.ones((1, 1, 2, DV)), np.array([[[np.nan, 0.0]]])
    merged = tw.merge([(o, lse), (o, np.zeros((1, 1, 2)))])
    np.testing.assert_array_equal(np.isnan(merged.lse[0, 0]), [True, False])
    np.testing.assert_array_equal(np.isnan(merged.o[0, 0, :, 0]), [True, False])


def test_merge_of_large_logits_keeps_its_digits() -> None:
    """The weights are relative, so a common offset of 1e4 changes nothing."""
    o = [normal(B, H, N, DV, seed=seed) for seed in (1, 2)]
    lse = [normal(B, H, N, seed=seed) for seed in (3, 4)]
    near = tw.merge(zip(o, lse, strict=True))
    far = tw.merge((part, x + 1e4) for part, x in zip(o, lse, strict=True))
    np.testing.assert_allclose(near.o, far.o, rtol=1e-11, atol=1e-11)


def test_table_of_arguments_names_every_argument() -> None:
    table = arguments_table()
    names = {argument.name for argument in ARRAYS} | {*OPERATOR.inputs, *OPERATOR.options}
    assert all(f"| `{name}` |" in table for name in names)
    assert {line.count(" | ") for line in table.splitlines()[2:]} == {3}
