"""The dynamic disk header and its parent locators. VHD 1.0, Dynamic Disk Header Format."""

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
from hvreplica.formats.vhd_footer import vhd_checksum
from hvreplica.formats.vhd_header import DYNAMIC_HEADER, DynamicHeader, unpack_dynamic_header
from hvreplica.formats.vhd_locator import (
    ABSOLUTE,
    ABSOLUTE_OLD,
    FILE_URL,
    LOCATOR_BYTES_MAX,
    MAC_ALIAS,
    NONE,
    RELATIVE,
    RELATIVE_OLD,
    LocatorEntry,
    decode_locator,
    encode_locator,
    unpack_locator_entry,
)
from hvreplica.units import MIB

if TYPE_CHECKING:
    from pathlib import Path

LOCATOR = LocatorEntry(RELATIVE, 512, 40, 0x3000)
GOOD = DynamicHeader(
    table_offset=0x600,
    max_table_entries=20,
    block_size=2 * MIB,
    parent_unique_id=uuid.UUID(bytes=bytes(range(16))),
    parent_name="parent \u00e4\U0001f600.vhd",
    locators=(LOCATOR, *(LocatorEntry(),) * 7),
    at=512,
)


def read_back(header: DynamicHeader) -> DynamicHeader:
    return unpack_dynamic_header(header.pack(), file_offset=512)


def check(header: DynamicHeader, *, size: int = 100 * MIB, virtual_bytes: int = 40 * MIB) -> None:
    header.validate()
    header.validate_within(size, virtual_bytes=virtual_bytes)


def test_packed_header_reads_back_valid() -> None:
    header = read_back(GOOD)
    check(header)
    assert header.parent_name == GOOD.parent_name
    assert header.parent_unique_id.bytes == bytes(range(16))
    assert header.locators[0].platform_data_offset == 0x3000
    assert header.locators[0].at == 512 + 576
    assert header.locators[7].at == 512 + 576 + 7 * 24
    assert [entry.is_used for entry in header.locators] == [True] + [False] * 7
    assert header.pack() == GOOD.pack()


def test_header_that_virtual_pc_wrote_is_read(specimens: Path) -> None:
    data = (specimens / "fragments/libvhdi-dynamic_disk_header.1").read_bytes()
    header = unpack_dynamic_header(data, file_offset=512)
    check(header, virtual_bytes=512 * MIB)
    assert (header.block_size, header.max_table_entries) == (2 * MIB, 256)
    assert header.parent_name == "dynamic.vhd"
    assert header.pack() == data


def test_long_names_are_cut_and_keep_their_end() -> None:
    header = read_back(dataclasses.replace(GOOD, parent_name="x" * 300))
    assert header.parent_name == "x" * 255


@given(st.integers(0, 1023), st.integers(1, 255))
def test_any_changed_byte_makes_it_invalid(at: int, change: int) -> None:
    packed = bytearray(GOOD.pack())
    packed[at] ^= change
    with pytest.raises((BadSignature, ChecksumMismatch)) as caught:
        unpack_dynamic_header(packed, file_offset=512).validate()
    assert caught.value.offset in {512, 512 + 36}


@given(st.binary(min_size=1016, max_size=1016), st.integers(0, 1 << 40), st.integers(1, 1 << 32))
def test_any_fields_under_a_right_checksum_are_a_header_or_a_format_error(
    rest: bytes, size: int, sectors: int
) -> None:
    packed = bytearray(b"cxsparse" + rest)
    packed[36:40] = vhd_checksum(packed, 36).to_bytes(4, "big")
    header = unpack_dynamic_header(packed, file_offset=512)
    for entry in header.locators:
        decode_locator(entry.platform_code, rest)
        try:
            entry.validate_within(size)
        except FormatError as error:
            assert error.field
    try:
        check(header, size=size, virtual_bytes=sectors * 512)
    except FormatError as error:
        assert error.field
        assert error.spec


@given(st.binary(max_size=1100))
def test_any_bytes_are_a_header_or_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        unpack_dynamic_header(data, file_offset=0).validate()


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"header_version": 0x20000}, UnsupportedVersion, "header_version"),
        ({"block_size": 0}, FieldOutOfRange, "block_size"),
        ({"block_size": 3 * MIB}, FieldOutOfRange, "block_size"),
        ({"block_size": 256}, FieldOutOfRange, "block_size"),
        ({"max_table_entries": 19}, FieldOutOfRange, "max_table_entries"),
        ({"table_offset": 0x601}, FieldOutOfRange, "table_offset"),
        ({"table_offset": 0}, Overlap, "table_offset"),
        ({"table_offset": 0x400}, Overlap, "table_offset"),
        ({"table_offset": 100 * MIB}, Truncated, "table_offset"),
        ({"table_offset": 1 << 62}, Truncated, "table_offset"),
    ],
)
def test_header_that_cannot_be_is_refused(
    changes: dict[str, object], error: type[FormatError], field: str
) -> None:
    header = read_back(dataclasses.replace(GOOD, **changes))
    with pytest.raises(error) as caught:
        check(header)
    assert caught.value.field == field
    assert caught.value.offset == 512 + DYNAMIC_HEADER.offset_of(field)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_table_entries": 1 << 31},  # more entries than the disk needs, even than the file holds
        {"table_offset": 0x2000},
        {"block_size": 512, "max_table_entries": 81920},
        {"block_size": 1 << 31},
        {"header_version": 0x10001},
    ],
)
def test_unusual_header_is_read(changes: dict[str, object]) -> None:
    check(read_back(dataclasses.replace(GOOD, **changes)))


def test_table_of_more_blocks_than_fit_in_memory_is_refused() -> None:
    header = read_back(dataclasses.replace(GOOD, block_size=512, max_table_entries=0xFFFFFFFF))
    with pytest.raises(FieldOutOfRange) as caught:
        check(header, size=1 << 45, virtual_bytes=1 << 34)
    assert caught.value.field == "block_size"


def test_locator_outside_of_the_file_or_endless_is_refused() -> None:
    for entry in (
        dataclasses.replace(LOCATOR, platform_data_offset=MIB - 39),
        dataclasses.replace(LOCATOR, platform_data_length=LOCATOR_BYTES_MAX + 1),
        dataclasses.replace(LOCATOR, platform_data_offset=(1 << 64) - 1),
    ):
        with pytest.raises(FormatError) as caught:
            unpack_locator_entry(entry.pack(), at=100).validate_within(MIB)
        assert 100 < caught.value.offset < 124
    dataclasses.replace(LOCATOR, platform_data_offset=MIB - 40).validate_within(MIB)
    LocatorEntry(NONE, platform_data_length=1 << 31).validate_within(MIB)


@pytest.mark.parametrize(
    ("code", "data", "path"),
    [
        (RELATIVE, ".\\a b.vhd".encode("utf-16-le"), ".\\a b.vhd"),
        (ABSOLUTE, "C:\\x\\\u00e4.vhd\0\0".encode("utf-16-le"), "C:\\x\\\u00e4.vhd"),
        (ABSOLUTE, b"a", "\ufffd"),
        (FILE_URL, b"file://./raw%20parent.raw", "file://./raw%20parent.raw"),
        (FILE_URL, "file:///\u00e4.vhd".encode(), "file:///\u00e4.vhd"),
        (RELATIVE_OLD, b".\\\xe4.vhd", ".\\\u00e4.vhd"),
        (ABSOLUTE_OLD, b"C:\\a.vhd\0junk", "C:\\a.vhd"),
        (MAC_ALIAS, b"\0\1\2", ""),
        (b"abcd", b"x", ""),
        (NONE, b"", ""),
    ],
)
def test_locator_data_spells_its_path(code: bytes, data: bytes, path: str) -> None:
    assert decode_locator(code, data) == path


@given(st.sampled_from([RELATIVE, ABSOLUTE, FILE_URL]), st.text(st.characters(exclude_categories=["Cs"])))
def test_locators_read_back(code: bytes, name: str) -> None:
    name = name.replace("\0", "")
    assert decode_locator(code, encode_locator(code, name)) == name


@given(st.sampled_from([RELATIVE, ABSOLUTE, FILE_URL, RELATIVE_OLD, ABSOLUTE_OLD]), st.binary(max_size=200))
def test_any_locator_data_is_a_text(code: bytes, data: bytes) -> None:
    assert "\0" not in decode_locator(code, data)
