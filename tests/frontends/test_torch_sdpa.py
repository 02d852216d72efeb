"""scaled_dot_product_attention with PyTorch's signature, and rerouting of models to it."""

from __future__ import annotations

import copy
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import func, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as taken_before
from torch.utils.checkpoint import checkpoint

from tilewise import Unsupported
from tilewise.torch import replace_sdpa, scaled_dot_product_attention

HELD = (functional.scaled_dot_product_attention,)


def pytorch(*arguments: Any, **options: Any) -> Any:
    """PyTorch's own function, which no block replaces in a tuple."""
    return HELD[0](*arguments, **options)


def randn(*shape: int, seed: int = 0, dtype: Any = torch.float64) -> Any:
    """Random numbers in the dtype that they are used in."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))
    return made.to(dtype)


def boolean(*shape: int) -> Any:
    return randn(*shape, seed=9) > -0.4


# Shapes of query, key, value; mask; other arguments.
CASES: dict[str, tuple[Any, Any, Any, Any, dict[str, Any]]] = {
    "two dimensions": ((5, 3), (7, 3), (7, 2), None, {}),
    "two and three": ((5, 3), (2, 7, 3), (2, 7, 2), None, {}),
    "three dimensions": ((4, 5, 3), (4, 7, 3), (4, 7, 2), (5, 7), {}),
    "four dimensions": ((2, 4, 5, 3), (2, 4, 7, 3), (2, 4, 7, 11), (2, 1, 5, 7), {}),
    "five dimensions": ((2, 3, 4, 5, 3), (2, 3, 4, 7, 3), (2, 3, 4, 7, 2), (3, 1, 5, 7), {}),
    "five and a long mask": ((2, 3, 4, 5, 3), (2, 3, 4, 7, 3), (3, 4, 7, 2), (2, 1, 4, 1, 7), {}),
    "six dimensions": ((2, 1, 3, 4, 5, 3), (3, 4, 7, 3), (1, 1, 4, 7, 2), None, {}),
    "batch broadcasts": ((2, 4, 5, 3), (1, 4, 7, 3), (2, 4, 7, 2), (5, 7), {}),
    "query broadcasts": ((5, 3), (2, 4, 7, 3), (2, 4, 7, 2), None, {}),
    "heads broadcast": ((2, 4, 5, 3), (2, 1, 7, 3), (2, 4, 7, 2), (4, 1, 7), {}),
    "query head broadcasts": ((2, 1, 5, 3), (2, 4, 7, 3), (2, 1, 7, 2), None, {}),
    "grouped": ((2, 6, 5, 3), (2, 2, 7, 3), (2, 2, 7, 2), None, {"enable_gqa": True}),
    "unlike groups": ((2, 6, 5, 3), (2, 2, 7, 3), (2, 3, 7, 2), None, {"enable_gqa": True}),
    "grouped in 3-D": ((6, 5, 3), (2, 7, 3), (2, 7, 2), (5, 7), {"enable_gqa": True}),
    "causal": ((2, 4, 7, 3), (2, 4, 7, 3), (2, 4, 7, 2), None, {"is_causal": True}),
    "causal, fewer queries": ((2, 5, 3), (2, 7, 3), (2, 7, 2), None, {"is_causal": True}),
    "causal, more queries": ((2, 7, 3), (2, 5, 3), (2, 5, 2), None, {"is_causal": True}),
    "scale": ((2, 5, 3), (2, 7, 3), (2, 7, 2), None, {"scale": 0.3}),
    "negative scale": ((2, 5, 3), (2, 7, 3), (2, 7, 2), (5, 7), {"scale": -0.3}),
    "zero scale": ((2, 5, 3), (2, 7, 3), (2, 7, 2), (5, 7), {"scale": 0}),
    "no keys": ((2, 5, 3), (2, 0, 3), (2, 0, 2), None, {}),
    "no queries": ((2, 0, 3), (2, 7, 3), (2, 7, 2), None, {}),
    "no batch": ((0, 4, 5, 3), (0, 4, 7, 3), (0, 4, 7, 2), None, {}),
    "no heads": ((2, 0, 5, 3), (2, 0, 7, 3), (2, 1, 7, 2), None, {}),
    "no entries": ((2, 5, 0), (2, 7, 0), (2, 7, 2), None, {"scale": 1.0}),
    "no values": ((2, 5, 3), (2, 7, 3), (2, 7, 0), None, {}),
}


def problem(name: str, kind: str, dtype: Any = torch.float64) -> tuple[list[Any], dict[str, Any]]:
    """The tensors of a case, and the other arguments."""
    *shapes, mask_shape, options = CASES[name]
    tensors = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    if mask_shape is None:
        return tensors, dict(options)
    mask = boolean(*mask_shape)
    if kind == "additive":
        mask = randn(*mask_shape, seed=5, dtype=dtype).masked_fill(~mask, -math.inf)
    elif kind == "hiding":
        mask = torch.zeros(mask_shape, dtype=dtype).masked_fill(~mask, -math.inf)
    return tensors, {**options, "attn_mask": mask}


def names(kind: str) -> list[str]:
    return [name for name, case in CASES.items() if kind == "boolean" or case[3] is not None]


ALL = [(name, kind) for kind in ("boolean", "additive", "hiding") for name in names(kind)]


@pytest.mark.parametrize(("name", "kind"), ALL, ids=[f"{n}, {k}" for n, k in ALL])
def test_value_and_gradients_are_those_of_pytorch(name: str, kind: str) -> None:
    results = []
    for attention in (pytorch, scaled_dot_product_attention):
        tensors, options = problem(name, kind)
        leaves = [t.requires_grad_() for t in tensors]
        if kind == "additive":
            leaves.append(options["attn_mask"].requires_grad_())
        o = attention(*tensors, **options)
        o.backward(randn(*o.shape, seed=3))
        results.append([o.detach(), *(leaf.grad for leaf in leaves)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_lower_precision_agrees_to_its_rounding(dtype: Any, kind: str) -> None:
    tensors, options = problem("four dimensions", kind, dtype)
    got = scaled_dot_product_attention(*tensors, **options)
    if kind == "additive":
        options["attn_mask"] = options["attn_mask"].double()
    want = pytorch(*(t.double() for t in tensors), **options)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=4 * eps)


def test_float32_mask_goes_with_bfloat16_tensors() -> None:
    tensors, options = problem("four dimensions", "additive", torch.bfloat16)
    options["attn_mask"] = options["attn_mask"].float()
    got = scaled_dot_product_attention(*tensors, **options)
    torch.testing.assert_close(got, pytorch(*tensors, **options), rtol=2e-2, atol=2e-2)


def test_causal_bias_objects_are_masks() -> None:
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    tensors, _ = problem("three dimensions", "boolean")
    for bias in (causal_upper_left(5, 7), causal_lower_right(5, 7)):
        seen = torch.ones(5, 7, dtype=torch.bool).tril(int(bias.variant == 2) * 2)
        want = pytorch(*tensors, attn_mask=seen)
        torch.testing.assert_close(scaled_dot_product_attention(*tensors, bias), want)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_row_that_sees_nothing_is_zero(kind: str) -> None:
    q, k, v = (randn(2, 5, 3, seed=i).requires_grad_() for i in range(3))
    seen = torch.ones(5, 5, dtype=torch.bool)
    seen[2] = False
    mask = seen if kind == "boolean" else randn(5, 5).masked_fill(~seen, -math.inf)
    o = scaled_dot_product_attention(q, k, v, mask)
    assert (o[:, 2] == 0).all()
    o.sum().backward()
    assert (q.grad[:, 2] == 0).all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_hidden_nan_reaches_nothing() -> None:
    q, k, v = (randn(2, 5, 3, seed=i) for i in range(3))
    seen = torch.ones(5, 5, dtype=torch.bool)
    seen[:, 3] = False
    want = scaled_dot_product_attention(q, k, v, seen)
    k[:, 3], v[:, 3] = math.nan, math.inf
    for mask in (seen, torch.zeros(5, 5, dtype=torch.float64).masked_fill(~seen, -math.inf)):
        assert torch.equal(scaled_dot_product_attention(q, k, v, mask), want)


def test_dropout_follows_the_seed_and_keeps_the_mean() -> None:
    q, k = randn(1, 64, 3), randn(1, 128, 3)
    v = torch.ones(1, 128, 1, dtype=torch.float64)
    torch.manual_seed(0)
    first = scaled_dot_product_attention(q, k, v, None, 0.5)
    second = scaled_dot_product_attention(q, k, v, None, 0.5)
    torch.manual_seed(0)
    assert torch.equal(scaled_dot_product_attention(q, k, v, None, 0.5), first)
    assert not torch.equal(first, second)
    assert 0.9 < first.mean() < 1.1
    assert (scaled_dot_product_attention(q, k, v, dropout_p=1.0) == 0).all()


def test_second_derivatives_and_tangents() -> None:
    tensors, options = problem("heads broadcast", "additive")
    mask = options["attn_mask"].masked_fill(options["attn_mask"].isinf(), -1.0)

    def attention(*x: Any) -> Any:
        return scaled_dot_product_attention(*x)

    leaves = [t.requires_grad_() for t in (*tensors, mask)]
    assert torch.autograd.gradcheck(attention, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attention, leaves)


def test_mask_of_zeros_has_a_tangent() -> None:
    (q, k, v), _ = problem("three dimensions", "boolean")
    zero, tangent, step = torch.zeros(5, 7, dtype=torch.float64), randn(5, 7, seed=3), 1e-6
    above, below = (pytorch(q, k, v, each * tangent) for each in (step, -step))
    want = (above - below) / (2 * step)
    _, got = func.jvp(lambda mask: scaled_dot_product_attention(q, k, v, mask), (zero,), (tangent,))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)
    with forward_ad.dual_level():
        o = scaled_dot_product_attention(q, k, v, forward_ad.make_dual(zero, tangent))
        got = forward_ad.unpack_dual(o).tangent
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


def test_vmap_over_queries() -> None:
    q, k, v = randn(3, 2, 5, 3), randn(2, 7, 3), randn(2, 7, 2)
    mask = randn(3, 5, 7)
    got = func.vmap(scaled_dot_product_attention, (0, None, None, 0))(q, k, v, mask)
    want = torch.stack([pytorch(q[i], k, v, mask[i]) for i in range(3)])
    torch.testing.assert_close(got, want)


Q = randn(2, 4, 5, 3)
WRONG: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "query is an array": (TypeError, "query must be a torch.Tensor", (Q.numpy(), Q, Q), {}),
    "one dimension": (ValueError, "key must have at least 2 dim", (Q, Q[0, 0, 0], Q), {}),
    "dtypes": (TypeError, "value must have dtype torch.float64", (Q, Q, Q.float()), {}),
    "batch": (ValueError, "key must broadcast to batch", (Q, randn(3, 4, 5, 3), Q), {}),
    "heads": (ValueError, "key must have 1 or 4 heads of query", (Q, Q[:, :2], Q), {}),
    "groups": (
        ValueError,
        "key must have a divisor of the 4 heads",
        (Q, Q[:, :3], Q[:, :3]),
        {"enable_gqa": True},
    ),
    "mask and causal": (
        ValueError,
        "attn_mask must be None where is_causal is True",
        (Q, Q, Q, boolean(5, 5)),
        {"is_causal": True},
    ),
    "mask of integers": (TypeError, "attn_mask must have dtype bool", (Q, Q, Q, Q.int()), {}),
    "mask is a list": (TypeError, "attn_mask must be a torch.Tensor", (Q, Q, Q, [1]), {}),
    "mask of another size": (
        ValueError,
        "attn_mask must broadcast to",
        (Q, Q, Q, boolean(5, 6)),
        {},
    ),
    "mask of one dimension": (ValueError, "attn_mask must broadcast", (Q, Q, Q, boolean(5)), {}),
    "long mask": (ValueError, "attn_mask must broad", (Q, Q, Q, boolean(3, 2, 4, 5, 5)), {}),
    "dropout": (ValueError, "dropout_p must be", (Q, Q, Q), {"dropout_p": 1.5}),
    "wide": (Unsupported, "D is 513, not 1 <= D <= 512", (randn(1, 513),) * 3, {}),
    "integers": (Unsupported, "query has dtype int64", (Q.long(),) * 3, {}),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name: str) -> None:
    error, message, arguments, options = WRONG[name]
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(*arguments, **options)


class Net(nn.Module):
    """Calls PyTorch's function in each way that a model may hold it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 18, dtype=torch.float64)
        self.way = way
        self.held = taken_before

    def forward(self, x: Any) -> Any:
        q, k, v = self.proj(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        attention = {
            "attribute": lambda: functional.scaled_dot_product_attention,
            "import": lambda: taken_before,
            "member": lambda: self.held,
        }[self.way]()
        return attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    yield
    assert functional.scaled_dot_product_attention is taken_before is HELD[0]
    assert torch.backends.mha.get_fastpath_enabled()


X = randn(2, 5, 6)


@pytest.mark.parametrize("way", ["attribute", "import"])
def test_module_is_rerouted(way: str) -> None:
    net = Net(way)
    want = net(X)
    want.sum().backward()
    grad, net.proj.weight.grad = net.proj.weight.grad, None
    with replace_sdpa() as block:
        got = net(X)
        got.sum().backward()
    assert block.served == 1
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(net.proj.weight.grad, grad)
    net(X)
    assert block.served == 1


MODULES: dict[str, Any] = {
    "MultiheadAttention": lambda: nn.MultiheadAttention(6, 2, batch_first=True),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(6, 2, 5, 0.0, batch_first=True),
    "TransformerEncoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(6, 2, 5, 0.0, batch_first=True), 1
    ),
}
PADDED = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_layers_of_pytorch_are_rerouted_also_off_their_fast_path(name: str, training: bool) -> None:
    torch.manual_seed(0)
    layer = MODULES[name]().double().train(training)

    def run() -> Any:
        with torch.set_grad_enabled(training):
            if name == "MultiheadAttention":
                return layer(X, X, X, key_padding_mask=PADDED, need_weights=False)[0]
            return layer(X, src_key_padding_mask=PADDED)

    # The fast path fills padded rows, which mean nothing, with other numbers.
    shown = ~PADDED if name != "MultiheadAttention" else slice(None)
    torch.backends.mha.set_fastpath_enabled(False)
    want = run()
    torch.backends.mha.set_fastpath_enabled(True)
    with replace_sdpa() as block:
        got = run()
    assert block.served == 1
    torch.testing.assert_close(got[shown], want[shown])


def test_weights_that_are_asked_for_go_past_the_function() -> None:
    layer = nn.MultiheadAttention(6, 2, batch_first=True).double()
    with replace_sdpa() as block:
        layer(X, X, X, need_weights=True)
    assert block.served == 0


def test_refusal_raises_or_falls_back_and_is_counted() -> None:
    wide = randn(1, 2, 600)
    with pytest.raises(Unsupported, match="D is 600"), replace_sdpa():
        functional.scaled_dot_product_attention(wide, wide, wide)
    with replace_sdpa(fallback="pytorch") as block:
        for _ in range(2):
            got = functional.scaled_dot_product_attention(wide, wide, wide)
        functional.scaled_dot_product_attention(Q, Q, Q)
    assert torch.equal(got, pytorch(wide, wide, wide))
    assert block.served == 1
    assert dict(block.fallbacks) == {"D is 600, not 1 <= D <= 512": 2}
    assert "2 left to PyTorch" in repr(block)


def test_subclass_with_functions_of_its_own_is_refused() -> None:
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
            return "its own"

    loud = Q.as_subclass(Loud)
    with replace_sdpa(fallback="pytorch") as block:
        assert functional.scaled_dot_product_attention(loud, loud, loud) == "its own"
    assert list(block.fallbacks) == ["query is a Loud, which has functions of its own"]


def test_unknown_fallback() -> None:
    with pytest.raises(ValueError, match="fallback must be 'raise' or 'pytorch', got 'eager'"):
        replace_sdpa(fallback="eager")


def test_blocks_nest_and_the_inner_one_counts() -> None:
    wide = randn(1, 2, 600)
    with replace_sdpa() as outer:
        functional.scaled_dot_product_attention(Q, Q, Q)
        with replace_sdpa(fallback="pytorch") as inner:
            functional.scaled_dot_product_attention(Q, Q, Q)
            functional.scaled_dot_product_attention(wide, wide, wide)
        functional.scaled_dot_product_attention(Q, Q, Q)
        with pytest.raises(Unsupported):
            functional.scaled_dot_product_attention(wide, wide, wide)
    assert (outer.served, inner.served) == (2, 1)
    with inner, inner:
        functional.scaled_dot_product_attention(Q, Q, Q)
    assert inner.served == 2


def test_reference_held_since_before_is_out_of_reach() -> None:
    net = Net("member")
    with replace_sdpa() as block:
        net(X)
    assert block.served == 0


def test_reference_taken_inside_is_pytorchs_function_outside() -> None:
    with replace_sdpa() as block:
        net = Net("member")
        net.held = functional.scaled_dot_product_attention
        inside = net(X)
    assert block.served == 1
    assert torch.equal(net.held(Q, Q, Q), pytorch(Q, Q, Q))
    torch.testing.assert_close(net(X), inside)
    assert block.served == 1


def test_exception_inside_restores_everything() -> None:
    with pytest.raises(KeyError), replace_sdpa():
        raise KeyError
    assert taken_before is HELD[0]


def in_thread(run: Any) -> None:
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    assert not errors, errors


def test_other_threads_are_rerouted_too() -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 5, 0.0, batch_first=True).double().eval()

    def worker() -> None:
        Net("attribute")(X)
        Net("import")(X)
        with torch.no_grad():
            layer(X)

    with replace_sdpa() as block:
        in_thread(worker)
    assert block.served == 3


def test_blocks_of_two_threads_may_end_in_any_order() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with replace_sdpa():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with replace_sdpa():
        thread.start()
        entered.wait(10)
    assert functional.scaled_dot_product_attention is not HELD[0]
    leave.set()
    thread.join()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_the_block(reentrant: bool) -> None:
    net, x = Net("attribute"), X.clone().requires_grad_()
    want = torch.autograd.grad(net(x).square().sum(), net.proj.weight)[0]
    with replace_sdpa() as block:
        checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
    assert block.served == 2
    torch.testing.assert_close(net.proj.weight.grad, want)


def test_transforms_inside_the_block() -> None:
    net = Net("import")
    parameters = dict(net.named_parameters())

    def loss(p: Any, x: Any) -> Any:
        return func.functional_call(net, p, (x[None],)).square().sum()

    with replace_sdpa() as block:
        got = func.vmap(func.grad(loss), (None, 0))(parameters, X)
    assert block.served == 1
    for i, x in enumerate(X):
        want = func.grad(loss)(parameters, x)
        torch.testing.assert_close({name: g[i] for name, g in got.items()}, want)
    tangent = randn(5, 6, seed=2)
    with replace_sdpa():
        o, to = func.jvp(lambda x: net(x[None]), (X[0],), (tangent,))
    step = 1e-6
    numerical = (net((X[0] + step * tangent)[None]) - net((X[0] - step * tangent)[None])) / step / 2
    torch.testing.assert_close(to, numerical, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(o, net(X[:1]))


@pytest.mark.parametrize("way", ["attribute", "import"])
def test_compiled_module_is_rerouted_and_returns(way: str) -> None:
    torch._dynamo.reset()
    net = Net(way)
    compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)
    want = net(X)
    torch.testing.assert_close(compiled(X), want)
    with replace_sdpa() as block:
        got = compiled(X)
        got.sum().backward()
    assert block.served >= 1
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(compiled(X), want)


def test_page_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "sdpa.md"
    text = page.read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    assert blocks
