"""Test failovers: one at a time, of a point that stays, removed as a whole and only when nobody serves them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from hvreplica.errors import InvalidTransition, Locked, NoSuchPoint
from hvreplica.store.failover import AT_WORK, pinned_points
from hvreplica.store.failover_status import failover_status
from hvreplica.store.firedrill import begin_firedrill, end_firedrill, firedrill_lock
from hvreplica.store.open_point import LATEST
from hvreplica.store.promotion import Wish, fail_over
from tests.store.failover_world import World
from tests.store.world import guid, ram_folder

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator


@pytest.fixture
def world(rng: random.Random) -> Iterator[World]:
    with ram_folder() as root, contextlib.ExitStack() as stack:
        made = World(root, rng)
        stack.callback(made.store.close)
        yield made


def test_begins_on_the_newest_point_that_was_applied_and_holds_it(world: World) -> None:
    test = begin_firedrill(world.home, None)
    assert test.point == list(world.images)[1]  # the newest one waits to be applied
    assert test.disks == [0, 1]
    assert pinned_points(world.home.failover()) == {test.point}


def test_replication_goes_on_beside_it(world: World) -> None:
    begin_firedrill(world.home, None)
    world.cycle()
    assert world.replica.apply() == list(world.images)[-1]
    assert world.home.failover().test is not None


def test_goes_on_with_the_one_there_is_and_refuses_a_second(world: World) -> None:
    first = begin_firedrill(world.home, LATEST)
    assert begin_firedrill(world.home, None) == first
    assert begin_firedrill(world.home, first.point) == first
    world.replica.apply()
    with pytest.raises(InvalidTransition, match="test failover already"):
        begin_firedrill(world.home, LATEST)


def test_unknown_point_begins_nothing(world: World) -> None:
    with pytest.raises(NoSuchPoint):
        begin_firedrill(world.home, guid(9))
    assert world.home.failover() == AT_WORK


def test_cleanup_waits_for_who_serves_it_and_removes_all(world: World) -> None:
    assert not end_firedrill(world.home)
    begin_firedrill(world.home, None)
    with firedrill_lock(world.home):
        assert failover_status(world.home).test.served  # type: ignore[union-attr]
        with pytest.raises(Locked, match="holds this lock") as caught:
            end_firedrill(world.home)
        assert "serves the test failover" in (caught.value.hint or "")
    world.files.open(world.home.paths.test(0), create=True).close()
    world.files.open(world.home.paths.test(1).with_suffix(".tmp"), create=True).close()
    assert not failover_status(world.home).test.served  # type: ignore[union-attr]
    assert end_firedrill(world.home)
    assert [path.name for path in world.files.files() if path.parent.name == "test"] == ["lock"]
    assert world.home.failover() == AT_WORK


def test_cut_cleanup_is_called_again_before_another_test(world: World) -> None:
    with firedrill_lock(world.home):
        begin_firedrill(world.home, None)
    world.files.open(world.home.paths.test(0), create=True).close()
    world.files.fail("unlink", path="*/test/*")
    with pytest.raises(OSError, match="Input/output"):
        end_firedrill(world.home)
    world.files.heal()
    with pytest.raises(InvalidTransition, match="being removed"):
        begin_firedrill(world.home, None)
    assert end_firedrill(world.home)


def test_failover_and_its_end_leave_the_test_alone(world: World) -> None:
    test = begin_firedrill(world.home, None)
    fail_over(world.home, "unplanned", Wish(LATEST, wait_s=0.0))
    assert world.home.failover().test == test
    status = failover_status(world.home)
    assert status.test is not None
    assert (status.test.state, status.test.mode) == ("FiredrillInProgress", "TestReplica")
    assert end_firedrill(world.home)
    assert world.home.failover().state == "FailedOverWaitingCompletion"
