"""The locks that keep disk images which are in use: our own, and QEMU's, taken and tested as QEMU does.

Each permission has a number; who has it holds a shared lock on one byte of the file, and who lets nobody else
have it holds one on another. The locks belong to the open file description, so that they go with its last
descriptor. flock(), by which the programs of this project keep off each other, is not seen by QEMU.

    byte 100 + n  held: 0 to read what is consistent, 1 to write, 3 to resize
    byte 200 + n  not shared with others
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_READ, _WRITE, _RESIZE = 0, 1, 3
_WRITER, _UNSHARED = (_READ, _WRITE, _RESIZE), (_WRITE, _RESIZE)
_HELD_BASE, _UNSHARED_BASE = 100, 200
_BYTES_END = 300
_UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_HOLDERS_MAX = 4


class _Flock(ctypes.Structure):
    """The kernel's struct flock with 64-bit offsets."""

    _fields_ = (
        ("l_type", ctypes.c_short),
        ("l_whence", ctypes.c_short),
        ("l_start", ctypes.c_int64),
        ("l_len", ctypes.c_int64),
        ("l_pid", ctypes.c_int),
    )


def hold_image(descriptor: int, *, writes: bool) -> bool:
    """Lock an open file against programs of ours and QEMU's: for its one writer, or against any writer.

    QEMU's programs may still read it, unless `writes`, and then only if they are told to. Returns False where
    a holder stands against it; the caller closes the file. Raises: OSError.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if writes else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        is_free = _hold_qemu(descriptor, writes=writes)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return True  # nobody can hold such a lock there
        raise
    if not is_free:
        release_image(descriptor)
    return is_free


def bars_writer(descriptor: int) -> bool:
    """Return whether somebody's lock stands against a writer of an open file; takes none. Raises: OSError.

    Programs of ours hold QEMU's locks too, so that these tell of all; flock() cannot be asked.
    """
    try:
        return not all(_is_free(descriptor, start) for start in _bars(_WRITER))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise


def _hold_qemu(descriptor: int, *, writes: bool) -> bool:
    held = _WRITER if writes else (_READ,)
    # First our own, then those of others: of two that come at once at least one sees the other.
    own = [_HELD_BASE + number for number in held] + [_UNSHARED_BASE + number for number in _UNSHARED]
    for start in own:
        _lock(descriptor, fcntl.F_RDLCK, start, 1)
    return all(_is_free(descriptor, start) for start in _bars(held))


def _bars(held: tuple[int, ...]) -> list[int]:
    """Return the bytes on which no other may hold a lock, for one who is to hold these permissions."""
    return [_UNSHARED_BASE + number for number in held] + [_HELD_BASE + number for number in _UNSHARED]


def release_image(descriptor: int) -> None:
    """Give the locks back, also where a mapping keeps the file open."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    with contextlib.suppress(OSError):
        _lock(descriptor, fcntl.F_UNLCK, _HELD_BASE, _BYTES_END - _HELD_BASE)


def programs_with(descriptor: int) -> list[str]:
    """Return who else has the file of a descriptor open, as "name (pid)", as far as this user may know."""
    wanted = os.fstat(descriptor)
    identity = (wanted.st_dev, wanted.st_ino)
    found = [
        f"{_name_of(pid)} (pid {pid})"
        for pid in _others()
        if any((each.st_dev, each.st_ino) == identity for each in _open_files(pid))
    ]
    return found[:_HOLDERS_MAX]


def _lock(descriptor: int, kind: int, start: int, length: int) -> None:
    request = _Flock(kind, os.SEEK_SET, start, length, 0)
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, bytes(request))


def _is_free(descriptor: int, start: int) -> bool:
    """Return whether nobody else holds a lock of any kind on a byte."""
    request = _Flock(fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0)
    answer = _Flock.from_buffer_copy(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, bytes(request)))
    return bool(answer.l_type == fcntl.F_UNLCK)


def _others() -> list[str]:
    with contextlib.suppress(OSError):
        return [name for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
    return []


def _open_files(pid: str) -> Iterator[os.stat_result]:
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                yield os.stat(f"{folder}/{name}")


def _name_of(pid: str) -> str:
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return "a process"
