"""Open and create disks by name."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hvreplica.disk.raw import RawDisk
from hvreplica.disk.vhdx.create import parameters_for, write_empty_vhdx
from hvreplica.disk.vhdx.open import open_vhdx
from hvreplica.errors import FieldOutOfRange, UnsupportedVersion
from hvreplica.files import lock_open_file
from hvreplica.formats.vhdx_header import FILE_SIGNATURE

if TYPE_CHECKING:
    import os

    from hvreplica.clock import Clock
    from hvreplica.disk.disk import Disk
    from hvreplica.files import BlockFile, FileSystem

Format = Literal["raw", "vhdx"]
DiskType = Literal["dynamic", "fixed"]

_VHD_COOKIE = b"conectix"
_VHD_FOOTER_BYTES = 512
_RAW_SECTOR_BYTES = 512
_FOREIGN_SIGNATURES = (  # name, offset in the file, signature
    ("a qcow2 image", 0, b"QFI\xfb"),
    ("a VMDK", 0, b"KDMV"),
    ("a VMDK", 0, b"COWD"),
    ("the descriptor of a VMDK", 0, b"# Disk DescriptorFile"),
    ("a VDI", 0x40, b"\xbe\xda\x10\x7f"),
    ("a QED image", 0, b"QED\0"),
)
_HEAD_BYTES = max(offset + len(signature) for _, offset, signature in _FOREIGN_SIGNATURES)


def open_disk(
    files: FileSystem,
    path: str | os.PathLike[str],
    *,
    writable: bool = False,
    format: Format | None = None,  # noqa: A002 - the word that users type
    clock: Clock,
) -> Disk:
    """Return the disk in the file at `path`.

    format: None tells by signature; give "raw" for images whose guest may write what looks like a signature.
    Opening for writing takes a lock that the file keeps until close. A clean file is not changed by being
    opened. Raises: Locked, FormatError of the kind that fits, UnsupportedVersion for what is known and not
    supported, which takes in the signatures of qcow2, QED, VDI, VHD and VMDK.
    """
    file = files.open(Path(path), writable=writable)
    try:
        if writable:
            lock_open_file(file)
        found = format or _format_of(file)
        return open_vhdx(file, clock=clock) if found == "vhdx" else RawDisk(file)
    except BaseException:
        file.close()
        raise


def _format_of(file: BlockFile) -> Format:
    size = file.size()
    head = file.read(0, min(size, _HEAD_BYTES))
    if head.startswith(FILE_SIGNATURE):
        return "vhdx"
    footer = file.read(size - _VHD_FOOTER_BYTES, len(_VHD_COOKIE)) if size >= _VHD_FOOTER_BYTES else b""
    if head.startswith(_VHD_COOKIE) or footer == _VHD_COOKIE:
        raise _foreign(file, "a VHD", _VHD_COOKIE)
    for name, offset, signature in _FOREIGN_SIGNATURES:
        if head.startswith(signature, offset):
            raise _foreign(file, name, signature)
    return "raw"


def _foreign(file: BlockFile, name: str, signature: bytes) -> UnsupportedVersion:
    """Return the refusal of a file that would be taken for raw, its container's bytes for the guest's."""
    return UnsupportedVersion(
        f"this is {name}; only VHDX and raw disks can be opened",
        path=file.path,
        field="signature",
        expected=FILE_SIGNATURE,
        actual=signature,
        hint="convert it first with `qemu-img convert -O vhdx`, or give open_disk() the format raw if the"
        " guest itself wrote this",
    )


def require_folder(files: FileSystem, path: Path) -> None:
    """Name the folder that is missing, not the temporary file in it. Raises: FileNotFoundError."""
    if not files.exists(path.parent):
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))


def create_disk(  # noqa: PLR0913 - each is a choice that a user may make
    files: FileSystem,
    path: str | os.PathLike[str],
    *,
    virtual_bytes: int,
    format: Format = "vhdx",  # noqa: A002 - the word that users type
    type: DiskType = "dynamic",  # noqa: A002 - the word that users type
    block_bytes: int | None = None,
    logical_sector_bytes: int = 512,
    physical_sector_bytes: int = 4096,
    clock: Clock,
    overwrite: bool = False,
) -> None:
    """Create an empty disk under `path`; after any crash it is there as a whole or not at all.

    virtual_bytes: multiple of the logical sector, up to 64 TiB for a VHDX. block_bytes: None chooses by size.
    A fixed disk's blocks are holes until they are written: reserving the space is left to the file system.
    Raises: FileExistsError unless overwrite; FileNotFoundError naming a missing folder; FieldOutOfRange for
    sizes that the format does not allow.
    """
    path = Path(path)
    if not overwrite and files.exists(path):
        raise FileExistsError(17, "a file of this name exists; it was not touched", str(path))
    require_folder(files, path)
    parameters = None
    if format == "vhdx":
        parameters = parameters_for(
            virtual_bytes=virtual_bytes,
            block_bytes=block_bytes,
            fixed=type == "fixed",
            logical_sector_bytes=logical_sector_bytes,
            physical_sector_bytes=physical_sector_bytes,
            clock=clock,
        )
    elif virtual_bytes % _RAW_SECTOR_BYTES or virtual_bytes <= 0:
        raise FieldOutOfRange(
            "a raw disk cannot have this size",
            path=path,
            field="size",
            expected="a multiple of 512",
            actual=virtual_bytes,
        )
    temporary = path.with_name(f".{path.name}.{clock.guid().hex[:8]}.tmp")
    file = files.open(temporary, create=True, exclusive=True)
    try:
        if parameters is not None:
            write_empty_vhdx(file, parameters, clock=clock)
        else:
            file.resize(virtual_bytes)
            file.sync()
        file.close()
        files.replace(temporary, path)
    except BaseException:
        file.close()
        files.unlink(temporary)
        raise
    files.sync_directory(path.parent)
