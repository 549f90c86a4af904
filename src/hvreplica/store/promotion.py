"""Make a VM's replica the active side, take that back, or make it final: the verbs of store/failover.py.

    unplanned   record the intent: from here no primary is let in
                finish    what was received is applied; then the disks are on the newest point
                revert    an older point that was chosen becomes the newest one (store/revert.py)
                promote   active/<i>.vhdx, an empty child of disks/<i>.vhdx, for each disk
    cancel      remove    the children go, with what was written to them
                restore   the disks are on the point again that the primary knows
    commit      delete    older points go, where that was asked for

Each step is done under the VM's exclusive lock; its end and the beginning of the next are one transaction.
Every step may be done twice, so after a cut the same verb is called again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from hvreplica.clock import instant_time
from hvreplica.disk import create_disk, open_disk
from hvreplica.disk.open import open_layer
from hvreplica.errors import FailoverRefused, HvReplicaError, InvalidTransition, NoSuchPoint
from hvreplica.files import require_unused
from hvreplica.store import failover as table
from hvreplica.store.apply import finish
from hvreplica.store.at_instant import WAIT_S, Instant, exclusive_within, reach, shown_by
from hvreplica.store.check import require_sound
from hvreplica.store.failover import ActiveDisk, Failover, Intent
from hvreplica.store.open_point import LATEST, LATEST_APP
from hvreplica.store.points_kept import drop_point, kept_points
from hvreplica.store.revert import require_revertible, revert_forward, take_back
from hvreplica.store.room import room

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hvreplica.progress import ProgressCallback
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import PointRow

_UNFINISHED = ".tmp"


class Wish(NamedTuple):
    """How a verb is to be done. point: LATEST, LATEST_APP, a point's id, or an instant; None for none.

    force: although data is lost, or the point is damaged. wait_s: for what holds the VM's disks.
    """

    point: uuid.UUID | str | Instant | None = None
    force: bool = False
    delete_points: bool = False
    wait_s: float = WAIT_S
    progress: ProgressCallback | None = None


def fail_over(home: VmHome, verb: table.Verb, wish: Wish) -> Failover:
    """Do `unplanned` or `planned`, or the rest of it; return the record. Done already: nothing is done.

    An instant is made a point first; the primary is let in until that is durable. Durable on return. Raises:
    NoSuchPoint, InvalidTransition, FailoverRefused for a damaged point; Locked where the disks stay in use
    for longer than wait_s, after which the same call goes on; StoreFull, StoreError, FormatError.
    """
    _settle_initial(home, wish)
    wish = _reached(home, verb, wish)
    with home.catalog.transaction():
        record = home.failover()
        point = _chosen(home, wish)
        if _is_done(home, record, verb, point):
            return record
        begun = table.begin(home.name, record, verb, intent=Intent(verb, "finish", point=_id(point)))
        _require_revertible(home, point)
        _require_same_point(home, begun, wish, point)
        if begun.intent != record.intent:
            begun = _stamped(home, begun)
        home.set_failover(begun)
    return _run(home, wish)


def cancel(home: VmHome, wish: Wish) -> Failover:
    """Take a failover back, or the rest of it; with wish.point, fail over to that point instead.

    What was written to the active disks is lost; that needs wish.force. Raises: FailoverRefused without it,
    InvalidTransition, NoSuchPoint, Locked, StoreError.
    """
    with exclusive_within(home, wish.wait_s):
        wish = _reached(home, "cancel", wish)
        with home.catalog.transaction():
            record = home.failover()
            leaving = None if record.reverted is None else record.reverted.id
            then = _chosen(home, wish, without=leaving)
            is_repeated = record.intent is not None and record.intent.verb == "cancel"
            begun = table.begin(
                home.name, record, "cancel", intent=Intent("cancel", "remove", then_point=_id(then))
            )
            _require_revertible(home, then, without=leaving)
            if not is_repeated and not wish.force:
                _require_unwritten(home)
            if begun.intent is not None and not begun.started_s:
                begun = _stamped(home, begun)  # one that was only prepared goes straight to another point
            home.set_failover(begun)
        return _run(home, wish)


def commit(home: VmHome, wish: Wish) -> Failover:
    """Make a failover final: it cannot be cancelled any more. Points stay, unless wish.delete_points.

    Raises: InvalidTransition, PointInUse for a point that is open and was to go, Locked, StoreError.
    """
    with home.catalog.transaction():
        record = home.failover()
        if record.state == "FailedOver" and record.intent is None and not wish.delete_points:
            return record
        begun = table.begin(
            home.name, record, "commit", intent=Intent("commit", "delete", delete_points=wish.delete_points)
        )
        begun = replace(begun, reverted=None)  # nothing is taken back from here on, so nothing is pinned
        if wish.delete_points and record.test is not None:
            raise InvalidTransition(
                f"VM {home.name!r} has a test failover of point {record.test.point}",
                hint="end it with `hvreplica failover test --cleanup` first, or keep the points",
            )
        home.set_failover(begun)
    return _run(home, wish)


def _id(point: PointRow | None) -> uuid.UUID | None:
    return None if point is None else point.id


def _chosen(home: VmHome, wish: Wish, *, without: uuid.UUID | None = None) -> PointRow | None:
    """Return the point that is wanted, none for none; _reached() comes first."""
    assert not isinstance(wish.point, Instant)
    return None if wish.point is None else choose_point(home, wish.point, force=wish.force, without=without)


def choose_point(
    home: VmHome,
    point: uuid.UUID | str,
    *,
    force: bool,
    waiting: bool = True,
    without: uuid.UUID | None = None,
) -> PointRow:
    """Return the point that is meant by an id, LATEST or LATEST_APP.

    force: also the newest one if it is damaged. waiting: also one whose logs wait to be applied. without: as
    if this one were not there. Raises: NoSuchPoint, FailoverRefused for a damaged one.
    """
    stored = home.catalog.points(home.vm_id)
    points = [row for row in stored if row.state != "base" and row.id != without]
    listed = [row for row in points if waiting or row.is_kept]
    if point == LATEST:
        found = listed[-1:]
    elif point == LATEST_APP:
        found = [row for row in listed if row.consistency == "app"][-1:]
    else:
        found = [row for row in listed if row.id == point]
    if not found:
        what = {LATEST: "no point yet", LATEST_APP: "no application-consistent point"}.get(str(point))
        raise NoSuchPoint(
            f"VM {home.name!r} has {what or f'no point {point}'} to fail over to",
            path=home.paths.folder,
            hint="see `hvreplica point list`" if listed else "its initial replication must finish first",
        )
    is_newest = found[0].id == points[-1].id
    if found[0].state == "damaged" and not (force and is_newest):
        raise FailoverRefused(
            f"point {found[0].id} of VM {home.name!r} is damaged: {found[0].damage}",
            path=home.paths.folder,
            hint="choose another point" + (", or take this one as it is with --force" if is_newest else ""),
        )
    return found[0]


def written_bytes(home: VmHome, disk_index: int) -> int:
    """Return how many bytes an active disk holds itself. Raises: HvReplicaError, OSError."""
    path = home.paths.active(disk_index)
    if not home.files.exists(path):
        return 0
    with open_layer(home.files, path, format="vhdx", clock=home.clock) as child:
        stretches = child.stretches(0, child.virtual_bytes)
        return sum(stretch.length for stretch in stretches if stretch.kind != "parent")


def _settle_initial(home: VmHome, wish: Wish) -> None:
    """Let disks that came whole take their place first: they bring a point that may be the one to choose."""
    if any(row.state == "renaming" for row in home.catalog.transfers(home.vm_id)):
        with exclusive_within(home, wish.wait_s):
            finish(home, progress=wish.progress)


def _reached(home: VmHome, verb: table.Verb, wish: Wish) -> Wish:
    """Return the wish with a point's id for its instant, whose point is made where there is none yet.

    A verb that does not follow, or may not, is refused before. Raises: as reach() and the verb.
    """
    if not isinstance(wish.point, Instant):
        return wish
    record, instant = home.failover(), wish.point
    intent = record.intent
    if verb == "cancel" and intent is not None and intent.verb == "cancel":
        return wish._replace(point=None)  # it goes on with what was recorded
    found = shown_by(home, instant, None if intent is None else intent.point, record.point)
    if found is None:
        if verb == "unplanned" and intent is None and record.state == "FailedOverWaitingCompletion":
            raise _elsewhere(home, record, instant_time(instant.unix_s))
        table.begin(home.name, record, verb)
        if verb == "cancel" and not wish.force:
            _require_unwritten(home)
        if verb == "unplanned" and intent is not None:
            raise _other_point(home, intent.point, instant_time(instant.unix_s))
        leaving = None if record.reverted is None else record.reverted.id
        found = reach(
            home,
            instant,
            wait_s=wish.wait_s,
            progress=wish.progress,
            check=lambda base: _require_revertible(home, base, without=leaving),
        )
    return wish._replace(point=found.id)


def _is_done(home: VmHome, record: Failover, verb: table.Verb, point: PointRow | None) -> bool:
    """Return whether this very failover has been done. Raises: InvalidTransition if to another."""
    if record.intent is not None or record.state != "FailedOverWaitingCompletion":
        return False
    is_it = point is None or point.id in {record.point, record.reverted and record.reverted.id}
    if verb == "unplanned" and not is_it:
        raise _elsewhere(home, record, str(point and point.id))
    return True


def _require_same_point(home: VmHome, begun: Failover, wish: Wish, point: PointRow | None) -> None:
    intent = begun.intent
    if intent is None or point is None or intent.point in {None, point.id} or isinstance(wish.point, str):
        return
    raise _other_point(home, intent.point, str(point.id))


def _elsewhere(home: VmHome, record: Failover, wanted: str) -> InvalidTransition:
    return InvalidTransition(
        f"VM {home.name!r} is failed over to point {record.point}",
        field="point",
        expected=record.point,
        actual=wanted,
        hint=f"choose another one with `hvreplica failover cancel --point {wanted}`",
    )


def _other_point(home: VmHome, point_id: uuid.UUID | None, wanted: str) -> InvalidTransition:
    return InvalidTransition(
        f"a failover of VM {home.name!r} to point {point_id} was cut before its end",
        field="point",
        expected=point_id,
        actual=wanted,
        hint="call it again for that point, or call `hvreplica failover cancel` first",
    )


def _require_revertible(home: VmHome, chosen: PointRow | None, *, without: uuid.UUID | None = None) -> None:
    if chosen is not None:
        require_revertible(home, choose_point(home, LATEST, force=True, without=without), chosen)


def _stamped(home: VmHome, record: Failover) -> Failover:
    row = home.row()
    return replace(record, generation=row.owner.generation + 1, started_s=home.clock.now_s())


def _require_unwritten(home: VmHome) -> None:
    """Refuse to throw away what was written to the active disks. Raises: FailoverRefused with the sum."""
    lost = 0
    for path, disk_index in _active_files(home):
        try:
            lost += written_bytes(home, disk_index)
        except (HvReplicaError, OSError) as error:
            raise FailoverRefused(
                f"whether this disk of VM {home.name!r} holds writes cannot be told: {error}",
                path=path,
                hint="lose what it holds with --force",
            ) from error
    if lost:
        raise FailoverRefused(
            f"{lost} bytes were written to VM {home.name!r} since its failover; cancel loses them",
            path=home.paths.active(0).parent,
            actual=f"{lost} bytes",
            hint="keep them with `hvreplica failover reverse`, or lose them with --force",
        )


def _run(home: VmHome, wish: Wish) -> Failover:
    """Do the recorded step and those that follow, until none is recorded."""
    with exclusive_within(home, wish.wait_s):
        while (record := home.failover()).intent is not None:
            assert record.intent is not None
            work = _STEPS.get(record.intent.step)
            if work is None:
                raise InvalidTransition(
                    f"VM {home.name!r} is {table.describe(record)}", hint="call that verb again"
                )
            with room(home.files, home.paths.folder):
                done = work(home, record, wish)
                with home.catalog.transaction():
                    done.rows()
                    home.set_failover(table.advance(done.record))
                done.after()
        return record


def _nothing() -> None:
    """Change nothing."""


class _Done(NamedTuple):
    """A step that was done. rows: what it changes in the transaction that ends it. after: what follows."""

    record: Failover
    rows: Callable[[], None] = _nothing
    after: Callable[[], None] = _nothing


def _finish(home: VmHome, record: Failover, wish: Wish) -> _Done:
    finish(home, progress=wish.progress)
    require_sound(home)
    return _Done(record)


def _revert(home: VmHome, record: Failover, wish: Wish) -> _Done:
    intent = record.intent
    newest = choose_point(home, LATEST, force=True)
    if intent is None or intent.point is None or intent.point == newest.id:
        return _Done(record)
    if record.reverted is not None and newest.id == record.reverted.id and newest.is_kept:
        return _Done(record)
    return _Done(revert_forward(home, record, intent.point, progress=wish.progress))


def _promote(home: VmHome, record: Failover, _wish: Wish) -> _Done:
    """Put an empty child on top of each disk of the newest point; one that is there already stays."""
    newest = choose_point(home, LATEST, force=True)
    chosen = None if record.intent is None else record.intent.point
    folder = home.paths.active(0).parent
    home.files.make_directory(folder)
    for name in home.files.names(folder):
        if name.endswith(_UNFINISHED):
            home.files.unlink(folder / name)  # of a child whose making was cut
    members = home.catalog.members(home.vm_id, newest.id)
    for disk_index in members:
        path = home.paths.active(disk_index)
        if not home.files.exists(path):
            create_disk(home.files, path, parent=home.paths.disk(disk_index), clock=home.clock)
        open_disk(home.files, path, clock=home.clock).close()  # proves that it rests on its parent
    home.files.sync_directory(folder)
    active = [ActiveDisk(disk_index, virtual_bytes) for disk_index, virtual_bytes in members.items()]
    shown = newest if chosen is None else home.catalog.point(home.vm_id, chosen) or newest
    return _Done(replace(record, active=active, point=shown.id, point_type=_type_of(shown)))


def _type_of(point: PointRow) -> table.PointType:
    if point.kind == "planned":
        return "planned"
    if point.consistency == "app":
        return "application-consistent"
    return "initial" if point.kind == "initial" else "regular"


def _remove(home: VmHome, record: Failover, _wish: Wish) -> _Done:
    folder = home.paths.active(0).parent
    paths = [path for path, _ in _active_files(home)]
    for path in paths:
        require_unused(home.files, path)
    for name in home.files.names(folder):
        if folder / name in paths or name.endswith(_UNFINISHED):
            home.files.unlink(folder / name)
    if paths:
        home.files.sync_directory(folder)
    return _Done(replace(record, active=[]))


def _restore(home: VmHome, record: Failover, wish: Wish) -> _Done:
    return _Done(record, *take_back(home, record, force=wish.force, progress=wish.progress))


def _delete(home: VmHome, record: Failover, _wish: Wish) -> _Done:
    if record.intent is not None and record.intent.delete_points:
        for point in kept_points(home)[:-1]:
            drop_point(home, point.id)
    return _Done(record)


_STEPS: dict[str, Callable[[VmHome, Failover, Wish], _Done]] = {
    "finish": _finish,
    "revert": _revert,
    "promote": _promote,
    "remove": _remove,
    "restore": _restore,
    "delete": _delete,
}


def _active_files(home: VmHome) -> Iterator[tuple[Path, int]]:
    folder = home.paths.active(0).parent
    for name in home.files.names(folder):
        stem = name.removesuffix(".vhdx")
        if stem != name and stem.isdecimal():
            yield folder / name, int(stem)
