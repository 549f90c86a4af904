"""Bring the blocks that a replica has lost to damage, so that its points are whole again.

The fingerprint table says what the replica should hold. Where it holds something else, and the disk still has
the bytes that the table knows, these very bytes go back in place, and every recovery point that shares the
block is right again. What has changed here since is left to the next cut, as any change.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.disk.extents import merge
from hvreplica.formats import messages
from hvreplica.formats.fingerprint import UNKNOWN
from hvreplica.progress import Progress
from hvreplica.replication.resync import fetch_fingerprints
from hvreplica.replication.state import cuts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hvreplica.replication.session import ReplicaSession
    from hvreplica.replication.work import Work

_LOG = logging.getLogger("hvreplica.replicate")
_UNKNOWN_ROW = np.frombuffer(UNKNOWN, np.uint8)


def repair(work: Work, session: ReplicaSession, damaged: list[int]) -> None:
    """Compare the disks that the replica says are damaged, and bring what they should hold. Repeatable.

    Does nothing while a cut is on its way: the tables say then what the replica will hold.
    """
    for index in damaged:
        with work.cutting:
            if work.state.phase != "ready" or cuts(work.state) or index not in work.indexes:
                return
            place = work.indexes.index(index)
            virtual_bytes = work.disks[place].virtual_bytes
            if place not in work.members or work.state.disks[index].replica_bytes not in {
                None,
                virtual_bytes,
            }:
                continue
            _repair_disk(work, session, place)


def _repair_disk(work: Work, session: ReplicaSession, place: int) -> None:
    index, table = work.indexes[place], work.tables[place]
    brought = 0
    changed: list[NDArray[np.int64]] = []
    for first in range(0, table.header.block_count, messages.FINGERPRINT_BLOCKS_MAX):
        count = min(messages.FINGERPRINT_BLOCKS_MAX, table.header.block_count - first)
        theirs = fetch_fingerprints(session, index, first, count, table.block_bytes)
        known = table.read(first, count)
        differing = np.flatnonzero((theirs != known).any(axis=1))
        for at in range(0, len(differing), messages.REPAIR_BLOCKS_MAX):
            rows = differing[at : at + messages.REPAIR_BLOCKS_MAX]
            sent, left = _bring(work, session, place, rows + first, theirs[rows], known[rows])
            brought += sent
            changed += [left]
        done = min((first + count) * table.block_bytes, table.header.virtual_bytes)
        work.on_progress(Progress("repair", done, table.header.virtual_bytes, wire_bytes=session.wire_bytes))
    table.sync()
    rest = merge(np.concatenate(changed)) if changed else np.empty((0, 2), np.int64)
    if len(rest) and work.machine is not None:
        work.machine.mark(index, rest)
    answer = session.ask(messages.RepairEnd(index, proven=not len(rest)), messages.Repaired)
    _LOG.warning(
        "the replica's disk %d was damaged: %d blocks were put back, %d bytes have changed here since; %s",
        index,
        brought,
        int(rest[:, 1].sum()),
        "it is whole again" if answer.whole else "the next cycle brings the rest",
    )


def _bring(
    work: Work,
    session: ReplicaSession,
    place: int,
    blocks: NDArray[np.int64],
    theirs: NDArray[np.uint8],
    known: NDArray[np.uint8],
) -> tuple[int, NDArray[np.int64]]:
    """Put back those of `blocks` that the disk still has as they were known.

    Returns how many, and the extents of those that it has otherwise; the table says then what the replica
    really holds, so that a comparison finds them.
    """
    table, disk = work.tables[place], work.disks[place]
    starts = blocks * table.block_bytes
    extents = np.stack((starts, np.minimum(table.block_bytes, disk.virtual_bytes - starts)), axis=1)
    data = np.empty(int(extents[:, 1].sum()), np.uint8)
    disk.read_extents(extents, data.data)
    mine = native.fingerprints(data, table.block_bytes)
    is_known = (mine == known).all(axis=1) & (known != _UNKNOWN_ROW).any(axis=1)
    is_theirs = (mine == theirs).all(axis=1)
    offsets = np.arange(len(blocks)) * table.block_bytes
    if is_known.any():
        wanted = np.flatnonzero(is_known)
        pieces = [data[offsets[row] : offsets[row] + extents[row, 1]] for row in wanted.tolist()]
        question = messages.RepairBlocks(
            work.indexes[place], blocks[wanted].tolist(), np.concatenate(pieces).tobytes()
        )
        session.ask(question, messages.Repaired)
    for row in np.flatnonzero(~is_known).tolist():
        table.write(int(blocks[row]), theirs[row : row + 1])
    return int(is_known.sum()), extents[~is_known & ~is_theirs]
