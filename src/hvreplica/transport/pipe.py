"""Bytes through TLS over one TCP socket, with few system calls.

TLS runs in memory (ssl.SSLObject) and the socket moves large pieces: a TLS record holds 16 KiB at most, and
fewer system calls save more CPU than the added copies cost (docs/design/0004-transport-threads.md).
One thread owns a pipe and calls everything but abort(), which any thread may call to wake it.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
import threading
from typing import TYPE_CHECKING

from hvreplica.errors import AuthenticationFailed, PeerClosed, ProtocolViolation, TransportError
from hvreplica.transport.refusal import describe_tls_error, is_authentication_error
from hvreplica.units import KIB

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Buffer

    from hvreplica.clock import Clock

_SEND_BYTES = 256 * KIB  # encrypted by one call and sent by one; measured in design 0004
_RECEIVE_BYTES = 256 * KIB
_TCP_INFO_BYTES = 256
# Offsets in struct tcp_info of linux/tcp.h, which only grows at its end.
_RTT_AT, _RECEIVER_LIMITED_AT, _RETRANSMITTED_AT = 68, 176, 208
_RTT_SHORT_US = 2_000
_CLOSE_TIMEOUT_S = 5.0  # a peer that does not read cannot hold a closing thread for longer
_UNREAD = (
    "APPLICATION_DATA_AFTER_CLOSE_NOTIFY"  # our end is ready to be sent; something came that nobody read
)
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}  # a dead host shows in 90 s


class TlsPipe:
    """A TLS connection that sends and receives whole buffers."""

    def __init__(
        self, connection: socket.socket, context: ssl.SSLContext, *, server_name: str | None
    ) -> None:
        """Take `connection` over.

        server_name: the name that the certificate must carry; None on the server's side.
        """
        self._socket = connection
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_name is None, server_hostname=server_name
        )
        self._raw = memoryview(bytearray(_RECEIVE_BYTES))
        self._timeout_s: float | None = None
        self._sent_bytes = 0
        self._received_bytes = 0
        self._retransmitted_bytes = 0
        self._lock = threading.Lock()  # guards the descriptor against abort() while it is being closed
        self._is_open = True
        self._aborted = False
        self._broken = False  # after an error nothing sensible can be sent
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def handshake(self, *, timeout_s: float, clock: Clock) -> None:
        """Prove who both sides are, within `timeout_s` altogether.

        With TLS 1.3 a client learns only at its first receive() that its own certificate was refused.
        Raises: AuthenticationFailed, PeerClosed, ProtocolViolation.
        """
        deadline_s = clock.monotonic_s() + timeout_s
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self.set_timeout(max(deadline_s - clock.monotonic_s(), 0.001))
                self._fill()
            except ssl.SSLError as error:
                with contextlib.suppress(OSError, TransportError):
                    self._flush()  # the alert that tells the other side why
                raise self._tls_failure(error) from None
            else:
                self._flush()
                return

    def peer_certificate(self) -> bytes:
        """Return the other side's certificate as DER; it was verified in the handshake."""
        return self._tls.getpeercert(binary_form=True) or b""

    def set_timeout(self, timeout_s: float) -> None:
        """Bound each wait for the other side."""
        if timeout_s != self._timeout_s:
            self._timeout_s = timeout_s
            try:
                self._socket.settimeout(timeout_s)
            except OSError as error:
                raise self._os_failure(error) from None

    def send(self, buffers: Iterable[Buffer]) -> None:
        """Send all of `buffers`. On return the kernel has them. Raises: PeerClosed, AuthenticationFailed."""
        write, outgoing = self._tls.write, self._outgoing
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            for start in range(0, len(view), _SEND_BYTES):
                try:
                    write(view[start : start + _SEND_BYTES])
                except ssl.SSLError as error:
                    raise self._tls_failure(error) from None
                if outgoing.pending >= _SEND_BYTES:
                    self._flush()
        self._flush()

    def receive_into(self, view: memoryview) -> int:
        """Fill `view` and return its length, or less if the other side ended the connection in good order.

        Raises: PeerClosed for any other end and for silence, AuthenticationFailed if it refused our
        certificate.
        """
        done, length = 0, len(view)
        read = self._tls.read
        while done < length:
            try:
                count = read(length - done, view[done:])
            except ssl.SSLWantReadError:
                if self._outgoing.pending:
                    self._flush()  # an answer of TLS itself, to a key update
                self._fill()
                continue
            except ssl.SSLError as error:
                raise self._tls_failure(error) from None
            if not count:
                break
            done += int(count)
        return done

    def finish_sending(self) -> None:
        """End our direction in good order; the other one stays open, but for what came and is not yet read.

        Raises: PeerClosed.
        """
        try:
            with contextlib.suppress(ssl.SSLWantReadError):  # the other side's own end is not waited for
                self._tls.unwrap()
        except ssl.SSLError as error:
            if error.reason != _UNREAD:
                raise self._tls_failure(error) from None
        self._flush()

    @property
    def sent_bytes(self) -> int:
        """TCP payload sent so far: TLS, its handshake, and what the kernel had to send again."""
        self._read_tcp_info()
        return self._sent_bytes + self._retransmitted_bytes

    @property
    def received_bytes(self) -> int:
        """TCP payload received so far."""
        return self._received_bytes

    def receiver_limited_s(self) -> float:
        """Return for how many seconds so far sending stood still because the receiver's window was full.

        0 where the system does not tell, and on paths so long that the window, not the receiver, may be the
        limit.
        """
        info = self._read_tcp_info()
        if len(info) < _RETRANSMITTED_AT or _number(info, _RTT_AT, size_bytes=4) > _RTT_SHORT_US:
            return 0.0
        return _number(info, _RECEIVER_LIMITED_AT, size_bytes=8) / 1e6

    def abort(self) -> None:
        """End the connection now, from any thread; a blocked send() or receive_into() raises PeerClosed."""
        with self._lock:
            self._aborted = True
            if self._is_open:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End in good order as far as the other side lets us. May be called twice."""
        if not self._is_open:
            return
        self._read_tcp_info()
        if not (self._broken or self._aborted):
            with contextlib.suppress(TransportError):
                self.set_timeout(_CLOSE_TIMEOUT_S)
                self.finish_sending()
        with self._lock:
            self._is_open = False
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            self._socket.close()

    def _flush(self) -> None:
        pending = self._outgoing.read()
        if not pending:
            return
        try:
            self._socket.sendall(pending)
        except OSError as error:
            raise self._os_failure(error) from None
        self._sent_bytes += len(pending)

    def _fill(self) -> None:
        try:
            count = self._socket.recv_into(self._raw)
        except OSError as error:
            raise self._os_failure(error) from None
        if count:
            self._received_bytes += count
            self._incoming.write(self._raw[:count])
        else:
            self._incoming.write_eof()

    def _os_failure(self, error: OSError) -> PeerClosed:
        self._broken = True
        if isinstance(error, TimeoutError) and not self._aborted:
            message = f"the other side neither sent nor took anything for {self._timeout_s:g} seconds"
            return PeerClosed(message, hint="check the network and the other side's log, then run it again")
        return self._closed(error.strerror or str(error))

    def _closed(self, reason: str) -> PeerClosed:
        if self._aborted:
            return PeerClosed("the connection was given up on this side")
        return PeerClosed(f"the connection broke: {reason}", hint="run it again; it goes on where it stopped")

    def _tls_failure(self, error: ssl.SSLError) -> TransportError:
        self._broken = True
        if self._aborted or isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
            return self._closed("the other side closed it without a word")
        message, hint = describe_tls_error(error)
        if is_authentication_error(error):
            return AuthenticationFailed(message, hint=hint)
        return ProtocolViolation(message, hint=hint)

    def _read_tcp_info(self) -> bytes:
        if not hasattr(socket, "TCP_INFO"):
            return b""
        with self._lock:
            if not self._is_open:
                return b""
            try:
                info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            except OSError:
                return b""  # only figures are lost
        if len(info) >= _RETRANSMITTED_AT + 8:
            self._retransmitted_bytes = _number(info, _RETRANSMITTED_AT, size_bytes=8)
        return info


def _number(info: bytes, at: int, *, size_bytes: int) -> int:
    return int.from_bytes(info[at : at + size_bytes], sys.byteorder)
