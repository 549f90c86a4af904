"""What compacting needs of a VHD: places are a bitmap with its block, and the last thing is the footer.

What lies before the first block stays as it is: writers keep things there that no specification names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.disk.moves import Moves, place_before, plan_moves
from hvreplica.disk.vhd.resize import drop_batmap, first_use, read_again, repoint, whole_ranges
from hvreplica.disk.vhd.space import first_place
from hvreplica.formats.vhd_footer import SECTOR_BYTES
from hvreplica.units import MIB, align_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from hvreplica.disk.vhd.disk import VhdDisk
    from hvreplica.files import BlockFile

_PAGE_BYTES = 4096


class VhdFile:
    """See compact.CompactFile."""

    def __init__(self, disk: VhdDisk) -> None:
        self._disk = disk
        self._parts = disk.parts()
        self._geometry = self._parts.image.geometry
        self._floor = first_use(self._parts)
        self._blocks = np.empty(0, np.int64)

    @property
    def file(self) -> BlockFile:
        return self._parts.file

    def begin(self) -> None:
        self._parts.session.begin()
        drop_batmap(self._parts)

    def held(self, first_block: int, last_block: int) -> NDArray[np.int64]:
        blocks = self._parts.table.held_blocks(first_block, last_block)
        self._parts.table.ensure_checked(blocks)
        return blocks

    def unneeded(self, blocks: NDArray[np.int64]) -> NDArray[np.bool_]:
        unneeded = ~self._parts.table.present(blocks)
        sectors = self._geometry.sectors_per_block
        for index in np.flatnonzero(unneeded).tolist():
            unneeded[index] = self._parts.bitmaps.none_set(int(blocks[index]) * sectors, sectors)
        return unneeded

    def can_be_zero(self, block: int) -> bool:
        """Return whether the parent, which shows where a block has no place, has zeros there too."""
        parent = self._disk.parent
        if parent is None:
            return True
        start = block * self._geometry.block_bytes
        end = min(start + self._geometry.block_bytes, self._disk.virtual_bytes, parent.virtual_bytes)
        for low in range(start, end, MIB):
            buffer = bytearray(min(MIB, end - low))
            parent.read_into(buffer, low)
            if not native.is_zero(buffer):
                return False
        return True

    def forget(self, blocks: NDArray[np.int64]) -> None:
        self._parts.session.forget(blocks)

    def zero(self, blocks: NDArray[np.int64]) -> None:
        self._parts.session.discard(blocks)

    def released(self) -> int:
        self._parts.session.flush()
        return 0

    def lower_table(self) -> None:
        parts = self._parts
        start, length = parts.image.table_place(parts.image.footer.at)
        used = [row[:2] for row in parts.image.structures if row[0] != start]
        target = place_before(
            start,
            length,
            np.concatenate((np.array(used, np.int64), whole_ranges(parts)[:, 1:])),
            floor=self._floor,
            aligned=lambda at: align_up(at, SECTOR_BYTES),
        )
        if target is None:
            return
        parts.file.write(parts.file.read(start, length), target)
        parts.file.sync()
        repoint(parts, target, parts.image.header.max_table_entries)
        self._parts = read_again(parts)
        self._parts.session.begin()

    def plan(self) -> tuple[NDArray[np.int64], Moves]:
        ranges = whole_ranges(self._parts)
        self._blocks, movable = ranges[:, 0], ranges[:, 1:]
        pinned = [row[:2] for row in self._parts.image.structures if row[2] != "footer"]
        rows = np.array([*pinned, self._parts.image.table_place(self._parts.image.footer.at)], np.int64)
        return movable, plan_moves(movable, rows, floor=self._floor, aligned=self._place_from(movable))

    def _place_from(self, movable: NDArray[np.int64]) -> Callable[[int], int]:
        """Return what aligns places: to pages where the file does, as gaps would be too small elsewhere."""
        data_offsets = movable[:, 0] + self._geometry.bitmap_bytes
        if (data_offsets % _PAGE_BYTES).any():
            return lambda at: align_up(at, SECTOR_BYTES)
        return lambda at: first_place(at, self._geometry)

    def move(self, parts: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        self._parts.session.move(self._blocks[parts], targets)
        self._parts.session.flush()

    def cut(self) -> None:
        self._parts.session.cut(floor=self._floor)
