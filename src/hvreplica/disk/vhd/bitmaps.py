"""Where the sector bitmaps of a VHD stand: each before the data of its block, one page for each block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.bitmaps import SectorBitmaps
from hvreplica.formats.vhd_footer import SECTOR_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hvreplica.disk.vhd.table import VhdTable
    from hvreplica.files import BlockFile
    from hvreplica.formats.vhd_bat import BlockGeometry


def open_bitmaps(file: BlockFile, table: VhdTable, geometry: BlockGeometry) -> SectorBitmaps:
    """Return the sector bitmaps of the blocks of `table`; of a block without a place no sector counts."""

    def load(block: int) -> NDArray[np.uint8]:
        octets = np.zeros(geometry.bitmap_bytes, np.uint8)
        file_offset = table.bitmap_offset(block)
        if file_offset is not None:
            file.read_into(octets.data, file_offset)
        return octets

    return SectorBitmaps(
        sector_bytes=SECTOR_BYTES, page_sectors=geometry.sectors_per_block, msb_first=True, load=load
    )
