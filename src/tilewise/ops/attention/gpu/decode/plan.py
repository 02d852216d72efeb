"""How the kernels of few queries are launched: known without Triton and without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from tilewise.shared.launch import INTERPRETER, Compilation, LaunchPlan

from ..plan import padded

MOST_QUERIES = 16
"""Calls of up to so many queries, in one head, have their keys cut into chunks."""

_BM = 16  # rows of a tile: as few as a product takes


def chunks_of(keys: int, arch: str) -> int:
    """Return into how many chunks keys are cut; those of no keys are one chunk."""
    return max(1, -(-keys // _chunk(arch)))


def plan(
    *, heads: int, rows: int, keys: int, D: int, Dv: int, dtype: str, arch: str = "sm_90"
) -> LaunchPlan:
    """Return how the chunks are computed.

    The extents depend on D, Dv, the dtype and the architecture alone, and so do the bits of a row.

    Args:
        heads: Key/value heads of all batch entries.
        rows: Queries of all heads of a group.
        keys: Keys of the longest sequence.
        D: Entries of a query.
        Dv: Entries of a value.
        dtype: Name of the dtype of q.
        arch: "sm_80", "sm_90", "sm_100", "gfx942" or `INTERPRETER`.
    """
    DP, DVP = padded(D), padded(Dv)
    BN, num_warps, num_stages = _tile(max(DP, DVP), dtype, arch)
    grid = (-(-rows // _BM) * chunks_of(keys, arch) * heads,)
    sizes = {"BM": _BM, "BN": BN, "CHUNK": _chunk(arch), "DP": DP, "DVP": DVP}
    # Weights of 16-bit values are rounded to their dtype, as in every forward pass.
    return LaunchPlan(grid, {**sizes, "WEIGHTS": 0, "PRECISION": "ieee"}, num_warps, num_stages)


def merge_plan(*, rows: int, Dv: int, arch: str = "sm_90") -> LaunchPlan:
    """Return how the states of the chunks are merged.

    Args:
        rows: Queries of all heads and batch entries.
        Dv: Entries of a value.
        arch: As for `plan`.
    """
    BR, BC = (64, 2) if arch == INTERPRETER else (1, 16)  # rows, and states merged at a time
    return LaunchPlan((-(-rows // BR),), {"BR": BR, "BC": BC, "DVP": padded(Dv)}, 4, 1)


def _chunk(arch: str) -> int:
    """Return the keys of a chunk."""
    return 32 if arch == INTERPRETER else 512


def _tile(width: int, dtype: str, arch: str) -> tuple[int, int, int]:
    """Return keys of a tile, warps and stages."""
    if arch == INTERPRETER:
        return 16, 4, 1
    size = (width > 64) + (width > 128) + (width > 256)
    if dtype == "float64":
        return ((16, 4, 2), (16, 4, 1), (16, 4, 1), (16, 4, 1))[size]
    if dtype == "float32":
        return ((32, 4, 3), (32, 4, 1), (16, 4, 1), (16, 4, 1))[size]
    ahead = 2 if arch == "gfx942" else 3  # what its 64 KiB of shared memory hold
    # Of 128 entries few keys at a time, for hidden ones that are not finite take registers, and
    # several programs on a multiprocessor have more loads under way than one of eight warps.
    return ((64, 4, ahead), (32, 4, ahead + 1), (32, 4, 2), (16, 4, 2))[size]


def planned(arch: str) -> Iterator[Compilation]:
    """List what is compiled without a GPU.

    Args:
        arch: "sm_80", "sm_90", "sm_100" or "gfx942".
    """
    every = dict.fromkeys(_OPTIONS, True) | {"MASK": 1}
    for D in (64, 128, 256, 512):
        for paged in (False, True):
            yield _chunks(D, "bfloat16", arch, {"PAGED": paged})
    for dtype in ("float16", "float32", "float64"):
        yield _chunks(64, dtype, arch, {"PAGED": True})
    for D in (64, 128):
        yield _chunks(D, "bfloat16", arch, {"PAGED": True, "MASK": 1})
        yield _chunks(D, "bfloat16", arch, every)
        yield _chunks(D, "bfloat16", arch, {"PAGED": True, "MASK": 1, "CAREFUL": True})
        yield _chunks(D, "float32", arch, every)
    yield _chunks(64, "bfloat16", arch, {"MASK": 2})
    for D, dtype in ((64, "bfloat16"), (128, "bfloat16"), (512, "bfloat16"), (64, "float64")):
        yield _merge(D, dtype, arch)


_OPTIONS = ("BIAS", "ALIBI", "SOFTCAP", "DROPOUT", "ENTROPY")
_POINTERS = {"float64": "*fp64", "float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
_STORED = frozenset({"q", "k", "v", "bias", "slopes", "sinks", "o"})
_ABSENT = {
    "bias": "BIAS", "slopes": "ALIBI", "mask": "MASK", "table": "PAGED", "k_lengths": "PAGED",
    "entropy_part": "ENTROPY", "spoiled": "HIDES", "sinks": "SINKS", "o_full": "O_FULL",
    "lse": "LSE", "max_logit": "MAX_LOGIT", "entropy_out": "ENTROPY",
}  # fmt: skip
"""The constant that says whether a pointer is given."""

_TYPES = {"mask": "*i32", "table": "*i32", "k_lengths": "*i64", "spoiled": "*i32"}
_TYPES |= dict.fromkeys(("scale", "softcap", "factor"), "fp64")
_TYPES |= dict.fromkeys(("seed_low", "seed_high", "threshold"), "u32")
_INTEGERS = ("H", "N", "R", "Nk", "group", "pages", "page_size", "chunks", "first_entry")


def _chunks(D: int, dtype: str, arch: str, options: Mapping[str, Any]) -> Compilation:
    chosen = plan(heads=1, rows=1, keys=1, D=D, Dv=D, dtype=dtype, arch=arch)
    given = dict.fromkeys((*_OPTIONS, "PAGED", "CAREFUL"), False) | {"MASK": 0, "D": D, "DV": D}
    given |= dict(options) | dict(chosen.constants)
    given["HIDES"] = bool(given["MASK"])
    words = [name.lower() for name in options if options[name] and name != "MASK"]
    masks = ("", "intervals", "bits")[given["MASK"]]
    text = "+".join(filter(None, (*words, masks))) or "plain"
    name = f"attention decode D{D} {dtype} {text}"
    return _compilation("decode", name, dtype, given, chosen)


def _merge(D: int, dtype: str, arch: str) -> Compilation:
    chosen = merge_plan(rows=1, Dv=D, arch=arch)
    given = dict.fromkeys(("SINKS", "LSE", "MAX_LOGIT", "ENTROPY"), True) | {"DV": D}
    given |= {"O_FULL": dtype == "bfloat16"} | dict(chosen.constants)
    return _compilation("merge", f"attention merge D{D} {dtype}", dtype, given, chosen)


def _compilation(
    kernel: str, name: str, dtype: str, given: Mapping[str, Any], chosen: LaunchPlan
) -> Compilation:
    function = getattr(import_module("..kernels.decode", __package__), f"attention_{kernel}_kernel")
    signature, constants = {}, {}
    for argument in function.arg_names:
        if argument in given:
            constants[argument] = given[argument]
        elif argument in _ABSENT and not given[_ABSENT[argument]]:
            constants[argument] = None
        else:
            signature[argument] = _type_of(argument, dtype, given)
    narrow = ("_stride_k", "_stride_b", "_stride_h")
    divisible = [of for of, type in signature.items() if type[0] == "*" or of.startswith("stride")]
    return Compilation(
        name,
        function,
        signature,
        constants,
        frozenset(of for of in divisible if not of.endswith(narrow)),
        chosen.num_warps,
        chosen.num_stages,
        chosen.max_registers,
    )


def _type_of(name: str, dtype: str, given: Mapping[str, Any]) -> str:
    """Return the Triton type of an argument."""
    if name in _STORED:
        return _POINTERS[dtype]
    if name == "mask" and given["MASK"] == 2:
        return "*i16"
    if name in _TYPES:
        return _TYPES[name]
    if "stride" in name or name in _INTEGERS:
        return "i32"
    return "*fp64" if dtype == "float64" else "*fp32"
