"""The block allocation table of an open VHD, in the form that all disks of blocks share.

A block with a place begins as partially present: only its sector bitmap knows what of it counts. Bitmaps are
read when their blocks are first used, many at once, and a full one makes its block fully present in memory.

Thread rule: as BlockTable; what ensure_checked() changes it changes under the table's own lock.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.disk.table import ENTRIES_PER_PAGE, BlockTable
from hvreplica.formats.vhd_bat import NO_OFFSET, pack_bat, unpack_bat, validate_bat
from hvreplica.formats.vhd_footer import SECTOR_BYTES
from hvreplica.formats.vhd_header import BAT_ENTRY_BYTES
from hvreplica.formats.vhdx_bat import STATE_MASK, PayloadState, has_place

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hvreplica.disk.vhd.image import Image
    from hvreplica.files import BlockFile

_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
_ENTRIES_PER_SECTOR = SECTOR_BYTES // BAT_ENTRY_BYTES
_SECTOR_SHIFT = _ENTRIES_PER_SECTOR.bit_length() - 1
_READ_BYTES_MAX = 1 << 20  # of bitmaps at once


class VhdTable(BlockTable):
    """The table of `image` in `file`. Offsets of entries are those of the data, behind the bitmaps."""

    def __init__(self, file: BlockFile, image: Image) -> None:
        """Load and check the table. Raises: FormatError for entries that cannot be."""
        self._file = file
        self._image = image
        self._geometry = image.geometry
        self._table_offset = image.header.table_offset
        count = image.geometry.block_count
        offsets = unpack_bat(file.read(self._table_offset, count * BAT_ENTRY_BYTES), count)
        validate_bat(
            offsets,
            image.geometry,
            table_offset=self._table_offset,
            file_size_bytes=file.size(),
            structures=image.structures,
        )
        page_count = -(-count // ENTRIES_PER_PAGE)
        entries = np.zeros(page_count * ENTRIES_PER_PAGE, np.uint64)
        placed = offsets != NO_OFFSET
        data_offsets = offsets[placed] + image.geometry.bitmap_bytes
        entries[:count][placed] = data_offsets.view(np.uint64) | np.uint64(
            PayloadState.PAYLOAD_BLOCK_PARTIALLY_PRESENT
        )
        occupied: NDArray[np.bool_] = np.any(entries.reshape(-1, ENTRIES_PER_PAGE) != 0, axis=1)
        super().__init__(image.geometry, entries, occupied, offset_mask=_OFFSET_MASK)
        self._lock = threading.Lock()
        self._unread = np.zeros(len(entries), bool)
        self._unread[:count] = placed
        self._dirty = np.zeros(-(-count // _ENTRIES_PER_SECTOR), bool)

    def ensure_checked(self, blocks: NDArray[np.int64]) -> None:
        """Read the bitmaps of `blocks`, where that was not done, and make full those that are."""
        if not self._unread[blocks].any():
            return
        unread = np.unique(blocks[self._unread[blocks]])
        step = max(_READ_BYTES_MAX // self._geometry.bitmap_bytes, 1)
        for first in range(0, len(unread), step):
            self._read_bitmaps(unread[first : first + step])

    def _read_bitmaps(self, blocks: NDArray[np.int64]) -> None:
        entries = self.entries[blocks]
        blocks, entries = blocks[has_place(entries)], entries[has_place(entries)]
        length = self._geometry.bitmap_bytes
        out = np.empty((len(blocks), length), np.uint8)
        starts = self.offsets_of(entries) - length
        rows = np.column_stack((starts, np.full(len(blocks), length), np.arange(len(blocks)) * length))
        native.read_pieces(self._file, rows, out.reshape(-1))
        full = self._are_full(blocks, out)
        with self._lock:
            # One that got another place since has no use for what was read.
            same = self._unread[blocks] & (self.entries[blocks] == entries)
            self._unread[blocks[same]] = False
            chosen = blocks[same & full]
            self.entries[chosen] = (self.entries[chosen] & np.uint64(_OFFSET_MASK)) | np.uint64(
                PayloadState.PAYLOAD_BLOCK_FULLY_PRESENT
            )

    def _are_full(self, blocks: NDArray[np.int64], bitmaps: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return of which blocks all sectors count; of the last one those that the disk has."""
        full = _all_ones(bitmaps, self._geometry.sectors_per_block)
        last = blocks == self._geometry.block_count - 1
        full[last] = _all_ones(bitmaps[last], self._geometry.last_block_bytes // SECTOR_BYTES)
        return full

    def _set(self, blocks: NDArray[np.int64], entries: NDArray[np.uint64]) -> None:
        with self._lock:
            super()._set(blocks, entries)

    def _changed(self, indices: NDArray[np.int64]) -> None:
        super()._changed(indices)
        self._dirty[indices >> _SECTOR_SHIFT] = True
        self._unread[indices] = False

    def promote(self, blocks: NDArray[np.int64]) -> None:
        with self._lock:  # the table in the file stays as it is: there the bitmap says so
            self._unread[blocks] = False
            self.entries[blocks] = (self.entries[blocks] & np.uint64(_OFFSET_MASK)) | np.uint64(
                PayloadState.PAYLOAD_BLOCK_FULLY_PRESENT
            )

    def bitmap_offset(self, block: int) -> int | None:
        """Return where the block's bitmap stands in the file, None where the block has no place."""
        entry = int(self.entries[block])
        return (entry & _OFFSET_MASK) - self._geometry.bitmap_bytes if entry & STATE_MASK else None

    def bitmap_offsets(self) -> NDArray[np.int64]:
        """Return the sorted file offsets of all bitmaps, which are those of all blocks with a place."""
        return self.places(has_place) - self._geometry.bitmap_bytes

    def used_ranges(self) -> NDArray[np.int64]:
        """Return (file_offset, length) of all that is used in the file but the footer at its end.

        Of the last block only what the disk has of it: nothing else need be there.
        """
        ends = [row[:2] for row in self._image.structures if row[2] != "footer"]
        return np.concatenate((np.array(ends, np.int64), self.placed_ranges()[:, 1:]))

    def placed_ranges(self) -> NDArray[np.int64]:
        """Return (block, file_offset, length) of all blocks with a place, bitmaps included."""
        blocks = np.flatnonzero(has_place(self.entries))
        starts = self.offsets_of(self.entries[blocks]) - self._geometry.bitmap_bytes
        lengths = np.full(len(blocks), self._geometry.place_bytes, np.int64)
        lengths[blocks == self._geometry.block_count - 1] = (
            self._geometry.bitmap_bytes + self._geometry.last_block_bytes
        )
        return np.column_stack((blocks, starts, lengths))

    def end(self) -> int:
        """Return the end of what is used in the file, without the footer; the last block counts as whole."""
        ends = np.append(self.used_ranges().sum(axis=1), sum(self._image.table_place(self._file.size())))
        whole = self.placed_ranges()[:, 1] + self._geometry.place_bytes
        return max(int(ends.max()), int(whole.max(initial=0)))

    def move(self, blocks: NDArray[np.int64], data_offsets: NDArray[np.int64]) -> None:
        """Let blocks with places stand somewhere else, in the states that they have."""
        states = self.entries[blocks] & np.uint64(STATE_MASK)
        self._set(blocks, data_offsets.view(np.uint64) | states)

    @property
    def is_dirty(self) -> bool:
        """Whether there are changes that nobody took."""
        return bool(self._dirty.any())

    def take_dirty(self) -> list[tuple[int, bytes]]:
        """Return (file offset, bytes) of the changed sectors of the table, which become clean."""
        taken = []
        for sector in np.flatnonzero(self._dirty).tolist():
            first = sector * _ENTRIES_PER_SECTOR
            entries = self.entries[first : min(first + _ENTRIES_PER_SECTOR, self._geometry.block_count)]
            offsets = self.offsets_of(entries) - self._geometry.bitmap_bytes
            offsets[entries == 0] = NO_OFFSET
            taken.append((self._table_offset + first * BAT_ENTRY_BYTES, pack_bat(offsets)))
        self._dirty[:] = False
        return taken


def _all_ones(bitmaps: NDArray[np.uint8], sector_count: int) -> NDArray[np.bool_]:
    """Return which rows of bitmaps have their first `sector_count` bits set."""
    whole, rest = divmod(sector_count, 8)
    full: NDArray[np.bool_] = (bitmaps[:, :whole] == 0xFF).all(axis=1)
    if rest:
        mask = 0xFF00 >> rest & 0xFF
        full &= (bitmaps[:, whole] & mask) == mask
    return full
