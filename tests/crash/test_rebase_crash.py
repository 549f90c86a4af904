"""A power cut at any instant of a rebase leaves the old parent or the new one, and the same bytes for the guest."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from hvreplica.disk import create_disk, open_disk, rebase_disk
from hvreplica.disk.open import open_layer
from hvreplica.formats.vhd_footer import choose_footer, unpack_footer
from hvreplica.units import KIB
from tests.crash.test_merge_crash import BLOCKS, FORMATS, UNIT, build, names, shown
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states
from tests.support.numbered import SECTOR_BYTES, History, perform, read_numbers

MODES = ("content", "identity", "unsafe")


def new_parent(ending: str, mode: str) -> Path:
    """Return the name: one too long for the place of the old one, or a short one, as the mode has it."""
    return Path("/vm/new") / f"{'n' * (200 if mode == 'content' else 3)}.{ending}"


def make(ending: str, mode: str, seed: int) -> tuple[FaultFiles, np.ndarray]:
    """Return a chain, beside it the new parent, and what the child shows."""
    files = FaultFiles("/vm")
    files.make_directory(Path("/vm/new"))
    expected = build(files, ending, seed)
    parent, unit = new_parent(ending, mode), UNIT[ending]
    if mode == "identity":
        files.load(parent, files.content_of(names(ending)["parent"]))
        # It rests on the grandparent, by a name that is looked for beside it.
        files.load(parent.with_name(f"grandparent.{ending}"), files.content_of(names(ending)["grandparent"]))
    else:
        size = BLOCKS * unit - 7 * SECTOR_BYTES
        clock = FakeClock(seed=seed + 400)
        create_disk(files, parent, virtual_bytes=size, format=ending, block_bytes=unit, clock=clock)  # type: ignore[arg-type]
        with open_disk(files, parent, writable=True, clock=clock) as disk:
            if mode == "unsafe":
                disk.write(np.repeat(shown(files, names(ending)["parent"]), SECTOR_BYTES).data, 0)
            else:
                history = History([read_numbers(disk)])
                perform(disk, files, history, random.Random(seed + 9), steps=8, unit_bytes=unit)
    files.settle()
    return files, expected


def rebase(files: FaultFiles, ending: str, mode: str, *, seed: int = 70) -> object:
    clock = FakeClock(seed=seed)
    child, parent = names(ending)["child"], new_parent(ending, mode)
    return rebase_disk(files, child, parent, unsafe=mode == "unsafe", clock=clock)


def check(world: FaultFiles, ending: str, expected: np.ndarray, *, writable: bool) -> Path:
    """Fail unless the child shows what it showed; return its parent."""
    with open_disk(world, names(ending)["child"], writable=writable, clock=FakeClock(seed=5)) as disk:
        wrong = np.flatnonzero(read_numbers(disk) != expected)
        assert not len(wrong), f"{world.story}: sector {wrong[0]}"
        return disk.parent.path


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ending", FORMATS)
def test_power_cut_anywhere_shows_the_same_and_is_finished_by_the_same_call(
    ending: str, mode: str, seed: int
) -> None:
    files, expected = make(ending, mode, seed)
    child, parent = names(ending)["child"], new_parent(ending, mode)
    with open_layer(files, child, clock=FakeClock()) as disk:
        guid = disk.data_write_guid
    assert rebase(files, ending, mode).by == mode
    files.acknowledge("rebased")
    parents = set()
    for index, world in crash_states(files.trace(), seed=seed, limit=160, distinct=True):
        found = check(world, ending, expected, writable=index % 3 == 0)
        parents.add(found)
        assert found == parent or "rebased" not in world.acknowledged, world.story
        rebase(world, ending, mode, seed=71 + index % 2)
        assert check(world, ending, expected, writable=True) == parent, world.story
        with open_layer(world, child, clock=FakeClock()) as disk:
            assert disk.data_write_guid == guid
        if ending == "vhd":
            check_layout(world, child)
    assert parents == {parent, names(ending)["parent"]}


def check_layout(world: FaultFiles, path: Path) -> None:
    content = world.content_of(path)
    tail = unpack_footer(content[-512:], file_offset=len(content) - 512)
    assert choose_footer([tail], tail, file_size_bytes=len(content)) is tail, world.story
    assert content[:512] == content[-512:], world.story
    assert tail.data_offset == 512, world.story


@pytest.mark.parametrize(("ending", "lacks"), [("vhdx", ""), ("vhd", ""), ("vhd", "copy of the footer")])
def test_every_order_in_which_the_link_becomes_durable(ending: str, lacks: str, seed: int) -> None:
    """Only the link changes, so that each of its few writes is tried with every set of the others."""
    files, expected = make(ending, "unsafe", seed)
    child, parent = names(ending)["child"], new_parent(ending, "unsafe")
    if lacks:
        files.load(child, bytes(512) + files.content_of(child)[512:])
        files.settle()
    rebase(files, ending, "unsafe")
    parents = set()
    for _, world in crash_states(files.trace(), seed=seed, subsets_per_prefix=40, limit=None, distinct=True):
        parents.add(check(world, ending, expected, writable=False))
    assert parents == {parent, names(ending)["parent"]}


@pytest.mark.parametrize("ending", FORMATS)
def test_power_cut_after_which_the_child_is_written(ending: str, seed: int) -> None:
    """What a cut left can be written and cut again: nothing that counts stands where a block is put."""
    files, _ = make(ending, "content", seed)
    rebase(files, ending, "content")
    child = names(ending)["child"]
    for number, (_, world) in enumerate(crash_states(files.trace(), seed=seed, limit=50)):
        clock = FakeClock(seed=number)
        world.settle()
        with open_disk(world, child, writable=True, clock=clock) as disk:
            history = History([read_numbers(disk)])
            perform(disk, world, history, random.Random(number), steps=8, unit_bytes=UNIT[ending])
        assert (shown(world, child) == history.states[-1]).all(), world.story
        rebase(world, ending, "content", seed=number)
        assert (shown(world, child) == history.states[-1]).all(), world.story


@pytest.mark.parametrize("ending", FORMATS)
def test_failed_syncs_and_a_full_file_system_leave_the_same_bytes(ending: str, seed: int) -> None:
    refused = 0
    for attempt in range(16):
        files, expected = make(ending, "content", seed)
        if attempt < 10:
            files.fail("sync", path=str(names(ending)["child"]), at=attempt + 1)
        else:
            files.capacity_bytes = 1 << 40
            files.capacity_bytes += (1 << 2 * (attempt - 10)) * KIB - files.free_bytes(Path("/vm"))
        try:
            rebase(files, ending, "content")
        except OSError:
            refused += 1
        for _, world in crash_states(files.trace(), seed=seed, limit=12, distinct=True):
            check(world, ending, expected, writable=True)
        world = files.after_kill()
        world.capacity_bytes = None
        check(world, ending, expected, writable=True)
    assert refused > 4
