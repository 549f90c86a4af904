"""Find where a disk does not hold what a log wrote to it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica import native
from hvreplica.disk.extents import NO_EXTENTS, batches, data_windows, intersection, merge, select_runs, union
from hvreplica.disk.parallel import Scratch
from hvreplica.formats.hrl import SECTOR_BYTES
from hvreplica.hrl.apply import apply_log
from hvreplica.units import MIB

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from hvreplica.disk import Disk
    from hvreplica.files import BlockFile, FileSystem
    from hvreplica.progress import ProgressCallback

_BATCH_BYTES = MIB
_END = 1 << 62  # behind every disk


def log_differences(
    files: FileSystem, path: Path, disk: Disk, *, progress: ProgressCallback | None = None
) -> NDArray[np.int64]:
    """Return the sectors in which `disk` holds something else than the newest write of the log to them.

    int64 (n, 2) of (disk_offset, length), sorted, disjoint. The log is taken as verified; the disk is only
    read. Raises: NotClosed, FormatError for structure and bounds.
    """
    target = _Comparison(disk)
    apply_log(files, path, target, verify_data=False, progress=progress)
    return target.differing


class _Comparison:
    """A target of apply_log() that only looks. What later passes see overrules what earlier ones saw."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._lock = threading.Lock()
        self._ours = Scratch(_BATCH_BYTES)
        self._logged = Scratch(_BATCH_BYTES)
        self.virtual_bytes = disk.virtual_bytes
        self.logical_sector_bytes = disk.logical_sector_bytes
        self.differing = NO_EXTENTS

    def copy_extents(
        self, source_file: BlockFile, source_offsets: NDArray[Any], extents: NDArray[Any]
    ) -> None:
        rows = extents.astype(np.int64)
        shifts = source_offsets.astype(np.int64) - rows[:, 0]
        found = [NO_EXTENTS]
        for batch in batches(rows, _BATCH_BYTES):
            length = int(batch[:, 1].sum())
            ours, logged = self._ours.take(length), self._logged.take(length)
            self._disk.read_extents(batch, ours.data)
            # The rows are disjoint and sorted, so the one that a part was cut from is the last that begins
            # before it.
            owner = np.searchsorted(rows[:, 0], batch[:, 0], "right") - 1
            sources = np.column_stack((batch[:, 0] + shifts[owner], batch[:, 1]))
            native.read_extents(source_file, None, sources, logged.data)
            found.append(_selected(batch, native.changed_runs(ours.data, logged.data, SECTOR_BYTES)))
        self._note(rows, found)

    def write_zeroes(self, disk_offset: int, length: int) -> None:
        found = [NO_EXTENTS]
        for _, _, rows in data_windows(self._disk, disk_offset, disk_offset + length):
            for batch in batches(rows, _BATCH_BYTES):
                ours = self._ours.take(int(batch[:, 1].sum()))
                self._disk.read_extents(batch, ours.data)
                found.append(_selected(batch, native.data_runs(ours.data, SECTOR_BYTES)))
        self._note(np.array([[disk_offset, length]], np.int64), found)

    def _note(self, looked_at: NDArray[np.int64], found: list[NDArray[np.int64]]) -> None:
        with self._lock:
            rest = intersection(self.differing, _outside(merge(looked_at)))
            self.differing = union(rest, np.concatenate(found))


def _selected(rows: NDArray[np.int64], runs: NDArray[np.int64]) -> NDArray[np.int64]:
    return select_runs(rows, runs) if len(runs) else NO_EXTENTS


def _outside(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what sorted, disjoint `rows` leave of everything."""
    starts = np.concatenate(([0], rows.sum(axis=1)))
    ends = np.concatenate((rows[:, 0], [_END]))
    return merge(np.column_stack((starts, ends - starts)))
