"""Cut a VM whose disks are tracked live, or are at rest, and record the cut to be shipped.

A cut is one instant over all disks. Its logs are durable in logs/ before the state names them, and the state
names them before tracking forgets what they hold: killed anywhere, a change is in the tracking, in a recorded
log, or in both.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.errors import FormatError, InvalidTransition, LogError, NotClosed, StateError
from hvreplica.hrl import LogReader, LogWriter, verify_log
from hvreplica.replication import cycle
from hvreplica.replication.shape import differs, point_disks
from hvreplica.replication.state import PENDING_MAX, CutLog, Transfer, cuts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from hvreplica.capture.machine import ClosedLog, Cut
    from hvreplica.files import FileSystem
    from hvreplica.formats.messages import Consistency
    from hvreplica.replication.work import Work
    from hvreplica.tracking.fingerprints import FingerprintTable

_LOG = logging.getLogger("hvreplica.replicate")


@dataclass(frozen=True, slots=True)
class RecordedCut:
    """A cut that waits to be shipped, or that had nothing to ship.

    transfer: None where nothing had changed. held_us: how long writes were held. entries: of each log.
    """

    instant_s: float
    held_us: float
    transfer: Transfer | None
    entries: tuple[int, ...]


def cut_live(
    work: Work,
    *,
    on_ready: Callable[[], bool] = lambda: False,
    on_instant: Callable[[], None] | None = None,
) -> RecordedCut:
    """Cut all disks at one instant and record the logs behind those that wait; durable on return.

    on_ready: called when no other cut and nothing that takes long is left before the instant, to freeze the
    guest, and returns whether that makes the cut consistent for what runs in it; what it raises ends the
    call. on_instant: called as soon as the guest may write again; what it
    raises undoes the cut. Raises: InvalidTransition while the initial replication reads the disks, StateError
    where too much waits, OSError; what changed then counts as changed still.
    """
    if work.fan is not None:
        return work.fan.cut(work, on_ready=on_ready, on_instant=on_instant)
    machine = work.machine
    assert machine is not None
    with work.cutting:
        _collapse(work)
        check_cut(work)
        last = work.previous_log_ids()
        known = _known(work)
        consistency: Consistency = "app" if on_ready() else "crash"
        cut = machine.cut([last[index] for index in work.indexes], known=known, on_instant=on_instant)
        in_point = {disk.index for disk in point_disks(work.state)}
        logs = [log for log in cut.logs if log.disk_index in in_point]
        entries = tuple(log.entries for log in logs)
        try:
            for log in cut.logs:
                if log.disk_index not in in_point:
                    _mark_again(work, log.disk_index, log.path)  # for the first cut that has the disk
            transfer = record(work, cut, logs, consistency)
        except BaseException:
            machine.give_back(cut)
            raise
        try:
            machine.settle(cut)
            machine.recycle(log.path for log in cut.logs if log.disk_index not in in_point)
        except OSError as error:  # it is recorded all the same; what tracking did not forget is read again
            _LOG.warning("tracking could not take note of a cut: %s", error)
        return RecordedCut(cut.instant_s, cut.held_us, transfer, entries or (0,) * (transfer is not None))


def cut_compared(work: Work, *, app_consistent: bool = False) -> RecordedCut:
    """Find what changed of disks at rest by comparison, and record it as a cut; durable on return.

    app_consistent: whether whoever used the disks had brought them to rest.

    Raises: InvalidTransition before the replica has a copy, StateError while another cut waits: what it holds
    is in no fingerprint yet.
    """
    if work.state.phase != "ready":
        raise InvalidTransition(
            "there is nothing to compare the disks with before they were replicated",
            path=work.folder.folder,
            hint="replicate first, or serve the disks with `hvreplica capture`, which knows every write",
        )
    cycle.drop_unfinished(work)
    if cuts(work.state):
        raise StateError(
            "a cut waits to be shipped, and disks at rest can only be compared with what was shipped",
            path=work.folder.folder,
            hint="ship it with `hvreplica replicate --once`",
        )
    work.open_tables()
    work.check_tables()
    instant_s = work.clock.now_s()
    consistency: Consistency = "app" if app_consistent else "crash"
    transfer = work.state.transfer if cycle.cut(work, consistency) else None
    entries = []
    for log in [] if transfer is None else transfer.logs:
        with LogReader(work.files, work.folder.log_path(log.log_id)) as reader:
            entries.append(reader.entry_count)
    return RecordedCut(instant_s, 0.0, transfer, tuple(entries))


def _known(work: Work) -> list[FingerprintTable | None] | None:
    """Return what the cut may rely on: of a disk that joins nothing, for its copy is still on its way."""
    tables = work.known_tables()
    if tables is None:
        return None
    return [table if place in work.members else None for place, table in enumerate(tables)]


def _collapse(work: Work) -> None:
    """Drop cuts that wait where their logs are more than the budget: the next cut has all that they hold.

    What they hold is marked before the state forgets them: killed between, it is read twice.
    """
    machine = work.machine
    assert machine is not None
    with work.lock:  # until they are dropped: the logs of a cut that goes its way may be written over
        waiting = list(work.state.pending)
        held_bytes = sum(log.log_bytes for transfer in waiting for log in transfer.logs)
        if held_bytes <= machine.budget_bytes:
            return
        _LOG.warning(
            "%d cuts that wait have %d bytes of logs, more than %d: they become one with the next cut",
            len(waiting),
            held_bytes,
            machine.budget_bytes,
        )
        paths = []
        for log in (log for transfer in waiting for log in transfer.logs):
            paths.append(work.folder.log_path(log.log_id))
            if log.disk_index in work.indexes:  # else the disk has left since
                _mark_again(work, log.disk_index, paths[-1])
        work.state.pending = []
        work.save()
    machine.recycle(paths)


def drop_damaged(work: Work) -> bool:
    """Drop the transfer on its way, and the cuts behind it, where one of its logs is missing or damaged here.

    Returns whether it was so. What the logs held counts as changed first: for a damaged one, in which nothing
    is to be believed, the whole disk; disks at rest are compared as a whole anyway. The replica must not have
    taken the transfer.
    """
    with work.cutting:  # a cut between the marks and the state would take them away, and be dropped
        transfer = work.state.transfer
        if transfer is None or transfer.kind != "logs" or transfer.stage != "cut":
            return False
        damaged = {log.log_id for log in transfer.logs if not _is_sound(work, log)}
        if not damaged:
            return False
        dropped = cuts(work.state)
        if work.machine is None:
            work.folder.remove_journals()  # a capture that starts before the comparison looks at all
        else:
            for log in (log for each in dropped for log in each.logs):
                path = work.folder.log_path(log.log_id)
                _mark_again(work, log.disk_index, None if log.log_id in damaged else path)
        with work.lock:
            work.state.transfer, work.state.pending = None, []
            work.save()
        work.sweep_logs()
    return True


def _is_sound(work: Work, log: CutLog) -> bool:
    """Return whether the log is there and the one that was cut, every byte of it; says so if not."""
    path = work.folder.log_path(log.log_id)
    try:
        report = verify_log(work.files, path)
    except (FileNotFoundError, FormatError, LogError) as error:
        reason = str(error)
    else:
        if (report.log_id, report.log_bytes) == (str(log.log_id), log.log_bytes):
            return True
        reason = f"it is log {report.log_id} of {report.log_bytes} bytes"
    _LOG.warning("%s, which waits to be shipped, is not as it was written: %s", path, reason)
    return False


def _mark_again(work: Work, disk_index: int, path: Path | None) -> None:
    """Count all that a log holds as changed again; the whole disk where it cannot be read or has no path."""
    assert work.machine is not None
    if disk_index not in work.indexes:
        return  # the VM no longer has it
    disk_bytes = work.state.disks[disk_index].virtual_bytes
    if path is None:
        work.mark(disk_index, np.array([[0, disk_bytes]], np.int64))
        return
    if work.fan is not None:
        work.fan.miss_log(work, disk_index, path)
        return
    try:
        for extents in log_extents(work.files, path, disk_bytes):
            work.machine.mark(disk_index, extents)
    except (FileNotFoundError, FormatError, NotClosed) as error:
        _LOG.warning("the next cut looks at the whole disk %d: %s", disk_index, error)
        work.machine.mark(disk_index, np.array([[0, disk_bytes]], np.int64))


def log_extents(files: FileSystem, path: Path, disk_bytes: int) -> Iterator[NDArray[np.int64]]:
    """Yield what a closed log holds of a disk of so many bytes, int64 (n, 2) for each block of its entries.

    Raises: FileNotFoundError, FormatError, NotClosed.
    """
    with LogReader(files, path) as reader:
        for entries in reader.blocks():
            starts = entries["byte_offset"].astype(np.int64)
            # The log may be of a time before the disk became shorter.
            lengths = np.minimum(entries["data_length"].astype(np.int64), disk_bytes - starts)
            extents = np.stack((starts, lengths), axis=1)[lengths > 0]
            if len(extents):
                yield extents


def check_cut(work: Work) -> None:
    """Refuse a cut that this replica cannot have. Raises: InvalidTransition, StateError."""
    state = work.state
    if state.phase == "initial":
        # It would hold older bytes of a block than the initial replication may have read already, and would
        # be a point without the newer ones of others.
        raise InvalidTransition(
            "the initial replication is not complete: nothing before its end is one instant of the disks",
            path=work.folder.folder,
            hint="cut again when `hvreplica status` says that the VM is replicating",
        )
    if len(state.pending) >= PENDING_MAX:
        raise StateError(
            "too many cuts wait to be shipped",
            path=work.folder.folder,
            expected=f"at most {PENDING_MAX}",
            actual=len(state.pending),
            hint="ship them with `hvreplica replicate --once`",
        )


def record(work: Work, cut: Cut, closed: Sequence[ClosedLog], consistency: Consistency) -> Transfer | None:
    """Record a cut behind those that wait; durable on return. closed: its logs, which are in the folder.

    Returns None where there is nothing to ship.
    """
    logs = [
        CutLog(
            log.disk_index,
            log.log_id,
            log.previous_log_id,
            log.log_bytes,
            log.changed_bytes,
            is_ordered=log.is_ordered,
        )
        for log in closed
    ]
    with work.lock:
        is_needed = work.state.mixed or differs(work.state)
    if not logs and is_needed:
        logs = [_empty_log(work)]  # a copy of several instants needs logs to become one, as other disks do
    if not logs:
        return None
    work.files.sync_directory(work.folder.logs)
    transfer = Transfer(
        kind="logs",
        stage="cut",
        transfer_id=work.clock.guid(),
        point_id=work.clock.guid(),
        instant_s=cut.instant_s,
        positions=[0] * len(logs),
        logs=logs,
        disks=point_disks(work.state),
        consistency=consistency,
    )
    work.append(transfer)
    return transfer


def _empty_log(work: Work) -> CutLog:
    place = work.members[0]
    index = work.indexes[place]
    log_id, previous_log_id = work.clock.guid(), work.previous_log_ids()[index]
    writer = LogWriter.create(
        work.files,
        work.folder.log_path(log_id),
        log_id=log_id,
        previous_log_id=previous_log_id,
        data_write_guid=work.disks[place].data_write_guid,
        clock=work.clock,
    )
    with writer:
        summary = writer.close()
    return CutLog(index, log_id, previous_log_id, summary.log_bytes, 0)
