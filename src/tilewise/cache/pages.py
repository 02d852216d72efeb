"""Which pages a sequence of keys lies in: the books of a cache, without the keys."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tilewise.base.errors import must, value_error

EVICTED: Final = -1
"""What stands in a table in place of a page that was given back."""


class OutOfPages(MemoryError):
    """A cache has fewer free pages than a call needs; the call changed nothing."""


@dataclass(slots=True, eq=False)
class Entry:
    """One open sequence.

    Attributes:
        id: Its number.
        length: Its keys, with those evicted.
        pages: Its pages in the order of its keys; evicted ones come first.
        evicted: How many of them are evicted.
        busy: Whether a call is appending to it.
    """

    id: int
    length: int = 0
    pages: array[int] = field(default_factory=lambda: array("i"))
    evicted: int = 0
    busy: bool = False


@dataclass(frozen=True, slots=True)
class Copied:
    """Keys of a shared page that go to a page of one's own before more are appended."""

    source: int
    target: int
    rows: int


@dataclass(frozen=True, slots=True)
class View:
    """What some sequences are at one time, or will be once a claim on pages is settled.

    Attributes:
        starts: `(B,)`, int64. Keys before the claim.
        lengths: `(B,)`, int64. Keys with it.
        tables: Pages of each sequence, in the order of its keys.
        hidden: `(B,)`, int64. Keys at the start that are evicted.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    tables: Sequence[array[int]]
    hidden: NDArray[np.int64]

    def block_table(self) -> NDArray[np.int32]:
        """Return `(B, P)`, int32: the pages of each sequence, and -1 where it has none."""
        width = max(map(len, self.tables), default=0)
        table = np.full((len(self.tables), width), EVICTED, np.int32)
        for row, pages in zip(table, self.tables, strict=True):
            row[: len(pages)] = pages
        return table


@dataclass(frozen=True, slots=True)
class Claim:
    """Pages set aside for keys that are about to be appended.

    Attributes:
        view: The sequences as they will be.
        entries: The sequences.
        copies: What to copy first.
        taken: The pages set aside.
    """

    view: View
    entries: Sequence[Entry]
    copies: Sequence[Copied]
    taken: Sequence[int]


class Pages:
    """Pages of equal size, sequences that hold them, and how many hold each page.

    Every method changes all that it should or, where it raises, nothing; any thread may call it.

    Args:
        count: Number of pages.
        size: Keys in a page.
        limit: Keys that a sequence may have, or None.
    """

    def __init__(self, count: int, size: int, limit: int | None = None) -> None:
        self.count = count
        self.size = size
        self.limit = limit
        self._holders = [0] * count
        self._free = list(range(count))  # a heap: the lowest free page is taken first
        self._entries: dict[int, Entry] = {}
        self._next = 0
        self._lock = Lock()

    @property
    def free_count(self) -> int:
        """Return the number of pages that nobody holds."""
        with self._lock:
            return len(self._free)

    def ids(self) -> list[int]:
        """Return the open sequences, oldest first."""
        with self._lock:
            return list(self._entries)

    def open(self, n: int) -> list[int]:
        """Return the ids of n new empty sequences. An id is never used again."""
        with self._lock:
            return [self._add(Entry(self._next)) for _ in range(n)]

    def view(self, operator: str, ids: Iterable[int]) -> View:
        """Return what some sequences are now."""
        with self._lock:
            return self._view([self._entry(operator, id) for id in ids])

    def free(self, operator: str, ids: Iterable[int]) -> None:
        """Close sequences and give back the pages that no other one holds."""
        with self._lock:
            for entry in self._idle(operator, ids):
                self._release(entry.pages)
                del self._entries[entry.id]

    def fork(self, operator: str, id: int, n: int, length: int | None) -> list[int]:
        """Return n new sequences that share the first keys of another."""
        with self._lock:
            (entry,) = self._idle(operator, [id])
            kept = self._length_of(operator, entry, length)
            shared = entry.pages[: self._pages_for(kept)]
            for page in shared:
                if page != EVICTED:
                    self._holders[page] += n
            new = (Entry(self._next, kept, shared[:], entry.evicted) for _ in range(n))
            return [self._add(entry) for entry in new]

    def truncate(self, operator: str, id: int, length: int) -> None:
        """Forget the last keys of a sequence."""
        with self._lock:
            (entry,) = self._idle(operator, [id])
            entry.length = self._length_of(operator, entry, length)
            kept = self._pages_for(length)
            self._release(entry.pages[kept:])
            del entry.pages[kept:]

    def evict(self, operator: str, ids: Iterable[int], keep: int) -> None:
        """Give back the pages that lie wholly before the last `keep` keys."""
        with self._lock:
            for entry in self._idle(operator, ids):
                gone = max(entry.evicted, (entry.length - keep) // self.size)
                self._release(entry.pages[entry.evicted : gone])
                for page in range(entry.evicted, gone):
                    entry.pages[page] = EVICTED
                entry.evicted = gone

    @contextmanager
    def claim(self, operator: str, ids: Iterable[int], counts: Sequence[int]) -> Iterator[Claim]:
        """Set pages aside for so many more keys, which the sequences have when the context ends.

        Where it ends by an exception, they are as they were. Until then no other call may change
        them.

        Raises:
            OutOfPages: There are not enough free pages.
        """
        claim = self._claim(operator, ids, counts)
        settled = False
        try:
            yield claim
            settled = True
        finally:
            with self._lock:
                if settled:
                    self._settle(claim)
                else:
                    self._release(claim.taken)
                for entry in claim.entries:
                    entry.busy = False

    def _claim(self, operator: str, ids: Iterable[int], counts: Sequence[int]) -> Claim:
        with self._lock:
            entries = self._idle(operator, ids)
            shared = self._shared_ends(entries, counts)
            needed = [
                self._pages_for(entry.length + count) - len(entry.pages) + (page is not None)
                for entry, count, page in zip(entries, counts, shared, strict=True)
            ]
            self._check_room(operator, entries, counts, sum(needed))
            taken = [heapq.heappop(self._free) for _ in range(sum(needed))]
            for new in taken:
                self._holders[new] = 1
            fresh, copies, tables = iter(taken), [], []
            for entry, more, page in zip(entries, needed, shared, strict=True):
                table = entry.pages[:]
                if page is not None:
                    table[-1] = next(fresh)
                    copies.append(Copied(page, table[-1], entry.length % self.size))
                table.extend([next(fresh) for _ in range(more - (page is not None))])
                tables.append(table)
                entry.busy = True
            now = self._view(entries)
            view = View(now.starts, now.starts + np.array(counts, np.int64), tables, now.hidden)
            return Claim(view, entries, copies, taken)

    def _shared_ends(self, entries: Sequence[Entry], counts: Sequence[int]) -> list[int | None]:
        """Return of each sequence the page to append to, if another one holds it too."""
        left: Counter[int] = Counter()
        ends: list[int | None] = []
        for entry, count in zip(entries, counts, strict=True):
            page = entry.pages[-1] if count and entry.length % self.size else None
            # Of those that leave a page in one call, the last one has it for itself.
            if page is not None and self._holders[page] - left[page] == 1:
                page = None
            if page is not None:
                left[page] += 1
            ends.append(page)
        return ends

    def _check_room(
        self, operator: str, entries: Sequence[Entry], counts: Sequence[int], needed: int
    ) -> None:
        for entry, count in zip(entries, counts, strict=True):
            if self.limit is not None and entry.length + count > self.limit:
                requirement = f"stay within max_length={self.limit}"
                got = f"{entry.length} + {count} keys"
                raise value_error(operator, f"sequence {entry.id}", requirement, got)
        if needed > len(self._free):
            requirement = f"have {needed} free pages"
            raise OutOfPages(must(operator, "cache", requirement, len(self._free)))

    def _settle(self, claim: Claim) -> None:
        view = claim.view
        for entry, length, table in zip(claim.entries, view.lengths, view.tables, strict=True):
            entry.length, entry.pages = int(length), table
        self._release([copied.source for copied in claim.copies])

    def _add(self, entry: Entry) -> int:
        self._entries[entry.id] = entry
        self._next += 1
        return entry.id

    def _release(self, pages: Iterable[int]) -> None:
        for page in pages:
            if page == EVICTED:
                continue
            self._holders[page] -= 1
            if not self._holders[page]:
                heapq.heappush(self._free, page)

    def _pages_for(self, length: int) -> int:
        return -(-length // self.size)

    def _view(self, entries: Sequence[Entry]) -> View:
        lengths = np.array([entry.length for entry in entries], np.int64)
        hidden = np.array([entry.evicted * self.size for entry in entries], np.int64)
        return View(lengths, lengths, [entry.pages[:] for entry in entries], hidden)

    def _entry(self, operator: str, id: int) -> Entry:
        entry = self._entries.get(id)
        if entry is None:
            raise value_error(operator, "sequences", "be open in this cache", id)
        return entry

    def _idle(self, operator: str, ids: Iterable[int]) -> list[Entry]:
        """Return sequences that may be changed: each once, and in no other call's hands."""
        entries = [self._entry(operator, id) for id in ids]
        for id, times in Counter(entry.id for entry in entries).items():
            if times > 1:
                raise value_error(operator, "sequences", "be different", f"{id} {times} times")
        for entry in entries:
            if entry.busy:
                requirement = "be in no other call that appends to them"
                raise value_error(operator, "sequences", requirement, entry.id)
        return entries

    def _length_of(self, operator: str, entry: Entry, length: int | None) -> int:
        """Return a length to which a sequence can be cut; None is all of it."""
        if length is None:
            return entry.length
        least = entry.evicted * self.size
        if not least <= length <= entry.length:
            why = f" (earlier keys of sequence {entry.id} are evicted)" if least else ""
            requirement = f"be from {least} to {entry.length}{why}"
            raise value_error(operator, "length", requirement, length)
        return length
