"""Hold a guest's file systems still through the QEMU guest agent, and let them go again whatever happens.

The agent is a program in the guest, behind a Unix socket of its hypervisor, so nothing that it says is
believed unchecked: answers are bounded in bytes and in time, and guest-sync-delimited skips those that
belong to the questions of others.

A frozen guest that nobody thaws stands still for ever: an agent on Linux has no time limit of its own,
Windows gives up after ten seconds. So a thread of its own thaws: when the with-block ends, or when the guest
has been frozen for too long. Signals raise in the main thread and cannot interrupt it, and the process does
not end before it has. Only SIGKILL leaves a guest frozen; the next frozen() says so and how to thaw it.

    owner    sync -> status -> freeze -> [ with-block: the cut ] -> end ....... -> raise, if not one instant
    thawer   ............................ waits for end or limit .... thaw, again on new connections
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import TYPE_CHECKING, TypeVar

import msgspec

from hvreplica.clock import SYSTEM
from hvreplica.errors import FreezeFailed, HvReplicaError, PeerClosed, ProtocolViolation, Unreachable, kept

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from hvreplica.clock import Clock

DEFAULT_TIMEOUT_S = 5.0
DEFAULT_FREEZE_LIMIT_S = 10.0
FREEZE_LIMIT_MAX_S = 3600.0
THAW_ATTEMPTS = 4
ANSWER_BYTES_MAX = 64 << 10  # our commands are answered in some tens of bytes; an error tells a sentence
STALE_BYTES_MAX = 1 << 20  # what an agent may still have to say to whoever asked before us
_TEXT_CHARACTERS_MAX = 200
_FILE_SYSTEMS_MAX = 1 << 20
_DELIMITER = b"\xff"

ValueT = TypeVar("ValueT")


class _AgentError(msgspec.Struct):
    desc: str = ""


class _Answer(msgspec.Struct, rename={"value": "return"}):
    value: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    error: _AgentError | msgspec.UnsetType = msgspec.UNSET


class _Refused(FreezeFailed):
    """The agent answered with an error."""


class GuestAgent:
    """The agent of one guest. One freeze at a time; the object may be used again after each."""

    def __init__(
        self, path: str | os.PathLike[str], *, timeout_s: float = DEFAULT_TIMEOUT_S, clock: Clock = SYSTEM
    ) -> None:
        """path: of the Unix socket of the hypervisor's chardev.

        timeout_s: for each answer but the one to the freeze, which has the whole of its limit.
        """
        self._path = os.fspath(path)
        self._timeout_s = timeout_s
        self._clock = clock

    @contextlib.contextmanager
    def frozen(self, *, limit_s: float = DEFAULT_FREEZE_LIMIT_S) -> Iterator[int]:
        """Freeze the guest's file systems for the length of a with-block; yield how many, which may be 0.

        limit_s: from the request to freeze until the guest is thawed, whether the block has ended or not; a
        block that took longer raises at its end, for applications did not agree to its cut. The guest is
        asked to thaw however the block ends. Raises: Unreachable where no agent answers; PeerClosed and
        ProtocolViolation where it stops answering; FreezeFailed where the guest refuses, is frozen already,
        was thawed too early, or could not be thawed; ValueError for a limit that is none. An error of the
        block passes, with a note where the guest could not be thawed.
        """
        freeze = _Freeze(self._path, self._timeout_s, checked_freeze_limit_s(limit_s), self._clock)
        try:
            yield freeze.begin()
        except BaseException as error:
            freeze.end()
            if freeze.failure is not None:
                error.add_note(str(freeze.failure))
            raise
        finally:
            freeze.end()
        freeze.require_one_instant()


def checked_freeze_limit_s(limit_s: float) -> float:
    """Return `limit_s`, for which a guest may stand still. Raises: ValueError."""
    if not 0 < limit_s <= FREEZE_LIMIT_MAX_S:  # nor not a number
        message = f"a guest stands still for more than 0 and at most {FREEZE_LIMIT_MAX_S:g} s, not {limit_s}"
        raise ValueError(message)
    return limit_s


class _Freeze:
    """One freeze. The owner calls begin() and end(); after begin() the thawer alone has the connection."""

    def __init__(self, path: str, timeout_s: float, limit_s: float, clock: Clock) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._limit_s = limit_s
        self._clock = clock
        self._deadline_s = 0.0
        self._connection: _Connection | None = None
        self._begun = threading.Event()  # the owner leaves the connection alone from here on
        self._ended = threading.Event()
        self._thawer = threading.Thread(target=self._thaw_in_time, name="guest thaw")
        self._count = 0
        self._thawed_count: int | None = None
        self._refusal = ""
        self._expired = False
        self.failure: FreezeFailed | None = None

    def begin(self) -> int:
        """Freeze; return how many file systems that were. Raises: as GuestAgent.frozen."""
        connection = _Connection(self._path, self._timeout_s, self._clock)
        try:
            state = connection.ask("guest-fsfreeze-status", str)
        except BaseException:
            connection.close()
            raise
        if state != "thawed":
            connection.close()
            raise FreezeFailed(
                "the guest's file systems are already frozen",
                path=self._path,
                field="guest-fsfreeze-status",
                expected="thawed",
                actual=_shown(state),
                hint="another backup may be at work; else thaw it: `virsh domfsthaw`, or fsfreeze -u in it",
            )
        self._connection = connection
        self._deadline_s = self._clock.monotonic_s() + self._limit_s
        try:
            self._thawer.start()
            self._count = connection.ask("guest-fsfreeze-freeze", int, timeout_s=self._limit_s)
            _validate_count(self._count, self._path)
            return self._count
        finally:
            self._begun.set()

    def end(self) -> None:
        """Let the guest go on; returns when it does, or when that failed. May be called again."""
        self._ended.set()
        self._begun.set()
        if self._thawer.ident is not None:
            self._thawer.join()

    def require_one_instant(self) -> None:
        """Raise FreezeFailed unless the guest stood still from begin() to end() and goes on now."""
        if self.failure is not None:
            raise self.failure
        if self._expired:
            raise FreezeFailed(
                f"the guest was thawed after {self._limit_s:g} s, before the cut was done",
                path=self._path,
                hint="the cut is crash-consistent only; cut again, or allow a longer freeze",
            )
        if self._thawed_count is not None and self._thawed_count < self._count:
            raise FreezeFailed(
                f"file systems of the guest were thawed before the cut was done, not by us{self._refusal}",
                path=self._path,
                field="guest-fsfreeze-thaw",
                expected=self._count,
                actual=self._thawed_count,
                hint="the cut is crash-consistent only; cut again while no other backup is at work. Windows "
                "holds still for ten seconds at most",
            )

    def _thaw_in_time(self) -> None:
        """Wait for the end or the limit, then thaw: the thawer's whole life."""
        self._begun.wait(self._limit_s + self._timeout_s)
        remaining_s = max(self._deadline_s - self._clock.monotonic_s(), 0.0)
        self._expired = not self._ended.wait(remaining_s)
        reason: BaseException | None = None
        for attempt in range(THAW_ATTEMPTS):
            try:
                self._thaw(is_first=attempt == 0)
            except HvReplicaError as error:
                reason = kept(error)
            else:
                return
        self.failure = FreezeFailed(
            f"the guest may still be frozen: its agent did not thaw it ({reason})",
            path=self._path,
            hint="Windows thaws by itself after ten seconds, a Linux guest stays frozen: `virsh domfsthaw`, "
            "fsfreeze -u on its console, or a reset thaw it",
        )

    def _thaw(self, *, is_first: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            connection = _Connection(self._path, self._timeout_s, self._clock)
        with connection:
            if connection.is_broken:
                raise PeerClosed("the connection to the guest agent failed", path=self._path)
            try:
                count = connection.ask("guest-fsfreeze-thaw", int)
            except _Refused as refusal:
                if connection.ask("guest-fsfreeze-status", str) != "thawed":
                    raise
                count, self._refusal = 0, f"; {refusal.message}"
        if is_first:  # a later one counts nothing where only the answer to an earlier one was lost
            self._thawed_count = count


class _Connection:
    """A connection on which the agent is known to answer us."""

    def __init__(self, path: str, timeout_s: float, clock: Clock) -> None:
        """Connect and synchronise. Raises: Unreachable, ProtocolViolation."""
        self._path = path
        self._timeout_s = timeout_s
        self._clock = clock
        self._received = bytearray()
        self.is_broken = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(path)
            self._synchronise()
        except HvReplicaError as error:
            self._socket.close()
            if isinstance(error, PeerClosed):
                raise _unreachable(path, error.message) from None
            raise
        except OSError as error:
            self._socket.close()
            raise _unreachable(path, error.strerror or str(error)) from None
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the socket back; the agent keeps what it was told."""
        self._socket.close()

    def ask(self, command: str, kind: type[ValueT], *, timeout_s: float | None = None) -> ValueT:
        """Return the agent's answer to a command without arguments.

        Raises: FreezeFailed with the agent's words for an error; PeerClosed for silence and a lost
        connection; ProtocolViolation for what is no answer. After the latter two the connection is of no use.
        """
        try:
            deadline_s = self._send({"execute": command}, timeout_s)
            return self._parse(self._receive_line(deadline_s, command), command, kind)
        except _Refused:
            raise
        except BaseException:
            self.is_broken = True
            raise

    def _synchronise(self) -> None:
        """Make what the agent still says to others end: all of it comes before our number.

        The delimiter before the command makes the agent forget half a command that somebody left behind.
        """
        number = int.from_bytes(self._clock.random_bytes(6), "big")
        question: dict[str, object] = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        deadline_s = self._send(question, None, before=_DELIMITER)
        budget_bytes = STALE_BYTES_MAX
        while budget_bytes > 0:
            line = self._receive_line(deadline_s, "guest-sync-delimited")
            budget_bytes -= len(line) + 1
            _, delimiter, answer = line.rpartition(_DELIMITER)
            if not delimiter:
                continue
            with contextlib.suppress(HvReplicaError):
                if self._parse(answer, "guest-sync-delimited", int) == number:
                    return
        raise ProtocolViolation(
            f"the guest agent sent more than {STALE_BYTES_MAX} bytes but never the number it was to repeat",
            path=self._path,
            hint="is that the socket of a guest agent?",
        )

    def _send(self, question: dict[str, object], timeout_s: float | None, *, before: bytes = b"") -> float:
        """Send one question; return when its answer is due."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline_s = self._clock.monotonic_s() + timeout_s
        self._received.clear()
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(before + msgspec.json.encode(question) + b"\n")
        except OSError as error:
            raise PeerClosed(f"the guest agent takes nothing: {error}", path=self._path) from None
        return deadline_s

    def _receive_line(self, deadline_s: float, command: str) -> bytes:
        """Return the next line, without its end. Raises: PeerClosed, ProtocolViolation."""
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > ANSWER_BYTES_MAX:
                raise ProtocolViolation(
                    f"the guest agent's answer to {command} is longer than {ANSWER_BYTES_MAX} bytes",
                    path=self._path,
                )
            remaining_s = deadline_s - self._clock.monotonic_s()
            try:
                if remaining_s <= 0:
                    raise TimeoutError
                self._socket.settimeout(remaining_s)
                piece = self._socket.recv(ANSWER_BYTES_MAX)
            except TimeoutError:
                raise PeerClosed(
                    f"the guest agent did not answer {command} in time", path=self._path
                ) from None
            except OSError as error:
                raise PeerClosed(f"the guest agent went away: {error}", path=self._path) from None
            if not piece:
                raise PeerClosed(
                    f"the guest agent's socket was closed before {command} was answered", path=self._path
                )
            self._received += piece
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def _parse(self, line: bytes, command: str, kind: type[ValueT]) -> ValueT:
        """Return the value of an answer. Raises: FreezeFailed, ProtocolViolation."""
        try:
            answer = msgspec.json.decode(line, type=_Answer)
            if answer.error is not msgspec.UNSET:
                raise _Refused(
                    f"the guest agent refused {command}: {_shown(answer.error.desc)}", path=self._path
                )
            if answer.value is not msgspec.UNSET:
                return msgspec.json.decode(answer.value, type=kind)
            reason = "neither a value nor an error"
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = str(error)
        raise ProtocolViolation(
            f"the guest agent's answer to {command} cannot be read: {reason}",
            path=self._path,
            hint="is that the socket of a guest agent?",
        )


def _unreachable(path: str, reason: str) -> Unreachable:
    return Unreachable(
        f"no guest agent answers: {reason}",
        path=path,
        hint="is qemu-ga running in the guest, is this the socket of its port org.qemu.guest_agent.0, and "
        "does no other program hold that socket?",
    )


def _validate_count(count: int, path: str) -> None:
    if not 0 <= count <= _FILE_SYSTEMS_MAX:
        raise ProtocolViolation(
            "the guest agent counts an impossible number of file systems",
            path=path,
            field="guest-fsfreeze-freeze",
            expected=f"0..{_FILE_SYSTEMS_MAX}",
            actual=count,
        )


def _shown(text: str) -> str:
    """Return the guest's words fit for a terminal: short, and nothing in them but characters to read."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:_TEXT_CHARACTERS_MAX])
    return shown if len(text) <= _TEXT_CHARACTERS_MAX else shown + "..."
