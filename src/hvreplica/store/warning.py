"""What needs somebody before it hurts: the budget of older points, and room in the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.store.budget import budget_limit, budget_warning
from hvreplica.store.policy import policy_of
from hvreplica.store.verdicts import next_to_go, verdicts
from hvreplica.units import format_size

if TYPE_CHECKING:
    from hvreplica.store.home import VmHome


def point_warning(home: VmHome) -> tuple[str, str | None] | None:
    """Return what warns of a point that goes next for the budget, and its id; None while there is nothing."""
    policy = policy_of(home)
    if budget_limit(home, policy) is None:
        return None
    following = next_to_go(verdicts(home, policy))
    warning = budget_warning(home, policy, following)
    return None if warning is None else (warning, None if following is None else str(following.id))


def room_warning(home: VmHome) -> str | None:
    """Return what says that replication waits, or is about to wait, for room; None while there is enough.

    Applying a log takes about its length for what it overwrites, and at most as much again in the disk.
    """
    catalog, vm_id = home.catalog, home.vm_id
    waiting = [point for point in catalog.points(vm_id) if point.state in {"spooled", "applying"}]
    needed_bytes = sum(2 * point.bytes for point in waiting)
    transfer = catalog.transfer(vm_id, "logs")
    if transfer is not None:
        needed_bytes += sum(log.log_bytes for log in transfer.logs) - sum(transfer.positions.values())
    free_bytes = home.files.free_bytes(home.parts.root)
    if not needed_bytes or needed_bytes <= free_bytes:
        return None
    return (
        f"replication may wait for room: what was received and is on its way takes up to"
        f" {format_size(needed_bytes)}, {format_size(free_bytes)} are free"
    )
