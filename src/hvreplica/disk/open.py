"""Open disks by name, with all their parents."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hvreplica.disk.paths import candidate_paths
from hvreplica.disk.raw import RawDisk
from hvreplica.disk.vhd.open import looks_like_vhd, open_vhd
from hvreplica.disk.vhdx.open import open_vhdx
from hvreplica.errors import BadSignature, HvReplicaError, ParentLoop, ParentMissing, UnsupportedVersion
from hvreplica.files import lock_open_file
from hvreplica.formats.vhdx_header import FILE_SIGNATURE

if TYPE_CHECKING:
    from hvreplica.clock import Clock
    from hvreplica.disk.disk import Disk
    from hvreplica.files import BlockFile, FileSystem

Format = Literal["raw", "vhd", "vhdx"]
DiskType = Literal["dynamic", "fixed", "differencing"]

# Hyper-V makes at most 50 checkpoints; backup tools add some. More than this is a mistake or an attack.
CHAIN_LENGTH_MAX = 256
_FORMAT_OF_ENDING = {".vhdx": "vhdx", ".avhdx": "vhdx", ".vhd": "vhd", ".avhd": "vhd"}
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
    parent: str | os.PathLike[str] | None = None,
    shared: bool = False,
    clock: Clock,
) -> Disk:
    """Return the disk in the file at `path`, with all its parents open for reading.

    shared: hold a lock against writers, for whoever reads a disk that must not change meanwhile.

    format: None tells by signature, and refuses a file that is named as a VHD or VHDX and has none; give
    "raw" for images whose guest may write what looks like a signature.
    parent: the file of the parent, where the names in a differencing disk do not lead to it. Opening for
    writing takes a lock that the file keeps until close, and each parent is locked against writers. A clean
    file is not changed by being opened. Raises: Locked, FormatError of the kind that fits, UnsupportedVersion
    for what is known and not supported, which takes in the signatures of qcow2, QED, VDI and VMDK;
    ParentMissing, ParentMismatch, ParentLoop.
    """
    disk = open_layer(files, path, writable=writable, format=format, shared=shared, clock=clock)
    try:
        open_parents(files, disk, parent=parent, clock=clock)
    except BaseException:
        disk.abandon()
        raise
    return disk


def open_layer(
    files: FileSystem,
    path: str | os.PathLike[str],
    *,
    writable: bool = False,
    format: Format | None = None,  # noqa: A002 - the word that users type
    shared: bool = False,
    clock: Clock,
) -> Disk:
    """Return as open_disk(), without any parent: what a parent holds cannot be read, and all else can.

    shared: hold a lock against writers, for a file that is only read and must not change.
    """
    file = files.open(Path(path), writable=writable)
    try:
        if writable or shared:
            lock_open_file(file, shared=not writable)
        found = format or _format_as_named(file)
        if found == "vhdx":
            return open_vhdx(file, clock=clock)
        return open_vhd(file) if found == "vhd" else RawDisk(file)
    except BaseException:
        file.close()
        raise


def open_parents(
    files: FileSystem, disk: Disk, *, parent: str | os.PathLike[str] | None = None, clock: Clock
) -> None:
    """Open the parents of `disk`, which was opened without, down to the last, and attach each to its child.

    parent: the file of the first. Raises: ParentMissing, ParentMismatch, ParentLoop, and what opening a file
    raises.
    """
    seen = [real_path(disk.path)]
    child = disk
    while child.parent_reference is not None:
        if len(seen) >= CHAIN_LENGTH_MAX:
            raise ParentLoop(
                "the chain of parents has more members than any real one",
                path=disk.path,
                expected=f"at most {CHAIN_LENGTH_MAX}",
            )
        below = _open_parent(files, child, [Path(parent)] if parent is not None else None, seen, clock)
        child.attach(below)
        seen.append(real_path(below.path))
        child, parent = below, None


def _open_parent(
    files: FileSystem, child: Disk, given: list[Path] | None, seen: list[Path], clock: Clock
) -> Disk:
    """Return the first candidate that is the parent; tell of the first that is there and is not."""
    reference = child.parent_reference
    names = reference.names if reference is not None else ()
    candidates = given or candidate_paths(child.path, names)
    failure: Exception | None = None
    for path in candidates:
        if not files.exists(path):
            continue
        try:
            if real_path(path) in seen:
                raise _loop(child, path)
            return _verified(files, child, path, clock)
        except FileNotFoundError:
            continue  # a link that leads nowhere
        except (HvReplicaError, OSError) as error:
            failure = failure or error
    if failure is not None:
        raise failure
    raise ParentMissing(
        "the parent of this differencing disk is not there",
        path=child.path,
        field="parent",
        expected=" or ".join(str(path) for path in candidates) or "a name",
        actual="no such file; the disk names " + (", ".join(repr(name) for name in names) or "nothing"),
        hint="put the parent beside its child, or name it with --parent",
    )


def _verified(files: FileSystem, child: Disk, path: Path, clock: Clock) -> Disk:
    reference = child.parent_reference
    below = open_layer(files, path, shared=True, clock=clock)
    try:
        if reference is not None:
            reference.verify(below)
    except BaseException:
        below.abandon()
        raise
    return below


def _loop(child: Disk, path: Path) -> ParentLoop:
    return ParentLoop(
        "the chain of parents leads back to a disk that it has passed already",
        path=child.path,
        field="parent",
        actual=str(path),
        hint="a disk was rebased onto its own child; name its true parent with `hvreplica disk rebase`",
    )


def real_path(path: Path) -> Path:
    """Return the one name of a file that may be named through links, which could make a loop look endless."""
    return Path(os.path.realpath(path))


def format_of(file: BlockFile) -> Format:
    """Return the format that the file's signatures tell, raw where there is none.

    Raises: UnsupportedVersion for those of formats that are not read here.
    """
    size = file.size()
    head = file.read(0, min(size, _HEAD_BYTES))
    if head.startswith(FILE_SIGNATURE):
        return "vhdx"
    if looks_like_vhd(file):
        return "vhd"
    for name, offset, signature in _FOREIGN_SIGNATURES:
        if head.startswith(signature, offset):
            raise _foreign(file, name, signature)
    return "raw"


def _format_as_named(file: BlockFile) -> Format:
    """Return as format_of(), and refuse to take a container that lost its signature for the guest's bytes."""
    found = format_of(file)
    named = _FORMAT_OF_ENDING.get(file.path.suffix.lower())
    if found != "raw" or named is None:
        return found
    raise BadSignature(
        f"the name says that this is a {named.upper()}, and nothing in the file does",
        path=file.path,
        field="signature",
        expected=FILE_SIGNATURE if named == "vhdx" else b"conectix",
        hint=f"`hvreplica disk check {file.path}` tells what is damaged and whether it can be repaired; a raw"
        " disk needs another name, or the format raw",
    )


def _foreign(file: BlockFile, name: str, signature: bytes) -> UnsupportedVersion:
    """Return the refusal of a file that would be taken for raw, its container's bytes for the guest's."""
    return UnsupportedVersion(
        f"this is {name}; only VHDX, VHD and raw disks can be opened",
        path=file.path,
        field="signature",
        expected=FILE_SIGNATURE,
        actual=signature,
        hint="convert it first with `qemu-img convert -O vhdx`, or give open_disk() the format raw if the"
        " guest itself wrote this",
    )
