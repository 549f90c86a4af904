"""Footers of VHD 1.0: fields, checksum, geometry, and which of several counts."""

from __future__ import annotations

import dataclasses
import uuid
from typing import TYPE_CHECKING

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
from hvreplica.formats.vhd_footer import (
    FOOTER,
    GEOMETRY_MAX,
    NO_DATA_OFFSET,
    VIRTUAL_BYTES_MAX,
    Footer,
    Geometry,
    choose_footer,
    geometry_of,
    unpack_footer,
    vhd_checksum,
)
from hvreplica.units import GIB, MIB

if TYPE_CHECKING:
    from pathlib import Path

DYNAMIC = Footer(
    data_offset=512,
    time_stamp=7,
    creator_application=b"win ",
    creator_version=0xA0000,
    creator_host_os=b"Wi2k",
    original_size=40 * MIB,
    current_size=40 * MIB,
    cylinders=963,
    heads=5,
    sectors_per_track=17,
    disk_type=3,
    unique_id=uuid.UUID(int=0x1234),
)
FIXED = dataclasses.replace(DYNAMIC, disk_type=2, data_offset=NO_DATA_OFFSET)
OTHER = uuid.UUID(int=0x9999)


def read_back(footer: Footer, at: int = 0) -> Footer:
    return unpack_footer(footer.pack(), file_offset=at)


def test_packed_footer_reads_back_valid() -> None:
    footer = read_back(DYNAMIC, at=1000)
    footer.validate()
    footer.validate_within(100_000)
    assert footer.unique_id == DYNAMIC.unique_id
    assert footer.pack() == DYNAMIC.pack()
    assert footer.at == 1000


def test_unique_id_is_kept_as_raw_bytes() -> None:
    footer = dataclasses.replace(DYNAMIC, unique_id=uuid.UUID(bytes=bytes(range(16))))
    assert footer.pack()[68:84] == bytes(range(16))


def test_reserved_bytes_and_unknown_features_are_kept() -> None:
    footer = dataclasses.replace(DYNAMIC, features=0x80000003, reserved=bytes(range(200)), saved_state=1)
    packed = footer.pack()
    assert packed[8:12] == b"\x80\x00\x00\x03"
    assert packed[85:285] == bytes(range(200))
    assert read_back(footer).pack() == packed


@given(st.integers(0, 511), st.integers(1, 255))
def test_any_changed_byte_makes_it_invalid(at: int, change: int) -> None:
    packed = bytearray(DYNAMIC.pack())
    packed[at] ^= change
    with pytest.raises((BadSignature, ChecksumMismatch)) as caught:
        unpack_footer(packed, file_offset=4096).validate()
    assert caught.value.offset in {4096, 4096 + 64}
    assert caught.value.field in {"cookie", "checksum"}


@given(st.binary(max_size=600))
def test_any_bytes_are_a_footer_or_a_format_error(data: bytes) -> None:
    try:
        footer = unpack_footer(data, file_offset=0)
        footer.validate()
        footer.validate_within(10 * MIB)
    except FormatError:
        return
    assert footer.current_size > 0


@given(st.binary(min_size=504, max_size=504), st.integers(0, 1 << 64))
def test_any_fields_under_a_right_checksum_are_a_footer_or_a_format_error(rest: bytes, size: int) -> None:
    packed = bytearray(b"conectix" + rest)
    packed[64:68] = vhd_checksum(packed, 64).to_bytes(4, "big")
    footer = unpack_footer(packed, file_offset=0)
    footer.validate()
    try:
        footer.validate_within(size)
    except FormatError as error:
        assert error.field
        assert error.spec
    assert footer.pack() == packed


@pytest.mark.parametrize("number", range(1, 7))
def test_footers_of_windows_virtualbox_and_disk2vhd_are_read(specimens: Path, number: int) -> None:
    data = (specimens / f"fragments/vhdattach-footer.{number}").read_bytes()
    footer = unpack_footer(data, file_offset=0)
    footer.validate()
    footer.validate_within(1 << 45)
    creators = {4: b"vbox", 5: b"d2v\0"}
    assert footer.creator_application == creators.get(number, b"win ")
    assert footer.is_fixed == (number < 4)
    assert footer.pack() == data
    chs = Geometry(footer.cylinders, footer.heads, footer.sectors_per_track)
    assert geometry_of(footer.current_size) == chs


def test_footer_with_one_damaged_byte_is_refused(specimens: Path) -> None:
    good = (specimens / "fragments/vhdattach-footer.6").read_bytes()
    damaged = (specimens / "fragments/vhdattach-footer.7").read_bytes()
    assert sum(a != b for a, b in zip(good, damaged, strict=True)) == 1
    with pytest.raises(ChecksumMismatch):
        unpack_footer(damaged, file_offset=0).validate()


def test_footer_of_virtual_pc_is_read(specimens: Path) -> None:
    data = (specimens / "fragments/libvhdi-file_footer.1").read_bytes()
    footer = unpack_footer(data, file_offset=0)
    footer.validate()
    assert footer.disk_type == 4
    assert footer.current_size == 512 * MIB
    assert footer.unique_id == uuid.UUID("40d56d36-9ab8-4fe4-a31a-121fe2bf15eb")
    assert footer.pack() == data


def test_footer_of_511_bytes_is_read() -> None:
    footer = unpack_footer(FIXED.pack()[:511], file_offset=40 * MIB)
    footer.validate()
    footer.validate_within(40 * MIB + 511)
    assert footer.footer_bytes == 511
    with pytest.raises(Truncated):
        footer.validate_within(40 * MIB + 510)
    with pytest.raises(Truncated):
        unpack_footer(FIXED.pack()[:510], file_offset=0)


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"file_format_version": 0x20000}, UnsupportedVersion, "file_format_version"),
        ({"disk_type": 0}, FieldOutOfRange, "disk_type"),
        ({"disk_type": 5}, FieldOutOfRange, "disk_type"),
        ({"current_size": 0}, FieldOutOfRange, "current_size"),
        ({"current_size": 1000}, FieldOutOfRange, "current_size"),
        ({"current_size": VIRTUAL_BYTES_MAX + 512}, FieldOutOfRange, "current_size"),
        ({"current_size": 1 << 63}, FieldOutOfRange, "current_size"),
        ({"data_offset": 0}, FieldOutOfRange, "data_offset"),
        ({"data_offset": 513}, FieldOutOfRange, "data_offset"),
        ({"data_offset": NO_DATA_OFFSET}, FieldOutOfRange, "data_offset"),
        ({"data_offset": 1 << 20}, Truncated, "data_offset"),
        ({"disk_type": 2}, Truncated, "current_size"),
    ],
)
def test_footer_that_cannot_be_is_refused(
    changes: dict[str, object], error: type[FormatError], field: str
) -> None:
    footer = read_back(dataclasses.replace(DYNAMIC, **changes), at=2000)
    footer.validate()
    with pytest.raises(error) as caught:
        footer.validate_within(1 << 20)
    assert caught.value.field == field
    assert caught.value.offset == 2000 + FOOTER.offset_of(field)


def test_sizes_may_differ_and_the_largest_is_allowed() -> None:
    for size in (512, VIRTUAL_BYTES_MAX):
        read_back(dataclasses.replace(DYNAMIC, current_size=size)).validate_within(1 << 20)


@pytest.mark.parametrize(
    ("size", "geometry"),
    [
        (40 * MIB, (963, 5, 17)),  # Windows 8
        (10 * MIB, (301, 4, 17)),  # Windows 10
        (4 * MIB, (120, 4, 17)),  # Windows 10
        (GIB, (2080, 16, 63)),  # Windows 8.1
        (136365211648, (65278, 16, 255)),  # Server 2012 R2
        (32 * GIB, (16448, 16, 255)),  # Windows 7
        (100 * GIB, (51400, 16, 255)),  # Windows 7
        (10489344, (301, 4, 17)),  # VirtualBox
        (16 * MIB, (481, 4, 17)),  # vhd-util
        (500 * MIB, (1015, 16, 63)),
        (65535 * 16 * 255 * 512, GEOMETRY_MAX),
        (VIRTUAL_BYTES_MAX, GEOMETRY_MAX),
        (512, (0, 4, 17)),
        (17 * 5120 * 512, (175, 16, 31)),  # exactly as many tracks as five heads have: too many
        (17 * 5120 * 512 - 512, (1023, 5, 17)),
        (31 * 16384 * 512, (503, 16, 63)),
        (31 * 16384 * 512 - 512, (1023, 16, 31)),
    ],
)
def test_geometry_is_the_one_other_programs_write(size: int, geometry: tuple[int, int, int]) -> None:
    assert geometry_of(size) == geometry


@given(st.integers(1, VIRTUAL_BYTES_MAX // 512))
def test_geometry_fits_its_fields_and_never_exceeds_the_size(sectors: int) -> None:
    cylinders, heads, per_track = geometry_of(sectors * 512)
    assert 0 <= cylinders <= 65535
    assert 4 <= heads <= 16
    assert cylinders * heads * per_track <= sectors


def test_resized_footer_has_its_geometry_and_keeps_the_first_size() -> None:
    footer = DYNAMIC.resized(GIB)
    assert footer.current_size == GIB
    assert footer.original_size == 40 * MIB
    assert (footer.cylinders, footer.heads, footer.sectors_per_track) == (2080, 16, 63)


def choose(
    trailing: list[Footer | FormatError], copy: Footer | FormatError, size: int = 50 * MIB
) -> tuple[int, int]:
    footer = choose_footer(trailing, copy, file_size_bytes=size)
    return footer.at, footer.time_stamp


NOTHING = read_back(dataclasses.replace(DYNAMIC, cookie=b"\0" * 8), at=900)
COPY = read_back(dataclasses.replace(DYNAMIC, time_stamp=1), at=0)
TAIL = read_back(dataclasses.replace(DYNAMIC, time_stamp=2), at=1000)
TORN = dataclasses.replace(TAIL, checksum=1)


def test_footer_at_the_end_counts_before_the_copy() -> None:
    assert choose([TAIL, NOTHING], COPY) == (1000, 2)
    assert choose([NOTHING, TAIL], COPY) == (1000, 2)
    assert choose([TAIL, NOTHING], NOTHING) == (1000, 2)


def test_copy_counts_where_the_end_is_lost_or_damaged() -> None:
    for lost in (NOTHING, TORN, Truncated("cut")):
        assert choose([lost, NOTHING], COPY) == (0, 1)


def test_footer_in_the_guests_data_at_a_torn_end_is_not_believed() -> None:
    inner = read_back(dataclasses.replace(DYNAMIC, unique_id=OTHER), at=1000)
    assert choose([inner, NOTHING], COPY) == (0, 1)
    longer = read_back(dataclasses.replace(FIXED, unique_id=OTHER), at=1000)
    assert choose([longer, NOTHING], COPY, size=4096) == (0, 1)


def test_a_file_that_may_be_either_of_two_disks_is_refused() -> None:
    """A guest's own footer at a torn end, or a guest's own disk at the start: the wrong choice is its choice."""
    fitting = read_back(dataclasses.replace(FIXED, unique_id=OTHER), at=40 * MIB + 4096)
    with pytest.raises(Overlap) as caught:
        choose([fitting, NOTHING], COPY, size=40 * MIB + 4096 + 512)
    assert caught.value.hint


def test_fixed_disk_that_holds_a_dynamic_one_is_a_fixed_disk() -> None:
    outer = read_back(dataclasses.replace(FIXED, unique_id=OTHER, time_stamp=9), at=40 * MIB)
    assert choose([outer, NOTHING], COPY, size=40 * MIB + 512) == (40 * MIB, 9)


def test_copy_of_a_fixed_disk_is_the_guests_own_bytes() -> None:
    with pytest.raises(BadSignature):
        choose([NOTHING, NOTHING], read_back(FIXED))


def test_no_valid_footer_is_the_error_that_tells_most() -> None:
    with pytest.raises(ChecksumMismatch) as caught:
        choose([NOTHING, TORN], TORN)
    assert caught.value.hint
    with pytest.raises(BadSignature):
        choose([NOTHING, NOTHING], NOTHING)
    with pytest.raises(Truncated):
        choose([Truncated("short"), Truncated("short")], Truncated("short"))
