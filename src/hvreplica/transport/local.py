r"""Ask the process that owns a folder, over a Unix socket in it: one question and one answer a connection.

    caller   {"verb": "cut", "arguments": {…}}\n
    owner    {"progress": …}\n            any number
             {"result": …}\n  or  {"error": {"kind", "message", "path", "hint", …}}\n

The socket has the mode 0600, so callers are the owner's user or root; still their lines are bounded in bytes
and time, and one that goes away or does not read disturbs nobody. A path may be longer than a socket's
address: it is reached through its folder's descriptor.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Self

import msgspec
from msgspec import Meta

from hvreplica.clock import SYSTEM
from hvreplica.errors import HvReplicaError, Locked, PeerClosed, ProtocolViolation, kept
from hvreplica.files import OS_FILES, short_name
from hvreplica.transport.failure import Failure, pack_failure, unpack_failure

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem

LINE_BYTES_MAX = 1 << 20
CALLERS_MAX = 32
_QUESTION_S = 10.0  # from the connection to the end of the question
_ANSWER_S = 10.0  # for a caller to take one line
_BACKLOG = 64
_PAUSE_S = 0.1  # after accept() failed, for example for want of descriptors
_MODE = 0o600

log = logging.getLogger("hvreplica.control")

Tell = Callable[[object], None]
Handler = Callable[[str, dict[str, Any], Tell], object]


class _Question(msgspec.Struct, forbid_unknown_fields=True):
    verb: Annotated[str, Meta(min_length=1, max_length=64)]
    arguments: dict[str, Any] = {}


class _Answer(msgspec.Struct, omit_defaults=True):
    """One line of an answer; exactly one of its fields is there."""

    progress: Any = msgspec.UNSET
    result: Any = msgspec.UNSET
    error: Failure | msgspec.UnsetType = msgspec.UNSET


class LocalServer:
    """Answers callers at a path, each in a thread of its own. One owner; a handler must not close it."""

    def __init__(
        self, path: Path, handler: Handler, *, files: FileSystem = OS_FILES, clock: Clock = SYSTEM
    ) -> None:
        """Bind and listen; callers wait until start(). The caller holds the lock of the socket's folder.

        handler: called with verb, arguments and a function that tells progress; returns the result. What a
        dead process left at `path` is replaced. Raises: OSError.
        """
        self._path = path
        self._handler = handler
        self._files = files
        self._clock = clock
        self._lock = threading.Lock()
        self._callers: dict[threading.Thread, socket.socket] = {}
        self._stopping = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(self._socket.fileno(), _MODE)  # bind() gives it to the name, which never has another
            files.unlink(path)
            with short_name(path) as name:
                self._socket.bind(name)
            self._socket.listen(_BACKLOG)
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._thread = threading.Thread(target=self._accept_all, name="hvreplica control", daemon=True)

    def start(self) -> None:
        """Answer from now on. Called once."""
        self._thread.start()

    def close(self) -> None:
        """Take no more callers, cut those that are there, and wait for their verbs to return.

        May be called twice.
        """
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._wake_sender.send(b"\0")
        if self._thread.ident is not None:
            self._thread.join()
        self._files.unlink(self._path)
        for each in (self._socket, self._wake_receiver, self._wake_sender):
            each.close()
        with self._lock:
            callers = dict(self._callers)
            for connection in callers.values():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)
        for thread in callers:
            thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _accept_all(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._wake_receiver, selectors.EVENT_READ)
            while not self._stopping.is_set():
                selector.select()
                if not self._stopping.is_set():
                    self._accept()

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("cannot accept a caller: %s", error.strerror or error)
            self._stopping.wait(_PAUSE_S)
            return
        thread = threading.Thread(target=self._run, args=(connection,), name="hvreplica caller", daemon=True)
        with self._lock:
            is_full = len(self._callers) >= CALLERS_MAX
            if not is_full:
                self._callers[thread] = connection
        if is_full:
            connection.settimeout(0)
            busy = Locked("too many callers are being answered", path=self._path, hint="ask again later")
            _send(connection, _Answer(error=pack_failure(busy)))
            connection.close()
            return
        try:
            thread.start()
        except RuntimeError as error:  # no more threads from the system
            log.warning("a caller is refused: %s", error)
            self._forget(thread, connection)

    def _run(self, connection: socket.socket) -> None:
        try:
            answer = self._answer(connection)
            if answer is not None:
                connection.settimeout(_ANSWER_S)
                _send(connection, answer)
        finally:
            self._forget(threading.current_thread(), connection)

    def _answer(self, connection: socket.socket) -> _Answer | None:
        """Return the last line for a caller, None for one that went away before its question."""
        is_there = True

        def tell(progress: object) -> None:
            nonlocal is_there
            if is_there:
                connection.settimeout(_ANSWER_S)
                is_there = _send(connection, _Answer(progress=progress))

        try:
            deadline_s = self._clock.monotonic_s() + _QUESTION_S
            line = _Lines(connection).next(lambda: deadline_s - self._clock.monotonic_s())
            if line is None:
                return None
            question = _decoded(line, _Question)
            return _Answer(result=self._handler(question.verb, question.arguments, tell))
        except (HvReplicaError, OSError, ValueError) as error:
            log.info("a caller is told: %s", error)
            return _Answer(error=pack_failure(kept(error)))
        except Exception as error:
            log.exception("a caller cannot be answered")
            return _Answer(error=pack_failure(kept(error)))

    def _forget(self, thread: threading.Thread, connection: socket.socket) -> None:
        with self._lock:  # nobody may shut down a descriptor that is another's by now
            del self._callers[thread]
            connection.close()


class Owner:
    """A connection to the process that owns a folder, good for one question. find() it."""

    def __init__(self, path: Path, connection: socket.socket) -> None:
        self._path = path
        self._connection = connection

    @classmethod
    def find(cls, path: Path) -> Owner | None:
        """Return the owner that listens at `path`, None where nobody does. Raises: OSError."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with short_name(path) as name:
                connection.connect(name)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            connection.close()
            return None
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError):
                error.filename = os.fspath(path)
            raise
        return cls(path, connection)

    def ask(
        self,
        verb: str,
        arguments: dict[str, Any] | None = None,
        *,
        on_progress: Callable[[Any], None] | None = None,
    ) -> Any:
        """Return the answer to `verb`, waiting as long as the owner lives; ends the connection.

        Raises: PeerClosed where the owner ends before it answers; what the owner raised, as the same class.
        """
        with contextlib.closing(self._connection):
            question = msgspec.json.encode(_Question(verb, arguments or {}), enc_hook=_named) + b"\n"
            if len(question) > LINE_BYTES_MAX:
                message = f"a question has at most {LINE_BYTES_MAX} bytes"
                raise ValueError(message)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._connection.sendall(question)  # the answer of an owner that did not read it says why
            lines = _Lines(self._connection)
            while (line := lines.next(lambda: None)) is not None:
                answer = _decoded(line, _Answer)
                if answer.error is not msgspec.UNSET:
                    raise unpack_failure(answer.error)
                if answer.result is not msgspec.UNSET:
                    return answer.result
                if on_progress is not None and answer.progress is not msgspec.UNSET:
                    on_progress(answer.progress)
        raise PeerClosed(
            "the process ended before it answered", path=self._path, hint="what it had done stands"
        )


class _Lines:
    """Takes lines from a socket. next(): None at an end between lines."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._held = bytearray()

    def next(self, left_s: Callable[[], float | None]) -> bytes | None:
        """Return the next line without its end. left_s: the time that is left, None for any."""
        searched = 0
        while (end := self._held.find(b"\n", searched)) < 0:
            searched = len(self._held)
            if searched >= LINE_BYTES_MAX:
                raise ProtocolViolation("a line is too long", expected=f"at most {LINE_BYTES_MAX} bytes")
            seconds = left_s()
            if seconds is not None and seconds <= 0:
                raise ProtocolViolation("no whole line came in time", expected="a line of JSON")
            self._connection.settimeout(seconds)
            try:
                piece = self._connection.recv(64 << 10)
            except TimeoutError:
                continue
            except ConnectionResetError:
                piece = b""
            if not piece:
                if self._held:
                    raise ProtocolViolation("the line breaks off", expected="a line of JSON")
                return None
            self._held += piece
        line = bytes(self._held[:end])
        del self._held[: end + 1]
        return line


def _send(connection: socket.socket, answer: _Answer) -> bool:
    """Send one line; return False where the caller does not take it."""
    try:
        line = msgspec.json.encode(answer, enc_hook=_named) + b"\n"
    except Exception as error:
        log.exception("an answer has no JSON form")
        line = msgspec.json.encode(_Answer(error=pack_failure(kept(error)))) + b"\n"
    if len(line) > LINE_BYTES_MAX:
        failure = ProtocolViolation("the answer is too long", expected=f"at most {LINE_BYTES_MAX} bytes")
        line = msgspec.json.encode(_Answer(error=pack_failure(failure))) + b"\n"
    try:
        connection.sendall(line)
    except OSError as error:
        log.info("a caller does not take its answer: %s", error.strerror or error)
        return False
    return True


def _decoded(line: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolViolation(f"not a line that belongs here: {error}") from None


def _named(value: object) -> str:
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    message = f"no JSON form for {type(value).__name__}"
    raise NotImplementedError(message)
