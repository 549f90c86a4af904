"""A power cut while a disk is compacted leaves all of its bytes; the same call again finishes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from hvreplica.disk import create_disk, open_disk
from hvreplica.disk.compact import compact_disk
from hvreplica.disk.resize import resize_disk
from hvreplica.disk.vhd.create import HEADER_OFFSET
from hvreplica.errors import FormatError
from hvreplica.units import GIB, KIB, MIB
from tests.support.disks import KINDS, create_kind
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states
from tests.support.numbered import History, perform, read_numbers

KINDS_COMPACTED = (
    "dynamic",
    "dynamic-4096",
    "differencing",
    "differencing-4096",
    "vhd-dynamic",
    "vhd-differencing",
)
SECTOR = 512


def path_of(kind: str) -> Path:
    return Path(f"/vm/disk.{KINDS[kind][0]}")


def make(files: FaultFiles, kind: str, seed: int, *, blocks: int = 12) -> np.ndarray:
    """Make a disk whose file has gaps, blocks of zeros, and blocks in no order; return its sectors' numbers."""
    clock, path = FakeClock(), path_of(kind)
    block = MIB if KINDS[kind][0] == "vhdx" else 512 * KIB
    size = blocks * block - 3 * 4096
    numbers = create_kind(files, path, kind, virtual_bytes=size, clock=clock).copy()
    rng = random.Random(seed)
    order = rng.sample(range(blocks), blocks)
    if kind == "vhd-differencing":
        # Zeros over anything else of a parent must stay; so some of them are over zeros.
        with open_disk(files, path.with_name(f"parent of {path.name}"), writable=True, clock=clock) as disk:
            for index in order[: blocks // 2 - 2]:
                start, end = index * block, min((index + 1) * block, size)
                disk.write(bytes(end - start), start)
                numbers[start // SECTOR : end // SECTOR] = 0
    with open_disk(files, path, writable=True, clock=clock) as disk:
        for number, index in enumerate(order, 1):
            start, end = index * block, min((index + 1) * block, size)
            if index % 2:
                start, end = start + 8192, min(start + 65536, end)
            disk.write(bytes([number]) * (end - start), start)
            numbers[start // SECTOR : end // SECTOR] = number
            disk.flush()
        for index in order[: blocks // 2]:
            start, end = index * block, min((index + 1) * block, size)
            disk.write(bytes(end - start), start)  # zeros that have a place
            numbers[start // SECTOR : end // SECTOR] = 0
        assert (read_numbers(disk) == numbers).all()
    files.settle()
    return numbers


def check(world: FaultFiles, kind: str, numbers: np.ndarray) -> None:
    with open_disk(world, path_of(kind), clock=FakeClock(seed=3)) as disk:
        found = read_numbers(disk)
    wrong = np.flatnonzero(found != numbers)
    assert not len(wrong), f"{world.story}: sector {wrong[0]} holds {found[wrong[0]]}"


@pytest.mark.parametrize("kind", KINDS_COMPACTED)
def test_power_cut_anywhere(seed: int, kind: str) -> None:
    files, path = FaultFiles("/vm"), path_of(kind)
    numbers = make(files, kind, seed)
    report = compact_disk(files, path, clock=FakeClock(seed=seed))
    assert report.won_bytes > MIB
    assert report.moved_bytes > 0
    for index, world in crash_states(files.trace(), seed=seed, limit=160, distinct=True):
        check(world, kind, numbers)
        if index % 4 == 0:
            again = compact_disk(world, path, clock=FakeClock(seed=index))
            assert again.file_bytes <= report.file_bytes, world.story
            check(world, kind, numbers)
            for _, cut in crash_states(world.trace(), seed=index, limit=12, distinct=True):
                check(cut, kind, numbers)


@pytest.mark.parametrize("kind", KINDS_COMPACTED)
def test_what_a_cut_leaves_can_be_written(seed: int, kind: str) -> None:
    """No place belongs to two blocks, and none that is in use counts as free."""
    files, path = FaultFiles("/vm"), path_of(kind)
    numbers = make(files, kind, seed)
    compact_disk(files, path, clock=FakeClock(seed=seed))
    for number, (_, world) in enumerate(crash_states(files.trace(), seed=seed, limit=40)):
        history = History([numbers])
        clock = FakeClock(seed=number)
        with open_disk(world, path, writable=True, clock=clock) as disk:
            perform(disk, world, history, random.Random(number), steps=10, unit_bytes=MIB)
        check(world, kind, history.states[-1])
        compact_disk(world, path, clock=clock)
        check(world, kind, history.states[-1])


def test_children_still_know_a_compacted_parent(seed: int) -> None:
    files = FaultFiles("/vm")
    make(files, "dynamic", seed)
    child = Path("/vm/child.vhdx")
    create_disk(files, child, parent=path_of("dynamic"), clock=FakeClock())
    assert compact_disk(files, path_of("dynamic"), clock=FakeClock(seed=9)).won_bytes > 0
    open_disk(files, child, clock=FakeClock()).close()


@pytest.mark.parametrize("kind", ["dynamic", "vhd-dynamic"])
def test_compacting_after_a_growth_that_moved_the_table(seed: int, kind: str) -> None:
    files, path = FaultFiles("/vm"), path_of(kind)
    numbers = make(files, kind, seed)
    resize_disk(files, path, 300 * GIB, clock=FakeClock())
    grown = files.open(path).size()
    files.settle()
    before = compact_disk(files, path, clock=FakeClock(seed=seed)).file_bytes
    assert before < grown - 5 * 512 * KIB  # the table at its end does not hold it
    check_start(files, path, numbers, seed)
    with open_disk(files, path, writable=True, clock=FakeClock()) as disk:
        disk.write(bytes([5]) * (8 * MIB), GIB)
        disk.flush()
        disk.write_zeroes(GIB, 8 * MIB)
    files.settle()
    assert compact_disk(files, path, clock=FakeClock(seed=seed)).file_bytes == before
    check_start(files, path, numbers, seed)


def check_start(files: FaultFiles, path: Path, numbers: np.ndarray, seed: int) -> None:
    for _, world in crash_states(files.trace(), seed=seed, limit=100, distinct=True):
        with open_disk(world, path, clock=FakeClock()) as disk:
            buffer = bytearray(len(numbers) * SECTOR)
            disk.read_into(buffer, 0)
            assert (np.frombuffer(buffer, np.uint8)[::SECTOR] == numbers).all(), world.story


def test_failed_sync_is_told_and_nothing_is_lost(seed: int) -> None:
    for at in range(1, 12, 2):
        files, path = FaultFiles("/vm"), path_of("dynamic")
        numbers = make(files, "dynamic", seed)
        files.fail("sync", at=at, path=str(path))
        with pytest.raises((OSError, FormatError)):
            compact_disk(files, path, clock=FakeClock())
        for _, world in crash_states(files.trace(), seed=seed, limit=20, distinct=True):
            check(world, "dynamic", numbers)


def test_header_of_a_vhd_changes_when_nothing_is_pending(seed: int) -> None:
    """It points to a table that is durable, growing and compacting; and it is durable before what follows."""
    files, path = FaultFiles("/vm"), path_of("vhd-dynamic")
    make(files, "vhd-dynamic", seed)
    for size in (300 * GIB, 400 * GIB):
        resize_disk(files, path, size, clock=FakeClock())
        compact_disk(files, path, clock=FakeClock())
    pending: list[str] = []
    seen = 0
    for event in files.trace().events:
        if event.kind == "sync":
            pending.clear()
        elif event.kind in {"write", "zero", "resize"}:
            if event.kind == "write" and event.offset == HEADER_OFFSET:
                assert pending == []
                seen += 1
            else:
                assert "header" not in pending
            pending.append("header" if event.offset == HEADER_OFFSET else str(event))
    assert seen == 3  # the second growth finds a table at the end that is compacted no more
