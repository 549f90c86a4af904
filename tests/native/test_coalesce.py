"""Coalescing: newest write wins, proven against a disk of bytes and against the reference."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hvreplica import native
from hvreplica.native import reference

DISK_BYTES = 200
writes = st.lists(
    st.tuples(st.integers(0, DISK_BYTES - 40), st.integers(0, 40), st.integers(0, 500)), max_size=40
)
huge = st.tuples(st.integers(0, 1 << 62), st.integers(0, 1 << 61), st.integers(0, 1 << 62))


def columns(rows: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = np.array(rows, np.uint64).reshape(-1, 3)
    return table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy()


def replayed(rows: list[tuple[int, int, int]]) -> list[int]:
    """Return for each byte of a small disk the log offset it was last written from, -1 where never."""
    disk = [-1] * DISK_BYTES
    for start, length, log in rows:
        disk[start : start + length] = range(log, log + length)
    return disk


def check_form(rows: list[tuple[int, int, int]]) -> None:
    for (start, length, log), (next_start, _, next_log) in pairwise(rows):
        assert start + length <= next_start
        assert (start + length, log + length) != (next_start, next_log), "neighbours are joined"
    assert all(length > 0 for _, length, _ in rows)


def coalesced(rows: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    result = native.coalesce(*columns(rows))
    assert all(column.dtype == np.uint64 for column in result)
    return list(zip(*(column.tolist() for column in result), strict=True))


@given(rows=writes)
@example(rows=[(0, 10, 100), (10, 10, 110), (5, 10, 200)])
@example(rows=[(0, 40, 0), (10, 5, 300), (10, 5, 310), (0, 0, 9)])
@example(rows=[(10, 5, 0), (0, 40, 100)])
@example(rows=[(0, 10, 100), (9, 10, 200)])
def test_coalesced_writes_leave_the_disk_of_the_writes_in_order(rows: list[tuple[int, int, int]]) -> None:
    result = coalesced(rows)
    check_form(result)
    assert replayed(result) == replayed(rows)
    assert len(result) <= 2 * len(rows)


@given(rows=st.lists(huge, max_size=60))
def test_coalesce_equals_the_reference_for_offsets_of_any_size(rows: list[tuple[int, int, int]]) -> None:
    expected = reference.coalesce(*columns(rows))
    result = coalesced(rows)
    assert result == list(zip(*(column.tolist() for column in expected), strict=True))
    check_form(result)


@given(gaps=st.lists(st.integers(0, 3), max_size=60), seed=st.integers(0, 99))
def test_sorted_disjoint_input_is_only_joined(gaps: list[int], seed: int) -> None:
    rows, disk, log = [], 0, seed
    for gap in gaps:
        disk, log = disk + (gap % 2) * 512, log + (gap // 2) * 7
        rows.append((disk, 512 * (1 + gap % 2), log))
        disk, log = disk + rows[-1][1], log + rows[-1][1]
    expected = reference.coalesce(*columns(rows))
    assert coalesced(rows) == list(zip(*(column.tolist() for column in expected), strict=True))


def test_coalescing_twice_changes_nothing() -> None:
    rng = np.random.default_rng(42)
    rows = columns(list(zip(*(rng.integers(0, 5000, (3, 4000)).tolist()), strict=True)))
    once = native.coalesce(*rows)
    twice = native.coalesce(*once)
    assert all((a == b).all() for a, b in zip(once, twice, strict=True))


def test_a_million_random_writes_equal_a_disk_of_sectors() -> None:
    rng = np.random.default_rng(42)
    count, sectors = 1_000_000, 400_000
    starts = rng.integers(0, sectors - 16, count)
    lengths = rng.integers(1, 17, count)
    logs = np.cumsum(lengths) - lengths
    newest = np.full(sectors, -1, np.int64)
    for step in range(16):  # of all writes that reach a sector at all, the last one in order counts
        reach = lengths > step
        np.maximum.at(newest, starts[reach] + step, np.flatnonzero(reach))
    written = newest >= 0
    expected = np.where(written, logs[newest] + np.arange(sectors) - starts[newest], -1)
    disk, sizes, log = (
        column.astype(np.int64) // 512 for column in native.coalesce(starts * 512, lengths * 512, logs * 512)
    )
    found = np.full(sectors, -1, np.int64)
    places = np.repeat(disk - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
    found[places] = np.repeat(log - disk, sizes) + places
    assert (found == expected).all()


@pytest.mark.parametrize(
    "rows",
    [[((1 << 64) - 1, 1, 0)], [(0, 1, (1 << 64) - 1)], [(0, (1 << 64) - 1, 1)], [(1, (1 << 64) - 1, 0)]],
)
def test_an_extent_beyond_64_bits_is_refused(rows: list[tuple[int, int, int]]) -> None:
    for side in (native, reference):
        with pytest.raises(ValueError, match="64 bits"):
            side.coalesce(*columns(rows))


def test_columns_of_unequal_length_are_refused() -> None:
    one, two = np.zeros(1, np.uint64), np.zeros(2, np.uint64)
    for side in (native, reference):
        for arguments in ((one, one, two), (one, two, one), (two, one, one)):
            with pytest.raises(ValueError, match="equal length"):
                side.coalesce(*arguments)
    with pytest.raises(TypeError):
        native.coalesce(np.zeros(1), one, one)
