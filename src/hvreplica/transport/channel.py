"""One connection: messages and frames in order, each length checked before it is used.

What a receiver gets is a prefix of what was sent, every frame verified, or an error. One thread owns a
channel; abort() may come from any other and wakes it. Silence is bounded by timeout_s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from hvreplica.errors import HvReplicaError, PeerClosed, ProtocolViolation
from hvreplica.formats import wire
from hvreplica.formats.wire import UnitKind
from hvreplica.transport.frame import Frame, FrameDecoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from hvreplica.address import Address
    from hvreplica.clock import Clock
    from hvreplica.transport.codec import CodecPolicy
    from hvreplica.transport.pipe import TlsPipe
    from hvreplica.transport.tls import PeerIdentity

DEFAULT_TIMEOUT_S = 60.0

MessageT = TypeVar("MessageT")


class Channel(Generic[MessageT]):
    """A connection whose two ends know each other.

    MessageT: what the other side sends, by the decoder's type.
    """

    def __init__(
        self,
        pipe: TlsPipe,
        *,
        decoder: msgspec.msgpack.Decoder[MessageT],
        peer: PeerIdentity,
        address: Address,
        clock: Clock,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """pipe: after its handshake.

        address: of the other side. timeout_s: the longest silence in seconds.
        """
        self.peer = peer
        self.address = address
        self.pipe = pipe
        self._clock = clock
        self._timeout_s = timeout_s
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()
        self._frames = FrameDecoder()
        self._front = memoryview(bytearray(wire.UNIT.size + wire.FRAME.size))
        self._receiver_limited_s = 0.0
        pipe.set_timeout(timeout_s)

    @property
    def wire_bytes_sent(self) -> int:
        """TCP payload of this connection so far: TLS, its handshake and retransmissions included."""
        return self.pipe.sent_bytes

    @property
    def wire_bytes_received(self) -> int:
        """TCP payload received so far."""
        return self.pipe.received_bytes

    def exchange_preamble(self, *, first: bool) -> int:
        """Agree on a version of the protocol and return it; the server speaks first.

        A client that is refused sends nothing after its certificate, so that the reason reaches it: bytes
        that nobody reads would make the server's kernel reset the connection and drop the alert. Raises:
        FormatError, PeerClosed, AuthenticationFailed.
        """
        if first:
            self.pipe.send([wire.pack_preamble()])
        view = memoryview(bytearray(wire.PREAMBLE.size))
        self._receive(view, "before it said which protocol it speaks")
        with _At(self.address):
            version = wire.choose_version(view)
        if not first:
            self.pipe.send([wire.pack_preamble()])
        return version

    def set_idle_timeout(self, timeout_s: float) -> None:
        """Set the longest silence for every call that does not name its own."""
        self._timeout_s = timeout_s
        self.pipe.set_timeout(timeout_s)

    def send_message(self, message: msgspec.Struct) -> None:
        """Send one message. Raises: PeerClosed; ValueError for a message beyond MESSAGE_BYTES_MAX."""
        body = self._encoder.encode(message)
        if len(body) > wire.MESSAGE_BYTES_MAX:
            error = f"a message of {len(body)} bytes is longer than {wire.MESSAGE_BYTES_MAX}"
            raise ValueError(error)
        with _At(self.address):
            self.pipe.send([wire.pack_unit_header(UnitKind.MESSAGE, len(body)) + body])

    def receive_message(self, timeout_s: float | None = None) -> MessageT:
        """Return the next unit, which must be a message. timeout_s: the longest silence, None the channel's
        own.

        Raises: PeerClosed for any end and for silence; ProtocolViolation for a frame or for a message that
        its type does not allow; FormatError.
        """
        body_bytes = self._receive_unit(UnitKind.MESSAGE, timeout_s)
        if body_bytes is None:
            raise PeerClosed("the other side closed the connection", path=str(self.address))
        body = memoryview(bytearray(body_bytes))
        self._receive(body, "inside a message")
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolViolation(
                f"a message is not what the protocol allows: {error}",
                path=str(self.address),
                hint="the two sides may be of different versions",
            ) from None

    def send_frame(self, buffers: Sequence[Buffer], policy: CodecPolicy | None = None) -> None:
        """Send the buffers of one frame, as FrameEncoder made them, and tell `policy` how long it took.

        Raises: PeerClosed.
        """
        with _At(self.address):
            if policy is None or not policy.adaptive:
                self.pipe.send(buffers)
                return
            start_s = self._clock.monotonic_s()
            self.pipe.send(buffers)
            seconds = self._clock.monotonic_s() - start_s
            limited_s = self.pipe.receiver_limited_s()
            policy.observe_send(
                wire_bytes=sum(memoryview(buffer).nbytes for buffer in buffers),
                seconds=seconds,
                receiver_s=max(limited_s - self._receiver_limited_s, 0.0),
            )
            self._receiver_limited_s = limited_s

    def receive_frame(self, timeout_s: float | None = None) -> Frame | None:
        """Return the next frame, verified, or None if the other side closed in good order after the last one.

        The frame's data lives until the next call. Raises: PeerClosed, ProtocolViolation for a message;
        FormatError for a frame that breaks the format, ChecksumMismatch for one that was damaged. The channel
        is of no use then.
        """
        body_bytes = self._receive_unit(UnitKind.FRAME, timeout_s)
        if body_bytes is None:
            return None
        header = self._front[wire.UNIT.size :]
        self._receive(header, "inside a frame")
        with _At(self.address):
            table, payload = self._frames.begin(header, body_bytes)
            self._receive(table, "inside a frame")
            self._receive(payload, "inside a frame")
            return self._frames.finish()

    def finish_sending(self) -> None:
        """Tell the other side that no frame follows; it gets None after the last one and may still answer.

        Raises: PeerClosed.
        """
        with _At(self.address):
            self.pipe.finish_sending()

    def close(self) -> None:
        """Close in good order: the other side gets everything that was sent, then an end.

        May be called twice.
        """
        self.pipe.close()

    def abort(self) -> None:
        """Give the connection up, from any thread; a blocked call in the owner raises PeerClosed.

        close() still follows.
        """
        self.pipe.abort()

    def __enter__(self) -> Channel[MessageT]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _receive_unit(self, expected: UnitKind, timeout_s: float | None) -> int | None:
        """Return the length of the next body, or None at an orderly end between two units."""
        self.pipe.set_timeout(self._timeout_s if timeout_s is None else timeout_s)
        unit = self._front[: wire.UNIT.size]
        with _At(self.address):
            count = self.pipe.receive_into(unit)
            if count == 0:
                return None
            if count < len(unit):
                raise PeerClosed("the other side closed the connection inside a header")
            kind, body_bytes = wire.unpack_unit_header(unit)
            if kind != expected:
                raise ProtocolViolation(
                    f"a {kind.name.lower()} came where a {expected.name.lower()} was due", field="kind"
                )
        return body_bytes

    def _receive(self, view: memoryview, where: str) -> None:
        with _At(self.address):
            if self.pipe.receive_into(view) < len(view):
                raise PeerClosed(f"the other side closed the connection {where}")


class _At:
    """Name the other side in every error that passes."""

    __slots__ = ("_address",)

    def __init__(self, address: Address) -> None:
        self._address = address

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, HvReplicaError):
            error.at(str(self._address))
