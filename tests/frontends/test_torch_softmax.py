"""Softmax in PyTorch: values, every derivative and transform, tracing, out, error texts."""

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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import tilewise as tw
from tilewise.torch import LogSoftmaxResult, SoftmaxResult, log_softmax, logsumexp, softmax

A, C, I = 2, 5, 3
F64 = torch.float64
FUNCTIONS = {"softmax": softmax, "log_softmax": log_softmax, "logsumexp": logsumexp}
NARROW = [torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


X, T = randn(A, C, I), randn(A, C, I, seed=1)
SEEN = torch.rand(A, C, I, generator=torch.Generator().manual_seed(2)) > 0.4
SINK = randn(A, 1, seed=3)
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "temperature": {"temperature": 0.4},
    "where": {"where": SEEN},
    "where of columns": {"where": SEEN[0, :, :1]},
    "sink of one number": {"sink": 0.5},
    "sinks": {"sink": SINK},
    "sinks of all rows": {"sink": randn(A, I, seed=3)},
    "everything": {"temperature": 1.5, "where": SEEN[:, :, :1], "sink": SINK},
}


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def plain(
    name: str,
    x: Any,
    dim: int = 1,
    *,
    temperature: float = 1.0,
    where: Any = None,
    sink: Any = None,
) -> Any:
    """The same mathematics in PyTorch's own operations, with 0 for the logarithm of 0."""
    s = x / temperature
    seen = torch.ones_like(x, dtype=torch.bool) if where is None else where.expand(x.shape)
    s = s.masked_fill(~seen, -1e300)
    rows = s
    if sink is not None:
        z = torch.as_tensor(sink, dtype=x.dtype).expand(s.select(dim, 0).shape)
        rows = torch.cat((s, z.unsqueeze(dim)), dim)
    # Not by logsumexp, whose tangents cannot be differentiated in reverse mode.
    top = rows.detach().amax(dim, keepdim=True)
    lse = (rows - top).exp().sum(dim, keepdim=True).log() + top
    log_y = torch.where(seen, s - lse, 0.0)
    y = torch.where(seen, (s - lse).exp(), 0.0)
    return {"softmax": y, "log_softmax": log_y, "logsumexp": lse.squeeze(dim)}[name]


def door(name: str, x: Any, *, where: Any = None, **options: Any) -> Any:
    """The result of a function, with 0 for the logarithm of 0, and lse."""
    if name == "logsumexp":
        return logsumexp(x, 1, where=where, **options)
    whole, lse = FUNCTIONS[name](x, 1, where=where, return_lse=True, **options)
    hidden = name == "log_softmax" and where is not None
    return (whole.masked_fill(~where, 0) if hidden else whole), lse


def squares(tree: Any) -> Any:
    return sum(t.square().sum() for t in torch.utils._pytree.tree_leaves(tree))


def problem(name: str, options: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function of x and, where it is a tensor, the sink."""
    more = dict(OPTIONS[options])
    sink = more.get("sink")
    if not isinstance(sink, torch.Tensor):
        return (lambda x: door(name, x, **more)), (X,)
    del more["sink"]
    return (lambda x, sink: door(name, x, sink=sink, **more)), (X, sink)


def parameters(tensors: Any) -> list[Any]:
    return [t.clone().requires_grad_() for t in tensors]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield


# Values


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_values_are_those_of_pytorch(dim: int) -> None:
    same(softmax(X, dim), torch.softmax(X, dim))
    same(log_softmax(X, dim), torch.log_softmax(X, dim))
    same(logsumexp(X, dim), torch.logsumexp(X, dim))
    same(logsumexp(X, dim, True), torch.logsumexp(X, dim, True))
    same(softmax(X, axis=dim), torch.softmax(X, axis=dim))
    same(logsumexp(X, axis=dim, keepdims=True), torch.logsumexp(X, axis=dim, keepdims=True))


@pytest.mark.parametrize("dim", [(0, 1), (0, 2), (2, 0), (0, 1, 2), None])
def test_several_dimensions_are_one_row(dim: Any) -> None:
    dims = tuple(range(3)) if dim is None else dim
    same(logsumexp(X, dim, keepdim=True), torch.logsumexp(X, dims, keepdim=True))
    same(softmax(X, dim), (X - torch.logsumexp(X, dims, keepdim=True)).exp())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_those_of_the_textbook(name: str, options: str) -> None:
    found = door(name, X, **OPTIONS[options])
    whole = found if name == "logsumexp" else found[0]
    same(whole, plain(name, X, **OPTIONS[options]))
    if name != "logsumexp":
        same(found[1], plain("logsumexp", X, **OPTIONS[options]))


@pytest.mark.parametrize("dtype", [torch.float32, F64, *NARROW])
def test_numpy_and_torch_have_the_same_bits(dtype: Any) -> None:
    x, where = torch.randn(7, 67, 5).to(dtype), torch.rand(7, 67, 1) > 0.3
    r = softmax(x, 1, where=where, sink=0.5, return_lse=True)
    assert r.y.dtype == dtype
    assert r.lse.dtype == (dtype if dtype.itemsize > 2 else torch.float32)
    if dtype is torch.bfloat16:
        array = x.view(torch.int16).numpy().view(tw.base.dtypes.bfloat16("softmax"))
    else:
        array = x.numpy()
    want = tw.numpy.softmax(array, 1, where=where.numpy(), sink=0.5, return_lse=True)
    bits = torch.int16 if dtype.itemsize == 2 else dtype
    assert r.y.view(bits).numpy().tobytes() == want.y.tobytes()
    assert r.lse.numpy().tobytes() == want.lse.tobytes()
    assert tw.softmax(x, 1, where=where, sink=0.5).equal(r.y)


def test_results_are_named_and_where_may_be_an_array() -> None:
    r = softmax(X, 1, where=SEEN.numpy(), return_lse=True)
    assert isinstance(r, SoftmaxResult)
    assert isinstance(log_softmax(X, 1, return_lse=True), LogSoftmaxResult)
    same(r.y, softmax(X, 1, where=SEEN))


def test_sizes_of_zero_and_tensors_without_dimensions() -> None:
    for x in (torch.tensor(3.0), torch.zeros(2, 0), torch.zeros(0, 3), torch.zeros(2, 1)):
        x.requires_grad_()
        for dim in (0, -1):
            same(softmax(x, dim), torch.softmax(x, dim))
            same(log_softmax(x, dim), torch.log_softmax(x, dim))
            lse = logsumexp(x, dim)
            same(lse, torch.logsumexp(x, dim))
            (grad,) = torch.autograd.grad(lse.sum() + softmax(x, dim).sum(), x)
            assert grad.shape == x.shape
    assert logsumexp(torch.zeros(2, 0), 1, sink=1.5).tolist() == [1.5, 1.5]


# Derivatives


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_of_both_orders_and_modes(name: str, options: str) -> None:
    f, x = problem(name, options)
    x = tuple(parameters(x))
    assert gradcheck(
        f, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(f, x, check_fwd_over_rev=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_transform_agrees_with_plain_pytorch(name: str) -> None:
    def ours(x: Any, sink: Any) -> Any:
        return FUNCTIONS[name](x, 1, temperature=1.5, sink=sink)

    def theirs(x: Any, sink: Any) -> Any:
        return plain(name, x, temperature=1.5, sink=sink)

    x, t = (X, SINK), (T, torch.ones_like(SINK))
    both = (0, 1)
    transforms: tuple[Callable[..., Any], ...] = (
        lambda f: ft.vjp(f, *x)[1](f(*x)),
        lambda f: ft.jvp(f, x, t),
        lambda f: ft.jacrev(f, both)(*x),
        lambda f: ft.jacfwd(f, both)(*x),
        lambda f: ft.hessian(lambda *x: squares(f(*x)), both)(*x),
        lambda f: ft.jacrev(ft.jacrev(lambda *x: squares(f(*x)), both), both)(*x),
        lambda f: ft.jvp(ft.grad(lambda *x: squares(f(*x)), both), x, t),
        lambda f: ft.vmap(f, (None, 0))(X, torch.stack((SINK, 2 * SINK))),
        lambda f: ft.vmap(ft.grad(lambda *x: squares(f(*x))), (0, None))(
            torch.stack((X, 2 * X)), SINK
        ),
    )
    for transform in transforms:
        same(transform(ours), transform(theirs))


def test_samples_with_a_mask_of_their_own_are_one_call() -> None:
    """With vmap over everything the samples become a part of A, also of a mask."""
    kinds: list[str] = []
    real = tw.dispatch.choose

    def counted(operator: str, *call: Any) -> Any:
        kinds.append(operator)
        return real(operator, *call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tw.dispatch, "choose", counted)
        got = ft.vmap(lambda x, w: softmax(x, where=w))(X, SEEN)
    assert kinds == ["softmax"]
    same(got, softmax(X, where=SEEN))


def test_forward_mode_over_backward_and_duals() -> None:
    with fw.dual_level():
        dual = fw.make_dual(X, T)
        y, ty = fw.unpack_dual(softmax(dual, 1))
    same((y, ty), ft.jvp(lambda x: torch.softmax(x, 1), (X,), (T,)))


def test_rows_without_entries_have_no_gradient() -> None:
    x, where = X.clone().requires_grad_(), SEEN.clone()
    where[1] = False
    with torch.no_grad():
        x[1, 2, 0] = math.nan
    for name, f in FUNCTIONS.items():
        out = f(x, 1, where=where)
        assert (out[1] == (0 if name == "softmax" else -math.inf)).all()
        weights = torch.randn_like(out)
        g = torch.autograd.grad(out, x, weights, create_graph=True)[0]
        assert not g[1].any() and g.isfinite().all()
        gg = torch.autograd.grad(g.sum(), x)[0]
        assert not gg[1].any() and gg.isfinite().all()


@pytest.mark.parametrize("dtype", NARROW)
def test_16_bits_are_computed_in_float32_and_rounded_once(dtype: Any) -> None:
    x, sink = X.to(dtype).requires_grad_(), SINK.to(dtype).requires_grad_()
    wide = [t.detach().float().requires_grad_() for t in (x, sink)]
    for f in (softmax, log_softmax, logsumexp):
        y, want = f(x, 1, sink=sink), f(wide[0], 1, sink=wide[1])
        assert y.equal(want if f is logsumexp else want.to(dtype))
        weights = torch.randn_like(y)
        grads = torch.autograd.grad(y, (x, sink), weights)
        wanted = torch.autograd.grad(want, wide, weights.float())
        for grad, right in zip(grads, wanted, strict=True):
            assert grad.equal(right.to(dtype))
    assert softmax(x, 1, sink=wide[1]).equal(softmax(x, 1, sink=sink))


def test_third_derivatives_are_refused() -> None:
    def grad(f: Any) -> Any:
        return lambda x: ft.grad(lambda x: squares(f(x)))(x)

    with pytest.raises(tw.Unsupported, match="log_softmax: third derivatives"):
        grad(grad(grad(lambda x: log_softmax(x, 1))))(X)


# Tracing


def compiled(f: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    return torch.compile(f, backend="aot_eager", fullgraph=True, **how)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_functions_and_their_gradients(name: str) -> None:
    f, x = problem(name, "everything")
    same(compiled(f)(*x), f(*x))
    a, b = parameters(x), parameters(x)
    same(torch.autograd.grad(squares(compiled(f)(*a)), a), torch.autograd.grad(squares(f(*b)), b))


def test_dimensions_and_forward_mode_compile() -> None:
    for dim in (-1, 0, (0, 2), None):
        same(compiled(lambda x, dim=dim: softmax(x, dim))(X), softmax(X, dim))
    same(
        compiled(lambda x, t: ft.jvp(lambda x: softmax(x, 1), (x,), (t,)))(X, T),
        ft.jvp(lambda x: torch.softmax(x, 1), (X,), (T,)),
    )
    same(compiled(lambda x: tw.softmax(x, 1))(X), torch.softmax(X, 1))
    out = torch.empty_like(X)
    compiled(lambda x, out: softmax(x, 1, out=out))(X, out)
    same(out, torch.softmax(X, 1))


def test_one_graph_serves_all_sizes() -> None:
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    f = torch.compile(lambda x: softmax(x, 1, sink=0.5), backend=count, dynamic=True)
    for n in (13, 17, 19):
        x = randn(n, n + 2, 3)
        same(f(x), softmax(x, 1, sink=0.5))
    assert graphs == 1


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_are_saved_and_still_differentiable(strict: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Any, sink: Any) -> Any:
            return tuple(log_softmax(x, 1, sink=sink, return_lse=True))

    file = io.BytesIO()
    torch.export.save(torch.export.export(Module(), (X, SINK), strict=strict), file)
    file.seek(0)
    m, f = torch.export.load(file).module(), Module()
    same(m(X, SINK), f(X, SINK))
    same(ft.hessian(lambda x: squares(m(x, SINK)))(X), ft.hessian(lambda x: squares(f(x, SINK)))(X))


def test_shapes_without_values() -> None:
    x = X.to("meta").requires_grad_()
    y = softmax(x, 1, sink=0.5)
    (g,) = torch.autograd.grad(squares(y), x, create_graph=True)
    assert torch.autograd.grad(squares(g), x)[0].shape == X.shape
    with FakeTensorMode() as mode:
        x = mode.from_tensor(X).requires_grad_()
        r = log_softmax(x, (0, 2), where=mode.from_tensor(SEEN), return_lse=True)
        (g,) = torch.autograd.grad(squares(r), x)
    assert r.log_y.shape == g.shape == X.shape and r.lse.shape == (C,)


OPS = torch.ops.tilewise


@pytest.mark.parametrize("kind", ["forward", "vjp", "jvp", "vjp_jvp"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_ops_pass_the_checks_of_pytorch(name: str, kind: str) -> None:
    options = "{'temperature': 1.5, 'implementation': None}"
    x, sink = X.clone(), randn(A, I, seed=3)
    if kind != "vjp_jvp":
        x.requires_grad_()
        sink.requires_grad_()
    inputs = (x, sink, SEEN)
    count = 3 if name == "logsumexp" else 4
    found = getattr(OPS, f"{name}_forward")(options, [True] * count, *inputs)
    *outputs, m, log_l = (t.detach() for t in found)
    base, t = (*inputs, *outputs, m, log_l), (T, randn(A, I, seed=4))
    given = {
        "forward": inputs,
        "vjp": (*outputs, *base),
        "jvp": (*t, *base),
        "vjp_jvp": (*outputs, *t, *outputs, *[None] * len(outputs), *base),
    }[kind]
    results = {"forward": count, "jvp": len(outputs)}.get(kind, 2)
    op = getattr(OPS, f"{name}_{kind}").default
    torch.library.opcheck(op, (options, [True] * results, *given))


# Memory


@pytest.mark.parametrize("dtype", [F64, torch.float32, *NARROW])
def test_results_are_written_into_out_and_in_place(dtype: Any) -> None:
    for f in (softmax, log_softmax):
        x = X.to(dtype)
        want = f(x, 1, sink=0.5, return_lse=True)
        out = torch.empty_like(x)
        version = out._version
        r = f(x, 1, sink=0.5, return_lse=True, out=out)
        assert r[0] is out and out._version > version
        assert out.equal(want[0]) and r.lse.equal(want.lse)
        assert f(x, 1, sink=0.5, out=x) is x
        assert x.equal(want[0])


def test_what_is_saved_for_a_backward_is_not_overwritten_unseen() -> None:
    x = X.clone().requires_grad_()
    y = x * 1
    z = y.square()
    with torch.no_grad():
        softmax(y, 1, out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_inference_mode_and_no_grad() -> None:
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert not softmax(x, 1).requires_grad
    with torch.inference_mode():
        y = torch.empty_like(X)
        same(softmax(x, 1, out=y), torch.softmax(X, 1))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "array": ({"x": np.ones(3)}, TypeError, "x must be a torch.Tensor, got ndarray"),
    "integers": (
        {"x": torch.ones(3, dtype=torch.int64)},
        TypeError,
        "x must have dtype float64, float32, bfloat16 or float16, got int64",
    ),
    "sparse": ({"x": torch.eye(3).to_sparse()}, TypeError, "x must be a dense tensor"),
    "dim": ({"dim": 3}, ValueError, "dim must be from -3 to 2, for x has 3 dimensions, got 3"),
    "dim of text": ({"dim": "a"}, TypeError, "dim must be an integer or a tuple of integers"),
    "dim twice": ({"dim": (0, -3)}, ValueError, "dim must have no axis twice, got (0, -3)"),
    "no temperature": ({"temperature": 0}, ValueError, "temperature must be > 0, got 0"),
    "temperature of a tensor": (
        {"temperature": torch.tensor(1.0)},
        TypeError,
        "temperature must be a real number, got Tensor",
    ),
    "where of numbers": ({"where": X}, TypeError, "where must have dtype bool, got float64"),
    "where of a list": ({"where": [True]}, TypeError, "where must be a boolean tensor, got list"),
    "where of another size": (
        {"where": SEEN[:, :2]},
        ValueError,
        "where must broadcast to the shape (2, 5, 3) of x, got (2, 2, 3)",
    ),
    "where elsewhere": ({"where": SEEN.to("meta")}, ValueError, "where must be on cpu (as x)"),
    "sink of text": ({"sink": "0"}, TypeError, "sink must be a number or"),
    "infinite sink": ({"sink": math.inf}, ValueError, "sink must be finite or -inf, got inf"),
    "sinks with NaN": (
        {"sink": torch.full((I,), math.nan, dtype=F64)},
        ValueError,
        "sink must be finite or -inf, got nan",
    ),
    "sinks of another dtype": (
        {"sink": torch.ones(I)},
        TypeError,
        "sink must have dtype float64 (from x), got float32",
    ),
    "sinks of another size": (
        {"sink": randn(C)},
        ValueError,
        "sink must broadcast to the shape (2, 3) of the rows, got (5,)",
    ),
    "out of another dtype": (
        {"out": X.float()},
        TypeError,
        "out must have dtype float64 (from x), got float32",
    ),
    "out of another shape": (
        {"out": X[0]},
        ValueError,
        "out must have shape (2, 5, 3) (from x), got (5, 3)",
    ),
    "out with a gradient": (
        {"out": torch.empty_like(X), "x": X.clone().requires_grad_()},
        ValueError,
        "out must be None where a derivative may be asked for, got a tensor",
    ),
    "out that is a part of x": (
        {"x": X[:1].expand(2, C, I)[:, :, :2], "out": X[:, :, 1:]},
        ValueError,
        "out must be x itself or not overlap it",
    ),
    "implementation": ({"implementation": "gpu"}, ValueError, "implementation must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_error_says_what_is_wrong(name: str) -> None:
    change, kind, text = BAD[name]
    for function in (softmax, log_softmax):
        with pytest.raises(kind, match=re.escape(text)) as caught:
            function(**({"x": X, "dim": 1} | change))
        assert str(caught.value).startswith(f"{function.__name__}: ")


def test_both_names_of_the_dimension_are_refused() -> None:
    with pytest.raises(TypeError, match="got both dim and axis"):
        softmax(X, 1, axis=2)


def test_other_devices_are_unsupported() -> None:
    with FakeTensorMode(), pytest.raises(tw.Unsupported, match="no implementation for device xpu"):
        softmax(torch.empty(2, 3, device="xpu"), 1)
