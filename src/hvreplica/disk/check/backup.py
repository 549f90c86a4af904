"""Write what a repair will overwrite to a backup, and put it back. Format: formats/repair_backup.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.errors import FieldOutOfRange
from hvreplica.formats.repair_backup import (
    BACKUP_HEADER_BYTES,
    RECORD_BYTES_MAX,
    RECORD_HEADER_BYTES,
    SPEC,
    BackupHeader,
    pack_record,
    unpack_backup_header,
    unpack_record,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.clock import Clock
    from hvreplica.disk.check.plan import RepairPlan
    from hvreplica.files import BlockFile, FileSystem
    from hvreplica.formats.repair_backup import BackupRecord


def write_backup(
    files: FileSystem, path: Path, file: BlockFile, plan: RepairPlan, *, format_name: str, clock: Clock
) -> int:
    """Save all that `plan` changes in `file` to a new file at `path`; return the bytes saved.

    Durable on return, name and content. A header that says so is written last: a backup without it belongs
    to a repair that changed nothing. Raises: FileExistsError; OSError, and then no backup is left.
    """
    backup = files.open(path, create=True, exclusive=True)
    try:
        backup.resize(BACKUP_HEADER_BYTES)
        at, count, saved = BACKUP_HEADER_BYTES, 0, 0
        for step, file_offset, length in _pieces(file, plan):
            data = file.read(file_offset, length)
            backup.write(pack_record(step=step, file_offset=file_offset, data=data) + data, at)
            at += RECORD_HEADER_BYTES + length
            count += 1
            saved += length
        backup.sync()
        header = BackupHeader(
            created_s=int(clock.now_s()),
            file_bytes=file.size(),
            record_count=count,
            identity_before=plan.identity_before,
            identity_after=plan.identity_after,
            format=format_name,
            file_name=file.path.name,
        )
        backup.write(header.pack(), 0)
        backup.sync()
        backup.close()
        files.sync_directory(path.parent)
    except BaseException:
        backup.close()
        files.unlink(path)
        raise
    return saved


def _pieces(file: BlockFile, plan: RepairPlan) -> Iterator[tuple[int, int, int]]:
    """Yield (step, file_offset, length) of all to be saved; what is erased and a hole already is left out."""
    size = file.size()
    number = 0
    for step in plan.steps:
        for file_offset, length in step.writes.tolist():
            # Each range is a step of its own when it is put back: of two header copies one is whole.
            for start in range(file_offset, min(file_offset + length, size), RECORD_BYTES_MAX):
                yield number, start, min(RECORD_BYTES_MAX, file_offset + length - start, size - start)
            number += step.action == "headers"
        for file_offset, length in step.erases.tolist():
            for start, held in file.data_extents(file_offset, min(file_offset + length, size)):
                for at in range(start, start + held, RECORD_BYTES_MAX):
                    yield number, at, min(RECORD_BYTES_MAX, start + held - at)
        number += 1


def read_backup(backup: BlockFile) -> tuple[BackupHeader, list[BackupRecord]]:
    """Return header and records of a backup, every byte of it checked. Raises: FormatError."""
    header = unpack_backup_header(backup.read(0, min(BACKUP_HEADER_BYTES, backup.size())))
    records: list[BackupRecord] = []
    at = BACKUP_HEADER_BYTES
    while len(records) < header.record_count:
        # Each turn reads 32 bytes that are there or raises, whatever record_count claims.
        record = unpack_record(backup.read(at, RECORD_HEADER_BYTES), at=at)
        record.validate(backup.read(at + RECORD_HEADER_BYTES, record.length))
        if record.file_offset + record.length > header.file_bytes:
            raise FieldOutOfRange(
                "a record of a backup lies behind the end of its file",
                offset=at,
                field="file_offset",
                expected=f"within {header.file_bytes} bytes",
                actual=f"{record.length} bytes at {record.file_offset}",
                spec=SPEC,
            )
        records.append(record)
        at = record.end
    return header, records


def restore(file: BlockFile, backup: BlockFile, header: BackupHeader, records: list[BackupRecord]) -> int:
    """Put everything back, last change first; return the bytes written. Durable on return, safe to repeat."""
    file.resize(header.file_bytes)
    file.sync()
    written, step = 0, None
    for record in reversed(records):
        if step not in {None, record.step}:
            file.sync()
        step = record.step
        file.write(backup.read(record.at + RECORD_HEADER_BYTES, record.length), record.file_offset)
        written += record.length
    file.sync()
    return written
