"""A power cut at any instant leaves a valid VHDX: what was flushed is there, the rest is old or new per sector."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import numpy as np
import pytest

from hvreplica.disk import create_disk, open_disk
from hvreplica.errors import FormatError
from hvreplica.units import MIB
from tests.support.disks import create_kind
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states
from tests.support.numbered import History, check_numbers, perform, read_numbers

PATH = Path("/vm/disk.vhdx")
KINDS = ("dynamic", "fixed", "differencing")
SECTOR = 512
BLOCKS = 6
SIZE = BLOCKS * MIB - 7 * SECTOR  # the last block ends inside
SECTORS = SIZE // SECTOR


def check_world(world: FaultFiles, history: History, *, writable: bool, killed: bool = False) -> None:
    with open_disk(world, PATH, writable=writable, clock=FakeClock(seed=5)) as disk:
        actual = read_numbers(disk)
    check_numbers(actual, world, history, killed=killed)


def record(seed: int, *, kind: str, steps: int) -> tuple[FaultFiles, History]:
    rng = random.Random(seed)
    clock = FakeClock(seed=seed)
    files = FaultFiles("/vm")
    history = History([create_kind(files, PATH, kind, virtual_bytes=SIZE, clock=clock)])
    files.settle()
    disk = open_disk(files, PATH, writable=True, clock=clock)
    perform(disk, files, history, rng, steps=steps, unit_bytes=MIB)
    disk.close()
    files.acknowledge(len(history.states) - 1)
    return files, history


@pytest.mark.parametrize("kind", KINDS)
def test_power_cut_anywhere_keeps_what_was_flushed(seed: int, kind: str) -> None:
    for round_number in range(3):
        files, history = record(seed * 100 + round_number, kind=kind, steps=24)
        for index, world in crash_states(files.trace(), seed=seed + round_number, limit=150, distinct=True):
            check_world(world, history, writable=index % 2 == 0)


@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_power_cut_during_recovery_is_recovered_again(seed: int, kind: str) -> None:
    """Replay twice equals replay once: the cut comes while the log of an earlier cut is replayed."""
    files, history = record(seed, kind=kind, steps=16)
    worlds = [world for _, world in crash_states(files.trace(), seed=seed, limit=60, distinct=True)]
    for number, world in enumerate(worlds[::4]):
        open_disk(world, PATH, writable=True, clock=FakeClock(seed=number)).abandon()
        for _, again in crash_states(world.trace(), seed=number, limit=25, distinct=True):
            again.notes = list(world.notes)
            check_world(again, history, writable=True)


@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_session_after_power_cut_works_and_is_clean(seed: int, kind: str) -> None:
    """What a cut leaves can be written, flushed and cut again: space is never given to two blocks."""
    files, _ = record(seed, kind=kind, steps=16)
    for number, (_, world) in enumerate(crash_states(files.trace(), seed=seed, limit=40)):
        clock = FakeClock(seed=number)
        with open_disk(world, PATH, writable=True, clock=clock) as disk:
            history = History([read_numbers(disk)])
            world.notes.clear()
            world.settle()
            perform(disk, world, history, random.Random(number), steps=8, unit_bytes=MIB)
        world.acknowledge(len(history.states) - 1)
        for _, again in crash_states(world.trace(), seed=number, limit=12, distinct=True):
            check_world(again, history, writable=True)
        with open_disk(world, PATH, clock=clock) as disk:
            assert disk.info().log == "clean"
            assert (read_numbers(disk) == history.states[-1]).all()


def test_power_cut_during_create_leaves_a_whole_disk_or_none(seed: int) -> None:
    files = FaultFiles("/vm")
    create_disk(files, PATH, virtual_bytes=SIZE, block_bytes=MIB, clock=FakeClock())
    files.acknowledge(0)
    for _, world in crash_states(files.trace(), seed=seed, limit=400, distinct=True):
        names = world.names(PATH.parent)
        if world.acknowledged:
            assert PATH.name in names, world.story
        if PATH.name in names:
            check_world(world, History([np.zeros(SECTORS, np.uint8)] * 2), writable=True)
        for name in names:
            if name != PATH.name:  # the temporary file: a whole disk, or refused
                try:
                    open_disk(world, PATH.with_name(name), format="vhdx", clock=FakeClock()).close()
                except FormatError:
                    continue


@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_kill_keeps_all_that_was_published(seed: int, kind: str) -> None:
    """A kill -9 loses no written byte of the file, but the table in memory: it is there as it was published."""
    files, history = record(seed, kind=kind, steps=20)
    for count in range(0, len(files.trace()), 7):
        again = FaultFiles("/vm")
        rng, clock = random.Random(seed), FakeClock(seed=seed)
        states = History([create_kind(again, PATH, kind, virtual_bytes=SIZE, clock=clock)])
        again.settle()
        again.kill_at(count)
        try:
            disk = open_disk(again, PATH, writable=True, clock=clock)
            perform(disk, again, states, rng, steps=20, unit_bytes=MIB)
        except BaseException as killed:  # Killed is no Exception, on purpose
            assert type(killed).__name__ == "Killed"
        again.heal()
        check_world(again.after_kill(), history, writable=True, killed=True)


def test_power_cut_in_a_flush_of_several_rounds(seed: int) -> None:
    """More changed BAT sectors than half of the log holds: rounds follow each other round the ring."""
    clock = FakeClock(seed=seed)
    files = FaultFiles("/vm")
    size = 1 << 40
    create_disk(files, PATH, virtual_bytes=size, block_bytes=MIB, clock=clock)
    files.settle()
    places = np.arange(300, dtype=np.int64) * 600 * MIB  # one BAT sector holds 512 entries
    extents = np.column_stack((places, np.full(300, SECTOR, np.int64)))
    disk = open_disk(files, PATH, writable=True, clock=clock)
    disk.write_extents(extents, b"\1" * (300 * SECTOR))
    disk.flush()
    files.acknowledge(1)
    disk.write_extents(extents + np.array([MIB, 0]), b"\2" * (300 * SECTOR))
    disk.write_zeroes(0, 200 * 600 * MIB - MIB)  # but for the last 100 of each
    disk.flush()
    files.acknowledge(2)
    disk.close()
    first, second = np.ones(300), np.zeros(300)
    for _, world in crash_states(files.trace(), seed=seed, limit=300, distinct=True):
        acknowledged = world.acknowledged[-1] if world.acknowledged else 0
        with open_disk(world, PATH, writable=True, clock=clock) as disk:
            for shift, value in ((0, 1), (MIB, 2)):
                buffer = bytearray(300 * SECTOR)
                disk.read_extents(extents + np.array([shift, 0]), buffer)
                rows = np.frombuffer(buffer, np.uint8).reshape(300, SECTOR)
                assert (rows == rows[:, :1]).all(), world.story
                assert set(rows[:, 0].tolist()) <= {0, value}, world.story
                (first if value == 1 else second)[:] = rows[:, 0]
        if acknowledged == 1:
            assert (first[200:] == 1).all(), world.story
        if acknowledged == 2:
            assert not first[:200].any(), world.story
            assert (first[200:] == 1).all(), world.story
            assert not second[:200].any(), world.story
            assert (second[200:] == 2).all(), world.story


def test_full_file_system_at_any_point_loses_nothing_that_was_flushed(seed: int) -> None:
    """No space for payload, log, BAT or headers: an OSError tells, and the file opens again when there is room."""
    rng_seed, refused = seed + 5, 0
    for capacity_kib in [*range(0, 1100, 60), 3000]:
        files = FaultFiles("/vm")
        clock = FakeClock(seed=seed)
        create_disk(files, PATH, virtual_bytes=SIZE, block_bytes=MIB, clock=clock)
        files.settle()
        files.capacity_bytes = capacity_kib * 1024
        history = History([np.zeros(SECTORS, np.uint8)])
        disk = open_disk(files, PATH, writable=True, clock=clock)
        try:
            perform(disk, files, history, random.Random(rng_seed), steps=20, unit_bytes=MIB)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            refused += 1
        disk.abandon()
        world = files.after_kill()
        world.capacity_bytes = None
        check_world(world, history, writable=True)
    assert refused > 5


def test_failed_sync_ends_the_session(seed: int) -> None:
    """After a failed flush no write and no flush claims success, and the file is as the last good flush left it."""
    files = FaultFiles("/vm")
    clock = FakeClock(seed=seed)
    create_disk(files, PATH, virtual_bytes=SIZE, block_bytes=MIB, clock=clock)
    files.settle()
    disk = open_disk(files, PATH, writable=True, clock=clock)
    disk.write(b"\1" * SECTOR, 0)
    disk.flush()
    files.acknowledge(1)
    disk.write(b"\2" * SECTOR, 3 * MIB)
    files.fail("sync", path=str(PATH))
    with pytest.raises(OSError, match=r"."):
        disk.flush()
    for call in (disk.flush, lambda: disk.write(b"\3" * SECTOR, 0), disk.close):
        with pytest.raises(OSError, match=r"."):
            call()
    before = np.zeros(SECTORS, np.uint8)
    after_one, after_two = before.copy(), before.copy()
    after_one[0] = after_two[0] = 1
    after_two[3 * MIB // SECTOR] = 2
    history = History([before, after_one, after_two])
    files.note("step", 1)
    for _, world in crash_states(files.trace(), seed=seed, limit=200, distinct=True):
        if world.acknowledged:
            world.note("step", 1)
            check_world(world, history, writable=True)


def test_power_cut_in_a_flush_of_several_rounds_over_a_parent(seed: int) -> None:
    """BAT entries, bitmap entries and bitmaps of one block go in different rounds: none may miss another."""
    clock = FakeClock(seed=seed)
    files = FaultFiles("/vm")
    parent = PATH.with_name("parent.vhdx")
    size, count = 1 << 40, 121  # odd: a round ends between the two entries of a block
    places = np.arange(count, dtype=np.int64) * (8 << 30) + MIB  # a chunk of 1 MiB blocks has 4 GiB
    extents = np.column_stack((places, np.full(count, 2 * SECTOR, np.int64)))
    create_disk(files, parent, virtual_bytes=size, block_bytes=MIB, clock=clock)
    with open_disk(files, parent, writable=True, clock=clock) as disk:
        disk.write_extents(extents, b"\7" * (count * 2 * SECTOR))
    create_disk(files, PATH, block_bytes=MIB, parent=parent, clock=clock)
    files.settle()
    disk = open_disk(files, PATH, writable=True, clock=clock)
    disk.write_extents(extents - np.array([0, SECTOR]), b"\1" * (count * SECTOR))
    disk.flush()
    files.acknowledge(1)
    disk.close()
    for index, world in crash_states(files.trace(), seed=seed, limit=300, distinct=True):
        with open_disk(world, PATH, writable=index % 2 == 0, clock=clock) as disk:
            buffer = bytearray(count * 2 * SECTOR)
            disk.read_extents(extents, buffer)
        rows = np.frombuffer(buffer, np.uint8).reshape(count, 2, SECTOR)
        assert (rows == rows[:, :, :1]).all(), world.story
        assert (rows[:, 1, 0] == 7).all(), world.story
        assert set(rows[:, 0, 0].tolist()) <= ({1} if world.acknowledged else {1, 7}), world.story
