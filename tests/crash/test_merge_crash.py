"""A power cut at any instant of a merge leaves a chain that shows the same bytes, and the same call finishes it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from hvreplica.disk import create_disk, merge_disk, open_disk
from hvreplica.disk.open import open_layer
from hvreplica.units import KIB, MIB
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states
from tests.support.numbered import SECTOR_BYTES, History, perform, read_numbers

FORMATS = ("vhdx", "vhd")
UNIT = {"vhdx": MIB, "vhd": 512 * KIB}
BLOCKS = 5


def build(files: FaultFiles, ending: str, seed: int, *, child_bytes: int | None = None) -> np.ndarray:
    """Make grandparent, parent and child, and return the number in each sector that the child shows."""
    unit = UNIT[ending]
    paths = [names(ending)[name] for name in ("grandparent", "parent", "child")]
    parent = None
    for number, path in enumerate(paths):
        size = BLOCKS * unit - 7 * SECTOR_BYTES if parent is None else None
        if path.stem == "child" and child_bytes is not None:
            size = child_bytes
        clock = FakeClock(seed=seed * 10 + number)
        create_disk(
            files, path, virtual_bytes=size, format=ending, block_bytes=unit, parent=parent, clock=clock
        )  # type: ignore[arg-type]
        with open_disk(files, path, writable=True, clock=clock) as disk:
            history = History([read_numbers(disk)])
            perform(disk, files, history, random.Random(seed + number), steps=8, unit_bytes=unit)
        parent = path
    files.settle()
    return history.states[-1]


def names(ending: str) -> dict[str, Path]:
    return {name: Path(f"/vm/{name}.{ending}") for name in ("grandparent", "parent", "child")}


def shown(world: FaultFiles, path: Path, *, writable: bool = False) -> np.ndarray:
    with open_disk(world, path, writable=writable, clock=FakeClock(seed=5)) as disk:
        return read_numbers(disk)


def merge(files: FaultFiles, ending: str, *, seed: int = 70, keep: bool = False) -> None:
    merge_disk(files, names(ending)["child"], keep=keep, clock=FakeClock(seed=seed))


def check(world: FaultFiles, ending: str, expected: np.ndarray, *, writable: bool) -> None:
    """Fail unless the chain opens by what is left of it, and shows what it showed."""
    paths = names(ending)
    top = paths["child"] if world.exists(paths["child"]) else paths["parent"]
    actual = shown(world, top, writable=writable)
    # A shorter child leaves zeros behind its end.
    wrong = np.flatnonzero(actual[: len(expected)] != expected)
    assert not len(wrong), f"{world.story}: sector {wrong[0]} of {top}"
    assert not actual[len(expected) :].any(), world.story


@pytest.mark.parametrize("what_then", ["keep", "remove"])
@pytest.mark.parametrize("ending", FORMATS)
def test_power_cut_anywhere_shows_the_same_and_is_finished_by_the_same_call(
    ending: str, what_then: str, seed: int
) -> None:
    keep = what_then == "keep"
    files = FaultFiles("/vm")
    expected = build(files, ending, seed)
    merge(files, ending, keep=keep)
    files.acknowledge("merged")
    paths = names(ending)
    for index, world in crash_states(files.trace(), seed=seed, limit=150, distinct=True):
        assert "merged" not in world.acknowledged or world.exists(paths["child"]) == keep
        check(world, ending, expected, writable=index % 3 == 0)
        if world.exists(paths["child"]):
            merge(world, ending, keep=keep, seed=71 + index % 2)
        check(world, ending, expected, writable=True)
        assert (shown(world, paths["parent"]) == expected).all(), world.story
        assert world.exists(paths["child"]) == keep, world.story


@pytest.mark.parametrize("ending", FORMATS)
def test_power_cut_while_a_merge_is_finished(ending: str, seed: int) -> None:
    files = FaultFiles("/vm")
    expected = build(files, ending, seed)
    merge(files, ending)
    worlds = [world for _, world in crash_states(files.trace(), seed=seed, limit=60, distinct=True)]
    for number, world in enumerate(worlds[::4]):
        if not world.exists(names(ending)["child"]):
            continue
        world.settle()
        merge(world, ending, seed=80 + number)
        for index, again in crash_states(world.trace(), seed=number, limit=20, distinct=True):
            check(again, ending, expected, writable=index % 2 == 0)


@pytest.mark.parametrize("ending", FORMATS)
def test_power_cut_while_a_shorter_child_is_merged(ending: str, seed: int) -> None:
    files = FaultFiles("/vm")
    expected = build(files, ending, seed, child_bytes=3 * UNIT[ending] + SECTOR_BYTES)
    merge(files, ending)
    for index, world in crash_states(files.trace(), seed=seed, limit=120, distinct=True):
        check(world, ending, expected, writable=index % 2 == 0)


def test_no_other_disk_takes_a_half_merged_parent_for_whole(seed: int) -> None:
    """The parent has the child's identity only when it holds all of it; else a grandchild would believe it."""
    files = FaultFiles("/vm")
    expected = build(files, "vhdx", seed)
    paths = names("vhdx")
    with open_layer(files, paths["child"], clock=FakeClock()) as disk:
        guid = disk.data_write_guid
    merge(files, "vhdx")
    seen = set()
    for _, world in crash_states(files.trace(), seed=seed, limit=150, distinct=True):
        with open_layer(world, paths["parent"], clock=FakeClock()) as disk:
            is_same = disk.data_write_guid == guid
        seen.add(is_same)
        if is_same:
            assert (shown(world, paths["parent"]) == expected).all(), world.story
    assert seen == {False, True}


@pytest.mark.parametrize("ending", FORMATS)
def test_full_file_system_leaves_a_chain_that_shows_the_same(ending: str, seed: int) -> None:
    refused = 0
    for more_kib in [0, 1, 4, 16, 64, 256, 512, 1024, 4096]:
        files = FaultFiles("/vm")
        expected = build(files, ending, seed)
        files.capacity_bytes = 1 << 40
        files.capacity_bytes += more_kib * KIB - files.free_bytes(Path("/vm"))
        try:
            merge(files, ending)
        except OSError:
            refused += 1
        world = files.after_kill()
        world.capacity_bytes = None
        check(world, ending, expected, writable=True)
        if world.exists(names(ending)["child"]):
            merge(world, ending, seed=90)
            check(world, ending, expected, writable=True)
    assert refused


@pytest.mark.parametrize("ending", FORMATS)
def test_failed_syncs_leave_a_chain_that_shows_the_same(ending: str, seed: int) -> None:
    for which in ("parent", "child"):
        for count in range(1, 14):
            files = FaultFiles("/vm")
            expected = build(files, ending, seed)
            files.fail("sync", path=str(names(ending)[which]), at=count)
            try:
                merge(files, ending)
            except OSError:
                check(files.after_kill(), ending, expected, writable=True)
            for _, world in crash_states(files.trace(), seed=seed, limit=10, distinct=True):
                check(world, ending, expected, writable=True)
