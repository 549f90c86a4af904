"""A power cut at any instant leaves a valid VHD: what was flushed is there, the rest is old or new per sector."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import numpy as np
import pytest

from hvreplica.disk import create_disk, open_disk
from hvreplica.errors import FormatError
from hvreplica.formats.vhd_footer import choose_footer, unpack_footer
from hvreplica.units import KIB, MIB
from tests.support.disks import create_kind
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states
from tests.support.numbered import History, check_numbers, perform, read_numbers

PATH = Path("/vm/disk.vhd")
KINDS = ("vhd-dynamic", "vhd-fixed", "vhd-differencing")
GROWING = ("vhd-dynamic", "vhd-differencing")
SECTOR = 512
UNIT = 512 * KIB
SIZE = 6 * UNIT - 7 * SECTOR  # the last block ends inside


def check_world(world: FaultFiles, history: History, *, writable: bool, killed: bool = False) -> None:
    with open_disk(world, PATH, writable=writable, clock=FakeClock(seed=5)) as disk:
        actual = read_numbers(disk)
    check_numbers(actual, world, history, killed=killed)
    if writable:
        check_footers(world)


def check_footers(world: FaultFiles) -> None:
    """After any session there is a valid footer at the end, equal to the copy where there is one."""
    content = world.content_of(PATH)
    tail = unpack_footer(content[-512:], file_offset=len(content) - 512)
    assert choose_footer([tail], tail, file_size_bytes=len(content)) is tail, world.story
    assert tail.is_fixed or content[:512] == content[-512:], world.story


def record(seed: int, *, kind: str, steps: int) -> tuple[FaultFiles, History]:
    clock = FakeClock(seed=seed)
    files = FaultFiles("/vm")
    history = History([create_kind(files, PATH, kind, virtual_bytes=SIZE, clock=clock)])
    files.settle()
    disk = open_disk(files, PATH, writable=True, clock=clock)
    perform(disk, files, history, random.Random(seed), steps=steps, unit_bytes=UNIT)
    disk.close()
    files.acknowledge(len(history.states) - 1)
    return files, history


@pytest.mark.parametrize("kind", KINDS)
def test_power_cut_anywhere_keeps_what_was_flushed(seed: int, kind: str) -> None:
    for round_number in range(3):
        files, history = record(seed * 100 + round_number, kind=kind, steps=24)
        for index, world in crash_states(files.trace(), seed=seed + round_number, limit=150, distinct=True):
            check_world(world, history, writable=index % 2 == 0)


@pytest.mark.parametrize("kind", GROWING)
def test_power_cut_while_the_footer_is_restored_is_recovered_again(seed: int, kind: str) -> None:
    files, history = record(seed, kind=kind, steps=16)
    worlds = [world for _, world in crash_states(files.trace(), seed=seed, limit=60, distinct=True)]
    for number, world in enumerate(worlds[::4]):
        open_disk(world, PATH, writable=True, clock=FakeClock(seed=number)).abandon()
        for _, again in crash_states(world.trace(), seed=number, limit=25, distinct=True):
            again.notes = list(world.notes)
            check_world(again, history, writable=True)


@pytest.mark.parametrize("kind", GROWING)
def test_session_after_power_cut_works(seed: int, kind: str) -> None:
    """What a cut leaves can be written, flushed and cut again: space is never given to two blocks."""
    files, _ = record(seed, kind=kind, steps=16)
    for number, (_, world) in enumerate(crash_states(files.trace(), seed=seed, limit=40)):
        clock = FakeClock(seed=number)
        with open_disk(world, PATH, writable=True, clock=clock) as disk:
            history = History([read_numbers(disk)])
            world.notes.clear()
            world.settle()
            perform(disk, world, history, random.Random(number), steps=8, unit_bytes=UNIT)
        world.acknowledge(len(history.states) - 1)
        for _, again in crash_states(world.trace(), seed=number, limit=12, distinct=True):
            check_world(again, history, writable=True)
        with open_disk(world, PATH, clock=clock) as disk:
            assert (read_numbers(disk) == history.states[-1]).all()


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_power_cut_during_create_leaves_a_whole_disk_or_none(seed: int, kind: str) -> None:
    files = FaultFiles("/vm")
    create_disk(files, PATH, virtual_bytes=SIZE, format="vhd", type=kind, clock=FakeClock())
    files.acknowledge(0)
    for _, world in crash_states(files.trace(), seed=seed, limit=400, distinct=True):
        names = world.names(PATH.parent)
        if world.acknowledged:
            assert PATH.name in names, world.story
        if PATH.name in names:
            check_world(world, History([np.zeros(SIZE // SECTOR, np.uint8)] * 2), writable=True)
        for name in names:
            if name != PATH.name:  # the temporary file: a whole disk, or refused
                try:
                    open_disk(world, PATH.with_name(name), format="vhd", clock=FakeClock()).close()
                except FormatError:
                    continue


@pytest.mark.parametrize("kind", GROWING)
def test_kill_keeps_all_that_was_published(seed: int, kind: str) -> None:
    """A kill -9 loses no written byte of the file, but the table in memory: it is there as it was published."""
    files, history = record(seed, kind=kind, steps=20)
    for count in range(0, len(files.trace()), 5):
        again = FaultFiles("/vm")
        rng, clock = random.Random(seed), FakeClock(seed=seed)
        states = History([create_kind(again, PATH, kind, virtual_bytes=SIZE, clock=clock)])
        again.settle()
        again.kill_at(count)
        try:
            disk = open_disk(again, PATH, writable=True, clock=clock)
            perform(disk, again, states, rng, steps=20, unit_bytes=UNIT)
        except BaseException as killed:  # Killed is no Exception, on purpose
            assert type(killed).__name__ == "Killed"
        again.heal()
        check_world(again.after_kill(), history, writable=True, killed=True)


@pytest.mark.parametrize("kind", GROWING)
def test_full_file_system_at_any_point_loses_nothing_that_was_flushed(seed: int, kind: str) -> None:
    """No space for payload, bitmaps, BAT or footer: an OSError tells, and the file opens again when there is room."""
    refused = 0
    for capacity_kib in [*range(0, 700, 20), 3000]:
        files = FaultFiles("/vm")
        clock = FakeClock(seed=seed)
        history = History([create_kind(files, PATH, kind, virtual_bytes=SIZE, clock=clock)])
        files.settle()
        files.capacity_bytes = capacity_kib * KIB + (0 if kind == "vhd-dynamic" else SIZE)
        disk = open_disk(files, PATH, writable=True, clock=clock)
        try:
            perform(disk, files, history, random.Random(seed + 5), steps=20, unit_bytes=UNIT)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            refused += 1
        disk.abandon()
        world = files.after_kill()
        world.capacity_bytes = None
        check_world(world, history, writable=True)
    assert refused > 3


def test_failed_sync_ends_the_session(seed: int) -> None:
    """After a failed flush no write and no flush claims success, and the file is as the last good flush left it."""
    files = FaultFiles("/vm")
    clock = FakeClock(seed=seed)
    create_disk(files, PATH, virtual_bytes=SIZE, format="vhd", block_bytes=UNIT, clock=clock)
    files.settle()
    disk = open_disk(files, PATH, writable=True, clock=clock)
    history = History([np.zeros(SIZE // SECTOR, np.uint8)])
    history.step(0, 1, 1)
    disk.write(b"\1" * SECTOR, 0)
    disk.flush()
    files.acknowledge(1)
    history.step(3 * UNIT // SECTOR, 1, 2)
    disk.write(b"\2" * SECTOR, 3 * UNIT)
    files.fail("sync", path=str(PATH))
    with pytest.raises(OSError, match=r"."):
        disk.flush()
    for call in (disk.flush, lambda: disk.write(b"\3" * SECTOR, 0), disk.close):
        with pytest.raises(OSError, match=r"."):
            call()
    files.note("step", 1)
    for _, world in crash_states(files.trace(), seed=seed, limit=200, distinct=True):
        if world.acknowledged:
            world.note("step", 1)
            check_world(world, history, writable=True)


def test_blocks_given_back_are_used_again_and_only_after_the_flush(seed: int) -> None:
    """Zeroed, flushed, taken again in many rounds: the file does not grow, and no cut mixes two lives of a place."""
    files = FaultFiles("/vm")
    clock = FakeClock(seed=seed)
    create_disk(files, PATH, virtual_bytes=4 * MIB, format="vhd", block_bytes=UNIT, clock=clock)
    files.settle()
    history = History([np.zeros(4 * MIB // SECTOR, np.uint8)])
    rng = random.Random(seed)
    disk = open_disk(files, PATH, writable=True, clock=clock)
    sizes = []
    for _ in range(12):
        for block in rng.sample(range(8), 3):
            number = len(history.states)
            history.step(block * UNIT // SECTOR, UNIT // SECTOR, number)
            disk.write(bytes([number]) * UNIT, block * UNIT)
            files.note("step", number)
        disk.flush()
        files.acknowledge(len(history.states) - 1)
        history.step(0, 4 * MIB // SECTOR, 0)
        disk.write_zeroes(0, 4 * MIB)
        files.note("step", len(history.states) - 1)
        if rng.random() < 0.5:
            disk.flush()
            files.acknowledge(len(history.states) - 1)
        sizes.append(files.open(PATH).size())
    disk.close()
    files.acknowledge(len(history.states) - 1)
    assert max(sizes) < 8 * (UNIT + 4096)
    for index, world in crash_states(files.trace(), seed=seed, limit=200, distinct=True):
        check_world(world, history, writable=index % 2 == 0)
