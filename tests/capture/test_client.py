"""The small NBD client: what it writes is there in order, and what is not as it should be is told."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from hvreplica.capture.client import NbdClient
from hvreplica.capture.listen import NbdListener
from hvreplica.errors import PeerClosed, ProtocolViolation
from hvreplica.formats.nbd import PAYLOAD_BYTES_MAX, SIMPLE_REPLY, Command, pack_simple_reply
from hvreplica.formats.nbd_options import pack_export_name_reply, pack_greeting
from tests.support.plain_nbd import PlainDisk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MIB = 1 << 20
READY = (pack_greeting(), pack_export_name_reply(MIB, 0, padded=False))  # type: ignore[arg-type]


@contextlib.contextmanager
def scripted(path: Path, answers: Sequence[bytes]) -> Iterator[None]:
    """Answer the first client with each of these, after it has sent something, and end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        server.listen(1)
        server.settimeout(10)

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                for place, answer in enumerate(answers):
                    if place:
                        connection.recv(4096)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join()


def test_writes_are_read_again_and_asked_for_in_order(tmp_path: Path) -> None:
    disk = PlainDisk(bytearray(MIB))
    path = tmp_path / "d.sock"
    with NbdListener(path, lambda: [disk.export()], disk.serve), NbdClient(path, "0") as client:
        assert client.size_bytes == MIB
        client.write(4096, b"first" * 1024)
        client.write(4096, b"again".ljust(512))
        client.flush()
        assert client.read(4096, 1024).split() == [b"again", (b"first" * 1024)[512:1024]]
        with pytest.raises(OSError, match="Invalid argument") as caught:
            client.read(MIB, 512)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(ValueError, match="more than one request"):
            client.read(0, PAYLOAD_BYTES_MAX + 1)
        assert client.read(0, 512) == bytes(512)
    commands = [command for command, _, _ in disk.log]
    assert commands == [Command.WRITE, Command.WRITE, Command.FLUSH, Command.READ, Command.READ]


@pytest.mark.parametrize(
    ("answers", "error", "words"),
    [
        ([b"SSH-2.0-OpenSSH_9.2p1 Debian"], ProtocolViolation, "no NBD server"),
        ([pack_greeting(), b""], PeerClosed, "ended the connection"),
        ([*READY, pack_simple_reply(7)], ProtocolViolation, "another request"),
        ([*READY, pack_simple_reply(1)[: SIMPLE_REPLY.size // 2]], PeerClosed, "ended the connection"),
        ([*READY, pack_simple_reply(1, errno.ENOSPC)], OSError, "No space left"),
    ],
    ids=["other", "early-end", "cookie", "cut", "full"],
)
def test_server_that_does_not_answer_as_it_should_is_told(
    tmp_path: Path, answers: Sequence[bytes], error: type[Exception], words: str
) -> None:
    path = tmp_path / "d.sock"
    with scripted(path, answers), pytest.raises(error, match=words), NbdClient(path, "0") as client:
        client.write(0, bytes(512))
