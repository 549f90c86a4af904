"""A guest on an NBD export behind a Unix socket, from the protocol document alone: one request at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

_READ, _WRITE, _DISC, _FLUSH = 0, 1, 2, 3
_EXPORT_NAME = 1
_FIXED_NO_ZEROES = 3


class SocketGuest:
    """One connection to the export called `name`; simple replies."""

    def __init__(self, path: Path, name: str) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.settimeout(60)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            self._connection.connect(f"/proc/self/fd/{descriptor}/{path.name}")
        finally:
            os.close(descriptor)
        assert self._receive(16) == b"NBDMAGICIHAVEOPT"
        self._receive(2)
        encoded = name.encode()
        chosen = struct.pack(">8sII", b"IHAVEOPT", _EXPORT_NAME, len(encoded)) + encoded
        self._connection.sendall(struct.pack(">I", _FIXED_NO_ZEROES) + chosen)
        self.size_bytes, _ = struct.unpack(">QH", self._receive(10))
        self._cookie = 0

    def write(self, offset: int, data: bytes) -> None:
        """Write, and wait for the answer."""
        self._ask(_WRITE, offset, len(data), data)

    def read(self, offset: int, length: int) -> bytes:
        """Return what is there."""
        return self._ask(_READ, offset, length)

    def flush(self) -> None:
        """Make all answered writes durable."""
        self._ask(_FLUSH, 0, 0)

    def close(self) -> None:
        """Say goodbye, where somebody still listens."""
        with contextlib.suppress(OSError):
            self._connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, _DISC, 0, 0, 0))
        self._connection.close()

    def _ask(self, command: int, offset: int, length: int, data: bytes = b"") -> bytes:
        self._cookie += 1
        head = struct.pack(">IHHQQI", 0x25609513, 0, command, self._cookie, offset, length)
        self._connection.sendall(head + data)
        magic, error, cookie = struct.unpack(">IIQ", self._receive(16))
        assert (magic, cookie) == (0x67446698, self._cookie)
        if error:
            raise OSError(error, os.strerror(error))
        return self._receive(length) if command == _READ else b""

    def _receive(self, count: int) -> bytes:
        parts = []
        while count:
            part = self._connection.recv(count)
            if not part:
                raise ConnectionError("the server ended")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
