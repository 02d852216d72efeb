"""Time what the doors add to one call of the compiled kernel, on a problem that takes no time.

python bench/torch_overhead.py --json bench/results/torch_overhead.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tilewise as tw
import tilewise.torch
from tilewise import _core
from tilewise.hardware.machine import describe, versions

SHAPE = (1, 1, 4, 16)


def median_us(call: Callable[[], Any], rounds: int = 1000, calls: int = 10) -> float:
    """Return the median over short rounds of the time of one call, in microseconds."""
    for _ in range(200):
        call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def kernel(mask: tw.Mask | None) -> Callable[[], Any]:
    """Return a call of the compiled kernel alone, with arrays that exist already."""
    q, k, v, o = (np.ones(SHAPE, np.float32) for _ in range(4))
    m, log_l, lse = (np.empty(SHAPE[:3], np.float32) for _ in range(3))
    options: dict[str, Any] = dict.fromkeys(
        ("max_logit", "entropy", "mask_bits", "mask_tiles", "bias", "slopes", "sinks")
    )
    options["mask_rows"] = None if mask is None else mask.lower(*SHAPE[:3], SHAPE[2]).rows
    options |= {"softmax_scale": 0.25, "softcap": 0.0, "dropout_p": 0.0, "seed": 0}
    return lambda: _core.attention_forward(q, k, v, o, m=m, log_l=log_l, lse=lse, **options)


def doors(mask: tw.Mask | None) -> dict[str, Callable[[], Any]]:
    """Return the calls to time, by name."""
    arrays = [np.ones(SHAPE, np.float32) for _ in range(3)]
    plain = [torch.from_numpy(array) for array in arrays]
    leaves = [tensor.clone().requires_grad_() for tensor in plain]
    do = torch.ones(SHAPE)

    def no_grad() -> Any:
        with torch.no_grad():
            return tilewise.torch.attention(*leaves, mask=mask)

    def both() -> Any:
        return torch.autograd.grad(tilewise.torch.attention(*leaves, mask=mask), leaves, do)

    return {
        "kernel": kernel(mask),
        "torch, q * 2": lambda: leaves[0] * 2,
        "numpy": lambda: tw.numpy.attention(*arrays, mask=mask, return_lse=True),
        "torch, no grad": no_grad,
        "torch, grad": lambda: tilewise.torch.attention(*leaves, mask=mask),
        "torch, forward and backward": both,
    }


def main() -> None:
    """Print the medians, and write them to a file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    path = parser.parse_args().json
    torch.set_num_threads(1)
    tw.set_num_threads(1)
    results = {}
    for name, mask in {"no options": None, "mask=causal()": tw.causal()}.items():
        results[name] = {door: round(median_us(call), 1) for door, call in doors(mask).items()}
        for door, us in results[name].items():
            print(f"{name:16} {door:28} {us:7.1f} us")
    if path is not None:
        head = {"machine": describe(), "versions": versions("tilewise", "numpy", "torch")}
        figures = {"shape": SHAPE, "dtype": "float32", "threads": 1, "median us": results}
        path.write_text(json.dumps(head | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
