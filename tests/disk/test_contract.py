"""What disk.Disk promises, for every kind of disk."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.disk import map_disk, open_disk
from hvreplica.errors import FieldOutOfRange, Locked
from hvreplica.files import OS_FILES
from hvreplica.units import MIB
from tests.disk.contract import SIZE, everything, make_disk, reopen
from tests.support.build import mixed_bytes, random_bytes, random_extents
from tests.support.disks import KINDS, parent_numbers
from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.disk import Disk


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    with make_disk(tmp_path / "a.disk", request.param) as disk:
        yield disk


def test_new_disk_reads_as_its_parent_or_as_zeros(disk: Disk) -> None:
    assert disk.virtual_bytes == SIZE
    expected = bytes(SIZE) if disk.parent is None else parent_numbers(SIZE).repeat(512).tobytes()
    assert everything(disk) == expected


def test_written_extents_read_back_and_last(disk: Disk) -> None:
    expected = bytearray(everything(disk))
    for round_number in range(4):
        extents = random_extents(40, disk_bytes=SIZE, seed=round_number, disjoint=True, length_bytes_max=MIB)
        data = mixed_bytes(int(extents[:, 1].sum()), seed=round_number)
        disk.write_extents(extents, data)
        at = 0
        for offset, length in extents.tolist():
            expected[offset : offset + length] = data[at : at + length]
            at += length
        out = bytearray(len(data))
        disk.read_extents(extents, out)
        assert out == data
    assert everything(disk) == expected
    again = reopen(disk)
    assert everything(again) == expected
    again.close()


def test_odd_offsets_and_lengths_are_fine(disk: Disk) -> None:
    expected = bytearray(everything(disk))
    disk.write(b"abc", MIB - 1)
    disk.write(b"", 5)
    expected[MIB - 1 : MIB + 2] = b"abc"
    assert everything(disk) == expected


def test_extents_without_bytes_among_others_change_nothing(disk: Disk) -> None:
    before = bytearray(everything(disk))
    disk.write_extents(np.array([[0, 0], [100, 50], [disk.virtual_bytes, 0], [7, 0]]), b"x" * 50)
    before[100:150] = b"x" * 50
    assert everything(disk) == before


def test_zeroed_ranges_read_as_zeros(disk: Disk) -> None:
    data = random_bytes(SIZE, seed=4)
    disk.write(data, 0)
    expected = bytearray(data)
    for offset, length in ((0, 512), (MIB - 5, 10), (2 * MIB - 1, 3 * MIB + 2), (SIZE - 100, 100), (7, 0)):
        disk.write_zeroes(offset, length)
        expected[offset : offset + length] = bytes(length)
    assert everything(disk) == expected
    disk.flush()
    disk.write(b"x" * MIB, 3 * MIB + 5)
    expected[3 * MIB + 5 : 4 * MIB + 5] = b"x" * MIB
    again = reopen(disk)
    assert everything(again) == expected
    again.write_zeroes(0, SIZE)
    assert not any(everything(again))
    again.close()


def test_extents_cover_every_byte_that_is_not_zero(disk: Disk) -> None:
    for offset, length in random_extents(20, disk_bytes=SIZE, seed=7).tolist():
        disk.write(random_bytes(length, seed=offset), offset)
    content = np.frombuffer(everything(disk), np.uint8)
    for start, end in ((0, SIZE), (5, SIZE - 5), (MIB + 3, MIB + 4), (3 * MIB, 5 * MIB), (SIZE, SIZE)):
        rows = disk.extents(start, end)
        outside = np.ones(SIZE, bool)
        outside[:start] = outside[end:] = False
        position = start
        for offset, length in rows.tolist():
            assert position <= offset
            assert length > 0
            position = offset + length
            outside[offset:position] = False
        assert position <= max(end, start)
        assert not content[outside].any()


def test_map_tiles_the_disk_and_agrees_with_extents(disk: Disk) -> None:
    disk.write(b"x" * 5000, 3 * MIB)
    disk.write(b"x" * 5000, SIZE - 5000)
    position = 0
    for entry in map_disk(disk):
        assert entry.start == position
        assert entry.length > 0
        assert entry.data != entry.zero
        position += entry.length
        if entry.zero:
            assert not len(disk.extents(entry.start, position)) or disk.format == "raw"
        else:
            assert entry.present
            assert entry.filename == str(disk.path if entry.depth == 0 else disk.parent.path)
            assert entry.offset is not None
    assert position == SIZE


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (-1, 1), (0, SIZE + 1), (SIZE - 1, 2)])
def test_ranges_beyond_the_end_are_refused_and_nothing_is_written(
    disk: Disk, offset: int, length: int
) -> None:
    before = everything(disk)
    for call in (
        lambda: disk.read_into(bytearray(length), offset),
        lambda: disk.write(b"x" * length, offset),
        lambda: disk.write_zeroes(offset, length),
        lambda: disk.write_extents(np.array([[0, 1], [offset, length]]), b"x" * (length + 1)),
    ):
        with pytest.raises(FieldOutOfRange):
            call()
    assert everything(disk) == before


def test_data_of_another_length_than_the_extents_is_refused(disk: Disk) -> None:
    before = everything(disk)
    for data in (b"x" * 10, b"x" * 12):
        with pytest.raises(ValueError):
            disk.write_extents(np.array([[0, 11]]), data)
    assert everything(disk) == before


def test_copied_extents_come_from_their_places(disk: Disk, tmp_path: Path) -> None:
    source_path = tmp_path / "source.bin"
    source_bytes = mixed_bytes(6 * MIB, seed=11)
    source_path.write_bytes(source_bytes)
    source = OS_FILES.open(source_path)
    expected = bytearray(everything(disk))
    for seed in range(3):
        extents = random_extents(60, disk_bytes=SIZE, seed=seed, disjoint=True, length_bytes_max=300_000)
        offsets = np.random.default_rng(seed).integers(0, 5 * MIB, len(extents))
        disk.copy_extents(source, offsets, extents)
        for at, (offset, length) in zip(offsets.tolist(), extents.tolist(), strict=True):
            expected[offset : offset + length] = source_bytes[at : at + length]
    assert everything(disk) == expected
    source.close()


def test_reading_only_refuses_every_change(disk: Disk) -> None:
    again = reopen(disk, writable=False)
    for call in (lambda: again.write(b"x", 0), lambda: again.write_zeroes(0, MIB)):
        with pytest.raises(OSError):
            call()
    again.flush()
    again.close()
    again.close()


def test_one_writer_at_a_time(disk: Disk) -> None:
    with pytest.raises(Locked):
        open_disk(OS_FILES, disk.path, writable=True, clock=FakeClock())
    open_disk(OS_FILES, disk.path, clock=FakeClock()).close()
    reopen(disk).close()


def test_four_threads_write_disjoint_ranges_while_another_flushes(disk: Disk) -> None:
    """Ranges interleave inside blocks, so that threads race for the allocation of the same block."""
    data = random_bytes(SIZE, seed=21)
    grain = 4096
    errors: list[BaseException] = []
    done = threading.Event()

    def write(thread: int) -> None:
        try:
            starts = np.arange(thread * grain, SIZE, 4 * grain)
            np.random.default_rng(thread).shuffle(starts)
            for group in np.array_split(starts, 40):
                rows = np.column_stack((group, np.full(len(group), grain)))
                disk.write_extents(rows, b"".join(data[at : at + grain] for at in group.tolist()))
        except BaseException as error:
            errors.append(error)

    def flush() -> None:
        try:
            while not done.is_set():
                disk.flush()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    flusher = threading.Thread(target=flush)
    for thread in (*threads, flusher):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    flusher.join()
    assert not errors
    assert everything(disk) == data
    again = reopen(disk, writable=False)
    assert everything(again) == data
    again.close()
