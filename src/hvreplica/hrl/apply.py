"""Apply a closed log to a disk: the newest write of every byte, once, ordered by disk offset.

    log order      A: 0..8K   B: 4K..12K   C: 64K..68K   D: 0..4K
    coalesced      D: 0..4K   B: 4K..12K   C: 64K..68K               -> one ordered way over the disk

The whole log is checked before the first byte is written: structure, bounds against the disk, data checksums.
Then it is applied in passes of a bounded number of entries, oldest pass first, so that memory does not grow
with the log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hvreplica import native
from hvreplica.disk.parallel import map_ordered
from hvreplica.formats.hrl import FILE_TYPE_HRL, SECTOR_BYTES
from hvreplica.hrl.data import HOLE_BYTES_MIN, HoleFinder
from hvreplica.hrl.reader import LogReader
from hvreplica.hrl.report import ApplyReport
from hvreplica.hrl.verify import check_log
from hvreplica.progress import Progress
from hvreplica.units import align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from hvreplica.files import BlockFile
    from hvreplica.hrl.reader import LogFiles
    from hvreplica.progress import ProgressCallback

ENTRIES_PER_PASS = 1 << 19  # 2 GiB of 4 KiB writes; about 60 MiB of tables while they are coalesced
_EXTENTS_PER_STEP = 1 << 12


class Target(Protocol):
    """What apply_log() needs of a disk."""

    @property
    def virtual_bytes(self) -> int:
        """The guest's disk size."""
        ...

    @property
    def logical_sector_bytes(self) -> int:
        """The guest's sector size."""
        ...

    def copy_extents(
        self, source_file: BlockFile, source_offsets: NDArray[Any], extents: NDArray[Any]
    ) -> None:
        """Copy ranges of a file to guest extents."""
        ...

    def write_zeroes(self, disk_offset: int, length: int) -> None:
        """Make a guest range read as zeros."""
        ...


def apply_log(
    files: LogFiles,
    path: Path,
    disk: Target,
    *,
    verify_data: bool = True,
    progress: ProgressCallback | None = None,
    file_type: int = FILE_TYPE_HRL,
) -> ApplyReport:
    """Write what the log holds to `disk`; where writes overlap, the newest wins.

    verify_data: check data checksums first; may be left out by a caller who has just done so with
    verify_log(). Does not flush the disk: nothing is durable before the caller does. Applying the same log
    again, whole, gives the same disk, so an apply that was cut is repeated. One owner of the disk meanwhile.
    Raises: NotClosed, FormatError before anything is written; OSError from the disk in the middle.
    """
    with LogReader(files, path, file_type=file_type) as reader:
        gathered = _Gathered(min(ENTRIES_PER_PASS, reader.entry_count))
        fits = reader.entry_count <= ENTRIES_PER_PASS
        check_log(
            reader,
            data=verify_data,
            disk_bytes=disk.virtual_bytes,
            progress=progress,
            keep=gathered.add if fits else None,
        )
        applied = _Apply(reader, disk, progress)
        for columns in [gathered.take()] if fits else _passes(reader, disk.virtual_bytes, gathered):
            applied.run_pass(columns)
        return applied.report()


_Columns = tuple["NDArray[np.uint64]", "NDArray[np.uint64]", "NDArray[np.uint64]"]


class _Gathered:
    """Disk offsets, lengths and log offsets of up to `count_max` entries, oldest first."""

    def __init__(self, count_max: int) -> None:
        self._columns = np.empty((3, count_max), np.uint64)
        self._filled = 0

    @property
    def room(self) -> int:
        """How many entries still fit."""
        return self._columns.shape[1] - self._filled

    def add(self, entries: NDArray[Any]) -> None:
        part = slice(self._filled, self._filled + len(entries))
        for column, name in zip(self._columns, ("byte_offset", "data_length", "log_offset"), strict=True):
            column[part] = entries[name]
        self._filled = part.stop

    def take(self) -> _Columns:
        """Return views of what was gathered, good until the next add(), and begin anew."""
        disk_offsets, lengths, log_offsets = self._columns[:, : self._filled]
        self._filled = 0
        return disk_offsets, lengths, log_offsets


def _passes(reader: LogReader, disk_bytes: int, gathered: _Gathered) -> Iterator[_Columns]:
    """Yield all entries, oldest first, in as few passes as their bound allows."""
    for entries in reader.entries(disk_bytes=disk_bytes):
        rest = entries
        while len(rest):
            part, rest = rest[: gathered.room], rest[gathered.room :]
            gathered.add(part)
            if not gathered.room:
                yield gathered.take()
    yield gathered.take()


class _Apply:
    """One log on its way into one disk."""

    def __init__(self, reader: LogReader, disk: Target, progress: ProgressCallback | None) -> None:
        self._reader = reader
        self._disk = disk
        self._progress = progress
        self._holes = HoleFinder(reader.file)
        self._extents = self._bytes_written = self._bytes_zeroed = self._bytes_passed = self._passes = 0

    def run_pass(self, columns: _Columns) -> None:
        """Coalesce and write one pass of entries."""
        _, lengths, log_offsets = columns
        if not len(lengths):
            return
        holes = self._holes.find(int(log_offsets[0]), int(log_offsets[-1]) + int(lengths[-1]))
        sector_bytes = max(self._disk.logical_sector_bytes, SECTOR_BYTES)
        pieces, zeros = split_at_holes(native.coalesce(*columns), holes, sector_bytes)
        done_bytes = self._bytes_passed
        for disk_offset, length in zeros.tolist():
            self._disk.write_zeroes(disk_offset, length)
            done_bytes += length
        # Steps are disjoint parts of the disk, and a disk takes those from many threads.
        for step_bytes in map_ordered(self._copy, _steps(pieces)):
            done_bytes += step_bytes
            self._tell(done_bytes)
        self._extents += len(pieces[0]) + len(zeros)
        self._bytes_written += int(pieces[1].sum()) + int(zeros[:, 1].sum())
        self._bytes_zeroed += int(zeros[:, 1].sum())
        self._bytes_passed += int(lengths.sum())
        self._passes += 1
        self._tell(self._bytes_passed)

    def report(self) -> ApplyReport:
        """Return the sum of all passes."""
        return ApplyReport(
            entries=self._reader.entry_count,
            extents=self._extents,
            bytes_logged=self._reader.data_bytes,
            bytes_written=self._bytes_written,
            bytes_zeroed=self._bytes_zeroed,
            passes=self._passes,
        )

    def _copy(self, step: _Columns) -> int:
        disk_offsets, lengths, log_offsets = step
        self._disk.copy_extents(self._reader.file, log_offsets, np.stack((disk_offsets, lengths), axis=1))
        return int(lengths.sum())

    def _tell(self, done_bytes: int) -> None:
        if self._progress is not None:
            self._progress(Progress("apply", done_bytes, self._reader.data_bytes, raw_bytes=done_bytes))


def _steps(columns: _Columns) -> Iterator[_Columns]:
    """Yield the extents in steps that are worth a thread's while, in the order of the disk."""
    for at in range(0, len(columns[0]), _EXTENTS_PER_STEP):
        disk_offsets, lengths, log_offsets = (column[at : at + _EXTENTS_PER_STEP] for column in columns)
        yield disk_offsets, lengths, log_offsets


def split_at_holes(
    columns: _Columns, holes: NDArray[np.int64], sector_bytes: int
) -> tuple[_Columns, NDArray[np.uint64]]:
    """Return the parts of coalesced extents that hold data, and the rest as (disk_offset, length) of zeros.

    columns: disk offsets, lengths, log offsets, sorted by disk offset, disjoint on the disk. holes:
    HoleFinder.find(). Parts are cut at multiples of `sector_bytes` from an extent's start and zeros are at
    least HOLE_BYTES_MIN long; both results are sorted by disk offset.
    """
    nothing = np.empty((0, 2), np.uint64)
    if not len(holes):
        return columns, nothing
    disk_offsets, lengths, log_offsets = columns
    starts = holes[:, 0].astype(np.uint64)
    ends = starts + holes[:, 1].astype(np.uint64)
    first = np.searchsorted(ends, log_offsets, side="right")
    last = np.searchsorted(starts, log_offsets + lengths, side="left")
    met = np.flatnonzero((first < last) & (lengths >= np.uint64(HOLE_BYTES_MIN)))
    if not len(met):
        return columns, nothing
    kept: list[tuple[int, int, int]] = []
    zeros: list[tuple[int, int]] = []
    for index in met.tolist():
        extent = (int(disk_offsets[index]), int(lengths[index]), int(log_offsets[index]))
        inside = holes[int(first[index]) : int(last[index])]
        _split_extent(extent, inside.tolist(), sector_bytes, kept, zeros)
    whole = np.ones(len(lengths), np.bool_)
    whole[met] = False
    rows = np.array(kept, np.uint64).reshape(-1, 3)
    joined = [
        np.concatenate((column[whole], rows[:, at]))
        for at, column in enumerate((disk_offsets, lengths, log_offsets))
    ]
    order = np.argsort(joined[0])
    return (joined[0][order], joined[1][order], joined[2][order]), _joined(zeros)


def _split_extent(
    extent: tuple[int, int, int],
    holes: list[list[int]],
    sector_bytes: int,
    kept: list[tuple[int, int, int]],
    zeros: list[tuple[int, int]],
) -> None:
    """Add the parts of one extent to `kept` and `zeros`."""
    disk_offset, length, log_offset = extent
    done = 0
    for hole_offset, hole_length in holes:
        start = align_up(max(hole_offset - log_offset, done), sector_bytes)
        end = align_down(min(hole_offset + hole_length - log_offset, length), sector_bytes)
        if end - start < HOLE_BYTES_MIN:
            continue
        if start > done:
            kept.append((disk_offset + done, start - done, log_offset + done))
        zeros.append((disk_offset + start, end - start))
        done = end
    if length > done:
        kept.append((disk_offset + done, length - done, log_offset + done))


def _joined(rows: list[tuple[int, int]]) -> NDArray[np.uint64]:
    """Return ascending disjoint rows with those that touch made one, as write_zeroes() likes them."""
    joined: list[list[int]] = []
    for offset, length in rows:
        if joined and sum(joined[-1]) == offset:
            joined[-1][1] += length
        else:
            joined.append([offset, length])
    return np.array(joined, np.uint64).reshape(-1, 2)
