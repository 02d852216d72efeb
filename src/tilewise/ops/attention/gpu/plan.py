"""How the kernels of attention are launched: known without Triton and without a GPU."""

from __future__ import annotations

from typing import Any

from tilewise.shared.launch import LaunchPlan

INTERPRETER = "interpreter"
"""The architecture of Triton's interpreter, whose tiles are small so that tests have several."""

_LEAST = 16  # the smallest extent of a product


def padded(size: int) -> int:
    """Return the power of two that a tile has for an extent."""
    return max(_LEAST, 1 << (size - 1).bit_length())


def plan(
    kind: str, *, heads: int, rows: int, D: int, Dv: int, dtype: str, arch: str = "sm_90"
) -> LaunchPlan:
    """Return how one kernel is launched.

    Args:
        kind: "fwd", "jvp", "dq", "dkv" or "dbias"; with "second_" before it for the JVP of a VJP.
        heads: Heads of all batch entries: of the keys for "dkv".
        rows: Queries, or keys for "dkv".
        D: Entries of a query.
        Dv: Entries of a value.
        dtype: Name of the dtype of q.
        arch: "sm_80", "sm_90", "sm_100", "gfx942" or `INTERPRETER`.
    """
    DP, DVP = padded(D), padded(Dv)
    BM, BN, num_warps, num_stages = _tile(kind, max(DP, DVP), dtype, arch)
    tile = BN if kind.endswith("dkv") else BM
    grid = (max(1, -(-rows // tile) * heads),)
    constants = {"BM": BM, "BN": BN, "DP": DP, "DVP": DVP, **_precision(kind, dtype, arch)}
    return LaunchPlan(grid, constants, num_warps, num_stages)


def _tile(kind: str, width: int, dtype: str, arch: str) -> tuple[int, int, int, int]:
    """Return queries and keys of a tile, warps and stages."""
    if arch == INTERPRETER:
        return 32, 32, 4, 1
    if dtype in ("float32", "float64"):
        return (64, 32, 4, 1) if width <= 64 else (32, 32, 4, 1) if width <= 128 else (16, 16, 4, 1)
    if kind == "fwd":
        return (128, 64, 4, 2) if width <= 64 else (128, 64, 8, 2) if width <= 128 else (64, 32, 8, 1)
    return (64, 64, 4, 1) if width <= 64 else (64, 32, 4, 1) if width <= 128 else (32, 16, 4, 1)


def _precision(kind: str, dtype: str, arch: str) -> dict[str, Any]:
    """Return how products are rounded.

    Weights of 16-bit values are rounded to their dtype, except where that would cost digits that
    the results have: gradients in float16 may be smaller than its numbers, and a tangent subtracts
    what the output, computed from unrounded ones, carries.
    """
    narrow = dtype in ("float16", "bfloat16")
    wide = narrow and (kind not in ("fwd", "dq", "dkv") or (kind != "fwd" and dtype == "float16"))
    # Only products of 32 bits are split: three of fewer bits have their digits.
    split = wide and arch.startswith("sm_")
    return {"WIDE": wide, "PRECISION": "tf32x3" if split else "ieee"}
