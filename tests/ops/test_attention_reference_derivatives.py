"""The reference's derivatives against differences, a textbook in PyTorch and each other."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import tilewise as tw
from tilewise.ops.attention import reference
from tilewise.ops.attention.spec import (
    AttentionCall,
    AttentionGrads,
    AttentionOutputs,
    Needed,
    OutputTangents,
    Want,
    prepare,
    prepare_jvp,
    prepare_vjp,
    prepare_vjp_jvp,
)

B, H, HK, N, NK, D, DV = 2, 6, 3, 5, 7, 11, 13
INPUTS = ("q", "k", "v", "bias", "sinks")
EMPTY_ROW = np.arange(N * NK).reshape(N, NK) % 3 != 0
EMPTY_ROW[2] = False
# Four runs of keys in a row do not fit two intervals.
BITS = (np.arange(N)[:, None] + np.arange(NK)) % 2 == 0

Arrays = dict[str, np.ndarray]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape))


def sinks_with_none() -> np.ndarray:
    sinks = normal(H)
    sinks[1] = -np.inf
    return sinks


EVERYTHING: dict[str, Any] = {
    "mask": EMPTY_ROW,
    "bias": normal(1, H, N, NK),
    "alibi_slopes": np.linspace(0.1, 0.9, H),
    "softcap": 1.3,
    "sinks": sinks_with_none(),
    "softmax_scale": 0.4,
    "dropout_p": 0.3,
    "seed": 2**63 + 5,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"softmax_scale": 0.7},
    "zero scale": {"softmax_scale": 0.0},
    "intervals": {"mask": tw.causal() & tw.window(2, 0)},
    "lengths": {"mask": tw.lengths(np.array([4, 0]))},
    "bits": {"mask": BITS},
    "empty row": {"mask": EMPTY_ROW},
    "bias": {"bias": normal(B, H, N, NK)},
    "bias over heads": {"bias": normal(B, 1, N, NK)},
    "bias of a matrix": {"bias": normal(N, NK)},
    "bias per key": {"bias": normal(NK)},
    "bias per row": {"bias": normal(H, N, 1)},
    "scalar bias": {"bias": np.array(0.3)},
    "alibi": {"alibi_slopes": np.linspace(0.1, 0.9, H)},
    "alibi per batch": {"alibi_slopes": np.linspace(0.1, 0.9, B * H).reshape(B, H)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": sinks_with_none()},
    "sinks and empty row": {"sinks": sinks_with_none(), "mask": EMPTY_ROW},
    "dropout": {"dropout_p": 0.4, "seed": 1},
    "everything": EVERYTHING,
    "everything, bnhd": {**EVERYTHING, "layout": "bnhd"},
}


class Point:
    """Inputs, cotangents and tangents of both; arrays are in the order `(B, H, N, D)`."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.layout = options.get("layout", "bhnd")
        self.options = {name: x for name, x in options.items() if name not in INPUTS}
        self.inputs = {"q": normal(B, H, N, D), "k": normal(B, HK, NK, D)}
        self.inputs |= {"v": normal(B, HK, NK, DV)}
        self.inputs |= {name: options[name] for name in ("bias", "sinks") if name in options}
        self.cotangents = {"do": normal(B, H, N, DV, seed=1), "dlse": normal(B, H, N, seed=1)}
        self.tangents = {f"t{name}": normal(*x.shape, seed=2) for name, x in self.inputs.items()}
        self.cotangent_tangents = {
            f"t{name}": normal(*x.shape, seed=2) for name, x in self.cotangents.items()
        }

    def laid_out(self, arrays: Arrays) -> Arrays:
        if self.layout == "bhnd":
            return arrays
        follows = {"q", "k", "v", "do", "tq", "tk", "tv", "tdo", "o", "to"}
        return {name: x.swapaxes(1, 2) if name in follows else x for name, x in arrays.items()}

    def call(self) -> AttentionCall:
        return prepare(**self.laid_out(self.inputs), **self.options)

    def forward(self) -> AttentionOutputs:
        return reference.forward64(self.call(), Want(lse=True))

    def results(self) -> dict[str, Any]:
        outputs = self.forward()
        return {**self.laid_out({"o": outputs.o}), "stats": outputs.stats}

    def vjp(self) -> AttentionGrads:
        given = {"do": None, "dlse": None, **self.laid_out(self.cotangents)}
        call = self.call()
        return reference.vjp64(call, prepare_vjp(call, **given, **self.results()))

    def jvp(self) -> OutputTangents:
        given = {"tq": None, "tk": None, "tv": None, **self.laid_out(self.tangents)}
        call = self.call()
        return reference.jvp64(call, prepare_jvp(call, **given, **self.results()))

    def vjp_jvp(self, outputs: OutputTangents | None = None) -> AttentionGrads:
        given = dict.fromkeys(("do", "tq", "tk", "tv"))
        for arrays in (self.cotangents, self.tangents, self.cotangent_tangents):
            given |= self.laid_out(arrays)
        call = self.call()
        second = prepare_vjp_jvp(call, **given, **self.results(), outputs=outputs)
        return reference.vjp_jvp64(call, second)

    def only(self, **groups: tuple[str, ...]) -> Point:
        """Return the point without the tangents and cotangents that are not named."""
        other = copy(self)
        for group, names in groups.items():
            kept = {name: x for name, x in getattr(self, group).items() if name in names}
            setattr(other, group, kept)
        return other

    def moved(self, step: float) -> Point:
        """Return the point after a step along its tangents."""
        other = copy(self)
        for group, tangents in (
            ("inputs", self.tangents),
            ("cotangents", self.cotangent_tangents),
        ):
            arrays = getattr(self, group)
            moved = {
                name: np.asarray(x + step * tangents[f"t{name}"]) for name, x in arrays.items()
            }
            setattr(other, group, moved)
        return other


def difference(function: Any, point: Point, step: float = 1e-3) -> list[np.ndarray]:
    """Return the derivative of arrays along the tangents, with an error of order step^4."""
    at = [function(point.moved(n * step)) for n in (1, -1, 2, -2)]
    return [(8 * (a - b) - (c - d)) / (12 * step) for a, b, c, d in zip(*at, strict=True)]


def given(arrays: Any) -> list[np.ndarray]:
    return [x for x in arrays if x is not None]


def finite_lse(point: Point) -> tuple[np.ndarray, np.ndarray]:
    """Return o and lse; a row without keys and sink has an lse that does not move."""
    outputs = point.forward()
    return outputs.o, np.where(np.isfinite(outputs.lse), outputs.lse, 0.0)


def dot(a: Any, b: Any) -> float:
    return sum(float((x * y).sum()) for x, y in zip(given(a), given(b), strict=True))


def tangents_of(point: Point) -> list[np.ndarray]:
    """Return the tangents of what has a gradient; that of a sink of -inf counts for nothing."""
    sinks = point.inputs.get("sinks", np.zeros(H))
    return [
        np.where(np.isfinite(sinks), x, 0.0) if name == "tsinks" else x
        for name, x in point.tangents.items()
    ]


@pytest.mark.parametrize("name", OPTIONS)
def test_jvp_is_the_derivative_of_the_forward_pass(name: str) -> None:
    point = Point(OPTIONS[name])
    for got, expected in zip(point.jvp(), difference(finite_lse, point), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-8)


@pytest.mark.parametrize("name", OPTIONS)
def test_vjp_jvp_is_the_derivative_of_the_vjp(name: str) -> None:
    point = Point(OPTIONS[name])
    expected = difference(lambda moved: given(moved.vjp()), point)
    for got, right in zip(given(point.vjp_jvp()), expected, strict=True):
        assert got.shape == right.shape
        np.testing.assert_allclose(got, right, atol=2e-8)


@pytest.mark.parametrize("name", OPTIONS)
def test_jvp_is_the_transpose_of_vjp(name: str) -> None:
    point = Point(OPTIONS[name])
    forwards = dot(point.cotangents.values(), point.jvp())
    assert dot(tangents_of(point), point.vjp()) == pytest.approx(forwards, rel=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
def test_hessian_is_symmetric(name: str) -> None:
    """`<u, H t> = <t, H u>` for the Hessian H of `sum(do * o) + sum(dlse * lse)`."""
    t = Point(OPTIONS[name]).only(cotangent_tangents=())
    u = t.only()
    u.tangents = {name: normal(*x.shape, seed=3) for name, x in t.tangents.items()}
    one, other = dot(tangents_of(u), t.vjp_jvp()), dot(tangents_of(t), u.vjp_jvp())
    assert one == pytest.approx(other, rel=1e-11, abs=1e-12)
    assert name == "zero scale" or abs(one) > 1e-3


def textbook_derivatives(
    point: Point, keep: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the tangents of o and lse, and those of the gradients, by automatic differentiation.

    Attention is one expression over all heads here; every row must see a key or a sink.
    """
    torch = pytest.importorskip("torch")
    options, names = point.options, list(point.inputs)
    i, j = np.arange(N)[:, None], np.arange(NK)
    slopes = np.broadcast_to(options.get("alibi_slopes", 0.0), (B, H))[..., None, None]
    distance = torch.tensor(slopes * np.abs(i + NK - N - j))
    visible = torch.tensor(options.get("mask", np.ones((N, NK), np.bool_)))
    kept = torch.tensor(keep)

    def attention(*inputs: Any) -> Any:
        x = dict(zip(names, inputs, strict=True))
        k, v = (x[name].repeat_interleave(H // HK, dim=1) for name in "kv")
        s = x["q"] @ k.transpose(2, 3) * options.get("softmax_scale", D**-0.5)
        if "softcap" in options:
            s = options["softcap"] * torch.tanh(s / options["softcap"])
        s = torch.where(visible, s + x.get("bias", 0.0) - distance, -torch.inf)
        sinks = x.get("sinks", torch.full((H,), -torch.inf, dtype=torch.float64))
        columns = sinks[:, None, None].expand(B, H, N, 1)
        lse = torch.logsumexp(torch.cat([s, columns], dim=3), dim=3)
        return (torch.exp(s - lse[..., None]) * kept) @ v, lse

    def gradients(*arguments: Any) -> Any:
        *inputs, do, dlse = arguments
        return torch.autograd.grad(attention(*inputs), inputs, (do, dlse), create_graph=True)

    def along(function: Any, primals: Arrays, tangents: Arrays) -> list[np.ndarray]:
        at, t = (tuple(torch.tensor(x) for x in arrays.values()) for arrays in (primals, tangents))
        return [x.numpy() for x in torch.autograd.functional.jvp(function, at, t)[1]]

    first = along(attention, point.inputs, point.tangents)
    primals = {**point.inputs, **point.cotangents}
    return first, along(gradients, primals, {**point.tangents, **point.cotangent_tangents})


TEXTBOOK = ["plain", "bits", "bias", "bias per row", "softcap", "alibi per batch", "dropout"]


@pytest.mark.parametrize("name", [*TEXTBOOK, "sinks", "everything"])
def test_derivatives_are_those_of_the_textbook(name: str) -> None:
    options = dict(OPTIONS[name])
    if "sinks" in options:
        options["sinks"] = np.linspace(-1.0, 1.0, H)
    point = Point(options)
    p, seed = options.get("dropout_p", 0.0), options.get("seed", 0)
    first, second = textbook_derivatives(point, dropout_factors(p, seed))
    for got, right in zip(point.jvp(), first, strict=True):
        np.testing.assert_allclose(got, right, atol=1e-12)
    for got, right in zip(given(point.vjp_jvp()), second, strict=True):
        np.testing.assert_allclose(got, right, atol=1e-11)


@pytest.mark.parametrize("name", ["plain", "everything", "everything, bnhd"])
def test_missing_tangents_are_zero_and_the_jvp_is_linear(name: str) -> None:
    point = Point(OPTIONS[name])
    whole, parts = point.jvp(), []
    for tangent, x in point.tangents.items():
        alone = point.only(tangents=(tangent,))
        parts.append(alone.jvp())
        zeros = point.only()
        zeros.tangents = {t: np.zeros_like(y) for t, y in point.tangents.items()} | {tangent: x}
        for got, expected in zip(parts[-1], zeros.jvp(), strict=True):
            np.testing.assert_array_equal(got, expected)
    for got, *terms in zip(whole, *parts, strict=True):
        np.testing.assert_allclose(sum(terms), got, atol=1e-13)


@pytest.mark.parametrize("name", ["plain", "everything", "everything, bnhd"])
def test_missing_cotangents_are_zero_and_the_vjp_jvp_is_linear_in_them(name: str) -> None:
    """Without cotangents only their tangents are left, whose VJP it is."""
    point = Point(OPTIONS[name])
    do = point.only(cotangents=("do",), cotangent_tangents=())
    dlse = point.only(cotangents=("dlse",), cotangent_tangents=())
    tdo = point.only(cotangents=(), cotangent_tangents=("tdo",))
    tdlse = point.only(cotangents=(), cotangent_tangents=("tdlse",))
    turned = point.only()
    turned.cotangents = {name[1:]: x for name, x in point.cotangent_tangents.items()}
    parts = [given(part.vjp_jvp()) for part in (do, dlse, tdo, tdlse)]
    fields = zip(given(point.vjp_jvp()), given(turned.vjp()), *parts, strict=True)
    for whole, vjp, of_do, of_dlse, of_tdo, of_tdlse in fields:
        np.testing.assert_allclose(of_do + of_dlse + of_tdo + of_tdlse, whole, atol=1e-12)
        np.testing.assert_allclose(of_tdo + of_tdlse, vjp, atol=1e-13)


def test_given_output_tangents_are_taken() -> None:
    point = Point(EVERYTHING)
    computed = point.vjp_jvp()
    given_back = point.vjp_jvp(outputs=point.jvp())
    for one, other in zip(computed, given_back, strict=True):
        np.testing.assert_array_equal(one, other)


def test_tangents_of_parts_add_up_with_the_results_of_the_whole() -> None:
    """With o, lse and then to, tlse of the whole, two halves of the keys make up everything."""
    point = Point({"softcap": 2.0})
    results, whole, second = point.results(), point.jvp(), point.vjp_jvp()
    first_parts, second_parts = [], []
    for at in (np.s_[:, :, :3], np.s_[:, :, 3:]):
        k, v = (point.inputs[name][at] for name in "kv")
        call = prepare(point.inputs["q"], k, v, softcap=2.0)
        tq, tk, tv = (point.tangents[name] for name in ("tq", "tk", "tv"))
        tangents = {"tq": tq, "tk": tk[at], "tv": tv[at]}
        first_parts.append(reference.jvp64(call, prepare_jvp(call, **tangents, **results)))
        checked = prepare_vjp_jvp(
            call,
            **point.cotangents,
            **tangents,
            **results,
            **point.cotangent_tangents,
            outputs=whole,
        )
        second_parts.append(reference.vjp_jvp64(call, checked))
    for one, other, right in zip(*first_parts, whole, strict=True):
        np.testing.assert_allclose(one + other, right, atol=1e-13)
    one, other = second_parts
    np.testing.assert_allclose(one.dq + other.dq, second.dq, atol=1e-12)
    for field in ("dk", "dv"):
        joined = np.concatenate([getattr(one, field), getattr(other, field)], axis=2)
        np.testing.assert_allclose(joined, getattr(second, field), atol=1e-12)


def test_fully_masked_row_has_no_tangents() -> None:
    point = Point({"mask": np.zeros((N, NK), np.bool_), "bias": normal(N, NK), "dropout_p": 0.0})
    for result in (*point.jvp(), *given(point.vjp_jvp())):
        assert not result.any()


def test_row_without_keys_moves_with_its_sink() -> None:
    sinks = np.linspace(-1, 1, H)
    point = Point({"mask": np.zeros((N, NK), np.bool_), "sinks": sinks})
    to, tlse = point.jvp()
    assert not to.any()
    expected = np.broadcast_to(point.tangents["tsinks"][:, None], (B, H, N))
    np.testing.assert_allclose(tlse, expected, rtol=1e-14)
    second = point.vjp_jvp()
    assert not any(x.any() for x in second[:3])
    tdlse = point.cotangent_tangents["tdlse"]
    np.testing.assert_allclose(second.dsinks, tdlse.sum(axis=(0, 2)), rtol=1e-12)


def test_row_without_keys_has_no_output_to_move() -> None:
    """Whatever stands in its rows of q, do, o and their tangents, only its sink counts."""
    point = Point({"mask": EMPTY_ROW, "sinks": np.linspace(-1, 1, H)})
    clean, results = (*point.jvp(), *point.vjp(), *point.vjp_jvp()), point.results()
    results["o"][:, :, 2] = np.nan
    dirty = Point({"mask": EMPTY_ROW, "sinks": np.linspace(-1, 1, H)})
    dirty.results = lambda: results
    for group in (dirty.inputs, dirty.cotangents, dirty.tangents, dirty.cotangent_tangents):
        for name in group.keys() & {"q", "do", "tq", "tdo"}:
            group[name][:, :, 2] = np.nan
    spoiled = (*dirty.jvp(), *dirty.vjp(), *dirty.vjp_jvp())
    for right, got in zip(given(clean), given(spoiled), strict=True):
        np.testing.assert_array_equal(right, got)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_masked_entries_reach_nothing(poison: float, softcap: float | None) -> None:
    """Key 3 is hidden from all rows, bias is poison at hidden pairs, row 2 sees nothing."""
    mask = np.ones((N, NK), np.bool_)
    mask[:, 3] = mask[2] = False
    options = {"mask": mask, "bias": normal(N, NK), "sinks": np.full(H, -np.inf)}
    options |= {"softcap": softcap, "dropout_p": 0.2, "seed": 3}
    clean, dirty = Point(options), Point(options)
    arrays = {**dirty.inputs, **dirty.cotangents, **dirty.tangents, **dirty.cotangent_tangents}
    for name in ("k", "v", "tk", "tv"):
        arrays[name][:, :, 3] = poison
    for name in ("q", "do", "dlse", "tq", "tdo", "tdlse"):
        arrays[name][:, :, 2] = poison
    arrays["tsinks"][:] = poison
    arrays["tbias"][~mask] = poison
    dirty.inputs["bias"] = np.where(mask, options["bias"], poison)
    expected = (*clean.jvp(), *clean.vjp_jvp())
    for right, got in zip(expected, (*dirty.jvp(), *dirty.vjp_jvp()), strict=True):
        np.testing.assert_array_equal(right, got)


@pytest.mark.parametrize("name", ["tq", "tk", "tv", "tbias", "q", "k", "v", "bias"])
def test_nan_reaches_exactly_the_rows_that_attend(name: str) -> None:
    """Under a causal mask key 4 is seen by queries 2, 3 and 4 only, and query 2 sees keys 0..4."""
    point = Point({"mask": tw.causal(), "bias": np.zeros((N, NK)), "dropout_p": 0.5, "seed": 4})
    where = {"q": np.s_[0, 0, 2, 1], "k": np.s_[0, 0, 4, 1], "v": np.s_[0, 0, 4, 1]}
    where["bias"] = np.s_[2, 4]
    group = point.tangents if name.startswith("t") else point.inputs
    group[name][where[name.removeprefix("t")]] = np.nan
    rows = np.zeros((B, H, N), np.bool_)
    rows[
        {
            "q": np.s_[0, :1, 2:3],
            "k": np.s_[0, :2, 2:],
            "v": np.s_[0, :2, 2:],
            "bias": np.s_[:, :, 2:3],
        }[name.removeprefix("t")]
    ] = True
    to, tlse = point.jvp()
    np.testing.assert_array_equal(np.isnan(to).any(-1), rows)
    if name not in ("v", "tv"):
        np.testing.assert_array_equal(np.isnan(tlse), rows)
    else:
        assert not np.isnan(tlse).any()
    second = point.vjp_jvp()
    np.testing.assert_array_equal(np.isnan(second.dq).any(-1), rows)
    seen = np.tri(N, NK, NK - N, dtype=np.bool_)
    spoiled = (rows[..., None] & seen).reshape(B, HK, H // HK * N, NK).any(axis=2)
    np.testing.assert_array_equal(np.isnan(second.dk).any(-1), spoiled)


@pytest.mark.parametrize("name", ["do", "dlse", "tdo", "tdlse"])
def test_nan_in_a_cotangent_stays_in_its_row(name: str) -> None:
    point = Point({"mask": tw.causal()})
    group = point.tangents | point.cotangents | point.cotangent_tangents
    group[name][1, 3, 2] = np.nan
    second = point.vjp_jvp()
    rows = np.zeros((B, H, N), np.bool_)
    rows[1, 3, 2] = True
    np.testing.assert_array_equal(np.isnan(second.dq).any(-1), rows)


def test_missing_cotangents_are_zeros_even_where_a_value_is_nan() -> None:
    missing = Point({"mask": tw.causal()}).only(cotangents=("dlse",), cotangent_tangents=())
    missing.inputs["v"][0, 0, 4] = np.nan
    zeros = copy(missing)
    zeros.cotangents = {**missing.cotangents, "do": np.zeros((B, H, N, DV))}
    zeros.cotangent_tangents = {"tdo": np.zeros((B, H, N, DV)), "tdlse": np.zeros((B, H, N))}
    one, other = ((*point.vjp(), *point.vjp_jvp()) for point in (missing, zeros))
    for left, right in zip(given(one), given(other), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("size", ["B", "N", "Nk", "H"])
def test_sizes_of_zero(size: str) -> None:
    n = {"B": B, "H": H, "Hk": HK, "N": N, "Nk": NK} | {size: 0}
    n["Hk"] = 0 if size == "H" else HK
    q, k = np.ones((n["B"], n["H"], n["N"], D)), np.ones((n["B"], n["Hk"], n["Nk"], D))
    v, do = np.ones((*k.shape[:3], DV)), np.ones((*q.shape[:3], DV))
    call = prepare(q, k, v, dropout_p=0.5, seed=0)
    outputs = reference.forward64(call, Want())
    to, tlse = reference.jvp64(call, prepare_jvp(call, q, k, v, outputs.o, outputs.stats))
    assert (to.shape, tlse.shape) == (do.shape, do.shape[:3])
    given = prepare_vjp_jvp(call, do, q, k, v, outputs.o, outputs.stats, tdo=do)
    second = reference.vjp_jvp64(call, given)
    assert [x.shape for x in second[:3]] == [q.shape, k.shape, v.shape]
    assert not any(np.isnan(x).any() for x in (to, tlse, *second[:3]))


def test_float32_results_are_the_float64_results_rounded() -> None:
    point = Point(EVERYTHING)
    groups = [point.inputs, point.cotangents, point.tangents, point.cotangent_tangents]
    low = [{name: x.astype(np.float32) for name, x in group.items()} for group in groups]
    low[0]["alibi_slopes"] = EVERYTHING["alibi_slopes"].astype(np.float32)
    options = {name: x for name, x in point.options.items() if name != "alibi_slopes"}
    call = prepare(**low[0], **options)
    outputs = reference.forward(call, Want())
    tangents = prepare_jvp(call, **low[2], o=outputs.o, stats=outputs.stats)
    second = prepare_vjp_jvp(call, **low[1], **low[2], **low[3], o=outputs.o, stats=outputs.stats)
    exact = (*reference.jvp64(call, tangents), *reference.vjp_jvp64(call, second))
    rounded = (*reference.jvp(call, tangents), *reference.vjp_jvp(call, second))
    for right, got in zip(exact, rounded, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, right.astype(np.float32))


@pytest.mark.parametrize("missing", INPUTS)
def test_only_needed_gradients_are_returned(missing: str) -> None:
    point = Point(EVERYTHING)
    call, results = point.call(), point.results()
    cotangents = prepare_vjp(call, **point.cotangents, **results)
    second = prepare_vjp_jvp(call, **point.cotangents, **point.tangents, **results)
    needed = replace(Needed(), **{missing: False})
    for function, given in ((reference.vjp, cotangents), (reference.vjp_jvp, second)):
        whole, part = function(call, given)._asdict(), function(call, given, needed)._asdict()
        assert part.pop(f"d{missing}") is None
        for name, x in part.items():
            np.testing.assert_array_equal(x, whole[name])


def dropout_factors(p: float, seed: int, queries: int = N, keys: int = NK) -> np.ndarray:
    """Return what dropout multiplies each pair by, one word of Philox4x32-10 at a time."""

    def words(counter: list[int]) -> list[int]:
        x0, x1, x2, x3 = (word % 2**32 for word in counter)
        k0, k1 = seed % 2**32, seed // 2**32
        for _ in range(10):
            a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2
            x0, x1, x2, x3 = b // 2**32 ^ x1 ^ k0, b % 2**32, a // 2**32 ^ x3 ^ k1, a % 2**32
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        return [x0, x1, x2, x3]

    threshold = min(round(p * 2**32), 2**32 - 1)
    factors = np.zeros((B, H, queries, keys))
    for b, h, i, j in np.ndindex(factors.shape):
        dropped = words([j // 4, i + keys - queries, h, b])[j % 4] < threshold
        factors[b, h, i, j] = 0.0 if dropped or p == 1 else 1 / (1 - p)
    return factors


def kept(queries: np.ndarray, keys: int, p: float, seed: int, **options: Any) -> np.ndarray:
    """Return the factors of dropout as `o` shows them where v is the identity and p uniform."""
    batch, heads = queries.shape[:2]
    k = np.zeros((batch, heads, keys, D))
    v = np.broadcast_to(np.eye(keys), (batch, heads, keys, keys))
    o = tw.numpy.attention(
        queries, k, v, dropout_p=p, seed=seed, implementation="reference", **options
    )
    return np.asarray(o) * keys


@pytest.mark.parametrize(("p", "seed"), [(0.25, 0), (0.5, 2**64 - 1), (0.9, 2**32), (1e-3, 7)])
@pytest.mark.parametrize(("queries", "keys"), [(N, NK), (7, 3)])
def test_dropout_is_philox_of_position_head_and_batch(
    p: float, seed: int, queries: int, keys: int
) -> None:
    got = kept(np.zeros((B, H, queries, D)), keys, p, seed)
    np.testing.assert_allclose(got, dropout_factors(p, seed, queries, keys), rtol=1e-14)


def test_dropout_keeps_its_rate_and_the_mean() -> None:
    rows, keys, p = 97, 101, 0.3
    factors = kept(np.zeros((B, H, rows, D)), keys, p, seed=11)
    pairs = B * H * rows * keys
    dropped = np.count_nonzero(factors == 0)
    assert abs(dropped - p * pairs) < 5 * np.sqrt(p * (1 - p) * pairs)
    assert factors.mean() == pytest.approx(1.0, abs=0.01)
    # Neither rows, nor columns, nor heads repeat each other.
    drops = (factors == 0).reshape(B * H, rows, keys) - p
    for one, other in ((drops[1:], drops[:-1]), (drops[:, 1:], drops[:, :-1])):
        assert abs((one * other).mean()) < 5 * p * (1 - p) / np.sqrt(one.size)
    assert abs((drops[..., 1:] * drops[..., :-1]).mean()) < 5 * p * (1 - p) / np.sqrt(pairs)


def test_dropout_of_a_chunk_of_queries_is_that_of_the_whole() -> None:
    q = np.zeros((B, H, 13, D))
    whole = kept(q, 17, 0.5, seed=5)
    for rows in (1, 4, 13):
        np.testing.assert_array_equal(kept(q[:, :, -rows:], 17, 0.5, seed=5), whole[:, :, -rows:])


def test_dropout_of_a_decoding_step_is_that_of_the_whole() -> None:
    """The query at a position sees the same pairs dropped, whatever comes after it."""
    whole = dropout_factors(0.5, 9, 13, 13)
    for length in (1, 6, 12):
        step = kept(np.zeros((B, H, 1, D)), length, 0.5, seed=9)
        np.testing.assert_allclose(step[:, :, 0], whole[:, :, length - 1, :length], rtol=1e-14)


def test_dropout_depends_on_all_bits_of_the_seed() -> None:
    q = np.zeros((B, H, N, D))
    masks = [kept(q, NK, 0.5, seed).tobytes() for seed in (0, 1, 2**31, 2**32, 2**63)]
    assert len(set(masks)) == len(masks)


@pytest.mark.parametrize("p", [0.0, 0.6, 1.0])
def test_dropout_leaves_row_statistics_alone(p: float) -> None:
    q, k, v = normal(B, H, N, D), normal(B, HK, NK, D), normal(B, HK, NK, DV)
    want = Want(lse=True, max_logit=True, entropy=True)
    plain = reference.forward64(prepare(q, k, v), want)
    dropped = reference.forward64(prepare(q, k, v, dropout_p=p, seed=1), want)
    for field in ("lse", "max_logit", "entropy"):
        np.testing.assert_array_equal(getattr(plain, field), getattr(dropped, field))
    np.testing.assert_array_equal(plain.stats.m, dropped.stats.m)
    assert (dropped.o == plain.o).all() == (p == 0)


def test_dropout_of_everything_leaves_lse_alone() -> None:
    point = Point({"dropout_p": 1.0, "seed": 1})
    bare = Point({}).only(cotangents=("dlse",), cotangent_tangents=("tdlse",))
    assert not point.forward().o.any()
    to, tlse = point.jvp()
    assert not to.any()
    np.testing.assert_array_equal(tlse, bare.jvp().tlse)
    for got, expected in ((point.vjp(), bare.vjp()), (point.vjp_jvp(), bare.vjp_jvp())):
        assert not got.dv.any()
        np.testing.assert_allclose(got.dq, expected.dq, atol=1e-15)
        np.testing.assert_allclose(got.dk, expected.dk, atol=1e-15)
