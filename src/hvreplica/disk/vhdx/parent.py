"""The parent of a differencing VHDX: what the child's locator says, and what it takes to be that parent.

Spec: [MS-VHDX] 2.6.2.6.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.disk.paths import relative_windows_path
from hvreplica.errors import FormatError, ParentMismatch
from hvreplica.formats.guid import braced
from hvreplica.formats.vhdx_locator import (
    PARENT_LINKAGE,
    RELATIVE_PATH,
    locator_entries,
    pack_parent_locator,
)

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.disk.disk import Disk
    from hvreplica.formats.vhdx_locator import ParentLocator
    from hvreplica.formats.vhdx_metadata import DiskParameters


class VhdxParentReference:
    """See disk.ParentReference."""

    def __init__(self, child: Path, locator: ParentLocator, parameters: DiskParameters) -> None:
        """locator: of the disk `child`, as it was read."""
        self._child = child
        self._locator = locator
        self._parameters = parameters

    @property
    def names(self) -> tuple[str, ...]:
        return self._locator.paths

    def verify(self, parent: Disk) -> None:
        """Check format, identity and sector size. Raises: ParentMismatch; FormatError for a bad locator."""
        try:
            self._locator.validate()
        except FormatError as error:
            error.at(self._child)
            raise
        if parent.format != "vhdx":
            raise self._mismatch(
                parent,
                "the parent of a VHDX must be a VHDX",
                field="format",
                expected="vhdx",
                actual=parent.format,
            )
        if parent.data_write_guid not in self._locator.linkages:
            raise self._mismatch(
                parent,
                "this is not the parent, or its content is not that on which the child rests",
                field=PARENT_LINKAGE,
                expected=" or ".join(braced(guid) for guid in self._locator.linkages),
                actual="none" if parent.data_write_guid is None else braced(parent.data_write_guid),
            )
        if parent.logical_sector_bytes != self._parameters.logical_sector_bytes:
            raise self._mismatch(
                parent,
                "parent and child have sectors of different sizes",
                field="logical_sector_size",
                expected=self._parameters.logical_sector_bytes,
                actual=parent.logical_sector_bytes,
            )

    def _mismatch(
        self, parent: Disk, message: str, *, field: str, expected: object, actual: object
    ) -> ParentMismatch:
        return ParentMismatch(
            message,
            path=parent.path,
            field=field,
            expected=expected,
            actual=actual,
            spec="[MS-VHDX] 2.6.2.6.3",
            hint=f"the child is {self._child}: whoever writes to a parent breaks its children; restore"
            " the parent from a copy, or name the right file with --parent",
        )


def parent_locator(child: Path, parent: Disk) -> bytes:
    """Return the locator item of a new `child` of `parent`, which has a DataWriteGuid.

    Only the relative path is given: no name of this system is one of the Win32 paths that the other entries
    hold.
    """
    if parent.data_write_guid is None:
        raise TypeError("a parent without a DataWriteGuid")
    paths = {RELATIVE_PATH: relative_windows_path(child, parent.path)}
    return pack_parent_locator(locator_entries(parent.data_write_guid, paths))
