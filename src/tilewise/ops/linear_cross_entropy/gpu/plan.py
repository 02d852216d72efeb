"""How the kernels of the linear cross-entropy are launched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tilewise.shared.launch import INTERPRETER, Compilation, LaunchPlan
from tilewise.shared.row_tiles import compilation, merge_plan

STRIP_ENTRIES = 1 << 24
"""Cotangents of logits that are stored at a time: tokens times classes of a strip."""

WIDEST_STRIP = 1 << 20
"""Classes of a strip at most; offsets inside a tile of its cotangents have 32 bits."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of one kernel.

    Attributes:
        rows: Tokens of a tile, or rows of a gradient.
        cols: Classes of a tile, or columns of a gradient.
        inner: Entries of a product at a time.
        num_warps: Warps of one program.
        num_stages: Tiles that loads run ahead of the arithmetic.
        steps: Tiles of logits that one program folds.
    """

    rows: int
    cols: int
    inner: int
    num_warps: int
    num_stages: int
    steps: int = 1

    def launch(self, rows: int, cols: int, names: str = "TVK") -> LaunchPlan:
        """Return the launch for so many rows and columns; `names` are those of the blocks."""
        grid = (-(-rows // self.rows), -(-cols // (self.cols * self.steps)))
        sizes = (self.rows, self.cols, self.inner)
        blocks = {f"BLOCK_{name}": size for name, size in zip(names, sizes, strict=True)}
        return LaunchPlan(grid, blocks, self.num_warps, self.num_stages)


_NARROW = {
    "forward": Tiles(64, 64, 64, 8, 3, steps=16),
    "jvp": Tiles(64, 64, 64, 8, 3, steps=16),
    "vjp": Tiles(64, 128, 64, 8, 3),
    "vjp_jvp": Tiles(64, 64, 64, 8, 3),
    "gradient": Tiles(128, 128, 64, 8, 3),
    "two_gradients": Tiles(128, 128, 64, 8, 2),
}
_WIDE = {
    "forward": Tiles(64, 32, 32, 8, 2, steps=32),
    "jvp": Tiles(64, 32, 32, 8, 2, steps=32),
    "vjp": Tiles(64, 64, 32, 8, 2),
    "vjp_jvp": Tiles(64, 32, 32, 8, 2),
    "gradient": Tiles(64, 64, 32, 8, 2),
    "two_gradients": Tiles(64, 64, 32, 8, 2),
}
# Shared memory of 64 KiB, and masks that take scalar registers.
_NARROW_AMD = _NARROW | {
    "forward": Tiles(64, 32, 64, 8, 3, steps=32),
    "jvp": Tiles(64, 32, 64, 8, 3, steps=32),
    "gradient": Tiles(128, 128, 64, 8, 2),
    "two_gradients": Tiles(128, 128, 32, 8, 2),
}


def tiles(kind: str, itemsize: int, arch: str) -> Tiles:
    """Return the tiles of a kernel; they do not depend on the sizes of a call.

    Args:
        kind: forward, jvp, vjp, vjp_jvp, or the products that end the last two: gradient and
            two_gradients.
        itemsize: Bytes of an entry, for products of one of the stored cotangents.
        arch: "sm_80", "sm_90", "sm_100", "gfx942" or `INTERPRETER`.
    """
    if arch == INTERPRETER:
        return Tiles(16, 16, 16, 1, 1, steps=2 if kind in ("forward", "jvp") else 1)
    if itemsize == 8:
        return Tiles(32, 32, 32, 4, 2, steps=32 if kind in ("forward", "jvp") else 1)
    narrow = _NARROW_AMD if arch.startswith("gfx") else _NARROW
    return (narrow if itemsize == 2 else _WIDE)[kind]


def strip(T: int, V: int, cols: int, inner: int, chunk: int | None = None) -> int:
    """Return how many classes have their cotangents stored at a time.

    Args:
        T: Tokens.
        V: Classes.
        cols: Classes of a tile.
        inner: Classes of a product at a time, of which strips are multiples.
        chunk: Classes that the caller wants at most, if there is a multiple below.
    """
    step = max(cols, inner)
    widest = WIDEST_STRIP if chunk is None else min(chunk, WIDEST_STRIP)
    most = min(STRIP_ENTRIES // max(T, 1), widest) // step * step
    return min(max(most, step), -(-V // step) * step)


def precision(name: str) -> str:
    """Return how matrix products of a dtype treat their operands.

    The cotangents of float16 stay float32, for float16 lacks their range: with the digits of TF32.
    """
    return "tf32" if name == "float16" else "ieee"


def planned(arch: str) -> Iterator[Compilation]:
    """Return the configurations that are compiled without a GPU."""
    from . import kernels

    for name, short in _SHORT.items():
        if name != "float16":  # the logits are made as those of bfloat16
            yield from _of_logits(name, short, arch, kernels)
        yield from _of_gradients(name, short, arch, kernels.linear_cross_entropy_gradient_kernel)
    rows = ("loss", "z_loss", "lse", "m", "log_l", "entropy", "parts")
    tensors = dict.fromkeys(rows, "fp32") | dict.fromkeys(("targets", "argmax"), "i64")
    tensors["argmax_parts"] = "i64"
    constants = {**merge_plan(1, 1).constants, "SQUARED": True}
    kernel = kernels.linear_cross_entropy_merge_kernel
    yield _single(f"{_STEM}merge", kernel, tensors, constants)
    rows = ("sums", "class_weight", "m", "log_l", "tloss", "tlse", "tentropy")
    tensors = {**dict.fromkeys(rows, "fp32"), "targets": "i64"}
    constants = {"BLOCK_R": 128, "SQUARED": True}
    kernel = kernels.linear_cross_entropy_tangents_kernel
    yield _single(f"{_STEM}tangents", kernel, tensors, constants)


def _of_logits(name: str, short: str, arch: str, kernels: Any) -> Iterator[Compilation]:
    """Return the configurations of the kernels that make logits, with all options."""
    inputs, moved = ("hidden", "weight", "bias"), ("thidden", "tweight", "tbias")
    rows = ["class_weight", "parts", "m", "log_l", "entropy", "sums"]
    rows += ["g", "g_lse", "g_entropy", "tg", "tg_lse", "tg_entropy"]
    wide = "fp64" if short == "fp64" else "fp32"
    tensors = dict.fromkeys(inputs, short) | dict.fromkeys(rows, wide)
    tensors |= {"targets": "i64", "argmax_parts": "i64", "scale": "fp64", "live": "i8"}
    tangents = dict.fromkeys(moved, short)
    options = {"ENTROPY": True, "CAPPED": True, "SQUARED": True, "PRECISION": "ieee"}
    cotangents = kernels.linear_cross_entropy_cotangents_kernel
    for kind, kernel, more in (
        ("forward", kernels.linear_cross_entropy_fwd_kernel, {}),
        ("jvp", kernels.linear_cross_entropy_jvp_kernel, tangents),
        ("vjp", cotangents, {"dz": short}),
        ("vjp_jvp", cotangents, tangents | {"dz": short, "tdz": short}),
    ):
        cut = tiles(kind, _itemsize(short), arch)
        constants = {**options, "TILES": cut.steps, "SECOND": kind == "vjp_jvp"}
        title = f"{_STEM}{kind} {name}"
        yield _compilation(title, kernel, tensors | more, cut, "TVK", constants)


def _of_gradients(name: str, short: str, arch: str, kernel: Any) -> Iterator[Compilation]:
    """Return the configurations of the products that end gradients."""
    stored = "fp32" if name == "float16" else short
    wide = "fp64" if short == "fp64" else "fp32"
    for side, more, dense in (
        ("hidden", {"after": short}, "a_inner"),
        ("hidden, first strip", {"after": wide}, "a_inner"),
        ("weight", {"after": short, "live": "i8", "rows": short}, "a_row"),
        ("hidden, of tangents", {"after": short, "a2": stored, "b2": short}, "a_inner"),
    ):
        kind = "two_gradients" if "a2" in more else "gradient"
        cut = tiles(kind, _itemsize(stored), arch)
        tensors = {"a": stored, "b": short, "before": wide, **more}
        constants = {"PRECISION": precision(name), dense: 1}
        title = f"{_STEM}gradient by {side}, {name}"
        yield _compilation(title, kernel, tensors, cut, "MNK", constants)


def _itemsize(kind: str) -> int:
    return {"fp64": 8, "fp32": 4}.get(kind, 2)


_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
_STEM = "linear_cross_entropy_"
_NUMBERS = {**dict.fromkeys(("sharp", "share", "zeta", "cap"), "fp64"), "ignored": "i64"}


def _compilation(
    name: str, kernel: Any, tensors: dict[str, str], cut: Tiles, blocks: str, more: dict[str, Any]
) -> Compilation:
    """Return a configuration of a kernel of tiles; it takes those of the tensors that it knows."""
    plan = cut.launch(1, 1, blocks)
    known = {**plan.constants, **more}
    fixed = {key: value for key, value in known.items() if key in kernel.arg_names}
    found = _single(name, kernel, tensors, fixed, cut.num_warps)
    return replace(found, num_stages=cut.num_stages)


def _single(
    name: str, kernel: Any, tensors: dict[str, str], constants: dict[str, Any], warps: int = 4
) -> Compilation:
    pointers = {f"{tensor}_ptr": f"*{kind}" for tensor, kind in tensors.items()}
    pointers = {key: kind for key, kind in pointers.items() if key in kernel.arg_names}
    numbers = {key: kind for key, kind in _NUMBERS.items() if key in kernel.arg_names}
    found = compilation(name, kernel, pointers, numbers, constants, warps)
    aligned = {
        "T",
        "C",
        "V",
        "M",
        "N",
        "K",
        "a_row",
        "a_inner",
        "strip",
        "strip_start",
    } & found.signature.keys()
    return replace(found, divisible=found.divisible | aligned)
