"""Clients that mean harm, against `hvreplica capture` itself: it stays alive, bounded, and good to others.

One server bears all of them, one after the other. After each a good client is served, and in the end memory, threads
and descriptors are what they were.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk
from hvreplica.files import OS_FILES
from hvreplica.units import GIB, KIB, MIB
from tests.fuzz.mutate import mutate
from tests.support.command_line import Running, ask_verb
from tests.support.nbd_client import (
    FLUSH,
    READ,
    SECTOR,
    TRIM,
    WRITE,
    ZEROES,
    Connection,
    content,
    request_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

DISK_BYTES = 64 * MIB
CACHE, STATUS = 5, 7
COMMANDS = (READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS)
EINVAL, ENOSPC = 22, 28
PAYLOAD_BYTES_MAX = 32 * MIB
CONNECTIONS_MAX = 64
ROUNDS = 5_000 if os.environ.get("HVREPLICA_PROFILE") == "deep" else 400
WAIT_S = 60
# What clients may make a server hold: its buffers for each of them, and some slack of the allocators.
RSS_BYTES_MAX = CONNECTIONS_MAX * 4 * MIB + 128 * MIB


class Server:
    """A capture of one disk that runs through all tests of this file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "nbd.sock"
        create_disk(
            OS_FILES,
            folder / "disk.vhdx",
            virtual_bytes=DISK_BYTES,
            format="vhdx",
            block_bytes=MIB,
            clock=SYSTEM,
        )
        self.running = Running(
            *("capture", "--vm", "web01", "--disk", folder / "disk.vhdx", "--socket", self.socket),
            *("--state", folder / "state", "--json"),
        )
        assert self.running.ready, self.running.errors()
        self.rng = random.Random(0)
        self.check()
        self.idle = self.status()

    def connect(self) -> Connection:
        """Return a client that behaves so far."""
        return Connection(self.socket, "0", timeout_s=WAIT_S)

    def check(self) -> None:
        """Write, flush and read as a good client does; wait while the places are taken by those who go."""
        client = until_connected(self)
        with contextlib.closing(client):
            number, sector = self.rng.randrange(1, 1 << 60), self.rng.randrange(DISK_BYTES // SECTOR - 16)
            data = content(number, sector, 16)
            assert client.ask(WRITE, sector * SECTOR, len(data), data=data) == (0, b"")
            assert client.ask(FLUSH) == (0, b"")
            assert client.ask(READ, sector * SECTOR, len(data)) == (0, data)

    def status(self) -> dict[str, int]:
        """Return memory in bytes, threads and open descriptors."""
        process = Path("/proc") / str(self.running.process.pid)
        lines = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        return {
            "rss": int(lines["VmRSS"].split()[0]) * KIB,
            "threads": int(lines["Threads"]),
            "descriptors": len(os.listdir(process / "fd")),
        }

    def check_settled(self) -> None:
        """Wait until the threads and descriptors of clients that left are gone."""
        moment = threading.Event()
        for _ in range(WAIT_S * 20):
            now = self.status()
            if all(now[name] <= self.idle[name] for name in ("threads", "descriptors")):
                break
            moment.wait(0.05)
        else:
            pytest.fail(f"clients have left, and the server holds {now}, not {self.idle} as before")
        assert now["rss"] < self.idle["rss"] + RSS_BYTES_MAX


def until_connected(server: Server) -> Connection:
    """Return a new client, as soon as the server has a place."""
    moment = threading.Event()
    for _ in range(WAIT_S * 20):
        try:
            return server.connect()
        except (ConnectionError, BlockingIOError):
            moment.wait(0.05)
    return server.connect()


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("hostile"))
    with server.running:
        yield server
        code, said = server.running.end(signal.SIGTERM)
        assert code == 0, said
        assert "Traceback" not in said, said


@pytest.fixture
def server(module_server: Server) -> Iterator[Server]:
    yield module_server
    assert module_server.running.process.poll() is None, module_server.running.errors()
    module_server.check()
    module_server.check_settled()


def raw(server: Server) -> socket.socket:
    """Return a connected socket that has said nothing."""
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(WAIT_S)
    try:
        line.connect(str(server.socket))
    except OSError:
        line.close()
        raise
    return line


def drain(line: socket.socket) -> bytes:
    """Say that nothing follows, and return all that the server still says; fails if it never ends."""
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_WR)
    parts = []
    try:
        while part := line.recv(1 << 20):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def valid_stream(rng: random.Random) -> bytes:
    """Return some requests, each of which is right."""
    stream = b""
    for number in range(rng.randrange(1, 12)):
        command = rng.choice(COMMANDS)
        length = 0 if command == FLUSH else rng.choice((1, 511, 512, 4096, 5000, 70_000))
        offset = 0 if command == FLUSH else rng.randrange(DISK_BYTES - length)
        data = rng.randbytes(length) if command == WRITE else b""
        flags = rng.choice((0, 0, 1)) if command != READ else 0
        stream += request_bytes(number, command, offset, length, flags=flags, data=data)
    return stream


def test_mutated_streams_end_in_bounded_time(server: Server, seed: int) -> None:
    rng = random.Random(seed)
    for round_number in range(ROUNDS):
        stream = valid_stream(rng)
        changed = mutate(stream, rng, [valid_stream(rng)], hot=range(0, len(stream), 28))
        client = until_connected(server)
        sender = threading.Thread(target=lambda c=client, s=changed: send_all(c.socket, s))
        sender.start()
        try:
            sender.join(WAIT_S)
            drain(client.socket)
        except TimeoutError:
            pytest.fail(f"round {round_number} of seed {seed} hangs")
        finally:
            client.socket.close()
            sender.join()


def send_all(line: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        line.sendall(data)


EDGES = (0, 1, DISK_BYTES - 1, DISK_BYTES, DISK_BYTES + 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
LENGTHS = (0, 1, DISK_BYTES, DISK_BYTES + 1, 1 << 31, (1 << 32) - 1)


@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, ZEROES, STATUS, 8, 0xFFFF])
def test_absurd_ranges_are_refused_and_the_next_request_is_served(server: Server, command: int) -> None:
    client = server.connect()
    with contextlib.closing(client):
        for offset in EDGES:
            for length in LENGTHS:
                is_inside = offset + length <= DISK_BYTES
                client.send(7, command, offset, length)
                wanted = length if command == READ and is_inside and length <= PAYLOAD_BYTES_MAX else 0
                number, error, _ = client.reply(lambda _, wanted=wanted: wanted)
                assert number == 7
                if command in {8, 0xFFFF, STATUS}:  # without structured replies there is no block status
                    assert error == EINVAL
                elif command == FLUSH:
                    assert error in {0, EINVAL}
                elif not is_inside:
                    assert error in {EINVAL, ENOSPC}, (offset, length)
                elif command != READ or length <= PAYLOAD_BYTES_MAX:
                    assert error == 0, (offset, length)
                assert client.ask(READ, 0, 512)[0] == 0


@pytest.mark.parametrize("length", [1, 512, 70_000, MIB, 32 * MIB])
def test_write_beyond_the_end_is_refused_and_the_next_request_is_served(server: Server, length: int) -> None:
    client = server.connect()
    with contextlib.closing(client):
        for offset in (DISK_BYTES - length + 1, DISK_BYTES, 1 << 62, (1 << 64) - 1, (1 << 64) - length):
            error, _ = client.ask(WRITE, offset, length, data=bytes(length))
            assert error in {EINVAL, ENOSPC}
            assert client.ask(READ, 0, 512)[0] == 0


@pytest.mark.parametrize("length", [32 * MIB + 1, GIB, (1 << 32) - 1])
def test_write_of_absurd_length_holds_no_memory(server: Server, length: int) -> None:
    """Such a payload is dropped as it comes, or the connection ends; it is never gathered."""
    client = server.connect()
    with contextlib.closing(client.socket):
        before = server.status()["rss"]
        client.send(1, WRITE, 0, length)
        window = bytes(MIB)
        try:
            for _ in range(200):
                client.socket.sendall(window)
        except OSError:
            pass  # the server has ended it
        assert server.status()["rss"] < before + 16 * MIB


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: web01\r\n\r\n" * 4, id="http"),
        pytest.param(struct.pack(">IHHQQI", 0x25609514, 0, READ, 1, 0, 512), id="magic"),
        pytest.param(b"\0" * 4096, id="zeros"),
        pytest.param(request_bytes(1, READ, 0, 512)[:27], id="short"),
    ],
)
def test_what_is_no_request_ends_the_connection(server: Server, start: bytes) -> None:
    client = server.connect()
    with contextlib.closing(client.socket):
        client.socket.sendall(start)
        assert drain(client.socket) == b""


def test_half_open_connections_keep_nobody_out(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            with contextlib.suppress(ConnectionError, BlockingIOError):
                stack.enter_context(raw(server))
        server.check()
        for _ in range(CONNECTIONS_MAX // 2):  # some choose an export, and then say nothing
            with contextlib.suppress(ConnectionError):
                stack.enter_context(contextlib.closing(server.connect()))
        server.check()


def test_hundred_clients_are_served_or_refused(server: Server) -> None:
    served, failures = [], []

    def work(index: int) -> None:
        try:
            with contextlib.closing(until_connected(server)) as client:
                sector = index * 64
                for number in range(1, 20):
                    data = content(number, sector, 16)
                    assert client.ask(WRITE, sector * SECTOR, len(data), data=data) == (0, b"")
                    assert client.ask(READ, sector * SECTOR, len(data)) == (0, data)
                served.append(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[:3]
    assert len(served) == 100


@pytest.mark.parametrize("length", [4 * KIB, MIB, 32 * MIB], ids=["small", "large", "largest"])
def test_clients_that_never_read_their_answers_hold_little(server: Server, length: int) -> None:
    before = server.status()["rss"]
    clients = []
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS_MAX // 2):
            client = server.connect()
            stack.callback(client.socket.close)
            clients.append(client)
        for client in clients:
            client.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for number in range(2000):
                    client.send(number, READ, 0, length)
        for _ in range(5):
            server.check()
        held = server.status()["rss"] - before
        assert held < len(clients) * 4 * MIB + 64 * MIB, f"{held / MIB:.0f} MiB for {len(clients)} clients"


@pytest.mark.parametrize("length", [64 * KIB, 8 * MIB])
def test_client_that_stops_inside_a_payload_holds_up_nobody(server: Server, length: int) -> None:
    """Neither others that write to the same place, nor a cut."""
    client = server.connect()
    with contextlib.closing(client.socket):
        half = request_bytes(1, WRITE, 8 * MIB, length, data=bytes(length // 2 + 1))
        client.socket.sendall(half)
        with contextlib.closing(server.connect()) as other:
            for offset in range(8 * MIB, 8 * MIB + length, 64 * KIB):
                assert other.ask(WRITE, offset, 64 * KIB, data=b"\1" * (64 * KIB)) == (0, b"")
            assert other.ask(FLUSH) == (0, b"")
            assert other.ask(ZEROES, 8 * MIB, length) == (0, b"")
        ask_verb("cut", "--state", server.folder / "state")


def test_clients_that_leave_with_requests_under_way_disturb_nobody(server: Server, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        client = server.connect()
        stream = valid_stream(rng) + request_bytes(99, WRITE, 0, 4096, data=bytes(rng.randrange(4096)))
        send_all(client.socket, stream)
        client.socket.close()


def test_connection_that_is_reset_by_many_at_once_is_let_go(server: Server) -> None:
    for _ in range(5):
        lines = []
        for _ in range(CONNECTIONS_MAX):
            with contextlib.suppress(ConnectionError, BlockingIOError):
                lines.append(raw(server))
        for line in lines:
            line.close()
