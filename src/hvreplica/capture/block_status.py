"""What a range of a disk is made of, as NBD's block status tells it: data, or a hole that reads as zeros.

A client asks piece by piece, and often for one state at a time. So what lies ahead is looked at in windows
that begin small and grow only while they tell little: the work is that of a walk over the disk, however many
pieces it has and in however many questions it is asked. Nothing is remembered between two questions, so that
none is answered with what was true before a write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from hvreplica.disk.extents import NO_EXTENTS
from hvreplica.formats.nbd import BlockState
from hvreplica.units import GIB, KIB, MIB

if TYPE_CHECKING:
    import numpy.typing as npt

# A shorter hole is told as data: a client reads it faster than it asks for what follows.
HOLE_BYTES_MIN = 64 * KIB
_ROWS_MAX = 8192
_WINDOW_BYTES_MIN = MIB
_WINDOW_BYTES_MAX = 4 * GIB
_WINDOW_GROWS = 4
_FEW_EXTENTS = 64


class Mapped(Protocol):
    """What tells where a disk may hold data, see disk.Disk."""

    def extents(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """Return (disk_offset, length) of what may be data, sorted and disjoint."""
        ...


def block_states(disk: Mapped, offset: int, length: int, *, only_one: bool) -> npt.NDArray[np.int64]:
    """Return what a range begins with, in order: int64 (n, 2) of (length, BlockState), at least one row.

    The range is within the disk and not empty. only_one: no more than its first state is asked for. The
    answer may end before the range does. Raises: OSError, HvReplicaError.
    """
    ranges, known_end = _look(disk, offset, offset + length, rows_max=1 if only_one else _ROWS_MAX)
    # Holes and data take turns; the first hole may be empty.
    edges = np.concatenate(([offset], ranges.ravel(), [known_end]))
    states = np.full(len(edges) - 1, int(BlockState.HOLE | BlockState.ZERO), np.int64)
    states[1::2] = 0
    table = np.column_stack((np.diff(edges), states))
    return table[table[:, 0] > 0][: 1 if only_one else _ROWS_MAX]


def _look(disk: Mapped, start: int, end: int, *, rows_max: int) -> tuple[npt.NDArray[np.int64], int]:
    """Return the ranges of data, int64 (n, 2) of (start, end), and up to where they are all there is.

    Ends early where they are enough for `rows_max` states.
    """
    ranges, at, window_bytes = NO_EXTENTS, start, _WINDOW_BYTES_MIN
    while at < end:
        stop = min(end, (at + window_bytes) // _WINDOW_BYTES_MIN * _WINDOW_BYTES_MIN)
        found = disk.extents(at, stop)
        ranges = _joined(ranges, np.column_stack((found[:, 0], found.sum(axis=1))))
        at = stop
        if len(found) <= _FEW_EXTENTS:
            window_bytes = min(window_bytes * _WINDOW_GROWS, _WINDOW_BYTES_MAX)
        # The last range may go on in the next window, so what is certain ends before it.
        is_open = len(ranges) > 0 and at - int(ranges[-1, 1]) < HOLE_BYTES_MIN
        certain = len(ranges) - is_open
        begins_with_hole = len(ranges) > 0 and int(ranges[0, 0]) > start
        if at < end and 2 * certain - 1 + begins_with_hole + is_open >= rows_max:
            return (ranges[:-1], int(ranges[-1, 0])) if is_open else (ranges, at)
    return ranges, end


def _joined(ranges: npt.NDArray[np.int64], more: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return both, in order, as one where the hole between two is too short to be told."""
    both = np.concatenate((ranges, more))
    if len(both) < 2:
        return both
    ends = np.flatnonzero(both[1:, 0] - both[:-1, 1] >= HOLE_BYTES_MIN)
    heads, tails = np.concatenate(([0], ends + 1)), np.concatenate((ends, [len(both) - 1]))
    return np.column_stack((both[heads, 0], both[tails, 1]))
