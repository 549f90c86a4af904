"""Give a recovery point out as a disk of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import msgspec

from hvreplica.disk import convert_open_disk
from hvreplica.errors import StoreError
from hvreplica.store.check import file_length, require_sound
from hvreplica.store.open_point import LATEST, open_point
from hvreplica.store.room import room

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    from hvreplica.progress import ProgressCallback
    from hvreplica.store.home import VmHome

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
    point_id: uuid.UUID | str | None,
    disk_index: int,
    format: Format,  # noqa: A002  # the word that every disk tool uses
    progress: ProgressCallback | None,
    overwrite: bool,
) -> ExportReport:
    """Write one disk of a point to `output`; whole under that name on return, or nothing of it.

    point_id: see choose_point(); None takes the newest complete one. Replication goes on meanwhile, and the
    point is not dropped. Raises: NoSuchPoint, StoreFull, StoreError if `output` is there or inside the store.
    """
    _validate_output(home, output, format, overwrite=overwrite)
    require_sound(home)
    with open_point(home, point_id or LATEST, disks=[disk_index]) as opened:
        disk = opened.disks[disk_index]
        with room(
            home.files,
            output,
            message="no room left for the exported disk",
            hint="make room, then run the same command again",
        ):
            convert_open_disk(
                home.files,
                disk,
                output,
                source_name=str(disk.path),
                format=format,
                block_bytes=(disk.block_bytes or None) if format == "vhdx" else None,
                clock=home.clock,
                progress=progress,
                overwrite=overwrite,
            )
        return ExportReport(
            vm=home.name,
            point=str(opened.id),
            disk=disk_index,
            output=str(output),
            format=format,
            virtual_bytes=disk.virtual_bytes,
            file_bytes=file_length(home.files, output),
        )


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
