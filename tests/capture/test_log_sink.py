"""The disk that only takes: what it takes, what it refuses, and that a client cannot make it do more."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from hvreplica.capture.handshake import Negotiated
from hvreplica.capture.log_sink import LogSink
from hvreplica.formats.nbd import (
    PAYLOAD_BYTES_MAX,
    Command,
    NbdError,
    Request,
    pack_request,
    unpack_chunk_header,
    unpack_simple_reply,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

SIZE = 1 << 20


class Sink:
    """Remembers changes; fails when told to."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, bytes | int]] = []
        self.failure: Exception | None = None

    def append(self, extents: np.ndarray, data: memoryview) -> None:
        if self.failure is not None:
            raise self.failure
        self.taken.append((int(extents[0, 0]), bytes(data)))

    def append_zeroes(self, disk_offset: int, length: int) -> None:
        self.taken.append((disk_offset, length))


class Client:
    """The other end."""

    def __init__(self, sink: Sink, *, structured: bool) -> None:
        self.seen: list[int] = []
        self.disk = LogSink(sink, SIZE, self.seen.append)
        inside, self.socket = socket.socketpair()
        self.socket.settimeout(30)
        negotiated = Negotiated(0, self.disk.export, structured, True, inside, None)
        self.thread = threading.Thread(target=self._serve, args=(negotiated,))
        self.thread.start()

    def _serve(self, negotiated: Negotiated) -> None:
        try:
            self.disk.serve(negotiated)
        finally:
            negotiated.close()

    def send(self, command: int, offset: int, length: int, data: bytes = b"") -> None:
        self.socket.sendall(pack_request(Request(command, 0, 77, offset, length)) + data)

    def ask(self, command: int, offset: int, length: int, data: bytes = b"") -> int:
        """Return the error of the answer."""
        self.send(command, offset, length, data)
        cookie, error = unpack_simple_reply(self.socket.recv(16, socket.MSG_WAITALL))
        assert cookie == 77
        return error

    def ended(self) -> bool:
        return self.socket.recv(1) == b""

    def close(self) -> None:
        self.socket.close()
        self.thread.join()


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def client(sink: Sink) -> Iterator[Client]:
    made = Client(sink, structured=False)
    yield made
    made.close()


def test_writes_and_zeros_reach_the_sink_in_order(client: Client, sink: Sink) -> None:
    assert client.ask(Command.WRITE, 4096, 1024, b"a" * 1024) == 0
    assert client.ask(Command.WRITE_ZEROES, 0, SIZE) == 0
    assert client.ask(Command.WRITE, SIZE - 512, 512, b"b" * 512) == 0
    assert client.ask(Command.WRITE, 512, 0) == 0
    assert client.ask(Command.FLUSH, 0, 0) == 0
    assert sink.taken == [(4096, b"a" * 1024), (0, SIZE), (SIZE - 512, b"b" * 512)]
    assert client.disk.changed_bytes == sum(client.seen) == 1024 + SIZE + 512
    client.send(Command.DISC, 0, 0)
    assert client.ended()


@pytest.mark.parametrize(
    ("command", "offset", "length", "error"),
    [
        (Command.WRITE, SIZE, 512, NbdError.ENOSPC),
        (Command.WRITE, SIZE - 512, 1024, NbdError.ENOSPC),
        (Command.WRITE_ZEROES, (1 << 64) - 512, 512, NbdError.ENOSPC),
        (Command.WRITE, 1, 512, NbdError.EINVAL),
        (Command.WRITE_ZEROES, 0, 100, NbdError.EINVAL),
        (Command.READ, 0, 512, NbdError.EPERM),
        (Command.TRIM, 0, 512, NbdError.EPERM),
        (Command.CACHE, 0, 512, NbdError.EPERM),
        (Command.BLOCK_STATUS, 0, 512, NbdError.EPERM),
        (99, 0, 512, NbdError.EINVAL),
    ],
)
def test_what_is_no_change_of_the_disk_is_refused(
    client: Client, sink: Sink, command: int, offset: int, length: int, error: NbdError
) -> None:
    data = bytes(length) if command == Command.WRITE else b""
    assert client.ask(command, offset, length, data) == error
    assert client.ask(Command.WRITE, 0, 512, b"c" * 512) == 0
    assert sink.taken == [(0, b"c" * 512)]


@pytest.mark.parametrize("command", [Command.READ, Command.BLOCK_STATUS])
def test_a_read_is_refused_in_a_chunk_where_that_was_agreed(sink: Sink, command: Command) -> None:
    client = Client(sink, structured=True)
    try:
        client.send(command, 0, 512)
        cookie, kind, payload_bytes, is_last = unpack_chunk_header(client.socket.recv(20, socket.MSG_WAITALL))
        assert (cookie, kind, is_last) == (77, 0x8001, True)
        payload = client.socket.recv(payload_bytes, socket.MSG_WAITALL)
        assert payload[:4] == b"\0\0\0\1"
        assert client.ask(Command.WRITE, 0, 512, bytes(512)) == 0
    finally:
        client.close()


@pytest.mark.parametrize(
    ("failure", "error"), [(OSError(28, "full"), NbdError.ENOSPC), (MemoryError(), NbdError.EIO)]
)
def test_after_a_failure_nothing_more_is_taken(
    client: Client, sink: Sink, failure: Exception, error: NbdError
) -> None:
    sink.failure = failure
    assert client.ask(Command.WRITE, 0, 512, bytes(512)) == error
    sink.failure = None
    assert client.ask(Command.WRITE, 0, 512, bytes(512)) == NbdError.ESHUTDOWN
    assert client.ask(Command.WRITE_ZEROES, 0, 512) == NbdError.ESHUTDOWN
    assert sink.taken == []
    assert type(client.disk.failure) is type(failure)


def test_a_write_that_is_too_long_ends_the_connection(client: Client, caplog: Any) -> None:
    client.send(Command.WRITE, 0, PAYLOAD_BYTES_MAX + 512)
    assert client.ended()
    assert "at once" in caplog.text


def test_a_client_that_goes_away_in_the_middle_is_forgotten(client: Client, sink: Sink) -> None:
    client.send(Command.WRITE, 0, 1024, bytes(512))
    client.close()
    assert sink.taken == []
    assert client.disk.failure is None
