"""What goes at the replica is told at the primary, by whoever of the two said what stays."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import hvreplica
from hvreplica.formats.messages import PointPolicy
from tests.replication.sites import DISK, STATE, VM

if TYPE_CHECKING:
    import pytest

    from hvreplica.replication.results import ReplicateResult
    from tests.replication.sites import Guest, Served


def replicate(guest: Guest, served: Served, points: PointPolicy | None = None) -> ReplicateResult:
    guest.write(64 << 10)
    return hvreplica.replicate(
        VM, [DISK], to=served.address, tls=served.tls, state=STATE, files=guest.files, points=points
    )


def test_each_point_that_goes_is_in_the_answer_and_in_both_logs(
    guest: Guest, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    first = replicate(guest, served, PointPolicy(recovery_points=0))
    assert (first.gone, first.warning) == ([], None)
    with caplog.at_level(logging.INFO):
        second = replicate(guest, served)
    [gone] = second.gone
    assert (gone.id, gone.reason) == (first.point, "the next point took its place")
    assert gone.instant.endswith("Z")
    for words in (f"the replica let point {first.point}", f"VM {VM!r}: point {first.point}"):
        assert words in caplog.text
    assert [point.id for point in hvreplica.point_list(served.store, VM)] == [second.point]


def test_policy_that_was_set_at_the_replica_holds_from_the_next_cycle_on(
    guest: Guest, served: Served
) -> None:
    points = [replicate(guest, served, PointPolicy(recovery_point_every_s=0)).point]
    points += [replicate(guest, served).point for _ in range(3)]
    plan = hvreplica.store_policy(served.store, VM, keep="last 2", points_budget="1G")
    assert [point.keep for point in plan.points] == [False, False, True, True]
    assert [point.id for point in hvreplica.point_list(served.store, VM)] == points
    result = replicate(guest, served)
    assert [point.id for point in result.gone] == points[:3]
    assert result.gone[0].reason == "no rule keeps it"
    assert [point.id for point in hvreplica.point_list(served.store, VM)] == [points[3], result.point]
    assert served.content() == guest.model


def test_budget_warns_at_the_primary_before_it_takes_a_point(guest: Guest, served: Served) -> None:
    wish = PointPolicy(recovery_point_every_s=0, budget_bytes=1 << 20)
    points = [replicate(guest, served, wish).point]
    told = None
    while True:
        result = replicate(guest, served)
        points.append(result.point)
        if result.gone:
            break
        told = result.warning
    assert told is not None
    assert f"the next to go is {points[0]}" in told
    assert [point.id for point in result.gone] == points[:1]
    assert "the budget is 1.0 MiB" in result.gone[0].reason
