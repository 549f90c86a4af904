"""An intent journal in memory, and what it, its file and its bitmaps say, as sets of regions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.formats.journal import BITMAP_OFFSET, DiskIdentity, choose_header, unpack_sectors
from hvreplica.tracking.journal import IntentJournal
from hvreplica.units import GIB, MIB
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

PATH = Path("/state/journal/0.ij")
REGION = IntentJournal.REGION_BYTES
IDENTITY = DiskIdentity(None, file_bytes=1000, mtime_ns=50, inode=7, device=1)


def new_files() -> FaultFiles:
    """Return a file system with the journal's folder."""
    return FaultFiles(PATH.parent)


def new_journal(files: FaultFiles, virtual_bytes: int = 64 * GIB) -> IntentJournal:
    """Make a journal."""
    return IntentJournal.create(files, PATH, disk_index=3, virtual_bytes=virtual_bytes, clock=FakeClock())


def opened(files: FaultFiles, virtual_bytes: int = 64 * GIB) -> IntentJournal:
    """Open it again."""
    return IntentJournal.open(files, PATH, virtual_bytes=virtual_bytes)


def rows(*extents: tuple[int, int]) -> NDArray[np.int64]:
    """Return extents as arm() takes them."""
    return np.array(extents, np.int64).reshape(-1, 2)


def of_regions(regions: Iterable[int]) -> NDArray[np.int64]:
    """Return extents of one byte in each region."""
    return rows(*((region * REGION, 1) for region in regions))


def bits(bitmap: NDArray[np.uint8]) -> set[int]:
    """Return the bits that are set."""
    bitmap = bitmap.copy()  # numpy refuses to count what another thread changes meanwhile
    used = np.flatnonzero(bitmap)
    places, bits = np.nonzero(np.unpackbits(bitmap[used], bitorder="little").reshape(-1, 8))
    return set((used[places] * 8 + bits).tolist())


def bitmap(regions: Iterable[int]) -> NDArray[np.uint8]:
    """Return a bitmap with these bits."""
    found = np.zeros(2 * MIB, np.uint8)
    for region in regions:
        found[region // 8] |= 1 << region % 8
    return found


def marked(journal: IntentJournal) -> set[int]:
    """Return what a journal says that a crash would leave unknown."""
    return {
        region
        for offset, length in journal.regions().tolist()
        for region in range(offset // REGION, -(-(offset + length) // REGION))
    }


def remove(journal: IntentJournal, regions: Iterable[int]) -> None:
    """Do what native code and the owner do at a cut."""
    removed = journal.armed & bitmap(regions)
    journal.armed &= ~removed
    journal.cleared(removed)


def in_file(files: FaultFiles) -> set[int]:
    """Return what the journal's file says."""
    content = files.content_of(PATH)
    count = choose_header(content[:BITMAP_OFFSET]).region_count
    return bits(unpack_sectors(content[BITMAP_OFFSET:], count).bitmap)


def syncs(files: FaultFiles) -> int:
    """Return how many syncs there were."""
    return sum(event.kind == "sync" for event in files.trace().events)


def writes(files: FaultFiles) -> list[int]:
    """Return the offsets of all writes."""
    return [event.offset for event in files.trace().events if event.kind == "write"]
