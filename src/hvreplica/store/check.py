"""Compare what the catalog says with the files that are there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    from hvreplica.files import FileSystem
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import DiskRow, LogSpec

_HINT = "put the file back as it was, or replicate the VM from the start again"
_LOOKS_MAX = 5


@dataclass(frozen=True, slots=True)
class _Records:
    """What the catalog says of a VM's files at one moment."""

    disks: list[DiskRow]
    states: dict[uuid.UUID, str]
    renaming: set[int]
    logs: list[LogSpec]


def find_damage(home: VmHome, *, logs: bool = True) -> list[str]:
    """Return a sentence for each file of the VM that is missing or of the wrong length; reads no content.

    logs: whether those that wait to be applied count.
    """
    records = _records(home, logs=logs)
    found = _compare(home, records)
    for _ in range(_LOOKS_MAX):
        again = _records(home, logs=logs)
        if not found or again == records:
            break  # else the VM moved on between catalog and files, in this process or in another
        records, found = again, _compare(home, again)
    return found


def _records(home: VmHome, *, logs: bool) -> _Records:
    with home.catalog.snapshot():
        transfers = home.catalog.transfers(home.vm_id)
        points = home.catalog.points(home.vm_id)
        return _Records(
            disks=home.catalog.disks(home.vm_id),
            states={point.id: point.state for point in points},
            renaming={index for row in transfers if row.state == "renaming" for index in row.disks},
            logs=[log for point in points for log in home.catalog.logs(home.vm_id, point.id)] if logs else [],
        )


def _compare(home: VmHome, records: _Records) -> list[str]:
    paths, files = home.paths, home.files
    is_moving = "applying" in records.states.values()
    found: list[str | None] = [
        f"{paths.disk(index)} is missing"
        for index in sorted(records.renaming)
        if not files.exists(paths.partial_disk(index)) and not files.exists(paths.disk(index))
    ]
    found += [
        _look(files, paths.disk(row.spec.index), None if is_moving else row.file_bytes)
        for row in records.disks
        if row.is_held and row.spec.index not in records.renaming
    ]
    found += [_look(files, paths.log(log.log_id), log.log_bytes) for log in records.logs]
    return [sentence for sentence in found if sentence is not None]


def require_sound(home: VmHome, *, logs: bool = True) -> None:
    """Refuse to work on a VM with damaged files. Raises: StoreError naming what find_damage() finds.

    logs: those that wait too.
    """
    found = find_damage(home, logs=logs)
    if found:
        raise home.damage(*found, hint=_HINT)


def file_length(files: FileSystem, path: Path) -> int:
    """Return the bytes of a file."""
    file = files.open(path)
    try:
        return file.size()
    finally:
        file.close()


def _look(files: FileSystem, path: Path, expected_bytes: int | None) -> str | None:
    try:
        actual_bytes = file_length(files, path)
    except FileNotFoundError:
        return f"{path} is missing"
    if expected_bytes in {None, actual_bytes}:
        return None
    return f"{path} has {actual_bytes} bytes, {expected_bytes} are recorded"
