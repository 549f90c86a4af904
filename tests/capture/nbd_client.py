"""An NBD client written from the protocol document alone: no constant and no structure of ours is used."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

ACK, SERVER, INFO, META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_TLS_REQD, ERR_UNKNOWN = (0x80000000 + n for n in (1, 2, 3, 5, 6))
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO_OPTION, GO, STRUCTURED, LIST_META, SET_META = (
    1,
    2,
    3,
    5,
    6,
    7,
    8,
    9,
    10,
)
EXTENDED_HEADERS = 11
FIXED, NO_ZEROES = 1, 2


@dataclass
class Reply:
    """One reply to an option."""

    option: int
    kind: int
    data: bytes


class Client:
    """One connection, until it is closed."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.settimeout(30)

    def greet(self, flags: int = FIXED | NO_ZEROES) -> int:
        """Read the greeting, answer it, and return the server's flags."""
        magic, option_magic, server_flags = struct.unpack(">8s8sH", self.receive(18))
        assert (magic, option_magic) == (b"NBDMAGIC", b"IHAVEOPT")
        self.send(struct.pack(">I", flags))
        return int(server_flags)

    def option(self, option: int, data: bytes = b"") -> list[Reply]:
        """Send an option and return its replies up to the one that ends them."""
        self.send(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)
        replies = [self.reply()]
        while replies[-1].kind in (SERVER, INFO, META_CONTEXT):
            replies.append(self.reply())
        assert {reply.option for reply in replies} == {option}
        return replies

    def kinds(self, option: int, data: bytes = b"") -> list[int]:
        """Send an option and return the kinds of its replies."""
        return [reply.kind for reply in self.option(option, data)]

    def reply(self) -> Reply:
        """Read one reply."""
        magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == 0x3E889045565A9
        return Reply(option, kind, self.receive(length))

    def request(self, command: int, offset: int, length: int, *, data: bytes = b"", flags: int = 0) -> None:
        """Send one request, with the offset as its cookie."""
        self.send(struct.pack(">IHHQQI", 0x25609513, flags, command, offset, offset, length) + data)

    def simple_reply(self, length: int = 0) -> tuple[int, bytes]:
        """Return (error, data) of a simple reply."""
        magic, error, _ = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698
        return int(error), b"" if error else self.receive(length)

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def receive(self, count: int) -> bytes:
        """Return exactly `count` bytes."""
        data = b""
        while len(data) < count:
            part = self.connection.recv(count - len(data))
            if not part:
                raise EOFError(f"{len(data)} of {count} bytes came")
            data += part
        return data

    def is_ended(self) -> bool:
        """Wait for the server's end; whatever it still says is an error of the test."""
        try:
            return self.connection.recv(1) == b""
        except ConnectionResetError:
            return True


def counted(text: bytes) -> bytes:
    """Return text behind its length."""
    return struct.pack(">I", len(text)) + text


def export_request(name: bytes, *infos: int) -> bytes:
    """Return the data of INFO and GO."""
    return counted(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def context_request(name: bytes, *queries: bytes) -> bytes:
    """Return the data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return counted(name) + struct.pack(">I", len(queries)) + b"".join(map(counted, queries))
