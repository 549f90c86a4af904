"""Open a recovery point: choose it, hold it against being dropped, and find its disks."""

from __future__ import annotations

import contextlib
import threading
import uuid
from typing import TYPE_CHECKING

from hvreplica.errors import HvReplicaError, Locked, NoSuchPoint, StoreError
from hvreplica.store.apply import finish
from hvreplica.store.counter import Counter
from hvreplica.store.point_disk import PointDisk
from hvreplica.store.point_use import hold_shared
from hvreplica.store.point_view import PartFile, PointSource, Watch
from hvreplica.store.points_kept import chain, part_path
from hvreplica.store.room import room

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from hvreplica.errors import FormatError
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import PointRow

LATEST = "latest"
LATEST_APP = "latest-app"
_TRIES = 100
_PAUSE_S = 0.1


class OpenPoint:
    """A point that is held: it is not dropped before close(). disks: by index. scratch: a folder for
    what is written on top of it.
    """

    def __init__(self, home: VmHome, row: PointRow, stack: contextlib.ExitStack) -> None:
        """Use open_point()."""
        self.vm = home.name
        self.scratch = home.paths.test(0).parent
        self.row = row
        self.disks: dict[int, PointDisk] = {}
        self._stack = stack

    @property
    def id(self) -> uuid.UUID:
        """The point's id."""
        return self.row.id

    def close(self) -> None:
        """Close the disks and let go of the point. May be called twice."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_point(home: VmHome, which: uuid.UUID | str, *, disks: Iterable[int] | None = None) -> OpenPoint:
    """Return a point with its disks, for reading while replication goes on.

    which: see choose_point(). disks: the indexes wanted, all of the point by default. Raises: NoSuchPoint;
    StoreError for a damaged point; FormatError, OSError for damaged files.
    """
    with contextlib.ExitStack() as stack:
        row = _hold(home, which, stack)
        sizes = home.catalog.members(home.vm_id, row.id)
        opened = OpenPoint(home, row, stack)
        for index in sizes if disks is None else disks:
            opened.disks[index] = stack.enter_context(_open_disk(home, row, sizes, index))
        opened._stack = stack.pop_all()  # noqa: SLF001 - it was made here
    return opened


def choose_point(home: VmHome, which: uuid.UUID | str) -> PointRow:
    """Return a point that can be had.

    which: its id, also as text, LATEST or LATEST_APP. Where moving the disks to the newest one was cut,
    that is finished; where it is on its way and the one before has been let go, it is waited for. Raises:
    NoSuchPoint; StoreError for a damaged point; Locked if that takes too long.
    """
    if which in {LATEST, LATEST_APP}:
        _wait_for_disks(home)
    points = home.catalog.points(home.vm_id)
    complete = [point for point in points if point.state == "complete"]
    if which == LATEST_APP:
        complete = [point for point in complete if point.consistency == "app"]
        if not complete:
            raise NoSuchPoint(
                f"VM {home.name!r} has no application-consistent point",
                path=home.paths.folder,
                hint=f"see `point list`, or take --point {LATEST}",
            )
        return complete[-1]
    if which == LATEST:
        if not complete:
            raise _nothing_complete(home, points)
        return complete[-1]
    return _require_complete(home, points, point_id_of(which))


def _wait_for_disks(home: VmHome) -> None:
    for left in range(_TRIES - 1, -1, -1):
        points = home.catalog.points(home.vm_id, superseded=True)
        places = [place for place, point in enumerate(points) if point.state == "applying"]
        if not places:
            return
        try:
            finish(home)
        except Locked:
            if places[0] and points[places[0] - 1].is_kept:
                return  # somebody is at it, and the one before is still there
            if not left:
                raise
            threading.Event().wait(_PAUSE_S)


def point_id_of(which: uuid.UUID | str) -> uuid.UUID:
    """Return the id that a text stands for. Raises: NoSuchPoint if it is none."""
    if isinstance(which, uuid.UUID):
        return which
    try:
        return uuid.UUID(which)
    except ValueError:
        raise NoSuchPoint(
            "this is not the id of a recovery point",
            actual=which,
            hint=f"see `point list`; {LATEST} and {LATEST_APP} are understood too",
        ) from None


def walk(home: VmHome, point: PointRow, disk_index: int) -> list[PartFile]:
    """Return the parts that a disk of a point is read through, as the catalog has them now, in order.

    Raises: NoSuchPoint if the point is gone; StoreError if it is damaged.
    """
    with home.catalog.snapshot():
        _require_complete(home, home.catalog.points(home.vm_id), point.id)
        parts = chain(home, point.id, disk_index)
    return [PartFile(part.id, part_path(home, part), is_whole=part.kind == "whole") for part in parts]


def _hold(home: VmHome, which: uuid.UUID | str, stack: contextlib.ExitStack) -> PointRow:
    """Choose a point and share it with other readers; whoever drops it takes its lock alone."""
    for left in range(_TRIES - 1, -1, -1):
        point = choose_point(home, which)
        try:
            with room(home.files, home.paths.points):
                lock = hold_shared(home, point.id)
        except Locked:
            if not left:
                raise
            threading.Event().wait(_PAUSE_S)  # it is being dropped, or was going to be
            continue
        if left and not home.files.exists(home.paths.use(point.id)):
            lock.release()  # whoever let the point go removed the file: the lock keeps nobody away
            continue
        stack.callback(lock.release)
        return _require_complete(home, home.catalog.points(home.vm_id), point.id)
    raise AssertionError("the last try returns or raises")


def _open_disk(home: VmHome, point: PointRow, sizes: dict[int, int], disk_index: int) -> PointDisk:
    rows = {row.spec.index: row for row in home.catalog.disks(home.vm_id)}
    if disk_index not in rows:
        raise NoSuchPoint(f"VM {home.name!r} has no disk {disk_index}", field="disk", actual=disk_index)
    if disk_index not in sizes:
        raise NoSuchPoint(
            f"point {point.id} of VM {home.name!r} does not have disk {disk_index}",
            field="disk",
            actual=disk_index,
            hint="the disk was removed from the VM; its last content is in its file in the store"
            if rows[disk_index].removed_s is not None
            else "the disk was added to the VM; it belongs to its points from the next one on",
        )
    source = PointSource(
        files=home.files,
        clock=home.clock,
        disk_path=home.paths.disk(disk_index),
        virtual_bytes=sizes[disk_index],
        walk=lambda: walk(home, point, disk_index),
        watch=Watch(Counter(home.files, home.paths.counter)),
        on_damage=lambda part_id, error: _spoil(home, point, part_id, error),
    )
    path = home.paths.points / f"{point.id}.{disk_index}"
    return PointDisk(source, path, point_id=point.id, spec=rows[disk_index].spec)


def _spoil(home: VmHome, point: PointRow, part_id: uuid.UUID, error: FormatError) -> None:
    """Mark the point that was read; which others the damage concerns is for a verification to say."""
    with contextlib.suppress(HvReplicaError, OSError), home.catalog.transaction():
        home.catalog.damage_point(home.vm_id, point.id, f"undo part {part_id} is damaged: {error}")


def _require_complete(home: VmHome, points: list[PointRow], point_id: uuid.UUID) -> PointRow:
    row = next((point for point in points if point.id == point_id), None)
    if row is not None and row.state == "complete":
        return row
    if row is not None and row.state == "damaged":
        raise StoreError(
            f"point {point_id} of VM {home.name!r} is damaged: {row.damage}",
            path=home.paths.folder,
            hint="choose another one, see `point list`",
        )
    complete = [point for point in points if point.state == "complete"]
    if not complete:
        raise _nothing_complete(home, points)
    is_coming = row is not None and row.state in {"spooled", "applying"}
    raise NoSuchPoint(
        f"VM {home.name!r} has no point {point_id}" + (" yet: it is being made" if is_coming else ""),
        path=home.paths.folder,
        actual=point_id,
        hint=f"see `point list`; the newest one is {complete[-1].id}",
    )


def _nothing_complete(home: VmHome, points: list[PointRow]) -> NoSuchPoint:
    if any(point.state == "base" for point in points):
        return NoSuchPoint(
            f"VM {home.name!r} has no point yet: its first copy was made while the VM wrote,"
            " and waits for the first cut",
            path=home.paths.folder,
            hint="it becomes a point with the next cycle; run replicate, or wait for it",
        )
    return NoSuchPoint(
        f"VM {home.name!r} has no complete point yet",
        path=home.paths.folder,
        hint="its initial replication must finish first",
    )
