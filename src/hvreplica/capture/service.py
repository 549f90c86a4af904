"""Serve one disk to one client: drive the native loop, and do what it leaves to us.

The loop comes back for what needs a rule. A piece of a write is then either made possible (its regions armed,
what a cut still has to read preserved) and left to the loop, or done here: the first write to a block, and
what lies in blocks of which only some sectors count.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Protocol

from hvreplica.capture.block_status import block_states
from hvreplica.clock import hrl_timestamp
from hvreplica.errors import HvReplicaError, kept
from hvreplica.formats.nbd import (
    OFFSET_DATA,
    PAYLOAD_BYTES_MAX,
    ChunkType,
    Command,
    CommandFlag,
    NbdError,
    nbd_error,
    pack_block_status,
    pack_chunk_header,
    pack_error_chunk,
    pack_simple_reply,
)
from hvreplica.native.live import NbdConnection, NbdEvent, NbdExport, NbdReason, TrackStatus
from hvreplica.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Buffer

    from hvreplica.capture.tracked import TrackedDisk
    from hvreplica.clock import Clock
    from hvreplica.disk.disk import Direct, Disk
    from hvreplica.native.live import Gate, Under

_LOG = logging.getLogger("hvreplica.capture")
_ZERO_LOOK_BYTES = 4 * GIB  # what is looked at for something to zero
_ZERO_WINDOW_BYTES = 32 * MIB  # the gate of all disks is closed for no more at a time
_PROVISION_BYTES = MIB
_FLAGS = {
    Command.READ: CommandFlag.DF | CommandFlag.FUA,
    Command.WRITE: CommandFlag.FUA,
    Command.FLUSH: CommandFlag.FUA,
    Command.TRIM: CommandFlag.FUA,
    Command.CACHE: CommandFlag.FUA,
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE,
    Command.BLOCK_STATUS: CommandFlag.REQ_ONE | CommandFlag.FUA,
}


class ServedDisk(Protocol):
    """The part of disk.Disk that is needed to serve one."""

    @property
    def path(self) -> Path:
        """What to call it."""
        ...

    @property
    def virtual_bytes(self) -> int:
        """The guest's size of the disk."""
        ...

    @property
    def block_bytes(self) -> int:
        """The unit of allocation; 0 where there is none."""
        ...

    @property
    def parent(self) -> Disk | None:
        """The disk below a differencing disk."""
        ...

    def read_into(self, buffer: Buffer, disk_offset: int) -> None:
        """See disk.Disk."""
        ...

    def write(self, buffer: Buffer, disk_offset: int) -> None:
        """See disk.Disk."""
        ...

    def write_zeroes(self, disk_offset: int, length: int) -> None:
        """See disk.Disk."""
        ...

    def extents(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """See disk.Disk."""
        ...

    def direct(self) -> Direct:
        """See disk.Disk."""
        ...

    def changed(self) -> None:
        """See disk.Disk."""
        ...

    def flush(self) -> None:
        """See disk.Disk."""
        ...

    def publish(self) -> None:
        """See disk.Disk."""
        ...


class UnderSource(Protocol):
    """What finds the `Under` of a disk, and finds it anew once that is stale."""

    def under(self, stale: Under | None = None) -> Under:
        """Return one that is newer than `stale`; any thread. Raises: HvReplicaError, OSError."""
        ...


class DiskService:
    """One exported disk, for any number of clients at once.

    tracked: None serves it without tracking. gate: shared by all disks that are cut together. under: has what
    the disk has not. is_bare: it has no file of its own, and nothing but what is under it. on_flush: told
    when a guest asks for a flush, before it is done.
    """

    def __init__(
        self,
        disk: ServedDisk,
        gate: Gate,
        tracked: TrackedDisk | None,
        *,
        read_only: bool,
        clock: Clock,
        under: UnderSource | None = None,
        is_bare: bool = False,
        on_flush: Callable[[], None] | None = None,
    ) -> None:
        self.disk = disk
        self._on_flush = on_flush
        self._gate = gate
        self._tracked = tracked
        self._clock = clock
        self._read_only = read_only
        self._flushing = threading.Lock()
        self._flush_failed = False
        self._under = under
        direct = None if is_bare else disk.direct()
        descriptor = -1 if direct is None else direct.file.fileno()
        if descriptor is None:
            message = f"{disk.path} cannot be served: it has no descriptor"
            raise TypeError(message)
        self._exported = NbdExport(
            descriptor,
            None if direct is None else direct.block_map,
            gate,
            None if tracked is None else tracked.track,
            virtual_bytes=disk.virtual_bytes,
            has_parent=direct is not None and direct.has_parent,
            read_only=read_only,
        )

    def serve(self, descriptor: int, *, structured: bool, base_allocation: bool = False) -> None:
        """Serve the client behind a socket's descriptor until it leaves.

        structured, base_allocation: what it has negotiated.

        Raises: ConnectionError if it breaks; HvReplicaError, OSError where what is under the disk is lost.
        """
        connection = NbdConnection(self._exported, descriptor, structured=structured)
        connection.base_allocation = base_allocation
        if self._under is not None:
            connection.under = self._under.under()
        written = False
        while True:
            event = connection.serve(written=written)
            written = False
            if event is NbdEvent.CLOSED:
                return
            if event is NbdEvent.BROKEN:
                raise self._broken(connection.error)
            if event is NbdEvent.REFRESH and self._under is not None:
                connection.under = self._under.under(connection.under)
            elif event is NbdEvent.FILL:
                with self._gate.reading():
                    self.disk.read_into(connection.room, connection.piece_offset)
            elif event is NbdEvent.PIECE:
                written = self._piece(connection)
            else:
                self._answer(connection, event, structured=structured)

    def flush(self) -> None:
        """Make every write durable that was answered; the journal has been since before each of them.

        Any thread. Raises: OSError, HvReplicaError, and so for every later call.
        """
        tracked = self._tracked
        # One after the other: a flush that finds nothing to do must not return before the one that does it.
        with self._flushing:
            if tracked is None or tracked.track.take_written():
                self.disk.changed()
            try:
                self.disk.flush()
            except (OSError, HvReplicaError) as error:
                self._report_flush(error)
                raise

    def _flush_for_guest(self) -> None:
        if self._on_flush is not None:
            self._on_flush()
        self.flush()

    # ---- pieces of writes

    def _piece(self, connection: NbdConnection) -> bool:
        """Make a piece possible, or do it; return whether it is done, well or badly."""
        offset, length = connection.piece_offset, len(connection.piece)
        try:
            if connection.reason is NbdReason.PLACE:
                return self._write(offset, connection.piece)
            tracked = self._require_tracked()
            if connection.reason is NbdReason.ARM:
                tracked.arm(offset, length)
            else:
                tracked.preserve(offset, length)
        except (OSError, HvReplicaError) as error:
            self._report(error, "write", offset)
            connection.fail(_told(error))
            kept(error)
            return True
        return False

    def _write(self, offset: int, data: memoryview) -> bool:
        """Write through the disk, which gives places to blocks; return False if a cut came between.

        Nobody else writes until the places are in the file: a client that connects again after our death
        takes what was answered as written, and its next flush as the promise that it lasts.
        """
        tracked = self._tracked
        with self._gate.closed():
            if tracked is not None:
                if tracked.track.check(offset, len(data)) is not TrackStatus.READY:
                    return False
                tracked.track.write(offset, data, hrl_timestamp(self._clock.now_s()))
            try:
                self.disk.write(data, offset)
                self.disk.publish()
            except BaseException:
                if tracked is not None:
                    tracked.track.mark(offset, len(data))  # the disk may hold part of it
                raise
            if tracked is not None:
                tracked.track.note_written()
        return True

    # ---- other commands

    def _answer(self, connection: NbdConnection, event: NbdEvent, *, structured: bool) -> None:
        command, cookie = connection.type, connection.cookie
        try:
            if event is NbdEvent.FLUSH:
                self._flush_for_guest()
                reply = pack_simple_reply_raw(cookie)
            else:
                reply = self._do(connection, structured=structured)
        except (OSError, HvReplicaError, MemoryError) as error:
            self._report(error, "command", connection.offset)
            reply = _refusal(cookie, _told(error), str(error), chunked=structured and _is_chunked(command))
            kept(error)
        except _Refused as refused:
            chunked = structured and _is_chunked(command)
            reply = _refusal(cookie, refused.error, refused.reason, chunked=chunked)
        failed = connection.send(reply)
        if failed:
            raise self._broken(failed)

    def _do(self, connection: NbdConnection, *, structured: bool) -> bytes:
        command, flags = connection.type, connection.flags
        offset, length, cookie = connection.offset, connection.length, connection.cookie
        allowed = _FLAGS.get(command)  # type: ignore[call-overload]
        if allowed is None or flags & ~int(allowed):
            raise _Refused(NbdError.EINVAL, f"command {command} with flags {flags:#x} is not served")
        if command != Command.FLUSH and (offset > self.disk.virtual_bytes - length):
            beyond = NbdError.ENOSPC if command == Command.WRITE_ZEROES else NbdError.EINVAL
            raise _Refused(beyond, f"the disk ends at {self.disk.virtual_bytes}")
        if command == Command.READ:
            return self._read(cookie, offset, length, structured=structured)
        if command == Command.BLOCK_STATUS:
            if not connection.base_allocation or length == 0:
                raise _Refused(NbdError.EINVAL, "block status needs base:allocation, and a length")
            only_one = bool(flags & CommandFlag.REQ_ONE)
            rows = block_states(self.disk, offset, length, only_one=only_one)
            return pack_block_status(cookie_of(cookie), rows)
        if command in {Command.TRIM, Command.WRITE_ZEROES}:
            if self._read_only:
                raise _Refused(NbdError.EPERM, "the export is read-only")
            self._zero(offset, length, keep=bool(flags & CommandFlag.NO_HOLE))
            if command == Command.WRITE_ZEROES:
                self.disk.publish()  # what a trimmed range reads is left open, and waits for the next flush
        if command == Command.FLUSH or flags & CommandFlag.FUA:
            self._flush_for_guest()
        return pack_simple_reply_raw(cookie)

    def _read(self, cookie: int, offset: int, length: int, *, structured: bool) -> bytes:
        if length > PAYLOAD_BYTES_MAX:
            raise _Refused(NbdError.EINVAL, f"a read has at most {PAYLOAD_BYTES_MAX} bytes")
        data = bytearray(length)
        with self._gate.reading():
            self.disk.read_into(data, offset)
        if not structured:
            return pack_simple_reply_raw(cookie) + data
        if not length:
            return pack_chunk_header(cookie_of(cookie), ChunkType.NONE, 0, is_last=True)
        head = pack_chunk_header(cookie_of(cookie), ChunkType.OFFSET_DATA, 8 + length, is_last=True)
        return head + OFFSET_DATA.pack(disk_offset=offset) + data

    def _zero(self, offset: int, length: int, *, keep: bool) -> None:
        for start in range(offset, offset + length, _ZERO_LOOK_BYTES):
            end = min(start + _ZERO_LOOK_BYTES, offset + length)
            if not keep and self._reads_as_zeros(start, end):
                continue
            # Aligned, and of whole blocks where these give their places back.
            window_bytes = _PROVISION_BYTES if keep else max(_ZERO_WINDOW_BYTES, self.disk.block_bytes)
            low = start
            while low < end:
                high = min((low // window_bytes + 1) * window_bytes, end)
                if keep or not self._reads_as_zeros(low, high):
                    self._zero_window(low, high - low, keep=keep)
                low = high

    def _reads_as_zeros(self, start: int, end: int) -> bool:
        """Return whether zeroing a range would change nothing, so that there is nothing to track."""
        return self.disk.parent is None and not len(self.disk.extents(start, end))

    def _zero_window(self, offset: int, length: int, *, keep: bool) -> None:
        tracked = self._tracked
        while True:
            if tracked is not None:
                tracked.arm(offset, length)
                tracked.preserve(offset, length)
            # Blocks lose their places: nobody may write to them or read from them meanwhile.
            with self._gate.closed(bar_readers=True):
                if tracked is not None:
                    if tracked.track.check(offset, length) is not TrackStatus.READY:
                        continue
                    tracked.track.mark(offset, length)
                    tracked.track.note_written()
                if keep:
                    self._provision(offset, length)
                    self.disk.publish()
                else:
                    self.disk.write_zeroes(offset, length)
                return

    def _provision(self, offset: int, length: int) -> None:
        """Write zeros, so that what has a place keeps it."""
        zeros = bytes(min(length, _PROVISION_BYTES))
        for start in range(offset, offset + length, len(zeros)):
            self.disk.write(zeros[: min(len(zeros), offset + length - start)], start)

    def _require_tracked(self) -> TrackedDisk:
        if self._tracked is None:
            raise AssertionError("only a tracked disk asks for a region or a grain")
        return self._tracked

    def _report_flush(self, error: BaseException) -> None:
        """Say once what a failed flush means: every later one fails too."""
        if not self._flush_failed:
            self._flush_failed = True
            _LOG.error(
                "%s cannot be flushed: %s. What was written since the last flush may be lost, and no flush "
                "succeeds any more. See to the storage, then stop capture and start it again: the next cut "
                "looks at all that is not certain.",
                self.disk.path,
                error,
            )

    def _broken(self, code: int) -> ConnectionError:
        why = f" ({os.strerror(code)})" if code else ""
        return ConnectionError(f"the client of {self.disk.path} went away without a goodbye{why}")

    def _report(self, error: BaseException, what: str, offset: int) -> None:
        _LOG.error("%s at %d of %s failed: %s", what, offset, self.disk.path, error)


class _Refused(Exception):
    """A request that is answered with an error and is no failure of ours."""

    def __init__(self, error: NbdError, reason: str) -> None:
        super().__init__(reason)
        self.error = error
        self.reason = reason


def cookie_of(cookie: int) -> int:
    """Return a cookie as formats.nbd has it: the native loop reads its bytes as little-endian."""
    return int.from_bytes(cookie.to_bytes(8, "little"), "big")


def pack_simple_reply_raw(cookie: int, error: int = 0) -> bytes:
    """Return a simple reply to a cookie of the native loop."""
    return pack_simple_reply(cookie_of(cookie), error)


def _is_chunked(command: int) -> bool:
    return command in {Command.READ, Command.BLOCK_STATUS}


def _refusal(cookie: int, error: NbdError, reason: str, *, chunked: bool) -> bytes:
    if chunked:
        return pack_error_chunk(cookie_of(cookie), error, reason)
    return pack_simple_reply_raw(cookie, error)


def _told(error: BaseException) -> NbdError:
    """Return what a client is told of a failure."""
    if isinstance(error, MemoryError):
        return NbdError.ENOMEM
    return nbd_error(error.errno or 0) if isinstance(error, OSError) else NbdError.EIO
