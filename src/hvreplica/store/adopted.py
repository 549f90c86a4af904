"""What a store remembers of an old primary whose disks became its replica; see docs/formats/ranges.md.

    <vm>/adopted/adopted.json       which points of the other site the disks grew from
    <vm>/adopted/<disk>.ranges      what was written to a disk after them

Believed as long as the VM's newest point is the one that adopted.json names: with the first logs from the
other site it is of no use any more.
"""

from __future__ import annotations

import uuid  # noqa: TC003 - msgspec reads the annotations when the program runs
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from msgspec import Meta

from hvreplica.disk.extents import NO_EXTENTS
from hvreplica.errors import FailoverRefused, FormatError, StoreError
from hvreplica.files import write_durably
from hvreplica.formats.messages import CHANGES_MAX, CUTS_MAX
from hvreplica.formats.ranges import HEADER, RANGES_MAX, ROW_BYTES, pack_ranges, unpack_ranges
from hvreplica.store.home import VmHome

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from hvreplica.store.home import StoreParts

_JSON_BYTES_MAX = 1 << 16
_HINT = "take the old primary in again with `hvreplica store adopt --unknown`: all is compared then"


class AdoptedRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """adopted.json. adoption: of which call of the verb it is. The rest: see docs/formats/ranges.md."""

    version: Annotated[int, Meta(ge=1, le=1)]
    adoption: uuid.UUID
    point: uuid.UUID
    known: Annotated[list[uuid.UUID], Meta(max_length=CUTS_MAX)]
    is_known: bool


def require_adopted(parts: StoreParts, vm: str) -> None:
    """Refuse the site to which a VM was failed over where its old primary is no replica.

    Raises: FailoverRefused.
    """
    row = parts.catalog.vm(vm)
    home = None if row is None else VmHome(parts, row)
    if home is None or AdoptedFiles(home).current() is None:
        raise FailoverRefused(
            f"VM {vm!r} is no replica here that was made of its old primary",
            path=parts.root,
            hint="make it one with `hvreplica store adopt`; one that was written since is none any more",
        )


@dataclass(frozen=True, slots=True)
class AdoptedFiles:
    """The files of one VM's record."""

    home: VmHome

    @property
    def folder(self) -> Path:
        """Where they stand."""
        return self.home.paths.folder / "adopted"

    def write(self, record: AdoptedRecord, ranges: Mapping[int, tuple[NDArray[np.int64], int]]) -> None:
        """Make the record durable, as a whole. ranges: disk index -> (rows, virtual bytes of the disk)."""
        files, clock = self.home.files, self.home.clock
        files.make_directory(self.folder)
        for index, (rows, virtual_bytes) in ranges.items():
            data = pack_ranges(rows, disk_index=index, virtual_bytes=virtual_bytes)
            write_durably(files, self._path(index), data, clock=clock)
        write_durably(files, self.folder / "adopted.json", msgspec.json.encode(record), clock=clock)
        files.sync_directory(self.home.paths.folder)

    def read(self) -> AdoptedRecord | None:
        """Return the record, whatever point it belongs to; None where there is none. Raises: StoreError."""
        path = self.folder / "adopted.json"
        if not self.home.files.exists(path):
            return None
        try:
            return msgspec.json.decode(self._bytes(path, _JSON_BYTES_MAX), type=AdoptedRecord)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise StoreError(
                f"the record of an old primary's disks is damaged: {error}", path=path, hint=_HINT
            ) from None

    def current(self) -> AdoptedRecord | None:
        """Return the record while the disks are what it speaks of. Raises: StoreError."""
        record = self.read()
        points = self.home.catalog.points(self.home.vm_id)
        if record is None or not points or points[-1].id != record.point:
            return None
        return record

    def ranges(self, disk_index: int, disk_offset: int) -> tuple[NDArray[np.int64], bool]:
        """Return what was written from an offset on, at most CHANGES_MAX ranges, and whether that is all.

        Raises: StoreError for a damaged file.
        """
        rows = self._rows(disk_index)
        first = int(np.searchsorted(rows[:, 0], disk_offset, "left"))
        return rows[first : first + CHANGES_MAX], first + CHANGES_MAX >= len(rows)

    def changed_bytes(self, disk_index: int) -> int:
        """Return how many bytes all ranges of a disk have. Raises: StoreError for a damaged file."""
        rows = self._rows(disk_index)
        return int(rows[:, 1].sum())

    def _rows(self, disk_index: int) -> NDArray[np.int64]:
        path = self._path(disk_index)
        if not self.home.files.exists(path):
            return NO_EXTENTS
        try:
            data = self._bytes(path, HEADER.size + RANGES_MAX * ROW_BYTES)
            rows, _ = unpack_ranges(data, disk_index=disk_index)
        except FormatError as error:
            raise StoreError(str(error), path=path, hint=_HINT) from None
        return rows

    def _path(self, disk_index: int) -> Path:
        return self.folder / f"{disk_index:d}.ranges"

    def _bytes(self, path: Path, bytes_max: int) -> bytes:
        file = self.home.files.open(path)
        try:
            return file.read(0, min(file.size(), bytes_max))
        finally:
            file.close()
