"""Find from which kept point, and over which kept logs, an instant between two cycles is reached.

Where that is none, the refusal names the nearest span of instants that can be had.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.clock import instant_time, iso_time
from hvreplica.errors import NoSuchPoint, StoreError
from hvreplica.store.kept_times import times_of
from hvreplica.store.moment import SECOND_US, Moment, choose_moment, micros, reach_us, second_of

if TYPE_CHECKING:
    import uuid

    from hvreplica.store.home import VmHome
    from hvreplica.store.records import KeptLogRow, PointRow


@dataclass(frozen=True, slots=True)
class Plan:
    """base: the kept point that the new one is made from. end: the point that the cycle wanted led to.

    before_id: the point that this cycle led from. logs: of all cycles from base on, oldest first. instant_s:
    what the new point is to say that it shows. moment: what it has of the last cycle. is_coarse: whether the
    parts of seconds were wanted and are not known.
    """

    instant_s: float
    base: PointRow
    end: PointRow
    before_id: uuid.UUID
    logs: list[KeptLogRow]
    moment: Moment
    is_coarse: bool = False

    @property
    def is_there(self) -> bool:
        """Whether the point to begin with is what is wanted."""
        same = reach_us(self.base.instant_s, self.base.kind) == self.moment.time_us
        return same or (self.base.id == self.before_id and self.moment.entry_count == 0)

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

    @property
    def reach_us(self) -> int:
        """The last microsecond that is wanted: a whole second stands for all of it."""
        return reach_us(self.instant_s)

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
            f"VM {self.home.name!r} cannot go to {instant_time(self.instant_s)}: {sentence}",
            path=self.home.paths.folder,
            field="instant",
            actual=instant_time(self.instant_s),
            hint=hint or self.nearest(),
        )

    def nearest(self) -> str:
        """Return what can be had instead: the nearest span of instants, or points."""
        spans = _spans(self)
        if not spans:
            return "choose one of the points, see `point list`"
        first, last = min(spans, key=lambda span: max(span[0] - self.instant_s, self.instant_s - span[1]))
        span = f"{instant_time(first)} to {instant_time(last)}"
        return f"the nearest that can be had are {span}; see also `point list`"


def plan_instant(home: VmHome, instant_s: float, *, flush: bool = False) -> Plan:
    """Return the way to an instant. For arguments and errors see make_point_at()."""
    with home.catalog.snapshot():
        known = _known(home, instant_s)
        end, before = _find_cycle(known)
        if flush:
            plan = _plan_flush(known, end, before)
        elif micros(instant_s) % SECOND_US:
            plan = _plan_fine(known, end, before)
        else:
            plan = _walk_back(known, end, before, Moment(reach_us(instant_s), None), instant_s)
        _require_one_shape(known, plan)
    _require_order(known, plan.end)
    return plan


def kept_cycles(home: VmHome) -> list[tuple[float, PointRow, list[KeptLogRow]]]:
    """Return of each cycle whose logs are kept when it began, the point that it led to, and the logs."""
    known = _known(home, 0.0)
    cycles = [(known.before(end), end) for end in known.points if end.applied_s is not None]
    return [
        (known.start_of(before), end, known.logs[end.id])
        for before, end in cycles
        if before is not None and end.id in known.logs
    ]


def _known(home: VmHome, instant_s: float) -> _Known:
    logs: dict[uuid.UUID, list[KeptLogRow]] = {}
    for row in home.catalog.kept_logs(home.vm_id):
        logs.setdefault(row.point_id, []).append(row)
    return _Known(home, home.catalog.points(home.vm_id, superseded=True), logs, instant_s)


def _plan_fine(known: _Known, end: PointRow, before: PointRow) -> Plan:
    """Plan the last moment that is known at or before the wanted one; by whole seconds where no part is."""
    rows, wanted_us, began_us = known.logs[end.id], micros(known.instant_s), micros(known.start_of(before))
    times = times_of(known.home, rows)
    moment = second_of(wanted_us) if times is None else choose_moment(times, wanted_us)
    assert moment is not None
    if moment.time_us <= began_us:
        began_us += began_us % SECOND_US == 0  # a whole second would stand for all of it
        moment = Moment(began_us, {row.log_id: 0 for row in rows})
    return _walk_back(known, end, before, moment, moment.time_us / SECOND_US, is_coarse=times is None)


def _plan_flush(known: _Known, end: PointRow, before: PointRow) -> Plan:
    """Plan the last flush of the guest at or before the wanted moment, in this cycle or an earlier one."""
    wanted_us = known.reach_us
    for _ in known.points:  # at most so many steps
        rows = known.logs[end.id]
        times = times_of(known.home, rows) if all(row.is_ordered for row in rows) else None
        moment = None if times is None else choose_moment(times, wanted_us, flush=True)
        if moment is not None:
            return _walk_back(known, end, before, moment, moment.time_us / SECOND_US)
        earlier = known.before(before)
        if earlier is None or before.id not in known.logs:
            break
        end, before = before, earlier
    raise known.refuse(
        "no flush of the guest is known until then",
        hint="without --flush the last state is taken that is known; `capture --keep-logs` notes flushes",
    )


def _require_order(known: _Known, end: PointRow) -> None:
    for row in known.logs[end.id]:
        if not row.is_ordered:
            raise StoreError(
                f"the log of disk {row.disk_index} of the cycle up to {iso_time(end.instant_s)} does not hold"
                " each write in the order of the guest's writes",
                path=known.home.paths.folder,
                field="instant",
                actual=instant_time(known.instant_s),
                hint="ranges were read from the disk for it: let `capture --keep-logs` run, with a log budget"
                f" that is enough; {known.nearest()}",
            )


def _find_cycle(known: _Known) -> tuple[PointRow, PointRow]:
    """Return the newest cycle that has the instant in it: the point that it led to, and that it led from.

    Of a second as a whole, in which a cut may lie, it is the cycle that has its end.
    """
    for end in reversed(known.points):
        if end.applied_s is not None and end.id in known.logs:
            before = known.before(end)
            if before is not None and micros(known.start_of(before)) <= known.reach_us <= micros(
                end.instant_s
            ):
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
    if micros(last_s) < known.reach_us and known.instant_s <= last_s:
        return known.refuse(f"that second was received up to {instant_time(last_s)} alone")
    if first_s <= known.instant_s <= last_s:
        return known.refuse("the log of that cycle is not kept")
    return known.refuse(f"logs are kept from {iso_time(first_s)} to {iso_time(last_s)}")


def _walk_back(
    known: _Known,
    end: PointRow,
    before: PointRow,
    moment: Moment,
    instant_s: float,
    *,
    is_coarse: bool = False,
) -> Plan:
    """Go back over kept logs to the newest kept point on the way."""
    found: list[KeptLogRow] = []
    first, at = before, end
    for _ in known.points:  # at most so many steps
        led_from = known.before(at)
        if led_from is None or at.id not in known.logs:
            break
        found = known.logs[at.id] + found
        made = [point for point in known.points if _is_made_in(known, point, led_from, at, moment)]
        if made or led_from.is_kept:
            base = made[-1] if made else led_from
            return Plan(instant_s, base, end, first.id, found, moment, is_coarse)
        at = led_from
    raise known.refuse("no point before it is kept that the kept logs lead on from")


def _is_made_in(known: _Known, point: PointRow, before: PointRow, end: PointRow, moment: Moment) -> bool:
    """Return whether a kept point was made in this cycle, by an earlier call, of this moment or before."""
    return (
        point.is_kept
        and point.kind == "manual"
        and point.id not in known.logs
        and point.previous_id == before.id
        and point.id != end.id
        and micros(known.start_of(before)) <= reach_us(point.instant_s) <= moment.time_us
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
            first, last = math.floor(start_s), (micros(end.instant_s) + 1) // SECOND_US - 1
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
