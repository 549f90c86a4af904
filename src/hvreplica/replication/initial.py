"""Initial replication: the whole of each disk, filling the fingerprint tables on the way.

Of disks at rest a broken transfer goes on from the positions that the replica confirmed, but no further than
the disks still are what was sent: the point that results is one state of the disks, not a mixture. Disks that
are tracked live are read while the guest writes: the copy is a mixture, and the first cut after it makes it
one instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.formats import messages
from hvreplica.replication.shape import restart
from hvreplica.replication.sources import DiskSource, unchanged_until
from hvreplica.replication.state import NIL, Transfer

if TYPE_CHECKING:
    from hvreplica.replication.session import ReplicaSession
    from hvreplica.replication.work import Work


def prepare_initial(work: Work) -> None:
    """Where an initial replication is unfinished, go back to where the disks are no longer what was sent.

    Reads and hashes all that was sent, but where tracking knows every write since it began. Raises:
    TrackingLost without the tables.
    """
    transfer = work.state.transfer
    if transfer is None or transfer.kind != "initial":
        return
    work.open_tables()
    if work.machine is not None and transfer.tracked:
        return
    transfer.positions = [
        unchanged_until(disk, table, position)
        for disk, table, position in zip(work.disks, work.tables, transfer.positions, strict=True)
    ]
    transfer.instant_s = work.instant_s
    transfer.tracked = transfer.tracked or work.machine is not None
    work.save()


def replicate_initially(work: Work, session: ReplicaSession) -> None:
    """Send a whole copy, or the rest of one, and record that the replica has it."""
    transfer = work.state.transfer or _begin(work)
    work.open_tables()
    if transfer.tracked:
        session.require_revision(2, "a first copy of disks that are written meanwhile")
    question = messages.BeginInitial(
        transfer_id=transfer.transfer_id,
        point_id=transfer.point_id,
        instant_s=transfer.instant_s,
        positions=transfer.positions,
        consistent=not transfer.tracked,
        consistency="crash" if work.origin is None else work.origin.consistency,
    )
    answer = session.ask_either(question, messages.Ready, messages.AlreadyHave)
    if isinstance(answer, messages.Ready):
        with work.lock:
            restart(work.state)  # the replica takes the disks as they are announced now
            if work.origin is not None:
                # Not before: of a copy whose end was not heard of, this is another point's.
                transfer.source_point = work.origin.point_id
                work.save()
        _send(work, session, transfer, answer.positions)
    work.tally.kind = "initial"
    settle_initial(work, transfer)


def _send(work: Work, session: ReplicaSession, transfer: Transfer, positions: list[int]) -> None:
    work.resume(transfer, positions)
    source = DiskSource(work.disks, work.tables, transfer.positions)
    work.ship(session, source, transfer, phase="initial")
    for index, data_bytes in enumerate(source.data_bytes):
        work.tally.changed_bytes[index] += data_bytes


def settle_initial(work: Work, transfer: Transfer) -> None:
    """Take note that the replica has committed the whole copy. Repeatable."""
    if not work.tables:
        work.open_tables()
    work.fit_tables([])
    for table in work.tables:
        table.mark(transfer.point_id)
    state = work.state
    with work.lock:
        state.phase, state.last_point, state.transfer = "ready", transfer.point_id, None
        state.mixed, state.source_point = transfer.tracked, transfer.source_point
        for disk in state.disks:
            disk.last_log_id = NIL
        work.save()


def _begin(work: Work) -> Transfer:
    with work.lock:
        restart(work.state)
    work.create_tables()
    transfer = Transfer(
        kind="initial",
        stage="cut",
        transfer_id=work.clock.guid(),
        point_id=work.clock.guid(),
        instant_s=work.instant_s,
        positions=[0] * len(work.disks),
        tracked=work.machine is not None,
    )
    with work.cutting:  # a cut that is being made belongs to what the disks are read for now
        with work.lock:
            work.state.phase, work.state.transfer, work.state.pending = "initial", transfer, []
            work.save()
        if work.fan is not None:
            work.fan.begun_anew(work)
        work.sweep_logs()
    return transfer
