"""The disks of an extended replication: those of the newest point of a store's VM, opened for each cycle.

    store of this site                          further site
    S ── … ── N (newest)                        S', shows the instant of S
    └─ parts ─┘ what may differ: compared       └─ one log ──> N'

No lock of the store is needed: a point is a view that stays what it is while newer ones are applied. The
point that is read cannot go meanwhile; the one that was shipped last is held beyond that by a note in the
store, so that the next cycle knows where it has to look.
"""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.extents import merge, widened
from hvreplica.errors import Fenced, FormatError, InvalidTransition, LogError, StoreError
from hvreplica.replication.origin import Origin
from hvreplica.replication.shape import follow_point
from hvreplica.store.failover import describe, is_frozen
from hvreplica.store.feeds import Feed, read_feed, write_feed
from hvreplica.store.open_point import LATEST, open_point
from hvreplica.store.points_kept import kept_points
from hvreplica.store.since import written_between

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

    from hvreplica.formats.messages import Consistency
    from hvreplica.replication.state import PrimaryState
    from hvreplica.replication.work import Work
    from hvreplica.store.home import VmHome
    from hvreplica.store.open_point import OpenPoint

_FENCED_HINT = (
    "where the VM was failed over to the further site, this goes on by itself after `hvreplica failover"
    " cancel` there; where another primary has it, `hvreplica extend --once --takeover` takes it over"
)
_LOG = logging.getLogger("hvreplica.replicate")


class ExtendedSource:
    """Opens the VM's newest point for each cycle. One owner thread.

    home: of the VM. hold_s: how long the store keeps what was shipped last for the next cycle, 0 for not at
    all. has_more: whether the point has disks that the cycle left for the next one.
    """

    def __init__(self, home: VmHome, *, store: Path, hold_s: float) -> None:
        self.home = home
        self._store = store
        self._hold_s = hold_s
        self.has_more = False

    @contextlib.contextmanager
    def opened(self, work: Work) -> Iterator[None]:
        """Let the disks of `work` be those of the newest point while the block runs.

        Raises: InvalidTransition while the VM is failed over to this site, StoreError for a damaged point,
        NoSuchPoint; as open_point().
        """
        require_replica(self.home)
        with open_point(self.home, LATEST) as point:
            require_replica(self.home)  # the point is none that a failover has made, and may take back
            self._require_newest(point)
            for index, disk in point.disks.items():
                disk.path = self.home.paths.disk(index)  # what it is called in answers and in the state
            with work.lock:
                work.disks = follow_point(work.state, point.disks, work.folder.folder)
                work.state.store = str(self._store)
                work.origin = self._origin(point)
                work.save()
            self.has_more = len(work.disks) < len(point.disks)
            self._note(work, _shipped(work.state) | {point.id})
            try:
                yield
            except BaseException as error:
                self._note(work, _shipped(work.state))
                if isinstance(error, Fenced):
                    error.hint = _FENCED_HINT
                raise
            else:
                self._note(work, _shipped(work.state), is_renewed=True)
            finally:
                work.close_tables()
                work.disks, work.origin = [], None

    def _require_newest(self, point: OpenPoint) -> None:
        """Refuse to go back to an older point where the newest one is damaged. Raises: StoreError."""
        newest = kept_points(self.home)[-1]
        if newest.state == "damaged" and newest.sequence > point.row.sequence:
            raise StoreError(
                f"the newest point of VM {self.home.name!r} is damaged: {newest.damage}",
                path=self.home.paths.folder,
                hint="the primary's next `replicate` mends it, or brings a newer one",
            )

    def _origin(self, point: OpenPoint) -> Origin:
        row = point.row
        consistency: Consistency = "app" if row.consistency == "app" else "crash"
        return Origin(row.id, row.instant_s, consistency, partial(changed_since, self.home, point))

    def _note(self, work: Work, points: set[uuid.UUID], *, is_renewed: bool = False) -> None:
        """Have the store hold these points; durable on return, and no reason to fail."""
        relationship_id, now_s = work.state.relationship_id, work.clock.now_s()
        known = read_feed(self.home, relationship_id)
        renewed_s = now_s if is_renewed or known is None else known.renewed_s
        feed = Feed(work.required_link.address, sorted(points), renewed_s, self._hold_s)
        if feed == known or (known is None and not self._hold_s):
            return
        try:
            write_feed(self.home, relationship_id, feed)
        except OSError as error:
            _LOG.warning("the point that was shipped last may go before the next cycle: %s", error)


def changed_since(
    home: VmHome, point: OpenPoint, shipped: uuid.UUID, disk_index: int
) -> npt.NDArray[np.int64] | None:
    """Return where alone a disk of `point` may differ from what the point `shipped` holds of it.

    int64 (n, 2), sorted, disjoint, in whole grains of 4 KiB; what only `point` has is among it. None where
    nothing tells: the point is gone, or the disk was replaced, or a part is damaged.
    """
    try:
        rows = written_between(home, shipped, point.id, disk_index)
    except (FormatError, LogError) as error:
        _LOG.warning("the whole disk %d is compared: %s", disk_index, error)
        return None
    if rows is None:
        _LOG.info("the whole disk %d is compared: nothing tells what changed since %s", disk_index, shipped)
        return None
    disk_bytes = point.disks[disk_index].virtual_bytes
    held_bytes = home.catalog.members(home.vm_id, shipped).get(disk_index)
    if held_bytes is None:  # the point has gone since
        return None
    grown = np.array([[held_bytes, max(disk_bytes - held_bytes, 0)]], np.int64)
    rows = np.concatenate((rows, grown))
    return widened(merge(rows[rows[:, 0] < disk_bytes]), start=0, end=disk_bytes)


def require_replica(home: VmHome) -> None:
    """Refuse a VM whose replica here is none now. Raises: InvalidTransition, StoreError."""
    record = home.failover()
    if not is_frozen(record):
        return
    hint = "after `hvreplica failover cancel`, or once the VM is a replica here again, this goes on by itself"
    if record.mode == "Primary":
        hint = (
            "its points end here as long as it runs here: replicate its active disks to the further site with"
            " `hvreplica replicate --takeover`, and a state folder of their own"
        )
    raise InvalidTransition(
        f"VM {home.name!r} is {describe(record)} at this site: its replica is no copy of what runs",
        path=home.paths.folder,
        field="state",
        actual=describe(record),
        hint=hint,
    )


def _shipped(state: PrimaryState) -> set[uuid.UUID]:
    """Return the points that the further site has, or will have by what waits to be shipped."""
    waiting = [] if state.transfer is None else [state.transfer.source_point]
    return {point_id for point_id in (state.source_point, *waiting) if point_id is not None}
