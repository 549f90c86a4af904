"""Read a log or an undo part again, from end to end, and say what of the disk a damage of it concerns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica.errors import FormatError, LogError
from hvreplica.hrl import verify_log
from hvreplica.hrl.data import DataChecker, HoleFinder
from hvreplica.store.part_files import PressedFile, open_part, stored_bytes

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    from numpy.typing import NDArray

    from hvreplica.files import FileSystem
    from hvreplica.hrl import LogReader
    from hvreplica.progress import Progress
    from hvreplica.store.pace import Pace

_ENTRIES_PER_BATCH = 1 << 12
_FAULTS_MAX = 64  # to tell apart in one part; with more of them all of it counts as damaged


@dataclass(frozen=True, slots=True, eq=False)
class Fault:
    """A damaged file. extents: what of the disk it concerns, sorted; None: anything that the file covers."""

    sentence: str
    extents: NDArray[np.int64] | None = None


def check_part(
    files: FileSystem, path: Path, pace: Pace, *, part_id: uuid.UUID, file_bytes: int
) -> Fault | None:
    """Read all of an undo part. Raises: Stopped."""
    try:
        with open_part(files, path) as reader:
            for name, expected, actual in (
                ("UniqueId", part_id, reader.header.unique_id),
                ("length", file_bytes, stored_bytes(reader)),
            ):
                if expected != actual:
                    return Fault(
                        f"{path} is not the part it should be: its {name} is {actual}, not {expected}"
                    )
            return _check_data(reader, pace)
    except (FormatError, LogError, OSError) as error:
        return Fault(_sentence(path, error))


def check_log(files: FileSystem, path: Path, pace: Pace, *, log_bytes: int) -> Fault | None:
    """Read all of a log. Raises: Stopped."""
    spent = 0

    def spend(progress: Progress) -> None:
        nonlocal spent
        pace.spend(progress.done_bytes - spent)
        spent = progress.done_bytes

    try:
        report = verify_log(files, path, data=True, progress=spend)
    except (FormatError, LogError, OSError) as error:
        return Fault(_sentence(path, error))
    if report.log_bytes != log_bytes:
        return Fault(f"{path} has {report.log_bytes} bytes, {log_bytes} are recorded")
    return None


def _check_data(reader: LogReader, pace: Pace) -> Fault | None:
    checker, finder = DataChecker(reader.file), HoleFinder(reader.file)
    damaged: list[NDArray[Any]] = []
    frames = reader.file.damaged() if isinstance(reader.file, PressedFile) else np.empty((0, 2), np.int64)
    for entries in reader.entries(_ENTRIES_PER_BATCH):
        holes = finder.find_under(entries)
        for run in _readable(entries, frames, damaged):
            left = run
            while len(damaged) <= _FAULTS_MAX and (fault := checker.find_fault(left, holes)) is not None:
                damaged.append(left[fault.index])
                left = left[fault.index + 1 :]
        if len(damaged) > _FAULTS_MAX:
            return Fault(f"{reader.path}: the data of more than {_FAULTS_MAX} entries is damaged")
        pace.spend(int(entries["data_length"].sum()))
    if not damaged:
        return None
    rows = np.array([[row["byte_offset"], row["data_length"]] for row in damaged], np.int64)
    place = int(damaged[0]["log_offset"])
    return Fault(
        f"{reader.path}: the data of {len(rows)} entries is damaged, first for disk offset {rows[0, 0]}, at"
        f" offset {place}",
        rows,
    )


def _readable(
    entries: NDArray[Any], frames: NDArray[np.int64], damaged: list[NDArray[Any]]
) -> list[NDArray[Any]]:
    """Return the runs of entries that no damaged frame has a byte of; add the others to `damaged`."""
    if not len(frames):
        return [entries]
    starts = entries["log_offset"].astype(np.int64)
    ends = starts + entries["data_length"]
    is_hit = np.searchsorted(frames[:, 1], starts, "right") < np.searchsorted(frames[:, 0], ends, "left")
    damaged += list(entries[is_hit][: _FAULTS_MAX + 1])
    edges = np.flatnonzero(is_hit)
    runs = zip([0, *(edges + 1).tolist()], [*edges.tolist(), len(entries)], strict=True)
    return [entries[first:last] for first, last in runs if first < last]


def _sentence(path: Path, error: Exception) -> str:
    text = str(error)
    return text if str(path) in text else f"{path}: {text}"
