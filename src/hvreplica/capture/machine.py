"""The disks of one VM under capture: served, tracked, and cut together.

    STATE/journal/<index>.ij   what may differ from the last durable cut, see tracking/journal.py
    STATE/open, logs, spare    see capture/log_folder.py

A cut is one instant of all disks: the gate that every write passes is closed, each disk's epoch is exchanged
for a new one, and the gate is opened. All that takes long comes before (new logs) or after (reading what the
old logs lack, closing them), while the guest goes on.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import msgspec
import numpy as np

from hvreplica.capture.log_folder import LogFolder
from hvreplica.capture.service import DiskService
from hvreplica.capture.strangers import Watch
from hvreplica.capture.tracked import Ended, LogSettings, TrackedDisk
from hvreplica.errors import FormatError, HvReplicaError, StateError, kept
from hvreplica.native import live
from hvreplica.tracking.identity import Judgement, Verdict, disk_identity, judge
from hvreplica.tracking.journal import IntentJournal
from hvreplica.units import KIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path
    from uuid import UUID

    from hvreplica.clock import Clock
    from hvreplica.disk import Disk
    from hvreplica.disk.open import Format
    from hvreplica.files import FileSystem
    from hvreplica.formats.journal import DiskIdentity
    from hvreplica.native.live import Epoch
    from hvreplica.tracking.compare import KnownBlocks

LOG_BUDGET_SHARE = 4  # a log may have a quarter of its disk
WRITE_BYTES_MAX = 128 * KIB  # longer writes cost less to read at the cut than to write twice
ORDERED_WRITE_BYTES_MAX = 64 << 20  # longer than any write over NBD: all of them are logged
_SETTLE_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class Slot:
    """One disk of a VM.

    index: its number in the VM. has_base: whether the replica has a copy to build upon.
    """

    index: int
    disk: Disk
    has_base: bool


@dataclass(frozen=True, slots=True)
class ClosedLog:
    """One disk's part of a cut.

    changed_bytes: guest bytes in the log, a byte that was written twice counts twice. is_ordered: whether its
    entries are every write since the cut before, in the guest's order: nothing was read from the disk.
    """

    disk_index: int
    log_id: UUID
    previous_log_id: UUID
    path: Path
    log_bytes: int
    entries: int
    changed_bytes: int
    is_ordered: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """One instant of all disks. logs: of those that changed. held_us: for how long writes were held."""

    instant_s: float
    held_us: float
    logs: list[ClosedLog]


class DiskTracking(msgspec.Struct, frozen=True):
    """What is tracked of one disk now.

    dirty_bytes: of grains that were written since the last cut that is recorded. judgement: what the start
    found of changes while nothing was tracked.
    """

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
    judgement: str


class Machine:
    """Owns the disks it is given, until close(). Any thread may call; cuts come one after the other.

    budget_bytes: what the logs of all disks may have together.
    """

    def __init__(
        self,
        files: FileSystem,
        state: Path,
        slots: Sequence[Slot],
        *,
        clock: Clock,
        log_budget_bytes: int | None = None,
        write_bytes_max: int = WRITE_BYTES_MAX,
        has_times: bool = False,
    ) -> None:
        """Begin to track. What a crash or another program left uncertain counts as changed.

        log_budget_bytes: of one disk's log; a quarter of the disk by default, 0 for none. write_bytes_max:
        longer writes are not logged. has_times: whether a times file stands beside each log that is in order;
        a cut's instant is then of the clock that stamps the entries. Raises: OSError, FormatError of the
        disks.
        """
        self._files = files
        self._clock = clock
        self._gate = live.Gate()
        self._cutting = threading.Lock()
        self._unsettled: tuple[Cut, list[Ended]] | None = None
        self._unrecorded: list[Epoch] = []  # of a cut from its instant until it is settled or given back
        self._settled_s = clock.monotonic_s()
        self._indices = [slot.index for slot in slots]
        self.disks = [slot.disk for slot in slots]
        total = sum(disk.virtual_bytes for disk in self.disks)
        self.budget_bytes = (log_budget_bytes or 0) * len(slots) or total // LOG_BUDGET_SHARE
        self._folder = LogFolder(files, state, clock, spare_bytes_max=total // LOG_BUDGET_SHARE)
        self._journals = state / "journal"
        files.make_directory(self._journals)
        self._tracked: list[TrackedDisk] = []
        self._judgements: list[Judgement] = []
        self._watches: list[Watch] = []
        for slot in slots:
            budget = (
                slot.disk.virtual_bytes // LOG_BUDGET_SHARE if log_budget_bytes is None else log_budget_bytes
            )
            self._begin(slot, LogSettings(budget, write_bytes_max, has_times))
        self._has_times = has_times
        noter = live.FlushNoter(self._gate, [tracked.track for tracked in self._tracked])
        self.services = [
            DiskService(
                tracked.disk,
                self._gate,
                tracked,
                read_only=False,
                clock=clock,
                on_flush=noter.note if has_times else None,
            )
            for tracked in self._tracked
        ]

    def _begin(self, slot: Slot, settings: LogSettings) -> None:
        disk = slot.disk
        before = self._identity(disk)
        journal, judgement = self._open_journal(slot, before)
        if slot.has_base and judgement.verdict is not Verdict.SAME:
            # Before the identity is recorded: from then on nothing else tells that this is not certain.
            journal.arm(np.array([[0, disk.virtual_bytes]], np.int64))
        guid = self._clock.guid() if disk.format == "vhdx" else None
        # The disk takes a new identity now; a crash between the two finds one or the other.
        journal.record(replace(before, next_guid=guid), clean=False)
        disk.direct(data_write_guid=guid)
        journal.record(self._identity(disk), clean=False)
        tracked = TrackedDisk(disk, self._gate, journal, self._folder, settings)
        self._tracked.append(tracked)
        self._judgements.append(judgement)
        self._watches.append(Watch(self._files, disk))

    def _open_journal(self, slot: Slot, now: DiskIdentity) -> tuple[IntentJournal, Judgement]:
        path = self._journals / f"{slot.index}.ij"
        disk = slot.disk
        reason = "there was no intent journal"
        if slot.has_base and self._files.exists(path):
            try:
                journal = IntentJournal.open(self._files, path, virtual_bytes=disk.virtual_bytes)
            except FormatError as error:
                reason = str(error)
            else:
                return journal, judge(
                    journal.identity, now, was_clean=journal.is_clean, disk_format=cast("Format", disk.format)
                )
        journal = IntentJournal.create(
            self._files, path, disk_index=slot.index, virtual_bytes=disk.virtual_bytes, clock=self._clock
        )
        return journal, Judgement(Verdict.UNKNOWN, reason)

    def _identity(self, disk: Disk) -> DiskIdentity:
        guid = disk.data_write_guid if disk.format == "vhdx" else None
        return disk_identity(self._files, disk.path, data_write_guid=guid)

    # ---- cuts

    def cut(
        self,
        previous_log_ids: Sequence[UUID],
        *,
        known: Sequence[KnownBlocks | None] | None = None,
        on_instant: Callable[[], None] | None = None,
    ) -> Cut:
        """Cut all disks at one instant; on return the logs of those that changed are closed and durable.

        previous_log_ids: for each disk, what its log follows. known: for each disk a table of what the
        replica will hold before this cut: blocks that are read from the disk and equal to it are left out.
        on_instant: called as soon as the instant has passed, before anything is read: a guest that was frozen
        for it may go on. settle() or give_back() comes before the next cut. Raises: StateError if it did not,
        or after stop(); OSError. All is then as if there had been no cut.
        """
        with self._cutting:
            if self._unsettled is not None:
                raise StateError("the cut before was neither recorded nor given back")
            self._look_for_strangers()
            begun: list[Ended] = []
            try:
                begun += (tracked.begin() for tracked in self._tracked)
            except BaseException:
                self._discard(begun)
                raise
            instant_s = self._clock.now_s()
            old, disarmed, held_ns = live.cut(
                self._gate, [tracked.track for tracked in self._tracked], [each.epoch for each in begun]
            )
            if self._has_times:
                # No entry of it is stamped later; and none of the next cut's logs earlier, unless the clock
                # is set back between.
                instant_s = old[0].ended_us / 1e6
            self._unrecorded = old
            ended = [
                tracked.swap(epoch, new)
                for tracked, epoch, new in zip(self._tracked, old, begun, strict=True)
            ]
            logs: list[ClosedLog | None] = []
            try:
                for place, tracked in enumerate(self._tracked):
                    tracked.journal.cleared(disarmed[place])
                    table = None if known is None else known[place]
                    ended[place] = tracked.prepare(ended[place], table)
                # Only now: a guest that thaws writes, and may have to wait for what is prepared here.
                if on_instant is not None:
                    on_instant()
                for place, each in enumerate(ended):
                    logs.append(self._finish(place, each, previous_log_ids[place]))
                self._folder.sync()
            except BaseException:
                self._give_back(ended, logs)
                raise
            cut = Cut(instant_s, held_ns / 1000, [log for log in logs if log is not None])
            self._unsettled = cut, ended
            return cut

    def _look_for_strangers(self) -> None:
        """Count a disk as changed to which somebody else wrote; the cut that comes reads all of it."""
        for watch, tracked in zip(self._watches, self._tracked, strict=True):
            if watch.notices():
                tracked.mark(np.array([[0, tracked.disk.virtual_bytes]], np.int64))

    def _finish(self, place: int, ended: Ended, previous_log_id: UUID) -> ClosedLog | None:
        summary = self._tracked[place].finish(ended, previous_log_id)
        if summary is None or ended.writer is None:
            return None
        return ClosedLog(
            disk_index=self._indices[place],
            log_id=ended.writer.log_id,
            previous_log_id=previous_log_id,
            path=self._folder.keep(ended.writer, ended.epoch.moments() if ended.is_ordered else None),
            log_bytes=summary.log_bytes,
            entries=summary.entries,
            changed_bytes=summary.data_bytes,
            is_ordered=ended.is_ordered,
        )

    def settle(self, cut: Cut) -> None:
        """Take note that a cut is recorded durably: tracking need not know what it holds any more."""
        with self._cutting:
            self._take_unsettled(cut)
            self._unrecorded = []
            now_s = self._clock.monotonic_s()
            if now_s - self._settled_s >= _SETTLE_AFTER_S:
                self._settled_s = now_s
                for tracked, service in zip(self._tracked, self.services, strict=True):
                    self._forget(tracked, service)

    def _forget(self, tracked: TrackedDisk, service: DiskService) -> None:
        """Let the journal forget regions, once the disk has durably what cuts hold of them.

        A guest need not flush for hours. Until the disk is flushed, a crash may take from it what the replica
        has, and only the journal could tell.
        """
        try:
            service.flush()
        except (OSError, HvReplicaError) as error:
            kept(error)
            return  # it is reported, and no later flush succeeds: from now on the journal only grows
        tracked.journal.settle()

    def give_back(self, cut: Cut, *, keep_logs: bool = False) -> None:
        """Count all that a cut holds as changed again: it could not be recorded. Its logs go.

        keep_logs: they stay, for somebody has recorded them all the same.
        """
        with self._cutting:
            self._give_back(self._take_unsettled(cut), [] if keep_logs else cut.logs)

    def _take_unsettled(self, cut: Cut) -> list[Ended]:
        if self._unsettled is None or self._unsettled[0] is not cut:
            raise StateError("this cut is not the last one, or was settled before")
        ended, self._unsettled = self._unsettled[1], None
        return ended

    def _give_back(self, ended: Sequence[Ended], logs: Sequence[ClosedLog | None]) -> None:
        for tracked, each in zip(self._tracked, ended, strict=True):
            tracked.give_back(each)
        self._unrecorded = []
        self._discard(ended)  # last: what is in memory must be whole before anything can fail
        self._folder.recycle(log.path for log in logs if log is not None)

    def _discard(self, begun: Sequence[Ended]) -> None:
        for tracked, each in zip(self._tracked, begun, strict=False):
            tracked.discard(each)

    def mark(self, disk_index: int, extents: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> None:
        """Count ranges as changed, durably; the next cut reads them from the disk.

        extents: int64 (n, 2) of (disk_offset, length).
        """
        self._tracked[self._indices.index(disk_index)].mark(extents)

    def stop(self) -> None:
        """Let a cut that is being read, and every later one that has to read, fail soon; from any thread."""
        for tracked in self._tracked:
            tracked.stop()

    def recycle(self, paths: Iterable[Path]) -> None:
        """Take back logs that were acknowledged, to be written over."""
        self._folder.recycle(paths)

    def status(self) -> list[DiskTracking]:
        """Return what is tracked of each disk."""
        unrecorded = self._unrecorded
        return [
            DiskTracking(
                index=index,
                path=str(tracked.disk.path),
                virtual_bytes=tracked.disk.virtual_bytes,
                dirty_bytes=tracked.dirty_bytes(*(unrecorded[place : place + 1])),
                unlogged_bytes=tracked.unlogged_bytes,
                log_bytes=tracked.track.epoch.log_bytes,
                log_state=tracked.track.epoch.log_state.name.lower(),
                journal_regions=tracked.journal.region_count(),
                writes=tracked.track.writes,
                written_bytes=tracked.track.written_bytes,
                judgement=judgement.reason,
            )
            for place, (index, tracked, judgement) in enumerate(
                zip(self._indices, self._tracked, self._judgements, strict=True)
            )
        ]

    def close(self) -> None:
        """End tracking, after the last client has left: disks flushed and closed, what is not cut journalled.

        Every disk is closed, whatever happens to another one. Raises: what the first one that failed raised;
        the journal of such a disk says that it was not left in good order.
        """
        if self._unsettled is not None:
            self.give_back(self._unsettled[0])
        with contextlib.ExitStack() as stack:
            for tracked in self._tracked:
                stack.callback(self._close, tracked)

    def _close(self, tracked: TrackedDisk) -> None:
        with contextlib.closing(tracked.journal):
            tracked.end()
            tracked.disk.changed()
            tracked.disk.close()
            tracked.journal.record(self._identity(tracked.disk), clean=True)

    def abandon(self) -> None:
        """Let go of everything as it is, as if the process had died."""
        for tracked in self._tracked:
            tracked.disk.abandon()
            tracked.journal.close()
