"""What a policy makes of a VM's points, before it does: the preview, and the policy as it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hvreplica.store.budget import budget_limit, budget_warning, used_bytes
from hvreplica.store.points_kept import kept_points
from hvreplica.store.policy import Policy  # noqa: TC001 - msgspec resolves the annotations at run time
from hvreplica.store.verdicts import next_to_go, verdicts

if TYPE_CHECKING:
    from hvreplica.store.home import VmHome


class PlannedPoint(msgspec.Struct, frozen=True):
    """What becomes of one point. instant_s: Unix seconds. bytes: length of the files that keep it alone.

    keep: whether it stays. reasons: why; empty for one that goes. budget_place: 1 for the point that goes
    first where older points take more than their budget, 0 for one that never does or goes anyway.
    """

    id: str
    instant_s: float
    kind: str
    consistency: str
    state: str
    keep: bool
    reasons: list[str]
    budget_place: int
    bytes: int


class PointPlan(msgspec.Struct, frozen=True):
    """A policy and what it makes of a VM's points, oldest first.

    budget_bytes: the budget as it is now, None where there is none. used_bytes: what older points take.
    warning: what the budget makes go next, a sentence.
    """

    vm: str
    policy: Policy
    budget_bytes: int | None
    used_bytes: int
    warning: str | None
    points: list[PlannedPoint]


def plan_points(home: VmHome, policy: Policy) -> PointPlan:
    """Return what the policy makes of the VM's points now; nothing is changed."""
    found = verdicts(home, policy)
    states = {point.id: point.state for point in kept_points(home)}
    own_bytes: dict[object, int] = {}
    for row in home.catalog.undo_rows(home.vm_id):
        own_bytes[row.point_id] = own_bytes.get(row.point_id, 0) + row.file_bytes
    return PointPlan(
        vm=home.name,
        policy=policy,
        budget_bytes=budget_limit(home, policy),
        used_bytes=used_bytes(home),
        warning=budget_warning(home, policy, next_to_go(found)),
        points=[
            PlannedPoint(
                id=str(verdict.point.id),
                instant_s=verdict.point.instant_s,
                kind=verdict.point.kind,
                consistency=verdict.point.consistency,
                state=states.get(verdict.point.id, "complete"),
                keep=verdict.is_kept,
                reasons=list(verdict.reasons),
                budget_place=verdict.budget_place,
                bytes=own_bytes.get(verdict.point.id, 0),
            )
            for verdict in found
        ],
    )
