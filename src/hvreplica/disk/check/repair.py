"""Mend a disk's file: check, plan, back up, change, check again; and undo all of it.

A crash at any instant leaves a file that is no worse: the repair can be run again, and its backup, durable
before the first change, still puts everything back.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from hvreplica.clock import iso_time
from hvreplica.disk.check.backup import read_backup, restore, write_backup
from hvreplica.disk.check.check import check_open_file
from hvreplica.disk.check.repair_vhd import plan_vhd, vhd_identity
from hvreplica.disk.check.repair_vhdx import plan_vhdx, vhdx_identity
from hvreplica.errors import StateError, UnsupportedVersion
from hvreplica.files import lock_open_file
from hvreplica.formats.guid import NIL

if TYPE_CHECKING:
    import os
    import uuid
    from collections.abc import Callable, Mapping

    from hvreplica.clock import Clock
    from hvreplica.disk.check.codes import Level, Repair
    from hvreplica.disk.check.findings import CheckReport, Verdict
    from hvreplica.disk.check.plan import RepairPlan
    from hvreplica.files import BlockFile, FileSystem

# What is wrong with parents is not mended here, and does not stand against mending the file itself.
_LEVELS: tuple[Level, ...] = ("structure", "log", "bat", "leaks")
_PLANS: Mapping[str, Callable[[Any, CheckReport, Clock], RepairPlan]] = {"vhd": plan_vhd, "vhdx": plan_vhdx}
_IDENTITIES: Mapping[str, Callable[[BlockFile], uuid.UUID | None]] = {
    "vhd": vhd_identity,
    "vhdx": vhdx_identity,
}


class RepairAction(msgspec.Struct, frozen=True):
    """One thing that was done, or would be with dry_run."""

    action: Repair
    message: str


class RepairReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a repair did.

    status, verdict: of the file as it is now. backup: the file that undoes it, None where nothing was done.
    backup_bytes: the bytes of the disk's file that it holds. before, after: the checks around it; after is
    None where nothing was done.
    """

    path: str
    dry_run: bool
    status: int
    verdict: Verdict
    actions: tuple[RepairAction, ...]
    backup: str | None
    backup_bytes: int
    before: CheckReport
    after: CheckReport | None


class UndoReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an undo put back. file_bytes: the length of the file, as before the repair."""

    path: str
    backup: str
    restored_bytes: int
    file_bytes: int


def repair_disk(
    files: FileSystem,
    path: str | os.PathLike[str],
    *,
    backup: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    clock: Clock,
) -> RepairReport:
    """Mend what a check of the disk at `path` calls mendable, and nothing else; durable on return.

    backup: where to save what is overwritten, a file that is not there yet; None names it after the disk and
    the time. dry_run: only say what would be done. Guest data never changes. Raises: Locked; FileExistsError
    for the backup; OSError, and then the repair can be run again.
    """
    file = files.open(Path(path), writable=not dry_run)
    try:
        if not dry_run:
            lock_open_file(file)
        before, learned = check_open_file(file, _LEVELS)
        make_plan = _PLANS.get(before.format)
        steps = make_plan(learned, before, clock) if make_plan is not None else None
        actions = tuple(RepairAction(s.action, s.message) for s in (steps.steps if steps else ()))
        target, saved, after = None, 0, None
        if steps is not None and actions and not dry_run:
            target = Path(backup) if backup is not None else _backup_path(Path(path), clock)
            saved = write_backup(files, target, file, steps, format_name=before.format, clock=clock)
            for step in steps.steps:
                step.apply(file)
            after = check_open_file(file, _LEVELS)[0]
        now = after or before
        return RepairReport(
            path=str(path),
            dry_run=dry_run,
            status=now.status,
            verdict=now.verdict,
            actions=actions,
            backup=None if target is None else str(target),
            backup_bytes=saved,
            before=before,
            after=after,
        )
    finally:
        file.close()


def _backup_path(path: Path, clock: Clock) -> Path:
    stamp = iso_time(clock.now_s()).replace("-", "").replace(":", "")
    return path.with_name(f"{path.name}.repair-{stamp}.bak")


def undo_repair(
    files: FileSystem, path: str | os.PathLike[str], backup: str | os.PathLike[str]
) -> UndoReport:
    """Put back into the disk at `path` what a repair saved to `backup`, byte for byte; durable on return.

    Cut off, it can be repeated. Raises: FormatError for a damaged backup; StateError if the file is not the
    one that was repaired, or has changed since.
    """
    saved = files.open(Path(backup))
    try:
        header, records = read_backup(saved)
        file = files.open(Path(path), writable=True)
        try:
            lock_open_file(file)
            _check_identity(file, header.format, (header.identity_before, header.identity_after))
            written = restore(file, saved, header, records)
        finally:
            file.close()
    finally:
        saved.close()
    return UndoReport(
        path=str(path), backup=str(backup), restored_bytes=written, file_bytes=header.file_bytes
    )


def _check_identity(file: BlockFile, format_name: str, identities: tuple[uuid.UUID, uuid.UUID]) -> None:
    identify = _IDENTITIES.get(format_name)
    if identify is None:
        raise UnsupportedVersion(
            "a backup of a file in a format that is not known here", field="format", actual=format_name
        )
    identity = identify(file)
    if identity not in identities or identity == NIL:
        raise StateError(
            "this is not the file that was repaired, or it has changed since",
            path=file.path,
            field="identity",
            expected=" or ".join(str(each) for each in identities),
            actual=identity,
            hint="undo the latest repair first; what a guest wrote since cannot be kept by an undo",
        )
