"""Which points the rule keeps: against a model that groups by period, and what never may go."""

from __future__ import annotations

import dataclasses
import uuid
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from hvreplica.store.keep_rule import KeepRule
from hvreplica.store.retention import Candidate, Retention, decide

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

HOUR, DAY, WEEK = 3600, 86400, 7 * 86400
NOON = 1_795_608_000.0  # Wednesday, 2026-11-25, 12:00 UTC
NONE = Retention(recovery_points=0)


def points_at(*instants: float) -> list[Candidate]:
    return [
        Candidate(uuid.UUID(int=number), number, instant) for number, instant in enumerate(instants, start=1)
    ]


def kept(points: list[Candidate], retention: Retention) -> list[int]:
    return [verdict.point.sequence for verdict in decide(points, retention) if verdict.is_kept]


def reasons(points: list[Candidate], retention: Retention) -> dict[int, tuple[str, ...]]:
    return {verdict.point.sequence: verdict.reasons for verdict in decide(points, retention)}


def first_to_go(points: list[Candidate], retention: Retention) -> list[int]:
    places = {verdict.budget_place: verdict.point.sequence for verdict in decide(points, retention)}
    return [places[place] for place in sorted(places) if place]


# Examples


def test_no_points_give_no_verdict() -> None:
    assert decide([], NONE) == []


def test_without_a_rule_nothing_goes() -> None:
    points = points_at(*range(50))
    assert kept(points, Retention()) == list(range(1, 51))


def test_zero_recovery_points_keep_the_newest_alone() -> None:
    assert kept(points_at(NOON, NOON + 1, NOON + 2), NONE) == [3]


def test_recovery_points_are_one_each_hour_before_the_newest() -> None:
    points = points_at(*(NOON + 300 * number for number in range(12 * 4)))  # four hours of five minutes
    found = reasons(points, Retention(recovery_points=2))
    assert {number: why for number, why in found.items() if why} == {
        48: ("newest",),
        36: ("recovery point 1 of 2",),
        24: ("recovery point 2 of 2",),
    }


def test_an_application_consistent_point_stands_for_its_period() -> None:
    points = points_at(*(NOON + 600 * number for number in range(15)))
    points = [
        dataclasses.replace(point, consistency="app") if point.sequence in {2, 8, 14} else point
        for point in points
    ]
    assert reasons(points, Retention(recovery_points=2, keep=KeepRule(hourly=1)))[14] == (
        "recovery point of the newest one's period",
        "hourly 2026-11-25T14Z",
    )
    assert kept(points, Retention(recovery_points=2)) == [2, 8, 14, 15]
    assert kept(points, Retention(recovery_points=0)) == [15]


def test_recovery_points_of_no_period_are_the_newest_ones() -> None:
    points = points_at(*(NOON + number for number in range(30)))
    retention = Retention(recovery_points=24, recovery_point_every_s=0)
    assert kept(points, retention) == list(range(6, 31))


def test_twenty_four_hourly_points_reach_back_a_day() -> None:
    points = points_at(*(NOON + 900 * number for number in range(4 * 48)))
    found = kept(points, Retention(recovery_points=24))
    assert len(found) == 25
    oldest, newest = points[found[0] - 1], points[-1]
    assert newest.instant_s - oldest.instant_s > 23 * HOUR


def test_rule_names_the_period_of_each_point() -> None:
    points = points_at(NOON - WEEK, NOON - DAY, NOON, NOON + 60)
    found = reasons(points, Retention(keep=KeepRule(last=1, hourly=2, daily=2, weekly=3)))
    assert found == {
        1: ("weekly from 2026-11-16",),
        2: ("hourly 2026-11-24T12Z", "daily 2026-11-24"),
        3: (),
        4: ("newest", "last 1 of 1", "hourly 2026-11-25T12Z", "daily 2026-11-25", "weekly from 2026-11-23"),
    }


def test_weeks_begin_on_monday() -> None:
    sunday = NOON - 3 * DAY
    points = points_at(sunday, sunday + 12 * HOUR - 1, sunday + 12 * HOUR, NOON)
    assert kept(points, Retention(keep=KeepRule(weekly=2))) == [2, 4]


def test_only_periods_with_points_count() -> None:
    points = points_at(NOON, NOON + 1, NOON + 400 * DAY)
    assert kept(points, Retention(keep=KeepRule(hourly=2))) == [2, 3]


def test_app_consistent_points_are_counted_apart() -> None:
    points = points_at(*(NOON + number for number in range(6)))
    points = [
        dataclasses.replace(point, consistency="app") if point.sequence in {1, 2, 4} else point
        for point in points
    ]
    assert reasons(points, Retention(keep=KeepRule(app_consistent=2))) == {
        1: (),
        2: ("app-consistent 2 of 2",),
        3: (),
        4: ("app-consistent 1 of 2",),
        5: (),
        6: ("newest",),
    }


def test_manual_points_and_those_in_use_stay() -> None:
    manual, used, plain, newest = points_at(NOON, NOON + 1, NOON + 2, NOON + 3)
    manual = dataclasses.replace(manual, kind="manual")
    used = dataclasses.replace(used, is_used=True)
    found = reasons([manual, used, plain, newest], NONE)
    assert found == {1: ("manual",), 2: ("in use",), 3: (), 4: ("newest",)}


def test_a_manual_point_takes_no_other_ones_place() -> None:
    plain, manual, newest = points_at(NOON, NOON + 1, NOON + 2)
    manual = dataclasses.replace(manual, kind="manual")
    assert kept([plain, manual, newest], Retention(keep=KeepRule(last=2))) == [1, 2, 3]


def test_a_damaged_point_takes_no_whole_ones_place() -> None:
    whole, damaged, newest = points_at(NOON, NOON + 1, NOON + 2)
    damaged = dataclasses.replace(damaged, is_damaged=True)
    points = [whole, damaged, newest]
    assert kept(points, Retention(keep=KeepRule(last=2))) == [1, 2, 3]
    assert kept(points, Retention(keep=KeepRule(last=1))) == [3]
    broken_newest = dataclasses.replace(newest, is_damaged=True)
    assert kept([whole, damaged, broken_newest], NONE) == [1, 3]


def test_a_clock_that_was_set_back_loses_no_newer_point() -> None:
    points = points_at(NOON + DAY, NOON, NOON + HOUR)
    assert kept(points, Retention(keep=KeepRule(last=2))) == [2, 3]
    assert kept(points, Retention(keep=KeepRule(daily=2))) == [1, 3]


def test_over_a_budget_damaged_points_go_first_and_application_consistent_ones_last() -> None:
    points = points_at(*(NOON + number for number in range(7)))
    points[0] = dataclasses.replace(points[0], consistency="app")
    points[2] = dataclasses.replace(points[2], kind="manual")
    points[3] = dataclasses.replace(points[3], is_damaged=True)
    points[4] = dataclasses.replace(points[4], is_used=True)
    assert first_to_go(points, Retention()) == [4, 2, 6, 1]


# Against a model, and what holds for all

RULES = st.builds(KeepRule, *(st.integers(0, 4) for _ in range(5)))
RETENTIONS = st.builds(
    Retention,
    st.none() | st.integers(0, 5),
    st.sampled_from([0, 900, HOUR]),
    st.none() | RULES,
)
STEPS = st.sampled_from([1, 600, HOUR, 5 * HOUR, DAY, WEEK])


@st.composite
def histories(draw: st.DrawFn, *, backwards: bool = True) -> list[Candidate]:
    """Points in the order of their making; with `backwards`, a clock may have been set back between two."""
    instant, found = NOON, []
    for number in range(draw(st.integers(1, 25))):
        step = draw(STEPS) * (-1 if backwards and draw(st.integers(0, 9)) == 0 else 1)
        instant = max(instant + step, 0)
        found.append(
            Candidate(
                uuid.UUID(int=number + 1),
                number + 1,
                instant,
                kind=draw(st.sampled_from(["standard", "standard", "standard", "planned", "manual"])),
                consistency=draw(st.sampled_from(["crash", "crash", "app"])),
                is_damaged=draw(st.integers(0, 7)) == 0,
                is_used=draw(st.integers(0, 9)) == 0,
            )
        )
    return found


def top(points: list[Candidate], count: int, key: Callable[[Candidate], object]) -> set[int]:
    """Return the best point of each period, of the `count` periods whose best points are the newest."""
    best: dict[object, tuple[bool, int]] = {}
    for point in points:
        rank = point.consistency == "app", point.sequence
        best[key(point)] = max(best.get(key(point), rank), rank)
    return set(sorted((sequence for _, sequence in best.values()), reverse=True)[:count])


def model_rule(points: list[Candidate], retention: Retention) -> set[int]:
    if retention.recovery_points is None and retention.keep is None:
        return {point.sequence for point in points}
    found: set[int] = set()
    every = retention.recovery_point_every_s
    if retention.recovery_points == 0:
        found |= top(points, 1, lambda point: point.sequence)
    elif retention.recovery_points is not None:
        found |= top(
            points,
            retention.recovery_points + 1,
            lambda point: int(point.instant_s / every) if every else point.sequence,
        )
    rule = retention.keep or KeepRule()
    found |= top(points, rule.last, lambda point: point.sequence)
    found |= top(points, rule.hourly, lambda point: int(point.instant_s / HOUR))
    found |= top(points, rule.daily, lambda point: int(point.instant_s / DAY))
    found |= top(points, rule.weekly, lambda point: int((point.instant_s + 3 * DAY) / WEEK))
    consistent = [point for point in points if point.consistency == "app"]
    return found | top(consistent, rule.app_consistent, lambda point: point.sequence)


def model(points: list[Candidate], retention: Retention) -> set[int]:
    found = {point.sequence for point in points if point.kind == "manual" or point.is_used}
    found.add(max(point.sequence for point in points))
    ruled = [point for point in points if point.kind != "manual"]
    found |= model_rule([point for point in ruled if not point.is_damaged], retention)
    damaged = {point.sequence for point in ruled if point.is_damaged}
    return found | model_rule(ruled, retention) & damaged


@given(histories(), RETENTIONS)
def test_what_is_kept_equals_the_model(points: list[Candidate], retention: Retention) -> None:
    assert set(kept(points, retention)) == model(points, retention)


@given(histories(), RETENTIONS, st.randoms(use_true_random=False))
def test_verdicts_do_not_depend_on_the_order_they_are_asked_in(
    points: list[Candidate], retention: Retention, random: Random
) -> None:
    shuffled = list(points)
    random.shuffle(shuffled)
    assert decide(shuffled, retention) == decide(points, retention)


@given(histories(), RETENTIONS)
def test_applying_the_rule_again_drops_nothing_more(points: list[Candidate], retention: Retention) -> None:
    stay = [verdict.point for verdict in decide(points, retention) if verdict.is_kept]
    assert [verdict.point for verdict in decide(stay, retention) if verdict.is_kept] == stay


@given(histories(), RETENTIONS)
def test_applying_the_rule_after_each_point_equals_applying_it_once(
    points: list[Candidate], retention: Retention
) -> None:
    points = [dataclasses.replace(point, is_damaged=False, is_used=False) for point in points]
    stay: list[Candidate] = []
    for point in points:
        stay = [verdict.point for verdict in decide([*stay, point], retention) if verdict.is_kept]
    assert [point.sequence for point in stay] == kept(points, retention)


@given(histories(), RETENTIONS)
def test_each_kept_point_has_a_reason_and_budget_places_are_of_kept_ones(
    points: list[Candidate], retention: Retention
) -> None:
    verdicts = decide(points, retention)
    assert [verdict.point for verdict in verdicts] == points
    places = [verdict.budget_place for verdict in verdicts if verdict.budget_place]
    assert sorted(places) == list(range(1, len(places) + 1))
    for verdict in verdicts:
        never = verdict.point.kind == "manual" or verdict.point.is_used or verdict.point is points[-1]
        assert (verdict.budget_place > 0) == (verdict.is_kept and not never)
        assert verdict.is_kept or not never
