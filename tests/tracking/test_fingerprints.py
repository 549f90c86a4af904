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
from tests.support.faultfile import FaultFiles, crash_states

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


SIZES = (BLOCK_BYTES, BLOCK_BYTES + 512, 5 * BLOCK_BYTES, 300 * BLOCK_BYTES + 512)


@pytest.mark.parametrize("before", SIZES)
@pytest.mark.parametrize("after", SIZES)
def test_table_resized_keeps_what_both_sizes_have_and_is_zero_behind(before: int, after: int) -> None:
    files = FaultFiles("/state")
    table = new_table(files, before)
    blocks, kept = -(-before // BLOCK_BYTES), -(-min(before, after) // BLOCK_BYTES)
    rows = np.arange(blocks * 16).astype(np.uint8).reshape(-1, 16) | 1
    table.write(0, rows)
    table.mark(POINT)
    table.resize(after)
    table.close()
    opened = FingerprintTable.open(files, PATH)
    assert (opened.header.virtual_bytes, opened.header.point_id) == (after, POINT)
    assert (opened.read(0, kept) == rows[:kept]).all()
    assert not opened.read(0, opened.header.block_count)[kept:].any()


@pytest.mark.parametrize(("before", "after"), [(SIZES[1], SIZES[3]), (SIZES[3], SIZES[1])])
def test_table_whose_resize_is_cut_has_one_size_or_the_other(before: int, after: int, seed: int) -> None:
    files = FaultFiles("/state")
    table = new_table(files, before)
    files.sync_directory(PATH.parent)
    table.write(0, np.full((table.header.block_count, 16), 7, np.uint8))
    table.mark(POINT)
    files.settle()
    table.resize(after)
    table.resize(before)
    table.resize(after)
    seen = set()
    for _, world in crash_states(files.trace(), seed=seed, subsets_per_prefix=8, limit=200):
        opened = FingerprintTable.open(world, PATH)
        seen.add(opened.header.virtual_bytes)
        opened.resize(after)
        kept = -(-min(before, after) // BLOCK_BYTES)
        assert (opened.read(0, kept) == 7).all(), world.story
        assert not opened.read(0, opened.header.block_count)[kept:].any(), world.story
        opened.close()
        assert FingerprintTable.open(world, PATH).header.virtual_bytes == after
    assert seen == {before, after}
