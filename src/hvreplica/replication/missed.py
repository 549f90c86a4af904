"""What cuts hold that one replica of several did not get: ranges that its next own cut reads from the disks.

    STATE/missed.json, or STATE/replicas/NAME/missed.json

A cut is one instant for all replicas of a VM, but not each of them can have it: one whose first copy is on
its way, or that could not be reached until its queue was full. What the cut's logs hold is noted here before
tracking forgets it. A file that is damaged, or of a replica that was fed without it, says that everything is
missed. Ranges become coarser where there are too many, so that neither file nor memory grows.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from msgspec import Meta

from hvreplica.disk.extents import NO_EXTENTS, merge, union
from hvreplica.files import write_durably
from hvreplica.formats import messages
from hvreplica.replication.state import MISSED_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem

VERSION = 1
RANGES_MAX = 1 << 14  # of one disk: with all of 64 disks they are some 25 MiB of text
_FINEST_BYTES = 4096
_FILE_BYTES_MAX = 64 << 20
_LOG = logging.getLogger("hvreplica.replicate")

_Offset = Annotated[int, Meta(ge=0, lt=messages.DISK_BYTES_MAX)]
_Length = Annotated[int, Meta(ge=1, le=messages.DISK_BYTES_MAX)]


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    disks: dict[int, list[tuple[_Offset, _Length]]]


class Missed:
    """The ranges that one replica missed, by disk. Whoever calls holds the lock of cuts."""

    def __init__(self, files: FileSystem, folder: Path, *, clock: Clock) -> None:
        self._files = files
        self._path = folder / MISSED_NAME
        self._clock = clock
        self._rows: dict[int, NDArray[np.int64]] = {}

    def load(self, sizes: Mapping[int, int], *, unless_there: bool) -> None:
        """Take what is noted. sizes: of the disks that the VM has.

        unless_there: whether everything is missed where there is no file.
        """
        self._rows = self.noted(sizes, unless_there=unless_there)
        if unless_there or self._rows:
            self._save()

    def noted(self, sizes: Mapping[int, int], *, unless_there: bool) -> dict[int, NDArray[np.int64]]:
        """Return what load() would take, and take nothing: by disk, int64 (n, 2), sorted, disjoint."""
        noted = self._read(sizes)
        if noted is None or (unless_there and not self._files.exists(self._path)):
            return {index: np.array([[0, size]], np.int64) for index, size in sizes.items()}
        return noted

    @property
    def is_empty(self) -> bool:
        """Whether nothing is missed."""
        return not self._rows

    @property
    def total_bytes(self) -> int:
        """What is missed, of all disks."""
        return sum(int(rows[:, 1].sum()) for rows in list(self._rows.values()))

    def of(self, indexes: Iterable[int]) -> dict[int, NDArray[np.int64]]:
        """Return what is missed of disks, those without left out: int64 (n, 2), sorted, disjoint."""
        return {index: self._rows[index] for index in indexes if index in self._rows}

    def add(self, missed: Mapping[int, NDArray[np.int64]]) -> None:
        """Note ranges, durably. Raises: OSError; then nothing is noted."""
        before = dict(self._rows)
        for index, rows in missed.items():
            if len(rows):
                self._rows[index] = coarse(union(self._rows.get(index, NO_EXTENTS), rows))
        self._save_or(before)

    def forget(self, indexes: Iterable[int]) -> None:
        """Take note that tracking knows, or a new copy has, all that was missed of these disks; durable."""
        before = dict(self._rows)
        for index in indexes:
            self._rows.pop(index, None)
        self._save_or(before)

    def clear(self) -> None:
        """Take note that a new copy of all disks has whatever was missed; durable."""
        before, self._rows = self._rows, {}
        self._save_or(before)

    def _save_or(self, before: dict[int, NDArray[np.int64]]) -> None:
        try:
            self._save()
        except BaseException:
            self._rows = before
            raise

    def _save(self) -> None:
        disks = {index: rows.tolist() for index, rows in self._rows.items()}
        data = msgspec.json.encode(_Record(VERSION, disks))
        write_durably(self._files, self._path, data, clock=self._clock)

    def _read(self, sizes: Mapping[int, int]) -> dict[int, NDArray[np.int64]] | None:
        """Return what the file says, none where there is no file; None where it is damaged."""
        if not self._files.exists(self._path):
            return {}
        file = self._files.open(self._path)
        try:
            data = file.read(0, min(file.size(), _FILE_BYTES_MAX))
        finally:
            file.close()
        try:
            record = msgspec.json.decode(data, type=_Record)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            _LOG.warning("%s is damaged, everything counts as missed: %s", self._path, error)
            return None
        found = {}
        for index, size in sizes.items():
            rows = np.array(record.disks.get(index, []), np.int64).reshape(-1, 2)
            rows = rows[rows[:, 0] < size]
            rows[:, 1] = np.minimum(rows[:, 1], size - rows[:, 0])
            if len(rows):
                found[index] = merge(rows)
        return found


def coarse(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return sorted disjoint ranges that cover `rows`, which are so: at most RANGES_MAX, in larger grains."""
    grain_bytes = _FINEST_BYTES
    while len(rows) > RANGES_MAX:
        grain_bytes *= 2
        starts = rows[:, 0] // grain_bytes * grain_bytes
        ends = -(-rows.sum(axis=1) // grain_bytes) * grain_bytes
        rows = merge(np.column_stack((starts, ends - starts)))
    return rows
