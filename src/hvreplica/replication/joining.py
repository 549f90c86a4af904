"""Send the first copy of a disk that was added to a VM whose replica has points already.

It arrives alone, in parts where cycles of the others are due between, and needs not be one instant: the first
cut that has the disk makes it one. What is written to it meanwhile is for that cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.errors import ProtocolViolation
from hvreplica.formats import messages
from hvreplica.replication.sources import DiskSource
from hvreplica.replication.state import NIL, Transfer

if TYPE_CHECKING:
    from hvreplica.replication.session import ReplicaSession
    from hvreplica.replication.state import PrimaryState
    from hvreplica.replication.work import Work


def send_joining(work: Work, session: ReplicaSession) -> None:
    """Send the disks that join, one after the other, until a cycle of the others is due. Repeatable.

    Comes when nothing of the others is on its way.
    """
    if work.is_due():
        return
    for index, disk in enumerate(work.state.disks):
        if disk.stage == "joining" and not _send(work, session, index):
            return


def is_begun(state: PrimaryState, disk_index: int) -> bool:
    """Return whether the replica may hold anything of a disk, so that no write to it may be forgotten."""
    joining = state.joining
    is_joining = state.disks[disk_index].stage == "joining"
    return not is_joining or (joining is not None and joining.disks[0].index == disk_index)


def _send(work: Work, session: ReplicaSession, index: int) -> bool:
    """Send what is left of one disk; return whether the replica has it whole."""
    transfer = _transfer(work, index)
    question = messages.BeginInitial(
        transfer_id=transfer.transfer_id,
        point_id=transfer.point_id,
        instant_s=transfer.instant_s,
        positions=transfer.positions,
        consistent=False,
        joining=[index],
    )
    answer = session.ask_either(question, messages.Ready, messages.AlreadyHave)
    if isinstance(answer, messages.Ready):
        if len(answer.positions) != 1 or answer.positions[0] > transfer.positions[0]:
            raise ProtocolViolation(
                "the replica answered with positions that were not asked for",
                path=work.required_link.address,
                expected=transfer.positions,
                actual=answer.positions,
            )
        transfer.positions = answer.positions
        place = work.indexes.index(index)
        source = DiskSource([work.disks[place]], [work.tables[place]], transfer.positions)
        source.is_due = work.is_due
        is_whole = work.ship(session, source, transfer, phase="initial")
        work.tally.changed_bytes[place] += source.data_bytes[0]
        if not is_whole:
            return False
    _settle(work, index, transfer)
    return True


def _transfer(work: Work, index: int) -> Transfer:
    """Return the transfer that goes on, or a new one, whose table says that nothing was sent."""
    state = work.state
    if state.joining is not None and state.joining.disks[0].index == index:
        return state.joining
    work.renew_table(index)
    transfer = Transfer(
        kind="join",
        stage="cut",
        transfer_id=work.clock.guid(),
        point_id=work.clock.guid(),
        instant_s=work.instant_s,
        positions=[0],
        disks=[messages.DiskSize(index, state.disks[index].virtual_bytes)],
    )
    with work.lock:
        state.joining = transfer
        work.save()
    return transfer


def _settle(work: Work, index: int, transfer: Transfer) -> None:
    """Take note that the replica has the disk; from now on its table describes what the last point's does."""
    state = work.state
    with work.cutting:
        work.tables[work.indexes.index(index)].mark(state.last_point or NIL)
        with work.lock:
            disk = state.disks[index]
            sent_bytes = transfer.disks[0].virtual_bytes
            disk.stage, disk.last_log_id, state.joining = "joined", NIL, None
            disk.replica_bytes = None if sent_bytes == disk.virtual_bytes else sent_bytes
            work.save()
