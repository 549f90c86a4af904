"""Ask the rule what becomes of a VM's points: of those in the catalog, and of those somebody reads now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.errors import Locked
from hvreplica.store.failover import pinned_points
from hvreplica.store.feeds import held_points
from hvreplica.store.keep_rule import parse_keep_rule
from hvreplica.store.points_kept import kept_points
from hvreplica.store.retention import Candidate, Retention, decide

if TYPE_CHECKING:
    import uuid
    from collections.abc import Container, Sequence

    from hvreplica.store.home import VmHome
    from hvreplica.store.policy import Policy
    from hvreplica.store.records import PointRow
    from hvreplica.store.retention import Verdict


def retention_of(policy: Policy) -> Retention:
    """Return what the policy asks of the rule. Raises: FieldOutOfRange for a rule that is none."""
    return Retention(
        recovery_points=policy.recovery_points,
        recovery_point_every_s=policy.recovery_point_every_s,
        keep=None if policy.keep is None else parse_keep_rule(policy.keep),
    )


def candidate(
    point: PointRow, *, used: Container[uuid.UUID] = (), held: Container[uuid.UUID] = ()
) -> Candidate:
    """Return a point as the rule looks at it."""
    return Candidate(
        id=point.id,
        sequence=point.sequence,
        instant_s=point.instant_s,
        kind=point.kind,
        consistency=point.consistency,
        is_damaged=point.state == "damaged",
        is_used=point.id in used,
        is_held=point.id in held,
    )


def is_used(home: VmHome, point_id: uuid.UUID) -> bool:
    """Return whether somebody has the point open now, or a failover rests on it."""
    if point_id in pinned_points(home.failover()):
        return True
    path = home.paths.use(point_id)
    if not home.files.exists(path):
        return False
    try:
        home.files.lock(path).release()
    except Locked:
        return True
    return False


def verdicts(home: VmHome, policy: Policy, *, coming: Candidate | None = None) -> list[Verdict]:
    """Return what becomes of each point of the VM, oldest first; those in use are found out where it matters.

    coming: a point that will be the newest one.
    """
    retention = retention_of(policy)
    has_budget = policy.budget_bytes is not None or policy.budget_percent is not None
    points, held = kept_points(home), held_points(home)
    used: set[uuid.UUID] = set()
    while True:
        known = [candidate(point, used=used, held=held) for point in points]
        found = decide(known if coming is None else [*known, coming], retention)
        asked = {
            verdict.point.id
            for verdict in found
            if not verdict.is_kept or (has_budget and verdict.budget_place)
        }
        more = {point_id for point_id in asked if is_used(home, point_id)}
        if not more:
            return found
        used |= more


def next_to_go(found: Sequence[Verdict]) -> Candidate | None:
    """Return the point that goes next over a budget; None where all that are left stay."""
    return next((verdict.point for verdict in found if verdict.budget_place == 1), None)
