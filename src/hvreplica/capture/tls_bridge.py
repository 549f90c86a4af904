"""TLS outside, plain bytes inside: pump between a client's connection and one end of a socket pair.

C serves plain sockets only, so a connection that went over to TLS continues on the inner socket. TLS runs in
memory (ssl.SSLObject): one thread receives and decrypts, another encrypts and sends, and the lock is held
only while TLS turns one buffer into another. Memory is a few buffers, however slow either side is: nobody
reads ahead of what the other side takes. The end of one direction is carried over as the end of that
direction; a broken connection ends both.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
from typing import TYPE_CHECKING

from hvreplica.errors import AuthenticationFailed, PeerClosed, ProtocolViolation
from hvreplica.units import KIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from hvreplica.clock import Clock

_BUFFER_BYTES = 256 * KIB
LAST_WORDS_S = 5.0

log = logging.getLogger("hvreplica.capture")


class TlsBridge:
    """One connection under TLS, from the server's side. One thread owns it; two more run inside."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        """Take `connection` over; nothing is sent before handshake()."""
        self._connection = connection
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._tls_lock = threading.Lock()  # TLS and its two buffers know nothing of threads
        self._send_lock = threading.Lock()  # records leave in the order in which TLS made them
        self._outer: socket.socket | None = None
        self._threads: list[threading.Thread] = []

    def handshake(self, *, deadline_s: float, clock: Clock) -> None:
        """Go over to TLS, until clock.monotonic_s() is `deadline_s` at the latest.

        Raises: AuthenticationFailed, ProtocolViolation, PeerClosed.
        """
        raw = bytearray(_BUFFER_BYTES)
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._exchange(raw, deadline_s - clock.monotonic_s())
            except ssl.SSLError as error:
                with contextlib.suppress(OSError):
                    self._flush()  # the alert that tells the client why
                raise _failure(error) from None
            else:
                break
        try:
            self._connection.settimeout(max(deadline_s - clock.monotonic_s(), 0.001))
            self._flush()
            self._connection.settimeout(None)
        except OSError as error:
            raise PeerClosed(f"the connection broke in TLS: {error.strerror or error}") from None

    def start(self) -> socket.socket:
        """Return the inner socket, which the caller closes; after it, close() ends the rest."""
        self._outer, inner = socket.socketpair()
        for name, pump in (("receives", self._receive), ("sends", self._send)):
            thread = threading.Thread(
                target=self._guard, args=(pump, self._outer), name=f"hvreplica TLS {name}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        return inner

    def close(self, *, last_words_s: float = LAST_WORDS_S) -> None:
        """Send what was written to the inner socket, which is closed by now, and end the connection.

        last_words_s: how long a client that does not read can hold it up.
        """
        if self._threads:
            self._threads[-1].join(last_words_s)
        self._break()
        for thread in self._threads:
            thread.join()
        self._connection.close()
        if self._outer is not None:
            self._outer.close()

    def _exchange(self, raw: bytearray, left_s: float) -> None:
        """Send what the handshake has to say, and wait for the client's next words."""
        try:
            if left_s <= 0:
                raise TimeoutError
            self._connection.settimeout(left_s)
            self._flush()
            count = self._connection.recv_into(raw)
        except TimeoutError:
            raise PeerClosed("the client did not finish the handshake of TLS in time") from None
        except OSError as error:
            raise PeerClosed(f"the connection broke in TLS: {error.strerror or error}") from None
        if count:
            self._incoming.write(memoryview(raw)[:count])
        else:
            self._incoming.write_eof()

    def _guard(self, pump: Callable[[socket.socket], None], outer: socket.socket) -> None:
        try:
            pump(outer)
        except OSError as error:  # of a socket or of TLS
            log.debug("a connection under TLS broke: %s", error)
            self._break()

    def _receive(self, outer: socket.socket) -> None:
        raw, plain = bytearray(_BUFFER_BYTES), memoryview(bytearray(_BUFFER_BYTES))
        while True:
            # Decrypt first: the client's first words may have come together with the end of its handshake.
            count = self._decrypt(plain)
            if count is None:
                received = self._connection.recv_into(raw)
                # A bare end of the connection is one too: requests carry their lengths, so none can be cut
                # short unseen. TLS is not told, or it would send nothing more, and replies are still due.
                count = None if received else 0
                with self._tls_lock:
                    self._incoming.write(memoryview(raw)[:received])
            if count == 0:
                with contextlib.suppress(OSError):
                    outer.shutdown(socket.SHUT_WR)
                return
            if count:
                try:
                    outer.sendall(plain[:count])
                except OSError:
                    return  # nobody reads the inner socket any more; what it still has to say may go out

    def _decrypt(self, plain: memoryview) -> int | None:
        """Return how many bytes came out into `plain`; 0 where the client ended, None if more must come."""
        count: int | None = None
        with self._tls_lock:
            with contextlib.suppress(ssl.SSLWantReadError):
                count = int(self._tls.read(len(plain), plain))
            has_words = self._outgoing.pending > 0  # an answer of TLS itself, to a key update
        if has_words:
            self._flush()
        return count

    def _send(self, outer: socket.socket) -> None:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        while True:
            try:
                count = outer.recv_into(buffer)
            except ConnectionResetError:  # the inner socket was closed with requests unread
                count = 0
            if not count:
                break
            with self._tls_lock:
                self._tls.write(buffer[:count])
            self._flush()
        with self._tls_lock, contextlib.suppress(ssl.SSLError):  # the client's own end is not waited for
            self._tls.unwrap()
        self._flush()
        self._connection.shutdown(socket.SHUT_WR)

    def _flush(self) -> None:
        with self._send_lock:
            with self._tls_lock:
                pending = self._outgoing.read()
            if pending:
                self._connection.sendall(pending)

    def _break(self) -> None:
        for each in (self._connection, self._outer):
            if each is not None:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)


def _failure(error: ssl.SSLError) -> AuthenticationFailed | PeerClosed | ProtocolViolation:
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return PeerClosed("the client ended the connection in the handshake of TLS")
    if isinstance(error, ssl.SSLCertVerificationError):
        return AuthenticationFailed(f"the client's certificate was refused: {error.verify_message}")
    words = (error.reason or str(error)).replace("_", " ").lower()
    return ProtocolViolation(f"TLS failed: {words}", hint="has the client a certificate of the same CA?")
