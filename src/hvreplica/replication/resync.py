"""Resync: learn from the replica itself what it holds, so that only what differs is sent.

16 bytes travel for each 4 KiB block that holds data, and the difference travels as one more log: no recovery
point is touched. For a primary whose state folder was lost, and for a replica that is not on the point we
believe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.errors import ProtocolViolation, ReplicaDiverged
from hvreplica.formats import messages
from hvreplica.formats.fingerprint import FINGERPRINT_BYTES
from hvreplica.progress import Progress
from hvreplica.replication.shape import adopt
from hvreplica.tracking.fingerprints import BLOCK_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hvreplica.replication.session import ReplicaSession
    from hvreplica.replication.work import Work


def resync(work: Work, session: ReplicaSession, claimed: messages.Claimed) -> None:
    """Make tables and state say what the replica really holds, whatever was believed before. Repeatable."""
    if claimed.last_point is None:
        raise ReplicaDiverged("the replica has no point to compare with", path=work.required_link.address)
    # The first answer comes before anything is forgotten: a refusal must leave things as they were.
    first = next((held.index for held in claimed.disks if held.virtual_bytes != 0), 0)
    session.ask(messages.FingerprintsRequest(first, 0, 1, BLOCK_BYTES), messages.Fingerprints)
    state = work.state
    with work.cutting:  # a cut between the marks and the state would take them away, and be dropped
        _mark_all(work)
        with work.lock:
            state.phase, state.transfer, state.last_point = "ready", None, claimed.last_point
            state.pending, state.source_point = [], None
            adopt(state, claimed)
            work.save()
        # Only now: as long as the state names a transfer, its tables are still needed as they are.
        work.create_tables()
        work.sweep_logs()
    for place in work.members:
        fill_from_replica(work, session, place)
        work.tables[place].mark(claimed.last_point)


def _mark_all(work: Work) -> None:
    """Have the next cut look at all: what waits is dropped, and what the replica holds is not believed.

    Durable on return. Disks at rest are compared instead, but that may be cut short: a capture that starts
    then looks at all where there are no journals.
    """
    if work.machine is None:
        work.folder.remove_journals()
        return
    for index, disk in zip(work.indexes, work.disks, strict=True):
        work.mark(index, np.array([[0, disk.virtual_bytes]], np.int64))


def fill_from_replica(work: Work, session: ReplicaSession, place: int) -> None:
    """Fill a table, which says "all zero", with what the replica has of the disk. The caller marks it."""
    index, table = work.indexes[place], work.tables[place]
    held_bytes = work.state.disks[index].replica_bytes or table.header.virtual_bytes
    block_count = min(table.header.block_count, -(-held_bytes // table.block_bytes))
    for first in range(0, block_count, messages.FINGERPRINT_BLOCKS_MAX):
        count = min(messages.FINGERPRINT_BLOCKS_MAX, block_count - first)
        rows = fetch_fingerprints(session, index, first, count, table.block_bytes)
        if rows.any():
            table.write(first, rows)
        done = min((first + count) * table.block_bytes, table.header.virtual_bytes)
        work.on_progress(Progress("resync", done, table.header.virtual_bytes, wire_bytes=session.wire_bytes))


def fetch_fingerprints(
    session: ReplicaSession, disk_index: int, first_block: int, block_count: int, block_bytes: int
) -> NDArray[np.uint8]:
    """Return the fingerprints of some blocks of the replica's disk, a row of 16 bytes for each."""
    question = messages.FingerprintsRequest(disk_index, first_block, block_count, block_bytes)
    data = session.ask(question, messages.Fingerprints).data
    if not data:
        return np.zeros((block_count, FINGERPRINT_BYTES), np.uint8)
    if len(data) != block_count * FINGERPRINT_BYTES:
        raise ProtocolViolation(
            "the replica sent another number of fingerprints than it was asked for",
            expected=block_count,
            actual=len(data) / FINGERPRINT_BYTES,
        )
    return np.frombuffer(data, np.uint8).reshape(-1, FINGERPRINT_BYTES)
