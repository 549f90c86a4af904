"""What keeps the points that the disks have moved on from, and how one of them goes without hurting others.

    point    1          2          3 (newest)
    parts    a, b       c          disks/0.vhdx

A byte of point 1 is in the first of a, b, c that covers it; where none does, nothing changed it since, and
the disk has it. So a part serves its own point and all older ones. When point 2 goes, point 1 gets c behind
its own parts; when point 1 goes, nobody needs a and b. A part of kind "whole" is a complete disk: what stands
behind it in a walk is of a later copy of the disk, and not looked at.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hvreplica.errors import InvalidTransition, Locked, NoSuchPoint, PointInUse
from hvreplica.store.failover import pinned_points

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from hvreplica.store.home import VmHome
    from hvreplica.store.records import PointRow, UndoRow


def part_path(home: VmHome, part: UndoRow) -> Path:
    """Return where a part's file stands."""
    return home.paths.whole(part.id) if part.kind == "whole" else home.paths.undo(part.id)


def chain(home: VmHome, point_id: uuid.UUID, disk_index: int) -> list[UndoRow]:
    """Return the parts that a point's disk is read from, in the order of the walk.

    The first that covers a byte has it. What none covers is in the disk's file, unless the last part is of
    kind "whole". While the disks begin to change, the answer is out of date: see store/counter.py.
    """
    parts = home.catalog.undo_chain(home.vm_id, point_id, disk_index)
    ends = [place for place, part in enumerate(parts) if part.kind == "whole"]
    return parts[: ends[0] + 1] if ends else parts


def kept_points(home: VmHome) -> list[PointRow]:
    """Return the points that can be had, or could be but for damage, oldest first."""
    return [point for point in home.catalog.points(home.vm_id) if point.is_kept]


def drop_point(home: VmHome, point_id: uuid.UUID) -> None:
    """Let an older point go; every other one stays exactly as it is. Durable on return, whole or not at all.

    Its space is given back where no older point needs it. Raises: NoSuchPoint; PointInUse while somebody
    reads it; InvalidTransition for the newest one, which is the replica itself.
    """
    with _unused(home, point_id):
        with home.catalog.transaction():
            _require_older(home, point_id)
            gone = forget_point(home, point_id)
        remove_parts(home, gone)
        home.files.unlink(home.paths.use(point_id))


def forget_point(home: VmHome, point_id: uuid.UUID) -> list[UndoRow]:
    """Do what drop_point() does to the catalog, inside a transaction; return the parts nobody needs now.

    Their files are removed after the transaction: remove_parts().
    """
    catalog, vm_id = home.catalog, home.vm_id
    gone: list[UndoRow] = []
    own = catalog.undo_rows(vm_id, point_id=point_id)
    for disk_index in sorted({part.disk_index for part in own}):
        heir = catalog.heir(vm_id, point_id, disk_index)
        if heir is None or _ends_whole(home, heir, disk_index):
            gone += [part for part in own if part.disk_index == disk_index]
        else:
            catalog.move_undo(vm_id, point_id=point_id, target_id=heir, disk_index=disk_index)
    for part in gone:
        catalog.delete_undo(vm_id, part.id)
    catalog.supersede_point(vm_id, point_id)
    return gone


def remove_parts(home: VmHome, parts: Iterable[UndoRow]) -> None:
    """Remove files of parts that no row speaks of any more; what a cut leaves goes at the next start."""
    paths = [part_path(home, part) for part in parts]
    for path in paths:
        home.files.unlink(path)
    if paths:
        home.files.sync_directory(home.paths.points)


def sweep_points(home: VmHome) -> None:
    """Remove files of parts that the catalog does not know, and locks of points that are gone.

    Only while nobody makes parts: before the store is served, or under the VM's exclusive lock.
    """
    with home.catalog.snapshot():
        known = {part_path(home, part).name for part in home.catalog.undo_rows(home.vm_id)}
        known |= {home.paths.use(point.id).name for point in kept_points(home)}
    stale = [name for name in home.files.names(home.paths.points) if name not in known]
    for name in stale:
        home.files.unlink(home.paths.points / name)
    if stale:
        home.files.sync_directory(home.paths.points)


def spoiled_points(home: VmHome, part: UndoRow) -> list[PointRow]:
    """Return the kept points whose bytes may be in this part: those that a damage of its file spoils."""
    return [
        point
        for point in kept_points(home)
        if part.disk_index in home.catalog.members(home.vm_id, point.id)
        and any(other.id == part.id for other in chain(home, point.id, part.disk_index))
    ]


def _ends_whole(home: VmHome, point_id: uuid.UUID, disk_index: int) -> bool:
    parts = home.catalog.undo_rows(home.vm_id, point_id=point_id, disk_index=disk_index)
    return any(part.kind == "whole" for part in parts)


@contextlib.contextmanager
def _unused(home: VmHome, point_id: uuid.UUID) -> Iterator[None]:
    """Hold a point against those who read it. Raises: PointInUse."""
    home.files.make_directory(home.paths.points)
    try:
        lock = home.files.lock(home.paths.use(point_id))
    except Locked as error:
        raise PointInUse(
            f"point {point_id} of VM {home.name!r} is being read",
            path=home.paths.use(point_id),
            hint="end `point serve` or the failover that uses it, then try again",
        ) from error
    try:
        yield
    finally:
        lock.release()


def require_droppable(home: VmHome, point_id: uuid.UUID) -> None:
    """Refuse what drop_point() would refuse now. Raises: NoSuchPoint, InvalidTransition, PointInUse."""
    _require_older(home, point_id)
    with _unused(home, point_id):
        pass


def _require_older(home: VmHome, point_id: uuid.UUID) -> None:
    point = home.catalog.point(home.vm_id, point_id)
    if point is None or not point.is_kept:
        raise NoSuchPoint(
            f"VM {home.name!r} has no point {point_id} that could go",
            path=home.paths.folder,
            actual=point_id,
            hint="`hvreplica point list` shows those that it has",
        )
    if point_id in pinned_points(home.failover()):
        raise PointInUse(
            f"a failover of VM {home.name!r}, or a test of one, rests on point {point_id}",
            path=home.paths.folder,
            hint="see `hvreplica failover status`; it can go after `cancel`, `commit` or `test --cleanup`",
        )
    if home.catalog.newest_on_disks(home.vm_id) == point_id:
        raise InvalidTransition(
            f"point {point_id} is the newest one of VM {home.name!r}: its disks are the replica itself",
            path=home.paths.folder,
            hint="older points can go; the newest one is replaced by the next cycle",
        )
