"""Failover to an older point: it becomes the newest one, nothing is lost by it, and it can be taken back."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from hvreplica.errors import FailoverRefused, InvalidTransition, NoSuchPoint, PointInUse
from hvreplica.store.failover import AT_WORK, begin
from hvreplica.store.open_point import LATEST, open_point
from hvreplica.store.pace import Pace
from hvreplica.store.points_kept import drop_point
from hvreplica.store.press import is_raw, press_part
from hvreplica.store.promotion import Wish, cancel, commit, fail_over
from hvreplica.store.verify import verify_vm
from tests.store.failover_world import World, read_whole
from tests.store.world import MIB, guid, ram_folder, read_disk, small_disk

if TYPE_CHECKING:
    import random
    import uuid
    from collections.abc import Iterator

NOW = Wish(wait_s=0.0)


@pytest.fixture
def world(rng: random.Random) -> Iterator[World]:
    with ram_folder() as root, contextlib.ExitStack() as stack:
        made = World(root, rng)
        stack.callback(made.store.close)
        made.replica.apply()
        yield made


def point(world: World, place: int) -> uuid.UUID:
    return list(world.images)[place]


def fail_over_to(world: World, place: int) -> None:
    fail_over(world.home, "unplanned", Wish(point(world, place), wait_s=0.0))


def states(world: World) -> list[tuple[str, str]]:
    return [(row.kind, row.state) for row in world.store.points("web01")]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_active_disks_show_the_chosen_point_and_every_point_stays(world: World, place: int) -> None:
    before = set(world.kept())
    fail_over_to(world, place)
    assert world.active() == world.images[point(world, place)]
    assert set(world.kept()) >= before
    world.check_kept()
    assert world.home.failover().point == point(world, place)


def test_chosen_point_is_listed_as_the_newest_of_kind_manual(world: World) -> None:
    fail_over_to(world, 0)
    assert states(world) == [(kind, "complete") for kind in ("initial", "standard", "standard", "manual")]
    manual = list(world.kept().values())[-1]
    assert manual == world.images[point(world, 0)]


@pytest.mark.parametrize("place", [0, 1])
def test_cancel_brings_the_primarys_point_back_and_replication_goes_on(world: World, place: int) -> None:
    before = world.kept()
    rows = world.home.catalog.disks(world.home.vm_id)
    fail_over_to(world, place)
    assert cancel(world.home, NOW) == AT_WORK
    assert world.kept() == before
    after = world.home.catalog.disks(world.home.vm_id)
    assert [(row.spec, row.last_log_id, row.removed_s, row.digest) for row in after] == [
        (row.spec, row.last_log_id, row.removed_s, row.digest) for row in rows
    ]
    world.replica = world.primary.claim(world.store)
    world.cycle()
    assert world.replica.apply() == point(world, -1)
    world.check_kept()
    assert not [path for path in world.files.files() if path.suffix in {".hrl", ".partial", ".tmp"}]


@pytest.mark.parametrize("verified_before", [True, False])
def test_digests_hold_through_a_failover_and_back(world: World, *, verified_before: bool) -> None:
    def states_found() -> set[str]:
        verdict = verify_vm(world.home, Pace(world.clock, lambda _: False))
        assert (verdict.damage, verdict.unknown_files) == ([], [])
        return {found.state for found in verdict.points}

    if verified_before:
        assert "damaged" not in states_found()
    fail_over_to(world, 0)
    assert "damaged" not in states_found()
    world.run_vm()
    cancel(world.home, Wish(force=True, wait_s=0.0))
    assert "damaged" not in states_found()
    assert states_found() == {"ok"}


def test_cancel_to_another_point_shows_that_one(world: World) -> None:
    fail_over_to(world, 0)
    record = cancel(world.home, Wish(point(world, 1), wait_s=0.0))
    assert (record.state, record.point) == ("FailedOverWaitingCompletion", point(world, 1))
    assert world.active() == world.images[point(world, 1)]
    world.check_kept()
    cancel(world.home, Wish(LATEST, wait_s=0.0))
    assert world.active() == world.latest


def test_prepared_replica_goes_straight_to_another_point(world: World) -> None:
    with world.home.catalog.transaction():
        world.home.set_failover(begin("web01", world.home.failover(), "prepare"))
    record = cancel(world.home, Wish(point(world, 0), wait_s=0.0))
    assert (record.state, record.generation) == ("FailedOverWaitingCompletion", 2)
    assert world.active() == world.images[point(world, 0)]


def test_same_call_again_is_done_and_another_point_is_refused(world: World) -> None:
    fail_over_to(world, 0)
    fail_over_to(world, 0)
    with pytest.raises(InvalidTransition, match="is failed over to point") as caught:
        fail_over_to(world, 1)
    assert f"cancel --point {point(world, 1)}" in (caught.value.hint or "")


def test_point_that_may_be_gone_back_to_cannot_be_dropped(world: World) -> None:
    fail_over_to(world, 0)
    with pytest.raises(PointInUse, match="rests on point"):
        drop_point(world.home, point(world, 2))
    drop_point(world.home, point(world, 1))
    cancel(world.home, NOW)
    world.check_kept()
    assert set(world.kept()) == {point(world, 0), point(world, 2)}


def test_point_to_go_back_to_stays_although_the_policy_keeps_one_an_hour(world: World) -> None:
    catalog = world.home.catalog
    with catalog.transaction():
        catalog.set_policy(world.home.vm_id, None)
    before = world.kept()
    fail_over_to(world, 0)
    assert cancel(world.home, NOW) == AT_WORK
    assert world.kept() == before


def test_commit_keeps_points_and_deletes_them_on_request(world: World) -> None:
    fail_over_to(world, 0)
    commit(world.home, NOW)
    assert len(world.kept()) == 4
    world.check_kept()
    drop_point(world.home, point(world, 2))
    world.check_kept()


def test_commit_deletes_points_on_request(world: World) -> None:
    fail_over_to(world, 1)
    commit(world.home, Wish(delete_points=True, wait_s=0.0))
    assert states(world) == [("manual", "complete")]
    assert world.active() == world.images[point(world, 1)]


def test_disk_gets_the_size_that_it_had(world: World) -> None:
    world.primary.resize(0, 3 * MIB)
    world.primary.resize(1, MIB)
    world.cycle()
    world.replica.apply()
    before = world.kept()
    fail_over_to(world, 0)
    assert world.active() == world.images[point(world, 0)]
    world.check_kept()
    cancel(world.home, NOW)
    assert world.kept() == before
    assert len(read_disk(world.files, world.home.paths.disk(0), world.clock)) == 3 * MIB


def test_disk_that_joined_since_is_left_out_and_comes_back(world: World) -> None:
    world.primary.add(small_disk(2, 1))
    world.replica = world.primary.claim(world.store)
    sink = world.primary.begin_initial(world.replica, 300, joining=[2])
    sink.write(2, 0, MIB, *__import__("tests.store.world", fromlist=["x"]).NOTHING)  # type: ignore[union-attr]
    sink.commit()  # type: ignore[union-attr]
    world.cycle()
    world.replica.apply()
    fail_over_to(world, 0)
    assert sorted(world.active()) == [0, 1]
    cancel(world.home, NOW)
    assert [row.removed_s for row in world.home.catalog.disks(world.home.vm_id)] == [None] * 3
    world.check_kept()


def test_point_with_a_disk_that_was_lost_since_is_refused_before_anything(world: World) -> None:
    world.primary.remove(1)
    world.replica = world.primary.claim(world.store)
    world.cycle()
    world.replica.apply()
    with pytest.raises(FailoverRefused, match=r"does not have any more: 1 \(.*, removed 20"):
        fail_over_to(world, 0)
    assert world.home.failover() == AT_WORK


def test_point_from_before_a_second_first_copy(world: World) -> None:
    world.primary.scribble(world.rng, 5)
    world.replica = world.primary.replicate(world.store, 400)
    world.images[guid(400)] = world.primary.image()
    world.cycle()
    world.replica.apply()
    before = world.kept()
    fail_over_to(world, 1)
    assert world.active() == world.images[point(world, 1)]
    world.check_kept()
    cancel(world.home, NOW)
    assert world.kept() == before


def test_reader_of_the_manual_point_gets_no_other_points_bytes_after_cancel(world: World) -> None:
    fail_over_to(world, 0)
    with open_point(world.home, LATEST) as manual, open_point(world.home, point(world, 0)) as old:
        shown = world.images[point(world, 0)][0]
        assert read_whole(manual.disks[0]) == read_whole(old.disks[0]) == shown
        cancel(world.home, NOW)
        with pytest.raises(NoSuchPoint):
            read_whole(manual.disks[0])
        assert read_whole(old.disks[0]) == shown


@pytest.mark.parametrize("place", [0, 1])
def test_way_there_and_back_leads_through_pressed_parts(world: World, place: int) -> None:
    before = world.kept()
    assert press_all(world) > 0
    world.check_kept()
    fail_over_to(world, place)
    assert world.active() == world.images[point(world, place)]
    press_all(world)
    assert cancel(world.home, NOW) == AT_WORK
    assert world.kept() == before
    assert press_all(world) == 0
    assert verify_vm(world.home, Pace(world.clock, lambda _: False)).is_damaged is False


def press_all(world: World) -> int:
    """Press what shrinks; return how many parts did."""
    raw = [row for row in world.home.catalog.undo_rows(world.home.vm_id) if is_raw(row)]
    return sum(press_part(world.home, row, held_bytes_min=0) > 0 for row in raw)


def test_reader_that_comes_while_the_disks_are_put_back_is_refused(world: World) -> None:
    fail_over_to(world, 0)
    manual = world.home.failover().reverted
    assert manual is not None
    seen = []

    def look(operation: str, path: object) -> None:
        if operation == "write" and path == world.home.paths.disk(0):
            world.files.hook = None
            with pytest.raises(NoSuchPoint), open_point(world.home, manual.id) as opened:
                read_whole(opened.disks[0])
            with open_point(world.home, point(world, 2)) as opened:
                seen.append(read_whole(opened.disks[0]))

    world.files.hook = look
    cancel(world.home, NOW)
    assert seen == [world.images[point(world, 2)][0]]


def test_disks_that_are_half_put_back_are_given_up_on_by_force_alone(world: World) -> None:
    fail_over_to(world, 0)
    world.files.fail("sync", path="*/disks/0.vhdx", at=2)
    with pytest.raises(OSError, match="Input/output"):
        cancel(world.home, NOW)
    world.files.heal()
    part = world.home.catalog.undo_rows(world.home.vm_id, point_id=point(world, 2))[0]
    with world.files.open(world.home.paths.undo(part.id), writable=True) as file:
        file.write(b"\xff" * 512, 8192 + 512)
    with pytest.raises(FailoverRefused, match="cannot be brought back"):
        cancel(world.home, NOW)
    assert cancel(world.home, Wish(force=True, wait_s=0.0)) == AT_WORK
    assert [row.state for row in world.store.points("web01")][-2:] == ["damaged", "damaged"]
    world.store.recover()
    world.check_kept()


def test_damaged_undo_refuses_the_way_back_until_it_is_forced(world: World) -> None:
    fail_over_to(world, 0)
    part = world.home.catalog.undo_rows(world.home.vm_id, point_id=point(world, 2))[0]
    with world.files.open(world.home.paths.undo(part.id), writable=True) as file:
        file.write(b"\xff" * 512, 8192 + 512)
    with pytest.raises(FailoverRefused, match="cannot be brought back"):
        cancel(world.home, NOW)
    shown = world.images[point(world, 0)]
    assert cancel(world.home, Wish(force=True, wait_s=0.0)) == AT_WORK
    assert {
        index: read_disk(world.files, world.home.paths.disk(index), world.clock) for index in shown
    } == shown
    assert [row.state for row in world.store.points("web01")][-2:] == ["damaged", "complete"]
