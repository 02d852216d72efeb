"""How the kernels of the cross-entropy are launched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tilewise.shared.launch import Compilation
from tilewise.shared.row_tiles import RowTiles, compilation, merge_plan, reduction_plan, row_tiles

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
    entries = ENTRIES[kind]
    return row_tiles(C, I, entries=entries // 2 if itemsize == 8 else entries)


def planned(arch: str) -> Iterator[Compilation]:
    """Return the configurations that are compiled without a GPU: the same for each architecture."""
    from tilewise.shared import triton_losses

    from . import kernels

    rows = {f"{name}_ptr": "*fp32" for name in ("m", "log_l", "total")}
    indices = {"targets_ptr": "*i64", "weight_ptr": "*fp32"}
    losses = {f"{name}_ptr": "*fp32" for name in ("loss", "lse", "z_loss", "parts")}
    for name, whole in (("indices", indices), ("probabilities", {"q_ptr": "*bf16"})):
        for C in (1000, 128256):
            cut = tiles("forward", C, 1, 2)
            pointers = {"x_ptr": "*bf16", **whole, **rows, **losses}
            phase = "whole" if cut.parts == 1 else "sums"
            title = f"cross_entropy_fwd {name} {C}"
            yield _compilation(title, kernels.cross_entropy_fwd_kernel, pointers, cut, phase)
            for kind in ("vjp", "jvp", "vjp_jvp"):
                cut = tiles(kind, C, 1, 2)
                long = cut.parts > 1 and kind != "vjp"
                for phase in ("sums", "write") if long else ("whole",):
                    title = f"cross_entropy_{kind} {name} {C} {phase}"
                    pointers = {"x_ptr": "*bf16", **whole, **rows, **_derivative(kind, name)}
                    kernel = kernels.cross_entropy_derivative_kernel
                    yield _compilation(title, kernel, pointers, cut, phase, {"KIND": kind})
    merged = {"targets_ptr": "*i64", **rows, **losses}
    numbers = {"zeta": "fp64", "ignored": "i64"}
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


def _derivative(kind: str, targets: str) -> dict[str, str]:
    """Return the types of the tensors that one derivative takes and others do not."""
    rows = ["parts", "sums"]
    rows += ["tloss", "tlse", "tz_loss"] if kind == "jvp" else ["g", "g_lse", "g_z"]
    whole = [] if kind == "vjp" else ["tx"]
    whole += [] if kind == "jvp" else ["dx"]
    if kind == "vjp_jvp":
        rows += ["tg", "tg_lse", "tg_z"]
    if targets == "probabilities":
        whole += [{"tx": "tq", "dx": "dq"}[name] for name in whole]
    found = {f"{name}_ptr": "*fp32" for name in rows} | {f"{name}_ptr": "*bf16" for name in whole}
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
