"""The digest of pages: the reference's in every variant, a sum over pages, of content and of place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvreplica import native
from hvreplica.native import PAGE_BYTES, reference

if TYPE_CHECKING:
    import random

    from hvreplica.native.kernels import Kernels

per_variant = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
U64 = 1 << 64
GOLDEN_FIRST = (0x8EEC2E72A33296B4, 0x27A0737862A0E7BA)
GOLDEN_SECOND = (0xE04593D358BCE4EC, 0x3215019BDB9E5B34)
pages = st.lists(
    st.one_of(
        st.just(bytes(PAGE_BYTES)),
        st.binary(min_size=1, max_size=64).map(lambda seed: xxhash.xxh3_128_digest(seed) * 256),
        st.integers(0, PAGE_BYTES - 1).map(
            lambda place: bytes(place) + b"\1" + bytes(PAGE_BYTES - 1 - place)
        ),
    ),
    max_size=9,
).map(b"".join)
page_numbers = st.one_of(st.integers(0, 1 << 20), st.integers(U64 - 20, U64 - 1))


def total(*sums: tuple[int, int]) -> tuple[int, int]:
    return sum(low for low, _ in sums) % U64, sum(high for _, high in sums) % U64


@per_variant
@given(data=pages, first=page_numbers, cut=st.integers(0, PAGE_BYTES - 1))
def test_the_digest_equals_the_reference(kernels: Kernels, data: bytes, first: int, cut: int) -> None:
    data = data[: max(len(data) - cut, 0)]
    assert kernels.page_digest(data, first) == reference.page_digest(data, first)


def test_the_digest_at_every_length_of_a_last_page_equals_the_reference(
    kernels: Kernels, rng: random.Random
) -> None:
    data = rng.randbytes(2 * PAGE_BYTES + 1)
    for length in range(len(data) + 1):
        piece = memoryview(data)[length % 2 : length]
        assert kernels.page_digest(piece, 3) == reference.page_digest(piece, 3), length


def test_the_digest_is_what_catalogs_hold(kernels: Kernels) -> None:
    one = b"a" * PAGE_BYTES
    for side in (kernels, reference):
        assert side.page_digest(one, 0) == GOLDEN_FIRST
        assert side.page_digest(bytes(PAGE_BYTES) + one[:512], 1 << 34) == GOLDEN_SECOND


def test_pages_of_zeros_count_nothing(kernels: Kernels) -> None:
    for length in (0, 1, 511, PAGE_BYTES, 3 * PAGE_BYTES, 3 * PAGE_BYTES + 17):
        assert kernels.page_digest(bytes(length), 5) == (0, 0)


@per_variant
@given(data=pages, first=page_numbers, at=st.integers(0, 9))
def test_the_digest_of_a_whole_is_the_sum_of_its_parts(
    kernels: Kernels, data: bytes, first: int, at: int
) -> None:
    cut = min(at * PAGE_BYTES, len(data))
    parts = (
        kernels.page_digest(data[:cut], first),
        kernels.page_digest(data[cut:], (first + cut // PAGE_BYTES) % U64),
    )
    assert total(*parts) == kernels.page_digest(data, first)


@per_variant
@given(data=pages, tail=st.binary(max_size=64), zeros=st.integers(0, 3 * PAGE_BYTES))
def test_zeros_behind_a_disk_change_nothing(kernels: Kernels, data: bytes, tail: bytes, zeros: int) -> None:
    assert kernels.page_digest(data + tail + bytes(zeros), 1) == kernels.page_digest(data + tail, 1)


def test_every_bit_of_a_page_counts(kernels: Kernels, rng: random.Random) -> None:
    page = bytearray(rng.randbytes(PAGE_BYTES))
    seen = {kernels.page_digest(page, 9)}
    for bit in range(8 * PAGE_BYTES):
        page[bit // 8] ^= 1 << bit % 8
        seen.add(kernels.page_digest(page, 9))
        page[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 8 * PAGE_BYTES + 1
    assert len({low for low, _ in seen}) == len({high for _, high in seen}) == len(seen)


def test_the_place_and_the_order_of_pages_count(kernels: Kernels, rng: random.Random) -> None:
    first, second = rng.randbytes(PAGE_BYTES), rng.randbytes(PAGE_BYTES)
    whole = kernels.page_digest(first + second, 0)
    swapped = kernels.page_digest(second + first, 0)
    assert whole[0] != swapped[0]
    assert whole[1] != swapped[1]
    places = [kernels.page_digest(first, number) for number in (0, 1, 2, 1 << 20, 1 << 52, U64 - 1)]
    assert len({low for low, _ in places}) == len({high for _, high in places}) == len(places)
    # Two equal pages must not cancel out, nor count the same as one twice as heavy elsewhere.
    assert total(places[0], places[1]) == kernels.page_digest(first + first, 0)
    assert len({total(places[a], places[b]) for a in range(6) for b in range(a)}) == 15


def test_random_changes_are_seen(rng: random.Random) -> None:
    disk = bytearray(rng.randbytes(16 * PAGE_BYTES))
    before = native.page_digest(disk, 0)
    for _ in range(2000):
        a, b = rng.sample(range(16), 2)
        saved = bytes(disk)
        length = rng.randrange(1, PAGE_BYTES + 1)
        disk[a * PAGE_BYTES : a * PAGE_BYTES + length] = saved[b * PAGE_BYTES : b * PAGE_BYTES + length]
        if disk != saved:
            assert native.page_digest(disk, 0) != before
        disk[:] = saved


@per_variant
@given(data=pages, numbers=st.sets(st.integers(0, 1 << 40), min_size=4, max_size=4), cut=st.integers(0, 4096))
def test_extents_count_what_their_pages_do(
    kernels: Kernels, data: bytes, numbers: set[int], cut: int
) -> None:
    lengths = [2 * PAGE_BYTES, 0, PAGE_BYTES, max(len(data) - 3 * PAGE_BYTES - cut, 0)]
    data = data[: sum(lengths)].ljust(sum(lengths), b"\7")
    extents = np.array([[n * PAGE_BYTES, length] for n, length in zip(numbers, lengths, strict=True)])
    expected, at = (0, 0), 0
    for offset, length in extents.tolist():
        expected = total(expected, kernels.page_digest(data[at : at + length], offset // PAGE_BYTES))
        at += length
    assert kernels.extents_digest(data, extents) == expected == reference.extents_digest(data, extents)


@pytest.mark.parametrize(
    ("extents", "reason"),
    [
        ([[0, 4096]], "add up"),
        ([[0, 4096], [8192, 4096], [16384, 1]], "add up"),
        ([[0, 1 << 62], [0, 1 << 62]], "add up"),
        ([[0, 4096], [512, 4096]], "begin with a page"),
    ],
)
def test_extents_that_do_not_fit_are_refused(kernels: Kernels, extents: list[list[int]], reason: str) -> None:
    for side in (kernels, reference):
        with pytest.raises(ValueError, match=reason):
            side.extents_digest(bytes(8192), np.array(extents))


@pytest.mark.parametrize("number", [-1, U64])
def test_a_page_number_beyond_64_bits_is_refused(kernels: Kernels, number: int) -> None:
    for side in (kernels, reference):
        with pytest.raises(OverflowError):
            side.page_digest(bytes(8), number)
