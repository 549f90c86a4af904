"""The data of log entries: find the first that does not match its checksum, and the holes that stand for
zeros.

Reads the log once, front to back, in windows; memory is one window and a few numbers per entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica import native
from hvreplica.formats.hrl import DATA_CHECKSUM_ABSENT, SECTOR_BYTES
from hvreplica.units import align_down, align_up

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hvreplica.files import BlockFile

WINDOW_BYTES = 512 << 10  # stays in a core's cache between the read and the sum
HOLE_BYTES_MIN = 64 << 10  # smaller holes are read as the data around them: a read costs less than a split
_HOLES_MAX = 1 << 16  # per call; holes beyond are read as data, which is slower and gives the same
_BEHIND_EVERYTHING = 1 << 63


@dataclass(frozen=True, slots=True)
class DataFault:
    """The first entry whose data does not match. index: its row. computed: the checksum that its data has."""

    index: int
    computed: int


class DataChecker:
    """Check entries against their data in `file`. Any thread may call."""

    def __init__(self, file: BlockFile) -> None:
        self._file = file
        self._windows: list[bytearray] = []  # those that no thread uses now

    def find_fault(self, entries: NDArray[Any], holes: NDArray[np.int64]) -> DataFault | None:
        """Return the first of `entries` whose data does not match its data_checksum, None if all do.

        entries: native.HRL_ENTRY in log order, rules checked. holes: what HoleFinder found under them, which
        is not read; may be empty. A data_checksum of 0 says that none was computed and matches anything.
        Raises: Truncated if the file ends before the data does. Spec: [MS-HRL] 2.4, 2.6.
        """
        stored = entries["data_checksum"]
        try:
            window = self._windows.pop()
        except IndexError:
            window = bytearray(WINDOW_BYTES)
        computed = ~self._sums(entries, holes, memoryview(window))
        self._windows.append(window)
        bad = np.flatnonzero((stored != computed) & (stored != DATA_CHECKSUM_ABSENT))
        if not len(bad):
            return None
        index = int(bad[0])
        return DataFault(index, int(computed[index]))

    def _sums(
        self, entries: NDArray[Any], holes: NDArray[np.int64], window: memoryview
    ) -> NDArray[np.uint32]:
        """Return the sum of the data bytes of each entry."""
        starts = entries["log_offset"].astype(np.int64)
        ends = starts + entries["data_length"]
        sums = np.zeros(len(entries), np.uint32)
        unread = np.flatnonzero(~_inside(holes, starts, ends))
        at = 0
        while at < len(unread):
            first = int(unread[at])
            start = int(starts[first])
            last = int(np.searchsorted(ends, start + WINDOW_BYTES, side="right"))
            if last <= first:
                sums[first] = self._long_sum(start, int(ends[first]), window)
                last = first + 1
            else:
                sums[first:last] = self._window_sums(starts[first:last], ends[first:last], window)
            at = int(np.searchsorted(unread, last))
        return sums

    def _window_sums(
        self, starts: NDArray[np.int64], ends: NDArray[np.int64], window: memoryview
    ) -> NDArray[np.uint32]:
        # Metadata blocks stand between the data; each gap is one more piece, whose sum is thrown away.
        pieces = np.empty(2 * len(starts) - 1, np.int64)
        pieces[0::2] = ends - starts
        pieces[1::2] = starts[1:] - ends[:-1]
        base = int(starts[0])
        view = window[: int(ends[-1]) - base]
        self._file.read_into(view, base)
        sums: NDArray[np.uint32] = native.byte_sums(view, pieces)[0::2]
        return sums

    def _long_sum(self, start: int, end: int, window: memoryview) -> int:
        total = 0
        for at in range(start, end, WINDOW_BYTES):
            view = window[: min(WINDOW_BYTES, end - at)]
            self._file.read_into(view, at)
            total += native.byte_sum(view)
        return total & 0xFFFFFFFF


class HoleFinder:
    """Find the holes of a log. One owner. Ranges in ascending order cost one walk over the file in all."""

    def __init__(self, file: BlockFile) -> None:
        self._file = file
        self._walk_from(0)

    def find_under(self, entries: NDArray[Any]) -> NDArray[np.int64]:
        """Return find() of the range that the data of `entries` takes."""
        if not len(entries):
            return np.empty((0, 2), np.int64)
        last = entries[-1]
        return self.find(int(entries["log_offset"][0]), int(last["log_offset"]) + int(last["data_length"]))

    def _walk_from(self, start: int) -> None:
        self._runs = self._file.data_extents(start, self._file.size())
        self._hole_start = self._run_start = self._run_end = start

    def find(self, start: int, end: int) -> NDArray[np.int64]:
        """Return holes between `start` and `end`, both within the file, as rows (log_offset, length),
        ascending.

        Only holes of whole sectors and at least HOLE_BYTES_MIN, and a bounded number: what is not returned
        may be zeros too, what is returned reads as zeros.
        """
        if start < self._hole_start:
            self._walk_from(start)
        holes: list[tuple[int, int]] = []
        position = start
        while position < end:
            while self._run_end <= position:
                self._hole_start = self._run_end
                self._run_start, length = next(self._runs, (_BEHIND_EVERYTHING, 1))
                self._run_end = self._run_start + length
            _add_hole(holes, position, min(self._run_start, end))
            position = self._run_end
        return np.array(holes, np.int64).reshape(-1, 2)


def _add_hole(holes: list[tuple[int, int]], start: int, end: int) -> None:
    start = align_up(start, SECTOR_BYTES)
    end = align_down(end, SECTOR_BYTES)
    if end - start >= HOLE_BYTES_MIN and len(holes) < _HOLES_MAX:
        holes.append((start, end - start))


def _inside(
    holes: NDArray[np.int64], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return for each range whether it lies in a hole as a whole."""
    if not len(holes):
        return np.zeros(len(starts), np.bool_)
    index = np.searchsorted(holes[:, 0], starts, side="right") - 1
    inside: NDArray[np.bool_] = (index >= 0) & (ends <= holes[index, 0] + holes[index, 1])
    return inside
