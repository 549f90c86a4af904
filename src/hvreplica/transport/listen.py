"""Accept connections: each handshake and each handler in a thread of its own, all of them bounded.

A connection that fails before its handler runs is logged with the reason and forgotten; it never ends the
loop. Connections that have not proven themselves can take at most half of the places and ten seconds each.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hvreplica.address import Address, parse_address
from hvreplica.clock import SYSTEM
from hvreplica.errors import HvReplicaError, Unreachable, kept
from hvreplica.transport.channel import DEFAULT_TIMEOUT_S, Channel
from hvreplica.transport.pipe import TlsPipe
from hvreplica.transport.tls import identify

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    import msgspec

    from hvreplica.clock import Clock

HANDSHAKE_TIMEOUT_S = 10.0
CONNECTIONS_MAX = 64
_BACKLOG = 128
_PAUSE_S = 0.1  # after accept() failed, for example for want of descriptors

log = logging.getLogger("hvreplica.transport")

MessageT = TypeVar("MessageT")


class Listener(Generic[MessageT]):
    """A listening socket. serve_forever() belongs to one thread; stop() may come from any."""

    def __init__(
        self,
        address: Address | str,
        context: ssl.SSLContext,
        handler: Callable[[Channel[MessageT]], object],
        *,
        decoder: msgspec.msgpack.Decoder[MessageT],
        connections_max: int = CONNECTIONS_MAX,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        idle_timeout_s: float = DEFAULT_TIMEOUT_S,
        clock: Clock = SYSTEM,
    ) -> None:
        """Bind and listen; connections wait until serve_forever().

        handler: called in a thread for each connection; the channel is closed when it returns. decoder: of
        what clients send; shared by all threads. Raises: Unreachable if the address cannot be listened on;
        ValueError.
        """
        self._socket = _listening(parse_address(address) if isinstance(address, str) else address)
        self._context = context
        self._handler = handler
        self._decoder = decoder
        self._clock = clock
        self._handshake_timeout_s = handshake_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._places = threading.BoundedSemaphore(connections_max)
        self._unproven_places = threading.BoundedSemaphore(max(connections_max // 2, 1))
        self._lock = threading.Lock()
        self._pipes: set[TlsPipe] = set()
        self._threads: set[threading.Thread] = set()
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._ended.set()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        host, port = self._socket.getsockname()[:2]
        self.address = Address(str(host), int(port))

    def serve_forever(self) -> None:
        """Accept until stop(); returns when every handler has returned. Called once."""
        self._ended.clear()
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._socket, selectors.EVENT_READ)
                selector.register(self._wake_receiver, selectors.EVENT_READ)
                while not self._stopping.is_set():
                    selector.select()
                    if not self._stopping.is_set():
                        self._accept()
        finally:
            self._socket.close()
            with self._lock:
                threads = list(self._threads)
            for thread in threads:
                thread.join()
            self._ended.set()

    def stop(self) -> None:
        """End serve_forever(): no more connections, and the ones that are open are given up."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._wake_sender.send(b"\0")
        with self._lock:
            pipes = list(self._pipes)
        for pipe in pipes:
            pipe.abort()

    def close(self) -> None:
        """Stop, wait until serve_forever() has returned where it runs, and give everything back.

        Not for a handler's thread. May be called twice.
        """
        self.stop()
        self._ended.wait()
        for each in (self._socket, self._wake_receiver, self._wake_sender):
            each.close()

    def _accept(self) -> None:
        try:
            connection, peer = self._socket.accept()
        except BlockingIOError:
            return  # the connection was given up before we came to it
        except OSError as error:
            log.warning("cannot accept a connection: %s", error.strerror or error)
            self._stopping.wait(_PAUSE_S)
            return
        address = Address(str(peer[0]), int(peer[1]))
        if not self._places.acquire(blocking=False):
            log.warning("%s: refused, all places are taken", address)
            connection.close()
            return
        if not self._unproven_places.acquire(blocking=False):
            self._places.release()
            log.warning("%s: refused, too many connections have not proven who they are", address)
            connection.close()
            return
        thread = threading.Thread(
            target=self._run, args=(connection, address), name=f"hvreplica {address}", daemon=True
        )
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads from the system
            self._finished(thread)
            self._unproven_places.release()
            self._places.release()
            connection.close()
            log.warning("%s: refused: %s", address, error)

    def _run(self, connection: socket.socket, address: Address) -> None:
        try:
            channel = self._welcome(connection, address)
            if channel is not None:
                self._handle(channel)
        finally:
            self._places.release()
            self._finished(threading.current_thread())

    def _welcome(self, connection: socket.socket, address: Address) -> Channel[MessageT] | None:
        """Return the channel of a client that proved itself, or None after logging why not."""
        pipe: TlsPipe | None = None
        try:
            connection.settimeout(self._handshake_timeout_s)
            pipe = TlsPipe(connection, self._context, server_name=None)
            with self._lock:
                self._pipes.add(pipe)
            if self._stopping.is_set():
                pipe.abort()
            pipe.handshake(timeout_s=self._handshake_timeout_s, clock=self._clock)
            channel = Channel(
                pipe,
                decoder=self._decoder,
                peer=identify(pipe.peer_certificate()),
                address=address,
                clock=self._clock,
                timeout_s=self._handshake_timeout_s,
            )
            channel.exchange_preamble(first=True)
            channel.set_idle_timeout(self._idle_timeout_s)
        except HvReplicaError as error:
            log.warning("%s: connection refused: %s", address, error.message)
        except OSError as error:
            log.warning("%s: connection lost: %s", address, error.strerror or error)
        else:
            return channel
        finally:
            self._unproven_places.release()
        self._drop(pipe, connection)
        return None

    def _handle(self, channel: Channel[MessageT]) -> None:
        try:
            self._handler(channel)
        except HvReplicaError as error:
            log.warning("%s (%s): %s", channel.address, channel.peer.common_name, error)
            kept(error)
        except Exception as error:
            log.exception(
                "%s (%s): the connection's handler failed", channel.address, channel.peer.common_name
            )
            kept(error)
        finally:
            channel.close()
            self._forget(channel)

    def _forget(self, channel: Channel[Any]) -> None:
        with self._lock:
            self._pipes.discard(channel.pipe)

    def _drop(self, pipe: TlsPipe | None, connection: socket.socket) -> None:
        if pipe is None:
            connection.close()
            return
        pipe.close()
        with self._lock:
            self._pipes.discard(pipe)

    def _finished(self, thread: threading.Thread) -> None:
        with self._lock:
            self._threads.discard(thread)


def _listening(address: Address) -> socket.socket:
    """Return a listening, non-blocking socket. Raises: Unreachable."""
    listening: socket.socket | None = None
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, place = found[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise Unreachable(
            f"cannot listen: {error.strerror or error}",
            path=str(address),
            hint="is another server using this port?",
        ) from None
    return listening
