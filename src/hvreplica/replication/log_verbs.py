"""The log verbs as functions: what an .hrl says, whether it is sound, and what it does to a disk."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES
from hvreplica.hrl import apply_log, dump_entries, recover_log, verify_log
from hvreplica.hrl import log_info as read_log_info

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from hvreplica.hrl import ApplyReport, LogEntry, LogInfo, LogReport
    from hvreplica.progress import ProgressCallback

    PathLike = str | os.PathLike[str]


def log_info(path: PathLike) -> LogInfo:
    """Return what the header of an .hrl says, closed or not."""
    return read_log_info(OS_FILES, Path(path))


def log_verify(path: PathLike, *, progress: ProgressCallback | None = None) -> LogReport:
    """Check an .hrl from end to end, data included. Raises: NotClosed, FormatError at the first fault."""
    return verify_log(OS_FILES, Path(path), progress=progress)


def log_apply(path: PathLike, disk: PathLike, *, progress: ProgressCallback | None = None) -> ApplyReport:
    """Write an .hrl into a disk, newest write wins; durable on return. Cut off, it can be repeated."""
    with contextlib.closing(open_disk(OS_FILES, Path(disk), writable=True, clock=SYSTEM)) as target:
        report = apply_log(OS_FILES, Path(path), target, progress=progress)
        target.flush()
    return report


def log_dump(path: PathLike) -> Iterator[LogEntry]:
    """Yield the entries of an .hrl, oldest first."""
    return dump_entries(OS_FILES, Path(path))


def log_recover(path: PathLike) -> LogReport:
    """Close an .hrl that its writer never closed, at its last whole metadata block."""
    return recover_log(OS_FILES, Path(path))
