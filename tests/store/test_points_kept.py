"""Older points stay exactly what they were while the disks move on, and while others of them go."""

from __future__ import annotations

import random
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from hvreplica.store import Store
from hvreplica.store.points_kept import drop_point, part_path
from hvreplica.store.policy import Policy, pack_policy
from tests.store.world import Primary, guid, ram_folder, small_disk
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles
from tests.support.points import read_point

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.store.home import VmHome

EVERY = Policy(recovery_point_every_s=0)


class Life:
    """A primary, its store, and what each point must show."""

    def __init__(self, root: Path, policy: Policy = EVERY, disks: int = 2) -> None:
        self.root = root
        self.files = FaultFiles(root)
        self.clock = FakeClock(seed=3)
        self.rng = random.Random(3)
        self.primary = Primary(self.clock, [small_disk(index, 2) for index in range(disks)])
        self.store = Store.create_or_open(self.files, root, clock=self.clock)
        self.primary.scribble(self.rng, 8)
        self.images: dict[str, dict[int, bytes]] = {}
        self.replica = self.primary.replicate(self.store)
        self.images[str(guid(100))] = self.primary.image()
        self.set_policy(policy)

    @property
    def home(self) -> VmHome:
        return self.store._known("web01")

    def set_policy(self, policy: Policy) -> None:
        with self.home.catalog.transaction():
            self.home.catalog.set_policy(self.home.vm_id, pack_policy(policy))

    def cycle(self, writes: int = 6, *, apply: bool = True, **options: Any) -> str:
        """Let the guest write and ship it; return the point's id."""
        self.primary.scribble(self.rng, writes)
        cycle = self.primary.cut(**options)
        self.primary.ship(self.replica, cycle)
        if apply:
            self.replica.apply()
        self.images[str(cycle.point_id)] = cycle.disks
        return str(cycle.point_id)

    def listed(self) -> list[str]:
        return [point.id for point in self.store.points("web01") if point.state == "complete"]

    def check(self) -> None:
        """Compare every listed point with what the primary had."""
        for point_id in self.listed():
            assert read_point(self.files, self.root, point_id, self.clock) == self.images[point_id]
        known = {part_path(self.home, part) for part in self.home.catalog.undo_rows(self.home.vm_id)}
        assert known == {path for path in self.files.files() if path.suffix in {".hru", ".vhdx"}} - {
            self.home.paths.disk(index) for index in range(64)
        }


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


def test_every_point_stays_as_it_was(root: Path) -> None:
    life = Life(root)
    made = [str(guid(100))] + [life.cycle() for _ in range(5)]
    assert life.listed() == made
    life.check()


def test_drop_of_any_point_leaves_the_others_exact() -> None:
    for gone in range(5):
        with ram_folder() as folder:
            life = Life(folder)
            made = [str(guid(100))] + [life.cycle() for _ in range(5)]
            drop_point(life.home, uuid.UUID(made[gone]))
            assert life.listed() == made[:gone] + made[gone + 1 :]
            life.check()
            life.cycle()
            life.check()


def test_drop_of_all_older_points_in_any_order_leaves_no_part(root: Path, seed: int) -> None:
    life = Life(root)
    made = [str(guid(100))] + [life.cycle() for _ in range(5)]
    older = made[:-1]
    random.Random(seed).shuffle(older)
    for point_id in older:
        drop_point(life.home, uuid.UUID(point_id))
        life.check()
    assert life.listed() == made[-1:]
    assert life.home.catalog.undo_rows(life.home.vm_id) == []
