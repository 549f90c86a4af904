"""Listening sockets: a TCP port, or a path that a dead process may have left behind."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.errors import Locked, Unreachable
from hvreplica.files import socket_identity

if TYPE_CHECKING:
    from hvreplica.address import Address
    from hvreplica.files import FileSystem

_BACKLOG = 128
_PATH_BYTES_MAX = 107  # struct sockaddr_un has 108 with the NUL, and clients are bound by it too
_PROBE_S = 1.0
_SOCKET_MODE = 0o600
_CREDENTIALS_BYTES = 12  # struct ucred: pid, uid, gid


def listen_on(address: Path | Address, files: FileSystem) -> socket.socket:
    """Return a listening, non-blocking socket.

    At a path, what a dead process left is replaced, and nothing else is; its mode is 0600 from the start.
    Raises: Unreachable; Locked, naming the process, if one listens there.
    """
    listening: socket.socket | None = None
    try:
        if isinstance(address, Path):
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            _bind_path(listening, address, files)
        else:
            listening = _bound_to_port(address)
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except (OSError, Unreachable, Locked) as error:
        if listening is not None:
            listening.close()
        if not isinstance(error, OSError):
            raise
        hint = "may this user write to that folder?" if isinstance(address, Path) else "is the port in use?"
        raise Unreachable(f"cannot listen: {error.strerror or error}", path=str(address), hint=hint) from None
    return listening


def peer_pid(connection: socket.socket) -> int | None:
    """Return the process at the other end of a Unix socket, where the system tells."""
    try:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS_BYTES)
    except (OSError, AttributeError):
        return None
    return int.from_bytes(credentials[:4], sys.byteorder)


def _bound_to_port(address: Address) -> socket.socket:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, place = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
    except OSError:
        listening.close()
        raise
    return listening


def _bind_path(listening: socket.socket, path: Path, files: FileSystem) -> None:
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        raise Unreachable(
            f"the path is too long for a socket: at most {_PATH_BYTES_MAX} bytes",
            path=path,
            hint="choose a shorter one, such as /run/web01.sock",
        )
    os.fchmod(listening.fileno(), _SOCKET_MODE)  # bind() gives it to the name, which then never had another
    if files.exists(path):
        _require_stale(path)
        files.unlink(path)
    listening.bind(os.fspath(path))


def _require_stale(path: Path) -> None:
    """Refuse a name that is no socket, or whose process still listens."""
    if socket_identity(path) is None:
        raise Unreachable("there is a file of another kind; it was not touched", path=path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except TimeoutError:  # it lives, and its queue is full
            holder = None
        else:
            holder = peer_pid(probe)
    raise Locked(
        f"another process{f' (pid {holder})' if holder else ''} listens there",
        path=path,
        hint="stop it, or choose another path",
    )
