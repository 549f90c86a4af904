"""The header and table of a pressed part: what is refused, and by which field."""

from __future__ import annotations

import uuid
from array import array

import pytest

from hvreplica.errors import FormatError
from hvreplica.formats import pressed
from hvreplica.formats.pressed import (
    FrameKind,
    FrameTable,
    is_pressed,
    pack_table,
    unpack_header,
    unpack_table,
)

PART_ID = uuid.UUID(int=0x1234)
HOLE, PLAIN, ZSTD = FrameKind.HOLE, FrameKind.PLAIN, FrameKind.ZSTD
GOOD = [(4096, 900, 7, ZSTD), (1 << 30, 0, 0, HOLE), (65536, 65536, 8, PLAIN), (4096, 1, 9, ZSTD)]


def unpacked(rows: list[tuple[int, int, int, int]]) -> FrameTable:
    table = array("I", [value for row in rows for value in row])
    head, table_offset = pack_table(PART_ID, table)
    assert is_pressed(head)
    header = unpack_header(head, file_bytes=table_offset + 16 * len(rows))
    return unpack_table(header, bytes(table))


def test_table_says_where_each_frame_is() -> None:
    table = unpacked(GOOD)
    assert table.part_id == PART_ID
    assert table.starts.tolist() == [0, 4096, 4096 + (1 << 30), 69632 + (1 << 30), 73728 + (1 << 30)]
    assert table.places.tolist() == [64, 964, 964, 66500, 66501]
    assert table.kinds.tolist() == [2, 0, 1, 2]
    assert table.checksums.tolist() == [7, 0, 8, 9]
    assert table.log_bytes == 73728 + (1 << 30)


@pytest.mark.parametrize(
    "row",
    [
        (0, 0, 0, HOLE),
        (0, 0, 0, PLAIN),
        (4096, 4095, 0, PLAIN),
        (4096, 4096, 0, ZSTD),
        (4096, 0, 0, ZSTD),
        ((128 << 10) + 1, 9, 0, ZSTD),
        ((1 << 30) + 1, 0, 0, HOLE),
        (4096, 1, 0, HOLE),
        (4096, 0, 1, HOLE),
        (4096, 100, 0, 3),
    ],
)
def test_impossible_frame_is_refused(row: tuple[int, int, int, int]) -> None:
    with pytest.raises(FormatError, match="frame of a pressed"):
        unpacked([*GOOD, row])


@pytest.mark.parametrize("place", range(0, 64, 3))
def test_any_changed_byte_of_the_header_is_found(place: int) -> None:
    table = array("I", [value for row in GOOD for value in row])
    head, table_offset = pack_table(PART_ID, table)
    damaged = bytearray(head)
    damaged[place] ^= 0x11
    with pytest.raises(FormatError):
        unpack_table(unpack_header(damaged, file_bytes=table_offset + 64), bytes(table))


def test_file_of_another_length_is_refused() -> None:
    table = array("I", [value for row in GOOD for value in row])
    head, table_offset = pack_table(PART_ID, table)
    for change in (-1, 1, 16):
        with pytest.raises(FormatError, match="does not end where"):
            unpack_header(head, file_bytes=table_offset + 64 + change)
    with pytest.raises(FormatError):
        unpack_header(head[:63], file_bytes=63)


def test_sums_must_agree() -> None:
    """A table that keeps its checksum and does not fill the log."""
    table = array("I", [value for row in GOOD for value in row])
    table_offset = 64 + 900 + 65536 + 1
    for log_bytes, offset in ((100, table_offset), (73728 + (1 << 30), table_offset - 1)):
        checksum = pressed._checksum(PART_ID, log_bytes, offset, table)
        head = pressed._pack(PART_ID, log_bytes, offset, len(GOOD), checksum)
        header = unpack_header(head, file_bytes=offset + 64)
        with pytest.raises(FormatError, match="not possible"):
            unpack_table(header, bytes(table))
