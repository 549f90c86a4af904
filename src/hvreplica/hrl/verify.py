"""Check a closed log from end to end: structure, entries, bounds, data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from hvreplica.clock import HRL_EPOCH_S
from hvreplica.disk.parallel import map_ordered
from hvreplica.errors import ChecksumMismatch
from hvreplica.formats.hrl import DATA_CHECKSUM_ABSENT, FILE_TYPE_HRL, METADATA_ENTRY
from hvreplica.hrl.data import DataChecker, DataFault, HoleFinder
from hvreplica.hrl.reader import LogReader
from hvreplica.hrl.report import LogEnd, LogReport
from hvreplica.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from hvreplica.hrl.reader import LogFiles
    from hvreplica.progress import ProgressCallback

    _Batch = tuple[NDArray[Any], NDArray[np.int64]]

_ENTRIES_PER_BATCH = 1 << 13


@dataclass(slots=True)
class _Tally:
    unchecked_entries: int = 0
    disk_end: int = 0
    first_time_stamp: int | None = None
    last_time_stamp: int | None = None

    def add(self, entries: NDArray[Any]) -> None:
        self.unchecked_entries += int((entries["data_checksum"] == DATA_CHECKSUM_ABSENT).sum())
        self.disk_end = max(self.disk_end, int((entries["byte_offset"] + entries["data_length"]).max()))
        low, high = int(entries["time_stamp"].min()), int(entries["time_stamp"].max())
        self.first_time_stamp = low if self.first_time_stamp is None else min(low, self.first_time_stamp)
        self.last_time_stamp = high if self.last_time_stamp is None else max(high, self.last_time_stamp)


def verify_log(
    files: LogFiles,
    path: Path,
    *,
    data: bool = True,
    disk_bytes: int | None = None,
    progress: ProgressCallback | None = None,
    file_type: int = FILE_TYPE_HRL,
) -> LogReport:
    """Check every byte of a closed log that means something, and say what it holds.

    data: read the data too and check it against its checksums. disk_bytes: refuse entries beyond this guest
    offset. Raises: NotClosed; FormatError naming the first damage. Memory is bounded whatever the length of
    the log.
    """
    with LogReader(files, path, file_type=file_type) as reader:
        return check_log(reader, data=data, disk_bytes=disk_bytes, progress=progress)


def check_log(
    reader: LogReader,
    *,
    data: bool,
    disk_bytes: int | None,
    progress: ProgressCallback | None,
    keep: Callable[[NDArray[Any]], None] | None = None,
) -> LogReport:
    """Do what verify_log() does with a log that is open; `keep` is given the good entries, oldest first."""
    tally = _Tally()
    done_bytes = 0
    batches = reader.entries(_ENTRIES_PER_BATCH, disk_bytes=disk_bytes)
    for entries in _checked_data(reader, batches) if data else batches:
        tally.add(entries)
        if keep is not None:
            keep(entries)
        done_bytes += int(entries["data_length"].sum())
        if progress is not None:
            progress(Progress("verify", done_bytes, reader.data_bytes, raw_bytes=done_bytes))
    return _report(reader, tally, data_checked=data)


def _checked_data(reader: LogReader, batches: Iterator[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Yield the batches, each once its data is known to be good."""
    checker, finder = DataChecker(reader.file), HoleFinder(reader.file)

    def check(batch: _Batch) -> NDArray[Any]:
        entries, holes = batch
        fault = checker.find_fault(entries, holes)
        if fault is not None:
            _raise_fault(reader, entries, fault)
        return entries

    return map_ordered(check, ((entries, finder.find_under(entries)) for entries in batches))


def _raise_fault(reader: LogReader, entries: NDArray[Any], fault: DataFault) -> NoReturn:
    entry = entries[fault.index]
    raise ChecksumMismatch(
        f"data for disk offset {int(entry['byte_offset'])} is damaged in the log",
        path=reader.path,
        offset=int(entry["log_offset"]),
        field="data_checksum",
        expected=int(entry["data_checksum"]),
        actual=fault.computed,
        spec=METADATA_ENTRY.spec,
        hint="the log cannot be applied; fetch it again, or compare the disks to find what changed",
    )


def _unix_s(time_stamp: int | None) -> int | None:
    return None if time_stamp is None else time_stamp + HRL_EPOCH_S


def _report(reader: LogReader, tally: _Tally, *, data_checked: bool) -> LogReport:
    header = reader.header
    return LogReport(
        path=str(reader.path),
        log_id=str(header.unique_id),
        previous_log_id=str(header.previous_unique_id),
        end=LogEnd.CLEAN,
        entries=reader.entry_count,
        metadata_blocks=reader.block_count,
        data_bytes=reader.data_bytes,
        log_bytes=reader.log_bytes,
        dropped_bytes=reader.file.size() - reader.log_bytes,
        data_checked=data_checked,
        unchecked_entries=tally.unchecked_entries,
        disk_end=tally.disk_end,
        first_time_s=_unix_s(tally.first_time_stamp),
        last_time_s=_unix_s(tally.last_time_stamp),
    )
