"""Failover of a replica: what the active disks show, who is let in meanwhile, and how it is taken back."""

from __future__ import annotations

import contextlib
import uuid
from typing import TYPE_CHECKING

import pytest

from hvreplica.errors import FailoverRefused, Fenced, InvalidTransition, Locked, NoSuchPoint
from hvreplica.formats.messages import PointPolicy
from hvreplica.store import Store
from hvreplica.store.failover import AT_WORK
from hvreplica.store.failover_status import failover_status
from hvreplica.store.open_point import LATEST, LATEST_APP
from hvreplica.store.promotion import Wish, cancel, commit, fail_over
from tests.store.failover_world import World
from tests.store.world import Primary, guid, ram_folder, read_disk, small_disk
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

NOW = Wish(LATEST, wait_s=0.0)


@pytest.fixture
def world(rng: random.Random) -> Iterator[World]:
    with ram_folder() as root, contextlib.ExitStack() as stack:
        made = World(root, rng)
        stack.callback(made.store.close)
        yield made


def test_unplanned_applies_what_waits_and_shows_the_newest_point(world: World) -> None:
    record = fail_over(world.home, "unplanned", NOW)
    assert (record.state, record.point) == ("FailedOverWaitingCompletion", list(world.images)[-1])
    assert world.active() == world.latest
    assert record.generation == world.home.row().owner.generation + 1


def test_point_is_called_what_it_is(world: World) -> None:
    for place, called in ((0, "initial"), (-1, "regular")):
        record = fail_over(world.home, "unplanned", Wish(list(world.images)[place], wait_s=0.0))
        assert record.point_type == called
        cancel(world.home, Wish(wait_s=0.0))


def test_active_disk_takes_writes_and_leaves_the_replica_alone(world: World) -> None:
    fail_over(world.home, "unplanned", NOW)
    world.run_vm()
    assert world.active()[0][4096:4608] == b"x" * 512
    assert read_disk(world.files, world.home.paths.disk(0), world.clock) == world.latest[0]


def test_session_and_claim_of_the_old_primary_are_refused_with_the_way_out(world: World) -> None:
    world.cycle()
    cut = world.primary.cut()
    fail_over(world.home, "unplanned", NOW)
    with pytest.raises(Fenced):
        world.primary.ship(world.replica, cut)
    with pytest.raises(Fenced):
        world.replica.fingerprints(0, 0, 1, 4096)
    world.primary.generation += 100
    with pytest.raises(Fenced) as caught:
        world.primary.claim(world.store)
    assert "failover cancel" in (caught.value.hint or "")
    assert "failover reverse" in (caught.value.hint or "")
    assert world.active() == world.latest


def test_same_call_again_changes_nothing(world: World) -> None:
    first = fail_over(world.home, "unplanned", NOW)
    world.run_vm()
    shown = world.active()
    assert fail_over(world.home, "unplanned", NOW) == first
    assert world.active() == shown


def test_cancel_refuses_to_lose_writes_and_says_how_many_bytes(world: World) -> None:
    fail_over(world.home, "unplanned", NOW)
    world.run_vm()
    with pytest.raises(FailoverRefused) as caught:
        cancel(world.home, Wish(wait_s=0.0))
    assert caught.value.actual == "512 bytes"
    assert world.home.failover().state == "FailedOverWaitingCompletion"
    assert cancel(world.home, Wish(force=True, wait_s=0.0)) == AT_WORK
    assert [path for path in world.files.files() if path.parent.name == "active"] == []


def test_active_disk_that_cannot_be_read_is_lost_by_force_alone(world: World) -> None:
    fail_over(world.home, "unplanned", NOW)
    with world.files.open(world.home.paths.active(1), writable=True) as file:
        file.zero(0, file.size())
    with pytest.raises(FailoverRefused, match="cannot be told"):
        cancel(world.home, Wish(wait_s=0.0))
    assert cancel(world.home, Wish(force=True, wait_s=0.0)) == AT_WORK


def test_replication_goes_on_after_cancel_where_it_was(world: World) -> None:
    fail_over(world.home, "unplanned", NOW)
    cancel(world.home, Wish(wait_s=0.0))
    world.replica = world.primary.claim(world.store)
    world.cycle()
    assert world.replica.apply() == list(world.images)[-1]
    assert read_disk(world.files, world.home.paths.disk(0), world.clock) == world.latest[0]


def test_commit_is_final_and_repeatable(world: World) -> None:
    with pytest.raises(InvalidTransition):
        commit(world.home, Wish(wait_s=0.0))
    fail_over(world.home, "unplanned", NOW)
    assert commit(world.home, Wish(wait_s=0.0)).state == "FailedOver"
    assert commit(world.home, Wish(wait_s=0.0)).state == "FailedOver"
    with pytest.raises(InvalidTransition):
        cancel(world.home, Wish(wait_s=0.0))
    with pytest.raises(Fenced):
        world.primary.claim(world.store)


def test_reader_of_the_replica_holds_it_off_and_it_goes_on_after(world: World) -> None:
    with world.home.shared(), pytest.raises(Locked) as caught:
        fail_over(world.home, "unplanned", NOW)
    assert "goes on" in (caught.value.hint or "")
    assert failover_status(world.home).unfinished == "unplanned: finish"
    with pytest.raises(Fenced):
        world.primary.claim(world.store)
    assert fail_over(world.home, "unplanned", NOW).state == "FailedOverWaitingCompletion"
    assert world.active() == world.latest


def test_cut_failover_is_cancelled_as_a_whole_one(world: World) -> None:
    with world.home.shared(), pytest.raises(Locked):
        fail_over(world.home, "unplanned", NOW)
    assert cancel(world.home, Wish(wait_s=0.0)) == AT_WORK
    world.primary.claim(world.store).apply()


def test_unknown_points_are_told(world: World) -> None:
    for point, words in ((guid(9), "no point"), (LATEST_APP, "application-consistent")):
        with pytest.raises(NoSuchPoint, match=words):
            fail_over(world.home, "unplanned", Wish(point, wait_s=0.0))
    assert world.home.failover() == AT_WORK


def test_vm_without_a_point_has_nothing_to_fail_over_to() -> None:
    with ram_folder() as root:
        files, clock = FaultFiles(root), FakeClock()
        with Store.create_or_open(files, root, clock=clock) as store:
            Primary(clock, [small_disk(0, 1)]).claim(store)
            with pytest.raises(NoSuchPoint, match="no point yet"):
                fail_over(store.home("web01"), "unplanned", NOW)
            assert store.home("web01").failover() == AT_WORK


def test_server_that_starts_leaves_a_failed_over_vm_alone(world: World) -> None:
    fail_over(world.home, "unplanned", NOW)
    shown = world.active()
    world.store.close()
    world.store = Store.create_or_open(world.files, world.root, clock=world.clock)
    assert [vm.error for vm in world.store.recover()] == [None]
    assert world.active() == shown


def test_server_that_starts_lets_no_point_go_while_an_older_one_is_on_trial(world: World) -> None:
    oldest = world.store.points("web01")[0]
    fail_over(world.home, "unplanned", Wish(uuid.UUID(oldest.id), wait_s=0.0))
    kept = [point.id for point in world.store.points("web01")]
    world.store.set_policy("web01", PointPolicy(recovery_points=0))
    world.store.close()
    world.store = Store.create_or_open(world.files, world.root, clock=world.clock)
    assert [vm.error for vm in world.store.recover()] == [None]
    assert [point.id for point in world.store.points("web01")] == kept


def test_status_names_the_disks_to_run_and_what_may_follow(world: World) -> None:
    fail_over(world.home, "unplanned", NOW)
    world.run_vm()
    status = failover_status(world.home)
    assert [disk.path for disk in status.disks] == [str(world.home.paths.active(index)) for index in (0, 1)]
    assert [disk.written_bytes for disk in status.disks] == [512, 0]
    assert status.possible == ["failover cancel", "failover commit", "failover reverse"]
    assert status.unfinished is None
    shown = world.store.status().vms[0]
    assert (shown.failover, shown.test, shown.damage) == ("FailedOverWaitingCompletion", None, [])
