"""Write a log: data first, the metadata block that describes it behind it, the header's end last of all.

    create   header with EOLLocation 0, an empty first metadata block, sync
    append   data; a metadata block behind every 127 entries
    flush    a metadata block behind what is pending, sync: recovery finds everything up to here
    close    as flush, then the header with EOLLocation, then sync: whoever sees the end sees all before it

A log is taken as closed only if every byte before its end was durable first. After any failure the writer
refuses to go on, so the header keeps EOLLocation 0 and the log is never taken as closed.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hvreplica import native
from hvreplica.clock import hrl_timestamp
from hvreplica.errors import LogError, kept
from hvreplica.formats.hrl import (
    COOKIE,
    DISK_BYTES_MAX,
    ENTRY_BYTES,
    FILE_TYPE_HRL,
    FILE_TYPE_UNDO,
    HEADER_BYTES,
    LOG_BYTES_MAX,
    LOG_FORMAT_VERSION_2,
    METADATA_BYTES_DEFAULT,
    METADATA_HEADER_BYTES,
    NIL_GUID,
    SECTOR_BYTES,
    LogHeader,
    MetadataHeader,
    entry_capacity,
)
from hvreplica.formats.hrl_entries import pack_metadata_block, parse_entries
from hvreplica.hrl.report import LogSummary
from hvreplica.units import align_up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self
    from uuid import UUID

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.clock import Clock
    from hvreplica.files import BlockFile, FileSystem

ENTRY_DATA_BYTES_MAX = 2 << 20  # an applying side may hold an entry in memory as a whole
CREATOR_APPLICATION = b"hvr\0"
CREATOR_VERSION = 0x00010000
_WINDOW_BYTES = 1 << 20
_DIRECT_BYTES = 128 << 10  # from here on a copy into the window costs more than the call it saves
_HOLE_BYTES_MIN = 16 << 10  # a smaller hole costs more in calls than its zeros do in writing
_ZERO_ENTRIES_PER_BATCH = 1 << 14
_BLOCK_BYTES_MAX = 256 << 10  # of metadata; one that is not full at a part's end is room for nothing
_ZEROS_CHECKSUM = 0xFFFFFFFF  # [MS-HRL] 2.6 over zeros of any length


class GrownLog(NamedTuple):
    """What a native loop has made of a log: see struct hvr_log in native/hvr.h.

    pending: packed entries of the metadata block that grows.
    """

    position: int
    last_block: int
    blocks: int
    entries: int
    data_bytes: int
    pending: bytes


class LogWriter:
    """A log under construction. Every method may be called from any thread; appends are logged one after the
    other.

    Nothing is durable until flush() or close() returned. As a context manager it closes the log, or aborts it
    after an exception. Make one with create().
    """

    def __init__(self, files: FileSystem, file: BlockFile, header: LogHeader, clock: Clock) -> None:
        """Go on behind the header and the empty first block, which create() has written."""
        self._ordered = True
        self._files = files
        self._file = file
        self._header = header
        self._clock = clock
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._summary: LogSummary | None = None
        self._pending = bytearray()  # packed entries of the block that is growing
        self._window = memoryview(bytearray(_WINDOW_BYTES))
        self._filled_bytes = 0
        self._position = HEADER_BYTES + header.metadata_size  # where the next byte of the log belongs
        self._last_block: int | None = HEADER_BYTES
        self._durable = self._position
        self._blocks = 1
        self._entries = 0
        self._data_bytes = 0
        self._stale_bytes = 0  # what lies below here in the file is not zeros

    @classmethod
    def create(
        cls,
        files: FileSystem,
        path: Path,
        *,
        log_id: UUID,
        previous_log_id: UUID | None,
        data_write_guid: UUID | None,
        clock: Clock,
        metadata_bytes: int = METADATA_BYTES_DEFAULT,
        recycle: bool = False,
    ) -> LogWriter:
        """Make an empty, open log at `path`, its content durable on return; the caller syncs the folder.

        previous_log_id, data_write_guid: None is written as the nil GUID. metadata_bytes: as MetadataSize.
        recycle: `path` is a log that nobody needs any more; its file is written over, which spares the file
        system the search for new blocks. It may stay longer than the log. Raises: FileExistsError if the name
        is taken; FieldOutOfRange for an impossible metadata_bytes. Spec: [MS-HRL] 2.2.
        """
        ids = (log_id, previous_log_id or NIL_GUID, data_write_guid or NIL_GUID)
        header = _new_header(ids, FILE_TYPE_HRL, metadata_bytes, clock)
        return cls._begin(files, Path(path), header, clock, recycle=recycle)

    @classmethod
    def create_undo(
        cls,
        files: FileSystem,
        path: Path,
        *,
        part_id: UUID,
        log_id: UUID | None,
        data_write_guid: UUID | None,
        clock: Clock,
        entry_count: int = 0,
    ) -> LogWriter:
        """Make an empty undo part at `path`: a log of another type, see docs/formats/hru.md.

        For a file that gets its name once it is whole: nothing is durable before close(), which syncs once,
        so that after a power cut the part may look closed and not be whole. entry_count: how many entries it
        will have at most, so that few metadata blocks describe it; more may come. Raises: FileExistsError.
        """
        ids = (part_id, log_id or NIL_GUID, data_write_guid or NIL_GUID)
        header = _new_header(ids, FILE_TYPE_UNDO, _metadata_bytes(entry_count), clock)
        header.validate(file_type=FILE_TYPE_UNDO)
        writer = cls(files, files.open(Path(path), create=True, exclusive=True), header, clock)
        writer._ordered = False
        # Nobody reads it before it is closed: the header is written then, and the first block behind data.
        writer._position = writer._durable = HEADER_BYTES
        writer._last_block, writer._blocks = None, 0
        return writer

    @classmethod
    def _begin(
        cls,
        files: FileSystem,
        path: Path,
        header: LogHeader,
        clock: Clock,
        *,
        recycle: bool = False,
    ) -> LogWriter:
        header.validate()
        file = files.open(path, create=True, exclusive=not recycle)
        try:
            # An empty first block as Hyper-V writes it: an empty log can be closed, and recovery has an
            # anchor.
            metadata_bytes = header.metadata_size
            first = pack_metadata_block(b"", previous_metadata_location=0, metadata_size=metadata_bytes)
            file.write(header.pack() + first, 0)
            file.sync()
        except BaseException:
            file.close()
            with contextlib.suppress(OSError):
                files.unlink(path)
            raise
        writer = cls(files, file, header, clock)
        writer._stale_bytes = file.size() if recycle else 0
        return writer

    @property
    def path(self) -> Path:
        """The log's name."""
        return self._file.path

    @property
    def log_id(self) -> UUID:
        """The log's UniqueId."""
        return self._header.unique_id

    @property
    def log_bytes(self) -> int:
        """The length of the log if it were closed now, but for a metadata block that may be pending."""
        return self._position

    @property
    def durable_bytes(self) -> int:
        """The length of what recovery would keep: log_bytes as of the last flush()."""
        return self._durable

    @property
    def data_bytes(self) -> int:
        """The guest bytes appended so far, zeros included."""
        return self._data_bytes

    @property
    def entry_count(self) -> int:
        """The entries appended so far."""
        return self._entries

    def append(
        self,
        extents: NDArray[Any],
        data: Buffer,
        *,
        time_s: float | None = None,
        holes: bool = False,
    ) -> None:
        """Log writes in the order given; a later one wins over an earlier one.

        extents: (n, 2) int64 or uint64 rows (disk_offset, length), multiples of 512, length not 0. data:
        their bytes, concatenated; not kept. time_s: when they were written, Unix seconds; now by default.
        holes: long runs of zeros in `data` are not written but left out, as by append_zeroes().
        Entries are split at ENTRY_DATA_BYTES_MAX. Raises: ValueError for extents that no log can hold;
        OSError, after which the writer is good for nothing but abort().
        """
        view = memoryview(data).cast("B")
        rows = _checked(extents)
        if (rows[:, 1] > len(view)).any() or int(rows[:, 1].sum()) != len(view):
            message = f"the extents have {int(rows[:, 1].sum())} bytes, the data {len(view)}"
            raise ValueError(message)
        if not len(rows):
            return
        rows = _split(rows)
        checksums = ~native.byte_sums(view, rows[:, 1])
        packed = native.pack_hrl_entries(rows, self._time_stamp(time_s), checksums)
        with self._working():
            self._put(np.cumsum(rows[:, 1]), memoryview(packed), view, holes=holes)

    def append_zeroes(self, disk_offset: int, length: int, *, time_s: float | None = None) -> None:
        """Log that a range was zeroed; its data is a hole in the file where the file system can.

        disk_offset, length: bytes, multiples of 512, length not 0, any size. Raises: as append().
        """
        _checked(np.array([[disk_offset, length]], np.int64))
        time_stamp = self._time_stamp(time_s)
        batch_bytes = _ZERO_ENTRIES_PER_BATCH * ENTRY_DATA_BYTES_MAX
        with self._working():
            for at in range(0, length, batch_bytes):
                row = np.array([[disk_offset + at, min(batch_bytes, length - at)]], np.int64)
                rows = _split(row)
                checksums = np.full(len(rows), _ZEROS_CHECKSUM, np.uint32)
                packed = native.pack_hrl_entries(rows, time_stamp, checksums)
                self._put(np.cumsum(rows[:, 1]), memoryview(packed), None)

    def fileno(self) -> int | None:
        """Return the log's descriptor for a native loop that appends, see adopt()."""
        return self._file.fileno()

    def adopt(self, grown: GrownLog) -> None:
        """Go on behind what a native loop has appended to the file of a log that had nothing appended
        before.
        """
        with self._working():
            self._position, self._last_block = grown.position, grown.last_block
            self._blocks, self._entries, self._data_bytes = grown.blocks, grown.entries, grown.data_bytes
            self._pending += grown.pending

    def flush(self) -> int:
        """Make all appends durable that returned before; return durable_bytes, for recover_log().

        Raises: OSError, after which the writer is good for nothing but abort().
        """
        with self._working():
            self._flush()
            return self._durable

    def close(self, *, previous_log_id: UUID | None = None) -> LogSummary:
        """End the log, durably; the caller syncs the folder. A second call returns the same.

        previous_log_id: the log that this one follows, where that was not known when it was made. Raises:
        OSError; the log is then not closed, though whole if only the last sync failed.
        """
        with self._lock:
            if self._summary is not None:
                return self._summary
        with self._working():
            self._flush(sync=self._ordered)
            header = self._header.sealed(
                previous_unique_id=previous_log_id or self._header.previous_unique_id,
                current_size=self._position,
                eol_location=self._position,
                last_modified_time_stamp=self._time_stamp(None),
                total_metadata_entries=self._entries,
            )
            try:
                self._file.write(header.pack(), 0)
                self._file.sync()
            except BaseException:
                self._reopen_as_unclosed()
                raise
            self._file.close()
            self._summary = LogSummary(
                log_id=str(header.unique_id),
                previous_log_id=str(header.previous_unique_id),
                path=str(self.path),
                entries=self._entries,
                metadata_blocks=self._blocks,
                data_bytes=self._data_bytes,
                log_bytes=self._position,
            )
            return self._summary

    def abort(self) -> None:
        """Stop without closing the log: its EOLLocation stays 0. No effect on a closed one."""
        with self._lock:
            if self._summary is None and self._failure is None:
                self._failure = LogError("the log was aborted", path=self.path)
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Hold the lock; any exception inside leaves the log in an unknown state, so it ends the writer."""
        with self._lock:
            if self._failure is not None:
                raise LogError(
                    "an earlier write to this log failed, so nothing more can be logged",
                    path=self.path,
                    hint="abort it; what was flushed is found by recovery, the rest only by a comparison",
                ) from kept(self._failure)
            try:
                yield
            except BaseException as error:
                self._failure = kept(error)
                raise

    def _time_stamp(self, time_s: float | None) -> int:
        return hrl_timestamp(self._clock.now_s() if time_s is None else time_s)

    def _put(
        self,
        ends: NDArray[np.int64],
        packed: memoryview,
        view: memoryview | None,
        *,
        holes: bool = False,
    ) -> None:
        """Log entries whose data ends at `ends`; view: their data, or None for zeros."""
        if self._position + int(ends[-1]) > LOG_BYTES_MAX:
            message = f"{self.path} would grow beyond {LOG_BYTES_MAX} bytes"
            raise ValueError(message)
        done, at = 0, 0
        while done < len(ends):
            room = self._header.entries_per_block - len(self._pending) // ENTRY_BYTES
            stop = min(done + room, len(ends))
            end = int(ends[stop - 1])
            if view is None:
                self._skip(end - at)
            elif holes:
                self._write_around_zeros(view[at:end])
            else:
                self._write(view[at:end])
            self._pending += packed[done * ENTRY_BYTES : stop * ENTRY_BYTES]
            self._entries += stop - done
            self._data_bytes += end - at
            done, at = stop, end
            if len(self._pending) == self._header.entries_per_block * ENTRY_BYTES:
                self._end_block()

    def _end_block(self) -> None:
        location = self._position
        block = pack_metadata_block(
            self._pending,
            previous_metadata_location=0 if self._last_block is None else location - self._last_block,
            metadata_size=self._header.metadata_size,
        )
        self._verify_block(block, location)
        self._write(memoryview(block))
        self._last_block = location
        self._blocks += 1
        self._pending.clear()

    def _verify_block(self, block: bytes, location: int) -> None:
        """Read the block as a reader will, before it is written: no log may be one that we cannot read."""
        metadata_size = self._header.metadata_size
        packed = MetadataHeader.unpack(block)
        packed.validate(block_offset=location, metadata_size=metadata_size)
        parse_entries(
            block,
            count=packed.valid_metadata_entries,
            data_offset=HEADER_BYTES if self._last_block is None else self._last_block + metadata_size,
            block_offset=location,
        )

    def _write(self, view: memoryview) -> None:
        if self._filled_bytes + len(view) > _WINDOW_BYTES or len(view) >= _DIRECT_BYTES:
            self._drain()
        if len(view) >= _DIRECT_BYTES:
            self._file.write(view, self._position)
        else:
            self._window[self._filled_bytes : self._filled_bytes + len(view)] = view
            self._filled_bytes += len(view)
        self._position += len(view)

    def _write_around_zeros(self, view: memoryview) -> None:
        done = 0
        for start, length in native.data_runs(view).tolist():
            if start - done >= _HOLE_BYTES_MIN:
                self._skip(start - done)
                done = start
            self._write(view[done : start + length])
            done = start + length
        if len(view) - done >= _HOLE_BYTES_MIN:
            self._skip(len(view) - done)
        else:
            self._write(view[done:])

    def _skip(self, length: int) -> None:
        """Leave a hole: what was never written reads as zeros once the file is longer."""
        self._drain()
        stale = min(self._stale_bytes, self._position + length) - self._position
        self._file.zero(self._position, stale)
        self._position += length

    def _drain(self) -> None:
        if self._filled_bytes:
            self._file.write(self._window[: self._filled_bytes], self._position - self._filled_bytes)
            self._filled_bytes = 0

    def _flush(self, *, sync: bool = True) -> None:
        if self._pending or not self._blocks:
            self._end_block()
        self._drain()
        if sync and self._durable != self._position:
            self._file.sync()
            self._durable = self._position

    def _reopen_as_unclosed(self) -> None:
        """Take the end back after it could not be made durable; should it linger, the log is whole."""
        with contextlib.suppress(OSError):
            self._file.close()
            file = self._files.open(self.path, writable=True)
            try:
                file.write(self._header.pack(), 0)
                file.sync()
            finally:
                file.close()


def _metadata_bytes(entry_count: int) -> int:
    """Return a MetadataSize for that many entries: few blocks, evenly full, none above _BLOCK_BYTES_MAX."""
    blocks = max(-(-entry_count // entry_capacity(_BLOCK_BYTES_MAX)), 1)
    wanted = METADATA_HEADER_BYTES + -(-entry_count // blocks) * ENTRY_BYTES
    return max(align_up(wanted, METADATA_BYTES_DEFAULT), METADATA_BYTES_DEFAULT)


def _new_header(ids: tuple[UUID, UUID, UUID], file_type: int, metadata_bytes: int, clock: Clock) -> LogHeader:
    """Return the header of an open log. ids: its own, the one before it, the DataWriteGuid."""
    now = hrl_timestamp(clock.now_s())
    return LogHeader(
        cookie=COOKIE,
        log_format_version=LOG_FORMAT_VERSION_2,
        time_stamp=now,
        creator_application=CREATOR_APPLICATION,
        creator_version=CREATOR_VERSION,
        original_size=0,
        current_size=0,
        checksum=0,
        eol_location=0,
        error_code=0,
        metadata_size=metadata_bytes,
        unique_id=ids[0],
        previous_unique_id=ids[1],
        last_modified_time_stamp=now,
        total_metadata_entries=0,
        file_type=file_type,
        flags=0,
        vhd2_data_write_guid=ids[2],
        reserved=b"",
    ).sealed()


def _checked(extents: NDArray[Any]) -> NDArray[np.int64]:
    """Return the rows as int64. Raises: ValueError if a log cannot hold them."""
    array = np.asarray(extents)
    if array.size == 0:
        return np.empty((0, 2), np.int64)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        message = f"extents must be integers of shape (n, 2), not {array.dtype} of shape {array.shape}"
        raise TypeError(message)
    offsets, lengths = array[:, 0], array[:, 1]
    limit = np.array(DISK_BYTES_MAX, array.dtype)
    fits = (offsets >= 0) & (offsets <= limit) & (lengths > 0) & (lengths <= limit - offsets)
    aligned = (offsets % SECTOR_BYTES == 0) & (lengths % SECTOR_BYTES == 0)
    if not bool((fits & aligned).all()):
        index = int((fits & aligned).argmin())
        row = (int(offsets[index]), int(lengths[index]))
        message = f"extent {index} {row} is empty, unaligned or out of range"
        raise ValueError(message)
    return array.astype(np.int64, copy=False)


def _split(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows with those longer than ENTRY_DATA_BYTES_MAX cut into pieces, in the same order."""
    counts = -(-rows[:, 1] // ENTRY_DATA_BYTES_MAX)
    if int(counts.sum()) == len(rows):
        return rows
    first = np.repeat(np.cumsum(counts) - counts, counts)
    shift = (np.arange(len(first)) - first) * ENTRY_DATA_BYTES_MAX
    offsets = np.repeat(rows[:, 0], counts) + shift
    lengths = np.minimum(np.repeat(rows[:, 1], counts) - shift, ENTRY_DATA_BYTES_MAX)
    return np.stack((offsets, lengths), axis=1)
