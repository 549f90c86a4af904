"""The VHDX's own log: entries as [MS-VHDX] 2.3.1 lays them out, and the active sequence of 2.3.3."""

from __future__ import annotations

import struct
import uuid
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.errors import FormatError
from hvreplica.formats.vhdx_header import FILE_BYTES_MAX
from hvreplica.formats.vhdx_log import (
    LogEntryHeader,
    choose_active_sequence,
    descriptor_sectors,
    entry_bytes,
    pack_entry,
    unpack_entry,
)
from hvreplica.native import crc32c
from hvreplica.units import MIB

LOG_GUID = uuid.UUID(int=0xABC)


def header(sequence_number: int = 5, **changes: object) -> LogEntryHeader:
    base = LogEntryHeader(
        entry_length=4096,
        tail=0,
        sequence_number=sequence_number,
        descriptor_count=0,
        log_guid=LOG_GUID,
        flushed_file_offset=4 * MIB,
        last_file_offset=5 * MIB,
    )
    return replace(base, **changes)


def updates(count: int) -> tuple[np.ndarray, np.ndarray]:
    data = np.random.default_rng(count).integers(0, 256, (count, 4096), dtype=np.uint8)
    return np.arange(count, dtype=np.int64) * 4096 + 3 * MIB, data


def sealed(packed: bytearray) -> bytes:
    packed[4:8] = bytes(4)
    packed[4:8] = crc32c(packed).to_bytes(4, "little")
    return bytes(packed)


def unpack(packed: bytes) -> object:
    return unpack_entry(packed, log_offset=0, log_guid=LOG_GUID, log_length=MIB)


@pytest.mark.parametrize("count", [0, 1, 126, 127, 200])
@pytest.mark.parametrize("sequence_number", [1, 0xFFFF_FFFF_FFFF_FFFF, 0x1234_5678_9ABC_DEF0])
def test_entry_reads_back(count: int, sequence_number: int) -> None:
    offsets, data = updates(count)
    packed = pack_entry(header(sequence_number), offsets, data)
    assert len(packed) == entry_bytes(count)
    entry = unpack_entry(packed, log_offset=0, log_guid=LOG_GUID, log_length=MIB)
    assert entry.header.sequence_number == sequence_number
    assert (entry.data == data).all()
    assert (entry.data_offsets == offsets).all()


def test_entry_is_laid_out_as_the_specification_says() -> None:
    """Every field by struct, independent of the layouts in the code."""
    offsets, data = updates(2)
    packed = pack_entry(header(0x1_0000_0002), offsets, data)
    fields = struct.unpack_from("<4s4xIIQII16sQQ", packed)
    assert fields == (b"loge", 3 * 4096, 0, 0x1_0000_0002, 2, 0, LOG_GUID.bytes_le, 4 * MIB, 5 * MIB)
    for index in range(2):
        row = struct.unpack_from("<4s4s8sQQ", packed, 64 + 32 * index)
        sector = data[index].tobytes()
        assert row == (b"desc", sector[-4:], sector[:8], int(offsets[index]), 0x1_0000_0002)
        logged = packed[4096 * (1 + index) : 4096 * (2 + index)]
        assert logged[8:-4] == sector[8:-4]
        assert (logged[:4], logged[4:8], logged[-4:]) == (b"data", b"\1\0\0\0", b"\2\0\0\0")


@pytest.mark.parametrize(("count", "sectors"), [(0, 1), (126, 1), (127, 2), (254, 2), (255, 3)])
def test_descriptors_beyond_126_go_on_in_the_next_sector(count: int, sectors: int) -> None:
    assert descriptor_sectors(count) == sectors


@given(st.integers(0, 3 * 4096 - 1), st.integers(1, 255))
def test_any_changed_byte_makes_the_entry_dead(at: int, change: int) -> None:
    packed = bytearray(pack_entry(header(), *updates(2)))
    packed[at] ^= change
    with pytest.raises(FormatError):
        unpack(bytes(packed))


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (8, struct.pack("<I", 2 * 4096)),  # entry length: a data sector too few
        (8, struct.pack("<I", 4096 * 1000)),
        (8, struct.pack("<I", 0)),
        (12, struct.pack("<I", MIB)),  # tail
        (12, struct.pack("<I", 512)),
        (16, bytes(8)),  # sequence number 0
        (24, struct.pack("<I", 1)),  # descriptor count
        (24, struct.pack("<I", 0xFFFFFFFF)),
        (32, bytes(16)),  # another log
        (48, struct.pack("<Q", FILE_BYTES_MAX + MIB)),
        (56, struct.pack("<Q", (1 << 64) - 1)),
        (64, b"what"),  # descriptor signature
        (64 + 16, struct.pack("<Q", 512)),  # file offset
        (64 + 16, struct.pack("<Q", (1 << 64) - 4096)),
        (64 + 24, struct.pack("<Q", 6)),  # sequence number of the descriptor
        (4096, b"dato"),
        (4096 + 4, b"\7\0\0\0"),
        (2 * 4096 - 4, b"\7\0\0\0"),
    ],
)
def test_well_summed_entry_with_a_bad_field_is_dead(at: int, value: bytes) -> None:
    packed = bytearray(pack_entry(header(), *updates(2)))
    packed[at : at + len(value)] = value
    with pytest.raises(FormatError) as caught:
        unpack(sealed(packed))
    assert caught.value.field


def test_zero_descriptors_are_read() -> None:
    packed = bytearray(pack_entry(header(), *updates(1)))
    packed[24:28] = struct.pack("<I", 2)
    packed[96:128] = struct.pack("<4sIQQQ", b"zero", 0, 8 * 4096, 12 * 4096, 5)
    entry = unpack_entry(sealed(packed), log_offset=0, log_guid=LOG_GUID, log_length=MIB)
    assert entry.zero_offsets.tolist() == [12 * 4096]
    assert entry.zero_lengths.tolist() == [8 * 4096]
    assert (entry.data_positions.tolist(), entry.zero_positions.tolist()) == ([0], [1])
    packed[96:128] = struct.pack("<4sIQQQ", b"zero", 0, 512, 12 * 4096, 5)
    with pytest.raises(FormatError):
        unpack(sealed(packed))


def ring(*rows: tuple[int, int, int, int]) -> dict[int, LogEntryHeader]:
    """Return entries from (log_offset, sectors, sequence_number, tail), offsets and tail in sectors."""
    return {
        at * 4096: header(number, log_offset=at * 4096, entry_length=sectors * 4096, tail=tail * 4096)
        for at, sectors, number, tail in rows
    }


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], []),
        ([(0, 1, 1, 0)], [1]),
        ([(3, 2, 9, 3)], [9]),
        (
            [(0, 1, 1, 0), (1, 1, 2, 0), (2, 1, 3, 1)],
            [2, 3],
        ),  # from the head's tail, not from the chain's start
        ([(0, 1, 1, 0), (1, 1, 3, 1)], [3]),  # a gap in the numbers ends the chain
        ([(0, 1, 1, 0), (2, 1, 2, 0)], [1]),  # a gap in space too; the later one lacks its tail
        ([(6, 2, 4, 6), (0, 1, 5, 6), (1, 1, 6, 6)], [4, 5, 6]),  # round the end of the ring
        ([(0, 1, 20, 0), (4, 1, 7, 4)], [20]),  # the highest last number wins, wherever it is
        ([(4, 1, 20, 4), (0, 1, 7, 0)], [20]),
        ([(0, 1, 1, 0), (1, 1, 2, 7)], []),  # the head's tail is not in its chain
        ([(0, 8, 1, 0)], [1]),  # one entry fills the ring
        ([(0, 4, 1, 0), (4, 4, 2, 0)], [1, 2]),
    ],
)
def test_active_sequence(entries: list[tuple[int, int, int, int]], expected: list[int]) -> None:
    active = choose_active_sequence(ring(*entries), log_length=8 * 4096)
    assert [entry.sequence_number for entry in active] == expected


def specification_scan(entries: dict[int, LogEntryHeader], log_length: int) -> list[LogEntryHeader]:
    """Follow the numbered steps of 2.3.3 literally."""
    candidate: list[LogEntryHeader] = []
    tail = old_tail = 0
    while True:
        current: list[LogEntryHeader] = []
        position = tail
        while position in entries and (
            not current or entries[position].sequence_number == current[-1].sequence_number + 1
        ):
            current.append(entries[position])
            position = (position + entries[position].entry_length) % log_length
        valid = bool(current) and current[-1].tail in {entry.log_offset for entry in current}
        if valid and (not candidate or current[-1].sequence_number > candidate[-1].sequence_number):
            candidate = current
        tail = position if valid else (tail + 4096) % log_length
        if tail <= old_tail:
            break
        old_tail = tail
    if not candidate:
        return []
    places = [entry.log_offset for entry in candidate]
    return candidate[places.index(candidate[-1].tail) :]


@given(st.data())
def test_active_sequence_is_that_of_the_specification(data: st.DataObject) -> None:
    sectors = 10
    rows, at = [], 0
    while at < sectors:
        if data.draw(st.booleans()):
            length = data.draw(st.integers(1, min(3, sectors - at)))
            number = data.draw(st.integers(1, 6)) if not rows or data.draw(st.booleans()) else rows[-1][2] + 1
            rows.append((at, length, number, data.draw(st.integers(0, sectors - 1))))
            at += length
        else:
            at += 1
    entries = ring(*rows)
    ours = choose_active_sequence(entries, log_length=sectors * 4096)
    theirs = specification_scan(entries, sectors * 4096)
    assert bool(ours) == bool(theirs)
    if ours:
        assert ours[-1].sequence_number == theirs[-1].sequence_number
