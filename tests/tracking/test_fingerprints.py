"""The fingerprint table: what it says after any order of writes, and that damage is told and not believed."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from hvreplica import native
from hvreplica.errors import BadSignature, ChecksumMismatch, FormatError, Truncated, UnsupportedVersion
from hvreplica.formats.fingerprint import HEADER, HEADER_BYTES, FingerprintHeader, pack_header, unpack_header
from hvreplica.tracking.fingerprints import BLOCK_BYTES, FingerprintTable
from tests.support.build import mixed_bytes
from tests.support.faultfile import FaultFiles

PATH = Path("/state/0.fp")
POINT = uuid.UUID(int=77)


def new_table(files: FaultFiles, virtual_bytes: int = 1 << 20) -> FingerprintTable:
    return FingerprintTable.create(files, PATH, disk_index=0, virtual_bytes=virtual_bytes)


def test_table_new_says_all_zero_and_describes_no_point() -> None:
    files = FaultFiles("/state")
    table = new_table(files)
    assert not table.read(0, 256).any()
    assert table.header.point_id == uuid.UUID(int=0)
    assert len(table.extents(0, 1 << 20)) == 0


def test_table_rows_are_what_xxhash_says_of_each_block() -> None:
    files = FaultFiles("/state")
    table = new_table(files)
    data = mixed_bytes(64 * BLOCK_BYTES, seed=3)
    table.write(10, native.fingerprints(data, BLOCK_BYTES))
    for index in range(64):
        block = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
        expected = xxhash.xxh3_128_digest(block) if any(block) else bytes(16)
        assert table.read(10 + index, 1).tobytes() == expected


def test_table_mark_survives_a_cut_with_all_rows_before_it() -> None:
    files = FaultFiles("/state")
    table = new_table(files)
    files.sync_directory(Path("/state"))
    table.write(5, np.full((3, 16), 9, np.uint8))
    table.mark(POINT)
    table.close()
    opened = FingerprintTable.open(files, PATH)
    assert opened.header.point_id == POINT
    assert (opened.read(5, 3) == 9).all()


def test_table_extents_cover_every_row_that_is_not_zero() -> None:
    files = FaultFiles("/state")
    table = new_table(files, virtual_bytes=64 << 20)
    table.write(5000, np.full((100, 16), 1, np.uint8))
    covered = np.zeros((64 << 20) // BLOCK_BYTES, bool)
    for offset, length in table.extents(0, 64 << 20).tolist():
        covered[offset // BLOCK_BYTES : -(-(offset + length) // BLOCK_BYTES)] = True
    assert covered[5000:5100].all()
    assert covered.sum() < len(covered) / 2


def test_table_clear_makes_rows_zero() -> None:
    files = FaultFiles("/state")
    table = new_table(files)
    table.write(0, np.full((256, 16), 1, np.uint8))
    table.clear(16, 64)
    assert not table.read(16, 64).any()
    assert table.read(0, 16).all()
    assert table.read(80, 176).all()


@pytest.mark.parametrize(
    ("offset", "error"),
    [(0, BadSignature), (8, UnsupportedVersion), (12, ChecksumMismatch), (33, ChecksumMismatch)],
)
def test_table_with_a_damaged_header_is_refused(offset: int, error: type[FormatError]) -> None:
    files = FaultFiles("/state")
    new_table(files).close()
    file = files.open(PATH, writable=True)
    file.write(bytes([file.read(offset, 1)[0] ^ 0xFF]), offset)
    with pytest.raises(error, match=r"/state/0\.fp"):
        FingerprintTable.open(files, PATH)


def test_table_of_the_wrong_length_is_refused() -> None:
    files = FaultFiles("/state")
    new_table(files).close()
    files.open(PATH, writable=True).resize(HEADER_BYTES + 16)
    with pytest.raises(Truncated):
        FingerprintTable.open(files, PATH)


@given(st.binary(max_size=200))
def test_unpack_header_of_any_bytes_gives_a_value_or_a_format_error(data: bytes) -> None:
    try:
        header = unpack_header(data)
    except FormatError:
        return
    assert pack_header(header)[: HEADER.size] == data[: HEADER.size]


def test_header_round_trip() -> None:
    header = FingerprintHeader(4096, 3, 10 << 40, POINT)
    assert unpack_header(pack_header(header)) == header
    assert header.block_count == (10 << 40) // 4096
