"""Apply a closed log to a disk: the newest write of every byte, once, ordered by disk offset.

    log order      A: 0..8K   B: 4K..12K   C: 64K..68K   D: 0..4K
    coalesced      D: 0..4K   B: 4K..12K   C: 64K..68K               -> one ordered way over the disk

The whole log is checked before the first byte is written: structure, bounds against the disk, data checksums.
Then it is applied in passes of a bounded number of entries, oldest pass first, so that memory does not grow
with the log.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hvreplica import native
from hvreplica.formats.hrl import SECTOR_BYTES
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

    from hvreplica.files import BlockFile, FileSystem
    from hvreplica.progress import ProgressCallback

ENTRIES_PER_PASS = 1 << 19  # 2 GiB of 4 KiB writes; about 60 MiB of tables while they are coalesced
_EXTENTS_PER_STEP = 1 << 14  # between two reports of progress


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


@dataclass(slots=True)
class _Written:
    extents: int = 0
    bytes_written: int = 0
    bytes_zeroed: int = 0
    bytes_passed: int = 0
    passes: int = 0


def apply_log(
    files: FileSystem,
    path: Path,
    disk: Target,
    *,
    verify_data: bool = True,
    progress: ProgressCallback | None = None,
) -> ApplyReport:
    """Write what the log holds to `disk`; where writes overlap, the newest wins.

    verify_data: check data checksums first; may be left out by a caller who has just done so with
    verify_log(). Does not flush the disk: nothing is durable before the caller does. Applying the same log
    again, whole, gives the same disk, so an apply that was cut is repeated. One owner of the disk meanwhile.
    Raises: NotClosed, FormatError before anything is written; OSError from the disk in the middle.
    """
    with LogReader(files, path) as reader:
        check_log(reader, data=verify_data, disk_bytes=disk.virtual_bytes, progress=progress)
        holes = HoleFinder(reader.file)
        written = _Written()
        for columns in _passes(reader, disk.virtual_bytes):
            _apply_pass(reader, disk, columns, holes, written, progress)
        return ApplyReport(
            entries=reader.entry_count,
            extents=written.extents,
            bytes_logged=reader.data_bytes,
            bytes_written=written.bytes_written,
            bytes_zeroed=written.bytes_zeroed,
            passes=written.passes,
        )


_Columns = tuple["NDArray[np.uint64]", "NDArray[np.uint64]", "NDArray[np.uint64]"]


def _passes(reader: LogReader, disk_bytes: int) -> Iterator[_Columns]:
    """Yield disk offsets, lengths and log offsets of up to ENTRIES_PER_PASS entries, oldest first."""
    count_max = min(ENTRIES_PER_PASS, reader.entry_count)
    columns = [np.empty(count_max, np.uint64) for _ in range(3)]
    filled = 0
    for entries in reader.entries(disk_bytes=disk_bytes):
        at = 0
        while at < len(entries):
            stop = min(at + count_max - filled, len(entries))
            part = slice(filled, filled + stop - at)
            for column, name in zip(columns, ("byte_offset", "data_length", "log_offset"), strict=True):
                column[part] = entries[name][at:stop]
            filled += stop - at
            at = stop
            if filled == count_max:
                yield columns[0], columns[1], columns[2]
                filled = 0
    if filled:
        yield columns[0][:filled], columns[1][:filled], columns[2][:filled]


def _apply_pass(
    reader: LogReader,
    disk: Target,
    columns: _Columns,
    holes: HoleFinder,
    written: _Written,
    progress: ProgressCallback | None,
) -> None:
    """Coalesce and write one pass."""
    start, end = int(columns[2][0]), int(columns[2][-1]) + int(columns[1][-1])
    sector_bytes = max(disk.logical_sector_bytes, SECTOR_BYTES)
    pieces, zeros = split_at_holes(native.coalesce(*columns), holes.find(start, end), sector_bytes)
    for disk_offset, length in zeros.tolist():
        disk.write_zeroes(disk_offset, length)
        written.bytes_zeroed += length
    done = written.bytes_passed + int(zeros[:, 1].sum())
    for at in range(0, len(pieces[0]), _EXTENTS_PER_STEP):
        disk_offsets, lengths, log_offsets = (column[at : at + _EXTENTS_PER_STEP] for column in pieces)
        disk.copy_extents(reader.file, log_offsets, np.stack((disk_offsets, lengths), axis=1))
        done += int(lengths.sum())
        if progress is not None:
            progress(Progress("apply", done, reader.data_bytes, raw_bytes=done))
    written.extents += len(pieces[0]) + len(zeros)
    written.bytes_written += int(pieces[1].sum()) + int(zeros[:, 1].sum())
    written.bytes_passed += int(columns[1].sum())
    written.passes += 1
    if progress is not None:
        progress(Progress("apply", written.bytes_passed, reader.data_bytes, raw_bytes=written.bytes_passed))


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
