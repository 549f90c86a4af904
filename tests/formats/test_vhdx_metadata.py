"""Metadata: items are found and bounded; unknown and required is refused, optional is left alone. [MS-VHDX] 2.6."""

from __future__ import annotations

import uuid
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.errors import BadSignature, FieldOutOfRange, FormatError, Overlap, UnsupportedVersion
from hvreplica.formats.vhdx_metadata import (
    FILE_PARAMETERS_ITEM,
    METADATA_TABLE_BYTES,
    METADATA_TABLE_ENTRY,
    VIRTUAL_DISK_SIZE_ITEM,
    DiskParameters,
    MetadataTable,
    pack_metadata,
    unpack_metadata_table,
)
from hvreplica.units import KIB, MIB, TIB

GOOD = DiskParameters(
    virtual_bytes=64 * MIB,
    block_bytes=2 * MIB,
    logical_sector_bytes=512,
    physical_sector_bytes=4096,
    virtual_disk_id=uuid.UUID(int=3),
)
UNKNOWN = uuid.UUID(int=99)


def table_with(**row: object) -> MetadataTable:
    """Return the good table with one more row."""
    packed = bytearray(pack_metadata(GOOD))
    packed[10:12] = (6).to_bytes(2, "little")
    at = 32 + 5 * 32
    packed[at : at + 32] = METADATA_TABLE_ENTRY.pack(**{"item_id": UNKNOWN, "offset": 0, "length": 0, **row})
    return unpack_metadata_table(packed, file_offset=2 * MIB)


def check(table: MetadataTable) -> None:
    table.validate()
    table.validate_within(MIB)


def test_packed_metadata_reads_back_valid() -> None:
    table = unpack_metadata_table(pack_metadata(GOOD), file_offset=2 * MIB)
    check(table)
    assert table.find(VIRTUAL_DISK_SIZE_ITEM).length == 8
    assert [entry.flags for entry in table.entries] == [4, 6, 6, 6, 6]


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"flags": 1, "offset": 128 * KIB, "length": 100},
        {"item_id": VIRTUAL_DISK_SIZE_ITEM, "flags": 1},  # a user's item may have a system item's id
        {"flags": 2, "offset": 128 * KIB, "length": MIB - 128 * KIB},
    ],
)
def test_unknown_optional_item_is_left_alone(row: dict[str, object]) -> None:
    check(table_with(**row))


@pytest.mark.parametrize(
    ("row", "error", "field"),
    [
        ({"flags": 4}, UnsupportedVersion, "item_id"),
        ({"item_id": VIRTUAL_DISK_SIZE_ITEM, "flags": 5}, UnsupportedVersion, "item_id"),
        ({"item_id": VIRTUAL_DISK_SIZE_ITEM}, Overlap, "item_id"),
        ({"flags": 8}, FieldOutOfRange, "flags"),
        ({"offset": 128 * KIB, "length": MIB + 1}, FieldOutOfRange, "length"),
        ({"offset": 128 * KIB, "length": 0}, FieldOutOfRange, "length"),
        ({"offset": 32 * KIB, "length": 8}, FieldOutOfRange, "offset"),
        ({"offset": MIB - 4, "length": 8}, FieldOutOfRange, "offset"),
        ({"offset": 0xFFFFFFFF, "length": 8}, FieldOutOfRange, "offset"),
        ({"offset": 64 * KIB + 4, "length": 8}, Overlap, "offset"),
    ],
)
def test_row_that_cannot_be_is_refused(row: dict[str, object], error: type[FormatError], field: str) -> None:
    with pytest.raises(error) as caught:
        check(table_with(**row))
    assert caught.value.field == field


def test_absurd_count_is_refused_before_it_is_used() -> None:
    packed = bytearray(pack_metadata(GOOD))
    packed[10:12] = b"\xff\xff"
    with pytest.raises(FieldOutOfRange, match="too many"):
        unpack_metadata_table(packed, file_offset=0).validate()
    packed[0] = 0
    with pytest.raises(BadSignature):
        unpack_metadata_table(packed, file_offset=0).validate()


def test_missing_or_odd_item_is_named() -> None:
    table = unpack_metadata_table(pack_metadata(GOOD), file_offset=0)
    without = replace(table, entries=table.entries[1:])
    with pytest.raises(FieldOutOfRange, match="no file parameters"):
        without.find(FILE_PARAMETERS_ITEM)
    odd = replace(table, entries=(replace(table.entries[0], length=4),))
    with pytest.raises(FieldOutOfRange, match="wrong length"):
        odd.find(FILE_PARAMETERS_ITEM)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"block_bytes": 3 * MIB}, "block_size"),
        ({"block_bytes": 512 * KIB}, "block_size"),
        ({"block_bytes": 512 * MIB}, "block_size"),
        ({"block_bytes": 0}, "block_size"),
        ({"flags": 4}, "flags"),
        ({"logical_sector_bytes": 1024}, "logical_sector_size"),
        ({"logical_sector_bytes": 0}, "logical_sector_size"),
        ({"physical_sector_bytes": 0}, "physical_sector_size"),
        ({"virtual_bytes": 0}, "virtual_disk_size"),
        ({"virtual_bytes": 513}, "virtual_disk_size"),
        ({"virtual_bytes": 512, "logical_sector_bytes": 4096}, "virtual_disk_size"),
        ({"virtual_bytes": 64 * TIB + 512}, "virtual_disk_size"),
    ],
)
def test_value_out_of_range_is_refused(changes: dict[str, int], field: str) -> None:
    with pytest.raises(FieldOutOfRange) as caught:
        replace(GOOD, **changes).validate()
    assert caught.value.field == field


@given(st.binary(min_size=0, max_size=400))
def test_any_table_is_a_value_or_a_format_error(rows: bytes) -> None:
    packed = b"metadata" + rows
    packed = packed.ljust(METADATA_TABLE_BYTES, b"\0")
    try:
        check(unpack_metadata_table(packed, file_offset=0))
    except FormatError as error:
        assert str(error)
