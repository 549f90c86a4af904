"""A test failover: overlays of one point that a test may write to, while replication goes on beside it.

    begin     record the test and its point, which then cannot be dropped -> overlays test/<i>.vhdx are made
              when they are served, and served again with what was written
    cleanup   record that it ends -> overlays removed, folder synced -> record that there is none

One test at a time for each VM. Whoever serves it holds test/lock; a cleanup needs it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from msgspec.structs import replace

from hvreplica.errors import InvalidTransition, Locked
from hvreplica.store import failover as table
from hvreplica.store.at_instant import Instant, reach, shown_by
from hvreplica.store.failover import Firedrill
from hvreplica.store.open_point import LATEST
from hvreplica.store.promotion import choose_point
from hvreplica.store.room import room

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator

    from hvreplica.store.home import VmHome


def begin_firedrill(home: VmHome, point: uuid.UUID | str | Instant | None) -> Firedrill:
    """Record a test failover of `point`, or return the one that there is; under firedrill_lock().

    point: its id, LATEST, LATEST_APP, or an instant, for which a point is made that stays; None goes on with
    the test that there is, else takes LATEST. Raises: NoSuchPoint, FailoverRefused for a damaged point,
    InvalidTransition for a second test or one that is being removed; for an instant as reach().
    """
    if isinstance(point, Instant):
        point = _point_at(home, point)
    with home.catalog.transaction():
        record = home.failover()
        test = record.test
        _require_staying(home, test)
        if test is not None and (point is None or point == test.point):
            return test
        chosen = choose_point(home, LATEST if point is None else point, force=False, waiting=False)
        members = home.catalog.members(home.vm_id, chosen.id)
        begun = Firedrill(chosen.id, sorted(members), home.clock.now_s())
        home.set_failover(table.with_test(home.name, record, begun))
        return begun


def _point_at(home: VmHome, instant: Instant) -> uuid.UUID:
    """Return a point that shows the instant, made unless it is that of the test or may be none."""
    test = home.failover().test
    _require_staying(home, test)
    if test is None:
        return reach(home, instant).id
    if shown_by(home, instant, test.point) is None:
        raise table.second_test(home.name, test)
    return test.point


def _require_staying(home: VmHome, test: Firedrill | None) -> None:
    """Refuse to go on with a test whose removal was cut. Raises: InvalidTransition."""
    if test is not None and test.removing:
        raise InvalidTransition(
            f"the test failover of VM {home.name!r} is being removed",
            hint="call `hvreplica failover test --cleanup` again; then begin another one",
        )


def end_firedrill(home: VmHome) -> bool:
    """Remove the test failover and what was written to it; return whether there was one. Repeatable.

    Raises: Locked while it is served.
    """
    if home.failover().test is None:
        return False
    with firedrill_lock(home):
        return remove_firedrill(home)


def remove_firedrill(home: VmHome) -> bool:
    """Do what end_firedrill() does, under firedrill_lock()."""
    with home.catalog.transaction():
        record = home.failover()
        if record.test is None:
            return False
        home.set_failover(replace(record, test=replace(record.test, removing=True)))
    folder = home.paths.test_lock.parent
    for name in home.files.names(folder):
        if name != home.paths.test_lock.name:
            home.files.unlink(folder / name)
    home.files.sync_directory(folder)
    with home.catalog.transaction():
        home.set_failover(replace(home.failover(), test=None))
    return True


@contextlib.contextmanager
def firedrill_lock(home: VmHome) -> Iterator[None]:
    """Be the only one who serves or removes the test failover. Raises: Locked."""
    with room(home.files, home.paths.folder):
        home.files.make_directory(home.paths.test_lock.parent)
        try:
            lock = home.files.lock(home.paths.test_lock)
        except Locked as error:
            error.hint = "end the process that serves the test failover"
            raise
    try:
        yield
    finally:
        lock.release()


def is_served(home: VmHome) -> bool:
    """Return whether a process serves the test failover now."""
    if not home.files.exists(home.paths.test_lock):
        return False
    try:
        home.files.lock(home.paths.test_lock, shared=True).release()
    except Locked:
        return True
    return False
