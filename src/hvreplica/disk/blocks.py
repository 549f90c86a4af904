"""The guest's bytes of a disk that is made of blocks: what VHD and VHDX have in common.

Payload goes straight to its place by one native call per batch; a block that is touched for the first time is
given a place first. See disk.Disk for the promises, block_reader.py for reading.

A block that covers a parent's bytes gets its place in a state in which none of its sectors counts; the
sectors that were written count only after the write has returned. So a power cut shows the parent's old bytes
or the new ones, and never the zeros of a fresh place.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica import native
from hvreplica.disk.block_reader import FULL, MAP_WINDOW_BLOCKS, PARTIAL, BlockReader
from hvreplica.disk.extents import Pieces, beyond_end, cut_at_blocks, merge, touched_blocks, true_runs
from hvreplica.disk.parallel import COPY_WINDOW_BYTES
from hvreplica.disk.pieces import are_zero, chosen, in_order
from hvreplica.formats.vhdx_bat import PayloadState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.disk.bitmaps import SectorBitmaps
    from hvreplica.disk.session import Session
    from hvreplica.disk.table import BlockTable
    from hvreplica.files import BlockFile

_DISCARD_WINDOW_BLOCKS = 1 << 20
# Changed pages of sector bitmaps wait in memory for a flush; more than this make one.
_DIRTY_PAGE_COUNT_MAX = 1 << 14


class BlockDisk(BlockReader):
    """See disk.Disk. Owns `file`, and its parent once it has one. What a format adds is abstract."""

    def __init__(
        self,
        *,
        file: BlockFile,
        table: BlockTable,
        bitmaps: SectorBitmaps | None,
        session: Session | None,
        has_parent: bool,
        virtual_bytes: int,
    ) -> None:
        """See BlockReader."""
        super().__init__(
            file=file,
            table=table,
            bitmaps=bitmaps,
            session=session,
            has_parent=has_parent,
            virtual_bytes=virtual_bytes,
        )
        self._edge_lock = threading.Lock()

    def write(self, buffer: Buffer, disk_offset: int) -> None:
        self.write_extents(np.array([[disk_offset, memoryview(buffer).nbytes]], np.int64), buffer)

    def write_extents(self, extents: NDArray[Any], data: Buffer) -> None:
        rows = self._rows(extents)
        session = self._begin()
        try:
            if self._bitmaps is not None:
                self._write_counting(session, self._bitmaps, rows, data)
            else:
                try:
                    native.write_extents(self._file, self._table.block_map, rows, data)
                except native.BlockAbsent:  # found before anything was written
                    self._write_allocating(session, rows, memoryview(data).cast("B"))
        finally:
            session.changed()
        if self._bitmaps is not None and self._bitmaps.dirty_count > _DIRTY_PAGE_COUNT_MAX:
            session.flush()

    def _write_counting(
        self, session: Session, bitmaps: SectorBitmaps, rows: NDArray[np.int64], data: Buffer
    ) -> None:
        """Write to a disk of whose blocks only some sectors may count."""
        blocks = touched_blocks(rows, self.block_bytes)
        self._table.ensure_checked(blocks)
        if (rows % bitmaps.sector_bytes).any():
            self._write_edges(rows, memoryview(data).cast("B"))
        elif self._table.present(blocks).all():
            native.write_extents(self._file, self._table.block_map, rows, data)
        else:
            self._write_allocating(session, rows, memoryview(data).cast("B"))

    def _write_allocating(self, session: Session, rows: NDArray[np.int64], view: memoryview) -> None:
        self._check_length(rows, view)
        pieces = cut_at_blocks(rows, self.block_bytes)
        keep = self._give_places(session, pieces, view)
        if keep.all():
            native.write_extents(self._file, self._table.block_map, rows, view)
        else:
            kept = np.column_stack((pieces.disk_offset, pieces.length))
            for first, last in true_runs(keep):
                start = int(pieces.data_offset[first])
                end = int(pieces.data_offset[last - 1] + pieces.length[last - 1])
                native.write_extents(self._file, self._table.block_map, kept[first:last], view[start:end])
        self._count_sectors(session, chosen(pieces, keep))

    @staticmethod
    def _check_length(rows: NDArray[np.int64], view: memoryview) -> None:
        if int(rows[:, 1].sum()) != len(view):
            message = f"the extents add up to {int(rows[:, 1].sum())} bytes, the buffer has {len(view)}"
            raise ValueError(message)

    def _give_places(self, session: Session, pieces: Pieces, view: memoryview) -> NDArray[np.bool_]:
        """Give places to the blocks that need one, and return which pieces must then be written."""
        states = self._table.states(pieces.block)
        below = self._has_parent_below[states]
        absent = ~below & (states != FULL) & (states != PARTIAL)
        zero = are_zero(view, pieces, np.flatnonzero(absent | below))
        covered = below & zero & self._covers(pieces)
        if session.has_zero_state and covered.any():
            session.discard(np.unique(pieces.block[covered]))
        else:
            covered[:] = False
        session.settle(pieces.block[absent & zero])
        session.allocate(in_order(pieces.block[absent & ~zero]))
        session.allocate_partial(in_order(pieces.block[below & ~covered]))
        keep: NDArray[np.bool_] = ~(absent & zero) & ~covered
        return keep

    def _covers(self, pieces: Pieces) -> NDArray[np.bool_]:
        """Return which pieces are all of their blocks that the disk has."""
        ends = np.minimum((pieces.block + 1) * self.block_bytes, self.virtual_bytes)
        starts = pieces.block * self.block_bytes
        covers: NDArray[np.bool_] = (pieces.disk_offset == starts) & (
            pieces.disk_offset + pieces.length == ends
        )
        return covers

    def _count_sectors(self, session: Session, pieces: Pieces) -> None:
        """Make the written sectors of partially present blocks count; a block that is complete says so."""
        if self._bitmaps is None:
            return
        partial = self._table.states(pieces.block) == PARTIAL
        if not partial.any():
            return
        pieces = chosen(pieces, partial)
        size = self._bitmaps.sector_bytes
        self._bitmaps.mark_all(pieces.disk_offset // size, pieces.length // size)
        ends = np.minimum((pieces.block + 1) * self.block_bytes, self.virtual_bytes)
        # A block is written to its end last by whoever writes in order; others stay as they are, which is
        # right too.
        last = np.unique(pieces.block[pieces.disk_offset + pieces.length == ends])
        complete = [block for block in last.tolist() if self._all_count(block)]
        if complete:
            session.promote(np.array(complete, np.int64))

    def _all_count(self, block: int) -> bool:
        if self._bitmaps is None:
            return False
        start = block * self.block_bytes
        end = min(start + self.block_bytes, self.virtual_bytes)
        size = self._bitmaps.sector_bytes
        return self._bitmaps.all_set(start // size, (end - start) // size)

    def _write_edges(self, rows: NDArray[np.int64], view: memoryview) -> None:
        """Write rows that begin or end inside of sectors: only whole sectors can count.

        Two writers of one sector must not come between reading and writing it, so one at a time does this,
        also where the block is present and needs it no more: another writer may have found it partial.
        """
        self._check_length(rows, view)
        size = self._bitmaps.sector_bytes if self._bitmaps is not None else 1
        at = 0
        for disk_offset, length in rows[rows[:, 1] > 0].tolist():
            start = disk_offset // size * size
            end = min(-(-(disk_offset + length) // size) * size, self.virtual_bytes)
            with self._edge_lock:
                buffer = bytearray(end - start)
                for low, high in ((start, start + size), (end - size, end)):
                    self.read_into(memoryview(buffer)[low - start : high - start], low)
                buffer[disk_offset - start : disk_offset - start + length] = view[at : at + length]
                self.write(buffer, start)
            at += length

    def copy_extents(
        self, source_file: BlockFile, source_offsets: NDArray[Any], extents: NDArray[Any]
    ) -> None:
        rows = self._rows(extents)
        offsets = np.ascontiguousarray(np.asarray(source_offsets).astype(np.int64, copy=False))
        if len(offsets) != len(rows):
            message = f"{len(rows)} extents need as many source offsets, not {len(offsets)}"
            raise ValueError(message)
        session = self._begin()
        try:
            for first, last, has_places in self._place_runs(rows):
                if has_places:
                    native.copy_extents(
                        source_file, offsets[first:last], self._file, self._table.block_map, rows[first:last]
                    )
                else:
                    self._copy_allocating(source_file, offsets[first:last], rows[first:last])
        finally:
            session.changed()

    def _place_runs(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, int, bool]]:
        """Yield (first, end, whether all blocks of these rows are present), in order."""
        pieces = cut_at_blocks(rows, self.block_bytes)
        missing = ~self._table.present(pieces.block)
        if not missing.any():
            yield 0, len(rows), True
            return
        # Rows that need a place, found by where their pieces start in the data.
        ends = np.cumsum(rows[:, 1])
        owners = np.searchsorted(ends, pieces.data_offset[missing], "right")
        has_places = np.ones(len(rows), bool)
        has_places[owners] = False
        breaks = np.flatnonzero(np.diff(has_places)) + 1
        heads = [0, *breaks.tolist()]
        for first, last in zip(heads, [*heads[1:], len(rows)], strict=True):
            yield first, last, bool(has_places[first])

    def _copy_allocating(
        self, source_file: BlockFile, offsets: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> None:
        """Copy through a buffer, so that zeros for absent blocks are seen and allocate nothing."""
        pieces = cut_at_blocks(rows, min(self.block_bytes, COPY_WINDOW_BYTES))
        starts = np.cumsum(rows[:, 1]) - rows[:, 1]
        owners = np.searchsorted(starts + rows[:, 1], pieces.data_offset, "right")
        sources = offsets[owners] + pieces.data_offset - starts[owners]
        targets = np.column_stack((pieces.disk_offset, pieces.length))
        first = 0
        totals = np.cumsum(pieces.length)
        while first < len(targets):
            done = int(totals[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(totals, done + COPY_WINDOW_BYTES, "right")))
            length = int(totals[last - 1]) - done
            window = np.empty(length, np.uint8).data
            wanted = np.column_stack((sources[first:last], pieces.length[first:last]))
            native.read_extents(source_file, None, wanted, window)
            self.write_extents(targets[first:last], window)
            first = last

    # ---- zeros

    def write_zeroes(self, disk_offset: int, length: int) -> None:
        if disk_offset < 0 or length < 0 or disk_offset + length > self.virtual_bytes:
            raise beyond_end(disk_offset, length, virtual_bytes=self.virtual_bytes, path=self.path)
        if length == 0:
            return
        end = disk_offset + length
        block_bytes = self.block_bytes
        first_whole = -(-disk_offset // block_bytes)
        end_whole = self._block_count if end == self.virtual_bytes else end // block_bytes
        session = self._begin()
        try:
            if first_whole >= end_whole:
                self._zero_inside(session, disk_offset, end)
                return
            self._zero_inside(session, disk_offset, first_whole * block_bytes)
            self._zero_whole(session, first_whole, end_whole)
            self._zero_inside(session, end_whole * block_bytes, end)
        finally:
            session.changed()

    @property
    def _keeps_blocks(self) -> bool:
        """Whether zeroed blocks keep their places: those of a fixed disk do."""
        return False

    def _zero_whole(self, session: Session, first_block: int, end_block: int) -> None:
        if self._keeps_blocks or (self._has_parent and not session.has_zero_state):
            end = min(end_block * self.block_bytes, self.virtual_bytes)
            self._zero_inside(session, first_block * self.block_bytes, end)
            return
        for start in range(first_block, end_block, _DISCARD_WINDOW_BLOCKS):
            last = min(end_block, start + _DISCARD_WINDOW_BLOCKS) - 1
            # Without a parent entries of 0 read as zeros already, and most of a sparse disk is that.
            blocks = np.arange(start, last + 1) if self._has_parent else self._table.held_blocks(start, last)
            gone = blocks[self._table.states(blocks) != PayloadState.PAYLOAD_BLOCK_ZERO]
            if len(gone):
                session.discard(gone)

    def _zero_inside(self, session: Session, start: int, end: int) -> None:
        """Zero what holds anything between `start` and `end`, leaving every block its place."""
        if start >= end:
            return
        if self._bitmaps is not None:
            self._zero_sectors(session, start, end)
            return
        first, last = start // self.block_bytes, (end - 1) // self.block_bytes
        for low in range(first, last + 1, MAP_WINDOW_BLOCKS):
            high = min(last, low + MAP_WINDOW_BLOCKS - 1)
            session.settle(self._table.held_blocks(low, high))
            for run in self._present_ranges(low, high, start, end):
                self._file.zero(run[2], run[1])

    def _zero_sectors(self, session: Session, start: int, end: int) -> None:
        """Zero a range of a disk with sector bitmaps, which has to count where it covers a parent's bytes."""
        size = self._bitmaps.sector_bytes if self._bitmaps is not None else 1
        low, high = -(-start // size) * size, end // size * size
        if low >= high:
            self.write(bytes(end - start), start)
            return
        for edge_start, edge_end in ((start, low), (high, end)):
            if edge_start < edge_end:
                self.write(bytes(edge_end - edge_start), edge_start)
        first, last = low // self.block_bytes, (high - 1) // self.block_bytes
        for window in range(first, last + 1, MAP_WINDOW_BLOCKS):
            stop = min(last, window + MAP_WINDOW_BLOCKS - 1)
            window_start, window_end = (
                max(low, window * self.block_bytes),
                min(high, (stop + 1) * self.block_bytes),
            )
            pieces = cut_at_blocks(np.array([[window_start, window_end - window_start]]), self.block_bytes)
            states = self._table.states(pieces.block)
            below = self._has_parent_below[states]
            session.settle(pieces.block)
            session.allocate_partial(pieces.block[below])
            held = chosen(pieces, below | self._table.placed(pieces.block))
            offsets = self._table.offsets_of(self._table.entries_of(held.block))
            offsets = offsets + held.disk_offset - held.block * self.block_bytes
            for file_offset, length in merge(np.column_stack((offsets, held.length))).tolist():
                self._file.zero(file_offset, length)
            self._count_sectors(session, held)

    def _begin(self) -> Session:
        if self._session is None:
            error = PermissionError(f"{self.path} is open for reading only")
            raise error
        self._session.begin()
        return self._session
