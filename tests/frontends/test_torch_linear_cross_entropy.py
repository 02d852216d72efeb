"""Linear cross-entropy in PyTorch: values, every derivative and transform, tracing, error texts."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.func as ft
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import tilewise as tw
from tilewise.torch import LinearCrossEntropyResult, linear_cross_entropy

T, C, V = 7, 3, 5
F64 = torch.float64
NARROW = [torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


H, W, B = randn(T, C), randn(V, C, seed=1), randn(V, seed=2)
Y = torch.tensor([1, 4, -100, 0, 2, -100, 1])
COUNTS = torch.rand(V, dtype=F64, generator=torch.Generator().manual_seed(3))
ALL: dict[str, Any] = {
    "label_smoothing": 0.2,
    "z_loss": 0.03,
    "class_weight": COUNTS,
    "softcap": 2.5,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "sum": {"reduction": "sum"},
    "each token": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.13},
    "z-loss": {"z_loss": 0.07},
    "class weights": {"class_weight": COUNTS},
    "softcap": {"softcap": 1.7},
    "shift": {"shift": 2},
    "chunks": {"token_chunk": 2, "vocab_chunk": 2048},
    "everything": ALL,
    "everything of each token": {**ALL, "reduction": "none", "shift": 1},
}


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def plain(
    h: Any,
    w: Any,
    b: Any = None,
    y: Any = Y,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Any = None,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: int = 0,
    **chunks: int,
) -> tuple[Any, ...]:
    """Loss, lse, entropy and z-loss by PyTorch's own operations."""
    if shift:
        h, y = h[..., :-shift, :], y[..., shift:]
    s = h @ w.mT if b is None else h @ w.mT + b
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    kept = y != ignore_index
    at = torch.where(kept, y, 0)
    count = torch.ones(w.shape[0], dtype=h.dtype) if class_weight is None else class_weight
    # Not by logsumexp, whose tangents cannot be differentiated in reverse mode.
    top = s.detach().amax(-1, keepdim=True)
    lse = (s - top).exp().sum(-1).log() + top.squeeze(-1)
    log_p = s - lse[..., None]
    picked = log_p.gather(-1, at[..., None]).squeeze(-1) * count[at]
    loss = -(1 - label_smoothing) * picked
    loss = loss - label_smoothing / w.shape[0] * (log_p * count).sum(-1)
    z = z_loss * lse**2
    loss, z = (torch.where(kept, x, 0.0) for x in (loss + z, z))
    scale = 1 / (count[at] * kept).sum() if reduction == "mean" else 1.0
    if reduction != "none":
        loss, z = loss.sum() * scale, z.sum() * scale
    return loss, lse, -(log_p.exp() * log_p).sum(-1), z


def door(h: Any, w: Any, b: Any = None, y: Any = Y, **options: Any) -> tuple[Any, ...]:
    """The differentiable results."""
    asked = dict.fromkeys(("return_lse", "return_entropy", "return_z_loss"), True)
    r = linear_cross_entropy(h, w, y, bias=b, **asked, **options)
    return r.loss, r.lse, r.entropy, r.z_loss


def loss_of(h: Any, w: Any, b: Any = None, y: Any = Y, **options: Any) -> Any:
    return linear_cross_entropy(h, w, y, bias=b, **options)


def squares(tree: Any) -> Any:
    return sum(t.square().sum() for t in torch.utils._pytree.tree_leaves(tree))


def parameters(*tensors: Any) -> list[Any]:
    return [t.clone().requires_grad_() for t in tensors]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield


# Values


@pytest.mark.parametrize("options", OPTIONS)
def test_results_are_those_of_the_textbook(options: str) -> None:
    more = OPTIONS[options]
    same(door(H, W, B, **more), plain(H, W, B, **more))
    same(loss_of(H, W, **more), plain(H, W, **more)[0])
    r = linear_cross_entropy(H, W, Y, bias=B, return_argmax=True, **more)
    s = H @ W.mT + B
    assert isinstance(r, LinearCrossEntropyResult)
    shift = more.get("shift", 0)
    assert r.argmax.equal(s.argmax(-1)[: T - shift]) and r.lse is None and r.z_loss is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0, 0.3])
def test_the_loss_is_pytorchs(reduction: str, label_smoothing: float) -> None:
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    for counts in (None, COUNTS):
        want = torch.nn.functional.cross_entropy(H @ W.mT, Y, weight=counts, **options)
        same(loss_of(H, W, class_weight=counts, **options), want)
    y = Y.clamp(0)
    want = torch.nn.functional.cross_entropy(H @ W.mT, y, ignore_index=1, **options)
    same(loss_of(H, W, y=y, ignore_index=1, **options), want)


def test_any_leading_dimensions() -> None:
    h, y = randn(2, 3, 11, C), torch.arange(66).reshape(2, 3, 11) % V
    flat = loss_of(h.reshape(66, C), W, y=y.flatten(), reduction="none")
    assert loss_of(h, W, y=y, reduction="none").equal(flat.reshape(2, 3, 11))
    assert loss_of(h[0, 0, 0], W, y=y[0, 0, 0], reduction="none").equal(flat[0])
    assert loss_of(h[0, 0, 0], W, y=y[0, 0, 0]).equal(flat[0])
    same(door(h, W, y=y, shift=1), plain(h, W, y=y, shift=1))
    assert loss_of(h.mT.contiguous().mT, W, y=y).equal(loss_of(h, W, y=y))
    assert loss_of(h, W.mT.contiguous().mT, y=y).equal(loss_of(h, W, y=y))


@pytest.mark.parametrize("dtype", [torch.float32, F64, *NARROW])
def test_numpy_and_torch_have_the_same_bits(dtype: Any) -> None:
    h, w, b = (t.to(dtype) for t in (H, W, B))
    asked = dict.fromkeys((f"return_{n}" for n in ("lse", "entropy", "argmax", "z_loss")), True)
    r = linear_cross_entropy(h, w, Y, bias=b, z_loss=0.1, **asked)
    assert r.loss.dtype == r.lse.dtype == (dtype if dtype.itemsize > 2 else torch.float32)
    arrays = [t.numpy() if dtype is not torch.bfloat16 else _bfloat16(t) for t in (h, w, b)]
    want = tw.numpy.linear_cross_entropy(
        *arrays[:2], Y.numpy(), bias=arrays[2], z_loss=0.1, **asked
    )
    for name in ("loss", "lse", "entropy", "argmax"):
        assert getattr(r, name).numpy().tobytes() == getattr(want, name).tobytes(), name
    torch.testing.assert_close(r.z_loss.numpy(), want.z_loss, rtol=1e-6, atol=0)
    assert tw.linear_cross_entropy(h, w, Y, bias=b, z_loss=0.1).equal(r.loss)


def _bfloat16(tensor: Any) -> Any:
    return tensor.view(torch.int16).numpy().view(tw.base.dtypes.bfloat16("test"))


# Derivatives


@pytest.mark.parametrize("options", OPTIONS)
def test_derivatives_of_both_orders_and_modes(options: str) -> None:
    more, x = OPTIONS[options], parameters(H, W, B)
    asked = dict.fromkeys(("check_batched_grad", "check_batched_forward_grad"), True)

    def f(*x: Any) -> Any:
        results = door(*x, **more)
        return results if more.get("z_loss") else results[:3]

    assert gradcheck(f, x, check_forward_ad=True, **asked)
    assert gradgradcheck(f, x, check_fwd_over_rev=True)


@pytest.mark.parametrize("options", ["nothing", "everything", "everything of each token"])
def test_derivatives_of_the_loss_alone(options: str) -> None:
    """The backward hands over what the forward pass computed; that of one input alone too."""
    more, x = OPTIONS[options], parameters(H, W, B)
    assert gradcheck(lambda *x: loss_of(*x, **more), x, check_forward_ad=True)
    assert gradgradcheck(lambda *x: loss_of(*x, **more), x, check_fwd_over_rev=True)
    for i in range(3):
        fixed = [H, W, B]

        def alone(t: Any, i: int = i, fixed: list[Any] = fixed) -> Any:
            return loss_of(*fixed[:i], t, *fixed[i + 1 :], **more)

        assert gradcheck(alone, (x[i],))
        assert gradgradcheck(alone, (x[i],))


def test_every_transform_agrees_with_plain_pytorch() -> None:
    def ours(h: Any, w: Any) -> Any:
        return door(h, w, **ALL)

    def theirs(h: Any, w: Any) -> Any:
        return plain(h, w, **ALL)

    x, t = (H, W), (randn(T, C, seed=5), randn(V, C, seed=6))
    both = (0, 1)
    transforms: tuple[Callable[..., Any], ...] = (
        lambda f: ft.vjp(f, *x)[1](f(*x)),
        lambda f: ft.jvp(f, x, t),
        lambda f: ft.jacrev(f, both)(*x),
        lambda f: ft.jacfwd(f, both)(*x),
        lambda f: ft.grad(lambda *x: f(*x)[0], both)(*x),
        lambda f: ft.hessian(lambda *x: squares(f(*x)), both)(*x),
        lambda f: ft.hessian(lambda *x: f(*x)[0], both)(*x),
        lambda f: ft.jacrev(ft.jacrev(lambda *x: squares(f(*x)), both), both)(*x),
        lambda f: ft.jvp(ft.grad(lambda *x: squares(f(*x)), both), x, t),
        lambda f: ft.vmap(f, (None, 0))(H, torch.stack((W, 2 * W))),
        lambda f: ft.vmap(ft.grad(lambda *x: f(*x)[0]), (0, None))(torch.stack((H, 2 * H)), W),
    )
    for transform in transforms:
        same(transform(ours), transform(theirs))


def test_forward_mode_by_duals() -> None:
    t = randn(T, C, seed=5)
    with fw.dual_level():
        pair = fw.unpack_dual(loss_of(fw.make_dual(H, t), W))
    same(tuple(pair), ft.jvp(lambda h: plain(h, W)[0], (H,), (t,)))


@pytest.mark.parametrize("dtype", [torch.float32, F64, *NARROW])
def test_a_backward_may_be_repeated_and_its_gradients_changed(dtype: Any) -> None:
    """The first one hands over memory; the others compute the same bits again."""
    h, w, b = parameters(*(t.to(dtype) for t in (H, W, B)))
    loss = loss_of(h, w, b)
    first = torch.autograd.grad(loss, (h, w, b), retain_graph=True)
    want = [g.clone() for g in first]
    for g in first:
        g.fill_(9)
    for g, right in zip(torch.autograd.grad(loss, (h, w, b)), want, strict=True):
        assert g.equal(right)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    for _ in range(2):
        loss_of(h, w, b).backward()
    assert w.grad.equal(want[1] + want[1])


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_a_scaled_loss_scales_its_gradients(dtype: Any) -> None:
    h, w = parameters(H.to(dtype), W.to(dtype))
    want = torch.autograd.grad(loss_of(h, w), (h, w))
    got = torch.autograd.grad(loss_of(h, w) * 1024, (h, w))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b * 1024, rtol=0.02, atol=1e-2)
    if dtype is not torch.float16:
        assert all(a.equal(b * 1024) for a, b in zip(got, want, strict=True))


def test_small_gradients_of_float16_survive_the_scale_of_the_loss() -> None:
    """Gradients of a mean over many tokens are below its smallest number until they are scaled."""
    h, w = parameters((1e-3 * randn(997, C)).half(), W.half())
    loss = loss_of(h, w, y=torch.zeros(997, dtype=torch.int64), softcap=1e-3)
    got = torch.autograd.grad(loss * 2.0**16, (h, w))
    wide = [t.detach().double().requires_grad_() for t in (h, w)]
    y = torch.zeros(997, dtype=torch.int64)
    want = torch.autograd.grad(plain(*wide, y=y, softcap=1e-3)[0] * 2.0**16, wide)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=1e-3 * float(b.abs().max()))


def test_what_a_backward_reads_is_not_overwritten_unseen() -> None:
    h, w = parameters(H, W)
    loss = loss_of(h * 1, w)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_cotangents_of_other_results_reach_the_inputs() -> None:
    """Also where the gradients of the loss are there already."""
    x, z = parameters(H, W, B), parameters(H, W, B)
    same(
        torch.autograd.grad(squares(door(*x, **ALL)), x),
        torch.autograd.grad(squares(plain(*z, **ALL)), z),
    )
    ours, theirs = door(*x, **ALL), plain(*z, **ALL)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        grads = torch.autograd.grad(squares(a), x, retain_graph=True)
        same(grads, torch.autograd.grad(squares(b), z, retain_graph=True))


@pytest.mark.parametrize("dtype", NARROW)
def test_16_bits_are_those_of_float32_rounded(dtype: Any) -> None:
    h, w, b = parameters(*(t.to(dtype) for t in (H, W, B)))
    wide = [t.detach().float().requires_grad_() for t in (h, w, b)]
    loss, want = loss_of(h, w, b, **{**ALL, "class_weight": None}), None
    want = loss_of(*wide, **{**ALL, "class_weight": None})
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for g, right in zip(
        torch.autograd.grad(loss, (h, w, b)), torch.autograd.grad(want, wide), strict=True
    ):
        assert g.dtype is dtype
        limit = 3 * torch.finfo(dtype).eps * float(right.abs().max())
        torch.testing.assert_close(g.float(), right, rtol=0, atol=limit)
    assert loss_of(h, w, b.float()).dtype is torch.float32


def test_autocast_casts_the_classifier() -> None:
    h, w = parameters(H.float(), W.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(h, w)
    assert loss.dtype is torch.float32
    assert loss.equal(loss_of(h.bfloat16(), w.bfloat16()))
    loss.backward()
    assert w.grad.dtype is torch.float32 and w.grad.isfinite().all()


def test_without_a_kept_token_all_is_zero() -> None:
    for h, y in ((H, torch.full((T,), -100)), (H[:0], Y[:0])):
        x = parameters(h, W, B)
        for reduction in ("mean", "sum", "none"):
            results = door(*x, y=y, **{**ALL, "reduction": reduction})
            loss = results[0]
            assert not loss.any() and not results[3].any()
            for g in torch.autograd.grad(loss.sum(), x, create_graph=True):
                assert not g.any()


def test_an_ignored_token_has_no_part() -> None:
    h = H.clone()
    h[Y == -100] = torch.nan
    a, b = parameters(h, W), parameters(H, W)
    for reduction in ("mean", "none"):
        la, lb = (loss_of(*x, reduction=reduction) for x in (a, b))
        assert la.equal(lb)
        ga, gb = (torch.autograd.grad(x.sum(), p) for x, p in zip((la, lb), (a, b), strict=True))
        assert ga[0].equal(gb[0]) and ga[1].equal(gb[1])


def test_third_derivatives_are_refused() -> None:
    def grad(f: Any) -> Any:
        return lambda h: ft.grad(lambda h: squares(f(h)))(h)

    with pytest.raises(tw.Unsupported, match="linear_cross_entropy: third derivatives"):
        grad(grad(grad(lambda h: loss_of(h, W))))(H)


# Tracing


def compiled(f: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    return torch.compile(f, backend="aot_eager", fullgraph=True, **how)


@pytest.mark.parametrize("options", ["nothing", "everything", "everything of each token"])
def test_compiled_functions_and_their_gradients(options: str) -> None:
    more = OPTIONS[options]
    for g in (door, loss_of):

        def f(*x: Any, g: Any = g) -> Any:
            return g(*x, **more)

        a, b = parameters(H, W, B), parameters(H, W, B)
        same(compiled(f)(*a), f(*b))
        same(
            torch.autograd.grad(squares(compiled(f)(*a)), a),
            torch.autograd.grad(squares(f(*b)), b),
        )
    with torch.no_grad():
        same(compiled(f)(H, W, B), f(H, W, B))


def test_one_graph_serves_all_sizes() -> None:
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    f = torch.compile(
        lambda h, y: loss_of(h, W, y=y, shift=1, return_lse=True), backend=count, dynamic=True
    )
    for n in (13, 17, 19):
        h, y = randn(n, n + 2, C), torch.arange(n * (n + 2)).reshape(n, n + 2) % V
        same(f(h, y), loss_of(h, W, y=y, shift=1, return_lse=True))
    assert graphs == 1


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_are_saved_and_still_differentiable(strict: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, h: Any, w: Any) -> Any:
            return door(h, w, **ALL)

    file = io.BytesIO()
    torch.export.save(torch.export.export(Module(), (H, W), strict=strict), file)
    file.seek(0)
    m, f = torch.export.load(file).module(), Module()
    same(m(H, W), f(H, W))
    same(ft.hessian(lambda h: squares(m(h, W)))(H), ft.hessian(lambda h: squares(f(h, W)))(H))


def test_shapes_without_values() -> None:
    h, w = H.to("meta").requires_grad_(), W.to("meta")
    loss = loss_of(h, w, y=Y.to("meta"))
    (g,) = torch.autograd.grad(loss, h, create_graph=True)
    assert torch.autograd.grad(squares(g), h)[0].shape == H.shape
    narrow = H.bfloat16(), W.bfloat16(), Y
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in narrow]
        r = linear_cross_entropy(*fakes, return_argmax=True, return_entropy=True, shift=1)
    assert r.loss.shape == () and r.loss.dtype is torch.float32
    assert r.argmax.shape == r.entropy.shape == (T - 1,) and r.argmax.dtype is torch.int64


OPS = torch.ops.tilewise


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("kind", ["forward", "vjp", "jvp", "vjp_jvp"])
def test_ops_pass_the_checks_of_pytorch(kind: str, asked: bool) -> None:
    options = (
        "{'ignore_index': -100, 'label_smoothing': 0.1, 'z_loss': 0.0, 'softcap': None, "
        "'reduction': 'mean', 'token_chunk': None, 'vocab_chunk': None, "
        f"'gradient_filter': None, 'lse': {asked}, 'entropy': {asked}, 'implementation': None}}"
    )
    x = parameters(H, W, B) if kind != "vjp_jvp" else [H, W, B]
    inputs = (*x, Y, COUNTS)
    every = [True] * 9
    found = OPS.linear_cross_entropy_forward(options, every, *inputs)
    loss, lse, entropy, _, *residuals = (t.detach() for t in found)
    y, t = (loss, lse, entropy), (H, W, B)
    base = (*inputs, *y, *residuals)
    given = {
        "forward": inputs,
        "vjp": (*y, *base),
        "jvp": (*t, *base),
        "vjp_jvp": (*y, *t, *y, None, None, None, *base),
    }[kind]
    results = 9 if kind == "forward" else 3
    op = getattr(OPS, f"linear_cross_entropy_{kind}").default
    torch.library.opcheck(op, (options, [True] * results, *given))


def test_inference_mode_and_no_grad() -> None:
    h, w = parameters(H, W)
    with torch.no_grad():
        assert not loss_of(h, w).requires_grad
    with torch.inference_mode():
        same(loss_of(h, w), loss_of(H, W))


# Errors

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "array": ({"hidden": np.ones(3)}, TypeError, "hidden must be a torch.Tensor, got ndarray"),
    "integers": (
        {"hidden": torch.ones(T, C, dtype=torch.int64)},
        TypeError,
        "hidden must have dtype float64, float32, bfloat16 or float16, got int64",
    ),
    "weight of another dtype": (
        {"weight": W.float()},
        TypeError,
        "weight must have dtype float64 (from hidden), got float32",
    ),
    "weight of another width": (
        {"weight": W[:, :2]},
        ValueError,
        "weight must have shape (V, C) with C=3 (from hidden), got (5, 2)",
    ),
    "weight without a class": (
        {"weight": W[:0]},
        ValueError,
        "weight must have shape (V, C) with 1 <= V",
    ),
    "bias of another size": (
        {"bias": B[:2]},
        ValueError,
        "bias must have shape (V,) with V=5 (from weight), got (2,)",
    ),
    "sparse": ({"weight": W.to_sparse()}, TypeError, "weight must be a dense tensor"),
    "weight elsewhere": ({"weight": W.to("meta")}, ValueError, "weight must be on cpu (as hidden)"),
    "targets elsewhere": (
        {"targets": Y.to("meta")},
        ValueError,
        "targets must be on cpu (as hidden)",
    ),
    "targets of a list": ({"targets": [1]}, TypeError, "targets must be a torch.Tensor, got list"),
    "targets of bool": (
        {"targets": Y > 0},
        TypeError,
        "targets must have an integer dtype up to int64, got bool",
    ),
    "targets of another shape": (
        {"targets": Y[:3]},
        ValueError,
        "targets must have shape (7,) (from hidden), got (3,)",
    ),
    "probabilities": (
        {"targets": torch.ones(T, V)},
        tw.Unsupported,
        "targets that are class probabilities would be as large as the logits",
    ),
    "target too large": (
        {"targets": torch.full((T,), V)},
        ValueError,
        "targets must be from 0 to 4, or ignore_index=-100, got 5",
    ),
    "target too small": ({"targets": torch.full((T,), -1)}, ValueError, "got -1"),
    "class weights of NaN": (
        {"class_weight": torch.full((V,), torch.nan, dtype=F64)},
        ValueError,
        "class_weight must be finite, got nan",
    ),
    "class weights of another size": (
        {"class_weight": COUNTS[:2]},
        ValueError,
        "class_weight must have shape (V,) with V=5 (from weight), got (2,)",
    ),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be from 0 to 1"),
    "z-loss": ({"z_loss": -1}, ValueError, "z_loss must be from 0 to 1e+06, got -1"),
    "softcap": ({"softcap": 0}, ValueError, "softcap must be from 1e-15 to 1e+15, got 0"),
    "softcap of text": ({"softcap": "1"}, TypeError, "softcap must be a real number, got str"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum'"),
    "no reduction": ({"reduction": None}, TypeError, "reduction must be a string, got NoneType"),
    "shift": ({"shift": -1}, ValueError, "shift must be from 0 to 2**63 - 1, got -1"),
    "chunk": ({"token_chunk": 0}, ValueError, "token_chunk must be from 1 to 2**63 - 1, got 0"),
    "filter": ({"gradient_filter": 2}, ValueError, "gradient_filter must be from 0 to 1, got 2"),
    "index": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got float"),
    "implementation": ({"implementation": "gpu"}, ValueError, "implementation must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_error_says_what_is_wrong(name: str) -> None:
    change, kind, text = BAD[name]
    with pytest.raises(kind, match=re.escape(text)) as caught:
        linear_cross_entropy(**({"hidden": H, "weight": W, "targets": Y} | change))
    assert str(caught.value).startswith("linear_cross_entropy: ")


def test_other_devices_are_unsupported() -> None:
    with FakeTensorMode(), pytest.raises(tw.Unsupported, match="no implementation for device xpu"):
        empty = torch.empty(2, 3, device="xpu")
        linear_cross_entropy(empty, empty, torch.zeros(2, dtype=torch.int64, device="xpu"))
