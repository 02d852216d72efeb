"""How the kernels of attention are launched: known without Triton and without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from tilewise.base._lowering import KEY_TILE, QUERY_TILE
from tilewise.shared.launch import Compilation, LaunchPlan

INTERPRETER = "interpreter"
"""The architecture of Triton's interpreter, whose tiles are small so that tests have several."""

_ROUNDED, _WIDE, _SPLIT = 0, 1, 2
_LEAST = 16  # the smallest extent of a product

PLACES = 128
"""How many places of a packed sequence are written at once."""


def padded(size: int) -> int:
    """Return the power of two that a tile has for an extent."""
    return max(_LEAST, 1 << (size - 1).bit_length())


def tiles_of(rows: int, extent: int, sequences: int | None = None) -> int:
    """Return how many tiles there are of so many rows; for packed sequences, places for them."""
    return -(-rows // extent) if sequences is None else rows // extent + sequences


def plan(
    kind: str,
    *,
    heads: int,
    rows: int,
    D: int,
    Dv: int,
    dtype: str,
    arch: str = "sm_90",
    sequences: int | None = None,
    crowded: bool = False,
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
        sequences: How many are packed in these rows, or None.
        crowded: Whether there is a bias, a soft cap, dropout or ALiBi.
    """
    DP, DVP = padded(D), padded(Dv)
    cut = _tile(kind, max(DP, DVP), dtype, arch, crowded=crowded)
    tile = cut.BN if kind.endswith("dkv") else cut.BM
    grid = (tiles_of(rows, tile, sequences) * heads,)
    constants = {"BM": cut.BM, "BN": cut.BN, "DP": DP, "DVP": DVP, **_precision(kind, dtype, arch)}
    greedy = cut.greedy or (sequences is not None and f"{kind} {arch}" in _GREEDY_IF_PACKED)
    most = MOST_REGISTERS if greedy and arch.startswith("sm_") else None
    return LaunchPlan(grid, constants, cut.num_warps, cut.num_stages, most)


class Tile(NamedTuple):
    """A tile of queries and keys.

    Attributes:
        BM: Queries.
        BN: Keys.
        num_warps: Warps of one program.
        num_stages: Tiles that loads run ahead of the arithmetic.
        greedy: Whether ptxas has to be told that a thread may have all registers. Else it may take
            fewer, so that there are more programs at a time, and spill.
    """

    BM: int
    BN: int
    num_warps: int
    num_stages: int = 1
    greedy: bool = False


MOST_REGISTERS = 255
"""Registers that a thread of NVIDIA can have."""

_GREEDY_IF_PACKED = ("dkv sm_100",)
"""What is greedy for packed sequences; their tiles are those of one call, as are their bits."""


def _tile(kind: str, width: int, dtype: str, arch: str, *, crowded: bool) -> Tile:
    """Return the tile of a kernel: of what is known of a case, by its architecture first."""
    if arch == INTERPRETER:
        return Tile(64, 64, 4)
    size = 0 if width <= 64 else 1 if width <= 128 else 2
    if dtype in ("float32", "float64"):
        tables = [_CROWDED_FULL, _FULL] if crowded else [_FULL]
    elif dtype == "float16":
        tables = [_CROWDED_HALF, _CROWDED, _HALF, _TILES] if crowded else [_HALF, _TILES]
    else:
        tables = [_CROWDED, _TILES] if crowded else [_TILES]
    kind = kind.replace("dbias", "dq")
    for table in tables:
        for name in (f"{kind} {arch}", kind, "other"):
            found = table.get(name, {}).get(size)
            if found is not None:
                return found
    return _TILES["dq"][size]  # what has no products has no tile of its own


_TILES: dict[str, dict[int, Tile]] = {
    "fwd": {0: Tile(128, 64, 8, 2), 1: Tile(128, 64, 8, 2), 2: Tile(64, 32, 8)},
    "dq": {0: Tile(64, 64, 4), 1: Tile(64, 32, 4), 2: Tile(32, 16, 8)},
    "dkv": {0: Tile(32, 64, 4), 1: Tile(32, 32, 4), 2: Tile(16, 16, 8)},
    "dkv sm_90": {0: Tile(64, 64, 4)},
    "jvp": {0: Tile(32, 32, 4), 1: Tile(32, 32, 4), 2: Tile(16, 16, 8)},
    "jvp sm_90": {0: Tile(64, 32, 4)},
    "second_dq": {0: Tile(32, 32, 4), 1: Tile(16, 32, 4), 2: Tile(16, 16, 8)},
    "second_dq sm_90": {0: Tile(64, 32, 4)},
    "second_dq gfx942": {1: Tile(32, 16, 4)},
    "second_dkv": {0: Tile(32, 32, 4), 1: Tile(16, 16, 4), 2: Tile(16, 16, 8)},
}
"""What fits the registers, for rows of up to 64, 128 and 512 entries of 16 bits: of all, or of one
architecture."""

_HALF: dict[str, dict[int, Tile]] = {"dq": {0: Tile(64, 32, 4)}, "dkv": {0: Tile(32, 32, 4)}}
"""For float16, whose gradients are multiplied in float32."""

_CROWDED_HALF: dict[str, dict[int, Tile]] = {
    "dq": {0: Tile(32, 32, 4)},
    "dkv": {0: Tile(16, 32, 4)},
}
"""For those with options that take registers themselves."""

_CROWDED: dict[str, dict[int, Tile]] = {
    "fwd": {1: Tile(128, 32, 8, 2)},
    "fwd sm_100": {0: Tile(128, 64, 8)},
    "fwd gfx942": {0: Tile(128, 32, 8), 1: Tile(64, 64, 4)},
    "dq": {0: Tile(64, 32, 4), 1: Tile(32, 32, 4)},
    "dkv": {0: Tile(16, 64, 4, greedy=True), 1: Tile(16, 32, 8)},
    "dkv sm_80": {0: Tile(32, 32, 4, greedy=True)},
    "jvp": {0: Tile(64, 16, 4)},
    "second_dq": {0: Tile(64, 16, 4)},
    "second_dq sm_80": {0: Tile(32, 16, 8)},
    "second_dkv": {0: Tile(32, 16, 8, greedy=True)},
    "second_dkv gfx942": {0: Tile(16, 32, 4)},
}
"""For 16 bits with such options."""

_FULL: dict[str, dict[int, Tile]] = {
    "other": {0: Tile(16, 32, 4), 1: Tile(16, 16, 4), 2: Tile(16, 16, 4)},
    "fwd": {0: Tile(16, 32, 4, greedy=True)},
    "dkv": {0: Tile(32, 16, 4)},
}
"""For float32 and float64."""

_CROWDED_FULL: dict[str, dict[int, Tile]] = {"dkv": {0: Tile(16, 32, 4)}}
"""For those with options that take registers themselves."""


def _precision(kind: str, dtype: str, arch: str) -> dict[str, Any]:
    """Return how the weights of sums are rounded that multiply values of 16 bits.

    To their dtype, as the other factor has no more digits; but a tangent subtracts what the output
    carries, which was summed from other roundings, and gradients in float16 may be smaller than its
    numbers: there they keep their digits.
    """
    weights = _ROUNDED
    if dtype == "float16" and kind != "fwd":
        weights = _WIDE
    elif dtype == "bfloat16" and (kind == "jvp" or kind.startswith("second_")):
        weights = _SPLIT
    # Only products of 32 bits are split, into three: those of 16 bits are exact.
    split = weights == _WIDE and arch.startswith("sm_")
    return {"WEIGHTS": weights, "PRECISION": "tf32x3" if split else "ieee"}


def planned(arch: str) -> Iterator[Compilation]:
    """List what is compiled without a GPU: for each pass, the usual options, and all at once.

    Args:
        arch: "sm_80", "sm_90", "sm_100" or "gfx942".
    """
    causal, every = {"MASK": 1}, dict.fromkeys(_OPTIONS, True) | {"MASK": 1}
    passes = ("fwd", "dq", "dkv", "jvp", "second_dq", "second_dkv")
    for D in (64, 128):
        for kind in passes:
            yield _compilation(kind, D, "bfloat16", arch, causal)
    for kind in ("fwd", "dq", "dkv"):
        yield _compilation(kind, 64, "bfloat16", arch, {})
        yield _compilation(kind, 64, "float16", arch, causal)
        yield _compilation(kind, 64, "float32", arch, causal)
        yield _compilation(kind, 128, "bfloat16", arch, every)
        yield _compilation(kind, 64, "float16", arch, every)
        yield _compilation(kind, 64, "float32", arch, every)
    for kind in (*passes, "dbias"):
        yield _compilation(kind, 64, "bfloat16", arch, every)
    for option in _TAKING:
        yield _compilation("dq", 64, "bfloat16", arch, causal | {option: True})
        yield _compilation("dkv", 64, "bfloat16", arch, causal | {option: True})
    yield _compilation("fwd", 64, "bfloat16", arch, {"MASK": 2})
    for kind in ("bounds", "pack", "delta", "dsinks"):
        yield _compilation(kind, 64, "bfloat16", arch, {})
    yield from _planned_packed(arch, passes, every)


def _planned_packed(
    arch: str, passes: tuple[str, ...], every: Mapping[str, Any]
) -> Iterator[Compilation]:
    """List what is compiled of packed sequences."""
    packed: dict[str, Any] = {"PACKED": True}
    for D in (64, 128):
        for kind in passes:
            yield _compilation(kind, D, "bfloat16", arch, {"MASK": 1, **packed})
    for kind in ("fwd", "dq", "dkv"):
        yield _compilation(kind, 64, "bfloat16", arch, packed)
    for kind in ("fwd", "dbias"):
        yield _compilation(kind, 64, "bfloat16", arch, {**every, **packed})
    for kind in ("bounds", "sequences"):
        yield _compilation(kind, 64, "bfloat16", arch, packed)


_OPTIONS = ("BIAS", "ALIBI", "SOFTCAP", "SINKS", "DROPOUT")
_TAKING = ("BIAS", "ALIBI", "SOFTCAP", "DROPOUT")
_TANGENTS = ("T_Q", "T_K", "T_V", "TDO")
_MODULES = {
    "fwd": "forward",
    "jvp": "tangents",
    "dq": "backward",
    "dkv": "backward",
    "delta": "backward",
    "dbias": "sums",
    "dsinks": "sums",
    "bounds": "tiles",
    "pack": "masks",
    "sequences": "sequences",
}
_POINTERS = {"float64": "*fp64", "float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
_NUMBERS = {"scale": "fp64", "softcap": "fp64", "factor": "fp64"} | dict.fromkeys(
    ("seed_low", "seed_high", "threshold"), "u32"
)
_OF_ROWS = frozenset(
    {"m", "log_l", "delta", "tlse", "tdelta", "dlse", "tdlse", "m_out", "log_l_out", "lse"}
    | {"max_logit", "entropy_out", "delta_out", "tdelta_out", "o_full", "dbias", "dsinks", "to"}
)
_STORED = frozenset(
    {"q", "k", "v", "tq", "tk", "tv", "do", "tdo", "o", "dq", "dk", "dv"}
    | {"bias", "tbias", "slopes", "sinks", "tsinks"}
)
_ABSENT = {
    "bias": "BIAS", "tbias": "T_BIAS", "slopes": "ALIBI", "sinks": "SINKS", "tsinks": "T_SINKS",
    "tq": "T_Q", "tk": "T_K", "tv": "T_V", "tdo": "TDO", "o_full": "O_FULL", "lse": "LSE",
    "max_logit": "MAX_LOGIT", "entropy_out": "ENTROPY", "mask": "MASK", "tiles": "MASK",
    "spoiled": "HIDES", "dlse": "DLSE", "tdlse": "TDLSE", "tdelta": "SECOND",
    "tdelta_out": "SECOND", "order": "PACKED", "q_starts": "PACKED", "k_starts": "PACKED",
}  # fmt: skip
"""The constant that says whether a pointer is given."""


def _compilation(
    kind: str, D: int, dtype: str, arch: str, options: Mapping[str, Any]
) -> Compilation:
    """Return one configuration of a kernel, with all tangents where it takes tangents."""
    base, second = kind.removeprefix("second_"), kind.startswith("second_")
    module = import_module(f".kernels.{_MODULES[base]}", __package__)
    kernel = getattr(module, f"attention_{base}_kernel")
    crowded = any([options.get(name) for name in _TAKING])
    chosen = plan(
        kind,
        heads=1,
        rows=1,
        D=D,
        Dv=D,
        dtype=dtype,
        arch=arch,
        sequences=1 if options.get("PACKED") else None,
        crowded=crowded,
    )
    given: dict[str, Any] = {name: False for name in set(_ABSENT.values())} | {"ROWS": 256}
    given |= dict.fromkeys(("BIAS_B", "BIAS_H", "BIAS_N", "BIAS_K", "D_K", "D_V", "LSE"), True)
    given |= {"EXTENT": 64, "BLOCK": PLACES, "QUERIES": QUERY_TILE, "KEYS": KEY_TILE}
    given |= dict.fromkeys((*_OPTIONS, "MASK"), False) | {"SECOND": second, "D": D, "DV": D}
    given |= dict.fromkeys(_TANGENTS, second or base == "jvp")
    given |= dict(options) | dict(chosen.constants)
    given["MASK"] = int(given["MASK"])
    given |= {"HIDES": bool(given["MASK"]), "CAREFUL": False}
    given["T_BIAS"] = given["BIAS"] and (second or base == "jvp")
    given["T_SINKS"] = given["SINKS"] and (second or base == "jvp")
    if base == "pack":
        given["MASK"] = 2
    if base in ("dbias", "dsinks", "bounds"):
        given["BIAS"] = given["SINKS"] = given["MASK"] = True
    signature, constants = {}, {}
    for name in kernel.arg_names:
        if name in given:
            constants[name] = given[name]
        elif name in _ABSENT and not given[_ABSENT[name]]:
            constants[name] = None
        else:
            signature[name] = _type_of(name, dtype, int(given["MASK"]))
    narrow = ("_stride_k", "_stride_b", "_stride_h")
    divisible = [
        name for name, of in signature.items() if of[0] == "*" or name.startswith("stride")
    ]
    text = "+".join([name.lower() for name, on in options.items() if on]) or "plain"
    text += " of bits" if options.get("MASK") == 2 else ""
    return Compilation(
        f"attention {kind} D{D} {dtype} {text}",
        kernel,
        signature,
        constants,
        frozenset(name for name in divisible if not name.endswith(narrow)),
        chosen.num_warps,
        chosen.num_stages,
        chosen.max_registers,
    )


def _type_of(name: str, dtype: str, mask: int) -> str:
    """Return the Triton type of an argument."""
    if name in _STORED:
        return _POINTERS[dtype]
    if name in _OF_ROWS:
        return "*fp64" if dtype == "float64" else "*fp32"
    if name in ("seen", "bits"):
        return "*u8" if name == "seen" else "*i16"
    if name in ("starts", "order", "q_starts", "k_starts"):
        return "*i64"
    if name in ("mask", "tiles", "rows", "bounds", "spoiled"):
        bits = {"mask": "*i16", "tiles": "*u8"}
        return bits.get(name, "*i32") if mask == 2 else "*i32"
    return _NUMBERS.get(name, "i32")
