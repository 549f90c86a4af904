"""Applying a log gives the disk that its writes, one after the other, would have given."""

from __future__ import annotations

import errno
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica import native
from hvreplica.errors import ChecksumMismatch, FieldOutOfRange, NotClosed
from hvreplica.files import OS_FILES
from hvreplica.hrl import LogReader, apply, apply_log
from hvreplica.hrl.apply import split_at_holes
from tests.hrl.support import (
    LOG,
    MemoryDisk,
    many_writes,
    new_files,
    new_writer,
    patch,
    reopen_as_unclosed,
    rows,
    write_log,
)
from tests.support.build import random_bytes, random_extents

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.progress import Progress
    from tests.support.faultfile import FaultFiles

MIB = 1 << 20


def overlapping_log(disk_bytes: int = 256 << 10, count: int = 600, seed: int = 1) -> tuple[FaultFiles, bytes]:
    """Return a log of overlapping writes and zeroes, and what it makes of a disk of 0xee."""
    model = bytearray(b"\xee" * disk_bytes)
    files = new_files()
    writer = new_writer(files)
    for index, (offset, length) in enumerate(
        random_extents(count, disk_bytes=disk_bytes, seed=seed).tolist()
    ):
        if index % 17 == 0:
            writer.append_zeroes(offset, length)
            data = bytes(length)
        else:
            data = random_bytes(length, index)
            writer.append(rows((offset, length)), data)
        model[offset : offset + length] = data
    writer.close()
    return files, bytes(model)


def test_newest_write_wins() -> None:
    files = new_files()
    write_log(files, [(0, b"a" * 8192), (4096, b"b" * 8192), (65536, b"c" * 4096), (0, b"d" * 4096)])
    disk = MemoryDisk(128 << 10)
    report = apply_log(files, LOG, disk)
    assert bytes(disk.content[:12288]) == b"d" * 4096 + b"b" * 8192
    assert bytes(disk.content[65536:69632]) == b"c" * 4096
    assert (report.entries, report.extents, report.passes) == (4, 3, 1)
    assert (report.bytes_logged, report.bytes_written, report.bytes_zeroed) == (24576, 16384, 0)


def test_overlapping_writes_equal_the_model_and_each_byte_is_written_once() -> None:
    files, expected = overlapping_log()
    disk = MemoryDisk(len(expected), content=b"\xee" * len(expected))
    apply_log(files, LOG, disk)
    assert bytes(disk.content) == expected
    pieces = sorted(disk.copied + disk.zeroed)
    assert all(first + length <= second for (first, length), (second, _) in pairwise(pieces))


def test_second_apply_changes_nothing() -> None:
    files, expected = overlapping_log()
    disk = MemoryDisk(len(expected), content=b"\xee" * len(expected))
    apply_log(files, LOG, disk)
    apply_log(files, LOG, disk)
    assert bytes(disk.content) == expected


def test_writes_go_up_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    files, expected = overlapping_log()
    disk = MemoryDisk(len(expected), content=b"\xee" * len(expected))
    monkeypatch.setattr("hvreplica.disk.parallel.WORKER_COUNT", 1)
    monkeypatch.setattr(apply, "_EXTENTS_PER_STEP", 7)
    apply_log(files, LOG, disk)
    assert disk.copied == sorted(disk.copied)
    assert bytes(disk.content) == expected


@pytest.mark.parametrize("per_pass", [1, 126, 127, 128, 300])
def test_passes_keep_their_bound_and_the_order_of_the_log(
    per_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "ENTRIES_PER_PASS", per_pass)
    files, expected = overlapping_log()
    disk = MemoryDisk(len(expected), content=b"\xee" * len(expected))
    report = apply_log(files, LOG, disk)
    assert bytes(disk.content) == expected
    assert report.passes == -(-600 // per_pass)


def test_empty_log_changes_nothing() -> None:
    files = new_files()
    new_writer(files).close()
    disk = MemoryDisk(4096, content=b"x" * 4096)
    report = apply_log(files, LOG, disk)
    assert (report.entries, report.extents, report.passes) == (0, 0, 0)
    assert bytes(disk.content) == b"x" * 4096


@pytest.mark.parametrize("place", ["first", "last"])
def test_damaged_data_anywhere_stops_before_the_first_write(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "ENTRIES_PER_PASS", 10)
    files = new_files()
    write_log(files, many_writes(400))
    with LogReader(files, LOG) as reader:
        entries = np.concatenate(list(reader.entries()))
    at = int(entries["log_offset"][0 if place == "first" else -1])
    patch(files, at, bytes([files.content_of(LOG)[at] ^ 1]))
    disk = MemoryDisk(MIB)
    with pytest.raises(ChecksumMismatch):
        apply_log(files, LOG, disk)
    assert disk.copied == []
    apply_log(files, LOG, disk, verify_data=False)
    assert len(disk.copied) == 400


@pytest.mark.parametrize("per_pass", [10, 1 << 19])
def test_entry_beyond_the_disk_stops_before_the_first_write(
    per_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "ENTRIES_PER_PASS", per_pass)
    files = new_files()
    write_log(files, many_writes(400))
    disk = MemoryDisk(399 * 1024 + 511)
    with pytest.raises(FieldOutOfRange):
        apply_log(files, LOG, disk)
    assert disk.copied == []


def test_unclosed_log_is_refused() -> None:
    files, _ = overlapping_log()
    reopen_as_unclosed(files)
    disk = MemoryDisk(MIB)
    with pytest.raises(NotClosed):
        apply_log(files, LOG, disk)
    assert disk.copied == []


def test_error_of_the_disk_passes_through() -> None:
    class FullDisk(MemoryDisk):
        def copy_extents(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, "full")

    files, _ = overlapping_log()
    with pytest.raises(OSError, match="full"):
        apply_log(files, LOG, FullDisk(MIB))


def test_progress_rises_to_the_total() -> None:
    files, expected = overlapping_log()
    seen: list[Progress] = []
    apply_log(files, LOG, MemoryDisk(len(expected)), progress=seen.append)
    for phase in ("verify", "apply"):
        steps = [progress for progress in seen if progress.phase == phase]
        assert steps[-1].done_bytes == steps[-1].total_bytes
        assert [step.done_bytes for step in steps] == sorted(step.done_bytes for step in steps)


@pytest.mark.parametrize("sector_bytes", [512, 4096])
@pytest.mark.parametrize("metadata_bytes", [512, 4096], ids=["out of phase", "in phase"])
def test_holes_become_zeroes_of_the_disk_without_being_read(
    tmp_path: Path, sector_bytes: int, metadata_bytes: int
) -> None:
    path = tmp_path / "zeroes.hrl"
    writer = new_writer(OS_FILES, path, metadata_bytes=metadata_bytes)
    writer.append(rows((4096, 4096)), b"a" * 4096)
    writer.append_zeroes(0, 16 * MIB)
    writer.append(rows((8 * MIB, 4096)), b"b" * 4096)
    writer.append(rows((0, 4096)), b"c" * 4096)
    writer.close()
    disk = MemoryDisk(16 * MIB, content=b"\xee" * (16 * MIB), logical_sector_bytes=sector_bytes)
    report = apply_log(OS_FILES, path, disk)
    expected = bytearray(16 * MIB)
    expected[8 * MIB : 8 * MIB + 4096] = b"b" * 4096
    expected[0:4096] = b"c" * 4096
    assert disk.content == expected
    assert report.bytes_zeroed > 15 * MIB
    assert report.bytes_written == 16 * MIB


def test_huge_zeroes_cost_few_calls(tmp_path: Path) -> None:
    path = tmp_path / "zeroes.hrl"
    writer = new_writer(OS_FILES, path)
    writer.append_zeroes(0, 1 << 38)
    writer.close()
    disk = MemoryDisk(0)
    disk.virtual_bytes = 1 << 38
    disk.content = CountingBytes()  # type: ignore[assignment]
    zeroed: list[tuple[int, int]] = []
    disk.write_zeroes = lambda offset, length: zeroed.append((offset, length))  # type: ignore[method-assign]
    report = apply_log(OS_FILES, path, disk)
    assert report.bytes_zeroed == 1 << 38
    assert zeroed == [(0, 1 << 38)]


class CountingBytes(bytearray):
    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def sectors_of(columns: tuple[Any, ...]) -> set[tuple[int, int]]:
    """Return (disk offset, log offset) of every sector of some extents."""
    return {
        (offset + at, log + at)
        for offset, length, log in zip(*(column.tolist() for column in columns), strict=True)
        for at in range(0, length, 512)
    }


@given(
    st.lists(st.tuples(st.integers(1, 600), st.integers(0, 40)), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 300), st.integers(128, 900)), max_size=5),
    st.sampled_from([512, 4096]),
    st.integers(0, 1 << 32).map(Random),
)
def test_split_covers_every_sector_once_and_zeroes_only_holes(
    pieces: list[tuple[int, int]], gaps: list[tuple[int, int]], sector_bytes: int, random: Random
) -> None:
    order = list(range(len(pieces)))
    random.shuffle(order)
    log_at = {}
    at = 8192
    for index in order:
        log_at[index] = at
        at += pieces[index][0] * 8 * 512 + random.randrange(2) * 512
    disk_at, table = 0, []
    for index, (units, gap) in enumerate(pieces):
        table.append((disk_at, units * 8 * 512, log_at[index]))
        disk_at += (units + gap) * 8 * 512
    columns = tuple(np.array([row[column] for row in table], np.uint64) for column in range(3))
    hole_at, holes = 4096, []
    for gap, length in gaps:
        holes.append([hole_at + gap * 512, length * 512])
        hole_at = sum(holes[-1]) + 512
    kept, zeros = split_at_holes(columns, np.array(holes, np.int64).reshape(-1, 2), sector_bytes)  # type: ignore[arg-type]
    logs = dict(sectors_of(columns))
    copied = dict(sectors_of(kept))
    zeroed = [offset + step for offset, length in zeros.tolist() for step in range(0, length, 512)]
    assert len(copied) + len(zeroed) == len(logs)
    assert copied.keys() | set(zeroed) == logs.keys()
    assert all(logs[disk] == log for disk, log in copied.items())
    for sector in zeroed:
        assert any(start <= logs[sector] < start + length for start, length in holes)
    for column in (kept[0], kept[1], zeros[:, 0], zeros[:, 1]):
        assert not (column % np.uint64(sector_bytes)).any()
    assert (np.diff(kept[0].astype(np.int64)) > 0).all()
    assert (np.diff(zeros[:, 0].astype(np.int64)) > 0).all()


sectors = st.integers(0, 127)
step = st.one_of(
    st.tuples(st.just("write"), sectors, st.integers(1, 40)),
    st.tuples(st.just("zeroes"), sectors, st.integers(1, 128)),
    st.tuples(st.just("flush"), st.none(), st.none()),
)


@given(st.lists(step, max_size=60), st.integers(1, 60), st.integers(0, 1 << 32).map(Random))
def test_any_history_equals_the_model(history: list[Any], per_pass: int, random: Random) -> None:
    disk_bytes = 168 * 512
    model = bytearray(b"\x11" * disk_bytes)
    files = new_files()
    writer = new_writer(files, metadata_bytes=512)
    for verb, sector, count in history:
        if verb == "flush":
            writer.flush()
            continue
        offset, length = sector * 512, min(count, 168 - sector) * 512
        if verb == "write":
            data = random.randbytes(length)
            writer.append(rows((offset, length)), data)
        else:
            data = bytes(length)
            writer.append_zeroes(offset, length)
        model[offset : offset + length] = data
    writer.close()
    disk = MemoryDisk(disk_bytes, content=b"\x11" * disk_bytes)
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(apply, "ENTRIES_PER_PASS", per_pass)
        apply_log(files, LOG, disk)
    assert disk.content == model


def test_apply_through_the_kernels_on_a_real_file(tmp_path: Path) -> None:
    """The way that a raw disk takes: descriptors and native.copy_extents, two steps at a time."""
    disk_bytes = 8 * MIB
    path, image = tmp_path / "a.hrl", tmp_path / "disk.raw"
    writer = new_writer(OS_FILES, path)
    model = bytearray(disk_bytes)
    for index, (offset, length) in enumerate(
        random_extents(9000, disk_bytes=disk_bytes, length_bytes_max=4096).tolist()
    ):
        data = random_bytes(length, index)
        writer.append(rows((offset, length)), data)
        model[offset : offset + length] = data
    writer.close()
    with OS_FILES.open(image, create=True) as file:
        file.resize(disk_bytes)

        class RawDisk(MemoryDisk):
            def copy_extents(self, source_file: Any, source_offsets: Any, extents: Any) -> None:
                native.copy_extents(source_file, source_offsets, file, None, extents)

        disk = RawDisk(0)
        disk.virtual_bytes = disk_bytes
        apply_log(OS_FILES, path, disk)
    assert image.read_bytes() == bytes(model)
