"""Accept NBD clients on a Unix socket or a TCP port: one thread each, all of them bounded.

A client that fails is logged with the reason and forgotten; it never ends the loop. Clients that have chosen
no export yet have half of the places and ten seconds each, and where they are too many the oldest of them
goes: those that hold connections open without a word keep nobody out.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hvreplica.address import Address
from hvreplica.capture.handshake import TIME_LIMIT_S, Negotiated, negotiate
from hvreplica.capture.listening import listen_on, peer_pid
from hvreplica.clock import SYSTEM
from hvreplica.errors import HvReplicaError, kept
from hvreplica.files import OS_FILES, socket_identity

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from hvreplica.capture.export import ExportInfo
    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem

CONNECTIONS_MAX = 64
CLOSE_GRACE_S = 5.0
_PAUSE_S = 0.1  # after accept() failed, for example for want of descriptors
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}  # a dead host shows in 90 s

_COMPLAINTS = 5  # in so many seconds; a program that knocks at random could fill the log
_COMPLAINTS_S = 10.0

log = logging.getLogger("hvreplica.capture")


class _Complaints:
    """Logs what is wrong with clients, the first few of a while one by one and the rest as a number."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._since_s = float("-inf")
        self._count = 0

    def say(self, words: str, *arguments: object) -> None:
        """Log a warning, or count it."""
        with self._lock:
            now_s = self._clock.monotonic_s()
            if now_s - self._since_s >= _COMPLAINTS_S:
                self._tell_count()
                self._since_s, self._count = now_s, 0
            self._count += 1
            is_told = self._count <= _COMPLAINTS
        if is_told:
            log.warning(words, *arguments)

    def end(self) -> None:
        """Log the number of those that were not told."""
        with self._lock:
            self._tell_count()
            self._count = 0

    def _tell_count(self) -> None:
        if self._count > _COMPLAINTS:
            log.warning("%d further clients were refused or failed as well", self._count - _COMPLAINTS)


@dataclass(eq=False, slots=True)
class _Client:
    """One connection. line: a descriptor of its own for it, by which any thread can end it."""

    name: str
    connection: socket.socket
    line: socket.socket
    has_chosen: bool = False
    thread: threading.Thread = field(init=False)

    def end(self, how: int) -> None:
        with contextlib.suppress(OSError):
            self.line.shutdown(how)


class NbdListener:
    """A listening socket and its clients. One thread owns it; a handler must not close it."""

    def __init__(
        self,
        address: Path | Address,
        exports: Callable[[], Sequence[ExportInfo]],
        handler: Callable[[Negotiated], object],
        *,
        tls_context: ssl.SSLContext | None = None,
        connections_max: int = CONNECTIONS_MAX,
        negotiation_limit_s: float = TIME_LIMIT_S,
        files: FileSystem = OS_FILES,
        clock: Clock = SYSTEM,
    ) -> None:
        """Bind and listen; clients wait until start().

        address: of a Unix socket, which gets the mode 0600, or of a TCP port. exports: asked once for each
        client, in its thread. handler: called in that thread; the client's socket is closed when it returns.
        tls_context: of a server; with it, no client is served without TLS.
        Raises: Unreachable, Locked if a living process listens there.
        """
        self._socket = listen_on(address, files)
        self._identity = socket_identity(address) if isinstance(address, Path) else None
        self._exports = exports
        self._handler = handler
        self._tls_context = tls_context
        self._negotiation_limit_s = negotiation_limit_s
        self._files = files
        self._clock = clock
        self._places = threading.BoundedSemaphore(connections_max)
        self._undecided_max = max(connections_max // 2, 1)
        self._complaints = _Complaints(clock)
        self._lock = threading.Lock()
        self._clients: dict[_Client, None] = {}  # oldest first
        self._stopping = threading.Event()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._thread = threading.Thread(target=self._accept_all, name="hvreplica NBD", daemon=True)
        if isinstance(address, Path):
            self.address: Path | Address = address
        else:
            host, port = self._socket.getsockname()[:2]
            self.address = Address(str(host), int(port))

    def start(self) -> None:
        """Accept clients, in a thread of its own. Called once."""
        self._thread.start()

    def close(self, *, grace_s: float = CLOSE_GRACE_S) -> None:
        """Accept nobody more, let requests that have arrived be answered, and wait for all handlers.

        grace_s: for the answers; connections are cut after it. May be called twice.
        """
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._wake_sender.send(b"\0")
        if self._thread.ident is not None:
            self._thread.join()
        if isinstance(self.address, Path) and socket_identity(self.address) == self._identity:
            self._files.unlink(self.address)  # ours still, and not the one of a process that came after
        for each in (self._socket, self._wake_receiver, self._wake_sender):
            each.close()
        deadline_s = self._clock.monotonic_s() + grace_s
        for client in self._end_all(socket.SHUT_RD):
            client.thread.join(max(deadline_s - self._clock.monotonic_s(), 0))
        for client in self._end_all(socket.SHUT_RDWR):
            client.thread.join()
        self._complaints.end()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _end_all(self, how: int) -> list[_Client]:
        with self._lock:
            for client in self._clients:
                client.end(how)
            return list(self._clients)

    def _accept_all(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._wake_receiver, selectors.EVENT_READ)
            while True:
                selector.select()
                if self._stopping.is_set():
                    return
                self._accept()

    def _accept(self) -> None:
        try:
            connection, peer = self._socket.accept()
        except BlockingIOError:
            return  # the connection was given up before we came to it
        except OSError as error:
            log.warning("cannot accept a client: %s", error.strerror or error)
            self._stopping.wait(_PAUSE_S)
            return
        name = _name(connection, peer)
        if not self._places.acquire(blocking=False):
            self._complaints.say("%s: refused, all places are taken", name)
            connection.close()
            return
        try:
            client = _Client(name, _tuned(connection), connection.dup())
        except OSError as error:
            self._refuse(connection, name, error.strerror or str(error))
            return
        client.thread = threading.Thread(
            target=self._run, args=(client,), name=f"hvreplica NBD {name}", daemon=True
        )
        with self._lock:
            self._clients[client] = None
            undecided = [each for each in self._clients if not each.has_chosen]
            given_up = undecided[: -self._undecided_max]
            for each in given_up:  # all but the last were ended before, and are on their way out
                each.end(socket.SHUT_RDWR)
        if given_up:
            self._complaints.say("%s: given up, it has chosen no export and others wait", given_up[-1].name)
        try:
            client.thread.start()
        except RuntimeError as error:  # no more threads from the system
            self._forget(client)
            self._refuse(connection, name, str(error))

    def _refuse(self, connection: socket.socket, name: str, reason: str) -> None:
        self._places.release()
        connection.close()
        self._complaints.say("%s: refused: %s", name, reason)

    def _run(self, client: _Client) -> None:
        try:
            negotiated = self._negotiate(client)
            if negotiated is not None:
                self._handle(client, negotiated)
        finally:
            self._forget(client)
            self._places.release()

    def _negotiate(self, client: _Client) -> Negotiated | None:
        def choose() -> None:
            with self._lock:  # from here on it is not given up for others
                client.has_chosen = True

        try:
            return negotiate(
                client.connection,
                self._exports(),
                tls_context=self._tls_context,
                require_tls=self._tls_context is not None,
                time_limit_s=self._negotiation_limit_s,
                on_choice=choose,
                clock=self._clock,
            )
        except HvReplicaError as error:
            self._complaints.say("%s: %s", client.name, error)
            kept(error)
        except Exception as error:
            log.exception("%s: the negotiation failed", client.name)
            client.connection.close()
            kept(error)
        return None

    def _handle(self, client: _Client, negotiated: Negotiated) -> None:
        try:
            self._handler(negotiated)
        except HvReplicaError as error:
            log.warning("%s, export %s: %s", client.name, negotiated.export.name, error)
            kept(error)
        except Exception as error:
            log.exception("%s, export %s: the handler failed", client.name, negotiated.export.name)
            kept(error)
        finally:
            negotiated.close()

    def _forget(self, client: _Client) -> None:
        with self._lock:  # nobody may end a descriptor that is another's by now
            del self._clients[client]
            client.line.close()


def _tuned(connection: socket.socket) -> socket.socket:
    """Make replies leave at once, and dead hosts show."""
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _name(connection: socket.socket, peer: tuple[object, ...] | str | bytes) -> str:
    """Return how to call a client in the log."""
    if connection.family != socket.AF_UNIX:
        return str(Address(str(peer[0]), int(str(peer[1]))))
    pid = peer_pid(connection)
    return "a process" if pid is None else f"process {pid}"
