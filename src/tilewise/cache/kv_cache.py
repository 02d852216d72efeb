"""Keys and values of sequences that grow, in pages that are allocated once."""

from __future__ import annotations

import operator as _operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tilewise.base.dims import Sizes
from tilewise.base.errors import type_error, value_error
from tilewise.ops.attention.spec.arguments import KEY, LAYOUTS, LIMITS, VALUE

from .memory import NAME, WORDS, allocated
from .pages import Claim, Pages, View


class KVCache:
    """Keys and values for inference, in pages that sequences take as they grow.

    A sequence is an integer. Sequences may share pages: `fork` copies nothing, and what one of them
    appends later the others do not see. Pools are allocated once. `append`, and attention with new
    keys, either do all of what they are asked or raise and leave the cache as it was. Any thread
    may call any method; while a call appends to a sequence, no other call may change that sequence.

    Args:
        pages: Pages in each pool.
        page_size: Keys in a page.
        Hk: Key/value heads.
        D: Entries of a key, at most 512.
        Dv: Entries of a value, at most 512; D by default.
        dtype: `"float32"` (the default), `"float64"`, `"bfloat16"`, `"float16"`, or one of these as
            a dtype of NumPy or PyTorch.
        like: An array or tensor that has the dtype, instead, and the device.
        max_length: Keys that a sequence may have; as many as there are pages for by default.
        device: A device of PyTorch, such as `"cuda"`, on which the pools are tensors; by default
            that of `like`, or the memory of the host.

    Raises:
        TypeError: An argument has a wrong kind, or no cache has that dtype.
        ValueError: A size is too small or too large.
        Unsupported: There are no kernels for the device.
        MemoryError: There is not enough memory.
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        Hk: int,
        D: int,
        Dv: int | None = None,
        *,
        dtype: Any = None,
        like: Any = None,
        max_length: int | None = None,
        device: Any = None,
    ) -> None:
        count = _count(NAME, "pages", pages, least=0, most=2**31 - 1)
        self._page_size = _count(NAME, "page_size", page_size, most=2**31 - 1)
        self._Hk = _count(NAME, "Hk", Hk)
        self._D = _count(NAME, "D", D, most=512)
        self._Dv = self._D if Dv is None else _count(NAME, "Dv", Dv, most=512)
        self._dtype = _dtype_name(dtype, like)
        limit = None if max_length is None else _count(NAME, "max_length", max_length)
        k, v = ((count, self._Hk, self._page_size, width) for width in (self._D, self._Dv))
        self._memory = allocated(k, v, self._dtype, device, like)
        self._pages = Pages(count, self._page_size, limit)

    @classmethod
    def contiguous(
        cls,
        batch: int,
        max_length: int,
        Hk: int,
        D: int,
        Dv: int | None = None,
        *,
        dtype: Any = None,
        like: Any = None,
        device: Any = None,
    ) -> KVCache:
        """Return a cache of one page for each of a batch of sequences, which are open already.

        Args:
            batch: Number of sequences; their ids are 0 to `batch - 1`.
            max_length: Keys that each may have.
            Hk: Key/value heads.
            D: Entries of a key.
            Dv: Entries of a value; D by default.
            dtype: As for `KVCache`.
            like: As for `KVCache`.
            device: As for `KVCache`.
        """
        batch = _count(f"{NAME}.contiguous", "batch", batch)
        length = _count(f"{NAME}.contiguous", "max_length", max_length, most=2**31 - 1)
        options = {"dtype": dtype, "like": like, "device": device}
        cache = cls(batch, length, Hk, D, Dv, max_length=length, **options)
        cache.open(batch)
        return cache

    @property
    def k(self) -> Any:
        """Return the pool of keys `(pages, Hk, page_size, D)`.

        In the memory of the host an array, of bfloat16 its bits as uint16; on a device a tensor.
        """
        return self._memory.k

    @property
    def v(self) -> Any:
        """Return the pool of values `(pages, Hk, page_size, Dv)`; as `k`."""
        return self._memory.v

    @property
    def dtype(self) -> str:
        """Return the dtype of keys and values by name."""
        return self._dtype

    @property
    def page_size(self) -> int:
        """Return the keys in a page."""
        return self._page_size

    @property
    def max_length(self) -> int | None:
        """Return how many keys a sequence may have, or None."""
        return self._pages.limit

    @property
    def pages(self) -> int:
        """Return the pages in each pool."""
        return self._pages.count

    @property
    def pages_free(self) -> int:
        """Return the pages that no sequence holds."""
        return self._pages.free_count

    @property
    def nbytes(self) -> int:
        """Return the bytes of both pools."""
        return int(self.k.nbytes + self.v.nbytes)

    @property
    def sequences(self) -> list[int]:
        """Return the open sequences, oldest first."""
        return self._pages.ids()

    def open(self, n: int = 1) -> list[int]:
        """Return the ids of n new empty sequences. An id is never used again."""
        return self._pages.open(_count(f"{NAME}.open", "n", n, least=0))

    def append(
        self,
        k: Any,
        v: Any,
        sequences: Any = None,
        *,
        lengths: Any = None,
        layout: str = "bhnd",
    ) -> None:
        """Append keys and values to sequences.

        Args:
            k: `(B, Hk, n, D)`, dtype of the cache. A NumPy array or a PyTorch tensor.
            v: `(B, Hk, n, Dv)`, dtype of the cache.
            sequences: B different ids, or one; all open sequences by default.
            lengths: `(B,)` integers, 0 to n: how many of the n keys of each sequence are real. The
                others, behind them, are not appended. All by default.
            layout: `"bhnd"`, or `"bnhd"` for tensors `(B, n, Hk, D)`.

        Raises:
            TypeError: An argument has a wrong kind or dtype.
            ValueError: An argument has a wrong shape, or a sequence is not open, twice there, in
                another call that appends to it, or full.
            OutOfPages: There are not enough free pages.
        """
        with self._appending(f"{NAME}.append", sequences, k, v, lengths, layout):
            pass

    def lengths(self, sequences: Any = None) -> NDArray[np.int64]:
        """Return `(B,)`, int64: the keys of each sequence, with those evicted."""
        return self._view(f"{NAME}.lengths", sequences).lengths

    def block_table(self, sequences: Any = None) -> NDArray[np.int32]:
        """Return `(B, P)`, int32: the pages of each sequence in the order of its keys.

        Key j is row `j % page_size` of page `j // page_size` of the sequence. -1 stands for a page
        that is evicted, and behind the last page.
        """
        return self._view(f"{NAME}.block_table", sequences).block_table()

    def fork(self, sequence: int, n: int = 1, *, length: int | None = None) -> list[int]:
        """Return n new sequences that begin as another one does; no key is copied.

        A page that is partly filled is copied when one of those that share it appends.

        Args:
            sequence: An open sequence.
            n: How many.
            length: How many of its first keys they share; all by default.

        Raises:
            TypeError: An argument is not an integer.
            ValueError: The sequence is not open, or length lies beyond its end or among keys that
                are evicted.
        """
        name = f"{NAME}.fork"
        if length is not None:
            length = _count(name, "length", length, least=0)
        id = _count(name, "sequence", sequence, least=0)
        return self._pages.fork(name, id, _count(name, "n", n, least=0), length)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all keys of a sequence but the first `length`, such as those of rejected tokens.

        Raises:
            TypeError: An argument is not an integer.
            ValueError: The sequence is not open, or length lies beyond its end or among keys that
                are evicted.
        """
        name = f"{NAME}.truncate"
        id = _count(name, "sequence", sequence, least=0)
        self._pages.truncate(name, id, _count(name, "length", length, least=0))

    def evict(self, sequences: Any = None, *, keep: int) -> None:
        """Give back the pages that lie wholly before the last `keep` keys of each sequence.

        Attention hides their keys from then on. Positions stay what they were.

        Args:
            sequences: Different ids, or one; all open sequences by default.
            keep: Keys at the end that stay: the next query, which a window of w keys lets see its
                own key and w - 1 before it, needs w - 1.
        """
        name = f"{NAME}.evict"
        keep = _count(name, "keep", keep, least=0)
        self._pages.evict(name, self._ids(name, sequences), keep)

    def free(self, sequences: Any) -> None:
        """Close sequences and give back the pages that no other one holds.

        Args:
            sequences: Different ids, or one.
        """
        name = f"{NAME}.free"
        if sequences is None:
            raise type_error(name, "sequences", "be given", "None")
        self._pages.free(name, self._ids(name, sequences))

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse copy, deepcopy and pickle, which would miss what other threads append."""
        got = "copy, deepcopy or pickle of the whole cache"
        raise type_error(NAME, "copies", "be made by fork, sequence by sequence", got)

    def __repr__(self) -> str:
        shape = f"Hk={self._Hk}, D={self._D}, Dv={self._Dv}, dtype={self._dtype!r}"
        used = f"{len(self.sequences)} sequences, {self.pages_free} of {self.pages} pages free"
        return f"<{NAME}: page_size={self._page_size}, {shape}; {used}>"

    def _view(self, operator: str, sequences: Any) -> View:
        return self._pages.view(operator, self._ids(operator, sequences))

    def _ids(self, operator: str, sequences: Any) -> list[int]:
        if sequences is None:
            return self._pages.ids()
        return _integers(operator, "sequences", sequences)

    @contextmanager
    def _appending(
        self, operator: str, sequences: Any, k: Any, v: Any, lengths: Any, layout: str
    ) -> Iterator[View]:
        """Append keys and values that belong to the sequences when the context ends.

        Within it, the view that it gives shows them; an exception there takes them back.
        """
        ids = self._ids(operator, sequences)
        k, v = self._checked(operator, len(ids), k, v, layout)
        counts = row_counts(operator, lengths, len(ids), k.shape[2])
        with self._pages.claim(operator, ids, counts) as claim:
            self._write(claim, k, v)
            yield claim.view

    def _checked(self, operator: str, B: int, k: Any, v: Any, layout: str) -> tuple[Any, Any]:
        """Return `(B, Hk, n, D)` and `(B, Hk, n, Dv)` as the pools store them."""
        if layout not in LAYOUTS:
            allowed = " or ".join(map(repr, LAYOUTS))
            raise value_error(operator, "layout", f"be {allowed}", repr(layout))
        k, v = (self._words(operator, name, x) for name, x in (("k", k), ("v", v)))
        sizes = Sizes(operator, LIMITS)
        sizes.match("sequences", (("B",),), (B,))
        sizes.match("cache", (("Hk", "D", "Dv"),), (self._Hk, self._D, self._Dv))
        sizes.match("k", KEY.in_layout(layout), tuple(k.shape))
        sizes.match("v", VALUE.in_layout(layout), tuple(v.shape))
        return (k, v) if layout == "bhnd" else (k.swapaxes(1, 2), v.swapaxes(1, 2))

    def _words(self, operator: str, name: str, value: Any) -> Any:
        """Return an array or tensor of the cache's dtype as the pools store it."""
        stored, dtype = self._memory.read(operator, name, value)
        if dtype != self._dtype:
            raise type_error(operator, name, f"have dtype {self._dtype} (from cache)", dtype)
        return stored

    def _write(self, claim: Claim, k: Any, v: Any) -> None:
        self._memory.write(claim, k, v)

    def _dense(self, view: View, b: int) -> tuple[Any, Any]:
        return self._memory.dense(view, b)


def row_counts(operator: str, lengths: Any, B: int, n: int) -> list[int]:
    """Return how many of the n rows of each sequence are real."""
    if lengths is None:
        return [n] * B
    counts = _integers(operator, "lengths", lengths)
    if len(counts) != B:
        raise value_error(operator, "lengths", f"have {B} entries (from sequences)", len(counts))
    for count in counts:
        if not 0 <= count <= n:
            raise value_error(operator, "lengths", f"be from 0 to {n}", count)
    return counts


def _count(operator: str, name: str, value: Any, *, least: int = 1, most: int = 2**63 - 1) -> int:
    (count,) = _integers(operator, name, [value])
    if not least <= count <= most:
        limit = f"be at least {least}" if count < least else f"be at most {most}"
        raise value_error(operator, name, limit, count)
    return count


def _integers(operator: str, name: str, values: Any) -> list[int]:
    """Return integers from one or from several, of any package."""
    plain = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(plain, Iterable) or isinstance(plain, str):
        plain = [plain]
    return [_integer(operator, name, value) for value in plain]


def _integer(operator: str, name: str, value: Any) -> int:
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return _operator.index(value)
    except TypeError:
        requirement = "be an integer or integers" if name in _SEVERAL else "be an integer"
        raise type_error(operator, name, requirement, type(value).__name__) from None


_SEVERAL = ("sequences", "lengths")


def _dtype_name(dtype: Any, like: Any) -> str:
    if like is not None:
        if dtype is not None:
            raise type_error(NAME, "dtype", "be left out where like is given", repr(dtype))
        dtype = getattr(like, "dtype", like)
    name = _name_of("float32" if dtype is None else dtype)
    if name not in WORDS:
        raise type_error(NAME, "dtype", f"be one of {', '.join(WORDS)}", name)
    return name


def _name_of(dtype: Any) -> str:
    if isinstance(dtype, str):
        return dtype
    if type(dtype).__module__ == "torch":
        return str(dtype).removeprefix("torch.")
    try:
        found = np.dtype(dtype)
    except TypeError:
        return repr(dtype)
    return str(found.name if found.isnative else found.str)
