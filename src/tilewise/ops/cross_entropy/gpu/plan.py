"""How the kernels of the cross-entropy are launched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tilewise.shared.launch import Compilation
from tilewise.shared.row_tiles import (
    POINTERS,
    RowTiles,
    compilation,
    itemsize_of,
    merge_plan,
    reduction_plan,
    row_tiles,
    sums_of,
)

ENTRIES = {"forward": 8192, "vjp": 4096, "jvp": 4096, "vjp_jvp": 2048}
"""Entries of a tile at most, for what a kernel keeps of each in registers."""


def tiles(kind: str, C: int, I: int, itemsize: int) -> RowTiles:
    """Return the tiles of a kernel.

    Args:
        kind: forward, vjp, jvp or vjp_jvp.
        C: Classes.
        I: Rows that lie side by side behind the axis of the classes.
        itemsize: Bytes of a logit.
    """
    return row_tiles(C, I, entries=ENTRIES[kind], itemsize=itemsize)


_PLANNED = {
    "bfloat16": (1000, 128256),
    "float16": (1000,),
    "float32": (1000, 128256),
    "float64": (1000,),
}
"""Classes for which kernels are compiled without a GPU."""


def planned(arch: str) -> Iterator[Compilation]:
    """Return the configurations that are compiled without a GPU: the same for each architecture."""
    from tilewise.shared import triton_losses

    from . import kernels

    for dtype, sizes in _PLANNED.items():
        for targets in ("indices", "probabilities"):
            for C in sizes:
                yield from _of_rows(C, dtype, targets)
    losses = dict.fromkeys(("loss_ptr", "lse_ptr", "z_loss_ptr", "parts_ptr"), "*fp32")
    rows = dict.fromkeys(("m_ptr", "log_l_ptr", "total_ptr"), "*fp32")
    indices = {"targets_ptr": "*i64", "weight_ptr": "*fp32"}
    numbers = {"zeta": "fp64", "ignored": "i64"}
    merged = {"targets_ptr": "*i64", **rows, **losses}
    constants = {**merge_plan(1, 1).constants, "SQUARED": True}
    kernel = kernels.cross_entropy_merge_kernel
    yield compilation("cross_entropy_merge", kernel, merged, numbers, constants, 4)
    factor = {**indices, "scale_ptr": "*fp64"}
    plan, numbers = reduction_plan(), {"ignored": "i64"}
    kernel = triton_losses.mean_factor_kernel
    constants = {**plan.constants, "ANY": True}
    yield compilation("mean_factor", kernel, factor, numbers, constants, plan.num_warps)
    totals = {"loss_total_ptr": "*fp32", "z_loss_total_ptr": "*fp32", "scale_ptr": "*fp64"}
    kernel = triton_losses.reduce_rows_kernel
    pointers = {**losses, **totals}
    pointers = {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
    yield compilation("reduce_rows", kernel, pointers, {}, plan.constants, plan.num_warps)


def _of_rows(C: int, dtype: str, targets: str) -> Iterator[Compilation]:
    """Return the configurations of all functions for rows of C classes."""
    from .kernels import cross_entropy_derivative_kernel, cross_entropy_fwd_kernel

    indices = {"targets_ptr": "*i64", "weight_ptr": sums_of(dtype)}
    inputs = {"x_ptr": POINTERS[dtype]}
    inputs |= indices if targets == "indices" else {"q_ptr": POINTERS[dtype]}
    cut = tiles("forward", C, 1, itemsize_of(dtype))
    names = ("m", "log_l", "total", "loss", "lse", "z_loss", "parts")
    pointers = {**inputs, **{f"{name}_ptr": sums_of(dtype) for name in names}}
    phase = "whole" if cut.parts == 1 else "sums"
    title = f"cross_entropy_fwd {targets} {C} {dtype}"
    yield _compilation(title, cross_entropy_fwd_kernel, pointers, cut, phase)
    for kind in ("vjp", "jvp", "vjp_jvp"):
        cut = tiles(kind, C, 1, itemsize_of(dtype))
        long = cut.parts > 1 and kind != "vjp"
        for phase in ("sums", "write") if long else ("whole",):
            title = f"cross_entropy_{kind} {targets} {C} {phase} {dtype}"
            pointers = {**inputs, **_derivative(kind, targets, dtype)}
            kernel = cross_entropy_derivative_kernel
            yield _compilation(title, kernel, pointers, cut, phase, {"KIND": kind})


def _derivative(kind: str, targets: str, dtype: str) -> dict[str, str]:
    """Return the types of the tensors that one derivative takes and others do not."""
    rows = ["m", "log_l", "total", "parts", "sums"]
    rows += ["tloss", "tlse", "tz_loss"] if kind == "jvp" else ["g", "g_lse", "g_z"]
    whole = [] if kind == "vjp" else ["tx"]
    whole += [] if kind == "jvp" else ["dx"]
    if kind == "vjp_jvp":
        rows += ["tg", "tg_lse", "tg_z"]
    if targets == "probabilities":
        whole += [{"tx": "tq", "dx": "dq"}[name] for name in whole]
    found = {f"{name}_ptr": sums_of(dtype) for name in rows}
    found |= {f"{name}_ptr": POINTERS[dtype] for name in whole}
    return found if kind == "jvp" else {**found, "scale_ptr": "*fp64"}


def _compilation(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    cut: RowTiles,
    phase: str,
    more: dict[str, Any] | None = None,
) -> Compilation:
    """Return a configuration for classes that lie side by side, with all options."""
    numbers = dict.fromkeys(("sharp", "share", "zeta", "cap"), "fp64") | {"ignored": "i64"}
    dense = [argument for argument in kernel.arg_names if argument.endswith("_c")]
    fixed = {**dict.fromkeys(dense, 1), **cut.launch(1, 1).constants, **(more or {})}
    fixed |= {"CAPPED": True, "SQUARED": True, "PHASE": phase}
    return compilation(name, kernel, pointers, numbers, fixed, cut.num_warps)
