"""Live tracking and NBD's transmission phase: the structures that C and Python share, and the calls on them.

Memory belongs to the objects here and lives as long as they do; what they refer to is kept alive with them.
native/hvr.h says which thread may do what.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica.native.extents import map_table
from hvreplica.native.library import CHOSEN_VARIANT, VARIANTS, ffi, lib, octets, u64s, writable_octets
from hvreplica.units import align_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from hvreplica.native.tables import BlockMap, Octets

GRAIN_BYTES: int = lib.HVR_GRAIN_BYTES
REGION_BYTES: int = lib.HVR_REGION_BYTES
ALL_STRIPES = (1 << 64) - 1
LOG_METADATA_BYTES = 4096  # of the logs that C writes
MARK = np.dtype([("entries", "<u8"), ("time_us", "<u8")])
_BUFFER_BYTES = 1 << 20
_SPIN_NS = 50_000
_MARKS_MIN = 4
_AHEAD_US_MAX = 16


class LogState(IntEnum):
    """Of the log of an epoch; native/hvr.h."""

    OFF = lib.HVR_LOG_OFF
    OPEN = lib.HVR_LOG_OPEN
    FULL = lib.HVR_LOG_FULL
    FAILED = lib.HVR_LOG_FAILED


class TrackStatus(IntEnum):
    """Whether a range may be written now; native/hvr.h."""

    READY = lib.HVR_TRACK_READY
    ARM = lib.HVR_TRACK_ARM
    GUARDED = lib.HVR_TRACK_GUARDED


class NbdEvent(IntEnum):
    """Why the transmission loop came back; native/hvr.h."""

    CLOSED = lib.HVR_NBD_CLOSED
    BROKEN = lib.HVR_NBD_BROKEN
    COMMAND = lib.HVR_NBD_COMMAND
    PIECE = lib.HVR_NBD_PIECE
    FLUSH = lib.HVR_NBD_FLUSH
    REFRESH = lib.HVR_NBD_REFRESH
    FILL = lib.HVR_NBD_FILL


class NbdReason(IntEnum):
    """Why a piece of a write cannot be done in C; native/hvr.h."""

    ARM = lib.HVR_NBD_ARM
    GUARDED = lib.HVR_NBD_GUARDED
    PLACE = lib.HVR_NBD_PLACE


class Gate:
    """Keeps writes of one grain, cuts, and changes of where blocks stand apart."""

    def __init__(self) -> None:
        self.c: Any = ffi.new("struct hvr_gate *")

    @contextlib.contextmanager
    def writing(self, disk_offset: int, length: int) -> Iterator[None]:
        """Hold the stripes of a range, not empty; no cut comes meanwhile."""
        mask = lib.hvr_stripes(disk_offset, length)
        lib.hvr_gate_enter(self.c, mask)
        try:
            yield
        finally:
            lib.hvr_gate_leave(self.c, mask)

    @contextlib.contextmanager
    def closed(self, *, bar_readers: bool = False) -> Iterator[None]:
        """Keep all writes away, and reads too where wanted."""
        lib.hvr_gate_close(self.c, bar_readers)
        try:
            yield
        finally:
            lib.hvr_gate_open(self.c)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keep every block where it stands."""
        lib.hvr_read_enter(self.c)
        try:
            yield
        finally:
            lib.hvr_read_leave(self.c)


@dataclass(frozen=True, slots=True)
class Moments:
    """When the entries of a log came; all times are Unix microseconds, rows are of MARK.

    entry_count: of the log. ticks: for each slot of slot_us in which any came, how many came before and when
    the first of it did. flushes: how many entries had come when a guest asked for a flush. ended_us: the cut.
    """

    entry_count: int
    slot_us: int
    ticks: npt.NDArray[np.void]
    flushes: npt.NDArray[np.void]
    ended_us: int


class Epoch:
    """What was written since a cut. dirty, unlogged, logged: bit per grain; touched: bit per region; uint8,
    LSB first.

    Memory that was never touched is never taken: a map of a disk costs what was written, 4 KiB for 2 GiB of
    it.
    """

    def __init__(self, virtual_bytes: int) -> None:
        region_count = -(-virtual_bytes // REGION_BYTES)
        self.touched = np.zeros(align_up(-(-region_count // 8), 8), np.uint8)
        # A region is one word of grains.
        self.dirty = np.zeros(len(self.touched) * 8 * 8, np.uint8)
        self.unlogged = np.zeros(len(self.dirty), np.uint8)
        self.logged = np.zeros(len(self.dirty), np.uint8)
        self._pending = np.zeros(LOG_METADATA_BYTES, np.uint8)
        self.c: Any = ffi.new("struct hvr_epoch *")
        self._kept = [
            writable_octets(each)
            for each in (self.dirty, self.unlogged, self.logged, self.touched, self._pending)
        ]
        self.c.dirty, self.c.unlogged, self.c.logged, self.c.touched, self.c.log.pending = self._kept
        self._marks: list[npt.NDArray[np.void]] = []

    def open_log(
        self, descriptor: int, *, position: int, last_block: int, limit: int, write_bytes_max: int
    ) -> None:
        """Log from now on into a file whose header and empty first metadata block stand. Before the epoch
        begins.

        position: where the first byte goes. limit: the bytes that the log may have. write_bytes_max: longer
        writes are left to the map.
        """
        log = self.c.log
        log.descriptor = descriptor
        log.position, log.last_block, log.blocks = position, last_block, 1
        log.limit, log.write_bytes_max = limit, write_bytes_max
        log.state = lib.HVR_LOG_OPEN

    def note_moments(self, *, tick_count: int, flush_count: int, slot_us: int) -> None:
        """Note from now on when entries come and guests ask for flushes. Before the epoch begins.

        tick_count, flush_count: how many moments of each kind are kept at most, at least 4. slot_us: how far
        ticks are apart at least, 1, 2, 10, 20, 100 and so on; a log that is long makes both kinds fewer.
        """
        log = self.c.log
        for marks, count, first_us in ((log.ticks, tick_count, slot_us), (log.flushes, flush_count, 1)):
            if count < _MARKS_MIN:
                message = f"room for {count} moments is too little"
                raise ValueError(message)
            rows = np.zeros(count, MARK)
            view = ffi.from_buffer("struct hvr_mark[]", rows, require_writable=True)
            self._kept += [view]
            self._marks.append(rows)
            marks.rows, marks.capacity, marks.slot_us = view, count, first_us

    def moments(self) -> Moments | None:
        """Return what was noted; None where nothing was, or where the clock was set back. After the epoch."""
        log = self.c.log
        ended_us = max(int(self.c.ended_us), int(log.last_us))  # moments may be ahead by some
        if not self._marks or log.clock_back or ended_us - int(self.c.ended_us) > _AHEAD_US_MAX:
            return None
        ticks, flushes = (
            rows[: int(marks.count)].copy()
            for rows, marks in zip(self._marks, (log.ticks, log.flushes), strict=True)
        )
        return Moments(int(log.entries), int(log.ticks.slot_us), ticks, flushes, ended_us)

    @property
    def ended_us(self) -> int:
        """When the cut was that ended the epoch: Unix time in microseconds, 0 before."""
        return int(self.c.ended_us)

    @property
    def log_state(self) -> LogState:
        """The state of the log."""
        return LogState(self.c.log.state)

    @property
    def log_error(self) -> int:
        """The errno of a log that has failed."""
        return int(self.c.log.error)

    @property
    def log_bytes(self) -> int:
        """Where the next byte of the log goes."""
        return int(self.c.log.position)

    def grown(self) -> dict[str, Any]:
        """Return what the log has become, as hrl.GrownLog wants it. After the epoch."""
        log = self.c.log
        count = int(log.pending_count)
        return {
            "position": int(log.position),
            "last_block": int(log.last_block),
            "blocks": int(log.blocks),
            "entries": int(log.entries),
            "data_bytes": int(log.data_bytes),
            "pending": self._pending[32 : 32 + 32 * count].tobytes(),
        }


class Track:
    """The tracking of one disk.

    armed: bit per region, of the journal, at least as long as the epoch's maps.
    """

    def __init__(self, gate: Gate, epoch: Epoch, armed: npt.NDArray[np.uint8], virtual_bytes: int) -> None:
        if len(armed) < len(epoch.touched):
            message = f"armed regions in {len(armed)} bytes, touched ones in {len(epoch.touched)}"
            raise ValueError(message)
        self.gate = gate
        self.epoch = epoch
        self.virtual_bytes = virtual_bytes
        self._guarded: Epoch | None = None
        self._armed = armed
        self.c: Any = ffi.new("struct hvr_track *")
        self._armed_octets = writable_octets(armed)
        self.c.gate, self.c.epoch, self.c.armed = gate.c, epoch.c, self._armed_octets
        self.c.map_bytes, self.c.region_bytes = len(epoch.dirty), len(epoch.touched)

    def check(self, disk_offset: int, length: int) -> TrackStatus:
        """Say whether a range may be written now. The caller holds its stripes."""
        self._require_inside(disk_offset, length)
        return TrackStatus(lib.hvr_track_check(self.c, disk_offset, length))

    def mark(self, disk_offset: int, length: int) -> None:
        """Note a range as written and unlogged. The caller holds some stripe, and the range is armed."""
        self._require_inside(disk_offset, length)
        if lib.hvr_track_mark(self.c, disk_offset, length, 0) != lib.HVR_OK:
            message = f"{length} bytes at {disk_offset} lie beyond the map"
            raise IndexError(message)

    def write(self, disk_offset: int, data: Octets, time_stamp: int) -> None:
        """Note a write that comes next, in the log where it can be. The caller holds its stripes."""
        view = octets(data)
        self._require_inside(disk_offset, len(view))
        lib.hvr_track_write(self.c, VARIANTS[CHOSEN_VARIANT], disk_offset, view, len(view), time_stamp)

    def note_written(self) -> None:
        """Say that the disk holds something that is not durable."""
        self.c.written = 1

    def take_written(self) -> bool:
        """Return whether anything was written since the last call."""
        return bool(lib.hvr_track_take_written(self.c))

    def unguard(self) -> None:
        """End the guard of the last cut: all of its grains were read."""
        self.c.guard = ffi.NULL
        self._guarded = None

    @property
    def writes(self) -> int:
        """The writes noted so far."""
        return int(self.c.writes)

    @property
    def written_bytes(self) -> int:
        """The bytes of all writes noted so far."""
        return int(self.c.written_bytes)

    def _require_inside(self, disk_offset: int, length: int) -> None:
        if disk_offset < 0 or length < 0 or disk_offset + length > self.virtual_bytes:
            message = f"{length} bytes at {disk_offset} lie beyond the disk's {self.virtual_bytes} bytes"
            raise IndexError(message)

    def _begin(self, epoch: Epoch) -> None:
        """Follow what a cut has done."""
        self._guarded, self.epoch = self.epoch, epoch


def cut(
    gate: Gate, tracks: Sequence[Track], epochs: Sequence[Epoch]
) -> tuple[list[Epoch], list[npt.NDArray[np.uint8]], int]:
    """End the epochs of all tracks at one instant and begin `epochs`.

    The grains that the old epochs have unlogged are guarded until unguard(). Return the old epochs, for each
    track the bitmap of the regions that were disarmed, and for how many nanoseconds writes were held.
    """
    if len(tracks) != len(epochs):
        message = f"{len(tracks)} tracks need as many epochs, not {len(epochs)}"
        raise ValueError(message)
    old = [track.epoch for track in tracks]
    disarmed = [np.zeros(len(track.epoch.touched), np.uint8) for track in tracks]
    views = [writable_octets(each) for each in disarmed]
    held = ffi.new("uint64_t *")
    lib.hvr_cut(
        gate.c,
        ffi.new("struct hvr_track *[]", [track.c for track in tracks]),
        ffi.new("struct hvr_epoch *[]", [epoch.c for epoch in epochs]),
        ffi.new("uint8_t *[]", views),
        len(tracks),
        held,
    )
    for track, epoch in zip(tracks, epochs, strict=True):
        track._begin(epoch)  # noqa: SLF001 - one module owns what C shares
    return old, disarmed, int(held[0])


class FlushNoter:
    """Notes flushes of guests in the logs of all disks that are cut together, see hvr_note_flush()."""

    def __init__(self, gate: Gate, tracks: Sequence[Track]) -> None:
        self._kept = (gate, tuple(tracks))
        self._gate, self._count = gate.c, len(tracks)
        self._tracks = ffi.new("struct hvr_track *[]", [track.c for track in tracks])

    def note(self) -> None:
        """Note that a guest asks for a flush now. Any thread that holds nothing of the gate."""
        lib.hvr_note_flush(self._gate, self._tracks, self._count)


def merge_grains(
    bitmap: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8], touched: npt.NDArray[np.uint8]
) -> None:
    """Bitmap |= other in the regions of `touched`; threads may set bits of `bitmap` meanwhile."""
    if not len(bitmap) == len(other) == 64 * len(touched):
        message = "two bitmaps of grains and one of their regions are needed"
        raise ValueError(message)
    lib.hvr_grains_merge(writable_octets(bitmap), octets(other), octets(touched), len(touched))


def clear_grains(bitmap: npt.NDArray[np.uint8], first: int, count: int) -> None:
    """Clear a run of bits, also while threads look at them."""
    if first < 0 or count < 0 or first + count > 8 * len(bitmap):
        message = f"{count} grains from {first} on do not lie in a map of {8 * len(bitmap)}"
        raise IndexError(message)
    lib.hvr_grains_clear(writable_octets(bitmap), first, count)


ELSEWHERE = -2  # native/hvr.h


class Under:
    """What stands under a served disk: extents in files that never change, and the rest in a disk's file.

    starts, ends: uint64, of sorted disjoint extents. descriptors: int32, the file of each, -1 where it reads
    as zeros, ELSEWHERE where only Python can read it; file_offsets: uint64, where it begins there.
    descriptor, block_map: of the disk. counter: a buffer of 8 bytes that whoever changes that disk adds to
    before, None where nobody does; applied: what it was when all of this was found. kept: what must live as
    long, such as the open files.
    """

    def __init__(  # noqa: PLR0913 - the fields of a structure
        self,
        starts: npt.NDArray[np.uint64],
        ends: npt.NDArray[np.uint64],
        file_offsets: npt.NDArray[np.uint64],
        descriptors: npt.NDArray[np.int32],
        *,
        descriptor: int,
        block_map: BlockMap | None,
        counter: Octets | None,
        applied: int,
        kept: object,
    ) -> None:
        if not len(starts) == len(ends) == len(file_offsets) == len(descriptors):
            message = "the columns of the extents differ in length"
            raise ValueError(message)
        self.applied = applied
        self.c: Any = ffi.new("struct hvr_under *")
        table, kept_map = map_table(block_map)
        columns = [ffi.from_buffer("uint64_t[]", each) for each in (starts, ends, file_offsets)]
        columns.append(ffi.from_buffer("int32_t[]", descriptors))
        self._kept = [table, kept_map, columns]
        self.c.starts, self.c.ends, self.c.file_offsets, self.c.descriptors = columns
        self.c.count = len(starts)
        self.c.descriptor, self.c.map = descriptor, table
        if counter is not None:
            watched = ffi.from_buffer("uint64_t[1]", counter)
            self._kept.append(watched)
            self.c.counter = watched
        self.c.applied = applied
        self.kept = kept  # the last attribute goes last: what it owns can be closed then

    def read_into(self, buffer: Octets, disk_offset: int) -> bool:
        """Fill `buffer`; return False where extents and map are to be found anew first.

        Raises: OSError, also for what only Python can read.
        """
        view = writable_octets(buffer)
        status = lib.hvr_under_read(self.c, disk_offset, view, len(view))
        if status == lib.HVR_STALE:
            return False
        if status != lib.HVR_OK:
            code = -status if status < 0 else errno.EIO
            raise OSError(code, os.strerror(code))
        return True


class NbdExport:
    """A disk as the transmission loop sees it. descriptor: -1 for one that has nothing but its `Under`s."""

    def __init__(
        self,
        descriptor: int,
        block_map: BlockMap | None,
        gate: Gate,
        track: Track | None,
        *,
        virtual_bytes: int,
        has_parent: bool,
        read_only: bool,
    ) -> None:
        self.gate = gate
        self.track = track
        self.c: Any = ffi.new("struct hvr_nbd_export *")
        self._map: Any = None
        if block_map is not None:
            self._entries = u64s(block_map.entries)
            self._map = ffi.new("struct hvr_block_map *")
            self._map.entries, self._map.entry_count = self._entries, len(block_map.entries)
            self._map.block_bytes, self._map.chunk_ratio = block_map.block_bytes, block_map.chunk_ratio
            self._map.offset_mask = block_map.offset_mask
            self.c.map = self._map
        self.c.descriptor, self.c.virtual_bytes = descriptor, virtual_bytes
        self.c.has_parent, self.c.read_only = has_parent, read_only
        self.c.variant = VARIANTS[CHOSEN_VARIANT]
        self.c.gate = gate.c
        self.c.track = ffi.NULL if track is None else track.c


class NbdConnection:
    """One connection of one client, of one thread.

    After serve() the attributes say what it speaks of; see struct hvr_nbd.
    """

    def __init__(self, exported: NbdExport, descriptor: int, *, structured: bool) -> None:
        self._exported = exported
        self.base_allocation = False  # whether block status may be asked for
        self._input = np.empty(_BUFFER_BYTES, np.uint8)
        self._output = np.empty(_BUFFER_BYTES, np.uint8)
        self._kept = [writable_octets(self._input), writable_octets(self._output)]
        self._under: Under | None = None
        self.c: Any = ffi.new("struct hvr_nbd *")
        self.c.exported, self.c.descriptor, self.c.structured = exported.c, descriptor, structured
        self.c.spin_ns = _SPIN_NS
        self.c.input, self.c.output = self._kept
        self.c.input_bytes = self.c.output_bytes = _BUFFER_BYTES

    @property
    def under(self) -> Under | None:
        """What the disk has under it, for this connection; it lives until another is set."""
        return self._under

    @under.setter
    def under(self, under: Under | None) -> None:
        self.c.under = ffi.NULL if under is None else under.c
        self._under = under

    def serve(self, *, written: bool = False) -> NbdEvent:
        """Serve until something needs the caller. written: the piece of the last event is in the disk."""
        return NbdEvent(lib.hvr_nbd_serve(self.c, written))

    @property
    def reason(self) -> NbdReason:
        """Of the event PIECE."""
        return NbdReason(self.c.reason)

    @property
    def error(self) -> int:
        """The errno of the event BROKEN, or 0 where the client broke the protocol."""
        return int(self.c.error)

    @property
    def type(self) -> int:
        """The command of the request."""
        return int(self.c.type)

    @property
    def flags(self) -> int:
        """The flags of the request."""
        return int(self.c.flags)

    @property
    def cookie(self) -> int:
        """The cookie of the request, its bytes read as little-endian."""
        return int(self.c.cookie)

    @property
    def offset(self) -> int:
        """Where the request begins."""
        return int(self.c.offset)

    @property
    def length(self) -> int:
        """The length of the request."""
        return int(self.c.length)

    @property
    def piece_offset(self) -> int:
        """Where the piece of a write, or of a read to be filled, begins on the disk."""
        return int(self.c.offset + self.c.done)

    @property
    def piece(self) -> memoryview:
        """The data of the piece, in the input buffer: valid until the next serve()."""
        start = int(self.c.piece - self.c.input)
        return self._input.data[start : start + int(self.c.piece_bytes)]

    @property
    def room(self) -> memoryview:
        """What the event FILL wants filled, with what stands from piece_offset on."""
        return self._output.data[: int(self.c.piece_bytes)]

    def fail(self, nbd_error: int) -> None:
        """Let the current write be answered with an error; the rest of its payload is dropped."""
        self.c.failed = nbd_error

    def send(self, data: Octets) -> int:
        """Send all of `data`; return 0 or errno."""
        view = octets(data)
        return int(lib.hvr_nbd_send(self.c, view, len(view)))
