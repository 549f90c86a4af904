"""Metadata entries: the 58 that Hyper-V wrote, and the reference's answer for any bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hvreplica import native
from hvreplica.native import reference

# [MS-HRL] v6.0 section 3, a log that Hyper-V wrote, as numbers: (id, length, byte offset, time stamp, checksum).
EXAMPLE = json.loads((Path(__file__).parent / "vectors" / "ms-hrl-example.json").read_text(encoding="utf-8"))[
    "entries"
]

u32 = st.integers(0, 0xFFFFFFFF)
rows_of_entries = st.lists(st.tuples(st.integers(0, (1 << 64) - 1), u32, u32), max_size=140)


def columns(rows: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(rows, np.uint64).reshape(-1, 3)
    return np.ascontiguousarray(table[:, :2]), table[:, 2].astype(np.uint32)


def example_entry(row: list[int]) -> bytes:
    extents = np.array([[row[2], row[1]]], np.int64)
    return native.pack_hrl_entries(extents, row[3], np.zeros(1, np.uint32))


@pytest.mark.parametrize("row", EXAMPLE, ids=lambda row: f"entry {row[0]}")
def test_each_entry_of_the_specification_example_packs_with_its_checksum(row: list[int]) -> None:
    assert int.from_bytes(example_entry(row)[8:12], "little") == row[4]


def test_the_specification_example_parses_to_its_numbers() -> None:
    block = bytes(32) + b"".join(example_entry(row) for row in EXAMPLE)
    entries = native.parse_hrl_entries(block, len(EXAMPLE), 8192)
    assert len(entries) == 58
    assert entries["byte_offset"].tolist() == [row[2] for row in EXAMPLE]
    assert entries["data_length"].tolist() == [row[1] for row in EXAMPLE]
    assert entries["time_stamp"].tolist() == [row[3] for row in EXAMPLE]
    # The data stands between the two metadata blocks of the example, at 8192 and 328192.
    assert entries["log_offset"][0] == 8192
    assert int(entries["log_offset"][-1]) + int(entries["data_length"][-1]) == 328192


def test_packed_fields_stand_where_the_specification_puts_them() -> None:
    packed = native.pack_hrl_entries(
        np.array([[0x0807060504030201, 0x14131211]]), 0x24232221, np.array([0x34333231])
    )
    assert packed[:8] == bytes([1, 2, 3, 4, 5, 6, 7, 8])
    assert packed[12:16] == bytes([0x11, 0x12, 0x13, 0x14])
    assert packed[16:20] == bytes([0x21, 0x22, 0x23, 0x24])
    assert packed[20] == 1
    assert packed[21:25] == bytes([0x31, 0x32, 0x33, 0x34])
    assert packed[25:] == bytes(7)


@given(rows=rows_of_entries, time_stamp=u32, log_offset=st.integers(0, 1 << 60))
@example(rows=[(2**64 - 1, 2**32 - 1, 2**32 - 1)], time_stamp=2**32 - 1, log_offset=0)
def test_what_is_packed_parses_back_and_equals_the_reference(
    rows: list[tuple[int, int, int]], time_stamp: int, log_offset: int
) -> None:
    extents, checksums = columns(rows)
    packed = native.pack_hrl_entries(extents, time_stamp, checksums)
    assert packed == reference.pack_hrl_entries(extents, time_stamp, checksums)
    entries = native.parse_hrl_entries(bytes(32) + packed, len(rows), log_offset)
    assert entries.dtype == native.HRL_ENTRY
    assert (
        entries.tobytes() == reference.parse_hrl_entries(bytes(32) + packed, len(rows), log_offset).tobytes()
    )
    assert entries["byte_offset"].tolist() == [row[0] for row in rows]
    assert entries["data_checksum"].tolist() == [row[2] for row in rows]


@given(block=st.binary(min_size=32, max_size=160), count=st.integers(-1, 5))
def test_any_bytes_give_entries_or_the_error_of_the_reference(block: bytes, count: int) -> None:
    answers = []
    for side in (native, reference):
        try:
            answers.append(side.parse_hrl_entries(block, count, 0).tobytes())
        except native.BadEntry as bad:
            answers.append((bad.index, bad.reason, bad.expected, bad.actual))
        except ValueError as error:
            answers.append(str(error))
    assert answers[0] == answers[1]


def test_every_flipped_bit_of_an_entry_is_a_bad_checksum() -> None:
    packed = native.pack_hrl_entries(np.array([[4096, 512]] * 3), 5, np.array([1, 2, 3]))
    for bit in range(256):
        block = bytearray(32) + bytearray(packed)
        block[64 + bit // 8] ^= 1 << bit % 8
        with pytest.raises(native.BadEntry) as caught:
            native.parse_hrl_entries(block, 3, 0)
        assert caught.value.index == 1
        assert caught.value.reason == "checksum"
        assert caught.value.expected != caught.value.actual


def test_an_operation_that_is_no_write_is_refused() -> None:
    packed = bytearray(native.pack_hrl_entries(np.array([[4096, 512]]), 5, np.array([1])))
    packed[20] = 2
    checksum = int.from_bytes(packed[8:12], "little") - 1
    packed[8:12] = checksum.to_bytes(4, "little")
    for side in (native, reference):
        with pytest.raises(native.BadEntry) as caught:
            side.parse_hrl_entries(bytes(32) + packed, 1, 0)
        assert (caught.value.reason, caught.value.expected, caught.value.actual) == ("meta_operation", 1, 2)


@pytest.mark.parametrize(
    ("length", "count"), [(0, 1), (31, 1), (63, 1), (64, 2), (4096, 128), (64, -1), (64, 1 << 64)]
)
def test_a_block_too_short_for_its_entries_is_refused(length: int, count: int) -> None:
    for side in (native, reference):
        with pytest.raises(ValueError, match="room for"):
            side.parse_hrl_entries(bytes(length), count, 0)


def test_data_beyond_64_bits_is_refused() -> None:
    packed = native.pack_hrl_entries(np.array([[0, 4096]]), 0, np.array([0]))
    with pytest.raises(ValueError, match="64 bits"):
        native.parse_hrl_entries(bytes(32) + packed, 1, (1 << 64) - 4095)


@pytest.mark.parametrize(
    ("extents", "time_stamp", "checksums"),
    [
        ([[0, 1 << 32]], 0, [0]),
        ([[0, 1]], 1 << 32, [0]),
        ([[0, 1]], -1, [0]),
        ([[0, 1]], 0, [1 << 32]),
        ([[0, -1]], 0, [0]),
        ([[0, 1]], 0, [0, 0]),
        ([[0, 1]], 0, []),
    ],
)
def test_what_does_not_fit_an_entry_is_refused(
    extents: list[list[int]], time_stamp: int, checksums: list[int]
) -> None:
    for side in (native, reference):
        with pytest.raises(ValueError, match=r"32 bits|as many"):
            side.pack_hrl_entries(np.array(extents), time_stamp, np.array(checksums))
