"""Damage is found with its own code, whatever else stands in the file; what is sound has no finding."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.disk import create_disk, open_disk
from hvreplica.disk.check import LEVELS, check_disk
from hvreplica.disk.check.codes import CODES
from hvreplica.errors import UnsupportedVersion
from hvreplica.files import OS_FILES, lock_open_file
from hvreplica.formats.vhdx_metadata import METADATA_TABLE_ENTRY
from hvreplica.native import crc32c
from hvreplica.units import MIB, TIB
from tests.disk import damage_vhd
from tests.disk.damage import (
    CORRUPT,
    DAMAGES,
    HARMLESS,
    MENDABLE,
    harmed,
    make_child,
    make_dirty,
    make_patient,
    parent_of,
)
from tests.support.fakeclock import FakeClock
from tests.support.vhdx_surgery import Patient

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.vhdx"


def test_enough_kinds_of_damage_are_tried() -> None:
    assert len(MENDABLE) + len(CORRUPT) >= 30
    every = (*DAMAGES.values(), *damage_vhd.DAMAGES.values())
    found = {code for damage in every for code in damage.codes}
    elsewhere = {
        "file-too-long",  # test_a_file_of_any_length_is_judged
        "log-too-large",  # test_a_log_beyond_the_bound_is_told
        "region-table-count",  # test_a_table_with_too_many_entries_is_no_copy
        "parent-in-use",  # test_a_parent_may_be_named_and_may_be_in_use
        "size-not-sectors",  # test_raw_disks_have_little_to_check
    }
    assert found | elsewhere == set(CODES)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_with_its_own_codes_alone(path: Path, name: str) -> None:
    harmed(path, name)
    before = path.read_bytes() if path.stat().st_size < 64 * MIB else b""
    report = check_disk(OS_FILES, path, clock=FakeClock())
    assert set(report.codes()) == set(DAMAGES[name].codes)
    expected = 2 if name in CORRUPT else report.status if name in MENDABLE else 0
    assert report.status == expected
    assert report.status < 2 or name in CORRUPT
    assert report.verdict == ("clean", "repairable", "corrupt")[report.status]
    assert sum(report.counts.values()) == len(report.findings)
    assert not before or path.read_bytes() == before


@pytest.mark.parametrize("make", [make_patient, make_child], ids=["dynamic", "child"])
def test_sound_disk_has_no_finding(path: Path, make: Callable[[Path], Patient]) -> None:
    make(path)
    report = check_disk(OS_FILES, path, clock=FakeClock())
    figures = report.statistics
    assert (report.status, report.findings, report.levels) == (0, (), LEVELS)
    assert (figures.leaked_bytes, figures.used_bytes) == (0, figures.file_bytes)
    if make is make_patient:
        assert (figures.allocated_blocks, figures.zero_blocks, figures.parents) == (4, 1, None)
    else:
        assert (figures.allocated_blocks, figures.partial_blocks, figures.bitmap_blocks) == (3, 1, 2)
        assert figures.parents == [str(parent_of(path))]


def test_a_parent_may_be_named_and_may_be_in_use(path: Path, tmp_path: Path) -> None:
    make_child(path)
    moved = tmp_path / "elsewhere" / "old.vhdx"
    moved.parent.mkdir()
    parent_of(path).rename(moved)
    assert check_disk(OS_FILES, path, clock=FakeClock()).codes() == ["parent-missing"]
    report = check_disk(OS_FILES, path, parent=moved, clock=FakeClock())
    assert (report.findings, report.statistics.parents) == ((), [str(moved)])
    with OS_FILES.open(moved, writable=True) as held:
        lock_open_file(held)
        report = check_disk(OS_FILES, path, parent=moved, clock=FakeClock())
    assert (report.codes(), report.status) == (["parent-in-use"], 0)
    assert report.findings[0].path == str(moved)


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
@pytest.mark.parametrize("sector_bytes", [512, 4096])
@pytest.mark.parametrize("block_bytes", [MIB, 32 * MIB, 256 * MIB])
def test_what_we_make_and_write_is_clean(path: Path, kind: str, sector_bytes: int, block_bytes: int) -> None:
    size = 300 * MIB + 4096
    create_disk(
        OS_FILES,
        path,
        virtual_bytes=size,
        type=kind,
        block_bytes=block_bytes,
        logical_sector_bytes=sector_bytes,
        clock=FakeClock(),
    )
    assert check_disk(OS_FILES, path, clock=FakeClock()).findings == ()
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=1)) as disk:
        disk.write(b"x" * 9000, 0)
        disk.write(b"y" * 9000, size - 9000)
        disk.flush()
        disk.write_zeroes(0, 8192)
    assert check_disk(OS_FILES, path, clock=FakeClock()).findings == ()


def test_damage_of_several_kinds_is_found_all_together(path: Path) -> None:
    """A check does not stop: two header faults, a table's, a metadata item's and some of the BAT's."""
    patient = make_patient(path)
    for name in ("header 2 checksum", "region table 1 signature", "metadata item unknown", "state 4"):
        DAMAGES[name].harm(patient)
    patient.set_entry(8, patient.entry(1))
    patient.set_entry(4096, 99)
    patient.resize(patient.size + 2 * MIB)
    report = check_disk(OS_FILES, path, clock=FakeClock())
    assert set(report.codes()) == {
        "header-checksum",
        "region-table-signature",
        "metadata-item-unknown",
        "bat-state",
        "bat-block-overlap",
        "bat-unused-entry",
        "file-tail-unused",
    }
    assert report.status == 2
    overlap = next(finding for finding in report.findings if finding.code == "bat-block-overlap")
    assert "block 8 lies in the place of block 1" in overlap.message
    assert overlap.offset == patient.entry_at(8)


def test_a_level_brings_what_it_needs_and_no_more(path: Path) -> None:
    patient = make_dirty(path)
    DAMAGES["region tables differ"].harm(patient)
    patient.set_entry(3000, 4)
    levels = {level: check_disk(OS_FILES, path, levels=[level], clock=FakeClock()) for level in LEVELS}
    assert levels["structure"].codes() == ["region-tables-differ"]
    assert levels["log"].codes() == ["region-tables-differ", "log-dirty"]
    assert levels["bat"].codes() == ["region-tables-differ", "log-dirty", "bat-state"]
    assert levels["leaks"].levels == ("structure", "log", "bat", "leaks")
    assert levels["parents"].levels == ("structure", "log", "parents")
    assert [levels[level].status for level in LEVELS] == [0, 1, 2, 2, 1]
    assert levels["structure"].statistics.blocks is None


def test_a_dirty_log_is_judged_as_a_replay_would_leave_it(path: Path) -> None:
    """The BAT in place is damaged, and the log holds it whole: only the log is to be told."""
    patient = make_dirty(path)
    patient.set_entry(21, 4)
    report = check_disk(OS_FILES, path, clock=FakeClock())
    assert report.codes() == ["log-dirty"]
    assert report.statistics.allocated_blocks == 6
    assert report.statistics.log == "dirty"


def test_a_flood_of_findings_is_counted_and_not_kept(path: Path) -> None:
    patient = make_patient(path)
    patient.write(patient.entry_at(1000), np.full(2000, 4, "<u8").tobytes())
    patient.write(patient.entry_at(5000), np.full(2000, 3 << 20 | 6, "<u8").tobytes())
    report = check_disk(OS_FILES, path, clock=FakeClock())
    assert report.counts["corrupt"] == 4000
    assert len(report.findings) == 200
    assert report.omitted == {"bat-state": 1900, "bat-block-overlap": 1900}


def test_many_unknown_items_are_counted_and_not_all_kept(path: Path) -> None:
    patient = make_patient(path)
    rows = [METADATA_TABLE_ENTRY.pack(item_id=uuid.UUID(int=number), flags=1) for number in range(1, 301)]
    patient.write(patient.metadata_at + 6 * 32, b"".join(rows))
    patient.set_item_count(5 + 300)
    report = check_disk(OS_FILES, path, clock=FakeClock())
    assert (report.counts["info"], len(report.findings)) == (300, 100)
    assert report.omitted == {"metadata-item-unknown": 200}


def test_raw_disks_have_little_to_check(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    assert check_disk(OS_FILES, path, clock=FakeClock()).format == "raw"
    assert check_disk(OS_FILES, path, clock=FakeClock()).findings == ()
    path.write_bytes(bytes(4097))
    report = check_disk(OS_FILES, path, clock=FakeClock())
    assert (report.codes(), report.status) == (["size-not-sectors"], 0)


def test_formats_that_are_not_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    path.write_bytes(b"QFI\xfb".ljust(4096, b"\0"))
    with pytest.raises(UnsupportedVersion):
        check_disk(OS_FILES, path, clock=FakeClock())
    with pytest.raises(FileNotFoundError):
        check_disk(OS_FILES, tmp_path / "absent.vhdx", clock=FakeClock())


def test_a_file_that_claims_to_be_a_vhdx_by_name_is_judged_as_one(path: Path) -> None:
    path.write_bytes(bytes(4 * MIB))
    report = check_disk(OS_FILES, path, clock=FakeClock())
    assert (report.format, report.status) == ("vhdx", 2)
    assert "no-valid-header" in report.codes()
    assert not any(finding.repair for finding in report.findings)


def test_a_table_with_too_many_entries_is_no_copy(path: Path) -> None:
    patient = make_patient(path)
    table = bytearray(patient.read(192 << 10, 64 << 10))
    table[8:12] = (2048).to_bytes(4, "little")
    table[4:8] = bytes(4)
    table[4:8] = crc32c(table).to_bytes(4, "little")
    patient.write(192 << 10, bytes(table))
    assert check_disk(OS_FILES, path, clock=FakeClock()).codes() == ["region-table-count"]


def test_a_log_beyond_the_bound_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dirty(path)
    monkeypatch.setattr("hvreplica.disk.vhdx.replay._REPLAY_DESCRIPTOR_COUNT_MAX", 1)
    report = check_disk(OS_FILES, path, clock=FakeClock())
    assert (report.codes(), report.status) == (["log-too-large"], 2)


def test_a_file_of_any_length_is_judged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = make_patient(path)
    monkeypatch.setattr("hvreplica.disk.check.vhdx_structure.FILE_BYTES_MAX", patient.size - 1)
    assert check_disk(OS_FILES, path, clock=FakeClock()).codes() == ["file-too-long"]


def test_a_fixed_disk_may_keep_room_for_all_its_blocks(path: Path) -> None:
    create_disk(OS_FILES, path, virtual_bytes=10 * MIB, type="fixed", block_bytes=MIB, clock=FakeClock())
    patient = Patient(path)
    patient.set_entry(9, 0)
    report = check_disk(OS_FILES, path, clock=FakeClock())
    assert (report.findings, report.statistics.tail_bytes) == ((), 0)
    patient.resize(patient.size + 2 * MIB)
    assert check_disk(OS_FILES, path, clock=FakeClock()).statistics.tail_bytes == 2 * MIB


def test_a_table_of_two_to_the_26_entries_needs_little(path: Path) -> None:
    """A sparse one here: holes are skipped, and entries at its ends are found."""
    create_disk(OS_FILES, path, virtual_bytes=64 * TIB, block_bytes=MIB, clock=FakeClock())
    patient = Patient(path)
    blocks = 64 * TIB // MIB
    last = blocks - 1 + (blocks - 1) // 4096
    patient.set_entry(last, 4)
    patient.set_entry(last - 1, 3 << 20 | 6)
    report = check_disk(OS_FILES, path, clock=FakeClock())
    assert sorted(report.codes()) == ["bat-block-in-structure", "bat-state"]
    assert f"block {blocks - 1} " in next(f.message for f in report.findings if f.code == "bat-state")
    assert report.statistics.blocks == blocks


def test_every_harmless_oddity_is_clean() -> None:
    assert all(CODES[code].severity in {"info", "warning"} for d in HARMLESS.values() for code in d.codes)
