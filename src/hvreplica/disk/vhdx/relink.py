"""Give a differencing VHDX another parent locator: the item and its row in the metadata table, all at once.

The item stays where it is if the new one fits there, else it goes to free room of the metadata region. Both
ways every sector that changes passes through one entry of the log, so that a power cut leaves the old locator
or the new one. All other items stay byte for byte.

Spec: [MS-VHDX] 2.6.1.2, 2.6.2.6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.errors import FieldOutOfRange
from hvreplica.formats.guid import braced
from hvreplica.formats.vhdx_locator import (
    PARENT_LINKAGE,
    PARENT_LINKAGE2,
    PATH_KEYS,
    RELATIVE_PATH,
    pack_parent_locator,
    unpack_parent_locator,
)
from hvreplica.formats.vhdx_log import LOG_SECTOR_BYTES
from hvreplica.formats.vhdx_metadata import (
    METADATA_TABLE_BYTES,
    METADATA_TABLE_ENTRY,
    PARENT_LOCATOR_ITEM,
    unpack_metadata_table,
)
from hvreplica.units import KIB

if TYPE_CHECKING:
    import uuid
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from hvreplica.files import BlockFile
    from hvreplica.formats.vhdx_metadata import MetadataEntry, MetadataTable
    from hvreplica.formats.vhdx_region import Region


# Far above any path, and what one entry of the log holds in whole sectors whatever way it lies.
_ITEM_BYTES_MAX = 256 * KIB


def locator_change(
    file: BlockFile, region: Region, *, linkages: Sequence[uuid.UUID], relative_path: str | None
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return (file offsets, 4096 bytes each) of the sectors of `region`, the metadata, that change.

    Read from `file` as it is now. linkages: one, or two while a parent changes. relative_path: None keeps the
    paths. Raises: FieldOutOfRange where the region has no room, or the file has no parent.
    """
    start = region.file_offset
    table = unpack_metadata_table(file.read(start, METADATA_TABLE_BYTES), file_offset=start)
    row = table.find(PARENT_LOCATOR_ITEM)
    old = unpack_parent_locator(file.read(start + row.offset, row.length), file_offset=start + row.offset)
    item = pack_parent_locator(_relinked(old.entries, linkages, relative_path))
    offset = _place_for(table, row, len(item), region)
    packed = METADATA_TABLE_ENTRY.pack(item_id=row.item_id, offset=offset, length=len(item), flags=row.flags)
    sectors: dict[int, bytearray] = {}
    for file_offset, data in ((row.at, packed), (start + offset, item)):
        _lay(file, sectors, file_offset, data)
    return (
        np.array(list(sectors), np.int64),
        np.stack([np.frombuffer(sector, np.uint8) for sector in sectors.values()]),
    )


def _relinked(
    entries: Mapping[str, str], linkages: Sequence[uuid.UUID], relative_path: str | None
) -> dict[str, str]:
    """Return a locator's `entries` with other linkages, and with another path if one is given.

    A new path makes all old ones stale, which would be tried after it. What is not known here is kept.
    """
    stale = (PARENT_LINKAGE, PARENT_LINKAGE2, *(PATH_KEYS if relative_path is not None else ()))
    linked = dict(zip((PARENT_LINKAGE, PARENT_LINKAGE2), map(braced, linkages), strict=False))
    if relative_path is not None:
        linked[RELATIVE_PATH] = relative_path
    return linked | {key: value for key, value in entries.items() if key not in stale}


def _place_for(table: MetadataTable, row: MetadataEntry, length: int, region: Region) -> int:
    """Return where in the region an item of `length` fits beside all but the old one, there first."""
    taken = sorted((each.offset, each.offset + each.length) for each in table.entries if each is not row)
    ends = [METADATA_TABLE_BYTES, *(end for _, end in taken)]
    room = region.length if length <= _ITEM_BYTES_MAX else 0
    for offset in (row.offset, *ends):
        clear = all(end <= offset or start >= offset + length for start, end in taken)
        if offset >= METADATA_TABLE_BYTES and clear and offset + length <= room:
            return offset
    raise FieldOutOfRange(
        "the metadata region has no room for the name of the parent",
        offset=row.at,
        field="length",
        expected=f"{length} free bytes in a region of {region.length}, at most {_ITEM_BYTES_MAX}",
        actual=f"{len(table.entries)} items",
        spec="[MS-VHDX] 2.6",
        hint="give the parent a shorter name",
    )


def _lay(file: BlockFile, sectors: dict[int, bytearray], file_offset: int, data: bytes) -> None:
    """Put `data` into copies of the file's sectors."""
    end = file_offset + len(data)
    for at in range(file_offset // LOG_SECTOR_BYTES * LOG_SECTOR_BYTES, end, LOG_SECTOR_BYTES):
        if at not in sectors:
            sectors[at] = bytearray(file.read(at, LOG_SECTOR_BYTES))
        low, high = max(at, file_offset), min(at + LOG_SECTOR_BYTES, end)
        sectors[at][low - at : high - at] = data[low - file_offset : high - file_offset]
