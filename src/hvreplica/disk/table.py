"""The table that says where each block of a disk stands in its file, and in what state it is.

One form for all formats: a native uint64 array of entries as [MS-VHDX] 2.5.1 packs them, state in bits 0-2,
file offset in the rest, which the native kernels read in place:

    0        not present: the parent's bytes, or zeros without a parent
    1 2 3 5  zeros, whatever a parent holds
    6        in this file, at the entry's offset
    7        has a place in this file, and a sector bitmap says which of its sectors count

Formats load the array, check it and write it back; what is here only asks and changes it in memory.

Thread rule: reads may come from any thread; changes from one at a time, under the owner's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hvreplica import native
from hvreplica.disk.extents import runs_of
from hvreplica.formats.vhdx_bat import STATE_MASK, PayloadState, has_place, is_present, states_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from hvreplica.native import BlockMap

ENTRIES_PER_PAGE = 512  # 4 KiB of entries: what is tracked as one
_PAGE_SHIFT = ENTRIES_PER_PAGE.bit_length() - 1
_SCAN_PAGE_COUNT = 1024


class TableGeometry(Protocol):
    """How blocks and entries are counted."""

    @property
    def block_bytes(self) -> int:
        """The guest bytes of a block."""
        ...

    @property
    def block_count(self) -> int:
        """The blocks that hold the disk; the last may be longer than what is left of it."""
        ...

    @property
    def chunk_ratio(self) -> int:
        """Payload entries before each entry of another kind; 0 where there are none."""
        ...

    def index_of(self, blocks: NDArray[Any]) -> NDArray[Any]:
        """Return the entries' indices of `blocks`."""
        ...

    def block_of(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Return the blocks of payload entries."""
        ...

    def is_payload(self, indices: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which of `indices` are payload entries of this disk."""
        ...


class BlockTable:
    """The entries of one disk. occupied: which pages of them may hold anything but 0."""

    def __init__(
        self,
        geometry: TableGeometry,
        entries: NDArray[np.uint64],
        occupied: NDArray[np.bool_],
        *,
        offset_mask: int,
    ) -> None:
        """entries: whole pages, owned by the table. offset_mask: the bits of an entry that are its offset."""
        self.geometry = geometry
        self.entries = entries
        self.offset_mask = offset_mask
        self.block_map: BlockMap = native.BlockMap(
            entries, geometry.block_bytes, geometry.chunk_ratio, offset_mask
        )
        self._occupied = occupied

    @property
    def is_checked(self) -> bool:
        """Whether every entry may be used without ensure_checked()."""
        return True

    def ensure_checked(self, blocks: NDArray[np.int64]) -> None:
        """Make sure that the entries of `blocks` may be used. Raises: FormatError for what cannot be."""

    def check_all(self) -> None:
        """Make sure of all entries, and unless they are very many of that no two share a place.

        Raises: FormatError.
        """

    def offsets_of(self, entries: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the file offsets of `entries`; beyond 2**63 they become negative and fail every bound."""
        return (entries & np.uint64(self.offset_mask)).view(np.int64)

    def _windows(self, pages: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
        """Yield (indices, entries) of the payload entries in `pages` that are not 0."""
        for first, last in runs_of(pages):
            for at in range(first, last, _SCAN_PAGE_COUNT):
                stop = min(last, at + _SCAN_PAGE_COUNT)
                low, high = at * ENTRIES_PER_PAGE, stop * ENTRIES_PER_PAGE
                # A copy: numpy counts and then collects, and refuses what another thread changes meanwhile.
                window = self.entries[low:high].copy()
                indices = low + np.flatnonzero(window)
                indices = indices[self.geometry.is_payload(indices)]
                if len(indices):
                    yield indices, window[indices - low]

    def places(self, chosen: Callable[[NDArray[np.uint64]], NDArray[np.bool_]]) -> NDArray[np.int64]:
        """Return the sorted file offsets of the payload entries for which `chosen(entries)` is true."""
        pages = np.flatnonzero(self._occupied.copy())
        parts = [self.offsets_of(entries[chosen(entries)]) for _, entries in self._windows(pages)]
        return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)

    def entries_of(self, blocks: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the entries of `blocks`."""
        entries: NDArray[np.uint64] = self.entries[self.geometry.index_of(blocks)]
        return entries

    def states(self, blocks: NDArray[np.int64]) -> NDArray[np.intp]:
        """Return the states of `blocks`, to index with."""
        states: NDArray[np.intp] = (self.entries_of(blocks) & np.uint64(STATE_MASK)).astype(np.intp)
        return states

    def present(self, blocks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of `blocks` have all of their data in the file."""
        return is_present(self.entries_of(blocks))

    def placed(self, blocks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of `blocks` have a place in the file, with all of their data or some."""
        return has_place(self.entries_of(blocks))

    def present_runs(self, first_block: int, last_block: int) -> NDArray[np.int64]:
        """Return the present blocks of first_block..last_block as int64 (n, 3): block, count, file_offset.

        A run has blocks that follow each other in the guest and in the file. Only pages of the table that may
        hold something are looked at.
        """
        blocks, entries = self._held(first_block, last_block)
        chosen = is_present(entries)
        blocks, offsets = blocks[chosen], self.offsets_of(entries[chosen])
        if not len(blocks):
            return np.empty((0, 3), np.int64)
        breaks = (np.diff(blocks) != 1) | (np.diff(offsets) != self.geometry.block_bytes)
        heads = np.concatenate(([0], np.flatnonzero(breaks) + 1))
        counts = np.diff(np.concatenate((heads, [len(blocks)])))
        return np.column_stack((blocks[heads], counts, offsets[heads]))

    def held_blocks(self, first_block: int, last_block: int) -> NDArray[np.int64]:
        """Return the blocks of first_block..last_block whose entry is not 0, sorted."""
        return self._held(first_block, last_block)[0]

    def blocks_in(self, state: PayloadState, first_block: int, last_block: int) -> NDArray[np.int64]:
        """Return the blocks of first_block..last_block in one state, not that of entry 0, sorted."""
        blocks, entries = self._held(first_block, last_block)
        chosen: NDArray[np.int64] = blocks[states_of(entries) == np.uint64(state)]
        return chosen

    def _held(self, first_block: int, last_block: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        windows = list(self._windows(self._pages(first_block, last_block)))
        if not windows:
            return np.empty(0, np.int64), np.empty(0, np.uint64)
        blocks = self.geometry.block_of(np.concatenate([indices for indices, _ in windows]))
        entries = np.concatenate([entries for _, entries in windows])
        inside = (blocks >= first_block) & (blocks <= last_block)
        return blocks[inside], entries[inside]

    def _pages(self, first_block: int, last_block: int) -> NDArray[np.int64]:
        ends = self.geometry.index_of(np.array([first_block, last_block])) >> _PAGE_SHIFT
        pages: NDArray[np.int64] = ends[0] + np.flatnonzero(self._occupied[ends[0] : ends[1] + 1].copy())
        return pages

    def place(self, blocks: NDArray[np.int64], file_offsets: NDArray[np.int64], state: PayloadState) -> None:
        """Give `blocks` places in the file, in a state that has one."""
        self._set(blocks, file_offsets.view(np.uint64) | np.uint64(state))

    def set_state(self, blocks: NDArray[np.int64], state: PayloadState) -> None:
        """Give `blocks` a state without a place in the file."""
        self._set(blocks, np.full(len(blocks), state, np.uint64))

    def promote(self, blocks: NDArray[np.int64]) -> None:
        """Make blocks fully present where they stand: all of their sectors count."""
        entries = self.entries_of(blocks) & np.uint64(self.offset_mask)
        self._set(blocks, entries | np.uint64(PayloadState.PAYLOAD_BLOCK_FULLY_PRESENT))

    def _set(self, blocks: NDArray[np.int64], entries: NDArray[np.uint64]) -> None:
        indices = self.geometry.index_of(blocks)
        self._changed(indices)
        self.entries[indices] = entries

    def _changed(self, indices: NDArray[np.int64]) -> None:
        """Remember that the entries at `indices` are about to change."""
        self._occupied[indices >> _PAGE_SHIFT] = True
