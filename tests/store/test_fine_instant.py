"""Points of parts of seconds and of a guest's flushes, and what is left where the times of logs are lost."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from hvreplica.errors import NoSuchPoint
from hvreplica.store import Store
from hvreplica.store.at_instant import Instant, reach, shown_by
from hvreplica.store.moment import SECOND_US, micros, reach_us
from hvreplica.store.pace import Pace
from hvreplica.store.points_kept import drop_point
from hvreplica.store.policy import Policy
from hvreplica.store.retain import retain
from tests.store.instant_world import InstantWorld
from tests.store.world import INSTANT_S, ram_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hvreplica.store.status import MadePoint

SLOTS = (1000, 2000, 10_000)


@pytest.fixture
def world(seed: int) -> Iterator[InstantWorld]:
    with ram_folder() as root:
        world = InstantWorld(root, seed, slots=SLOTS)
        yield world
        world.store.close()


def make(world: InstantWorld, instant_s: float, *, flush: bool = False) -> MadePoint:
    """Make a point of an instant, and hold what is told of it to the writes of its cycle."""
    made = world.store.make_point_at("web01", instant_s, flush=flush)
    assert made.instant_s <= instant_s + 1e-6
    if made.entries is not None:
        began_s = max(at for at in world.points_s if at <= made.instant_s)
        own = [at for at, *_ in world.writes if began_s < at and micros(at) <= micros(made.instant_s)]
        assert made.entries == len(own)
    return made


def test_points_of_parts_of_seconds_have_just_what_was_written_by_then(world: InstantWorld) -> None:
    for _ in range(2):
        world.cycle(14)
    end_s = world.points_s[-1]
    wanted = [world.rng.uniform(INSTANT_S + 1, end_s) for _ in range(3)]
    wanted += [at + step for at, *_ in world.rng.sample(world.writes, 2) for step in (-1e-6, 0)]
    world.rng.shuffle(wanted)
    for instant_s in wanted:
        made = make(world, instant_s)
        assert instant_s - made.instant_s <= max(SLOTS) / SECOND_US or made.instant_s in world.points_s
    for second in world.rng.sample(range(int(INSTANT_S) + 1, int(end_s)), 2):
        world.make(second)  # beside them, before and behind
    world.check()
    times = [reach_us(point.instant_s, point.kind) for point in world.store.points("web01")]
    assert times == sorted(times)
    assert make(world, wanted[0]).id == make(world, wanted[0]).id
    world.cycle()
    world.check()


def test_flush_is_the_last_one_the_guest_asked_for(world: InstantWorld) -> None:
    for _ in range(3):
        world.cycle(14)
    for _ in range(6):
        instant_s = world.rng.uniform(world.flushes[0], world.points_s[-1])
        made = make(world, instant_s, flush=True)
        assert made.is_flush
        flushed_us = max(at for at in map(micros, world.flushes) if at <= micros(instant_s))
        if made.instant_s in world.points_s:  # that has all: nothing was written until the flush
            assert world.at(made.instant_s, made.kind) == world.at(flushed_us / SECOND_US)
        else:
            assert micros(made.instant_s) == flushed_us
    world.check()
    with pytest.raises(NoSuchPoint, match="no flush of the guest is known"):
        make(world, world.flushes[0] - 1e-5, flush=True)


@pytest.mark.parametrize("damage", ["lost", "cut", "changed", "foreign"])
def test_without_times_the_second_before_is_taken(
    world: InstantWorld, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.cycle(14)
    world.cycle(14)
    home = world.home
    rows = [row for row in home.catalog.kept_logs(home.vm_id) if row.instant_s == world.points_s[-1]]
    path = world.home.paths.kept_times(rows[0].log_id)
    content = world.files.content_of(path)
    if damage == "lost":
        world.files.unlink(path)
    elif damage == "foreign":
        others = [at for at in home.files.names(home.paths.logs) if at.endswith(".hrt") and at != path.name]
        world.files.load(path, world.files.content_of(home.paths.logs / others[0]))
    else:
        world.files.load(path, content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    verdict = world.store.verify("web01", Pace(world.clock, lambda _: False))
    assert not verdict.is_damaged
    assert not verdict.vms[0].unknown_files
    assert (damage == "lost") != ("the times of a log cannot be read" in caplog.text), "verify says so"
    caplog.clear()
    instant_s = world.points_s[-1] - 2.3
    made = make(world, instant_s)
    assert made.note is not None
    assert (damage == "lost") != ("the times of a log cannot be read" in caplog.text)
    assert made.instant_s == (int(instant_s * SECOND_US + 1) // SECOND_US * SECOND_US - 1) / SECOND_US
    assert make(world, instant_s).id == made.id
    world.check()
    spans = world.store.instant_spans("web01")
    assert [span.step_s for span in spans][1:] == [1.0]
    assert spans[0].step_s in {slot / SECOND_US for slot in SLOTS}


def test_verb_that_is_called_again_finds_the_point_of_its_instant(world: InstantWorld) -> None:
    """The point shows the last known moment, which is seldom the very instant."""
    world.cycle(14)
    home = world.home
    instant = Instant(world.points_s[-1] - 2.3)
    assert shown_by(home, instant, *(point.id for point in home.catalog.points(home.vm_id))) is None
    row = reach(home, instant)
    assert row.instant_s < instant.unix_s
    assert shown_by(home, instant, None, row.id) == row
    assert reach(home, instant) == row
    assert shown_by(home, Instant(instant.unix_s + 0.02), row.id) is None, "slots are shorter"
    assert shown_by(home, Instant(row.instant_s - 0.02), row.id) is None


def test_times_live_as_long_as_their_logs(world: InstantWorld) -> None:
    first = world.cycle(apply=False)
    home = world.home
    known = sorted(f"{row}.hrt" for row in world.times)
    assert [name for name in home.files.names(home.paths.spool) if name.endswith(".hrt")] == known
    world.store.close()
    world.store = Store.create_or_open(world.files, world.root, clock=world.clock)
    world.replica = world.primary.claim(world.store)
    world.replica.apply()
    home = world.home
    assert sorted(at for at in home.files.names(home.paths.logs) if at.endswith(".hrt")) == known
    assert home.files.names(home.paths.spool) == []
    make(world, world.points[first] - 2.1)
    world.check()
    world.clock.advance(4000)
    retain(home)
    assert home.files.names(home.paths.logs) == []
    world.set_policy(Policy(recovery_point_every_s=0))
    world.cycle()
    assert home.files.names(home.paths.spool) == home.files.names(home.paths.logs) == []


def test_store_without_room_for_times_takes_the_cycle(
    world: InstantWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world.files.fail("write", path="*.hrt*", error=errno.ENOSPC)
    first = world.cycle()
    assert "the parts of seconds of a log are not kept" in caplog.text
    assert [span.step_s for span in world.store.instant_spans("web01")] == [1.0]
    world.make(int(world.points[first]) - 2)
    world.check()


def test_spans_say_which_instants_there_are(world: InstantWorld) -> None:
    first = world.cycle()
    second = world.cycle(ordered=False)
    third = world.cycle()
    spans = world.store.instant_spans("web01")
    assert [span.point for span in spans] == [str(first), str(second), str(third)]
    assert [(span.from_s, span.to_s) for span in spans] == list(
        zip(world.points_s, world.points_s[1:], strict=False)
    )
    assert spans[1].step_s is None
    assert "in the order of the guest's writes" in str(spans[1].reason)
    for span in (spans[0], spans[2]):
        assert span.reason is None
        assert span.flushes == sum(span.from_s < at <= span.to_s for at in world.flushes)
    drop_point(world.home, second)
    make(world, world.points[third] - 2.1)
    world.check()


@pytest.mark.parametrize("slots", [(), SLOTS], ids=["seconds", "parts"])
def test_whole_second_has_what_was_written_after_a_cut_in_it(seed: int, slots: tuple[int, ...]) -> None:
    """Its point is in the cycle that has its end; before that was received there is none of it."""
    with ram_folder() as root:
        world = InstantWorld(root, seed, slots=slots)
        world.apart_s = 0.001  # in the same second, nearly always
        for _ in range(3):
            world.cycle(6)
            cut_second = int(world.points_s[-1])
            with pytest.raises(NoSuchPoint, match="that second was received up to"):
                world.store.make_point_at("web01", cut_second)
            world.clock.advance(0.25)
            world.primary.write(0, 4096, world.rng.randbytes(512))
            world.writes.append((world.clock.now_s(), 0, 4096, world.primary.image()[0][4096:4608]))
            assert int(world.clock.now_s()) == cut_second
            world.cycle(6)
            if int(world.points_s[-1]) > cut_second:
                world.make(cut_second)
            world.check()
        world.store.close()
