"""The verbs that look for damage in a disk's file and mend it, as functions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.clock import SYSTEM
from hvreplica.disk.check import check_disk, repair_disk, undo_repair
from hvreplica.files import OS_FILES

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from hvreplica.disk.check import CheckReport, Level, RepairReport, UndoReport

    PathLike = str | os.PathLike[str]


def disk_check(
    path: PathLike, *, levels: Iterable[Level] | None = None, parent: PathLike | None = None
) -> CheckReport:
    """Look for damage in the file of a disk, which is only read; damage never raises.

    levels: of "structure", "log", "bat", "leaks", "parents"; None runs all. parent: the parent of a
    differencing disk, where its names do not lead to it. Raises: OSError; UnsupportedVersion for formats that
    are not read here.
    """
    return check_disk(OS_FILES, path, levels=levels, parent=parent, clock=SYSTEM)


def disk_repair(path: PathLike, *, backup: PathLike | None = None, dry_run: bool = False) -> RepairReport:
    """Mend what disk_check() calls repairable, behind a backup; guest data never changes.

    backup: where it goes, else beside the disk. dry_run: only tell. Durable on return. Raises: Locked;
    FileExistsError for the backup; OSError.
    """
    return repair_disk(OS_FILES, path, backup=backup, dry_run=dry_run, clock=SYSTEM)


def disk_repair_undo(path: PathLike, backup: PathLike) -> UndoReport:
    """Put back what a repair saved to `backup`, byte for byte. Raises: FormatError, StateError, Locked."""
    return undo_repair(OS_FILES, Path(path), Path(backup))
