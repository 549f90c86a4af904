"""Times files: what is written is read, each field is checked, and damage is named."""

from __future__ import annotations

import dataclasses
import uuid

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
from hvreplica.formats.times import HEADER, TIMES_BYTES_MAX, Times, is_slot, pack_times, unpack_times
from hvreplica.native import crc32c
from tests.support.times import times_of_history

LOG_ID = uuid.UUID(int=7)
STAMPS = [1_000_000, 1_000_001, 1_000_900, 1_002_000, 1_002_500, 1_009_999]
TIMES = times_of_history(LOG_ID, STAMPS, [1_000_500, 1_002_200, 1_009_999], slot_us=1000, ended_us=1_020_000)
# The first bytes, with the checksum of all: a change of them is a change of the format.
GOLDEN = "48565254494d4553010000008a7c999800000000000000000000000000000007"


def sealed(packed: bytes) -> bytes:
    """Set the checksum right."""
    bare = packed[:12] + bytes(4) + packed[16:]
    return packed[:12] + crc32c(bare).to_bytes(4, "little") + packed[16:]


def put(field: str, value: int, size: int) -> bytes:
    at = HEADER.offset_of(field)
    packed = pack_times(TIMES)
    return sealed(packed[:at] + value.to_bytes(size, "little") + packed[at + size :])


def test_times_come_back() -> None:
    packed = pack_times(TIMES)
    found = unpack_times(packed, log_id=LOG_ID)
    assert found.ticks.tolist() == [[0, 1_000_000], [3, 1_002_000], [5, 1_009_999]]
    assert found.flushes.tolist() == [[2, 1_000_500], [4, 1_002_200], [6, 1_009_999]]
    assert dataclasses.replace(found, ticks=TIMES.ticks, flushes=TIMES.flushes) == dataclasses.replace(TIMES)
    assert len(packed) == 64 + 6 * 16 <= TIMES_BYTES_MAX < 1 << 20
    assert packed[:32].hex() == GOLDEN
    assert [found.entries_before(at) for at in (0, 1_000_000, 1_001_000, 1_003_000, 2_000_000)] == [
        0,
        0,
        3,
        5,
        6,
    ]
    assert found.entries_at_flush(1_002_200) == 4
    for absent in (1_002_199, 9_999_999):
        with pytest.raises(KeyError):
            found.entries_at_flush(absent)


@pytest.mark.parametrize(
    ("field", "value", "size", "error"),
    [
        ("signature", 0, 8, BadSignature),
        ("version", 2, 4, UnsupportedVersion),
        ("slot_us", 3000, 8, FieldOutOfRange),
        ("slot_us", 0, 8, FieldOutOfRange),
        ("entry_count", 5, 8, FieldOutOfRange),
        ("entry_count", 1 << 63, 8, FieldOutOfRange),
        ("ended_us", 1_009_998, 8, FieldOutOfRange),
        ("tick_count", 32_769, 4, FieldOutOfRange),
        ("flush_count", 16_385, 4, FieldOutOfRange),
        ("tick_count", 2, 4, Truncated),
    ],
)
def test_header_that_is_not_possible_is_refused(
    field: str, value: int, size: int, error: type[FormatError]
) -> None:
    with pytest.raises(error):
        unpack_times(put(field, value, size), log_id=LOG_ID)


@pytest.mark.parametrize(
    "changed",
    [
        {"ticks": [[1, 1_000_000]]},
        {"ticks": [[0, 1_000_000], [3, 1_000_999]]},
        {"ticks": [[0, 1_002_000], [3, 1_000_000]]},
        {"ticks": [[0, 1_000_000], [6, 1_002_000]]},
        {"ticks": [[0, 1_000_000], [0, 1_002_000]]},
        {"ticks": []},
        {"flushes": [[2, 1_000_500], [1, 1_002_200]]},
        {"flushes": [[2, 1_000_500], [2, 1_000_500]]},
        {"flushes": [[0, 1_000_500]]},
        {"flushes": [[4, 1_000_500]]},
        {"flushes": [[3, 1_002_200]]},
        {"flushes": [[1, 999_999]]},
        {"flushes": [[7, 1_010_000]]},
    ],
)
def test_rows_that_are_not_possible_are_neither_written_nor_read(changed: dict[str, list[list[int]]]) -> None:
    rows = {name: np.array(table, np.int64).reshape(-1, 2) for name, table in changed.items()}
    with pytest.raises(FieldOutOfRange, match="of a times file are not possible"):
        pack_times(dataclasses.replace(TIMES, **rows))


def test_damage_and_strangers_are_named() -> None:
    packed = pack_times(TIMES)
    for at in range(16, len(packed)):
        changed = bytearray(packed)
        changed[at] ^= 1
        with pytest.raises(FormatError):
            unpack_times(changed, log_id=LOG_ID)
    with pytest.raises(ChecksumMismatch):
        unpack_times(packed[:-1] + b"\1", log_id=LOG_ID)
    with pytest.raises(FieldOutOfRange, match="another log"):
        unpack_times(packed, log_id=uuid.UUID(int=8))
    for length in (0, 10, 63, len(packed) - 1):
        with pytest.raises(Truncated):
            unpack_times(packed[:length], log_id=LOG_ID)
    with pytest.raises(Truncated):
        unpack_times(packed + b"\0", log_id=LOG_ID)


@given(st.binary(max_size=300))
def test_any_bytes_give_times_or_a_format_error(data: bytes) -> None:
    head = pack_times(TIMES)
    for content in (data, head[: len(data)] + data, sealed((data + head)[:160])):
        try:
            found = unpack_times(content, log_id=LOG_ID)
        except FormatError:
            continue
        assert isinstance(found, Times)
        assert pack_times(found) == content


def test_slots_lie_in_one_another() -> None:
    slots = [value for value in range(1, 5001) if is_slot(value)]
    assert slots == [1, 2, 10, 20, 100, 200, 1000, 2000]
    assert all(longer % shorter == 0 for longer, shorter in zip(slots[1:], slots, strict=False))
