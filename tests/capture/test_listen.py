"""The listener outlives every bad client, keeps its bounds, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hvreplica.address import Address
from hvreplica.capture.export import ExportInfo
from hvreplica.capture.listen import NbdListener
from hvreplica.errors import FieldOutOfRange, Locked, Unreachable
from tests.capture.nbd_client import ABORT, ACK, GO, INFO, LIST, SERVER, Client, export_request
from tests.support.plain_nbd import PlainDisk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hvreplica.capture.handshake import Negotiated

READ, WRITE, DISC = 0, 1, 2
WAIT_S = 30


@pytest.fixture
def disk() -> PlainDisk:
    return PlainDisk(bytearray(1 << 20))


@contextlib.contextmanager
def serving(
    address: Path | Address,
    disk: PlainDisk,
    handler: Callable[[Negotiated], object] | None = None,
    **options: Any,
) -> Iterator[NbdListener]:
    with NbdListener(address, lambda: [disk.export()], handler or disk.serve, **options) as listener:
        yield listener


def connected(listener: NbdListener) -> Client:
    if isinstance(listener.address, Path):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(WAIT_S)
        connection.connect(str(listener.address))
        return Client(connection)
    return Client(socket.create_connection((listener.address.host, listener.address.port), timeout=WAIT_S))


def entered(listener: NbdListener) -> Client:
    client = connected(listener)
    try:
        client.greet()
        assert client.kinds(GO, export_request(b"")) == [INFO, ACK]
    except BaseException:
        client.connection.close()
        raise
    return client


def works(listener: NbdListener) -> bool:
    client = entered(listener)
    with client.connection:
        client.request(WRITE, 4096, 512, data=b"x" * 512)
        assert client.simple_reply() == (0, b"")
        client.request(READ, 4096, 512)
        return client.simple_reply(512) == (0, b"x" * 512)


@pytest.fixture(params=["unix", "tcp"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Path | Address:
    return tmp_path / "web01.sock" if request.param == "unix" else Address("127.0.0.1", 0)


def test_clients_are_served_at_the_same_time(address: Path | Address, disk: PlainDisk) -> None:
    with serving(address, disk) as listener:
        clients = [entered(listener) for _ in range(5)]
        for index, client in enumerate(clients):
            client.request(WRITE, 512 * index, 512, data=bytes([index + 1]) * 512)
            assert client.simple_reply() == (0, b"")
        assert works(listener)
        for client in clients:
            client.request(DISC, 0, 0)
            assert client.is_ended()
            client.connection.close()
    assert disk.data[:2560] == b"".join(bytes([index + 1]) * 512 for index in range(5))


@pytest.mark.parametrize(
    "junk", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, bytes(3)], ids=["none", "http", "ones", "short"]
)
def test_junk_is_logged_and_the_next_client_is_served(
    address: Path | Address, disk: PlainDisk, junk: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(address, disk) as listener:
        client = connected(listener)
        client.receive(18)
        with contextlib.suppress(OSError):  # the first bytes may have been enough for the server
            client.send(junk)
            client.connection.shutdown(socket.SHUT_WR)
        assert client.is_ended()
        client.connection.close()
        assert works(listener)
    expected = "127.0.0.1:" if isinstance(address, Address) else f"process {os.getpid()}: "
    assert all(record.getMessage().startswith(expected) for record in caplog.records)
    assert bool(caplog.records) == bool(junk)


def test_exports_are_asked_for_each_client(tmp_path: Path, disk: PlainDisk) -> None:
    sizes = iter([1 << 20, 2 << 20])
    with NbdListener(tmp_path / "web01.sock", lambda: [ExportInfo("0", next(sizes))], disk.serve) as listener:
        for expected in (1 << 20, 2 << 20):
            client = connected(listener)
            with client.connection:
                client.greet()
                replies = client.option(GO, export_request(b"0"))
                assert struct.unpack(">HQ", replies[0].data[:10])[1] == expected


def test_many_half_open_clients_keep_nobody_out(
    address: Path | Address, disk: PlainDisk, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(address, disk, connections_max=6, negotiation_limit_s=600) as listener:
        silent = []
        for _ in range(20):
            silent.append(connected(listener))
            with contextlib.suppress(EOFError, ConnectionError):
                silent[-1].receive(18)  # so that the listener has met it
        until_works(listener)
        for client in silent:
            client.connection.close()
    assert any("it has chosen no export and others wait" in record.getMessage() for record in caplog.records)


def until_works(listener: NbdListener) -> None:
    """Try until a place is free: the listener learns of a closed connection a moment later."""
    for _ in range(500):
        with contextlib.suppress(EOFError, ConnectionError):
            assert works(listener)
            return
    pytest.fail("no place became free")


def test_clients_that_have_chosen_are_not_given_up(address: Path | Address, disk: PlainDisk) -> None:
    with serving(address, disk, connections_max=4, negotiation_limit_s=600) as listener:
        first = entered(listener)
        others = [connected(listener) for _ in range(10)]
        for client in others:
            with contextlib.suppress(EOFError, ConnectionError):
                client.receive(18)
        first.request(READ, 0, 512)
        assert first.simple_reply(512) == (0, bytes(512))
        for client in (first, *others):
            client.connection.close()


def test_connections_beyond_the_limit_are_refused(
    address: Path | Address, disk: PlainDisk, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(address, disk, connections_max=2) as listener:
        served = [entered(listener) for _ in range(2)]
        refused = connected(listener)
        assert refused.is_ended()
        for client in (*served, refused):
            client.connection.close()
        until_works(listener)
    assert any("all places are taken" in record.getMessage() for record in caplog.records)


def test_handler_that_fails_is_logged_and_the_next_client_is_served(
    tmp_path: Path, disk: PlainDisk, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter([FieldOutOfRange("bad field"), RuntimeError("a bug"), None])

    def handler(negotiated: Negotiated) -> None:
        failure = next(failures)
        if failure is not None:
            raise failure
        disk.serve(negotiated)

    with serving(tmp_path / "web01.sock", disk, handler) as listener:
        for _ in range(2):
            client = entered(listener)
            assert client.is_ended()
            client.connection.close()
        assert works(listener)
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]


def test_close_lets_what_has_arrived_be_answered(address: Path | Address, disk: PlainDisk) -> None:
    arrived = threading.Event()

    def handler(negotiated: Negotiated) -> None:
        negotiated.socket.recv(28, socket.MSG_PEEK)
        arrived.set()
        closed = select.poll()
        closed.register(negotiated.socket, select.POLLRDHUP)
        assert closed.poll(1000 * WAIT_S), "close() has not ended what the client may still send"
        disk.serve(negotiated)

    with serving(address, disk, handler) as listener:
        client = entered(listener)
        client.request(WRITE, 0, 512, data=b"a" * 512)
        assert arrived.wait(WAIT_S)
        listener.close(grace_s=WAIT_S)
        assert client.simple_reply() == (0, b"")
        assert client.is_ended()
        client.connection.close()
    assert disk.data[:512] == b"a" * 512


def test_close_cuts_a_client_that_does_not_read(address: Path | Address, disk: PlainDisk) -> None:
    stuck = threading.Event()

    def handler(negotiated: Negotiated) -> None:
        stuck.set()
        with contextlib.suppress(OSError):
            while True:
                negotiated.socket.sendall(bytes(1 << 20))

    listener = NbdListener(address, lambda: [disk.export()], handler)
    listener.start()
    client = entered(listener)
    assert stuck.wait(WAIT_S)
    listener.close(grace_s=0.05)
    listener.close()
    client.connection.close()


def test_close_before_start_returns_at_once(address: Path | Address, disk: PlainDisk) -> None:
    NbdListener(address, lambda: [disk.export()], disk.serve).close()


def test_socket_is_private_and_removed_at_close(tmp_path: Path, disk: PlainDisk) -> None:
    path = tmp_path / "web01.sock"
    before = os.umask(0)
    try:
        with serving(path, disk):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert not path.exists()


def test_socket_of_a_dead_process_is_replaced(tmp_path: Path, disk: PlainDisk) -> None:
    path = tmp_path / "web01.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(path, disk) as listener:
        assert works(listener)


def test_socket_of_a_living_process_is_refused_by_name(tmp_path: Path, disk: PlainDisk) -> None:
    path = tmp_path / "web01.sock"
    with serving(path, disk) as listener:
        with pytest.raises(Locked, match=rf"web01\.sock.*\(pid {os.getpid()}\)"):
            NbdListener(path, list, disk.serve)
        assert works(listener)


def test_file_of_another_kind_is_not_touched(tmp_path: Path, disk: PlainDisk) -> None:
    path = tmp_path / "web01.vhdx"
    path.write_bytes(b"a disk")
    link = tmp_path / "link"
    link.symlink_to(path)
    for each in (path, link, tmp_path):
        with pytest.raises(Unreachable):
            NbdListener(each, list, disk.serve)
    assert path.read_bytes() == b"a disk"
    assert link.is_symlink()


def test_socket_of_another_that_came_after_is_not_removed(tmp_path: Path, disk: PlainDisk) -> None:
    path = tmp_path / "web01.sock"
    with serving(path, disk), socket.socket(socket.AF_UNIX) as other:
        path.unlink()
        other.bind(str(path))
        other.listen()
    assert path.is_socket()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (Path("/nowhere/at/all/web01.sock"), "cannot listen: No such file"),
        (Path("/tmp") / ("x" * 110), "at most 107 bytes"),
        (Address("203.0.113.1", 1), "cannot listen"),
    ],
)
def test_address_that_cannot_be_listened_on_is_unreachable_with_a_hint(
    address: Path | Address, message: str, disk: PlainDisk
) -> None:
    with pytest.raises(Unreachable, match=message) as caught:
        NbdListener(address, list, disk.serve)
    assert caught.value.hint


def test_port_in_use_is_unreachable(disk: PlainDisk) -> None:
    with serving(Address("127.0.0.1", 0), disk) as listener, pytest.raises(Unreachable, match="in use"):
        NbdListener(listener.address, list, disk.serve)


def test_replies_leave_at_once(disk: PlainDisk) -> None:
    seen: list[int] = []

    def handler(negotiated: Negotiated) -> None:
        seen.append(negotiated.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    with serving(Address("127.0.0.1", 0), disk, handler) as listener:
        client = entered(listener)
        assert client.is_ended()
        client.connection.close()
    assert seen == [1]


def test_client_that_only_lists_leaves_no_word_in_the_log(
    tmp_path: Path, disk: PlainDisk, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path / "web01.sock", disk) as listener:
        client = connected(listener)
        with client.connection:
            client.greet()
            assert client.kinds(LIST) == [SERVER, ACK]
            assert client.kinds(ABORT) == [ACK]
            assert client.is_ended()
    assert not caplog.records
