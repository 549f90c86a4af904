"""A small NBD client for a Unix socket: one request at a time, simple replies, no TLS.

What the demo's guest writes with. A hypervisor brings a client of its own.

Spec: the NBD protocol, "Handshake", "Transmission".
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Self

from hvreplica.errors import PeerClosed, ProtocolViolation
from hvreplica.formats.nbd import (
    PAYLOAD_BYTES_MAX,
    SIMPLE_REPLY,
    Command,
    Request,
    pack_request,
    pack_text,
    unpack_simple_reply,
)
from hvreplica.formats.nbd_options import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    GREETING,
    GREETING_MAGIC,
    OPTION_MAGIC,
    ClientFlag,
    Option,
    pack_option,
)

if TYPE_CHECKING:
    from pathlib import Path

_TIMEOUT_S = 60.0


class NbdClient:
    """One connection to an export; close() when done. One owner. size_bytes: of the export."""

    def __init__(self, path: Path, export: str) -> None:
        """Connect and choose the export. Raises: ProtocolViolation, PeerClosed, OSError."""
        self._path = path
        self._cookie = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(_TIMEOUT_S)
            self._socket.connect(str(path))
            greeting = GREETING.unpack(self._receive(GREETING.size))
            if (greeting["magic"], greeting["option_magic"]) != (GREETING_MAGIC, OPTION_MAGIC):
                raise ProtocolViolation("what answers is no NBD server", path=path, actual=greeting["magic"])
            flags = CLIENT_FLAGS.pack(flags=ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)
            self._socket.sendall(flags + pack_option(Option.EXPORT_NAME, pack_text(export)))
            answer = EXPORT_NAME_REPLY.unpack(self._receive(EXPORT_NAME_REPLY.size))
        except BaseException:
            self._socket.close()
            raise
        self.size_bytes = int(answer["size_bytes"])

    def read(self, disk_offset: int, length: int) -> bytes:
        """Return what is there, at most PAYLOAD_BYTES_MAX. Raises: OSError, ProtocolViolation, PeerClosed."""
        return self._ask(Command.READ, disk_offset, length)

    def write(self, disk_offset: int, data: bytes) -> None:
        """Write, at most PAYLOAD_BYTES_MAX; durable after flush(). Raises: as read()."""
        self._ask(Command.WRITE, disk_offset, len(data), data)

    def flush(self) -> None:
        """Make durable what was written. Raises: as read()."""
        self._ask(Command.FLUSH, 0, 0)

    def close(self) -> None:
        """End the connection. May be called twice."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ask(self, command: Command, disk_offset: int, length: int, data: bytes = b"") -> bytes:
        if length > PAYLOAD_BYTES_MAX:
            message = f"{length} bytes are more than one request may have"
            raise ValueError(message)
        self._cookie += 1
        request = Request(command, 0, self._cookie, disk_offset, length)
        self._socket.sendall(pack_request(request) + data)
        cookie, error = unpack_simple_reply(self._receive(SIMPLE_REPLY.size))
        if cookie != self._cookie:
            raise ProtocolViolation(
                "the reply belongs to another request",
                path=self._path,
                expected=self._cookie,
                actual=cookie,
            )
        if error:
            raise OSError(error, os.strerror(error), str(self._path))
        return self._receive(length) if command == Command.READ else b""

    def _receive(self, length: int) -> bytes:
        parts = []
        while length:
            part = self._socket.recv(length)
            if not part:
                raise PeerClosed("the NBD server ended the connection", path=self._path)
            parts.append(part)
            length -= len(part)
        return b"".join(parts)
