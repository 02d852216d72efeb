"""The compiled kernels. Private: use tilewise.numpy."""

from typing import Annotated

from numpy.typing import NDArray


def target() -> str:
    """The instruction set in use."""

def targets() -> list[str]:
    """The instruction sets this CPU can run, best first."""

def set_target(name: str) -> None:
    """Use the named instruction set from now on."""

def num_threads() -> int:
    """Threads that a call may use."""

def set_num_threads(n: int) -> None:
    """Let a call use n threads from now on."""

def fma_peak(dtype: str, seconds: float) -> float:
    """Fused multiply-adds of one core in GFLOP/s."""

def attention_forward(q: Annotated[NDArray, dict(device='cpu', writable=False)], k: Annotated[NDArray, dict(device='cpu', writable=False)], v: Annotated[NDArray, dict(device='cpu', writable=False)], o: Annotated[NDArray, dict(device='cpu')], *, m: Annotated[NDArray, dict(device='cpu')] | None, log_l: Annotated[NDArray, dict(device='cpu')] | None, lse: Annotated[NDArray, dict(device='cpu')] | None, max_logit: Annotated[NDArray, dict(device='cpu')] | None, entropy: Annotated[NDArray, dict(device='cpu')] | None, mask_rows: Annotated[NDArray, dict(device='cpu', writable=False)] | None, mask_bits: Annotated[NDArray, dict(device='cpu', writable=False)] | None, mask_tiles: Annotated[NDArray, dict(device='cpu', writable=False)] | None, bias: Annotated[NDArray, dict(device='cpu', writable=False)] | None, slopes: Annotated[NDArray, dict(device='cpu', writable=False)] | None, sinks: Annotated[NDArray, dict(device='cpu', writable=False)] | None, softmax_scale: float, softcap: float, dropout_p: float = 0.0, seed: int = 0) -> None:
    """Write o and the row results that are given; softcap 0 is none."""

def attention_forward_jvp(q: Annotated[NDArray, dict(device='cpu', writable=False)], k: Annotated[NDArray, dict(device='cpu', writable=False)], v: Annotated[NDArray, dict(device='cpu', writable=False)], o: Annotated[NDArray, dict(device='cpu')], *, m: Annotated[NDArray, dict(device='cpu')] | None, log_l: Annotated[NDArray, dict(device='cpu')] | None, lse: Annotated[NDArray, dict(device='cpu')] | None, max_logit: Annotated[NDArray, dict(device='cpu')] | None, entropy: Annotated[NDArray, dict(device='cpu')] | None, tq: Annotated[NDArray, dict(device='cpu', writable=False)] | None, tk: Annotated[NDArray, dict(device='cpu', writable=False)] | None, tv: Annotated[NDArray, dict(device='cpu', writable=False)] | None, tbias: Annotated[NDArray, dict(device='cpu', writable=False)] | None, tsinks: Annotated[NDArray, dict(device='cpu', writable=False)] | None, to: Annotated[NDArray, dict(device='cpu')], tlse: Annotated[NDArray, dict(device='cpu')], mask_rows: Annotated[NDArray, dict(device='cpu', writable=False)] | None, mask_bits: Annotated[NDArray, dict(device='cpu', writable=False)] | None, mask_tiles: Annotated[NDArray, dict(device='cpu', writable=False)] | None, bias: Annotated[NDArray, dict(device='cpu', writable=False)] | None, slopes: Annotated[NDArray, dict(device='cpu', writable=False)] | None, sinks: Annotated[NDArray, dict(device='cpu', writable=False)] | None, softmax_scale: float, softcap: float, dropout_p: float = 0.0, seed: int = 0) -> None:
    """Write what attention_forward writes, and to and tlse."""

def attention_jvp(q: Annotated[NDArray, dict(device='cpu', writable=False)], k: Annotated[NDArray, dict(device='cpu', writable=False)], v: Annotated[NDArray, dict(device='cpu', writable=False)], o: Annotated[NDArray, dict(device='cpu', writable=False)], m: Annotated[NDArray, dict(device='cpu', writable=False)], log_l: Annotated[NDArray, dict(device='cpu', writable=False)], *, tq: Annotated[NDArray, dict(device='cpu', writable=False)] | None, tk: Annotated[NDArray, dict(device='cpu', writable=False)] | None, tv: Annotated[NDArray, dict(device='cpu', writable=False)] | None, tbias: Annotated[NDArray, dict(device='cpu', writable=False)] | None, tsinks: Annotated[NDArray, dict(device='cpu', writable=False)] | None, to: Annotated[NDArray, dict(device='cpu')], tlse: Annotated[NDArray, dict(device='cpu')], mask_rows: Annotated[NDArray, dict(device='cpu', writable=False)] | None, mask_bits: Annotated[NDArray, dict(device='cpu', writable=False)] | None, mask_tiles: Annotated[NDArray, dict(device='cpu', writable=False)] | None, bias: Annotated[NDArray, dict(device='cpu', writable=False)] | None, slopes: Annotated[NDArray, dict(device='cpu', writable=False)] | None, sinks: Annotated[NDArray, dict(device='cpu', writable=False)] | None, softmax_scale: float, softcap: float, dropout_p: float = 0.0, seed: int = 0) -> None:
    """Write to and tlse."""

def attention_vjp(q: Annotated[NDArray, dict(device='cpu', writable=False)], k: Annotated[NDArray, dict(device='cpu', writable=False)], v: Annotated[NDArray, dict(device='cpu', writable=False)], do: Annotated[NDArray, dict(device='cpu', writable=False)], o: Annotated[NDArray, dict(device='cpu', writable=False)], m: Annotated[NDArray, dict(device='cpu', writable=False)], log_l: Annotated[NDArray, dict(device='cpu', writable=False)], *, dlse: Annotated[NDArray, dict(device='cpu', writable=False)] | None, dq: Annotated[NDArray, dict(device='cpu')] | None, dk: Annotated[NDArray, dict(device='cpu')] | None, dv: Annotated[NDArray, dict(device='cpu')] | None, dbias: Annotated[NDArray, dict(device='cpu')] | None, dsinks: Annotated[NDArray, dict(device='cpu')] | None, mask_rows: Annotated[NDArray, dict(device='cpu', writable=False)] | None, mask_bits: Annotated[NDArray, dict(device='cpu', writable=False)] | None, mask_tiles: Annotated[NDArray, dict(device='cpu', writable=False)] | None, bias: Annotated[NDArray, dict(device='cpu', writable=False)] | None, slopes: Annotated[NDArray, dict(device='cpu', writable=False)] | None, sinks: Annotated[NDArray, dict(device='cpu', writable=False)] | None, softmax_scale: float, softcap: float, dropout_p: float = 0.0, seed: int = 0) -> None:
    """Write the gradients that are given; dbias must hold zeros."""

def attention_vjp_jvp(q: Annotated[NDArray, dict(device='cpu', writable=False)], k: Annotated[NDArray, dict(device='cpu', writable=False)], v: Annotated[NDArray, dict(device='cpu', writable=False)], do: Annotated[NDArray, dict(device='cpu', writable=False)], o: Annotated[NDArray, dict(device='cpu', writable=False)], m: Annotated[NDArray, dict(device='cpu', writable=False)], log_l: Annotated[NDArray, dict(device='cpu', writable=False)], *, dlse: Annotated[NDArray, dict(device='cpu', writable=False)] | None, tq: Annotated[NDArray, dict(device='cpu', writable=False)] | None, tk: Annotated[NDArray, dict(device='cpu', writable=False)] | None, tv: Annotated[NDArray, dict(device='cpu', writable=False)] | None, tbias: Annotated[NDArray, dict(device='cpu', writable=False)] | None, tsinks: Annotated[NDArray, dict(device='cpu', writable=False)] | None, to: Annotated[NDArray, dict(device='cpu', writable=False)], tlse: Annotated[NDArray, dict(device='cpu', writable=False)], tdo: Annotated[NDArray, dict(device='cpu', writable=False)] | None, tdlse: Annotated[NDArray, dict(device='cpu', writable=False)] | None, dq: Annotated[NDArray, dict(device='cpu')] | None, dk: Annotated[NDArray, dict(device='cpu')] | None, dv: Annotated[NDArray, dict(device='cpu')] | None, dbias: Annotated[NDArray, dict(device='cpu')] | None, dsinks: Annotated[NDArray, dict(device='cpu')] | None, mask_rows: Annotated[NDArray, dict(device='cpu', writable=False)] | None, mask_bits: Annotated[NDArray, dict(device='cpu', writable=False)] | None, mask_tiles: Annotated[NDArray, dict(device='cpu', writable=False)] | None, bias: Annotated[NDArray, dict(device='cpu', writable=False)] | None, slopes: Annotated[NDArray, dict(device='cpu', writable=False)] | None, sinks: Annotated[NDArray, dict(device='cpu', writable=False)] | None, softmax_scale: float, softcap: float, dropout_p: float = 0.0, seed: int = 0) -> None:
    """
    Write the tangents of the gradients that are given; dbias must hold zeros.
    """
