"""Who uses the disks now, and whether anybody may: a VM that is prepared for failover must not start."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

from hvreplica.errors import InvalidTransition

if TYPE_CHECKING:
    from collections.abc import Iterator


class ClientGate:
    """Counts the clients that are served, and lets none in while it is shut. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._lines: set[socket.socket] = set()
        self._is_shut = False

    @contextlib.contextmanager
    def client(self, line: socket.socket) -> Iterator[None]:
        """Count a client for the length of a with-block. Raises: InvalidTransition while the gate is shut."""
        with self._changed:
            if self._is_shut:
                raise InvalidTransition(
                    "the VM is prepared for a planned failover and must not run here",
                    hint="go on here with `hvreplica replicate --cancel-prepare`",
                )
            self._lines.add(line)
        try:
            yield
        finally:
            with self._changed:
                self._lines.remove(line)
                self._changed.notify_all()

    def shut(self, *, cut_off: bool) -> int:
        """Let nobody in from now on; return how many are inside.

        cut_off: end their connections, and wait until each has gone: then nobody is. Where somebody is
        inside, the gate stays open.
        """
        with self._changed:
            was_shut, self._is_shut = self._is_shut, True
            if self._lines and not cut_off:
                self._is_shut = was_shut
                return len(self._lines)
            for line in self._lines:
                with contextlib.suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)
            self._changed.wait_for(lambda: not self._lines)
            return 0

    def open(self) -> None:
        """Let clients in again."""
        with self._changed:
            self._is_shut = False
