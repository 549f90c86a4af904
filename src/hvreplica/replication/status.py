"""How replication of a VM stands, told by the process that owns its state folder, or read from the folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hvreplica.clock import iso_time
from hvreplica.replication import statistics
from hvreplica.replication.state import cuts
from hvreplica.replication.statistics import ReplicationStatistics, Situation, Statistics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hvreplica.capture.machine import DiskTracking
    from hvreplica.replication.state import PrimaryState, Transfer


class WaitingCut(msgspec.Struct, frozen=True):
    """A cut that the replica does not have yet. bytes: of its logs. instant: ISO 8601 in UTC.

    point: None before the first copy, which takes the place of the cut.
    """

    point: str | None
    instant: str
    bytes: int


class TrackedStatus(msgspec.Struct, frozen=True):
    """What live tracking knows of a disk.

    dirty_bytes: changed since the last cut that is recorded, in whole grains; unlogged_bytes: those of them
    that the next cut reads from the disk. log_bytes: of the open log. log_state: open, full, failed or off.
    writes, written_bytes: of the guest since the process began. judgement: what its start found of changes
    made while nothing was tracked.
    """

    dirty_bytes: int
    unlogged_bytes: int
    log_bytes: int
    log_state: str
    journal_regions: int
    writes: int
    written_bytes: int
    judgement: str = ""


class JournalStatus(msgspec.Struct, frozen=True):
    """What a capture that does not run has left of a disk.

    marked_bytes: at most so much differs from the last cut; the next start of capture looks at it. clean:
    False where it was cut off, by kill -9 or with its host.
    """

    marked_bytes: int
    clean: bool


class DiskStatus(msgspec.Struct, frozen=True):
    """One disk. tracking: None where no process captures it; journal: what the last one left then.

    stage: "protected"; "joining" while the replica has no whole copy of a disk that was added; "joined" once
    it has one that no recovery point has yet; "leaving" for one that was removed and that the newest point
    has.
    """

    index: int
    path: str
    virtual_bytes: int
    tracking: TrackedStatus | None
    stage: str = "protected"
    journal: JournalStatus | None = None


class Cycles(msgspec.Struct, frozen=True):
    """The cycles of a running process. interval_s: 0 for back to back.

    next_s: seconds until the next one, None while none will begin.
    """

    to: str
    interval_s: float
    next_s: float | None


class ReplicationStatus(msgspec.Struct, frozen=True):
    """One VM at its primary. running: "capture" or "replicate" for a living process, else None.

    replication_state: ReadyForInitialReplication, InitialReplicationInProgress, Replicating, Suspended
    (paused here, or the replica has no room), PreparedForFailover, FailedOver (the disks are a replica now)
    or Error. last_point: that the replica acknowledged. pending: cuts that it does not have, oldest first.
    cycles: None where none are scheduled. statistics: see ReplicationStatistics. replicas: the VM's further
    ones, which are fed by the same process.
    """

    vm: str
    running: str | None
    replication_state: str
    paused: bool
    relationship: str
    generation: int
    last_point: str | None
    pending: list[WaitingCut]
    cycles: Cycles | None
    disks: list[DiskStatus]
    statistics: ReplicationStatistics
    replicas: list[NamedReplica] = []


class NamedReplica(msgspec.Struct, frozen=True):
    """A further replica of a VM: its name, and how replication to it stands."""

    name: str
    status: ReplicationStatus


def make_status(
    state: PrimaryState,
    record: Statistics,
    *,
    now_s: float,
    tracking: Sequence[DiskTracking] = (),
    running: str | None = None,
    cycles: Cycles | None = None,
    journals: Mapping[int, JournalStatus] | None = None,
    missed_bytes: int = 0,
) -> ReplicationStatus:
    """Return the status of a VM from what is known of it.

    journals: by index, where no capture runs. missed_bytes: of cuts that only other replicas have.
    """
    left = journals or {}
    known = {disk.index: disk for disk in tracking}
    waiting = [
        _waiting(transfer, is_early=state.phase == "new")
        for transfer in cuts(state)
        if transfer.stage == "cut"
    ]
    has_replica = cycles is not None or state.phase != "new" or record.trouble is not None
    pending_bytes = sum(cut.bytes for cut in waiting) + sum(disk.dirty_bytes for disk in tracking)
    pending_bytes += missed_bytes + sum(journal.marked_bytes for journal in left.values())
    situation = Situation(has_replica, state.phase, state.paused, pending_bytes, now_s, _left_issues(left))
    return ReplicationStatus(
        vm=state.vm,
        running=running,
        replication_state=_state_name(state, record),
        paused=state.paused,
        relationship=str(state.relationship_id),
        generation=state.generation,
        last_point=None if state.last_point is None else str(state.last_point),
        pending=waiting,
        cycles=cycles,
        disks=[
            DiskStatus(
                index,
                disk.path,
                disk.virtual_bytes,
                _tracked(known[index]) if index in known else None,
                disk.stage,
                left.get(index),
            )
            for index, disk in enumerate(state.disks)
            if disk.stage != "removed"
        ],
        statistics=statistics.show(record, situation),
    )


def _left_issues(left: Mapping[int, JournalStatus]) -> tuple[str, ...]:
    if not left:
        return ()
    if all(journal.clean for journal in left.values()):
        return ("capture does not run",)
    return ("capture does not run, and was cut off: what its journals name is looked at when it starts",)


def _state_name(state: PrimaryState, record: Statistics) -> str:
    if state.stopped is not None:
        return "PreparedForFailover" if state.stopped.kind == "prepared" else "FailedOver"
    if state.paused:
        return "Suspended"
    trouble = record.trouble
    if trouble is not None and trouble.is_fatal:
        return "Error"
    if trouble is not None and trouble.waits_for_room:
        return "Suspended"
    names = {"new": "ReadyForInitialReplication", "initial": "InitialReplicationInProgress"}
    return names.get(state.phase, "Replicating")


def _waiting(transfer: Transfer, *, is_early: bool) -> WaitingCut:
    log_bytes = sum(log.log_bytes for log in transfer.logs)
    point = None if is_early else str(transfer.point_id)
    return WaitingCut(point, iso_time(transfer.instant_s), log_bytes)


def _tracked(disk: DiskTracking) -> TrackedStatus:
    return TrackedStatus(
        dirty_bytes=disk.dirty_bytes,
        unlogged_bytes=disk.unlogged_bytes,
        log_bytes=disk.log_bytes,
        log_state=disk.log_state,
        journal_regions=disk.journal_regions,
        writes=disk.writes,
        written_bytes=disk.written_bytes,
        judgement=disk.judgement,
    )
