"""The steps of a GPU board for decoding: one query of each sequence to all of its keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tilewise.bench.board_oracle import BOUNDS, error

__all__ = ["CONTENDERS", "run"]

CONTENDERS: Final = ("triton", "triton pages", "sdpa")
_CHECKED: Final = (3, 8, 2, 1543)
_BATCH, _HEADS, _KEY_HEADS, _PAGE = 8, 32, 8, 16

Call = Callable[[], Any]


def run(median: Callable[[Call], float], D: int, Nk: int, device: str = "cuda") -> dict[str, Any]:
    """Check every contender, and time those that are right.

    Args:
        median: Returns the median time of a call in milliseconds.
        D: Entries of a query, a key and a value.
        Nk: Keys of each sequence.
        device: The device of the tensors.

    Returns:
        Of each contender its error, its time and the bytes of keys and values that it read in a
        second, in GB/s; or why there are none.
    """
    found: dict[str, Any] = {}
    sizes = _BATCH, _HEADS, _KEY_HEADS, Nk
    for contender in CONTENDERS:
        try:
            wrong = _error(contender, D, device)
            assert wrong <= BOUNDS["forward"], f"o is off by {wrong:.2e}"
            ms = median(_call(contender, *_fresh(*sizes, D, device)))
            nbytes = 2 * 2 * _BATCH * _KEY_HEADS * Nk * D
            found[contender] = {"error": wrong, "ms": ms, "gb_per_s": nbytes / ms / 1e6}
        except Exception as failure:
            found[contender] = {"reason": f"{type(failure).__name__}: {failure}"[:200]}
    return found


def _error(contender: str, D: int, device: str) -> float:
    """Return the relative error of a contender on a small problem."""
    import tilewise as tw

    q, k, v = _fresh(*_CHECKED, D, device)
    wide: Any = [x.double().cpu().numpy() for x in (q, k, v)]
    expected = tw.numpy.attention(*wide, implementation="reference")
    o = _call(contender, q, k, v)()
    return error(o.double().cpu().numpy(), expected)


def _call(contender: str, q: Any, k: Any, v: Any) -> Call:
    """Return attention of the queries to all keys, without arguments."""
    import torch

    import tilewise as tw
    import tilewise.torch

    if contender == "sdpa":
        own = torch.nn.functional.scaled_dot_product_attention
        return lambda: own(q, k, v, enable_gqa=True)
    if contender == "triton":
        return lambda: tilewise.torch.attention(q, k, v, implementation="triton")
    B, Hk, Nk, D = k.shape
    pages = B * -(-Nk // _PAGE)
    cache = tw.KVCache(pages, _PAGE, Hk, D, dtype=k.dtype, device=k.device)
    cache.open(B)
    cache.append(k, v)
    return lambda: tilewise.torch.attention(q, cache=cache, implementation="triton")


def _fresh(B: int, H: int, Hk: int, Nk: int, D: int, device: str) -> list[Any]:
    """Return new random q, k and v."""
    import torch

    shapes = ((B, H, 1, D), (B, Hk, Nk, D), (B, Hk, Nk, D))
    return [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
