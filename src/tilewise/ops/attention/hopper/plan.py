"""How the Hopper kernels of attention are configured, and what the offline gate compiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, NamedTuple

from tilewise.shared.launch import Compilation, LaunchPlan

__all__ = [
    "ARCH",
    "CANDIDATES",
    "DTYPES",
    "HEAD_DIMS",
    "Tile",
    "configured",
    "layout_of",
    "own_rows",
    "plan",
    "planned",
]

ARCH: Final = "sm_90"
DTYPES: Final = {"bfloat16": "bf16", "float16": "fp16"}


class Tile(NamedTuple):
    """A configuration of a kernel.

    Attributes:
        BM: Rows of a consumer.
        BN: Rows of a visited tile.
        stages: Tiles that loads run ahead.
        paired: Of the forward pass, whether the consumers take turns at the matrix units; of dk
            and dv, whether both products of a tile are issued at once.
    """

    BM: int
    BN: int
    stages: int
    paired: bool


CANDIDATES: Final[Mapping[str, Mapping[int, tuple[Tile, ...]]]] = {
    "forward": {
        64: (Tile(64, 128, 4, True), Tile(64, 128, 4, False), Tile(64, 128, 2, True)),
        128: (Tile(64, 128, 2, True), Tile(64, 128, 2, False), Tile(64, 64, 4, True)),
        256: (Tile(64, 32, 4, True), Tile(64, 32, 4, False), Tile(64, 32, 2, True)),
    },
    "keys": {
        64: (Tile(64, 64, 4, True), Tile(64, 64, 4, False), Tile(64, 64, 2, True)),
        128: (Tile(64, 64, 2, False), Tile(64, 32, 4, True), Tile(64, 32, 4, False)),
    },
    "queries": {
        64: (Tile(64, 64, 4, False), Tile(64, 64, 2, False)),
        128: (Tile(64, 64, 2, False), Tile(64, 32, 4, False)),
    },
}
"""Configurations that compile without spills. The first is taken; none of them has been timed."""

HEAD_DIMS: Final = {kind: tuple(tiles) for kind, tiles in CANDIDATES.items()}

_taken: dict[tuple[str, int], Tile] = {}

ROWS: Final = 32
"""Queries of one program of the kernel that gathers row statistics."""

_REGISTERS: Final = 240
_CONSUMERS: Final = 2
_PAIRED: Final = {"forward": "PING_PONG", "keys": "EARLY"}


def plan(kind: str, D: int, *, programs: int, masked: bool) -> LaunchPlan:
    """Return how a kernel runs.

    Args:
        kind: forward, keys (dk and dv) or queries (dq).
        D: Entries of a query, key and value; one of `HEAD_DIMS[kind]`.
        programs: Multiprocessors of the device: each runs one program, which takes several items.
        masked: Whether there is a mask.
    """
    tile = _taken.get((kind, D)) or CANDIDATES[kind][D][0]
    constants: dict[str, Any] = {"BM": tile.BM, "BN": tile.BN, "D": D, "STAGES": tile.stages}
    constants |= {"MASKED": masked, "REGS": _REGISTERS}
    if kind in _PAIRED:
        constants[_PAIRED[kind]] = tile.paired
    return LaunchPlan((programs,), constants, num_warps=4, num_stages=tile.stages)


@contextmanager
def configured(kind: str, D: int, tile: Tile) -> Iterator[None]:
    """Take another configuration of a kernel, to time it."""
    before = _taken.get((kind, D))
    _taken[kind, D] = tile
    try:
        yield
    finally:
        del _taken[kind, D]
        if before is not None:
            _taken[kind, D] = before


def own_rows(chosen: LaunchPlan) -> int:
    """Return the rows of one work item."""
    return _CONSUMERS * int(chosen.constants["BM"])


def planned(arch: str) -> Iterator[Compilation]:
    """Return what the offline gate compiles for an architecture."""
    if arch != ARCH:
        return
    for D in HEAD_DIMS["forward"]:
        for dtype, masked, full in (
            ("bf16", True, True),
            ("bf16", False, True),
            ("bf16", True, False),
            ("fp16", True, True),
        ):
            yield _forward(D, dtype, masked, full)
    for D in HEAD_DIMS["keys"]:
        for dtype, masked in (("bf16", True), ("bf16", False), ("fp16", True)):
            yield _pass("keys", D, dtype, masked)
            yield _pass("queries", D, dtype, masked)
        yield _rows(D)
    for kind, by_dim in CANDIDATES.items():
        for D, tiles in by_dim.items():
            for tile in tiles[1:]:
                with configured(kind, D, tile):
                    one = _forward(D, "bf16", True, True) if kind == "forward" else None
                    one = one or _pass(kind, D, "bf16", True)
                yield replace(
                    one,
                    name=f"{one.name} {tile.BM}x{tile.BN}x{tile.stages}" + " paired" * tile.paired,
                )


def _forward(D: int, dtype: str, masked: bool, full: bool) -> Compilation:
    from .kernels.forward import attention_hopper_fwd_kernel

    chosen = plan("forward", D, programs=1, masked=masked)
    BM, BN = chosen.constants["BM"], chosen.constants["BN"]
    signature = {
        "q_desc": _tile(dtype, 4, BM, D),
        "k_desc": _tile(dtype, 4, BN, D),
        "v_desc": _tile(dtype, 4, BN, D),
        "tables": "*i32",
        "scale": "fp32",
        "o_desc": _tile(dtype, 4, BM, D),
        **dict.fromkeys(("o_ptr", "m_ptr", "l_ptr"), "*fp32"),
    }
    return Compilation(
        _name("forward", dtype, D, masked) + (" o_full" if full else ""),
        attention_hopper_fwd_kernel,
        signature,
        {**chosen.constants, "FULL": full, "H_PER_KV": 1},
        frozenset(name for name, kind in signature.items() if kind[0] == "*"),
        chosen.num_warps,
        chosen.num_stages,
    )


def _pass(kind: str, D: int, dtype: str, masked: bool) -> Compilation:
    from .kernels import backward

    chosen = plan(kind, D, programs=1, masked=masked)
    BM, BN = chosen.constants["BM"], chosen.constants["BN"]
    of_keys = kind == "keys"
    for_q, for_k = (BN, BM) if of_keys else (BM, BN)
    signature = {
        **dict.fromkeys(("q_desc", "do_desc"), _tile(dtype, 4, for_q, D)),
        **dict.fromkeys(("k_desc", "v_desc"), _tile(dtype, 4, for_k, D)),
        "tables": "*i32",
        "scale": "fp32",
    }
    if of_keys:
        kernel = backward.attention_hopper_bwd_keys_kernel
        signature["rows_desc"] = _tile("fp32", 2, 1, BN)
        signature |= dict.fromkeys(("dk_desc", "dv_desc"), _tile(dtype, 4, BM, D))
    else:
        kernel = backward.attention_hopper_bwd_queries_kernel
        signature |= {"rows": "*fp32", "dq_desc": _tile(dtype, 4, BM, D)}
    return Compilation(
        _name("dk dv" if of_keys else "dq", dtype, D, masked),
        kernel,
        signature,
        {**chosen.constants, "GROUP": 1},
        frozenset(name for name, kind in signature.items() if kind[0] == "*"),
        chosen.num_warps,
        chosen.num_stages,
    )


def _rows(D: int) -> Compilation:
    from .kernels.backward import attention_hopper_rows_kernel

    strides = [f"stride_{name}_{dim}" for name in ("do", "o") for dim in "bhn"]
    signature = {
        "do": "*bf16",
        **dict.fromkeys(("o", "m_ptr", "l_ptr", "dlse", "rows"), "*fp32"),
        **dict.fromkeys((*strides, "H", "N", "padded"), "i32"),
    }
    pointers = {name for name, kind in signature.items() if kind[0] == "*"}
    return Compilation(
        f"hopper rows bf16 D={D}",
        attention_hopper_rows_kernel,
        signature,
        {"ROWS": ROWS, "D": D, "DLSE": True},
        frozenset({*pointers, *strides, "padded"}),
    )


def _name(kind: str, dtype: str, D: int, masked: bool) -> str:
    return f"hopper {kind} {dtype} D={D}" + (" masked" if masked else "")


def _tile(dtype: str, rank: int, rows: int, entries: int) -> str:
    """Return the type of a descriptor of tiles, `(1, 1, rows, entries)` or `(rows, entries)`."""
    shape = [1] * (rank - 2) + [rows, entries]
    return f"tensordesc<{dtype}{shape},{layout_of(shape, dtype)!r}>"


def layout_of(shape: list[int], dtype: str) -> Any:
    """Return the layout of a tile in shared memory."""
    from triton.experimental.gluon import language as gl

    types = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32}
    return gl.NVMMASharedLayout.get_default_for(shape, types[dtype])
