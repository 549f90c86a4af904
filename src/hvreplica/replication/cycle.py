"""One cycle: find what changed by comparison, close it as logs, ship them, and let the fingerprints follow.

What live tracking found is cut in replication/live.py and goes the same way from there.

The stages of the transfer in state.json say where a call that was cut off left: "cutting" logs are thrown
away, "cut" logs are shipped, "acknowledged" logs only have to be taken into the fingerprints.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING

from hvreplica.errors import FormatError, LogError, TrackingLost
from hvreplica.formats import messages
from hvreplica.formats.times import unpack_times
from hvreplica.hrl import LogWriter, read_times_file, times_path
from hvreplica.progress import Progress
from hvreplica.replication.follow import follow_log
from hvreplica.replication.results import ShippedLog
from hvreplica.replication.shape import differs, point_disks, settled
from hvreplica.replication.sources import LogSource
from hvreplica.replication.state import NIL, CutLog, Transfer
from hvreplica.tracking.compare import ComparedDisk

if TYPE_CHECKING:
    from hvreplica.replication.session import ReplicaSession
    from hvreplica.replication.work import Work

_LOG = logging.getLogger("hvreplica.replicate")
_COMPARE_WORKERS = 2


def cut(work: Work, consistency: messages.Consistency = "crash") -> bool:
    """Compare every disk with its fingerprints; return whether logs were cut and wait to be shipped.

    Disks that are a recovery point say themselves which instant they show, and make a point of their own
    also where nothing differs.
    """
    state, origin = work.state, work.origin
    transfer = Transfer(
        kind="logs",
        stage="cutting",
        transfer_id=work.clock.guid(),
        point_id=work.clock.guid(),
        instant_s=work.instant_s,
        positions=[],
        consistency=consistency if origin is None else origin.consistency,
        source_point=None if origin is None else origin.point_id,
    )
    state.transfer = transfer
    work.save()
    if origin is not None:
        work.within = origin.within(state)
    progress = _CompareProgress(work)
    logs = [_cut_disk(work, place, progress) for place in work.members]
    # A replica whose copy is of several instants needs logs to become one, as it does to have other disks.
    is_needed = state.mixed or differs(state) or transfer.source_point != state.source_point
    transfer.logs = [log for log in logs if log.changed_bytes] or logs[: int(is_needed)]
    transfer.disks = point_disks(state)
    if not transfer.logs:
        work.within = {}
        state.transfer = None
        work.save()
        work.sweep_logs()
        return False
    work.within = {}
    work.sweep_logs()
    work.files.sync_directory(work.folder.logs)
    transfer.positions = [0] * len(transfer.logs)
    transfer.stage = "cut"
    work.save()
    return True


def drop_unfinished(work: Work) -> None:
    """Throw away the logs of a comparison that was cut off."""
    with work.lock:
        transfer = work.state.transfer
        if transfer is None or transfer.stage != "cutting":
            return
        work.state.transfer = None
        work.save()
    work.sweep_logs()


def ship(work: Work, session: ReplicaSession, transfer: Transfer) -> None:
    """Bring the cut logs to the replica; on return it has them durably, and so it is recorded."""
    question = messages.BeginLogs(
        transfer_id=transfer.transfer_id,
        point_id=transfer.point_id,
        previous_point_id=work.state.last_point or NIL,
        instant_s=transfer.instant_s,
        logs=[
            messages.LogShape(log.disk_index, log.log_id, log.previous_log_id, log.log_bytes, log.is_ordered)
            for log in transfer.logs
        ],
        positions=transfer.positions,
        disks=transfer.disks or point_disks(work.state),
        kind=transfer.point_kind,
        consistency=transfer.consistency,
    )
    answer = session.ask_either(question, messages.Ready, messages.AlreadyHave)
    if isinstance(answer, messages.Ready):
        work.resume(transfer, answer.positions)
        _send_times(work, session, transfer)
        with contextlib.ExitStack() as stack:
            opened = []
            for log in transfer.logs:
                file = work.files.open(work.folder.log_path(log.log_id))
                stack.callback(file.close)
                opened.append((file, log.log_bytes))
            work.ship(session, LogSource(opened, transfer.positions), transfer, phase="ship")
    transfer.stage = "acknowledged"
    work.save()


def _send_times(work: Work, session: ReplicaSession, transfer: Transfer) -> None:
    """Tell the replica when the entries of logs came, where that is known and it understands."""
    if session.revision < messages.TIMES_REVISION:
        return
    for log in transfer.logs:
        path = times_path(work.folder.log_path(log.log_id))
        if not work.files.exists(path):
            continue
        try:
            data = read_times_file(work.files, path)
            unpack_times(data, log_id=log.log_id)
        except (OSError, FormatError) as error:
            _LOG.warning("the replica is not told the parts of seconds of a log: %s: %s", path, error)
        else:
            session.ask(messages.LogTimes(log.log_id, data), messages.Noted)


def settle(work: Work, transfer: Transfer) -> None:
    """Let the fingerprints follow the acknowledged logs, then forget the logs. Repeatable."""
    state = work.state
    places = {index: place for place, index in enumerate(work.indexes)}
    for log in transfer.logs:
        state.disks[log.disk_index].last_log_id = log.log_id
        work.tally.shipped.append(ShippedLog(str(log.log_id), str(work.folder.log_path(log.log_id))))
        place = places.get(log.disk_index)
        if place is not None:  # else the disk has left since
            _follow(work, log, place)
            work.tally.changed_bytes[place] += log.changed_bytes
    work.fit_tables(transfer.disks)
    for place in work.members:
        work.tables[place].mark(transfer.point_id)
    if work.tally.kind == "none":
        work.tally.kind = "delta"
    with work.lock:
        settled(state, transfer)
        state.last_point, state.transfer, state.mixed = transfer.point_id, None, False
        state.source_point = transfer.source_point
        work.save()
    work.forget_logs(transfer)


def _follow(work: Work, log: CutLog, place: int) -> None:
    path = work.folder.log_path(log.log_id)
    try:
        follow_log(work.files, path, work.tables[place])
    except (FormatError, LogError, FileNotFoundError) as error:
        raise TrackingLost(
            f"the replica has this log, but it cannot be read here any more: {error}",
            path=path,
            hint="run replicate --once --resync: it asks the replica what it holds and sends what differs",
        ) from None


def _cut_disk(work: Work, place: int, progress: _CompareProgress) -> CutLog:
    disk, index = work.disks[place], work.indexes[place]
    previous_log_id = work.state.disks[index].last_log_id
    log_id = work.clock.guid()
    writer = LogWriter.create(
        work.files,
        work.folder.log_path(log_id),
        log_id=log_id,
        previous_log_id=previous_log_id,
        data_write_guid=disk.data_write_guid,
        clock=work.clock,
    )
    with writer:
        source = ComparedDisk(
            disk, work.tables[place], workers=_COMPARE_WORKERS, within=work.within.get(index)
        )
        changed_bytes = source.changes_into(writer, on_read=progress.add)
        summary = writer.close()
    return CutLog(index, log_id, previous_log_id, summary.log_bytes, changed_bytes)


class _CompareProgress:
    """Adds up what all disks' comparisons have looked at; told from their threads, one at a time."""

    def __init__(self, work: Work) -> None:
        self._on_progress = work.on_progress
        self._total_bytes = sum(work.disks[place].virtual_bytes for place in work.members)
        self._done_bytes = 0
        self._lock = threading.Lock()

    def add(self, length: int) -> None:
        with self._lock:
            self._done_bytes += length
            self._on_progress(
                Progress("compare", self._done_bytes, self._total_bytes, raw_bytes=self._done_bytes)
            )
