"""A VM that must not run at this site: prepared for a planned failover, or handed to a store as a replica.

    (running) ──prepare──> prepared, no point ──the replica is told──> prepared, point ──(promoted there)
        ^                        │                                        │
        ├──────cancel────────────┘                                        │
        └──────cancel, once the replica says that it was not promoted─────┘

The mark stands in the state before anything is done, so that no VM starts between the last cut and the
failover; and the point stands in it before the replica is told, so that a cancel always asks a replica that
may have been told. It also does where the replica has refused to be prepared, being failed over unplanned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.clock import iso_time
from hvreplica.errors import InvalidTransition, StateError
from hvreplica.formats import messages
from hvreplica.replication.state import NIL, Stopped

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.replication.session import ReplicaSession
    from hvreplica.replication.state import PrimaryState
    from hvreplica.replication.work import Work

PREPARE_REVISION = 3


def require_running(state: PrimaryState, folder: Path, *, prepare: bool = False) -> None:
    """Refuse what would change a VM that is stopped here. prepare: it may be prepared, which is repeatable.

    Raises: InvalidTransition.
    """
    stopped = state.stopped
    if stopped is None or (prepare and stopped.kind == "prepared"):
        return
    since = iso_time(stopped.since_s)
    if stopped.kind == "prepared":
        raise InvalidTransition(
            f"VM {state.vm!r} is prepared for a planned failover since {since}: it must not run or be"
            " replicated from here",
            path=folder,
            hint="promote the replica with `hvreplica failover planned`, or go on here with"
            " `hvreplica replicate --cancel-prepare`",
        )
    if stopped.kind == "reversing":
        raise InvalidTransition(
            f"`hvreplica failover reverse` of VM {state.vm!r} was cut off before its end",
            path=folder,
            hint="call it again; it goes on where it was cut",
        )
    raise InvalidTransition(
        f"VM {state.vm!r} is a replica since {since}: its disks were taken into the store {stopped.store}",
        path=folder,
        hint="its primary is the other site now; fail over to this one to run it here again"
        if stopped.kind == "adopted"
        else "`hvreplica store adopt` was cut off: call it again as before",
    )


def require_own_disks(state: PrimaryState, folder: Path) -> None:
    """Refuse the folder of an extended replication to what is for a VM that runs here. Raises: StateError."""
    if state.store:
        raise StateError(
            f"this folder is that of an extended replication: it ships points of the store {state.store}",
            path=folder,
            hint=f"run `hvreplica extend --store {state.store} --vm {state.vm}`, or name the VM's own folder",
        )


def mark_prepared(work: Work) -> None:
    """Let the VM start no more; durable on return."""
    with work.lock:
        if work.state.stopped is None:
            work.state.stopped = Stopped("prepared", work.clock.now_s())
            work.save()


def confirm_prepared(work: Work, session: ReplicaSession, *, is_whole: bool) -> None:
    """Tell the replica that its last point is all of the VM, once it has it; it may be promoted then.

    is_whole: whether that point has the disks that the VM has. Raises: StateError where it has not.
    """
    session.require_revision(PREPARE_REVISION, "a planned failover")
    state, stopped = work.state, work.state.stopped
    assert stopped is not None
    if not is_whole or state.mixed or any(disk.stage == "joining" for disk in state.disks):
        raise StateError(
            "the replica's last point does not have all disks of the VM yet",
            path=work.folder.folder,
            hint="call this again: the next cycle has those that were added",
        )
    with work.lock:
        stopped.point = work.state.last_point
        work.save()
    session.ask(messages.Prepare(work.state.last_point or NIL), messages.Prepared)


def suspect_promoted(work: Work) -> None:
    """Let a cancel ask the replica, which has refused this primary; durable on return."""
    with work.lock:
        stopped = work.state.stopped
        if stopped is not None and stopped.kind == "prepared" and stopped.point is None:
            stopped.point = work.state.last_point or NIL
            work.save()


def mark_running(work: Work) -> None:
    """Let the VM run here again; durable on return."""
    with work.lock:
        work.state.stopped = None
        work.save()


def is_told(state: PrimaryState) -> bool:
    """Return whether the replica may know that it is prepared, and so may have been promoted."""
    return state.stopped is not None and state.stopped.point is not None
