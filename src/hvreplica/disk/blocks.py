"""The guest's bytes of a disk that is made of blocks: what VHD and VHDX have in common.

Payload goes straight to its place by one native call per batch. Three things take a longer way: a block that
is touched for the first time is given a place, a block of which only some sectors count is asked through its
sector bitmap, and what this file does not hold is asked from the parent. See disk.Disk for the promises.

A block that covers a parent's bytes gets its place in a state in which none of its sectors counts; the
sectors that were written count only after the write has returned. So a power cut shows the parent's old bytes
or the new ones, and never the zeros of a fresh place.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hvreplica import native
from hvreplica.disk.chain import parent_of, read_layers
from hvreplica.disk.disk import Stretch
from hvreplica.disk.extents import (
    NO_EXTENTS,
    Pieces,
    beyond_end,
    checked_rows,
    clipped,
    cut_at_blocks,
    cut_spans,
    intersection,
    merge,
    touched_blocks,
    true_runs,
    union,
    widened,
)
from hvreplica.disk.held import held_parts
from hvreplica.disk.parallel import COPY_WINDOW_BYTES
from hvreplica.disk.pieces import are_zero, chosen, in_order, joined, joined_runs
from hvreplica.formats.vhdx_bat import PayloadState

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.disk.bitmaps import SectorBitmaps
    from hvreplica.disk.disk import Disk, DiskInfo, ParentReference
    from hvreplica.disk.table import BlockTable
    from hvreplica.files import BlockFile

_MAP_WINDOW_BLOCKS = 1 << 16
_DISCARD_WINDOW_BLOCKS = 1 << 20
# Changed pages of sector bitmaps wait in memory for a flush; more than this make one.
_DIRTY_PAGE_COUNT_MAX = 1 << 14
_ZERO_PIECE = -1  # the file offset of what reads as zeros, see native.read_pieces
_NOT_PRESENT = PayloadState.PAYLOAD_BLOCK_NOT_PRESENT
_FULL = PayloadState.PAYLOAD_BLOCK_FULLY_PRESENT
_PARTIAL = PayloadState.PAYLOAD_BLOCK_PARTIALLY_PRESENT


class Session(Protocol):
    """What is needed to change a disk of one format.

    Any thread may call; clear() comes last.
    """

    @property
    def has_zero_state(self) -> bool:
        """Whether discard() can make a block read as zeros that covers a parent's bytes."""
        ...

    def begin(self) -> None:
        """Make the file ready for its first change. Raises: the error that ended the session."""
        ...

    def changed(self) -> None:
        """Say that payload was written; called after the write and before it returns to its caller."""
        ...

    def allocate(self, blocks: NDArray[np.int64]) -> None:
        """Give each of `blocks`, unique, that has none a place that reads as zeros and counts."""
        ...

    def allocate_partial(self, blocks: NDArray[np.int64]) -> None:
        """Give each of `blocks`, unique, that has none a place none of whose sectors counts."""
        ...

    def promote(self, blocks: NDArray[np.int64]) -> None:
        """Say that all sectors of `blocks`, which have places, count."""
        ...

    def discard(self, blocks: NDArray[np.int64]) -> None:
        """Make `blocks`, unique, read as zeros without a place of their own."""
        ...

    def settle(self, blocks: NDArray[np.int64]) -> None:
        """Make those of `blocks` read as zeros everywhere that are in a state which only allows zeros."""
        ...

    def flush(self) -> None:
        """Make all that was written before durable."""
        ...

    def clear(self) -> None:
        """Flush, and leave the file so that any program opens it."""
        ...


class BlockDisk(ABC):
    """See disk.Disk. Owns `file`, and its parent once it has one. What a format adds is abstract here."""

    format: str
    logical_sector_bytes: int
    physical_sector_bytes: int
    parent_reference: ParentReference | None

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
        """file: to read and write payload. bitmaps: None where no block can be partial. session: None for
        reading only. A disk that has a parent is given it by attach().
        """
        self._file = file
        self._table = table
        self._bitmaps = bitmaps
        self._session = session
        self._has_parent = has_parent
        self._edge_lock = threading.Lock()
        self._closed = False
        self._block_count = table.geometry.block_count
        # The states whose blocks the native kernels read as they are: absent is zeros to them.
        self._is_direct = np.array([not has_parent, *[True] * 6, bitmaps is None])
        self._has_parent_below = np.array([has_parent, *[False] * 7])
        self.path: Path = file.path
        self.parent: Disk | None = None
        self.writable = session is not None
        self.virtual_bytes = virtual_bytes
        self.block_bytes = table.geometry.block_bytes

    @property
    @abstractmethod
    def data_write_guid(self) -> uuid.UUID | None: ...

    @property
    @abstractmethod
    def virtual_disk_id(self) -> uuid.UUID | None: ...

    @abstractmethod
    def info(self) -> DiskInfo: ...

    def attach(self, parent: Disk) -> None:
        self.parent = parent

    def _parent_name(self) -> str | None:
        """Return what to call the parent: the file that was opened, or the first name that is known."""
        if self.parent is not None:
            return str(self.parent.path)
        reference = self.parent_reference
        return None if reference is None else next(iter(reference.names), "")

    # ---- reading

    def read_into(self, buffer: Buffer, disk_offset: int) -> None:
        self.read_extents(np.array([[disk_offset, memoryview(buffer).nbytes]], np.int64), buffer)

    def read_extents(self, extents: NDArray[Any], out: Buffer) -> None:
        rows = self._rows(extents)
        if self._bitmaps is None and self._table.is_checked:
            native.read_extents(self._file, self._table.block_map, rows, out)
            return
        blocks = touched_blocks(rows, self.block_bytes)
        self._table.ensure_checked(blocks)
        if self._bitmaps is None or self._is_direct[self._table.states(blocks)].all():
            native.read_extents(self._file, self._table.block_map, rows, out)
        else:
            read_layers(self, rows, out)

    def read_spans(self, spans: NDArray[np.int64], out: Buffer) -> NDArray[np.int64]:
        inside, behind = clipped(spans, self.virtual_bytes)
        pieces = cut_spans(inside, self.block_bytes)
        self._table.ensure_checked(pieces.block)
        own, zero, below = self._sorted_out(pieces)
        entries = self._table.entries_of(own.block)
        file_offsets = self._table.offsets_of(entries) + own.disk_offset - own.block * self.block_bytes
        zeros = np.concatenate((np.column_stack((zero.length, zero.data_offset)), behind[:, 1:]))
        native.read_pieces(
            self._file,
            np.concatenate(
                (
                    np.column_stack((file_offsets, own.length, own.data_offset)),
                    np.column_stack((np.full(len(zeros), _ZERO_PIECE, np.int64), zeros)),
                )
            ),
            out,
        )
        return np.column_stack((below.disk_offset, below.length, below.data_offset))

    def _sorted_out(self, pieces: Pieces) -> tuple[Pieces, Pieces, Pieces]:
        """Return the parts of `pieces` that stand in this file, that are zeros, and that the parent has."""
        states = self._table.states(pieces.block)
        own, below = states == _FULL, self._has_parent_below[states]
        zero = ~own & ~below
        if self._bitmaps is None or not (partial := states == _PARTIAL).any():
            return chosen(pieces, own), chosen(pieces, zero), chosen(pieces, below)
        cut, counts = self._bitmaps.split(chosen(pieces, partial))
        zero &= ~partial
        rest = chosen(cut, ~counts)
        return (
            joined(chosen(pieces, own), chosen(cut, counts)),
            chosen(pieces, zero) if self._has_parent else joined(chosen(pieces, zero), rest),
            joined(chosen(pieces, below), rest) if self._has_parent else chosen(pieces, below),
        )

    # ---- writing

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
        absent = ~below & (states != _FULL) & (states != _PARTIAL)
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
        partial = self._table.states(pieces.block) == _PARTIAL
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
        for disk_offset, length in rows.tolist():
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
        session.settle(self._table.held_blocks(first, last))
        for low in range(first, last + 1, _MAP_WINDOW_BLOCKS):
            for run in self._present_ranges(low, min(last, low + _MAP_WINDOW_BLOCKS - 1), start, end):
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
        for window in range(first, last + 1, _MAP_WINDOW_BLOCKS):
            stop = min(last, window + _MAP_WINDOW_BLOCKS - 1)
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

    # ---- what there is

    def extents(self, start: int, end: int) -> NDArray[np.int64]:
        end = min(end, self.virtual_bytes)
        if start >= end:
            return NO_EXTENTS
        first, last = start // self.block_bytes, (end - 1) // self.block_bytes
        self._table.ensure_checked(self._table.held_blocks(first, last))
        ranges = np.array(self._present_ranges(first, last, start, end), np.int64).reshape(-1, 3)
        found = merge(held_parts(self._file, ranges)[:, :2])
        if self._bitmaps is not None:
            found = self._more_extents(found, start, end)
        return widened(found, start=start, end=end) if len(found) else NO_EXTENTS

    def _more_extents(self, found: NDArray[np.int64], start: int, end: int) -> NDArray[np.int64]:
        """Add what partially present blocks and the parent hold to `found`."""
        own, _, below = self._sorted_out(self._block_pieces(start, end, held_only=not self._has_parent))
        full = self._table.present(own.block)
        found = union(found, np.column_stack((own.disk_offset, own.length))[~full])
        if not len(below.block):
            return found
        wanted = merge(np.column_stack((below.disk_offset, below.length)))
        return union(found, intersection(parent_of(self).extents(start, end), wanted))

    def _block_pieces(self, start: int, end: int, *, held_only: bool = False) -> Pieces:
        pieces = cut_at_blocks(np.array([[start, end - start]], np.int64), self.block_bytes)
        if held_only:
            first, last = start // self.block_bytes, (end - 1) // self.block_bytes
            pieces = chosen(pieces, np.isin(pieces.block, self._table.held_blocks(first, last)))
        self._table.ensure_checked(pieces.block)
        return pieces

    def _present_ranges(self, first_block: int, last_block: int, start: int, end: int) -> list[list[int]]:
        """Return [disk_offset, length, file_offset] of what is present from `start` to `end`, in order."""
        ranges = []
        for block, count, file_offset in self._table.present_runs(first_block, last_block).tolist():
            low = max(block * self.block_bytes, start)
            high = min((block + count) * self.block_bytes, end)
            if low < high:
                ranges.append([low, high - low, file_offset + low - block * self.block_bytes])
        return ranges

    def stretches(self, start: int, end: int) -> Iterator[Stretch]:
        for low in range(start, end, _MAP_WINDOW_BLOCKS * self.block_bytes):
            high = min(end, low + _MAP_WINDOW_BLOCKS * self.block_bytes)
            # Without a parent only what is held is looked at: most of a sparse disk is not.
            own, zero, below = self._sorted_out(self._block_pieces(low, high, held_only=not self._has_parent))
            offsets = self._table.offsets_of(self._table.entries_of(own.block))
            offsets = offsets + own.disk_offset - own.block * self.block_bytes
            runs = joined_runs(own, offsets)
            held = held_parts(self._file, np.array(runs, np.int64).reshape(-1, 3))
            data = deque(map(tuple, held[np.argsort(held[:, 0], kind="stable")].tolist()))
            rows = [(*row, "own") for row in runs]
            rows += [(*row, "zero") for row in joined_runs(zero, None)]
            rows += [(*row, "parent") for row in joined_runs(below, None)]
            position = low
            for disk_offset, length, file_offset, kind in sorted(rows):
                if disk_offset > position:
                    yield Stretch(position, disk_offset - position, "absent", None)
                if kind == "own":
                    yield from _stored(disk_offset, length, file_offset, data)
                else:
                    yield Stretch(disk_offset, length, "zero" if kind == "zero" else "parent", None)
                position = disk_offset + length
            if position < high:
                yield Stretch(position, high - position, "absent", None)

    def flush(self) -> None:
        if self._session is not None:
            self._session.flush()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if self._session is not None:
                self._session.clear()
        finally:
            self._file.close()
            if self.parent is not None:
                self.parent.close()

    def abandon(self) -> None:
        self._closed = True
        self._file.close()
        if self.parent is not None:
            self.parent.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _rows(self, extents: NDArray[Any]) -> NDArray[np.int64]:
        return checked_rows(extents, virtual_bytes=self.virtual_bytes, path=self.path)

    def _begin(self) -> Session:
        if self._session is None:
            error = PermissionError(f"{self.path} is open for reading only")
            raise error
        self._session.begin()
        return self._session


def _stored(
    disk_offset: int, length: int, file_offset: int, data: deque[tuple[int, int, int]]
) -> Iterator[Stretch]:
    """Yield what a stored run is made of. data: (disk_offset, length, file_offset), in order; used up."""
    shift = disk_offset - file_offset
    position, end = disk_offset, disk_offset + length
    while data and data[0][0] < end:
        data_offset, data_length, data_file_offset = data.popleft()
        if data_offset > position:
            yield Stretch(position, data_offset - position, "hole", position - shift)
        yield Stretch(data_offset, data_length, "data", data_file_offset)
        position = data_offset + data_length
    if position < end:
        yield Stretch(position, end - position, "hole", position - shift)
