"""The tracking of one disk: its epochs, its journal and its logs, and what has to be done before a write.

Order of every write: its regions are durably marked in the journal, its grains are noted and its data is
logged, then it reaches the disk. So after a power cut the journal names a superset of what differs from the
last durable cut, whatever of log and disk survived.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hvreplica import native
from hvreplica.capture.cut_reader import CutReader
from hvreplica.formats.hrl import HEADER_BYTES, METADATA_BYTES_DEFAULT
from hvreplica.formats.times import FLUSHES_MAX, SLOT_US_MIN, TICKS_MAX
from hvreplica.hrl import GrownLog
from hvreplica.native.live import GRAIN_BYTES, Epoch, LogState, Track, TrackStatus, merge_grains

if TYPE_CHECKING:
    from uuid import UUID

    import numpy.typing as npt

    from hvreplica.capture.log_folder import LogFolder
    from hvreplica.disk import Disk
    from hvreplica.hrl import LogWriter
    from hvreplica.hrl.report import LogSummary
    from hvreplica.native.live import Gate
    from hvreplica.tracking.compare import KnownBlocks
    from hvreplica.tracking.journal import IntentJournal

_LOG = logging.getLogger("hvreplica.capture")


_NOT_READY_S = 0.0002


class LogSettings(NamedTuple):
    """limit_bytes: of one log; 0 logs nothing. write_bytes_max: longer writes are left to the map.

    has_times: whether it is noted when entries come, see formats/times.py.
    """

    limit_bytes: int
    write_bytes_max: int
    has_times: bool = False


class Ended(NamedTuple):
    """An epoch that a cut has ended, and the log that grew with it, if one did.

    is_ordered: whether the log holds every write of the epoch, so that nothing is read from the disk for it.
    """

    epoch: Epoch
    writer: LogWriter | None
    is_ordered: bool = False


class TrackedDisk:
    """One disk under capture. `track` is what the native loop writes through."""

    def __init__(
        self, disk: Disk, gate: Gate, journal: IntentJournal, folder: LogFolder, settings: LogSettings
    ) -> None:
        """Track from now on; what the journal has marked is changed, and read from the disk at the next
        cut.
        """
        self.disk = disk
        self.journal = journal
        self._gate = gate
        self._folder = folder
        self._settings = settings
        self._stopping = threading.Event()
        self._reader: CutReader | None = None
        began = self.begin()
        self._writer = began.writer
        self.track = Track(gate, began.epoch, journal.armed, disk.virtual_bytes)
        self.mark(journal.regions())

    def begin(self) -> Ended:
        """Return a new epoch with its open log, for the next cut to begin; discard() one that is not
        begun.
        """
        epoch = Epoch(self.disk.virtual_bytes)
        if self._settings.limit_bytes == 0:
            return Ended(epoch, None)
        try:
            writer = self._folder.create(self.disk.data_write_guid)
        except OSError as error:
            # Tracking does not depend on a log: the cut reads from the disk.
            _LOG.warning("no log for %s: %s; changes are kept in the map alone", self.disk.path, error)
            return Ended(epoch, None)
        descriptor = writer.fileno()
        if descriptor is None:
            return Ended(epoch, writer)
        epoch.open_log(
            descriptor,
            position=HEADER_BYTES + METADATA_BYTES_DEFAULT,
            last_block=HEADER_BYTES,
            limit=self._settings.limit_bytes,
            write_bytes_max=self._settings.write_bytes_max,
        )
        if self._settings.has_times:
            epoch.note_moments(tick_count=TICKS_MAX, flush_count=FLUSHES_MAX, slot_us=SLOT_US_MIN)
        return Ended(epoch, writer)

    def discard(self, ended: Ended) -> None:
        """Give up a log."""
        if ended.writer is not None:
            ended.writer.abort()
            self._folder.recycle([ended.writer.path])

    # ---- before and beside writes

    def arm(self, disk_offset: int, length: int) -> None:
        """Mark the regions of a range durably. Raises: OSError; then nothing may be written there."""
        self.journal.arm(np.array([[disk_offset, length]], np.int64))

    def preserve(self, disk_offset: int, length: int) -> None:
        """Let the cut that is being read have a range before it changes."""
        reader = self._reader
        if reader is None:
            threading.Event().wait(_NOT_READY_S)  # the cut is about to have one, or to be over
        else:
            reader.preserve(disk_offset, length)

    def mark(self, extents: npt.NDArray[np.int64]) -> None:
        """Count ranges as changed, durably; the next cut reads them from the disk."""
        if not len(extents):
            return
        self.journal.arm(extents)  # all at once, for one sync
        for disk_offset, length in extents.tolist():
            while not self._mark(disk_offset, length):
                self.arm(disk_offset, length)

    def _mark(self, disk_offset: int, length: int) -> bool:
        """Mark a range, or return False where a cut has cleared its regions since they were armed."""
        with self._gate.writing(disk_offset, length):
            if self.track.check(disk_offset, length) is TrackStatus.ARM:
                return False
            self.track.mark(disk_offset, length)
            return True

    # ---- the cut, after native.live.cut() has ended the epoch

    def swap(self, epoch: Epoch, begun: Ended) -> Ended:
        """Follow a cut that has ended `epoch` and begun another; prepare() or give_back() comes next."""
        ended = Ended(epoch, self._writer)
        self._writer = begun.writer
        return ended

    def prepare(self, ended: Ended, known: KnownBlocks | None) -> Ended:
        """Make ready to read what the log of an ended epoch lacks; finish() or give_back() comes next.

        known: see Machine.cut(). Raises: OSError.
        """
        epoch, writer = ended.epoch, ended.writer
        if not epoch.touched.any():
            return ended
        if writer is not None and epoch.log_state in {LogState.OFF, LogState.FAILED}:
            if epoch.log_state is LogState.FAILED:
                _LOG.warning("the log of %s could not be written; the cut reads the disk", self.disk.path)
            self.discard(ended)
            writer = None
        is_ordered = writer is not None and not _count(epoch.unlogged, epoch.touched)
        if writer is None:
            writer = self._folder.create(self.disk.data_write_guid)
        else:
            writer.adopt(GrownLog(**epoch.grown()))
        self._reader = CutReader(self.disk, epoch, writer, known, stopping=self._stopping)
        return Ended(epoch, writer, is_ordered)

    def finish(self, ended: Ended, previous_log_id: UUID) -> LogSummary | None:
        """Read what the log of an ended epoch lacks, and close it, durably; None where nothing changed."""
        reader, writer = self._reader, ended.writer
        if reader is not None and writer is not None:
            reader.run()
        self._unguard()
        if writer is None or writer.entry_count == 0:
            self.discard(ended)
            return None
        return writer.close(previous_log_id=previous_log_id)

    def stop(self) -> None:
        """Let finish() fail soon, now and later; from any thread."""
        self._stopping.set()

    def give_back(self, ended: Ended) -> None:
        """Count all that an ended epoch held as changed since the cut before it.

        Its log is of no use any more: discard() it. Raises nothing.
        """
        with self._gate.closed():
            now, old = self.track.epoch, ended.epoch
            np.bitwise_or(now.touched, old.touched, out=now.touched)
            merge_grains(now.dirty, old.dirty, old.touched)
            merge_grains(now.unlogged, old.dirty, old.touched)
            self.track.unguard()
        self._reader = None

    def _unguard(self) -> None:
        with self._gate.closed():  # nobody looks at the guard while it goes
            self.track.unguard()
        self._reader = None

    # ---- figures

    def dirty_bytes(self, *ended: Epoch) -> int:
        """Return the bytes of grains written since the last cut, and in epochs whose cut is not recorded."""
        epochs = (self.track.epoch, *ended)
        return sum(_count(epoch.dirty, epoch.touched) for epoch in epochs)

    @property
    def unlogged_bytes(self) -> int:
        """The bytes of grains that the next cut reads from the disk."""
        return _count(self.track.epoch.unlogged, self.track.epoch.touched)

    def end(self) -> None:
        """Give up the open log; the journal keeps what is changed and not cut, and nothing else."""
        with self._gate.closed():
            lapsed = self.journal.armed.copy()
            touched = self.track.epoch.touched
            lapsed[: len(touched)] &= ~touched
            np.bitwise_and(self.journal.armed, ~lapsed, out=self.journal.armed)
        self.journal.cleared(lapsed)
        self.discard(Ended(self.track.epoch, self._writer))
        self._writer = None


def _count(bitmap: npt.NDArray[np.uint8], touched: npt.NDArray[np.uint8]) -> int:
    """Return the bytes of the grains in a bitmap, in regions that were touched."""
    regions = np.flatnonzero(np.unpackbits(touched, bitorder="little"))
    words = bitmap.view(np.uint64)[regions]
    grain_count: int = native.bitmap_count(words.view(np.uint8))
    return grain_count * GRAIN_BYTES
