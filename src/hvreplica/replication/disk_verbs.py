"""The disk verbs as functions: paths in, typed results out; they need no other side and no store."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hvreplica.clock import SYSTEM
from hvreplica.disk import compare_disks, convert_disk, create_disk, map_disk, open_disk
from hvreplica.files import OS_FILES

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from hvreplica.disk import CompareReport, ConvertReport, DiskInfo, MapEntry
    from hvreplica.progress import ProgressCallback

    PathLike = str | os.PathLike[str]
    DiskFormat = Literal["raw", "vhd", "vhdx"]
    DiskType = Literal["dynamic", "fixed", "differencing"]

_FORMATS: dict[str, DiskFormat] = {".vhdx": "vhdx", ".vhd": "vhd"}


def disk_info(path: PathLike) -> DiskInfo:
    """Return what the disk in a file is. Raises: FormatError, OSError."""
    with contextlib.closing(open_disk(OS_FILES, Path(path), clock=SYSTEM)) as disk:
        return disk.info()


def disk_map(path: PathLike) -> Iterator[MapEntry]:
    """Yield runs that cover the whole disk, in order, each with the file of the chain that holds it."""
    with contextlib.closing(open_disk(OS_FILES, Path(path), clock=SYSTEM)) as disk:
        yield from map_disk(disk)


def disk_create(
    path: PathLike,
    size_bytes: int,
    *,
    format: DiskFormat = "vhdx",  # noqa: A002 - the word that every disk tool uses
    type: DiskType = "dynamic",  # noqa: A002 - as above
    block_bytes: int | None = None,
    logical_sector_bytes: int = 512,
    physical_sector_bytes: int = 4096,
    overwrite: bool = False,
) -> DiskInfo:
    """Make an empty disk that reads as zeros, durable on return. Raises: FileExistsError unless overwrite."""
    create_disk(
        OS_FILES,
        Path(path),
        virtual_bytes=size_bytes,
        format=format,
        type=type,
        block_bytes=block_bytes,
        logical_sector_bytes=logical_sector_bytes,
        physical_sector_bytes=physical_sector_bytes,
        clock=SYSTEM,
        overwrite=overwrite,
    )
    return disk_info(path)


def disk_convert(
    source: PathLike,
    target: PathLike,
    *,
    format: DiskFormat | None = None,  # noqa: A002 - as above
    type: DiskType = "dynamic",  # noqa: A002 - as above
    block_bytes: int | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> ConvertReport:
    """Copy a disk into another format. format: by the target's ending (.vhdx, .vhd, else raw)."""
    return convert_disk(
        OS_FILES,
        Path(source),
        Path(target),
        format=format or _FORMATS.get(Path(target).suffix.lower(), "raw"),
        type=type,
        block_bytes=block_bytes,
        clock=SYSTEM,
        progress=progress,
        overwrite=overwrite,
    )


def disk_compare(
    first: PathLike, second: PathLike, *, progress: ProgressCallback | None = None
) -> CompareReport:
    """Compare what two disks hold, whatever their formats; stops at the first difference."""
    return compare_disks(OS_FILES, Path(first), Path(second), clock=SYSTEM, progress=progress)
