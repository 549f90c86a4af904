"""A VHDX without a parent as a disk: reads and writes through its block map, allocation on first touch.

Payload goes straight to its place by one native call per batch; only what is touched for the first time
passes through allocation, and zeros for it allocate nothing. See disk.Disk for the promises, session.py for
how they are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica import native
from hvreplica.disk.disk import DiskInfo, MapEntry
from hvreplica.disk.extents import (
    NO_EXTENTS,
    beyond_end,
    checked_rows,
    cut_at_blocks,
    merge,
    touched_blocks,
    widened,
)
from hvreplica.formats.vhdx_bat import PayloadState, is_present, states_of
from hvreplica.units import MIB

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.disk.extents import Pieces
    from hvreplica.disk.vhdx.bat import Bat
    from hvreplica.disk.vhdx.headers import Headers
    from hvreplica.disk.vhdx.image import Image
    from hvreplica.disk.vhdx.session import WriteSession
    from hvreplica.files import BlockFile

_COPY_WINDOW_BYTES = 4 * MIB
_MAP_WINDOW_BLOCKS = 1 << 16
_DISCARD_WINDOW_BLOCKS = 1 << 20


class VhdxDisk:
    """See disk.Disk.

    Owns `file`. payload: the file to read blocks from, `file` or the overlay of a dirty log.
    """

    format = "vhdx"

    def __init__(
        self,
        *,
        file: BlockFile,
        headers: Headers,
        image: Image,
        bat: Bat,
        session: WriteSession | None,
        replayed: bool,
    ) -> None:
        """session: None for reading only. replayed: whether the file's own log was not empty."""
        self._file = file
        self._headers = headers
        self._image = image
        self._bat = bat
        self._session = session
        self._replayed = replayed
        self._closed = False
        parameters = image.parameters
        self.path: Path = file.path
        self.writable = session is not None
        self.virtual_bytes = parameters.virtual_bytes
        self.logical_sector_bytes = parameters.logical_sector_bytes
        self.physical_sector_bytes = parameters.physical_sector_bytes
        self.block_bytes = parameters.block_bytes

    @property
    def data_write_guid(self) -> uuid.UUID:
        return self._headers.current.data_write_guid

    def read_into(self, buffer: Buffer, disk_offset: int) -> None:
        self.read_extents(np.array([[disk_offset, memoryview(buffer).nbytes]], np.int64), buffer)

    def read_extents(self, extents: NDArray[Any], out: Buffer) -> None:
        rows = self._rows(extents)
        self._bat.ensure_checked(touched_blocks(rows, self.block_bytes))
        native.read_extents(self._file, self._bat.block_map, rows, out)

    def write(self, buffer: Buffer, disk_offset: int) -> None:
        self.write_extents(np.array([[disk_offset, memoryview(buffer).nbytes]], np.int64), buffer)

    def write_extents(self, extents: NDArray[Any], data: Buffer) -> None:
        rows = self._rows(extents)
        session = self._begin()
        try:
            if self._bat.present(touched_blocks(rows, self.block_bytes)).all():
                native.write_extents(self._file, self._bat.block_map, rows, data)
            else:
                self._write_allocating(session, rows, data)
        finally:
            session.changed()

    def _write_allocating(self, session: WriteSession, rows: NDArray[np.int64], data: Buffer) -> None:
        view = memoryview(data).cast("B")
        if int(rows[:, 1].sum()) != len(view):
            message = f"the extents add up to {int(rows[:, 1].sum())} bytes, the buffer has {len(view)}"
            raise ValueError(message)
        pieces = cut_at_blocks(rows, self.block_bytes)
        absent = np.flatnonzero(~self._bat.present(pieces.block))
        zero = absent[_are_zero(view, pieces, absent)]
        keep = np.ones(len(pieces.block), bool)
        keep[zero] = False
        session.settle(pieces.block[zero])
        # In the order of the data, so that a sequential fill lies sequentially in the file.
        wanted, first_seen = np.unique(pieces.block[absent[keep[absent]]], return_index=True)
        session.allocate(wanted[np.argsort(first_seen)])
        if keep.all():
            native.write_extents(self._file, self._bat.block_map, rows, data)
            return
        kept = np.column_stack((pieces.disk_offset, pieces.length))
        for first, last in _true_runs(keep):
            start = int(pieces.data_offset[first])
            end = int(pieces.data_offset[last - 1] + pieces.length[last - 1])
            native.write_extents(self._file, self._bat.block_map, kept[first:last], view[start:end])

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
                        source_file, offsets[first:last], self._file, self._bat.block_map, rows[first:last]
                    )
                else:
                    self._copy_allocating(source_file, offsets[first:last], rows[first:last])
        finally:
            session.changed()

    def _place_runs(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, int, bool]]:
        """Yield (first, end, whether all blocks of these rows are present), in order."""
        pieces = cut_at_blocks(rows, self.block_bytes)
        missing = ~self._bat.present(pieces.block)
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
        pieces = cut_at_blocks(rows, min(self.block_bytes, _COPY_WINDOW_BYTES))
        starts = np.cumsum(rows[:, 1]) - rows[:, 1]
        owners = np.searchsorted(starts + rows[:, 1], pieces.data_offset, "right")
        sources = offsets[owners] + pieces.data_offset - starts[owners]
        targets = np.column_stack((pieces.disk_offset, pieces.length))
        first = 0
        totals = np.cumsum(pieces.length)
        while first < len(targets):
            done = int(totals[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(totals, done + _COPY_WINDOW_BYTES, "right")))
            length = int(totals[last - 1]) - done
            window = np.empty(length, np.uint8).data
            wanted = np.column_stack((sources[first:last], pieces.length[first:last]))
            native.read_extents(source_file, None, wanted, window)
            self.write_extents(targets[first:last], window)
            first = last

    def write_zeroes(self, disk_offset: int, length: int) -> None:
        if disk_offset < 0 or length < 0 or disk_offset + length > self.virtual_bytes:
            raise beyond_end(disk_offset, length, virtual_bytes=self.virtual_bytes, path=self.path)
        if length == 0:
            return
        end = disk_offset + length
        block_bytes = self.block_bytes
        first_whole = -(-disk_offset // block_bytes)
        end_whole = self._image.geometry.block_count if end == self.virtual_bytes else end // block_bytes
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

    def _zero_whole(self, session: WriteSession, first_block: int, end_block: int) -> None:
        if self._image.parameters.leave_blocks_allocated:
            self._zero_inside(session, first_block * self.block_bytes, end_block * self.block_bytes)
            return
        for start in range(first_block, end_block, _DISCARD_WINDOW_BLOCKS):
            last = min(end_block, start + _DISCARD_WINDOW_BLOCKS) - 1
            blocks = self._bat.held_blocks(start, last)
            states = states_of(self._bat.entries_of(blocks))
            gone = blocks[states != PayloadState.PAYLOAD_BLOCK_ZERO]
            if len(gone):
                session.discard(gone)

    def _zero_inside(self, session: WriteSession, start: int, end: int) -> None:
        """Zero what is present between `start` and `end`, leaving every block its place."""
        if start >= end:
            return
        first, last = start // self.block_bytes, (end - 1) // self.block_bytes
        session.settle(self._bat.held_blocks(first, last))
        for low in range(first, last + 1, _MAP_WINDOW_BLOCKS):
            for run in self._present_ranges(low, min(last, low + _MAP_WINDOW_BLOCKS - 1), start, end):
                self._file.zero(run[2], run[1])

    def flush(self) -> None:
        if self._session is not None:
            self._session.flush()

    def extents(self, start: int, end: int) -> NDArray[np.int64]:
        end = min(end, self.virtual_bytes)
        if start >= end:
            return NO_EXTENTS
        first, last = start // self.block_bytes, (end - 1) // self.block_bytes
        self._check_window(first, last)
        rows = []
        for disk_offset, length, file_offset in self._present_ranges(first, last, start, end):
            for data_offset, data_length in self._file.data_extents(file_offset, file_offset + length):
                rows.append((disk_offset + data_offset - file_offset, data_length))
        if not rows:
            return NO_EXTENTS
        return widened(merge(np.array(rows, np.int64)), start=start, end=end)

    def _check_window(self, first_block: int, last_block: int) -> None:
        """Check the entries that a walk over these blocks will use."""
        self._bat.ensure_checked(self._bat.held_blocks(first_block, last_block))

    def _present_ranges(self, first_block: int, last_block: int, start: int, end: int) -> list[list[int]]:
        """Return [disk_offset, length, file_offset] of what is present from `start` to `end`, in order."""
        ranges = []
        for block, count, file_offset in self._bat.present_runs(first_block, last_block).tolist():
            low = max(block * self.block_bytes, start)
            high = min((block + count) * self.block_bytes, end)
            if low < high:
                ranges.append([low, high - low, file_offset + low - block * self.block_bytes])
        return ranges

    def info(self) -> DiskInfo:
        self._bat.check_all()
        header = self._headers.current
        parameters = self._image.parameters
        return DiskInfo(
            path=str(self.path),
            format=self.format,
            type="fixed" if parameters.leave_blocks_allocated else "dynamic",
            virtual_bytes=self.virtual_bytes,
            file_bytes=self._file.size(),
            allocated_bytes=len(self._bat.places(is_present)) * self.block_bytes,
            logical_sector_bytes=self.logical_sector_bytes,
            physical_sector_bytes=self.physical_sector_bytes,
            block_bytes=self.block_bytes,
            creator=self._image.creator,
            disk_id=str(parameters.virtual_disk_id),
            file_write_guid=str(header.file_write_guid),
            data_write_guid=str(header.data_write_guid),
            log="replayed" if self._replayed else "clean",
        )

    def map(self) -> Iterator[MapEntry]:
        position = 0
        for first in range(0, self._image.geometry.block_count, _MAP_WINDOW_BLOCKS):
            last = min(first + _MAP_WINDOW_BLOCKS, self._image.geometry.block_count) - 1
            self._check_window(first, last)
            for disk_offset, length, file_offset in self._present_ranges(first, last, 0, self.virtual_bytes):
                if disk_offset > position:
                    yield MapEntry(position, disk_offset - position, "zero", None)
                yield from self._map_run(disk_offset, length, file_offset)
                position = disk_offset + length
        if position < self.virtual_bytes:
            yield MapEntry(position, self.virtual_bytes - position, "zero", None)

    def _map_run(self, disk_offset: int, length: int, file_offset: int) -> Iterator[MapEntry]:
        shift = disk_offset - file_offset
        position, end = file_offset, file_offset + length
        for data_offset, data_length in self._file.data_extents(file_offset, end):
            if data_offset > position:
                yield MapEntry(position + shift, data_offset - position, "zero", position)
            yield MapEntry(data_offset + shift, data_length, "data", data_offset)
            position = data_offset + data_length
        if position < end:
            yield MapEntry(position + shift, end - position, "zero", position)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if self._session is not None:
                self._session.clear()
        finally:
            self._file.close()

    def abandon(self) -> None:
        self._closed = True
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _rows(self, extents: NDArray[Any]) -> NDArray[np.int64]:
        return checked_rows(extents, virtual_bytes=self.virtual_bytes, path=self.path)

    def _begin(self) -> WriteSession:
        if self._session is None:
            error = PermissionError(f"{self.path} is open for reading only")
            raise error
        self._session.begin()
        return self._session


def _are_zero(view: memoryview, pieces: Pieces, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the `chosen` pieces of `view` hold zeros only."""
    octets = np.frombuffer(view, np.uint8)
    starts, lengths = pieces.data_offset[chosen], pieces.length[chosen]
    # One byte of each settles most pieces of real data in one step; the rest is looked at one by one.
    zero: NDArray[np.bool_] = (octets[starts] | octets[starts + lengths // 2]) == 0
    for index in np.flatnonzero(zero).tolist():
        start = int(starts[index])
        zero[index] = native.is_zero(view[start : start + int(lengths[index])])
    return zero


def _true_runs(flags: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
