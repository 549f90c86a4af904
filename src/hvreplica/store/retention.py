"""Which recovery points are kept, for what reason, and which go first: a pure function of the points.

A point is kept if any of these says so; what none of them keeps goes at once.

    newest            always
    manual            always: a person made it, a person deletes it
    in use            while somebody has it open
    held              while the next cycle to a further site needs it; the budget does not mind
    recovery points N one point of the newest point's own period and of each of N periods before; a period of
                      0 makes each point one. This is Hyper-V's surface: N of 0 to 24, one each hour.
    last N            the N newest points
    hourly, daily, weekly N   one point of each of the N newest hours, days, weeks that have points
    app-consistent N  the N newest points that a guest's agent made application-consistent

The one point of a period is the newest application-consistent one, where there is none the newest. Hours,
days and weeks (from Monday) are of UTC. Only periods that have points count, so that nothing goes because
time has passed while no point came. Damaged points take nobody's place: they are kept where the rule would
keep them, beside the whole ones that it keeps without them. Manual ones take none either: they stay anyway.

Points count in the order in which they were made, not by their times: a primary whose clock was set back
loses nothing. Applying the rule after each point gives what applying it once at the end gives, so a point
that goes would not have been wanted later; the tests hold that.

Over a budget further points go, one at a time, in this order: damaged ones, then crash-consistent ones, then
application-consistent ones; the oldest of a kind first, because nothing older needs its data. The newest,
manual ones and those in use never go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.clock import iso_time
from hvreplica.store.keep_rule import KeepRule

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterable, Sequence

_HOUR_S = 3600
_DAY_S = 24 * _HOUR_S
_WEEK_S = 7 * _DAY_S
_FIRST_MONDAY_S = 4 * _DAY_S  # 1970-01-01 was a Thursday
RECOVERY_POINTS_MAX = 24  # what Hyper-V allows


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the rule looks at of a point that can be had, or that is damaged. instant_s: Unix seconds."""

    id: uuid.UUID
    sequence: int
    instant_s: float
    kind: str = "standard"
    consistency: str = "crash"
    is_damaged: bool = False
    is_used: bool = False
    is_held: bool = False


@dataclass(frozen=True, slots=True)
class Retention:
    """What is asked for. Without recovery_points and keep, all points are kept."""

    recovery_points: int | None = None
    recovery_point_every_s: float = _HOUR_S
    keep: KeepRule | None = None

    @property
    def keeps_all(self) -> bool:
        """Whether no rule lets any point go."""
        return self.recovery_points is None and self.keep is None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a point. reasons: why it is kept; empty for one that goes.

    budget_place: 1 for the one that goes first over a budget; 0 for one that never does, and for one that
    goes anyway.
    """

    point: Candidate
    reasons: tuple[str, ...]
    budget_place: int = 0

    @property
    def is_kept(self) -> bool:
        """Whether the point stays."""
        return bool(self.reasons)


def decide(points: Iterable[Candidate], retention: Retention) -> list[Verdict]:
    """Return what becomes of each point, oldest first."""
    newest_first = sorted(points, key=lambda point: point.sequence, reverse=True)
    reasons: dict[int, list[str]] = {point.sequence: _always(point) for point in newest_first}
    if newest_first:
        reasons[newest_first[0].sequence].insert(0, "newest")
    ruled = [
        point for point in newest_first if point.kind != "manual"
    ]  # those stay anyway, and take no place
    whole = [point for point in ruled if not point.is_damaged]
    for point, reason in _kept_by_rule(whole, retention):
        if reason not in reasons[point.sequence]:
            reasons[point.sequence].append(reason)
    for point, reason in _kept_by_rule(ruled, retention):
        if point.is_damaged and reason not in reasons[point.sequence]:
            reasons[point.sequence].append(reason)
    kept = [point for point in newest_first if reasons[point.sequence]]
    places = {point.sequence: place for place, point in enumerate(_budget_order(kept), start=1)}
    return [
        Verdict(point, tuple(reasons[point.sequence]), places.get(point.sequence, 0))
        for point in reversed(newest_first)
    ]


def _always(point: Candidate) -> list[str]:
    held = "for the next cycle to a further site"
    asked = (("manual", point.kind == "manual"), ("in use", point.is_used), (held, point.is_held))
    return [reason for reason, holds in asked if holds]


def _kept_by_rule(points: Sequence[Candidate], retention: Retention) -> list[tuple[Candidate, str]]:
    """Return each point, newest first, with each reason that asks for it."""
    if retention.keeps_all:
        return [(point, "no rule lets it go") for point in points]
    found = []
    if retention.recovery_points is not None:
        found += _recovery_points(points, retention.recovery_points, retention.recovery_point_every_s)
    rule = retention.keep or KeepRule()
    found += _one_of_each(points, rule.last, _itself, "last")
    found += _one_of_each(points, rule.hourly, _hour, "hourly")
    found += _one_of_each(points, rule.daily, _day, "daily")
    found += _one_of_each(points, rule.weekly, _week, "weekly")
    consistent = [point for point in points if point.consistency == "app"]
    return found + _one_of_each(consistent, rule.app_consistent, _itself, "app-consistent")


def _recovery_points(points: Sequence[Candidate], count: int, every_s: float) -> list[tuple[Candidate, str]]:
    """Return the newest point; with a count above 0 one of its own period and of each of `count` before."""
    if not count:
        return [(point, "newest") for point in points[:1]]
    found = []
    for number, (point, _) in enumerate(_one_of_each(points, count + 1, _period(every_s), "")):
        word = (
            f"recovery point {number} of {count}" if number else "recovery point of the newest one's period"
        )
        found.append((point, "newest" if point is points[0] else word))
    return found


def _one_of_each(
    points: Sequence[Candidate], count: int, period: Callable[[Candidate], tuple[object, str]], word: str
) -> list[tuple[Candidate, str]]:
    """Return one point of each of the newest `count` periods that have one, with the reason.

    What stands for a period gives way only to a newer point, so the order of periods changes only by points
    that come.
    """
    best: dict[object, Candidate] = {}
    for point in points:
        key = period(point)[0]
        other = best.get(key)
        if other is None or (point.consistency == "app" and other.consistency != "app"):
            best[key] = point
    chosen = sorted(best.values(), key=lambda point: point.sequence, reverse=True)[:count]
    return [
        (point, f"{word} {period(point)[1] or f'{number} of {count}'}")
        for number, point in enumerate(chosen, start=1)
    ]


def _itself(point: Candidate) -> tuple[object, str]:
    return point.sequence, ""


def _hour(point: Candidate) -> tuple[object, str]:
    return point.instant_s // _HOUR_S, f"{iso_time(point.instant_s)[:13]}Z"


def _day(point: Candidate) -> tuple[object, str]:
    return point.instant_s // _DAY_S, iso_time(point.instant_s)[:10]


def _week(point: Candidate) -> tuple[object, str]:
    week = (point.instant_s - _FIRST_MONDAY_S) // _WEEK_S
    return week, f"from {iso_time(max(week * _WEEK_S + _FIRST_MONDAY_S, 0))[:10]}"


def _period(every_s: float) -> Callable[[Candidate], tuple[object, str]]:
    if not every_s:
        return _itself
    return lambda point: (point.instant_s // every_s, "")


def _budget_order(kept: Sequence[Candidate]) -> list[Candidate]:
    """Return what may go over a budget, first to go first. kept: newest first."""
    free = [point for point in kept[1:] if point.kind != "manual" and not point.is_used]
    return sorted(free, key=lambda point: (not point.is_damaged, point.consistency == "app", point.sequence))
