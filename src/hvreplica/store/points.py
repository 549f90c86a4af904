"""Give a recovery point out as a disk of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import msgspec

from hvreplica.disk import convert_disk
from hvreplica.errors import Locked, NoSuchPoint, StoreError
from hvreplica.store.apply import finish, is_cut
from hvreplica.store.check import file_length, require_sound
from hvreplica.store.room import room

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    from hvreplica.progress import ProgressCallback
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import PointRow

Format = Literal["raw", "vhd", "vhdx"]
FORMATS = get_args(Format)


class ExportReport(msgspec.Struct, frozen=True):
    """A point that was exported. file_bytes: length of the file at `output`."""

    vm: str
    point: str
    disk: int
    output: str
    format: str
    virtual_bytes: int
    file_bytes: int


def export_point(
    home: VmHome,
    output: Path,
    *,
    point_id: uuid.UUID | None,
    disk_index: int,
    format: Format,  # noqa: A002  # the word that every disk tool uses
    progress: ProgressCallback | None,
    overwrite: bool,
) -> ExportReport:
    """Write one disk of a point to `output`; whole under that name on return, or nothing of it.

    point_id: None takes the newest complete one. Applying is finished first if it was cut. Raises:
    NoSuchPoint, Locked while the disks are being changed, StoreFull, StoreError if `output` is there or
    inside the store.
    """
    _validate_output(home, output, format, overwrite=overwrite)
    for _ in range(2):
        with home.shared():
            if not is_cut(home):
                point = _choose_point(home, point_id, disk_index)
                return _export(
                    home,
                    output,
                    point.id,
                    disk_index=disk_index,
                    format_name=format,
                    progress=progress,
                    overwrite=overwrite,
                )
        finish(home)
    raise Locked(f"the disks of VM {home.name!r} are being changed", path=home.paths.lock, hint="try again")


def _validate_output(home: VmHome, output: Path, format_name: str, *, overwrite: bool) -> None:
    if format_name not in FORMATS:
        raise StoreError(f"no export as {format_name!r}", hint=f"choose one of {', '.join(FORMATS)}")
    root = home.parts.root.resolve()
    if output.resolve().is_relative_to(root):
        raise StoreError(
            "an export must not go into the store itself", path=output, hint="choose another folder"
        )
    if not overwrite and home.files.exists(output):
        raise StoreError(
            "a file of this name exists; it was not touched",
            path=output,
            hint="choose another name, or replace the file with --overwrite",
        )


def _choose_point(home: VmHome, point_id: uuid.UUID | None, disk_index: int) -> PointRow:
    rows = {row.spec.index: row for row in home.catalog.disks(home.vm_id)}
    if disk_index not in rows:
        raise NoSuchPoint(f"VM {home.name!r} has no disk {disk_index}", field="disk", actual=disk_index)
    points = home.catalog.points(home.vm_id)
    complete = [point for point in points if point.state == "complete"]
    if not complete:
        raise _nothing_complete(home, points)
    if point_id is not None and point_id != complete[-1].id:
        raise NoSuchPoint(
            f"VM {home.name!r} has no point {point_id} to export",
            path=home.paths.folder,
            expected=complete[-1].id,
            actual=point_id,
            hint="only the newest complete point is kept; leave the point out to take it",
        )
    if disk_index not in home.catalog.members(home.vm_id, complete[-1].id):
        is_removed = rows[disk_index].removed_s is not None
        raise NoSuchPoint(
            f"the newest point of VM {home.name!r} does not have disk {disk_index}",
            field="disk",
            actual=disk_index,
            hint="the disk was removed from the VM; its last content is in its file in the store"
            if is_removed
            else "the disk was added to the VM; it belongs to its points from the next one on",
        )
    require_sound(home)
    return complete[-1]


def _nothing_complete(home: VmHome, points: list[PointRow]) -> NoSuchPoint:
    if any(point.state == "base" for point in points):
        return NoSuchPoint(
            f"VM {home.name!r} has no point yet: its first copy was made while the VM wrote,"
            " and waits for the first cut",
            path=home.paths.folder,
            hint="it becomes a point with the next cycle; run replicate, or wait for it",
        )
    return NoSuchPoint(
        f"VM {home.name!r} has no complete point yet",
        path=home.paths.folder,
        hint="its initial replication must finish first",
    )


def _export(
    home: VmHome,
    output: Path,
    point_id: uuid.UUID,
    *,
    disk_index: int,
    format_name: Format,
    progress: ProgressCallback | None,
    overwrite: bool,
) -> ExportReport:
    spec = next(row.spec for row in home.catalog.disks(home.vm_id) if row.spec.index == disk_index)
    with room(
        home.files,
        output,
        message="no room left for the exported disk",
        hint="make room, then run the same command again",
    ):
        convert_disk(
            home.files,
            home.paths.disk(disk_index),
            output,
            source_format="vhdx",
            format=format_name,
            type="dynamic",
            block_bytes=(spec.block_bytes or None) if format_name == "vhdx" else None,
            clock=home.clock,
            progress=progress,
            overwrite=overwrite,
        )
    return ExportReport(
        vm=home.name,
        point=str(point_id),
        disk=disk_index,
        output=str(output),
        format=format_name,
        virtual_bytes=spec.virtual_bytes,
        file_bytes=file_length(home.files, output),
    )
