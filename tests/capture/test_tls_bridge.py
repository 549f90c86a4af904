"""NBD under TLS: what is inside is plain, and both ends of a connection are carried over."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest

from hvreplica.address import Address
from hvreplica.capture.listen import NbdListener
from tests.capture.nbd_client import (
    ACK,
    ERR_INVALID,
    FIXED,
    GO,
    INFO,
    LIST,
    NO_ZEROES,
    SERVER,
    SET_META,
    STARTTLS,
    STRUCTURED,
    Client,
    context_request,
    export_request,
)
from tests.support.plain_nbd import PlainDisk

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from hvreplica.capture.handshake import Negotiated

READ, WRITE, DISC = 0, 1, 2
WAIT_S = 30
DISK_BYTES = 4 << 20


@contextlib.contextmanager
def serving(
    context: ssl.SSLContext, handler: Callable[[Negotiated], object], **options: Any
) -> Iterator[NbdListener]:
    disk = PlainDisk(bytearray(DISK_BYTES))
    with NbdListener(
        Address("127.0.0.1", 0), lambda: [disk.export()], handler, tls_context=context, **options
    ) as listener:
        yield listener


def plain(listener: NbdListener) -> Client:
    assert isinstance(listener.address, Address)
    return Client(socket.create_connection((listener.address.host, listener.address.port), timeout=WAIT_S))


def under_tls(client: Client, context: ssl.SSLContext) -> Client:
    client.greet()
    assert client.kinds(STARTTLS) == [ACK]
    wrapped = context.wrap_socket(
        client.connection,
        server_hostname="127.0.0.1",
        suppress_ragged_eofs=False,  # an end without close_notify raises
    )
    return Client(wrapped)


def entered(listener: NbdListener, context: ssl.SSLContext) -> Client:
    client = under_tls(plain(listener), context)
    assert client.kinds(GO, export_request(b"0")) == [INFO, ACK]
    return client


def test_bytes_survive_in_both_directions(
    tls_server: ssl.SSLContext, tls_client: ssl.SSLContext, rng: random.Random
) -> None:
    disk = PlainDisk(bytearray(DISK_BYTES))
    with serving(tls_server, disk.serve) as listener:
        client = entered(listener, tls_client)
        data = rng.randbytes(1 << 20)
        client.request(WRITE, 1 << 20, len(data), data=data)
        assert client.simple_reply() == (0, b"")
        client.request(READ, 0, DISK_BYTES)
        error, read = client.simple_reply(DISK_BYTES)
        assert (error, read) == (0, bytes(disk.data))
        assert disk.data[1 << 20 : 2 << 20] == data
        client.request(DISC, 0, 0)
        assert client.is_ended()
        client.connection.close()


def test_both_directions_flow_at_once(tls_server: ssl.SSLContext, tls_client: ssl.SSLContext) -> None:
    """Far more than any buffer holds goes each way before the other side reads a byte of it."""
    total = 16 << 20

    def echo(negotiated: Negotiated) -> None:
        count = 0
        while count < total:
            piece = negotiated.socket.recv(1 << 16)
            negotiated.socket.sendall(piece)
            count += len(piece)

    with serving(tls_server, echo) as listener:
        client = entered(listener, tls_client)
        # A TLS socket of Python is for one thread: the kernel's buffers let this one write first.
        client.connection.settimeout(0)
        sent = received = 0
        data = memoryview(bytes(range(256)) * 256)
        while received < total:
            with contextlib.suppress(ssl.SSLWantWriteError, ssl.SSLWantReadError):
                if sent < total:
                    at = sent % len(data)
                    sent += client.connection.send(data[at : min(len(data), at + total - sent)])
            with contextlib.suppress(ssl.SSLWantWriteError, ssl.SSLWantReadError):
                piece = client.connection.recv(1 << 16)
                at = received % len(data)
                assert piece == (bytes(data) * 2)[at : at + len(piece)]
                received += len(piece)
        client.connection.close()


def test_end_of_one_direction_leaves_the_other_open(
    tls_server: ssl.SSLContext, tls_client: ssl.SSLContext
) -> None:
    def handler(negotiated: Negotiated) -> None:
        heard = b""
        while piece := negotiated.socket.recv(100):
            heard += piece
        negotiated.socket.sendall(b"heard " + heard)

    with serving(tls_server, handler) as listener:
        client = entered(listener, tls_client)
        client.send(b"last words")
        socket.socket.shutdown(client.connection, socket.SHUT_WR)  # of TCP, without a word of TLS
        assert client.receive(16) == b"heard last words"
        assert client.is_ended()
        client.connection.close()


def test_last_words_go_out_though_requests_are_unread(
    tls_server: ssl.SSLContext, tls_client: ssl.SSLContext
) -> None:
    def handler(negotiated: Negotiated) -> None:
        negotiated.socket.recv(1, socket.MSG_PEEK)
        negotiated.socket.sendall(b"no more")

    with serving(tls_server, handler) as listener:
        client = entered(listener, tls_client)
        client.send(bytes(1 << 16))
        assert client.receive(7) == b"no more"
        with contextlib.suppress(OSError):
            client.send(bytes(1 << 20))  # for a socket that nobody reads any more
        with contextlib.suppress(ConnectionError):
            assert client.is_ended()
        client.connection.close()


def test_client_that_vanishes_ends_the_inner_socket(
    tls_server: ssl.SSLContext, tls_client: ssl.SSLContext
) -> None:
    ended = threading.Event()

    def handler(negotiated: Negotiated) -> None:
        with contextlib.suppress(OSError):
            while negotiated.socket.recv(100):
                pass
        ended.set()

    with serving(tls_server, handler) as listener:
        client = entered(listener, tls_client)
        client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.connection.close()  # with a reset
        assert ended.wait(WAIT_S)


def test_damaged_record_ends_the_inner_socket(tls_server: ssl.SSLContext, tls_client: ssl.SSLContext) -> None:
    ended = threading.Event()

    def handler(negotiated: Negotiated) -> None:
        with contextlib.suppress(OSError):
            assert negotiated.socket.recv(100) == b""
        ended.set()

    with serving(tls_server, handler) as listener:
        client = entered(listener, tls_client)
        raw = socket.socket(fileno=client.connection.detach())
        raw.sendall(b"\x17\x03\x03\x00\x40" + bytes(64))
        assert ended.wait(WAIT_S)
        raw.close()


def test_memory_is_bounded_where_the_client_does_not_read(
    tls_server: ssl.SSLContext, tls_client: ssl.SSLContext
) -> None:
    """The handler comes to a stop long before it has sent what would not fit into a few buffers."""
    sent: list[int] = []
    stopped = threading.Event()

    def handler(negotiated: Negotiated) -> None:
        negotiated.socket.settimeout(0.5)
        piece = bytes(1 << 16)
        try:
            while sum(sent) < 1 << 30:
                sent.append(negotiated.socket.send(piece))
        except OSError:
            stopped.set()

    with serving(tls_server, handler) as listener:
        client = entered(listener, tls_client)
        assert stopped.wait(WAIT_S)
        client.connection.close()
    assert sum(sent) < 64 << 20


def test_nothing_agreed_in_the_clear_counts_under_tls(
    tls_server: ssl.SSLContext, tls_client: ssl.SSLContext
) -> None:
    from hvreplica.capture.handshake import negotiate  # noqa: PLC0415

    disk = PlainDisk(bytearray(512))
    ours, theirs = socket.socketpair()
    seen: list[Negotiated | None] = []
    thread = threading.Thread(
        target=lambda: seen.append(negotiate(theirs, [disk.export()], tls_context=tls_server))
    )
    thread.start()
    client = Client(ours)
    client.greet()
    client.option(STRUCTURED)
    client.option(SET_META, context_request(b"0", b"base:allocation"))
    assert client.kinds(STARTTLS) == [ACK]
    inside = Client(tls_client.wrap_socket(ours, server_hostname="127.0.0.1"))
    assert inside.kinds(STARTTLS) == [ERR_INVALID]
    assert inside.kinds(SET_META, context_request(b"0", b"base:allocation")) == [ERR_INVALID]
    assert inside.kinds(LIST) == [SERVER, ACK]
    assert inside.kinds(GO, export_request(b"0")) == [INFO, ACK]
    thread.join(WAIT_S)
    negotiated = seen[0]
    assert negotiated is not None
    assert (negotiated.structured, negotiated.base_allocation) == (False, False)
    inside.connection.close()
    negotiated.close()


def test_plain_bytes_behind_starttls_are_not_believed(
    tls_server: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody between the two could put options there, to be taken for the client's own under TLS."""
    with serving(tls_server, lambda _: pytest.fail("served")) as listener:
        client = plain(listener)
        client.receive(18)
        data = export_request(b"0")
        client.send(
            struct.pack(">I", FIXED | NO_ZEROES)
            + b"IHAVEOPT"
            + struct.pack(">II", STARTTLS, 0)
            + b"IHAVEOPT"
            + struct.pack(">II", GO, len(data))
            + data
        )
        assert client.reply().kind == ACK
        with contextlib.suppress(ConnectionResetError):
            while client.connection.recv(100):  # the alert, in the clear
                pass
        client.connection.close()
    assert any("TLS failed" in record.getMessage() for record in caplog.records)


def test_client_without_a_certificate_is_refused(
    tls_server: ssl.SSLContext, tls_folder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tls_folder / "ca.pem")
    with serving(tls_server, lambda _: pytest.fail("served")) as listener:
        client = under_tls(plain(listener), context)
        with pytest.raises((OSError, EOFError)):
            client.kinds(LIST)
        client.connection.close()
    assert any("peer did not return a certificate" in record.getMessage() for record in caplog.records)


def test_silence_in_the_handshake_of_tls_is_given_up(
    tls_server: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tls_server, lambda _: pytest.fail("served"), negotiation_limit_s=0.1) as listener:
        client = plain(listener)
        client.greet()
        client.send(b"IHAVEOPT" + struct.pack(">II", STARTTLS, 0))
        with contextlib.suppress(EOFError, ConnectionError):
            client.reply()
        assert client.is_ended()
        client.connection.close()
    assert any("in time" in record.getMessage() for record in caplog.records)


def test_dripping_client_cannot_stretch_the_handshake_of_tls(
    tls_server: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tls_server, lambda _: pytest.fail("served"), negotiation_limit_s=0.2) as listener:
        client = plain(listener)
        client.greet()
        assert client.kinds(STARTTLS) == [ACK]
        client.send(b"\x16\x03\x01\x40\x00")  # a record of 16 KiB
        stop = threading.Event()
        for _ in range(16_384):
            try:
                client.send(b"\1")
            except OSError:
                break
            stop.wait(0.01)
        else:
            pytest.fail("the server still listens")
        client.connection.close()
    assert caplog.records


def test_close_ends_clients_under_tls(tls_server: ssl.SSLContext, tls_client: ssl.SSLContext) -> None:
    disk = PlainDisk(bytearray(DISK_BYTES))
    with serving(tls_server, disk.serve) as listener:
        client = entered(listener, tls_client)
        listener.close(grace_s=WAIT_S)
        assert client.is_ended()
        client.connection.close()
