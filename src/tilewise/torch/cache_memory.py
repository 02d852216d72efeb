"""The memory of a cache on a device: tensors there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewise.base.errors import must, type_error, value_error
from tilewise.cache.memory import NAME, copied_pages, is_host, slots
from tilewise.cache.pages import Claim, View

from .cache import checked
from .checks import check_place, shown
from .gpu import sent


class DeviceMemory:
    """Pools of pages as tensors of one device; nothing here waits for it.

    Args:
        k: Shape of the pool of keys.
        v: Shape of the pool of values.
        dtype: Name of their dtype.
        device: The device.

    Raises:
        Unsupported: There are no kernels for the device.
        MemoryError: It has not enough memory.
    """

    def __init__(self, k: tuple[int, ...], v: tuple[int, ...], dtype: str, device: Any) -> None:
        try:
            device = torch.device(device)
        except RuntimeError:
            requirement = "be a device of PyTorch or the name of one"
            raise value_error(NAME, "device", requirement, repr(device)) from None
        if not is_host(device):
            check_place(NAME, device)
        wanted = getattr(torch, dtype)
        try:
            self.k, self.v = (torch.zeros(shape, dtype=wanted, device=device) for shape in (k, v))
        except torch.cuda.OutOfMemoryError as error:
            raise MemoryError(must(NAME, "pages", f"fit into {device}", k[0])) from error

    def read(self, operator: str, name: str, value: Any) -> tuple[Tensor, str]:
        """Return a tensor of the device as it is, and the name of its dtype."""
        if not isinstance(value, Tensor):
            requirement = f"be a torch.Tensor on {self.k.device} (as cache)"
            raise type_error(operator, name, requirement, type(value).__name__)
        return checked(operator, name, value, self.k.device), shown(value.dtype)

    def write(self, claim: Claim, k: Tensor, v: Tensor) -> None:
        """Write keys and values behind the sequences, all by one copy for each pool."""
        pools, device = ((self.k, k), (self.v, v)), self.k.device
        if claim.copies:
            source, target = sent(copied_pages(claim), device)
            for pool, _ in pools:
                pool[target] = pool[source]
        places = slots(claim.view, self.k.shape[2])
        if places.size:
            page, row, b, new = sent(places, device)
            for pool, x in pools:
                pool[page, :, row] = x[b, :, new]

    def dense(self, view: View, b: int) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values of a sequence; anything where evicted."""
        table = sent(view.block_table()[b], self.k.device).long()
        keys = int(view.lengths[b])
        return _joined(self.k, table, keys), _joined(self.v, table, keys)


def _joined(pool: Tensor, table: Tensor, keys: int) -> Tensor:
    pages = pool[table.clamp(min=0)]  # (P, Hk, page_size, D)
    return pages.transpose(0, 1).reshape(1, pool.shape[1], -1, pool.shape[3])[:, :, :keys]
