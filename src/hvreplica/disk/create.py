"""Create empty disks by name."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.disk.chain import layers
from hvreplica.disk.open import open_disk, real_path
from hvreplica.disk.vhd.create import vhd_writer
from hvreplica.disk.vhdx.create import parameters_for, write_empty_vhdx
from hvreplica.disk.vhdx.parent import parent_locator
from hvreplica.errors import FieldOutOfRange, ParentLoop, ParentMismatch
from hvreplica.files import require_unused
from hvreplica.formats.vhdx_metadata import FLAG_HAS_PARENT, FLAG_LEAVE_BLOCKS_ALLOCATED

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from hvreplica.clock import Clock
    from hvreplica.disk.disk import Disk
    from hvreplica.disk.open import DiskType, Format
    from hvreplica.files import BlockFile, FileSystem

_RAW_SECTOR_BYTES = 512


def require_folder(files: FileSystem, path: Path) -> None:
    """Name the folder that is missing, not the temporary file in it. Raises: FileNotFoundError."""
    if not files.exists(path.parent):
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))


def create_disk(  # noqa: PLR0913 - each is a choice that a user may make
    files: FileSystem,
    path: str | os.PathLike[str],
    *,
    virtual_bytes: int | None = None,
    format: Format = "vhdx",  # noqa: A002 - the word that users type
    type: DiskType = "dynamic",  # noqa: A002 - the word that users type
    block_bytes: int | None = None,
    logical_sector_bytes: int = 512,
    physical_sector_bytes: int = 4096,
    parent: str | os.PathLike[str] | None = None,
    clock: Clock,
    overwrite: bool = False,
) -> None:
    """Create an empty disk under `path`; after any crash it is there as a whole or not at all.

    virtual_bytes: multiple of the logical sector, up to 64 TiB for a VHDX; None takes the parent's.
    block_bytes: None chooses by size. A fixed disk's blocks are holes until they are written: reserving the
    space is left to the file system. parent: makes a differencing disk on top of that one, whose sectors it
    takes over. Raises: FileExistsError unless overwrite; FileNotFoundError naming a missing folder;
    FieldOutOfRange for sizes that the format does not allow; ParentMismatch for a parent of another format;
    ParentLoop where it would take the name of one of its own parents.
    """
    path = Path(path)
    _require_type(path, type, has_parent=parent is not None)
    if not overwrite and files.exists(path):
        raise FileExistsError(17, "a file of this name exists; it was not touched", str(path))
    require_folder(files, path)
    below = None if parent is None else open_disk(files, parent, clock=clock)
    try:
        if virtual_bytes is None:
            virtual_bytes = 0 if below is None else below.virtual_bytes
        if below is not None:
            _require_another_name(path, below)
        require_unused(files, path)
        if below is not None:
            logical_sector_bytes = below.logical_sector_bytes
            physical_sector_bytes = below.physical_sector_bytes
        if format == "raw":
            write = _raw_writer(path, virtual_bytes)
        elif format == "vhd":
            write = vhd_writer(
                path,
                below,
                virtual_bytes=virtual_bytes,
                fixed=type == "fixed",
                block_bytes=block_bytes,
                logical_sector_bytes=logical_sector_bytes,
                clock=clock,
            )
        else:
            write = _vhdx_writer(
                path,
                below,
                virtual_bytes=virtual_bytes,
                type=type,
                block_bytes=block_bytes,
                logical_sector_bytes=logical_sector_bytes,
                physical_sector_bytes=physical_sector_bytes,
                clock=clock,
            )
        _write_under_name(files, path, write, clock=clock)
    finally:
        if below is not None:
            below.close()


def create_child(
    files: FileSystem, path: Path, below: Disk, *, block_bytes: int | None = None, clock: Clock
) -> None:
    """Create an empty differencing VHDX on top of an open disk, which has a DataWriteGuid and no file
    perhaps.

    After any crash it is there as a whole or not at all. Raises: FileExistsError, FileNotFoundError naming a
    missing folder.
    """
    if files.exists(path):
        raise FileExistsError(17, "a file of this name exists; it was not touched", str(path))
    require_folder(files, path)
    write = _vhdx_writer(
        path,
        below,
        virtual_bytes=below.virtual_bytes,
        type="differencing",
        block_bytes=block_bytes,
        logical_sector_bytes=below.logical_sector_bytes,
        physical_sector_bytes=below.physical_sector_bytes,
        clock=clock,
    )
    _write_under_name(files, path, write, clock=clock)


def _require_type(path: Path, type: DiskType, *, has_parent: bool) -> None:  # noqa: A002 - as above
    if (type == "differencing" and not has_parent) or (type == "fixed" and has_parent):
        raise FieldOutOfRange(
            "a disk is differencing where it has a parent, and only there",
            path=path,
            field="type",
            expected="differencing" if has_parent else "dynamic or fixed, or a parent",
            actual=type,
        )


def _require_another_name(path: Path, below: Disk) -> None:
    """Check that overwriting `path` does not take away what the new disk rests on. Raises: ParentLoop."""
    if any(real_path(layer.path) == real_path(path) for layer in layers(below)):
        raise ParentLoop(
            "a new disk cannot take the name of one of its own parents; nothing was changed",
            path=path,
            field="parent",
            actual=str(below.path),
            hint="give the new disk another name",
        )


def _write_under_name(
    files: FileSystem, path: Path, write: Callable[[BlockFile], None], *, clock: Clock
) -> None:
    temporary = path.with_name(f".{path.name}.{clock.guid().hex[:8]}.tmp")
    file = files.open(temporary, create=True, exclusive=True)
    try:
        write(file)
        file.close()
        files.replace(temporary, path)
    except BaseException:
        file.close()
        files.unlink(temporary)
        raise
    files.sync_directory(path.parent)


def _raw_writer(path: Path, virtual_bytes: int) -> Callable[[BlockFile], None]:
    if virtual_bytes % _RAW_SECTOR_BYTES or virtual_bytes <= 0:
        raise FieldOutOfRange(
            "a raw disk cannot have this size",
            path=path,
            field="size",
            expected="a multiple of 512",
            actual=virtual_bytes,
        )

    def write(file: BlockFile) -> None:
        file.resize(virtual_bytes)
        file.sync()

    return write


def _vhdx_writer(
    path: Path,
    below: Disk | None,
    *,
    virtual_bytes: int,
    type: DiskType,  # noqa: A002 - as above
    block_bytes: int | None,
    logical_sector_bytes: int,
    physical_sector_bytes: int,
    clock: Clock,
) -> Callable[[BlockFile], None]:
    flags, disk_id, locator = FLAG_LEAVE_BLOCKS_ALLOCATED if type == "fixed" else 0, clock.guid(), b""
    if below is not None:
        if below.format != "vhdx":
            raise ParentMismatch(
                "the parent of a VHDX must be a VHDX",
                path=below.path,
                field="format",
                expected="vhdx",
                actual=below.format,
                hint=f"convert it first: hvreplica disk convert {below.path} PARENT.vhdx",
            )
        flags, locator = FLAG_HAS_PARENT, parent_locator(path, below)
        disk_id = below.virtual_disk_id or disk_id
    parameters = parameters_for(
        virtual_bytes=virtual_bytes,
        block_bytes=block_bytes,
        flags=flags,
        virtual_disk_id=disk_id,
        logical_sector_bytes=logical_sector_bytes,
        physical_sector_bytes=physical_sector_bytes,
    )
    return lambda file: write_empty_vhdx(file, parameters, clock=clock, locator=locator)
