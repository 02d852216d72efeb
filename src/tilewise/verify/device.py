"""Implementations on tensors of a GPU, or interpreted ones, as implementations on arrays."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from tilewise.base.errors import unsupported
from tilewise.base.operator import Implementation
from tilewise.dispatch import device_implementation

from .tensors import array_of, tensor_of

__all__ = ["on_arrays"]


def on_arrays(operator: str, name: str) -> Implementation:
    """Return an implementation on tensors as one that takes and returns arrays.

    Its tensors are on the GPU that there is, or on the CPU where Triton interprets its kernels.

    Raises:
        Unsupported: There is neither, or the package that it needs is not installed.
    """
    from tilewise.torch.gpu import adapted, missing

    own = device_implementation(operator, name)
    reason = None if own.interprets else missing()
    if reason is not None:
        raise unsupported(operator, f"implementation {name!r}: {reason}")
    device = "cpu" if own.interprets else "cuda"

    def to_tensor(array: NDArray[Any]) -> Any:
        plain = array.view("int16") if array.dtype == "uint16" else array
        return tensor_of(plain).to(device)

    return adapted(operator, own, to_tensor, array_of)
