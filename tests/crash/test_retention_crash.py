"""Power cuts and kills at every step of letting points go and of writing their parts anew.

A store with a point at every cycle stands durable. Then points between others are deleted, so that the oldest one
inherits their parts and those are trimmed and merged, and a rule lets more go. Whatever is left by a cut, each point
that is listed equals what the primary had, and going on ends at the same points.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from hvreplica.formats.messages import PointPolicy
from hvreplica.store.part_plan import MERGE_MIN
from hvreplica.store.retain import retain
from tests.store.history import History, open_store, put_catalog
from tests.store.world import EVERY, ram_folder
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, Killed, crash_states

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.store import Store

CYCLES = MERGE_MIN + 3
IS_DEEP = settings().max_examples > 1000
WORLDS_MAX, KILLS_MAX = (None, 200) if IS_DEEP else (54, 12)


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


class Shrinking:
    """A store with many points, and what lets them go."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.history = History(seed, cycles=CYCLES, policy=EVERY)
        files = FaultFiles(root)
        with open_store(files, root, self.history.clock) as store:
            self.history.run(files, store)
        self.files = files
        self.snapshot = files.last_note("catalog")
        self.points = list(self.history.images)
        self.between = self.points[1 : MERGE_MIN + 1]

    def start(self) -> FaultFiles:
        """Return the store as it stood before anything went, durable."""
        put_catalog(self.root, self.snapshot)
        return self.files.after_kill()

    def shrink(self, store: Store) -> None:
        """Let points go, those that are there still."""
        for point_id in self.between:
            if str(point_id) in self.listed(store):
                store.delete_points("web01", [point_id])
        store.set_policy("web01", PointPolicy(keep="last 2"))
        retain(store._known("web01"))

    def listed(self, store: Store) -> list[str]:
        return [point.id for point in store.points("web01") if point.state == "complete"]

    def check(self, world: FaultFiles) -> None:
        """Restart on what a cut left, and let the rest go."""
        with open_store(world, self.root, FakeClock(seed=99)) as store:
            self.history.check_listed(world, self.root, store)
            assert {str(point_id) for point_id in self.points[-2:]} <= set(self.listed(store))
            assert [vm.error for vm in store.recover() if vm.error] == [], world.story
            self.check_files(world, store)
            self.shrink(store)
            assert self.listed(store) == [str(point_id) for point_id in self.points[-2:]]
            self.history.check_listed(world, self.root, store)
            self.check_files(world, store)

    def check_files(self, world: FaultFiles, store: Store) -> None:
        """Hold the folder to the parts that the catalog names."""
        home = store._known("web01")
        names = {f"{row.id}.hru" for row in home.catalog.undo_rows(home.vm_id)}
        names |= {home.paths.use(uuid.UUID(point_id)).name for point_id in self.listed(store)}
        found = {path.name for path in world.files() if path.parent.name == "points"}
        assert {name for name in names if name.endswith(".hru")} <= found <= names, world.story


def test_power_cut_anywhere_spoils_no_point(root: Path, seed: int) -> None:
    life = Shrinking(root, seed)
    files = life.start()
    with open_store(files, root, FakeClock(seed=5)) as store:
        life.shrink(store)
    count = 0
    for _, world in crash_states(
        files.trace(), seed=seed, subsets_per_prefix=3, limit=WORLDS_MAX, distinct=True
    ):
        put_catalog(root, world.last_note("catalog", life.snapshot))
        life.check(world)
        count += 1
    assert count > 18


def test_kill_anywhere_spoils_no_point(root: Path, seed: int) -> None:
    life = Shrinking(root, seed + 1)
    files = life.start()
    with open_store(files, root, FakeClock(seed=5)) as store:
        life.shrink(store)
        assert life.listed(store) == [str(point_id) for point_id in life.points[-2:]]
    steps = len(files.trace())
    for step in range(1, steps, max(steps // KILLS_MAX, 1)):
        files = life.start()
        files.kill_at(step)
        with pytest.raises(Killed):
            life.shrink(open_store(files, root, FakeClock(seed=step)))
        life.check(files.after_kill())


def test_the_oldest_point_inherits_and_its_parts_stay_few(root: Path, seed: int) -> None:
    life = Shrinking(root, seed + 2)
    files = life.start()
    with open_store(files, root, FakeClock(seed=5)) as store:
        home = store._known("web01")
        gone = store.delete_points("web01", life.between)
        assert [uuid.UUID(point.id) for point in gone] == life.between
        for disk_index in (0, 1):
            rows = home.catalog.undo_rows(home.vm_id, point_id=life.points[0], disk_index=disk_index)
            assert 1 <= len(rows) < MERGE_MIN
        life.history.check_listed(files, root, store)
        life.check_files(files, store)
