"""verify_log() reads every byte that means something, and only those, and reports what is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.clock import HRL_EPOCH_S
from hvreplica.errors import ChecksumMismatch, FieldOutOfRange
from hvreplica.files import OS_FILES
from hvreplica.hrl import LogEnd, LogReader, verify_log
from hvreplica.hrl.data import HOLE_BYTES_MIN, DataChecker, HoleFinder
from tests.hrl.support import LOG, many_writes, new_files, new_writer, patch, rows, write_log
from tests.support.build import random_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.progress import Progress

MIB = 1 << 20
NO_HOLES = np.empty((0, 2), np.int64)


def test_report_says_what_the_log_holds() -> None:
    files = new_files()
    writer = new_writer(files)
    writer.append(rows((1 << 40, 512)), bytes(512), time_s=HRL_EPOCH_S + 9)
    writer.append(rows((0, 1024)), bytes(1024), time_s=HRL_EPOCH_S + 3)
    writer.close()
    report = verify_log(files, LOG)
    assert report.end is LogEnd.CLEAN
    assert (report.entries, report.metadata_blocks, report.data_bytes) == (2, 2, 1536)
    assert report.disk_end == (1 << 40) + 512
    assert (report.first_time_s, report.last_time_s) == (HRL_EPOCH_S + 3, HRL_EPOCH_S + 9)
    assert report.data_checked
    assert report.dropped_bytes == 0


def test_disk_bound_is_kept() -> None:
    files = new_files()
    write_log(files, [(4096, bytes(512))])
    verify_log(files, LOG, disk_bytes=4608)
    with pytest.raises(FieldOutOfRange):
        verify_log(files, LOG, disk_bytes=4607)


def test_progress_ends_at_the_total() -> None:
    files = new_files()
    write_log(files, many_writes(300))
    seen: list[Progress] = []
    verify_log(files, LOG, progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes == 300 * 512


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_found_in_entries_of_every_length(seed: int, tmp_path: Path) -> None:
    """Shorter than a window, as long as one, and longer: each is summed by another path."""
    path = tmp_path / "mixed.hrl"
    lengths = [512, 2 * MIB, 4096, 2 * MIB - 512, 512, 2 * MIB, 65536, 512]
    rng = np.random.default_rng(seed)
    rng.shuffle(lengths)
    writer = new_writer(OS_FILES, path)
    for index, length in enumerate(lengths):
        writer.append(rows((index * 4 * MIB, length)), random_bytes(length, index))
        if rng.integers(3) == 0:
            writer.flush()
    writer.close()
    assert verify_log(OS_FILES, path).data_bytes == sum(lengths)
    with LogReader(OS_FILES, path) as reader:
        entries = np.concatenate(list(reader.entries()))
    for entry in entries:
        start, length = int(entry["log_offset"]), int(entry["data_length"])
        for at in (start, start + length // 2, start + length - 1):
            flip(path, at)
            with pytest.raises(ChecksumMismatch) as caught:
                verify_log(OS_FILES, path)
            assert (caught.value.offset, caught.value.path) == (start, path)
            assert caught.value.field == "data_checksum"
            flip(path, at)
    assert verify_log(OS_FILES, path).entries == len(lengths)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        octet = file.read(1)[0]
        file.seek(at)
        file.write(bytes([octet ^ 0x10]))


def test_entry_longer_than_a_window_is_summed_whole() -> None:
    """Others may write entries of up to 4 GiB; one of 5 MiB shows that pieces add up."""
    files = new_files()
    data = random_bytes(5 * MIB)
    files.load(LOG, bytes(4096) + data)
    entries = np.zeros(1, [("log_offset", "<u8"), ("data_length", "<u4"), ("data_checksum", "<u4")])
    entries["log_offset"], entries["data_length"] = 4096, len(data)
    entries["data_checksum"] = ~np.uint32(sum(data) & 0xFFFFFFFF)
    file = files.open(LOG)
    assert DataChecker(file).find_fault(entries, NO_HOLES) is None
    entries["data_checksum"] ^= 1
    fault = DataChecker(file).find_fault(entries, NO_HOLES)
    assert fault is not None
    assert fault.index == 0


def test_hole_of_the_file_counts_as_zeros_and_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "zeroes.hrl"
    writer = new_writer(OS_FILES, path)
    writer.append_zeroes(0, 1 << 38)  # reading it would take a minute
    writer.close()
    report = verify_log(OS_FILES, path, disk_bytes=1 << 38)
    assert report.data_bytes == 1 << 38
    assert report.entries == 1 << 17


def test_entry_that_is_partly_a_hole_is_summed_whole() -> None:
    files = new_files()
    head, tail = random_bytes(4096), random_bytes(4096, 1)
    write_log(files, [(0, bytes(256 << 10) + tail), (MIB, head + bytes(256 << 10)), (2 * MIB, head)])
    with files.open(LOG, writable=True) as file:
        file.zero(8192, 256 << 10)
        file.zero(8192 + (256 << 10) + 8192, 256 << 10)
        assert len(HoleFinder(file).find(8192, file.size())) == 2
    assert verify_log(files, LOG).entries == 3


def test_holes_are_found_in_any_order_and_at_any_place() -> None:
    class Runs:
        """A file that says where its data is, on no boundary at all."""

        def size(self) -> int:
            return 10 * MIB

        def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
            for first, last in ((0, 4097), (MIB - 1, 2 * MIB + 1), (5 * MIB, 5 * MIB + 7)):
                if last > start and first < end:
                    yield max(first, start), min(last, end) - max(first, start)

    finder = HoleFinder(Runs())  # type: ignore[arg-type]
    expected = [[4608, MIB - 512 - 4608], [2 * MIB + 512, 3 * MIB - 512], [5 * MIB + 512, 5 * MIB - 512]]
    for start, end in ((0, 10 * MIB), (5 * MIB, 10 * MIB), (0, 3 * MIB), (4 * MIB, 5 * MIB), (0, 10 * MIB)):
        within = [
            [max(at, start), min(at + length, end) - max(at, start)]
            for at, length in expected
            if at < end and at + length > start
        ]
        assert finder.find(start, end).tolist() == within


def test_lost_data_that_became_a_hole_is_found() -> None:
    files = new_files()
    write_log(files, [(0, random_bytes(MIB)), (MIB, random_bytes(MIB, 1))])
    file = files.open(LOG, writable=True)
    file.zero(8192 + MIB, MIB)
    with pytest.raises(ChecksumMismatch) as caught:
        verify_log(files, LOG)
    assert caught.value.offset == 8192 + MIB


def test_holes_are_found_in_whole_sectors_and_in_order() -> None:
    files = new_files()
    files.load(LOG, b"x" * 8192)
    file = files.open(LOG, writable=True)
    file.resize(MIB)
    file.write(b"y", MIB)
    patch(files, 512 << 10, b"z")
    finder = HoleFinder(file)
    first = finder.find(100, 512 << 10)
    assert first.tolist() == [[8192, (512 << 10) - 8192]]
    assert finder.find(512 << 10, MIB + 1).tolist() == [[(512 << 10) + 4096, (512 << 10) - 4096]]
    assert HoleFinder(file).find(0, 8192 + HOLE_BYTES_MIN - 1).tolist() == []
    assert HoleFinder(file).find(0, 8192).tolist() == []
