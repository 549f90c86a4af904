"""The listener outlives every bad client, and is bounded in connections, silence and time to stop."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest

from hvreplica.errors import FieldOutOfRange, HvReplicaError, Unreachable
from hvreplica.transport import Listener, server_context
from tests.transport.support import DECODER, Ask, Tell, connected, raw_connection, serving, wait_for, warned

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.transport import Channel


def answer(channel: Channel[Any]) -> None:
    channel.send_message(Tell(len(channel.receive_message().text)))


def works(listener: Listener[Any], folder: Path) -> bool:
    with connected(listener, folder) as channel:
        channel.send_message(Ask("four"))
        return bool(channel.receive_message() == Tell(4))


def until_closed(connection: Any) -> bytes:
    """Return everything that a plain connection is sent before its end."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize(
    "junk", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(600), b"\xff" * 5000], ids=repr
)
def test_junk_is_logged_and_the_next_client_is_served(tls_folder: Path, junk: bytes) -> None:
    with serving(tls_folder, answer) as listener:
        with warned() as logged, raw_connection(listener) as connection:
            connection.sendall(junk)
            connection.shutdown(1)
            until_closed(connection)
        assert works(listener, tls_folder)
    assert logged[0].startswith("127.0.0.1:")


def test_silent_client_is_given_up_after_the_handshake_timeout(tls_folder: Path) -> None:
    serve = serving(tls_folder, answer, handshake_timeout_s=0.1)
    with serve as listener, warned() as logged, raw_connection(listener) as connection:
        until_closed(connection)
    assert "neither sent nor took anything" in logged[0]


def test_dripping_client_cannot_stretch_the_handshake(tls_folder: Path) -> None:
    # One byte of a record that never ends, again and again: each byte comes in time, the handshake does not.
    stop = threading.Event()
    with (
        serving(tls_folder, answer, handshake_timeout_s=0.3) as listener,
        warned() as logged,
        raw_connection(listener) as connection,
    ):
        connection.sendall(b"\x16\x03\x01\x40\x00")

        def drip() -> None:
            while not stop.wait(0.02):
                try:
                    connection.sendall(b"\x01")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        until_closed(connection)
        stop.set()
        thread.join()
    assert logged[0].startswith("127.0.0.1:")


def test_unproven_connections_take_at_most_half_of_the_places(tls_folder: Path) -> None:
    with (
        serving(tls_folder, answer, connections_max=4, handshake_timeout_s=5) as listener,
        warned() as logged,
    ):
        silent = [raw_connection(listener) for _ in range(3)]
        until_closed(silent[2])  # the third of a half of four
        for connection in silent:
            connection.close()
        until_works(listener, tls_folder)
    assert any("have not proven who they are" in message for message in logged)


def patiently_connected(listener: Listener[Any], folder: Path) -> Channel[Any]:
    """Connect as soon as the server has seen that the one before has proven itself."""
    for _ in range(500):
        try:
            return connected(listener, folder)
        except HvReplicaError:
            continue
    pytest.fail("no place became free")


def until_works(listener: Listener[Any], folder: Path) -> None:
    """Connect until a place is free: the server learns of a closed connection a moment later."""
    for _ in range(500):
        try:
            assert works(listener, folder)
        except HvReplicaError:
            continue
        return
    pytest.fail("no place became free")


def test_connections_beyond_the_limit_are_refused_and_logged(tls_folder: Path) -> None:
    with serving(tls_folder, answer, connections_max=2) as listener, warned() as logged:
        first, second = patiently_connected(listener, tls_folder), patiently_connected(listener, tls_folder)
        with raw_connection(listener) as third:
            assert until_closed(third) == b""
        for channel in (first, second):
            channel.send_message(Ask("x"))
            assert channel.receive_message() == Tell(1)
            channel.close()
        until_works(listener, tls_folder)
    assert any("all places are taken" in message for message in logged)


def test_handler_that_fails_is_logged_and_the_next_client_is_served(
    tls_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter([FieldOutOfRange("bad field"), RuntimeError("a bug"), None])

    def handler(channel: Channel[Any]) -> None:
        failure = next(failures)
        if failure is not None:
            raise failure
        answer(channel)

    with serving(tls_folder, handler) as listener:
        for _ in range(2):
            with connected(listener, tls_folder) as channel, pytest.raises(HvReplicaError):
                channel.receive_message()
        assert works(listener, tls_folder)
    levels = [record.levelno for record in caplog.records if "(primary)" in record.getMessage()]
    assert levels == [logging.WARNING, logging.ERROR]


def test_stop_gives_up_open_connections_and_waits_for_their_handlers(tls_folder: Path) -> None:
    running, ended = threading.Event(), threading.Event()

    def handler(channel: Channel[Any]) -> None:
        running.set()
        try:
            channel.receive_message(timeout_s=3600)
        finally:
            ended.set()

    with serving(tls_folder, handler) as listener:
        channel = connected(listener, tls_folder)
        wait_for(running)
        listener.stop()
        listener.stop()
        wait_for(ended)
        channel.close()


def test_stop_before_serving_returns_at_once(tls_folder: Path) -> None:
    listener = Listener("127.0.0.1:0", server_context(tls_folder), answer, decoder=DECODER)
    listener.stop()
    listener.serve_forever()
    listener.close()
    listener.close()


def test_address_in_use_is_unreachable_with_a_hint(tls_folder: Path) -> None:
    context = server_context(tls_folder)
    listener = Listener("127.0.0.1:0", context, answer, decoder=DECODER)
    with pytest.raises(Unreachable, match="cannot listen") as caught:
        Listener(listener.address, context, answer, decoder=DECODER)
    assert caught.value.hint
    listener.close()
