"""An NBD disk that only takes: what a client writes to it goes into a sink of changes, and nothing is kept.

The target to which a QEMU pushes the changed clusters of a disk. Requests are answered one after the other,
in the order in which they come: speed matters little here, for the client waits for its own disk.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.capture.export import ExportInfo
from hvreplica.errors import HvReplicaError, kept
from hvreplica.formats.nbd import (
    PAYLOAD_BYTES_MAX,
    REQUEST,
    Command,
    NbdError,
    nbd_error,
    pack_error_chunk,
    pack_simple_reply,
    unpack_request,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from hvreplica.capture.handshake import Negotiated
    from hvreplica.formats.nbd import Request
    from hvreplica.tracking.compare import ChangeSink

_SECTOR_BYTES = 512  # the unit of a sink
_CHUNKED = frozenset((Command.READ, Command.BLOCK_STATUS))  # answered in chunks where that was negotiated

log = logging.getLogger("hvreplica.capture")


class LogSink:
    """The disk. serve() is a listener's handler, for one client or several; the rest belongs to one owner.

    After the first change that the sink did not take, no other is taken: `failure` then says why. A flush is
    answered without doing anything: what counts is durable when the sink's owner says so.
    """

    def __init__(self, sink: ChangeSink, size_bytes: int, on_read: Callable[[int], None]) -> None:
        """size_bytes: as the client must find it.

        on_read: told the bytes that arrived, in a thread of serve().
        """
        self._sink = sink
        self._on_read = on_read
        self._lock = threading.Lock()
        self.export = ExportInfo(
            name="", size_bytes=size_bytes, description="changes, on their way into a log"
        )
        self.changed_bytes = 0
        self.failure: BaseException | None = None

    def serve(self, negotiated: Negotiated) -> None:
        """Answer requests until the client is done or sends what no client may."""
        connection = negotiated.socket
        header, payload = memoryview(bytearray(REQUEST.size)), memoryview(bytearray())
        while _receive(connection, header):
            request = unpack_request(header)
            if request.command == Command.DISC:
                return
            if request.command == Command.WRITE:
                if request.length > PAYLOAD_BYTES_MAX:
                    log.warning("a client writes %d bytes at once, more than it may", request.length)
                    return  # where the next request begins is known, but nobody promised to read so much
                if len(payload) < request.length:
                    payload = memoryview(bytearray(request.length))
                if not _receive(connection, payload[: request.length]):
                    return
            error = self._take(request, payload[: request.length])
            chunked = negotiated.structured and request.command in _CHUNKED
            reply = (
                pack_error_chunk(request.cookie, NbdError(error))
                if chunked
                else pack_simple_reply(request.cookie, error)
            )
            try:
                connection.sendall(reply)
            except ConnectionError:
                return

    def _take(self, request: Request, data: memoryview) -> int:
        """Carry a request out; return 0, or the error that the client is told."""
        if request.command == Command.FLUSH:
            return 0
        if request.command not in {Command.WRITE, Command.WRITE_ZEROES}:
            known = request.command in set(Command)
            return NbdError.EPERM if known else NbdError.EINVAL  # there is nothing to read or to trim
        offset, length = request.disk_offset, request.length
        if offset + length > self.export.size_bytes:
            return NbdError.ENOSPC
        if (offset | length) % _SECTOR_BYTES:
            return NbdError.EINVAL
        if not length:
            return 0
        with self._lock:
            if self.failure is not None:
                return NbdError.ESHUTDOWN
            try:
                if request.command == Command.WRITE:
                    self._sink.append(np.array([[offset, length]], np.int64), data)
                else:
                    self._sink.append_zeroes(offset, length)
                self.changed_bytes += length
                self._on_read(length)
            except (HvReplicaError, OSError, MemoryError) as error:
                self.failure = kept(error)
                return nbd_error(error.errno or 0) if isinstance(error, OSError) else NbdError.EIO
        return 0


def _receive(connection: socket.socket, buffer: memoryview) -> bool:
    """Fill `buffer`; return whether the client sent so much before it went away."""
    done = 0
    while done < len(buffer):
        try:
            received = connection.recv_into(buffer[done:])
        except ConnectionError:
            return False
        if not received:
            return False
        done += received
    return True
