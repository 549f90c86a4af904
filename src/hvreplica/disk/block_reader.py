"""The guest's bytes of a disk that is made of blocks, for reading: what VHD and VHDX have in common.

Payload comes straight from its place by one native call per batch. Two things take a longer way: a block of
which only some sectors count is asked through its sector bitmap, and what this file does not hold is asked
from the parent. See disk.Disk for the promises.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica import native
from hvreplica.disk.chain import parent_of, read_layers
from hvreplica.disk.disk import Direct, Stretch
from hvreplica.disk.extents import (
    NO_EXTENTS,
    Pieces,
    checked_rows,
    clipped,
    cut_at_blocks,
    cut_spans,
    intersection,
    merge,
    touched_blocks,
    union,
    widened,
)
from hvreplica.disk.held import held_parts
from hvreplica.disk.pieces import chosen, joined, joined_runs
from hvreplica.formats.vhdx_bat import PayloadState
from hvreplica.units import MIB, align_up

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.disk.bitmaps import SectorBitmaps
    from hvreplica.disk.disk import Disk, DiskInfo, ParentReference
    from hvreplica.disk.session import Session
    from hvreplica.disk.table import BlockTable
    from hvreplica.files import BlockFile

MAP_WINDOW_BLOCKS = 1 << 16
# Partially present blocks that are looked at together: each of their sectors may be an extent of its own.
_PARTIAL_BYTES_MAX = 256 * MIB
_ZERO_PIECE = -1  # the file offset of what reads as zeros, see native.read_pieces
FULL = PayloadState.PAYLOAD_BLOCK_FULLY_PRESENT
PARTIAL = PayloadState.PAYLOAD_BLOCK_PARTIALLY_PRESENT


class BlockReader(ABC):
    """The half of disk.Disk that reads. Owns `file`, and its parent once it has one.

    What a format adds is abstract here.
    """

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

    @property
    def block_count(self) -> int:
        """How many blocks hold the disk."""
        return self._block_count

    def has_place(self, block: int) -> bool:
        """Return whether a block has a place in the file."""
        return bool(self._table.placed(np.array([block]))[0])

    def is_whole(self, block: int) -> bool:
        """Return whether all of a block is said here: nothing of it is the parent's."""
        state = int(self._table.states(np.array([block]))[0])
        return state != PARTIAL and not self._has_parent_below[state]

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
        own, below = states == FULL, self._has_parent_below[states]
        zero = ~own & ~below
        if self._bitmaps is None or not (partial := states == PARTIAL).any():
            return chosen(pieces, own), chosen(pieces, zero), chosen(pieces, below)
        cut, counts = self._bitmaps.split(chosen(pieces, partial))
        zero &= ~partial
        rest = chosen(cut, ~counts)
        return (
            joined(chosen(pieces, own), chosen(cut, counts)),
            chosen(pieces, zero) if self._has_parent else joined(chosen(pieces, zero), rest),
            joined(chosen(pieces, below), rest) if self._has_parent else chosen(pieces, below),
        )

    # ---- what there is

    def extents(self, start: int, end: int) -> NDArray[np.int64]:
        end = min(end, self.virtual_bytes)
        parts = [NO_EXTENTS]
        while start < end:
            stop = self._window_end(start, end)
            parts.append(self._extents(start, stop))
            start = stop
        return merge(np.concatenate(parts))

    def _window_end(self, start: int, end: int) -> int:
        """Return `end`, or a nearer one where sector bitmaps could cut what lies before it into too much."""
        while True:
            first, last = start // self.block_bytes, (end - 1) // self.block_bytes
            self._table.ensure_checked(self._table.held_blocks(first, last))
            if self._bitmaps is None or end - start <= _PARTIAL_BYTES_MAX:
                return end
            if len(self._table.blocks_in(PARTIAL, first, last)) * self.block_bytes <= _PARTIAL_BYTES_MAX:
                return end
            end = align_up(start + (end - start) // 2, _PARTIAL_BYTES_MAX // 2)

    def _extents(self, start: int, end: int) -> NDArray[np.int64]:
        first, last = start // self.block_bytes, (end - 1) // self.block_bytes
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
        high = start
        while (low := high) < end:
            high = self._window_end(low, min(end, low + MAP_WINDOW_BLOCKS * self.block_bytes))
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

    def direct(self, *, data_write_guid: uuid.UUID | None = None) -> Direct:  # noqa: ARG002 - see VhdxDisk
        if self._session is not None:
            self._session.begin()
        self._table.check_all()
        return Direct(self._file, self._table.block_map, self._has_parent)

    def changed(self) -> None:
        if self._session is not None:
            self._session.changed()

    def flush(self) -> None:
        if self._session is not None:
            self._session.flush()

    def publish(self) -> None:
        if self._session is not None:
            self._session.publish()

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
