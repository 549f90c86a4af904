"""A disk that somebody else changed is never taken for the same; one that is the same is not compared for nothing."""

from __future__ import annotations

import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvreplica.files import OS_FILES
from hvreplica.formats.journal import DiskIdentity
from hvreplica.tracking.identity import Verdict, disk_identity, judge
from tests.support.faultfile import FaultFiles, crash_states

OLD, NEW, OTHER = (uuid.UUID(int=number) for number in (1, 2, 3))
RECORDED = DiskIdentity(OLD, file_bytes=1000, mtime_ns=50, inode=7, device=1)
SAME, CHANGED, UNKNOWN = Verdict.SAME, Verdict.CHANGED, Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("disk_format", "was_clean", "changes", "verdict"),
    [
        ("vhdx", True, {}, SAME),
        ("vhdx", True, {"data_write_guid": OTHER}, CHANGED),
        ("vhdx", True, {"data_write_guid": None}, CHANGED),
        ("vhdx", True, {"file_bytes": 1001}, CHANGED),
        ("vhdx", True, {"mtime_ns": 51}, CHANGED),
        ("vhdx", True, {"inode": 8}, CHANGED),
        ("vhdx", True, {"device": 2}, SAME),
        ("vhdx", False, {"file_bytes": 9000, "mtime_ns": 1, "device": 2}, SAME),
        ("vhdx", False, {"inode": 8}, CHANGED),
        ("vhdx", False, {"data_write_guid": OTHER}, CHANGED),
        ("vhdx", False, {"data_write_guid": NEW}, CHANGED),
        ("raw", True, {}, SAME),
        ("raw", True, {"mtime_ns": 49}, CHANGED),
        ("raw", True, {"file_bytes": 999}, CHANGED),
        ("raw", True, {"inode": 8}, CHANGED),
        ("raw", False, {"mtime_ns": 90}, SAME),
        ("raw", False, {"inode": 8}, CHANGED),
        ("raw", False, {"file_bytes": 1001}, CHANGED),
        ("raw", False, {"file_bytes": 999}, CHANGED),
        ("raw", False, {"device": 2}, UNKNOWN),
        ("vhd", True, {"file_bytes": 1001}, CHANGED),
        ("vhd", False, {"file_bytes": 1001}, SAME),
        ("vhd", False, {"file_bytes": 999}, CHANGED),
        ("vhd", False, {"inode": 8}, CHANGED),
    ],
)
def test_judge_says_what_the_table_says(
    *, disk_format: Any, was_clean: bool, changes: dict[str, Any], verdict: Verdict
) -> None:
    recorded = RECORDED if disk_format == "vhdx" else replace(RECORDED, data_write_guid=None)
    found = judge(recorded, replace(recorded, **changes), was_clean=was_clean, disk_format=disk_format)
    assert found.verdict is verdict
    assert found.reason


@pytest.mark.parametrize(("guid", "verdict"), [(OLD, SAME), (NEW, SAME), (OTHER, CHANGED)])
def test_judge_takes_both_guids_while_a_start_is_under_way(guid: uuid.UUID, verdict: Verdict) -> None:
    recorded = replace(RECORDED, next_guid=NEW)
    found = judge(recorded, replace(RECORDED, data_write_guid=guid), was_clean=False, disk_format="vhdx")
    assert found.verdict is verdict


@pytest.mark.parametrize("was_clean", [True, False])
def test_judge_does_not_know_what_was_never_recorded(*, was_clean: bool) -> None:
    assert judge(None, RECORDED, was_clean=was_clean, disk_format="vhdx").verdict is UNKNOWN


def test_judge_does_not_know_a_block_device() -> None:
    device = DiskIdentity(None, file_bytes=1 << 30, mtime_ns=0, inode=0, device=2049)
    assert judge(device, device, was_clean=True, disk_format="raw").verdict is UNKNOWN


def test_judge_names_what_differs() -> None:
    changed = replace(RECORDED, data_write_guid=OTHER)
    found = judge(RECORDED, changed, was_clean=True, disk_format="vhdx")
    assert str(OLD) in found.reason
    assert str(OTHER) in found.reason


def test_identity_is_that_of_the_file_and_follows_its_writes(tmp_path: Path) -> None:
    path = tmp_path / "web01.raw"
    path.write_bytes(b"x" * 1000)
    facts = path.stat()
    identity = disk_identity(OS_FILES, path, data_write_guid=OLD)
    assert identity == DiskIdentity(OLD, 1000, facts.st_mtime_ns, facts.st_ino, facts.st_dev)
    os.utime(path, ns=(1, identity.mtime_ns + 1))
    changed = disk_identity(OS_FILES, path, data_write_guid=OLD)
    assert judge(identity, changed, was_clean=True, disk_format="raw").verdict is CHANGED
    (tmp_path / "link").symlink_to(path)
    assert disk_identity(OS_FILES, tmp_path / "link", data_write_guid=OLD) == changed
    with pytest.raises(FileNotFoundError):
        OS_FILES.identity(tmp_path / "absent")


def test_identity_of_files_in_memory_moves_with_each_change() -> None:
    files = FaultFiles("/d")
    path = Path("/d/a")
    seen = []
    with files.open(path, create=True) as file:
        for step in (lambda: file.write(b"x", 0), lambda: file.resize(9), lambda: file.zero(0, 4)):
            seen.append(files.identity(path).mtime_ns)
            step()
        seen.append(files.identity(path).mtime_ns)
        file.sync()
    assert seen == sorted(set(seen))
    assert files.identity(path).mtime_ns == seen[-1]
    files.sync_directory(Path("/d"))
    times = {
        world.identity(path).mtime_ns
        for _, world in crash_states(files.trace(), subsets_per_prefix=20)
        if world.exists(path)
    }
    assert times == set(seen)
    world = files.after_kill()
    assert world.identity(path) == files.identity(path)
    world.open(path, writable=True).write(b"y", 0)
    assert world.identity(path).mtime_ns > seen[-1]
    with pytest.raises(FileNotFoundError):
        files.identity(Path("/d/absent"))
