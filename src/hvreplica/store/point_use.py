"""Who reads a point holds its lock with others; who lets it go must have the lock alone.

Readers take no other lock, so that they never wait for a cycle, nor a cycle for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.errors import Locked

if TYPE_CHECKING:
    import uuid

    from hvreplica.files import FileLock
    from hvreplica.store.home import VmHome


def hold_shared(home: VmHome, point_id: uuid.UUID) -> FileLock:
    """Return a lock that keeps the point from being let go. Raises: Locked while somebody does that."""
    home.files.make_directory(home.paths.points)
    return home.files.lock(home.paths.use(point_id), shared=True)


def hold_alone(home: VmHome, point_id: uuid.UUID) -> FileLock | None:
    """Return a lock that keeps readers from the point; None where one is there already."""
    home.files.make_directory(home.paths.points)
    try:
        return home.files.lock(home.paths.use(point_id))
    except Locked:
        return None
