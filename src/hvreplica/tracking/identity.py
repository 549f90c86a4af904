"""Whether a disk is still what it was when its journal was last written. Pure but for disk_identity().

A disk that somebody else changed while nothing was tracked must never pass for the same; one that is the same
should not be compared, which reads all of it.

    stopped  format      the same if
    clean    any         DataWriteGuid, length, mtime and inode are equal
    unclean  vhdx        the inode is equal, and the DataWriteGuid is the recorded one or the one to come
    unclean  raw         length, inode and file system are equal
    unclean  vhd         inode and file system are equal, and it is not shorter

After an unclean stop the time says nothing, because capture itself wrote; nor does the length of a file that
grows. The number of a file system changes at a mount with some, so after a clean stop it is not asked: there
the time, in nanoseconds, is stronger.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from hvreplica.formats.journal import DiskIdentity

if TYPE_CHECKING:
    from pathlib import Path
    from uuid import UUID

    from hvreplica.disk.open import Format
    from hvreplica.files import FileSystem


class Verdict(StrEnum):
    """What is known of a disk's changes while nothing was tracked."""

    SAME = "same"  # none
    CHANGED = "changed"  # there were some
    UNKNOWN = "unknown"  # nothing proves that there were none


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and why, for people."""

    verdict: Verdict
    reason: str


def disk_identity(files: FileSystem, path: Path, *, data_write_guid: UUID | None) -> DiskIdentity:
    """Return what the file at `path` looks like now. data_write_guid: of a VHDX, None for other formats."""
    found = files.identity(path)
    return DiskIdentity(
        data_write_guid=data_write_guid,
        file_bytes=found.size_bytes,
        mtime_ns=found.mtime_ns,
        inode=found.inode,
        device=found.device,
    )


def judge(
    recorded: DiskIdentity | None, now: DiskIdentity, *, was_clean: bool, disk_format: Format
) -> Judgement:
    """Say whether the disk is the one that was recorded, without a write since that was not tracked."""
    if recorded is None:
        return Judgement(Verdict.UNKNOWN, "nothing was recorded of this disk")
    if disk_format == "vhdx" and now.data_write_guid not in _accepted(recorded):
        reason = f"its DataWriteGuid is {now.data_write_guid}, not {recorded.data_write_guid} as recorded"
        return Judgement(Verdict.CHANGED, f"another program wrote to it: {reason}")
    if was_clean:
        return _judge_clean(recorded, now)
    if disk_format == "vhdx":
        if now.inode != recorded.inode:  # perhaps a copy that was made while the disk was in use
            reason = f"it is another file: inode {now.inode}, not {recorded.inode}"
            return Judgement(Verdict.CHANGED, reason)
        return Judgement(Verdict.SAME, "its DataWriteGuid is the recorded one")
    return _judge_by_file(recorded, now, may_grow=disk_format == "vhd")


def _accepted(recorded: DiskIdentity) -> set[UUID | None]:
    """Return what the DataWriteGuid may be: while capture starts, the one before and the one after."""
    return {recorded.data_write_guid} | ({recorded.next_guid} if recorded.next_guid is not None else set())


def _judge_clean(recorded: DiskIdentity, now: DiskIdentity) -> Judgement:
    if recorded.mtime_ns == 0 and now.data_write_guid is None:
        return Judgement(Verdict.UNKNOWN, "a block device does not tell when it was written to")
    facts = (
        ("length", recorded.file_bytes, now.file_bytes),
        ("inode", recorded.inode, now.inode),
        ("time of last change", recorded.mtime_ns, now.mtime_ns),
    )
    for name, before, after in facts:
        if before != after:
            return Judgement(Verdict.CHANGED, f"its {name} is {after}, and was {before} when capture stopped")
    return Judgement(Verdict.SAME, "it is as it was when capture stopped")


def _judge_by_file(recorded: DiskIdentity, now: DiskIdentity, *, may_grow: bool) -> Judgement:
    if now.inode != recorded.inode:
        return Judgement(Verdict.CHANGED, f"it is another file: inode {now.inode}, not {recorded.inode}")
    if now.file_bytes < recorded.file_bytes or (now.file_bytes > recorded.file_bytes and not may_grow):
        reason = f"its length is {now.file_bytes} bytes, not {recorded.file_bytes}"
        return Judgement(Verdict.CHANGED, reason)
    if now.device != recorded.device:
        reason = "capture was cut off, and the file is on another file system or that one was mounted anew"
        return Judgement(Verdict.UNKNOWN, reason)
    return Judgement(Verdict.SAME, "it is the same file, of a length that it may have")
