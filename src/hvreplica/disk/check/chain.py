"""Whether the parents of a differencing disk are there, and are those on which it rests. Knows no format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.disk.open import open_layer, open_parents
from hvreplica.errors import FormatError, Locked, ParentError, ParentLoop, ParentMissing

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from hvreplica.clock import Clock
    from hvreplica.disk.check.findings import Findings, Statistics
    from hvreplica.disk.disk import Disk
    from hvreplica.files import FileSystem

_MISMATCHES = {"logical_sector_size": "parent-sector-size", "format": "parent-format"}


@dataclass(frozen=True, slots=True)
class Chain:
    """Where a check may look for parents. parent: the file of the first, where it is named elsewhere."""

    files: FileSystem
    path: Path
    parent: str | os.PathLike[str] | None
    clock: Clock

    def check(self, findings: Findings, statistics: Statistics) -> None:
        """Open each parent, for reading, as opening the disk would; leaves their names in `statistics`.

        Raises: OSError.
        """
        try:
            disk = open_layer(self.files, self.path, clock=self.clock)
        except FormatError:
            return  # its own damage is told by the other levels
        try:
            open_parents(self.files, disk, parent=self.parent, clock=self.clock)
        except (ParentError, FormatError, Locked) as error:
            findings.add_error(_code_of(error), error, path=error.path)
        finally:
            statistics.parents = _names(disk)
            disk.abandon()


def _names(disk: Disk) -> list[str]:
    names = []
    below = disk.parent
    while below is not None:
        names.append(str(below.path))
        below = below.parent
    return names


def _code_of(error: ParentError | FormatError | Locked) -> str:
    if isinstance(error, ParentMissing):
        return "parent-missing"
    if isinstance(error, ParentLoop):
        return "parent-loop"
    if isinstance(error, ParentError):
        return _MISMATCHES.get(error.field or "", "parent-linkage")
    return "parent-in-use" if isinstance(error, Locked) else "parent-damaged"
