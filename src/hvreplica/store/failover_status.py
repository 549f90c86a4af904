"""What is told of a failover; the JSON of the command line is these structures, field by field."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec

from hvreplica.clock import iso_time
from hvreplica.errors import HvReplicaError
from hvreplica.store import failover as table
from hvreplica.store.check import file_length
from hvreplica.store.firedrill import is_served
from hvreplica.store.promotion import written_bytes

if TYPE_CHECKING:
    from hvreplica.store.failover import Failover
    from hvreplica.store.home import VmHome


class ActiveDiskStatus(msgspec.Struct, frozen=True):
    """A disk to run the VM from. path: a differencing VHDX. parent: the replica's disk; it must not change.

    written_bytes: what the file holds that its parent does not; None where that cannot be read.
    """

    index: int
    path: str
    parent: str
    virtual_bytes: int
    file_bytes: int
    written_bytes: int | None


class FiredrillStatus(msgspec.Struct, frozen=True):
    """A test failover. state, mode: FiredrillInProgress, TestReplica. served: by a process, now.

    disks: the files of what was written to it, some of which may not be there yet.
    """

    state: str
    mode: str
    point: str
    since: str
    served: bool
    disks: list[str]


class FailoverStatus(msgspec.Struct, frozen=True):
    """Where a failover of a VM stands.

    mode: Replica or Primary. state: Replicating, PreparedForFailover, FailedOverWaitingCompletion or
    FailedOver. unfinished: the verb and step that was cut, to be called again. point: what the active disks
    began as, of point_type regular, application-consistent, planned or initial (a first copy); None once this
    side is the primary. generation: of the side that is active, 0 where that is the primary's. since: ISO
    8601. possible: the commands that may follow, as `failover cancel`.
    """

    vm: str
    mode: str
    state: str
    unfinished: str | None
    point: str | None
    point_type: str | None
    generation: int
    since: str | None
    disks: list[ActiveDiskStatus]
    test: FiredrillStatus | None
    possible: list[str]


def failover_status(home: VmHome) -> FailoverStatus:
    """Return where a failover of the VM stands."""
    record = home.failover()
    intent = record.intent
    point = record.point if record.mode == "Replica" else None
    return FailoverStatus(
        vm=home.name,
        mode=record.mode,
        state=record.state,
        unfinished=None if intent is None else f"{intent.verb}: {intent.step}",
        point=None if point is None else str(point),
        point_type=None if point is None else record.point_type,
        generation=record.generation,
        since=iso_time(record.started_s) if record.started_s else None,
        disks=_disks(home, record),
        test=_test(home, record),
        possible=[table.command_of(verb) for verb in table.possible_verbs(record)],
    )


def _disks(home: VmHome, record: Failover) -> list[ActiveDiskStatus]:
    found = []
    for disk in record.active:
        path = home.paths.active(disk.disk)
        with contextlib.suppress(FileNotFoundError):
            found.append(
                ActiveDiskStatus(
                    disk.disk,
                    str(path),
                    str(home.paths.disk(disk.disk)),
                    disk.virtual_bytes,
                    file_length(home.files, path),
                    _written(home, disk.disk),
                )
            )
    return found


def _written(home: VmHome, disk_index: int) -> int | None:
    try:
        return written_bytes(home, disk_index)
    except (HvReplicaError, OSError):
        return None  # a hypervisor may be in the middle of a change


def _test(home: VmHome, record: Failover) -> FiredrillStatus | None:
    test = record.test
    if test is None:
        return None
    return FiredrillStatus(
        table.TEST_STATE,
        table.TEST_MODE,
        str(test.point),
        iso_time(test.started_s),
        is_served(home),
        [str(home.paths.test(disk_index)) for disk_index in test.disks],
    )
