"""The counter-based random numbers against their published known answers."""

import numpy as np
import pytest

from tilewise.shared.philox import philox4x32

PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
ONES = 0xFFFFFFFF


# Random123, tests/kat_vectors: counter, key, words.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, (ONES, ONES), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (PI, (0xA4093822, 0x299F31D0), [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)
def test_known_answers(counter: list[int], key: tuple[int, int], words: list[int]) -> None:
    np.testing.assert_array_equal(philox4x32(np.array(counter), key), words)


def test_many_counters_are_each_alone() -> None:
    counters = np.random.default_rng(0).integers(0, 2**32, (4, 3, 5))
    many = philox4x32(counters, (7, 11))
    assert many.dtype == np.uint32
    for at in np.ndindex(3, 5):
        np.testing.assert_array_equal(many[:, *at], philox4x32(counters[:, *at], (7, 11)))


def test_counters_are_taken_modulo_two_to_the_32() -> None:
    low = philox4x32(np.array([1, 2**32 - 3, 0, 5]), (1, 2))
    np.testing.assert_array_equal(philox4x32(np.array([1 + 2**32, -3, 2**33, 5]), (1, 2)), low)
