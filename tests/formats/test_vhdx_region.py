"""Region tables: either copy will do; unknown and required is refused; nothing overlaps. [MS-VHDX] 2.2.3."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.errors import (
    BadSignature,
    ChecksumMismatch,
    FieldOutOfRange,
    FormatError,
    Overlap,
    Truncated,
    UnsupportedVersion,
)
from hvreplica.formats.vhdx_region import (
    BAT_REGION,
    METADATA_REGION,
    REGION_TABLE_BYTES,
    Region,
    RegionTable,
    choose_region_table,
    pack_region_table,
    unpack_region_table,
    validate_regions_within,
)
from hvreplica.native import crc32c
from hvreplica.units import MIB

BAT = Region(BAT_REGION, 3 * MIB, MIB, required=1)
METADATA = Region(METADATA_REGION, 2 * MIB, MIB, required=1)
UNKNOWN = uuid.UUID(int=77)


def read_back(*regions: Region) -> RegionTable:
    return unpack_region_table(pack_region_table(regions), file_offset=196608)


def test_packed_table_reads_back_valid() -> None:
    table = read_back(METADATA, BAT)
    table.validate()
    assert table.find(BAT_REGION).file_offset == 3 * MIB
    validate_regions_within(table.regions, file_size_bytes=4 * MIB, log_offset=MIB, log_length=MIB)


@given(st.integers(0, REGION_TABLE_BYTES - 1), st.integers(1, 255))
def test_any_changed_byte_makes_it_invalid(at: int, change: int) -> None:
    packed = bytearray(pack_region_table([BAT, METADATA]))
    packed[at] ^= change
    with pytest.raises((BadSignature, ChecksumMismatch)):
        unpack_region_table(packed, file_offset=0).validate()


def test_absurd_count_is_refused_before_it_is_used() -> None:
    packed = bytearray(pack_region_table([BAT]))
    packed[8:12] = (2048).to_bytes(4, "little")
    packed[4:8] = bytes(4)
    packed[4:8] = crc32c(packed).to_bytes(4, "little")
    with pytest.raises(FieldOutOfRange) as caught:
        unpack_region_table(packed, file_offset=0).validate()
    assert (caught.value.field, caught.value.actual) == ("entry_count", 2048)


def test_second_copy_serves_where_the_first_is_bad() -> None:
    good = read_back(BAT, METADATA)
    bad = unpack_region_table(bytes(REGION_TABLE_BYTES), file_offset=0)
    assert choose_region_table([bad, good]) is good
    assert choose_region_table([Truncated("cut"), good]) is good
    with pytest.raises(BadSignature):
        choose_region_table([bad, Truncated("cut")])


@pytest.mark.parametrize(
    ("region", "error"),
    [
        (Region(UNKNOWN, 8 * MIB, MIB, required=1), UnsupportedVersion),
        (Region(BAT_REGION, 8 * MIB, MIB, required=1), Overlap),
        (Region(METADATA_REGION, 8 * MIB + 512, MIB, required=1), FieldOutOfRange),
        (Region(METADATA_REGION, 0, MIB, required=1), FieldOutOfRange),
        (Region(METADATA_REGION, 8 * MIB, 0, required=1), FieldOutOfRange),
        (Region(METADATA_REGION, 1 << 60, MIB, required=1), FieldOutOfRange),
    ],
)
def test_entry_that_cannot_be_is_refused(region: Region, error: type[FormatError]) -> None:
    with pytest.raises(error) as caught:
        read_back(BAT, region).validate()
    assert caught.value.offset == 196608 + 16 + 32 + {FieldOutOfRange: 16}.get(error, 0) + (
        8 if region.length == 0 else 0
    )


def test_unknown_optional_region_is_kept_out_of_the_way() -> None:
    table = read_back(BAT, METADATA, Region(UNKNOWN, 8 * MIB, MIB, required=0))
    table.validate()
    validate_regions_within(table.regions, file_size_bytes=9 * MIB, log_offset=MIB, log_length=MIB)


def test_known_regions_need_not_be_marked_required() -> None:
    read_back(Region(BAT_REGION, 3 * MIB, MIB, required=0)).validate()


@pytest.mark.parametrize(
    ("log_offset", "size", "error"),
    [(2 * MIB, 4 * MIB, Overlap), (3 * MIB, 4 * MIB, Overlap), (MIB, 4 * MIB - 1, Truncated)],
)
def test_overlap_and_end_of_file_are_seen(log_offset: int, size: int, error: type[FormatError]) -> None:
    with pytest.raises(error):
        validate_regions_within([BAT, METADATA], file_size_bytes=size, log_offset=log_offset, log_length=MIB)


def test_missing_region_is_named() -> None:
    with pytest.raises(FieldOutOfRange, match="BAT"):
        read_back(METADATA).find(BAT_REGION)
