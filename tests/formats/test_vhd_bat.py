"""Block tables, sector bitmaps and the batmap of a VHD."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.errors import BadSignature, FieldOutOfRange, FormatError, Overlap, Truncated
from hvreplica.formats.vhd_bat import (
    NO_OFFSET,
    BlockGeometry,
    pack_bat,
    pack_bitmap,
    unpack_bat,
    unpack_bitmap,
    validate_bat,
)
from hvreplica.formats.vhd_batmap import BATMAP_HEADER, batmap_header_offset, unpack_batmap
from hvreplica.formats.vhd_header import DynamicHeader
from hvreplica.units import GIB, KIB, MIB

TABLE = 0x600
PLACE = 2 * MIB + 512


@pytest.mark.parametrize(
    ("block_bytes", "bitmap_bytes"),
    [(2 * MIB, 512), (512 * KIB, 512), (512, 512), (4 * MIB, 1024), (1 << 31, 512 * KIB)],
)
def test_bitmaps_are_whole_sectors(block_bytes: int, bitmap_bytes: int) -> None:
    geometry = BlockGeometry.of(virtual_bytes=3 * GIB + 512, block_bytes=block_bytes)
    assert geometry.bitmap_bytes == bitmap_bytes
    assert geometry.block_count == -(-(3 * GIB + 512) // block_bytes)
    assert geometry.last_block_bytes == (3 * GIB + 512) % block_bytes or block_bytes
    assert geometry.sectors_per_block * 512 == block_bytes


@given(
    st.lists(st.one_of(st.just(NO_OFFSET), st.integers(0, 0xFFFFFFFE).map(lambda n: n * 512)), max_size=50)
)
def test_tables_read_back(rows: list[int]) -> None:
    offsets = np.array(rows, np.int64)
    assert unpack_bat(pack_bat(offsets), len(rows)).tolist() == rows


def test_table_is_big_endian_sectors() -> None:
    table = bytes.fromhex("0000000f ffffffff fffffffe 00000010")
    assert unpack_bat(table, 3).tolist() == [0x1E00, NO_OFFSET, 0xFFFFFFFE * 512]
    with pytest.raises(Truncated):
        unpack_bat(table[:-1], 4)


def check(*offsets: int, size: int = 100 * MIB, virtual_bytes: int | None = None) -> None:
    geometry = BlockGeometry.of(virtual_bytes=virtual_bytes or len(offsets) * 2 * MIB, block_bytes=2 * MIB)
    validate_bat(
        np.array(offsets, np.int64),
        geometry,
        table_offset=TABLE,
        file_size_bytes=size,
        structures=[(0, 512, "copy of the footer"), (TABLE, 512, "BAT"), (50 * MIB, 100, "parent locator")],
    )


def test_blocks_may_lie_in_any_order_and_with_gaps() -> None:
    check(NO_OFFSET)
    check(0x1E00 + 2 * PLACE + 3584, 0x800, NO_OFFSET, 0x800 + PLACE)
    check(50 * MIB - PLACE, 50 * MIB + 512)


@pytest.mark.parametrize(
    ("offset", "error"),
    [
        (0, Overlap),
        (512, Overlap),
        (TABLE, Overlap),
        (50 * MIB - PLACE + 512, Overlap),
        (50 * MIB, Overlap),
        (0x800 + PLACE - 512, Overlap),
        (0x800, Overlap),
        (100 * MIB - PLACE + 512, Truncated),
        (0xFFFFFFFE * 512, Truncated),
    ],
)
def test_block_that_cannot_be_there_is_refused_at_its_entry(offset: int, error: type[FormatError]) -> None:
    with pytest.raises(error) as caught:
        check(0x800, NO_OFFSET, offset, NO_OFFSET)
    assert caught.value.field == "entry"
    assert caught.value.offset == TABLE + 8
    assert str(caught.value.actual) == str(offset // 512) or caught.value.actual == 4


def test_of_the_last_block_only_the_disks_part_must_be_there() -> None:
    virtual_bytes = 2 * MIB + 1024
    check(NO_OFFSET, 0x800, size=0x800 + 512 + 1024, virtual_bytes=virtual_bytes)
    with pytest.raises(Truncated):
        check(NO_OFFSET, 0x800, size=0x800 + 512 + 1023, virtual_bytes=virtual_bytes)
    with pytest.raises(Truncated):
        check(0x800, NO_OFFSET, size=0x800 + 512 + 1024, virtual_bytes=virtual_bytes)


@given(st.lists(st.integers(0, 0xFFFFFFFF), min_size=1, max_size=20), st.integers(0, 1 << 42))
def test_any_table_is_good_or_a_format_error(rows: list[int], size: int) -> None:
    offsets = unpack_bat(b"".join(row.to_bytes(4, "big") for row in rows), len(rows))
    try:
        check(*offsets.tolist(), size=size)
    except FormatError as error:
        assert error.offset is not None
        return
    places = sorted(offset for offset in offsets.tolist() if offset != NO_OFFSET)
    assert all(0x800 <= offset < size for offset in places)
    assert all(second - first >= PLACE for first, second in itertools.pairwise(places))


def test_first_sector_is_the_most_significant_bit() -> None:
    bits = unpack_bitmap(b"\x81\x40" + bytes(510), 4096)
    assert np.flatnonzero(bits).tolist() == [0, 7, 9]
    assert pack_bitmap(bits[:10], 512) == b"\x81\x40" + bytes(510)


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_bitmaps_read_back(bits: list[bool]) -> None:
    assert unpack_bitmap(pack_bitmap(np.array(bits), 512), len(bits)).tolist() == bits


def test_bitmaps_too_short_or_too_long_are_refused() -> None:
    with pytest.raises(Truncated):
        unpack_bitmap(bytes(511), 4096)
    with pytest.raises(FieldOutOfRange):
        pack_bitmap(np.ones(4097, bool), 512)


def packed_batmap(**changes: object) -> bytes:
    values = {"cookie": b"tdbatmap", "batmap_offset": 0xA00, "batmap_size": 1, "batmap_version": 0x10002}
    return BATMAP_HEADER.pack(**{**values, **changes})


def test_batmap_stands_behind_the_bat() -> None:
    header = DynamicHeader(table_offset=0x600, max_table_entries=20, block_size=2 * MIB)
    assert batmap_header_offset(header) == 0x800
    batmap = unpack_batmap(packed_batmap(), file_offset=0x800)
    batmap.validate()
    batmap.validate_within(0xC00)
    assert batmap.batmap_bytes == 512


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"cookie": b"conectix"}, BadSignature),
        ({"batmap_size": 0xFFFFFFFF}, FieldOutOfRange),
        ({"batmap_offset": 0x800}, Overlap),
        ({"batmap_offset": 0xA01}, Truncated),
        ({"batmap_offset": (1 << 64) - 1}, Truncated),
    ],
)
def test_batmap_that_cannot_be_is_refused(changes: dict[str, object], error: type[FormatError]) -> None:
    batmap = unpack_batmap(packed_batmap(**changes), file_offset=0x800)
    if error is not BadSignature:
        batmap.validate()
    with pytest.raises(error):
        batmap.validate() if error is BadSignature else batmap.validate_within(0xC00)
