"""A repair or an undo that is cut anywhere can be run again, and the backup still puts everything back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hvreplica.disk.check import check_disk, repair_disk, undo_repair
from hvreplica.errors import FormatError, HvReplicaError, StateError
from hvreplica.formats.vhdx_header import HEADER_OFFSETS, unpack_header
from tests.disk.damage import MENDABLE, make_dirty
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states

if TYPE_CHECKING:
    from collections.abc import Iterator

DISK = Path("/vm/disk.vhdx")
BACKUP = Path("/vm/first.bak")
SECOND = Path("/vm/second.bak")
HARMS = (
    "region table 2 checksum",
    "identifier",
    "bitmap entries with garbage",
    "zero block with an offset",
    "leaked tail of odd length",
    "log to replay, header torn",
)


@pytest.fixture
def harmed(tmp_path: Path) -> bytes:
    """Return a disk with all that can be mended at once, and little else."""
    patient = make_dirty(tmp_path / "disk.vhdx")
    for name in HARMS:
        MENDABLE[name].harm(patient)
    patient.set_entry(3000, 5 << 20 | 2)
    return patient.path.read_bytes()


@pytest.fixture
def mended(harmed: bytes) -> bytes:
    """Return the disk as an undisturbed repair leaves it."""
    files = FaultFiles("/vm")
    files.load(DISK, harmed)
    repair_disk(files, DISK, backup=BACKUP, clock=FakeClock(seed=1))
    return files.content_of(DISK)


def behind_headers(content: bytes) -> bytes:
    """Return what two repairs leave alike: their headers have other numbers and other GUIDs."""
    return content[: 64 << 10] + content[192 << 10 :]


def cut_repairs(harmed: bytes, seed: int, limit: int) -> Iterator[FaultFiles]:
    files = FaultFiles("/vm")
    files.load(DISK, harmed)
    assert repair_disk(files, DISK, backup=BACKUP, clock=FakeClock(seed=1)).status == 0
    for _, world in crash_states(files.trace(), seed=seed, limit=limit, distinct=True):
        yield world


def test_a_repair_cut_anywhere_is_completed_by_the_next(harmed: bytes, mended: bytes, seed: int) -> None:
    for world in cut_repairs(harmed, seed, limit=120):
        report = repair_disk(world, DISK, backup=SECOND, clock=FakeClock(seed=2))
        assert report.status == 0, world.story
        assert check_disk(world, DISK, clock=FakeClock()).findings == (), world.story
        assert behind_headers(world.content_of(DISK)) == behind_headers(mended), world.story


def test_a_repair_cut_anywhere_is_undone_by_its_backup(harmed: bytes, seed: int) -> None:
    """Where the backup is not whole, nothing was changed; else it brings back every byte."""
    undone = 0
    for world in cut_repairs(harmed, seed, limit=120):
        try:
            undo_repair(world, DISK, BACKUP)
            undone += 1
        except (FileNotFoundError, FormatError):
            pass
        assert world.content_of(DISK) == harmed, world.story
    assert undone > 8


def test_the_second_repairs_backup_goes_first_and_then_the_first_ones(harmed: bytes, seed: int) -> None:
    for number, world in enumerate(cut_repairs(harmed, seed, limit=80)):
        between = world.content_of(DISK)
        report = repair_disk(world, DISK, backup=SECOND, clock=FakeClock(seed=2))
        if report.backup is None:
            continue
        undo_repair(world, DISK, SECOND)
        assert world.content_of(DISK) == between, (number, world.story)
        try:
            undo_repair(world, DISK, BACKUP)
        except (FileNotFoundError, FormatError):
            pass
        assert world.content_of(DISK) == harmed, world.story


def test_an_undo_cut_anywhere_is_completed_by_the_next(harmed: bytes, seed: int) -> None:
    files = FaultFiles("/vm")
    files.load(DISK, harmed)
    repair_disk(files, DISK, backup=BACKUP, clock=FakeClock(seed=1))
    files.settle()
    undo_repair(files, DISK, BACKUP)
    for _, world in crash_states(files.trace(), seed=seed, limit=120, distinct=True):
        undo_repair(world, DISK, BACKUP)
        assert world.content_of(DISK) == harmed, world.story


def test_the_order_of_writes_and_syncs_is_the_one_that_is_documented(harmed: bytes) -> None:
    """Backup: records, sync, header, sync. Undo: the header copy that was valid, sync, the bad one, sync."""
    bad, good = sorted(HEADER_OFFSETS, key=lambda at: is_valid(harmed, at))
    assert is_valid(harmed, good) > is_valid(harmed, bad)
    files = FaultFiles("/vm")
    files.load(DISK, harmed)
    repair_disk(files, DISK, backup=BACKUP, clock=FakeClock(seed=1))
    saved = [
        (e.kind, e.offset) for e in files.trace().events if e.path == BACKUP and e.kind in {"write", "sync"}
    ]
    assert saved[-3:] == [("sync", 0), ("write", 0), ("sync", 0)]
    first_change = next(i for i, e in enumerate(files.trace().events) if e.path == DISK)
    assert "sync_directory" in [event.kind for event in files.trace().events[:first_change]]
    files.settle()
    undo_repair(files, DISK, BACKUP)
    undone = [(e.kind, e.offset) for e in files.trace().events if e.kind in {"write", "sync"}]
    assert undone[-4:] == [("write", good), ("sync", 0), ("write", bad), ("sync", 0)]


def is_valid(content: bytes, at: int) -> bool:
    try:
        unpack_header(content[at : at + 4096], file_offset=at).validate()
    except FormatError:
        return False
    return True


@pytest.mark.parametrize("operation", ["write", "sync", "resize", "open", "sync_directory"])
def test_an_io_error_at_any_step_leaves_a_disk_that_can_be_repaired(
    harmed: bytes, mended: bytes, operation: str
) -> None:
    for at in range(1, 40):
        files = FaultFiles("/vm")
        files.load(DISK, harmed)
        fault = files.fail(operation, at=at)
        try:
            repair_disk(files, DISK, backup=BACKUP, clock=FakeClock(seed=1))
        except OSError:
            pass
        except HvReplicaError as error:
            raise AssertionError(f"{operation} {at}") from error
        if not fault.hits:
            assert at > 1
            return
        world = files.after_kill()
        report = repair_disk(world, DISK, backup=SECOND, clock=FakeClock(seed=2))
        assert report.status == 0
        assert behind_headers(world.content_of(DISK)) == behind_headers(mended)
        if world.exists(BACKUP) and report.backup is not None:
            with pytest.raises(StateError):
                undo_repair(world, DISK, BACKUP)  # its turn comes after that of the second


def test_a_full_file_system_leaves_the_disk_as_it_was(harmed: bytes) -> None:
    files = FaultFiles("/vm")
    files.load(DISK, harmed)
    files.capacity_bytes = 8192
    with pytest.raises(OSError, match="space"):
        repair_disk(files, DISK, backup=BACKUP, clock=FakeClock(seed=1))
    assert files.content_of(DISK) == harmed
    assert files.files() == [DISK]
