"""The parent of a differencing VHD: how it is recognised, and how a new child names it.

Parent and child are linked by the parent's unique_id alone. It does not change when the parent is written to,
so that a changed parent cannot be told from the right one: never write to a parent. The time stamp beside it
proves as little: Windows 10 writes 0, and whoever copies a file changes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.disk.paths import relative_windows_path
from hvreplica.errors import ParentMismatch
from hvreplica.formats.guid import NIL
from hvreplica.formats.vhd_header import DYNAMIC_HEADER
from hvreplica.formats.vhd_locator import ABSOLUTE, RELATIVE, encode_locator

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    from hvreplica.disk.disk import Disk
    from hvreplica.disk.vhd.image import Image


class VhdParentReference:
    """See disk.ParentReference. child: the file's name, for messages and for raw parents."""

    def __init__(self, child: Path, image: Image) -> None:
        self._child = child
        self._image = image

    @property
    def names(self) -> tuple[str, ...]:
        return self._image.parent_names

    def verify(self, parent: Disk) -> None:
        """Make sure that `parent` has the unique_id that the child names. Raises: ParentMismatch.

        XenServer makes children of raw disks, which have no identity, and names the nil one. Nothing proves
        such a parent, so it must at least stand in the child's own folder.
        """
        wanted = self._image.header.parent_unique_id
        if parent.format == "raw" and wanted == NIL:
            if parent.path.absolute().parent != self._child.absolute().parent:
                raise self._mismatch(
                    parent,
                    "a raw parent has no identity, so only one beside its child is believed",
                    expected=f"a file in {self._child.absolute().parent}",
                    actual=str(parent.path),
                )
            return
        found = unique_id_of(parent)
        if found is None:
            raise self._mismatch(
                parent, "the parent of a VHD must be a VHD", expected="vhd", actual=parent.format
            )
        if found != wanted:
            raise self._mismatch(
                parent, "this VHD is not the one that the child rests on", expected=wanted, actual=found
            )

    def _mismatch(self, parent: Disk, message: str, *, expected: object, actual: object) -> ParentMismatch:
        return ParentMismatch(
            message,
            path=parent.path,
            field="parent_unique_id",
            expected=expected,
            actual=actual,
            spec=DYNAMIC_HEADER.spec,
            hint=f"the child is {self._child}: put its parent beside it, or name the file with --parent",
        )


def unique_id_of(disk: Disk) -> uuid.UUID | None:
    """Return the unique_id of a VHD, None for disks of other formats."""
    found: uuid.UUID | None = getattr(disk, "unique_id", None)
    return found


@dataclass(frozen=True, slots=True)
class ParentNames:
    """What a child says of its parent. locators: platform codes and data."""

    unique_id: uuid.UUID
    name: str
    locators: tuple[tuple[bytes, bytes], ...]


def names_of(child: Path, parent: Disk) -> ParentNames:
    """Return what the disk `child` is to say of `parent`. Raises: ParentMismatch if that is no VHD."""
    unique_id = unique_id_of(parent)
    if unique_id is None:
        raise ParentMismatch(
            "the parent of a VHD must be a VHD",
            path=parent.path,
            field="format",
            expected="vhd",
            actual=parent.format,
            hint=f"convert it first: hvreplica disk convert {parent.path} PARENT.vhd",
        )
    locators = (
        (ABSOLUTE, encode_locator(ABSOLUTE, str(parent.path.absolute()))),
        (RELATIVE, encode_locator(RELATIVE, relative_windows_path(child, parent.path))),
    )
    return ParentNames(unique_id, parent.path.name, locators)
