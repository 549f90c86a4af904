"""Create an empty VHD.

    dynamic         copy of the footer | header | BAT | gap | footer
    differencing    copy of the footer | header | BAT | W2ku | W2ru | gap | footer
    fixed           hole | footer

The footer of the first two stands where the first block will: so that the block's data is on 4 KiB. What
creator and geometry say, and why, is in docs/design/0006-vhd-creator-and-geometry.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.clock import hrl_timestamp
from hvreplica.disk.vhd.image import read_footer, read_image
from hvreplica.disk.vhd.parent import names_of
from hvreplica.disk.vhd.space import first_place
from hvreplica.errors import FieldOutOfRange
from hvreplica.formats.vhd_bat import NO_OFFSET, BlockGeometry, pack_bat
from hvreplica.formats.vhd_footer import (
    FOOTER,
    NO_DATA_OFFSET,
    SECTOR_BYTES,
    VIRTUAL_BYTES_MAX,
    Footer,
    VhdType,
    geometry_of,
)
from hvreplica.formats.vhd_header import (
    BAT_ENTRY_BYTES,
    DYNAMIC_HEADER,
    DYNAMIC_HEADER_BYTES,
    HEADER_OFFSET,
    DynamicHeader,
)
from hvreplica.formats.vhd_locator import (
    LOCATOR_COUNT,
    LOCATOR_SPACE_BYTES,
    LocatorEntry,
)
from hvreplica.units import KIB, MIB, align_up

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hvreplica.clock import Clock
    from hvreplica.disk.disk import Disk
    from hvreplica.disk.vhd.parent import ParentNames
    from hvreplica.files import BlockFile

CREATOR_APPLICATION = b"win "
CREATOR_VERSION = 0x000A_0000
CREATOR_HOST_OS = b"Wi2k"
TABLE_OFFSET = HEADER_OFFSET + DYNAMIC_HEADER_BYTES
# All that Windows makes; others can be read.
BLOCK_BYTES_ALLOWED = (512 * KIB, 2 * MIB)
_BLOCK_BYTES_DEFAULT = 2 * MIB


def vhd_writer(
    path: Path,
    below: Disk | None,
    *,
    virtual_bytes: int,
    fixed: bool,
    block_bytes: int | None,
    logical_sector_bytes: int,
    clock: Clock,
) -> Callable[[BlockFile], None]:
    """Return what writes an empty VHD into the empty file that will be called `path`, and syncs it.

    below: the parent of a differencing disk. Raises: FieldOutOfRange for what VHD cannot be; ParentMismatch
    for a parent of another format.
    """
    _require_parameters(path, virtual_bytes, block_bytes, logical_sector_bytes)
    footer = new_footer(virtual_bytes, VhdType.FIXED if fixed else VhdType.DYNAMIC, clock=clock)
    if below is not None:
        parent = names_of(path, below)
        footer = new_footer(virtual_bytes, VhdType.DIFFERENCING, clock=clock)
    elif fixed:
        return lambda file: _write_fixed(file, footer)
    else:
        parent = None
    chosen = block_bytes or _BLOCK_BYTES_DEFAULT
    return lambda file: _write_empty(file, footer, chosen, parent)


def new_footer(virtual_bytes: int, disk_type: VhdType, *, clock: Clock) -> Footer:
    """Return the footer of a new disk."""
    geometry = geometry_of(virtual_bytes)
    return Footer(
        data_offset=NO_DATA_OFFSET if disk_type == VhdType.FIXED else HEADER_OFFSET,
        time_stamp=hrl_timestamp(clock.now_s()),
        creator_application=CREATOR_APPLICATION,
        creator_version=CREATOR_VERSION,
        creator_host_os=CREATOR_HOST_OS,
        original_size=virtual_bytes,
        current_size=virtual_bytes,
        cylinders=geometry.cylinders,
        heads=geometry.heads,
        sectors_per_track=geometry.sectors_per_track,
        disk_type=disk_type,
        unique_id=clock.guid(),
    )


def _require_parameters(
    path: Path, virtual_bytes: int, block_bytes: int | None, logical_sector_bytes: int
) -> None:
    if not 0 < virtual_bytes <= VIRTUAL_BYTES_MAX or virtual_bytes % SECTOR_BYTES:
        raise FieldOutOfRange(
            "a VHD cannot have this size",
            path=path,
            field="size",
            expected=f"a multiple of 512, at most {VIRTUAL_BYTES_MAX}",
            actual=virtual_bytes,
            spec=FOOTER.spec,
            hint="a VHDX holds up to 64 TiB",
        )
    if block_bytes is not None and block_bytes not in BLOCK_BYTES_ALLOWED:
        raise FieldOutOfRange(
            "a VHD with blocks of this size would not be accepted by Windows",
            path=path,
            field="block_size",
            expected=" or ".join(str(each) for each in BLOCK_BYTES_ALLOWED),
            actual=block_bytes,
            spec=DYNAMIC_HEADER.spec,
        )
    if logical_sector_bytes != SECTOR_BYTES:
        raise FieldOutOfRange(
            "a VHD has sectors of 512 bytes only",
            path=path,
            field="logical_sector_size",
            expected=SECTOR_BYTES,
            actual=logical_sector_bytes,
            hint="keep disks with larger sectors as VHDX or raw: their guests count in such sectors",
        )


def _write_fixed(file: BlockFile, footer: Footer) -> None:
    file.resize(footer.current_size)
    file.write(footer.pack(), footer.current_size)
    file.sync()
    read_footer(file)  # what was written must read back before it gets its name


def _write_empty(file: BlockFile, footer: Footer, block_bytes: int, parent: ParentNames | None) -> None:
    geometry = BlockGeometry.of(virtual_bytes=footer.current_size, block_bytes=block_bytes)
    table = pack_bat(np.full(geometry.block_count, NO_OFFSET, np.int64))
    at = TABLE_OFFSET + align_up(geometry.block_count * BAT_ENTRY_BYTES, SECTOR_BYTES)
    entries = []
    for platform_code, data in parent.locators if parent is not None else ():
        space = max(LOCATOR_SPACE_BYTES, align_up(len(data), SECTOR_BYTES))
        entries.append(LocatorEntry(platform_code, space, len(data), at))
        file.write(data, at)
        at += space
    header = DynamicHeader(
        table_offset=TABLE_OFFSET,
        max_table_entries=geometry.block_count,
        block_size=block_bytes,
        locators=(*entries, *(LocatorEntry(),) * (LOCATOR_COUNT - len(entries))),
    )
    if parent is not None:
        header = replace(header, parent_unique_id=parent.unique_id, parent_name=parent.name)
    end = first_place(at, geometry)
    file.resize(end)
    # Behind the last entry the sector is filled up as absent, as Windows does.
    file.write(table.ljust(align_up(len(table), SECTOR_BYTES), b"\xff"), TABLE_OFFSET)
    file.write(header.pack(), HEADER_OFFSET)
    for file_offset in (0, end):
        file.write(footer.pack(), file_offset)
    file.sync()
    read_image(file, read_footer(file))  # what was written must read back before it gets its name
