"""Create an empty VHDX.

    0        header section        2 MiB    metadata region
    1 MiB    log, 1 MiB            3 MiB    BAT, then blocks (dynamic: none yet; fixed: all, as holes)

The file is written under a temporary name, synced, and only then renamed: no file that claims to be a VHDX
and is not complete can be found under its name after a crash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.vhdx.headers import Headers
from hvreplica.formats.guid import NIL
from hvreplica.formats.vhdx_bat import BAT_ENTRY_BYTES, BatGeometry, present_entry
from hvreplica.formats.vhdx_header import HEADER_OFFSETS, Header, pack_identifier
from hvreplica.formats.vhdx_metadata import (
    BLOCK_BYTES_MAX,
    DiskParameters,
    pack_metadata,
)
from hvreplica.formats.vhdx_region import (
    BAT_REGION,
    METADATA_REGION,
    REGION_TABLE_OFFSETS,
    Region,
    pack_region_table,
)
from hvreplica.units import MIB, align_up

if TYPE_CHECKING:
    import uuid

    from hvreplica.clock import Clock
    from hvreplica.files import BlockFile

CREATOR = "hvreplica"
LOG_OFFSET, LOG_LENGTH = MIB, MIB
METADATA_OFFSET, METADATA_LENGTH = 2 * MIB, MIB
BAT_OFFSET = 3 * MIB
_BLOCK_BYTES_DEFAULT_MIN = 2 * MIB
_BLOCK_COUNT_DEFAULT_MAX = 1 << 20
_FIXED_WINDOW_BLOCKS = 1 << 17


def default_block_bytes(virtual_bytes: int) -> int:
    """Return the block size for a new disk: 2 MiB, doubled until there are at most 2**20 blocks.

    Small blocks keep a sparse disk's file short and cost nothing but table entries; 2**20 of them are an 8
    MiB BAT, which opens in milliseconds. 2 TiB still has 2 MiB blocks, 64 TiB has 64 MiB.
    """
    block_bytes = _BLOCK_BYTES_DEFAULT_MIN
    while virtual_bytes > block_bytes * _BLOCK_COUNT_DEFAULT_MAX and block_bytes < BLOCK_BYTES_MAX:
        block_bytes *= 2
    return block_bytes


def write_empty_vhdx(
    file: BlockFile, parameters: DiskParameters, *, clock: Clock, locator: bytes = b""
) -> None:
    """Fill the empty `file` with a VHDX of validated `parameters`, identifier last, and sync it.

    locator: the packed parent locator of a disk with a parent.

    What Windows' own parsers insist on is kept: regions marked required, 1 MiB log, item flags. Spec: [MS-
    VHDX] 2.
    """
    geometry = BatGeometry.of(
        virtual_bytes=parameters.virtual_bytes,
        block_bytes=parameters.block_bytes,
        logical_sector_bytes=parameters.logical_sector_bytes,
        has_parent=parameters.has_parent,
    )
    bat_length = align_up(geometry.entry_count * BAT_ENTRY_BYTES, MIB)
    end = BAT_OFFSET + bat_length
    if parameters.is_fixed:
        end += geometry.block_count * geometry.block_bytes
    file.resize(end)
    if parameters.is_fixed:
        _write_full_bat(file, geometry, first_offset=BAT_OFFSET + bat_length)
    file.write(pack_metadata(parameters, locator), METADATA_OFFSET)
    regions = (
        Region(METADATA_REGION, METADATA_OFFSET, METADATA_LENGTH, required=1),
        Region(BAT_REGION, BAT_OFFSET, bat_length, required=1),
    )
    table = pack_region_table(regions)
    for file_offset in REGION_TABLE_OFFSETS:
        file.write(table, file_offset)
    file_write_guid, data_write_guid = clock.guid(), clock.guid()
    for sequence_number, file_offset in enumerate(HEADER_OFFSETS, start=1):
        header = Header(
            sequence_number=sequence_number,
            file_write_guid=file_write_guid,
            data_write_guid=data_write_guid,
            log_guid=NIL,
            log_length=LOG_LENGTH,
            log_offset=LOG_OFFSET,
        )
        file.write(header.pack(), file_offset)
    file.sync()
    file.write(pack_identifier(CREATOR), 0)
    file.sync()
    Headers(file)  # what was written must read back as a valid VHDX before it gets its name


def _write_full_bat(file: BlockFile, geometry: BatGeometry, *, first_offset: int) -> None:
    """Write the entries of blocks that lie one after the other in the file."""
    for first in range(0, geometry.block_count, _FIXED_WINDOW_BLOCKS):
        blocks = np.arange(first, min(first + _FIXED_WINDOW_BLOCKS, geometry.block_count), dtype=np.int64)
        indices = geometry.index_of(blocks)
        row = np.zeros(int(indices[-1] - indices[0]) + 1, "<u8")
        row[indices - indices[0]] = present_entry(first_offset + blocks * geometry.block_bytes)
        file.write(row.view(np.uint8).data, BAT_OFFSET + int(indices[0]) * BAT_ENTRY_BYTES)


def parameters_for(
    *,
    virtual_bytes: int,
    block_bytes: int | None,
    flags: int,
    virtual_disk_id: uuid.UUID,
    logical_sector_bytes: int,
    physical_sector_bytes: int,
) -> DiskParameters:
    """Return checked parameters of a new disk; block_bytes None chooses by size. Raises: FieldOutOfRange."""
    parameters = DiskParameters(
        virtual_bytes=virtual_bytes,
        block_bytes=default_block_bytes(virtual_bytes) if block_bytes is None else block_bytes,
        logical_sector_bytes=logical_sector_bytes,
        physical_sector_bytes=physical_sector_bytes,
        virtual_disk_id=virtual_disk_id,
        flags=flags,
    )
    parameters.validate()
    return parameters
