"""Tell a full disk as StoreFull, with what was needed and what is there."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from hvreplica.errors import StoreFull
from hvreplica.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.files import FileSystem

_FULL_CODES = (errno.ENOSPC, errno.EDQUOT)
_MESSAGE = "no room left for the replica"
_HINT = "make room in the store's file system; nothing is lost, the next try continues"


@contextlib.contextmanager
def room(
    files: FileSystem, path: Path, needed_bytes: int = 0, *, message: str = _MESSAGE, hint: str = _HINT
) -> Iterator[None]:
    """Turn "no space" inside the block into StoreFull naming `path`; every other error passes.

    needed_bytes: what the block writes, 0 where that is not known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL_CODES:
            raise
        raise full(files, path, needed_bytes, message=message, hint=hint) from error


def full(
    files: FileSystem, path: Path, needed_bytes: int = 0, *, message: str = _MESSAGE, hint: str = _HINT
) -> StoreFull:
    """Return the error that says so."""
    free_bytes = files.free_bytes(path.parent)
    return StoreFull(
        message,
        path=path,
        expected=f"room for {format_size(needed_bytes)}" if needed_bytes else "room",
        actual=f"{format_size(free_bytes)} free",
        hint=hint,
    )


def require_room(files: FileSystem, path: Path, expected_bytes: int) -> None:
    """Refuse early what the sender itself expects not to fit. Raises: StoreFull."""
    if expected_bytes > files.free_bytes(path.parent):
        raise full(files, path, expected_bytes)
