"""The primary's intent journal, whose file a power cut, a bad sector or a stranger may have changed."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np

from hvreplica.formats.journal import (
    BITMAP_OFFSET,
    HEADER_BYTES,
    HEADER_SPACING_BYTES,
    SECTOR_BYTES,
    DiskIdentity,
)
from hvreplica.native import crc32c
from hvreplica.tracking.journal import IntentJournal, read_regions
from hvreplica.units import GIB, MIB, TIB
from tests.fuzz.registry import Fuzzer
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

_PATH = Path("/j/0.ij")
_FIRST = np.array([[0, 1]], np.int64)


def _seeds() -> list[bytes]:
    seeds = []
    for virtual_bytes in (9 * MIB, 40 * GIB, TIB):
        files = FaultFiles(_PATH.parent)
        journal = IntentJournal.create(
            files, _PATH, disk_index=1, virtual_bytes=virtual_bytes, clock=FakeClock()
        )
        journal.arm(np.array([[0, 1], [virtual_bytes - 512, 512]], np.int64))
        identity = DiskIdentity(uuid.UUID(int=1), 1 << 30, 1 << 60, 7, 2049, uuid.UUID(int=2))
        journal.record(identity, clean=False)
        seeds.append(files.content_of(_PATH))
    return seeds


def _repair(data: bytes) -> bytes:
    """Set the checksums of both headers and of the first sectors right."""
    repaired = bytearray(data)
    for at in (0, HEADER_SPACING_BYTES):
        if at + HEADER_BYTES <= len(data):
            repaired[at + 12 : at + 16] = bytes(4)
            value = crc32c(repaired[at : at + HEADER_BYTES])
            repaired[at + 12 : at + 16] = value.to_bytes(4, "little")
    for at in range(BITMAP_OFFSET, min(len(data), BITMAP_OFFSET + 8 * SECTOR_BYTES), SECTOR_BYTES):
        value = crc32c(repaired[at + 4 : at + SECTOR_BYTES])
        repaired[at : at + 4] = value.to_bytes(4, "little")
    return bytes(repaired)


def _attack(data: bytes) -> None:
    """Whatever is read is what an open journal says, and what it says goes on to be a journal."""
    files = FaultFiles()
    files.load(_PATH, data)
    header, before = read_regions(files, _PATH)
    journal = IntentJournal.open(files, _PATH, virtual_bytes=header.virtual_bytes)
    assert (journal.regions() == before).all()
    assert not len(before) or int(before[-1].sum()) <= header.virtual_bytes
    journal.arm(_FIRST)
    journal.record(DiskIdentity(None, 1, 2, 3, 4), clean=True)
    after, extents = read_regions(files, _PATH)
    assert (extents == journal.regions()).all()
    assert int(extents[0, 0]) == 0
    assert after.sequence == header.sequence + 1


FUZZERS = (
    Fuzzer("journal", _seeds, _attack, repair=_repair, hot=lambda: (0, HEADER_SPACING_BYTES, BITMAP_OFFSET)),
)
