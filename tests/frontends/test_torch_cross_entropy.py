"""The cross-entropy in PyTorch: values, every derivative and transform, tracing, in place."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.func as ft
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import tilewise as tw
from tilewise.torch import CrossEntropyResult, cross_entropy

N, V, D = 3, 5, 2
F64 = torch.float64
NARROW = [torch.bfloat16, torch.float16]
KINDS = ["indices", "probabilities"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, dtype=F64, generator=generator(seed))


X, T = 2 * randn(N, V), randn(N, V, seed=1)
Y = torch.tensor([3, -100, 0])
Q = torch.rand(N, V, dtype=F64, generator=generator(2))
W = torch.rand(V, dtype=F64, generator=generator(3)) + 0.5
TARGETS = {"indices": Y, "probabilities": Q}
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "sum with smoothing": {"label_smoothing": 0.2, "reduction": "sum"},
    "weighted mean": {"weight": W, "label_smoothing": 0.1},
    "rows with z-loss": {"z_loss": 0.1, "reduction": "none"},
    "mean with softcap": {"softcap": 1.5},
    "everything": {"label_smoothing": 0.3, "z_loss": 0.05, "softcap": 3.0, "weight": W},
    "everything of rows": {
        "label_smoothing": 0.3, "z_loss": 0.05, "softcap": 3.0, "weight": W, "reduction": "none",
    },
}  # fmt: skip


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def door(x: Any, targets: Any, **options: Any) -> tuple[Any, ...]:
    return tuple(cross_entropy(x, targets, return_lse=True, return_z_loss=True, **options))


def plain(
    x: Any,
    targets: Any,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    weight: Any = None,
    label_smoothing: float = 0.0,
) -> tuple[Any, ...]:
    """The same mathematics in PyTorch's own operations."""
    s = x if softcap is None else softcap * torch.tanh(x / softcap)
    # Not by logsumexp, whose tangents cannot be differentiated in reverse mode.
    top = s.detach().amax(-1)
    lse = (s - top[..., None]).exp().sum(-1).log() + top
    w = torch.ones_like(x[0]) if weight is None else weight
    if targets.is_floating_point():
        q, kept, count = targets, torch.ones_like(lse), torch.tensor(float(lse.numel()))
    else:
        kept = (targets != -100).to(x.dtype)
        at = targets.clamp(min=0)
        q, count = nn.functional.one_hot(at, x.shape[-1]).to(x.dtype), (w[at] * kept).sum()
    t = w * ((1 - label_smoothing) * q + label_smoothing / x.shape[-1])
    z = kept * z_loss * lse.square()
    loss = kept * (t * (lse[..., None] - s)).sum(-1) + z
    if reduction == "none":
        return loss, lse, z
    scale = 1 / count.to(x.dtype) if reduction == "mean" else 1
    return loss.sum() * scale, lse, z.sum() * scale


def squares(tree: Any) -> Any:
    return sum(t.square().sum() for t in torch.utils._pytree.tree_leaves(tree))


def problem(kind: str, options: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function of the logits and, where they are that, the class probabilities."""
    more = OPTIONS[options]
    if kind == "indices":
        return (lambda x: door(x, Y, **more)), (X,)
    return (lambda x, q: door(x, q, **more)), (X, Q)


def parameters(tensors: Any) -> tuple[Any, ...]:
    return tuple([t.clone().requires_grad_() for t in tensors])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield


# Values


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, W])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_pytorch(
    kind: str, weight: Any, smoothing: float, reduction: Any
) -> None:
    """In PyTorch's layout, where the classes are the second dimension."""
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    x = randn(N, V, D).requires_grad_()
    if kind == "indices":
        targets = torch.randint(0, V, (N, D), generator=generator(4))
        targets[1, 1] = -100
    else:
        targets = torch.rand(N, V, D, dtype=F64).requires_grad_()
    ours = cross_entropy(x, targets, class_axis=1, **options)
    theirs = nn.functional.cross_entropy(x, targets, **options)
    same(ours, theirs)
    wanted = (x,) if kind == "indices" else (x, targets)
    g = torch.randn_like(ours)
    same(torch.autograd.grad(ours, wanted, g), torch.autograd.grad(theirs, wanted, g))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_options_are_those_of_the_textbook(options: str, kind: str) -> None:
    same(door(X, TARGETS[kind], **OPTIONS[options]), plain(X, TARGETS[kind], **OPTIONS[options]))


@pytest.mark.parametrize("dtype", [torch.float32, F64, *NARROW])
@pytest.mark.parametrize("kind", KINDS)
def test_numpy_and_torch_have_the_same_bits(kind: str, dtype: Any) -> None:
    x = torch.randn(7, 67, D, generator=generator(5)).to(dtype)
    y = torch.randint(0, 67, (7, D), generator=generator(6))
    q = torch.rand(7, 67, D, generator=generator(7)).to(dtype)
    targets = {"indices": y, "probabilities": q}[kind]
    r = cross_entropy(x, targets, class_axis=1, reduction="none", return_lse=True)
    assert isinstance(r, CrossEntropyResult) and r.z_loss is None
    assert r.loss.dtype == r.lse.dtype == (dtype if dtype.itemsize > 2 else torch.float32)

    def array(t: Any) -> Any:
        if t.dtype is not torch.bfloat16:
            return t.numpy()
        return t.view(torch.int16).numpy().view(tw.base.dtypes.bfloat16("cross_entropy"))

    more = {"class_axis": 1, "reduction": "none", "return_lse": True}
    want = tw.numpy.cross_entropy(array(x), array(targets), **more)
    for a, b in zip(r[:2], want[:2], strict=True):
        assert a.numpy().tobytes() == b.tobytes()
    assert tw.cross_entropy(x, targets, class_axis=1, reduction="none").equal(r.loss)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_at_least_as_exact_as_those_of_pytorch(
    dtype: Any, smoothing: float
) -> None:
    """Against float64 on the same logits, with a z-loss of 0 and rows of different sizes."""
    x = (torch.randn(31, 1009, generator=generator(8)) * torch.logspace(-2, 2, 31)[:, None]).to(
        dtype
    )
    y = torch.randint(0, 1009, (31,), generator=generator(9))
    errors: dict[str, list[float]] = {}
    exact: list[Any] = []
    for name, f, z in (
        ("exact", nn.functional.cross_entropy, x.double()),
        ("ours", cross_entropy, x),
        ("theirs", nn.functional.cross_entropy, x.float()),
    ):
        z = z.clone().requires_grad_()
        loss = f(z, y, reduction="none", label_smoothing=smoothing)
        (dz,) = torch.autograd.grad(loss.sum(), z)
        found = [loss.detach().double(), dz.double()]
        exact = exact or found
        errors[name] = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    # plus one rounding of the result
    assert errors["ours"][0] <= errors["theirs"][0] + 2**-24
    assert errors["ours"][1] <= errors["theirs"][1] + torch.finfo(dtype).eps / 2


def test_empty_batches_and_rows_that_do_not_count() -> None:
    for x, y in ((torch.zeros(0, 3), torch.zeros(0)), (torch.ones(2, 3), torch.full((2,), -100))):
        x.requires_grad_()
        for reduction in ("none", "sum", "mean"):
            loss = cross_entropy(x, y.long(), reduction=reduction, z_loss=0.1)
            assert not loss.any()
            (g,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
            assert g.shape == x.shape and not g.any()
            assert not torch.autograd.grad(g.sum(), x)[0].any()


# Derivatives


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_both_orders_and_modes(kind: str, options: str) -> None:
    f, x = problem(kind, options)
    x = parameters(x)
    assert gradcheck(
        f, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(f, x, check_fwd_over_rev=True)


@pytest.mark.parametrize("options", ["weighted mean", "everything of rows"])
def test_every_transform_agrees_with_plain_pytorch(options: str) -> None:
    def ours(x: Any, q: Any) -> Any:
        return door(x, q, **OPTIONS[options])

    def theirs(x: Any, q: Any) -> Any:
        return plain(x, q, **OPTIONS[options])

    x, t, both = (X, Q), (T, 0.1 * T), (0, 1)
    transforms: tuple[Callable[..., Any], ...] = (
        lambda f: ft.vjp(f, *x)[1](f(*x)),
        lambda f: ft.jvp(f, x, t),
        lambda f: ft.jacrev(f, both)(*x),
        lambda f: ft.jacfwd(f, both)(*x),
        lambda f: ft.hessian(lambda *x: squares(f(*x)), both)(*x),
        lambda f: ft.jacrev(ft.jacrev(lambda *x: squares(f(*x)), both), both)(*x),
        lambda f: ft.jvp(ft.grad(lambda *x: squares(f(*x)), both), x, t),
        lambda f: ft.vmap(f, (None, 0))(X, torch.stack((Q, 2 * Q))),
        lambda f: ft.vmap(ft.grad(lambda *x: squares(f(*x))), (0, None))(
            torch.stack((X, 2 * X)), Q
        ),
    )
    for transform in transforms:
        same(transform(ours), transform(theirs))


def test_gradients_of_samples_by_vmap() -> None:
    """Over logits and class indices together, with a mean over the tokens of each sample."""
    x, y = randn(4, N, V), torch.randint(0, V, (4, N), generator=generator(10))
    y[2] = -100
    got = ft.vmap(ft.grad(cross_entropy))(x, y)
    for k in (0, 1, 3):
        same(got[k], ft.grad(lambda x, k=k: nn.functional.cross_entropy(x, y[k]))(x[k]))
    assert not got[2].any()


def test_rows_of_samples_are_one_call() -> None:
    """Without a reduction the samples become a part of A."""
    kinds: list[str] = []
    real = tw.dispatch.choose

    def counted(operator: str, *call: Any) -> Any:
        kinds.append(operator)
        return real(operator, *call)

    x, y = randn(4, N, V), torch.randint(0, V, (4, N), generator=generator(10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tw.dispatch, "choose", counted)
        got = ft.vmap(lambda x, y: cross_entropy(x, y, reduction="none"))(x, y)
    assert kinds == ["cross_entropy"]
    same(got, cross_entropy(x, y, reduction="none"))


def test_duals_and_forward_mode() -> None:
    with fw.dual_level():
        loss, t = fw.unpack_dual(cross_entropy(fw.make_dual(X, T), Y))
    same((loss, t), ft.jvp(lambda x: plain(x, Y)[0], (X,), (T,)))


def test_an_ignored_row_has_no_gradient_even_with_nan() -> None:
    x = X.clone()
    x[1] = math.nan
    x.requires_grad_()
    for options in OPTIONS.values():
        loss = cross_entropy(x, Y, **options)
        (g,) = torch.autograd.grad(loss.square().sum(), x, create_graph=True)
        assert loss.isfinite().all() and g.isfinite().all() and not g[1].any()
        (gg,) = torch.autograd.grad(g.square().sum(), x)
        assert gg.isfinite().all() and not gg[1].any()


@pytest.mark.parametrize("dtype", NARROW)
def test_16_bits_are_computed_in_float32_and_gradients_rounded_once(dtype: Any) -> None:
    for targets in (Y, Q.to(dtype), Q.float()):
        given = [X.to(dtype).requires_grad_()]
        wide = [given[0].detach().float().requires_grad_()]
        at, wide_at = targets, targets
        if targets.is_floating_point():
            at = targets.clone().requires_grad_()
            wide_at = targets.detach().float().requires_grad_()
            given.append(at)
            wide.append(wide_at)
        for weight in (W.to(dtype), W.to(dtype).float()):
            loss = cross_entropy(given[0], at, weight=weight)
            want = cross_entropy(wide[0], wide_at, weight=weight.float())
            assert loss.equal(want)
            grads, right = torch.autograd.grad(loss, given), torch.autograd.grad(want, wide)
            for a, b, t in zip(grads, right, given, strict=True):
                assert a.dtype == t.dtype and a.equal(b.to(t.dtype))


def test_third_derivatives_are_refused() -> None:
    def grad(f: Any) -> Any:
        return lambda x: ft.grad(lambda x: squares(f(x)))(x)

    with pytest.raises(tw.Unsupported, match="cross_entropy: third derivatives"):
        grad(grad(grad(lambda x: cross_entropy(x, Y))))(X)


# Over the logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F64, torch.float32, *NARROW])
def test_the_gradient_takes_the_memory_of_the_logits(dtype: Any, kind: str) -> None:
    targets = TARGETS[kind] if kind == "indices" else Q.to(dtype)
    for name, axis in (("everything", -1), ("everything of rows", 0)):
        options = {k: v for k, v in OPTIONS[name].items() if k != "weight"}
        x = (X if axis else X.mT).to(dtype).clone().requires_grad_()
        q = targets if kind == "indices" else (targets if axis else targets.mT)
        if kind == "probabilities":
            q = q.clone().requires_grad_()
        wanted = (x,) if kind == "indices" else (x, q)
        want = door(x, q, class_axis=axis, **options)
        logits = x * 1
        version = logits._version
        found = door(logits, q, class_axis=axis, inplace_backward=True, **options)
        for a, b in zip(found, want, strict=True):
            assert a.equal(b) and a.dtype == b.dtype
        g = [torch.randn_like(t) for t in want]
        right = torch.autograd.grad(want, wanted, g)
        # x * 1 hands its gradient on, so that the memory can be told
        seen: list[Any] = []
        logits.register_hook(seen.append)
        got = torch.autograd.grad(found, wanted, g)
        for a, b in zip(got, right, strict=True):
            assert a.equal(b)
        assert seen[0].data_ptr() == logits.data_ptr() and logits._version > version
        assert logits.detach().equal(right[0])


def test_logits_that_something_else_saved_are_not_overwritten_unseen() -> None:
    x = X.clone().requires_grad_()
    logits = x * 1
    # what was computed first has its backward last
    square = logits.square().sum()
    loss = square + cross_entropy(logits, Y, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_that_changed_between_the_passes_are_noticed() -> None:
    logits = X.clone().requires_grad_() * 1
    loss = cross_entropy(logits, Y, inplace_backward=True)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_backward_over_the_logits_is_refused() -> None:
    x = X.clone().requires_grad_()
    loss = cross_entropy(x * 1, Y, inplace_backward=True)
    with pytest.raises(tw.Unsupported, match="no second derivatives with inplace_backward=True"):
        torch.autograd.grad(loss, x, create_graph=True)
    loss = cross_entropy(x * 1, Y, inplace_backward=True)
    torch.autograd.grad(loss, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)


def test_where_the_logits_cannot_be_overwritten_that_is_said() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="inplace_backward must be False where the logits are a l"):
        cross_entropy(x, Y, inplace_backward=True)
    with pytest.raises(ValueError, match="out must not overlap itself"):
        cross_entropy((x[:1] * 1).expand(N, V), Y, inplace_backward=True)
    with pytest.raises(tw.Unsupported, match="inplace_backward=True is not served under transform"):
        ft.grad(lambda x: cross_entropy(x * 1, Y, inplace_backward=True))(X)
    with fw.dual_level(), pytest.raises(tw.Unsupported, match="no forward mode"):
        cross_entropy(fw.make_dual(x * 1, T), Y, inplace_backward=True)
    with pytest.raises(tw.Unsupported, match="no batched gradients"):
        rows = cross_entropy(x * 1, Y, reduction="none", inplace_backward=True)
        torch.autograd.grad(rows, x, torch.eye(N, dtype=F64), is_grads_batched=True)
    with torch.no_grad():
        same(cross_entropy(x, Y, inplace_backward=True), cross_entropy(x, Y))


# Tracing


def compiled(f: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    return torch.compile(f, backend="aot_eager", fullgraph=True, **how)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_functions_and_their_gradients(kind: str) -> None:
    f, x = problem(kind, "everything")
    same(compiled(f)(*x), f(*x))
    a, b = parameters(x), parameters(x)
    same(torch.autograd.grad(squares(compiled(f)(*a)), a), torch.autograd.grad(squares(f(*b)), b))


def test_forward_mode_and_the_package_compile() -> None:
    same(
        compiled(lambda x, t: ft.jvp(lambda x: cross_entropy(x, Y), (x,), (t,)))(X, T),
        ft.jvp(lambda x: plain(x, Y)[0], (X,), (T,)),
    )
    same(
        compiled(lambda x, y: tw.cross_entropy(x, y, z_loss=0.1))(X, Y), plain(X, Y, z_loss=0.1)[0]
    )


def test_one_graph_serves_all_sizes() -> None:
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    f = torch.compile(lambda x, y: cross_entropy(x, y, z_loss=0.1), backend=count, dynamic=True)
    for n in (13, 17, 19):
        x, y = randn(n, n + 2), torch.arange(n)
        same(f(x, y), cross_entropy(x, y, z_loss=0.1))
    assert graphs == 1


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_exported_programs_are_saved_and_still_differentiable() -> None:
    class Module(nn.Module):
        def forward(self, x: Any, y: Any) -> Any:
            return door(x, y, z_loss=0.1)

    file = io.BytesIO()
    torch.export.save(torch.export.export(Module(), (X, Y)), file)
    file.seek(0)
    m, f = torch.export.load(file).module(), Module()
    same(m(X, Y), f(X, Y))
    same(ft.hessian(lambda x: squares(m(x, Y)))(X), ft.hessian(lambda x: squares(f(x, Y)))(X))


def test_shapes_without_values() -> None:
    x = X.to("meta").requires_grad_()
    loss = cross_entropy(x, Y.to("meta"))
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.autograd.grad(squares(g), x)[0].shape == X.shape
    half = X.half()
    with FakeTensorMode() as mode:
        x = mode.from_tensor(half).requires_grad_()
        r = cross_entropy(x, mode.from_tensor(Y), reduction="none", return_lse=True)
        (g,) = torch.autograd.grad(squares(r[:2]), x)
    assert r.loss.shape == r.lse.shape == (N,) and r.loss.dtype is torch.float32
    assert g.shape == X.shape and g.dtype is torch.float16


@pytest.mark.parametrize("kind", ["forward", "vjp", "jvp", "vjp_jvp"])
def test_ops_pass_the_checks_of_pytorch(kind: str) -> None:
    options = repr(
        {"ignore_index": -100, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0,
         "reduction": "mean", "implementation": None}
    )  # fmt: skip
    x, q = X[:, :, None].clone(), Q[:, :, None].clone()
    if kind != "vjp_jvp":
        x.requires_grad_()
        q.requires_grad_()
    inputs = (x, q, None, W)
    found = torch.ops.tilewise.cross_entropy_forward(options, [True] * 6, *inputs)
    *outputs, m, log_l, total = (t.detach() for t in found)
    base, t = (*inputs, *outputs, m, log_l, total), (T[:, :, None], T[:, :, None])
    given = {
        "forward": inputs,
        "vjp": (*outputs, *base),
        "jvp": (*t, *base),
        "vjp_jvp": (*outputs, *t, *outputs, None, None, None, *base),
    }[kind]
    results = {"forward": 6, "jvp": 3}.get(kind, 2)
    op = getattr(torch.ops.tilewise, f"cross_entropy_{kind}").default
    torch.library.opcheck(op, (options, [True] * results, *given))


# Errors


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "array": ({"logits": np.ones(3)}, TypeError, "logits must be a torch.Tensor, got ndarray"),
    "integers": (
        {"logits": Y[:, None]},
        TypeError,
        "logits must have dtype float64, float32, bfloat16 or float16, got int64",
    ),
    "sparse": ({"logits": torch.eye(3).to_sparse()}, TypeError, "logits must be a dense tensor"),
    "scalar": ({"logits": X[0, 0]}, ValueError, "logits must have a dimension of classes, got ()"),
    "no classes": ({"logits": X[:, :0]}, ValueError, "logits must have at least one class"),
    "axis": ({"class_axis": 2}, ValueError, "class_axis must be from -2 to 1, for logits has 2"),
    "targets of an array": ({"targets": np.ones(3)}, TypeError, "targets must be a torch.Tensor"),
    "boolean targets": (
        {"targets": Y > 0},
        TypeError,
        "targets must hold class indices (integers) or class probabilities (floats), got bool",
    ),
    "index too large": (
        {"targets": Y + 3},
        ValueError,
        "targets must be from 0 to 4 or ignore_index (-100), got 6",
    ),
    "indices of another shape": ({"targets": Y[:2]}, ValueError, "targets must have shape (3,) as"),
    "probabilities of another shape": (
        {"targets": Q[:, :2]},
        ValueError,
        "targets must have shape (3, 5) as class probabilities",
    ),
    "probabilities of another dtype": (
        {"targets": Q.float()},
        TypeError,
        "targets must have dtype float64 (from logits), got float32",
    ),
    "targets elsewhere": (
        {"targets": Y.to("meta")},
        ValueError,
        "targets must be on cpu (as logits), got meta",
    ),
    "weight of a list": ({"weight": [1.0]}, TypeError, "weight must be a torch.Tensor, got list"),
    "weight of another size": (
        {"weight": W[:2]},
        ValueError,
        "weight must have shape (5,) (from the classes), got (2,)",
    ),
    "weight with a gradient": (
        {"weight": W.clone().requires_grad_()},
        ValueError,
        "weight must be without requires_grad, for it has no gradient",
    ),
    "infinite weight": ({"weight": W / 0}, ValueError, "weight must be finite, got inf"),
    "smoothing": ({"label_smoothing": -0.5}, ValueError, "label_smoothing must be from 0 to 1"),
    "softcap of a tensor": (
        {"softcap": torch.tensor(1.0)},
        TypeError,
        "softcap must be a real number, got Tensor",
    ),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be 'none', 'sum' or 'mean'"),
    "implementation": ({"implementation": "gpu"}, ValueError, "implementation must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_error_says_what_is_wrong(name: str) -> None:
    change, kind, text = BAD[name]
    with pytest.raises(kind, match=re.escape(text)) as caught:
        cross_entropy(**({"logits": X, "targets": Y} | change))
    assert str(caught.value).startswith("cross_entropy: ")


def test_other_devices_are_unsupported() -> None:
    with FakeTensorMode(), pytest.raises(tw.Unsupported, match="no implementation for device xpu"):
        cross_entropy(torch.empty(2, 3, device="xpu"), torch.zeros(2, device="xpu").long())
