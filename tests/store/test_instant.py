"""A point of any instant equals what the guest had written by then, and leaves every other point as it was."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from hvreplica.errors import NoSuchPoint, StoreError, StoreFull
from hvreplica.store.points_kept import drop_point, kept_points, sweep_points
from hvreplica.store.policy import Policy
from hvreplica.store.retain import compact_many, retain
from tests.store.instant_world import InstantWorld
from tests.store.late_commit import fail_after_commit
from tests.store.world import INSTANT_S, ram_folder

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def world(seed: int) -> Iterator[InstantWorld]:
    with ram_folder() as root:
        world = InstantWorld(root, seed)
        yield world
        world.store.close()


def test_point_of_any_instant_equals_what_was_written_by_then(world: InstantWorld) -> None:
    for _ in range(4):
        world.cycle()
    end_s = world.points[world.primary.last_point]
    seconds = set(range(int(INSTANT_S) + 1, int(end_s))) - {int(at) for at in world.points.values()}
    instants = world.rng.sample(sorted(seconds), 12)
    for instant_s in instants:
        world.make(instant_s)
        world.check()
    times = [point.instant_s for point in world.store.points("web01")]
    assert times == sorted(times)
    assert len(times) == 5 + 12


def test_points_around_it_and_itself_can_go_and_cycles_go_on(world: InstantWorld) -> None:
    first = world.cycle()
    second = world.cycle()
    third = world.cycle()
    early = world.make(world.points[first] + 3)
    late = world.make(world.points[second] - 3)
    world.cycle()
    world.check()
    for point_id in (first, early, second):
        drop_point(world.home, point_id)
        world.check()
        compact_many(world.home)
    world.make(world.points[third] - 4)  # from the one that was made, over the rest of its cycle
    world.check()
    drop_point(world.home, late)
    world.cycle()
    world.check()


def test_points_that_were_not_kept_are_bridged_by_their_logs(world: InstantWorld) -> None:
    ids = [world.cycle() for _ in range(4)]
    for point_id in ids[:3]:
        drop_point(world.home, point_id)
    for point_id in ids[1:]:
        world.make(world.points[point_id] - 3)
        world.check()
    world.cycle()
    world.check()


def test_same_instant_again_is_the_same_point(world: InstantWorld) -> None:
    world.cycle()
    assert world.make(INSTANT_S + 5) == world.make(INSTANT_S + 5)


def test_log_that_is_not_in_the_order_of_writes_is_refused(world: InstantWorld) -> None:
    first = world.cycle(ordered=False)
    second = world.cycle()
    with pytest.raises(StoreError, match="order of the guest's writes"):
        world.store.make_point_at("web01", INSTANT_S + 5)
    drop_point(world.home, first)
    world.make(world.points[second] - 3)  # a whole cycle may be in any order
    world.check()


def test_instants_outside_of_the_logs_are_refused(world: InstantWorld) -> None:
    with pytest.raises(NoSuchPoint, match="no logs are kept"):
        world.store.make_point_at("web01", INSTANT_S + 5)
    world.cycle()
    for instant_s in (INSTANT_S - 1, world.clock.now_s() + 100):
        with pytest.raises(NoSuchPoint, match="logs are kept from 2023"):
            world.store.make_point_at("web01", instant_s)
    second, third = world.cycle(), world.cycle()
    home = world.home
    with home.catalog.transaction():
        for row in home.catalog.kept_logs(home.vm_id):
            if row.point_id == second:
                home.catalog.delete_kept_log(home.vm_id, row.log_id)
    with pytest.raises(NoSuchPoint, match="of that cycle is not kept"):
        world.store.make_point_at("web01", world.points[second] - 2)
    world.make(world.points[third] - 2)
    world.check()


def test_clock_that_was_set_back_is_refused(world: InstantWorld) -> None:
    world.write()
    world.clock.advance(-20)
    world.write(2)
    world.clock.advance(30)
    world.cycle(1)
    with pytest.raises(StoreError, match="clock was set back"):
        world.store.make_point_at("web01", INSTANT_S + 5)


def test_kept_logs_go_when_their_time_is_over(world: InstantWorld) -> None:
    first = world.cycle()
    home = world.home
    rows = home.catalog.kept_logs(home.vm_id)
    assert [row.point_id for row in rows] == [first] * len(rows)
    assert rows
    assert sorted(home.files.names(home.paths.logs)) == sorted(f"{row.log_id}.hrl" for row in rows)
    told = world.store.status().vms[0]
    assert (told.kept_logs, told.kept_log_bytes) == (len(rows), sum(row.log_bytes for row in rows))
    assert home.files.names(home.paths.spool) == []
    world.clock.advance(3590)
    retain(home)
    assert home.catalog.kept_logs(home.vm_id) == rows
    world.clock.advance(20)
    retain(home)
    assert home.catalog.kept_logs(home.vm_id) == []
    assert home.files.names(home.paths.logs) == []


def test_kept_logs_go_with_the_points_before_them_and_with_the_wish(world: InstantWorld) -> None:
    first, second = world.cycle(), world.cycle()
    home = world.home
    [initial] = {point.id for point in home.catalog.points(home.vm_id)} - {first, second}
    drop_point(home, initial)
    retain(home)
    assert {row.point_id for row in home.catalog.kept_logs(home.vm_id)} == {second}
    world.set_policy(Policy(recovery_point_every_s=0, keep_logs_s=0))
    retain(home)
    assert home.catalog.kept_logs(home.vm_id) == []


def test_full_store_makes_no_point_and_leaves_nothing(world: InstantWorld) -> None:
    world.cycle()
    world.files.fail("write", path="*.hru.partial", error=errno.ENOSPC)
    with pytest.raises(StoreFull):
        world.store.make_point_at("web01", INSTANT_S + 8)
    world.check()


def test_point_whose_commit_shows_up_after_a_restart_has_its_parts(
    world: InstantWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.cycle()
    with monkeypatch.context() as patched:
        fail_after_commit(patched, world.home.catalog)
        with pytest.raises(StoreError, match="disk I/O error"):
            world.store.make_point_at("web01", INSTANT_S + 8)
    sweep_points(world.home)
    assert [point.kind for point in kept_points(world.home)].count("manual") == 1
    world.check()
