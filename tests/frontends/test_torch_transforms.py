"""Attention under each transform of PyTorch, against the same mathematics in plain operations."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.autograd.functional as af
import torch.func as ft
from torch.utils.checkpoint import checkpoint

import tilewise as tw
from tilewise import dispatch
from tilewise.base.operator import Implementation
from tilewise.ops.attention import cpu
from tilewise.torch import attention

B, H, HK, N, NK, D, DV, E = 2, 2, 1, 3, 5, 2, 3, 4
F64 = torch.float64
ALL = (0, 1, 2, 3, 4)
MASK = tw.causal() & tw.lengths([5, 3])
OPTIONS = {"softcap": 1.5, "softmax_scale": 0.6}
VISIBLE = torch.from_numpy(MASK.to_bool(B, H, N, NK))
Attention = Callable[..., Any]


def randn(*shape: int, seed: int) -> Any:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


SHAPES = ((B, H, N, D), (B, HK, NK, D), (B, HK, NK, DV), (H, N, NK), (H,))
X = tuple(randn(*shape, seed=i) for i, shape in enumerate(SHAPES))
T = tuple(randn(*shape, seed=10 + i) for i, shape in enumerate(SHAPES))
Q, K, V, BIAS, SINKS = X
QS = randn(E, B, H, N, D, seed=20)
KS = randn(B, E, HK, NK, D, seed=21)
VS = randn(B, HK, NK, DV, E, seed=22)
BIASES = randn(E, H, N, NK, seed=23)
SINKSS = randn(H, E, seed=24)
W = randn(B, H, N, DV, seed=25)
C = W, W[..., 0]
CT = W.sin(), W[..., 1]


def door(q: Any, k: Any, v: Any, bias: Any = None, sinks: Any = None, **options: Any) -> Any:
    more = {"mask": MASK, **OPTIONS, **options}
    r = attention(q, k, v, bias=bias, sinks=sinks, **more, return_lse=True)
    return r.o, r.lse


@pytest.fixture
def textbook(plain: Attention) -> Attention:
    def f(q: Any, k: Any, v: Any, bias: Any = None, sinks: Any = None, **options: Any) -> Any:
        more = {"visible": VISIBLE, **OPTIONS, **options}
        return plain(q, k, v, bias, sinks, **more)

    return f


def loss_of(f: Attention) -> Callable[..., Any]:
    def loss(*x: Any) -> Any:
        o, lse = f(*x)
        return (o * W).sum() + (o**3).sum() + (lse**2).sum()

    return loss


def leaves(tree: Any) -> list[Any]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if t is not None]


def squares(tree: Any) -> Any:
    return sum(t.square().sum() for t in leaves(tree))


def same(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    a, b = leaves(a), leaves(b)
    assert len(a) == len(b) > 0
    for s, t in zip(a, b, strict=True):
        torch.testing.assert_close(s, t, rtol=tolerance, atol=tolerance)


def parameters(tensors: Any = X) -> list[Any]:
    return [t.clone().requires_grad_() for t in tensors]


def double_backward(f: Attention) -> Any:
    x = parameters()
    grads = torch.autograd.grad(loss_of(f)(*x), x, create_graph=True)
    return torch.autograd.grad(sum((g * t).sum() for g, t in zip(grads, T, strict=True)), x)


def dual_then_reverse(f: Attention) -> Any:
    x = parameters()
    with fw.dual_level():
        o, lse = f(fw.make_dual(x[0], T[0]), *x[1:])
        tangents = fw.unpack_dual(o).tangent, fw.unpack_dual(lse).tangent
        return tangents, torch.autograd.grad(squares(tangents), x)


def dual_over_backward(f: Attention) -> Any:
    with fw.dual_level():
        x = [fw.make_dual(p, t) for p, t in zip(parameters(), T, strict=True)]
        grads = torch.autograd.grad(loss_of(f)(*x), x)
        return [fw.unpack_dual(g).tangent for g in grads]


def jvp_of_output_alone(f: Attention) -> Any:
    return ft.jvp(ft.grad(lambda *x: (f(*x)[0] ** 2).sum(), ALL), X, T)


def penalty(f: Attention) -> Any:
    x = parameters()
    (g,) = torch.autograd.grad(f(*x)[0].sum(), x[0], create_graph=True)
    return torch.autograd.grad((g.norm() - 1) ** 2, x)


BATCHED = (0, 1, 4, 0, 1)
TRANSFORMS: dict[str, Callable[[Attention], Any]] = {
    "double backward": double_backward,
    "gradient penalty": penalty,
    "grad": lambda f: ft.grad(loss_of(f), ALL)(*X),
    "vjp": lambda f: ft.vjp(f, *X)[1](C),
    "vjp of lse alone": lambda f: ft.vjp(lambda *x: f(*x)[1], *X)[1](W[..., 0]),
    "jvp": lambda f: ft.jvp(f, X, T),
    "linearize": lambda f: ft.linearize(f, *X)[1](*T),
    "jacrev": lambda f: ft.jacrev(f, ALL)(*X),
    "jacrev in chunks": lambda f: ft.jacrev(f, ALL, chunk_size=7)(*X),
    "jacfwd": lambda f: ft.jacfwd(f, ALL)(*X),
    "hessian": lambda f: ft.hessian(loss_of(f), ALL)(*X),
    "jacrev(jacrev)": lambda f: ft.jacrev(ft.jacrev(loss_of(f), ALL), ALL)(*X),
    "jacrev(jacfwd)": lambda f: ft.jacrev(ft.jacfwd(loss_of(f), ALL), ALL)(*X),
    "jvp(grad)": lambda f: ft.jvp(ft.grad(loss_of(f), ALL), X, T),
    "jvp(grad) of o": jvp_of_output_alone,
    "jvp(vjp) in cotangents": lambda f: ft.jvp(ft.vjp(f, *X)[1], (C,), (CT,)),
    "jvp of a jvp(grad) in its tangents": lambda f: ft.jvp(
        lambda *t: ft.jvp(ft.grad(loss_of(f), ALL), X, t)[1], T, tuple(t.sin() for t in T)
    ),
    "grad of a jvp(grad) in its tangents": lambda f: ft.grad(
        lambda *t: squares(ft.jvp(ft.grad(loss_of(f), ALL), X, t)[1]), ALL
    )(*T),
    "vjp(grad)": lambda f: ft.vjp(ft.grad(loss_of(f), ALL), *X)[1](T),
    "grad(jvp)": lambda f: ft.grad(lambda *x: squares(ft.jvp(f, x, T)[1]), ALL)(*X),
    "grad(jvp) of tangents": lambda f: ft.grad(lambda *t: squares(ft.jvp(f, X, t)[1]), ALL)(*T),
    "vmap of all": lambda f: ft.vmap(f, BATCHED)(QS, KS, VS, BIASES, SINKSS),
    "vmap of the bias": lambda f: ft.vmap(f, (None,) * 3 + (0,))(Q, K, V, BIASES),
    "vmap to other dims": lambda f: ft.vmap(f, (0, None, -1), (1, 2))(QS, K, VS),
    "vmap nested": lambda f: ft.vmap(lambda k: ft.vmap(f, (0, None, None))(QS, k, V), 1)(KS),
    "vmap in chunks": lambda f: ft.vmap(f, (0, None, None), chunk_size=3)(QS, K, V),
    "vmap(grad)": lambda f: ft.vmap(ft.grad(loss_of(f), ALL), BATCHED)(QS, KS, VS, BIASES, SINKSS),
    "vmap(jvp)": lambda f: ft.vmap(lambda t: ft.jvp(f, X, (t, *T[1:])))(QS),
    "vmap(jvp(grad))": lambda f: ft.vmap(lambda t: ft.jvp(ft.grad(loss_of(f)), X, (t, *T[1:])))(QS),
    "vmap(hessian)": lambda f: ft.vmap(ft.hessian(loss_of(f)), (0, None, None))(QS, K, V),
    "grad(vmap)": lambda f: ft.grad(lambda q: squares(ft.vmap(f, (0, None, None))(q, K, V)))(QS),
    "jvp(vmap)": lambda f: ft.jvp(
        lambda q: ft.vmap(f, (0, None, None))(q, K, V), (QS,), (QS.sin(),)
    ),
    "functional.jvp": lambda f: af.jvp(f, X, T),
    "functional.vjp": lambda f: af.vjp(f, X, C),
    "functional.vhp": lambda f: af.vhp(loss_of(f), X, T),
    "functional.jacobian": lambda f: af.jacobian(f, X, vectorize=True, strategy="forward-mode"),
    "functional.hessian": lambda f: af.hessian(loss_of(f), X, vectorize=True),
    "dual level, then reverse": dual_then_reverse,
    "dual level over backward": dual_over_backward,
}


# linearize says so of every tensor that a function closes over.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name: str, textbook: Attention) -> None:
    same(TRANSFORMS[name](door), TRANSFORMS[name](textbook))


def test_a_mask_that_was_new_inside_a_transform_serves_others(textbook: Attention) -> None:
    """Its tensors are kept, and must not be what the transform made of them."""
    fresh = copy.deepcopy(MASK)
    fresh.__dict__.pop("_tensors", None)

    def with_fresh(*x: Any) -> Any:
        return door(*x, mask=fresh)

    TRANSFORMS["vmap(jvp(grad))"](with_fresh)
    same(TRANSFORMS["vmap(hessian)"](with_fresh), TRANSFORMS["vmap(hessian)"](textbook))


def test_masks_slopes_and_seeds_are_mapped_over(textbook: Attention) -> None:
    visible = torch.rand(E, B, 1, N, NK, generator=torch.Generator().manual_seed(1)) > 0.3
    slopes = randn(B, E, H, seed=30).abs()

    def mapped(f: Attention, name: str) -> Any:
        def loss(q: Any, mask: Any, slopes: Any) -> Any:
            o, lse = f(q, K, V, BIAS, SINKS, **{name: mask}, alibi_slopes=slopes)
            return squares((o, lse))

        return ft.vmap(ft.grad_and_value(loss), (None, 0, 1))(Q, visible, slopes)

    same(mapped(door, "mask"), mapped(textbook, "visible"))
    seeds = torch.arange(E)
    dropped = ft.vmap(lambda s: attention(Q, K, V, dropout_p=0.5, seed=s))(seeds)
    same(dropped, [torch.stack([attention(Q, K, V, dropout_p=0.5, seed=i) for i in range(E)])])


def test_vmap_over_nothing_has_the_right_shapes() -> None:
    f = ft.vmap(ft.grad(loss_of(door), ALL), (0, *(None,) * 4))
    assert [g.shape for g in f(QS[:0], *X[1:])] == [(0, *shape) for shape in SHAPES]


def test_random_seeds_under_vmap_follow_its_randomness() -> None:
    def f(q: Any) -> Any:
        return attention(q, K, V, dropout_p=0.5)

    equal = Q.expand(E, *Q.shape)
    with pytest.raises(RuntimeError, match="randomness"):
        ft.vmap(f)(equal)
    assert (ft.vmap(f, randomness="same")(equal).std(0) == 0).all()
    assert (ft.vmap(f, randomness="different")(equal).std(0) > 0).any()


class Net(torch.nn.Module):
    """A network whose Jacobian-vector product is trained, as in mean flows."""

    def __init__(self, f: Attention) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.f, self.qkv, self.out = f, torch.nn.Linear(3, 9), torch.nn.Linear(3, 3)
        self.double()

    def forward(self, z: Any, t: Any) -> Any:
        h = z + t * torch.tensor([1.0, 2, 3], dtype=F64)
        q, k, v = self.qkv(h).unflatten(0, (1, 2)).chunk(3, -1)
        o, lse = self.f(q, k, v)
        return (self.out(o) + h * lse[..., None]).squeeze(0)


def mean_flow(f: Attention, style: str) -> Any:
    net, z, v = Net(f), randn(2, 5, 3, seed=40), randn(2, 5, 3, seed=41)
    t = torch.full((2, 1, 1), 0.7, dtype=F64)

    def loss(p: Any) -> Any:
        model = net if p is None else lambda z, t: ft.functional_call(net, p, (z, t))
        u, du = ft.jvp(model, (z, t), (v, torch.ones_like(t)))
        target = v - t * du
        return (u - (target if style == "not detached" else target.detach())).square().mean()

    p = dict(net.named_parameters())
    if style == "func.grad":
        return ft.grad(loss)({name: w.detach() for name, w in p.items()})
    loss(p if style == "functional_call" else None).backward()
    return {name: w.grad for name, w in p.items()}


@pytest.mark.parametrize("style", ["closure", "functional_call", "func.grad", "not detached"])
def test_jvp_in_a_training_loss(style: str, plain: Attention) -> None:
    def f(q: Any, k: Any, v: Any) -> Any:
        r = attention(q, k, v, mask=tw.causal(), return_lse=True)
        return r.o, r.lse

    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    same(mean_flow(f, style), mean_flow(lambda *x: plain(*x, visible=seen), style))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_recompute_the_same_dropout(reentrant: bool) -> None:
    def loss(*x: Any) -> Any:
        return squares(attention(*x[:3], mask=MASK, dropout_p=0.5))

    def gradients(run: Callable[..., Any]) -> Any:
        torch.manual_seed(3)
        x = parameters()[:3]
        run(*x).backward()
        return [t.grad for t in x]

    same(gradients(loss), gradients(lambda *x: checkpoint(loss, *x, use_reentrant=reentrant)))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Any]], dict[str, int]]]:
    """Run something and count the kernels, with the gradients that each of them computes."""
    log: Counter[str] = Counter()

    def spy(kind: str) -> Callable[..., Any]:
        def kernel(call: Any, given: Any, needed: Any = None) -> Any:
            names = ("q", "k", "v", "bias", "sinks") if needed is not None else ()
            wanted = [name for name in names if getattr(needed, name)]
            known = ", to" if kind == "vjp_jvp" and given.outputs is not None else ""
            log[" ".join([kind, *wanted]) + known] += 1
            function = getattr(cpu, kind)
            return function(call, given) if needed is None else function(call, given, needed)

        return kernel

    kinds = ("forward", "vjp", "jvp", "vjp_jvp")
    spied = Implementation("cpu", *(spy(kind) for kind in kinds))
    monkeypatch.setattr(dispatch, "_load", lambda operator, name: spied)

    def run(action: Callable[[], Any]) -> dict[str, int]:
        log.clear()
        action()
        return dict(log)

    yield run


def test_no_kernel_computes_what_nobody_needs(ran: Any) -> None:
    q, k, v, bias, sinks = parameters()
    assert ran(lambda: door(*X)) == {"forward": 1}
    assert ran(lambda: door(q, K, V)[0].sum().backward()) == {"forward": 1, "vjp q": 1}
    assert ran(lambda: door(Q, K, v, bias)[0].sum().backward()) == {"forward": 1, "vjp v bias": 1}
    assert ran(lambda: door(Q, K, V, BIAS, sinks)[1].sum().backward()) == {
        "forward": 1,
        "vjp sinks": 1,
    }
    assert ran(lambda: ft.grad(loss_of(door))(*X)) == {"forward": 1, "vjp q": 1}
    assert ran(lambda: ft.jvp(door, X, T)) == {"forward": 1, "jvp": 1}
    with torch.no_grad():
        assert ran(lambda: door(q, k, v)) == {"forward": 1}


def test_vmap_calls_a_kernel_once_where_it_can_be_part_of_the_batch(
    ran: Any, textbook: Attention
) -> None:
    def f(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, mask=tw.causal(), softcap=1.5, layout="bnhd")

    def loss(*x: Any) -> Any:
        return (f(*x) ** 3).sum()

    qs, k, vs = QS[:, :1].transpose(2, 3), K[:1].transpose(1, 2), VS[:1].transpose(1, 2)
    mapped = ft.vmap(ft.hessian(loss, (0, 1)), (0, None, -1))
    zeros = torch.zeros(E, B, 1, 2, 3)
    one = {"forward": 1, "vjp q k": 1, "jvp": 1, "vjp_jvp q k, to": 1}
    assert ran(lambda: mapped(qs, k, vs)) == one
    each = [ft.hessian(loss, (0, 1))(q, k, v) for q, v in zip(qs, vs.unbind(-1), strict=True)]
    same(mapped(qs, k, vs), [torch.stack(rows) for rows in zip(*map(leaves, each), strict=True)])
    every = [t.contiguous() for t in (QS, KS.movedim(1, 0), VS.movedim(-1, 0))]
    one_call = ft.vmap(lambda *x: attention(*x, mask=tw.causal()))
    assert ran(lambda: one_call(*every)) == {"forward": 1}
    apart = [attention(*x, mask=tw.causal()) for x in zip(*every, strict=True)]
    same(one_call(*every), [torch.stack(apart)])
    long = torch.zeros(B, 1 << 16, 2, 3)  # too much to be copied for each q
    assert ran(lambda: ft.vmap(f, (0, None, None))(zeros, long, long)) == {"forward": E}


def test_second_derivatives_share_one_jvp(ran: Any) -> None:
    q, k, v, *_ = parameters()

    def double() -> None:
        (g,) = torch.autograd.grad(squares(door(q, K, V)), q, create_graph=True)
        squares(g).backward()

    assert ran(double) == {"forward": 1, "vjp q": 2, "jvp": 1, "vjp_jvp q, to": 1}
    forward_over_reverse = {"forward": 1, "vjp q": 1, "jvp": 1, "vjp_jvp q, to": 1}
    assert ran(lambda: ft.jvp(ft.grad(loss_of(door)), X, T)) == forward_over_reverse
    assert ran(lambda: jvp_of_output_alone(door)) == {
        "forward": 1,
        "vjp q k v bias sinks": 1,
        "jvp": 1,
        "vjp_jvp q k v bias sinks, to": 1,
    }

    def reverse_over_forward() -> None:
        _, tangents = ft.jvp(lambda q: door(q, k, v), (Q,), T[:1])
        squares(tangents).backward()

    assert ran(reverse_over_forward) == {"forward": 1, "jvp": 1, "vjp_jvp k v, to": 1}

    def reverse_over_second() -> None:
        grad = ft.grad(lambda *x: (door(*x)[0] * W).sum())
        ft.grad(lambda t: squares(ft.jvp(grad, X, (t, *T[1:]))[1]))(T[0])

    counts = {"forward": 1, "vjp q": 1, "jvp": 2, "vjp_jvp q, to": 2}
    assert ran(reverse_over_second) == counts


def test_tensors_saved_for_backward_grow_with_the_length_alone() -> None:
    def saved_bytes(n: int) -> int:
        total = 0

        def pack(t: Any) -> Any:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        x = [torch.randn(1, 2, n, 4, requires_grad=True) for _ in range(3)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            o = attention(*x, mask=tw.causal(), dropout_p=0.1)
            torch.autograd.grad(o.sum(), x, create_graph=True)
        return total

    seeds = 8 + 8  # saved by the forward and by the backward pass
    assert saved_bytes(202) - seeds == 2 * (saved_bytes(101) - seeds)


def test_threads_of_python_do_not_disturb_each_other(textbook: Attention) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def gradients(seed: int) -> Any:
        x = parameters([randn(*shape, seed=seed + i) for i, shape in enumerate(SHAPES)])
        return torch.autograd.grad(loss_of(door)(*x), x)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(gradients, range(20)))
    for seed, grads in enumerate(found):
        same(grads, gradients(seed), 0.0)


def test_a_tensor_that_left_its_transform_is_what_it_was() -> None:
    left: list[Any] = []
    q = Q.clone().requires_grad_()
    ft.grad(lambda scale: left.append(scale * q) or scale)(torch.ones((), dtype=F64))
    o, lse = door(left[0], K, V)
    same((o, lse), door(Q, K, V))
    squares((o, lse)).backward()
    same(q.grad, ft.grad(lambda q: squares(door(q, K, V)))(Q))


def test_third_derivatives_are_refused() -> None:
    with pytest.raises(tw.Unsupported, match="attention: forward mode over jvp is not provided"):
        ft.jacfwd(ft.jacfwd(loss_of(door)))(*X)
    with pytest.raises(tw.Unsupported, match="attention: third derivatives are not provided"):
        ft.grad(lambda *x: squares(ft.grad(lambda *y: squares(ft.grad(loss_of(door))(*y)))(*x)))(*X)
    with pytest.raises(tw.Unsupported, match="attention: third derivatives are not provided"):
        af.hvp(loss_of(door), X, T)


def test_outputs_changed_in_place_are_noticed() -> None:
    o = door(*parameters())[0]
    o.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        o.sum().backward()


def test_statistics_have_no_gradient_and_outputs_are_differentiable() -> None:
    r = attention(*parameters()[:3], return_lse=True, return_max_logit=True, return_entropy=True)
    assert [t.requires_grad for t in r] == [True, True, False, False]
    alone = attention(*parameters()[:3], return_entropy=True)
    assert alone.lse is None and alone.max_logit is None
    same(alone.entropy, r.entropy)
