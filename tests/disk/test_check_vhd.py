"""Damage to a VHD is found with its own code, mended where that needs no guess, and the mending undone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hvreplica.disk import open_disk
from hvreplica.disk.check import LEVELS, check_disk, repair_disk, undo_repair
from hvreplica.errors import FormatError, StateError
from hvreplica.files import OS_FILES
from hvreplica.units import MIB
from tests.disk.damage_vhd import (
    CORRUPT,
    DAMAGES,
    HARMLESS,
    MENDABLE,
    SIZE,
    VhdPatient,
    harmed,
    make_child,
    make_dynamic,
    make_fixed,
    parent_of,
)
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states
from tests.support.tools import run_tool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.vhd"


def guest(path: Path) -> bytes:
    with open_disk(OS_FILES, path, clock=FakeClock()) as disk:
        buffer = bytearray(disk.virtual_bytes)
        disk.read_into(buffer, 0)
        return bytes(buffer)


@pytest.mark.parametrize("make", [make_dynamic, make_child, make_fixed])
def test_sound_disk_has_no_finding(path: Path, make: Callable[[Path], VhdPatient]) -> None:
    make(path)
    report = check_disk(OS_FILES, path, clock=FakeClock())
    assert (report.format, report.status, report.findings, report.levels) == ("vhd", 0, (), LEVELS)
    assert report.statistics.virtual_bytes == SIZE
    assert report.statistics.allocated_blocks == (None if make is make_fixed else 3)
    assert report.statistics.parents == ([str(parent_of(path))] if make is make_child else None)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_with_its_own_codes_alone(path: Path, name: str) -> None:
    harmed(path, name)
    before = path.read_bytes()
    report = check_disk(OS_FILES, path, clock=FakeClock())
    assert set(report.codes()) == set(DAMAGES[name].codes)
    assert report.format == "vhd"
    assert (report.status == 2) == (name in CORRUPT)
    assert name not in HARMLESS or report.status == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", MENDABLE)
def test_what_can_be_mended_is_and_undone(path: Path, name: str) -> None:
    MENDABLE[name].make(path)
    expected = guest(path)
    harmed(path, name)
    damaged = path.read_bytes()
    report = repair_disk(OS_FILES, path, clock=FakeClock(seed=9))
    assert report.after is not None
    assert (report.status, report.after.findings) == (0, ())
    assert check_disk(OS_FILES, path, clock=FakeClock()).findings == ()
    assert guest(path) == expected
    if MENDABLE[name].make is make_dynamic:
        run_tool("qemu-img", "check", "-f", "vpc", path, expected=(0, 63))  # 63: this qemu checks no VHD
    assert report.backup is not None
    for _ in range(2):
        undo_repair(OS_FILES, path, report.backup)
        assert path.read_bytes() == damaged


@pytest.mark.parametrize("name", [*CORRUPT, *HARMLESS])
def test_what_cannot_be_mended_is_left_as_it_is(path: Path, tmp_path: Path, name: str) -> None:
    harmed(path, name)
    before = path.read_bytes()
    report = repair_disk(OS_FILES, path, clock=FakeClock(seed=9))
    assert (report.actions, report.backup, report.after) == ((), None, None)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.bak"))


def test_beside_corruption_only_the_copy_is_mended(path: Path) -> None:
    patient = harmed(path, "leaked tail and no copy")
    CORRUPT["two blocks in one place"].harm(patient)
    size = patient.size
    report = repair_disk(OS_FILES, path, clock=FakeClock(seed=9))
    assert ([action.action for action in report.actions], report.status) == (["footers"], 2)
    assert patient.size == size
    lost = harmed(path, "footer gone")
    CORRUPT["two blocks in one place"].harm(lost)
    assert repair_disk(OS_FILES, path, clock=FakeClock(seed=9)).actions == ()


def test_a_last_block_that_ends_with_the_disk_is_whole(path: Path) -> None:
    """Some writers leave out what the disk does not have of its last block, and the footer follows at once."""
    patient = make_dynamic(path)
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=2)) as disk:
        disk.write(b"end", SIZE - 3)
    patient.set_footers(current_size=SIZE - 256 * 1024)
    footer = patient.read(patient.size - 512, 512)
    patient.write(patient.size - 512 - 256 * 1024, footer)
    patient.resize(patient.size - 256 * 1024)
    assert check_disk(OS_FILES, path, clock=FakeClock()).findings == ()
    patient.resize(patient.size - 512)
    assert check_disk(OS_FILES, path, clock=FakeClock()).codes() == ["footer-missing"]
    assert repair_disk(OS_FILES, path, clock=FakeClock()).status == 0
    assert patient.read(patient.size - 512, 512) == footer


def test_undo_refuses_a_file_that_got_blocks_since(path: Path) -> None:
    harmed(path, "leaked tail")
    backup = repair_disk(OS_FILES, path, clock=FakeClock(seed=9)).backup
    assert backup is not None
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=10)) as disk:
        disk.write(b"new", 15 * MIB)
    before = path.read_bytes()
    with pytest.raises(StateError):
        undo_repair(OS_FILES, path, backup)
    assert path.read_bytes() == before


def test_a_file_that_claims_to_be_a_vhd_by_name_is_judged_as_one(path: Path) -> None:
    path.write_bytes(bytes(MIB))
    report = check_disk(OS_FILES, path, clock=FakeClock())
    assert (report.format, report.codes()) == ("vhd", ["no-valid-footer"])


@pytest.mark.parametrize(
    "name", ["footer gone, junk behind", "leaked tail and no copy", "copy of another time"]
)
def test_a_repair_or_undo_cut_anywhere_is_completed_by_the_next(path: Path, name: str, seed: int) -> None:
    harmed(path, name)
    damaged, expected = path.read_bytes(), guest(path)
    disk, first, second = path.parent / "d.vhd", path.parent / "1", path.parent / "2"
    files = FaultFiles(path.parent)
    files.load(disk, damaged)
    repair_disk(files, disk, backup=first, clock=FakeClock(seed=1))
    mended = files.content_of(disk)
    for _, world in crash_states(files.trace(), seed=seed, limit=100):
        between = world.content_of(disk)
        report = repair_disk(world, disk, backup=second, clock=FakeClock(seed=2))
        assert report.status == 0, world.story
        assert world.content_of(disk) == mended, world.story
        if report.backup is not None:
            undo_repair(world, disk, second)
            assert world.content_of(disk) == between, world.story
            try:
                undo_repair(world, disk, first)
            except (FileNotFoundError, FormatError):
                pass
            assert world.content_of(disk) == damaged, world.story
    files.settle()
    undo_repair(files, disk, first)
    for _, world in crash_states(files.trace(), seed=seed, limit=60):
        undo_repair(world, disk, first)
        assert world.content_of(disk) == damaged, world.story
        with open_disk(world, disk, clock=FakeClock()) as opened:
            buffer = bytearray(SIZE)
            opened.read_into(buffer, 0)
            assert buffer == expected
