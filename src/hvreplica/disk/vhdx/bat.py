"""The block allocation table of an open VHDX, as one array that the native kernels read in place.

A table is loaded as far as the file holds data for it: its holes are zeros, which is "not present". One with
more data than _LOADED_BYTES_MAX is mapped privately instead, and each 4 KiB sector of it is checked before
its first use. Changes stay in memory, remembered per sector, until the owner takes them with take_dirty().

Thread rule: reads may come from any thread; changes and take_dirty() from one at a time, under the owner's
lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica import native
from hvreplica.errors import FormatError
from hvreplica.files import map_private
from hvreplica.formats.vhdx_bat import (
    BAT_ENTRY_BYTES,
    is_anchored,
    is_present,
    offsets_of,
    present_entry,
    validate_apart,
    validate_entries,
    validate_entries_within,
)
from hvreplica.formats.vhdx_log import LOG_SECTOR_BYTES
from hvreplica.units import MIB, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from hvreplica.disk.vhdx.image import Image
    from hvreplica.files import BlockFile

_ENTRIES_PER_SECTOR = LOG_SECTOR_BYTES // BAT_ENTRY_BYTES
_SECTOR_SHIFT = _ENTRIES_PER_SECTOR.bit_length() - 1
# 2 Mi entries: read and checked in a few milliseconds. Larger tables are mapped, and checked where they are
# used.
_LOADED_BYTES_MAX = 16 * MIB
_SCAN_SECTOR_COUNT = 1024
# More blocks than this are not sorted at open to find two on one place; a repair run may.
_APART_COUNT_MAX = 1 << 22


class Bat:
    """The table of `image` in `file`, which is the overlay where the file's own log is not empty.

    entries: native uint64, padded to whole sectors. block_map: the same array for the native kernels.
    """

    def __init__(self, file: BlockFile, image: Image) -> None:
        """Load or map the table and check what was loaded. Raises: FormatError for entries that cannot be."""
        self._file = file
        self._image = image
        self.geometry = image.geometry
        self.file_offset = image.bat.file_offset
        self._sector_count = -(-self.geometry.entry_count // _ENTRIES_PER_SECTOR)
        self._dirty = np.zeros(self._sector_count, bool)
        self._checked = np.zeros(self._sector_count, bool)
        self._occupied = self._find_occupied()
        self.entries = self._load()
        self.block_map = native.BlockMap(self.entries, self.geometry.block_bytes, self.geometry.chunk_ratio)
        self._checked |= ~self._occupied
        if not self._is_mapped:
            self._check_sectors(np.flatnonzero(self._occupied))
            self._check_apart()

    def _find_occupied(self) -> NDArray[np.bool_]:
        occupied = np.zeros(self._sector_count, bool)
        end = self.file_offset + self._sector_count * LOG_SECTOR_BYTES
        for file_offset, length in self._file.data_extents(self.file_offset, end):
            first = (file_offset - self.file_offset) // LOG_SECTOR_BYTES
            last = -(-(file_offset + length - self.file_offset) // LOG_SECTOR_BYTES)
            occupied[max(first, 0) : last] = True
        return occupied

    def _load(self) -> NDArray[np.uint64]:
        length = self._sector_count * LOG_SECTOR_BYTES
        self._is_mapped = False
        if int(self._occupied.sum()) * LOG_SECTOR_BYTES > _LOADED_BYTES_MAX:
            mapped = map_private(self._file, self.file_offset, align_up(length, MIB))
            if mapped is not None:
                self._is_mapped = True
                return np.frombuffer(mapped, np.uint64)[: length // BAT_ENTRY_BYTES]
        # Memory for the holes is never touched, and so never taken.
        entries = np.zeros(length // BAT_ENTRY_BYTES, np.uint64)
        octets = entries.view(np.uint8).data
        for first, last in _runs(np.flatnonzero(self._occupied)):
            window = octets[first * LOG_SECTOR_BYTES : last * LOG_SECTOR_BYTES]
            self._file.read_into(window, self.file_offset + first * LOG_SECTOR_BYTES)
        return entries

    def ensure_checked(self, blocks: NDArray[np.int64]) -> None:
        """Check the sectors that hold the entries of `blocks`, where that was not done.

        Raises: FormatError.
        """
        if not self._is_mapped or not len(blocks):
            return
        sectors = np.unique(self.geometry.index_of(blocks) >> _SECTOR_SHIFT)
        self._check_sectors(sectors[~self._checked[sectors]])

    def check_all(self) -> None:
        """Check every sector, and that no two blocks share a place. Raises: FormatError."""
        if self._checked.all():
            return
        self._check_sectors(np.flatnonzero(~self._checked))
        self._check_apart()

    def _check_sectors(self, sectors: NDArray[np.int64]) -> None:
        try:
            self._validate_sectors(sectors)
        except FormatError as error:
            error.at(self._file.path)
            raise
        self._checked[sectors] = True

    def _validate_sectors(self, sectors: NDArray[np.int64]) -> None:
        file_size_bytes = self._file.size()
        for indices, entries in self._windows(sectors):
            validate_entries(entries, file_offset=self.file_offset, indices=indices)
            validate_entries_within(
                entries,
                file_offset=self.file_offset,
                indices=indices,
                block_bytes=self.geometry.block_bytes,
                file_size_bytes=file_size_bytes,
                structures=self._image.structures,
            )

    def _check_apart(self) -> None:
        offsets = self.places(is_present)
        if len(offsets) <= _APART_COUNT_MAX:
            validate_apart(offsets, block_bytes=self.geometry.block_bytes)

    def _windows(self, sectors: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
        """Yield (indices, entries) of the payload entries in `sectors` that are not 0."""
        for first, last in _runs(sectors):
            for at in range(first, last, _SCAN_SECTOR_COUNT):
                stop = min(last, at + _SCAN_SECTOR_COUNT)
                low, high = at * _ENTRIES_PER_SECTOR, stop * _ENTRIES_PER_SECTOR
                # A copy: numpy counts and then collects, and refuses what another thread changes meanwhile.
                window = self.entries[low:high].copy()
                indices = low + np.flatnonzero(window)
                indices = indices[self.geometry.is_payload(indices)]
                if len(indices):
                    yield indices, window[indices - low]

    def places(self, chosen: Any) -> NDArray[np.int64]:
        """Return the sorted file offsets of the entries for which `chosen(entries)` is true."""
        parts = [offsets_of(e[chosen(e)]) for _, e in self._windows(np.flatnonzero(self._occupied.copy()))]
        return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)

    def anchors(self) -> NDArray[np.int64]:
        """Return the sorted file offsets that entries without data still hold."""
        return self.places(is_anchored)

    def entries_of(self, blocks: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the entries of `blocks`."""
        entries: NDArray[np.uint64] = self.entries[self.geometry.index_of(blocks)]
        return entries

    def present(self, blocks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of `blocks` have their data in the file."""
        return is_present(self.entries_of(blocks))

    def present_runs(self, first_block: int, last_block: int) -> NDArray[np.int64]:
        """Return the present blocks of first_block..last_block as int64 (n, 3): block, count, file_offset.

        A run has blocks that follow each other in the guest and in the file. Only sectors of the table that
        may hold something are looked at.
        """
        chosen: list[NDArray[np.int64]] = [
            indices[is_present(entries)]
            for indices, entries in self._windows(self._sectors(first_block, last_block))
        ]
        indices = np.concatenate(chosen) if chosen else np.empty(0, np.int64)
        blocks = self.geometry.block_of(indices)
        inside = (blocks >= first_block) & (blocks <= last_block)
        indices, blocks = indices[inside], blocks[inside]
        if not len(blocks):
            return np.empty((0, 3), np.int64)
        offsets = offsets_of(self.entries[indices])
        breaks = (np.diff(blocks) != 1) | (np.diff(offsets) != self.geometry.block_bytes)
        heads = np.concatenate(([0], np.flatnonzero(breaks) + 1))
        counts = np.diff(np.concatenate((heads, [len(blocks)])))
        return np.column_stack((blocks[heads], counts, offsets[heads]))

    def held_blocks(self, first_block: int, last_block: int) -> NDArray[np.int64]:
        """Return the blocks of first_block..last_block whose entry is not 0, sorted."""
        parts = [indices for indices, _ in self._windows(self._sectors(first_block, last_block))]
        blocks = self.geometry.block_of(np.concatenate(parts)) if parts else np.empty(0, np.int64)
        return blocks[(blocks >= first_block) & (blocks <= last_block)]

    def _sectors(self, first_block: int, last_block: int) -> NDArray[np.int64]:
        ends = self.geometry.index_of(np.array([first_block, last_block])) >> _SECTOR_SHIFT
        sectors: NDArray[np.int64] = ends[0] + np.flatnonzero(self._occupied[ends[0] : ends[1] + 1].copy())
        return sectors

    def place(self, blocks: NDArray[np.int64], file_offsets: NDArray[np.int64]) -> None:
        """Make `blocks` present at `file_offsets`."""
        self._set(blocks, present_entry(file_offsets))

    def set_state(self, blocks: NDArray[np.int64], state: int) -> None:
        """Give `blocks` a state without a place in the file."""
        self._set(blocks, np.full(len(blocks), state, np.uint64))

    def _set(self, blocks: NDArray[np.int64], entries: NDArray[np.uint64]) -> None:
        indices = self.geometry.index_of(blocks)
        sectors = indices >> _SECTOR_SHIFT
        self._occupied[sectors] = True
        self._dirty[sectors] = True
        self.entries[indices] = entries

    @property
    def is_dirty(self) -> bool:
        """Whether there are changes that nobody took."""
        return bool(self._dirty.any())

    def take_dirty(self) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return (file offsets, copies of the 4096 bytes) of the changed sectors, which become clean."""
        sectors = np.flatnonzero(self._dirty)
        self._dirty[sectors] = False
        data = self.entries.reshape(-1, _ENTRIES_PER_SECTOR)[sectors].view(np.uint8)
        return self.file_offset + sectors * LOG_SECTOR_BYTES, data


def _runs(numbers: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the runs of consecutive numbers."""
    if not len(numbers):
        return
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    heads = numbers[np.concatenate(([0], breaks + 1))]
    tails = numbers[np.concatenate((breaks, [len(numbers) - 1]))] + 1
    yield from zip(heads.tolist(), tails.tolist(), strict=True)
