"""Connections within the process in the place of TCP and TLS, so that a server dies with the files of its host.

Install once for a test: the primary's `connect` and the server's `Listener` become these. A handler that meets Killed
takes all connections of its server down with it, as the end of its process does.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Any

from hvreplica.address import Address
from hvreplica.clock import SYSTEM
from hvreplica.errors import HvReplicaError, PeerClosed, Unreachable, kept
from hvreplica.replication import primary, serve, session, work
from hvreplica.transport import Channel
from hvreplica.transport.tls import PeerIdentity
from tests.support.faultfile import Killed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import pytest

PEER = PeerIdentity(fingerprint_sha256="00" * 32, common_name="primary", not_after=2e9)
TIMEOUT_S = 30.0


class PlainPipe:
    """What a Channel needs of a TlsPipe, over one end of a socket pair."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self.sent_bytes = self.received_bytes = 0
        connection.settimeout(TIMEOUT_S)

    def set_timeout(self, timeout_s: float) -> None:
        """Keep to our own: a test that hangs is to fail soon."""

    def send(self, buffers: Iterable[Any]) -> None:
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            try:
                self._socket.sendall(view)
            except OSError as error:
                raise PeerClosed(f"the connection broke: {error}") from None
            self.sent_bytes += len(view)

    def receive_into(self, view: memoryview) -> int:
        done = 0
        while done < len(view):
            try:
                count = self._socket.recv_into(view[done:])
            except OSError as error:
                raise PeerClosed(f"the connection broke: {error}") from None
            if not count:
                break
            done += count
        self.received_bytes += done
        return done

    def finish_sending(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def receiver_limited_s(self) -> float:
        return 0.0

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.finish_sending()
        self._socket.close()


class NearListener:
    """Stands in for Listener; serve_forever() has nothing to do."""

    def __init__(
        self, network: NearNetwork, address: str, handler: Callable[[Any], object], decoder: Any
    ) -> None:
        self.address = Address(*address.rsplit(":", 1))  # type: ignore[arg-type] # a name is good enough here
        self._network, self._handler, self._decoder = network, handler, decoder
        self._lock = threading.Lock()
        self._open: set[Channel[Any]] = set()
        self._threads: list[threading.Thread] = []
        self._stopped = False

    def take(self, connection: socket.socket) -> None:
        """Handle a connection in a thread."""
        channel: Channel[Any] = Channel(
            PlainPipe(connection),  # type: ignore[arg-type] # it has what is needed
            decoder=self._decoder,
            peer=PEER,
            address=self.address,
            clock=SYSTEM,
        )
        with self._lock:
            self._open.add(channel)
        thread = threading.Thread(target=self._run, args=(channel,), name=f"near {self.address.host}")
        self._threads.append(thread)
        thread.start()

    def _run(self, channel: Channel[Any]) -> None:
        try:
            self._handler(channel)
        except Killed:
            self.stop()
        except (HvReplicaError, OSError) as error:
            kept(error)
        finally:
            channel.close()
            with self._lock:
                self._open.discard(channel)

    def serve_forever(self) -> None:
        """Return: each connection has its thread already."""

    def stop(self) -> None:
        """Cut all connections."""
        self._stopped = True
        self._network.listeners.pop(str(self.address), None)
        with self._lock:
            channels = list(self._open)
        for channel in channels:
            channel.abort()

    def close(self) -> None:
        """Stop, and wait for the handlers."""
        self.stop()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive(), "a handler does not end"


class NearNetwork:
    """Which listeners there are, by address."""

    def __init__(self) -> None:
        self.listeners: dict[str, NearListener] = {}

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Take the place of the network; patch: puts all of it back."""
        patch.setattr(session, "connect", self._connect)
        patch.setattr(serve, "Listener", self._listen)
        # A server that dies with its host's files leaves its threads to the process of the tests, and one that
        # works by the clock would move the steps that are counted.
        patch.setattr(serve.Presser, "start", lambda _presser: None)
        patch.setattr(serve, "server_context", lambda _folder: None)
        patch.setattr(serve.Server, "_authorise", lambda *_: None)
        patch.setattr(serve.TrustList, "load", lambda *_: None)
        patch.setattr(work, "client_context", lambda _folder: None)
        patch.setattr(primary, "RETRY_AFTER_S", ())  # a server that was killed stays dead

    def _listen(
        self, address: str, _context: object, handler: Any, *, decoder: Any, **_: object
    ) -> NearListener:
        self.listeners[address] = NearListener(self, address, handler, decoder)
        return self.listeners[address]

    def _connect(self, address: str, _context: object, *, decoder: Any, **_: object) -> Channel[Any]:
        listener = self.listeners.get(address)
        if listener is None:
            raise Unreachable("no connection: nobody listens", path=address)
        ours, theirs = socket.socketpair()
        listener.take(theirs)
        host, port = address.rsplit(":", 1)
        return Channel(
            PlainPipe(ours),  # type: ignore[arg-type] # it has what is needed
            decoder=decoder,
            peer=PEER,
            address=Address(host, int(port)),
            clock=SYSTEM,
        )
