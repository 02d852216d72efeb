"""The memory that a frontend offers for results, and how results get into it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from tilewise.base.memory import empty, results_in, settle


def test_what_is_offered_is_taken_once_by_size_and_dtype() -> None:
    offered = [np.zeros((2, 3)), np.zeros(6), np.zeros(6, np.float32)]
    with results_in(offered):
        first, second, third = (empty(shape, np.float64) for shape in ((6,), (3, 2), (6,)))
        narrow, other = empty((6,), np.float32), empty((5,), np.float64)
    assert np.shares_memory(first, offered[0]) and first.shape == (6,)
    assert np.shares_memory(second, offered[1]) and second.shape == (3, 2)
    assert np.shares_memory(narrow, offered[2])
    assert not any(np.shares_memory(x, y) for x in (third, other) for y in offered)


def test_outside_the_block_and_in_other_threads_memory_is_new() -> None:
    offered, found = np.zeros(7), []
    with results_in([offered]):
        thread = threading.Thread(target=lambda: found.append(empty((7,), np.float64)))
        thread.start()
        thread.join()
        with results_in([]):
            found.append(empty((7,), np.float64))
        assert np.shares_memory(empty((7,), np.float64), offered)
    found.append(empty((7,), np.float64))
    assert len(found) == 3 and not any(np.shares_memory(x, offered) for x in found)


def settled(results: list[Any], targets: list[Any]) -> list[Any]:
    wanted = [result.copy() for result in results]
    settle(results, targets)
    for target, want in zip(targets, wanted, strict=True):
        np.testing.assert_array_equal(target, want)
    return targets


def test_results_reach_their_targets_wherever_they_lie() -> None:
    rng = np.random.default_rng(1)
    a, b, c = (rng.normal(size=(3, 5)) for _ in range(3))
    settled([a.view(), b.view(), c + 1], [a, b, c])  # in place, and elsewhere
    a, b, c = (rng.normal(size=(3, 5)) for _ in range(3))
    settled([b.view(), c.view(), a.view()], [a, b, c])  # each in the memory of another
    a, b = rng.normal(size=(3, 3)), rng.normal(size=(3, 3))
    settled([a.T, b[::-1]], [a, b])  # in the own memory, in another order
