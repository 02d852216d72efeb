"""Programs of JAX for CUDA, lowered where there is no GPU: never run, but read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")
pytest.importorskip("tilewise._xla")

import jax.numpy as jnp  # noqa: E402

import tilewise as tw  # noqa: E402
import tilewise.jax  # noqa: E402
from tilewise import Unsupported  # noqa: E402
from tilewise.jax import gpu  # noqa: E402


def lowered(function: Any, *arguments: Any) -> Any:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


x = jnp.ones((7, 13))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let programs hold the names of kernels in place of their code, which takes long to make."""
    pytest.importorskip("triton")
    from tilewise.shared import triton_programs
    from tilewise.shared.triton_programs import Binary

    def compiled(launch: Any, special: Any) -> Binary:
        return Binary(launch.kernel.__name__, repr(special).encode(), 128, 0, 2)

    def encoder(operator: str, number: int) -> Any:
        return lambda *given: triton_programs.encoded(*given, number=number, compiled=compiled)

    monkeypatch.setattr(gpu, "_encoder", encoder)
    monkeypatch.setenv(gpu.ARCHITECTURE, "sm_90")


def calls(text: str) -> list[tuple[set[str], str]]:
    """Return the kernels of each call, with its types."""
    form = r'custom_call @tilewise_launch\((.*?)\) \{.*?kernels = "(.*?)".*\} : (\(.*\) -> .*)'
    found = re.findall(form, text)
    return [(set(re.findall(r"\w{32} (\w+)", names)), types) for _, names, types in found]


def attend(q: Any, k: Any, v: Any) -> Any:
    return tw.jax.attention(q, k, v, mask=tw.causal())


q, k, v = (jnp.ones(shape, jnp.bfloat16) for shape in ((2, 4, 19, 5), (2, 2, 13, 5), (2, 2, 13, 3)))


@pytest.mark.usefixtures("written")
def test_forward_is_one_call_with_the_layouts_of_its_arrays() -> None:
    text = lowered(attend, q, k, v).as_text()
    ((kernels, types),) = calls(text)
    assert kernels == {"attention_bounds_kernel", "attention_fwd_kernel"}
    operands = "(tensor<1x1x19x4xi32>, tensor<2x4x19x5xbf16>, tensor<2x2x13x5xbf16>, "
    assert types.startswith(f"{operands}tensor<2x2x13x3xbf16>) -> (tensor<2x4x19x3xbf16>, ")
    assert "operand_layouts = [dense<[3, 2, 1, 0]>" in text
    assert "tilewise_evaluate" not in text and "-> (f64" not in text


@pytest.mark.usefixtures("written")
def test_derivatives_are_calls_of_their_own() -> None:
    def loss(q: Any) -> Any:
        return jnp.sum(attend(q, k, v) ** 2)

    def product(q: Any) -> Any:
        return jax.jvp(jax.grad(loss), (q,), (q,))[1]

    gradient = [kernels for kernels, _ in calls(lowered(jax.grad(loss), q).as_text())]
    bounds = "attention_bounds_kernel"
    assert gradient[1] == {bounds, "attention_delta_kernel", "attention_dq_kernel"}
    tangent = calls(lowered(lambda q: jax.jvp(loss, (q,), (q,))[1], q).as_text())
    assert [bounds, "attention_jvp_kernel"] in [sorted(kernels) for kernels, _ in tangent]
    second = set().union(*[kernels for kernels, _ in calls(lowered(product, q).as_text())])
    assert {"attention_jvp_kernel", "attention_delta_kernel", "attention_dq_kernel"} <= second
    assert "attention_dkv_kernel" not in second


@pytest.mark.usefixtures("written")
def test_losses_and_softmax() -> None:
    y = jnp.arange(7)
    loss = tw.jax.linear_cross_entropy
    cases = {
        "softmax_fwd_kernel": lambda x: tw.jax.log_softmax(x),
        "softmax_derivative_kernel": jax.grad(lambda x: tw.jax.softmax(x)[0, 0]),
        "cross_entropy_fwd_kernel": lambda x: tw.jax.cross_entropy(x, y),
        "cross_entropy_derivative_kernel": jax.grad(lambda x: tw.jax.cross_entropy(x, y)),
        "linear_cross_entropy_fwd_kernel": lambda x: loss(x, x, y),
        "linear_cross_entropy_gradient_kernel": jax.grad(lambda x: loss(x, x, y)),
    }
    for kernel, function in cases.items():
        names = set().union(*[kernels for kernels, _ in calls(lowered(function, x).as_text())])
        assert kernel in names, kernel


@pytest.mark.usefixtures("written")
def test_vmap_joins_the_batch_and_loops_where_it_cannot() -> None:
    stacked = jnp.stack([q, q, q])
    joined = lowered(jax.vmap(lambda q: attend(q, k, v)), stacked).as_text()
    assert "tensor<6x4x19x5xbf16>" in calls(joined)[0][1]
    biased = jax.vmap(lambda q, bias: tw.jax.attention(q, k, v, bias=bias))
    apart = lowered(biased, stacked, jnp.ones((3, 19, 13), jnp.bfloat16)).as_text()
    assert "stablehlo.while" in apart and "tensor<2x4x19x5xbf16>" in calls(apart)[0][1]


@pytest.mark.usefixtures("written")
def test_exported_programs_hold_both_platforms() -> None:
    allowed = [
        jax.export.DisabledSafetyCheck.custom_call(name)
        for name in ("tilewise_launch", "tilewise_evaluate")
    ]
    make = jax.export.export(
        jax.jit(tw.jax.softmax), platforms=("cpu", "cuda"), disabled_checks=allowed
    )
    exported = make(x)
    text = exported.mlir_module()
    assert "@tilewise_launch" in text and "@tilewise_evaluate" in text


@pytest.mark.usefixtures("written")
def test_what_is_not_served_is_unsupported() -> None:
    def attention(**options: Any) -> Any:
        return lambda q, k, v: tw.jax.attention(q, k, v, **options)

    def packed(q: Any, k: Any, v: Any) -> Any:
        bias = jnp.ones((1, 4, 4))
        return tw.jax.attention_varlen(q[0], k[0], v[0], [0, 4], bias=bias)

    of = jnp.ones((1, 4, 2, 3))
    for function, text in {
        attention(implementation="cpu"): "'cpu': computes on the CPU, and the program is for CUDA",
        attention(implementation="hopper"): "'hopper': is not provided through JAX",
        packed: "takes no bias with a column for each key of packed sequences",
    }.items():
        with pytest.raises(Unsupported, match=text):
            lowered(function, of, of, of)
    with pytest.raises(Unsupported, match="'triton': computes on a GPU, and the program is for th"):
        attention(implementation="triton")(of, of, of)


@pytest.mark.usefixtures("written")
def test_sizes_that_are_not_known_are_unsupported() -> None:
    (n,) = jax.export.symbolic_shape("n")
    rows = jax.ShapeDtypeStruct((n, 5), jnp.float32)
    with pytest.raises(Unsupported, match="sizes must be known where a program is lowered"):
        lowered(tw.jax.softmax, rows)


@pytest.mark.usefixtures("written")
def test_forward_mode_over_forward_mode_is_unsupported() -> None:
    def twice(x: Any) -> Any:
        return jax.jvp(lambda x: jax.jvp(tw.jax.softmax, (x,), (x,))[1], (x,), (x,))[1]

    with pytest.raises(Unsupported, match="forward mode over forward mode is not provided for C"):
        lowered(twice, x)


def test_an_architecture_has_to_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu.ARCHITECTURE, "hopper")
    with pytest.raises(ValueError, match="TILEWISE_CUDA_ARCH must be like sm_90, got 'hopper'"):
        lowered(tw.jax.softmax, x)
    monkeypatch.delenv(gpu.ARCHITECTURE)
    monkeypatch.setattr(jax, "devices", _no_devices)
    with pytest.raises(Unsupported, match="JAX finds no GPU of NVIDIA, and TILEWISE_CUDA_ARCH na"):
        lowered(tw.jax.softmax, x)
    board = type("Board", (), {"compute_capability": "8.9"})
    monkeypatch.setattr(jax, "devices", lambda platform: [board])
    assert gpu.architecture("softmax") == 89


def _no_devices(platform: str) -> Any:
    raise RuntimeError(f"Unknown backend {platform}")


def test_without_triton_nothing_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu.ARCHITECTURE, "sm_90")
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="needs the package triton, which is not installed"):
        lowered(tw.jax.softmax, x)


def test_the_frontend_imports_no_triton() -> None:
    code = "import sys, tilewise.jax; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


COMPILED = """
import json, jax, jax.numpy as jnp, numpy as np, tilewise.jax
from jax._src.lib.mlir import ir
from tilewise.shared.recording import Recording
from tilewise.shared.triton_programs import compiler, encoded
x = jnp.ones((7, 24), jnp.float32)
of = lambda x: jax.jvp(jax.grad(lambda x: tilewise.jax.logsumexp(x, 1).sum()), (x,), (x,))[1]
q = jnp.ones((1, 2, 19, 16), jnp.bfloat16)
programs = [(of, [x]), (tilewise.jax.attention, [q, q, q])]
found = []

def collect(op):
    if op.name == "stablehlo.custom_call":
        given = op.attributes["mhlo.backend_config"]
        numbers = np.array(given["numbers"]).tolist()
        kernels, code = given["kernels"].value, given["code"].value_bytes
        found.append([numbers, kernels, code.hex()])
    return ir.WalkResult.ADVANCE

for function, given in programs:
    made = jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",))
    made.compiler_ir().operation.walk(collect)
recording = Recording("sm_90")
tensor = recording.argument((5, 7), np.dtype(np.float16))
made = [tensor.swapaxes(0, 1).to(np.float64), tensor.float().sum(), tensor.new_zeros(3, dtype=int)]
copies = encoded(recording, made, {}, 90, compiler(90))
found.append([copies.numbers.tolist(), copies.kernels, copies.code.hex()])
print(json.dumps(found))
"""


def test_compiled_programs_hold_code_of_the_architecture() -> None:
    pytest.importorskip("triton")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {gpu.ARCHITECTURE: "sm_90"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = []
    for numbers, kernels, code in json.loads(done.stdout):
        assert numbers[:2] == [1, 90]
        rest = bytes.fromhex(code)
        lines = kernels.split("\n")
        assert numbers[3] == len(lines)
        for place, line in enumerate(lines):
            digest, name = line.split(" ")
            size, threads, shared = numbers[5 + 3 * place : 8 + 3 * place]
            binary, rest = rest[:size], rest[size:]
            assert len(digest) == 32 and threads % 32 == 0 and 0 <= shared < 228 << 10
            assert binary[:4] == b"\x7fELF" and int.from_bytes(binary[18:20], "little") == 190
            assert name.encode() in binary and b"sm_90a" in binary
            names.append(name)
        assert not rest
    wanted = {"softmax_fwd_kernel", "softmax_derivative_kernel", "attention_fwd_kernel"}
    assert set(names) == wanted | {"copy_kernel", "sum_kernel", "fill_kernel"}
