"""The line between the sites breaks, the store is full, the certificate is wrong: told clearly, continued later."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
from typing import TYPE_CHECKING

import msgspec
import pytest

import hvreplica
from hvreplica.errors import (
    AuthenticationFailed,
    AuthorizationRefused,
    HvReplicaError,
    PeerClosed,
    StoreFull,
)
from hvreplica.files import OsBlockFile, OsFiles
from hvreplica.formats import messages
from hvreplica.replication import primary, serve
from hvreplica.transport import client_context, connect
from tests.replication.sites import DISK, MIB, STATE, VM, Guest, Served

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Line:
    """A TCP proxy that cuts each connection after so many bytes from the primary, as often as it is told to."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.cut_after: list[int] = []  # for each new connection; none left: never
        self.carried = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            limit = self.cut_after.pop(0) if self.cut_after else None
            thread = threading.Thread(target=self._pair, args=(near, limit))
            thread.start()
            self._threads.append(thread)

    def _pair(self, near: socket.socket, limit: int | None) -> None:
        with near, socket.create_connection(self._target) as far:
            back = threading.Thread(target=self._carry, args=(far, near, None))
            back.start()
            self._carry(near, far, limit)
            back.join()

    def _carry(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        carried = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if limit is not None and carried + len(data) > limit:
                    sink.sendall(data[: limit - carried])
                    break
                sink.sendall(data)
                carried += len(data)
                self.carried += len(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def line(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(primary, "RETRY_AFTER_S", (0.0, 0.0, 0.0))
    made = Line(served.address)
    yield made
    made.close()


def over(line: Line, guest: Guest, served: Served, **options: object) -> hvreplica.ReplicateResult:
    return hvreplica.replicate(
        VM, [DISK], to=line.address, tls=served.tls, state=STATE, files=guest.files, **options
    )


def test_line_cut_in_each_transfer_is_made_again_in_the_same_call(
    guest: Guest, served: Served, line: Line
) -> None:
    for phase in ("initial", "delta"):
        line.cut_after = [10**9, 1_000_000, 10**9, 10**9, 300_000]
        assert over(line, guest, served, compression="none").kind == phase
        assert served.content() == guest.model
        guest.write(3 * MIB)


def test_line_cut_too_often_gives_up_and_the_next_call_continues(
    guest: Guest, served: Served, line: Line
) -> None:
    line.cut_after = [10**9, 200_000, 200_000] * 4
    with pytest.raises(PeerClosed):
        over(line, guest, served, compression="none")
    line.cut_after = []
    assert over(line, guest, served).kind == "initial"
    assert served.content() == guest.model


def test_line_cut_before_a_claim_is_told_at_once(guest: Guest, served: Served, line: Line) -> None:
    line.cut_after = [600]
    with pytest.raises(HvReplicaError):
        over(line, guest, served)
    assert line.cut_after == []


class SmallFiles(OsFiles):
    """The operating system's files with room for so many bytes of payload under one folder."""

    def __init__(self) -> None:
        self.room_bytes: int | None = None

    def open(
        self,
        path: Path,
        *,
        writable: bool = False,
        create: bool = False,
        exclusive: bool = False,
        mode: int = 0o644,
    ) -> OsBlockFile:
        file = super().open(path, writable=writable, create=create, exclusive=exclusive, mode=mode)
        return SmallFile(file, self)


class SmallFile(OsBlockFile):
    """Writes only through write(), so that each byte is counted."""

    def __init__(self, file: OsBlockFile, owner: SmallFiles) -> None:
        self.__dict__.update(file.__dict__)
        self._owner = owner

    def fileno(self) -> int | None:
        return None

    def write(self, buffer: object, file_offset: int) -> None:
        room = self._owner.room_bytes
        if room is not None:
            length = memoryview(buffer).nbytes  # type: ignore[arg-type]
            if length > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self._owner.room_bytes = room - length
        super().write(buffer, file_offset)  # type: ignore[arg-type]


@pytest.mark.parametrize("room_bytes", [0, 10_000, 1_000_000, 5_000_000])
def test_full_store_refuses_and_continues_when_room_is_made(
    guest: Guest, tmp_path: Path, tls: Path, room_bytes: int
) -> None:
    files = SmallFiles()
    served = Served(tmp_path / "store", tls, files=files)
    try:
        for phase in ("initial", "delta"):
            files.room_bytes = room_bytes
            with contextlib.suppress(StoreFull):
                guest.replicate(served)
                assert room_bytes > 1_000_000, "the store had no room for this"
            files.room_bytes = None
            assert guest.replicate(served).kind in (phase, "none")
            assert served.content() == guest.model
            guest.write(2 * MIB)
    finally:
        served.close()


def test_vm_outside_of_the_trust_list_is_refused_and_logged(
    guest: Guest, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    trust = served.tls / "trust.toml"
    before = trust.read_text()
    try:
        trust.write_text(before.replace('"*"', '"db*"'))
        with caplog.at_level(logging.WARNING), pytest.raises(AuthorizationRefused, match="trust list"):
            guest.replicate(served)
        assert "AuthorizationRefused" in caplog.text or "trust list" in caplog.text
    finally:
        trust.write_text(before)
    assert guest.replicate(served).kind == "initial"


def test_primary_of_another_ca_is_refused_on_both_sides(
    guest: Guest, served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other-tls"
    hvreplica.tls_init(other)
    with caplog.at_level(logging.WARNING), pytest.raises(AuthenticationFailed):
        hvreplica.replicate(VM, [DISK], to=served.address, tls=other, state=STATE, files=guest.files)
    assert guest.replicate(served).kind == "initial"


def test_connection_that_says_nothing_is_closed_soon(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_FIRST_MESSAGE_S", 0.3)
    decoder = msgspec.msgpack.Decoder(messages.Answer)
    with (
        connect(served.address, client_context(served.tls), decoder=decoder, idle_timeout_s=30) as channel,
        pytest.raises(PeerClosed, match=r"closed|broke"),
    ):
        channel.receive_message()
