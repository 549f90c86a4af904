"""Where the sector bitmaps of a differencing VHDX stand: 4 KiB pages of the bitmap blocks that its BAT names.

Spec: [MS-VHDX] 2.4, 2.5.1.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.bitmaps import SectorBitmaps
from hvreplica.errors import FieldOutOfRange
from hvreplica.formats.vhdx_bat import BITMAP_BLOCK_BYTES
from hvreplica.formats.vhdx_log import LOG_SECTOR_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hvreplica.disk.vhdx.bat import Bat
    from hvreplica.files import BlockFile

_PAGES_PER_BLOCK = BITMAP_BLOCK_BYTES // LOG_SECTOR_BYTES
_PAGE_SECTORS = LOG_SECTOR_BYTES * 8


def open_bitmaps(file: BlockFile, bat: Bat, *, sector_bytes: int) -> SectorBitmaps:
    """Return the sector bitmaps that `bat` names in `file`."""

    def load(page: int) -> NDArray[np.uint8]:
        octets = np.empty(LOG_SECTOR_BYTES, np.uint8)
        file.read_into(octets.data, page_offset(bat, page))
        return octets

    return SectorBitmaps(sector_bytes=sector_bytes, page_sectors=_PAGE_SECTORS, msb_first=False, load=load)


def page_offset(bat: Bat, page: int) -> int:
    """Return where a page stands in the file. Raises: FieldOutOfRange if its chunk has no bitmap block."""
    chunk, within = divmod(page, _PAGES_PER_BLOCK)
    block = bat.bitmap_block(chunk)
    if block is None:
        raise FieldOutOfRange(
            f"a block of chunk {chunk} is partially present, and the chunk has no sector bitmap",
            path=bat.path,
            offset=bat.bitmap_entry_offset(chunk),
            field="state",
            expected="6 in the BAT entry of the sector bitmap",
            actual=0,
            spec="[MS-VHDX] 2.5.1.2",
            hint="the disk is damaged; restore it from a copy",
        )
    return block + within * LOG_SECTOR_BYTES
