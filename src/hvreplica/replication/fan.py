"""One tracking machine, several replicas: each cut is one instant for all of them.

    tracking ──cut──> STATE/logs/X.hrl ──link──> STATE/replicas/NAME/logs/X.hrl    for one that has the cut
                                       └───────> STATE/replicas/NAME/missed.json   for one that cannot have it

Every replica has a state folder of its own: relationship, generation, queue of cuts, fingerprints. A cut's
logs are durable in the queue of each replica, or what they hold is durable in what it missed, before tracking
forgets any of it: killed anywhere, a change is in the tracking, in a recorded log, or in both, for every
replica.

A replica that missed something gets no further log: what these hold is missed too. Its own next cut marks all
of it as changed, so that this one cut carries it, and from then on it has each cut again.

A log is written once and has a name in each queue. Whoever needs it last gives it to the machine, which
writes over it; others only take their name away.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.extents import NO_EXTENTS, union
from hvreplica.errors import FormatError, NotClosed, TrackingLost
from hvreplica.hrl import LogReader, times_path
from hvreplica.hrl.copy import copy_log
from hvreplica.replication.agreed import AgreedTable
from hvreplica.replication.live import RecordedCut, check_cut, log_extents, record
from hvreplica.replication.shape import point_disks
from hvreplica.replication.state import NIL, PENDING_MAX, cuts
from hvreplica.units import MIB

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from hvreplica.capture.machine import ClosedLog, Cut
    from hvreplica.formats.messages import Consistency
    from hvreplica.replication.missed import Missed
    from hvreplica.replication.state import Transfer
    from hvreplica.replication.work import Work

_LOG = logging.getLogger("hvreplica.replicate")
_HELD_ROWS_MAX = 1 << 16
_WORTH_BYTES = 4 * MIB  # less costs less to ship than to find out what queues hold


@dataclass(frozen=True, slots=True)
class Target:
    """One replica of the VM: its work, and what it missed of cuts."""

    work: Work
    missed: Missed

    @property
    def point_indexes(self) -> set[int]:
        """The disks that its next point has."""
        return {disk.index for disk in point_disks(self.work.state)}

    @property
    def takes_cuts(self) -> bool:
        """Whether it can have the next cut: it has a whole copy, and missed nothing since."""
        return self.work.state.phase == "ready" and not self.missed.of(self.point_indexes)


class Fan:
    """The replicas of one VM. Any thread may call; cuts come one after the other.

    targets: the one whose state folder the machine's is comes first. All share one machine and one `cutting`.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = list(targets)
        self._main = self.targets[0]
        self._releasing = threading.Lock()
        for target in self.targets:
            target.work.fan = self
            assert target.work.cutting is self._main.work.cutting

    def of(self, work: Work) -> Target:
        """Return the target of a work."""
        return next(target for target in self.targets if target.work is work)

    def cut(
        self,
        work: Work,
        *,
        on_ready: Callable[[], bool] = lambda: False,
        on_instant: Callable[[], None] | None = None,
    ) -> RecordedCut:
        """Cut all disks at one instant for every replica; durable in each queue on return.

        work: of the replica that wants it, whose record is returned and which gets all that it missed. For
        the rest see live.cut_live().
        """
        machine = work.machine
        assert machine is not None
        with work.cutting:
            for target in self.targets:
                self._collapse(target)
            check_cut(work)
            asking = self.of(work)
            mark_missed(asking)
            # Before the instant: a copy that is complete after it has newer blocks than the cut.
            takers = [target for target in self.targets if target is asking or target.takes_cuts]
            previous, known = self._previous(takers), self._known(asking)
            consistency: Consistency = "app" if on_ready() else "crash"
            cut = machine.cut(previous, known=known, on_instant=on_instant)
            try:
                transfer = self._record(cut, takers, asking, consistency)
            except BaseException:
                # Whoever has recorded it keeps it, and has the same once more in the next cut.
                machine.give_back(cut, keep_logs=True)
                self._tidy(cut)
                raise
            try:
                machine.settle(cut)
            except OSError as error:  # it is recorded all the same; what is not forgotten is read again
                _LOG.warning("tracking could not take note of a cut: %s", error)
            self._tidy(cut)
            in_point = asking.point_indexes
            entries = tuple(log.entries for log in cut.logs if log.disk_index in in_point)
            return RecordedCut(cut.instant_s, cut.held_us, transfer, entries or (0,) * (transfer is not None))

    def release(self, paths: Iterable[Path]) -> None:
        """Take the name of logs that a replica does not need any more; the last one's file is used again."""
        for path in paths:
            with self._releasing:
                if self._is_named_elsewhere(path):
                    self._main.work.files.unlink(times_path(path))
                    self._main.work.files.unlink(path)
                else:
                    assert self._main.work.machine is not None
                    self._main.work.machine.recycle([path])

    def missed_bytes(self, work: Work) -> int:
        """Return how much a replica missed."""
        return self.of(work).missed.total_bytes

    def miss(self, work: Work, missed: Mapping[int, NDArray[np.int64]]) -> None:
        """Have the next cut that a replica makes carry ranges, by disk; durable on return."""
        with work.cutting:
            self.of(work).missed.add(missed)

    def miss_log(self, work: Work, disk_index: int, path: Path) -> None:
        """Have the next cut that a replica makes carry what a log holds; durable on return."""
        self.miss(work, {disk_index: _extents(work, disk_index, path)})

    def begun_anew(self, work: Work) -> None:
        """Take note that a copy of all disks begins, which has what was missed. `cutting` is held."""
        self.of(work).missed.clear()

    # ---- the steps of a cut

    def _previous(self, takers: Sequence[Target]) -> list[uuid.UUID]:
        """Return for each disk the log that the next one follows: none where that is not one for all.

        A log has one predecessor in its header. A replica accepts none where a chain begins anew; that
        nothing is left out is told by the points.
        """
        lasts = [target.work.previous_log_ids() for target in takers]
        found = []
        for index in self._main.work.indexes:
            ids = {last[index] for last in lasts}
            found.append(ids.pop() if len(ids) == 1 else NIL)
        return found

    def _known(self, asking: Target) -> list[AgreedTable | None] | None:
        """Return what the cut may leave out; None where that is nothing, or not worth to find out.

        The replicas' own threads ship and settle meanwhile. Each queue is looked at once, before the tables:
        what is in it then is not believed, in the tables already or not, and nothing else changes in them as
        long as `cutting` is held.
        """
        held: list[tuple[Target, list[Transfer]]] = []
        for target in self.targets:
            if target is asking or target.work.state.phase != "new":
                queue = _queue(target)
                if queue is None:
                    return None
                held.append((target, queue))
        main = self._main.work
        assert main.machine is not None
        if sum(disk.unlogged_bytes for disk in main.machine.status()) < _WORTH_BYTES and any(
            queue or not target.missed.is_empty for target, queue in held
        ):
            return None
        return [self._agreed(held, place) for place in range(len(main.indexes))]

    def _agreed(self, held: Sequence[tuple[Target, Sequence[Transfer]]], place: int) -> AgreedTable | None:
        """Return what the replicas hold alike of a disk; None where one has no copy of it.

        held: each with what waits for it.
        """
        tables = [target.work.tables[place] for target, _ in held]
        is_whole = all(place in target.work.members for target, _ in held)
        if not is_whole or len({table.block_bytes for table in tables}) > 1:
            return None
        index, disk_bytes = self._main.work.indexes[place], self._main.work.disks[place].virtual_bytes
        uncertain = NO_EXTENTS
        for target, queue in held:
            uncertain = union(uncertain, target.missed.of([index]).get(index, NO_EXTENTS))
            for transfer in queue:
                uncertain = union(uncertain, _cut_off(transfer, index, disk_bytes))
                for log in transfer.logs:
                    if log.disk_index == index:
                        path = target.work.folder.log_path(log.log_id)
                        uncertain = union(uncertain, _extents(target.work, index, path))
        return AgreedTable(tables, uncertain, disk_bytes=disk_bytes)

    def _record(
        self, cut: Cut, takers: Sequence[Target], asking: Target, consistency: Consistency
    ) -> Transfer | None:
        """Record a cut in each queue, and what it holds where it cannot be queued; durable on return."""
        recorded = None
        for target in reversed(self.targets):  # the one in whose folder the machine left the logs comes last
            logs, others = cut.logs, cut.logs
            if target in takers:
                in_point = target.point_indexes
                logs = [log for log in cut.logs if log.disk_index in in_point]
                others = [log for log in cut.logs if log.disk_index not in in_point]
            if target.work.state.phase != "new":
                _miss(target, others)
            if target not in takers:
                continue
            for log in logs:
                self._name(target.work, log)
            transfer = record(target.work, cut, logs, consistency)
            recorded = transfer if target is asking else recorded
        return recorded

    def _name(self, work: Work, log: ClosedLog) -> None:
        """Give a log a name in a replica's queue; a file of its own where that cannot be."""
        path = work.folder.log_path(log.log_id)
        if path == log.path:
            return
        if work.files.exists(times_path(log.path)):
            work.files.link(times_path(log.path), times_path(path))  # without it, points are of whole seconds
        if work.files.link(log.path, path):
            return
        with LogReader(work.files, log.path) as reader:
            copy_log(work.files, reader, path, previous_log_id=log.previous_log_id)

    def _tidy(self, cut: Cut) -> None:
        """Take the names of the cut's logs in folders whose state does not name them."""
        for target in self.targets:
            work = target.work
            with work.lock:
                named = {log.log_id for transfer in cuts(work.state) for log in transfer.logs}
            spare = [log.log_id for log in cut.logs if log.log_id not in named]
            try:
                self.release(work.folder.log_path(log_id) for log_id in spare)
            except OSError as error:
                _LOG.warning("a log that nobody needs any more stays: %s", error)

    def _is_named_elsewhere(self, path: Path) -> bool:
        folders = (target.work.folder.logs for target in self.targets)
        return any(
            folder != path.parent and self._main.work.files.exists(folder / path.name) for folder in folders
        )

    def _collapse(self, target: Target) -> None:
        """Drop a queue that is full or too large: what it holds is missed until the replica's next cut."""
        work = target.work
        assert work.machine is not None
        with work.lock:  # until they are dropped: the logs of a cut that goes its way may be written over
            waiting = list(work.state.pending)
            held_bytes = sum(log.log_bytes for transfer in waiting for log in transfer.logs)
            if held_bytes <= work.machine.budget_bytes and len(waiting) < PENDING_MAX:
                return
            _LOG.warning(
                "%s: %d cuts that wait have %d bytes of logs: they become one with its next cut",
                work.folder.folder,
                len(waiting),
                held_bytes,
            )
            missed: dict[int, NDArray[np.int64]] = {}
            paths = []
            for log in (log for transfer in waiting for log in transfer.logs):
                paths.append(work.folder.log_path(log.log_id))
                rows = _extents(work, log.disk_index, paths[-1])
                missed[log.disk_index] = union(missed.get(log.disk_index, NO_EXTENTS), rows)
            target.missed.add(missed)
            work.state.pending = []
            work.save()
        self.release(paths)


def _queue(target: Target) -> list[Transfer] | None:
    """Return what waits for a replica, at a moment when its tables say all else that it holds; None where
    there is no such moment now: it has no whole copy, or something is on its way that the tables follow.
    """
    work = target.work
    if work.state.phase != "ready":
        return None
    try:
        work.open_tables()
        with work.lock:
            if work.state.phase != "ready" or work.state.transfer is not None:
                return None
            work.check_tables()
            return list(work.state.pending)
    except TrackingLost:
        return None


def _cut_off(transfer: Transfer, disk_index: int, disk_bytes: int) -> NDArray[np.int64]:
    """Return what a replica's disk loses where it becomes as short as the disk was at an earlier cut."""
    sizes = [disk.virtual_bytes for disk in transfer.disks if disk.index == disk_index]
    if not sizes or sizes[0] >= disk_bytes:
        return NO_EXTENTS
    return np.array([[sizes[0], disk_bytes - sizes[0]]], np.int64)


def mark_missed(target: Target) -> None:
    """Have the next cut carry what a replica missed of the disks that its next point has."""
    if target.work.state.phase != "ready":
        return
    missed = target.missed.of(target.point_indexes)
    _mark(target, missed)
    if missed:
        target.missed.forget(missed)


def mark_all_missed(target: Target) -> None:
    """Have tracking know all that a replica missed; from now on it is the only one.

    Also while a first copy is on its way, of the VM or of a disk: it goes on behind what it has read, and
    what was missed before that is in no cut.
    """
    if not target.missed.is_empty:
        _mark(target, target.missed.of(target.work.indexes))
        target.missed.clear()


def _mark(target: Target, missed: Mapping[int, NDArray[np.int64]]) -> None:
    """Have tracking know ranges, by disk; durable on return."""
    work = target.work
    assert work.machine is not None
    for index, rows in missed.items():
        if index in work.indexes:
            size = work.state.disks[index].virtual_bytes
            inside = rows[rows[:, 0] < size]
            lengths = np.minimum(inside[:, 1], size - inside[:, 0])
            work.machine.mark(index, np.column_stack((inside[:, 0], lengths)))


def _miss(target: Target, logs: Sequence[ClosedLog]) -> None:
    """Note what logs hold as missed by a replica, durably."""
    if logs:
        missed = {log.disk_index: _extents(target.work, log.disk_index, log.path) for log in logs}
        target.missed.add(missed)


def _extents(work: Work, disk_index: int, path: Path) -> NDArray[np.int64]:
    """Return what a log holds of a disk, sorted and disjoint; the whole disk where it cannot be read."""
    if disk_index not in work.indexes:
        return NO_EXTENTS  # the VM no longer has it
    disk_bytes = work.state.disks[disk_index].virtual_bytes
    rows, new, count = NO_EXTENTS, [NO_EXTENTS], 0
    try:
        for extents in log_extents(work.files, path, disk_bytes):
            new.append(extents)
            count += len(extents)
            if count >= _HELD_ROWS_MAX:
                rows, new, count = union(rows, np.concatenate(new)), [NO_EXTENTS], 0
    except (FileNotFoundError, FormatError, NotClosed) as error:
        _LOG.warning("the next cut looks at the whole disk %d: %s", disk_index, error)
        return np.array([[0, disk_bytes]], np.int64)
    return union(rows, np.concatenate(new))
