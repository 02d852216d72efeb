"""Attention on PyTorch tensors, of tilewise and of others, and what else it is compared with.

PyTorch and onnxruntime are imported only where a contender needs them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dtypes import is_bfloat16
from tilewise.bench.cases import (
    DOOR,
    FLEX,
    MATH,
    ONE_BY_ONE,
    ONNX,
    PACKED,
    PADDED,
    PYTORCH,
    PYTORCH_ONE_BY_ONE,
    READ,
    VARLEN,
)
from tilewise.bench.problems import Contender, NotAvailable, Problem, missing

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "THREADS",
    "flex",
    "onnx",
    "plain_read",
    "pytorch",
    "pytorch_math",
    "pytorch_one_by_one",
    "pytorch_packed",
    "pytorch_padded",
    "tilewise",
]

Array = NDArray[Any]


class _Threads:
    """How many threads contenders may use that have no setting of their own."""

    count = 1


THREADS = _Threads()


@dataclass(frozen=True)
class _Layout:
    """How `(B, h, N, d)` tensors are handed over.

    `split` makes pieces of one, each of which is attended by itself; `join` puts together what
    belongs to the queries or to the keys.
    """

    split: Callable[[Tensor], list[Tensor]] = lambda x: [x]
    join: Callable[[list[Tensor]], Tensor] = lambda pieces: pieces[0]


def tilewise(
    name: str, problem: Problem, implementation: str | None, *, once: bool = False
) -> Contender:
    """Return tilewise through its PyTorch door: one call, packed sequences, or one by one."""
    _torch()
    import tilewise as tw
    from tilewise.torch import attention, attention_varlen

    pattern = problem.pattern
    options: dict[str, Any] = {"implementation": implementation}
    if name == DOOR:
        options["mask"] = pattern.mask()
        return _of_torch(name, problem, functools.partial(attention, **options), once=once)
    options["mask"] = tw.causal() if pattern.causal else None
    if name == ONE_BY_ONE:
        attend = functools.partial(attention, **options)
        return _of_torch(name, problem, attend, _one_by_one(problem))
    starts = _torch().from_numpy(_boundaries(problem).astype(np.int32))
    packed = functools.partial(attention_varlen, cu_seqlens_q=starts, **options)
    layout = _Layout(
        lambda x: [x[0].transpose(0, 1).contiguous()],
        lambda pieces: pieces[0].transpose(0, 1)[None],
    )
    return _of_torch(VARLEN, problem, packed, layout)


def pytorch(problem: Problem) -> Contender:
    """Return PyTorch's attention; but for causal, a mask goes in as booleans, the only form."""
    return _of_torch(PYTORCH, problem, _sdpa(problem))


def pytorch_math(problem: Problem, *, once: bool = False) -> Contender:
    """Return its path of whole matrices, the only one with every derivative."""
    _torch()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attend = _sdpa(problem)

    def attend_by_matrices(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attend(*inputs)

    return _of_torch(MATH, problem, attend_by_matrices, once=once)


def pytorch_packed(problem: Problem) -> Contender:
    """Return it with the queries that share a key head folded into rows by hand.

    For one query without a mask.
    """
    attend = _torch().nn.functional.scaled_dot_product_attention
    B, Hk = problem.k.shape[:2]
    layout = _Layout(lambda x: [x.reshape(B, Hk, -1, x.shape[-1])])
    return _of_torch(PACKED, problem, attend, layout)


def pytorch_one_by_one(problem: Problem) -> Contender:
    """Return a call for each of the packed sequences."""
    attend = _torch().nn.functional.scaled_dot_product_attention
    causal = functools.partial(attend, is_causal=problem.pattern.causal)
    return _of_torch(PYTORCH_ONE_BY_ONE, problem, causal, _one_by_one(problem))


def pytorch_padded(problem: Problem) -> Contender:
    """Return one call on the packed sequences, padded to the longest and masked.

    Padding, which takes time too, is done beforehand.
    """
    torch = _torch()
    lengths = problem.pattern.documents
    longest = max(lengths)
    key = torch.arange(longest)
    mask = (key < torch.tensor(lengths)[:, None])[:, None, None, :]
    if problem.pattern.causal:
        mask = mask & (key <= key[:, None])
    pieces = _one_by_one(problem)

    def split(x: Tensor) -> list[Tensor]:
        rows = [part[0].transpose(0, 1) for part in pieces.split(x)]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return [padded.transpose(1, 2).contiguous()]

    def join(whole: list[Tensor]) -> Tensor:
        return pieces.join([x[None, :, :n] for x, n in zip(whole[0], lengths, strict=True)])

    attend = torch.nn.functional.scaled_dot_product_attention
    masked = functools.partial(attend, attn_mask=mask)
    return _of_torch(PADDED, problem, masked, _Layout(split, join))


def flex(problem: Problem) -> Contender:
    """Return the compiled FlexAttention of PyTorch, which has no backward on the CPU."""
    torch = _torch()
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    pattern = problem.pattern
    B, H, N, _ = problem.q.shape
    Hk, Nk = problem.k.shape[1:3]
    options: dict[str, Any] = {"enable_gqa": Hk < H}
    if pattern:
        ids, lengths = torch.from_numpy(pattern.ids()), torch.tensor(pattern.lengths)

        def sees(b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Any:
            return pattern.sees(b, i + (Nk - N), j, ids, lengths)

        entries = B if pattern.lengths else None
        options["block_mask"] = create_block_mask(sees, entries, None, N, Nk, device="cpu")

    # One graph or an error, since what is not compiled keeps whole matrices.
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    attend = functools.partial(compiled, **options)
    return _of_torch(FLEX, problem, attend, backward=False)


def onnx(problem: Problem) -> Contender:
    """Return the operator Attention of ONNX in onnxruntime; without a mask, forward only."""
    for package in ("onnxruntime", "onnx"):
        if importlib.util.find_spec(package) is None:
            raise NotAvailable(f"{package} is not installed")
    if is_bfloat16(problem.q.dtype):
        raise NotAvailable("its CPU kernels take no bfloat16")
    runtime: Any = importlib.import_module("onnxruntime")
    inputs = {"q": problem.q, "k": problem.k, "v": problem.v}
    model = _onnx_model(inputs, problem.do)

    @functools.cache
    def session(threads: int) -> Any:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def forward() -> Any:
        return session(THREADS.count).run(None, inputs)[0]

    return Contender(ONNX, forward, lambda o: {"o": o})


def _onnx_model(inputs: dict[str, Array], o: Array) -> bytes:
    """Return a graph of one node, as bytes."""
    helper: Any = importlib.import_module("onnx.helper")

    def described(name: str, x: Array) -> Any:
        kind = helper.np_dtype_to_tensor_dtype(x.dtype)
        return helper.make_tensor_value_info(name, kind, x.shape)

    node = helper.make_node("Attention", list(inputs), ["o"])
    given = [described(name, x) for name, x in inputs.items()]
    graph = helper.make_graph([node], "attention", given, [described("o", o)])
    opset = helper.make_opsetid("", 23)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    return bytes(model.SerializeToString())


def plain_read(problem: Problem) -> Contender:
    """Return a call that does nothing but read k and v, each thread its share: the largest word.

    It takes turns with the others, so that it finds in the caches what they find there.
    """
    words = [x.reshape(-1).view(np.int64) for x in (problem.k, problem.v)]

    @functools.cache
    def pool(threads: int) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(threads)

    def forward() -> list[Any]:
        parts = [part for x in words for part in np.array_split(x, THREADS.count)]
        if THREADS.count == 1:
            return [part.max() for part in parts]
        return list(pool(THREADS.count).map(np.max, parts))

    return Contender(READ, forward, lambda _: {})


def _torch() -> Any:
    if importlib.util.find_spec("torch") is None:
        raise NotAvailable("PyTorch is not installed")
    return importlib.import_module("torch")


def _sdpa(problem: Problem) -> Callable[..., Tensor]:
    torch, pattern = _torch(), problem.pattern
    options: dict[str, Any] = {}
    if pattern.causal and pattern.alone:
        options["is_causal"] = True
    elif pattern:
        options["attn_mask"] = torch.from_numpy(problem.dense_mask())
    if problem.q.shape[1] > problem.k.shape[1]:
        options["enable_gqa"] = True
    return functools.partial(torch.nn.functional.scaled_dot_product_attention, **options)


def _boundaries(problem: Problem) -> Array:
    return np.cumsum((0, *problem.pattern.documents))


def _one_by_one(problem: Problem) -> _Layout:
    """Return the layout of a tensor for each sequence."""
    torch = _torch()
    bounds = list(pairwise(map(int, _boundaries(problem))))
    return _Layout(
        lambda x: [x[:, :, start:stop].contiguous() for start, stop in bounds],
        lambda pieces: torch.cat(pieces, dim=2),
    )


def _tensor(x: Array) -> Any:
    torch = _torch()
    if is_bfloat16(x.dtype):
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _array(x: Tensor) -> Array:
    x = x.detach()
    return np.asarray(x.float() if x.itemsize == 2 else x)


def _of_torch(
    name: str,
    problem: Problem,
    attend: Callable[..., Tensor],
    layout: _Layout | None = None,
    *,
    once: bool = False,
    backward: bool = True,
) -> Contender:
    """Return a function of the tensors q, k and v as a contender.

    `backward` is false where it has no derivatives. Those but the first are for one piece alone.
    """
    torch = _torch()
    grad = torch.autograd.grad
    layout = layout or _Layout()
    split = [layout.split(_tensor(x)) for x in (problem.q, problem.k, problem.v, problem.do)]
    pieces = len(split[0])
    inputs, dos = (*split[0], *split[1], *split[2]), tuple(split[3])
    tangents = tuple(_tensor(x) for x in problem.tangents)
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    cotangents = tuple(x.clone().requires_grad_() for x in dos) if tangents else dos
    shapes = {"q": problem.q.shape, "k": problem.k.shape, "v": problem.v.shape}

    def each(flat: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(attend(*flat[piece::pieces]) for piece in range(pieces))

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return each(inputs)

    def save() -> tuple[Tensor, ...]:
        return each(leaves)

    def arrays(names: str, values: tuple[Tensor, ...]) -> dict[str, Array]:
        found = {}
        for index, label in enumerate(names.split()[: len(values) // pieces]):
            own = list(values[index * pieces : (index + 1) * pieces])
            shape = shapes.get(label[-1], problem.do.shape)
            found[label] = _array(layout.join(own)).reshape(shape)
        return found

    def graph() -> tuple[Any, tuple[Any, ...]]:
        o = save()
        return o, grad(o, leaves, cotangents, create_graph=True)

    def double_backward(_: Any, grads: Any) -> tuple[Any, ...]:
        inputs = (*leaves, *cotangents)
        found: tuple[Any, ...] = grad(grads, inputs, tangents, retain_graph=not once)
        return found

    return Contender(
        name,
        forward,
        lambda o: arrays("o", o),
        (lambda o: grad(o, leaves, dos, retain_graph=not once)) if backward else missing,
        save if backward else None,
        jvp=lambda: torch.func.jvp(attend, inputs, tangents),
        graph=graph,
        double_backward=double_backward,
        arrays=arrays,
    )
