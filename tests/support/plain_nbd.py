"""An NBD server's transmission loop in plain Python over a bytearray: slow, simple, and what others are held
to.

One request at a time, each answered before the next is read. All rules of the protocol are here once, in the
order in which a server has to check them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.capture.export import ExportInfo
from hvreplica.formats.nbd import (
    OFFSET_DATA,
    PAYLOAD_BYTES_MAX,
    REQUEST,
    BlockState,
    ChunkType,
    Command,
    CommandFlag,
    NbdError,
    pack_block_status,
    pack_chunk_header,
    pack_error_chunk,
    pack_simple_reply,
    unpack_request,
)

if TYPE_CHECKING:
    import socket

    from hvreplica.capture.handshake import Negotiated
    from hvreplica.formats.nbd import Request

GRAIN_BYTES = 4096  # what block status tells apart
_PAYLOAD = {Command.READ, Command.WRITE}
_CHANGES = {Command.WRITE, Command.TRIM, Command.WRITE_ZEROES}
_FLAGS = {
    Command.READ: CommandFlag.DF,
    Command.WRITE: CommandFlag(0),
    Command.FLUSH: CommandFlag(0),
    Command.TRIM: CommandFlag(0),
    Command.CACHE: CommandFlag(0),
    Command.WRITE_ZEROES: CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlag.REQ_ONE,
}


class Refused(Exception):
    """A request that gets an error instead of what it asks for."""

    def __init__(self, error: NbdError, message: str) -> None:
        super().__init__(message)
        self.error = error
        self.message = message


@dataclass
class PlainDisk:
    """A disk in memory, for any number of clients at once.

    data: the guest's bytes. log: (command, disk_offset, length) of every request that was carried out.
    """

    data: bytearray = field(repr=False)
    read_only: bool = False
    minimum_block_bytes: int = 512
    log: list[tuple[int, int, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def export(self, name: str = "0", description: str = "a disk in memory") -> ExportInfo:
        """Return what a client is told of it."""
        return ExportInfo(
            name=name,
            size_bytes=len(self.data),
            read_only=self.read_only,
            minimum_block_bytes=self.minimum_block_bytes,
            description=description,
            fast_zero=True,
        )

    def serve(self, negotiated: Negotiated) -> None:
        """Answer requests until the client is done: what a listener takes as its handler."""
        connection = negotiated.socket
        while (header := _receive(connection, REQUEST.size)) is not None:
            request = unpack_request(header)
            if request.command == Command.DISC:
                return
            data: bytes | None = b""
            if request.command == Command.WRITE:
                if request.length > 2 * PAYLOAD_BYTES_MAX:
                    return  # no room for what follows, and so no way to find the next request
                data = _receive(connection, request.length)
            if data is None:
                return
            connection.sendall(self._answer(negotiated, request, data))

    def _answer(self, negotiated: Negotiated, request: Request, data: bytes) -> bytes:
        try:
            self._check(negotiated, request)
            with self.lock:
                answer = self._do(request, data)
                self.log.append((request.command, request.disk_offset, request.length))
        except Refused as refused:
            if negotiated.structured:
                return pack_error_chunk(request.cookie, refused.error, refused.message)
            return pack_simple_reply(request.cookie, refused.error)
        if request.command == Command.READ and negotiated.structured:
            payload = OFFSET_DATA.pack(disk_offset=request.disk_offset) + answer
            header = pack_chunk_header(request.cookie, ChunkType.OFFSET_DATA, len(payload), is_last=True)
            return header + payload
        if request.command == Command.BLOCK_STATUS:
            return answer
        return pack_simple_reply(request.cookie) + answer

    def _check(self, negotiated: Negotiated, request: Request) -> None:
        known = _FLAGS.get(Command(request.command)) if request.command in set(Command) else None
        if known is None:
            raise Refused(NbdError.EINVAL, "there is no such command")
        if request.command == Command.BLOCK_STATUS and not negotiated.base_allocation:
            raise Refused(NbdError.EINVAL, "no metadata context was chosen")
        if not negotiated.structured:
            known &= ~CommandFlag.DF
        if request.flags & ~int(known | CommandFlag.FUA):
            raise Refused(NbdError.EINVAL, "a flag that this command does not have")
        if request.command in _CHANGES and self.read_only:
            raise Refused(NbdError.EPERM, "this disk is read-only")
        if request.command in _PAYLOAD and request.length > PAYLOAD_BYTES_MAX:
            raise Refused(NbdError.EINVAL, "more than 32 MiB at once")
        if request.command == Command.FLUSH:
            if request.disk_offset or request.length:
                raise Refused(NbdError.EINVAL, "a flush has no range")
            return
        if (request.disk_offset | request.length) % self.minimum_block_bytes:
            raise Refused(NbdError.EINVAL, f"not in blocks of {self.minimum_block_bytes} bytes")
        if request.disk_offset + request.length > len(self.data):
            is_write = request.command in {Command.WRITE, Command.WRITE_ZEROES}
            raise Refused(NbdError.ENOSPC if is_write else NbdError.EINVAL, "beyond the end of the disk")

    def _do(self, request: Request, data: bytes) -> bytes:
        start, end = request.disk_offset, request.disk_offset + request.length
        if request.command == Command.READ:
            return bytes(self.data[start:end])
        if request.command == Command.WRITE:
            self.data[start:end] = data
        elif request.command in {Command.TRIM, Command.WRITE_ZEROES}:
            self.data[start:end] = bytes(request.length)
        elif request.command == Command.BLOCK_STATUS:
            if request.length == 0:
                raise Refused(NbdError.EINVAL, "the status of nothing")
            rows = self._states(start, end)
            if request.flags & CommandFlag.REQ_ONE:
                rows = rows[:1]
            return pack_block_status(request.cookie, np.array(rows, dtype=np.int64))
        return b""

    def _states(self, start: int, end: int) -> list[tuple[int, int]]:
        rows: list[tuple[int, int]] = []
        while start < end:
            stop = min((start // GRAIN_BYTES + 1) * GRAIN_BYTES, end)
            state = 0 if any(self.data[start:stop]) else int(BlockState.HOLE | BlockState.ZERO)
            if rows and rows[-1][1] == state:
                rows[-1] = (rows[-1][0] + stop - start, state)
            else:
                rows.append((stop - start, state))
            start = stop
        return rows


def _receive(connection: socket.socket, count: int) -> bytes | None:
    """Return exactly `count` bytes, or None if the client went away before them."""
    parts, left = [], count
    while left:
        try:
            part = connection.recv(min(left, 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
