"""A power cut while a disk is resized leaves it with the old size or the new one, and exactly its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.disk import create_disk, open_disk
from hvreplica.disk.resize import resize_disk
from hvreplica.formats.vhd_footer import unpack_footer
from hvreplica.units import GIB, KIB, MIB
from tests.support.disks import KINDS, create_kind
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states

if TYPE_CHECKING:
    from hvreplica.disk import Disk

SECTOR = 512
SHORT = 3 * MIB + 5 * 4096  # ends inside of a block
LONG = 9 * MIB + 4096
GARBAGE = 0xEE


def path_of(kind: str) -> Path:
    return Path(f"/vm/disk.{KINDS[kind][0]}")


def numbers_of(disk: Disk, virtual_bytes: int) -> np.ndarray:
    """Return one byte of each sector of the first `virtual_bytes`; fails if a sector is not uniform."""
    buffer = bytearray(min(virtual_bytes, disk.virtual_bytes))
    disk.read_into(buffer, 0)
    sectors = np.frombuffer(buffer, np.uint8).reshape(-1, SECTOR)
    assert (sectors == sectors[:, :1]).all()
    return sectors[:, 0]


def make(files: FaultFiles, kind: str, *, parent_longer: bool = False) -> np.ndarray:
    """Make a disk of SHORT bytes with data to its end, and return the number in each of its sectors.

    parent_longer: its parent has LONG bytes, with data behind the end of the child.
    """
    clock, path = FakeClock(), path_of(kind)
    if parent_longer:
        format_, _, sector_bytes, _ = KINDS[kind]
        parent = path.with_name(f"long parent.{format_}")
        create_disk(
            files, parent, virtual_bytes=LONG, format=format_, logical_sector_bytes=sector_bytes, clock=clock
        )
        with open_disk(files, parent, writable=True, clock=clock) as disk:
            disk.write(bytes([GARBAGE]) * LONG, 0)
        block_bytes = MIB if format_ == "vhdx" else 512 * KIB
        create_disk(
            files,
            path,
            virtual_bytes=SHORT,
            format=format_,
            parent=parent,
            block_bytes=block_bytes,
            clock=clock,
        )
    else:
        create_kind(files, path, kind, virtual_bytes=SHORT, clock=clock)
    with open_disk(files, path, writable=True, clock=clock) as disk:
        disk.write(bytes([1]) * (5 * 4096), MIB - 8192)
        disk.write_zeroes(2 * MIB, 8192)
        if not parent_longer:
            disk.write(bytes([2]) * 4096, SHORT - 4096)
        return numbers_of(disk, SHORT).copy()


def spoil_tail(files: FaultFiles, kind: str) -> None:
    """Put garbage behind the end of the disk into its last block, as writers may leave it there."""
    path = path_of(kind)
    with open_disk(files, path, clock=FakeClock()) as disk:
        last = list(disk.stretches(SHORT - 4096, SHORT))[-1]
        block_bytes = disk.block_bytes
    if last.file_offset is None or not block_bytes:
        return
    at = last.file_offset + last.length
    length = block_bytes - SHORT % block_bytes
    with files.open(path, writable=True) as file:
        if at + length <= file.size():
            file.write(bytes([GARBAGE]) * length, at)


def check(world: FaultFiles, path: Path, numbers: np.ndarray, sizes: set[int]) -> int:
    """Fail unless the disk has one of `sizes`, its bytes, and zeros behind them; return its size."""
    with open_disk(world, path, writable=False, clock=FakeClock(seed=3)) as disk:
        assert disk.virtual_bytes in sizes, world.story
        found = numbers_of(disk, 2 * LONG)
        common = min(len(found), len(numbers))
        wrong = np.flatnonzero(found[:common] != numbers[:common])
        assert not len(wrong), f"{world.story}: sector {wrong[0]} holds {found[wrong[0]]}"
        assert not found[common:].any(), f"{world.story}: size {disk.virtual_bytes}"
        return disk.virtual_bytes


def cut_everywhere(
    files: FaultFiles, kind: str, numbers: np.ndarray, sizes: set[int], target: int, seed: int
) -> None:
    path = path_of(kind)
    seen = set()
    for index, world in crash_states(files.trace(), seed=seed, limit=140, distinct=True):
        seen.add(check(world, path, numbers, sizes))
        if index % 3 == 0:
            resize_disk(world, path, target, clock=FakeClock(seed=index))
            assert check(world, path, numbers, {target}) == target
            if index % 2 == 0:
                for _, again in crash_states(world.trace(), seed=index, limit=15, distinct=True):
                    check(again, path, numbers, sizes)
    assert seen == sizes


@pytest.mark.parametrize("target", [LONG, 200 * GIB])
@pytest.mark.parametrize("kind", list(KINDS))
def test_growing(seed: int, kind: str, target: int) -> None:
    if target > LONG and "fixed" in kind:
        pytest.skip("a fixed disk of this size takes long")
    files = FaultFiles("/vm")
    numbers = make(files, kind)
    spoil_tail(files, kind)
    files.settle()
    resize_disk(files, path_of(kind), target, clock=FakeClock(seed=seed))
    files.acknowledge(target)
    cut_everywhere(files, kind, numbers, {SHORT, target}, target, seed)


@pytest.mark.parametrize("kind", ["differencing", "differencing-4096", "vhd-differencing"])
def test_growing_over_a_longer_parent(seed: int, kind: str) -> None:
    """At no moment the guest sees what the parent holds behind the old end of its child."""
    files = FaultFiles("/vm")
    numbers = make(files, kind, parent_longer=True)
    files.settle()
    target = LONG + 3 * MIB
    resize_disk(files, path_of(kind), target, clock=FakeClock(seed=seed))
    cut_everywhere(files, kind, numbers, {SHORT, target}, target, seed)


@pytest.mark.parametrize("kind", list(KINDS))
def test_shrinking(seed: int, kind: str) -> None:
    files = FaultFiles("/vm")
    clock, path = FakeClock(), path_of(kind)
    numbers = make(files, kind)
    if KINDS[kind][3]:
        resize_disk(files, path, LONG, clock=clock)
    else:
        files.unlink(path)
        create_kind(files, path, kind, virtual_bytes=LONG, clock=clock)
        with open_disk(files, path, writable=True, clock=clock) as disk:
            disk.write(np.repeat(numbers, SECTOR).data, 0)
    with open_disk(files, path, writable=True, clock=clock) as disk:
        disk.write(bytes([9]) * (2 * MIB), 5 * MIB)
        disk.flush()
        disk.write(bytes(2 * MIB), 5 * MIB)  # zeros that have a place
        disk.write(bytes([9]) * 4096, 8 * MIB)
        disk.write_zeroes(8 * MIB, 4096)
    files.settle()
    resize_disk(files, path, SHORT, clock=FakeClock(seed=seed))
    cut_everywhere(files, kind, numbers, {SHORT, LONG}, SHORT, seed)


@pytest.mark.parametrize("kind", ["vhd-dynamic", "vhd-fixed", "vhd-differencing"])
def test_vhd_has_its_footer_at_its_end_at_any_moment_that_lasts(seed: int, kind: str) -> None:
    files = FaultFiles("/vm")
    make(files, kind)
    files.settle()
    path = path_of(kind)
    resize_disk(files, path, 200 * GIB if kind != "vhd-fixed" else LONG, clock=FakeClock(seed=seed))
    resize_disk(files, path, SHORT, clock=FakeClock(seed=seed))
    content = files.content_of(path)
    footer = unpack_footer(content[-512:], file_offset=len(content) - 512)
    footer.validate()
    assert footer.current_size == SHORT
    assert footer.is_fixed or content[:512] == content[-512:]


@pytest.mark.parametrize("kind", ["differencing", "vhd-differencing"])
def test_shrinking_over_a_longer_parent(seed: int, kind: str) -> None:
    """Blocks of zeros that hide the parent's bytes are given back, and at no moment those bytes show."""
    files = FaultFiles("/vm")
    numbers = make(files, kind, parent_longer=True)
    resize_disk(files, path_of(kind), LONG, clock=FakeClock())
    before = files.open(path_of(kind)).size()
    files.settle()
    resize_disk(files, path_of(kind), SHORT, clock=FakeClock(seed=seed))
    assert files.open(path_of(kind)).size() < before or kind == "differencing"
    cut_everywhere(files, kind, numbers, {SHORT, LONG}, SHORT, seed)


def test_sector_bitmaps_go_after_the_blocks_that_need_them(seed: int) -> None:
    """More changes than one entry of the log holds: a cut may keep the first entry alone."""
    files, clock, path = FaultFiles("/vm"), FakeClock(), path_of("differencing")
    size, first = 80 * GIB, GIB
    create_disk(files, path.with_name("base.vhdx"), virtual_bytes=size, block_bytes=MIB, clock=clock)
    create_disk(files, path, block_bytes=MIB, parent=path.with_name("base.vhdx"), clock=clock)
    places = np.arange(first, size, 512 * MIB, dtype=np.int64)  # one in each page of the BAT
    extents = np.column_stack((places, np.full(len(places), 4096)))
    with open_disk(files, path, writable=True, clock=clock) as disk:
        disk.write_extents(extents, b"\1" * (len(places) * 4096))
        disk.flush()
        disk.write_extents(extents, bytes(len(places) * 4096))
    files.settle()
    resize_disk(files, path, first, clock=FakeClock(seed=seed))
    for _, world in crash_states(files.trace(), seed=seed, limit=200, distinct=True):
        with open_disk(world, path, clock=clock) as disk:
            if disk.virtual_bytes == size:
                buffer = bytearray(len(places) * 4096)
                disk.read_extents(extents, buffer)
                assert not any(buffer), world.story
            else:
                assert disk.virtual_bytes == first
