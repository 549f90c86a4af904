"""Kinds of damage, each with the codes that a check must find in it and in nothing else."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hvreplica.disk import create_disk, open_disk
from hvreplica.files import OS_FILES
from hvreplica.formats.guid import braced
from hvreplica.formats.vhdx_header import HEADER_OFFSETS
from hvreplica.formats.vhdx_locator import (
    PARENT_LINKAGE,
    RELATIVE_PATH,
    pack_parent_locator,
    unpack_parent_locator,
)
from hvreplica.formats.vhdx_log import LogEntryHeader, pack_entry
from hvreplica.formats.vhdx_metadata import (
    FILE_PARAMETERS_ITEM,
    LOGICAL_SECTOR_SIZE_ITEM,
    PARENT_LOCATOR_ITEM,
    PHYSICAL_SECTOR_SIZE_ITEM,
    VIRTUAL_DISK_ID_ITEM,
    VIRTUAL_DISK_SIZE_ITEM,
)
from hvreplica.formats.vhdx_region import BAT_REGION, METADATA_REGION, REGION_TABLE_OFFSETS, Region
from hvreplica.units import GIB, KIB, MIB
from tests.support.build import random_bytes
from tests.support.fakeclock import FakeClock
from tests.support.vhdx_surgery import Patient

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = 9 * GIB  # two sector-bitmap entries, at 4096 and 8193
BITMAP = 4096
FAR = 4200 * MIB
FIRST, SECOND, THIRD, FOURTH = 0, 1, 2, 4201  # entries of the blocks that are present
ABSENT = 7
UNKNOWN = uuid.UUID("11111111-2222-3333-4444-555555555555")
LOG_GUID = uuid.UUID("aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee")
FULLY, ZERO, UNMAPPED, PARTIALLY = 6, 2, 3, 7
NO_LOG = uuid.UUID(int=0)


def make_patient(path: Path) -> Patient:
    """Make a sound disk with four blocks of data and one of zeros."""
    create_disk(OS_FILES, path, virtual_bytes=SIZE, block_bytes=MIB, clock=FakeClock(seed=1), overwrite=True)
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=2)) as disk:
        disk.write(random_bytes(3 * MIB, seed=5), 0)
        disk.write(random_bytes(70_000, seed=6), FAR)
    patient = Patient(path)
    patient.set_entry(5, ZERO)
    return patient


def make_dirty(path: Path) -> Patient:
    """Make a disk whose log must be replayed: its last blocks are only in the log."""
    patient = make_patient(path)
    disk = open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=3))
    disk.write(random_bytes(MIB, seed=8), 20 * MIB)
    disk.write(random_bytes(MIB, seed=9), FAR + 20 * MIB)
    disk.flush()
    disk.abandon()
    for index in (20, 4221):
        patient.set_entry(index, 0)
    return patient


def make_child(path: Path) -> Patient:
    """Make a differencing disk with whole blocks and a part of one, on a sound parent beside it."""
    parent = parent_of(path)
    if not parent.exists():
        make_patient(parent)
    create_disk(
        OS_FILES,
        path,
        virtual_bytes=None,
        type="differencing",
        block_bytes=MIB,
        parent=parent,
        clock=FakeClock(seed=4),
        overwrite=True,
    )
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=5)) as disk:
        disk.write(random_bytes(MIB, seed=10), 0)
        disk.write(random_bytes(4096, seed=11), MIB)
        disk.write(random_bytes(MIB, seed=12), FAR)
    return Patient(path)


def parent_of(path: Path) -> Path:
    return path.with_name("parent.vhdx")


def put_vhd_for_parent(patient: Patient) -> None:
    """Put a VHD under the parent's name."""
    create_disk(
        OS_FILES,
        parent_of(patient.path),
        virtual_bytes=MIB,
        format="vhd",
        overwrite=True,
        clock=FakeClock(seed=9),
    )


def write_to_parent(patient: Patient) -> None:
    with open_disk(OS_FILES, parent_of(patient.path), writable=True, clock=FakeClock(seed=6)) as disk:
        disk.write(b"x", 0)


def name_parent(patient: Patient, name: str) -> None:
    """Give the child another name of its parent; the identity stays."""
    at = patient.metadata_at + patient.item(PARENT_LOCATOR_ITEM).offset
    length = patient.item(PARENT_LOCATOR_ITEM).length
    entries = dict(unpack_parent_locator(patient.read(at, length), file_offset=at).entries)
    patient.set_locator(pack_parent_locator({**entries, RELATIVE_PATH: name}))


def place(mib: int, state: int = FULLY) -> int:
    return mib << 20 | state


def end_of(patient: Patient) -> int:
    return patient.size // MIB


def write_entry(patient: Patient, targets: list[int], **changes: int) -> None:
    """Write one log entry to the start of the log, and make it count."""
    log = patient.current
    header = LogEntryHeader(
        entry_length=0,
        tail=0,
        sequence_number=7,
        descriptor_count=0,
        log_guid=LOG_GUID,
        flushed_file_offset=changes.get("flushed", patient.size),
        last_file_offset=changes.get("last", patient.size),
    )
    data = np.zeros((len(targets), 4096), np.uint8)
    patient.write(log.log_offset, pack_entry(header, np.array(targets, np.int64), data))
    patient.set_headers(log_guid=LOG_GUID)


def tear_log(patient: Patient) -> None:
    """Leave an entry behind the live ones of which only the first half was written."""
    header = LogEntryHeader(0, 0, 90, 0, patient.current.log_guid, patient.size, patient.size)
    entry = pack_entry(header, np.array([3 * MIB]), np.ones((1, 4096), np.uint8))
    patient.write(patient.current.log_offset + 512 * KIB, entry[:4096])


def stale_bitmaps(patient: Patient) -> None:
    patient.set_entry(BITMAP, place(5))
    patient.set_entry(8193, 0xDEAD_BEEF_0000_0001)


def swap_sequence(patient: Patient) -> None:
    patient.set_headers(sequence_number=9)


class Damage(NamedTuple):
    """codes: what a check finds. make: the sound disk that `harm` is done to."""

    codes: tuple[str, ...]
    harm: Callable[[Patient], object]
    make: Callable[[Path], Patient] = make_patient


DIRTY = ("log-dirty",)
HEADER_1, HEADER_2 = HEADER_OFFSETS
TABLE_1, TABLE_2 = REGION_TABLE_OFFSETS

# Mended by `disk repair`, down to no finding at all.
MENDABLE: dict[str, Damage] = {
    "identifier": Damage(("identifier-signature",), lambda p: p.write(0, b"\0\0\0\0xxxx")),
    "header 1 signature": Damage(("header-signature",), lambda p: p.write(HEADER_1, b"daeh")),
    "header 1 zeroed": Damage(("header-signature",), lambda p: p.write(HEADER_1, bytes(4096))),
    "header 2 checksum": Damage(("header-checksum",), lambda p: p.break_checksum(1)),
    "header 1 torn": Damage(("header-checksum",), lambda p: p.write(HEADER_1 + 8, b"\xff" * 504)),
    "region table 1 signature": Damage(("region-table-signature",), lambda p: p.write(TABLE_1, b"ttab")),
    "region table 2 checksum": Damage(("region-table-checksum",), lambda p: p.flip(TABLE_2 + 60_000)),
    "region table 1 zeroed": Damage(("region-table-signature",), lambda p: p.write(TABLE_1, bytes(65536))),
    "log to replay": Damage(DIRTY, lambda p: p.set_entry(ABSENT, 0), make_dirty),
    "log to replay, half done": Damage(DIRTY, lambda p: p.set_entry(20, 0), make_dirty),
    "log to replay, entry torn": Damage((*DIRTY, "log-entry-torn"), tear_log, make_dirty),
    "log to replay, header torn": Damage(
        ("header-checksum", *DIRTY), lambda p: p.break_checksum(p.headers().index(p.current) ^ 1), make_dirty
    ),
    "log to replay, nothing in it": Damage(DIRTY, lambda p: write_entry(p, [])),
    "log to replay, file to grow": Damage(
        (*DIRTY, "file-tail-unused"), lambda p: write_entry(p, [], last=p.size + 3 * MIB)
    ),
    "zero block with an offset": Damage(("bat-stale-bits",), lambda p: p.set_entry(5, place(4, ZERO))),
    "absent block with an offset": Damage(("bat-stale-bits",), lambda p: p.set_entry(ABSENT, place(4, 0))),
    "absent block with reserved bits": Damage(("bat-stale-bits",), lambda p: p.set_entry(ABSENT, 0x80)),
    "unmapped block with reserved bits": Damage(
        ("bat-stale-bits",), lambda p: p.set_entry(ABSENT, 0x80 | UNMAPPED)
    ),
    "bitmap entries with garbage": Damage(("bat-unused-entry",), stale_bitmaps),
    "leaked tail": Damage(("file-tail-unused",), lambda p: p.write(p.size, b"\xaa" * (3 * MIB))),
    "odd length": Damage(("file-end-unaligned",), lambda p: p.write(p.size, b"\xaa" * 12_345)),
    "leaked tail of odd length": Damage(
        ("file-end-unaligned", "file-tail-unused"), lambda p: p.resize(p.size + 5 * MIB + 1)
    ),
}  # fmt: skip

# Found, and left alone.
CORRUPT: dict[str, Damage] = {
    "cut to nothing": Damage(
        ("file-truncated", "identifier-signature", "no-valid-header", "no-valid-region-table"),
        lambda p: p.resize(0),
    ),
    "cut in the header section": Damage(
        ("file-truncated", "header-log-outside-file", "no-valid-region-table"), lambda p: p.resize(192 * KIB)
    ),
    "both headers": Damage(
        ("header-signature", "header-checksum", "no-valid-header"),
        lambda p: (p.write(HEADER_1, b"xxxx"), p.break_checksum(1)),
    ),
    "header version": Damage(("header-version",), lambda p: p.set_headers(version=2)),
    "log version": Damage(
        ("header-log-version",), lambda p: p.set_headers(log_version=1, log_guid=LOG_GUID)
    ),
    "log misaligned": Damage(("header-log-misaligned",), lambda p: p.set_headers(log_length=MIB // 2)),
    "log without a length": Damage(
        ("header-log-missing",), lambda p: p.set_headers(log_length=0, log_guid=LOG_GUID)
    ),
    "log in the header section": Damage(
        ("header-log-overlap", "region-overlap"), lambda p: p.set_headers(log_offset=0)
    ),
    "log outside of the file": Damage(
        ("header-log-outside-file",), lambda p: p.set_headers(log_offset=end_of(p) * MIB)
    ),
    "both region tables": Damage(
        ("region-table-signature", "region-table-checksum", "no-valid-region-table"),
        lambda p: (p.write(TABLE_1, b"xxxx"), p.flip(TABLE_2 + 99)),
    ),
    "region misaligned": Damage(
        ("region-misaligned", "region-overlap"), lambda p: p.set_region(BAT_REGION, file_offset=3 * MIB - 512)
    ),
    "region twice": Damage(
        ("region-duplicate", "region-overlap"), lambda p: p.set_regions(lambda rows: [*rows, rows[0]])
    ),
    "region unknown and required": Damage(
        ("region-unknown-required",),
        lambda p: (
            p.set_regions(lambda rows: [*rows, Region(UNKNOWN, end_of(p) * MIB, MIB, 1)]),
            p.resize(p.size + MIB),
        ),
    ),
    "no BAT": Damage(
        ("region-missing",), lambda p: p.set_regions(lambda rows: [r for r in rows if r.guid != BAT_REGION])
    ),
    "no metadata region": Damage(
        ("region-missing",),
        lambda p: p.set_regions(lambda rows: [r for r in rows if r.guid != METADATA_REGION]),
    ),
    "region outside of the file": Damage(
        ("region-outside-file", "bat-too-short"),
        lambda p: p.set_region(BAT_REGION, file_offset=end_of(p) * MIB),
    ),
    "region over the log": Damage(
        ("region-overlap", "metadata-signature", "metadata-item-missing"),
        lambda p: p.set_region(METADATA_REGION, file_offset=MIB),
    ),
    "metadata signature": Damage(("metadata-signature",), lambda p: p.write(p.metadata_at, b"metabata")),
    "metadata count": Damage(
        ("metadata-count", "metadata-item-missing"), lambda p: p.set_item_count(2048)
    ),
    "metadata item twice": Damage(
        ("metadata-item-duplicate",), lambda p: p.add_item(VIRTUAL_DISK_ID_ITEM, bytes(16), flags=6)
    ),
    "metadata item unknown and required": Damage(
        ("metadata-item-unknown-required",), lambda p: p.add_item(UNKNOWN, bytes(8), flags=4)
    ),
    "metadata item flags": Damage(
        ("metadata-item-flags",), lambda p: p.set_item(VIRTUAL_DISK_ID_ITEM, flags=0x46)
    ),
    "metadata item length": Damage(
        ("metadata-item-length", "metadata-item-size"), lambda p: p.set_item(VIRTUAL_DISK_ID_ITEM, length=0)
    ),
    "metadata item outside": Damage(
        ("metadata-item-outside-region",), lambda p: p.set_item(VIRTUAL_DISK_ID_ITEM, offset=MIB - 8)
    ),
    "metadata items overlap": Damage(
        ("metadata-item-overlap",), lambda p: p.set_item(VIRTUAL_DISK_ID_ITEM, offset=65540)
    ),
    "metadata item missing": Damage(
        ("metadata-item-missing", "metadata-item-unknown"),
        lambda p: p.set_item(PHYSICAL_SECTOR_SIZE_ITEM, new_id=UNKNOWN, flags=0),
    ),
    "metadata item too long": Damage(
        ("metadata-item-size",), lambda p: p.set_item(PHYSICAL_SECTOR_SIZE_ITEM, length=8)
    ),
    "block size": Damage(
        ("parameter-block-size",), lambda p: p.set_value(FILE_PARAMETERS_ITEM, 3 * MIB)
    ),
    "file parameter flags": Damage(
        ("parameter-flags",), lambda p: p.set_value(FILE_PARAMETERS_ITEM, 8, at=4)
    ),
    "logical sector size": Damage(
        ("parameter-logical-sector-size",), lambda p: p.set_value(LOGICAL_SECTOR_SIZE_ITEM, 520)
    ),
    "physical sector size": Damage(
        ("parameter-physical-sector-size",), lambda p: p.set_value(PHYSICAL_SECTOR_SIZE_ITEM, 1)
    ),
    "disk size": Damage(
        ("parameter-disk-size",), lambda p: p.set_value(VIRTUAL_DISK_SIZE_ITEM, SIZE + 1, length=8)
    ),
    "log without entries": Damage(("log-no-sequence",), lambda p: p.set_headers(log_guid=LOG_GUID)),
    "log entry damaged": Damage(
        ("log-entry-torn", "log-no-sequence"),
        lambda p: (write_entry(p, [3 * MIB]), p.flip(p.current.log_offset + 5000)),
    ),
    "file shorter than its log": Damage(
        ("log-file-too-short",), lambda p: write_entry(p, [], flushed=p.size + MIB)
    ),
    "log over the headers": Damage(("log-target",), lambda p: write_entry(p, [HEADER_1])),
    "log over itself": Damage(("log-target",), lambda p: write_entry(p, [MIB + 8192])),
    "BAT too short": Damage(
        ("bat-too-short",), lambda p: p.set_value(VIRTUAL_DISK_SIZE_ITEM, 1 << 40, length=8)
    ),
    "state 4": Damage(("bat-state",), lambda p: p.set_entry(ABSENT, 4)),
    "partial block without a parent": Damage(
        ("bat-state",), lambda p: p.set_entry(FIRST, p.entry(FIRST) | 1)
    ),
    "reserved bits": Damage(("bat-reserved-bits",), lambda p: p.set_entry(FIRST, p.entry(FIRST) | 0x100)),
    "block outside of the file": Damage(
        ("bat-block-outside-file",), lambda p: p.set_entry(ABSENT, place(end_of(p)))
    ),
    "block far outside": Damage(
        ("bat-block-outside-file",), lambda p: p.set_entry(ABSENT, place((1 << 44) - 1))
    ),
    "file cut off": Damage(
        ("bat-block-outside-file", "file-end-unaligned"), lambda p: p.resize(p.size - 4096)
    ),
    "block in the header section": Damage(
        ("bat-block-in-structure",), lambda p: p.set_entry(ABSENT, place(0))
    ),
    "block in the log": Damage(("bat-block-in-structure",), lambda p: p.set_entry(ABSENT, place(1))),
    "block in the BAT": Damage(("bat-block-in-structure",), lambda p: p.set_entry(ABSENT, place(3))),
    "two blocks in one place": Damage(
        ("bat-block-overlap",), lambda p: p.set_entry(ABSENT, p.entry(FIRST))
    ),
    "bitmap missing": Damage(
        ("bat-bitmap-missing", "space-unused"),
        lambda p: (p.set_entry(FOURTH, p.entry(FOURTH) | 1), p.set_entry(8193, 0)),
        make_child,
    ),
    "bitmap state": Damage(("bat-state", "space-unused"), lambda p: p.set_entry(8193, 1), make_child),
    "bitmap over a block": Damage(
        ("bat-block-overlap", "space-unused"), lambda p: p.set_entry(8193, p.entry(FIRST)), make_child
    ),
    "parent gone": Damage(("parent-missing",), lambda p: parent_of(p.path).unlink(), make_child),
    "parent written": Damage(("parent-linkage",), write_to_parent, make_child),
    "parent without a signature": Damage(
        ("parent-damaged",), lambda p: parent_of(p.path).write_bytes(bytes(SIZE >> 10)), make_child
    ),
    "parent of another format": Damage(("parent-format",), put_vhd_for_parent, make_child),
    "parent with other sectors": Damage(
        ("parent-sector-size",),
        lambda p: Patient(parent_of(p.path)).set_value(LOGICAL_SECTOR_SIZE_ITEM, 4096),
        make_child,
    ),
    "parent damaged": Damage(
        ("parent-damaged",), lambda p: Patient(parent_of(p.path)).set_headers(version=7), make_child
    ),
    "parent of itself": Damage(("parent-loop",), lambda p: name_parent(p, f".\\{p.path.name}"), make_child),
    "locator cut": Damage(
        ("parent-locator-malformed",), lambda p: p.set_item(PARENT_LOCATOR_ITEM, length=30), make_child
    ),
    "locator without a path": Damage(
        ("parent-locator-malformed",),
        lambda p: p.set_locator(pack_parent_locator({PARENT_LINKAGE: braced(UNKNOWN)})),
        make_child,
    ),
    "locator of another type": Damage(
        ("parent-locator-type",), lambda p: p.set_locator(UNKNOWN.bytes_le + bytes(4)), make_child
    ),
    "no parent named": Damage(
        ("parent-locator-missing",), lambda p: p.set_value(FILE_PARAMETERS_ITEM, 2, at=4)
    ),
}  # fmt: skip

# Found, nothing to mend.
HARMLESS: dict[str, Damage] = {
    "headers of one number": Damage(("header-sequence-equal",), swap_sequence),
    "region tables differ": Damage(
        ("region-tables-differ",),
        lambda p: p.set_regions(lambda rows: rows[::-1], copies=1),
    ),
    "regions not required": Damage(
        ("region-not-required",), lambda p: p.set_region(BAT_REGION, required=0)
    ),
    "region unknown": Damage(
        ("region-unknown",),
        lambda p: (
            p.set_regions(lambda rows: [*rows, Region(UNKNOWN, end_of(p) * MIB, MIB, 0)]),
            p.resize(p.size + MIB),
        ),
    ),
    "metadata item unknown": Damage(
        ("metadata-item-unknown",), lambda p: p.add_item(UNKNOWN, bytes(8), flags=1)
    ),
    "log with dead entries": Damage(
        (), lambda p: (write_entry(p, [3 * MIB]), p.set_headers(log_guid=NO_LOG))
    ),
    "old unmapped state": Damage(("bat-state-reserved",), lambda p: p.set_entry(ABSENT, 5)),
    "soft anchor": Damage(
        ("space-unused",),
        lambda p: (p.set_entry(ABSENT, place(end_of(p) + 1, UNMAPPED)), p.resize(p.size + 2 * MIB)),
    ),
    "soft anchor outside of the file": Damage(
        ("bat-anchor-outside-file",), lambda p: p.set_entry(ABSENT, place(end_of(p), UNMAPPED))
    ),
    "soft anchor in a block": Damage(
        ("bat-anchor-overlap",), lambda p: p.set_entry(ABSENT, p.entry(FIRST) & ~7 | UNMAPPED)
    ),
    "gap": Damage(("space-unused",), lambda p: p.set_entry(FIRST, 0)),
    "parent named, and none": Damage(
        ("parent-locator-unused",), lambda p: p.add_item(PARENT_LOCATOR_ITEM, bytes(64), flags=4)
    ),
}  # fmt: skip

DAMAGES = {**MENDABLE, **CORRUPT, **HARMLESS}


def harmed(path: Path, name: str) -> Patient:
    """Make a disk with the damage of this name."""
    damage = DAMAGES[name]
    patient = damage.make(path)
    damage.harm(patient)
    return patient
