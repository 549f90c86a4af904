"""Compare what the catalog says with the files that are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.files import FileSystem
    from hvreplica.store.home import VmHome

_HINT = "put the file back as it was, or replicate the VM from the start again"


def find_damage(home: VmHome) -> list[str]:
    """Return a sentence for each file of the VM that is missing or of the wrong length; reads no content."""
    with home.catalog.snapshot():
        disks = home.catalog.disks(home.vm_id)
        points = home.catalog.points(home.vm_id)
        transfer = home.catalog.transfer(home.vm_id)
        logs = [log for point in points for log in home.catalog.logs(home.vm_id, point.id)]
    found = []
    if transfer is not None and transfer.state == "renaming":
        return [
            f"{home.paths.disk(row.spec.index)} is missing"
            for row in disks
            if not home.files.exists(home.paths.partial_disk(row.spec.index))
            and not home.files.exists(home.paths.disk(row.spec.index))
        ]
    for row in disks if points else []:
        applying = any(point.state == "applying" for point in points)
        expected = None if applying else row.file_bytes
        found.append(_look(home.files, home.paths.disk(row.spec.index), expected))
    found += [_look(home.files, home.paths.log(log.log_id), log.log_bytes) for log in logs]
    return [sentence for sentence in found if sentence is not None]


def require_sound(home: VmHome) -> None:
    """Refuse to work on a VM with damaged files. Raises: StoreError naming what find_damage() finds."""
    found = find_damage(home)
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
    if not files.exists(path):
        return f"{path} is missing"
    if expected_bytes is None:
        return None
    actual_bytes = file_length(files, path)
    if actual_bytes == expected_bytes:
        return None
    return f"{path} has {actual_bytes} bytes, {expected_bytes} are recorded"
