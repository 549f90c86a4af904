"""Certificates of every bad kind: refused, told to both sides in words, and logged by the server."""

from __future__ import annotations

import socket
import ssl
import threading
from typing import TYPE_CHECKING

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from hvreplica.errors import AuthenticationFailed, FormatError, PeerClosed, ProtocolViolation, Unreachable
from hvreplica.formats import wire
from hvreplica.transport import client_context, connect, server_context
from tests.transport.support import (
    DECODER,
    JOIN_TIMEOUT_S,
    Ask,
    connected,
    copy_folder,
    raw_client_context,
    raw_server_context,
    serving,
    wait_for,
    warned,
    write_leaf,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SERVER_ONLY = (ExtendedKeyUsageOID.SERVER_AUTH,)
CLIENT_ONLY = (ExtendedKeyUsageOID.CLIENT_AUTH,)


def refusal(
    server: ssl.SSLContext, client: ssl.SSLContext, *, host: str = "127.0.0.1"
) -> tuple[AuthenticationFailed, str]:
    """Return what the client raised and what the server logged."""
    ran: list[object] = []
    with serving(server, ran.append) as listener:
        address = f"{host}:{listener.address.port}"
        with warned() as logged, pytest.raises(AuthenticationFailed) as caught:
            connect(address, client, decoder=DECODER)
    assert not ran, "the handler ran for a connection that was refused"
    assert len(logged) == 1
    assert logged[0].startswith("127.0.0.1:")
    assert caught.value.path == address
    assert caught.value.hint
    return caught.value, logged[0]


def test_client_certificate_that_expired(tls_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(tls_folder, tmp_path / "tls")
    write_leaf(folder, "primary", valid_days=(-20, -1))
    told, logged = refusal(server_context(folder), raw_client_context(folder))
    assert "expired" in str(told)
    assert "certificate has expired" in logged


def test_client_certificate_that_is_not_yet_valid(tls_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(tls_folder, tmp_path / "tls")
    write_leaf(folder, "primary", valid_days=(2, 20))
    told, logged = refusal(server_context(folder), raw_client_context(folder))
    assert "refused our certificate" in str(told)
    assert "not yet valid" in logged


def test_client_of_an_unknown_ca(tls_folder: Path, other_folder: Path) -> None:
    # The client knows the server's CA, so that only the server has a reason to refuse.
    client = client_context(other_folder)
    client.load_verify_locations(tls_folder / "ca.pem")
    told, logged = refusal(server_context(tls_folder), client)
    assert "does not know our CA" in str(told)
    assert "from a CA that we do not know" in logged


def test_client_without_a_certificate(tls_folder: Path) -> None:
    client = raw_client_context(tls_folder, with_certificate=False)
    told, logged = refusal(server_context(tls_folder), client)
    assert "got no certificate from us" in str(told)
    assert "sent no certificate" in logged


def test_client_certificate_for_servers_only(tls_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(tls_folder, tmp_path / "tls")
    write_leaf(folder, "primary", usages=SERVER_ONLY)
    told, logged = refusal(server_context(folder), client_context(folder))
    assert "not made for this use" in str(told)
    assert "not made for this use" in logged


def test_server_certificate_that_expired(tls_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(tls_folder, tmp_path / "tls")
    write_leaf(folder, "replica", valid_days=(-20, -1))
    told, logged = refusal(raw_server_context(folder), client_context(folder))
    assert "the other side's certificate has expired" in str(told)
    assert "refused our certificate: expired" in logged


def test_server_of_an_unknown_ca(tls_folder: Path, other_folder: Path) -> None:
    told, logged = refusal(server_context(tls_folder), client_context(other_folder))
    assert "from a CA that we do not know" in str(told)
    assert "does not know our CA" in logged


def test_server_certificate_for_another_name(tls_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(tls_folder, tmp_path / "tls")
    write_leaf(folder, "replica", names=("replica.example", "192.0.2.7"))
    told, logged = refusal(server_context(folder), client_context(folder))
    assert "not for the name that we connect to" in str(told)
    assert "127.0.0.1" in str(told)
    assert "refused our certificate" in logged


def test_server_certificate_for_clients_only(tls_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(tls_folder, tmp_path / "tls")
    write_leaf(folder, "replica", usages=CLIENT_ONLY)
    told, logged = refusal(server_context(folder), client_context(folder))
    assert "not made for this use" in str(told)
    assert "not made for this use" in logged


def test_localhost_by_name_is_accepted(tls_folder: Path) -> None:
    with (
        serving(tls_folder, lambda channel: channel.receive_message()) as listener,
        connect(f"localhost:{listener.address.port}", client_context(tls_folder), decoder=DECODER) as channel,
    ):
        channel.send_message(Ask("hello"))


def test_tls_1_2_is_refused(tls_folder: Path) -> None:
    old = raw_client_context(tls_folder)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    refused = pytest.raises(ProtocolViolation, match=r"TLS 1\.3")
    with serving(tls_folder, print) as listener, warned() as logged, refused:
        connect(listener.address, old, decoder=DECODER)
    assert "does not speak TLS 1.3" in logged[0]


def test_session_is_tls_1_3_and_keeps_no_tickets(tls_folder: Path) -> None:
    assert server_context(tls_folder).minimum_version == ssl.TLSVersion.TLSv1_3
    assert client_context(tls_folder).minimum_version == ssl.TLSVersion.TLSv1_3
    assert server_context(tls_folder).num_tickets == 0


def test_nobody_listening_is_unreachable_with_a_hint(tls_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(Unreachable, match="refused") as caught:
        connect(f"127.0.0.1:{port}", client_context(tls_folder), decoder=DECODER)
    assert caught.value.path == f"127.0.0.1:{port}"
    assert caught.value.hint


def talk_plainly(answer: Callable[[socket.socket], object]) -> tuple[threading.Thread, int]:
    """Serve one connection without TLS."""
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with server, server.accept()[0] as connection:
            connection.settimeout(JOIN_TIMEOUT_S)
            connection.recv(65536)
            answer(connection)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, server.getsockname()[1]


def test_server_without_tls_is_told_apart(tls_folder: Path) -> None:
    thread, port = talk_plainly(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    with pytest.raises(ProtocolViolation, match="does not speak TLS"):
        connect(f"127.0.0.1:{port}", client_context(tls_folder), decoder=DECODER)
    thread.join()


def test_server_that_closes_in_the_handshake_is_peer_closed(tls_folder: Path) -> None:
    thread, port = talk_plainly(lambda _: None)
    with pytest.raises(PeerClosed):
        connect(f"127.0.0.1:{port}", client_context(tls_folder), decoder=DECODER)
    thread.join()


def test_server_that_says_nothing_is_given_up_after_the_timeout(tls_folder: Path) -> None:
    done = threading.Event()
    thread, port = talk_plainly(lambda _: wait_for(done))
    with pytest.raises(PeerClosed, match="neither sent nor took anything"):
        connect(f"127.0.0.1:{port}", client_context(tls_folder), decoder=DECODER, timeout_s=0.1)
    done.set()
    thread.join()


@pytest.mark.parametrize(
    ("preamble", "message"),
    [
        (wire.PREAMBLE.pack(magic=b"HVRWIRX\0", version=1, version_min=1), "does not speak this protocol"),
        (wire.PREAMBLE.pack(magic=wire.MAGIC, version=9, version_min=8), "no version"),
    ],
)
def test_server_of_another_protocol_or_version_is_refused(
    tls_folder: Path, monkeypatch: pytest.MonkeyPatch, preamble: bytes, message: str
) -> None:
    with serving(tls_folder, print) as listener:
        monkeypatch.setattr(wire, "pack_preamble", lambda: preamble)
        with pytest.raises(FormatError, match=message) as caught:
            connected(listener, tls_folder)
    assert caught.value.path == str(listener.address)
