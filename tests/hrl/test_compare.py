"""What a disk holds otherwise than a log wrote it, sector by sector, against a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.disk import open_disk
from hvreplica.formats.hrl import SECTOR_BYTES
from hvreplica.hrl import LogReader, apply, apply_log, verify_log
from hvreplica.hrl.compare import log_differences
from hvreplica.hrl.copy import copy_log
from tests.hrl.support import LOG, PREVIOUS_ID, new_files, new_writer, rows
from tests.support.fakeclock import FakeClock

SECTORS = 600
DISK = Path("/logs/disk.raw")

writes = st.lists(
    st.tuples(st.integers(0, SECTORS - 1), st.sampled_from([1, 2, 40, 200]), st.integers(0, 3)), max_size=12
)


@given(history=writes, later=writes, entries_per_pass=st.sampled_from([3, 7, 1 << 19]), hole=st.booleans())
def test_differences_are_the_sectors_that_were_written_again(
    history: list[tuple[int, int, int]],
    later: list[tuple[int, int, int]],
    entries_per_pass: int,
    *,
    hole: bool,
) -> None:
    files = new_files()
    disk_state = np.zeros(SECTORS, np.uint8)
    logged = np.zeros(SECTORS, bool)
    with new_writer(files) as writer:
        for first, count, number in history:
            count = min(count, SECTORS - first)
            disk_state[first : first + count] = number
            logged[first : first + count] = True
            extent = (first * SECTOR_BYTES, count * SECTOR_BYTES)
            if number or not hole:
                writer.append(rows(extent), bytes([number]) * extent[1])
            else:
                writer.append_zeroes(*extent)
    expected = disk_state.copy()
    for first, count, number in later:
        disk_state[first : first + count] = number
    files.load(DISK, np.repeat(disk_state, SECTOR_BYTES).tobytes())
    with pytest.MonkeyPatch.context() as patch, open_disk(files, DISK, clock=FakeClock()) as disk:
        patch.setattr(apply, "ENTRIES_PER_PASS", entries_per_pass)
        found = log_differences(files, LOG, disk)
    differs = np.zeros(SECTORS, bool)
    for offset, length in found.tolist():
        differs[offset // SECTOR_BYTES : (offset + length) // SECTOR_BYTES] = True
    assert (differs == (logged & (disk_state != expected))).all()


def test_long_zeros_and_long_writes_are_looked_at_to_their_end() -> None:
    files = new_files()
    length = 5 << 20
    with new_writer(files) as writer:
        writer.append_zeroes(0, length)
        writer.append(rows((length, length)), b"x" * length)
    content = bytearray(length) + bytearray(b"x" * length)
    places = [0, length - 1, length, 2 * length - 1]
    for place in places:
        content[place] ^= 1
    files.load(DISK, bytes(content))
    with open_disk(files, DISK, clock=FakeClock()) as disk:
        found = log_differences(files, LOG, disk)
    sectors = {place // SECTOR_BYTES for place in places}
    assert {
        sector
        for offset, size in found.tolist()
        for sector in range(offset // SECTOR_BYTES, (offset + size) // SECTOR_BYTES)
    } == sectors


def test_a_copied_log_differs_in_its_predecessor_alone() -> None:
    files = new_files()
    with new_writer(files) as writer:
        writer.append(rows((0, 4096), (9 << 20, 512)), b"a" * 4608)
        writer.append_zeroes(1 << 20, 6 << 20)
        writer.append(rows((4096, 512)), b"b" * 512)
    with files.open(LOG, writable=True) as file:
        file.write(b"not of the log", file.size())
    target = Path("/logs/copy.hrl")
    other = FakeClock(seed=3).guid()
    with LogReader(files, LOG) as log:
        copy_log(files, log, target, previous_log_id=other)
    assert other != PREVIOUS_ID
    ours, theirs = verify_log(files, target), verify_log(files, LOG)
    assert (ours.log_id, ours.previous_log_id) == (theirs.log_id, str(other))
    assert (ours.entries, ours.log_bytes, ours.dropped_bytes) == (theirs.entries, theirs.log_bytes, 0)
    assert files.content_of(target)[4096:] == files.content_of(LOG)[4096 : ours.log_bytes]
    for name in (LOG, target):
        path = name.with_suffix(".raw")
        files.load(path, bytes(10 << 20))
        with open_disk(files, path, writable=True, clock=FakeClock()) as disk:
            assert apply_log(files, name, disk).bytes_zeroed > 5 << 20
    assert files.content_of(LOG.with_suffix(".raw")) == files.content_of(target.with_suffix(".raw"))


def test_a_copy_that_fails_leaves_no_file() -> None:
    files = new_files()
    with new_writer(files) as writer:
        writer.append(rows((0, 4096)), b"a" * 4096)
    files.fail("sync", path="/logs/copy.hrl")
    with LogReader(files, LOG) as log, pytest.raises(OSError, match="copy"):
        copy_log(files, log, Path("/logs/copy.hrl"), previous_log_id=PREVIOUS_ID)
    assert files.names(Path("/logs")) == [LOG.name]
