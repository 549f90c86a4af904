"""Make a point of any instant between two cycles, from the logs that were kept and the point before.

    points    A (kept)         B            K          the cycle wanted leads from B to K
    logs          A to B           B to K
    new       A, then all of A to B, then the entries of B to K that are stamped up to the instant

The new point X comes right behind the kept point A that it is made from. Its undo part holds, in all ranges
that A's parts cover, what A had there with the entries laid over it; elsewhere nothing changed between A and
the next kept point, and reads go on there. So A's own parts stay as they are, no disk is copied, and nothing
is overwritten. Entries carry whole seconds: an instant without parts of a second means its end. With them,
and for flushes of the guest, the times beside the logs say how many entries come first (store/moment.py).

The kept logs of whole cycles may be in any order. The one that is cut must hold each write of its cycle in
the guest's order: otherwise the point would show later writes without earlier ones.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.clock import hrl_timestamp
from hvreplica.disk.extents import NO_EXTENTS, clipped, difference, merge, spans_of, widened
from hvreplica.errors import Locked, StoreError
from hvreplica.formats.hrl import FILE_TYPE_UNDO
from hvreplica.hrl import LogReader, LogWriter
from hvreplica.store.apply import finish, is_cut
from hvreplica.store.check import file_length
from hvreplica.store.digest import Digest, DigestReader
from hvreplica.store.instant_plan import Plan, plan_instant
from hvreplica.store.kept_logs import kept_log_path
from hvreplica.store.moment import SECOND_US
from hvreplica.store.old_data import append_old
from hvreplica.store.open_point import open_point
from hvreplica.store.point_index import DISK, ZEROS, PointIndex, rows_of
from hvreplica.store.points_kept import part_path
from hvreplica.store.records import PointRow, UndoRow, validate_instant
from hvreplica.store.room import room
from hvreplica.store.undo import log_extents

if TYPE_CHECKING:
    import uuid
    from typing import Any

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.store.home import VmHome
    from hvreplica.store.moment import Moment
    from hvreplica.store.point_disk import PointDisk

_TRIES = 5
_CLOCK_BACK_S_MAX = 2  # threads stamp at the same time; more than this is a clock that was set back


class InstantDisk:
    """A disk of a point with log entries laid over it, for reading. Any thread may read."""

    def __init__(self, base: PointDisk, logs: list[tuple[LogReader, list[NDArray[Any]]]]) -> None:
        """Lay logs over the disk, the oldest first, each with the entries that count; they stay open."""
        self.path = base.path
        self.virtual_bytes = base.virtual_bytes
        self._base = base
        self._files = [reader.file for reader, _ in logs]
        rows = [rows_of(entries) for _, entries in logs]
        # The newest log first: what comes first in the walk wins.
        newest_first = [(number, rows[number]) for number in range(len(rows) - 1, -1, -1)]
        index = PointIndex.empty(self.virtual_bytes)
        self._tiles = (index.under(newest_first) if newest_first else index).tiles()

    def read_extents(self, extents: NDArray[Any], out: Buffer) -> None:
        """Fill `out` with the extents (disk_offset, length), one after another."""
        pieces, numbers = self._tiles.split(spans_of(np.asarray(extents, np.int64)))
        for number in np.unique(numbers).tolist():
            rows = pieces[numbers == number]
            if number == DISK:
                self._base.read_spans(rows[:, :3], out)
            elif number == ZEROS:
                wanted = np.column_stack((np.full(len(rows), -1, np.int64), rows[:, 1:3]))
                native.read_pieces(self._files[0], wanted, out)
            else:
                native.read_pieces(self._files[number], rows[:, [3, 1, 2]], out)

    def extents(self, start: int, end: int) -> NDArray[np.int64]:
        """Return what may hold data between `start` and `end`."""
        return self._tiles.held(self._base.extents(start, end), start, end)


@dataclass(slots=True)
class _Part:
    """What one disk of the new point needs. own: the parts of the point before, as they were when read.

    part: None where nothing of the disk changed. change: from the point before to the new one; None where it
    is not known. entries: of the last cycle's log, those that are in the new point.
    """

    own: list[UndoRow]
    part: UndoRow | None
    change: Digest | None
    entries: int


@dataclass(frozen=True, slots=True)
class Made:
    """A point, and how it came to be.

    entries: of the last cycle's logs, those that it has; None where it was there. is_flush: whether the guest
    asked for a flush at its time. is_coarse: whether the parts of seconds were wanted and are not known.
    """

    point: PointRow
    entries: int | None
    is_flush: bool
    is_coarse: bool


def make_point_at(home: VmHome, instant_s: float, *, flush: bool = False) -> PointRow:
    """Return a new point of kind manual that shows the instant; durable. The one that is there, if one is.

    Without parts of a second it means the end of its second. With them the last moment is taken that is known
    at or before it, or where the times of a log are lost the end of the last second. flush: the last flush of
    the guest at or before the instant. Works beside the process that serves the store. Raises: NoSuchPoint
    where the instant is outside of what was kept, or no flush is known; StoreError where the logs do not lead
    there in the order of the guest's writes, FormatError for a damaged log, Locked while the disks are
    changed, StoreFull.
    """
    return make_instant(home, instant_s, flush=flush).point


def make_instant(home: VmHome, instant_s: float, *, flush: bool = False) -> Made:
    """Do what make_point_at() says, and tell more of it."""
    validate_instant(instant_s)
    for left in range(_TRIES - 1, -1, -1):
        with home.exclusive():
            if is_cut(home):
                finish(home)
            plan = plan_instant(home, instant_s, flush=flush)
            is_flush, is_coarse = plan.moment.is_flush, plan.is_coarse
            if plan.is_there:
                return Made(plan.base, None, is_flush, is_coarse)
            made = _make(home, plan)
        if made is not None:
            return Made(*made, is_flush, is_coarse)
        if not left:
            break
    raise Locked("points around the instant come and go", path=home.paths.folder, hint="try again")


def _make(home: VmHome, plan: Plan) -> tuple[PointRow, int] | None:
    """Make the point; return it and how many entries of its cycle it has.

    None where the point before was given other parts meanwhile.
    """
    point_id = home.clock.guid()
    parts: dict[int, _Part] = {}
    may_count = False
    try:
        with open_point(home, plan.base.id) as opened:
            for index, disk in opened.disks.items():
                parts[index] = _make_part(home, plan, point_id, index, disk)
            if any(each.part is not None for each in parts.values()):
                home.files.sync_directory(home.paths.points)
            may_count = True  # after an error of the catalog too: its change may show up after a restart
            try:
                row = _record(home, plan, point_id, parts)
            except Locked:
                may_count = False
                raise
            may_count = row is not None
    finally:
        if not may_count:
            for each in parts.values():
                if each.part is not None:
                    with contextlib.suppress(OSError):
                        home.files.unlink(home.paths.undo(each.part.id))
    return None if row is None else (row, sum(each.entries for each in parts.values()))


def _make_part(
    home: VmHome,
    plan: Plan,
    point_id: uuid.UUID,
    index: int,
    base: PointDisk,
) -> _Part:
    own = home.catalog.undo_rows(home.vm_id, point_id=plan.base.id, disk_index=index)
    undo = _before_whole(own)
    covered = [NO_EXTENTS]
    for row in undo:
        covered += log_extents(home, part_path(home, row), FILE_TYPE_UNDO)
    extents = _within(merge(np.concatenate(covered)), base.virtual_bytes)
    count = 0
    with contextlib.ExitStack() as stack:
        logs = []
        for log in plan.logs_of(index):
            path = kept_log_path(home, log)
            try:
                reader = stack.enter_context(LogReader(home.files, path))
            except FileNotFoundError as error:
                raise StoreError("a kept log is missing", path=path, hint="see `store verify`") from error
            tables = list(reader.entries(disk_bytes=base.virtual_bytes))
            if log.point_id == plan.end.id:
                tables = _until(reader, tables, plan.moment, log.log_id)
                count += sum(map(len, tables))
            logs.append((reader, tables))
        _require_covered(home, plan, logs, extents, base.virtual_bytes)
        if not len(extents):
            return _Part(own, None, Digest(), count)
        disk = InstantDisk(base, logs)
        part = _write_part(home, point_id, index, disk, extents)
        change = DigestReader(disk).of_extents(extents) + -DigestReader(base).of_extents(extents)
    return _Part(own, part, change, count)


def _within(extents: NDArray[np.int64], end: int) -> NDArray[np.int64]:
    inside, _ = clipped(spans_of(extents), end)
    return np.ascontiguousarray(inside[:, :2])


def _before_whole(parts: list[UndoRow]) -> list[UndoRow]:
    wholes = [place for place, row in enumerate(parts) if row.kind == "whole"]
    return parts[: min([*wholes, len(parts)])]


def _until(
    reader: LogReader, tables: list[NDArray[Any]], moment: Moment, log_id: uuid.UUID
) -> list[NDArray[Any]]:
    """Return the entries that come until the moment, oldest first."""
    if moment.entries is not None:
        left, found = moment.entries[log_id], []
        for table in tables:
            found.append(table[:left])
            left -= len(found[-1])
        return found
    return _until_second(reader, tables, moment.time_us // SECOND_US)


def _until_second(reader: LogReader, tables: list[NDArray[Any]], until_s: int) -> list[NDArray[Any]]:
    """Return the entries that are stamped with this second or an earlier one."""
    found, newest = [], 0
    for table in tables:
        stamps = table["time_stamp"].astype(np.int64)
        back_s = np.maximum.accumulate(np.concatenate(([newest], stamps)))[1:] - stamps
        if len(stamps) and int(back_s.max()) > _CLOCK_BACK_S_MAX:
            raise StoreError(
                "the primary's clock was set back in this cycle: its log has no order of time",
                path=reader.path,
                actual=f"{int(back_s.max())} s",
                hint="choose an instant of another cycle, or one of the points, see `point list`",
            )
        newest = max(newest, int(stamps.max(initial=0)))
        found.append(table[stamps <= hrl_timestamp(until_s)])
    return found


def _require_covered(
    home: VmHome,
    plan: Plan,
    logs: list[tuple[LogReader, list[NDArray[Any]]]],
    extents: NDArray[np.int64],
    disk_bytes: int,
) -> None:
    """Hold the logs to what the point's parts say changed after it: it must lie on one line with them."""
    touched = [
        np.column_stack((table["byte_offset"], table["data_length"])).astype(np.int64)
        for _, tables in logs
        for table in tables
    ]
    if not touched:
        return
    pages = widened(merge(np.concatenate(touched)), start=0, end=disk_bytes)
    if len(difference(pages, widened(extents, start=0, end=disk_bytes))):
        raise StoreError(
            f"point {plan.base.id} of VM {home.name!r} does not lie on one line with the logs behind it",
            path=home.paths.folder,
            hint="a failover came between; choose one of the points, see `point list`",
        )


def _write_part(
    home: VmHome, point_id: uuid.UUID, index: int, disk: InstantDisk, extents: NDArray[np.int64]
) -> UndoRow:
    part_id = home.clock.guid()
    partial, path = home.paths.partial_undo(part_id), home.paths.undo(part_id)
    covered_bytes = int(extents[:, 1].sum())
    with room(home.files, partial, covered_bytes):
        try:
            writer = LogWriter.create_undo(
                home.files, partial, part_id=part_id, log_id=None, data_write_guid=None, clock=home.clock
            )
            with writer:
                append_old(writer, disk, extents)
            home.files.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                home.files.unlink(partial)
            raise
    return UndoRow(point_id, index, part_id, "undo", file_length(home.files, path), covered_bytes)


def _record(home: VmHome, plan: Plan, point_id: uuid.UUID, parts: dict[int, _Part]) -> PointRow | None:
    """Let the point count, in one transaction; None where what it was made from has changed."""
    catalog, vm_id, now_s = home.catalog, home.vm_id, home.clock.now_s()
    with catalog.transaction():
        for index, each in parts.items():
            if catalog.undo_rows(vm_id, point_id=plan.base.id, disk_index=index) != each.own:
                return None
        row = PointRow(
            id=point_id,
            sequence=plan.base.sequence + 1,
            instant_s=plan.instant_s,
            kind="manual",
            consistency="crash",
            state="complete",
            previous_id=plan.before_id,
            bytes=0,
            received_s=now_s,
            applied_s=now_s,
        )
        catalog.insert_point_behind(vm_id, plan.base.id, row)
        catalog.set_members(vm_id, point_id, catalog.members(vm_id, plan.base.id))
        for each in parts.values():
            _hand_over(home, point_id, each)
    return row


def _hand_over(home: VmHome, point_id: uuid.UUID, each: _Part) -> None:
    """Add the new part, and split what is known of digests between it and the parts before it.

    What the parts of the point before change, together, is the way to the next kept point. From now on they
    lead to the new point, and its part leads on. A whole disk behind them goes to the new point, which comes
    first in the walk.
    """
    catalog, vm_id = home.catalog, home.vm_id
    undo = _before_whole(each.own)
    if each.part is not None:
        catalog.add_undo(vm_id, each.part)
        changes = [row.digest_change for row in undo]
        if each.change is not None and None not in changes:
            onward = -each.change
            for change in changes:
                onward += Digest.of_hex(change or "")
            catalog.set_digest_change(vm_id, each.part.id, onward.hex())
            last = Digest.of_hex(undo[-1].digest_change or "") + -onward
            catalog.set_digest_change(vm_id, undo[-1].id, last.hex())
    for row in each.own[len(undo) :]:
        catalog.move_part(vm_id, row.id, point_id)
