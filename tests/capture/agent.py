"""A guest agent that does as it is told: the real one's answers, and any other in their place."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

SILENT = b""
JOIN_TIMEOUT_S = 30


class FakeAgent:
    """A guest with `file_systems` of them behind a Unix socket, in a thread of its own.

    script: for each command, what its next calls are answered with, in order, instead of the real answer: bytes
    as they are, a dict as JSON, a function called with the agent and its connection, None for the real answer.
    """

    def __init__(self, path: Path, *, file_systems: int = 2, **script: list[Any]) -> None:
        self.path = path
        self.commands: list[str] = []
        self.connections = 0
        self.first_bytes: list[bytes] = []
        self.answer_to_sync = b""
        self.thawed = threading.Event()
        self.is_frozen = False
        self._file_systems = file_systems
        self._script = {name.replace("_", "-"): list(replies) for name, replies in script.items()}
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(path))
        self._listening.listen()
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        """Die: nothing answers any more. May be called twice, and from a script."""
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.path.unlink(missing_ok=True)
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_TIMEOUT_S)
            assert not self._thread.is_alive(), "a connection was left open"

    def _serve(self) -> None:
        while not self._is_closed:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            with connection, contextlib.suppress(OSError):
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        received = b""
        self.first_bytes.append(b"")
        while not self._is_closed:
            piece = connection.recv(4096)
            if not piece:
                return
            self.first_bytes[-1] = self.first_bytes[-1] or piece[:1]
            received += piece
            while b"\n" in received:
                line, received = received.split(b"\n", 1)
                self._answer(connection, json.loads(line.strip(b"\xff")))

    def _answer(self, connection: socket.socket, question: dict[str, Any]) -> None:
        command = question["execute"]
        self.commands.append(command)
        if command == "guest-sync-delimited":
            self.answer_to_sync = json.dumps({"return": question["arguments"]["id"]}).encode()
        replies = self._script.get(command)
        reply = replies.pop(0) if replies else None
        if reply is None:
            reply = self._real_answer(command)
        if callable(reply):
            reply(self, connection)
        else:
            connection.sendall(reply if isinstance(reply, bytes) else json.dumps(reply).encode() + b"\n")

    def _real_answer(self, command: str) -> bytes | dict[str, Any]:
        if command == "guest-sync-delimited":
            return b"\xff" + self.answer_to_sync + b"\n"
        if command == "guest-fsfreeze-status":
            return {"return": "frozen" if self.is_frozen else "thawed"}
        if command == "guest-fsfreeze-freeze":
            self.is_frozen = True
            return {"return": self._file_systems}
        assert command == "guest-fsfreeze-thaw", command
        was_frozen, self.is_frozen = self.is_frozen, False
        self.thawed.set()
        return {"return": self._file_systems if was_frozen else 0}


def hang_up(_agent: FakeAgent, connection: socket.socket) -> None:
    """End the connection instead of answering."""
    connection.shutdown(socket.SHUT_RDWR)


def die(agent: FakeAgent, connection: socket.socket) -> None:
    """End the connection and be gone for good."""
    connection.shutdown(socket.SHUT_RDWR)
    agent.close()


def error(words: str) -> dict[str, Any]:
    """Return an answer that says no."""
    return {"error": {"class": "GenericError", "desc": words}}
