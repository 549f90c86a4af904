"""Find from which kept point, and over which kept logs, an instant between two cycles is reached.

Where that is none, the refusal names the nearest span of instants that can be had.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.clock import iso_time
from hvreplica.errors import NoSuchPoint, StoreError

if TYPE_CHECKING:
    import uuid

    from hvreplica.store.home import VmHome
    from hvreplica.store.records import KeptLogRow, PointRow


@dataclass(frozen=True, slots=True)
class Plan:
    """base: the kept point that the new one is made from. end: the point that the cycle wanted led to.

    before_id: the point that this cycle led from. logs: of all cycles from base on, oldest first.
    """

    instant_s: float
    base: PointRow
    end: PointRow
    before_id: uuid.UUID
    logs: list[KeptLogRow]

    def logs_of(self, disk_index: int) -> list[KeptLogRow]:
        """Return those of one disk, oldest first."""
        return [row for row in self.logs if row.disk_index == disk_index]


@dataclass(frozen=True, slots=True)
class _Known:
    """What the catalog says. logs: those that are kept, by the point that they led to."""

    home: VmHome
    points: list[PointRow]
    logs: dict[uuid.UUID, list[KeptLogRow]]
    instant_s: float

    def before(self, end: PointRow) -> PointRow | None:
        """Return the point that a cycle led from."""
        return next((point for point in self.points if point.id == end.previous_id), None)

    def start_of(self, before: PointRow) -> float:
        """Return when a cycle began that led from this point.

        A point that was made here shows an older instant than that: of a failover to it, or of a way back.
        """
        return max(before.instant_s, before.received_s) if before.kind == "manual" else before.instant_s

    def refuse(self, sentence: str, *, hint: str = "") -> NoSuchPoint:
        """Return the error that says why the VM cannot go to the instant, and where it can."""
        return NoSuchPoint(
            f"VM {self.home.name!r} cannot go to {iso_time(self.instant_s)}: {sentence}",
            path=self.home.paths.folder,
            field="instant",
            actual=iso_time(self.instant_s),
            hint=hint or self.nearest(),
        )

    def nearest(self) -> str:
        """Return what can be had instead: the nearest span of instants, or points."""
        spans = _spans(self)
        if not spans:
            return "choose one of the points, see `point list`"
        first, last = min(spans, key=lambda span: max(span[0] - self.instant_s, self.instant_s - span[1]))
        return f"the nearest that can be had are {iso_time(first)} to {iso_time(last)}; see also `point list`"


def plan_instant(home: VmHome, instant_s: float) -> Plan:
    """Return the way to an instant. Raises: NoSuchPoint, StoreError: see make_point_at()."""
    with home.catalog.snapshot():
        points = home.catalog.points(home.vm_id, superseded=True)
        logs: dict[uuid.UUID, list[KeptLogRow]] = {}
        for row in home.catalog.kept_logs(home.vm_id):
            logs.setdefault(row.point_id, []).append(row)
        known = _Known(home, points, logs, instant_s)
        end, before = _find_cycle(known)
        plan = _walk_back(known, end, before.id)
        _require_one_shape(known, plan)
        for row in logs[end.id]:
            if not row.is_ordered:
                raise StoreError(
                    f"the log of disk {row.disk_index} of the cycle up to {iso_time(end.instant_s)} does not"
                    " hold each write in the order of the guest's writes",
                    path=home.paths.folder,
                    field="instant",
                    actual=iso_time(instant_s),
                    hint="ranges were read from the disk for it: let `capture --keep-logs` run, with a log"
                    f" budget that is enough; {known.nearest()}",
                )
    return plan


def _find_cycle(known: _Known) -> tuple[PointRow, PointRow]:
    """Return the newest cycle that has the instant in it: the point that it led to, and that it led from."""
    for end in reversed(known.points):
        if end.applied_s is not None and end.id in known.logs:
            before = known.before(end)
            if before is not None and known.start_of(before) <= known.instant_s <= end.instant_s:
                return end, before
    raise _outside(known)


def _outside(known: _Known) -> NoSuchPoint:
    ends = [point for point in known.points if point.id in known.logs]
    if not ends:
        return known.refuse(
            "no logs are kept", hint="ask for them with --keep-logs; they are kept from then on"
        )
    starts = [known.start_of(before) for before in map(known.before, ends) if before is not None]
    first_s, last_s = min(starts, default=ends[0].instant_s), max(end.instant_s for end in ends)
    if first_s <= known.instant_s <= last_s:
        return known.refuse("the log of that cycle is not kept")
    return known.refuse(f"logs are kept from {iso_time(first_s)} to {iso_time(last_s)}")


def _walk_back(known: _Known, end: PointRow, before_id: uuid.UUID) -> Plan:
    """Go back over kept logs to the newest kept point on the way."""
    found: list[KeptLogRow] = []
    at = end
    for _ in known.points:  # at most so many steps
        before = known.before(at)
        if before is None or at.id not in known.logs:
            break
        found = known.logs[at.id] + found
        made = [point for point in known.points if _is_made_in(known, point, before, at)]
        if made:
            return Plan(known.instant_s, made[-1], end, before_id, found)
        if before.is_kept:
            return Plan(known.instant_s, before, end, before_id, found)
        at = before
    raise known.refuse("no point before it is kept that the kept logs lead on from")


def _is_made_in(known: _Known, point: PointRow, before: PointRow, end: PointRow) -> bool:
    """Return whether a kept point was made in this cycle, by an earlier call, of this instant or before."""
    return (
        point.is_kept
        and point.kind == "manual"
        and point.id not in known.logs
        and point.previous_id == before.id
        and point.id != end.id
        and before.instant_s < point.instant_s <= known.instant_s
        and before.sequence < point.sequence < end.sequence
    )


def _spans(known: _Known) -> list[tuple[int, int]]:
    """Return the spans of whole seconds that can be had, oldest first, those that meet as one."""
    home = known.home
    spans: list[tuple[int, int]] = []
    reached: dict[uuid.UUID, dict[int, int]] = {}  # by point: the disks of the point that its logs lead from
    for end in known.points:
        before = known.before(end)
        if before is None or end.applied_s is None or end.id not in known.logs:
            continue
        start_s, disks = known.start_of(before), reached.get(before.id)
        if before.is_kept:
            disks = home.catalog.members(home.vm_id, before.id)
        if disks is None:
            continue
        if disks == home.catalog.members(home.vm_id, end.id):
            reached[end.id] = disks
            first, last = math.ceil(start_s), math.floor(end.instant_s)
            if first <= last and all(row.is_ordered for row in known.logs[end.id]):
                meets = bool(spans) and spans[-1][1] in {first, first - 1}
                spans[-1:] = [(spans[-1][0], last)] if meets else [*spans[-1:], (first, last)]
    return spans


def _require_one_shape(known: _Known, plan: Plan) -> None:
    """Refuse cycles in which disks were added, removed or resized: nobody knows when that was."""
    home = known.home
    members = home.catalog.members(home.vm_id, plan.base.id)
    for point_id in {row.point_id for row in plan.logs}:
        if home.catalog.members(home.vm_id, point_id) != members:
            raise StoreError(
                f"disks of VM {home.name!r} were added, removed or resized on the way to the instant",
                path=home.paths.folder,
                hint=known.nearest(),
            )
