"""A verb was given an instant: make the point that shows it, or find the one that an earlier call made.

    received ──> finish: what waits is applied, its logs are kept ──> make_point_at() ──> the verb goes on
                                                                                      with the point's id

The same instant is the same point, so a verb that was cut here, or later, is called again with the instant.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, NamedTuple

from hvreplica.errors import Locked, NoSuchPoint, StoreError
from hvreplica.store.apply import finish
from hvreplica.store.failover import may_apply
from hvreplica.store.instant import make_point_at
from hvreplica.store.instant_plan import plan_instant

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterator

    from hvreplica.progress import ProgressCallback
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import PointRow

WAIT_S = 60.0
_LOOK_EVERY_S = 0.1


class Instant(NamedTuple):
    """An instant that stands where a point may be named; Unix seconds, see make_point_at()."""

    unix_s: float


def reach(
    home: VmHome,
    instant: Instant,
    *,
    wait_s: float = WAIT_S,
    progress: ProgressCallback | None = None,
    check: Callable[[PointRow], None] | None = None,
) -> PointRow:
    """Return a point that shows the instant, durable. What was received and waits may hold it: it is applied
    first.

    check: called with the point that it is made from, whose disks it has, before it is made; may raise.
    Raises: as make_point_at(); Locked where the disks stay in use for longer than wait_s.
    """
    with exclusive_within(home, wait_s):
        if may_apply(home.failover()):
            finish(home, progress=progress)
        if check is not None:
            check(plan_instant(home, instant.unix_s).base)
        return make_point_at(home, instant.unix_s)


def shown_by(home: VmHome, instant: Instant, *point_ids: uuid.UUID | None) -> PointRow | None:
    """Return that of these points which an earlier call made, or found, for the instant; None for none.

    A point says the last moment that is known at or before an instant, so the way to it is planned again.
    """
    named = [row for each in point_ids if each is not None if (row := home.catalog.point(home.vm_id, each))]
    shown_s, base_id = instant.unix_s, None
    if named:
        with contextlib.suppress(NoSuchPoint, StoreError):  # its logs have gone since
            plan = plan_instant(home, instant.unix_s)
            shown_s, base_id = plan.instant_s, plan.base.id if plan.is_there else None
    return next((row for row in named if row.id == base_id or row.instant_s == shown_s), None)


@contextlib.contextmanager
def exclusive_within(home: VmHome, wait_s: float) -> Iterator[None]:
    """Hold the VM's disks; wait for a while for who holds them: an apply that is under way, or a reader."""
    deadline_s = home.clock.monotonic_s() + wait_s
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(home.exclusive())
                break
            except Locked as error:
                if home.clock.monotonic_s() >= deadline_s:
                    error.hint = "end what reads the VM's disks, then call this again; it goes on from here"
                    raise
            threading.Event().wait(_LOOK_EVERY_S)
        yield
