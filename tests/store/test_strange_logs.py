"""Logs that do not belong: out of sequence, sent twice, another VM's, an older primary's, damaged.

Each is refused by name, to a store that keeps older points, and nothing of it changes: no point, no undo part, no
byte of a disk. The log that was due is then taken as ever.
"""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, NamedTuple

import pytest

from hvreplica.errors import ChainBroken, ChecksumMismatch, Fenced, FieldOutOfRange, HvReplicaError
from hvreplica.store import AlreadyHave, LogSpec, Store
from hvreplica.store.open_point import open_point
from tests.store.failover_world import read_whole
from tests.store.world import EVERY, Cycle, Primary, guid, ram_folder, send_logs, small_disk
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class World:
    """A VM with two disks and four points at its replica, and the cycle that is due."""

    def __init__(self, root: Path, seed: int) -> None:
        self.files = FaultFiles(root)
        self.rng = random.Random(seed)
        self.primary = Primary(FakeClock(seed=3), [small_disk(0, 1), small_disk(1, 1)], policy=EVERY)
        self.primary.scribble(self.rng, 6)
        self.store = Store.create_or_open(self.files, root, clock=self.primary.clock)
        self.replica = self.primary.replicate(self.store)
        self.applied: list[Cycle] = []
        for _ in range(3):
            self.applied.append(self.next())
            self.primary.ship(self.replica, self.applied[-1])
            self.replica.apply()
        self.due = self.next()

    def next(self) -> Cycle:
        """Let the guest write to both disks, and cut."""
        for index in (0, 1):
            self.primary.write(index, 4096 * self.rng.randrange(200), self.rng.randbytes(9216))
        return self.primary.cut()

    def send(self, cycle: Cycle) -> None:
        """Do what a primary does with a cycle."""
        sink = self.primary.begin_logs(self.replica, cycle)
        assert not isinstance(sink, AlreadyHave)
        send_logs(sink, cycle)
        sink.commit()
        self.replica.apply()

    def seen(self) -> object:
        """Return all that must not change."""
        home = self.store.home("web01")
        shown = {}
        for point in home.catalog.points(home.vm_id):
            if point.is_kept:
                with open_point(home, point.id) as opened:
                    shown[point.id] = {index: read_whole(disk) for index, disk in opened.disks.items()}
        kept = {path for path in self.files.files() if path.parent.name in {"disks", "points"}}
        files = {path: self.files.content_of(path) for path in kept if path.suffix != ".use"}
        return home.catalog.points(home.vm_id, superseded=True), home.catalog.undo_rows(1), shown, files


@pytest.fixture
def world(seed: int) -> Iterator[World]:
    with ram_folder() as root:
        made = World(root, seed)
        yield made
        made.store.close()


def skipping(world: World) -> None:
    """Send the cycle after the one that is due."""
    world.send(world.next())


def wrong_previous_log(world: World) -> None:
    """Send a log that follows another one than the last of its disk."""
    log, *others = world.due.logs
    world.send(
        dataclasses.replace(world.due, logs=[dataclasses.replace(log, previous_log_id=guid(7)), *others])
    )


def older_again(world: World) -> None:
    """Send a cycle that was applied, and others after it."""
    world.send(world.applied[0])


def older_under_a_new_name(world: World) -> None:
    """Send the logs of an older cycle as a new one behind the newest point."""
    old = world.applied[1]
    newest = world.applied[-1].point_id
    world.send(dataclasses.replace(old, transfer_id=guid(50), point_id=guid(51), previous_point_id=newest))


def log_of_another_disk(world: World) -> None:
    """Send the bytes of one disk's log in the place of the other's."""
    first, second = world.due.logs
    logs = [
        LogSpec(first.disk_index, first.log_id, first.previous_log_id, second.log_bytes),
        LogSpec(second.disk_index, second.log_id, second.previous_log_id, first.log_bytes),
    ]
    world.send(dataclasses.replace(world.due, logs=logs, contents=world.due.contents[::-1]))


def log_of_another_vm(world: World) -> None:
    """Send a log that another VM's primary wrote, announced as the one that is due."""
    other = Primary(FakeClock(seed=9), [small_disk(0, 1), small_disk(1, 1)], vm="web02")
    other.last_point = guid(100)
    other.write(0, 0, b"x" * 512)
    other.write(1, 0, b"y" * 512)
    foreign = other.cut()
    logs = [
        LogSpec(log.disk_index, log.log_id, log.previous_log_id, strange.log_bytes)
        for log, strange in zip(world.due.logs, foreign.logs, strict=True)
    ]
    world.send(dataclasses.replace(world.due, logs=logs, contents=foreign.contents))


def damaged(world: World) -> None:
    """Send a log with a byte that changed on its way to the disk that it was read from."""
    content = bytearray(world.due.contents[0])
    content[9000] ^= 1
    world.send(dataclasses.replace(world.due, contents=[bytes(content), *world.due.contents[1:]]))


def beyond_the_disk(world: World) -> None:
    """Send a cycle of disks that are smaller than what its logs write."""
    sizes = {index: content[:512] for index, content in world.due.disks.items()}
    world.send(dataclasses.replace(world.due, disks=sizes))


def older_session(world: World) -> None:
    """Send from a primary that was fenced by a newer one, in its open session."""
    dataclasses.replace(world.primary, generation=9).claim(world.store).close()
    world.send(world.due)


def older_claim(world: World) -> None:
    """Claim by a primary with a state folder from a backup."""
    dataclasses.replace(world.primary, generation=0, has_claimed=False).claim(world.store)


def another_relationship(world: World) -> None:
    """Claim by a primary of another life with the same generation."""
    dataclasses.replace(world.primary, relationship_id=guid(2), has_claimed=False).claim(world.store)


class Strange(NamedTuple):
    """What comes, and how it is refused."""

    act: Callable[[World], None]
    error: type[HvReplicaError]
    words: str


@pytest.mark.parametrize(
    "strange",
    [
        Strange(skipping, ChainBroken, "previous_point_id"),
        Strange(wrong_previous_log, ChainBroken, "previous_log_id"),
        Strange(older_again, ChainBroken, "long ago"),
        Strange(older_under_a_new_name, ChainBroken, "previous_log_id"),
        Strange(log_of_another_disk, FieldOutOfRange, "UniqueId"),
        Strange(log_of_another_vm, FieldOutOfRange, "UniqueId"),
        Strange(damaged, ChecksumMismatch, "disk offset"),
        Strange(beyond_the_disk, FieldOutOfRange, "beyond the disk"),
        Strange(older_session, Fenced, "newer session"),
        Strange(older_claim, Fenced, "generation"),
        Strange(another_relationship, Fenced, str(guid(1))),
    ],
    ids=lambda strange: strange.act.__name__,
)
def test_log_that_does_not_belong_is_refused_by_name_and_changes_nothing(
    world: World, strange: Strange
) -> None:
    before = world.seen()
    with pytest.raises(strange.error) as caught:
        strange.act(world)
    assert strange.words in str(caught.value)
    assert world.seen() == before
    world.primary.generation = 20
    world.replica = world.primary.claim(world.store)
    assert world.seen() == before
    if strange.act is skipping:
        return  # the log that was due is lost with the one after it
    world.send(world.due)
    assert world.replica.last_point == world.due.point_id


def test_newest_cycle_again_is_answered_as_before_and_changes_nothing(world: World) -> None:
    before = world.seen()
    found = world.primary.begin_logs(world.replica, world.applied[-1])
    assert isinstance(found, AlreadyHave)
    assert found.point_id == world.applied[-1].point_id
    assert world.replica.apply() == world.applied[-1].point_id
    assert world.seen() == before
