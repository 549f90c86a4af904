"""The disk verbs as functions: paths in, typed results out; they need no other side and no store."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hvreplica.clock import SYSTEM
from hvreplica.disk import compare_disks, convert_disk, create_disk, map_disk, open_disk
from hvreplica.disk.open import open_layer, open_parents
from hvreplica.errors import ParentMissing
from hvreplica.files import OS_FILES

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from hvreplica.disk import CompareReport, ConvertReport, DiskInfo, MapEntry
    from hvreplica.progress import ProgressCallback

    PathLike = str | os.PathLike[str]
    DiskFormat = Literal["raw", "vhd", "vhdx"]
    DiskType = Literal["dynamic", "fixed", "differencing"]

_FORMATS: dict[str, DiskFormat] = {".vhdx": "vhdx", ".avhdx": "vhdx", ".vhd": "vhd", ".avhd": "vhd"}
_FORMATS_OF_NEW: dict[str, DiskFormat] = {**_FORMATS, ".raw": "raw", ".img": "raw"}


def disk_info(
    path: PathLike,
    *,
    format: DiskFormat | None = None,  # noqa: A002 - the word that every disk tool uses
    parent: PathLike | None = None,
) -> DiskInfo:
    """Return what the disk in a file is; of one whose parent is not there too, with the name it gives.

    format: None tells by signature.
    parent: the file of the parent, where the names in a differencing disk do not lead to it. Raises:
    FormatError, ParentError, OSError.
    """
    with contextlib.closing(open_layer(OS_FILES, Path(path), format=format, clock=SYSTEM)) as disk:
        try:
            open_parents(OS_FILES, disk, parent=parent, clock=SYSTEM)
        except ParentMissing:
            if parent is not None:
                raise
        return disk.info()


def disk_map(path: PathLike, *, parent: PathLike | None = None) -> Iterator[MapEntry]:
    """Yield runs that cover the whole disk, in order, each with the file of the chain that holds it."""
    with contextlib.closing(
        open_disk(OS_FILES, Path(path), parent=parent, shared=True, clock=SYSTEM)
    ) as disk:
        yield from map_disk(disk)


def disk_create(  # noqa: PLR0913 - each is a choice that a user may make
    path: PathLike,
    size_bytes: int | None = None,
    *,
    format: DiskFormat | None = None,  # noqa: A002 - the word that every disk tool uses
    type: DiskType = "dynamic",  # noqa: A002 - as above
    block_bytes: int | None = None,
    logical_sector_bytes: int = 512,
    physical_sector_bytes: int = 4096,
    parent: PathLike | None = None,
    overwrite: bool = False,
) -> DiskInfo:
    """Make an empty disk, durable on return, that reads as zeros, or as its parent.

    format: by the ending of the name, .vhd, .raw or .img, else VHDX, where it is None. parent: makes a
    differencing disk on that one, whose sectors, and size where none is given, it takes over.
    Raises: FileExistsError unless overwrite; FieldOutOfRange for what the format does not allow.
    """
    chosen = format or _FORMATS_OF_NEW.get(Path(path).suffix.lower(), "vhdx")
    create_disk(
        OS_FILES,
        Path(path),
        virtual_bytes=size_bytes,
        format=chosen,
        type=type,
        block_bytes=block_bytes,
        logical_sector_bytes=logical_sector_bytes,
        physical_sector_bytes=physical_sector_bytes,
        parent=parent,
        clock=SYSTEM,
        overwrite=overwrite,
    )
    return disk_info(path, format=chosen)


def disk_convert(  # noqa: PLR0913 - each is a choice that a user may make
    source: PathLike,
    target: PathLike,
    *,
    format: DiskFormat | None = None,  # noqa: A002 - as above
    type: DiskType = "dynamic",  # noqa: A002 - as above
    block_bytes: int | None = None,
    logical_sector_bytes: int | None = None,
    parent: PathLike | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> ConvertReport:
    """Copy a disk into another format, with all that its parents hold.

    format: None goes by the target's ending: .vhdx, .avhdx, .vhd, .avhd, else raw. logical_sector_bytes: None
    keeps the source's; a guest that counts in others does not find its partitions. parent: of the source.
    """
    return convert_disk(
        OS_FILES,
        Path(source),
        Path(target),
        format=format or _FORMATS.get(Path(target).suffix.lower(), "raw"),
        type=type,
        block_bytes=block_bytes,
        logical_sector_bytes=logical_sector_bytes,
        parent=parent,
        clock=SYSTEM,
        progress=progress,
        overwrite=overwrite,
    )


def disk_compare(
    first: PathLike,
    second: PathLike,
    *,
    first_parent: PathLike | None = None,
    second_parent: PathLike | None = None,
    progress: ProgressCallback | None = None,
) -> CompareReport:
    """Compare what two disks hold, whatever their formats; stops at the first difference.

    first_parent, second_parent: the files of their parents, where the names in them do not lead there.
    """
    return compare_disks(
        OS_FILES,
        Path(first),
        Path(second),
        a_parent=first_parent,
        b_parent=second_parent,
        clock=SYSTEM,
        progress=progress,
    )
