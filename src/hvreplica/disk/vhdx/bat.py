"""The block allocation table of an open VHDX.

A table is loaded as far as the file holds data for it: its holes are zeros, which is "not present". One with
more data than _LOADED_BYTES_MAX is mapped privately instead, and each 4 KiB page of it is checked before its
first use. Changes stay in memory, remembered per page, until the owner takes them with take_dirty().
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.extents import runs_of
from hvreplica.disk.table import ENTRIES_PER_PAGE, BlockTable
from hvreplica.errors import FormatError
from hvreplica.files import map_private
from hvreplica.formats.vhdx_bat import (
    BAT_ENTRY_BYTES,
    BITMAP_BLOCK_BYTES,
    OFFSET_MASK,
    STATE_MASK,
    BitmapState,
    has_place,
    is_anchored,
    offsets_of,
    validate_apart,
    validate_bitmap_entries,
    validate_entries,
    validate_entries_within,
)
from hvreplica.formats.vhdx_log import LOG_SECTOR_BYTES
from hvreplica.units import MIB, align_up

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from hvreplica.disk.vhdx.image import Image
    from hvreplica.files import BlockFile

_PAGE_SHIFT = ENTRIES_PER_PAGE.bit_length() - 1
# 128 Ki entries: read and checked in a few milliseconds. Larger tables are mapped, and checked where they are
# used, all of them before the first change.
_LOADED_BYTES_MAX = MIB
# More blocks than this are not sorted at open to find two on one place: the first change, which needs them
# sorted anyway, looks for that.
_APART_COUNT_MAX = 1 << 22


class Bat(BlockTable):
    """The table of `image` in `file`, which is the overlay where the file's own log is not empty."""

    def __init__(self, file: BlockFile, image: Image) -> None:
        """Load or map the table and check what was loaded. Raises: FormatError for entries that cannot be."""
        self._file = file
        self._image = image
        self.file_offset = image.bat.file_offset
        self._has_parent = image.parameters.has_parent
        page_count = -(-image.geometry.entry_count // ENTRIES_PER_PAGE)
        self._dirty = np.zeros(page_count, bool)
        self._unpublished = np.zeros(page_count, bool)
        occupied = self._find_occupied(page_count)
        entries = self._load(occupied)
        super().__init__(image.geometry, entries, occupied, offset_mask=OFFSET_MASK)
        self._checked = ~occupied
        self._is_checked = False
        if not self._is_mapped:
            self.check_all()

    def _find_occupied(self, page_count: int) -> NDArray[np.bool_]:
        occupied = np.zeros(page_count, bool)
        end = self.file_offset + page_count * LOG_SECTOR_BYTES
        for file_offset, length in self._file.data_extents(self.file_offset, end):
            first = (file_offset - self.file_offset) // LOG_SECTOR_BYTES
            last = -(-(file_offset + length - self.file_offset) // LOG_SECTOR_BYTES)
            occupied[max(first, 0) : last] = True
        return occupied

    def _load(self, occupied: NDArray[np.bool_]) -> NDArray[np.uint64]:
        length = len(occupied) * LOG_SECTOR_BYTES
        self._is_mapped = False
        if int(occupied.sum()) * LOG_SECTOR_BYTES > _LOADED_BYTES_MAX:
            mapped = map_private(self._file, self.file_offset, align_up(length, MIB))
            if mapped is not None:
                self._is_mapped = True
                return np.frombuffer(mapped, np.uint64)[: length // BAT_ENTRY_BYTES]
        # Memory for the holes is never touched, and so never taken.
        entries = np.zeros(length // BAT_ENTRY_BYTES, np.uint64)
        octets = entries.view(np.uint8).data
        for first, last in runs_of(np.flatnonzero(occupied)):
            window = octets[first * LOG_SECTOR_BYTES : last * LOG_SECTOR_BYTES]
            self._file.read_into(window, self.file_offset + first * LOG_SECTOR_BYTES)
        return entries

    @property
    def is_checked(self) -> bool:
        return self._is_checked

    def ensure_checked(self, blocks: NDArray[np.int64]) -> None:
        if self._is_checked or not len(blocks):
            return
        pages = np.unique(self._image.geometry.index_of(blocks) >> _PAGE_SHIFT)
        self._check_pages(pages[~self._checked[pages]])

    def check_all(self) -> None:
        if self._is_checked:
            return
        self._check_pages(np.flatnonzero(~self._checked))
        self._check_apart()
        self._is_checked = True

    def _check_pages(self, pages: NDArray[np.int64]) -> None:
        try:
            for indices, entries in self._windows(pages):
                validate_entries(
                    entries, file_offset=self.file_offset, indices=indices, has_parent=self._has_parent
                )
                self._check_within(indices, entries, self.geometry.block_bytes)
            if self._has_parent:
                self._check_bitmaps(pages)
        except FormatError as error:
            error.at(self._file.path)
            raise
        self._checked[pages] = True

    def _check_bitmaps(self, pages: NDArray[np.int64]) -> None:
        indices = self._bitmap_indices()
        indices = indices[np.isin(indices >> _PAGE_SHIFT, pages)]
        entries = self.entries[indices]
        validate_bitmap_entries(entries, file_offset=self.file_offset, indices=indices)
        self._check_within(indices, entries, BITMAP_BLOCK_BYTES)

    def _check_within(
        self, indices: NDArray[np.int64], entries: NDArray[np.uint64], block_bytes: int
    ) -> None:
        validate_entries_within(
            entries,
            file_offset=self.file_offset,
            indices=indices,
            block_bytes=block_bytes,
            file_size_bytes=self._file.size(),
            structures=self._image.structures,
        )

    def _check_apart(self) -> None:
        pages = np.flatnonzero(self._occupied)
        if sum(int(has_place(entries).sum()) for _, entries in self._windows(pages)) <= _APART_COUNT_MAX:
            self.apart_ranges()

    def apart_ranges(self) -> NDArray[np.int64]:
        """Return used_ranges(). Raises: Overlap if two of any number share bytes of the file."""
        ranges = self.used_ranges()
        try:
            validate_apart(ranges)
        except FormatError as error:
            error.at(self._file.path)
            raise
        return ranges

    def used_ranges(self) -> NDArray[np.int64]:
        """Return (file_offset, length) of every block with a place, payload and bitmaps, sorted."""
        payload = self.places(has_place)
        rows = np.column_stack((payload, np.full(len(payload), self.geometry.block_bytes, np.int64)))
        if not self._has_parent:
            return rows
        entries = self.entries[self._bitmap_indices()]
        bitmaps = offsets_of(entries[has_place(entries)])
        more = np.column_stack((bitmaps, np.full(len(bitmaps), BITMAP_BLOCK_BYTES, np.int64)))
        rows = np.concatenate((rows, more))
        ordered: NDArray[np.int64] = rows[np.argsort(rows[:, 0], kind="stable")]
        return ordered

    def anchors(self) -> NDArray[np.int64]:
        """Return the sorted file offsets that entries without data still hold."""
        return self.places(is_anchored)

    def _bitmap_indices(self) -> NDArray[np.int64]:
        geometry = self._image.geometry
        return np.arange(geometry.chunk_ratio, geometry.entry_count, geometry.chunk_ratio + 1, dtype=np.int64)

    def bitmap_block(self, chunk: int) -> int | None:
        """Return the file offset of a chunk's sector-bitmap block, None where it has none."""
        index = self._image.geometry.bitmap_index_of(chunk)
        if not self._checked[index >> _PAGE_SHIFT]:
            self._check_pages(np.array([index >> _PAGE_SHIFT]))
        entry = self.entries[index : index + 1]
        return int(offsets_of(entry)[0]) if has_place(entry)[0] else None

    @property
    def path(self) -> Path:
        """The file's name."""
        return self._file.path

    def bitmap_entry_offset(self, chunk: int) -> int:
        """Return where in the file the entry of a chunk's sector bitmap stands."""
        return self.file_offset + self._image.geometry.bitmap_index_of(chunk) * BAT_ENTRY_BYTES

    def place_bitmap(self, chunk: int, file_offset: int) -> None:
        """Give a chunk's sector-bitmap block its place."""
        index = self._image.geometry.bitmap_index_of(chunk)
        self._changed(np.array([index]))
        self.entries[index] = np.uint64(file_offset | BitmapState.SB_BLOCK_PRESENT)

    def bitmap_chunks(self) -> NDArray[np.int64]:
        """Return the chunks of a disk with a parent that have a sector-bitmap block, sorted."""
        self.check_all()
        chunks: NDArray[np.int64] = np.flatnonzero(has_place(self.entries[self._bitmap_indices()]))
        return chunks

    def release_bitmaps(self, chunks: NDArray[np.int64]) -> None:
        """Take the sector-bitmap blocks of chunks away in which no block is partially present."""
        indices = (chunks + 1) * (self._image.geometry.chunk_ratio + 1) - 1
        self._changed(indices)
        self.entries[indices] = np.uint64(BitmapState.SB_BLOCK_NOT_PRESENT)

    def placed_indices(self) -> NDArray[np.int64]:
        """Return the indices of all entries with a place, payload and sector bitmaps."""
        self.check_all()
        pages = np.flatnonzero(self._occupied)
        parts = [indices[has_place(entries)] for indices, entries in self._windows(pages)]
        if self._has_parent:
            indices = self._bitmap_indices()
            parts.append(indices[has_place(self.entries[indices])])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def move(self, indices: NDArray[np.int64], file_offsets: NDArray[np.int64]) -> None:
        """Let the entries at `indices`, which have places, point to other ones; their states stay."""
        self._changed(indices)
        states = self.entries[indices] & np.uint64(STATE_MASK)
        self.entries[indices] = file_offsets.view(np.uint64) | states

    def _changed(self, indices: NDArray[np.int64]) -> None:
        super()._changed(indices)
        self._dirty[indices >> _PAGE_SHIFT] = True
        self._unpublished[indices >> _PAGE_SHIFT] = True

    @property
    def is_dirty(self) -> bool:
        """Whether there are changes that nobody took."""
        return bool(self._dirty.any())

    def take_dirty(self) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return (file offsets, copies of the 4096 bytes) of the changed pages, last first; they become
        clean.

        Last first, because the entry of a chunk's sector bitmap stands behind those of its blocks: where a
        crash keeps only the first of them, no block is partially present without its bitmap.
        """
        pages = np.flatnonzero(self._dirty)[::-1]
        self._dirty[pages] = False
        self._unpublished[pages] = False
        return self._copies(pages)

    @property
    def is_unpublished(self) -> bool:
        """Whether pages changed since they were taken, or published() was called."""
        return bool(self._unpublished.any())

    def unpublished(self) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return the pages of is_unpublished as take_dirty() does; they stay dirty, and unpublished."""
        return self._copies(np.flatnonzero(self._unpublished)[::-1])

    def published(self) -> None:
        """Say that all changes stand where a reader of the file finds them."""
        self._unpublished[:] = False

    def _copies(self, pages: NDArray[np.intp]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        data = self.entries.reshape(-1, ENTRIES_PER_PAGE)[pages].view(np.uint8)
        return self.file_offset + pages * LOG_SECTOR_BYTES, data
