"""The intent journal's bytes: what is written is pinned, and whatever stands there marks too much, never too little."""

from __future__ import annotations

import random
import struct
import tracemalloc
import uuid
from dataclasses import replace

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
from hvreplica.formats.journal import (
    BITMAP_OFFSET,
    HEADER,
    HEADER_SPACING_BYTES,
    REGION_COUNT_MAX,
    SECTOR_BYTES,
    SECTOR_REGIONS,
    SEQUENCE_MAX,
    DiskIdentity,
    JournalHeader,
    JournalState,
    choose_header,
    file_bytes_of,
    header_offset_of,
    pack_sectors,
    unpack_header,
    unpack_sectors,
)
from hvreplica.units import GIB, TIB

GUID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
IDENTITY = DiskIdentity(GUID, 10 * GIB, 1_700_000_000_123_456_789, 77, 2049, uuid.UUID(int=5))
HEADER_VALUE = JournalHeader(6, 3, 40 * GIB, JournalState.IN_USE, IDENTITY)


def plain_crc32c(data: bytes) -> int:
    """CRC-32C, bit by bit, from RFC 3720 alone."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def sealed(packed: bytes) -> bytes:
    """Return a header with its checksum set right."""
    packed = packed[:12] + bytes(4) + packed[16:]
    return packed[:12] + struct.pack("<I", plain_crc32c(packed)) + packed[16:]


def bitmap_of(*regions: int, count: int) -> np.ndarray:
    flags = np.zeros(-(-count // 8) * 8, bool)
    flags[list(regions)] = True
    return np.packbits(flags, bitorder="little")


def sectors(bitmap: np.ndarray, count: int, sequence: int = 1) -> bytes:
    return b"".join(pack_sectors(range(-(-count // SECTOR_REGIONS)), bitmap, sequence=sequence))


def test_header_bytes_are_pinned() -> None:
    expected = struct.pack(
        "<8sIIQIII4xQ16s16sQqQQ400x",
        *(b"hvintent", 1, 0, 6, 3, 1, 4 << 20, 40 << 30),
        *(bytes.fromhex("33221100554477668899aabbccddeeff"), uuid.UUID(int=5).bytes_le),
        *(10 << 30, 1_700_000_000_123_456_789, 77, 2049),
    )
    assert HEADER_VALUE.pack() == sealed(expected)
    assert HEADER_VALUE.pack()[:16].hex() == "6876696e74656e7401000000e8aa882f"


def test_sector_bytes_are_pinned() -> None:
    (packed,) = pack_sectors([1], bitmap_of(0, SECTOR_REGIONS, SECTOR_REGIONS + 9, count=8000), sequence=7)
    body = struct.pack("<IQ", 1, 7) + b"\x01\x02" + bytes(494)
    assert packed == struct.pack("<I", plain_crc32c(body)) + body
    assert packed[:18].hex() == "c32252a4010000000700000000000000" + "0102"


def test_sizes_are_those_of_the_documentation() -> None:
    assert file_bytes_of(TIB // (4 << 20)) == 8192 + 67 * 512
    assert file_bytes_of(REGION_COUNT_MAX) == 8192 + 4229 * 512
    assert REGION_COUNT_MAX * (4 << 20) == 64 * TIB
    assert {header_offset_of(number) for number in range(9)} == {0, 4096}


def test_header_round_trip() -> None:
    assert unpack_header(HEADER_VALUE.pack()) == HEADER_VALUE
    none = JournalHeader(0, 0, 512, JournalState.NOT_RECORDED, None)
    assert unpack_header(none.pack()) == none
    plain = replace(HEADER_VALUE, identity=replace(IDENTITY, data_write_guid=None, next_guid=None))
    assert unpack_header(plain.pack()) == plain


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("signature", b"hvintenT", BadSignature),
        ("version", b"\x02", UnsupportedVersion),
        ("state", b"\x03", FieldOutOfRange),
        ("region_bytes", b"\x00\x00\x80\x00", FieldOutOfRange),
        ("virtual_bytes", b"\x01", FieldOutOfRange),
        ("virtual_bytes", bytes(8), FieldOutOfRange),
        ("virtual_bytes", struct.pack("<Q", 64 * TIB + 512), FieldOutOfRange),
        ("sequence", b"\xff" * 8, FieldOutOfRange),
    ],
)
def test_header_with_an_impossible_field_is_refused(
    field: str, value: bytes, error: type[FormatError]
) -> None:
    at = HEADER.offset_of(field)
    packed = bytearray(HEADER_VALUE.pack())
    packed[at : at + len(value)] = value
    with pytest.raises(error) as caught:
        unpack_header(sealed(bytes(packed)))
    assert caught.value.offset == at
    assert caught.value.field == field


def test_header_that_cannot_be_counted_further_has_no_next_one() -> None:
    last = replace(HEADER_VALUE, sequence=SEQUENCE_MAX)
    assert unpack_header(last.pack()) == last
    assert unpack_header(replace(last, sequence=SEQUENCE_MAX - 1).followed().pack()) == last
    with pytest.raises(FieldOutOfRange, match="count"):
        last.followed()


def test_header_with_any_byte_changed_is_refused() -> None:
    packed = HEADER_VALUE.pack()
    for at in range(len(packed)):
        damaged = packed[:at] + bytes([packed[at] ^ 0x10]) + packed[at + 1 :]
        with pytest.raises(FormatError):
            unpack_header(damaged)


def test_choice_takes_the_newest_whole_header() -> None:
    old, new = HEADER_VALUE, HEADER_VALUE.followed(state=JournalState.CLEAN)
    assert new.sequence == old.sequence + 1
    pad = bytes(HEADER_SPACING_BYTES - HEADER.size)
    torn = new.pack()[:300] + old.pack()[300:-1] + b"x"
    assert choose_header(old.pack() + pad + new.pack()) == new
    assert choose_header(new.pack() + pad + old.pack()) == new
    assert choose_header(old.pack() + pad + torn) == old
    assert choose_header(torn + pad + old.pack()) == old
    assert choose_header(old.pack()) == old
    with pytest.raises(ChecksumMismatch, match="header"):
        choose_header(torn + pad + torn)
    with pytest.raises(Truncated):
        choose_header(b"")


def test_choice_refuses_a_whole_header_of_another_version() -> None:
    later = bytearray(HEADER_VALUE.pack())
    later[8] = 2
    pad = bytes(HEADER_SPACING_BYTES - HEADER.size)
    with pytest.raises(UnsupportedVersion):
        choose_header(HEADER_VALUE.pack() + pad + sealed(bytes(later)))
    assert choose_header(HEADER_VALUE.pack() + pad + bytes(later)) == HEADER_VALUE


@given(st.integers(1, 9000), st.data())
def test_sectors_round_trip(count: int, data: st.DataObject) -> None:
    regions = data.draw(st.sets(st.integers(0, count - 1), max_size=40))
    bitmap = bitmap_of(*regions, count=count)
    found = unpack_sectors(sectors(bitmap, count, sequence=12), count)
    assert found.bitmap.tobytes() == bitmap.tobytes()
    assert found.sequence == 12
    assert not len(found.damaged)


@pytest.mark.parametrize("fault", ["bit", "torn", "moved", "zeros", "short", "absent"])
def test_damaged_sector_counts_as_marked_and_harms_no_other(fault: str) -> None:
    count = 3 * SECTOR_REGIONS - 5
    packed = bytearray(sectors(bitmap_of(0, SECTOR_REGIONS * 2 + 1, count=count), count))
    last = slice(2 * SECTOR_BYTES, 3 * SECTOR_BYTES)
    if fault == "bit":
        packed[last.start + 400] ^= 4
    elif fault == "torn":
        packed[last.start + 256 : last.stop] = bytes(range(256))
    elif fault == "moved":
        packed[last] = packed[:SECTOR_BYTES]
    elif fault == "zeros":
        packed[last] = bytes(SECTOR_BYTES)
    elif fault == "short":
        del packed[-1:]
    else:
        del packed[last]
    found = unpack_sectors(packed, count)
    marked = np.flatnonzero(np.unpackbits(found.bitmap, bitorder="little")).tolist()
    assert marked == [0, *range(2 * SECTOR_REGIONS, count)]
    assert found.damaged.tolist() == [2]


def test_bits_behind_the_last_region_mean_nothing() -> None:
    packed = sectors(np.full(496, 255, np.uint8), SECTOR_REGIONS)
    assert unpack_sectors(packed, 13).bitmap.tobytes() == b"\xff\x1f"


@given(st.binary(max_size=2000))
def test_any_bytes_give_a_header_or_a_format_error(data: bytes) -> None:
    try:
        header = choose_header(data)
    except FormatError:
        return
    assert header.sequence <= SEQUENCE_MAX


@given(st.binary(max_size=3000), st.integers(1, 9000))
def test_any_bytes_give_a_bitmap_of_the_right_length(data: bytes, count: int) -> None:
    found = unpack_sectors(data, count)
    assert len(found.bitmap) == -(-count // 8)
    assert len(found.damaged) == -(-count // SECTOR_REGIONS)


def test_memory_is_bounded_by_the_largest_disk() -> None:
    data = random.Random(1).randbytes(4229 * SECTOR_BYTES)
    tracemalloc.start()
    unpack_sectors(data, REGION_COUNT_MAX)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20
    with pytest.raises(ValueError, match="regions"):
        unpack_sectors(b"", REGION_COUNT_MAX + 1)
    assert BITMAP_OFFSET == 8192
