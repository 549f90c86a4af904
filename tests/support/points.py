"""Read a recovery point byte for byte, by the rule alone: the first part that covers a byte has it.

Slow and plain on purpose: nothing of the product's own reader of points is used, so that it can be compared
with this one.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from hvreplica.disk import open_disk
from hvreplica.formats.hrl import FILE_TYPE_UNDO
from hvreplica.hrl import LogReader, verify_log

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem


def read_point(
    files: FileSystem, root: Path, point_id: uuid.UUID | str, clock: Clock, vm: str = "web01"
) -> dict[int, bytes]:
    """Return the content of each disk at the point: disk index -> bytes."""
    with sqlite3.connect(f"file:{root}/catalog.db?mode=ro", uri=True) as catalog:
        vm_id = catalog.execute("SELECT id FROM vm WHERE name = ?", (vm,)).fetchone()[0]
        members = catalog.execute(
            "SELECT disk_index, virtual_bytes FROM member WHERE vm_id = ? AND point_id = ?",
            (vm_id, str(point_id)),
        ).fetchall()
        walks = {index: _walk(catalog, vm_id, str(point_id), index) for index, _ in members}
    catalog.close()
    folder = root / vm
    return {index: _read(files, folder, walks[index], index, size, clock) for index, size in members}


def _walk(catalog: sqlite3.Connection, vm_id: int, point_id: str, disk_index: int) -> list[tuple[str, str]]:
    """Return (kind, part id) in the order of reading."""
    sequence = catalog.execute(
        "SELECT sequence FROM point WHERE vm_id = ? AND id = ?", (vm_id, point_id)
    ).fetchone()[0]
    newer = catalog.execute(
        "SELECT id FROM point WHERE vm_id = ? AND sequence >= ? ORDER BY sequence", (vm_id, sequence)
    ).fetchall()
    parts = []
    for (other,) in newer:
        parts += catalog.execute(
            "SELECT kind, id FROM undo WHERE vm_id = ? AND point_id = ? AND disk_index = ? ORDER BY place",
            (vm_id, other, disk_index),
        ).fetchall()
    return parts


def _read(
    files: FileSystem,
    folder: Path,
    walk: list[tuple[str, str]],
    disk_index: int,
    virtual_bytes: int,
    clock: Clock,
) -> bytes:
    content = bytearray(virtual_bytes)
    missing = bytearray(b"\1" * virtual_bytes)  # 1 for each byte that no part has given yet
    for kind, part_id in walk:
        if kind == "whole":
            _fill(
                content, missing, 0, _disk(files, folder / "points" / f"{part_id}.vhdx", virtual_bytes, clock)
            )
            return bytes(content)
        path = folder / "points" / f"{part_id}.hru"
        report = verify_log(files, path, file_type=FILE_TYPE_UNDO)
        assert report.log_id == part_id
        end = 0
        with LogReader(files, path, file_type=FILE_TYPE_UNDO) as part:
            for entry in (entry for batch in part.entries() for entry in batch):
                offset, length = int(entry["byte_offset"]), int(entry["data_length"])
                assert offset >= end, "entries of a part are sorted and disjoint"
                end = offset + length
                _fill(content, missing, offset, part.file.read(int(entry["log_offset"]), length))
    _fill(content, missing, 0, _disk(files, folder / "disks" / f"{disk_index}.vhdx", virtual_bytes, clock))
    return bytes(content)


def _fill(content: bytearray, missing: bytearray, offset: int, data: bytes) -> None:
    at = missing.find(1, offset, offset + len(data))
    while at >= 0:
        stop = missing.find(0, at, offset + len(data))
        stop = min(stop if stop >= 0 else len(missing), offset + len(data))
        content[at:stop] = data[at - offset : stop - offset]
        missing[at:stop] = bytes(stop - at)
        at = missing.find(1, stop, offset + len(data))


def _disk(files: FileSystem, path: Path, length: int, clock: Clock) -> bytes:
    """Return `length` bytes of a disk, zeros where it is shorter."""
    disk = open_disk(files, path, format="vhdx", clock=clock)
    try:
        buffer = bytearray(min(length, disk.virtual_bytes))
        disk.read_into(buffer, 0)
        return bytes(buffer).ljust(length, b"\0")
    finally:
        disk.abandon()
