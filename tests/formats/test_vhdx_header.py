"""Headers: what makes one valid, which is current, and what the next one is. [MS-VHDX] 2.2.1, 2.2.2."""

from __future__ import annotations

import dataclasses
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
from hvreplica.formats.vhdx_header import (
    FILE_BYTES_MAX,
    HEADER_OFFSETS,
    SEQUENCE_NUMBER_MAX,
    Header,
    choose_header,
    next_header,
    pack_identifier,
    unpack_creator,
    unpack_header,
)
from hvreplica.units import GIB, MIB

NIL = uuid.UUID(int=0)
GOOD = Header(
    sequence_number=7,
    file_write_guid=uuid.UUID(int=1),
    data_write_guid=uuid.UUID(int=2),
    log_guid=NIL,
    log_length=MIB,
    log_offset=MIB,
)


def read_back(header: Header, at: int = HEADER_OFFSETS[0]) -> Header:
    return unpack_header(header.pack(), file_offset=at)


def test_packed_header_reads_back_valid() -> None:
    header = read_back(GOOD)
    header.validate()
    header.validate_within(2 * MIB)
    assert header.sequence_number == 7
    assert header.data_write_guid == uuid.UUID(int=2)
    assert header.pack() == GOOD.pack()


@given(st.integers(0, 4095), st.integers(1, 255))
def test_any_changed_byte_makes_it_invalid(at: int, change: int) -> None:
    packed = bytearray(GOOD.pack())
    packed[at] ^= change
    with pytest.raises((BadSignature, ChecksumMismatch)) as caught:
        unpack_header(packed, file_offset=65536).validate()
    assert caught.value.offset in {65536, 65540}
    assert caught.value.field in {"signature", "checksum"}


def test_short_header_is_truncated() -> None:
    with pytest.raises(Truncated):
        unpack_header(GOOD.pack()[:-1], file_offset=0)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"version": 2}, UnsupportedVersion),
        ({"log_version": 1, "log_guid": uuid.UUID(int=9)}, UnsupportedVersion),
        ({"log_offset": MIB + 4096}, FieldOutOfRange),
        ({"log_length": 4096}, FieldOutOfRange),
        ({"log_offset": FILE_BYTES_MAX + MIB}, FieldOutOfRange),
        ({"log_offset": 0}, Overlap),
        ({"log_offset": 3 * MIB}, Truncated),
        ({"log_length": 2 * GIB}, FieldOutOfRange),
        ({"log_length": 0, "log_guid": uuid.UUID(int=9)}, FieldOutOfRange),
    ],
)
def test_current_header_that_cannot_be_is_refused(
    changes: dict[str, object], error: type[FormatError]
) -> None:
    header = read_back(dataclasses.replace(GOOD, **changes))
    header.validate()
    with pytest.raises(error) as caught:
        header.validate_within(3 * MIB)
    assert caught.value.field
    assert caught.value.spec


@pytest.mark.parametrize(
    "changes", [{"log_version": 1}, {"log_length": 0}, {"log_length": 0, "log_offset": 0}]
)
def test_empty_log_may_have_any_version_and_no_length(changes: dict[str, object]) -> None:
    read_back(dataclasses.replace(GOOD, **changes)).validate_within(3 * MIB)


def test_larger_sequence_number_is_current_in_either_place() -> None:
    later = read_back(dataclasses.replace(GOOD, sequence_number=8))
    assert choose_header([read_back(GOOD), later]) == 1
    assert choose_header([later, read_back(GOOD)]) == 0


def test_equal_sequence_numbers_mean_the_first() -> None:
    assert choose_header([read_back(GOOD), read_back(GOOD)]) == 0


def test_one_valid_copy_is_enough() -> None:
    broken = dataclasses.replace(read_back(dataclasses.replace(GOOD, sequence_number=9)), checksum=1)
    assert choose_header([broken, read_back(GOOD)]) == 1
    assert choose_header([read_back(GOOD), Truncated("cut")]) == 0


def test_no_valid_copy_is_the_error_of_the_first() -> None:
    broken = dataclasses.replace(read_back(GOOD), checksum=1)
    with pytest.raises(ChecksumMismatch) as caught:
        choose_header([broken, Truncated("cut")])
    assert caught.value.hint


def test_next_header_grows_by_one_and_keeps_the_rest() -> None:
    following = next_header(GOOD, at=HEADER_OFFSETS[1], log_guid=uuid.UUID(int=5))
    assert following.sequence_number == 8
    assert following.log_guid == uuid.UUID(int=5)
    assert following.data_write_guid == GOOD.data_write_guid


def test_sequence_number_at_its_end_is_an_error_and_no_wrap() -> None:
    with pytest.raises(FieldOutOfRange):
        next_header(dataclasses.replace(GOOD, sequence_number=SEQUENCE_NUMBER_MAX), at=0)


@given(st.text(max_size=300))
def test_creator_reads_back_up_to_its_end(text: str) -> None:
    text = text.encode("utf-16-le", "ignore").decode("utf-16-le", "ignore").split("\0")[0]
    assert unpack_creator(pack_identifier(text)) in {
        text,
        text[:255],
        *(text[:n] + "\ufffd" for n in range(256)),
    }


def test_other_signature_is_no_vhdx() -> None:
    with pytest.raises(BadSignature):
        unpack_creator(b"conectix" + bytes(512))
