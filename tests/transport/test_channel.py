"""Channels over loopback: what arrives is a verified prefix of what was sent; every bad end is told as what it is."""

from __future__ import annotations

import itertools
import queue
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from hvreplica.clock import SYSTEM
from hvreplica.errors import ChecksumMismatch, FieldOutOfRange, FormatError, PeerClosed, ProtocolViolation
from hvreplica.formats import wire
from hvreplica.formats.wire import UnitKind
from hvreplica.transport import Channel, CodecPolicy, FrameEncoder
from tests.transport.support import Ask, Tell, connected, random_frame, serving, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WINDOW_BYTES = 64 << 10
HOUR_S = 3600.0


class Served:
    """Runs a test's server side and keeps what came of it: a value or an error."""

    def __init__(self, work: Callable[[Channel[Any]], object]) -> None:
        self._work = work
        self._results: queue.SimpleQueue[object] = queue.SimpleQueue()

    def __call__(self, channel: Channel[Any]) -> None:
        try:
            self._results.put(self._work(channel))
        except BaseException as error:
            self._results.put(error)

    def result(self) -> Any:
        """Return what the next connection's work returned or raised."""
        return self._results.get(timeout=30)


def encoded(sequence: int, data: bytes, compression: str = "none") -> list[Any]:
    return FrameEncoder(CodecPolicy(compression), clock=SYSTEM).encode(
        sequence=sequence,
        target=0,
        window_offset=0,
        window_bytes=max(len(data), 1),
        runs=np.array([[0, len(data)]]),
        data=data,
    )


def test_messages_go_both_ways(tls_folder: Path) -> None:
    def answer(channel: Channel[Any]) -> None:
        while True:
            question = channel.receive_message()
            channel.send_message(Tell(len(question.text)))

    with serving(tls_folder, Served(answer)) as listener, connected(listener, tls_folder) as channel:
        for length in (0, 1, 70_000, wire.MESSAGE_BYTES_MAX - 100):
            channel.send_message(Ask("x" * length))
            assert channel.receive_message() == Tell(length)


def test_both_sides_know_each_other_and_count_the_wire(tls_folder: Path) -> None:
    def swap(channel: Channel[Any]) -> tuple[object, int, int]:
        channel.receive_message()
        channel.send_message(Tell(1))
        with pytest.raises(PeerClosed):
            channel.receive_message()
        return channel.peer, channel.wire_bytes_sent, channel.wire_bytes_received

    served = Served(swap)
    with serving(tls_folder, served) as listener:
        with connected(listener, tls_folder) as channel:
            channel.send_message(Ask("x" * 500_000))
            channel.receive_message()
            assert channel.peer.common_name == "replica"
            assert channel.peer.not_after > SYSTEM.now_s() + 800 * 86400
            assert channel.address == listener.address
            sent_bytes, received_bytes = channel.wire_bytes_sent, channel.wire_bytes_received
        peer, server_sent_bytes, server_received_bytes = served.result()
    assert peer.common_name == "primary"
    assert len(peer.fingerprint_sha256) == 64
    assert 500_000 < sent_bytes < 510_000
    assert received_bytes == server_sent_bytes
    assert 0 <= server_received_bytes - sent_bytes < 100  # the goodbye came after we looked


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd", "auto"])
def test_many_connections_move_random_windows_and_every_byte_arrives(
    tls_folder: Path, compression: str
) -> None:
    window_count, connection_count = 60, 4
    expected = np.zeros(window_count * WINDOW_BYTES, np.uint8)
    actual = np.full_like(expected, 7)
    frames = {}
    for index in range(window_count):
        fields = random_frame(np.random.default_rng(index), data_bytes_max=WINDOW_BYTES)
        runs = fields["runs"] - [fields["window_offset"] - index * WINDOW_BYTES, 0]
        start = 0
        for offset, length in runs:
            expected[offset : offset + length] = fields["data"][start : start + length]
            start += length
        frames[index] = {"window_offset": index * WINDOW_BYTES, "runs": runs, "data": fields["data"]}

    def receive(channel: Channel[Any]) -> list[int]:
        sequences = []
        while (frame := channel.receive_frame()) is not None:
            sequences.append(frame.sequence)
            actual[frame.window_offset : frame.window_offset + frame.window_bytes] = 0
            start = 0
            for offset, length in frame.extents:
                actual[offset : offset + length] = frame.data[start : start + length]
                start += length
        return sequences

    def send(channel: Channel[Any], indexes: range) -> None:
        encoder = FrameEncoder(policy, clock=SYSTEM)
        for index in indexes:
            buffers = encoder.encode(sequence=index, target=0, window_bytes=WINDOW_BYTES, **frames[index])
            channel.send_frame(buffers, policy)
        channel.close()

    served, policy = Served(receive), CodecPolicy(compression)
    with serving(tls_folder, served) as listener:
        threads = [
            threading.Thread(
                target=send,
                args=(connected(listener, tls_folder), range(start, window_count, connection_count)),
            )
            for start in range(connection_count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        received = [served.result() for _ in threads]
    assert sorted(itertools.chain(*received)) == list(range(window_count))
    assert all(sequences == sorted(sequences) for sequences in received)
    assert np.array_equal(actual, expected)


def test_orderly_end_is_no_frame_and_the_answer_still_arrives(tls_folder: Path) -> None:
    def receive(channel: Channel[Any]) -> int:
        count = 0
        while channel.receive_frame() is not None:
            count += 1
        channel.send_message(Tell(count))
        return count

    with serving(tls_folder, Served(receive)) as listener, connected(listener, tls_folder) as channel:
        for sequence in range(3):
            channel.send_frame(encoded(sequence, b"data"))
        channel.finish_sending()
        assert channel.receive_message() == Tell(3)


def test_channel_closed_with_messages_unread_still_ends_in_good_order(tls_folder: Path) -> None:
    def tell(channel: Channel[Any]) -> object:
        for number in range(3):
            body = msgspec.msgpack.encode(Tell(number))
            channel.pipe.send([wire.pack_unit_header(UnitKind.MESSAGE, len(body)) + body])
        told.set()
        return channel.receive_frame()

    told, served = threading.Event(), Served(tell)
    with serving(tls_folder, served) as listener:
        channel = connected(listener, tls_folder)
        wait_for(told)
        assert channel.receive_message() == Tell(0)
        channel.close()
        assert served.result() is None


def cut_after(channel: Channel[Any], data: bytes) -> None:
    """Send `data` and let the connection break as a killed process leaves it: without TLS's own end."""
    channel.pipe.send([data])
    channel.abort()
    channel.close()


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 30, 63, 64, 70, 75])
def test_peer_killed_at_any_place_is_never_an_orderly_end(tls_folder: Path, kept: int) -> None:
    def receive(channel: Channel[Any]) -> None:
        assert channel.receive_frame() is not None
        channel.receive_frame()

    served = Served(receive)
    frame = b"".join(bytes(buffer) for buffer in encoded(0, b"data"))
    assert len(frame) == 76
    with serving(tls_folder, served) as listener:
        cut_after(connected(listener, tls_folder), frame + frame[:kept])
        error = served.result()
    assert isinstance(error, PeerClosed)
    assert error.path is not None


@pytest.mark.parametrize("kept", [1, 7, 30, 64, 75])
def test_orderly_end_inside_a_frame_is_an_error(tls_folder: Path, kept: int) -> None:
    served = Served(lambda channel: channel.receive_frame())
    frame = b"".join(bytes(buffer) for buffer in encoded(0, b"data"))
    with serving(tls_folder, served) as listener:
        channel = connected(listener, tls_folder)
        channel.pipe.send([frame[:kept]])
        channel.close()
        assert isinstance(served.result(), PeerClosed)


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (wire.pack_unit_header(UnitKind.MESSAGE, 1) + b"\xc0", ProtocolViolation),
        (wire.UNIT.pack(kind=2, body_bytes=0xFFFFFFFF), FieldOutOfRange),
        (wire.UNIT.pack(kind=2, body_bytes=56) + bytes(56), FormatError),
        (b"GET / HTTP/1.1\r\n\r\n", FormatError),
    ],
    ids=["message", "length", "zeros", "http"],
)
def test_what_is_no_frame_is_refused_naming_the_peer(
    tls_folder: Path, sent: bytes, kind: type[Exception]
) -> None:
    served = Served(lambda channel: channel.receive_frame())
    with serving(tls_folder, served) as listener:
        channel = connected(listener, tls_folder)
        channel.pipe.send([sent])
        error = served.result()
        channel.close()
    assert isinstance(error, kind)
    assert str(error).startswith("127.0.0.1:")


def test_frame_damaged_on_its_way_is_a_checksum_mismatch(tls_folder: Path) -> None:
    served = Served(lambda channel: channel.receive_frame())
    frame = bytearray(b"".join(bytes(buffer) for buffer in encoded(0, b"data")))
    frame[-1] ^= 1
    with serving(tls_folder, served) as listener, connected(listener, tls_folder) as channel:
        channel.pipe.send([frame])
        assert isinstance(served.result(), ChecksumMismatch)


@pytest.mark.parametrize(
    "body", [b"\xc1", b"\x80", b"\x81\xa4type\xa5other", b"\x92\x01", b"\x91" * 100_000, b"\xc0\xc0"]
)
def test_message_that_its_type_does_not_allow_is_refused(tls_folder: Path, body: bytes) -> None:
    served = Served(lambda channel: channel.receive_message())
    with serving(tls_folder, served) as listener, connected(listener, tls_folder) as channel:
        channel.pipe.send([wire.pack_unit_header(UnitKind.MESSAGE, len(body)) + body])
        assert isinstance(served.result(), ProtocolViolation)


def test_frame_where_a_message_is_due_is_refused(tls_folder: Path) -> None:
    served = Served(lambda channel: channel.receive_message())
    with serving(tls_folder, served) as listener, connected(listener, tls_folder) as channel:
        channel.send_frame(encoded(0, b"data"))
        assert isinstance(served.result(), ProtocolViolation)


def test_message_beyond_the_limit_is_refused_before_it_is_sent(tls_folder: Path) -> None:
    with serving(tls_folder, Served(lambda _: None)) as listener, connected(listener, tls_folder) as channel:
        sent_bytes = channel.wire_bytes_sent
        with pytest.raises(ValueError, match="longer than"):
            channel.send_message(Ask("x" * wire.MESSAGE_BYTES_MAX))
        assert channel.wire_bytes_sent == sent_bytes


def test_silent_peer_is_given_up_after_the_timeout(tls_folder: Path) -> None:
    done = threading.Event()
    with serving(tls_folder, Served(lambda _: wait_for(done))) as listener:
        with connected(listener, tls_folder) as channel, pytest.raises(PeerClosed, match=r"0\.05 seconds"):
            channel.receive_message(timeout_s=0.05)
        done.set()


def send_again_and_again(channel: Channel[Any], buffers: list[Any]) -> None:
    for _ in range(1000):
        channel.send_frame(buffers)


def test_peer_that_takes_nothing_is_given_up_after_the_timeout(tls_folder: Path) -> None:
    done = threading.Event()
    with serving(tls_folder, Served(lambda _: wait_for(done))) as listener:
        with connected(listener, tls_folder, idle_timeout_s=0.2) as channel:
            buffers = encoded(0, np.random.default_rng(0).bytes(4 << 20))
            with pytest.raises(PeerClosed, match=r"0\.2 seconds"):
                send_again_and_again(channel, buffers)
        done.set()


def test_abort_wakes_a_thread_that_receives(tls_folder: Path) -> None:
    done, waiting = threading.Event(), threading.Event()
    caught: list[BaseException] = []

    def receive(channel: Channel[Any]) -> None:
        waiting.set()
        try:
            channel.receive_frame(timeout_s=HOUR_S)
        except PeerClosed as error:
            caught.append(error)

    with serving(tls_folder, Served(lambda _: wait_for(done))) as listener:
        channel = connected(listener, tls_folder)
        thread = threading.Thread(target=receive, args=(channel,))
        thread.start()
        wait_for(waiting)
        channel.abort()
        thread.join(10)
        assert not thread.is_alive()
        channel.close()
        done.set()
    assert "given up on this side" in str(caught[0])


def test_abort_wakes_a_thread_that_sends(tls_folder: Path) -> None:
    done, sending = threading.Event(), threading.Event()
    caught: list[BaseException] = []
    buffers = encoded(0, np.random.default_rng(0).bytes(1 << 18))

    def send(channel: Channel[Any]) -> None:
        try:
            for _ in range(1000):
                channel.send_frame(buffers)
                sending.set()
        except PeerClosed as error:
            caught.append(error)

    with serving(tls_folder, Served(lambda _: wait_for(done))) as listener:
        channel = connected(listener, tls_folder, idle_timeout_s=HOUR_S)
        thread = threading.Thread(target=send, args=(channel,))
        thread.start()
        wait_for(sending)
        channel.abort()
        thread.join(10)
        assert not thread.is_alive()
        channel.close()
        done.set()
    assert "given up on this side" in str(caught[0])


def test_closed_and_aborted_channels_may_be_closed_again(tls_folder: Path) -> None:
    with serving(tls_folder, Served(lambda channel: channel.receive_frame())) as listener:
        channel = connected(listener, tls_folder)
        channel.close()
        channel.close()
        channel.abort()
        assert channel.wire_bytes_sent > 0
        with pytest.raises(PeerClosed):
            channel.send_message(Ask("too late"))
        with pytest.raises(PeerClosed):
            channel.receive_message()


def test_adaptive_policy_hears_of_every_send(tls_folder: Path) -> None:
    class Listening(CodecPolicy):
        heard: list[int] = []  # noqa: RUF012

        def observe_send(self, *, wire_bytes: int, seconds: float, receiver_s: float = 0.0) -> None:
            assert seconds >= 0
            assert receiver_s >= 0
            self.heard.append(wire_bytes)

    policy = Listening("auto")
    served = Served(lambda channel: channel.receive_frame())
    with serving(tls_folder, served) as listener, connected(listener, tls_folder) as channel:
        channel.send_frame(encoded(0, b"data"), policy)
    assert policy.heard == [76]
