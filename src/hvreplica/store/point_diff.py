"""In which ranges two recovery points differ.

What one point has and the next has not is in the undo parts of the points between them, so only that is
looked at; where a whole disk was replaced between them, all that either holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from hvreplica import native
from hvreplica.disk.extents import NO_EXTENTS, batches, data_windows, merge, select_runs
from hvreplica.disk.parallel import Scratch, map_ordered
from hvreplica.store.open_point import open_point
from hvreplica.store.since import written_between
from hvreplica.units import MIB

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from hvreplica.store.home import VmHome
    from hvreplica.store.open_point import OpenPoint
    from hvreplica.store.point_disk import PointDisk

_BATCH_BYTES = 4 * MIB
_SECTOR_BYTES = 512


class DiskDiff(msgspec.Struct, frozen=True):
    """One disk. a_bytes, b_bytes: its size at either point, None where the point does not have it.

    ranges: [offset, length] in bytes, in order; changed_bytes: in all of them. What only the longer one has
    is changed; a disk that only one point has is not listed by ranges.
    """

    disk: int
    a_bytes: int | None
    b_bytes: int | None
    changed_bytes: int
    ranges: list[tuple[int, int]]


class PointDiff(msgspec.Struct, frozen=True):
    """Where the points `a` and `b` differ. exact: sectors whose bytes differ, else ranges that may differ."""

    vm: str
    a: str
    b: str
    exact: bool
    disks: list[DiskDiff]


def diff_points(home: VmHome, a: uuid.UUID | str, b: uuid.UUID | str, *, coarse: bool = False) -> PointDiff:
    """Return the ranges in which the points `a` and `b` differ, whichever is older.

    coarse: what was written between them, without comparing any bytes. Raises: as open_point().
    """
    with open_point(home, a) as first, open_point(home, b) as second:
        indexes = sorted(first.disks.keys() | second.disks.keys())
        return PointDiff(
            vm=home.name,
            a=str(first.id),
            b=str(second.id),
            exact=not coarse,
            disks=[_diff_disk(home, first, second, index, coarse=coarse) for index in indexes],
        )


def _diff_disk(home: VmHome, a: OpenPoint, b: OpenPoint, index: int, *, coarse: bool) -> DiskDiff:
    first, second = a.disks.get(index), b.disks.get(index)
    rows = NO_EXTENTS
    if first is not None and second is not None:
        older, newer = (a, b) if a.row.sequence <= b.row.sequence else (b, a)
        common = min(first.virtual_bytes, second.virtual_bytes)
        rows = _candidates(home, older, newer, index, common)
        if not coarse:
            rows = _different(first, second, rows)
        tail = max(first.virtual_bytes, second.virtual_bytes) - common
        rows = merge(np.concatenate((rows, np.array([[common, tail]], np.int64))))
    return DiskDiff(
        disk=index,
        a_bytes=None if first is None else first.virtual_bytes,
        b_bytes=None if second is None else second.virtual_bytes,
        changed_bytes=int(rows[:, 1].sum()),
        ranges=[(offset, length) for offset, length in rows.tolist()],
    )


def _candidates(home: VmHome, older: OpenPoint, newer: OpenPoint, index: int, end: int) -> NDArray[np.int64]:
    """Return what was written to a disk between two points, up to `end`; all that they hold, if not known."""
    rows = written_between(home, older.id, newer.id, index)
    if rows is None:
        rows = np.concatenate([_all_extents(each.disks[index]) for each in (older, newer)])
    rows = rows[rows[:, 0] < end]
    return merge(np.column_stack((rows[:, 0], np.minimum(rows[:, 1], end - rows[:, 0]))))


def _all_extents(disk: PointDisk) -> NDArray[np.int64]:
    return np.concatenate([NO_EXTENTS, *(rows for _, _, rows in data_windows(disk, 0, disk.virtual_bytes))])


def _different(a: PointDisk, b: PointDisk, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sectors of `rows` whose bytes differ."""
    a_scratch, b_scratch = Scratch(_BATCH_BYTES), Scratch(_BATCH_BYTES)

    def compare(batch: NDArray[np.int64]) -> NDArray[np.int64]:
        length = int(batch[:, 1].sum())
        first, second = a_scratch.take(length), b_scratch.take(length)
        a.read_extents(batch, first.data)
        b.read_extents(batch, second.data)
        runs = native.changed_runs(first.data, second.data, _SECTOR_BYTES)
        return select_runs(batch, runs) if len(runs) else NO_EXTENTS

    found: Iterator[NDArray[np.int64]] = map_ordered(compare, batches(rows, _BATCH_BYTES))
    return merge(np.concatenate([NO_EXTENTS, *found]))
