"""Change the size of a VHDX. Each step leaves a valid file of the old size, or of the new one.

    grow     1. room in the BAT: entries behind the last block become 0, or the table goes, copied, to the end
                of the file by one entry of the log
             2. the disk is shown with its new size, though the file has the old one; what would not read as
                zeros in the new range is made so, and a fixed disk gets its blocks
             3. the size, by one entry of the log
    shrink   1. blocks behind the new end become PAYLOAD_BLOCK_ZERO, sector bitmaps there go
             2. the size, by one entry of the log
             3. the file is cut

Spec: [MS-VHDX] 2.3.1, 2.5, 2.6.2.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.grown import hide_what_grows
from hvreplica.disk.vhdx.open import open_vhdx
from hvreplica.formats.vhdx_bat import BAT_ENTRY_BYTES, BatGeometry, has_place
from hvreplica.formats.vhdx_log import LOG_SECTOR_BYTES
from hvreplica.formats.vhdx_metadata import VIRTUAL_DISK_SIZE, VIRTUAL_DISK_SIZE_ITEM
from hvreplica.formats.vhdx_region import (
    BAT_REGION,
    REGION_TABLE_BYTES,
    REGION_TABLE_OFFSETS,
    moved_region,
)
from hvreplica.units import MIB, align_down, align_up

if TYPE_CHECKING:
    from hvreplica.clock import Clock
    from hvreplica.disk.vhdx.disk import VhdxDisk, VhdxParts
    from hvreplica.files import BlockFile

_WINDOW_BYTES = MIB
_WINDOW_BLOCKS = 1 << 20


def grow_vhdx(disk: VhdxDisk, virtual_bytes: int, *, clock: Clock) -> None:
    """Make a disk that is open for writing, with its parent, longer; durable on return.

    The disk is closed then, or after an error as good as abandoned: its file is open, its content old or new.
    """
    parts = disk.parts()
    parameters = parts.image.parameters
    geometry = BatGeometry.of(
        virtual_bytes=virtual_bytes,
        block_bytes=parameters.block_bytes,
        logical_sector_bytes=parameters.logical_sector_bytes,
        has_parent=parameters.has_parent,
    )
    parts.session.begin()
    parts.session.clear()  # or a replay would bring entries back that are cleared here
    needed = align_up(geometry.entry_count * BAT_ENTRY_BYTES, MIB)
    if needed > parts.image.bat.length:
        move_bat(parts, parts.session.reserve(needed), needed)
    else:
        _clear_unused(parts, geometry.entry_count)
    parts.session.clear()
    shown = open_vhdx(parts.file, clock=clock, virtual_bytes=virtual_bytes)
    if disk.parent is not None:
        shown.attach(disk.parent)
    parts = shown.parts()
    parts.session.begin()
    if parameters.is_fixed:
        for first in range(disk.block_count, shown.block_count, _WINDOW_BLOCKS):
            end = min(first + _WINDOW_BLOCKS, shown.block_count)
            parts.session.allocate(np.arange(first, end, dtype=np.int64))
    hide_what_grows(shown, disk.virtual_bytes)
    _set_size(parts, virtual_bytes)
    shown.close()


def shrink_vhdx(disk: VhdxDisk, virtual_bytes: int) -> None:
    """Make a disk that is open for writing, and reads as zeros behind its new end, shorter; durable on
    return.
    """
    parts = disk.parts()
    geometry = parts.image.geometry
    parts.session.begin()
    first = -(-virtual_bytes // geometry.block_bytes)
    for start in range(first, geometry.block_count, _WINDOW_BLOCKS):
        end = min(start + _WINDOW_BLOCKS, geometry.block_count)
        blocks = parts.bat.held_blocks(start, end - 1)
        parts.session.discard(blocks[has_place(parts.bat.entries_of(blocks))])
    parts.session.flush()
    if parts.image.parameters.has_parent:
        # Only now: a block that is partially present needs its bitmap to the last.
        chunks = parts.bat.bitmap_chunks()
        parts.session.release_bitmaps(chunks[chunks * geometry.chunk_ratio >= first])
    _set_size(parts, virtual_bytes)
    parts.session.cut()


def move_bat(parts: VhdxParts, file_offset: int, length: int) -> None:
    """Put the table at `file_offset`, which is in no use, in `length` bytes, multiples of 1 MiB.

    What the open disk knows of the table is stale then: open it again. After begin(), with an empty log.
    """
    geometry = parts.image.geometry
    _copy_entries(parts, file_offset, first=0, end=geometry.entry_count)
    table = parts.file.read(parts.image.region_table_offset, REGION_TABLE_BYTES)
    table = moved_region(table, BAT_REGION, file_offset=file_offset, length=length)
    _commit(parts, [(at, table) for at in REGION_TABLE_OFFSETS])


def _clear_unused(parts: VhdxParts, end: int) -> None:
    """Make the entries from that of the last block to `end` 0 that no block of the disk has."""
    geometry = parts.image.geometry
    first = int(geometry.index_of(np.array([geometry.block_count - 1]))[0]) + 1
    if _copy_entries(parts, parts.image.bat.file_offset, first=first, end=end):
        parts.file.sync()


def _copy_entries(parts: VhdxParts, file_offset: int, *, first: int, end: int) -> bool:
    """Copy entries of the table to one at `file_offset`, leaving out what no block of the disk has.

    Returns whether anything changed.
    """
    file, source = parts.file, parts.image.bat.file_offset
    has_parent = parts.image.parameters.has_parent
    changed = False
    low, high = source + first * BAT_ENTRY_BYTES, source + end * BAT_ENTRY_BYTES
    for at, length in list(file.data_extents(low, high)):
        start, stop = max(align_down(at, BAT_ENTRY_BYTES), low), align_up(at + length, BAT_ENTRY_BYTES)
        for window in range(start, stop, _WINDOW_BYTES):
            octets = file.read(window, min(_WINDOW_BYTES, stop - window))
            entries = np.frombuffer(octets, "<u8").copy()
            indices = (window - source) // BAT_ENTRY_BYTES + np.arange(len(entries))
            entries[~parts.image.geometry.is_used(indices, has_parent=has_parent)] = 0
            if file_offset != source or entries.tobytes() != octets:
                file.write(entries.view(np.uint8).data, window - source + file_offset)
                changed = True
    return changed


def _set_size(parts: VhdxParts, virtual_bytes: int) -> None:
    table = parts.image.metadata_table
    at = table.at + table.find(VIRTUAL_DISK_SIZE_ITEM).offset
    _commit(parts, [(at, VIRTUAL_DISK_SIZE.pack(virtual_disk_size=virtual_bytes))])


def _commit(parts: VhdxParts, changes: list[tuple[int, bytes]]) -> None:
    """Change bytes of structures, in order and apart, all at once and durably."""
    sectors: dict[int, bytes] = {}
    for at, data in changes:
        sectors.update(_changed_sectors(parts.file, at, data))
    parts.session.commit_structures(
        np.array(list(sectors), np.int64),
        np.frombuffer(b"".join(sectors.values()), np.uint8).reshape(-1, LOG_SECTOR_BYTES),
    )


def _changed_sectors(file: BlockFile, at: int, data: bytes) -> dict[int, bytes]:
    start, end = align_down(at, LOG_SECTOR_BYTES), align_up(at + len(data), LOG_SECTOR_BYTES)
    before = file.read(start, end - start)
    after = before[: at - start] + data + before[at - start + len(data) :]
    return {
        start + low: after[low : low + LOG_SECTOR_BYTES]
        for low in range(0, end - start, LOG_SECTOR_BYTES)
        if after[low : low + LOG_SECTOR_BYTES] != before[low : low + LOG_SECTOR_BYTES]
    }
