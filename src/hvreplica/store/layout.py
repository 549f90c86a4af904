"""Where everything of a store stands, and how a VM's name becomes a folder's name.

    <root>/catalog.db            what the store knows (store/catalog.py)
    <root>/store.lock            held by the process that serves the store
    <root>/<vm folder>/lock      shared to read the disks, exclusive to change them
    <root>/<vm folder>/disks/0.vhdx           the replica
    <root>/<vm folder>/disks/0.vhdx.partial   an initial replication on its way
    <root>/<vm folder>/spool/<log id>.hrl     received, durable, not yet applied
    <root>/<vm folder>/spool/<log id>.hrl.partial
    <root>/<vm folder>/points/<part id>.hru        what older points need, docs/formats/hru.md
    <root>/<vm folder>/points/<part id>.hru.partial
    <root>/<vm folder>/points/<part id>.vhdx       a disk that an initial replication has replaced
    <root>/<vm folder>/points/<point id>.use       held, shared, by whoever reads a point
    <root>/<vm folder>/applied                     counts the times that the disks began to change
    <root>/<vm folder>/logs/<log id>.hrl           applied, kept for points between two cycles
    <root>/<vm folder>/logs/<log id>.hrt           its times; in spool/ beside a log that is not yet applied
    <root>/<vm folder>/active/0.vhdx               what runs here after a failover, a child of disks/0.vhdx
    <root>/<vm folder>/test/0.vhdx                 what a test failover writes to
    <root>/<vm folder>/feeds/<relationship id>.json   what a further site has of this replica's points

A name from outside becomes a path here and nowhere else. A folder name is one path component that every usual
file system takes: no separator, no control character, no leading dot, no trailing dot or space, no Windows
device name, no name of the store's own files, no 8.3 short name, at most 255 bytes. What is not safe is
written as %XX of its UTF-8 bytes. Two names that a case-insensitive or normalising file system would take for
one get different folders: the one that comes second is written in the strict form, "%=" and the name with
capitals and everything outside ASCII escaped too. The catalog holds which VM has which folder.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from hvreplica.errors import FieldOutOfRange
from hvreplica.formats.messages import VM_NAME_CHARS_MAX
from hvreplica.hrl.times import times_path

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

CATALOG_NAME = "catalog.db"
STORE_LOCK_NAME = "store.lock"
PARTIAL_SUFFIX = ".partial"
_FOLDER_BYTES_MAX = 240  # under the 255 of usual file systems, with room for what tools append
# Two hexadecimal digits follow each '%' of a plain folder name, so that these two can mean something else.
_DIGEST_MARK = "%~"  # behind it the digest of a name that is too long
_STRICT_MARK = "%="  # before the strict form
_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$", "clock$"}
_DEVICE_PORT = re.compile(r"(?:com|lpt)[0-9¹²³]")
_PLAIN_ASCII = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_. ()+,=@")
_STRICT_ASCII = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")
_SURE_CATEGORIES = {"Ll", "Lu", "Lt", "Lo", "Nd", "Mn", "Mc"}
_REFUSED_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}


def validate_vm_name(name: str) -> None:
    """Refuse what cannot be the name of a VM. Raises: FieldOutOfRange."""
    if not 1 <= len(name) <= VM_NAME_CHARS_MAX:
        raise FieldOutOfRange(
            "a VM's name is too long" if name else "a VM needs a name",
            field="vm",
            expected=f"1 to {VM_NAME_CHARS_MAX} characters",
            actual=f"{len(name)} characters",
        )
    for character in name:
        if unicodedata.category(character) in _REFUSED_CATEGORIES:
            raise FieldOutOfRange(
                "a VM's name has a control character or a broken one in it",
                field="vm",
                expected="printable characters",
                actual=f"U+{ord(character):04X}",
            )


def folder_name(name: str, *, strict: bool = False) -> str:
    """Return the folder of the VM called `name`, a single safe path component.

    strict: the form for a name whose plain folder is taken; it is never the plain form of any name, and two
    strict forms have one collision_key only if they are equal. Equal results mean equal names, in either
    form. Raises: FieldOutOfRange if no VM can have this name.
    """
    validate_vm_name(name)
    normal = unicodedata.is_normalized("NFC", name)
    reserved = _is_reserved(name)
    pieces = [_STRICT_MARK] if strict else []
    for index, character in enumerate(name):
        at_edge = (index == 0 and reserved) or (index in {0, len(name) - 1} and character in ". ")
        safe = not at_edge and _is_safe(character, strict=strict, normal=normal)
        pieces.append(character if safe else "".join(f"%{byte:02X}" for byte in character.encode()))
    folder = "".join(pieces)
    if len(folder.encode()) <= _FOLDER_BYTES_MAX:
        return folder
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return _cut(pieces, _FOLDER_BYTES_MAX - len(_DIGEST_MARK) - len(digest)) + _DIGEST_MARK + digest


def vm_name(folder: str) -> str | None:
    """Return the name that `folder` was made from; None where it was shortened or is not one of ours."""
    try:
        name = unquote_to_bytes(folder.removeprefix(_STRICT_MARK)).decode()
        known = folder == folder_name(name, strict=folder.startswith(_STRICT_MARK))
    except (UnicodeDecodeError, FieldOutOfRange):
        return None
    return name if known else None


def collision_key(folder: str) -> str:
    """Return what two folders share if any usual file system might take them for the same."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", folder).upper().casefold())


def _is_safe(character: str, *, strict: bool, normal: bool) -> bool:
    if character.isascii():
        return character in (_STRICT_ASCII if strict else _PLAIN_ASCII)
    return not strict and normal and unicodedata.category(character) in _SURE_CATEGORIES


def _is_reserved(name: str) -> bool:
    key = name.casefold()
    stem = key.split(".", 1)[0].rstrip(" ")
    return (
        stem in _DEVICES
        or _DEVICE_PORT.fullmatch(stem) is not None
        or key.startswith((CATALOG_NAME, STORE_LOCK_NAME))
    )


def _cut(pieces: list[str], bytes_max: int) -> str:
    taken: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece.encode())
        if size > bytes_max:
            break
        taken.append(piece)
    return "".join(taken)


@dataclass(frozen=True, slots=True)
class VmPaths:
    """The files of one VM; folder is <root>/<vm folder>."""

    folder: Path

    @classmethod
    def of(cls, root: Path, folder: str) -> VmPaths:
        """Return the paths of the VM whose folder name the catalog holds."""
        return cls(root / folder)

    @property
    def disks(self) -> Path:
        """The folder of the replica's disks."""
        return self.folder / "disks"

    @property
    def spool(self) -> Path:
        """The folder of the logs that wait to be applied."""
        return self.folder / "spool"

    @property
    def lock(self) -> Path:
        """The lock file: shared to read the disks, exclusive to change them."""
        return self.folder / "lock"

    @property
    def points(self) -> Path:
        """The folder of what older points need."""
        return self.folder / "points"

    @property
    def counter(self) -> Path:
        """The file that counts how often the disks began to change, see files.Counter."""
        return self.folder / "applied"

    def undo(self, part_id: uuid.UUID) -> Path:
        """Return where an undo part stands."""
        return self.points / f"{part_id}.hru"

    def partial_undo(self, part_id: uuid.UUID) -> Path:
        """Return where an undo part stands while it is made."""
        return self.points / f"{part_id}.hru{PARTIAL_SUFFIX}"

    def whole(self, part_id: uuid.UUID) -> Path:
        """Return where a disk stands that an initial replication has replaced."""
        return self.points / f"{part_id}.vhdx"

    def use(self, point_id: uuid.UUID) -> Path:
        """Return the lock file of a point: shared to read it, exclusive to drop it."""
        return self.points / f"{point_id}.use"

    @property
    def logs(self) -> Path:
        """The folder of the logs that are kept after they were applied."""
        return self.folder / "logs"

    def kept_log(self, log_id: uuid.UUID) -> Path:
        """Return where a log stands that is kept after it was applied."""
        return self.logs / f"{log_id}.hrl"

    def times(self, log_id: uuid.UUID) -> Path:
        """Return where the times of a log stand that is to be applied."""
        return times_path(self.log(log_id))

    def kept_times(self, log_id: uuid.UUID) -> Path:
        """Return where the times of a log stand that is kept after it was applied."""
        return times_path(self.kept_log(log_id))

    def active(self, disk_index: int) -> Path:
        """Return where a disk stands that runs here after a failover."""
        return self.folder / "active" / f"{disk_index:d}.vhdx"

    def test(self, disk_index: int) -> Path:
        """Return where a disk stands that a test failover writes to."""
        return self.folder / "test" / f"{disk_index:d}.vhdx"

    @property
    def test_lock(self) -> Path:
        """The lock file of whoever serves a test failover."""
        return self.folder / "test" / "lock"

    @property
    def test_socket(self) -> Path:
        """The socket where a test failover is served that was given no other."""
        return self.folder / "test" / "nbd.sock"

    @property
    def feeds(self) -> Path:
        """The folder of what further sites have of this replica's points."""
        return self.folder / "feeds"

    def feed(self, relationship_id: uuid.UUID) -> Path:
        """Return where it is noted what one further site has."""
        return self.feeds / f"{relationship_id}.json"

    def disk(self, disk_index: int) -> Path:
        """Return where the replica of one disk stands."""
        return self.disks / f"{disk_index:d}.vhdx"

    def partial_disk(self, disk_index: int) -> Path:
        """Return where a disk stands while its initial replication is on its way."""
        return self.disks / f"{disk_index:d}.vhdx{PARTIAL_SUFFIX}"

    def log(self, log_id: uuid.UUID) -> Path:
        """Return where a log stands that was received whole."""
        return self.spool / f"{log_id}.hrl"

    def partial_log(self, log_id: uuid.UUID) -> Path:
        """Return where a log on its way stands."""
        return self.spool / f"{log_id}.hrl{PARTIAL_SUFFIX}"
