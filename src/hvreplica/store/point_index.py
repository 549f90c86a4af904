"""Where each byte of a disk stood at a recovery point: in which undo part, or still in the disk's own file.

    parts, in the order of the walk      #1: ....AAAA........      the point's own
                                         #2: ..BBBB......BB..      the next newer point's
    index                                    ..BBAAAA....BB..      what comes first in the walk wins;
                                                                   the rest is in the disk's file

Pure: arrays in, arrays out. A file has a number here, and what is known to be zeros has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica import native
from hvreplica.disk.extents import intersection, merge
from hvreplica.errors import FieldOutOfRange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

NO_ROWS = np.empty((0, 3), np.int64)
ZEROS = -1  # the file of what reads as zeros
DISK = -2  # the file of what no part covers
_ZEROS_CHECKSUM = 0xFFFFFFFF  # [MS-HRL] 2.6 over zeros, and over nothing else of this length:
_SUMMED_BYTES_MAX = 16 << 20  # more bytes of 255 can add up to 2^32 again
# A row's file and the offset in it travel as one number through the kernel that decides which row wins.
_OFFSET_BITS = 48
_FILES_MAX = (1 << 15) - 2
_OFFSET_MASK = np.uint64((1 << _OFFSET_BITS) - 1)


def rows_of(entries: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Return (disk_offset, length, file_offset) of a part's entries, oldest first; -1 for zeros.

    entries: tables of native.HRL_ENTRY, checked.
    """
    if not entries:
        return NO_ROWS
    table = np.concatenate(entries)
    rows = np.column_stack(
        [table[name].astype(np.int64) for name in ("byte_offset", "data_length", "log_offset")]
    )
    is_zero = (table["data_checksum"] == _ZEROS_CHECKSUM) & (table["data_length"] <= _SUMMED_BYTES_MAX)
    rows[is_zero, 2] = -1
    return rows


@dataclass(frozen=True, slots=True, eq=False)
class PointIndex:
    """Sorted disjoint extents, each with its place. starts, ends: disk offsets. files: numbers, or ZEROS."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    file_offsets: NDArray[np.int64]
    files: NDArray[np.int64]
    virtual_bytes: int

    @classmethod
    def empty(cls, virtual_bytes: int) -> PointIndex:
        """Return the index of a disk that is as its file has it."""
        none = np.empty(0, np.int64)
        return cls(none, none, none, none, virtual_bytes)

    def under(self, parts: Sequence[tuple[int, NDArray[np.int64]]]) -> PointIndex:
        """Return this index with what `parts` add to it, which come behind it in the walk.

        parts: (number of its file, rows as rows_of() returns them), in the order of the walk. Raises:
        FieldOutOfRange for more files or longer ones than an index can name.
        """
        # The kernel lets the last row win, so the walk goes backwards.
        columns = [_packed(number, rows, self.virtual_bytes) for number, rows in reversed(parts)]
        columns.append(
            (self.starts, self.ends - self.starts, _places(self.files, self.file_offsets, self.starts))
        )
        offsets, lengths, places = (np.concatenate([each[column] for each in columns]) for column in range(3))
        starts, lengths, places = native.coalesce(offsets, lengths, places)
        numbers = (places >> np.uint64(_OFFSET_BITS)).astype(np.int64) - 1
        file_offsets = (places & _OFFSET_MASK).astype(np.int64)
        starts = starts.astype(np.int64)
        return PointIndex(
            starts, starts + lengths.astype(np.int64), file_offsets, numbers, self.virtual_bytes
        )

    def __len__(self) -> int:
        return len(self.starts)

    def tiles(self) -> PointIndex:
        """Return the index with a row of DISK for what lies between its rows: from 0 to the disk's end."""
        gap_starts = np.concatenate(([0], self.ends))
        gap_ends = np.concatenate((self.starts, [self.virtual_bytes]))
        wanted = gap_starts < gap_ends
        starts = np.concatenate((self.starts, gap_starts[wanted]))
        order = np.argsort(starts, kind="stable")
        filler = np.full(int(wanted.sum()), DISK, np.int64)
        return PointIndex(
            starts[order],
            np.concatenate((self.ends, gap_ends[wanted]))[order],
            np.concatenate((self.file_offsets, np.zeros(len(filler), np.int64)))[order],
            np.concatenate((self.files, filler))[order],
            self.virtual_bytes,
        )

    def split(self, spans: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the pieces of `spans`, within the disk, each in one row; of tiles().

        spans: rows (disk_offset, length, offset in a buffer). Returns rows (disk_offset, length, offset in
        the buffer, file_offset) and the files of them.
        """
        spans = spans[spans[:, 1] > 0]
        span_ends = spans[:, 0] + spans[:, 1]
        first = np.searchsorted(self.ends, spans[:, 0], "right")
        counts = np.searchsorted(self.starts, span_ends, "left") - first
        owner = np.repeat(np.arange(len(spans)), counts)
        row = np.repeat(first, counts) + np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        low = np.maximum(spans[owner, 0], self.starts[row])
        high = np.minimum(span_ends[owner], self.ends[row])
        pieces = np.column_stack(
            (
                low,
                high - low,
                spans[owner, 2] + low - spans[owner, 0],
                self.file_offsets[row] + low - self.starts[row],
            )
        )
        return pieces, self.files[row]

    def held(self, disk_extents: NDArray[np.int64], start: int, end: int) -> NDArray[np.int64]:
        """Return the extents between `start` and `end` that may hold data; of tiles().

        disk_extents: those of the disk's file, sorted and disjoint.
        """
        first = int(np.searchsorted(self.ends, start, "right"))
        last = int(np.searchsorted(self.starts, end, "left"))
        low = np.maximum(self.starts[first:last], start)
        rows = np.column_stack((low, np.minimum(self.ends[first:last], end) - low))
        numbers = self.files[first:last]
        below = intersection(disk_extents, rows[numbers == DISK])
        return merge(np.concatenate((rows[numbers >= 0], below)))


def _packed(
    number: int, rows: NDArray[np.int64], virtual_bytes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
    """Return offsets, lengths and places of a part's rows, without what lies behind the disk's end."""
    if not 0 <= number < _FILES_MAX:
        raise FieldOutOfRange(
            "a recovery point has too many undo parts",
            field="parts",
            expected=f"at most {_FILES_MAX}",
            actual=number + 1,
        )
    rows = rows[rows[:, 0] < virtual_bytes]
    lengths = np.minimum(rows[:, 1], virtual_bytes - rows[:, 0])
    if len(rows) and int((rows[:, 2] + lengths).max()) > int(_OFFSET_MASK):
        raise FieldOutOfRange(
            "an undo part is too long",
            field="file_offset",
            expected=f"less than {int(_OFFSET_MASK)}",
            actual=int(rows[:, 2].max()),
        )
    numbers = np.where(rows[:, 2] < 0, ZEROS, number)
    return rows[:, 0], lengths, _places(numbers, rows[:, 2], rows[:, 0])


def _places(
    numbers: NDArray[np.int64], file_offsets: NDArray[np.int64], disk_offsets: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Pack files and offsets; zeros take the disk offset for theirs, so that neighbours are one row."""
    offsets = np.where(numbers == ZEROS, disk_offsets, file_offsets)
    places: NDArray[np.uint64] = ((numbers + 1) << _OFFSET_BITS | offsets).view(np.uint64)
    return places
