"""Power cuts and kills while older points are made, dropped and outlive whole copies: each shows what it showed.

One trace holds cycles that are all kept, points that are dropped from the middle and from the end, and two whole copies
anew, the second over a copy that shows no single instant. At every cut each listed point must equal its image, before
the store recovers, after it, and after one more cycle.
"""

from __future__ import annotations

import random
import uuid
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from hvreplica.store import AlreadyHave, Store
from hvreplica.store.points_kept import drop_point
from tests.store.history import open_store, put_catalog
from tests.store.world import EVERY, NIL, Primary, guid, ram_folder, send_disks, send_logs, small_disk
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, Killed, crash_states
from tests.support.points import read_point

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.store import VmReplica

IS_DEEP = settings().max_examples > 1000
WORLDS_MAX, KILLS_MAX = (None, 200) if IS_DEEP else (80, 14)
STEPS = (
    "initial 100",
    "cycle",
    "cycle",
    "cycle",
    "drop 1",
    "whole 200",
    "cycle",
    "drop 0",
    "mixed 300",
    "whole 400",
    "cycle",
)


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


class Life:
    """A primary that does STEPS once, and what each point must show whatever cut it short."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock = FakeClock(seed=seed)
        self.primary = Primary(self.clock, [small_disk(0, 1), small_disk(1, 1)], policy=EVERY)
        self.images: dict[uuid.UUID, dict[int, bytes]] = {}

    def run(self, files: FaultFiles, store: Store) -> None:
        for step in STEPS:
            verb, _, number = step.partition(" ")
            self.primary.scribble(self.rng, 4)
            if verb == "drop":
                self.drop(store, int(number))
            elif verb == "cycle":
                files.acknowledge(self.cycle(self.primary.claim(store)))
            else:
                files.acknowledge(self.copy(store, int(number), consistent=verb != "mixed"))

    def drop(self, store: Store, place: int) -> None:
        points = [point.id for point in store.points("web01") if point.state == "complete"]
        drop_point(store._known("web01"), uuid.UUID(points[place]))

    def cycle(self, replica: VmReplica) -> uuid.UUID:
        """Ship a cycle; what it shows is known before a byte of it is sent."""
        cycle = self.primary.cut()
        self.images[cycle.point_id] = cycle.disks
        sink = self.primary.begin_logs(replica, cycle)
        assert not isinstance(sink, AlreadyHave)
        send_logs(sink, cycle)
        sink.commit()
        replica.apply()
        return cycle.point_id

    def copy(self, store: Store, number: int, *, consistent: bool) -> uuid.UUID:
        self.images[guid(number)] = image = self.primary.image()
        sink = self.primary.begin_initial(self.primary.claim(store), number, consistent=consistent)
        assert not isinstance(sink, AlreadyHave)
        send_disks(sink, image)
        point_id = sink.commit()
        self.primary.last_point = guid(number)
        self.primary.last_log = dict.fromkeys(self.primary.last_log, NIL)
        self.primary.changes = {index: [] for index in self.primary.changes}
        return point_id

    def check(self, world: FaultFiles, root: Path, store: Store) -> None:
        """Refuse a listed point that is damaged or shows anything else than it did."""
        for point in store.points("web01") if store.status().vms else []:
            assert point.state != "damaged", world.story
            if point.state == "complete":
                found = read_point(world, root, point.id, self.clock)
                assert found == self.images[uuid.UUID(point.id)], (point.id, world.story)

    def go_on(self, world: FaultFiles, root: Path) -> None:
        """Restart on what a cut left, and let another primary make one more cycle of it."""
        heir = Life(77)
        heir.images = self.images = dict(self.images)
        with open_store(world, root, FakeClock(seed=77)) as store:
            self.check(world, root, store)
            assert [vm.error for vm in store.recover() if vm.error] == [], world.story
            self.check(world, root, store)
            heir.primary.generation = 1000
            if not store.status().vms or heir.primary.claim(store).last_point is None:
                heir.copy(store, 900, consistent=True)
            replica = heir.primary.claim(store)
            heir.primary.last_point = replica.last_point
            assert replica.last_point is not None
            heir.primary.disks = {
                index: bytearray(data) for index, data in self.images[replica.last_point].items()
            }
            heir.primary.last_log = {row.spec.index: row.last_log_id for row in replica.disks}
            heir.primary.scribble(heir.rng, 4)
            heir.cycle(replica)
            self.check(world, root, store)
            stale = [
                path for path in world.files() if path.suffix in {".partial", ".tmp"} or path.suffix == ".hrl"
            ]
            assert stale == [], world.story
            rows = store._parts.catalog.undo_rows(1)
            files = [path for path in world.files() if path.parent.name == "points" and path.suffix != ".use"]
            assert len(files) == len(rows), world.story


def record(life: Life, root: Path) -> FaultFiles:
    files = FaultFiles(root)
    with open_store(files, root, life.clock) as store:
        life.run(files, store)
        life.check(files, root, store)
        assert len([point for point in store.points("web01") if point.state == "complete"]) == 6
    return files


def test_power_cut_anywhere_leaves_every_listed_point_as_it_was(root: Path, seed: int) -> None:
    life = Life(seed)
    trace = record(life, root).trace()
    count = 0
    for _, world in crash_states(trace, seed=seed, subsets_per_prefix=4, limit=WORLDS_MAX, distinct=True):
        put_catalog(root, world.last_note("catalog"))
        life.go_on(world, root)
        count += 1
    assert count > 30


def test_kill_anywhere_leaves_every_listed_point_as_it_was(root: Path, seed: int) -> None:
    steps = len(record(Life(seed + 1), root).trace())
    rng = random.Random(seed)
    for step in sorted(rng.sample(range(1, steps), KILLS_MAX)):
        put_catalog(root, None)
        files = FaultFiles(root)
        files.kill_at(step)
        life = Life(seed + 1)
        with pytest.raises(Killed):
            life.run(files, open_store(files, root, life.clock))
        life.go_on(files.after_kill(), root)
