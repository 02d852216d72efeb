"""Attention where PyTorch traces it: compile, export, fake tensors, the checks of its ops."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.func as ft
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import tilewise as tw
from tilewise.torch import attention

B, H, HK, N, NK, D, DV = 2, 4, 2, 3, 5, 7, 11
F64 = torch.float64
SHAPES = ((B, H, N, D), (B, HK, NK, D), (B, HK, NK, DV), (H, N, NK), (H,))
MASK = tw.causal() & tw.lengths([5, 3])
BOOL = torch.rand(B, 1, N, NK, generator=torch.Generator().manual_seed(9)) > 0.3


def randn(*shape: int, seed: int) -> Any:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


X = tuple(randn(*shape, seed=i) for i, shape in enumerate(SHAPES))
T = tuple(randn(*shape, seed=10 + i) for i, shape in enumerate(SHAPES))


def door(q: Any, k: Any, v: Any, bias: Any = None, sinks: Any = None, **options: Any) -> Any:
    more = {"mask": tw.causal(), **options}
    r = attention(q, k, v, bias=bias, sinks=sinks, softcap=2.0, **more, return_lse=True)
    return r.o, r.lse


def squares(tree: Any) -> Any:
    return sum(t.square().sum() for t in torch.utils._pytree.tree_leaves(tree))


def loss(*x: Any) -> Any:
    return squares(door(*x))


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def parameters(tensors: Any = X) -> list[Any]:
    return [t.clone().requires_grad_() for t in tensors]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def compiled(f: Callable[..., Any], backend: str = "aot_eager", **how: Any) -> Callable[..., Any]:
    return torch.compile(f, backend=backend, fullgraph=True, **how)


class Count:
    """A backend that counts the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph


# Masks made outside of a compiled function, or inside of it from numbers alone.
MASKS: dict[str, Callable[[], Any]] = {
    "of numbers": lambda: tw.causal() & (tw.window(2, 0) | tw.sink_tokens(1)) | tw.chunked(2),
    "of arrays": lambda: MASK,
    "documents": lambda: tw.documents(ids=[1, 2, 1], ids_k=[[1, 2, 1, 2, 1], [2, 2, 1, 3, 1]]),
    "dense": lambda: tw.dense(BOOL.numpy()),
    "tensor": lambda: BOOL,
    "array": lambda: BOOL.numpy(),
}


@pytest.mark.parametrize("name", MASKS)
def test_compiled_functions_take_masks(name: str) -> None:
    mask = MASKS[name]()
    want = door(*X, mask=mask)
    same(compiled(lambda *x: door(*x, mask=mask))(*X), want)
    same(compiled(lambda mask, *x: door(*x, mask=mask))(mask, *X), want)


def test_masks_of_numbers_are_made_inside_compiled_functions() -> None:
    def f(*x: Any) -> Any:
        return door(*x, mask=MASKS["of numbers"]())

    same(compiled(f)(*X), f(*X))


def test_function_of_the_package_compiles() -> None:
    def f(*x: Any) -> Any:
        return tw.attention(*x, mask=tw.causal())

    same(compiled(f)(*X[:3]), f(*X[:3]))


def mean_flow_step(*x: Any) -> Any:
    u, du = ft.jvp(lambda q: door(q, *x[1:])[0], x[:1], T[:1])
    return (u - du.detach()).square().mean()


ALL = (0, 1, 2, 3, 4)
COMPILED: dict[str, tuple[Callable[..., Any], bool]] = {
    "backward": (loss, True),
    "func.grad, then backward": (lambda *x: squares(ft.grad(loss, ALL)(*x)), True),
    "func.jvp": (lambda *x: ft.jvp(door, x, T), False),
    "mean flow": (mean_flow_step, True),
    "hessian": (lambda *x: ft.hessian(loss)(*x), False),
    "vmap(grad)": (
        lambda q, *x: ft.vmap(ft.grad(loss, ALL), (0, *(None,) * 4))(torch.stack((q, 2 * q)), *x),
        False,
    ),
    "checkpoint": (lambda *x: checkpoint(loss, *x, use_reentrant=False), True),
}


def differentiated(f: Callable[..., Any], backward: bool) -> Any:
    if not backward:
        return f(*X)
    x = parameters()
    return torch.autograd.grad(f(*x), x)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_derivatives(name: str) -> None:
    f, backward = COMPILED[name]
    same(differentiated(compiled(f), backward), differentiated(f, backward))


def test_inductor_runs_forward_and_backward() -> None:
    same(differentiated(compiled(loss, "inductor"), True), differentiated(loss, True))


def test_compiled_graph_holds_the_ops() -> None:
    graphs: list[list[str]] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append([n.target.__name__ for n in graph.graph.nodes if "tilewise" in str(n.target)])
        return make_boxed_func(graph.forward)

    f = torch.compile(mean_flow_step, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    f(*parameters()).backward()
    assert graphs == [
        ["attention_forward.default", "attention_jvp.default"],
        ["attention_vjp.default"],
    ]


def sized(n: int, seed: int = 0) -> list[Any]:
    shapes = ((B, H, n, D), (B, HK, n, D), (B, HK, n, DV))
    return [randn(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


def test_one_graph_serves_all_lengths_seeds_and_masks_of_one_form() -> None:
    count = Count()
    f = compiled(attention, count, dynamic=True)
    for n in (13, 17, 19):
        ends = [0, *range(2, n - 3), n]
        options = {"mask": tw.causal() & tw.documents(ends), "dropout_p": 0.5, "seed": 7 * n}
        same(f(*sized(n), **options), attention(*sized(n), **options))
    assert count.graphs == 1


def test_masks_of_other_numbers_are_other_graphs() -> None:
    count = Count()
    f = compiled(attention, count)
    for reach in (2, 3, 4):
        mask = tw.window(reach, 0) & tw.chunked(reach) | tw.prefix(reach)
        same(f(*sized(7), mask=mask), attention(*sized(7), mask=mask))
    assert count.graphs == 3


def test_compiled_dropout_draws_anew_each_time_and_repeats_with_the_generator() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(*x: Any) -> Any:
        return attention(*x, dropout_p=0.5)

    torch.manual_seed(5)
    first, second = f(*X[:3]), f(*X[:3])
    assert not first.equal(second)
    torch.manual_seed(5)
    same((f(*X[:3]), f(*X[:3])), (first, second))


def test_autograd_grad_inside_a_compiled_function() -> None:
    def f(*x: Any) -> Any:
        return squares(torch.autograd.grad(loss(*x), x, create_graph=True))

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        same(differentiated(compiled(f), True), differentiated(f, True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_autograd() -> None:
    x = parameters()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        grads = torch.autograd.grad(loss(*x), x)
    same(grads, differentiated(loss, True))


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.Parameter(X[0].clone())

    def forward(self, *x: Any) -> Any:
        return door(self.q, *x, mask=MASK)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_are_saved_and_still_differentiable(strict: bool) -> None:
    file = io.BytesIO()
    torch.export.save(torch.export.export(Module(), X[1:], strict=strict), file)
    file.seek(0)
    program = torch.export.load(file)
    program.run_decompositions()
    m = program.module()

    def f(*x: Any) -> Any:
        return door(*x, mask=MASK)

    same(m(*X[1:]), f(*X))
    same(torch.autograd.grad(squares(m(*X[1:])), m.q)[0], ft.grad(lambda *x: squares(f(*x)))(*X))
    k, rest = X[1], X[2:]
    for transform in (
        lambda g: ft.jvp(g, (k,), T[1:2]),
        lambda g: ft.hessian(lambda k: squares(g(k)))(k),
        lambda g: ft.vmap(g)(torch.stack((k, 2 * k))),
    ):
        same(transform(lambda k: m(k, *rest)), transform(lambda k: f(m.q, k, *rest)))


def test_strict_export_refuses_arrays_that_it_would_lose() -> None:
    class New(torch.nn.Module):
        def forward(self, *x: Any) -> Any:
            return attention(*x, mask=mask)

    mask = tw.lengths([5, 3])
    with pytest.raises(Exception, match="does not take the arrays of a new mask; use strict=False"):
        torch.export.export(New(), X[:3], strict=True)
    module = torch.export.export(New(), X[:3], strict=False).module()
    same(module(*X[:3]), attention(*X[:3], mask=mask))


def test_exported_program_takes_other_lengths() -> None:
    class Causal(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return attention(q, k, v, mask=tw.causal() & tw.window(3, 0))

    n = torch.export.Dim("n", min=2)
    dims = {name: {2: n} for name in "qkv"}
    program = torch.export.export(Causal(), tuple(sized(7)), dynamic_shapes=dims)
    same(program.module()(*sized(13)), Causal()(*sized(13)))


def test_shapes_without_values() -> None:
    x = parameters([t.to("meta") for t in X])
    grads = torch.autograd.grad(loss(*x), x, create_graph=True)
    second = torch.autograd.grad(squares(grads), x)
    assert [t.shape for t in second] == [t.shape for t in X]
    used = tw.lengths([5, 3])
    attention(*X[:3], mask=used)
    with FakeTensorMode() as mode:
        x = parameters([mode.from_tensor(t) for t in X])
        o = attention(*x[:3], mask=used, dropout_p=0.5)
        grads = torch.autograd.grad(loss(*x), x)
    assert o.shape == (B, H, N, DV)
    assert [g.shape for g in grads] == [t.shape for t in X]


def test_shapes_are_checked_without_values() -> None:
    with pytest.raises(ValueError, match=r"attention: v must have shape .* with Nk=5 \(from k\)"):
        attention(
            *(t.to("meta") for t in X[:2]), torch.empty(B, HK, NK + 1, DV, dtype=F64, device="meta")
        )


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    graph = make_fx(ft.grad(loss), tracing_mode=mode)(*X).graph
    names = [n.target.__name__ for n in graph.nodes if "tilewise" in str(n.target)]
    assert names == ["attention_forward.default", "attention_vjp.default"]


OPS = torch.ops.tilewise


@pytest.mark.parametrize("kind", ["forward", "vjp", "jvp", "vjp_jvp"])
def test_ops_pass_the_checks_of_pytorch(kind: str) -> None:
    options = (
        "{'mask': 'causal() & lengths(a0)', 'softcap': 2.0, 'softmax_scale': None, "
        "'dropout_p': 0.0, 'layout': 'bhnd', 'implementation': None}"
    )
    q, k, v, bias, sinks = X if kind == "vjp_jvp" else parameters()
    absent = (None,) * 4
    inputs = (q, k, v, bias, sinks, *absent, torch.tensor([5, 3]), None, None, None)
    o, lse, _, _, m, log_l, _ = (
        t.detach() for t in OPS.attention_forward(options, [True] * 6 + [False], *inputs)
    )
    base = (*inputs, o, lse, m, log_l, None)
    given = {
        "forward": inputs,
        "vjp": (o, None, *base),
        "jvp": (*T, *base),
        "vjp_jvp": (o, lse, None, *T[1:], None, lse, None, None, *base),
    }[kind]
    needed = [True, True, False, True, True, True, False][: 2 if kind == "jvp" else None]
    needed = needed[:5] if kind.startswith("vjp") else needed
    torch.library.opcheck(getattr(OPS, f"attention_{kind}").default, (options, needed, *given))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_the_old_tracer_is_refused_rather_than_given_a_constant() -> None:
    with pytest.raises(tw.Unsupported, match=r"attention: torch\.jit\.trace is not served"):
        torch.jit.trace(attention, X[:3])


def test_tensor_subclasses_are_seen_through() -> None:
    two = TwoTensor(X[0], 2 * X[0])
    o = attention(two, *X[1:3])
    same((o.a, o.b), (attention(*X[:3]), attention(2 * X[0], *X[1:3])))


def test_autocast_casts_as_for_pytorchs_own() -> None:
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    wide = torch.randn(1, 2, 3, 4, dtype=F64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attention(q, q.bfloat16(), q, bias=torch.zeros(3, 3))
        assert attention(wide, wide, wide).dtype == F64
        theirs = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    o.sum().backward()
    assert o.dtype == theirs.dtype == torch.bfloat16
    assert q.grad.dtype == torch.float32
    torch.testing.assert_close(o, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_float32_and_rounded_once(dtype: Any) -> None:
    x = [t.to(dtype).requires_grad_() for t in X]
    wide = [t.detach().float().requires_grad_() for t in x]
    r = attention(*x[:3], bias=x[3], sinks=x[4], return_lse=True)
    w = attention(*wide[:3], bias=wide[3], sinks=wide[4], return_lse=True)
    assert r.o.equal(w.o.to(dtype))
    assert r.lse.equal(w.lse)
    grads = torch.autograd.grad(r.o.float().sum(), x)
    wanted = torch.autograd.grad(w.o.sum(), wide)
    for grad, want in zip(grads, wanted, strict=True):
        assert grad.equal(want.to(dtype))


def test_memory_is_read_and_returned_in_place() -> None:
    q, k, v = (torch.randn(1, 3, 2, 4) for _ in range(3))
    strided = attention(*(t.transpose(1, 2) for t in (q, k, v)))
    assert strided.equal(attention(*(t.transpose(1, 2).contiguous() for t in (q, k, v))))
    assert attention(q, k, v, layout="bnhd").is_contiguous()
    flipped = [t.mT.contiguous().mT for t in (q, k, v)]
    assert attention(*flipped).equal(attention(q, k, v))
    one = q[:1, :1].expand(2, 5, *q.shape[2:])
    assert attention(one, one, one).equal(attention(*[one.clone()] * 3))


def test_no_grad_and_inference_mode() -> None:
    x = parameters()[:3]
    with torch.no_grad():
        assert not attention(*x).requires_grad
    with torch.inference_mode():
        same(attention(*x), attention(*X[:3]))
        inside = [t + 0 for t in x]
        same(attention(*inside, mask=tw.causal()), attention(*X[:3], mask=tw.causal()))


def test_numpy_and_torch_have_the_same_bits() -> None:
    options = {"mask": MASK, "dropout_p": 0.3, "seed": 2**64 - 11}
    x = [t.float() for t in X[:3]]
    ours = attention(*x, **options).numpy()
    np.testing.assert_array_equal(ours, tw.numpy.attention(*(t.numpy() for t in x), **options))


FIRST_CALLS = """
import sys, tilewise as tw, torch
x, ends = torch.linspace(-1, 1, 70).view(7, 2, 5), torch.tensor([0, 3, 7])
def varlen(x): return tw.attention_varlen(x, x, x, ends)
def whole(x): return tw.attention(x[None], x[None], x[None], layout="bnhd")
def rows(x): return tw.softmax(x), tw.log_softmax(x), tw.logsumexp(x)
assert "tilewise.torch" not in sys.modules
for f in (varlen, whole, rows):
    found = torch.compile(f, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(found, f(x), rtol=0, atol=0)
"""


def test_first_calls_may_be_compiled() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
