"""The door of JAX to CUDA: its programs on a driver that stands in, interpreted."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")
pytest.importorskip("tilewise._xla")

import jax.numpy as jnp  # noqa: E402

import tilewise as tw  # noqa: E402
import tilewise.jax  # noqa: E402


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module beside this one, running."""
    path = Path(__file__).with_name("jax_board.py")
    spec = importlib.util.spec_from_file_location("jax_board", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        yield module.started(tmp_path_factory.mktemp("driver"), patch)


# More queries than the kernels of decoding take.
SHAPES = ((2, 2, 19, 5), (2, 1, 13, 5), (2, 1, 13, 3))


def inputs(dtype: Any = np.float64, shapes: Any = SHAPES) -> list[Any]:
    made = np.random.default_rng(7)
    return [jnp.asarray(made.standard_normal(shape), dtype) for shape in shapes]


def both(board: Any, function: Any, rtol: float = 1e-12) -> None:
    """Compare what a function of the implementation returns with the kernels of the CPU."""
    programs = [jax.jit(partial(function, name)) for name in ("triton", "cpu")]
    mine, theirs = (jax.tree.leaves(program()) for program in programs)
    assert board.error is None, board.error
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 10)


def attention(name: str, **options: Any) -> Any:
    return lambda *x: tw.jax.attention(*x, implementation=name, **options)


SEEN = np.arange(19)[:, None] % 3 >= np.arange(13) % 4
IDS = np.array([[0] * 4 + [1] * 15, [0] * 7 + [1] * 12])
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {
        "mask": tw.causal(),
        "softcap": 1.7,
        "bias": np.linspace(-2, 1, 2 * 19).reshape(2, 19, 1),
        "softmax_scale": 0.3,
    },
    "bits": {"mask": SEEN, "sinks": np.linspace(-1, 1, 2), "layout": "bnhd"},
    "lengths": {
        "mask": tw.lengths([13, 4], query_lengths=[19, 9]) & tw.causal(),
        "dropout_p": 0.3,
        "seed": 2**63 + 9,
        "alibi_slopes": np.linspace(0.1, 0.4, 2),
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_attention_and_its_derivatives(board: Any, option: str) -> None:
    given = dict(OPTIONS[option])
    moving = {name: given.pop(name) for name in ("bias", "sinks") if name in given}
    x = inputs()
    if given.get("layout") == "bnhd":
        x = [a.swapaxes(1, 2) for a in x]

    def derived(name: str) -> Any:
        def loss(x: Any, moving: Any) -> Any:
            o, lse, *_ = attention(name, return_lse=True, **given, **moving)(*x)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

        def product(*at: Any) -> Any:
            gradient = jax.grad(loss, (0, 1))
            return jax.jvp(gradient, at, jax.tree.map(jnp.cos, at))

        return product(x, moving)

    both(board, derived)


MASKS = {
    "scalars-of-many-intervals": tw.chunked(3) | tw.prefix(2) | tw.window(1, 0),
    "ids": tw.documents(ids=IDS, ids_k=IDS[:, :13]) & tw.causal(),
}


def test_masks_of_arrays_that_are_not_known_while_tracing(board: Any) -> None:
    x = inputs(np.float32)

    def derived(name: str) -> Any:
        found = [attention(name, mask=mask, return_lse=True)(*x) for mask in MASKS.values()]
        few = jax.jit(lambda keys: attention(name, mask=keys)(x[0][:, :, :3], *x[1:]))
        return [*found, few(jnp.arange(13) % 5 != 2)]

    both(board, derived, 2e-6)


QUERIES, KEYS = [0, 6, 6, 8, 11], [0, 1, 4, 11, 13]
PACKED: dict[str, dict[str, Any]] = {
    "causal-and-window-or-prefix": {"mask": tw.causal() & (tw.window(2, 0) | tw.prefix(1))},
    "chunked-top-left-and-everything": {
        "mask": tw.chunked(2, align="top_left") | tw.window(0, 1),
        "bias": np.linspace(-2, 1, 22).reshape(2, 11, 1),
        "sinks": np.linspace(-1, 1, 2),
        "dropout_p": 0.3,
        "seed": 7,
    },
}


@pytest.mark.parametrize("option", PACKED)
def test_packed_sequences_whose_boundaries_are_not_known_while_tracing(
    board: Any, option: str
) -> None:
    q, k, v = inputs(shapes=[(11, 2, 5), (13, 1, 5), (13, 1, 3)])

    def derived(name: str) -> Any:
        def of(starts: Any, *x: Any) -> Any:
            more = {**PACKED[option], "return_lse": True, "implementation": name}
            o, lse, *_ = tw.jax.attention_varlen(*x, *starts, **more)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

        starts = jnp.asarray(QUERIES, np.int32), jnp.asarray(KEYS, np.int32)
        return jax.value_and_grad(of, (1, 2, 3))(starts, q, k, v)

    both(board, derived)


def test_seeds_are_read_when_the_program_runs(board: Any) -> None:
    x = inputs(np.float32)

    def derived(name: str) -> Any:
        drop = jax.jit(lambda seed: attention(name, dropout_p=0.4, seed=seed)(*x))
        return [drop(jnp.uint32(5)), drop(jnp.uint32(6)), drop(jax.random.key(3))]

    waits = board.library.stand_in_waits()
    both(board, derived, 2e-6)
    assert board.library.stand_in_waits() == waits + 3
    first, second, _ = derived("triton")
    assert not np.array_equal(first, second)


def test_vmap(board: Any) -> None:
    whole = [jnp.stack([a, jnp.sin(a)]) for a in inputs(np.float32)]
    x = [a[:, :1] for a in whole]
    sinks = jnp.asarray(np.linspace(-2, 3, 4).reshape(2, 2), np.float32)

    def derived(name: str) -> Any:
        def of(q: Any, sinks: Any) -> Any:
            return attention(name, sinks=sinks)(q, x[1][0], x[2][0])

        joined = jax.vmap(attention(name, mask=tw.window(3, 2)))(*whole)
        apart = jax.vmap(jax.grad(lambda *a: jnp.sum(jnp.sin(of(*a))), 1))(x[0], sinks)
        return joined, apart, jax.vmap(of)(x[0][:0], sinks[:0])

    both(board, derived, 5e-6)


def test_sixteen_bits(board: Any) -> None:
    x = [a[:1] for a in inputs(jnp.bfloat16)]

    def derived(name: str, *x: Any) -> Any:
        o, back = jax.vjp(attention(name, mask=tw.causal()), *x)
        return [o, *back(jnp.cos(o))]

    exact = derived("cpu", *[a.astype(np.float64) for a in x])
    for mine, theirs in zip(derived("triton", *x), exact, strict=True):
        assert mine.dtype == jnp.bfloat16
        error = jnp.linalg.norm(mine.astype(np.float64) - theirs) / jnp.linalg.norm(theirs)
        assert error < 1e-2


def test_softmax_and_its_derivatives(board: Any) -> None:
    (x,) = inputs(shapes=[(3, 7, 5)])
    where = jnp.asarray(np.arange(35).reshape(7, 5) % 3 != 1)

    def derived(name: str) -> Any:
        def of(x: Any, sink: Any) -> Any:
            more = {"temperature": 1.3, "where": where, "sink": sink, "implementation": name}
            return jnp.sum(jnp.nan_to_num(jnp.sin(tw.jax.log_softmax(x, 1, **more))))

        at = x, jnp.asarray(np.linspace(-1, 1, 15).reshape(3, 5))
        gradient = jax.value_and_grad(of, (0, 1))
        return jax.jvp(gradient, at, jax.tree.map(jnp.cos, at))

    both(board, derived)


def test_rows_in_parts(board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for operator in ("softmax", "cross_entropy"):
        plan = importlib.import_module(f"tilewise.ops.{operator}.gpu.plan")
        monkeypatch.setattr(plan, "ENTRIES", dict.fromkeys(plan.ENTRIES, 16))
    (x,) = inputs(shapes=[(1, 17)])

    def derived(name: str) -> Any:
        def of(x: Any) -> Any:
            soft = tw.jax.softmax(x, temperature=0.7, implementation=name)
            loss = tw.jax.cross_entropy(x, jnp.array([16]), implementation=name)
            return jnp.sum(jnp.sin(3 * soft)) + loss

        return jax.jvp(jax.value_and_grad(of), (x,), (jnp.cos(x),))

    both(board, derived)
    grids = {grid[1] for name, grid, *_ in board.launched if name == "softmax_fwd_kernel"}
    assert 3 in grids


def test_cross_entropy_and_its_derivatives(board: Any) -> None:
    (x,) = inputs(shapes=[(7, 13)])
    y = jnp.asarray([0, 12, -100, 5, 5, 1, 11], np.int32)
    options = {"label_smoothing": 0.1, "z_loss": 0.2, "weight": jnp.linspace(0.2, 2, 13)}

    def derived(name: str) -> Any:
        def of(x: Any) -> Any:
            more = {**options, "reduction": "none", "implementation": name}
            return jnp.sum(jnp.sin(tw.jax.cross_entropy(x, y, **more)))

        return jax.jvp(jax.value_and_grad(of), (x,), (jnp.cos(x),))

    both(board, derived)


def test_cross_entropy_with_probabilities(board: Any) -> None:
    x, y = inputs(shapes=[(2, 5, 3), (2, 5, 3)])

    def derived(name: str) -> Any:
        def of(x: Any, y: Any) -> Any:
            q = tw.jax.softmax(y, 1, implementation=name)
            return tw.jax.cross_entropy(x, q, implementation=name)

        at = x, y
        return jax.jvp(jax.value_and_grad(of, (0, 1)), at, jax.tree.map(jnp.cos, at))

    both(board, derived)


def test_linear_cross_entropy_and_its_derivatives(board: Any) -> None:
    x = inputs(shapes=[(7, 5), (13, 5), (13,)])
    y = jnp.asarray([0, 12, -100, 5, 5, 1, 11])
    options = {"label_smoothing": 0.1, "z_loss": 0.2, "class_weight": jnp.linspace(0.2, 2, 13)}

    def derived(name: str) -> Any:
        def of(hidden: Any, weight: Any, bias: Any) -> Any:
            more = {**options, "bias": bias, "implementation": name}
            found = tw.jax.linear_cross_entropy(hidden, weight, y, return_entropy=True, **more)
            return jnp.sin(found.loss) + jnp.sum(jnp.sin(found.entropy))

        return jax.jvp(jax.value_and_grad(of, (0, 1, 2)), x, [jnp.cos(a) for a in x])

    both(board, derived)


def test_gradients_of_a_loss_come_with_it(board: Any) -> None:
    hidden, weight = inputs(jnp.float32, [(7, 5), (13, 5)])
    y = jnp.asarray([0, 12, -100, 5, 5, 1, 11])

    def derived(name: str) -> Any:
        def of(*x: Any) -> Any:
            return tw.jax.linear_cross_entropy(*x, y, shift=1, implementation=name)

        return jax.value_and_grad(of, (0, 1))(hidden, weight)

    before = len(board.programs)
    both(board, derived, 1e-5)
    assert len(board.programs) == before + 1


def test_a_target_that_is_no_class_makes_the_loss_nan(board: Any) -> None:
    x, weight = inputs(np.float32, [(3, 13), (17, 13)])
    kept = jnp.asarray([0, 12, -100])
    for y in (jnp.asarray([0, 13, -100]), jnp.asarray([0, -1, 5])):
        each = tw.jax.cross_entropy(x, y, reduction="none", implementation="triton")
        assert np.isnan(each).tolist() == [False, True, False]
        assert np.isnan(tw.jax.cross_entropy(x, y, implementation="triton"))
    loss = tw.jax.linear_cross_entropy
    assert np.isnan(loss(x, weight, kept + 6, ignore_index=-94, implementation="triton"))
    assert np.isfinite(loss(x, weight, kept, implementation="triton"))


def test_a_program_that_was_saved_runs_as_before(board: Any) -> None:
    (x,) = inputs(np.float32, [(3, 7)])
    of = jax.jit(lambda x: tw.jax.softmax(x, implementation="triton"))
    allowed = [jax.export.DisabledSafetyCheck.custom_call("tilewise_launch")]
    saved = jax.export.export(of, disabled_checks=allowed)(x).serialize()
    assert np.array_equal(jax.export.deserialize(saved).call(x), of(x))


def test_modules_are_loaded_once_and_contexts_left_as_they_were(board: Any) -> None:
    x = inputs(np.float32)
    of = jax.jit(attention("triton", softmax_scale=0.77))
    before = len(board.launched)
    first = of(*x)
    loads, launches = board.library.stand_in_loads(), len(board.launched)
    assert np.array_equal(of(*x), first)
    assert board.library.stand_in_loads() == loads
    assert len(board.launched) - launches == launches - before > 0
    assert board.library.stand_in_pushed() == 0


def test_launches_have_the_grid_of_the_plan_and_their_shared_memory(
    board: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "shared", 99_000)
    (x,) = inputs(np.float32, [(67, 2111)])
    before = len(board.launched)
    # The driver refuses more shared memory than it was told of.
    tw.jax.logsumexp(x, 1, temperature=1.9, implementation="triton").block_until_ready()
    assert board.launched[before:] == [("softmax_fwd_kernel", (67, 1, 1), 256, 99_000)]


FAILURES = {
    "cuLaunchKernel": "tilewise: cuLaunchKernel of softmax_fwd_kernel: CUDA_ERROR_ILLEGAL_ADDRESS "
    r"\(an illegal memory access was encountered\)",
    "cuModuleLoadData": "cuModuleLoadData of softmax_fwd_kernel: CUDA_ERROR_ILLEGAL_ADDRESS",
    "cuModuleGetFunction": "cuModuleGetFunction of softmax_fwd_kernel: CUDA_ERROR_ILLEGAL",
    "cuCtxPushCurrent": "the context cannot be made current: CUDA_ERROR_ILLEGAL_ADDRESS",
    "no context": "there is no current context",
}


@pytest.mark.parametrize("failing", FAILURES)
def test_failures_of_the_driver_are_told(board: Any, failing: str) -> None:
    # Rows of other lengths have other code, which is not loaded yet.
    x = jnp.ones((3, 5 << list(FAILURES).index(failing)), np.float32)
    of = jax.jit(lambda x: tw.jax.softmax(x, implementation="triton"))
    board.library.stand_in_failing(failing.encode())
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match=FAILURES[failing]):
            of(x).block_until_ready()
    finally:
        board.library.stand_in_failing(b"")
    assert board.library.stand_in_pushed() == 0
    np.testing.assert_allclose(of(x), 1 / x.shape[1], rtol=1e-6)


def test_a_program_that_was_spoiled_is_refused(board: Any) -> None:
    from tilewise.jax.execution import LAUNCHER

    x = jnp.ones(3, np.float32)
    tw.jax.softmax(x, implementation="triton")
    good = board.programs[-1]
    shapes = [jax.ShapeDtypeStruct((b.entries,), b.dtype) for b in good.results]

    def run(numbers: Any, kernels: str = good.kernels) -> Any:
        call = jax.ffi.ffi_call(LAUNCHER, shapes)
        return call(x, numbers=np.asarray(numbers, np.int64), kernels=kernels, code=good.code)

    assert np.asarray(run(good.numbers)[0]) == pytest.approx(1 / 3)
    spoiled = {
        "ends too soon": good.numbers[:-1],
        "is longer than it says": [*good.numbers, 0],
        "another version": [2, *good.numbers[1:]],
        "has other buffers": [*good.numbers[:2], 99, *good.numbers[3:]],
        "lacks code": [*good.numbers[:5], 10**6, *good.numbers[6:]],
        "names what it does not have": [*good.numbers[:8], 7, *good.numbers[9:]],
    }
    for text, numbers in spoiled.items():
        with pytest.raises(jax.errors.JaxRuntimeError, match=text):
            jax.block_until_ready(run(numbers))
    with pytest.raises(jax.errors.JaxRuntimeError, match="lacks code"):
        jax.block_until_ready(run(good.numbers, "digest"))


def test_code_for_another_architecture_is_refused(board: Any) -> None:
    of = jax.jit(lambda x: tw.jax.softmax(x, implementation="triton"))
    board.library.stand_in_board(1, 80)
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match="for sm_90, and the GPU is sm_80"):
            of(jnp.ones((2, 3), np.float32)).block_until_ready()
    finally:
        board.library.stand_in_board(0, 90)


def test_whole_tensors_are_copied_filled_and_summed(board: Any) -> None:
    from tilewise.jax.execution import LAUNCHER
    from tilewise.shared.recording import Recording
    from tilewise.shared.triton_programs import encoded

    (x,) = inputs(np.float32, [(3, 5, 7)])
    recording = Recording("interpreter")
    tensor = recording.argument(x.shape, np.dtype(np.float32))
    part = tensor[1:].swapaxes(0, 1)[2]
    made = {
        "turned": tensor.swapaxes(0, 2).contiguous(),
        "wide": part.double(),
        "repeated": part[0].expand(4, 7).reshape(2, -1),
        "sum": tensor.swapaxes(1, 2).double().sum().reshape(1),
        "zeros": part.new_zeros((2, 3), dtype=np.int32),
        "constant": recording.apart([recording.constant(np.arange(6, dtype=np.uint16)[::2])])[0],
    }
    wide = np.asarray(x, np.float64)
    expected = {
        "turned": x.swapaxes(0, 2),
        "wide": wide[1:, 2],
        "repeated": np.broadcast_to(x[1, 2], (4, 7)).reshape(2, 14),
        "sum": wide.sum().reshape(1),
        "zeros": np.zeros((2, 3), np.int32),
        "constant": np.array([0, 2, 4], np.int16),
    }
    tensors = list(made.values())
    program = encoded(recording, tensors, {}, 90, board.compiled)
    given = [x if b.constant is None else b.constant for b in program.operands]
    shapes = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in tensors]
    shapes += [jax.ShapeDtypeStruct((b.entries,), b.dtype) for b in program.results[len(made) :]]
    call = jax.ffi.ffi_call(LAUNCHER, shapes)
    names = ("numbers", "kernels", "code")
    found = call(*given, **{name: getattr(program, name) for name in names})
    for name, array in zip(made, found, strict=False):
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_allclose(array, expected[name], rtol=1e-12, err_msg=name)


def test_results_are_memory_of_their_own() -> None:
    pytest.importorskip("triton")
    from tilewise.shared.recording import Recording

    recording = Recording("interpreter")
    given = recording.argument((2, 3), np.dtype(np.float32))
    made = given.new_empty((4, 3))
    found = recording.apart([made, made, given, made[1:3], made.swapaxes(0, 1)])
    assert found[0] is made and len({id(t.buffer) for t in found}) == 5
    assert [t.shape for t in found] == [(4, 3), (4, 3), (2, 3), (2, 3), (3, 4)]
    assert not any(t.buffer.given for t in found) and all(t.is_contiguous() for t in found)


def test_what_is_known_of_arguments_is_what_holds_when_they_are_passed() -> None:
    pytest.importorskip("triton")
    from tilewise.shared.recording import Launch, LaunchPlan, Recording
    from tilewise.shared.triton_copies import fill_kernel
    from tilewise.shared.triton_programs import specialised

    tensor = Recording("interpreter").argument((96,), np.dtype(np.float32))

    def known(at: int, n: int) -> tuple[Any, ...]:
        given = {"result_ptr": tensor[at:], "value": 1.0, "n": n, "BLOCK": 64}
        found = specialised(Launch(fill_kernel, LaunchPlan((1,), {}), given))
        places = [place for (place,), _ in found.attributes]
        return [of for _, of in found.signature], places

    assert known(0, 48) == (["*fp32", "fp64", "i32", "constexpr"], [0, 2])
    assert known(4, 47) == (["*fp32", "fp64", "i32", "constexpr"], [0])
    assert known(2, 2**40) == (["*fp32", "fp64", "i64", "constexpr"], [2])
    assert known(1, 1) == (["*fp32", "fp64", "constexpr", "constexpr"], [])


def test_a_driver_that_is_not_there_is_told() -> None:
    from tilewise import _xla

    with pytest.raises(RuntimeError, match="NVIDIA's driver cannot be opened: libmissing"):
        _xla.open_driver("libmissing.so.1")
    with pytest.raises(RuntimeError, match="NVIDIA's driver has no function cuGetErrorName"):
        _xla.open_driver("libm.so.6")
