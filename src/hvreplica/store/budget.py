"""How much room older points may take, how much they take, and the warning before one goes for it.

The budget is a number of bytes, or a percentage of what the VM's disks take in the store. Counted are the
files of undo parts and of replaced disks, without the holes in them. From WARNING_SHARE of it on, and where a
cycle like the last one would go beyond it, a warning names the point that goes next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.clock import iso_time
from hvreplica.store.points_kept import kept_points, part_path
from hvreplica.units import format_size

if TYPE_CHECKING:
    from hvreplica.store.home import VmHome
    from hvreplica.store.policy import Policy
    from hvreplica.store.records import UndoRow
    from hvreplica.store.retention import Candidate

WARNING_SHARE = 0.8


def budget_limit(home: VmHome, policy: Policy) -> int | None:
    """Return the bytes that older points may take; None where nobody bounds them."""
    limits = []
    if policy.budget_bytes is not None:
        limits.append(policy.budget_bytes)
    if policy.budget_percent is not None:
        disks_bytes = sum(row.file_bytes or 0 for row in home.catalog.disks(home.vm_id))
        limits.append(int(disks_bytes * policy.budget_percent / 100))
    return min(limits, default=None)


def used_bytes(home: VmHome) -> int:
    """Return the bytes that the files of older points take; holes in them take nothing."""
    return sum(held_bytes(home, row) for row in home.catalog.undo_rows(home.vm_id))


def held_bytes(home: VmHome, row: UndoRow) -> int:
    """Return what one part's file takes; its length where the file is not there. A part never changes."""
    known = home.part_bytes.get(row.id)
    if known is None:
        try:
            file = home.files.open(part_path(home, row))
        except FileNotFoundError:
            return row.file_bytes
        try:
            known = sum(length for _, length in file.data_extents(0, file.size()))
        finally:
            file.close()
        home.part_bytes[row.id] = known
    return known


def budget_warning(home: VmHome, policy: Policy, following: Candidate | None) -> str | None:
    """Return the sentence that warns of what the budget makes go next; None while it is far away.

    following: the point that goes next, None where all that are left stay.
    """
    limit_bytes = budget_limit(home, policy)
    if limit_bytes is None:
        return None
    rows = home.catalog.undo_rows(home.vm_id)
    if sum(row.file_bytes for row in rows) < WARNING_SHARE * limit_bytes - _last_bytes(home, rows):
        return None  # without a look at the files
    taken_bytes = used_bytes(home)
    if taken_bytes < WARNING_SHARE * limit_bytes and taken_bytes + _last_bytes(home, rows) <= limit_bytes:
        return None
    share = f"older points take {format_size(taken_bytes)} of the {format_size(limit_bytes)} they may take"
    if following is None:
        return f"{share}, and none may go: they are the newest, manual or in use"
    return f"{share}; the next to go is {following.id} of {iso_time(following.instant_s)}"


def _last_bytes(home: VmHome, rows: list[UndoRow]) -> int:
    """Return what the newest older point needed: about what the next cycle will need."""
    by_point: dict[object, int] = {}
    for row in rows:
        by_point[row.point_id] = by_point.get(row.point_id, 0) + row.file_bytes
    return next((by_point[point.id] for point in reversed(kept_points(home)) if point.id in by_point), 0)
