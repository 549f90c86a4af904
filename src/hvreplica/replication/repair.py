"""Bring the blocks that a replica has lost to damage, so that its points are whole again.

The fingerprint table says what the replica should hold. Where it holds something else, and the disk still has
the bytes that the table knows, these very bytes go back in place, and every recovery point that shares the
block is right again. What has changed here since is left to the next cut, as any change.

Cuts go on meanwhile. What they hold is shipped later, by the thread that repairs: until the end the replica
holds what the table says, but for the damage.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.disk.extents import NO_EXTENTS, merge
from hvreplica.formats import messages
from hvreplica.formats.fingerprint import UNKNOWN
from hvreplica.progress import Progress
from hvreplica.replication.resync import fetch_fingerprints

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
        if work.state.phase != "ready" or work.state.transfer is not None or index not in work.indexes:
            return
        place = work.indexes.index(index)
        virtual_bytes = work.disks[place].virtual_bytes
        if place not in work.members or work.state.disks[index].replica_bytes not in {None, virtual_bytes}:
            continue
        _compare_whole(work)
        _Disk(work, session, place).run()


def _compare_whole(work: Work) -> None:
    """Let the next comparison look at whole disks: a table is about to say what no point shows. Durable."""
    if work.state.source_point is not None:
        with work.lock:
            work.state.source_point = None
            work.save()


class _Disk:
    """One disk on its way to be whole again."""

    def __init__(self, work: Work, session: ReplicaSession, place: int) -> None:
        self.index = work.indexes[place]
        self._work = work
        self._session = session
        self._table = work.tables[place]
        self._disk = work.disks[place]
        self._brought_count = 0
        self._changed: list[NDArray[np.int64]] = []  # what the replica has otherwise, and the disk too
        self._rows: list[tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]] = []

    def run(self) -> None:
        """Compare all blocks, bring what can go back, and leave the rest to the next cut."""
        table = self._table
        for first in range(0, table.header.block_count, messages.FINGERPRINT_BLOCKS_MAX):
            count = min(messages.FINGERPRINT_BLOCKS_MAX, table.header.block_count - first)
            theirs = fetch_fingerprints(self._session, self.index, first, count, table.block_bytes)
            known = table.read(first, count)
            differing = np.flatnonzero((theirs != known).any(axis=1))
            for at in range(0, len(differing), messages.REPAIR_BLOCKS_MAX):
                rows = differing[at : at + messages.REPAIR_BLOCKS_MAX]
                self._bring(rows + first, theirs[rows], known[rows])
            self._take_note()
            self._tell(first + count)
        table.sync()
        rest = merge(np.concatenate(self._changed)) if self._changed else NO_EXTENTS
        question = messages.RepairEnd(self.index, proven=not len(rest))
        answer = self._session.ask(question, messages.Repaired)
        _LOG.warning(
            "the replica's disk %d was damaged: %d blocks went back, %d bytes have changed here since; %s",
            self.index,
            self._brought_count,
            int(rest[:, 1].sum()),
            "it is whole again" if answer.whole else "the next cycle brings the rest",
        )

    def _bring(self, blocks: NDArray[np.int64], theirs: NDArray[np.uint8], known: NDArray[np.uint8]) -> None:
        """Put back those of `blocks` that the disk still has as they were known."""
        block_bytes = self._table.block_bytes
        starts = blocks * block_bytes
        extents = np.stack((starts, np.minimum(block_bytes, self._disk.virtual_bytes - starts)), axis=1)
        data = np.empty(int(extents[:, 1].sum()), np.uint8)
        self._disk.read_extents(extents, data.data)
        mine = native.fingerprints(data, block_bytes)
        is_known = (mine == known).all(axis=1) & (known != _UNKNOWN_ROW).any(axis=1)
        is_theirs = (mine == theirs).all(axis=1)
        if is_known.any():
            pieces = [
                data[row * block_bytes : row * block_bytes + extents[row, 1]]
                for row in np.flatnonzero(is_known).tolist()
            ]
            question = messages.RepairBlocks(
                self.index, blocks[is_known].tolist(), np.concatenate(pieces).tobytes()
            )
            self._session.ask(question, messages.Repaired)
        self._brought_count += int(is_known.sum())
        says = np.where(is_theirs[:, np.newaxis], theirs, _UNKNOWN_ROW)
        self._rows.append((blocks[~is_known], says[~is_known], extents[~is_known & ~is_theirs]))

    def _take_note(self) -> None:
        """Leave what could not go back to the next cut.

        The table says from now on that nobody knows what the replica holds there, so that a comparison finds
        it, and so does another repair where this one is cut: it proves nothing.
        """
        found, self._rows = self._rows, []
        if not found:
            return
        changed = np.concatenate([NO_EXTENTS, *(extents for _, _, extents in found)])
        with self._work.cutting:  # marked first: what the table does not know is sent only where it is marked
            if len(changed) and self._work.machine is not None:
                self._work.mark(self.index, merge(changed))
            for blocks, rows, _ in found:
                for at, block in enumerate(blocks.tolist()):
                    self._table.write(block, rows[at : at + 1])
        self._changed.append(changed)

    def _tell(self, blocks_done: int) -> None:
        virtual_bytes = self._table.header.virtual_bytes
        done_bytes = min(blocks_done * self._table.block_bytes, virtual_bytes)
        self._work.on_progress(
            Progress("repair", done_bytes, virtual_bytes, wire_bytes=self._session.wire_bytes)
        )
