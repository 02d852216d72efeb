"""The audit flags wrong tangents and second derivatives of attention, and only those."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from tilewise import verify
from tilewise.shared.philox import philox4x32


class Textbook:
    """Attention and its derivatives with whole matrices, right unless a bug is switched on."""

    def __init__(self, q, k, v, bug, **options):
        (self.B, self.H, self.N, D), self.Hk, self.Nk = q.shape, *k.shape[1:3]
        self.bug, self.q, self.options = bug, q, options
        self.k, self.v = self.per_query_head(k), self.per_query_head(v)
        self.scale = q.dtype.type(options.get("softmax_scale") or D**-0.5)
        x, cap = q @ self.k.swapaxes(-1, -2) * self.scale, options.get("softcap")
        self.t = np.zeros_like(x) if cap is None else np.tanh(x / q.dtype.type(cap))
        s = x if cap is None else q.dtype.type(cap) * self.t
        bias, sinks, mask = (options.get(name) for name in ("bias", "sinks", "mask"))
        s = s if bias is None else s + bias
        self.seen = np.ones(s.shape, bool)
        if mask is not None:
            self.seen &= mask.to_bool(self.B, self.H, self.N, self.Nk)
        s = np.where(self.seen, s, -np.inf).astype(q.dtype)
        column = np.full((1, self.H, 1, 1), -np.inf, q.dtype)
        if sinks is not None:
            column = sinks[:, None, None][None]
        m = np.maximum(s.max(axis=-1, keepdims=True), column)
        base = np.where(m == -np.inf, 0, m)
        w, w_sink = np.exp(s - base), np.exp(column - base)
        l = w.sum(axis=-1, keepdims=True) + w_sink
        l = np.where(l == 0, 1, l)
        self.p, self.p_sink, self.z = w / l, w_sink / l, self.keep(q.dtype)
        self.lse = np.where(m == -np.inf, m, base + np.log(l))[..., 0]
        self.o = (self.p * self.z) @ self.v

    def per_query_head(self, x):
        return np.repeat(x, self.H // self.Hk, axis=1)

    def per_key_head(self, x):
        heads = x.reshape(self.B, self.Hk, self.H // self.Hk, *x.shape[2:])
        return heads[:, :, -1] if self.bug == "only the last head of a group" else heads.sum(axis=2)

    def keep(self, dtype):
        p = self.options.get("dropout_p", 0.0)
        if not p:
            return dtype.type(1)
        seed = self.options["seed"]
        b, h, i, j = np.ogrid[: self.B, : self.H, : self.N, : self.Nk]
        if self.bug == "dropout counts queries from the top":
            i = i - (self.Nk - self.N)
        counter = np.stack(np.broadcast_arrays(j // 4, i + self.Nk - self.N, h, b))
        words = philox4x32(counter, (seed % 2**32, seed >> 32))
        word = np.take_along_axis(words, j[None] % 4 + 0 * words[:1].astype(int), axis=0)[0]
        return np.where(word < round(p * 2**32), 0, 1 / (1 - p)).astype(dtype)

    def to_bias(self, x):
        bias = self.options["bias"]
        axes = tuple(axis for axis, size in enumerate(bias.shape) if size == 1)
        return x.sum(axis=axes, keepdims=True).reshape(bias.shape)

    def tangents(self, tq, tk, tv, tbias, tsinks):
        """Set tx, ts, tv, mu and to."""
        zero, bug = self.q.dtype.type(0), self.bug
        self.tq = np.zeros_like(self.q) if tq is None else tq
        self.tk = np.zeros_like(self.k) if tk is None else self.per_query_head(tk)
        self.tv = np.zeros_like(self.v) if tv is None else self.per_query_head(tv)
        tx = self.tq @ self.k.swapaxes(-1, -2)
        if bug != "missing q tk":
            tx = tx + self.q @ self.tk.swapaxes(-1, -2)
        self.tx = tx * self.scale
        slope = 1 - self.t * self.t
        self.ts = self.tx if bug == "missing slope of the soft cap" else self.tx * slope
        self.ts = self.ts + (zero if tbias is None or bug == "missing tbias" else tbias)
        if bug == "mask off by one in the tangents":
            self.ts = np.where(np.roll(self.seen, 1, axis=-1), self.ts, zero)
        self.tsinks = zero if tsinks is None else tsinks[None, :, None, None]
        self.mu = (self.p * self.ts).sum(axis=-1, keepdims=True)
        if bug != "missing tsinks in mu":
            self.mu = self.mu + self.p_sink * self.tsinks
        z = 1 if bug == "missing dropout in to" else self.z
        self.to = (self.p * z * self.ts) @ self.v
        if bug != "missing mu o":
            self.to = self.to - self.mu * self.o
        if bug != "missing p tv":
            self.to = self.to + (self.p * self.z) @ self.tv

    def cotangents(self, do, dlse):
        """Set do, g = dp - delta, delta, ds and dx."""
        self.do, self.delta = do, (do * self.o).sum(axis=-1, keepdims=True)
        if dlse is not None:
            self.delta = self.delta - dlse[..., None]
        self.g = self.z * (do @ self.v.swapaxes(-1, -2)) - self.delta
        self.ds = self.p * self.g
        self.dx = self.ds * (1 - self.t * self.t) * self.scale

    def grads(self):
        dk, dv = self.dx.swapaxes(-1, -2) @ self.q, (self.p * self.z).swapaxes(-1, -2) @ self.do
        dbias = None if self.options.get("bias") is None else self.to_bias(self.ds)
        sinks = self.options.get("sinks")
        dsinks = None if sinks is None else -(self.p_sink * self.delta).sum(axis=(0, 2, 3))
        dk, dv = (x.reshape(self.B, self.Hk, -1, *x.shape[2:]).sum(axis=2) for x in (dk, dv))
        return self.dx @ self.k, dk, dv, dbias, dsinks

    def second(self, tdo, tdlse):
        bug = self.bug
        tdo = np.zeros_like(self.do) if tdo is None else tdo
        tp, tp_sink = self.p * (self.ts - self.mu), self.p_sink * (self.tsinks - self.mu)
        tdp = tdo @ self.v.swapaxes(-1, -2) + self.do @ self.tv.swapaxes(-1, -2)
        if bug != "missing dropout in tdp":
            tdp = tdp * self.z
        tdelta = np.zeros_like(self.mu)
        if bug != "missing tdo o":
            tdelta = tdelta + (tdo * self.o).sum(axis=-1, keepdims=True)
        if bug != "missing do to":
            tdelta = tdelta + (self.do * self.to).sum(axis=-1, keepdims=True)
        if tdlse is not None and bug != "missing tdlse":
            tdelta = tdelta - tdlse[..., None]
        tds = tp * self.g + self.p * (tdp - tdelta)
        if bug == "missing tp (dp - delta)":
            tds = self.p * (tdp - tdelta)
        slope = 1 - self.t * self.t
        tdx = tds * slope
        cap = self.options.get("softcap")
        if cap is not None and bug != "missing second derivative of the soft cap":
            tdx = tdx - 2 * self.t * slope * self.tx / self.q.dtype.type(cap) * self.ds
        tdx = tdx * self.scale
        tdq, tdk = tdx @ self.k, tdx.swapaxes(-1, -2) @ self.q
        if bug != "missing dx tk":
            tdq = tdq + self.dx @ self.tk
        if bug != "missing dx tq":
            tdk = tdk + self.dx.swapaxes(-1, -2) @ self.tq
        z = 1 if bug == "missing dropout in tdv" else self.z
        tdv = (tp * z).swapaxes(-1, -2) @ self.do
        if bug != "missing p tdo":
            tdv = tdv + (self.p * self.z).swapaxes(-1, -2) @ tdo
        of_sink = np.zeros_like(self.p_sink)
        if bug != "missing tp_sink delta":
            of_sink = of_sink + tp_sink * self.delta
        if bug != "missing p_sink tdelta":
            of_sink = of_sink + self.p_sink * tdelta
        tdbias = None if self.options.get("bias") is None else self.to_bias(tds)
        tdsinks = None if self.options.get("sinks") is None else -of_sink.sum(axis=(0, 2, 3))
        return tdq, self.per_key_head(tdk), self.per_key_head(tdv), tdbias, tdsinks


def attention(
    q, k, v, *, mask=None, bias=None, softcap=None, sinks=None, softmax_scale=None,
    dropout_p=0.0, seed=None, return_lse=False, bug=None,
):  # fmt: skip
    x = Textbook(
        q, k, v, bug, mask=mask, bias=bias, softcap=softcap, sinks=sinks,
        softmax_scale=softmax_scale, dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    return SimpleNamespace(o=x.o, lse=x.lse)


def vjp(do, q, k, v, o, stats, *, dlse=None, bug=None, **options):
    x = Textbook(q, k, v, bug, **options)
    x.cotangents(do, dlse)
    return x.grads()


def jvp(tq, tk, tv, q, k, v, o, stats, *, tbias=None, tsinks=None, bug=None, **options):
    x = Textbook(q, k, v, bug, **options)
    x.tangents(tq, tk, tv, tbias, tsinks)
    return x.to, x.mu[..., 0]


def vjp_jvp(
    do, tq, tk, tv, q, k, v, o, stats, *, dlse=None, tbias=None, tsinks=None, tdo=None,
    tdlse=None, bug=None, **options,
):  # fmt: skip
    x = Textbook(q, k, v, bug, **options)
    x.tangents(tq, tk, tv, tbias, tsinks)
    x.cotangents(do, dlse)
    return x.second(tdo, tdlse)


def audit(bug, select):
    derivatives = {"vjp": vjp, "jvp": jvp, "vjp_jvp": vjp_jvp}
    planted = {kind: partial(function, bug=bug) for kind, function in derivatives.items()}
    return verify.run(partial(attention, bug=bug), select=select, **planted)


def failed_checks(report):
    return {check.name for _, check in report.failures}


@pytest.mark.parametrize(
    "select",
    ["heads/2", "mask/dense-per", "bias/1", "softcap/", "sinks/", "dropout/0.5", "tangent"],
)
def test_right_derivatives_pass(select):
    report = audit(None, select)
    assert report.passed, report.failures
    kinds = {check.name for case in report.cases for check in case.checks}
    assert {"to", "tlse", "tdq", "tdk", "tdv"} <= kinds


GRADS = {"tdq", "tdk", "tdv"}
LOGITS = {"tdq", "tdk"}
BUGS = {
    "missing mu o": ("heads/2-per-key-head-full", {"to", *LOGITS}),
    "missing p tv": ("heads/2-per-key-head-full", {"to", *LOGITS}),
    "missing q tk": ("heads/2-per-key-head-full", {"to", "tlse", *GRADS}),
    "missing tbias": ("bias/1-H-N-Nk", {"to", "tlse", *GRADS, "tdbias"}),
    "missing slope of the soft cap": ("softcap/strong", {"to", "tlse", *GRADS}),
    "missing second derivative of the soft cap": ("softcap/strong", LOGITS),
    "missing tdo o": ("heads/2-per-key-head-full", LOGITS),
    "missing do to": ("heads/2-per-key-head-full", LOGITS),
    "missing tdlse": ("heads/2-per-key-head-full", LOGITS),
    "missing tp (dp - delta)": ("heads/2-per-key-head-full", LOGITS),
    "missing dx tk": ("heads/2-per-key-head-full", {"tdq"}),
    "missing dx tq": ("heads/2-per-key-head-full", {"tdk"}),
    "missing p tdo": ("heads/2-per-key-head-full", {"tdv"}),
    "missing tsinks in mu": ("sinks/normal", {"to", "tlse", *GRADS, "tdsinks"}),
    "missing tp_sink delta": ("sinks/normal", {"tdsinks"}),
    "missing p_sink tdelta": ("sinks/normal", {"tdsinks"}),
    "missing dropout in to": ("dropout/0.5-causal", {"to", *LOGITS}),
    "missing dropout in tdp": ("dropout/0.1-causal", LOGITS),
    "missing dropout in tdv": ("dropout/0.1-causal", {"tdv"}),
    "only the last head of a group": ("heads/2-per-key-head-full", {"tdk", "tdv"}),
    "mask off by one in the tangents": ("mask/causal-square", {"to", "tlse", *GRADS}),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_in_the_tangents_is_flagged_there_alone(bug):
    select, expected = BUGS[bug]
    assert failed_checks(audit(bug, select)) == expected


def test_other_pairs_dropped_are_flagged():
    report = audit("dropout counts queries from the top", "dropout/0.1-causal")
    assert {"o", "dq", "dk", "dv", "to", "tdq", "tdk", "tdv"} <= failed_checks(report)
    assert "lse" not in failed_checks(report)
