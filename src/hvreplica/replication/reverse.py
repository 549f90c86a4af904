"""Make a VM that was failed over to this site its primary: the old primary takes only what differs.

    what this side wrote since the fork  ─┐
    what the old primary wrote after it  ─┴─ union: not known there; all else is equal on both sides

The fingerprint tables are made from this side's own disks, with the union in them as "not known". So the
first cycle is one log with the union in it, applied with undo like any other, and all that comes later is as
usual. Where one of the two halves is lost, the tables come from the old primary's disk itself, as in a
resync.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.disk.extents import NO_EXTENTS, union, widened
from hvreplica.errors import FailoverRefused, ReplicaDiverged
from hvreplica.formats import messages
from hvreplica.formats.fingerprint import FINGERPRINT_BYTES
from hvreplica.formats.ranges import unpack_rows
from hvreplica.progress import Progress
from hvreplica.replication.resync import fill_from_replica
from hvreplica.replication.shape import adopt
from hvreplica.replication.sources import new_buffer
from hvreplica.replication.stopped import PREPARE_REVISION
from hvreplica.store.since import changed_above, changed_between, newest_known
from hvreplica.tracking.window import windows_with_data

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hvreplica.disk import Disk
    from hvreplica.replication.session import ReplicaSession
    from hvreplica.replication.work import Work
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import PointRow
    from hvreplica.tracking.fingerprints import FingerprintTable

_ROWS_MAX = 1 << 16


@dataclass(slots=True)
class Reversal:
    """The first meeting with the old primary. union_bytes: of all disks so far; those of others are compared.

    compared: the disks of which nobody knows what was written at one of the sides.
    """

    home: VmHome
    union_bytes: int = 0
    compared: list[int] = field(default_factory=list)

    def agree(self, work: Work, session: ReplicaSession, claimed: messages.Claimed) -> None:
        """Make tables and state say what the old primary's disks hold now. Repeatable until it returns.

        Raises: FailoverRefused, ReplicaDiverged, TransportError, StoreError.
        """
        session.require_revision(PREPARE_REVISION, "the way back")
        address = work.required_link.address
        if claimed.adopted is None or claimed.last_point is None:
            raise FailoverRefused(
                "there is no replica made of this VM's old primary",
                path=address,
                hint="make it one with `hvreplica store adopt` at that site",
            )
        if claimed.damage:
            raise ReplicaDiverged(
                f"the old primary's disks are damaged: {'; '.join(claimed.damage)}",
                path=address,
                hint="replicate to that site from the start instead, into a store without this VM",
            )
        self.union_bytes, self.compared = 0, []
        with work.lock:
            adopt(work.state, claimed)
            work.save()
        known = set(claimed.adopted.points) if claimed.adopted.is_known else set()
        fork = newest_known(self.home, known)
        work.create_tables()
        work.within = {}
        held = {disk.index: disk.virtual_bytes or 0 for disk in claimed.disks}
        for place in work.members:
            self._fill(work, session, place, fork, held[work.indexes[place]])
            work.tables[place].mark(claimed.last_point)
        with work.lock:
            work.state.last_point, work.state.stopped = claimed.last_point, None
            work.save()

    def _fill(
        self, work: Work, session: ReplicaSession, place: int, fork: PointRow | None, held_bytes: int
    ) -> None:
        index, disk, table = work.indexes[place], work.disks[place], work.tables[place]
        ours = None if fork is None else self._ours(disk, index, fork)
        theirs = None if ours is None else _theirs(session, index, held_bytes)
        if ours is None or theirs is None:
            self.compared.append(index)
            fill_from_replica(work, session, place)
            return
        rows = widened(union(ours, theirs), start=0, end=disk.virtual_bytes)
        if disk.virtual_bytes > held_bytes:
            # It grows there by zeros, and what is here may have been cut off there.
            grown = np.array([[held_bytes, disk.virtual_bytes - held_bytes]], np.int64)
            rows = widened(union(rows, grown), start=0, end=disk.virtual_bytes)
        _fill_table(work, disk, table, rows)
        work.within[index] = rows
        self.union_bytes += int(rows[:, 1].sum())

    def _ours(self, disk: Disk, index: int, fork: PointRow) -> NDArray[np.int64] | None:
        between = changed_between(self.home, fork, index, disk.virtual_bytes)
        if between is None:
            return None
        return union(between, changed_above(disk, self.home.paths.disk(index)))


def _theirs(session: ReplicaSession, index: int, disk_bytes: int) -> NDArray[np.int64] | None:
    """Return what the old primary wrote; None where it does not know, and names the whole disk."""
    rows, at, is_last = NO_EXTENTS, 0, False
    while not is_last:
        answer = session.ask(messages.ChangesRequest(index, at), messages.Changes)
        found = unpack_rows(answer.ranges, virtual_bytes=disk_bytes, start=at)
        rows = np.concatenate((rows, found))
        is_last = answer.is_last or not len(found)
        at = int(rows[-1].sum()) if len(rows) else 0
    if len(rows) == 1 and rows[0].tolist() == [0, disk_bytes]:
        return None
    return rows


def _fill_table(work: Work, disk: Disk, table: FingerprintTable, rows: NDArray[np.int64]) -> None:
    """Say of `rows` that they are not known, and of the rest what the disk holds."""
    buffer, done_bytes = new_buffer(), 0
    for offset, length in windows_with_data((disk.extents,), 0, disk.virtual_bytes):
        content = buffer[:length]
        disk.read_into(content, offset)
        table.write(offset // table.block_bytes, native.fingerprints(content, table.block_bytes))
        done_bytes = offset + length
        work.on_progress(Progress("compare", done_bytes, disk.virtual_bytes, raw_bytes=done_bytes))
    unknown = np.full((_ROWS_MAX, FINGERPRINT_BYTES), 255, np.uint8)
    for start, length in rows.tolist():
        first, last = start // table.block_bytes, -(-(start + length) // table.block_bytes)
        for at in range(first, last, _ROWS_MAX):
            table.write(at, unknown[: min(_ROWS_MAX, last - at)])
