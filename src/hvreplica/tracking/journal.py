"""The intent journal of one disk in a file: a region is durably marked before its first write.

    armed     what may be written to without asking: durable for as long as the bit stands here
    image     what counts as marked; the file has it, or gets it with the next write of the sector
    certain   what any crash from now on finds marked. armed ⊆ certain; image - certain is being made durable
    lapsed    marked, proven removable by cleared(), and not armed again since; settle() forgets it

Guarantees: a crash at any instant leaves at least the regions whose arm() returned and that were not handed
to cleared() since. What was removed stands in the file until two calls of settle() saw it lapsed, so a region
that is written between all cuts costs one sync, not one for each cut. A lost removal costs reading.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica import native
from hvreplica.disk.extents import checked_rows
from hvreplica.errors import FieldOutOfRange, FormatError, kept
from hvreplica.files import write_durably
from hvreplica.formats.journal import (
    BITMAP_OFFSET,
    DISK_BYTES_MAX,
    REGION_BYTES,
    REGION_COUNT_MAX,
    SECTOR_BITMAP_BYTES,
    DiskIdentity,
    JournalBitmap,
    JournalHeader,
    JournalState,
    choose_header,
    file_bytes_of,
    header_offset_of,
    pack_sectors,
    sector_offset_of,
    sectors_of,
    unpack_sectors,
)
from hvreplica.tracking.regions import Window, empty_bitmap, extents_of, grown_bitmap, set_before, window_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from hvreplica.clock import Clock
    from hvreplica.files import BlockFile, FileSystem


AHEAD_REGIONS_MAX = 32


class _Batch:
    """Regions of several arm() that share one sync. outcome: None until it is decided, True, or the error."""

    __slots__ = ("bits", "outcome", "places", "sectors")

    def __init__(self, bitmap_bytes: int) -> None:
        self.bits = empty_bitmap(bitmap_bytes)
        self.places: list[slice] = []  # what of `bits` was touched
        self.sectors: set[int] = set()
        self.outcome: BaseException | bool | None = None

    def add(self, place: slice, bits: NDArray[np.uint8]) -> None:
        self.bits[place] |= bits
        self.places.append(place)
        self.sectors |= _sectors(place.start, bits)


class IntentJournal:
    """One disk's journal. Any thread may call anything; make one by create() or open().

    armed: uint8 bitmap of regions, least significant bit first, always of the size for 64 TiB, so that native
    code can keep its address; bits behind the disk are 0. Native code may read it at any time, and clear bits
    of it where the owner then calls cleared(). Everything else belongs to this class.
    """

    REGION_BYTES = REGION_BYTES

    def __init__(self, file: BlockFile, header: JournalHeader, sequence: int) -> None:
        self.armed = np.zeros(REGION_COUNT_MAX // 8, np.uint8)  # memory is taken by what is touched of it
        self._file = file
        self._header = header
        self._sequence = sequence  # of the last write of sectors
        self._image, self._certain = empty_bitmap(self._used), empty_bitmap(self._used)
        self._lapsed = empty_bitmap(self._used)  # since the last settle()
        self._aged = empty_bitmap(self._used)  # before it
        self._stale: set[int] = set()  # sectors that the file still has with bits that are forgotten
        self._turn = threading.Condition(threading.Lock())
        self._busy = False  # one thread at a time writes to the file, without the lock
        self._flight: _Batch | None = None
        self._next = _Batch(self._used)
        self._failure: BaseException | None = None

    @classmethod
    def create(
        cls, files: FileSystem, path: Path, *, disk_index: int, virtual_bytes: int, clock: Clock
    ) -> IntentJournal:
        """Make a journal without marks and identity, durably, in the place of an old one. Raises: OSError."""
        _check_size(virtual_bytes)
        header = JournalHeader(1, disk_index, virtual_bytes, JournalState.NOT_RECORDED, None)
        count = sectors_of(header.region_count)
        top = bytearray(BITMAP_OFFSET)
        for copy in (header, header.followed()):
            packed, at = copy.pack(), header_offset_of(copy.sequence)
            top[at : at + len(packed)] = packed
        sectors = pack_sectors(range(count), empty_bitmap(0), sequence=1)
        write_durably(files, path, bytes(top) + b"".join(sectors), clock=clock)
        return cls.open(files, path, virtual_bytes=virtual_bytes)

    @classmethod
    def open(cls, files: FileSystem, path: Path, *, virtual_bytes: int) -> IntentJournal:
        """Open a journal; all that it has marked is durably so, and armed, on return.

        Damaged sectors count as marked and are mended. A disk of another size than before is as by resize().
        Raises: FormatError if no copy of the header is valid, FileNotFoundError, OSError.
        """
        file = files.open(path, writable=True)
        try:
            header, found = _read(file, path)
            journal = cls(file, header, found.sequence)
            journal._take_over(found)
            if virtual_bytes != header.virtual_bytes:
                journal.resize(virtual_bytes)
        except BaseException:
            file.close()
            raise
        return journal

    @property
    def path(self) -> Path:
        """The file's name."""
        return self._file.path

    @property
    def disk_index(self) -> int:
        """The disk's place in its VM."""
        return self._header.disk_index

    @property
    def virtual_bytes(self) -> int:
        """The disk's size."""
        return self._header.virtual_bytes

    @property
    def identity(self) -> DiskIdentity | None:
        """What was recorded last; None while nothing was."""
        return self._header.identity

    @property
    def is_clean(self) -> bool:
        """Whether the last record() said so."""
        return self._header.state == JournalState.CLEAN

    def regions(self) -> NDArray[np.int64]:
        """Return what a crash now would leave unknown.

        int64 (n, 2) of (disk_offset, length), sorted, merged, clipped to the disk. Lapsed regions are part of
        it until they are forgotten.
        """
        with self._turn:
            return extents_of(self._image, self._header.virtual_bytes)

    def region_count(self) -> int:
        """Return how many regions that are."""
        with self._turn:
            return int(native.bitmap_count(self._image[: self._used]))

    def arm(self, extents: NDArray[np.int64]) -> None:
        """Mark every region that `extents` touches: durable, and visible in `armed`, on return.

        extents: (n, 2) of (disk_offset, length) in bytes. Concurrent calls share one sync; what stands in the
        file already needs none. Where armed regions lie right before, as many behind are armed too, at most
        AHEAD_REGIONS_MAX: who writes in sequence waits for one sync in 128 MiB. After an error no region is
        armed that is not durable. Native code may have cleared the bits again on return, at a cut: look again
        before the write.
        Raises: FieldOutOfRange beyond the disk's end; OSError, for every later call too if a sync failed.
        """
        size = self._header.virtual_bytes
        window = self._window(extents)
        if self._failure is not None:
            raise kept(self._failure)
        if window is None or not np.count_nonzero(window.bits & ~self.armed[window.place]):
            return
        with self._turn:
            if size != self._header.virtual_bytes:
                window = self._window(extents) or window
            batch = self._admit(window)
            while batch is not None and batch.outcome is None:
                if self._busy:
                    self._turn.wait()
                else:
                    self._lead(batch)
        if batch is not None and isinstance(batch.outcome, BaseException):
            raise kept(batch.outcome)

    def cleared(self, removed: NDArray[np.uint8]) -> None:
        """Take over that `removed`, bits that native code cleared in `armed`, may be forgotten.

        The caller has proven that what the regions held is durably cut. Bits that are armed again stay. In
        memory only; removed: uint8 bitmap, its bytes behind the disk's are not looked at.
        """
        with self._turn:
            used = min(len(removed), self._used)
            place = slice(0, used)
            self._lapsed[place] |= removed[:used] & self._certain[place] & ~self.armed[place]

    def settle(self) -> None:
        """Forget what had lapsed at the last call and was not armed since; write it, without a sync.

        The time between two calls is for how long a region stays marked after its last write was cut: call it
        every few seconds, not at every cut. Raises: OSError, which nothing is lost by.
        """
        with self._alone():
            with self._turn:
                self._forget(self._aged)
                self._aged, self._lapsed = self._lapsed, self._aged
            self._write(self._stale)

    def record(self, identity: DiskIdentity, *, clean: bool) -> None:
        """Record what the disk's file looks like, durably; with clean, that nothing will write to it now.

        Forgets all that lapsed, so that after a clean stop nothing is read that need not be. Record again,
        with clean False, before the first write. Raises: OSError.
        """
        with self._alone():
            with self._turn:
                self._forget(self._lapsed)
                self._forget(self._aged)
            self._write(self._stale)
            state = JournalState.CLEAN if clean else JournalState.IN_USE
            header = self._header.followed(identity=identity, state=state)
            self._write_header(header)
            self._header = header

    def resize(self, virtual_bytes: int) -> None:
        """Follow a new size of the disk, durably: marks stay, those behind a nearer end go.

        No native code may clear bits of `armed` meanwhile. Raises: FieldOutOfRange, OSError.
        """
        _check_size(virtual_bytes)
        with self._alone():
            header = self._header.followed(virtual_bytes=virtual_bytes)
            before, after = sectors_of(self._header.region_count), sectors_of(header.region_count)
            if after > before:
                self._write(range(before, after))
                self._sync()  # first, or a crash would find sectors that are not there, and marked
            self._write_header(header)
            with self._turn:
                self._forget_behind(header.region_count)
                self._header = header
                self._grow()
            self._file.resize(file_bytes_of(header.region_count))

    def close(self) -> None:
        """Close without syncing. May be called twice."""
        self._file.close()

    @property
    def _used(self) -> int:
        """The bytes of each bitmap that the disk needs."""
        return -(-self._header.region_count // 8)

    def _window(self, extents: NDArray[np.int64]) -> Window | None:
        """Return the regions that `extents` touch; None where none."""
        rows = checked_rows(extents, virtual_bytes=self._header.virtual_bytes, path=self._file.path)
        rows = rows[rows[:, 1] > 0]
        if not len(rows):
            return None
        first = rows[:, 0] // REGION_BYTES
        return window_of(np.column_stack((first, (rows.sum(axis=1) - 1) // REGION_BYTES + 1 - first)))

    def _admit(self, window: Window) -> _Batch | None:
        """Arm what is certain; return the batch that brings the rest, None where there is none."""
        if self._failure is not None:
            raise kept(self._failure)
        place, bits = window.place, window.bits
        sure = bits & self._certain[place]
        self._image[place] |= bits
        self._lapsed[place] &= ~bits
        self._aged[place] &= ~bits
        self.armed[place] |= sure
        missing = bits & ~sure
        if not np.count_nonzero(missing):
            return None
        flight = self._flight
        if flight is not None and not np.count_nonzero(missing & ~flight.bits[place]):
            return flight
        self._next.add(place, missing)
        self._add_ahead(window)
        return self._next

    def _add_ahead(self, window: Window) -> None:
        """Add as many regions behind the window as are armed right before it."""
        count = set_before(self.armed, window.first, count_max=AHEAD_REGIONS_MAX)
        count = min(count, self._header.region_count - window.end)
        if count > 0:
            place, bits, _, _ = window_of(np.array([[window.end, count]], np.int64))
            bits &= ~self._certain[place]  # what is certain costs nothing when its turn comes
            self._image[place] |= bits
            self._next.add(place, bits)

    def _lead(self, batch: _Batch) -> None:
        """Write the waiting batch and sync; the lock is held, but not during the work."""
        self._busy, self._flight, self._next = True, batch, _Batch(self._used)
        self._turn.release()
        outcome: BaseException | bool = True
        try:
            self._write(batch.sectors)
            self._sync()
        except BaseException as error:
            outcome = kept(error)
        finally:
            self._turn.acquire()
            self._busy, self._flight = False, None
        for place in batch.places:
            bits = batch.bits[place] & self._image[place]  # less what a shorter disk has no more
            if outcome is True:
                self._certain[place] |= bits
                self.armed[place] |= bits
                # A cut may have taken back what an earlier batch brought; armed again, it does not lapse.
                self._lapsed[place] &= ~bits
                self._aged[place] &= ~bits
            else:
                # What others still wait for stays; and in the file it may stand, which does no harm.
                self._image[place] &= ~(bits & ~self._certain[place] & ~self._next.bits[place])
        batch.outcome = outcome
        self._turn.notify_all()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the one thread that writes to the file; the lock is not held."""
        with self._turn:
            while self._busy:
                self._turn.wait()
            if self._failure is not None:
                raise kept(self._failure)
            self._busy = True
        try:
            yield
        finally:
            with self._turn:
                self._busy = False
                self._turn.notify_all()

    def _forget(self, bits: NDArray[np.uint8]) -> None:
        """Take `bits` out of the image, and out of `bits`; their sectors are stale. The lock is held."""
        used = slice(0, self._used)
        self._stale |= _sectors(0, bits[used] & self._image[used])
        self._image[used] &= ~bits[used]
        bits[used] = 0

    def _write(self, numbers: Iterable[int]) -> None:
        """Write these sectors as the image has them, without a sync."""
        with self._turn:
            chosen = sorted(numbers)
            self._sequence += 1
            packed = pack_sectors(chosen, self._image, sequence=self._sequence)
            for number in chosen:
                place = slice(number * SECTOR_BITMAP_BYTES, (number + 1) * SECTOR_BITMAP_BYTES)
                self._certain[place] &= self._image[place]  # before the file may say so
            self._stale.difference_update(chosen)
        try:
            for first, end in _runs(chosen):
                self._file.write(b"".join(packed[first:end]), sector_offset_of(chosen[first]))
        except BaseException:
            with self._turn:
                self._stale.update(chosen)
            raise

    def _write_header(self, header: JournalHeader) -> None:
        self._file.write(header.pack(), header_offset_of(header.sequence))
        self._sync()

    def _sync(self) -> None:
        try:
            self._file.sync()
        except BaseException as error:
            self._failure = kept(error)
            raise

    def _take_over(self, found: JournalBitmap) -> None:
        """Write again what was read, and sync: a process that died may have left it in the cache alone."""
        used = self._used
        self._image[:used] = found.bitmap
        self._file.write(self._header.pack(), header_offset_of(self._header.sequence))
        self._write(range(sectors_of(self._header.region_count)))
        self._sync()
        self._certain[:used] = found.bitmap
        self.armed[:used] = found.bitmap

    def _forget_behind(self, end: int) -> None:
        """Clear the bits of regions from `end` on, which the disk has no more. The lock is held."""
        count = self._header.region_count - end
        if count > 0:
            for bitmap in (self.armed, self._image, self._certain, self._lapsed, self._aged):
                native.bitmap_clear(bitmap, end, count)

    def _grow(self) -> None:
        """Give each bitmap room for the disk; one that has more keeps it. The lock is held."""
        used = self._used
        self._image, self._certain = grown_bitmap(self._image, used), grown_bitmap(self._certain, used)
        self._lapsed, self._aged = grown_bitmap(self._lapsed, used), grown_bitmap(self._aged, used)
        self._next.bits = grown_bitmap(self._next.bits, used)


def read_regions(files: FileSystem, path: Path) -> tuple[JournalHeader, NDArray[np.int64]]:
    """Return the header and the marked regions of a journal without changing it; see IntentJournal.regions().

    Raises: FormatError if no copy of the header is valid, FileNotFoundError, OSError.
    """
    with contextlib.closing(files.open(path)) as file:
        header, found = _read(file, path)
    return header, extents_of(found.bitmap, header.virtual_bytes)


def _read(file: BlockFile, path: Path) -> tuple[JournalHeader, JournalBitmap]:
    size = file.size()
    try:
        header = choose_header(file.read(0, min(size, BITMAP_OFFSET)))
    except FormatError as error:
        raise error.at(path) from None
    end = min(size, file_bytes_of(header.region_count))
    sectors: Any = file.read(BITMAP_OFFSET, end - BITMAP_OFFSET) if end > BITMAP_OFFSET else b""
    return header, unpack_sectors(sectors, header.region_count)


def _sectors(first_byte: int, bits: NDArray[np.uint8]) -> set[int]:
    """Return the sectors that have any of `bits`, a part of a bitmap from `first_byte` on."""
    return set(np.unique((np.flatnonzero(bits) + first_byte) // SECTOR_BITMAP_BYTES).tolist())


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the places in `numbers`, sorted, whose values follow each other."""
    first = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield first, place
            first = place


def _check_size(virtual_bytes: int) -> None:
    if not 0 < virtual_bytes <= DISK_BYTES_MAX or virtual_bytes % 512:
        raise FieldOutOfRange(
            "a disk of this size cannot be tracked",
            field="virtual_bytes",
            expected=f"512 to {DISK_BYTES_MAX}, a multiple of 512",
            actual=virtual_bytes,
        )
