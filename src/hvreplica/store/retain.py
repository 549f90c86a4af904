"""Let points go that the VM's policy does not keep, keep their parts few, and hold the budget.

    after each applied point   rule: what decide() does not keep goes, the oldest first
                               logs: those that were kept long enough go, see store/kept_logs.py
                               parts: those of each point that have become many are written as one
                               budget: while more is used than allowed, the first in decide()'s order goes,
                               see store/budget.py

Nothing goes silently: each point that goes is logged and returned, to be told to the primary. Before one goes
for the budget, a warning says so; only a cycle that brings more than was left may be faster than it. What
cannot be done now (a point that is read, a part that is damaged, no room for a new part) is left for the next
time and never fails the cycle.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from hvreplica.clock import iso_time
from hvreplica.errors import HvReplicaError, StoreError
from hvreplica.store.budget import budget_limit, budget_warning, used_bytes
from hvreplica.store.compact_parts import Compacted, compact_parts
from hvreplica.store.kept_logs import expire_kept
from hvreplica.store.part_plan import choose_merge
from hvreplica.store.points_kept import drop_point, kept_points, require_droppable
from hvreplica.store.policy import policy_of
from hvreplica.store.press import press_parts
from hvreplica.store.verdicts import candidate, next_to_go, verdicts
from hvreplica.units import format_size

if TYPE_CHECKING:
    import uuid
    from collections.abc import Sequence

    from hvreplica.store.home import VmHome
    from hvreplica.store.policy import Policy
    from hvreplica.store.retention import Candidate

_LOG = logging.getLogger("hvreplica.serve")


class GonePoint(msgspec.Struct, frozen=True):
    """A point that was let go. instant_s: the time it showed, Unix seconds. reason: a sentence."""

    id: str
    instant_s: float
    kind: str
    consistency: str
    reason: str


class Retained(msgspec.Struct, frozen=True):
    """What retain() did. gone: in the order in which they went. warning: what the budget makes go next."""

    gone: list[GonePoint] = []
    warning: str | None = None


def retain(home: VmHome) -> Retained:
    """Do what the policy asks after the disks have moved on; return the points that went.

    Never raises for what can be left for the next time. Raises: FieldOutOfRange for a rule that is none.
    """
    policy = policy_of(home)
    left, home.left = home.left, []
    gone = [_told(home, candidate(point), "the next point took its place") for point in left]
    for verdict in verdicts(home, policy):
        if not verdict.is_kept:
            gone += _let_go(home, verdict.point, "no rule keeps it")
    expire_kept(home, policy)
    compact_many(home)
    gone += _hold_budget(home, policy)
    return Retained(gone, _warn(home, policy))


def _hold_budget(home: VmHome, policy: Policy) -> list[GonePoint]:
    limit_bytes = budget_limit(home, policy)
    if limit_bytes is None:
        return []
    gone: list[GonePoint] = []
    if used_bytes(home) > limit_bytes:
        press_parts(home)  # what shrinks need not go
    while (taken_bytes := used_bytes(home)) > limit_bytes:
        point = next_to_go(verdicts(home, policy))
        if point is None:
            break
        reason = f"points take {format_size(taken_bytes)}, the budget is {format_size(limit_bytes)}"
        told = _let_go(home, point, reason, merge=True)  # the next look counts what it frees
        if not told:
            break
        gone += told
    return gone


def let_go(home: VmHome, point_id: uuid.UUID, *, merge: bool = False) -> Compacted:
    """Drop a point, and write without its dead bytes what its heirs inherit, where that is worth it.

    Writes no more than the point's own parts cover. merge: write as one what has become many, however much
    that is; else compact_many() does it, after the next cycle. Raises: as drop_point().
    """
    catalog, vm_id = home.catalog, home.vm_id
    heirs = {index: catalog.heir(vm_id, point_id, index) for index in catalog.members(vm_id, point_id)}
    own = dict.fromkeys(heirs, 0)
    for row in catalog.undo_rows(vm_id, point_id=point_id):
        own[row.disk_index] = own.get(row.disk_index, 0) + row.covered_bytes
    drop_point(home, point_id)
    done = Compacted()
    for disk_index, heir in heirs.items():
        if heir is not None and own[disk_index]:
            bytes_max = None if merge else own[disk_index]
            done = done.plus(_compact(home, heir, disk_index, look=True, bytes_max=bytes_max))
    return done


def delete_points(home: VmHome, point_ids: Sequence[uuid.UUID]) -> list[GonePoint]:
    """Drop points that a person named; durable on return.

    Nothing is done unless all of them can go. Raises: NoSuchPoint, InvalidTransition for the newest one,
    PointInUse, StoreFull.
    """
    for point_id in point_ids:
        require_droppable(home, point_id)
    gone = []
    for point in kept_points(home):
        if point.id in point_ids:
            let_go(home, point.id, merge=len(point_ids) > 1)
            gone.append(_told(home, candidate(point), "a person deleted it"))
    return gone


def compact_many(home: VmHome) -> Compacted:
    """Write parts as one where a point has many of a disk."""
    sizes: dict[tuple[uuid.UUID, int], list[int]] = {}
    for row in home.catalog.undo_rows(home.vm_id):
        sizes.setdefault((row.point_id, row.disk_index), []).append(row.covered_bytes)
    done = Compacted()
    for (point_id, disk_index), covered in sizes.items():
        if choose_merge(covered) is not None:
            done = done.plus(_compact(home, point_id, disk_index, look=False))
    return done


def _warn(home: VmHome, policy: Policy) -> str | None:
    if budget_limit(home, policy) is None:
        return None
    following = next_to_go(verdicts(home, policy))
    warning = budget_warning(home, policy, following)
    told = None if warning is None or following is None else following.id
    if warning is not None and home.warned_of != (told,):  # once for each point, not at each cycle
        _LOG.warning("VM %r: %s", home.name, warning)
    home.warned_of = None if warning is None else (told,)
    return warning


def _let_go(home: VmHome, point: Candidate, reason: str, *, merge: bool = False) -> list[GonePoint]:
    """Drop a point and tell; an empty list where it cannot go now."""
    try:
        let_go(home, point.id, merge=merge)
    except (StoreError, OSError) as error:
        _LOG.warning("VM %r: point %s stays for now: %s", home.name, point.id, error)
        return []
    return [_told(home, point, reason)]


def _told(home: VmHome, point: Candidate, reason: str) -> GonePoint:
    told = GonePoint(str(point.id), point.instant_s, point.kind, point.consistency, reason)
    _LOG.info("VM %r: point %s of %s went: %s", home.name, told.id, iso_time(told.instant_s), reason)
    return told


def _compact(
    home: VmHome, point_id: uuid.UUID, disk_index: int, *, look: bool, bytes_max: int | None = None
) -> Compacted:
    try:
        with home.exclusive():
            return compact_parts(home, point_id, disk_index, look=look, bytes_max=bytes_max)
    except (HvReplicaError, OSError) as error:
        _LOG.warning("VM %r: undo parts of point %s stay as they are: %s", home.name, point_id, error)
        return Compacted()
