"""Change by comparison: read a disk, hash it, and keep what differs from the fingerprint table.

The source of change for a disk that nobody tracked. The fingerprints are taken from the very buffer that goes
into the log, so a disk that changes meanwhile is found different again by the next cycle: never a subset of
what changed. Ranges that are unallocated now and were zero before are not read.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hvreplica import native
from hvreplica.disk.extents import NO_EXTENTS, merge, select_runs, union
from hvreplica.errors import kept
from hvreplica.tracking.window import WINDOW_BYTES, runs_of, windows_with_data

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    from typing_extensions import Buffer

    from hvreplica.disk import Disk
    from hvreplica.tracking.fingerprints import FingerprintTable
    from hvreplica.tracking.window import ExtentSource

_HELD_ROWS_MAX = 1 << 16


class ChangeSink(Protocol):
    """Where changes go: an .hrl writer."""

    def append(self, extents: npt.NDArray[np.int64], data: Buffer) -> None:
        """Take guest extents (offset, length), shape (n, 2), with their data concatenated.

        From many threads.
        """
        ...

    def append_zeroes(self, disk_offset: int, length: int) -> None:
        """Take a range that is all zero now. From many threads."""
        ...


class KnownBlocks(Protocol):
    """What a replica is known to hold, by fingerprints: a table, or what several agree upon."""

    @property
    def block_bytes(self) -> int:
        """The disk's bytes behind one fingerprint."""
        ...

    def read(self, first_block: int, block_count: int) -> npt.NDArray[np.uint8]:
        """Return fingerprints, shape (block_count, 16)."""
        ...

    def extents(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """Return the guest ranges (offset, length) within [start, end) that may hold data at the replica."""
        ...


class ChangeSource(Protocol):
    """A way to learn what changed since the last cut: by comparison here, by live tracking elsewhere."""

    def changes_into(self, sink: ChangeSink, *, on_read: Callable[[int], None]) -> int:
        """Put every change into `sink` and return the changed bytes. on_read is told the bytes looked at."""
        ...


class ComparedDisk:
    """A ChangeSource for one disk and its fingerprint table; the table is read, never changed.

    within: int64 (n, 2), sorted and disjoint: nothing changed outside of these ranges, so only they are read.
    """

    def __init__(
        self,
        disk: Disk,
        table: FingerprintTable,
        *,
        workers: int,
        within: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._disk = disk
        self._table = table
        self._workers = workers
        self._within = within

    def changes_into(self, sink: ChangeSink, *, on_read: Callable[[int], None]) -> int:
        rows = None if self._within is None else rows_as_source(self._within)
        return _Comparison(self._disk, self._table, rows, sink, on_read).run(self._workers)


class _Comparison:
    """One run: threads pull windows from one iterator, so memory is bounded by their number.

    rows: what alone is read of each window; None for all of it.
    """

    def __init__(
        self,
        disk: Disk,
        table: FingerprintTable,
        rows: ExtentSource | None,
        sink: ChangeSink,
        on_read: Callable[[int], None],
    ) -> None:
        self._disk = disk
        self._table = table
        self._rows = rows
        sources = (disk.extents, table.extents) if rows is None else (rows,)
        self._windows = windows_with_data(sources, 0, disk.virtual_bytes)
        self._sink = sink
        self._on_read = on_read
        self._lock = threading.Lock()
        self._changed_bytes = 0
        self._failure: BaseException | None = None

    def run(self, workers: int) -> int:
        threads = [
            threading.Thread(target=self._work, name=f"compare-{index}") for index in range(workers - 1)
        ]
        for thread in threads:
            thread.start()
        self._work()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise kept(self._failure)
        return self._changed_bytes

    def _work(self) -> None:
        buffer = np.empty(WINDOW_BYTES, np.uint8)
        try:
            while True:
                with self._lock:
                    window = None if self._failure else next(self._windows, None)
                if window is None:
                    return
                extents = self._extents(*window)
                read_bytes = int(extents[:, 1].sum())
                changed = self._compare(extents, buffer[:read_bytes])
                with self._lock:
                    self._changed_bytes += changed
                    self._on_read(read_bytes)
        except BaseException as failure:  # carried to the caller's thread by run()
            ended = kept(failure)
            with self._lock:
                self._failure = self._failure or ended

    def _extents(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Return what is read of a window, in whole blocks, int64 (n, 2)."""
        window = np.array([[start, length]], np.int64)
        if self._rows is None:
            return window
        rows, block_bytes = self._rows(start, start + length), self._table.block_bytes
        starts = rows[:, 0] // block_bytes * block_bytes
        ends = np.minimum(-(-(rows[:, 0] + rows[:, 1]) // block_bytes) * block_bytes, start + length)
        return merge(np.column_stack((starts, ends - starts)))

    def _compare(self, extents: npt.NDArray[np.int64], content: npt.NDArray[np.uint8]) -> int:
        self._disk.read_extents(extents, content)
        return changes_of(content, extents, self._table, self._sink)


class RangeSink:
    """A ChangeSink that keeps the places and forgets the data. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows = NO_EXTENTS
        self._new: list[npt.NDArray[np.int64]] = []
        self._count = 0

    def append(self, extents: npt.NDArray[np.int64], data: Buffer) -> None:  # noqa: ARG002 - a ChangeSink
        """Take guest extents (offset, length), int64 (n, 2)."""
        self._add(extents)

    def append_zeroes(self, disk_offset: int, length: int) -> None:
        """Take a range that is all zero."""
        self._add(np.array([[disk_offset, length]], np.int64))

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """What was taken, sorted, disjoint."""
        with self._lock:
            self._join()
            return self._rows

    def _add(self, rows: npt.NDArray[np.int64]) -> None:
        with self._lock:
            self._new.append(rows)
            self._count += len(rows)
            if self._count >= _HELD_ROWS_MAX:
                self._join()

    def _join(self) -> None:
        self._rows = union(self._rows, np.concatenate([NO_EXTENTS, *self._new]))
        self._new, self._count = [], 0


def changes_of(
    content: npt.NDArray[np.uint8],
    extents: npt.NDArray[np.int64],
    table: KnownBlocks,
    sink: ChangeSink,
) -> int:
    """Put into `sink` what of `content`, the disk's bytes in `extents`, differs from `table`.

    extents: int64 (n, 2), sorted, disjoint, of whole blocks of the table, but for one that ends with the
    disk. Return the changed bytes.
    """
    block_bytes = table.block_bytes
    new = native.fingerprints(content, block_bytes)
    old = _known(extents, table)
    runs = native.changed_runs(new, old, new.shape[1]) // new.shape[1]
    if not len(runs):
        return 0
    changed = np.zeros(len(new), np.bool_)
    for first, count in runs:
        changed[first : first + count] = True
    zero = ~new.any(axis=1)
    data_runs = clipped(runs_of(changed & ~zero) * block_bytes, len(content))
    zero_runs = clipped(runs_of(changed & zero) * block_bytes, len(content))
    if len(data_runs):
        sink.append(_placed(extents, data_runs), gather(content, data_runs))
    for start, length in _placed(extents, zero_runs).tolist():
        sink.append_zeroes(start, length)
    return int(data_runs[:, 1].sum() + zero_runs[:, 1].sum())


def _known(extents: npt.NDArray[np.int64], table: KnownBlocks) -> npt.NDArray[np.uint8]:
    """Return the table's fingerprints of the blocks in `extents`, of one window, in order."""
    block_bytes = table.block_bytes
    firsts, counts = extents[:, 0] // block_bytes, -(-extents[:, 1] // block_bytes)
    rows = table.read(int(firsts[0]), int(firsts[-1] + counts[-1] - firsts[0]))
    if len(extents) == 1:
        return rows
    places = np.repeat(firsts - firsts[0] - (np.cumsum(counts) - counts), counts)
    return rows[places + np.arange(len(places))]


def _placed(extents: npt.NDArray[np.int64], runs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where runs of the extents' content lie on the disk."""
    if len(extents) == 1 or not len(runs):
        return shifted(runs, int(extents[0, 0]))
    return select_runs(extents, runs)


def rows_as_source(rows: npt.NDArray[np.int64]) -> ExtentSource:
    """Return what gives the parts of `rows`, int64 (n, 2), sorted and disjoint, in a range."""
    ends = rows[:, 0] + rows[:, 1]

    def extents(start: int, end: int) -> npt.NDArray[np.int64]:
        first, last = np.searchsorted(ends, start, "right"), np.searchsorted(rows[:, 0], end, "left")
        found = rows[first:last].copy()
        starts = np.maximum(found[:, 0], start)
        found[:, 1] = np.minimum(ends[first:last], end) - starts
        found[:, 0] = starts
        return found

    return extents


def clipped(runs: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Return byte runs (offset, length) of whole blocks with the last one cut at `length`:

    a disk's short last block.
    """
    if len(runs):
        runs[-1, 1] = min(runs[-1, 1], length - runs[-1, 0])
    return runs


def shifted(runs: npt.NDArray[np.int64], offset: int) -> npt.NDArray[np.int64]:
    """Return runs (offset in a window, length) as extents of what the window was cut from."""
    return runs + np.array((offset, 0), np.int64)


def gather(window: npt.NDArray[np.uint8], runs: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Return the bytes of `runs` (offset, length) of `window`, concatenated;

    the window itself where one run is all.
    """
    if len(runs) == 1:
        return window[runs[0, 0] : runs[0, 0] + runs[0, 1]]
    return np.concatenate([window[first : first + count] for first, count in runs.tolist()])
