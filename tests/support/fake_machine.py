"""A machine under live tracking, in memory: keeps a list of writes, cuts true logs, and forgets nothing it
must know.

It does what capture does in the terms of replication/live.py, and says when it was asked for what it must not
be asked: a cut inside a cut, known tables that do not describe what the replica will hold, a settle twice.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.hrl import LogWriter

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from hvreplica.clock import Clock
    from hvreplica.disk import Disk
    from hvreplica.files import FileSystem
    from hvreplica.tracking.fingerprints import FingerprintTable

_GRAIN_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class FakeLog:
    """As capture's ClosedLog."""

    disk_index: int
    log_id: uuid.UUID
    previous_log_id: uuid.UUID
    path: Path
    log_bytes: int
    entries: int
    changed_bytes: int
    is_ordered: bool = False


@dataclass(slots=True)
class Epoch:
    """What was written to one disk between two cuts: writes in order, and grains to read at the cut."""

    writes: list[tuple[int, bytes]] = field(default_factory=list)
    grains: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.writes or self.grains)


@dataclass(frozen=True, slots=True)
class FakeCut:
    """As capture's Cut."""

    instant_s: float
    held_us: float
    logs: list[FakeLog]
    epochs: list[Epoch]
    content: list[bytes]  # of each disk at the instant


@dataclass(frozen=True, slots=True)
class FakeTracking:
    """As capture's DiskTracking."""

    index: int
    path: str
    virtual_bytes: int
    dirty_bytes: int
    unlogged_bytes: int
    log_bytes: int
    log_state: str
    journal_regions: int
    writes: int
    written_bytes: int
    judgement: str = ""


class FakeMachine:
    """Any thread may write while another cuts.

    recycled_bytes: what stands behind the end of each log in its file. on_cut: called in a cut after its
    instant, before its logs are made. cuts: all that were made and not given back.
    """

    def __init__(self, files: FileSystem, disks: Sequence[Disk], logs: Path, *, clock: Clock) -> None:
        self.disks = list(disks)
        self.files = files
        self.logs = logs
        self.recycled_bytes = 0
        self.budget_bytes = 1 << 50
        self.on_cut: Callable[[], None] = lambda: None
        self.cuts: list[FakeCut] = []
        self.settled: list[FakeCut] = []
        self.given_back: list[FakeCut] = []
        self.known: list[bool] = []  # for each cut, whether it was given tables
        self._clock = clock
        self._lock = threading.RLock()
        self._cutting = threading.Lock()
        self._epochs = [Epoch() for _ in disks]
        self._unsettled: list[list[Epoch]] = []
        self._written = [[0, 0] for _ in disks]

    def write(self, index: int, disk_offset: int, data: bytes, *, logged: bool = True) -> None:
        """Write as a guest does; what is not logged is read from the disk at the cut."""
        with self._lock:
            self.disks[index].write(data, disk_offset)
            self._written[index][0] += 1
            self._written[index][1] += len(data)
            if logged:
                self._epochs[index].writes.append((disk_offset, data))
            else:
                self._add_grains(index, disk_offset, len(data))

    def content(self, index: int) -> bytes:
        """Return what the guest reads now."""
        with self._lock:
            disk = self.disks[index]
            data = bytearray(disk.virtual_bytes)
            disk.read_into(data, 0)
            return bytes(data)

    def cut(
        self,
        previous_log_ids: Sequence[uuid.UUID],
        *,
        known: Sequence[FingerprintTable | None] | None = None,
        on_instant: Callable[[], None] | None = None,
    ) -> FakeCut:
        """Close every disk's epoch as a log; at one instant, for writes wait."""
        assert self._cutting.acquire(blocking=False), "a cut inside a cut"
        try:
            with self._lock:
                epochs, self._epochs = self._epochs, [Epoch() for _ in self.disks]
                self._unsettled.append(epochs)
                content = [self.content(index) for index in range(len(self.disks))]
                instant_s = self._clock.now_s()
            self.known.append(known is not None)
            try:
                self.on_cut()
                if on_instant is not None:
                    on_instant()
            except BaseException:
                self._unsettled.remove(epochs)
                self.recall([epochs])
                raise
            logs = [
                self._close(
                    index,
                    epoch,
                    content[index],
                    previous_log_ids[index],
                    None if known is None else known[index],
                )
                for index, epoch in enumerate(epochs)
                if epoch
            ]
            cut = FakeCut(instant_s, 7.0, [log for log in logs if log is not None], epochs, content)
            self.cuts.append(cut)
            return cut
        finally:
            self._cutting.release()

    def settle(self, cut: FakeCut) -> None:
        """Forget what a cut holds."""
        assert cut not in self.settled
        assert cut not in self.given_back
        self.settled.append(cut)
        self._unsettled.remove(cut.epochs)

    def give_back(self, cut: FakeCut, *, keep_logs: bool = True) -> None:  # noqa: ARG002 - they always stay
        """Count what a cut holds as changed again, to be read from the disk."""
        assert cut not in self.settled
        assert cut not in self.given_back
        self.given_back.append(cut)
        self.cuts.remove(cut)
        self._unsettled.remove(cut.epochs)
        self.recall([cut.epochs])

    def must_know(self) -> list[list[Epoch]]:
        """Return what a journal still holds if the process ends now, for recall() on the next machine."""
        return [*self._unsettled, self._epochs]

    def recall(self, known: list[list[Epoch]]) -> None:
        """Count what is in `known` as changed, to be read from the disk."""
        with self._lock:
            for epochs in known:
                for index, epoch in enumerate(epochs):
                    self._epochs[index].grains |= epoch.grains
                    for disk_offset, data in epoch.writes:
                        self._add_grains(index, disk_offset, len(data))

    def stop(self) -> None:
        """Do nothing: no cut here takes long."""

    def recycle(self, paths: Iterable[Path]) -> None:
        """Remove logs that nobody needs."""
        for path in paths:
            self.files.unlink(path)

    def mark(self, disk_index: int, extents: npt.NDArray[np.int64]) -> None:
        """Count ranges as changed."""
        with self._lock:
            for disk_offset, length in extents.tolist():
                self._add_grains(disk_index, disk_offset, length)

    def status(self) -> list[FakeTracking]:
        """Return what is tracked now."""
        with self._lock:
            return [self._tracking(index) for index in range(len(self.disks))]

    def _tracking(self, index: int) -> FakeTracking:
        epoch, disk = self._epochs[index], self.disks[index]
        grains = set(epoch.grains)
        for disk_offset, data in epoch.writes:
            grains |= set(range(disk_offset // _GRAIN_BYTES, -(-(disk_offset + len(data)) // _GRAIN_BYTES)))
        return FakeTracking(
            index=index,
            path=str(disk.path),
            virtual_bytes=disk.virtual_bytes,
            dirty_bytes=len(grains) * _GRAIN_BYTES,
            unlogged_bytes=len(epoch.grains) * _GRAIN_BYTES,
            log_bytes=sum(len(data) for _, data in epoch.writes),
            log_state="open",
            journal_regions=len({grain // 64 for grain in grains}),
            writes=self._written[index][0],
            written_bytes=self._written[index][1],
        )

    def _add_grains(self, index: int, disk_offset: int, length: int) -> None:
        end = disk_offset + length
        self._epochs[index].grains |= set(range(disk_offset // _GRAIN_BYTES, -(-end // _GRAIN_BYTES)))

    def _close(
        self,
        index: int,
        epoch: Epoch,
        content: bytes,
        previous_log_id: uuid.UUID,
        known: FingerprintTable | None,
    ) -> FakeLog | None:
        log_id = self._clock.guid()
        path = self.logs / f"{log_id}.hrl"
        writer = LogWriter.create(
            self.files,
            path,
            log_id=log_id,
            previous_log_id=previous_log_id,
            data_write_guid=None,
            clock=self._clock,
        )
        with writer:
            for disk_offset, data in epoch.writes:
                writer.append(np.array([[disk_offset, len(data)]], np.int64), data)
            logged = {
                grain
                for disk_offset, data in epoch.writes
                for grain in range(disk_offset // _GRAIN_BYTES, -(-(disk_offset + len(data)) // _GRAIN_BYTES))
            }
            for start, end in unlogged_ranges(epoch.grains, content, known, logged):
                writer.append(np.array([[start, end - start]], np.int64), content[start:end])
            summary = writer.close()
        if not summary.entries:
            self.files.unlink(path)
            return None
        if self.recycled_bytes:
            file = self.files.open(path, writable=True)
            file.write(b"\xee" * self.recycled_bytes, summary.log_bytes)
            file.sync()
            file.close()
        return FakeLog(
            index, log_id, previous_log_id, path, summary.log_bytes, summary.entries, summary.data_bytes
        )


def unlogged_ranges(
    grains: set[int], content: bytes, known: FingerprintTable | None, logged: set[int]
) -> list[tuple[int, int]]:
    """Return the (start, end) of what a cut reads from the disk: grains, without the blocks that are known.

    Where the log has something of a grain, the replica will not hold what is known: nothing is left out.
    """
    ranges = []
    for grain in sorted(grains):
        start, end = grain * _GRAIN_BYTES, min((grain + 1) * _GRAIN_BYTES, len(content))
        if known is None or grain in logged:
            ranges.append((start, end))
            continue
        rows = native.fingerprints(np.frombuffer(content[start:end], np.uint8), known.block_bytes)
        held = known.read(start // known.block_bytes, len(rows))
        for number in np.flatnonzero((rows != held).any(axis=1)).tolist():
            first = start + number * known.block_bytes
            ranges.append((first, min(first + known.block_bytes, end)))
    return ranges
