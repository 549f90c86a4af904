"""A second opinion on every log that is written: [MS-HRL] 2.2 to 2.6 read word by word, in plain Python.

Only bytes are summed by numpy, for there are many. It shares nothing with the package under test, not even constants, and follows the steps of section 2.5 in their
order. It asserts where the specification says MUST.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass

import numpy as np


@dataclass
class PlainHeader:
    version: int
    time_stamp: int
    original_size: int
    current_size: int
    eol_location: int
    error_code: int
    metadata_size: int
    unique_id: uuid.UUID
    previous_unique_id: uuid.UUID
    last_modified: int
    total_entries: int
    data_write_guid: uuid.UUID


@dataclass
class PlainWrite:
    byte_offset: int
    data: bytes
    time_stamp: int


def calculate_checksum(buffer: bytes, ignored_at: int | None = None) -> int:
    """2.6: the complement of the sum of all bytes but for the four at `ignored_at`."""
    total = int(np.frombuffer(buffer, np.uint8).sum(dtype=np.uint64))
    if ignored_at is not None:
        total -= sum(buffer[ignored_at : ignored_at + 4])
    return ~total & 0xFFFFFFFF


def read_plain_header(log: bytes) -> PlainHeader:
    header = log[0:4096]
    assert len(header) == 4096
    assert header[0:7] == b"msctlog"
    (stored,) = struct.unpack_from("<I", header, 40)
    assert stored == calculate_checksum(header, 40)
    (file_type,) = struct.unpack_from("<I", header, 104)
    assert file_type == 0
    assert header[108:110] == bytes(2)
    assert header[126:4096] == bytes(3970)
    return PlainHeader(
        version=struct.unpack_from("<I", header, 8)[0],
        time_stamp=struct.unpack_from("<I", header, 12)[0],
        original_size=struct.unpack_from("<Q", header, 24)[0],
        current_size=struct.unpack_from("<Q", header, 32)[0],
        eol_location=struct.unpack_from("<Q", header, 44)[0],
        error_code=struct.unpack_from("<i", header, 52)[0],
        metadata_size=struct.unpack_from("<I", header, 56)[0],
        unique_id=uuid.UUID(bytes_le=header[60:76]),
        previous_unique_id=uuid.UUID(bytes_le=header[76:92]),
        last_modified=struct.unpack_from("<I", header, 92)[0],
        total_entries=struct.unpack_from("<Q", header, 96)[0],
        data_write_guid=uuid.UUID(bytes_le=header[110:126]),
    )


def read_plain(log: bytes) -> tuple[PlainHeader, list[PlainWrite]]:
    """Return the header and every write, oldest first."""
    header = read_plain_header(log)
    stack = []
    current = header.eol_location - header.metadata_size
    while True:
        stack.append(current)
        (previous,) = struct.unpack_from("<Q", log, current)
        if previous == 0:
            break
        current -= previous
    writes = []
    data_at = 4096
    while stack:
        location = stack.pop()
        packed = log[location : location + 32]
        _, valid, stored = struct.unpack_from("<QII", packed)
        assert stored == calculate_checksum(packed, 12)
        assert packed[16:32] == bytes(16)
        for index in range(valid):
            at = location + 32 + 32 * index
            assert at + 32 <= location + header.metadata_size
            write, data_at = _read_entry(log, at, data_at)
            writes.append(write)
        assert data_at == location
        data_at = location + header.metadata_size
    assert len(writes) == header.total_entries
    return header, writes


def _read_entry(log: bytes, at: int, data_at: int) -> tuple[PlainWrite, int]:
    entry = log[at : at + 32]
    byte_offset, stored, length, time_stamp, operation, data_checksum, location = struct.unpack_from(
        "<QIIIBIB", entry
    )
    assert stored == calculate_checksum(entry, 8)
    assert operation == 1
    assert location == 0
    assert entry[26:32] == bytes(6)
    data = log[data_at : data_at + length]
    assert len(data) == length
    assert data_checksum == calculate_checksum(data)
    return PlainWrite(byte_offset, data, time_stamp), data_at + length
