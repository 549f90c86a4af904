"""Failover, its cancel and its test to an instant between two cycles: the point is made first, or nothing is done."""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import instant_time
from hvreplica.errors import FailoverRefused, Fenced, InvalidTransition, NoSuchPoint
from hvreplica.replication.retention_verbs import parse_instant
from hvreplica.store.at_instant import Instant
from hvreplica.store.failover import AT_WORK
from hvreplica.store.firedrill import begin_firedrill, end_firedrill, remove_firedrill
from hvreplica.store.open_point import LATEST
from hvreplica.store.policy import Policy
from hvreplica.store.promotion import Wish, cancel, commit, fail_over
from tests.store.instant_world import InstantWorld
from tests.store.world import INSTANT_S, ram_folder, read_disk

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def slots() -> tuple[int, ...]:
    """Return how long the ticks of logs are; none for logs that know whole seconds alone."""
    return ()


@pytest.fixture
def world(seed: int, slots: tuple[int, ...]) -> Iterator[InstantWorld]:
    """Return a world with two cycles applied and one that waits."""
    with ram_folder() as root:
        world = InstantWorld(root, seed, slots=slots)
        for _ in range(2):
            world.cycle()
        world.cycle(apply=False)
        yield world
        world.store.close()


def at(instant_s: float) -> Wish:
    return Wish(Instant(instant_s), wait_s=0.0)


def middles(world: InstantWorld) -> list[float]:
    """Return an instant in each cycle, a whole second that no point shows."""
    starts = [INSTANT_S, *world.points.values()]
    return [float((start + end) // 2) for start, end in itertools.pairwise(starts)]


@pytest.mark.parametrize("cycle", [0, 1, 2])
def test_failover_shows_what_was_written_by_then_also_of_a_cycle_that_waits(
    world: InstantWorld, cycle: int
) -> None:
    instant_s = middles(world)[cycle]
    record = fail_over(world.home, "unplanned", at(instant_s))
    assert record.state == "FailedOverWaitingCompletion"
    assert world.active() == world.at(instant_s)
    points = {str(point.id): point for point in world.store.points("web01")}
    assert points[str(record.point)].instant_s == instant_s
    assert points[str(record.point)].kind == "manual"
    world.check()
    with pytest.raises(Fenced):
        world.primary.claim(world.store)


def test_same_call_again_changes_nothing_and_another_instant_is_refused(world: InstantWorld) -> None:
    first, second, _ = middles(world)
    record = fail_over(world.home, "unplanned", at(first))
    listed = world.store.points("web01")
    assert fail_over(world.home, "unplanned", at(first)) == record
    with pytest.raises(InvalidTransition, match="is failed over to point") as caught:
        fail_over(world.home, "unplanned", at(second))
    assert "cancel --point 20" in (caught.value.hint or "")
    commit(world.home, Wish(wait_s=0.0))
    for verb in (
        lambda: fail_over(world.home, "unplanned", at(second)),
        lambda: cancel(world.home, at(second)),
    ):
        with pytest.raises(InvalidTransition):
            verb()
    assert world.store.points("web01") == listed, "no point is made for a verb that is refused"


@pytest.mark.parametrize(("part_s", "slots"), [(0.25, ()), (0.75, (1000, 20_000))])
def test_instant_of_a_part_of_a_second_is_found_again(world: InstantWorld, part_s: float) -> None:
    instant_s = middles(world)[1] + part_s
    record = fail_over(world.home, "unplanned", at(instant_s))
    listed = world.store.points("web01")
    shown = next(point.instant_s for point in listed if point.id == str(record.point))
    assert world.active() == world.at(shown)
    assert fail_over(world.home, "unplanned", at(instant_s)) == record
    assert cancel(world.home, at(instant_s)).point == record.point
    test = begin_firedrill(world.home, Instant(instant_s))
    assert test.point == record.point
    assert begin_firedrill(world.home, Instant(instant_s)) == test
    points = {point.id for point in world.store.points("web01")}
    assert len(points) == len(listed), "no other point was made of it"


def test_cancel_goes_over_to_another_instant_and_back(world: InstantWorld) -> None:
    first, second, third = middles(world)
    newest = world.at(world.clock.now_s())
    fail_over(world.home, "unplanned", at(first))
    for instant_s in (third, second):
        record = cancel(world.home, at(instant_s))
        assert record.state == "FailedOverWaitingCompletion"
        assert world.active() == world.at(instant_s)
    assert cancel(world.home, Wish(wait_s=0.0)) == AT_WORK
    for index, content in newest.items():
        assert read_disk(world.files, world.home.paths.disk(index), world.clock) == content
    world.check()
    kept = {f"{row.log_id}.hrl" for row in world.home.catalog.kept_logs(world.home.vm_id)}
    assert set(world.files.names(world.home.paths.logs)) == kept, "what led to the older points has gone"
    assert kept
    world.replica = world.primary.claim(world.store)
    world.cycle()
    world.check()


def test_cancel_with_an_instant_keeps_what_was_written(world: InstantWorld) -> None:
    first, second, _ = middles(world)
    fail_over(world.home, "unplanned", at(first))
    listed = world.store.points("web01")
    path = world.home.paths.active(0)
    with world.files.open(path, writable=True) as file:
        file.zero(0, file.size())
    with pytest.raises(Exception, match="cannot be told"):
        cancel(world.home, at(second))
    assert world.store.points("web01") == listed


def test_cut_failover_goes_on_with_the_same_instant_alone(world: InstantWorld) -> None:
    first, second, _ = middles(world)
    world.files.fail("write", path="*/active/*")
    with pytest.raises(OSError, match="Input/output"):
        fail_over(world.home, "unplanned", at(first))
    world.files.heal()
    listed = world.store.points("web01")
    with pytest.raises(InvalidTransition, match="was cut before its end"):
        fail_over(world.home, "unplanned", at(second))
    fail_over(world.home, "unplanned", at(first))
    assert world.active() == world.at(first)
    assert [point.id for point in world.store.points("web01")] == [point.id for point in listed]


def test_instant_that_cannot_be_had_changes_nothing_and_names_the_nearest(world: InstantWorld) -> None:
    for instant_s, side in ((INSTANT_S - 100, 0), (world.clock.now_s() + 1000, 1)):
        with pytest.raises(NoSuchPoint, match="cannot go to") as caught:
            fail_over(world.home, "unplanned", at(instant_s))
        hint = caught.value.hint or ""
        assert hint.startswith("the nearest that can be had are 2023")
        # The last second was not received to its end.
        assert f"to {instant_time(math.floor(max(world.points.values())) - 1)}" in hint, side
    assert world.home.failover() == AT_WORK
    for text in re.findall(r"2023\S+Z", hint):
        world.store.make_point_at("web01", parse_instant(text))  # as it is told it can be had
    world.check()
    world.replica = world.primary.claim(world.store)
    world.set_policy(Policy(recovery_point_every_s=0, keep_logs_s=0))
    world.cycle()
    with pytest.raises(NoSuchPoint, match="no logs are kept") as caught:
        fail_over(world.home, "unplanned", at(world.clock.now_s() - 3))
    assert "--keep-logs" in (caught.value.hint or "")


def test_instant_with_a_disk_that_was_removed_since_makes_no_point(world: InstantWorld) -> None:
    first, _, _ = middles(world)
    world.replica.apply()
    catalog, vm_id = world.home.catalog, world.home.vm_id
    newest = list(world.points)[-1]
    with catalog.transaction():
        catalog.set_members(vm_id, newest, {0: catalog.members(vm_id, newest)[0]})
    listed = world.store.points("web01")
    with pytest.raises(FailoverRefused, match="does not have any more: 1"):
        fail_over(world.home, "unplanned", at(first))
    assert world.store.points("web01") == listed
    assert world.home.failover() == AT_WORK


def test_test_failover_of_an_instant_is_one_point_that_stays(world: InstantWorld) -> None:
    first, second, _ = middles(world)
    test = begin_firedrill(world.home, Instant(first))
    listed = world.store.points("web01")
    assert begin_firedrill(world.home, Instant(first)) == test
    assert begin_firedrill(world.home, None) == test
    with pytest.raises(InvalidTransition, match="test failover already"):
        begin_firedrill(world.home, Instant(second))
    assert world.store.points("web01") == listed
    assert end_firedrill(world.home)
    assert begin_firedrill(world.home, Instant(first)).point == test.point
    assert remove_firedrill(world.home)
    assert begin_firedrill(world.home, LATEST).point != test.point
    world.check()
