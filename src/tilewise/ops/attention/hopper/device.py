"""The GPU that Hopper kernels run on, through Triton."""

from __future__ import annotations

from typing import Any

from .launch import Job, Tiled
from .plan import ARCH, DTYPES, layout_of

__all__ = ["Gpu", "reason_against"]


def reason_against(x: Any) -> str | None:
    """Return why kernels for this architecture do not run where a tensor is."""
    device = getattr(x, "device", "cpu")
    kind = getattr(device, "type", device)
    if kind != "cuda":
        return f"it runs on a GPU of architecture {ARCH} alone, and q is on {kind}"
    try:
        from triton.runtime import driver
    except ImportError:
        return "it needs triton, which is not installed"
    target = driver.active.get_current_target()
    if (target.backend, target.arch) != ("cuda", 90):
        return f"it runs on architecture {ARCH} alone, not on {target.backend} {target.arch}"
    return None


class Gpu:
    """Launches kernels on the GPU that holds the tensors."""

    def programs(self, like: Any) -> int:
        """Return the number of multiprocessors: each has room for one program."""
        from triton.runtime import driver

        index = like.device.index or 0
        return int(driver.active.utils.get_device_properties(index)["multiprocessor_count"])

    def run(self, job: Job) -> None:
        """Launch a kernel on the current stream."""
        from .kernels import backward, forward

        kernel = getattr(forward, job.kernel, None) or getattr(backward, job.kernel)
        arguments = {
            name: _descriptor(value) if isinstance(value, Tiled) else value
            for name, value in job.arguments.items()
        }
        kernel[job.plan.grid](**arguments, **job.plan.constants, num_warps=job.plan.num_warps)


def _descriptor(tiled: Tiled) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    x, block = tiled.tensor, list(tiled.block)
    name = str(x.dtype).removeprefix("torch.")
    layout = layout_of(block, {**DTYPES, "float32": "fp32"}[name])
    return TensorDescriptor(x, list(x.shape), _strides(x), block, layout)


def _strides(x: Any) -> list[int]:
    """Return strides; what a dimension of one entry has is not read, but must be aligned."""
    strides, span = list(x.stride()), 1
    for i in reversed(range(len(strides))):
        if x.shape[i] == 1 and i != len(strides) - 1:
            strides[i] = -(-span // 8) * 8
        span = max(span, strides[i] * x.shape[i])
    return strides
