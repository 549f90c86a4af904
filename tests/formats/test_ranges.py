"""Files of ranges: what is written is read, damage is named, too many ranges become fewer that cover them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.errors import (
    BadSignature,
    ChecksumMismatch,
    FieldOutOfRange,
    FormatError,
    Truncated,
    UnsupportedVersion,
)
from hvreplica.formats.ranges import HEADER, coarsened, pack_ranges, pack_rows, unpack_ranges, unpack_rows

DISK_BYTES = 1 << 30
ROWS = np.array([[0, 4096], [8192, 512], [1 << 20, DISK_BYTES - (1 << 20)]], np.int64)


def packed() -> bytes:
    return pack_ranges(ROWS, disk_index=3, virtual_bytes=DISK_BYTES)


def test_ranges_come_back_with_the_size_of_their_disk() -> None:
    rows, virtual_bytes = unpack_ranges(packed() + b"what stands behind does not count", disk_index=3)
    assert rows.tolist() == ROWS.tolist()
    assert virtual_bytes == DISK_BYTES
    none, _ = unpack_ranges(pack_ranges(ROWS[:0], disk_index=0, virtual_bytes=512), disk_index=0)
    assert none.shape == (0, 2)


@pytest.mark.parametrize(
    ("at", "byte", "error"),
    [
        (0, 0, BadSignature),
        (HEADER.offset_of("version"), 9, UnsupportedVersion),
        (HEADER.offset_of("checksum"), 0, ChecksumMismatch),
        (HEADER.offset_of("range_count"), 2, ChecksumMismatch),
        (HEADER.offset_of("range_count") + 7, 1, FieldOutOfRange),
        (HEADER.offset_of("virtual_bytes") + 7, 1, FieldOutOfRange),
        (HEADER.size, 1, ChecksumMismatch),
        (len(packed()) - 1, 1, ChecksumMismatch),
    ],
)
def test_damage_is_named(at: int, byte: int, error: type[FormatError]) -> None:
    data = bytearray(packed())
    data[at] = byte
    with pytest.raises(error):
        unpack_ranges(data, disk_index=3)


def test_file_of_another_disk_or_cut_short_is_refused() -> None:
    with pytest.raises(FieldOutOfRange, match="not possible"):
        unpack_ranges(packed(), disk_index=2)
    with pytest.raises(Truncated):
        unpack_ranges(packed()[:-1], disk_index=3)


@pytest.mark.parametrize(
    "rows",
    [
        [[4096, 4096], [0, 512]],
        [[0, 4096], [4095, 1]],
        [[0, 0]],
        [[DISK_BYTES - 512, 1024]],
        [[0, 1 << 63]],
    ],
)
def test_rows_from_outside_are_in_order_and_within_the_disk(rows: list[list[int]]) -> None:
    data = np.array(rows, np.uint64).tobytes()
    with pytest.raises(FieldOutOfRange):
        unpack_rows(data, virtual_bytes=DISK_BYTES)


def test_rows_of_a_page_begin_where_it_was_asked_for() -> None:
    page = pack_rows(ROWS[1:])
    assert unpack_rows(page, virtual_bytes=DISK_BYTES, start=8192).tolist() == ROWS[1:].tolist()
    with pytest.raises(FieldOutOfRange):
        unpack_rows(page, virtual_bytes=DISK_BYTES, start=8193)
    with pytest.raises(FieldOutOfRange, match="whole rows"):
        unpack_rows(page[:-1], virtual_bytes=DISK_BYTES)


@given(st.binary(max_size=200), st.sampled_from([b"", packed()[: HEADER.size]]))
def test_any_bytes_give_ranges_or_a_format_error(data: bytes, head: bytes) -> None:
    content = head + data
    try:
        unpack_ranges(content, disk_index=3)
    except FormatError:
        return
    assert content.startswith(packed())


@given(st.sets(st.integers(0, 400), max_size=60), st.integers(1, 40))
def test_too_many_ranges_are_joined_to_as_many_as_fit(blocks: set[int], count_max: int) -> None:
    rows = np.array([[at * 1024, 512] for at in sorted(blocks)], np.int64).reshape(-1, 2)
    fewer = coarsened(rows, count_max)
    assert len(fewer) == min(len(rows), count_max)
    covered = {at for start, length in fewer.tolist() for at in range(start, start + length, 512)}
    assert {at * 1024 for at in blocks} <= covered
    assert unpack_rows(pack_rows(fewer), virtual_bytes=1 << 20).tolist() == fewer.tolist()
    if len(rows) <= count_max:
        assert len(covered) == len(blocks)
